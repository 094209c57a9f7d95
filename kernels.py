"""quartet.py in Triton: the same quantizers, to the bit, with one look at each value. (The sums of a rotation
come from tensor cores, and their last bits may differ.)

    python kernels.py [--json=FILE]                     check against quartet.py, and time, on this GPU
    python kernels.py --target=sm_100a [--dump=DIR]     count what it takes on a GPU that need not be here

Read quartet.py first: what a function computes is explained there. Functions that a comment here calls
quartet's do the same, and the order is nearly that of quartet.py.

A block of 16 values is final after one look at it, scale included, because the tensor scale is a power of
two. So one kernel reads values and writes codes, block scales of 4 significant bits (as bf16, which holds
them), and the largest scale of all. A second one, over a sixteenth of the data, chooses the tensor scale and
encodes the block scales as E4M3.

What a GEMM takes depends on the GPU. FP4 tensor cores (compute capability 10 and up) take codes and encoded
scales. (Section 10 of quartet.py says how they add.) Elsewhere the first kernel also writes the decoded
values, which bf16 holds exactly, and cuBLAS multiplies those. With train_gpt.py's --gemm=blackwell a kernel
multiplies them instead, and adds as FP4 tensor cores do.
"""
import math
import os
import runpy
import sys
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library
from triton import cdiv, jit

import quartet
from quartet import BLOCK, GROUP, NVFP4


# To add a quantizer that quartet.py has: a row here, a branch in `quantize_blocks` (section 5), and a line
# for its name (section 8).

class Mode(NamedTuple):
    """What a quantizer of quartet.py asks of the kernels, beside its branch in `quantize_blocks`."""
    noise: int = 0          # random numbers it takes for each block; those for sub-normal scales come after
    warps: int = 4          # of quantize_kernel


MODES = {
    "rtn": Mode(),
    "four_six": Mode(),
    "scale_search": Mode(warps=8),       # with 4, in 16x16 blocks, it takes up to 255 registers
    "sr": Mode(noise=BLOCK),
    "ms_eden": Mode(noise=1),
    "ms_eden_46": Mode(noise=1),
}

# Kernels see constants only as constexpr. Their arguments in capitals, but for the sizes M, N, K and the
# matrix R, are constants, too: known when a kernel is compiled, so that an `if` on them leaves one branch.
# INTERPRET: kernels run in Python, on a CPU (TRITON_INTERPRET=1).
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
EXPONENT = tl.constexpr(quartet.EXPONENT)
TINY = tl.constexpr(quartet.TINY)
SR_MAX = tl.constexpr(quartet.SR_MAX)
EDEN_MAX = tl.constexpr(quartet.EDEN_MAX)
PHILOX_ROUNDS = tl.constexpr(quartet.PHILOX_ROUNDS)
SEARCH = tl.constexpr(quartet.SEARCH)
SEARCHED = tl.constexpr(len(quartet.SEARCH))
MAGIC = tl.constexpr(1.5 * 2.0**23)      # added and taken away, it rounds to whole numbers: see round_to_grid
TWO_THIRDS = tl.constexpr(2 / 3)


# ---- 1. The two small floats -------------------------------------------------------------------------------
#
# Bits of float32: sign 31, exponent 30 to 23, mantissa 22 to 0. A power of two has a mantissa of zeros, so
# adding n << 23 to its bits multiplies it by 2^n. A scale of 4 significant bits has its last one in bit 20.

@jit
def bits(v):
    """v (...) float32 -> its bits, int32."""
    return v.to(tl.int32, bitcast=True)


@jit
def down(N):
    """0 to N - 1 as a column, (N, 1) int32."""
    return tl.arange(0, N)[:, None]


@jit
def across(N):
    """0 to N - 1 as a row, (1, N) int32."""
    return tl.arange(0, N)[None, :]


@jit
def from_bits(i):
    """Bits i (...) int32 -> float32."""
    return i.to(tl.float32, bitcast=True)


@jit
def power_of_two_below(v):
    """quartet.power_of_two_below."""
    return from_bits(bits(v) & EXPONENT)


@jit
def inverse(p):
    """1 / p of p (...) float32, powers of two in [2^-126, 2^126]: exact. Example: 4 -> 0.25."""
    return from_bits(0x7F000000 - bits(p))             # exponents add up to 254, twice the bias


@jit
def e2m1(v):
    """quartet.e2m1 to nearest, of v (...) with |v| < 7. Beyond, the result may exceed 6."""
    # The spacing is half of p, a power of two. Adding 1.5 * 2^23 spacings rounds v to whole spacings, and
    # taking them away leaves those; MAGIC / 2 * p is exact.
    p = power_of_two_below(tl.maximum(tl.abs(v), 1.0))
    return tl.fma(p, -MAGIC / 2, tl.fma(p, MAGIC / 2, v))


@jit
def round_to_grid(v, u, SPACING, LEAST):
    """quartet.round_to_grid, stochastic, of v (...) within range.

    SPACING: between neighbours from 1 to 2. LEAST: the bits of the smallest normal number, below which the
    spacing does not shrink.
    """
    spacing = SPACING * from_bits(tl.maximum(bits(v) & EXPONENT, LEAST))
    n = v * inverse(spacing)
    floor = tl.floor(n)
    return (floor + (u < n - floor).to(tl.float32)) * spacing


@jit
def round_scale(s):
    """quartet.round_scale to nearest, of s (B, 1): 0, a normal number, or NaN."""
    magic = power_of_two_below(s) * (MAGIC / 8)        # the spacing is an eighth of the power below
    return s + magic - magic


@jit
def round_scale_by(s, word):
    """quartet.round_scale, stochastic, of finite s (B, 1) >= 0; word (B, 1) uint32, random.

    u is the top 24 bits of word, of which the first 20 decide: u is less than the fraction, which is the last
    20 bits of s, if and only if this sum carries into bit 20.
    """
    return from_bits(bits(s) + (0xFFFFF - (word >> 12).to(tl.int32)) & -0x100000)


# ---- 2. NVFP4 tensors --------------------------------------------------------------------------------------
#
# From here on, b is (B, 16) float32: B blocks, one a row. Of bf16 and of rotated tiles one thread owns a row,
# so that what concerns a block needs no other thread. The layout of loads and tensor-core products is
# arranged for that (section 6).

# PTX: eight values, $1 to $8, become eight codes in the word $0. An instruction makes a byte of two values,
# and its second operand becomes the low half.
E2M1_PAIRS = tl.constexpr(
    "{ .reg .b8 a, b, c, d; "
    "cvt.rn.satfinite.e2m1x2.f32 a, $2, $1; "
    "cvt.rn.satfinite.e2m1x2.f32 b, $4, $3; "
    "cvt.rn.satfinite.e2m1x2.f32 c, $6, $5; "
    "cvt.rn.satfinite.e2m1x2.f32 d, $8, $7; "
    "mov.b32 $0, {a, b, c, d}; }")


@jit
def append(word, code):
    """word (...) uint32 with the code in the top 4 bits of code (...) put behind it: one funnel shift."""
    return word << 4 | code >> 28


@jit
def pack(q, FP4):
    """quartet.pack: q (B, 16) E2M1 values -> codes (B, 2) uint32, eight in each, the first in the lowest
    bits.

    FP4: the GPU has an instruction for two values. (It makes code 8 of -0.0, but q is never that.)
    """
    code = q
    if not FP4:
        # As a float32, q * 2^-126 has the three bits of its code in bits 22 to 24, and the sign in bit 31.
        # Times 65 = 2^6 + 1, the code moves up to bits 28 to 30, and the sign stays.
        code = (q * 2.0**-126).to(tl.uint32, bitcast=True) * 65
    # Each split parts neighbours: into even and odd columns, and so on, until eight are apart.
    even, odd = tl.split(code.reshape(q.shape[0], 2, 2, 2, 2))
    even0, even2 = tl.split(even)
    odd1, odd3 = tl.split(odd)
    v0, v4 = tl.split(even0)
    v2, v6 = tl.split(even2)
    v1, v5 = tl.split(odd1)
    v3, v7 = tl.split(odd3)
    if FP4:
        word = tl.inline_asm_elementwise(E2M1_PAIRS, "=r,f,f,f,f,f,f,f,f", [v0, v1, v2, v3, v4, v5, v6, v7],
                                         tl.uint32, True, 1)
    else:
        word = append(append(append(v7 >> 28, v6), v5), v4)
        word = append(append(append(append(word, v3), v2), v1), v0)
    return word


