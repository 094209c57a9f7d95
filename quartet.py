"""Training linear layers in 4 bits: NVFP4, its quantizers, and the recipe Quartet II beside its rivals.

An article, and the project's reference, in plain PyTorch; `python quartet.py` prints its sections in numbers.

A linear layer multiplies matrices three times: y = x w^T forward, dx = dy w and dw = dy^T x backward. FP4
tensor cores do such a GEMM several times faster than bf16 ones if both operands are NVFP4: 4-bit values, a
scale for every 16 along the summed axis. So x, w and dy are rounded to 4 bits. Forward, each error counts
once: take the least squared error. Backward, errors of many steps add up in the weights and those of mean
zero cancel: be right on average. Quartet II, arXiv:2601.22813, does so by Four Over Six and MS-EDEN.

One decision shapes the code: the tensor scale is a power of two, chosen last. Rounding a block scale to E4M3
is then rounding it to 4 significant bits: a block is final after one look, in one pass. Decoded values have
at most 2 + 4 significant bits, of value and scale, and bfloat16 holds 8: a bf16 GEMM multiplies exactly what
an FP4 GEMM does, and only the order of its float32 sums differs. Whatever decides something (which scale errs
less, which way a value goes) is specified to the bit: float32, true division, a fixed order of sums.
"""
import contextlib, math, os, shutil, sys, warnings
from typing import NamedTuple
import torch, torch.nn.functional as F
from torch import library

BLOCK, GROUP = 16, 128            # values that share a block scale, fixed by NVFP4; and that a rotation mixes
E2M1_MAX, E4M3_MAX, EXPONENT = 6.0, 448.0, 0x7F800000       # EXPONENT: that field of a float32

# ---- 1. The number format and its two small floats ---------------------------------------------------------
# E2M1, the 4-bit value: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign. E4M3, the block scale: 4 significant bits from
# 2^-6 to 448, fewer down to 2^-9, its sub-normals. Both grids are uniform between powers of two.
def round_fp(v, mantissa_bits, min_exp, max_val, u=None):
    """Round v onto a small float grid: to nearest, ties to even; stochastically where u is given.

    ulp = 2^(e - mantissa_bits),  e = max(floor(log2 |v|), min_exp)         spacing of the grid around v
    v, u (...) float32, u in [0, 1) -> (...) float32, never -0.0. |v| > max_val saturates; grid points stay.
    """
    v = v.clamp(-max_val, max_val)
    power = (v.view(torch.int32) & EXPONENT).view(torch.float32)                # 2^floor(log2 |v|)
    ulp = power.clamp_(min=2.0**min_exp).mul_(2.0**-mantissa_bits)
    if u is None:
        magic = ulp.mul_(1.5 * 2.0**23)            # float32 is as coarse as ulp there: the sum rounds v
        return v.add_(magic).sub_(magic)
    n = v.div_(ulp)                                # exact: ulp is a power of two
    down = n.floor()
    return down.add_(u < n.sub_(down)).mul_(ulp)   # not floor(n + u): n + u itself rounds
# float32 (...) -> (...); round_scale: to E4M3 of any exponent, 4 significant bits, below 2^100; infinity: NaN
def e2m1(v, u=None): "To E2M1."; return round_fp(v, 1, 0, E2M1_MAX, u)
def e4m3(s, u=None): "To E4M3."; return round_fp(s, 3, -6, E4M3_MAX, u)
def round_scale(s, u=None): "To 4 significant bits."; return round_fp(s, 3, -126, math.inf, u)

# ---- 2. NVFP4 tensors --------------------------------------------------------------------------------------
class NVFP4(NamedTuple):
    """x ~ q * block_scale * tensor_scale; 16 values of the last axis share a block scale. 4.5 bits each."""
    codes: torch.Tensor          # (..., K/2) uint8: two E2M1 codes a byte, the even value in the low half
    block_scale: torch.Tensor    # (..., K/16) float8_e4m3fn, >= 0
    tensor_scale: torch.Tensor   # () float32: a power of two, at least 2^-123; NaN if x held NaN or infinity
def pack(q):
    """q (..., K) float32, E2M1 values -> codes (..., K/2) uint8: sign, 2 bits of exponent, 1 of mantissa."""
    h = (q * 2.0**-14).half().view(torch.int16)  # q's bits: magnitude in 9 to 11; 0.5 is sub-normal in both
    code = ((h >> 9 & 7) | (h >> 12 & 8)).to(torch.uint8)
    return code[..., 0::2] | code[..., 1::2] << 4
