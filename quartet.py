"""Training linear layers in 4 bits: NVFP4, its quantizers, and the recipe Quartet II beside its rivals.

This is an article in plain PyTorch, and the project's reference. Read it from top to bottom. Each section
ends with what `python quartet.py` prints for it; the appendix holds the plumbing and can be left out.

A linear layer of K features in and N out multiplies matrices three times for M tokens: y = x w^T (M, N)
forward, dx = dy w (M, K) and dw = dy^T x (N, K) backward. FP4 tensor cores do such a product (a GEMM) several
times faster than bf16 ones if both operands are NVFP4: 4-bit values, and a scale for every 16 of them along
the axis that is summed over. So x, w and dy must be rounded to 4 bits, and everything depends on how. The
loss is that of the rounded x and w, so the forward pass needs small errors. Gradients add up over many steps,
so their errors need a mean of zero: then they average out. Quartet II (arXiv:2601.22813) does the first by
Four Over Six and the second by MS-EDEN.

One decision shapes this code. Besides the block scales, NVFP4 has a scale of the whole tensor. Here it is a
power of two, and it is chosen last (section 3). So a block of 16 is final after one look at it. And a decoded
value has at most 2 + 4 significant bits, of its value and its block scale, where bfloat16 holds 8: a bf16
GEMM of decoded values multiplies exactly what an FP4 GEMM multiplies, on any device.

What still rounds: x, w and dy are cast to bf16 first, sums are float32, the result is bf16. FP4 tensor cores
add in a way of their own, which section 10 imitates; it hardly ever changes the result. Every choice (which
scale errs less, which way a value goes) is specified to the bit: float32, true division, sums in a fixed
order. So kernels.py gives the same codes and scales, but for the last bits of a rotation's sums.
"""
import contextlib
import math
import os
import runpy
import shutil
import sys
import warnings
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

BLOCK = 16             # values that share a block scale: fixed by the format NVFP4
GROUP = 128            # values that a rotation mixes
E2M1_MAX = 6.0
E4M3_MAX = 448.0


# ---- 1. The two small floats -------------------------------------------------------------------------------
#
# E2M1 is the 4-bit value: a sign and 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Its code is its place in this list, from 0
# to 7, plus 8 for a minus. E4M3 is the 8-bit block scale: 4 significant bits between 2^-6 and 448, and fewer
# below, down to 2^-9 (its sub-normal numbers). Between two powers of two, both grids are uniform. So rounding
# needs only the spacing of the grid around a value, and one function serves both.

EXPONENT = 0x7F800000  # the 8 bits of a float32 that hold its exponent


def power_of_two_below(v):
    """The largest power of two that is at most |v|, v (...) float32. Example: -6.5 -> 4.0.

    0 and sub-normal numbers -> 0; NaN and infinity -> infinity.
    """
    return (v.view(torch.int32) & EXPONENT).view(torch.float32)


def round_to_grid(v, u=None, mantissa_bits=3, min_exp=-126, max_val=math.inf):
    """Round v onto the grid of a small float: to nearest, ties to even, or stochastically if u is given.

    v, u (...) float32, u in [0, 1) or None -> (...) float32, never -0.0. Beyond max_val it saturates; points
    of the grid stay. Example: 2.5 lies between E2M1's 2 and 3. Nearest gives 2, which has the even code;
    u < 0.5 gives 3 and other u give 2.
    """
    v = v.clamp(-max_val, max_val)
    # In place: on a CPU, new tensors cost more than the arithmetic (a tenth of a training step).
    spacing = power_of_two_below(v).clamp_(min=2.0**min_exp)
    spacing *= 2.0**-mantissa_bits
    if u is None:
        # From 2^23 to 2^24, float32 holds just the whole numbers. So adding 1.5 * 2^23 spacings, and taking
        # them away again, rounds v to whole spacings, ties to even. (With 1.0 a negative v would fall below.)
        spacing *= 1.5 * 2.0**23
        v += spacing
        v -= spacing
        return v
    v /= spacing                   # exact: the spacing is a power of two
    down = v.floor()
    down += u < v - down           # not (v + u).floor(): that sum would round before it is floored
    return down * spacing


# E2M1; E4M3; and the 4 significant bits of E4M3 without limits of the exponent. Each (v, u=None) as above.
e2m1 = partial(round_to_grid, mantissa_bits=1, min_exp=0, max_val=E2M1_MAX)
e4m3 = partial(round_to_grid, min_exp=-6, max_val=E4M3_MAX)
round_scale = round_to_grid            # for v below 2^100; infinity -> NaN


# Printed:
#     E2M1: 0 0.5 1 1.5 2 3 4 6
#     E4M3: 126 positive values from 0.00195312 to 448, kept by rounding: True
#     2.5 to nearest: 2; stochastically 2 or 3, in the mean 2.49


# ---- 2. NVFP4 tensors --------------------------------------------------------------------------------------
#
# Sixteen neighbours share a block scale, and the whole tensor shares one tensor scale, which makes up for the
# short range of E4M3. A value costs 4 bits and its share of a scale, 8/16: 4.5 bits. Decoding is two products
# that do not round.

class NVFP4(NamedTuple):
    """A tensor x (..., K) of values q * block_scale * tensor_scale, K % 16 == 0."""
    codes: Tensor          # (..., K/2) uint8: two E2M1 codes a byte, the even value in the low half
    block_scale: Tensor    # (..., K/16) float8_e4m3fn, >= 0
    tensor_scale: Tensor   # () float32: a power of two, at least 2^-123; NaN if x held NaN or infinity


def pack(q):
    """q (..., K) float32, E2M1 values -> codes (..., K/2) uint8. Example: 1.5, -6 -> 0xF3, codes 3 and 15."""
    # 2^-14 is float16's smallest normal number, as 1 is E2M1's. So in float16 q * 2^-14 has the code's three
    # low bits in a row, at 9 to 11, also for 0.5, which is sub-normal in both.
    # Times 9 = 8 + 1: times 8 moves them up to 12 to 14, and times 1 keeps the sign at 15. Then bits 12 to 15
    # are the code. Two neighbours, read as one int32, have their codes at 12 to 15 and 28 to 31.
    bits = (q.half().contiguous() * 2.0**-14).view(torch.int16) * 9
    pair = bits.view(torch.int32)
    return (pair >> 12 & 15 | pair >> 24 & 240).to(torch.uint8)


def unpack(codes, dtype=torch.float32):
    """codes (..., K/2) uint8 -> (..., K) in dtype, E2M1 values: pack undone, by a table of all bytes."""
    byte = torch.arange(256, device=codes.device)
    code = torch.stack([byte & 15, byte >> 4], -1)
    # E4M3 has two more exponent bits above and two more mantissa bits below. Shifted between them, the three
    # bits of a code read as q * 2^-6, sub-normal numbers included.
    bits = (code & 7) << 2 | (code & 8) << 4
    table = bits.to(torch.uint8).view(torch.float8_e4m3fn).to(dtype) * 2.0**6
    return F.embedding(codes.int(), table).flatten(-2)


def decode(t, dtype=torch.float32):
    """t NVFP4 of (..., K) -> (..., K), its values: exact in float32 and in bfloat16.

    A recipe may leave an operand in bf16 (`unquantized`, section 9): then codes holds its values.
    """
    if t.codes.dtype == torch.bfloat16:
        return (t.codes * t.tensor_scale).to(dtype)
    scale = (t.block_scale.float() * t.tensor_scale).to(dtype)
    q = unpack(t.codes, dtype).unflatten(-1, (-1, BLOCK))
    return (q * scale[..., None]).flatten(-2)


def transpose(t):
    """t NVFP4 (N, K), a scale for each 16x16 values (section 4) -> its transpose, NVFP4 (K, N), exact."""
    # The 16 rows of a block store the same scale. Take one, and repeat it for 16 rows of the transpose.
    scale = t.block_scale.view(torch.uint8)[::BLOCK].T.repeat_interleave(BLOCK, 0)
    return NVFP4(pack(unpack(t.codes).T), scale.view(torch.float8_e4m3fn), t.tensor_scale)