# PTX: words of two bf16 each, $0 = $1 * 2^126 * $2. The products are fma that add -0.0: Ampere has no others.
SCALE_PAIRS = tl.constexpr(
    "{ .reg .b32 power, zero, q; "
    "mov.b32 power, 0x7E807E80; "
    "mov.b32 zero, 0x80008000; "
    "fma.rn.bf16x2 q, $1, power, zero; "
    "fma.rn.bf16x2 $0, q, $2, zero; }")


@jit
def decode_pairs(code, scale):
    """Bytes code (...) int32, two codes each, scale (...) float32 -> words (...) int32 of their two values
    times scale, as bf16: quartet.decode. Exact where scale is 0, or at least 2^-126 and of 6 significant bits
    or fewer. (Stored scales have 4.)
    """
    # The bits of E2M1, put where bf16 has sign, exponent and mantissa, are its value times 2^-126. The first
    # code of a byte, in its low half, goes to the low half of the word. A product makes the two copies.
    copies = code * 0x00040040
    pair = copies & 0x01C001C0 | (copies & 0x02000200) << 6
    if INTERPRET:
        first = from_bits(pair << 16) * 2.0**126 * scale
        second = from_bits(pair & -0x10000) * 2.0**126 * scale
        pair = bits(first) >> 16 & 0xFFFF | bits(second)
    else:
        both = bits(scale) | bits(scale) >> 16         # as bf16, twice
        pair = tl.inline_asm_elementwise(SCALE_PAIRS, "=r,r,r", [pair, both], tl.int32, True, 1)
    return pair


# ---- 3. Blocks and scales ----------------------------------------------------------------------------------
#
# A thread holds the 16 values of a block in registers, and sums them by halves as quartet.block_sum does.
# Sums and quotients that decide something are rounded as in quartet.py: compiled without fusing products and
# sums (LAUNCH), but for the fma written here on purpose.

@jit
def tree(t, MAX):
    """t (B, 16) -> (B, 1): sums in the order of quartet.block_sum; or maxima, where NaN wins."""
    # t is 16, 8, 4 and 2 columns wide in turn: its halves are split apart and joined by one operation.
    for _ in tl.static_range(4):
        low, high = tl.split(t.reshape(t.shape[0], 2, t.shape[1] // 2).permute(0, 2, 1))
        if MAX:
            t = tl.maximum(low, high, propagate_nan=tl.PropagateNan.ALL)
        else:
            t = low + high
    return t


@jit
def over_rows(t, ROWS, MAX):
    """t (B, 1) -> (B, 1): each row gets the sum or the maximum over the ROWS rows, 1 or 16, of its block."""
    # The 16 rows of a 16x16 block give 16 values, which make a row of their own: the same tree serves again.
    if ROWS > 1:
        rows = t.reshape(t.shape[0] // ROWS, ROWS)
        t = tl.broadcast_to(tree(rows, MAX), rows.shape).reshape(t.shape)
    return t


@jit
def divide_by(a, C):
    """quartet.divide_by: a (...) / C, correctly rounded."""
    if INTERPRET:
        v = tl.div_rn(a, C)                            # numpy has no fused multiply-add
    else:
        # Markstein: if 1/C is correctly rounded, then one correction by the remainder, which fma computes
        # exactly, makes the quotient correctly rounded, too.
        v = a * (1.0 / C)
        v = tl.fma(tl.fma(-v, C, a), 1.0 / C, v)
    return v


# A division instruction would cost more than the rest of a quantizer.

@jit
def reciprocal(s):
    """1 / s, correctly rounded, of s (B, 1) in [2^-120, 2^120]. For 0 and NaN callers drop the result."""
    if INTERPRET:
        r = tl.div_rn(1.0, s)
    else:
        # One fast instruction, off by a unit in the last place at most, and one step of Newton's. Theory
        # leaves open one significand, of ones only; on an H200 all 2^23 significands came out right.
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [s], tl.float32, True, 1)
        r = tl.fma(tl.fma(-s, r, 1.0), r, r)
    return r


@jit
def divide(a, s, r):
    """a / s, correctly rounded, by the `reciprocal` r of s: Markstein's correction, as in divide_by.

    a is 0, or the quotient is in [2^-100, 2^100].
    """
    if INTERPRET:
        v = tl.div_rn(a, s)
    else:
        v = a * r
        v = tl.fma(tl.fma(-v, s, a), r, v)
    return v


# b / s in three forms. s comes from round_scale: 4 significant bits, or 0, or NaN. For 0 the result is 0, as
# in quartet.ratio; after NaN nothing of the tensor is kept.

@jit
def ratio_interpreted(b, s):
    """quartet.ratio as numpy divides: correctly rounded."""
    return tl.where(s > 0, b / s, 0.0)


@jit
def ratio_exact(b, s):
    """quartet.ratio of any float32 b (B, 16), but for last bits below 2^-100, which E2M1 does not show."""
    return divide(b, s, tl.where(s > 0, reciprocal(s), 0.0))


@jit
def ratio_of_bf16(b, s):
    """As good as quartet.ratio for e2m1, where b (B, 16) has 8 significant bits and 1/2 <= s <= 2.

    Such a b / s is a tie of E2M1, or at least 2^-8 of itself away from one. So all that must be exact are the
    ties, and b + b ((1 - s) / s) is a tie where b / s is. (b (1 / s) is not, at s = 1.875 for one.)
    """
    t = divide(1.0 - s, s, reciprocal(s))              # for each block
    # One operation for each value. A t of -1 makes the result 0, where s is 0 or NaN.
    return tl.fma(b, tl.where(s > 0, t, -1.0), b)


@jit
def ratio(b, s, BF16):
    """b (B, 16) / s (B, 1): quartet.ratio; if b holds bf16 (BF16), so near that e2m1 makes the same of it."""
    if INTERPRET:
        v = ratio_interpreted(b, s)
    elif BF16:
        v = ratio_of_bf16(b, s)
    else:
        v = ratio_exact(b, s)
    return v


# ---- 4. Noise ----------------------------------------------------------------------------------------------
#
# The same numbers as quartet.uniform's. Element i takes word i % 4 of the hash of i // 4, so a thread with a
# whole block hashes four times, and a thread with one scale throws three words away.

@jit
def philox(seed, counter):
    """quartet.philox: counter (...) int64 -> four words of its shape, uint32."""
    return tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), 0, 0, PHILOX_ROUNDS)