def unpack(codes, dtype=torch.float32):
    """codes (..., K/2) uint8 -> (..., K) in dtype, E2M1 values: the exact inverse of pack, by a table."""
    code = torch.arange(256, device=codes.device)[:, None] >> torch.arange(0, 8, 4, device=codes.device)
    value = ((code & 7) << 2 | (code & 8) << 4).to(torch.uint8).view(torch.float8_e4m3fn)  # E4M3 of q * 2^-6
    return F.embedding(codes.int(), value.to(dtype) * 2.0**6).flatten(-2)
def decode(t, dtype=torch.float32):
    """t NVFP4 of (..., K) -> (..., K): q * block_scale * tensor_scale, exact in float32 and bfloat16."""
    if t.codes.dtype == torch.bfloat16: return (t.codes * t.tensor_scale).to(dtype)    # the quantizer "bf16"
    scale = (t.block_scale.float() * t.tensor_scale).to(dtype)
    return (unpack(t.codes, dtype).unflatten(-1, (-1, BLOCK)) * scale[..., None]).flatten(-2)
def transpose(t):
    """t NVFP4 (N, K) of 16x16 blocks -> its transpose, NVFP4 (K, N): codes repacked, nothing rounded."""
    scale = t.block_scale.view(torch.uint8)[::BLOCK].T.repeat_interleave(BLOCK, 0)
    return NVFP4(pack(unpack(t.codes).T), scale.view(torch.float8_e4m3fn), t.tensor_scale)

