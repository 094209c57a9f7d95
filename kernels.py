"""quartet.py in Triton: the same quantizers, to the bit, with one look at each value.

    python kernels.py                                   check against quartet.py, and time, on this GPU
    python kernels.py --target=sm_100a [--dump=DIR]     compile for a GPU that need not be here; count

A block of 16 values is final after one look at it, scale included, because the tensor scale is a power of two
(quartet.py says why). So one kernel reads bf16 and writes codes, block scales of 4 significant bits as bf16,
and the largest scale of all; a second, over 1/16 of the values, encodes the scales as E4M3.

What a GEMM takes depends on the GPU. FP4 tensor cores (capability 10 and up) take codes and encoded scales.
Elsewhere the kernels also write the decoded values, which bf16 holds exactly, and cuBLAS multiplies those.

Layout is most of the speed. A thread owns whole blocks, so that sums of 16 stay in its registers. A product
on tensor cores leaves each row spread over 4 threads, 2 columns at a time: R comes with its columns permuted
such that what a thread holds of x R are whole blocks.
"""
import argparse, os, re, subprocess, sys, tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import quartet
from quartet import BLOCK, GROUP, NVFP4

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")     # kernels run in Python, on a CPU
EXPONENT, SR_MAX, EDEN_MAX, ROUNDS, TINY = map(tl.constexpr, (
    quartet.EXPONENT, quartet.SR_MAX, quartet.EDEN_MAX, quartet.PHILOX_ROUNDS, 2.0**-120))
MODES = "rtn", "four_six", "sr", "ms_eden"      # quantizers
STOCHASTIC = {"sr": BLOCK, "ms_eden": 1}        # quantizers that draw: numbers a block before assemble's u

# ---- 1. Small floats. Blocks in registers: b is (B, 16) float32, one block a row, one thread a row ---------
@triton.jit
def bits(v):
    """v (...) float32 -> its bits, int32."""
    return v.to(tl.int32, bitcast=True)
@triton.jit
def power_of_two(b):
    """Bits b (...) int32 of a power of two -> float32."""
    return b.to(tl.float32, bitcast=True)
@triton.jit
def inverse(p):
    """1 / p of p (...) float32, powers of two in [2^-126, 2^126]: exact."""
    return power_of_two(0x7F000000 - bits(p))

@triton.jit
def e2m1(v):
    """quartet.e2m1 to nearest, for |v| < 7. Bitwise equal."""
    power = power_of_two(tl.maximum(bits(v) & EXPONENT, 0x3F800000))    # 1, 2, 4
    magic = power * 6291456.0                                           # 1.5 * 2^23 times the ulp, power / 2
    return v + magic - magic

@triton.jit
def round_by(v, u, ULP: tl.constexpr, MIN: tl.constexpr):
    """quartet.round_fp by u (...) for v (...) within range: ULP of 1, least power of two by its bits MIN."""
    ulp = ULP * power_of_two(tl.maximum(bits(v) & EXPONENT, MIN))
    n = v * inverse(ulp)
    down = tl.floor(n)
    return (down + (u < n - down).to(tl.float32)) * ulp

@triton.jit
def round_scale(s):
    """quartet.round_scale to nearest, of s (B, 1) >= 2^-40. Bitwise equal."""
    magic = power_of_two(bits(s) & EXPONENT) * 1572864.0                # 1.5 * 2^23 times the ulp, power / 8
    return s + magic - magic

@triton.jit
def round_scale_by(s, word):
    """quartet.round_scale, stochastic, of finite s (B, 1) >= 0; word (B, 1) uint32, random. Bitwise equal.

    u, the first 24 bits of word, is less than the fraction, the last 20 of s, if and only if the sum carries.
    """
    return power_of_two(bits(s) + (0xFFFFF - (word >> 12).to(tl.int32)) & -0x100000)