@jit
def random_word(seed, first, i):
    """Words (B, 1) uint32 of the elements first + i, first % 4 == 0, i (B, 1)."""
    # first // 4 + i // 4 is the counter; the last two bits of i choose the word.
    a, b, c, d = philox(seed, first // 4 + (i >> 2))
    return tl.where(i & 2 > 0, tl.where(i & 1 > 0, d, c), tl.where(i & 1 > 0, b, a))


@jit
def to_uniform(word):
    """Words (...) uint32 -> u (...) float32 in [0, 1), multiples of 2^-24."""
    return (word >> 8).to(tl.float32) * 2.0**-24


@jit
def uniform_blocks(seed, first, i):
    """u (B, 16) of the elements of blocks first + i, i (B, 1), 16 a block."""
    # Four counters a block, four words each. Joined so, the words come in the order of the elements.
    a, b, c, d = philox(seed, 4 * first + (4 * i + across(4)))
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(i.shape[0], 16)
    return to_uniform(words)


# ---- 5. The quantizers, on blocks in registers -------------------------------------------------------------
#
# In quartet.py's order of operations.

@jit
def try_scale(b, s, CLIP, ROWS, BF16):
    """Blocks b by scales s (B, 1), to nearest -> q (B, 16), s, squared errors (B, 1).

    CLIP: some b / s may exceed 7.
    """
    q = e2m1(ratio(b, s, BF16))
    if CLIP:
        q = tl.clamp(q, -6.0, 6.0)
    # q * s is exact, so one fma rounds as quartet.py's difference does.
    d = tl.fma(q, s, -b)
    return q, s, over_rows(tree(d * d, False), ROWS, False)


@jit
def better(new, old):
    """Of two results of try_scale, for each block the one of less error; ties: old."""
    q, s, error = new
    old_q, old_s, old_error = old
    less = error < old_error
    return tl.where(less, q, old_q), tl.where(less, s, old_s), tl.where(less, error, old_error)


@jit
def four_six_blocks(b, amax, ROWS, BF16):
    """quartet.four_six: b (B, 16), amax (B, 1), both in units -> q, s."""
    six = try_scale(b, round_scale(divide_by(amax, 6.0)), False, ROWS, BF16)
    four = try_scale(b, round_scale(divide_by(amax, 4.0)), False, ROWS, BF16)
    q, s, _ = better(four, six)
    return q, s


@jit
def scale_search_blocks(b, amax, ROWS, BF16):
    """quartet.scale_search: b (B, 16), amax (B, 1), both in units -> q, s."""
    six = round_scale(divide_by(amax, 6.0))
    best = try_scale(b, six, False, ROWS, BF16)        # 0 steps come first
    # Steps of E4M3 are steps of bit 20. (The sign goes: NaN may be negative.)
    code = bits(six) & 0x7FFFFFFF
    for j in tl.static_range(1, SEARCHED):
        s = from_bits(tl.where(code > 0, code + SEARCH[j] * 2**20, 0))
        best = better(try_scale(b, s, SEARCH[j] < 0, ROWS, BF16), best)
    q, s, _ = best
    return q, s


@jit
def larger_cosine(v, q6, v6):
    """quartet.larger_cosine of q6 and v rounded with amax at 4: v, q6 (B, 16), v6 = <v, q6> -> q, <v, q>."""
    # Cosines are compared by their squares, cross-multiplied: no root, no division.
    q4 = e2m1(v * TWO_THIRDS)
    v4 = tree(v * q4, False)
    four = v4 * v4 * tree(q6 * q6, False) > v6 * v6 * tree(q4 * q4, False)
    q = e2m1(v * tl.where(four, TWO_THIRDS, 1.0))      # again: to keep q4 takes 16 registers
    return q, tl.where(four, v4, v6)


@jit
def ms_eden_blocks(b, amax, unit, first, i, seed, FOUR_SIX):
    """quartet.ms_eden of rotated b (B, 16); amax (B, 1) in units -> q, s in units."""
    # Values in units of the first scale, which is not rounded: one division for a block's 16.
    s = divide_by(amax, EDEN_MAX)
    v = b * (tl.where(s > 0, reciprocal(s), 0.0) * inverse(unit))
    q = e2m1(v)

    # The EDEN factor <v, v> / <v, q>, quartet.eden_factor.
    vq = tree(v * q, False)
    if FOUR_SIX:
        q, vq = larger_cosine(v, q, vq)
    eden_factor = divide(tree(v * v, False), vq, reciprocal(vq))
    s = s * tl.where(vq > 0, eden_factor, 1.0)

    # The EDEN factor goes into the scale, and the scale is rounded stochastically. That works on integers,
    # which lose NaN: amax - amax brings it back.
    s = round_scale_by(s, random_word(seed, first, i))
    return q, s + (amax - amax)


@jit
def quantize_blocks(b, first, i, seed, QUANTIZER, ROWS, BF16):
    """b (B, 16), blocks number first + i, i (B, 1) -> E2M1 values q (B, 16), scales s (B, 1).

    QUANTIZER: of MODES, or "bf16": b and 1. ROWS neighbouring rows of b share a scale. BF16: b holds bf16.
    """
    # As in quartet.blocks. In units amax is in [4, 8), and the scales by which b is divided, amax / 6 to
    # amax / 4 and its neighbours, are in [1/2, 2].
    amax = over_rows(tree(tl.abs(b), True), ROWS, True)
    amax = tl.where(amax < TINY, 0.0, amax)
    unit = tl.clamp(0.25 * power_of_two_below(amax), 0.25 * TINY, 2.0**125)
    amax = amax * inverse(unit)

    # Which quantizer: decided when this is compiled.
    if QUANTIZER == "bf16":
        # No quantizer: this scale takes the unit out again, so that s * unit is 1.
        q = b
        s = inverse(unit)
    elif QUANTIZER.startswith("ms_eden"):
        q, s = ms_eden_blocks(b, amax, unit, first, i, seed, QUANTIZER == "ms_eden_46")
    else:
        v = b * inverse(unit)
        if QUANTIZER == "rtn":
            s = round_scale(divide_by(amax, 6.0))
            q = e2m1(ratio(v, s, BF16))
        elif QUANTIZER == "four_six":
            q, s = four_six_blocks(v, amax, ROWS, BF16)
        elif QUANTIZER == "scale_search":
            q, s = scale_search_blocks(v, amax, ROWS, BF16)
        elif QUANTIZER == "sr":
            s = round_scale(divide_by(amax, SR_MAX))
            v = ratio(v, s, False)
            if not BF16:
                # A quotient of float32 may round to just above 6; one of bf16 cannot.
                v = tl.clamp(v, -6.0, 6.0)
            # From 1 to 2, E2M1's neighbours are 0.5 apart. 0x3F800000 is 1.0.
            q = round_to_grid(v, uniform_blocks(seed, first, i), 0.5, 0x3F800000)
    return q, s * unit


# ---- 6. Kernels --------------------------------------------------------------------------------------------
#
# Layout is most of the speed: sums over a block should stay in the registers of one thread.
#
# What a thread gets of a product on Hopper's tensor cores (wgmma; mma.sync is alike), for 4 lanes, t = 0 to
# 3, that share a row, and the first of two halves of 64 columns:
#
#     column of x R     0 1   2 3   4 5   6 7 |  8 9  10 11  12 13  14 15 | 16 17 ...            62 63
#     lane t             0     1     2     3  |   0     1      2      3   |   0   ...               3
#
# So a block of 16 columns would lie in 4 lanes, and every sum would need two shuffles. R's columns may come
# in any order, though: `permuted` puts at column 8 i + 2 t + j what belongs at column 16 t + 2 i + j, and
# then lane t holds the columns 16 t to 16 t + 15 of x R, in order: one whole block.
#
#     what R is given   0 1  16 17  32 33  48 49 | 2 3  18 19  34 35  50 51 | 4 5  ...            62 63
#     lane t             0     1      2      3   |  0     1      2      3   |  0   ...               3
#
# Blackwell's large tensor cores (tcgen05) give a thread whole rows, so there the order would not matter; it
# is the same, to have one kernel.

@jit
def store_blocks(
    # the blocks, their numbers, and which of them there are
    q,
    s,
    first,
    i,
    mask,
    # where to write: None for what no GEMM wants
    codes_ptr,
    scale_ptr,
    decoded_ptr,
    FP4
):
    """Write blocks number first + i: scales as bf16, codes and decoded values where there is a place."""
    # quantize_kernel gives an int64 i. tile_kernel gives an int64 first and an int32 i within the tile, so
    # that most of the addresses are computed in 32 bits, which suffices for rows of up to 2^24 values.
    tl.store(scale_ptr + first + i, s.to(tl.bfloat16), mask)
    if codes_ptr is not None:
        words = (codes_ptr + 8 * first).to(tl.pointer_type(tl.uint32))
        tl.store(words + (2 * i + across(2)), pack(q, FP4), mask)
    if decoded_ptr is not None:
        # Exact, but for a rotated bf16 that was not quantized: that is rounded here.
        value = (q * s).to(tl.bfloat16)
        tl.store(decoded_ptr + 16 * first + (16 * i + across(16)), value, mask)


@jit
def magnitude_bits(s):
    """The bits of |s|: they order like |s|, with infinity and then NaN on top."""
    return bits(s) & 0x7FFFFFFF


@jit
def quantize_kernel(
    # load
    x_ptr,
    seed_ptr,
    # store
    codes_ptr,
    scale_ptr,
    largest_ptr,
    decoded_ptr,
    # shape, in blocks
    count,
    columns,
    # known when it is compiled
    QUANTIZER: tl.constexpr,
    ROWS: tl.constexpr,
    FP4: tl.constexpr,
    B: tl.constexpr
):
    """Quantize B of the count blocks of x, contiguous, bf16 or float32. columns: blocks in a row."""
    # Which blocks: the 16 rows of a 16x16 block come one after another.
    i = tl.program_id(0).to(tl.int64) * B + down(B)
    if ROWS > 1:
        tile = i // ROWS
        row = i % ROWS
        i = (tile // columns * ROWS + row) * columns + tile % columns
    mask = i < count

    # Load. A word of 32 bits holds two bf16 neighbours; by two loads of 4 words a thread gets a whole block.
    # A bf16 is the upper half of a float32, whose lower half is 0. The even value is in the low half of a
    # word.
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    if BF16:
        word = x_ptr.to(tl.pointer_type(tl.uint32)) + (8 * i + across(4))
        words = tl.join(tl.load(word, mask, 0), tl.load(word + 4, mask, 0)).permute(0, 2, 1)
        b = tl.join(words << 16, words & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        b = tl.load(x_ptr + (16 * i + across(16)), mask, 0.0)

    # Quantize.
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    q, s = quantize_blocks(b.reshape(B, 16), 0, i, seed, QUANTIZER, ROWS, BF16)

    # Store. Bits of numbers that are not negative order like the numbers, so an integer maximum will do.
    store_blocks(q, s, 0, i, mask, codes_ptr, scale_ptr, decoded_ptr, FP4)
    tl.atomic_max(largest_ptr, tl.max(magnitude_bits(s)), sem="relaxed")


@jit
def load_tile(
    # x: bf16, or codes, E4M3 bytes and the tensor scale
    x_ptr,
    x_scale_ptr,
    x_tensor_scale_ptr,
    # where, of how much
    m0,
    n0,
    M,
    N,
    # known when it is compiled
    COLUMNS,
    WHOLE,
    SWIZZLED
):
    """The tile of x (M, N) at row m0, column n0 -> (128, COLUMNS) bf16, 0 outside.

    m0 is a multiple of 128, n0 of COLUMNS, which is 128 or 64. WHOLE: N % 128 == 0, which spares loads of
    bf16 a mask for columns.
    """
    m = down(128)
    inside = m < M - m0
    if x_scale_ptr is None:
        n = across(COLUMNS)
        x = tl.load(x_ptr + (m0.to(tl.int64) * N + n0) + (m * N + n), inside & ((n < N - n0) | WHOLE), 0.0)
    else:
        # Codes: two a byte.
        k = across(COLUMNS // 2)
        x_ptr += m0.to(tl.int64) * (N // 2) + n0 // 2
        code = tl.load(x_ptr + (m * (N // 2) + k), inside & (k < (N - n0) // 2), 0).to(tl.int32)

        # Block scales, as bytes of E4M3, in rows or `swizzled`.
        b = across(COLUMNS // 16)
        if SWIZZLED:
            c = n0 // 16 + b
            at = (m0 // 128).to(tl.int64) * (tl.cdiv(N, 64) * 512)
            at += c // 4 * 512 + m % 32 * 16 + m // 32 * 4 + c % 4
        else:
            at = m0.to(tl.int64) * (N // 16) + n0 // 16 + (m * (N // 16) + b)
        byte = tl.load(x_scale_ptr + at, inside & (b < (N - n0) // 16), 0).to(tl.int32)

        # Decode. Eight bytes share a scale. The bits of E4M3, put where float32 has exponent and mantissa,
        # are its value times 2^-120.
        scale = from_bits(byte << 20) * 2.0**120 * tl.load(x_tensor_scale_ptr)
        scale = tl.broadcast_to(scale[:, :, None], (128, COLUMNS // 16, 8)).reshape(128, COLUMNS // 2)
        pair = decode_pairs(code, scale)
        x = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16)).reshape(128, COLUMNS)
        x = x.to(tl.bfloat16, bitcast=True)
    return x


@jit
def dot(a, b):
    """a (M, K) bf16, b (K, N) bf16 -> a b (M, N) float32."""
    if INTERPRET:                                      # Triton's interpreter multiplies bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b)


@jit
def rotate_tile(x, R):
    """x (T, 128), R (128, W) bf16: W columns of a `permuted` R -> blocks of x R, (T W / 16, 16) float32."""
    # The products are exact. These float32 sums have the order of the tensor cores: here, and only here,
    # codes and scales may differ from quartet.py's.
    y = dot(x, R)
    # Column 64 g + 8 i + 2 t + j of y is column 64 g + 16 t + 2 i + j of x R: see the drawing above.
    y = y.reshape(x.shape[0], R.shape[1] // 64, 8, 4, 2).permute(0, 1, 3, 2, 4)
    return y.reshape(x.shape[0] * R.shape[1] // 16, 16)


@jit
def quantize_tile(
    # what
    x,
    # where it is in the result
    row0,
    rows,
    block0,
    columns,
    # rotate
    R_ptr,
    # quantize
    seed_ptr,
    # store
    codes_ptr,
    scale_ptr,
    largest_ptr,
    decoded_ptr,
    # known when it is compiled
    QUANTIZER,
    FP4,
    W
):
    """Rotate and quantize x (T, 128) bf16, W columns of the result at a time.

    x's first row is row row0 of the result, which has `rows` rows; its first block is block0 of the `columns`
    blocks in that row.
    """
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    # W columns are W / 16 blocks in each row of x. row: the one that each of them lies in. i: its number,
    # counted from the first.
    block = down(x.shape[0] * W // 16)
    row = block // (W // 16)
    i = row * columns + block % (W // 16)
    first = row0.to(tl.int64) * columns + block0
    mask = row < rows - row0
    for w in tl.static_range(0, 128, W):
        R = tl.load(R_ptr + w + (down(128) * 128 + across(W)))
        at = first + w // 16
        q, s = quantize_blocks(rotate_tile(x, R), at, i, seed, QUANTIZER, 1, False)
        store_blocks(q, s, at, i, mask, codes_ptr, scale_ptr, decoded_ptr, FP4)
        if w == 0:
            largest = magnitude_bits(s)
        else:
            largest = tl.maximum(largest, magnitude_bits(s))
    tl.atomic_max(largest_ptr, tl.max(largest), sem="relaxed")


@jit
def tile_kernel(
    # load
    x_ptr,
    x_scale_ptr,
    x_tensor_scale_ptr,
    M,
    N,
    # rotate, quantize and store rows
    row_R,
    row_seed,
    row_codes,
    row_scale,
    row_largest,
    row_decoded,
    # rotate, quantize and store columns
    col_R,
    col_seed,
    col_codes,
    col_scale,
    col_largest,
    col_decoded,
    # known when it is compiled
    ROW: tl.constexpr,
    COL: tl.constexpr,
    SWIZZLED: tl.constexpr,
    FP4: tl.constexpr,
    COLUMNS: tl.constexpr,
    W: tl.constexpr
):
    """Rotate and quantize a tile of x (M, N), 128 rows and COLUMNS, along N by ROW and along M by COL.

    ROW and COL are of MODES, or "bf16", or "" for none. x is bf16, or NVFP4, its scales SWIZZLED or not. The
    second result's rows are columns of x, padded with zeros to whole tiles. COLUMNS: 128, or 64 without ROW.
    """
    m0 = tl.program_id(0) * 128
    n0 = tl.program_id(1) * COLUMNS
    # That N % 128 == 0 is known only if rows are rotated, as every rotation along N needs it.
    x = load_tile(x_ptr, x_scale_ptr, x_tensor_scale_ptr, m0, n0, M, N, COLUMNS, ROW != "", SWIZZLED)
    # Rows: blocks lie along N, as x is stored.
    if ROW != "":
        quantize_tile(
            x, m0, M, n0 // 16, N // 128 * 8,
            row_R, row_seed,
            row_codes, row_scale, row_largest, row_decoded,
            ROW, FP4, W)
    # Columns: blocks lie along M, and a row of the result has whole tiles of them.
    if COL != "":
        quantize_tile(
            x.T, n0, N, m0 // 16, tl.num_programs(0) * 8,
            col_R, col_seed,
            col_codes, col_scale, col_largest, col_decoded,
            COL, FP4, W)


@jit
def block_at(i, columns, SWIZZLED):
    """Place i (...) int64 of an encoded scale -> the number of its block, and whether there is one."""
    there = i >= 0                                     # all True: in rows every place is a block's
    if SWIZZLED:                                       # in the order of `swizzle`
        tile = i // 512
        j = (i % 512).to(tl.int32)
        width = (columns + 3) // 4
        r = j // 4 % 4 * 32 + j // 16
        c = (tile % width).to(tl.int32) * 4 + j % 4
        i = (tile // width * 128 + r) * columns + c
        there = c < columns
    return i, there


@jit
def e4m3_byte(s):
    """s (...) float32, E4M3 values >= 0 -> their bytes: 2^-120 moves the exponent to where E4M3 has it."""
    return (bits(s * 2.0**-120) >> 20).to(tl.uint8)


@jit
def encode_again(
    # the scales before and after, of which blocks
    s,
    scale,
    i,
    mask,
    tensor_scale,
    finite,
    # round
    seed_ptr,
    # store
    codes_ptr,
    decoded_ptr,
    # shape
    count,
    # known when it is compiled
    NOISE
):
    """The rare blocks i, where mask: scale = s / tensor_scale (B, 1) is sub-normal in E4M3, or x not finite.

    Rounds such scales once more, to nearest if NOISE is 0, else by element NOISE * count + i of the noise,
    and then decodes their values again. If x is not finite, scales and codes become 0, and values NaN.
    """
    # E4M3's sub-normals are 2^-9 apart, and 0x3C800000 is 2^-6, its smallest normal number.
    if NOISE == 0:
        again = scale + MAGIC * 2.0**-9 - MAGIC * 2.0**-9
    else:
        word = random_word(tl.load(seed_ptr), 0, NOISE * tl.cast(count, tl.int64) + i)
        again = round_to_grid(scale, to_uniform(word), 0.125, 0x3C800000)
    scale = tl.where(finite, tl.where(mask, again, scale), 0.0)
    # Of a tensor with NaN or infinity, no code remains.
    if codes_ptr is not None:
        tl.store(codes_ptr + (8 * i + across(8)), 0, mask & (not finite))
    # Decoded values were q * s: take q out of them, exactly, and multiply by the scale as it is stored.
    if decoded_ptr is not None:
        value = decoded_ptr + (16 * i + across(16))
        q = tl.div_rn(tl.load(value, mask, 0.0).to(tl.float32), tl.where(s > 0, s, 1.0))
        factor = tl.where(finite, scale * tensor_scale, float("nan"))
        tl.store(value, (q * factor).to(tl.bfloat16), mask)
    return scale


@jit
def encode_kernel(
    # load
    scale_ptr,
    largest_ptr,
    # round
    seed_ptr,
    # store
    block_scale_ptr,
    tensor_scale_ptr,
    codes_ptr,
    decoded_ptr,
    # shape
    count,
    columns,
    size,
    # known when it is compiled
    NOISE: tl.constexpr,
    SWIZZLED: tl.constexpr,
    B: tl.constexpr
):
    """quartet.assemble's end: choose the tensor scale, and encode B scales of 4 significant bits as E4M3
    bytes.

    count blocks, columns a row -> size bytes. SWIZZLED: in the order of `swizzle`, 0 where there is no
    block.
    """
    start = tl.program_id(0).to(tl.int64) * B
    place = start + tl.arange(0, B)
    i, there = block_at(place, columns, SWIZZLED)
    there = (i < count) & there

    # quartet.choose_tensor_scale. Adding one unit of the fourth significant bit, bit 20, carries a mantissa
    # of 1.875 into the exponent, and no other.
    largest = tl.load(largest_ptr)                     # as bits
    finite = largest < EXPONENT
    power = from_bits(largest + 2**20 & EXPONENT)
    tensor_scale = tl.where((largest > 0) & finite, tl.maximum(power * 2.0**-8, 2.0**-123), 1.0)
    if tl.program_id(0) == 0:
        tl.store(tensor_scale_ptr, tl.where(finite, tensor_scale, float("nan")))

    # The usual path: no scale is sub-normal.
    s = tl.load(scale_ptr + i, there, 0.0).to(tl.float32)
    scale = s * inverse(tensor_scale)
    if tl.max(((s > 0) & (scale < 2.0**-6)).to(tl.int32)) == 0 and finite:
        tl.store(block_scale_ptr + place, e4m3_byte(scale), place < size)
    else:
        # Hardly ever: some of these scales are sub-normal in E4M3, or x is not finite. 128 at a time.
        for j in tl.range(0, B, 128):
            place_j = start + j + down(128)
            i_j, there_j = block_at(place_j, columns, SWIZZLED)
            there_j = (i_j < count) & there_j
            s_j = tl.load(scale_ptr + i_j, there_j, 0.0).to(tl.float32)
            scale_j = s_j * inverse(tensor_scale)
            rare = ((s_j > 0) & (scale_j < 2.0**-6)) | (there_j & (not finite))
            if tl.max(rare.to(tl.int32)) > 0:
                scale_j = encode_again(
                    s_j, scale_j, i_j, rare, tensor_scale, finite,
                    seed_ptr, codes_ptr, decoded_ptr, count, NOISE)
            tl.store(block_scale_ptr + place_j, e4m3_byte(scale_j), place_j < size)


@jit
def load_scales(ptr, m0, k0, M, K, BM, BK):
    """Swizzled scales of (M, K), those of BM rows from m0 on and BK values from k0 on -> (BM, BK/16) E4M3; 0
    outside.
    """
    # A tile of 128 rows and 4 blocks, 64 values, has 512 bytes: 8 for each value of k.
    tile = m0 // 128 + down(BM // 128)
    byte = across(BK * 8) + k0 * 8
    width = tl.cdiv(K, 64) * 512
    scale = tl.load(ptr + tile.to(tl.int64) * width + byte, (tile * 128 < M) & (byte < width), 0.0)
    # The order of `swizzle`, undone.
    return scale.reshape(BM // 128, BK // 64, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(BM, BK // 16)


@jit
def gemm_kernel(
    # load
    a_ptr,
    a_scale_ptr,
    a_tensor_scale_ptr,
    b_ptr,
    b_scale_ptr,
    b_tensor_scale_ptr,
    # store
    y_ptr,
    # shape
    M,
    N,
    K,
    # known when it is compiled
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr
):
    """A BM x BN tile of a b^T, a NVFP4 (M, K), b NVFP4 (N, K), scales `swizzled` -> y (M, N) bf16."""
    # Programs one after another take 8 tiles side by side, then the 8 below. Those side by side share rows of
    # a in the L2 cache.
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BM) * 8
    first = pid // tiles * 8
    pid = pid % tiles
    width = tl.minimum(tl.cdiv(N, BN) - first, 8)
    m0 = pid // width * BM
    n0 = (first + pid % width) * BN

    m = m0 + down(BM)
    n = n0 + across(BN)
    k = tl.arange(0, BK // 2)
    a_ptr += m.to(tl.int64) * (K // 2) + k[None, :]
    b_ptr += n.to(tl.int64) * (K // 2) + k[:, None]

    # Sum over K, BK values at a time: codes are two a byte, scales one for 16.
    y = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK):
        a = tl.load(a_ptr + k0 // 2, (m < M) & (k[None, :] < (K - k0) // 2), 0)
        b = tl.load(b_ptr + k0 // 2, (n < N) & (k[:, None] < (K - k0) // 2), 0)
        a_scale = load_scales(a_scale_ptr, m0, k0, M, K, BM, BK)
        b_scale = load_scales(b_scale_ptr, n0, k0, N, K, BN, BK)
        y = tl.dot_scaled(a, a_scale, "e2m1", b, b_scale, "e2m1", y)

    # The tensor scales come last, as the tensor cores know nothing of them.
    y *= tl.load(a_tensor_scale_ptr) * tl.load(b_tensor_scale_ptr)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(tl.bfloat16), (m < M) & (n < N))


@jit
def add_toward_zero(a, b):
    """quartet.add_toward_zero."""
    total = a + b
    b_there = total - a
    lost = (a - (total - b_there)) + (b - b_there)
    # If what was lost has the other sign, the total was rounded away from zero. One less in its bits is the
    # next float toward zero, whatever its sign. (Not lost != 0: after an overflow lost is NaN.)
    grown = (tl.abs(lost) > 0) & ((bits(lost) ^ bits(total)) < 0)
    return from_bits(bits(total) - grown.to(tl.int32))


@jit
def emulated_gemm_kernel(
    # load
    a_values_ptr,
    b_values_ptr,
    unit_ptr,
    # store
    total_ptr,
    # shape
    M,
    N,
    K,
    # known when it is compiled
    BM: tl.constexpr,
    BN: tl.constexpr
):
    """A BM x BN tile of total = unit a b^T (M, N) float32, added as by quartet.fp4_gemm.

    a, b: values (M, K), (N, K) bf16, which are E2M1 times block scales. unit () float64: the product of both
    tensor scales over n, which float32 might not hold.
    """
    # Neighbouring programs take the tiles of one row: they share rows of a in the L2 cache.
    tiles = tl.cdiv(N, BN)
    m = tl.program_id(0) // tiles * BM + down(BM)
    n = tl.program_id(0) % tiles * BN + across(BN)
    k = tl.arange(0, 16)
    a_values_ptr += m.to(tl.int64) * K + k[None, :]
    b_values_ptr += n.to(tl.int64) * K + k[:, None]

    total = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, 64):
        # One block of a meets one of b: 16 products of E2M1 values, which are multiples of 1/4 up to 36, all
        # times the product of two block scales, a number of 8 bits. A sum of such products is below 2^12
        # quarters, so 20 bits hold it, and float32 is exact in whatever order tensor cores add. Four blocks
        # with scales of their own need up to 49 bits (quartet.fp4_gemm says why): float64.
        group = tl.zeros((BM, BN), tl.float64)
        for block in tl.static_range(4):
            at = k0 + 16 * block
            a = tl.load(a_values_ptr + at, (m < M) & (k[None, :] < K - at), 0.0)
            b = tl.load(b_values_ptr + at, (n < N) & (k[:, None] < K - at), 0.0)
            group += dot(a, b).to(tl.float64)
        total = add_toward_zero(total, group.to(tl.float32))
    # PyTorch makes bf16 of it: Triton's interpreter would truncate.
    total = (total.to(tl.float64) * tl.load(unit_ptr)).to(tl.float32)
    tl.store(total_ptr + m.to(tl.int64) * N + n, total, (m < M) & (n < N))


# ---- 7. Launching ------------------------------------------------------------------------------------------
#
# Two kernels make an operand: the first quantizes, the second encodes the scales. To torch.compile each pair
# is one op that it does not look into (custom_op). It knows the shapes of what comes out from register_fake.

LAUNCH = {"enable_fp_fusion": False}    # a product and a sum are rounded apart, as in quartet.py
# How much one program takes: blocks, of quantize_kernel; scales, of encode_kernel.
BLOCKS = 256
SCALES = 1024


def major(device):
    """The first number of a device's compute capability; 9 for a CPU, which interprets."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0]
    return 9


def tile_options(major, row):
    """FP4, COLUMNS, W and launch options of tile_kernel for `major`, by whether it makes rows too."""
    options = {"FP4": major > 9, "COLUMNS": 128, "W": 64, "num_warps": 8, "num_stages": 1}
    if major == 9:
        # wgmma. With 128 registers a thread, two programs fit on a multiprocessor. Left alone, the compiler
        # may take more, and then one fits. To keep to 128, sr spills a little; but with 168 an H200 takes 25
        # to 36% longer for sr and ms_eden (data/evidence/README.md, section 7).
        options["maxnreg"] = 128
        if not row:
            # Twice as many programs of half the size overlap better: an H200 takes 6 to 12% less time.
            options["COLUMNS"] = 64
            options["num_warps"] = 4
    if major == 10:
        # tcgen05 gives each of 128 threads a row, of 64 values, whose four blocks share a draw of Philox.
        options["num_warps"] = 4
    return options


# Small tiles, as each sum takes three registers: a float64 of 64 products and a float32 of all.
EMULATED_GEMM_OPTIONS = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3}
GEMM_OPTIONS = {
    10: {"BM": 128, "BN": 256, "BK": 256, "num_warps": 4, "num_stages": 3},    # tcgen05
    12: {"BM": 128, "BN": 128, "BK": 128, "num_warps": 8, "num_stages": 3},    # mma.sync
}


# The last three arguments of the ops: whether to write codes; whether to write decoded values; whether block
# scales go in the order of `swizzle`, else in rows.
FP4_PARTS = (True, False, True)       # as FP4 tensor cores take it
BF16_PARTS = (False, True, False)     # as a GEMM in bf16 takes it
NVFP4_PARTS = (True, False, False)    # as quartet.py has it


class Operand(NamedTuple):
    """A quantized (M, K). A part that was not wanted is an empty tensor."""
    codes: Tensor           # (M, K/2) uint8
    block_scale: Tensor     # (M, K/16) uint8, the bytes of E4M3; or flat, `swizzled`
    tensor_scale: Tensor    # () float32
    decoded: Tensor         # (M, K) bf16

    def nvfp4(self):
        """As quartet.py has it; not of swizzled scales."""
        return NVFP4(self.codes, self.block_scale.view(torch.float8_e4m3fn), self.tensor_scale)


class Buffers(NamedTuple):
    """What the kernels write for one operand (M, K), in the order of their arguments."""
    codes: Tensor | None      # (M, K/2) uint8
    scale: Tensor             # (M, K/16) bf16: block scales before the tensor scale is known
    largest: Tensor           # () int32: the bits of the largest of them
    decoded: Tensor | None    # (M, K) bf16
    block_scale: Tensor       # (M, K/16) uint8, or flat, `swizzled`
    tensor_scale: Tensor      # () float32

    def operand(self):
        """-> what a GEMM takes, as a list of tensors: custom ops return lists."""
        parts = Operand(self.codes, self.block_scale, self.tensor_scale, self.decoded)
        return [self.scale.new_empty(0) if part is None else part for part in parts]


NO_BUFFERS = (None, None, None, None)


def allocate(rows, columns, device, codes, decoded, swizzled):
    """Buffers for a quantized (rows, columns)."""
    def empty(dtype, *shape, wanted=True):
        if wanted:
            return torch.empty(shape, dtype=dtype, device=device)

    scales = (rows, columns // BLOCK)
    places = (cdiv(rows, 128) * cdiv(columns, 64) * 512,) if swizzled else scales
    return Buffers(
        empty(torch.uint8, rows, columns // 2, wanted=codes),
        empty(torch.bfloat16, *scales),
        torch.zeros((), dtype=torch.int32, device=device),
        empty(torch.bfloat16, rows, columns, wanted=decoded),
        empty(torch.uint8, *places),
        empty(torch.float32))


def swizzle(scale):
    """Block scales (R, C), a byte each, in the order that FP4 tensor cores take; (n,) are in it already.

    Tiles of 128 rows and 4 blocks, 512 bytes each, one after another, 0 where there is no block: (r, c) is at
    (r // 128 * ceil(C / 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4.
    """
    if scale.dim() == 1:
        return scale
    tiles = F.pad(scale.view(torch.uint8), (0, -scale.shape[1] % 4, 0, -scale.shape[0] % 128))
    return tiles.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32)).permute(0, 3, 2, 1, 4).flatten()


def encode(buffers, quantizer, seed):
    """Run encode_kernel on Buffers -> their `operand`."""
    # One program at least: it stores the tensor scale, also that of an empty tensor. "bf16", which has no row
    # in MODES, draws no noise.
    size = buffers.block_scale.numel()
    encode_kernel[(max(1, cdiv(size, SCALES)),)](
        buffers.scale, buffers.largest, seed,
        buffers.block_scale, buffers.tensor_scale, buffers.codes, buffers.decoded,
        buffers.scale.numel(), buffers.scale.shape[1], size,
        MODES.get(quantizer, Mode()).noise, buffers.block_scale.dim() == 1, SCALES, **LAUNCH)
    return buffers.operand()


@library.custom_op("quartet::quantize", mutates_args=())
def quantize(x: Tensor, quantizer: str, rows: int, seed: Tensor | None, codes: bool, decoded: bool,
             swizzled: bool = False) -> list[Tensor]:
    """x (M, K), bf16 or float32, by a quantizer in blocks of rows x 16 -> Operand (M, K), as a list.

    M % rows == K % 16 == 0, which is not looked at. seed () int64. codes, decoded, swizzled: the parts
    wanted.
    """
    buffers = allocate(*x.shape, x.device, codes, decoded, swizzled)
    count = buffers.scale.numel()
    if x.data_ptr() % 4:                               # bf16 is read by words of 4 bytes
        x = x.clone()
    with torch.cuda.device_of(x):                      # Triton launches on the current GPU
        if count:
            quantize_kernel[(cdiv(count, BLOCKS),)](
                x.contiguous(), seed,
                *buffers[:4],
                count, x.shape[1] // BLOCK,
                quantizer, rows, major(x.device) >= 10, BLOCKS,
                num_warps=MODES[quantizer].warps, **LAUNCH)
        return encode(buffers, quantizer, seed)


@quantize.register_fake
def _(x, quantizer, rows, seed, codes, decoded, swizzled=False):
    return allocate(*x.shape, x.device, codes, decoded, swizzled).operand()


def tile_buffers(x, row, col, codes, decoded, swizzled=False):
    """x, row, col and the parts wanted, of rotate_quantize -> M, N, and Buffers of both results."""
    M, N = x[0].shape
    if x[0].dtype == torch.uint8:
        N = 2 * N                                      # codes
    # tile_kernel computes places within a tile in 32 bits, and CUDA launches up to 65535 tiles side by side,
    # of as few as 64 columns.
    if M > 2**24 or N > 65535 * 64:
        raise ValueError(f"a layer takes up to 2^24 tokens and {65535 * 64} features at a time, "
                         f"not {M} and {N}")
    first = second = NO_BUFFERS
    if row:
        first = allocate(M, N, x[0].device, codes, decoded, swizzled)
    if col:
        second = allocate(N, cdiv(M, GROUP) * GROUP, x[0].device, codes, decoded, swizzled)
    return M, N, first, second


@library.custom_op("quartet::rotate_quantize", mutates_args=())
def rotate_quantize(
        x: list[Tensor], row: str, row_R: Tensor | None, row_seed: Tensor | None,
        col: str, col_R: Tensor | None, col_seed: Tensor | None,
        codes: bool, decoded: bool, swizzled: bool = False) -> list[Tensor]:
    """One read of x -> Operand of x row_R by quantizer row, then Operand of x^T col_R by col; "" for none.

    x: codes, block_scale, tensor_scale of an Operand (M, N); or first a bf16 (M, N), and what follows it, as
    in operand("bf16", ...), is not read. R (128, 128) bf16, `permuted`; seeds () int64. x^T (N, M) gets zeros
    up to M % 128 == 0. N % 128 == 0 if there is a row, for nothing else is looked at. codes, decoded,
    swizzled: the parts wanted of both. ValueError for too large an M or N.
    """
    M, N, first, second = tile_buffers(x, row, col, codes, decoded, swizzled)
    # NVFP4 comes as three tensors. Of bf16 the first counts, and the kernel takes None for the others.
    packed = x[0].dtype == torch.uint8
    if not packed:
        x = x[:1]
    source = [t.contiguous() for t in x] + [None] * (3 - len(x))
    found = []
    with torch.cuda.device_of(x[0]):
        if M and N and (row or col):
            options = tile_options(major(x[0].device), row)
            tile_kernel[(cdiv(M, GROUP), cdiv(N, options["COLUMNS"]))](
                *source, M, N,
                row_R, row_seed, *first[:4],
                col_R, col_seed, *second[:4],
                row, col, packed and x[1].dim() == 1,
                **options, **LAUNCH)
        if row:
            found += encode(first, row, row_seed)
        if col:
            found += encode(second, col, col_seed)
    return found


@rotate_quantize.register_fake
def _(x, row, row_R, row_seed, col, col_R, col_seed, *parts):
    *_, first, second = tile_buffers(x, row, col, *parts)
    return [t for buffers in (first, second) if buffers is not NO_BUFFERS for t in buffers.operand()]


def quantizers_of(row):
    """Names of quantizers in a row of RECIPES. The kernels make 16x16 blocks forward only: there that ending
    is left out.
    """
    forward = {str(q).removesuffix("_16x16") for q in (row.x, row.w)}
    return forward | {row.dx.dy, row.dx.other, row.dw.dy, row.dw.other}


def supports(row):
    """Whether the kernels have a mode for every quantizer of a row of RECIPES (None: bf16)."""
    # A None for x or w, which comes as "None", passes here: quartet.check_row then names the fault.
    return row is None or quantizers_of(row) <= {*MODES, "bf16", "None", None}


def permuted(R):
    """R (128, 128) -> bf16, with column 64 g + 16 t + 2 i + j at 64 g + 8 i + 2 t + j: see section 6."""
    return R.view(GROUP, 2, 4, 8, 2).transpose(2, 3).reshape(GROUP, GROUP).bfloat16()


# ---- 8. The functions of quartet.py ------------------------------------------------------------------------
#
# For callers who want NVFP4 tensors, and for the tests: the linear layer below calls the ops directly.

def quantized_as(quantizer, x, block=(1, BLOCK), seed=0, R=None):
    """x (..., K) on a GPU -> NVFP4 of x, or x R, by a mode. ValueError where quartet.check_blocks has one."""
    quartet.check_blocks(x, block)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
    *lead, k = x.shape
    flat = x.reshape(math.prod(lead), k)
    if R is not None:
        found = rotate_quantize([flat], quantizer, permuted(R), seed, "", None, None, *NVFP4_PARTS)
    else:
        if x.dtype != torch.bfloat16:
            flat = flat.float()
        found = quantize(flat, quantizer, block[0], seed, *NVFP4_PARTS)
    t = Operand(*found).nvfp4()
    return NVFP4(t.codes.view(*lead, k // 2), t.block_scale.view(*lead, k // BLOCK), t.tensor_scale)


# Those of quartet.py, bitwise equal, as functions of x (..., K) on a GPU and block, (1, 16) or (16, 16).
rtn = partial(quantized_as, "rtn")
four_six = partial(quantized_as, "four_six")
scale_search = partial(quantized_as, "scale_search")


def sr(x, seed):
    """quartet.sr, bitwise equal: x (..., K) on a GPU, seed int or () int64 -> NVFP4."""
    return quantized_as("sr", x, seed=seed)


def ms_eden(x, R, seed, four_six=False):
    """quartet.ms_eden, for x in bf16, or rotated already if R is None: then bitwise equal.

    The sums of x R are float32 in the order of the tensor cores: their last bits may differ. ValueError for x
    of another dtype, or whose last dimension has no whole groups of 128.
    """
    if R is not None and (x.dtype != torch.bfloat16 or x.shape[-1] % GROUP):
        raise ValueError(f"{x.dtype} {tuple(x.shape)}: rotate bfloat16 with a last dimension % {GROUP} == 0")
    return quantized_as("ms_eden" + "_46" * four_six, x, seed=seed, R=R)


# ---- 9. The three GEMMs ------------------------------------------------------------------------------------
#
# As in quartet.py, but dy is quantized for both backward GEMMs by one read, and an operand has the form that
# the GPU's GEMM takes.

def fp4_operand(t):
    """t: codes, scales (in rows or `swizzled`), tensor scale -> the same as an FP4 GEMM takes them."""
    codes, scale, tensor_scale = t
    return codes.contiguous(), swizzle(scale).view(torch.float8_e4m3fn), tensor_scale


@library.custom_op("quartet::scaled_mm", mutates_args=())
def scaled_mm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """codes, scales, tensor scale of a (M, K) and of b (N, K) -> a b^T (M, N) bf16, by cuBLASLt.

    K % 32 == N % 16 == 0.
    """
    if not a[0].numel():
        return a[0].new_zeros(len(a[0]), len(b[0]), dtype=torch.bfloat16)
    kinds = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    a_codes, *a_scales = fp4_operand(a)
    b_codes, *b_scales = fp4_operand(b)
    e2m1x2 = torch.float4_e2m1fn_x2
    return F.scaled_mm(
        a_codes.view(e2m1x2), b_codes.view(e2m1x2).t(), a_scales, kinds, b_scales, kinds, order, order)


# (Not len: that would fix a size that torch.compile keeps open.)
scaled_mm.register_fake(lambda a, b: a[0].new_empty(a[0].shape[0], b[0].shape[0], dtype=torch.bfloat16))


def gemm(a, b):
    """`scaled_mm` in Triton, to compare with: training does not call it. Compiled for sm_100a, sm_103a and
    sm_120a, but not yet run on hardware.
    """
    M = len(a[0])
    N = len(b[0])
    y = a[0].new_empty(M, N, dtype=torch.bfloat16)
    options = GEMM_OPTIONS.get(major(y.device), GEMM_OPTIONS[10])
    tiles = cdiv(M, options["BM"]) * cdiv(N, options["BN"])
    with torch.cuda.device_of(y):
        gemm_kernel[(tiles,)](
            *fp4_operand(a), *fp4_operand(b),
            y, M, N, 2 * a[0].shape[1],
            **options, **LAUNCH)
    return y


@library.custom_op("quartet::fp4_gemm", mutates_args=())
def fp4_gemm(a: Tensor, a_tensor_scale: Tensor, b: Tensor, b_tensor_scale: Tensor, n: int = 1) -> Tensor:
    """quartet.fp4_gemm in Triton: a (M, K), b (N, K), decoded values in bf16, and their tensor scales ()
    float32 -> a b^T / n (M, N) bf16. ValueError for another K of b.
    """
    M, K = a.shape
    N = len(b)
    if b.shape[1] != K:
        raise ValueError(f"a sums over {K} values, b over {b.shape[1]}: fp4_gemm takes (M, K) and (N, K)")
    # Take the tensor scales out, exactly, as they are powers of two. So the kernel adds numbers of moderate
    # size, as tensor cores do, and unit comes last.
    a = (a / a_tensor_scale).contiguous()
    b = (b / b_tensor_scale).contiguous()
    unit = a_tensor_scale.double() * b_tensor_scale.double() / n
    total = a.new_empty(M, N, dtype=torch.float32)
    options = EMULATED_GEMM_OPTIONS
    tiles = cdiv(M, options["BM"]) * cdiv(N, options["BN"])
    with torch.cuda.device_of(a):
        emulated_gemm_kernel[(tiles,)](a, b, unit, total, M, N, K, **options, **LAUNCH)
    return total.bfloat16()


@fp4_gemm.register_fake
def _(a, a_tensor_scale, b, b_tensor_scale, n=1):
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)


def matmul(row, a, b, n=1):
    """Operands a (M, K), b (N, K or more) of a row of RECIPES -> a b^T / n (M, N) bf16.

    Of decoded values, where they are there, added as quartet.GEMM says; else by FP4 tensor cores.
    """
    if a.decoded.dim() == 2:
        # In dx without a rotation w was padded with zeros to whole groups of 128, and dy was not.
        b_decoded = b.decoded[:, :a.decoded.shape[1]]
        # Values that are not quantized have more bits than the kernel can add exactly. Operands do not tell,
        # so in a row with any such values quartet.gemm adds, in float64.
        if quartet.GEMM == "blackwell" and "bf16" not in quantizers_of(row):
            return fp4_gemm(a.decoded, a.tensor_scale, b_decoded, b.tensor_scale, n)
        return quartet.gemm(a.decoded, b_decoded, n)
    if n > 1:
        # To divide by n, a power of two, is to divide a tensor scale.
        b = b._replace(tensor_scale=b.tensor_scale / n)
    return scaled_mm(list(a[:3]), list(b[:3]))


def native(w, row):
    """Whether all GEMMs of a row with w (N, K) go to FP4 tensor cores: K % 32 == N % 128 == 0."""
    fits = w.shape[1] % 32 == w.shape[0] % GROUP == 0
    return fits and "bf16" not in quantizers_of(row) and major(w.device) >= 10


def operand(quantizer, t, seed, parts):
    """t (M, K) bf16 -> Operand. quantizer: of MODES, also with _16x16; "bf16": t is codes and values."""
    if quantizer == "bf16":
        return Operand(t, t.new_empty(0), t.new_ones(()), t)
    rows = BLOCK if quantizer.endswith("_16x16") else 1
    return Operand(*quantize(t, quantizer.removesuffix("_16x16"), rows, seed, *parts))


def weight_parts(w, row):
    """The parts of w (N, K) that the GEMMs of a row want. Scales that are to be transposed stay in rows."""
    fp4 = native(w, row)
    return True, not fp4, fp4 and row.dx.other is not None


def quantized(w, recipe):
    """quartet.quantized; scales `swizzled` where they go to FP4 tensor cores."""
    row = quartet.RECIPES[recipe]
    codes, _, swizzled = weight_parts(w, row)
    return operand(row.w, w, None, (codes, False, swizzled))[:3]


def on_grid(w, recipe):
    """quartet.on_grid."""
    return operand(quartet.RECIPES[recipe].w, w, None, BF16_PARTS).decoded


def rotation_from(name, signs):
    """quartet.rotation_from's R, permuted, and n. Of None: I, which leaves finite values as they are."""
    if name is None:
        return permuted(torch.eye(GROUP, device=signs.device)), 1
    R, n = quartet.rotation_from(name, signs)
    return permuted(R), n


def with_values(w_q):
    """Operand w_q (N, K), scales in rows -> the same with decoded values."""
    return w_q._replace(decoded=quartet.decode(w_q.nvfp4(), torch.bfloat16))


def transposed(w_q, parts):
    """Operand w_q (N, K) of 16x16 blocks, scales in rows -> its transpose (K, N), codes or decoded values."""
    if parts == FP4_PARTS:
        return Operand(*quartet.transpose(w_q.nvfp4()), w_q.codes.new_empty(0))
    w_q = with_values(w_q)
    return w_q._replace(decoded=w_q.decoded.T)


class QuantizedMatmul(torch.autograd.Function):
    """quartet.QuantizedMatmul: x (M, K), w (N, K) bf16; w_q: `quantized` w, or Nones -> x w^T (M, N) bf16."""

    @staticmethod
    def forward(ctx, x, w, recipe, *w_q):
        row = ctx.row = quartet.RECIPES[recipe]
        ctx.parts = FP4_PARTS if native(w, row) else BF16_PARTS

        # --- y = x w^T, summed over K ---
        # Codes of x are kept for the backward pass, whatever this GEMM takes, unless bf16 is kept.
        x_q = operand(row.x, x, None, (ctx.parts[0] or not row.original, *ctx.parts[1:]))      # (M, K)
        if w_q[0] is None:
            w_q = operand(row.w, w, None, weight_parts(w, row))                        # (N, K)
        else:
            # w was quantized once for several passes: the codes are there, the decoded values are not.
            w_q = Operand(*w_q, w_q[0].new_empty(0))
            if ctx.parts == BF16_PARTS:
                w_q = with_values(w_q)
        y = matmul(row, x_q, w_q)                                                      # (M, N)
        if row.two_terms:
            # Codes that FP4 tensor cores take come without values.
            values = x_q.decoded
            if ctx.parts == FP4_PARTS:
                values = operand(row.x, x, None, BF16_PARTS).decoded
            lost = operand(row.x, x - values, None, ctx.parts)                         # (M, K)
            y = y + matmul(row, lost, w_q)

        # Kept for the backward pass: NVFP4 as it was multiplied, or, where the recipe says so, bf16.
        w_kept = operand("bf16", w, None, BF16_PARTS) if row.original and row.dx.other else w_q
        x_kept = operand("bf16", x, None, BF16_PARTS) if row.original else x_q
        ctx.save_for_backward(*w_kept[:3], *x_kept[:3])
        return y

    @staticmethod
    def backward(ctx, dy):
        quartet.refuse_second_derivative()
        row = ctx.row
        parts = ctx.parts
        saved = ctx.saved_tensors                      # read once: the rule of activation checkpointing
        need_dx, need_dw, *_ = ctx.needs_input_grad
        dx = dw = None
        with torch.autocast(dy.device.type, enabled=False):
            noise_dx, noise_dw = quartet.draw_noise(dy, row)
            R_dx, n_dx = rotation_from(row.dx.rotation, noise_dx.signs)
            R_dw, n_dw = rotation_from(row.dw.rotation, noise_dw.signs)

            # dy by one read: rotated along N for dx, and transposed and rotated along M for dw.
            dx_dy = row.dx.dy if need_dx and row.dx.rotation else ""
            dw_dy = row.dw.dy if need_dw else ""
            dy_q = rotate_quantize([dy], dx_dy, R_dx, noise_dx.dy, dw_dy, R_dw, noise_dw.dy, *parts)

            # --- dx = dy w, summed over N ---
            if need_dx:
                # Without a rotation N need not be whole tiles, and dy is quantized alone.
                if row.dx.rotation:
                    dy_dx = Operand(*dy_q[:4])                                         # (M, N)
                else:
                    dy_dx = operand(row.dx.dy, dy, noise_dx.dy, parts)
                # w is requantized along N, or, in 16x16 blocks, transposed as it is.
                if row.dx.other:
                    w_q = Operand(*rotate_quantize(                                    # (K, N)
                        saved[:3], "", None, None, row.dx.other, R_dx, noise_dx.other, *parts))
                else:
                    w_q = transposed(Operand(*saved[:3], None), parts)
                dx = matmul(row, dy_dx, w_q, n_dx)                                     # (M, K)

            # --- dw = dy^T x, summed over M ---
            if need_dw:
                dy_dw = Operand(*dy_q[-4:])                                            # (N, M)
                x_q = Operand(*rotate_quantize(                                        # (K, M)
                    saved[3:], "", None, None, row.dw.other, R_dw, noise_dw.other, *parts))
                dw = matmul(row, dy_dw, x_q, n_dw)                                     # (N, K)
        return dx, dw, None, None, None, None


if __name__ == "__main__":
    # Check and time, or compile for another GPU. What the script imports as kernels is this module.
    sys.modules["kernels"] = sys.modules[__name__]
    runpy.run_path(os.path.dirname(__file__) + "/data/evidence/bench.py", run_name="__main__")