# Printed:
#     codes of 1.5 and -6 in a byte: 0xF3
#     N(0, 1), 1024 x 1024: 4.50 bits a value; of the decoded values bf16 changes 0


# ---- 3. Blocks and scales ----------------------------------------------------------------------------------
#
# The usual way reads a tensor twice: once for its largest magnitude (amax), which fixes the tensor scale, and
# once to round. NVFP4 does not ask for that. Let the tensor scale be a power of two. Dividing a block scale
# by it changes the exponent of the block scale and none of its digits, so rounding to E4M3 means rounding to
# 4 significant bits whatever the tensor scale will be. Then codes and digits of a block's scale are final
# after one look at its 16 values; the tensor scale is chosen at the end, from the largest block scale that
# came up, and only shifts the exponents of the others, a sixteenth of the data. Example: block scales of 3.5,
# 1.25 and 0.40625 have 4 significant bits. The tensor scale becomes 2^-7, and E4M3 stores 448, 160 and 52.
# Only scales at least 2^14 times smaller than the largest, where E4M3 has fewer bits, are rounded a second
# time when they are stored, stochastically if the quantizer is stochastic.

TINY = 2.0**-120       # blocks of a smaller amax become zeros: scales stay clear of bf16's sub-normals


def blocks(x, block=(1, BLOCK)):
    """Cut x into blocks, and divide each by a unit of its own: a quarter of the power of two below its amax.

    Then amax is in [4, 8) and scales are near 1, so that squares of values neither overflow nor vanish.
    x (..., M, K) -> b (M/rows, rows, K/16, 16) float32, the values, in units; rows is block[0];
                     amax (M/rows, 1, K/16, 1), the largest magnitude, in units; 0 if it was below TINY;
                     unit (M/rows, 1, K/16, 1).
    ValueError for other dtypes and shapes.
    """
    check_blocks(x, block)
    rows, _ = block
    *lead, k = x.shape
    b = x.reshape(math.prod(lead) // rows, rows, k // BLOCK, BLOCK).float()
    amax = b.abs().amax((1, 3), keepdim=True)
    amax = torch.where(amax < TINY, 0.0, amax)
    unit = (0.25 * power_of_two_below(amax)).clamp(0.25 * TINY, 2.0**125)
    return b / unit, amax / unit, unit


def divide_by(a, constant):
    """a / constant, correctly rounded. (On a GPU, PyTorch makes of a / 6.0 a product with 1/6.)"""
    return a / a.new_full((), constant)


def ratio(b, s):
    """b / s. Where s is 0 or NaN: 0 of a finite b, else NaN."""
    return b / torch.where(s > 0, s, math.inf)


def block_sum(t):
    """The sums of blocks, t (., rows, ., 16) -> (., 1, ., 1), by halves: i and i + 8, then 4, 2, 1 apart."""
    # The order is part of the contract: another one flips a few choices between scales.
    for axis in 3, 1:
        while t.shape[axis] > 1:
            first_half, second_half = t.chunk(2, axis)
            t = first_half + second_half
    return t


def choose_tensor_scale(largest):
    """The power of two that puts the largest block scale between 240 and 448, E4M3's upper end.

    largest () float32 of 4 significant bits -> () float32, never below 2^-123. 0 -> 1; NaN and infinity ->
    NaN. Example: 3.5 = 1.75 * 2^1 -> 2^-7, as 3.5 / 2^-7 = 448.
    """
    # Times 16/15, a mantissa of 1.875 becomes 2, so that such a scale lands on 240 and not on 480. The next
    # mantissa below, 1.75, stays below 2.
    scale = (power_of_two_below(largest * (16 / 15)) * 2.0**-8).clamp(min=2.0**-123)
    scale = torch.where(largest > 0, scale, 1.0)
    return torch.where(largest.isfinite(), scale, math.nan)


def assemble(shape, q, s, u=None):
    """The last step of every quantizer: choose the tensor scale, store the block scales as E4M3, pack the
    codes.

    shape of x; q (M/rows, rows, K/16, 16) E2M1 values; s (M/rows, 1, K/16, 1) scales of 4 significant bits; u
    of s's shape, to round sub-normal scales stochastically -> NVFP4. NaN or infinity in s makes the tensor
    scale NaN and all codes and scales 0, so that nothing of the tensor can be mistaken for a number.
    """
    largest = s.amax() if s.numel() else s.new_zeros(())
    tensor_scale = choose_tensor_scale(largest)
    scale = e4m3(s / tensor_scale, u).nan_to_num(nan=0.0).to(torch.float8_e4m3fn)
    *lead, k = shape
    scale = scale.expand(-1, q.shape[1], -1, -1).reshape(*lead, k // BLOCK)
    codes = pack(q) * largest.isfinite()
    return NVFP4(codes.view(*lead, k // 2), scale, tensor_scale)


# Printed:
#     block scales 3.5, 1.25, 0.40625: tensor scale 2^-7, stored 448, 160, 52
#     block scales 3.75, 1.25, 0.40625: tensor scale 2^-6, stored 240, 80, 26


# ---- 4. Round to nearest (RTN) -----------------------------------------------------------------------------
#
# The simplest quantizer: stretch each block until its amax meets 6, the end of the E2M1 line, and round. Here
# and below, errors are given as NMSE, the squared error over the squared values, on numbers drawn from
# N(0, 1).

def rtn(x, block=(1, BLOCK)):
    """RTN: a block's amax maps to 6; the scale and the values go to nearest, ties to even.

    x (..., K) of any float dtype, K % 16 == 0 -> NVFP4. Deterministic, hence biased. NMSE 9.1e-3. block=(16,
    16): 16 rows share their scales too, so that the transpose has the same codes; NMSE 12.4e-3. The number of
    rows must then be a multiple of 16. Source: arXiv:2509.25149; the power-of-two tensor scale is ours.
    """
    b, amax, unit = blocks(x, block)
    s = round_scale(divide_by(amax, E2M1_MAX))
    q = e2m1(ratio(b, s))
    return assemble(x.shape, q, s * unit)


# Printed:
#     NMSE x 1e3 on N(0, 1)       here    paper, table 1
#     RTN                         9.06               9.0
#     RTN, 16x16 blocks          12.40              12.4


# ---- 5. Four Over Six (4/6), and a search over scales ------------------------------------------------------
#
# E2M1 has nothing between 4 and 6. A block that maps its amax to 4 leaves the 6 unused, but its grid is finer
# around its large values, and coarser around its small ones. Which of the two is better depends on the block,
# so both are tried. Why only two? The search tries five scales.

def best_scale(b, scales):
    """Round blocks b to nearest by each of scales, and keep for each block what has the least squared error.

    b (., rows, ., 16); scales, a list of (., 1, ., 1) -> E2M1 values q like b, and s (., 1, ., 1). Ties: the
    earlier.
    """
    best = None
    for s in scales:
        q = e2m1(ratio(b, s))
        error = block_sum((q * s - b).square())        # q * s is exact
        if best is None:
            best = q, s, error
        else:
            # Where this scale errs less than the best before, take its q, s and error.
            best = [torch.where(error < best[2], new, old) for new, old in zip((q, s, error), best)]
    return best[:2]


def four_six(x, block=(1, BLOCK)):
    """4/6: each block maps its amax to 6 or to 4, whichever reproduces the block with the smaller error;
    ties: 6.

    x (..., K) of any float dtype, K % 16 == 0 -> NVFP4; block as in rtn. Deterministic, hence biased. NMSE
    7.6e-3; with 16x16 blocks 12.4e-3, no gain. Source: Cook et al. 2025, arXiv:2512.02010.
    """
    b, amax, unit = blocks(x, block)
    scales = [round_scale(divide_by(amax, top)) for top in (6.0, 4.0)]
    q, s = best_scale(b, scales)
    return assemble(x.shape, q, s * unit)


# The scales that scale_search tries, in steps of E4M3 from that of amax / 6: the best five of -2 to 7. A
# sixth, 6, would lower the error by 0.9% more.
SEARCH = 0, -1, 1, 4, 5


def scale_search(x, block=(1, BLOCK)):
    """A search like 4/6, among five scales: amax / 6, a step of E4M3 up and down, and two near amax / 4.

    x (..., K) of any float dtype, K % 16 == 0 -> NVFP4; block as in rtn. The least squared error decides.
    Deterministic, hence biased. NMSE 6.7e-3; with 16x16 blocks 11.6e-3. In 1% of blocks plain 4/6 errs less:
    its amax / 4 is 4, 5 or 6 steps up, and six steps are not tried here.
    """
    b, amax, unit = blocks(x, block)
    six = round_scale(divide_by(amax, E2M1_MAX))
    # One step of a scale of 4 significant bits is 2^20 in the bits of a float32. (abs: NaN may be negative.)
    bits = six.abs().view(torch.int32)
    q, s = best_scale(b, [torch.where(bits > 0, bits + steps * 2**20, 0).view(torch.float32)
                          for steps in SEARCH])
    return assemble(x.shape, q, s * unit)


# Printed:
#     10 20 30 40 by RTN: 9.75 19.5 26 39, squared error 4.33 a value
#     10 20 30 40 by 4/6: 10 20 30 40, squared error 0.00 a value
#     NMSE x 1e3 on N(0, 1)       here    paper, table 1
#     always 4, never 6           9.66                 -
#     4/6                         7.57               7.6
#     4/6, 16x16 blocks          12.38              12.4
#     scale search                6.71                 -


# ---- 6. Noise, and stochastic rounding (SR) ----------------------------------------------------------------
#
# Nearest gives the same wrong answer every time. Stochastic rounding goes up with a probability equal to the
# fraction, so the mean over many draws is right. Noise is an argument here: a seed, hashed with the index of
# the element. So a draw can be replayed, and it is the same however a kernel cuts its work. Elements of a
# tensor have draws of their own; each operand, layer and step gets a fresh seed. SR does not go with 4/6: to
# draw with amax at 6 and at 4, and to keep the draw with the smaller error, is biased, as printed below.

PHILOX_ROUNDS = 7      # the fewest that pass BigCrush: Salmon et al. 2011
WORD = 0xFFFFFFFF      # 32 bits
# Rounding to 4 significant bits can shrink a scale to 16/17 of itself (1.0625 to 1). If amax maps to 16/17 of
# 6, then amax / s is at most 6, and nothing clips.
SR_MAX = E2M1_MAX * 16 / 17


def philox(seed, counter):
    """64-bit seed, counter (n,) int64 -> (n, 4) int64 of 32 random bits: Philox4x32, as Triton's philox."""
    c0 = counter & WORD
    c1 = counter >> 32
    c2 = c3 = 0
    for i in range(PHILOX_ROUNDS):
        # Python's + binds before >>, & and ^.
        a = c0 * 0xD2511F53                            # 64-bit products, modulo 2^64
        b = c2 * 0xCD9E8D57
        c0 = (b >> 32 ^ c1 ^ (seed & WORD) + i * 0x9E3779B9) & WORD
        c2 = (a >> 32 ^ c3 ^ (seed >> 32) + i * 0xBB67AE85) & WORD
        c1 = b                                         # above 32 bits c1 and c3 hold junk, masked away later
        c3 = a
    return torch.stack([c0, c1, c2, c3], -1) & WORD


def uniform(seed, a, b):
    """u of the shape of a, and of b: float32 in [0, 1), multiples of 2^-24. Only shapes of a and b matter.

    Elements are numbered through a, then b; element i takes word i % 4 of counter i // 4.
    """
    first = a.numel()
    last = first + b.numel()
    words = philox(seed, torch.arange((last + 3) // 4, device=a.device))
    u = (words.flatten() >> 8).float() * 2.0**-24
    return u[:first].view(a.shape), u[first:last].view(b.shape)


def sr(x, seed):
    """SR: each value goes to one of its two E2M1 neighbours at random, with mean x; grid points stay where
    they are.

    x (..., K) of any float dtype, K % 16 == 0; seed int, or () int64 on x's device -> NVFP4. Unbiased value
    by value, as nothing clips. NMSE 23.5e-3. Source: arXiv:2509.25149; for the factor 16/17,
    arXiv:2601.22813.
    """
    b, amax, unit = blocks(x)
    s = round_scale(divide_by(amax, SR_MAX))
    u, u_scale = uniform(seed, b, s)                   # u_scale: for scales that become sub-normal
    q = e2m1(ratio(b, s), u)
    return assemble(x.shape, q, s * unit, u_scale)


# Printed:
#     NMSE x 1e3 on N(0, 1)       here    paper, table 1
#     SR                         23.54              23.5
#     SR with 4/6, biased        17.52              17.5
#     B times the squared error of the mean of B draws, over that of one: 1 if unbiased, +- standard error
#                                            B=1     B=4    B=16    B=64   B=256      +-
#     SR                                    1.00    1.00    0.99    0.99    1.01    0.04
#     SR with 4/6                           1.00    1.30    1.87    3.98   12.36    0.45


# ---- 7. Rotations ------------------------------------------------------------------------------------------
#
# If R R^T = n I, then x w^T = (x R)(w R)^T / n: both operands of a GEMM may be rotated along the axis it sums
# over, and nothing changes but the rounding. The randomized Hadamard transform (RHT) flips signs at random
# and then replaces 128 values by 128 signed sums of them. Outliers are spread over the group, and errors
# change with the signs from draw to draw. Signs must come first. Rounding commutes with a change of sign, so
# signs after the sums would leave the same error in every draw. All of this can be repeated in rounds;
# section 8 says why one should. R is a matrix of integers, and n is a power of two.

ROTATIONS = {    # name: size of the Hadamard matrix, repeated along the diagonal of R; rounds
    "rht16": (16, 1),
    "rht32": (32, 1),
    "rht128": (128, 1),
    "rht128x2": (128, 2),
    "rht128x3": (128, 3)
}


def hadamard(size, device):
    """Sylvester's Hadamard matrix of a size, along the diagonal of (128, 128) float32.

    Entries are 1 and -1, and 0 outside: -1 if i and j have an odd number of binary ones in common. Example: 3
    and 5 share one, so entry (3, 5) is -1. Below size 128 some blocks on the diagonal are the negative,
    which random signs absorb.
    """
    i = torch.arange(GROUP, device=device)[:, None]
    j = i.T
    parity = i & j
    for half in 4, 2, 1:
        parity = parity ^ parity >> half               # after this, the last bit is the parity of all
    return (1.0 - 2.0 * (parity & 1).float()) * (i // size == j // size)


def rotation_from(name, signs):
    """signs (rounds or more, 128) float32 of +-1 -> R (128, 128) float32 of integers, and n, an int: R R^T =
    n I.

    name: of ROTATIONS, or None -> None, 1. Two rounds: R = D1 H D2 H, D the diagonal matrix of signs. Three
    rounds: entries are multiples of 4 and, but once in 10^9 draws, below 1024, so that bf16 holds them.
    """
    if name is None:
        return None, 1
    size, rounds = ROTATIONS[name]
    H = hadamard(size, signs.device)
    R = signs[0, :, None] * H
    for d in signs[1:rounds]:
        R = rotate(R * d, H)
    return R, size**rounds


def rotation(name, generator=None):
    """R, n by `rotation_from`, of new random signs, on the generator's device. ValueError: unknown name."""
    if name not in ROTATIONS:
        raise ValueError(f"unknown rotation {name!r}: choose one of {', '.join(ROTATIONS)}")
    signs = torch.randint(0, 2, (3, GROUP), generator=generator, device=generator and generator.device)
    return rotation_from(name, signs.float() * 2.0 - 1.0)


def rotate(x, R):
    """x (..., K), K % 128 == 0 -> x R (..., K) float32, each group of 128 by the same R, not normalised.

    R None: x as it is.
    """
    if R is None:
        return x
    if x.shape[-1] % GROUP:
        raise ValueError(f"shape {tuple(x.shape)}: pad the last dimension with zeros to groups of {GROUP}")
    # The last bits of these sums depend on the device. (TF32, if on, is exact for the bf16 values of a
    # Linear.)
    with torch.autocast(x.device.type, enabled=False):     # it would round x, and the sums, to bf16
        return (x.reshape(-1, GROUP).float() @ R).view(x.shape)


# Printed:
#     64 groups, one value of 100 in each: largest over root mean square 11.24; rotated
#         by rht16       3.01    R R^T = 16 I, in bf16 too: True
#         by rht32       2.22    R R^T = 32 I, in bf16 too: True
#         by rht128      1.29    R R^T = 128 I, in bf16 too: True
#         by rht128x2    3.00    R R^T = 16384 I, in bf16 too: True
#         by rht128x3    2.57    R R^T = 2097152 I, in bf16 too: True
# (One round makes such a group too flat, all 128 values +-constant; of normal numbers the largest of 128 is
# 2.8 times the root mean square.)


# ---- 8. MS-EDEN --------------------------------------------------------------------------------------------
#
# SR pays for its right mean with 2.6 times the error of RTN. EDEN (arXiv:2108.08842) gets the mean for less.
# Rotate the vector to v, and round it to nearest: q. On average <q, v> < <v, v>: q has too little of v.
# Multiply by the EDEN factor S = <v, v> / <v, q>, and the part of S q along v is v exactly. What is left of
# the error is at right angles to v. The random rotation turns it another way in every draw, so that it
# averages out. MS-EDEN does so for each block: S goes into the block scale, and only that scale is rounded
# stochastically (twice, where it becomes sub-normal in E4M3).
#
# The two operands of a GEMM share their rotation, so that it cancels in the product. That the mean of the
# product is right, too, does not follow from this: it was measured (data/evidence/README.md, section 5).
#
# One round of RHT does not always turn the error enough. A group that one large value dominates becomes
# +-constant: all 128 values lie close to one grid point or its negative, RTN erases the rest in every draw,
# and no averaging brings it back. (The paper's corollary, that the mean is always right, overlooks that.) A
# second round leaves next to nothing of this bias. But from two near-equal neighbours, such as (1, 0.88), and
# 126 zeros, the first round makes 64 sums that are nearly zero, and after the second a bias of 1.3% of the
# norm is left (0.5% if the two are in different 16s of the group). After three rounds none was seen in any
# input that was tried.

# amax maps to the paper's 6.07, 16/17 of 6 over 0.93: to clip the largest value a little costs less than a
# coarser grid for the others. (0.90 instead of 0.93 makes NMSE 1.6% larger.)
EDEN_MAX = SR_MAX / 0.93


def eden_factor(v, q):
    """<v, v> / <v, q> of each block, 1 if v = 0: v, q (M/rows, rows, K/16, 16) -> (M/rows, 1, K/16, 1)."""
    # Some of the authors' code has one factor for the v and q of a whole group. Its blocks differ in scale,
    # so that leaves a bias of 9e-4 of the norm. One factor from the decoded values would leave none, but 8 to
    # 9% more error.
    # v is not clamped, so what clipping lost counts too.
    vq = block_sum(v * q)
    return torch.where(vq > 0, block_sum(v * v) / vq, 1.0)


def larger_cosine(v, q6, q4):
    """Of each block q6 or q4, whichever has the smaller angle to v; ties: q6. All (., rows, ., 16)."""
    four = block_sum(v * q4).square() * block_sum(q6 * q6) > block_sum(v * q6).square() * block_sum(q4 * q4)
    return torch.where(four, q4, q6)


def ms_eden(x, R, seed, four_six=False):
    """MS-EDEN: rotate, round values to nearest, and the scale times the block's EDEN factor stochastically.

    x (..., K) of any float dtype, K % 128 == 0; R, the first of `rotation`'s results, or None if x is rotated
    already; seed as in sr -> NVFP4 of x R, not normalised. NMSE 9.4e-3. Rotated back, its mean over draws of
    R and seed is x, but for the bias of too few rounds, above. four_six: amax may map to 4 too, where that
    has the smaller angle to v; the part along v stays exact, and EDEN's argument holds. NMSE 8.1e-3; no
    recipe here uses it. Source: arXiv:2601.22813, Algorithm 1.
    """
    b, amax, unit = blocks(rotate(x, R))
    s = divide_by(amax, EDEN_MAX)                      # this first scale is not rounded
    v = b * ratio(torch.ones_like(s), s)               # one division for a block instead of 16
    q = e2m1(v)
    if four_six:
        q = larger_cosine(v, q, e2m1(v * (2 / 3)))     # s stays: the EDEN factor makes up for the 2/3
    s = s * eden_factor(v, q)
    u, u_scale = uniform(seed, s, s)
    return assemble(x.shape, q, round_scale(s, u) * unit, u_scale)


# Printed:
#     NMSE x 1e3 on N(0, 1)       here    paper, table 1
#     MS-EDEN                     9.36               9.4
#     MS-EDEN with 4/6            8.09                 -
#     B times the squared error of the mean of B draws, over that of one: 1 if unbiased, +- standard error
#                                            B=1     B=4    B=16    B=64   B=256      +-
#     rht128, N(0, 1)                       1.00    1.00    1.01    1.00    1.02    0.02
#     rht128, one 100 in 128                1.00    1.31    2.54    7.44   27.12    0.32
#     rht128, 1, 0.88, 126 zeros            1.00    3.18   11.92   46.89  186.78    0.02
#     rht128x2, N(0, 1)                     1.00    1.00    0.99    1.01    1.02    0.02
#     rht128x2, one 100 in 128              1.00    1.00    1.00    1.01    1.01    0.02
#     rht128x2, 1, 0.88, 126 zeros          1.00    1.07    1.37    2.55    7.30    0.06
#     rht128x3, N(0, 1)                     1.00    1.00    1.00    1.00    0.99    0.02
#     rht128x3, one 100 in 128              1.00    1.00    1.00    1.00    1.01    0.02
#     rht128x3, 1, 0.88, 126 zeros          1.00    1.00    0.99    1.00    0.99    0.01


# ---- 9. The table of recipes -------------------------------------------------------------------------------
#
# A recipe says how each operand of the three GEMMs becomes NVFP4. The backward pass sums over N and over M,
# so it needs w and x rounded along those, not along K as the forward pass rounded them. Most recipes
# therefore requantize: decode what the forward pass stored, transpose, rotate, quantize again. So a gradient
# is, in the mean, that at the rounded w and x, of which the loss was taken. NVIDIA's never quantizes twice: w
# comes in 16x16 blocks, whose transpose has the same codes, and x is kept in bf16 and quantized from that for
# dw. To add a recipe, add a row; to add a quantizer, write a function and name it here, with _16x16 at the
# end if its blocks are such, and in NOISY if it draws.

def unquantized(x, R, seed):
    """x R in bf16, in an NVFP4's place: for what a recipe leaves in bf16. `decode` takes it."""
    values = rotate(x, R).bfloat16()
    if R is not None:
        values = stored(values)                        # a compiler would leave out the cast to bf16
    return NVFP4(values, x.new_empty(0), x.new_ones(()))


def rotated(quantizer, **how):
    """A quantizer of x -> the same as a function of (x, R, seed)."""
    return lambda x, R, seed: quantizer(rotate(x, R), **how)


QUANTIZERS = {    # name: function of (x, R, seed) -> NVFP4 of x R
    "bf16": unquantized,
    "rtn": rotated(rtn),
    "rtn_16x16": rotated(rtn, block=(16, 16)),
    "four_six": rotated(four_six),
    "four_six_16x16": rotated(four_six, block=(16, 16)),
    "scale_search": rotated(scale_search),
    "scale_search_16x16": rotated(scale_search, block=(16, 16)),
    "sr": lambda x, R, seed: sr(rotate(x, R), seed),
    "ms_eden": ms_eden,
    "ms_eden_46": lambda x, R, seed: ms_eden(x, R, seed, four_six=True)
}
NOISY = {"sr", "ms_eden", "ms_eden_46"}    # those that draw: for the backward pass only


class Gemm(NamedTuple):
    """How one backward GEMM gets its operands, dy and the other one, which is w in dx and x in dw."""
    rotation: str | None    # of both operands along the axis that is summed over; it cancels in the product
    dy: str                 # quantizer of dy
    other: str | None       # quantizer of the other; None, for w only: as stored, which needs 16x16 blocks


class Recipe(NamedTuple):
    """A row of RECIPES."""
    x: str                     # y = x w^T: quantizer of x, without noise
    w: str                     #            quantizer of w, without noise
    dx: Gemm                   # dx = dy w
    dw: Gemm                   # dw = dy^T x
    original: bool = False     # quantize w and x again from their bf16 values, not from the stored NVFP4
    dampen: float = 0.0        # how strongly w is pulled towards its quantized value: section 12
    two_terms: bool = False    # y: by a fourth GEMM, multiply what quantizing x has lost, too


NVIDIA = Recipe(
    x="rtn",
    w="rtn_16x16",
    dx=Gemm(None, dy="sr", other=None),
    dw=Gemm("rht16", dy="sr", other="rtn"),
    original=True
)
RECIPES = {
    # All three GEMMs as in nn.Linear.
    "bf16": None,
    # The simplest: nearest everywhere, also where it should be unbiased.
    "rtn": Recipe(
        x="rtn",
        w="rtn",
        dx=Gemm(None, dy="rtn", other="rtn"),
        dw=Gemm(None, dy="rtn", other="rtn")
    ),
    # NVIDIA, arXiv:2509.25149. Which layers and which steps stay in bf16 is the training script's business.
    "nvidia": NVIDIA,
    # 4/6 in its forward pass, arXiv:2512.02010. (Their code lets 4/6 choose among SR gradients, too: biased.)
    "four_six": NVIDIA._replace(x="four_six", w="four_six_16x16"),
    # TetraJet-v2, arXiv:2510.27527, in the form that Quartet II compares with.
    "tetrajet2": Recipe(
        x="rtn",
        w="rtn",
        dx=Gemm("rht32", dy="sr", other="sr"),
        dw=Gemm("rht32", dy="sr", other="sr")
    ),
    # Quartet II, arXiv:2601.22813.
    "quartet2": Recipe(
        x="four_six",
        w="four_six",
        dx=Gemm("rht128", dy="ms_eden", other="ms_eden"),
        dw=Gemm("rht128", dy="ms_eden", other="ms_eden")
    ),
    # Ours: scales searched forward, three rounds of rotation backward, CAGE's pull on the weights (section
    # 12).
    "quintet": Recipe(
        x="scale_search",
        w="scale_search",
        dx=Gemm("rht128x3", dy="ms_eden", other="ms_eden"),
        dw=Gemm("rht128x3", dy="ms_eden", other="ms_eden"),
        dampen=10.0
    )
}


# Errors are against what was never rounded, so those of a requantized operand are of both times. Of 16.89 for
# quartet2's w in dx, about 9.4 are MS-EDEN's.
#
# Printed:
#     NMSE x 1e3 of operands    y: x       w  dx: dy       w  dw: dy       x
#     rtn                       9.03    9.03    9.02   17.73    9.08   17.70
#     nvidia                    9.03   12.34   23.64   12.34   23.44    9.02
#     four_six                  7.56   12.32   23.64   12.32   23.54    9.06
#     tetrajet2                 9.03    9.03   23.18   32.33   23.37   32.58
#     quartet2                  7.56    7.57    9.34   16.89    9.38   16.97
#     quintet                   6.70    6.70    9.38   16.06    9.36   15.97


# ---- 10. The three GEMMs -----------------------------------------------------------------------------------
#
# x (M, K), w (N, K), y and dy (M, N) come in bf16. An operand of a GEMM is always given with the summed axis
# last, as NVFP4 wants it. A backward pass draws noise of its own: each GEMM has its rotation, which both of
# its operands share, and each operand has its seed.

class Noise(NamedTuple):
    """The random bits of one backward GEMM."""
    signs: Tensor    # (rounds, 128) float32 of +-1: makes the rotation, which both operands share
    other: Tensor    # () int64: seed of w in dx, of x in dw
    dy: Tensor       # () int64: seed of dy


def draw_noise(dy, row):
    """Fresh Noise for dx and for dw of a row of RECIPES, from the default generator of dy's device."""
    # Two rounds of signs at least: so recipes of one round and of two get the same seeds, for comparisons.
    # (Those of three get others.)
    rounds = max([2] + [ROTATIONS[gemm.rotation][1] for gemm in (row.dx, row.dw) if gemm.rotation])
    words = draw(dy, 4 * rounds + 4).view(2, -1)      # for each GEMM 64 signs a word, then two seeds
    bits = words[:, :-2, None] >> torch.arange(64, device=dy.device) & 1
    signs = bits.view(2, rounds, GROUP).float() * 2.0 - 1.0
    return [Noise(gemm_signs, gemm_words[-2], gemm_words[-1]) for gemm_signs, gemm_words in zip(signs, words)]


def quantize(quantizer, x, R=None, seed=None):
    """x (..., K), by a name of QUANTIZERS -> NVFP4 of x R."""
    return QUANTIZERS[quantizer](x, R, seed)


def matmul(a, b, n=1):
    """a NVFP4 (M, K), b NVFP4 (N, K), n a power of two -> a b^T / n (M, N) bf16: an FP4 GEMM, emulated.

    Decoded values are exact, so this multiplies what FP4 tensor cores multiply. Its sums are float32, or,
    if the variable GEMM is "blackwell", `fp4_matmul`'s.
    """
    dtype = CPU_DTYPE if a.codes.device.type == "cpu" else torch.bfloat16
    return gemm(decode(a, dtype), decode(b, dtype), n)    # in the appendix


def whole_groups(t):
    """t (M, K) -> (M', K): tokens of zeros added, so that M' is a multiple of 128 for rotations along M."""
    return F.pad(t, (0, 0, 0, -len(t) % GROUP))


def forward_gemm(row, x, w, w_q):
    """x (M, K), w (N, K) bf16, w_q NVFP4 (N, K) -> y (M, N) bf16; w and x as the backward pass takes them.

    w_q is w by the quantizer row.w. The caller makes it (appendix A), since it can serve many forward passes.
    """
    # --- y = x w^T, summed over K ---
    x_q = quantize(row.x, x)                                               # (M, K)
    y = matmul(x_q, w_q)                                                   # (M, N)
    if row.two_terms:
        # A second term: what x has lost, in 4 bits. The difference is exact in bf16, since x is between half
        # and twice its quantized value, or that is 0. (But for scales that are sub-normal in E4M3.) The
        # backward pass takes the first term only. ARCQuant, arXiv:2601.07475, adds such a term to some
        # columns of x when a trained model is used.
        lost = x - decode(x_q, torch.bfloat16)
        y = y + matmul(quantize(row.x, lost), w_q)

    # Kept for the backward pass: NVFP4 as it was multiplied, or, where the recipe says so, bf16. A w that is
    # only transposed needs no bf16.
    w_kept = quantize("bf16", w) if row.original and row.dx.other else w_q
    x_kept = quantize("bf16", x) if row.original else x_q
    return y, w_kept, x_kept


def dgrad_gemm(row, dy, w_kept, noise):
    """dy (M, N) bf16, w_kept (N, K) of forward_gemm -> dx (M, K) bf16."""
    # --- dx = dy w, summed over N ---
    # Rotating both operands by one R changes nothing but the rounding: (dy R)(w^T R)^T = n dy w.
    R, n = rotation_from(row.dx.rotation, noise.signs)
    dy_q = quantize(row.dx.dy, dy, R, noise.dy)                            # (M, N)
    if row.dx.other is None:
        w_q = transpose(w_kept)                                            # (K, N)
    else:
        w_q = quantize(row.dx.other, decode(w_kept).T, R, noise.other)     # (K, N)
    return matmul(dy_q, w_q, n)                                            # (M, K)


def wgrad_gemm(row, dy, x_kept, noise):
    """dy (M, N) bf16, x_kept (M, K) of forward_gemm -> dw (N, K) bf16."""
    # --- dw = dy^T x, summed over M ---
    # Tokens of zeros are added up to whole groups of 128, and change no sum.
    R, n = rotation_from(row.dw.rotation, noise.signs)
    dy_t = whole_groups(dy).T                                              # (N, M)
    x_t = whole_groups(decode(x_kept)).T                                   # (K, M)
    dy_q = quantize(row.dw.dy, dy_t, R, noise.dy)
    x_q = quantize(row.dw.other, x_t, R, noise.other)
    return matmul(dy_q, x_q, n)                                            # (N, K)


# An aside that ends this section: how do FP4 tensor cores add? A published probe of one, a GB200's
# (arXiv:2609.02846), says: they take 64 products at a time along the summed axis, and round their exact sum
# to float32, to nearest, ties to even. They add these sums one after another, starting from 0, and round each
# result toward zero. The tensor scales and the rounding to bf16 come last. An emulation by these rules gave
# what the hardware gave in 258 of 258 tests of the order, in 1.29 billion gradients of a model, and through
# 100 steps of AdamW. But on random codes with random scales 146 of 512 sums differed in float32, though none
# in bf16. Nothing is known of sm_120 (GeForce), nor of GEMMs that split the summed axis among programs.

def add_toward_zero(a, b):
    """a + b of float32 tensors, rounded toward zero; one that overflows is infinite.

    Example: 1 + 0.75 * 2^-23 -> 1, where rounding to nearest gives 1 + 2^-23.
    """
    # lost is a + b - total, exactly (2Sum). If it has the other sign, total was rounded away from zero: take
    # the next float toward zero. After an overflow lost is NaN, and total stays.
    total = a + b
    b_there = total - a
    lost = (a - (total - b_there)) + (b - b_there)
    grown = lost * total.sign() < 0
    return torch.where(grown, torch.nextafter(total, torch.zeros_like(total)), total)


def fp4_gemm(a, b, n=1):
    """a (M, K), b (N, K), decoded NVFP4 -> a b^T / n (M, N) bf16, added as FP4 tensor cores do. Slow.

    For other values a sum of 64 products is only as exact as float64, and one that is 2^126 times smaller
    than the product of the sums of all |a| and all |b| is lost.
    """
    # Decoded values do not tell their tensor scales any more. So divide a by the power of two below the sum
    # of all |a|, and b likewise. That changes no digit. What is left sums to less than 2 each, so that no sum
    # of products reaches 4.
    a = a.double()
    b = b.double()
    a_unit = power_of_two_below(a.abs().sum().float()).clamp(2.0**-126, 2.0**127).double()
    b_unit = power_of_two_below(b.abs().sum().float()).clamp(2.0**-126, 2.0**127).double()
    a = a / a_unit
    b = b / b_unit

    # A decoded value is a multiple of 2^-10 tensor scales (1/2 times 2^-9), and at most 6 * 448 < 2^11.5 of
    # them. So a product is a multiple of 2^-20 below 2^23, and the sum of 64 is one below 2^29: 49 bits,
    # which float64 holds in any order.
    total = torch.zeros(len(a), len(b), device=a.device, dtype=torch.float32)
    for a_part, b_part in zip(a.split(64, 1), b.split(64, 1)):
        total = add_toward_zero(total, (a_part @ b_part.T).float())
    return (total.double() * (a_unit * b_unit / n)).bfloat16()


def fp4_matmul(a, b, n=1):
    """What `matmul` does, with the sums that an FP4 tensor core makes: a b^T / n (M, N) bf16."""
    return fp4_gemm(decode(a), decode(b), n)


# Printed:
#     NMSE x 1e3 on N(0, 1)         y       dx       dw
#     bf16                       0.00     0.00     0.00
#     rtn                       17.98    26.68    26.56
#     nvidia                    21.27    35.76    32.51
#     four_six                  19.76    35.94    32.63
#     tetrajet2                 17.98    56.68    56.63
#     quartet2                  15.06    26.46    26.34
#     quintet                   13.38    25.50    25.45
#     quintet in two terms       6.76
#     262144 sums of 2048 products by 4/6, added as FP4 tensor cores add and in float32:
#     in bf16 0 differ; 5 if columns of x are multiplied by exp(4 N(0, 1))


# ---- 11. The linear layer ----------------------------------------------------------------------------------
#
# What is left is to be nn.Linear: the same parameters and initialisation, any leading shape, any dtype,
# autocast. Most recipes keep x and w as NVFP4 for the backward pass, 0.56 bytes a value instead of 2. How
# autograd and torch.compile call the three GEMMs is in the appendix (QuantizedMatmul), and so are the checks.

NOTHING = (None, None, None)


class Linear(nn.Linear):
    """nn.Linear with its three GEMMs by a recipe. Same parameters, init and state dict; any leading shape.

    It computes on the bf16 values of x and weight; y has autocast's dtype or x's, dx x's dtype, dw the
    weight's. Noise comes from the device's default generator, as for nn.Dropout. Unlike nn.Linear's, bias is
    False by default. ValueError, except for bf16, unless in_features is a multiple of 16 and out_features of
    16, or of 128 where the recipe rotates dx. With a recipe that dampens, call dampen(model, share) after
    steps of the optimizer.

    Finite values can overflow, to infinity or NaN: inputs beyond 2.6e38, near float32's end, or beyond 1e34
    if they are rotated; and gradients, if the lengths of two vectors that are multiplied have a product
    beyond 1e32, since sums of rotated values are divided by n last.
    """
    # Within `quantized_weights` (appendix D) a weight is quantized once for many forward passes. Then
    # weight_nvfp4 holds the result, always in the same place, and weight_source says of which weight, by
    # which recipe and backend (this file or kernels.py). In all other cases forward quantizes the weight.
    weight_nvfp4 = NOTHING
    weight_source = None, None, None

    def __init__(self, in_features, out_features, bias=False, recipe="quartet2", backend="auto",
                 device=None, dtype=None):
        check(recipe, backend, in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe
        self.backend = backend

    def forward(self, x):
        if RECIPES[self.recipe] is None:
            return super().forward(x)
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(f"{self} takes floats (..., {self.in_features}), not {x.dtype} {tuple(x.shape)}")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x16 = x.reshape(-1, self.in_features).bfloat16()
        weight = self.weight                           # read once: a parametrization computes it
        w_q = NOTHING
        if weight is self.weight_source[0] and self.weight_source[1:] == (self.recipe, self.backend):
            w_q = self.weight_nvfp4
        apply = backend_of(self, weight).QuantizedMatmul.apply
        y = apply(x16, weight.bfloat16(), self.recipe, *w_q)
        y = y.to(dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, recipe={self.recipe!r}"

    def __getstate__(self):
        # A copy quantizes its weight itself.
        own = {"weight_nvfp4", "weight_source"}
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state):
        super().__setstate__(state)
        # Where this is unpickled, kernels.py may not be loaded yet: check loads it. Without it torch serves.
        check(self.recipe, "torch" if self.backend == "torch" else "auto")


# Printed:
#     bytes kept for the backward pass, a value of x and w:
#     bf16 2.00, rtn 0.56, nvidia 1.28, four_six 1.28, tetrajet2 0.56, quartet2 0.56, quintet 0.56


# ---- 12. Weights that come to rest -------------------------------------------------------------------------
#
# The gradient is taken where the forward pass multiplies, at Q(w), and it moves w. If the loss is least
# between two grid points, w goes to the border between them, and Q(w) flips from one to the other until
# training ends. Pull w towards Q(w), as weight decay pulls it towards 0, and it settles on one of the two.
# The pull must come late, when weights have found their place.
#
# This is CAGE (Tabesh et al. 2025, arXiv:2510.18784) in the form that moves the weights and leaves the
# gradient as it is. Only the ramp is our own: CAGE's pull waits, and then grows along a line; here it grows
# as (t/T)^4. After step t of T, a training loop lets quintet do w += min(1, 10 lr (t/T)^4) (Q(w) - w), lr
# being the learning rate. To dampen oscillations, by a term of the loss, is the idea of Nagel et al. 2022,
# arXiv:2203.11086.

@torch.no_grad()
def dampen(model, share):
    """w += min(1, share * strength) * (Q(w) - w), w a Linear's weight, strength its recipe's dampen.

    share: float, or () tensor on the weights' device. After step t of T, the learning rate times (t/T)^4; or,
    every few steps, the sum of these, which is cheaper. Frozen weights stay; a weight of several layers moves
    once. ValueError, and nothing moved, for a weight that is no parameter, but computed, or not in memory.
    """
    layers = {}
    for name, m in quantized_layers(model).items():
        if RECIPES[m.recipe].dampen:
            if own_weight(m) is None:
                raise ValueError(f"the weight of {name or 'this Linear'} is pruned, parametrized or "
                                 f"offloaded: {m.recipe!r} cannot dampen it, give this layer another recipe")
            layers[m.weight] = m
    for weight, m in layers.items():
        if weight.requires_grad:
            # FSDP2 shards weights: take the rows that this process has, as a tensor of their own.
            w = getattr(weight, "to_local", lambda: weight)()
            values = backend_of(m, w).on_grid(w.bfloat16(), m.recipe)
            fraction = w.new_zeros(()) + share * RECIPES[m.recipe].dampen      # a tensor, also of a float
            w.lerp_(values.to(w.dtype), fraction.clamp(max=1))


# Printed:
#     of weights whose best value lies between two grid points, this share flips in a step at the end:
#     29.5%, and 0.4% if they are pulled


# ============================================================================================================
# Appendix. From here on: what PyTorch needs. A reader who stops here has understood the method.
# ============================================================================================================

# ---- A. Custom ops, and what torch.compile needs -----------------------------------------------------------
#
# torch.compile may replace an operation by another that is equal on paper. Three must stay as they are:
# random bits, which are to be eager's; a GEMM with float32 sums; and a cast to bf16, which the compiler may
# skip, computing on with the float32 value. For a GPU that is not all. There PyTorch's compiler multiplies by
# an approximate reciprocal instead of dividing, and fuses products with sums. On an H200, RTN of random
# values in bf16 so stored another scale in 3% of blocks: in half of those whose amax / 6 lies midway between
# two scales. With torch.compile(model, options=AS_EAGER) all quantizers had the bits there that they have
# eager (data/evidence/README.md, section 7).

AS_EAGER = {"eager_numerics.division_rounding": True, "emulate_precision_casts": True}


@library.custom_op("quartet::draw", mutates_args=("clock",))
def draw_at(like: Tensor, words: int, clock: Tensor) -> Tensor:
    """`draw`, which says that it changes clock."""
    return torch.randint(-2**63, 2**63 - 1, (words,), device=like.device)


draw_at.register_fake(lambda like, words, clock: like.new_empty(words, dtype=torch.int64))
CLOCK = torch.zeros(1, device="cpu")


def draw(like, words):
    """(words,) int64 of random bits from the default generator of like's device, the same compiled or not."""
    # Two layers whose outputs are added have the same dy, so their calls have equal arguments. The compiler
    # would make one of them, or exchange them, even if the op were tagged as random. Calls that seem to
    # change a clock are neither merged nor exchanged.
    clock = torch.empty(0, device="cpu")
    if torch.compiler.is_compiling():
        clock = CLOCK
    return draw_at(like, words, clock)


@library.custom_op("quartet::stored", mutates_args=())
def stored(t: Tensor) -> Tensor:
    """A copy of t, (...) bf16: what is computed from it sees bf16 values, compiled or not."""
    return t.clone()


stored.register_fake(torch.empty_like)


GEMM = "plain"      # or "blackwell": how every emulated GEMM adds


@library.custom_op("quartet::gemm", mutates_args=())
def gemm(a: Tensor, b: Tensor, n: int = 1) -> Tensor:
    """a (M, K), b (N, K) of bf16 values -> a b^T / n (M, N) bf16, from sums in float32, or as GEMM says."""
    if GEMM == "blackwell":
        return fp4_gemm(a, b, n)
    cublas = torch.backends.cuda.matmul
    # Two flags, set as one: else partial sums may be added in bf16; whether a sum may be split is the user's.
    reduced = cublas.allow_bf16_reduced_precision_reduction
    split = cublas.allow_bf16_reduced_precision_reduction_split_k
    cublas.allow_bf16_reduced_precision_reduction = False, split
    try:
        with torch.autocast(a.device.type, enabled=False):
            # The sum is divided: an operand could become sub-normal, where bf16 has fewer bits.
            return torch.addmm(a.new_empty(len(b)), a, b.T, beta=0, alpha=1 / n).bfloat16()
    finally:
        cublas.allow_bf16_reduced_precision_reduction = reduced, split


gemm.register_fake(lambda a, b, n=1: a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16))


# A CPU without bf16 units multiplies faster in float32, and as exactly.
CPU_DTYPE = torch.float32
if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"):
    CPU_DTYPE = torch.bfloat16


def quantized(w, recipe):
    """w (N, K) bf16 -> NVFP4 (N, K), what y multiplies x by."""
    return quantize(RECIPES[recipe].w, w)


def on_grid(w, recipe):
    """w (N, K) bf16 -> its values as y multiplies x by them, (N, K) bf16."""
    return decode(quantized(w, recipe), torch.bfloat16)


class QuantizedMatmul(torch.autograd.Function):
    """x (M, K), w (N, K) bf16; w_q: `quantized` w, or Nones -> x w^T (M, N) bf16, as are the gradients."""

    @staticmethod
    def forward(ctx, x, w, recipe, *w_q):
        ctx.row = RECIPES[recipe]
        x = stored(x)
        w = stored(w)
        if w_q[0] is None:
            w_q = quantized(w, recipe)
        y, w_kept, x_kept = forward_gemm(ctx.row, x, w, NVFP4(*w_q))
        ctx.save_for_backward(*w_kept, *x_kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative()
        saved = ctx.saved_tensors                      # read once: the rule of activation checkpointing
        dy = stored(dy)
        dx = dw = None
        noise_dx, noise_dw = draw_noise(dy, ctx.row)
        if ctx.needs_input_grad[0]:
            dx = dgrad_gemm(ctx.row, dy, NVFP4(*saved[:3]), noise_dx)
        if ctx.needs_input_grad[1]:
            dw = wgrad_gemm(ctx.row, dy, NVFP4(*saved[3:]), noise_dw)
        return dx, dw, None, None, None, None          # none for recipe and the three parts of w_q


# ---- B. Backends -------------------------------------------------------------------------------------------
#
# This file computes everything on any device. kernels.py computes the same on a GPU, much faster.

kernels = None    # the module kernels.py, once a Linear may use it


def load_kernels():
    """Import kernels.py -> what is lacking to run it here, or None."""
    global kernels
    if os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
            return "an NVIDIA GPU of compute capability 8.0 or more"
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return "a C compiler (apt install gcc)"
    try:
        from kernels import supports    # another package of that name would lack this
        import kernels
    except ImportError as e:
        return f"kernels.py, and the package triton (pip install triton): {e}"


def resolve(backend, device, recipe):
    """What a Linear's backend means for a recipe on a device type, "cuda" or "cpu": "torch" or "triton"."""
    if backend != "auto":
        return backend
    if kernels and device == "cuda" and kernels.supports(RECIPES[recipe]):
        return "triton"
    return "torch"


def backend_of(layer, weight):
    """The module, kernels.py or this one, that computes a Linear where its weight is."""
    if resolve(layer.backend, weight.device.type, layer.recipe) == "triton":
        return kernels
    return sys.modules[__name__]


# ---- C. Checks ---------------------------------------------------------------------------------------------

def refuse_second_derivative():
    """RuntimeError in a backward pass that is to be differentiated again: it would leave out w, silently."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("a Linear in 4 bits has no second derivative (create_graph=True): use "
                           "recipe='bf16' where a loss has gradients in it")


def check_blocks(x, block):
    """ValueError unless a quantizer can cut x (..., M, K) into blocks."""
    if not x.is_floating_point():
        raise ValueError(f"quantizers take floating-point tensors, not {x.dtype}: use .float() first")
    if block not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"block={block}: NVFP4 blocks are (1, {BLOCK}) or, for weights, ({BLOCK}, {BLOCK})")
    if not x.dim() or x.shape[-1] % BLOCK or math.prod(x.shape[:-1]) % block[0]:
        raise ValueError(f"shape {tuple(x.shape)}: pad with zeros to "
                         f"rows % {block[0]} == columns % {BLOCK} == 0")


def check_row(recipe):
    """ValueError for a row of RECIPES that names what there is not, or what cannot stand there."""
    row = RECIPES[recipe]
    needed = {row.x, row.w, row.dx.dy, row.dw.dy, row.dw.other}
    if row.dx.other is not None or row.dx.rotation or not str(row.w).endswith("_16x16"):
        needed.add(row.dx.other)
    wrong = (needed - QUANTIZERS.keys()) | ({row.x, row.w} & NOISY)
    wrong |= {row.dx.rotation, row.dw.rotation} - {None, *ROTATIONS}
    if wrong:
        raise ValueError(f"{recipe!r}, {row}: {wrong} cannot stand where it does. Quantizers are names of "
                         "QUANTIZERS, for x and w without noise; rotations are names of ROTATIONS, or None; "
                         "other can be None in dx only, for a w in 16x16 blocks that is not rotated")


def check(recipe, backend, in_features=0, out_features=0, name=""):
    """ValueError for what cannot be computed; a warning where "auto" means torch in spite of a GPU."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r} is not one of auto, torch, triton")
    row = RECIPES[recipe]
    asked = backend == "triton" or backend == "auto" and torch.cuda.is_available()
    lacks = load_kernels() if asked else None      # what, or None
    if asked and not lacks and not kernels.supports(row):
        lacks = f"a mode in kernels.py for each quantizer of {recipe!r}"
    if lacks and backend == "triton":
        raise ValueError(f"backend 'triton' needs {lacks}; backend 'torch' runs everywhere")
    if row is None:
        return
    check_row(recipe)
    if lacks:
        warnings.warn(f"backend 'triton' needs {lacks}: 'auto' takes 'torch', which is slower")
    need = GROUP if row.dx.rotation else BLOCK
    if out_features % need or in_features % BLOCK:
        raise ValueError(f"{name or 'Linear'}({in_features}, {out_features}): {recipe!r} needs in_features % "
                         f"{BLOCK} == 0, out_features % {need} == 0: resize, use recipe='bf16' or skip=...")


# ---- D. Models ---------------------------------------------------------------------------------------------

def quantize_model(model, recipe, skip=(), backend="auto"):
    """Switch every nn.Linear (and Linear; no subclasses) to a recipe, in place -> list of their names.

    skip: names, or parts between dots, of modules to leave alone ("lm_head", "layers.0"). They stay the same
    objects, hooks included. ValueError, and nothing changed, if one does not fit. Modules that use weights
    without calling their layers, such as nn.MultiheadAttention, stay as they are. PyTorch's fast path for
    nn.TransformerEncoderLayer would do so in evaluation; it is switched off, for the whole process.
    """
    check(recipe, backend)
    if isinstance(skip, str):
        skip = {skip}
    unused = set(skip)
    linears = {}
    for name, m in model.named_modules():
        hits = {part for part in skip if f".{part}." in f".{name}."}
        unused -= hits
        if type(m) in (nn.Linear, Linear) and not hits:
            linears[name] = m
    if unused:
        raise ValueError(f"skip={sorted(unused)}: no such modules in the model")
    for name, m in linears.items():
        check(recipe, backend, m.in_features, m.out_features, name)
    for m in linears.values():
        m.__class__ = Linear
        m.recipe = recipe
        m.backend = backend
    if any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)
    return list(linears)


def quantized_layers(model):
    """The Linears of a model whose recipe is not bf16, {name: Linear}."""
    for m in model.modules():
        # A forward pass can leave FSDP2's weights whole: copies, which nothing may be done with.
        if hasattr(m, "set_reshard_after_forward"):
            m.reshard()
    return {name: m for name, m in model.named_modules()
            if isinstance(m, Linear) and RECIPES[m.recipe] is not None}


def own_weight(m):
    """The weight of a Linear, or None if it comes only when m is called: pruned, parametrized, offloaded."""
    w = m._parameters.get("weight")
    if w is None or w.is_meta or w.shape != (m.out_features, m.in_features):
        return None
    return w


@contextlib.contextmanager
def quantized_weights(model):
    """To accumulate gradients, or evaluate: within it each Linear takes its weight as quantized at the start.

    The quantized weight has a fixed place in memory, as a CUDA graph wants it. A weight that is not here
    outside of forward (sharded by FSDP2, pruned, parametrized, offloaded) is quantized in every forward, as
    without this. RuntimeError at the end if a weight has changed (values changed through .data go unnoticed).
    """
    layers = [m for m in quantized_layers(model).values() if type(own_weight(m)) is nn.Parameter]
    form = lambda parts: [(t.shape, t.dtype, t.device) for t in parts]
    # What inference_mode has made has no version, and cannot be trained. A fused optimizer leaves versions as
    # they are, so its steps are noticed, too.
    weights = [m.weight for m in layers if not m.weight.is_inference()]
    state = lambda: [(w._version, w.data_ptr(), w.dtype) for w in weights]
    before = state()
    stepped = set()

    def note(optimizer, *arguments):
        stepped.update(id(p) for group in optimizer.param_groups for p in group["params"])

    hook = register_optimizer_step_post_hook(note)
    try:
        for m in layers:
            new = backend_of(m, m.weight).quantized(m.weight.detach().bfloat16(), m.recipe)
            if m.weight_nvfp4 is NOTHING or form(m.weight_nvfp4) != form(new):
                # Memory of its own: what an op has returned must not be written to. Also in inference_mode it
                # is such that training can use it later.
                with torch.inference_mode(False):
                    m.weight_nvfp4 = [torch.empty_like(t) for t in new]
            for place, t in zip(m.weight_nvfp4, new):
                place.copy_(t)
            m.weight_source = m.weight, m.recipe, m.backend
        yield
    finally:
        hook.remove()
        for m in layers:
            m.weight_source = None, None, None
    if before != state() or not stepped.isdisjoint(map(id, weights)):
        raise RuntimeError("a weight changed within quantized_weights: step the optimizer after it")


if __name__ == "__main__":    # print the sections in numbers
    runpy.run_path(os.path.dirname(__file__) + "/data/evidence/demonstrate.py", run_name="__main__")