@triton.jit
def halves(t):
    """t (B, 2 n) -> its first and its last n columns."""
    return tl.split(t.reshape(t.shape[0], 2, t.shape[1] // 2).permute(0, 2, 1))

@triton.jit
def block_sum(t):
    """t (B, 16) -> (B, 1), added in quartet.block_sum's order. Bitwise equal."""
    for _ in tl.static_range(4):
        low, high = halves(t)
        t = low + high
    return t

@triton.jit
def block_amax(b):
    """b (B, 16) -> (B, 1): largest magnitude; NaN wins."""
    amax = tl.abs(b)
    for _ in tl.static_range(4):
        low, high = halves(amax)
        amax = tl.maximum(low, high, propagate_nan=tl.PropagateNan.ALL)
    return amax

@triton.jit
def over(a, C: tl.constexpr):
    """quartet.over: a / C for a constant, correctly rounded, by Markstein's division: C^-1 is."""
    v = a * (1.0 / C)                     # numpy has no fused multiply-add
    return tl.div_rn(a, C) if INTERPRET else tl.fma(tl.fma(-v, C, a), 1.0 / C, v)

@triton.jit
def ratio(b, s, BF16: tl.constexpr):
    """b (B, 16) / s (B, 1) of 4 bits, correctly rounded as in `over`; 0 where s is 0 or NaN.

    If BF16 and 1/2 <= s <= 2, only as good as e2m1 needs, for b of 8 significant bits: b / s is then a tie of
    E2M1 or 2^-8 of it away from one, and b + b ((1 - s) / s) is a tie where it is (b (1 / s), not at 1.875).
    """
    root = tl.rsqrt(tl.where(s > 0, s, 1.0) if INTERPRET else s)
    r = root * root                         # 1 / s but for some units in the last place; 64 would do
    r = tl.where(s > 0, tl.fma(tl.fma(-s, r, 1.0), r, r), 0.0)
    if INTERPRET:
        v = tl.where(s > 0, b / tl.where(s > 0, s, 1.0), 0.0)
    elif BF16:
        t = (1.0 - s) * r
        t = tl.fma(tl.fma(-t, s, 1.0 - s), r, t)
        v = tl.fma(b, tl.where(s > 0, t, -1.0), b)
    else:
        v = b * r
        v = tl.fma(tl.fma(-v, s, b), r, v)
    return v

@triton.jit
def behind(word, top):
    """The code in the first bits of top (...) behind those in word (...), uint32: one funnel shift."""
    return word << 4 | top >> 28

@triton.jit
def pack(q):
    """q (B, 16) E2M1 values -> codes (B, 2) uint32, eight in each, the first value's in the lowest bits.

    As a float32, q * 2^-126 has the code in bits 22 to 24, the sign in bit 31; times 65, in the first four.
    """
    top = (q * 1.1754943508222875e-38).to(tl.uint32, bitcast=True) * 65
    even, odd = tl.split(top.reshape(q.shape[0], 2, 2, 2, 2))
    even0, even2 = tl.split(even)
    odd1, odd3 = tl.split(odd)
    v0, v4 = tl.split(even0)
    v2, v6 = tl.split(even2)
    v1, v5 = tl.split(odd1)
    v3, v7 = tl.split(odd3)
    word = behind(behind(behind(v7 >> 28, v6), v5), v4)
    return behind(behind(behind(behind(word, v3), v2), v1), v0)

# ---- 2. Noise ----------------------------------------------------------------------------------------------
@triton.jit
def philox(seed, counter):
    """quartet.philox: counter (...) int64 -> four words of its shape, uint32. Bitwise equal."""
    zero = (counter * 0).to(tl.uint32)
    return tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero, ROUNDS)

@triton.jit
def random_word(seed, first, i):
    """Random words (B, 1) uint32, those of quartet.uniform's elements first + i; first % 4 == 0, i (B, 1)."""
    a, b, c, d = philox(seed, first // 4 + (i >> 2))
    return tl.where(i & 2 > 0, tl.where(i & 1 > 0, d, c), tl.where(i & 1 > 0, b, a))

@triton.jit
def to_unit(word):
    """Random words (...) uint32 -> u (...) in [0, 1): their first 24 bits."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08

@triton.jit
def uniform_blocks(seed, first, i):
    """u (B, 16) of the elements of blocks first + i, 16 a block, as quartet.uniform's. Bitwise equal."""
    a, b, c, d = philox(seed, 4 * first + (4 * i + tl.arange(0, 4)[None, :]))
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(i.shape[0], 16)
    return to_unit(words)

# ---- 3. The quantizers, on blocks in registers -------------------------------------------------------------
@triton.jit
def over_rows(t, ROWS: tl.constexpr, MAX: tl.constexpr):
    """t (B, 1) of rows of blocks -> the sum (in block_sum's order) or the maximum over each ROWS of them."""
    if ROWS > 1:
        rows = t.reshape(t.shape[0] // ROWS, ROWS)
        row = tl.max(rows, 1, keep_dims=True) if MAX else block_sum(rows)
        t = tl.broadcast_to(row, rows.shape).reshape(t.shape)
    return t

@triton.jit
def try_scale(b, amax, TOP: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr):
    """Round blocks b with amax mapped to TOP -> values q (B, 16), scales s (B, 1), squared errors (B, 1)."""
    s = round_scale(over(amax, TOP))
    q = e2m1(ratio(b, s, BF16))
    d = tl.fma(q, s, -b)                                                # q * s is exact
    return q, s, over_rows(block_sum(d * d), ROWS, False)

@triton.jit
def quantize_blocks(b, first, i, seed, QUANTIZER: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr):
    """b (B, 16), blocks with numbers first + i (B, 1) -> E2M1 values q (B, 16), scales s (B, 1) of 4 bits.

    The functions of quartet.py, in its order of operations. ROWS neighbouring rows of b share a scale.
    BF16: b holds values of bf16.
    """
    amax = block_amax(b)
    if ROWS > 1:                                                        # as integers, NaN is the largest
        amax = power_of_two(over_rows(bits(amax) & 0x7FFFFFFF, ROWS, True))
    amax = tl.where(amax < TINY, 0.0, amax)
    unit = tl.maximum(0.25 * power_of_two(bits(amax) & EXPONENT), 0.25 * TINY)
    unit = tl.minimum(unit, 4.2535295865117308e+37)                     # 2^125
    amax = amax * inverse(unit)                                         # in [4, 8): scales are in [1/2, 2]
    if QUANTIZER != "ms_eden":
        b = b * inverse(unit)
    if QUANTIZER == "rtn":
        s = round_scale(over(amax, 6.0))
        q = e2m1(ratio(b, s, BF16))
    elif QUANTIZER == "four_six":
        q4, s4, error4 = try_scale(b, amax, 4.0, ROWS, BF16)
        q, s, error = try_scale(b, amax, 6.0, ROWS, BF16)
        q, s = tl.where(error4 < error, q4, q), tl.where(error4 < error, s4, s)
    elif QUANTIZER == "sr":
        s = round_scale(over(amax, SR_MAX))
        q = round_by(ratio(b, s, False), uniform_blocks(seed, first, i), 0.5, 0x3F800000)
    else:                                                               # ms_eden
        s = over(amax, EDEN_MAX)
        r = tl.div_rn(1.0, tl.where(s > 0, s, 1.0) if INTERPRET else s)
        v = b * (tl.where(s > 0, r, 0.0) * inverse(unit))
        q = e2m1(v)
        vv, vq = block_sum(v * v), block_sum(v * q)
        s = s * tl.where(vq > 0, tl.div_rn(vv, vq), 1.0)
        s = round_scale_by(s, random_word(seed, first, i)) + (amax - amax)      # NaN again if it was
    return q, s * unit

@triton.jit
def store_blocks(q, s, first, i, mask, codes_ptr, scale_ptr, decoded_ptr, inverse_n):
    """Write blocks first + i: codes, scales (bf16: exact), decoded values / n (where wanted)."""
    tl.store(scale_ptr + first + i, s.to(tl.bfloat16), mask)
    if codes_ptr is not None:
        words = (codes_ptr + 8 * first).to(tl.pointer_type(tl.uint32))
        tl.store(words + (2 * i + tl.arange(0, 2)[None, :]), pack(q), mask)
    if decoded_ptr is not None:
        value = (q * (s * inverse_n)).to(tl.bfloat16)
        tl.store(decoded_ptr + 16 * first + (16 * i + tl.arange(0, 16)[None, :]), value, mask)

# ---- 4. Kernels --------------------------------------------------------------------------------------------
@triton.jit
def quantize_kernel(x_ptr, seed_ptr, codes_ptr, scale_ptr, top_ptr, decoded_ptr, count, columns,
                    QUANTIZER: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr):
    """Quantize B blocks of x, contiguous bf16 of count blocks, columns blocks a row, in one look at each."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[:, None]
    if ROWS > 1:                                                        # 16 rows of a block one after another
        tile, row = i // ROWS, i % ROWS
        i = (tile // columns * ROWS + row) * columns + tile % columns
    mask = i < count
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16          # else float32
    if BF16:                            # a word holds two neighbours; two loads, so that a thread gets both
        word = x_ptr.to(tl.pointer_type(tl.uint32)) + (8 * i + tl.arange(0, 4)[None, :])
        words = tl.join(tl.load(word, mask, 0), tl.load(word + 4, mask, 0)).permute(0, 2, 1)
        b = tl.join(words << 16, words & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:                               # four loads, for the same reason
        f = x_ptr + (16 * i + tl.arange(0, 4)[None, :])
        first = tl.join(tl.load(f, mask, 0.0), tl.load(f + 8, mask, 0.0))
        second = tl.join(tl.load(f + 4, mask, 0.0), tl.load(f + 12, mask, 0.0))
        b = tl.join(first, second).permute(0, 2, 3, 1)          # value 4 (2 a + b) + c is at c, a, b
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    q, s = quantize_blocks(b.reshape(B, 16), 0, i, seed, QUANTIZER, ROWS, BF16)
    store_blocks(q, s, 0, i, mask, codes_ptr, scale_ptr, decoded_ptr, 1.0)
    tl.atomic_max(top_ptr, tl.max(bits(s) & 0x7FFFFFFF), sem="relaxed")     # NaN is the largest; 0 outside

@triton.jit
def load_tile(x_ptr, scale_ptr, tensor_scale_ptr, m0, n0, M, N,
              H: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """H rows from m0, WIDTH columns from n0 of x (M, N) -> (H, WIDTH) bf16, 0 outside; WHOLE: N % 128 is 0"""
    m, inside = tl.arange(0, H)[:, None], tl.arange(0, H)[:, None] < M - m0
    if scale_ptr is None:
        n = tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + (m0.to(tl.int64) * N + n0) + (m * N + n), inside & ((n < N - n0) | WHOLE), 0.0)
    else:
        k, b = tl.arange(0, WIDTH // 2)[None, :], tl.arange(0, WIDTH // 16)[None, :]
        x_ptr += m0.to(tl.int64) * (N // 2) + n0 // 2
        scale_ptr += m0.to(tl.int64) * (N // 16) + n0 // 16
        byte = tl.load(x_ptr + (m * (N // 2) + k), inside & (k < (N - n0) // 2), 0).to(tl.int32)
        code = tl.join(byte & 15, byte >> 4).reshape(H, WIDTH // 16, 16)
        scale = tl.load(scale_ptr + (m * (N // 16) + b), inside & (b < (N - n0) // 16), 0).to(tl.int32)
        scale = power_of_two(scale << 20) * 1.329227995784916e+36 * tl.load(tensor_scale_ptr)       # 2^120
        q = power_of_two((code & 7) << 22 | (code & 8) << 28) * 8.507059173023462e+37               # 2^126
        x = (q * scale[:, :, None]).reshape(H, WIDTH).to(tl.bfloat16)                      # exact
    return x

@triton.jit
def rotate_tile(x, R):
    """x (H, 128) bf16 -> the blocks of x R, (8 H, 16) float32. R (128, 128) bf16, `permuted`."""
    if INTERPRET:                                                       # it multiplies bf16 as integers
        x, R = x.to(tl.float32), R.to(tl.float32)
    y = tl.dot(x, R)                                                    # column 64 g + 8 i + 2 t + j
    return y.reshape(x.shape[0], 2, 8, 4, 2).permute(0, 1, 3, 2, 4).reshape(x.shape[0] * 8, 16)

@triton.jit
def tile_kernel(x_ptr, x_scale_ptr, x_tensor_scale_ptr, M, N,
                row_R, row_seed, row_codes, row_scale, row_top, row_decoded, row_inverse_n,
                col_R, col_seed, col_codes, col_scale, col_top, col_decoded, col_inverse_n,
                ROW: tl.constexpr, COL: tl.constexpr, H: tl.constexpr):
    """Rotate and quantize a 128 x 128 tile of x (M, N) along N by ROW and along M by COL, H rows at a time.

    x is bf16, or, with scales, NVFP4. ROW, COL: a quantizer or "". Rows of the second result are columns of
    x; it is as long as whole tiles, and what x lacks is 0. A tile comes from memory once, then from a cache.
    """
    m0, n0, r = tl.program_id(0) * 128, tl.program_id(1) * 128, tl.arange(0, 128)
    row, k = tl.arange(0, 8 * H)[:, None] >> 3, tl.arange(0, 8 * H)[:, None] & 7        # of a block
    if ROW != "":
        seed = tl.load(row_seed) if row_seed is not None else 0
        R = tl.load(row_R + r[:, None] * 128 + r[None, :])
        for h in tl.static_range(0, 128, H):
            x = load_tile(x_ptr, x_scale_ptr, x_tensor_scale_ptr, m0 + h, n0, M, N, H, 128, True)
            first, i = (m0 + h).to(tl.int64) * (N // 16) + n0 // 16, row * (N // 16) + k
            q, s = quantize_blocks(rotate_tile(x, R), first, i, seed, ROW, 1, False)
            store_blocks(q, s, first, i, row < M - m0 - h, row_codes, row_scale, row_decoded, row_inverse_n)
            top = tl.maximum(top, bits(s) & 0x7FFFFFFF) if h > 0 else bits(s) & 0x7FFFFFFF
        tl.atomic_max(row_top, tl.max(top), sem="relaxed")
    if COL != "":
        seed = tl.load(col_seed) if col_seed is not None else 0
        R = tl.load(col_R + r[:, None] * 128 + r[None, :])
        columns = tl.num_programs(0) * 8
        for h in tl.static_range(0, 128, H):
            x = load_tile(x_ptr, x_scale_ptr, x_tensor_scale_ptr, m0, n0 + h, M, N, 128, H, ROW != "")
            first, i = (n0 + h).to(tl.int64) * columns + m0 // 16, row * columns + k
            q, s = quantize_blocks(rotate_tile(x.T, R), first, i, seed, COL, 1, False)
            store_blocks(q, s, first, i, row < N - n0 - h, col_codes, col_scale, col_decoded, col_inverse_n)
            top = tl.maximum(top, bits(s) & 0x7FFFFFFF) if h > 0 else bits(s) & 0x7FFFFFFF
        tl.atomic_max(col_top, tl.max(top), sem="relaxed")

@triton.jit
def encode_kernel(scale_ptr, top_ptr, seed_ptr, e4m3_ptr, tensor_scale_ptr, codes_ptr, decoded_ptr, count,
                  inverse_n, AGAIN: tl.constexpr, B: tl.constexpr):
    """quartet.assemble's end: the tensor scale, and scales of 4 bits as E4M3 bytes. Bitwise equal.

    Scales among E4M3's sub-normals are rounded once more, by noise AGAIN numbers a block further on (0: to
    nearest), and their blocks decoded again; if top is not finite, all is: to NaN, and codes are 0.
    """
    first, i = tl.program_id(0).to(tl.int64) * B, tl.arange(0, B)[:, None]
    mask, top = i < (count - first).to(tl.int32), tl.load(top_ptr)
    s = tl.load(scale_ptr + first + i, mask, 0.0).to(tl.float32)
    power = power_of_two(top + 1048576 & EXPONENT)                      # 1.875 * 2^8 would exceed 448
    tensor_scale = tl.where(top > 0, tl.maximum(power * 0.00390625, 9.4039548065783e-38), 1.0)      # 2^-123
    v = tl.minimum(s * inverse(tensor_scale), 448.0)
    if tl.max(((v > 0) & (v < 0.015625)).to(tl.int32)) > 0:             # hardly ever: else v is E4M3 already
        if AGAIN == 0:
            magic = tl.maximum(power_of_two(bits(v) & EXPONENT), 0.015625) * 1572864.0
            v = v + magic - magic
        else:
            word = random_word(tl.load(seed_ptr), 0, AGAIN * count.to(tl.int64) + first + i)
            v = round_by(v, to_unit(word), 0.125, 0x3C800000)           # 2^-6
    finite = top < EXPONENT
    v, tensor_scale = tl.where(finite, v, 0.0), tl.where(finite, tensor_scale * inverse_n, float("nan"))
    byte = bits(v * 7.52316384526264e-37) >> 20                         # 2^-120 moves exponents to E4M3's
    tl.store(e4m3_ptr + first + i, byte.to(tl.uint8), mask)
    if tl.program_id(0) == 0:
        tl.store(tensor_scale_ptr, tensor_scale)
    if codes_ptr is not None:
        if not finite:
            tl.store(codes_ptr + 8 * first + (8 * i + tl.arange(0, 8)[None, :]), 0, mask)
    if decoded_ptr is not None:
        again = (v * tensor_scale != s * inverse_n) & mask
        if tl.max(again.to(tl.int32)) > 0:                              # hardly ever
            value = decoded_ptr + 16 * first + (16 * i + tl.arange(0, 16)[None, :])
            q = tl.div_rn(tl.load(value, again, 0.0).to(tl.float32), tl.where(s > 0, s * inverse_n, 1.0))
            tl.store(value, (q * (v * tensor_scale)).to(tl.bfloat16), again)

# ---- 5. The functions of quartet.py ------------------------------------------------------------------------
LAUNCH = dict(enable_fp_fusion=False)           # a product and a sum are rounded apart, as in quartet.py

def tile_options(major):
    """H and launch options of tile_kernel by compute capability: the fewest instructions without spills."""
    if major == 9:                                                      # wgmma; 128: two on a multiprocessor
        return dict(H=64, num_warps=8, num_stages=1, maxnreg=128)
    if major == 10:                                                     # tcgen05 leaves whole rows to threads
        return dict(H=64, num_warps=4, num_stages=1)
    return dict(H=128, num_warps=8, num_stages=1)                       # mma.sync

def results(like, rows, columns, codes, decoded):
    """New codes, block_scale (uint8), tensor_scale, decoded for (rows, columns). Not wanted: no columns."""
    new = lambda dtype, *shape: like.new_empty(shape, dtype=dtype)
    return [new(torch.uint8, rows, columns // 2 if codes else 0), new(torch.uint8, rows, columns // BLOCK),
            new(torch.float32), new(torch.bfloat16, rows, columns if decoded else 0)]

def first_pass(out):
    """out of `results` -> what a kernel writes first: codes, scale (bf16), top, decoded. Not wanted: None."""
    codes, e4m3, tensor_scale, decoded = out
    return (codes if codes.numel() else None, torch.empty_like(e4m3, dtype=torch.bfloat16),
            torch.zeros_like(tensor_scale, dtype=torch.int32), decoded if decoded.numel() else None)

def encode(out, written, quantizer, seed, inverse_n=1.0):
    """Finish out, `results` whose `first_pass` is written: block_scale and tensor_scale. -> out"""
    codes, scale, top, decoded = written
    grid = max(1, triton.cdiv(scale.numel(), 256))
    encode_kernel[(grid,)](scale, top, seed, out[1], out[2], codes, decoded, scale.numel(), inverse_n,
                           STOCHASTIC.get(quantizer, 0), 256, **LAUNCH)
    return out

@torch.library.custom_op("quartet::quantize", mutates_args=())
def quantize(x: torch.Tensor, quantizer: str, rows: int, seed: torch.Tensor | None, codes: bool,
             decoded: bool) -> list[torch.Tensor]:
    """x (M, K) -> `results`; blocks of rows x 16."""
    out, B = results(x, *x.shape, codes, decoded), 128
    written = first_pass(out)
    if count := out[1].numel():                                         # bf16 is read by words of 4 bytes
        x = x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % 4 else x.contiguous()
        quantize_kernel[(triton.cdiv(count, B),)](x, seed, *written, count, x.shape[1] // BLOCK,
                                                  quantizer, rows, B, **LAUNCH)
    return encode(out, written, quantizer, seed)

@quantize.register_fake
def _(x, quantizer, rows, seed, codes, decoded):
    return results(x, *x.shape, codes, decoded)

def both_results(x, row, col, codes, decoded):
    """M, N of rotate_quantize's x, and `results` along each axis, the second of whole groups; [] for none."""
    M, N = x[0].shape[0], x[0].shape[1] * min(2, len(x))                # a byte holds two codes
    return (M, N, results(x[0], M, N, codes, decoded) if row else [],
            results(x[0], N, (M + GROUP - 1) // GROUP * GROUP, codes, decoded) if col else [])

@torch.library.custom_op("quartet::rotate_quantize", mutates_args=())
def rotate_quantize(
        x: list[torch.Tensor], row: str, row_R: torch.Tensor | None, row_seed: torch.Tensor | None,
        col: str, col_R: torch.Tensor | None, col_seed: torch.Tensor | None, inverse_n: float,
        codes: bool, decoded: bool) -> list[torch.Tensor]:
    """One read of x -> `results` of x row_R by quantizer row, then of x^T col_R by col; "" for none.

    x: [bf16 (M, N)], or the first three `results` of it. R (128, 128) bf16, `permuted`; seeds () int64.
    x^T (N, M) gets zeros up to M % 128 == 0. inverse_n: 1 / n of the second, a factor of its tensor scale.
    """
    M, N, *outs = both_results(x, row, col, codes, decoded)
    first, second = (first_pass(out) if out else [None] * 4 for out in outs)
    if M and N:
        source = [t.contiguous() for t in x] + [None] * (3 - len(x))
        options = tile_options(torch.cuda.get_device_capability(x[0].device)[0] if x[0].is_cuda else 9)
        tile_kernel[triton.cdiv(M, GROUP), triton.cdiv(N, GROUP)](
            *source, M, N, row_R, row_seed, *first, 1.0, col_R, col_seed, *second, inverse_n, row, col,
            **options, **LAUNCH)
    return ((encode(outs[0], first, row, row_seed) if row else [])
            + (encode(outs[1], second, col, col_seed, inverse_n) if col else []))

@rotate_quantize.register_fake
def _(x, row, row_R, row_seed, col, col_R, col_seed, inverse_n, codes, decoded):
    return sum(both_results(x, row, col, codes, decoded)[2:], [])

def supports(row):
    """Whether the kernels have a mode for every quantizer of a row of RECIPES (None: bf16)."""
    return row is None or {*MODES, None}.issuperset(
        (row.x.removesuffix("_16x16"), row.w.removesuffix("_16x16"), *row.dx[1:], *row.dw[1:]))

def permuted(R):
    """R (128, 128) -> bf16, with column 64 g + 16 t + 2 i + j at 64 g + 8 i + 2 t + j: see rotate_tile."""
    return R.view(GROUP, 2, 4, 8, 2).transpose(2, 3).reshape(GROUP, GROUP).bfloat16()

def of(x, quantizer, seed=0, block=(1, BLOCK), R=None):
    """x (..., K) on a GPU -> NVFP4 of x or x R by a quantizer. ValueError for what quartet.blocks refuses."""
    quartet.blocks(torch.empty(x.shape, dtype=x.dtype, device="meta"), block)
    seed, flat = torch.as_tensor(seed, dtype=torch.int64, device=x.device), x.reshape(-1, x.shape[-1])
    if R is None:
        flat = flat if x.dtype == torch.bfloat16 else flat.float()
        codes, scale, tensor_scale, _ = quantize(flat, quantizer, block[0], seed, True, False)
    else:
        codes, scale, tensor_scale, _ = rotate_quantize(
            [flat], quantizer, permuted(R), seed, "", None, None, 1.0, True, False)
    shape = lambda k: (*x.shape[:-1], x.shape[-1] // k)
    return NVFP4(codes.view(shape(2)), scale.view(shape(BLOCK)).view(torch.float8_e4m3fn), tensor_scale)

def rtn(x, block=(1, BLOCK)):
    """quartet.rtn. Bitwise equal."""
    return of(x, "rtn", block=block)
def four_six(x, block=(1, BLOCK)):
    """quartet.four_six. Bitwise equal."""
    return of(x, "four_six", block=block)
def sr(x, seed):
    """quartet.sr. Bitwise equal."""
    return of(x, "sr", seed)
def ms_eden(x, R, seed):
    """quartet.ms_eden, for x in bf16, or rotated already if R is None: then bitwise equal.

    The sums of x R are float32 in the order of the tensor cores: their last bits may differ. ValueError for
    x of another dtype, or whose last dimension has no whole groups of 128.
    """
    if R is not None and (x.dtype != torch.bfloat16 or x.shape[-1] % GROUP):
        raise ValueError(f"{x.dtype} {tuple(x.shape)}: rotate bfloat16 with a last dimension % {GROUP} == 0")
    return of(x, "ms_eden", seed, R=R)

# ---- 6. The linear layer -----------------------------------------------------------------------------------
def rotation(name, words):
    """quartet.backward_matmul's R, permuted, and 1 / n, from words (4,) int64; of None: I, which is exact."""
    if name is None:
        return permuted(torch.eye(GROUP, device=words.device)), 1.0
    signs = (words[:, None] >> torch.arange(64, device=words.device) & 1).view(2, GROUP) * 2.0 - 1.0
    R, n = quartet.rotation_from(name, signs)
    return permuted(R), 1.0 / n

class QuantizedMatmul(torch.autograd.Function):
    """quartet.QuantizedMatmul: x (M, K), w (N, K) bf16 -> x w^T (M, N) bf16, all three GEMMs by a recipe."""
    @staticmethod
    def forward(ctx, x, w, recipe):
        row = quartet.RECIPES[recipe]
        (*xq, x_decoded), (*wq, w_decoded) = (
            quantize(t, q.removesuffix("_16x16"), BLOCK if q.endswith("_16x16") else 1, None, True, True)
            for t, q in ((x, row.x), (w, row.w)))
        ctx.recipe = recipe
        ctx.save_for_backward(*wq, *((x,) if row.original_x else xq))
        return quartet.gemm(x_decoded, w_decoded)

    @staticmethod
    def backward(ctx, dy):
        row, dx, dw = quartet.RECIPES[ctx.recipe], None, None
        wq, xq = ctx.saved_tensors[:3], list(ctx.saved_tensors[3:])
        with torch.autocast(dy.device.type, enabled=False):
            words = quartet.draw(dy, 12)
            (R1, inverse1), (R2, inverse2) = rotation(row.dx[0], words[:4]), rotation(row.dw[0], words[6:10])
            rotated = row.dx[0] is not None
            first = row.dx[1] if ctx.needs_input_grad[0] and rotated else ""
            second = row.dw[1] if ctx.needs_input_grad[1] else ""
            e = rotate_quantize([dy], first, R1, words[5], second, R2, words[11], 1.0, False, True)
            if ctx.needs_input_grad[0]:
                e1 = e[3] if rotated else quantize(dy, row.dx[1], 1, words[5], False, True)[3]
                if row.dx[2]:
                    w = rotate_quantize(wq, "", None, None, row.dx[2], R1, words[4], inverse1, False, True)[3]
                    w = w[:, :dy.shape[1]]
                else:
                    w = quartet.decode(NVFP4(wq[0], wq[1].view(torch.float8_e4m3fn), wq[2]), torch.bfloat16).T
                dx = quartet.gemm(e1, w)
            if ctx.needs_input_grad[1]:
                x = rotate_quantize(xq, "", None, None, row.dw[2], R2, words[10], inverse2, False, True)[3]
                dw = quartet.gemm(e[-1], x)
        return dx, dw, None

# ---- 7. Compile for a GPU that is not here, and count ------------------------------------------------------
# capability, lane-instructions/s (multiprocessors x 128 x clock), bytes/s, dense FLOP/s in bf16 and in FP4
TARGETS = dict(sm_90a=(90, 30e12, 3.35e12), sm_100a=(100, 35e12, 8e12, 2.25e15, 9e15),        # H100, B200
               sm_103a=(103, 35e12, 8e12, 2.25e15, 13.1e15),                                  # B300
               sm_120a=(120, 52e12, 1.79e12, 0.2095e15, 1.676e15))                            # RTX 5090
TYPES = dict(x="*bf16", R="*bf16", seed="*i64", codes="*u8", scale="*bf16", top="*i32", decoded="*bf16",
             e4m3="*u8", x_scale_ptr="*u8", tensor_scale_ptr="*fp32", x_tensor_scale_ptr="*fp32", n="fp32",
             count="i32", columns="i32", M="i32", N="i32")      # of an argument: by its name or last word
KINDS = dict(float="F(?!2|LO)|MUFU|HMMA|HGMMA", convert="F2|I2", memory="U?LD|U?ST|ATOM|RED|UBLK",
             control="B|EXIT|WARPSYNC|NOP|S2|CS2|DEPBAR|CALL|RET|ELECT|SYNCS", integer="")     # the first fit
# A layer's width h, its MLP's f, its speed-up over bf16, measured in arXiv:2601.22813 on an RTX 5090: forward
# and backward of linears of (in, out) = (h, 3h) (h, h) (h, 2f) (f, h)
PAPER = {"800M": (2048, 5632, 3.12), "3B": (3072, 8192, 3.64), "7B": (4096, 11008, 3.89),
         "22B": (6144, 16384, 4.19)}
TOKENS = 16384

def configurations(major):
    """What training launches: name, kernel, constants (None: absent), options, values and bytes a value."""
    native, options = major >= 10, tile_options(major)
    skip, out = ("decoded", 0.5) if native else ("codes", 2.0)          # what no GEMM takes; else bytes
    flat = dict(ROWS=1, B=128, **({"decoded_ptr": None} if native else {}))
    for q in ("rtn", "four_six", "sr"):             # bytes: 2 in, codes, decoded, and 1/8 of scales
        yield f"quantize {q}", quantize_kernel, dict(flat, QUANTIZER=q), {}, 2048, 2.625 + 2 * (not native)
    tile = {f"row_{skip}": None, f"col_{skip}": None, "H": options.pop("H"), "COL": "ms_eden"}
    both = dict(tile, ROW="ms_eden", x_scale_ptr=None, x_tensor_scale_ptr=None)
    yield "both ms_eden", tile_kernel, both, options, 16384, 2 + 2 * (out + 0.125)
    absent = dict.fromkeys(["row_R", "row_seed", "row_codes", "row_scale", "row_top", "row_decoded"])
    again = dict(tile, ROW="", **absent)
    yield "requantize ms_eden", tile_kernel, again, options, 16384, 0.5625 + out + 0.125
    encode = dict(AGAIN=1, B=256, **{"decoded_ptr" if native else "codes_ptr": None})
    yield "encode ms_eden", encode_kernel, encode, {}, 4096, 0.1875

def compile_for(target, dump):
    """Compile every kernel for a target, print what it costs there -> whether none fails or spills.

    Instructions are static: a thread's, of all paths (encode's include the rare ones), times threads by
    values; loops are unrolled. The bound is bytes or instructions over what the GPU can do, the larger.
    dump: a directory for cubins, PTX and SASS.
    """
    capability, issue, bandwidth, *flops = TARGETS[target]
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    print(f"{target}: per value, and ns per million values")
    print(f"{'kernel':20}{'registers':>10}{'shared':>8}{'spills':>7}",
          *(f"{kind:>8}" for kind in KINDS), f"{'bytes':>6}{'bound':>7}  by")
    good, bounds = True, {}
    for name, kernel, constants, options, values, size in configurations(capability // 10):
        signature = {n: "constexpr" if n in constants else
                     TYPES.get(n) or TYPES[n.removesuffix("_ptr").split("_")[-1]] for n in kernel.arg_names}
        if name.startswith("requantize"):
            signature["x_ptr"] = "*u8"
        attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values())
                      if kind[0] == "*" or kind == "i32"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        try:
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options | LAUNCH)
        except Exception as e:                      # Triton has no common class for what a compiler may raise
            print(f"{name:20} does not compile: {type(e).__name__} {e}")
            good = False
            continue
        file = str(Path(dump, f"{target}-{name}".replace(" ", "-")))
        Path(file + ".cubin").write_bytes(compiled.asm["cubin"])
        sass = subprocess.check_output([cuobjdump, "-res-usage", "-sass", file + ".cubin"], text=True)
        for suffix, text in ("ptx", compiled.asm["ptx"]), ("sass", sass):
            Path(f"{file}.{suffix}").write_text(text)
        registers, stack = (int(re.search(rf"{word}:(\d+)", sass)[1]) for word in ("REG", "STACK"))
        codes = re.findall(r"^\s+/\*\w{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", sass, re.M)
        kinds = [next(kind for kind, pattern in KINDS.items() if re.match(pattern, c)) for c in codes]
        share, spills = options.get("num_warps", 4) * 32 / values, sum(c in ("LDL", "STL") for c in codes)
        good = good and not spills and not stack
        by_bytes, by_issue = size / bandwidth * 1e15, len(codes) * share / issue * 1e15
        bounds[name] = by_bytes if kernel is encode_kernel else max(by_bytes, by_issue)     # no rare paths
        print(f"{name:20}{registers:10}{compiled.metadata.shared:8}{spills:7}"
              + "".join(f"{kinds.count(kind) * share:9.1f}" for kind in KINDS)
              + f"{size:7.2f}{max(by_bytes, by_issue):7.0f}  " + ("bytes" if by_bytes > by_issue else
              f"instructions, {by_issue / by_bytes:.1f} times bytes"))
    if good and flops:
        predict(bounds, *flops)
    return good

def predict(bounds, bf16, fp4):
    """Print how fast PAPER's layers could be, by bounds in ns per million values and GEMMs in FLOP/s."""
    print(f"PREDICTED, from these bounds (encode: bytes) and published peaks of {bf16 / 1e12:g} and "
          f"{fp4 / 1e12:g} TFLOP/s; nothing was run:\nforward + backward over bf16, {TOKENS} tokens; in "
          "brackets what the paper measured on an RTX 5090")
    x_w, dy_both, encode = (1e-15 * sum(bounds[name] for name in names) for names in (
        ("quantize four_six", "requantize ms_eden"), ("both ms_eden",), ("encode ms_eden",) * 2))
    for model, (h, f, paper) in PAPER.items():
        x, w, dy = TOKENS * (3 * h + f), 4 * h * h + 3 * h * f, TOKENS * (5 * h + 2 * f)       # values
        time = 6 * TOKENS * w / fp4 + (x + w) * (x_w + encode) + dy * (dy_both + encode)
        print(f"{model:>5}: {6 * TOKENS * w / bf16 / time:.2f} ({paper})")

# ---- 8. Check and time on the GPU that is here -------------------------------------------------------------
def cases(x, flat, rotated):
    """Yield ops on x (M, K): name, inputs, ours(decoded) -> all `results`, theirs() -> NVFP4 of each.

    decoded: values too, or, rotated, instead of codes, as a GEMM in bf16 takes them.
    """
    R, _ = quartet.rotation("rht128x2", torch.Generator(x.device))
    t, P, (seed, again) = quartet.rtn(x), permuted(R), torch.tensor([5, 2**40 + 1], device=x.device)
    packed = [t.codes, t.block_scale.view(torch.uint8), t.tensor_scale]
    turned = lambda x: F.pad(x, (0, 0, 0, -len(x) % GROUP)).T
    for name in flat:
        q, rows, f = name.removesuffix("_16x16"), 16 if "16x16" in name else 1, quartet.QUANTIZERS[name]
        if len(x) % rows == 0:
            ours = lambda decoded: quantize(x, q, rows, seed, True, decoded)
            yield name, [x], ours, lambda: [f(x, None, seed)]
    for q in rotated:
        f, col = quartet.QUANTIZERS[q], (q, P, again, 1.0)
        yield (f"{q}, both ways", [x],
               lambda decoded: rotate_quantize([x], q, P, seed, *col, not decoded, decoded),
               lambda: [f(x, R, seed), f(turned(x), R, again)])
        yield (f"{q}, requantized", packed,
               lambda decoded: rotate_quantize(packed, "", None, None, *col, not decoded, decoded),
               lambda: [f(turned(quartet.decode(t, torch.bfloat16)), R, again)])

def check(device, shapes):
    """Compare the ops with quartet.py, bit for bit, on x (M, K) of shapes; print -> whether all agree.

    x is integers, every other 128 rows times 2^-16: sums of x R are exact, some scales sub-normal.
    """
    good, known = True, [name for name in quartet.QUANTIZERS if name.removesuffix("_16x16") in MODES]
    for M, K in shapes:
        x = torch.randint(-9, 10, (M, K), device=device).bfloat16()
        x *= 2.0 ** (-16 * (torch.arange(M, device=device)[:, None] // GROUP % 2))
        for name, _, ours, theirs in cases(x, known, ("rtn", "sr", "ms_eden")):
            expected = [part for t in theirs() for part in (
                t.codes, t.block_scale.view(torch.uint8), t.tensor_scale, quartet.decode(t, torch.bfloat16))]
            for decoded in (False, True):
                parts = zip((*NVFP4._fields, "decoded") * 2, ours(decoded), expected)
                if wrong := [part for part, a, b in parts if a.numel() and not torch.equal(a, b)]:
                    print(f"{M} x {K}, {name}: {', '.join(wrong)} not as quartet.py's")
                    good = False
    print("every op gives quartet.py's bits:", good)
    return good

def time_quantizers(x, native):
    """Print the time of ops on x, all launches, beside that of quartet.py's functions under torch.compile."""
    seconds = lambda f: triton.testing.do_bench_cudagraph(f, return_mode="median") * 1e-3
    source, copy = torch.empty(2, 2**30, dtype=torch.uint8, device=x.device)
    peak = 2 * copy.nbytes / seconds(lambda: copy.copy_(source))
    title = f"{len(x)} x {x.shape[1]}; a copy: {peak / 1e12:.2f} TB/s"
    print(f"\n{title:34}{'B/value':>8}{'us':>8}{'TB/s':>6}{'of copy':>8}{'compiled':>10}{'ratio':>6}")
    for name, inputs, ours, theirs in cases(x, ("rtn", "four_six", "sr"), ("ms_eden",)):
        for decoded in (False,) if native else (False, True):
            torch.compiler.reset()                  # else it gives up after some compilations of a function
            rival = torch.compile(lambda: [quartet.decode(t, torch.bfloat16) if decoded else t
                                           for t in theirs()])
            out = ours(decoded)                     # scales go through memory as bf16, there and back, too
            size = sum(t.nbytes for t in inputs + out) + 4 * sum(scale.numel() for scale in out[1::4])
            time, other = seconds(lambda: ours(decoded)), seconds(rival)
            print(f"{name + ', decoded' * decoded:34}{size / x.numel():8.2f}{time * 1e6:8.1f}"
                  f"{size / time / 1e12:6.2f}{size / time / peak:8.0%}{other * 1e6:10.1f}{other / time:6.1f}")

def benchmark(device, native):
    """Print the time of quantizers, and of linear layers forward and backward by every recipe."""
    torch.set_float32_matmul_precision("high")      # TF32 for the rival's x R: exact if x is bf16
    for shape in (TOKENS, 4096), (2 * TOKENS, 3072):
        time_quantizers(torch.randn(shape, device=device).bfloat16(), native)
    def ms(recipe, K, N):
        layer = quartet.Linear(K, N, recipe=recipe, backend="triton", device=device, dtype=torch.bfloat16)
        x, dy = (torch.randn(TOKENS, n, device=device).bfloat16() for n in (K, N))
        step = lambda: torch.autograd.grad(layer(x.requires_grad_()), (x, layer.weight), dy)
        return triton.testing.do_bench(step, return_mode="median")
    print(f"\nlinear layer, {TOKENS} x 4096 x 4096, forward + backward: ms, speed over bf16, time over bf16")
    for recipe in (recipe for recipe, row in quartet.RECIPES.items() if supports(row)):
        bf16, time = (ms(r, 4096, 4096) for r in ("bf16", recipe))
        print(f"{recipe:12}{time:8.3f}{bf16 / time:7.2f}{time / bf16 - 1:+8.0%}")
    for model, (h, f, paper) in PAPER.items() if native else ():
        layers = (h, 3 * h), (h, h), (h, 2 * f), (f, h)
        bf16, time = (sum(ms(recipe, *layer) for layer in layers) for recipe in ("bf16", "quartet2"))
        print(f"{model:>5}: quartet2 {bf16 / time:.2f} times as fast as bf16 (paper, RTX 5090: {paper})")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, help="compile for this GPU, here or not, and count")
    parser.add_argument("--dump", metavar="DIR", help="with --target: keep cubins, PTX, SASS there")
    arguments = parser.parse_args()
    if arguments.target:
        with tempfile.TemporaryDirectory() as directory:
            sys.exit(not compile_for(arguments.target, arguments.dump or directory))
    if not torch.cuda.is_available():
        sys.exit("to check and time the kernels, python kernels.py needs a GPU; --target works anywhere")
    quartet.kernels = sys.modules["kernels"] = sys.modules[__name__]        # what quartet.py imports is this
    good = check("cuda", [(1, 128), (140, 256), (16, 4096), (4112, 1536)])
    print(torch.cuda.get_device_name())
    benchmark("cuda", torch.cuda.get_device_capability() >= (10, 0))
    sys.exit(not good)