def blocks(x, block=(1, BLOCK)):
    """Cut x into blocks; find the amax of each, in units of a power of two near it.

    x (..., M, K) -> b (M/rows, rows, K/16, 16), amax and unit (M/rows, 1, K/16, 1), float32; rows: block[0].
    The amax of b is amax * unit, amax in [1, 2), near infinity in [1, 4), or 0 below 2^-120: scales are
    normal, in bf16 too, and no square in that unit overflows or vanishes. ValueError for other inputs.
    """
    rows, m, k = block[0], math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1
    if not x.is_floating_point():
        raise ValueError(f"quantizers take floating-point tensors, not {x.dtype}: use .float() first")
    if block not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"block={block}: NVFP4 blocks are (1, {BLOCK}) or, for weights, ({BLOCK}, {BLOCK})")
    if k % BLOCK or m % rows:
        raise ValueError(f"shape {tuple(x.shape)}: pad with zeros to rows % {rows} == columns % {BLOCK} == 0")
    b = x.reshape(m // rows, rows, k // BLOCK, BLOCK).float()
    amax = b.abs().amax((1, 3), keepdim=True)
    amax = torch.where(amax < 2.0**-120, 0.0, amax)
    unit = (amax.view(torch.int32) & EXPONENT).view(torch.float32).clamp(2.0**-120, 2.0**126)
    return b, amax / unit, unit
def over(a, c):
    """a / c for a constant c, correctly rounded: on a GPU, PyTorch makes of a / 6.0 a product with 1/6."""
    return a / a.new_full((), c)
def ratio(b, s):
    """b / s; where s is 0 or NaN (a block of zeros, or with NaN or infinity): 0, but NaN of those two."""
    return b / torch.where(s > 0, s, math.inf)
def block_sum(t):
    """t (., rows, ., 16) -> (., 1, ., 1): block sums as a tree, i with i+8, then +4, +2, +1; rows alike."""
    for dim in (3, 1):
        while t.shape[dim] > 1: t = torch.add(*t.chunk(2, dim))     # another order flips choices of 4/6
    return t

def assemble(shape, q, s, u=None):
    """The last step of every quantizer: choose the tensor scale, encode the scales as E4M3, pack the codes.

    shape of x; q (M/rows, rows, K/16, 16) E2M1 values; s (M/rows, 1, K/16, 1) of 4 significant bits -> NVFP4.
    The largest s becomes 240 to 448; those then below 2^-6, sub-normal, are rounded once more, by u of s's
    shape if given. NaN or infinity in s: tensor scale NaN, codes and scales 0.
    """
    top = s.amax() if s.numel() else s.new_zeros(())
    power = (top.view(torch.int32) + 2**20 & EXPONENT).view(torch.float32)      # 1.875 * 2^8 would exceed 448
    tensor_scale = torch.where(top > 0, (power * 2.0**-8).clamp(min=2.0**-123), 1.0)
    tensor_scale = torch.where(top.isfinite(), tensor_scale, math.nan)
    scale = e4m3(s / tensor_scale, u).nan_to_num(nan=0.0).to(torch.float8_e4m3fn)
    *lead, k = shape
    scale = scale.expand(-1, q.shape[1], -1, -1).reshape(*lead, k // BLOCK)
    return NVFP4((pack(q) * top.isfinite()).view(*lead, k // 2), scale, tensor_scale)

# ---- 3. Round to nearest (RTN) -----------------------------------------------------------------------------
def rtn(x, block=(1, BLOCK)):
    """RTN: a block's amax maps to 6, the largest E2M1 value; scale and values go to nearest, ties to even.

    x (..., K) of any float dtype, K % 16 == 0 -> NVFP4. Deterministic, hence biased. NMSE 9.0e-3 on N(0, 1).
    block=(16, 16): 16 rows share their scales too, so that the transposed tensor has the same codes; their
    number % 16 == 0; NMSE 12.4e-3. Source: arXiv:2509.25149, up to the tensor scale.
    """
    b, amax, unit = blocks(x, block)
    s = round_scale(over(amax, E2M1_MAX)) * unit
    return assemble(x.shape, e2m1(ratio(b, s)), s)

# ---- 4. Four Over Six (4/6), and a search over scales -----------------------------------------------------
# E2M1 has nothing between 4 and 6. A block whose amax maps to 4 uses 0 to 4 only, where the grid is finer
# around its large values and coarser around its small ones. Which is better depends: both are tried.
def best(b, roundings):
    """Of roundings (q, s) of blocks b, block by block that of least squared error; ties: the earlier."""
    found = None
    for q, s in roundings:
        new = q, s, block_sum((q * s).sub_(b).square_())                # q * s is exact
        less = found and (new[2] < found[2]).float()                    # lerp: a faster where
        found = [torch.lerp(y, x, less) for x, y in zip(new, found)] if found else new
    return found[:2]
def nearest(b, scales): "`best` of RTN."; return best(b, ((e2m1(ratio(b, s)), s) for s in scales))

def four_six(x, block=(1, BLOCK)):
    """4/6: each block maps its amax to 6 or to 4, whichever reproduces the block with the smaller error.

    x (..., K) of any float dtype, K % 16 == 0 -> NVFP4; block as in rtn. Deterministic, hence biased. Ties:
    6. NMSE 7.6e-3 on N(0, 1); 12.4e-3 with 16x16 blocks, no gain. Source: Cook et al. 2025, arXiv:2512.02010.
    """
    b, amax, unit = blocks(x, block)
    q, s = nearest(b / unit, (round_scale(over(amax, top)) for top in (6.0, 4.0)))
    return assemble(x.shape, q, s * unit)

SEARCH = 0, -1, 1, 4, 5                     # steps of E4M3 from amax / 6; amax / 4 is 4 to 6 of them up
def scale_search(x, block=(1, BLOCK)):
    """4/6 to its end: of scales near amax / 6 that of least error. NMSE 6.7e-3, 11.6e-3 with 16x16 blocks."""
    # Of 6.70e-3, -1 to 5 make 6.66e-3 by 1.3 times the instructions; 6, too (1% err less by 4/6), 6.64e-3.
    b, amax, unit = blocks(x, block)
    code = round_scale(over(amax, E2M1_MAX)).abs().view(torch.int32)    # NaN may be negative
    q, s = nearest(b / unit, (torch.where(code > 0, code + (n << 20), 0).view(torch.float32) for n in SEARCH))
    return assemble(x.shape, q, s * unit)

# ---- 5. Stochastic rounding (SR) ---------------------------------------------------------------------------
# Noise is an argument: a seed, hashed with an element's index. A draw can be replayed, is the same however a
# kernel tiles, and no two elements, tensors, layers or steps share it.
SR_MAX = E2M1_MAX * 16 / 17                 # round_scale shrinks a scale to 16/17 at least: amax lands <= 6
PHILOX_ROUNDS, M32 = 7, 0xFFFFFFFF          # 7: the fewest rounds that pass BigCrush, Salmon et al. 2011
def philox(seed, counter):
    """64-bit seed, counter (n,) int64 -> (n, 4) int64 of 32 random bits: Philox4x32, as Triton's philox."""
    c0, c1, c2, c3 = counter & M32, counter >> 32, 0, 0
    k0, k1 = seed & M32, seed >> 32 & M32
    for i in range(PHILOX_ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57                                 # 64-bit products, modulo 2^64
        c0, c2 = (b >> 32 ^ c1 ^ k0 + i * 0x9E3779B9) & M32, (a >> 32 ^ c3 ^ k1 + i * 0xBB67AE85) & M32
        c1, c3 = b, a                               # the low halves of these count
    return torch.stack([c0, c1 & M32, c2, c3 & M32], -1)
def uniform(seed, *likes):
    """For each of likes, numbered as one tensor, u of its shape: float32 in [0, 1), multiples of 2^-24."""
    sizes = [t.numel() for t in likes]
    counter = torch.arange(-(-sum(sizes) // 4), device=likes[0].device)     # element i: word i % 4 of i // 4
    u = (philox(seed, counter).flatten()[:sum(sizes)] >> 8).float().mul_(2.0**-24)
    return [part.view(t.shape) for part, t in zip(u.split(sizes), likes)]

def sr(x, seed):
    """SR: each value goes to one of its two E2M1 neighbours at random, with mean x; grid points stay put.

    x (..., K) of any float dtype, K % 16 == 0; seed int or 0-d int64 tensor on x's device -> NVFP4. Nothing
    clips: unbiased element by element. NMSE 23.5e-3 on N(0, 1). (The better of two draws, with amax to 6 and
    to 4, has 17.5e-3 and a bias: data/demonstrate.py.) arXiv:2509.25149; for the 16/17, arXiv:2601.22813.
    """
    b, amax, unit = blocks(x)
    b, s = b / unit, round_scale(over(amax, SR_MAX))
    u, again = uniform(seed, b, s)
    return assemble(x.shape, e2m1(ratio(b, s), u), s * unit, again)

# ---- 6. Rotations ------------------------------------------------------------------------------------------
# x w^T = (x R)(w R)^T / n if R R^T = n I, so both operands of a GEMM may be rotated along the axis it sums
# over. Random signs, then a Hadamard matrix, the RHT, make of 128 values 128 sums with random signs: outliers
# are spread over the group, and errors change with the signs. Signs after it would only flip what is rounded.
# R is an integer matrix, exact in bf16; 1/n, a power of two, goes into a tensor scale.
ROTATIONS = dict(rht16=(16, 1), rht32=(32, 1), rht128=(128, 1),        # Hadamard's size, rounds
                 rht128x2=(128, 2), rht128x3=(128, 3))
def rotation_from(name, signs):
    """signs (rounds or more, 128) float32 -> R (128, 128) float32 of integers, and the int n: R R^T = n I."""
    size, rounds = ROTATIONS[name]
    i = torch.arange(GROUP, device=signs.device)[:, None]
    ones = i & i.T
    for half in 4, 2, 1: ones = ones ^ ones >> half                 # last bit: their parity
    H = (1.0 - 2.0 * (ones & 1)) * (i // size == i.T // size)           # Sylvester's, in blocks size x size
    R = signs[0, :, None] * H                       # D H, D the diagonal matrix of signs
    for d in signs[1:rounds]: R = rotate(R * d, H)  # D1 H D2 H, D1 H D2 H D3 H
    return R, size**rounds
def rotation(name, generator=None):
    """`rotation_from` new random signs, on the generator's device. ValueError for an unknown name."""
    if name not in ROTATIONS:
        raise ValueError(f"unknown rotation {name!r}: choose one of {', '.join(ROTATIONS)}")
    signs = torch.randint(0, 2, (3, GROUP), generator=generator, device=generator and generator.device)
    return rotation_from(name, signs * 2.0 - 1.0)
def rotate(x, R):
    """x (..., K), K % 128 == 0 -> x R (..., K) float32, group by group, not normalised. R None: x."""
    if R is None: return x
    if x.shape[-1] % GROUP:
        raise ValueError(f"shape {tuple(x.shape)}: pad the last dimension with zeros to groups of {GROUP}")
    # The last bit of float32 sums depends on the device. TF32, if on, is exact for bf16 values like Linear's.
    with torch.autocast(x.device.type, enabled=False):      # it would round x, and the sums, to bf16
        return (x.reshape(-1, GROUP).float() @ R).view(x.shape)

# ---- 7. MS-EDEN --------------------------------------------------------------------------------------------
# RTN errs less than SR but shrinks: <q, v> < <v, v>. EDEN restores that product. Rotate, round v to q,
# multiply by S = <v, v> / <v, q>: now <S q, v> = <v, v>, and as a random rotation leaves the error no
# direction of its own, the mean of S q is v, whatever the rounding: 4/6 may choose it, by the angle between q
# and v. MS-EDEN puts S into the block scale, the randomness into rounding that to E4M3. The mean is right as
# far as the rotated error has no direction. A group dominated by one large value becomes +-constant under
# signs and one Hadamard; all 128 values sit on one grid point, RTN erases the rest in every draw, and no
# averaging brings it back. (The paper's corollary overlooks that.) Two rounds, R = D1 H D2 H, still one
# matrix, leave next to none of that: see ms_eden, and data/bias.py on a trained model. But of two near-equal
# values, such as (1, 0.88) and 126 zeros, half of the sums between the rounds are empty, and 1.3% of the norm
# stays; after a third round none was seen in any input tried.
EDEN_MAX = SR_MAX / 0.93      # the paper's 6.07: some clipping pays. NMSE 9.32e-3; by .90 and .96, 9.47, 9.58
def eden_factor(v, q):
    """S (M/rows, 1, K/16, 1) = <v, v> / <v, q> of blocks v (M/rows, rows, K/16, 16) and q; 1 if v = 0."""
    # One S for 128 scaled values has a bias of -9e-4 on N(0, 1): blocks of a group differ in scale
    # (test_eden_factor_is_per_block). v is not clamped, so what clipping lost counts too.
    vv, vq = block_sum(v * v), block_sum(v * q)
    return torch.where(vq > 0, vv / vq, 1.0)
def ms_eden(x, R, seed, four_six=False):
    """MS-EDEN: rotate, round values to nearest, and the scale times the block's EDEN factor stochastically.

    x (..., K) of any float dtype, K % 128 == 0; R of `rotation` (None: x is rotated already); seed as in sr
    -> NVFP4 of x R, not normalised. NMSE 9.32e-3 if x R is N(0, 1), 8.07e-3 with four_six; 9.38 and 8.08e-3
    if N(0, 128), as by rht128. Before the scale is rounded, <decode, x R> = <x R, x R> in every block. The
    mean is x R on N(0, 1), within noise; one value of 100 in 128 leaves 0.1 of a draw's squared error, < 1e-4
    if R has two rounds; of 300, 0.4 and 2e-4, but 5e-3 with four_six. Source: arXiv:2601.22813, Algorithm 1.
    """
    b, amax, unit = blocks(rotate(x, R))
    s = over(amax, EDEN_MAX)                        # this first scale is not rounded
    q = e2m1(v := b / unit * ratio(1.0, s))         # one division a block: here no tie needs more
    if four_six:                                    # amax to 4, in units of s still: S makes up for it
        q4 = e2m1(v * (2 / 3))
        (c6, l6), (c4, l4) = ((block_sum(v * q).square(), block_sum(q * q)) for q in (q, q4))
        q = q.lerp(q4, (c4 * l6 > c6 * l4).float()) # the larger cosine; ties: 6
    s = s * eden_factor(v, q)
    u, again = uniform(seed, s, s)
    return assemble(x.shape, q, round_scale(s, u) * unit, again)

# ---- 8. The table of recipes -------------------------------------------------------------------------------
# How each operand of the three GEMMs becomes NVFP4. To add a recipe, add a row; a quantizer, a function.
QUANTIZERS = {                              # name: function of (x, R, seed) -> NVFP4
    "bf16":           lambda x, R, seed: NVFP4(rotate(x, R).bfloat16(), x.new_empty(0),  # not quantized, to
                                               torch.ones((), device=x.device)),    # see what the others cost
    "rtn":            lambda x, R, seed: rtn(rotate(x, R)),
    "rtn_16x16":      lambda x, R, seed: rtn(rotate(x, R), block=(16, 16)),
    "four_six":       lambda x, R, seed: four_six(rotate(x, R)),
    "four_six_16x16": lambda x, R, seed: four_six(rotate(x, R), block=(16, 16)),
    "sr":             lambda x, R, seed: sr(rotate(x, R), seed),
    "scale_search":   lambda x, R, seed: scale_search(rotate(x, R)),
    "scale_search_16x16": lambda x, R, seed: scale_search(rotate(x, R), block=(16, 16)),
    "ms_eden":        ms_eden,
    "ms_eden_46":     lambda x, R, seed: ms_eden(x, R, seed, True),
}
NOISY = {"sr", "ms_eden", "ms_eden_46"}     # those that draw: for the backward pass only

class Recipe(NamedTuple):
    """A row of RECIPES. Backward quantizes again what the forward's NVFP4 x and w decode to, or as stated."""
    x: str                       # y = x w^T, sums over K: quantizer of x, without noise
    w: str                       #                         quantizer of w
    dx: tuple                    # dx = dy w, sums over N: rotation, quantizer of dy, of w (None: as saved)
    dw: tuple                    # dw = dy^T x, over M:    rotation, quantizer of dy, of x
    original: bool = False       # dx, dw quantize the original w, x, where they do not take w as saved
    dampen: float = 0.0          # how strongly w is pulled towards its quantized value, see section 10

RECIPES = {
    "bf16":      None,           # all three GEMMs as in nn.Linear
    #                   y: x, w      dx: R, dy, w           dw: R, dy, x
    "rtn":       Recipe("rtn", "rtn", (None, "rtn", "rtn"), (None, "rtn", "rtn")),
    # NVIDIA, arXiv:2509.25149. (Which layers and steps stay in bf16 is the training script's business.)
    "nvidia":    Recipe("rtn", "rtn_16x16", (None, "sr", None), ("rht16", "sr", "rtn"), True),
    # 4/6 forward in NVIDIA's, arXiv:2512.02010. (Its code also lets 4/6 choose among SR gradients: biased.)
    "four_six":  Recipe("four_six", "four_six_16x16", (None, "sr", None), ("rht16", "sr", "rtn"), True),
    # TetraJet-v2, arXiv:2510.27527, in the form that Quartet II, arXiv:2601.22813, compares with
    "tetrajet2": Recipe("rtn", "rtn", ("rht32", "sr", "sr"), ("rht32", "sr", "sr")),
    "quartet2":  Recipe("four_six", "four_six", ("rht128", "ms_eden", "ms_eden"),
                                                ("rht128", "ms_eden", "ms_eden")),
    # ours: scales searched forward, three rounds of rotation backward, weights that come to rest (section 10)
    "quintet":   Recipe("scale_search", "scale_search", ("rht128x3", "ms_eden", "ms_eden"),
                                                        ("rht128x3", "ms_eden", "ms_eden"), dampen=10.0),
}

# ---- 9. The linear layer -----------------------------------------------------------------------------------
NATIVE_BF16 = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
kernels = None                              # the module kernels.py, once a Linear may use it
@library.custom_op("quartet::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw(like: torch.Tensor, words: int) -> torch.Tensor:
    """(words,) int64 of random bits from the default generator of like's device, compiled or not the same."""
    return torch.randint(-2**63, 2**63 - 1, (words,), device=like.device)
draw.register_fake(lambda like, words: like.new_empty(words, dtype=torch.int64))
def draw_words(dy, row):
    """Of a backward pass: (2, words) int64; for dx, for dw: R's signs, by bits, seeds of w or x, of dy."""
    rounds = max([2] + [ROTATIONS[gemm[0]][1] for gemm in (row.dx, row.dw) if gemm[0]])
    return draw(dy, 2 * (2 * rounds + 2)).view(2, -1)
@library.custom_op("quartet::gemm", mutates_args=())
def gemm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K), b (N, K) of bf16 values -> a b^T (M, N) bf16, from sums in float32 throughout."""
    cublas = torch.backends.cuda.matmul
    before = cublas.allow_bf16_reduced_precision_reduction
    cublas.allow_bf16_reduced_precision_reduction = False       # else partial sums may be added in bf16
    try:
        with torch.autocast(a.device.type, enabled=False): return F.linear(a, b).bfloat16()
    finally: cublas.allow_bf16_reduced_precision_reduction = before
gemm.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16))
def matmul(a, b):
    """a NVFP4 (M, K), b NVFP4 (N, K) -> a b^T (M, N) bf16: as FP4 tensor cores, but for the order of sums."""
    slow = a.codes.device.type == "cpu" and not NATIVE_BF16     # float32 is as exact, and faster there
    return gemm(*(decode(t, torch.float32 if slow else torch.bfloat16) for t in (a, b)))
def backward_matmul(row, e, other, words):
    """One backward GEMM: e (I, L), other (J, L) or shorter, NVFP4 unless row quantizes it -> (I, J) bf16."""
    bits = words[:-2, None] >> torch.arange(64, device=words.device) & 1               # then two seeds
    R, n = rotation_from(row[0], bits.view(-1, GROUP) * 2.0 - 1.0) if row[0] else (None, 1)
    if row[2]:
        other = QUANTIZERS[row[2]](F.pad(other, (0, e.shape[1] - other.shape[1])), R, words[-2])
    return matmul(QUANTIZERS[row[1]](e, R, words[-1]), other._replace(tensor_scale=other.tensor_scale / n))

def quantized(w, recipe):
    """w (N, K) bf16 -> codes, block_scale, tensor_scale of what y multiplies x by."""
    return tuple(QUANTIZERS[RECIPES[recipe].w](w, None, None))
def on_grid(w, recipe):
    """w (N, K) bf16 -> its values as y multiplies x by them, (N, K) bf16."""
    return decode(NVFP4(*quantized(w, recipe)), torch.bfloat16)
@library.custom_op("quartet::stored", mutates_args=())
def stored(t: torch.Tensor) -> torch.Tensor:
    """A copy: between its own operations torch.compile keeps bf16 values in float32; here it must round."""
    return t.clone()
stored.register_fake(torch.empty_like)
class QuantizedMatmul(torch.autograd.Function):
    """x (M, K), w (N, K) bf16; wq: `quantized` w, or Nones -> x w^T (M, N) bf16, as are the gradients."""
    @staticmethod
    def forward(ctx, x, w, recipe, *wq):
        row, ctx.recipe, x, w = RECIPES[recipe], recipe, stored(x), stored(w)
        xq, wq = QUANTIZERS[row.x](x, None, None), quantized(w, recipe) if wq[0] is None else wq
        ctx.save_for_backward(*((w,) if row.original and row.dx[2] else wq), *((x,) if row.original else xq))
        return matmul(xq, NVFP4(*wq))
    @staticmethod
    def backward(ctx, dy):
        row, dx, dw, saved = RECIPES[ctx.recipe], None, None, ctx.saved_tensors     # once: checkpoint's rule
        w, x = (saved[:1], saved[1:]) if row.original and row.dx[2] else (saved[:3], saved[3:])
        w, x, dy = *(t[0] if len(t) == 1 else NVFP4(*t) for t in (w, x)), stored(dy)
        with torch.autocast(dy.device.type, enabled=False):
            words = draw_words(dy, row)
            if ctx.needs_input_grad[0]:
                if row.dx[2]: w = (w if row.original else decode(w, torch.bfloat16)).T
                dx = backward_matmul(row.dx, dy, w if row.dx[2] else transpose(w), words[0])
            if ctx.needs_input_grad[1]:
                x = x if row.original else decode(x, torch.bfloat16)
                e = F.pad(dy, (0, 0, 0, -len(dy) % GROUP)).T    # tokens of zeros, up to whole groups
                dw = backward_matmul(row.dw, e, x.T, words[1])
        return dx, dw, None, None, None, None
class Linear(torch.nn.Linear):
    """nn.Linear with its three GEMMs by a recipe. Same parameters, init and state dict; any leading shape.

    Computes on the bf16 values of x and weight; y has autocast's dtype or x's. For backward it keeps x and w
    in NVFP4, 0.56 bytes a value (in bf16 what the recipe takes `original`), and draws from the device's default
    generator. ValueError unless in_features % 16 == 0 and out_features % 16 == 0, % 128 where dx is rotated.
    A recipe with `dampen` wants that function called after steps of the optimizer.
    """
    weight_nvfp4, once = (), False              # of `quantized_weights`
    def __init__(self, in_features, out_features, bias=False, recipe="quartet2", backend="auto",
                 device=None, dtype=None):
        check(recipe, backend, in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe, self.backend = recipe, backend
    def __setstate__(self, state):              # unpickled, maybe where kernels.py is not loaded yet
        super().__setstate__(state | dict(once=False))
        check(self.recipe, "torch" if self.backend == "torch" else "auto")
    def forward(self, x):
        if RECIPES[self.recipe] is None: return super().forward(x)
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(f"{self} takes floats (..., {self.in_features}), not {x.dtype} {tuple(x.shape)}")
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):       # it would change the dtype of the sums in rotations
            x16, w16 = x.reshape(-1, self.in_features).bfloat16(), self.weight.bfloat16()
            matmul = module(self, kind).QuantizedMatmul.apply
            y = matmul(x16, w16, self.recipe, *(self.weight_nvfp4 if self.once else [None] * 3))
            y = y.to(dtype).view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(dtype)
    def extra_repr(self): return f"{super().extra_repr()}, recipe={self.recipe!r}"
def load_kernels():
    """Import kernels.py -> what it lacks to run here, or None."""
    global kernels
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    if not (gpu and compiler or os.environ.get("TRITON_INTERPRET") == "1"):
        return "a C compiler (apt install gcc)" if gpu else "an NVIDIA GPU of compute capability 8.0 or more"
    try: from kernels import supports; import kernels   # a package of that name lacks the first
    except ImportError as e: return f"kernels.py, and the package triton (pip install triton): {e}"
def resolve(backend, kind, recipe):
    """The backend that "auto" means on a device of a kind, "cuda" or "cpu"; else backend."""
    fast = kernels is not None and kind == "cuda" and kernels.supports(RECIPES[recipe])
    return backend if backend != "auto" else "triton" if fast else "torch"
def module(m, kind):
    """kernels.py or this file, whichever computes a Linear m on a device of a kind."""
    return kernels if resolve(m.backend, kind, m.recipe) == "triton" else sys.modules[__name__]
def check(recipe, backend, in_features=0, out_features=0, name=""):
    """ValueError for what cannot be computed; a warning where "auto" means torch in spite of a GPU."""
    for what, word, known in (("recipe", recipe, RECIPES), ("backend", backend, ("auto", "torch", "triton"))):
        if word not in known: raise ValueError(f"{what} {word!r} is not one of {', '.join(known)}")
    if row := RECIPES[recipe]:
        quantizers, rotations = {row.x, row.w, *row.dx[1:], *row.dw[1:]}, {row.dx[0], row.dw[0]}
        unknown = quantizers - {*QUANTIZERS, None} | rotations - {*ROTATIONS, None}
        if unknown: raise ValueError(f"{recipe!r}: {unknown} not in QUANTIZERS or ROTATIONS: add them there")
    lacks = (backend == "triton" or backend == "auto" and torch.cuda.is_available()) and load_kernels()
    if lacks is None and not kernels.supports(row):
        lacks = f"a mode in kernels.py for each quantizer of {recipe!r}"
    if lacks and backend == "triton":
        raise ValueError(f"backend 'triton' needs {lacks}; backend 'torch' runs everywhere")
    if not row: return
    if lacks: warnings.warn(f"backend 'triton' needs {lacks}: 'auto' takes 'torch', which is slower")
    as_saved = not row.dx[0] and str(row.w).endswith("_16x16")  # what `transpose` can take
    used = row.x, row.w, *row.dx[1:2], *row.dw[1:], *row.dx[2:] * (not as_saved)
    if len(row.dx + row.dw) != 6 or None in used or {*used[:2]} & NOISY:
        raise ValueError(f"{recipe!r}, {row}: x and w take quantizers without noise, dx and dw a rotation, "
                         "then two; None can stand only for dx's of a w in 16x16 blocks, not rotated")
    if out_features % (need := GROUP if row.dx[0] else BLOCK) or in_features % BLOCK:
        raise ValueError(f"{name or 'Linear'}({in_features}, {out_features}): {recipe!r} needs in_features % "
                         f"{BLOCK} == 0, out_features % {need} == 0: resize, use recipe='bf16' or skip=...")

def quantize_model(model, recipe, skip=(), backend="auto"):
    """Switch every nn.Linear (and Linear; no subclasses) to a recipe, in place -> list of their names.

    skip: names, or parts between dots, of modules to leave alone ("lm_head", "layers.0"). They stay the same
    objects, hooks included. ValueError, and nothing changed, if one does not fit. What multiplies by weights
    itself, as nn.MultiheadAttention, stays as it is. nn.TransformerEncoderLayer would, in evaluation, too, by
    PyTorch's fast path: that is switched off (torch.backends.mha, for other models as well).
    """
    check(recipe, backend)
    skip = {skip} if isinstance(skip, str) else set(skip)
    hits = {name: {part for part in skip if f".{part}." in f".{name}."} for name, _ in model.named_modules()}
    if unknown := sorted(skip.difference(*hits.values())):
        raise ValueError(f"skip={unknown}: no such modules in the model")
    linears = {n: m for n, m in model.named_modules() if type(m) in (torch.nn.Linear, Linear) and not hits[n]}
    for name, m in linears.items(): check(recipe, backend, m.in_features, m.out_features, name)
    for m in linears.values(): m.__class__, m.recipe, m.backend = Linear, recipe, backend
    if any(isinstance(m, torch.nn.TransformerEncoderLayer) for m in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)
    return list(linears)

@contextlib.contextmanager
def quantized_weights(model):
    """To accumulate gradients, or evaluate: each Linear takes its weight as quantized at the start,
    from a fixed place in memory. RuntimeError at the end if a weight changed (but through .data)."""
    layers = [m for m in model.modules() if isinstance(m, Linear) and RECIPES[m.recipe]]
    versions, kind = [m.weight._version for m in layers], lambda q: [(t.shape, t.dtype, t.device) for t in q]
    try:
        for m in layers:
            w, m.once = m.weight.detach().bfloat16(), True
            new = module(m, w.device.type).quantized(w, m.recipe)
            if kind(m.weight_nvfp4) != kind(new): m.weight_nvfp4 = [*map(torch.empty_like, new)]    # no alias
            for old, t in zip(m.weight_nvfp4, new): old.copy_(t)
        yield
    finally:
        for m in layers: m.once = False
    if versions != [m.weight._version for m in layers]:
        raise RuntimeError("a weight changed within quantized_weights: step the optimizer after it")

# ---- 10. Weights that come to rest -------------------------------------------------------------------------
# The gradient is taken where the forward pass multiplies, at Q(w), and moves w. If the loss is least between
# two grid points, w goes to the border between them and Q(w) flips from one to the other, until training
# ends. Pulled towards Q(w), as weight decay pulls towards 0, w settles on one of the two.
@torch.no_grad()
def dampen(model, share):
    """Move each weight of a Linear by share * its recipe's `dampen` (at most 1) of the way to its 4-bit one.

    share: float, or () tensor on the weights' device. After a step of the optimizer, its learning rate times
    (step / steps)^4, so that weights are free until late; or every few steps the sum of these.
    Source: oscillation dampening, Nagel et al. 2022, arXiv:2203.11086; here apart from the gradients.
    """
    for m in model.modules():
        if isinstance(m, Linear) and RECIPES[m.recipe] and RECIPES[m.recipe].dampen:
            w = m.weight.to_local() if hasattr(m.weight, "to_local") else m.weight      # of FSDP2: some rows
            values = module(m, w.device.type).on_grid(w.bfloat16(), m.recipe)
            w.lerp_(values.to(w.dtype), (w.new_zeros(()) + share * RECIPES[m.recipe].dampen).clamp(max=1))

if __name__ == "__main__":                      # print the sections in numbers: data/demonstrate.py
    sys.path.append(os.path.join(os.path.dirname(__file__), "data"))
    import demonstrate
    demonstrate.main()
