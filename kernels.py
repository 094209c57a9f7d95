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
such that what a thread holds of x R is whole blocks.
"""
import os, sys
from pathlib import Path
import torch, torch.nn.functional as F
from torch import library
import triton
import triton.language as tl
import quartet
from quartet import BLOCK, GROUP, NVFP4, SEARCH as STEPS

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")     # kernels run in Python, on a CPU
TINY, U24, EXPONENT, SR_MAX, EDEN_MAX, ROUNDS, SEARCH, COUNT = map(tl.constexpr, (2.0**-120, 2.0**-24,
    quartet.EXPONENT, quartet.SR_MAX, quartet.EDEN_MAX, quartet.PHILOX_ROUNDS, STEPS, len(STEPS)))
TO_E2M1 = tl.constexpr("{ .reg .b8 a, b, c, d; " + "".join(             # PTX: codes of eight floats
    f"cvt.rn.satfinite.e2m1x2.f32 {byte}, ${high}, ${high - 1}; " for byte, high in zip("abcd", (2, 4, 6, 8)))
    + "mov.b32 $0, {a, b, c, d}; }")
MODES = "rtn", "four_six", "scale_search", "sr", "ms_eden", "ms_eden_46"        # quantizers
STOCHASTIC = dict(sr=BLOCK, ms_eden=1, ms_eden_46=1)    # that draw: how many u a block before assemble's

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
    magic = tl.maximum((bits(v) & EXPONENT) + 0x0B400000, 0x4AC00000)   # 1.5 * 2^23 times the ulp, which is
    return v + power_of_two(magic) - power_of_two(magic)                # half the power below v, at least 0.5
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
def tree(t, MAX: tl.constexpr):
    """t (B, 16) -> (B, 1): sums in quartet.block_sum's order, bitwise equal; or maxima, where NaN wins."""
    for _ in tl.static_range(4):
        low, high = tl.split(t.reshape(t.shape[0], 2, t.shape[1] // 2).permute(0, 2, 1))
        t = tl.maximum(low, high, propagate_nan=tl.PropagateNan.ALL) if MAX else low + high
    return t
@triton.jit
def over_rows(t, ROWS: tl.constexpr, MAX: tl.constexpr):
    """t (B, 1) -> (B, 1): the sum or the maximum over each ROWS of its rows, 1 or 16."""
    if ROWS > 1:
        rows = t.reshape(t.shape[0] // ROWS, ROWS)
        t = tl.broadcast_to(tree(rows, MAX), rows.shape).reshape(t.shape)
    return t

@triton.jit
def over(a, C: tl.constexpr):
    """quartet.over: a / C for a constant, correctly rounded, by Markstein's division: C^-1 is."""
    v = a * (1.0 / C)                     # numpy has no fused multiply-add
    return tl.div_rn(a, C) if INTERPRET else tl.fma(tl.fma(-v, C, a), 1.0 / C, v)

@triton.jit
def ratio(b, s, BF16: tl.constexpr):
    """b (B, 16) / s (B, 1) of round_scale, correctly rounded as in `over`; 0 where s is 0 or NaN.

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
def pack(q, FP4: tl.constexpr):
    """q (B, 16) E2M1 values -> codes (B, 2) uint32, eight in each, the first value's in the lowest bits.

    As a float32, q * 2^-126 has the code in bits 22 to 24, the sign in bit 31; times 65, in the first four.
    FP4: the GPU has an instruction for two values (which makes 8 of -0.0, but q is never that).
    """
    top = q if FP4 else (q * 1.1754943508222875e-38).to(tl.uint32, bitcast=True) * 65
    even, odd = tl.split(top.reshape(q.shape[0], 2, 2, 2, 2))
    even0, even2 = tl.split(even)
    odd1, odd3 = tl.split(odd)
    v0, v4 = tl.split(even0)
    v2, v6 = tl.split(even2)
    v1, v5 = tl.split(odd1)
    v3, v7 = tl.split(odd3)
    if FP4:
        word = tl.inline_asm_elementwise(TO_E2M1, "=r,f,f,f,f,f,f,f,f", [v0, v1, v2, v3, v4, v5, v6, v7],
                                         tl.uint32, True, 1)
    else:
        word = behind(behind(behind(v7 >> 28, v6), v5), v4)
        word = behind(behind(behind(behind(word, v3), v2), v1), v0)
    return word

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
def uniform_blocks(seed, first, i):
    """u (B, 16) of the elements of blocks first + i, 16 a block, as quartet.uniform's. Bitwise equal."""
    a, b, c, d = philox(seed, 4 * first + (4 * i + tl.arange(0, 4)[None, :]))
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(i.shape[0], 16)
    return (words >> 8).to(tl.float32) * U24

# ---- 3. The quantizers, on blocks in registers -------------------------------------------------------------
@triton.jit
def try_scale(b, s, CLIP: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr):
    """Blocks b by scales s (B, 1) to nearest -> values q (B, 16), s, squared errors (B, 1)."""
    q = e2m1(ratio(b, s, BF16))
    q = tl.clamp(q, -6.0, 6.0) if CLIP else q
    d = tl.fma(q, s, -b)                                                # q * s is exact
    return q, s, over_rows(tree(d * d, False), ROWS, False)
@triton.jit
def better(new, found):
    """Of two results of `try_scale`, block by block that of less error; ties: found."""
    q, s, error = new
    less = error < found[2]
    return tl.where(less, q, found[0]), tl.where(less, s, found[1]), tl.where(less, error, found[2])

@triton.jit
def quantize_blocks(b, first, i, seed, QUANTIZER: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr):
    """b (B, 16), blocks with numbers first + i (B, 1) -> E2M1 values q (B, 16), scales s (B, 1).

    The functions of quartet.py, in its order of operations ("bf16": b and 1). ROWS neighbouring rows of b
    share a scale. BF16: b holds values of bf16.
    """
    amax = over_rows(tree(tl.abs(b), True), ROWS, True)
    amax = tl.where(amax < TINY, 0.0, amax)
    unit = tl.maximum(0.25 * power_of_two(bits(amax) & EXPONENT), 0.25 * TINY)
    unit = tl.minimum(unit, 4.2535295865117308e+37)                     # 2^125
    amax = amax * inverse(unit)                                         # in [4, 8): scales are in [1/2, 2]
    if QUANTIZER.startswith("ms_eden"):
        s = over(amax, EDEN_MAX)
        r = tl.div_rn(1.0, tl.where(s > 0, s, 1.0) if INTERPRET else s)
        v = b * (tl.where(s > 0, r, 0.0) * inverse(unit))
        q = e2m1(v)
        vv, vq = tree(v * v, False), tree(v * q, False)
        if QUANTIZER == "ms_eden_46":
            q4 = e2m1(v * 0.6666666865348816)                           # float32(2 / 3)
            qq, vq4, qq4 = tree(q * q, False), tree(v * q4, False), tree(q4 * q4, False)
            four = vq4 * vq4 * qq > vq * vq * qq4                       # the larger cosine
            q = e2m1(v * tl.where(four, 0.6666666865348816, 1.0))       # again: registers are scarcer
            vq = tl.where(four, vq4, vq)
        s = s * tl.where(vq > 0, tl.div_rn(vv, vq), 1.0)
        s = round_scale_by(s, random_word(seed, first, i)) + (amax - amax)      # NaN again if it was
    elif QUANTIZER == "sr":
        s = round_scale(over(amax, SR_MAX))
        q = round_by(ratio(b * inverse(unit), s, False), uniform_blocks(seed, first, i), 0.5, 0x3F800000)
    elif QUANTIZER == "bf16":
        q, s = b, inverse(unit)
    else:
        b, six = b * inverse(unit), round_scale(over(amax, 6.0))
        found = try_scale(b, six, False, ROWS, BF16)                    # rtn needs no error: not computed
        if QUANTIZER == "four_six":
            found = better(try_scale(b, round_scale(over(amax, 4.0)), False, ROWS, BF16), found)
        elif QUANTIZER == "scale_search":
            code = bits(six) & 0x7FFFFFFF                               # NaN may be negative
            for j in tl.static_range(1, COUNT):                         # 0 steps came first
                s = power_of_two(tl.where(code > 0, code + SEARCH[j] * 1048576, 0))
                found = better(try_scale(b, s, SEARCH[j] < 0, ROWS, BF16), found)
        q, s, _ = found
    return q, s * unit

@triton.jit
def store_blocks(q, s, first, i, mask, codes_ptr, scale_ptr, decoded_ptr, inverse_n, FP4: tl.constexpr):
    """Write blocks first + i: codes, scales (bf16: exact), decoded values / n (where wanted)."""
    tl.store(scale_ptr + first + i, s.to(tl.bfloat16), mask)
    if codes_ptr is not None:
        words = (codes_ptr + 8 * first).to(tl.pointer_type(tl.uint32))
        tl.store(words + (2 * i + tl.arange(0, 2)[None, :]), pack(q, FP4), mask)
    if decoded_ptr is not None:
        value = (q * (s * inverse_n)).to(tl.bfloat16)
        tl.store(decoded_ptr + 16 * first + (16 * i + tl.arange(0, 16)[None, :]), value, mask)

# ---- 4. Kernels --------------------------------------------------------------------------------------------
@triton.jit
def quantize_kernel(x_ptr, seed_ptr, codes_ptr, scale_ptr, top_ptr, decoded_ptr, count, columns,
                    QUANTIZER: tl.constexpr, ROWS: tl.constexpr, FP4: tl.constexpr, B: tl.constexpr):
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
    else:
        b = tl.load(x_ptr + (16 * i + tl.arange(0, 16)[None, :]), mask, 0.0)
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    q, s = quantize_blocks(b.reshape(B, 16), 0, i, seed, QUANTIZER, ROWS, BF16)
    store_blocks(q, s, 0, i, mask, codes_ptr, scale_ptr, decoded_ptr, 1.0, FP4)
    tl.atomic_max(top_ptr, tl.max(bits(s) & 0x7FFFFFFF), sem="relaxed")     # NaN is the largest; 0 outside

@triton.jit
def load_tile(x_ptr, scale_ptr, tensor_scale_ptr, m0, n0, M, N,
              H: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, SWIZZLED: tl.constexpr):
    """H rows from m0, WIDTH columns from n0 of x (M, N) -> (H, WIDTH) bf16, 0 outside; WHOLE: N % 128 is 0"""
    m, inside = tl.arange(0, H)[:, None], tl.arange(0, H)[:, None] < M - m0
    if scale_ptr is None:
        n = tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + (m0.to(tl.int64) * N + n0) + (m * N + n), inside & ((n < N - n0) | WHOLE), 0.0)
    else:
        k, b = tl.arange(0, WIDTH // 2)[None, :], tl.arange(0, WIDTH // 16)[None, :]
        x_ptr += m0.to(tl.int64) * (N // 2) + n0 // 2
        if SWIZZLED:
            r, c = m0 % 128 + m, n0 // 16 + b
            at = (m0 // 128).to(tl.int64) * (tl.cdiv(N, 64) * 512)
            at += c // 4 * 512 + r % 32 * 16 + r // 32 * 4 + c % 4
        else:
            at = m0.to(tl.int64) * (N // 16) + n0 // 16 + (m * (N // 16) + b)
        byte = tl.load(x_ptr + (m * (N // 2) + k), inside & (k < (N - n0) // 2), 0).to(tl.int32)
        code = tl.join(byte & 15, byte >> 4).reshape(H, WIDTH // 16, 16)
        scale = tl.load(scale_ptr + at, inside & (b < (N - n0) // 16), 0).to(tl.int32)
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
def quantize_tile(x_ptr, x_scale_ptr, tensor_scale_ptr, m0, n0, M, N, R_ptr, seed_ptr, codes_ptr, scale_ptr,
                  top_ptr, decoded_ptr, inverse_n, QUANTIZER: tl.constexpr, TURN: tl.constexpr,
                  WHOLE: tl.constexpr, SWIZZLED: tl.constexpr, FP4: tl.constexpr, H: tl.constexpr):
    """Rotate and quantize a tile along N, or its transpose (TURN) along M, H rows of the result at a time."""
    r = tl.arange(0, 128)
    row, k = tl.arange(0, 8 * H)[:, None] >> 3, tl.arange(0, 8 * H)[:, None] & 7        # of a block
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    R = tl.load(R_ptr + r[:, None] * 128 + r[None, :])
    columns = tl.num_programs(0) * 8 if TURN else N // 16
    for h in tl.static_range(0, 128, H):
        if TURN:
            x = load_tile(x_ptr, x_scale_ptr, tensor_scale_ptr, m0, n0 + h, M, N, 128, H, WHOLE, SWIZZLED).T
            first, mask = (n0 + h).to(tl.int64) * columns + m0 // 16, row < N - n0 - h
        else:
            x = load_tile(x_ptr, x_scale_ptr, tensor_scale_ptr, m0 + h, n0, M, N, H, 128, WHOLE, SWIZZLED)
            first, mask = (m0 + h).to(tl.int64) * columns + n0 // 16, row < M - m0 - h
        i = row * columns + k
        q, s = quantize_blocks(rotate_tile(x, R), first, i, seed, QUANTIZER, 1, False)
        store_blocks(q, s, first, i, mask, codes_ptr, scale_ptr, decoded_ptr, inverse_n, FP4)
        top = tl.maximum(top, bits(s) & 0x7FFFFFFF) if h > 0 else bits(s) & 0x7FFFFFFF
    tl.atomic_max(top_ptr, tl.max(top), sem="relaxed")
@triton.jit
def tile_kernel(x_ptr, x_scale_ptr, tensor_scale_ptr, M, N, row_R, row_seed, row_codes, row_scale, row_top,
                row_decoded, col_R, col_seed, col_codes, col_scale, col_top, col_decoded, inverse_n,
                ROW: tl.constexpr, COL: tl.constexpr, SWIZZLED: tl.constexpr, FP4: tl.constexpr,
                H: tl.constexpr):
    """Rotate and quantize a 128 x 128 tile of x (M, N) along N by ROW and along M by COL.

    x is bf16, or NVFP4, its scales SWIZZLED or not. ROW, COL: a quantizer or "". Rows of the second result
    are columns of x; it is as long as whole tiles, and what x lacks is 0. Memory is read once, then a cache.
    """
    m0, n0 = tl.program_id(0) * 128, tl.program_id(1) * 128
    if ROW != "":
        quantize_tile(x_ptr, x_scale_ptr, tensor_scale_ptr, m0, n0, M, N, row_R, row_seed, row_codes,
                      row_scale, row_top, row_decoded, 1.0, ROW, False, True, SWIZZLED, FP4, H)
    if COL != "":
        quantize_tile(x_ptr, x_scale_ptr, tensor_scale_ptr, m0, n0, M, N, col_R, col_seed, col_codes,
                      col_scale, col_top, col_decoded, inverse_n, COL, True, ROW != "", SWIZZLED, FP4, H)

@triton.jit
def block_at(i, columns, SWIZZLED: tl.constexpr):
    """Place i (...) int64 of an encoded scale -> its block's number, columns a row; whether there is one."""
    inside = i >= 0
    if SWIZZLED:                                                        # in the order of `swizzled`
        tile, j, across = i // 512, (i % 512).to(tl.int32), (columns + 3) // 4
        r, c = j // 4 % 4 * 32 + j // 16, (tile % across).to(tl.int32) * 4 + j % 4
        i, inside = (tile // across * 128 + r) * columns + c, c < columns
    return i, inside
@triton.jit
def encode_again(s, v, i, mask, tensor_scale, finite, seed_ptr, codes_ptr, decoded_ptr, count, inverse_n,
                 AGAIN: tl.constexpr):
    """Scales v (B, 1) of blocks i, where mask: sub-normal in E4M3 -> rounded once more; decoded again by s.

    The noise has numbers AGAIN a block further on (0: nearest). Not finite: scales, codes 0, values NaN.
    """
    if AGAIN == 0:
        again = v + 24576.0 - 24576.0                                   # 1.5 * 2^23 * 2^-9
    else:
        word = random_word(tl.load(seed_ptr), 0, AGAIN * tl.cast(count, tl.int64) + i)
        again = round_by(v, (word >> 8).to(tl.float32) * U24, 0.125, 0x3C800000)
    v = tl.where(finite, tl.where(mask, again, v), 0.0)
    if codes_ptr is not None:
        tl.store(codes_ptr + (8 * i + tl.arange(0, 8)[None, :]), 0, mask & (not finite))
    if decoded_ptr is not None:
        value = decoded_ptr + (16 * i + tl.arange(0, 16)[None, :])
        q = tl.div_rn(tl.load(value, mask, 0.0).to(tl.float32), tl.where(s > 0, s * inverse_n, 1.0))
        scale = tl.where(finite, v * tensor_scale * inverse_n, float("nan"))
        tl.store(value, (q * scale).to(tl.bfloat16), mask)
    return v
@triton.jit
def e4m3_byte(v):
    """v (...) float32, E4M3 values >= 0 -> their bytes: 2^-120 moves exponents to E4M3's."""
    return (bits(v * 7.52316384526264e-37) >> 20).to(tl.uint8)

@triton.jit
def encode_kernel(scale_ptr, top_ptr, seed_ptr, e4m3_ptr, tensor_scale_ptr, codes_ptr, decoded_ptr, count,
                  columns, size, inverse_n, AGAIN: tl.constexpr, SWIZZLED: tl.constexpr, B: tl.constexpr):
    """quartet.assemble's end: the tensor scale, and B scales of 4 bits as E4M3 bytes. Bitwise equal.

    count blocks, columns a row -> size bytes. SWIZZLED: in the order of `swizzled`, 0 for no block.
    """
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    i, inside = block_at(place, columns, SWIZZLED)
    mask, top = (i < count) & inside, tl.load(top_ptr)
    finite, power = top < EXPONENT, power_of_two(top + 1048576 & EXPONENT)      # 1.875 * 2^8 would exceed 448
    tensor_scale = tl.where((top > 0) & finite, tl.maximum(power * 0.00390625, 9.4039548065783e-38), 1.0)
    if tl.program_id(0) == 0:
        tl.store(tensor_scale_ptr, tl.where(finite, tensor_scale * inverse_n, float("nan")))
    v = tl.load(scale_ptr + i, mask, 0.0).to(tl.float32) * inverse(tensor_scale)
    if tl.max(((v > 0) & (v < 0.015625)).to(tl.int32)) == 0 and finite:
        tl.store(e4m3_ptr + place, e4m3_byte(v), place < size)          # 4 bits are E4M3 already
    else:                                                               # hardly ever
        for j in tl.range(0, B, 128):
            there = tl.program_id(0).to(tl.int64) * B + j + tl.arange(0, 128)[:, None]
            k, within = block_at(there, columns, SWIZZLED)
            within = (k < count) & within
            s = tl.load(scale_ptr + k, within, 0.0).to(tl.float32)
            one = s * inverse(tensor_scale)
            rare = ((one > 0) & (one < 0.015625)) | (within & (not finite))
            if tl.max(rare.to(tl.int32)) > 0:
                one = encode_again(s, one, k, rare, tensor_scale, finite, seed_ptr, codes_ptr, decoded_ptr,
                                   count, inverse_n, AGAIN)
            tl.store(e4m3_ptr + there, e4m3_byte(one), there < size)

@triton.jit
def scale_tile(ptr, row, k, rows, K, ROWS: tl.constexpr, BK: tl.constexpr):
    """Swizzled scales of ROWS rows from row on, BK values from k on -> (ROWS, BK/16) E4M3, 0 outside."""
    tile, byte = row // 128 + tl.arange(0, ROWS // 128)[:, None], tl.arange(0, BK * 8)[None, :] + k * 8
    width = tl.cdiv(K, 64) * 512
    scale = tl.load(ptr + tile * width + byte, (tile * 128 < rows) & (byte < width), 0.0)
    return scale.reshape(ROWS // 128, BK // 64, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(ROWS, BK // 16)
@triton.jit
def gemm_kernel(a_ptr, a_scale_ptr, a_tensor_scale_ptr, b_ptr, b_scale_ptr, b_tensor_scale_ptr, y_ptr,
                M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A BM x BN tile of a b^T. Tiles go down 8 columns of tiles at a time: those share rows of a in L2."""
    pid, tiles = tl.program_id(0), tl.cdiv(M, BM) * 8
    first, pid = pid // tiles * 8, pid % tiles
    width = tl.minimum(tl.cdiv(N, BN) - first, 8)
    m0, n0 = pid // width * BM, (first + pid % width) * BN
    m, n, k = m0 + tl.arange(0, BM)[:, None], n0 + tl.arange(0, BN)[None, :], tl.arange(0, BK // 2)
    a_ptr += m.to(tl.int64) * (K // 2) + k[None, :]
    b_ptr += n.to(tl.int64) * (K // 2) + k[:, None]
    y = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK):
        a = tl.load(a_ptr + k0 // 2, (m < M) & (k[None, :] < (K - k0) // 2), 0)
        b = tl.load(b_ptr + k0 // 2, (n < N) & (k[:, None] < (K - k0) // 2), 0)
        y = tl.dot_scaled(a, scale_tile(a_scale_ptr, m0, k0, M, K, BM, BK), "e2m1",
                          b, scale_tile(b_scale_ptr, n0, k0, N, K, BN, BK), "e2m1", y)
    y *= tl.load(a_tensor_scale_ptr) * tl.load(b_tensor_scale_ptr)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(tl.bfloat16), (m < M) & (n < N))

# ---- 5. The functions of quartet.py ------------------------------------------------------------------------
LAUNCH = dict(enable_fp_fusion=False)           # a product and a sum are rounded apart, as in quartet.py
GEMM_OPTIONS = {10: dict(BM=128, BN=256, BK=256, num_warps=4, num_stages=3),         # tcgen05
                12: dict(BM=128, BN=128, BK=128, num_warps=8, num_stages=3)}         # mma.sync

def major(device):
    """Of the device's compute capability; 9 for a CPU, which interprets."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
def tile_options(major):
    """FP4, H and launch options of tile_kernel by `major`: the fewest instructions without spills."""
    if major == 9:                                                      # wgmma; 128: two on a multiprocessor
        return dict(FP4=False, H=64, num_warps=8, num_stages=1, maxnreg=128)
    # On capability 10, half as many rows and warps take 5% fewer instructions; but Triton 3.8 spills there.
    return dict(FP4=major > 9, H=128, num_warps=8, num_stages=1)

def swizzled(scale):
    """Block scales (R, C), a byte each, in the order that FP4 tensor cores take; those in it, (n,): as is.

    Tiles of 128 rows and 4 blocks, 512 bytes each, one after another, 0 where there is no block: (r, c) is
    at (r // 128 * ceil(C / 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4.
    """
    if scale.dim() == 1: return scale
    tiles = F.pad(scale.view(torch.uint8), (0, -scale.shape[1] % 4, 0, -scale.shape[0] % 128))
    return tiles.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32)).permute(0, 3, 2, 1, 4).flatten()

def outputs(rows, columns, device, codes, decoded, swizzled=False):
    """Buffers of one quantized (rows, columns): codes, scale, top, decoded, e4m3 (uint8), tensor_scale.

    None for codes or decoded if not wanted. e4m3: (rows, columns/16), or flat, in the order of `swizzled`.
    """
    empty = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device=device)
    order = (-(-rows // 128) * -(-columns // 64) * 512,) if swizzled else (rows, columns // BLOCK)
    return (empty(torch.uint8, rows, columns // 2) if codes else None,
            empty(torch.bfloat16, rows, columns // BLOCK), torch.zeros((), dtype=torch.int32, device=device),
            empty(torch.bfloat16, rows, columns) if decoded else None,
            empty(torch.uint8, *order), empty(torch.float32))
def finished(out):
    """`outputs` -> what GEMMs take: [codes, e4m3, tensor_scale, decoded], empty for None."""
    return [out[4].new_empty(0) if out[i] is None else out[i] for i in (0, 4, 5, 3)]
def encode(out, quantizer, seed, inverse_n=1.0):
    """Encode the scales of outputs, and a factor of the tensor's -> `finished`."""
    codes, scale, top, decoded, e4m3, tensor_scale = out
    grid = max(1, triton.cdiv(e4m3.numel(), 1024))
    encode_kernel[(grid,)](scale, top, seed, e4m3, tensor_scale, codes, decoded, scale.numel(),
                           scale.shape[1], e4m3.numel(), inverse_n, STOCHASTIC.get(quantizer, 0),
                           e4m3.dim() == 1, 1024, **LAUNCH)
    return finished(out)

@library.custom_op("quartet::quantize", mutates_args=())
def quantize(x: torch.Tensor, quantizer: str, rows: int, seed: torch.Tensor | None, codes: bool,
             decoded: bool, swizzled: bool = False) -> list[torch.Tensor]:
    """x (M, K) -> `finished`; blocks of rows x 16."""
    out, B = outputs(*x.shape, x.device, codes, decoded, swizzled), 256
    with torch.cuda.device_of(x):                                       # Triton launches on the current GPU
        if count := out[1].numel():                                     # bf16 is read by words of 4 bytes
            x = x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % 4 else x.contiguous()
            quantize_kernel[(triton.cdiv(count, B),)](
                x, seed, *out[:4], count, x.shape[1] // BLOCK, quantizer, rows, major(x.device) >= 10, B,
                num_warps=8 if quantizer == "scale_search" else 4, **LAUNCH)        # else 254 registers
        return encode(out, quantizer, seed)
@library.custom_op("quartet::rotate_quantize", mutates_args=())
def rotate_quantize(
        x: list[torch.Tensor], row: str, row_R: torch.Tensor | None, row_seed: torch.Tensor | None,
        col: str, col_R: torch.Tensor | None, col_seed: torch.Tensor | None, inverse_n: float,
        codes: bool, decoded: bool, swizzled: bool = False) -> list[torch.Tensor]:
    """One read of x -> `finished` of x row_R by quantizer row, then of x^T col_R by col; "" for none.

    x: [bf16 (M, N)], or `finished`'s codes, e4m3, tensor_scale. R (128, 128) bf16, `permuted`; seeds ()
    int64. x^T (N, M) gets zeros up to M % 128 == 0. inverse_n: 1 / n of the second, a factor of its scale.
    """
    (M, N), device = x[0].shape, x[0].device
    N = N if len(x) == 1 else 2 * N
    tiles = triton.cdiv(M, GROUP), triton.cdiv(N, GROUP)
    first = outputs(M, N, device, codes, decoded, swizzled) if row else (None,) * 4
    second = outputs(N, tiles[0] * GROUP, device, codes, decoded, swizzled) if col else (None,) * 4
    with torch.cuda.device_of(x[0]):
        if M and N:
            source = [t.contiguous() for t in x] + [None] * (3 - len(x))
            tile_kernel[tiles](*source, M, N, row_R, row_seed, *first[:4], col_R, col_seed, *second[:4],
                               inverse_n, row, col, len(x) > 1 and x[1].dim() == 1,
                               **tile_options(major(device)), **LAUNCH)
        return ((encode(first, row, row_seed) if row else [])
                + (encode(second, col, col_seed, inverse_n) if col else []))
@quantize.register_fake
def _(x, quantizer, rows, seed, codes, decoded, swizzled=False):
    return finished(outputs(*x.shape, x.device, codes, decoded, swizzled))
@rotate_quantize.register_fake
def _(x, row, row_R, row_seed, col, col_R, col_seed, inverse_n, *form):
    M, N, device = len(x[0]), x[0].shape[1] * (1 if len(x) == 1 else 2), x[0].device
    return ((finished(outputs(M, N, device, *form)) if row else [])
            + (finished(outputs(N, -(-M // GROUP) * GROUP, device, *form)) if col else []))

def parts(row):
    """The quantizers in a row of RECIPES; of x and w without block shapes: 16x16 has no backward mode."""
    forward = {str(q).removesuffix("_16x16") for q in (row.x, row.w)}
    return forward | {str(q) for gemm in (row.dx, row.dw) for q in (gemm.dy, gemm.other)}
def supports(row):
    """Whether the kernels have a mode for every quantizer of a row of RECIPES (None: bf16)."""
    return row is None or parts(row) <= {*MODES, "bf16", "None"}
def permuted(R):
    """R (128, 128) -> bf16, with column 64 g + 16 t + 2 i + j at 64 g + 8 i + 2 t + j: see rotate_tile."""
    return R.view(GROUP, 2, 4, 8, 2).transpose(2, 3).reshape(GROUP, GROUP).bfloat16()

def of(x, quantizer, seed=0, block=(1, BLOCK), R=None):
    """x (..., K) on a GPU -> NVFP4 of x or x R by a quantizer. ValueError for what quartet.blocks refuses."""
    quartet.check_blocks(x, block)
    seed, flat = torch.as_tensor(seed, dtype=torch.int64, device=x.device), x.reshape(-1, x.shape[-1])
    if R is None:
        flat = flat if x.dtype == torch.bfloat16 else flat.float()
        codes, scale, tensor_scale, _ = quantize(flat, quantizer, block[0], seed, True, False)
    else:
        codes, scale, tensor_scale, _ = rotate_quantize(
            [flat], quantizer, permuted(R), seed, "", None, None, 1.0, True, False)
    shape = lambda k: (*x.shape[:-1], x.shape[-1] // k)
    return NVFP4(codes.view(shape(2)), scale.view(shape(BLOCK)).view(torch.float8_e4m3fn), tensor_scale)

# As in quartet.py, bitwise equal: x (..., K) on a GPU -> NVFP4
def rtn(x, block=(1, BLOCK)): "RTN."; return of(x, "rtn", block=block)
def four_six(x, block=(1, BLOCK)): "4/6."; return of(x, "four_six", block=block)
def scale_search(x, block=(1, BLOCK)): "Search."; return of(x, "scale_search", block=block)
def sr(x, seed): "SR."; return of(x, "sr", seed)
def ms_eden(x, R, seed, four_six=False):
    """quartet.ms_eden, for x in bf16, or rotated already if R is None: then bitwise equal.

    The sums of x R are float32 in the order of the tensor cores: their last bits may differ. ValueError for
    x of another dtype, or whose last dimension has no whole groups of 128.
    """
    if R is not None and (x.dtype != torch.bfloat16 or x.shape[-1] % GROUP):
        raise ValueError(f"{x.dtype} {tuple(x.shape)}: rotate bfloat16 with a last dimension % {GROUP} == 0")
    return of(x, "ms_eden_46" if four_six else "ms_eden", seed, R=R)

# ---- 6. The GEMM and the linear layer ----------------------------------------------------------------------
@library.custom_op("quartet::scaled_mm", mutates_args=())
def scaled_mm(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """a NVFP4 (M, K), b NVFP4 (N, K), scales `swizzled` or not -> a b^T (M, N) bf16, by cuBLASLt.

    K % 32 == N % 16 == 0. Equal to quartet.matmul but for the order of float32 sums.
    """
    if not a[0].numel():
        return a[0].new_zeros(len(a[0]), len(b[0]), dtype=torch.bfloat16)
    kinds = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    a_scales, b_scales = ([swizzled(t[1]).view(torch.float8_e4m3fn), t[2]] for t in (a, b))
    a, b = (t[0].contiguous().view(torch.float4_e2m1fn_x2) for t in (a, b))
    return F.scaled_mm(a, b.t(), a_scales, kinds, b_scales, kinds, order, order)
scaled_mm.register_fake(lambda a, b: a[0].new_empty(len(a[0]), len(b[0]), dtype=torch.bfloat16))

def gemm(a, b):
    """`scaled_mm` in Triton. Compiled for sm_100a, sm_103a and sm_120a, but not yet run on hardware."""
    M, N, K = len(a[0]), len(b[0]), 2 * a[0].shape[1]
    y = a[0].new_empty(M, N, dtype=torch.bfloat16)
    options = GEMM_OPTIONS.get(major(a[0].device), GEMM_OPTIONS[10])
    operands = [v for codes, scale, tensor_scale in (a, b)
                for v in (codes.contiguous(), swizzled(scale).view(torch.float8_e4m3fn), tensor_scale)]
    grid = triton.cdiv(M, options["BM"]) * triton.cdiv(N, options["BN"])
    with torch.cuda.device_of(y):
        gemm_kernel[(grid,)](*operands, y, M, N, K, **options, **LAUNCH)
    return y
def matmul(a, b):
    """a (M, K), b (N, K or more), `finished` -> a b^T (M, N) bf16: of decoded values if any, else FP4."""
    if a[3].dim() == 2: return quartet.gemm(a[3], b[3][:, :a[3].shape[1]])
    return scaled_mm(list(a[:3]), list(b[:3]))
def native(w, row):
    """Whether all GEMMs of a row with w (N, K) go to FP4 tensor cores: K % 32 == N % 128 == 0."""
    return w.shape[1] % 32 == w.shape[0] % GROUP == 0 and "bf16" not in parts(row) and major(w.device) >= 10
def operand(t, quantizer, seed, codes, decoded, swizzled):
    """t (M, K) bf16 -> `finished` for a GEMM. quantizer: also of 16x16 blocks; "bf16": codes are t itself."""
    if quantizer == "bf16":
        return [t, t.new_empty(0, dtype=torch.uint8), torch.ones((), device=t.device), t]
    rows = BLOCK if quantizer.endswith("_16x16") else 1
    return quantize(t, quantizer.removesuffix("_16x16"), rows, seed, codes, decoded, swizzled)
def quantized(w, recipe):
    """quartet.quantized; scales `swizzled` where they go to FP4 tensor cores, but not w to be transposed."""
    row = quartet.RECIPES[recipe]
    return tuple(operand(w, row.w, None, True, False, native(w, row) and row.dx.other is not None)[:3])
def on_grid(w, recipe):
    """quartet.on_grid."""
    return operand(w, quartet.RECIPES[recipe].w, None, False, True, False)[3]
def rotation(name, signs):
    """quartet.rotation_from's R, permuted, and 1 / n; of None: I, which is exact."""
    if name is None: return permuted(torch.eye(GROUP, device=signs.device)), 1.0
    R, n = quartet.rotation_from(name, signs)
    return permuted(R), 1.0 / n

class QuantizedMatmul(torch.autograd.Function):
    """quartet.QuantizedMatmul: x (M, K), w (N, K) bf16; wq: `quantized` w, or Nones -> x w^T (M, N) bf16."""
    @staticmethod
    def forward(ctx, x, w, recipe, *wq):
        row = quartet.RECIPES[recipe]
        ctx.recipe, ctx.native = recipe, native(w, row)
        xq = operand(x, row.x, None, True, not ctx.native, ctx.native)
        if wq[0] is not None:
            t = NVFP4(wq[0], wq[1].view(torch.float8_e4m3fn), wq[2])
            wq = *wq, wq[0].new_empty(0) if ctx.native else quartet.decode(t, torch.bfloat16)
        else:
            wq = operand(w, row.w, None, True, not ctx.native, ctx.native and row.dx.other is not None)
        ctx.save_for_backward(*((w,) if row.original and row.dx.other or row.w == "bf16" else wq[:3]),
                              *((x,) if row.original or row.x == "bf16" else xq[:3]))
        return matmul(xq, wq)

    @staticmethod
    def backward(ctx, dy):
        row, dx, dw, kept = quartet.RECIPES[ctx.recipe], None, None, ctx.saved_tensors     # read once
        n = 1 if row.original and row.dx.other or row.w == "bf16" else 3
        wq, xq = list(kept[:n]), list(kept[n:])
        form = ctx.native, not ctx.native, ctx.native                           # codes, decoded, swizzled
        with torch.autocast(dy.device.type, enabled=False):
            noise1, noise2 = quartet.draw_noise(dy, row)
            R1, inverse1 = rotation(row.dx.rotation, noise1.signs)
            R2, inverse2 = rotation(row.dw.rotation, noise2.signs)
            rotated = row.dx.rotation is not None
            first = row.dx.dy if ctx.needs_input_grad[0] and rotated else ""
            second = row.dw.dy if ctx.needs_input_grad[1] else ""
            e = rotate_quantize([dy], first, R1, noise1.dy, second, R2, noise2.dy, 1.0, *form)
            if ctx.needs_input_grad[0]:
                e1 = e[:4] if rotated else operand(dy, row.dx.dy, noise1.dy, *form)
                if row.dx.other:
                    w = rotate_quantize(wq, "", None, None, row.dx.other, R1, noise1.other, inverse1, *form)
                else:
                    w = NVFP4(wq[0], wq[1].view(torch.float8_e4m3fn), wq[2])
                    w = quartet.transpose(w) if ctx.native else [*w, quartet.decode(w, torch.bfloat16).T]
                dx = matmul(e1, w)
            if ctx.needs_input_grad[1]:
                x = rotate_quantize(xq, "", None, None, row.dw.other, R2, noise2.other, inverse2, *form)
                dw = matmul(e[-4:], x)
        return dx, dw, None, None, None, None

if __name__ == "__main__":    # check, time, or compile for another GPU
    import runpy
    sys.modules["kernels"] = sys.modules[__name__]      # what bench.py imports is this module
    runpy.run_path(str(Path(__file__).resolve().parent / "data/evidence/bench.py"), run_name="__main__")
