"""The tests: quartet.py in its order, data/prepare.py, train_gpt.py, README. Each is named for a property.

Tolerances are exhaustive or derived; "5 sigma" is 5 standard errors of what is averaged; without one, bits
are compared. Seeds are fixed.
"""
import collections, copy, dataclasses, functools, gzip, http.server, json, lzma, math, os, pickle, random, re
import shlex, shutil, signal, subprocess, sys, threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import quartet, train_gpt
from quartet import (NVFP4, RECIPES, ROTATIONS, Linear, decode, e2m1, e4m3, four_six, ms_eden, pack, philox,
                     quantize_model, rotate, rotation, round_scale, rtn, sr, transpose, uniform, unpack)
from train_gpt import prepare

HERE = Path(__file__).parent
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])                            # by code, 0 to 7
E4M3 = np.array([(m + 8 * (e > 0)) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127])
FOUR_BITS = np.array([m * 2.0**e for e in range(-129, 60) for m in range(8, 16)])  # what round_scale makes
QUANTIZERS = {                                                           # (x, seed) -> NVFP4 of x
    "rtn": lambda x, seed=0: rtn(x), "rtn_16x16": lambda x, seed=0: rtn(x, (16, 16)),
    "four_six": lambda x, seed=0: four_six(x), "four_six_16x16": lambda x, seed=0: four_six(x, (16, 16)),
    "sr": lambda x, seed=0: sr(x, seed), "sr_four_six": lambda x, seed=0: sr(x, seed, four_six=True),
    "ms_eden": lambda x, seed=0: ms_eden(x, None, seed)}
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
every_4bit_recipe = pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "bf16"])

@pytest.fixture(scope="session", autouse=True)
def list_what_is_skipped(request):      # as with -rs
    request.config.pluginmanager.getplugin("terminalreporter").reportchars += "s"

@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return request.param

def generator(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))
def wide(octaves, rows=64, K=256):
    """N(0, 1) with rows times powers of two of 2^-octaves .. 2^octaves: block scales of all kinds."""
    return normal(rows, K) * 2.0 ** torch.linspace(-octaves, octaves, rows).round()[:, None]

def nearest(v, grid):
    """The oracle of rounding: the value of an ascending grid nearest to |v|, with v's sign; ties go to the
    even index; the ends saturate. A search in float64, where midpoints are exact."""
    a, middle = v.abs().double().numpy(), (grid[1:] + grid[:-1]) / 2
    low, high = (np.searchsorted(middle, a, side) for side in ("left", "right"))  # differ at ties only
    return torch.from_numpy(grid[np.where(low % 2 == 0, low, high)]).float().copysign(v)

def same(a, b):
    bits = lambda t: t.reshape(-1).view(torch.uint8)
    return all(p.shape == q.shape and torch.equal(bits(p), bits(q)) for p, q in zip(a, b, strict=True))

def bias(a, x):
    """<a, x> / <x, x> - 1, and its standard error, from the scatter over groups of 128."""
    a, x = a.double().view(-1, 128), x.double().view(-1, 128)
    excess = ((a - x) * x).sum(-1)
    return (excess.sum() / x.square().sum()).item(), (excess.std() * len(x)**0.5 / x.square().sum()).item()

def convergence(draw, target, B):
    """B * error of the mean of B draws / error of one, and its standard error, from the scatter over rows.

    It is 1 where draws are independent with mean target, 1 + B b^2 / error with a bias b, B if all are equal.
    """
    total, single = 0, 0
    for i in range(B):
        a = draw(i).double()
        total, single = total + a, single + (a - target).square().sum(-1) / B
    excess = B * (total / B - target).square().sum(-1) - single          # of mean 0 if unbiased
    return (1 + excess.sum() / single.sum()).item(), (excess.std() * len(target)**0.5 / single.sum()).item()

# ---- 1. Small floats ---------------------------------------------------------------------------------------
GRIDS = pytest.mark.parametrize("rounding, grid", [(e2m1, E2M1), (e4m3, E4M3), (round_scale, FOUR_BITS)])

@GRIDS
def test_rounding_to_nearest_is_right_at_every_code_tie_and_neighbour(rounding, grid):
    v = torch.from_numpy(np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])).float()  # exact
    v = torch.cat([v, *(v.nextafter(torch.tensor(end)) for end in (0.0, math.inf))])
    v = v[v >= grid[0]]
    assert torch.equal(rounding(v), nearest(v, grid)) and torch.equal(rounding(-v), -nearest(v, grid))

@GRIDS
def test_stochastic_rounding_keeps_grid_points_and_else_goes_to_a_neighbour_without_bias(rounding, grid):
    # u runs through 0/m .. (m-1)/m, of which ceil(m f) are below the fraction f: the mean is exact to gap / m
    m, low, high = 2**10, torch.tensor(grid[:-1]), torch.tensor(grid[1:])
    u = (torch.arange(m) / m)[:, None].expand(m, len(low))
    for f in (0, 1e-3, 0.25, 0.3, 0.5, 0.999):
        v = (low + f * (high - low)).float()
        for sign in (1, -1):
            r = sign * rounding(sign * v.expand(m, -1), u).double()
            assert ((r == low) | (r == high)).all()
            assert ((r.mean(0) - v).abs() <= (high - low) / m * (f > 0)).all()

@pytest.mark.parametrize("u", [None, torch.zeros(1), torch.full((1,), 1 - 2.0**-24)])
def test_rounding_saturates_keeps_nan_and_makes_no_negative_zero(u):
    of = lambda rounding, *values: torch.cat([rounding(torch.tensor([v]), u) for v in values])
    for rounding, top in ((e2m1, 6.0), (e4m3, 448.0)):
        assert (of(rounding, top, top * 1.01, 1e30, math.inf) == top).all()
        assert (of(rounding, -top, -top * 1.01, -1e30, -math.inf) == -top).all()
    for rounding in (e2m1, e4m3, round_scale):
        zeros = of(rounding, 0.0, -0.0, -1e-45, -1e-3, -0.2)
        assert of(rounding, math.nan).isnan() and not (zeros.signbit() & (zeros == 0)).any()
    assert of(round_scale, math.inf).isnan()

# ---- 2. NVFP4 tensors --------------------------------------------------------------------------------------
def test_pack_and_unpack_are_inverse_on_all_bytes():
    byte = torch.arange(256, dtype=torch.uint8)
    code, q = torch.stack([byte & 15, byte >> 4], -1), unpack(byte)      # low half first
    assert torch.equal(q, torch.tensor([*E2M1, *-E2M1]).float()[code.long()].flatten())
    usable = (code != 8).all(-1)                                         # 8 is -0.0, which no quantizer makes
    assert torch.equal(pack(q)[usable], byte[usable]) and pack(q.view(2, 8, 32)).shape == (2, 8, 16)

@pytest.mark.parametrize("tensor_scale", [2.0**-123, 1.0, 2.0**110])
def test_decode_is_exact_in_float32_and_bf16_for_every_code_and_scale(tensor_scale):
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    t = NVFP4((torch.arange(8) * 34 + 16).byte().expand(127, 8), scale, torch.tensor(tensor_scale))
    exact = torch.from_numpy(np.outer(E4M3, [*E2M1, *-E2M1])) * tensor_scale  # codes 0 to 15 by all scales
    assert torch.equal(decode(t).double(), exact) and torch.equal(decode(t, torch.bfloat16).double(), exact)

@every_quantizer
def test_quantizers_return_what_nvfp4_promises_exact_in_bf16(name):
    huge = normal(32, 128).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(-1e30))     # one value
    for x in (wide(40), huge, normal(2, 16, 128) * 1e-30, wide(15) * 2.0**-119, torch.full((16, 128), 1e-42)):
        codes, scale, tensor_scale = t = QUANTIZERS[name](x)
        assert codes.dtype == torch.uint8 and codes.shape == (*x.shape[:-1], x.shape[-1] // 2)
        assert scale.dtype == torch.float8_e4m3fn and scale.shape == (*x.shape[:-1], x.shape[-1] // 16)
        assert tensor_scale.dtype == torch.float32 and tensor_scale.shape == () and tensor_scale >= 2.0**-123
        assert math.frexp(tensor_scale.item())[0] == 0.5                 # a power of two
        assert not (codes & 15 == 8).any() and not (codes >> 4 == 8).any()  # no -0.0
        assert (scale.float() >= 0).all() and (x.abs().max() < 2.0**-112 or 240 <= scale.float().max() <= 448)
        assert torch.equal(decode(t, torch.bfloat16).float(), decode(t)) and decode(t).isfinite().all()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):         # any float, any strides
        x = normal(16, 2, 128).to(dtype).transpose(0, 1)
        assert same(QUANTIZERS[name](x), QUANTIZERS[name](x.float().contiguous()))

@every_quantizer
def test_zeros_and_nothing_have_tensor_scale_1(name):
    for x in (torch.zeros(16, 128), -torch.zeros(16, 128), torch.zeros(0, 128), torch.zeros(16, 0)):
        t = QUANTIZERS[name](x)
        assert t.tensor_scale == 1 and not t.codes.any() and not t.block_scale.float().any()
        assert decode(t).shape == x.shape

@pytest.mark.parametrize("name", [q for q in QUANTIZERS if q != "sr_four_six"])  # that one only demonstrates
def test_powers_of_two_move_the_tensor_scale_only(name):
    # decisions are made in a block's own unit: no square overflows at 2^100 or vanishes at 2^-100
    x = normal(64, 512, seed=1)
    for power in (100, -100):
        t = QUANTIZERS[name](x * 2.0**power)
        assert same(t._replace(tensor_scale=t.tensor_scale * 2.0**-power), QUANTIZERS[name](x))

@every_quantizer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_makes_all_decode_to_nan(name, value):
    x = normal(32, 256)
    x[17, 130] = value
    t = QUANTIZERS[name](x)
    assert decode(t).isnan().all() and decode(t, torch.bfloat16).isnan().all()
    assert not t.codes[16 if "16x16" in name else 17, 64:72].any() and t.codes[0].any()
    assert not t.block_scale.view(torch.uint8).any()
    rotated = ms_eden(x, rotation("rht128", generator())[0], 0)          # spread over its group
    assert decode(rotated).isnan().all() and not rotated.codes[17, 64:].any()

@pytest.mark.parametrize("f", [rtn, four_six])
def test_16x16_blocks_have_the_same_codes_transposed(f):                 # 4/6: but for ties to the last bit
    x = normal(128, 256)
    x[:, 128:] = torch.where(x[:, 128:] > 0, 4.0, x[:, 128:].clamp(-4, 4))  # 4/6 picks 6 on the left, 4 here
    t = f(x, (16, 16))
    assert same(transpose(t), f(x.T, (16, 16))) and same(transpose(transpose(t)), t)
    assert torch.equal(decode(transpose(t)), decode(t).T)
    assert torch.equal(t.block_scale[::16].float().repeat_interleave(16, 0), t.block_scale.float())
    assert {unpack(half).max().item() for half in t.codes.chunk(2, 1)} == ({6.0} if f is rtn else {4.0, 6.0})

def test_sums_and_quotients_are_rounded_as_stated(device):
    halves = lambda v: zip(v[:len(v) // 2], v[len(v) // 2:])
    tree = lambda v: v[0] if len(v) == 1 else tree([a + b for a, b in halves(v)])
    t = normal(2, 16, 3, 16) * 10.0 ** normal(2, 16, 3, 16, seed=1)
    expected = [[tree([tree(list(row[j])) for row in rows]) for j in range(3)] for rows in t.numpy()]
    assert torch.equal(quartet.block_sum(t.to(device)).cpu().view(2, 3), torch.tensor(np.array(expected)))
    assert torch.equal(quartet.over(t.to(device), 6.0).cpu(), torch.from_numpy(t.numpy() / np.float32(6)))

@pytest.mark.parametrize("call, error", [
    (lambda: rtn(torch.ones(2, 16, dtype=torch.int32)), "torch.int32.*float"),
    (lambda: four_six(torch.ones(4, 24)), r"\(4, 24\).*pad.*16"),
    (lambda: sr(torch.tensor(1.0), 0), r"\(\).*pad.*16"),
    (lambda: rtn(torch.ones(24, 16), (16, 16)), r"\(24, 16\).*pad.*rows.*16"),
    (lambda: rtn(torch.ones(16, 32), (32, 1)), r"block=\(32, 1\).*\(1, 16\)"),
    (lambda: ms_eden(torch.ones(4, 64), rotation("rht128")[0], 0), r"\(4, 64\).*pad.*128"),
    (lambda: rotation("rht64"), "rht64.*rht16, rht32, rht128"),
    (lambda: Linear(100, 128), r"\(100, 128\).*quartet2.*in_features % 16.*bf16.*skip"),
    (lambda: Linear(128, 192), r"\(128, 192\).*out_features % 128"),
    (lambda: Linear(128, 24, recipe="nvidia"), r"\(128, 24\).*out_features % 16"),
    (lambda: Linear(128, 128, recipe="fp4"), "fp4.*bf16, rtn, nvidia, four_six, tetrajet2, quartet2"),
    (lambda: Linear(128, 128, backend="cuda"), "cuda.*auto, torch"),
    (lambda: Linear(128, 128)(torch.ones(4, 64)), r"128.*\(4, 64\)"),
    (lambda: Linear(128, 128)(torch.ones(4, 128, dtype=torch.int64)), "int64")])
def test_what_cannot_be_done_is_an_error_that_names_the_way_out(call, error):
    with pytest.raises(ValueError, match=error): call()

# ---- 3, 4. RTN and Four Over Six ---------------------------------------------------------------------------
def block_of(*values): return torch.tensor([[*values, *[0.0] * (16 - len(values))]])

def test_rtn_block_by_hand():
    x = block_of(6, -6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -0.3, 0, -0.0, 4.9, 1e-9, -3)
    q = block_of(6, -6, 4, 4.0, 2.0, 2.00, 1.00, 1.00, 0.00, 0.000, -0.5, 0, 0.00, 4.0, 0.00, -3)
    t = rtn(x)                                                           # scale 1 = 256 (byte 0x78) * 2^-8
    assert t.codes.tolist() == [[0xF7, 0x66, 0x44, 0x22, 0x00, 0x09, 0x60, 0xD0]]
    assert t.block_scale.view(torch.uint8).tolist() == [[0x78]] and t.tensor_scale == 2.0**-8
    assert torch.equal(decode(t), q) and torch.equal(decode(rtn(3 * x)), 3 * q)
    for eighths in range(8, 16):                                         # block scale 1 to 1.875, the largest
        t = rtn(torch.full((1, 16), 6 * eighths / 8))
        expected = (1 / 256, 32 * eighths) if eighths < 15 else (1 / 128, 240)  # since 1.875 * 256 > 448
        assert (t.tensor_scale.item(), t.block_scale.float().item()) == expected

def test_four_six_blocks_by_hand():
    # 6 5 -5: scale 1 makes it 6 4 -4, error 2; scale 1.5, onto 4 3 -3, makes it 6 4.5 -4.5, error 0.5
    t = four_six(block_of(6, 5, -5))
    assert decode(t)[0, :3].tolist() == [6, 4.5, -4.5] and t.codes[0, :2].tolist() == [0x56, 0x0D]
    # 4 3 2: exact onto 4; onto 6 the scale 2/3 becomes 11/16, and 4 becomes 4.125
    assert torch.equal(decode(four_six(block_of(4, 3, 2))), block_of(4, 3, 2))
    assert decode(rtn(block_of(4, 3, 2)))[0, 0] == 4.125
    # 6 3: exact onto 6 (codes 7 5) and onto 4 (codes 6 4): a tie, so 6
    assert four_six(block_of(6, 3)).codes[0, 0] == 0x57

def peers(x, top, tensor_scale):
    """Scales E4M3(amax / top / tensor scale), values nearest onto them; errors; where scales are normal."""
    x = x.view(len(x), -1, 16)
    raw = x.abs().amax(-1) / top / tensor_scale                          # float32, the rest float64
    s = nearest(raw, E4M3).double()
    q = nearest(x / (s * tensor_scale).clamp(min=1e-99)[..., None], E2M1).double()
    return q, s, (q * s[..., None] * tensor_scale - x).square().sum(-1), raw >= 2.0**-6

@pytest.mark.parametrize("k", [-20, 0, 9])
@pytest.mark.parametrize("f, most", [(rtn, 448), (four_six, 256)])
def test_codes_and_scales_equal_the_peers_formula(f, most, k):
    x = wide(7) * 2.0 ** (k + 1)                                         # block scales also below 2^-6
    x[0, 0] = 6 * most * 2.0**k
    t, (q, s, error, sure) = f(x), peers(x, 6.0, 2.0**k)
    if f is four_six:
        q4, s4, error4, _ = peers(x, 4.0, 2.0**k)
        # float32 errors are off by 7 * 2^-24 of them (difference twice, square, 4 sums): within 14, a tie
        pick, sure = error4 < error, sure & ((error4 / error - 1).abs() > 14 * 2.0**-24)
        q, s = torch.where(pick[..., None], q4, q), torch.where(pick, s4, s)
    assert t.tensor_scale == 2.0**k and 0.8 < sure.float().mean() < 1
    assert torch.equal(unpack(t.codes).view(q.shape)[sure].double(), q[sure])
    assert torch.equal(t.block_scale.double()[sure], s[sure])

EXPECTED = dict(rtn=(9.0, -4.5), rtn_16x16=(12.4, -9.1), four_six=(7.6, -3.4), four_six_16x16=(12.4, -9.0),
                sr=(23.5, 0), ms_eden=(9.3, 0), sr_four_six=(17.5, 7.3))  # NMSE and bias, times 1e-3

@pytest.mark.parametrize("name, size", [(name, size) for size in (1, 1e30, 1e-36) for name in EXPECTED
                                        if size == 1 or name != "sr_four_six"])
def test_nmse_and_bias_on_normal_values_of_any_size(name, size):
    x = normal(1024, 1024, seed=3) * size
    a, x = (t.double() / size for t in (decode(QUANTIZERS[name](x, 1)), x))
    tiles = lambda t: t.view(64, 16, 64, 16).sum((1, 3))                 # sums of 4096 tiles of 16 x 16
    for product, expected in zip(((a - x).square(), (a - x) * x), EXPECTED[name]):
        found = (product.sum() / x.square().sum()).item()
        sigma = (tiles(product - found * x.square()).std() * 64 / x.square().sum()).item()
        assert abs(found - expected * 1e-3) < 0.05e-3 + 5 * sigma        # half the last digit, and 5 sigma

# ---- 5. Stochastic rounding --------------------------------------------------------------------------------
def test_philox_known_answers_and_all_64_bits_of_seed_and_counter(monkeypatch):
    def integers(seed, counter):                                         # Python's
        c, k = [counter % 2**32, counter >> 32, 0, 0], [seed % 2**32, seed % 2**64 >> 32]
        for _ in range(7):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return c
    counters = [0, 1, 2**32 - 1, 2**32, 2**40 + 17]
    for seed in (0, 1, 2**32, 0x0123456789ABCDEF, 2**63 + 12345, 2**64 - 1, -1, -2**63):
        for s in (seed, torch.tensor((seed + 2**63) % 2**64 - 2**63)):
            assert philox(s, torch.tensor(counters)).tolist() == [integers(seed, c) for c in counters]
    answers = {7: "5f6fb709 0d893f64 4f121f81 4f730a48", 10: "6627e8d5 e169c58d bc57ac4c 9b00dbd8"}
    for rounds, words in answers.items():
        monkeypatch.setattr(quartet, "PHILOX_ROUNDS", rounds)     # kat_vectors of Random123: counter 0, key 0
        assert philox(0, torch.tensor([0])).tolist() == [[int(word, 16) for word in words.split()]]

@pytest.mark.parametrize("name, step", [("sr", 1), ("ms_eden", 16)])
def test_noise_is_shared_by_no_rows_seeds_or_neighbours(name, step):
    x = torch.ones(16, 1024 * step)                                      # equal values: errors show the noise
    noise = torch.cat([decode(QUANTIZERS[name](x, seed))[:, ::step] for seed in (0, 1, 2, 2**32, -1, 10**9)])
    assert noise.std(-1).min() > 0
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 5 / 1024**0.5  # 5 sigma, all pairs of rows
    flat = noise[:16].flatten() - noise[:16].mean()
    for lag in range(1, 65):
        assert abs((flat[lag:] * flat[:-lag]).mean() / flat.var()) < 5 / len(flat)**0.5

def test_sr_never_clips():
    # amaxes of an octave, and those near which the scale's rounding turns: none above 6 scales
    turns = torch.tensor([(m + 0.5) / 8 * 2.0**e * 96 / 17 for m in range(8, 16) for e in (-3, -2)])
    near = (turns.view(torch.int32)[:, None] + torch.arange(-9, 10, dtype=torch.int32)).view(torch.float32)
    amax = torch.cat([torch.linspace(1, 2, 2**16), near.flatten()])
    t = sr(F.pad(amax[:, None], (0, 15)), 0)
    scale = t.block_scale.float()[:, 0] * t.tensor_scale
    # SR_MAX and the quotient are rounded to float32; upwards, 8.5/8 goes to 9/8: 17/16 * 18/17 too large
    assert (6 * scale >= amax * (1 - 2.0**-23)).all() and (6 * scale <= amax * 18 / 16).all()

SIZES = 2.0 ** -torch.tensor([0.0, 1, 9, 13, 15, 16, 17, 18, 19, 20])[:, None]  # scales: to below sub-normal

def assert_mean(a, target, span):
    """The mean of a over its B draws is target: to 5 sigma, plus what the empirical Bernstein inequality
    (Maurer, Pontil 2009) adds where draws are not normal but in an interval of size span, at 5^2 / 2 nats."""
    B = len(a)
    assert ((a.mean(0) - target).abs() <= 5 * a.std(0) / B**0.5 + 7 / 3 * 12.5 * span / (B - 1)).all()

def test_sr_is_unbiased_element_by_element_and_ms_eden_along_each_block_also_at_sub_normal_scales():
    B, x = 4096, normal(10, 128) * SIZES
    t, b = sr(x.expand(B, 10, 128), 0), x.view(10, 8, 16)                # rows draw apart: B draws
    amax, step = b.abs().amax(-1, keepdim=True), 2.0**-9 * t.tensor_scale  # of a block; of sub-normals
    assert_mean(decode(t).view(B, 10, 8, 16), b, 2 * (9 / 8 * amax + 6 * step))
    assert 0.3 < (t.block_scale.float() < 2.0**-6).float().mean() < 0.9
    t = ms_eden(x.expand(B, 10, 128), None, 0)
    along = (decode(t).view(B, 10, 8, 16) * b).sum(-1, keepdim=True) / b.square().sum(-1, keepdim=True)
    assert_mean(along, torch.ones(10, 8, 1), 1 / 4 + 2 * 2.0**-9 * t.tensor_scale / (amax / 6))

# ---- 6. Rotations ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, n", [("rht16", 16), ("rht32", 32), ("rht128", 128), ("rht128x2", 2**14)])
def test_rotations_are_integer_cancel_in_a_product_and_begin_with_new_signs(name, n):
    g, all_signs, H = generator(), [], torch.ones(1, 1)
    while len(H) < min(n, 128):
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)       # Sylvester
    size, H = len(H), torch.block_diag(*[H] * (128 // len(H)))
    x, w = (torch.randint(-4, 5, shape, generator=g).float() for shape in ((2, 3, 256), (5, 256)))
    for _ in range(20):                                                  # sums of integers are exact
        R, found = rotation(name, g)
        assert found == n and isinstance(found, int) and torch.equal(R @ R.T, n * torch.eye(128))
        assert torch.equal(rotate(x, R) @ rotate(w, R).T / n, x @ w.T) and rotate(x, None) is x
        assert torch.equal(rotate(x, R)[1, 2, 128:], x[1, 2, 128:] @ R) and (R.bfloat16() == R).all()
        DHD = R @ H / 128 if name == "rht128x2" else R                   # R = D1 H D2 H, H H = 128 I; or D H
        first, second = DHD[:, ::size].sum(1), DHD[0] * H[0] * DHD[0, 0]
        assert torch.equal(DHD, first[:, None] * H * (second if name == "rht128x2" else 1))
        all_signs += [first, second] if name == "rht128x2" else [first]
    r = torch.corrcoef(torch.stack(all_signs)[:, 1:]).fill_diagonal_(0)
    assert r.abs().max() < 5 / 127**0.5                                  # all anew, the two of one R, too

# ---- 7. MS-EDEN --------------------------------------------------------------------------------------------
def test_ms_eden_by_hand():
    # one value a group is +-6 all over after one round; its scale 6 / 6.07 times S = 6.07 / 6 is 1
    R, n = rotation("rht128", generator())
    x = F.one_hot(torch.tensor([5, 77]), 128) * torch.tensor([[6.0], [-1.5]])
    t = ms_eden(x, R, 1)
    assert torch.equal(decode(t) @ R.T / n, x) and (unpack(t.codes).abs() == 6).all()

@pytest.fixture
def unrounded_scales(monkeypatch):
    """Quantizers return q * s, with s as it was before it was rounded."""
    monkeypatch.setattr(quartet, "round_scale", lambda s, u=None: s)
    monkeypatch.setattr(quartet, "assemble", lambda shape, q, s, u=None: (q * s).view(shape))

@pytest.mark.parametrize("name", ROTATIONS)
def test_ms_eden_keeps_the_length_of_every_block_before_its_scale_is_rounded(name, unrounded_scales):
    x, (R, n) = wide(30), rotation(name, generator())
    a, y = ms_eden(x, R, 0).double().view(-1, 16), rotate(x, R).double().view(-1, 16)
    # float32: S is a quotient of two sums with 5 roundings a term, and s, v and q s are rounded: 14 in all
    assert ((a * y).sum(-1) / (y * y).sum(-1) - 1).abs().max() < 14 * 2.0**-24

def test_eden_factor_is_per_block(unrounded_scales, monkeypatch):
    def one_a_group(v, q):
        vv, vq = ((v * t).sum((1, 3)).view(-1, 8).sum(-1) for t in (v, q))
        return (vv / vq).repeat_interleave(8).view(len(v), 1, -1, 1)
    x = normal(2048, 1024, seed=4)
    assert abs(bias(ms_eden(x, None, 1), x)[0]) < 14 * 2.0**-24
    monkeypatch.setattr(quartet, "eden_factor", one_a_group)
    found, sigma = bias(ms_eden(x, None, 1), x)
    assert abs(found + 9e-4) < 0.5e-4 + 5 * sigma < 3e-4

def test_eden_max_has_the_least_error(monkeypatch):
    x, shipped, errors = normal(1024, 1024), quartet.EDEN_MAX, []
    for c in (0.90, 0.93, 0.96):                                         # NMSE 9.47, 9.32, 9.58 (e-3)
        monkeypatch.setattr(quartet, "EDEN_MAX", shipped * 0.93 / c)
        errors.append(F.mse_loss(decode(ms_eden(x, None, 0)), x).item())
    assert errors[1] < errors[0] < errors[2]

@pytest.mark.parametrize("name", ["rht128", "rht128x2"])
@pytest.mark.parametrize("kind", ["normal", "with a mean", "with outliers"])
def test_ms_eden_averages_to_x(name, kind):
    x, g = normal(64, 128) + 10 * (kind == "with a mean"), generator()
    if kind == "with outliers":
        x[torch.arange(64), torch.arange(64) * 37 % 128] *= 100
    def draw(seed):
        R, n = rotation(name, g)
        return decode(ms_eden(x, R, seed)) @ R.T / n
    found, sigma = convergence(draw, x, 256)
    if (name, kind) == ("rht128", "with outliers"):
        assert found - 5 * sigma > 1.5                                   # one round is biased here: about 18
    else:
        assert abs(found - 1) < 5 * sigma < 0.15

def test_no_quantizer_needs_many_copies_of_its_input():
    x, (R, n) = normal(1024, 512), rotation("rht128", generator())
    # most memory at once, in float32 copies of x, itself not counted: 3.2, 5.3, 5.4 and (philox is int64) 6.5
    for f, most in ((rtn, 4), (four_six, 6), (lambda x: ms_eden(x, R, 0), 6), (lambda x: sr(x, 0), 8)):
        with torch.profiler.profile(profile_memory=True) as profile: f(x)
        events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        peak = np.cumsum([e.nbytes() for e in events if e.name() == "[memory]"]).max()
        assert 1 < peak / x.nbytes < most

@every_quantizer
def test_quantizers_give_the_same_bits_on_every_device(name, device):
    x, seed, cpu = wide(20), 2**40 + 3, lambda t: [p.cpu() for p in t]
    t, expected = QUANTIZERS[name](x.to(device), torch.tensor(seed, device=device)), QUANTIZERS[name](x, seed)
    assert t.codes.device.type == device and same(cpu(t), expected)      # with the seed as a tensor, too
    assert torch.equal(decode(t, torch.bfloat16).cpu(), decode(expected, torch.bfloat16))
    x, (R, n) = (normal(64, 256) * 9).round(), rotation("rht128x2", generator())  # x R: exact integers
    assert same(cpu(ms_eden(x.to(device), R.to(device), seed)), ms_eden(x, R, seed))

# ---- 8, 9. Recipes and the linear layer --------------------------------------------------------------------
FORWARD = dict(rtn=("rtn", "rtn"), nvidia=("rtn", "rtn_16x16"), four_six=("four_six", "four_six_16x16"),
               tetrajet2=("rtn", "rtn"), quartet2=("four_six", "four_six"))  # quantizers of x, w

def layer(recipe, *shape, bias=False, device="cpu"):
    """A Linear(128, 128), x and dy of a shape (..., 128): N(0, 1) in bf16 values, which no cast changes."""
    linear = Linear(128, 128, bias, recipe, device=device)
    sample = lambda seed, *shape: normal(*shape, seed=seed).bfloat16().float().to(device)
    linear.weight.data = sample(0, 128, 128)
    return linear, sample(1, *shape).requires_grad_(), sample(2, *shape)

def step(linear, x, dy):
    """y, dx, dw (and the bias's gradient) under manual_seed(0)."""
    torch.manual_seed(0)
    y = linear(x)
    return y.detach(), *torch.autograd.grad(y, (x, *linear.parameters()), dy)

def equal(a, b): return all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(a, b, strict=True))

def decoded_operands(recipe, *operands):
    return (decode(QUANTIZERS[q](t.detach())) for q, t in zip(FORWARD[recipe], operands))

def test_linear_is_nn_linear_but_for_its_recipe():
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 128)
    torch.manual_seed(0)
    linear, (_, x, dy) = Linear(128, 128, bias=True, recipe="bf16"), layer("bf16", 50, 128)
    assert equal(linear.state_dict().values(), plain.state_dict().values())
    assert equal(step(linear, x, dy), step(plain, x, dy))
    plain.load_state_dict(layer("quartet2", 0, 128, bias=True)[0].state_dict())
    linear.recipe = "quartet2"
    linear.load_state_dict(plain.state_dict())                           # strict: the same keys
    again = copy.deepcopy(linear)
    assert "recipe='quartet2'" in repr(again) and equal(step(again, x, dy), step(linear, x, dy))

@every_4bit_recipe
def test_y_is_the_product_of_the_decoded_operands(recipe):
    linear, x, _ = layer(recipe, 50, 128)
    a, b = (t.double() for t in decoded_operands(recipe, x, linear.weight))
    # bf16 rounds by 2^-8; 128 float32 additions by 128 * 2^-24 of the sum of magnitudes
    assert ((linear(x) - a @ b.T).abs() <= 2.0**-8 * (a @ b.T).abs() + 2.0**-17 * (a.abs() @ b.abs().T)).all()

@every_4bit_recipe
def test_gradients_average_to_what_the_recipe_promises(recipe, monkeypatch):
    (linear, x, dy), B = layer(recipe, 128, 128), 64
    a, b = decoded_operands(recipe, x, linear.weight)
    dx, dw = dy @ b, dy.T @ a                                            # those of the quantized forward
    if recipe in ("nvidia", "four_six"):                                 # x is rotated and rounded to nearest
        R, n = rotation("rht16", generator())
        monkeypatch.setattr(quartet, "rotation_from", lambda name, signs: (R, n))
        dw = (dy.T @ R) @ decode(rtn(x.detach().T @ R)).T / n
    torch.manual_seed(0)
    y = linear(x)
    draws = [torch.autograd.grad(y, (x, linear.weight), dy, retain_graph=True) for _ in range(B)]
    for i, target in enumerate((dx, dw)):
        found, _ = convergence(lambda k: draws[k][i], target, B)
        # rtn: all draws are equal, and wrong. Else 1 to 5 sigma, 5 (2/8000)^0.5 for 8000 degrees of freedom
        assert abs(found - (B if recipe == "rtn" else 1)) < 0.08

def test_noise_and_signs_are_shared_by_no_operands_layers_or_steps(monkeypatch):
    noise, signs, rotation_from = [], [], quartet.rotation_from
    monkeypatch.setattr(quartet, "uniform", lambda *a: noise.append(uniform(*a)) or noise[-1])
    monkeypatch.setattr(quartet, "rotation_from", lambda name, d: signs.append(d) or rotation_from(name, d))
    (one, x, dy), two = layer("tetrajet2", 128, 128), layer("tetrajet2", 128, 128)[0]
    for _ in range(2):
        two(one(x)).backward(dy)
    u, d = torch.stack([n[0].flatten() for n in noise]), torch.cat(signs)
    assert u.shape == (16, 128 * 128) and d.shape == (16, 128) and (d.abs() == 1).all()  # step, layer, GEMM
    for sample in (u, d):
        assert torch.corrcoef(sample).fill_diagonal_(0).abs().max() < 5 / sample.shape[1]**0.5

@every_4bit_recipe
@pytest.mark.parametrize("shape", [(128,), (50, 128), (2, 3, 128), (2, 1, 5, 128), (0, 128), (2, 0, 128)])
def test_leading_dimensions_are_tokens_and_missing_tokens_are_zeros(recipe, shape):
    linear, x, dy = layer(recipe, *shape, bias=True)
    y, dx, dw, db = step(linear, x, dy)
    pad = lambda t: F.pad(t.detach().reshape(-1, 128), (0, 0, 0, 128 - t.numel() // 128))  # 128 tokens
    expected = step(linear, pad(x).requires_grad_(), pad(dy))
    assert y.shape == shape and dx.shape == shape and torch.equal(db, dy.reshape(-1, 128).sum(0))
    assert equal((pad(y - linear.bias), pad(dx), dw), (expected[0] - linear.bias, *expected[1:3]))

@every_4bit_recipe
def test_strides_dtypes_and_what_bf16_drops_make_no_difference(recipe):
    linear, x, dy = layer(recipe, 256, 128)
    expected, strided = step(linear, x, dy), x.detach().T.contiguous().T.requires_grad_()
    assert equal(step(linear, strided, dy.T.contiguous().T), expected)
    linear.weight.data *= 1 + 2.0**-10                                   # rounded away: half an ulp is 2^-9
    assert equal(step(linear, x.detach().mul(1 + 2.0**-10).requires_grad_(), dy * (1 + 2.0**-10)), expected)
    for dtype in (torch.bfloat16, torch.float64):
        y, dx, dw = step(linear, x.detach().to(dtype).requires_grad_(), dy.to(dtype))
        assert y.dtype == dx.dtype == dtype and equal((y.float(), dx.float(), dw), expected)

@every_4bit_recipe
def test_autocast_sets_the_dtype_of_y_and_nothing_else(recipe):
    linear, x, dy = layer(recipe, 128, 128, bias=True)
    y, *outside = step(linear, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        y16, *inside = step(linear, x, dy.bfloat16())
        torch.manual_seed(0)
        graph = linear(x)
    assert equal(inside, torch.autograd.grad(graph, (x, *linear.parameters()), dy.bfloat16()))
    assert equal(inside[:2], outside[:2])
    assert equal([y16], [(y - linear.bias).bfloat16() + linear.bias.bfloat16()])

@pytest.mark.parametrize("recipe, bits", [("rtn", 4.5), ("nvidia", 16), ("four_six", 16), ("tetrajet2", 4.5),
                                          ("quartet2", 4.5)])
def test_backward_keeps_nvfp4_and_the_original_x_in_bf16(recipe, bits):
    (linear, x, dy), kept = layer(recipe, 256, 128), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        linear(x)
    assert sum(kept) == (x.numel() * bits + linear.weight.numel() * 4.5) / 8 + (8 if bits == 4.5 else 4)

@every_4bit_recipe
def test_what_is_not_finite_comes_out_as_nan(recipe):
    for position in (0, 1):                                              # in x, then in dy
        linear, *inputs = layer(recipe, 128, 128)
        inputs[position].data[3, 5] = math.inf
        y, dx, dw = step(linear, *inputs)
        assert dw.isnan().all() and (dx if position else y).isnan().all()

@pytest.mark.parametrize("recipes", [("bf16", "quartet2"), ("rtn", "tetrajet2"), ("nvidia", "four_six")])
def test_compiled_is_eager_to_the_bit(recipes):
    torch._dynamo.reset()
    model = torch.nn.Sequential(*[Linear(128, 128, recipe == "rtn", recipe) for recipe in recipes])
    x, dy = normal(20, 128).requires_grad_(), normal(20, 128, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert equal(step(compiled, x, dy), step(model, x, dy))
    with torch.autocast("cpu", torch.bfloat16):          # where torch 2.11 made gradients 0 of a dtype kept by .to
        assert equal(step(compiled, x, dy.bfloat16()), step(model, x, dy.bfloat16()))

@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_runs_on_every_device_without_synchronisation(recipe, device):
    linear, x, dy = layer(recipe, 2, 100, 128, device=device)
    step(linear, x, dy)                                                  # cuBLAS sets itself up
    switch = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None
    switch("error")
    try:
        y = linear(x)
        dx, dw = torch.autograd.grad(y, (x, linear.weight), dy)
    finally:
        switch("default")
    x, dy, w = x.detach().view(-1, 128), dy.view(-1, 128), linear.weight.detach()
    for found, exact in ((y.detach(), x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        error = (found.view(exact.shape) - exact).square().sum() / exact.square().sum()
        assert error < 4 * 23.5e-3 and (error > 1e-3) == (recipe != "bf16")  # 2 operands, rounded twice

def transformer(head):
    """Eleven layers with one Linear already; a head; a subclass of nn.Linear, which is not to be switched."""
    pair = lambda: torch.nn.Sequential(torch.nn.Linear(32, 128), Linear(128, 32, recipe="rtn"))
    other = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(32, 8)
    return torch.nn.ModuleDict(dict(layers=torch.nn.ModuleList(pair() for _ in range(11)), other=other,
                                    head=torch.nn.Linear(32, head)))

def test_quantize_model_switches_linears_in_place():
    model, calls, x = transformer(128), [], normal(3, 32)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    model["head"].register_forward_hook(lambda *_: calls.append(1))
    names = quantize_model(model, "nvidia", skip=["layers.1"])           # which is not layers.10
    assert names == [f"layers.{i}.{j}" for i in range(11) if i != 1 for j in (0, 1)] + ["head"]
    assert all(type(modules[name]) is Linear and modules[name].recipe == "nvidia" for name in names)
    assert type(modules["layers.1.0"]) is torch.nn.Linear and modules["layers.1.1"].recipe == "rtn"
    assert all(m is modules[name] for name, m in model.named_modules())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    fresh = Linear(32, 128, True, "nvidia")
    fresh.load_state_dict(model["head"].state_dict())
    assert torch.equal(model["head"](x), fresh(x)) and calls == [1]
    assert quantize_model(model, "bf16", skip=["head", "layers"]) == [] and type(model["other"]) is not Linear
    root = torch.nn.Linear(32, 128)
    assert quantize_model(root, "quartet2") == [""] and type(root) is Linear and root(x).shape == (3, 128)

@pytest.mark.parametrize("recipe, skip, error", [
    ("quartet2", ["layer"], "'layer'"), ("quartet2", [], "layers.0.1.*128, 32.*out_features % 128"),
    ("nvidia", [], r"head\(32, 100\)"), ("fp4", [], "fp4"), ("rtn", ["head", "layers.11"], "'layers.11'")])
def test_quantize_model_changes_nothing_where_it_cannot_change_all(recipe, skip, error):
    model = transformer(100)
    with pytest.raises(ValueError, match=error): quantize_model(model, recipe, skip)
    assert {getattr(m, "recipe", "rtn") for m in model.modules()} == {"rtn"}
    assert type(model["layers"][0][0]) is torch.nn.Linear

# ---- data/prepare.py ---------------------------------------------------------------------------------------

def shard(tokens=(1, 2, 3), magic=20240520, version=1, n=None):
    header = [magic, version, len(tokens) if n is None else n] + [0] * 253
    return np.array(header, "<i4").tobytes() + np.array(tokens, "<u2").tobytes()

def documents_of(path): return np.fromfile(path, "<u2")[512:].astype(np.uint8).tobytes().split(b"\0")[:-1]
def files_in(directory): return sorted(path.name for path in directory.iterdir())

def test_shard_round_trip(tmp_path):
    tokens = np.array([0, 255, 256, 50256, 65535])
    prepare.write_shard(tmp_path / "x.bin", tokens)
    assert prepare.check_shard(tmp_path / "x.bin") == 5 and (tmp_path / "x.bin").read_bytes() == shard(tokens)

def test_interrupted_write_leaves_the_old_shard(tmp_path, monkeypatch):
    prepare.write_shard(tmp_path / "x.bin", np.arange(9))
    monkeypatch.delattr(prepare.os, "replace")
    with pytest.raises(AttributeError): prepare.write_shard(tmp_path / "x.bin", np.arange(5))
    assert prepare.check_shard(tmp_path / "x.bin") == 9

@pytest.mark.parametrize("data, fault", [
    (None, "is missing: run python data/prepare.py python$"), (b"", "is empty"),
    (shard()[:1023], "1023 bytes, less than a header"), (shard(magic=7), "begins with 7, not 20240520"),
    (shard(version=2), "version 2, not 1"), (shard()[:-4], "header says 3 tokens, the file holds 1:"),
    (shard()[:-1], "header says 3 tokens, the file holds 2.5:"), (shard(()), "header says 0 tokens"),
    (shard(n=2), "header says 2 tokens, the file holds 3:")])
def test_bad_shard_is_named_with_its_fault_and_the_way_out(tmp_path, data, fault):
    path = tmp_path / "python_train_000000.bin"
    if data is not None: path.write_bytes(data)
    with pytest.raises(ValueError, match=fault) as error: prepare.check_shard(path)
    assert str(error.value).startswith(str(path))
    assert data is None or str(error.value).endswith("delete it and run python data/prepare.py python again")

def test_token_0_ends_every_document_and_is_nowhere_else(tmp_path):
    text = b"one\0\n<|endoftext|>\n \n<|endoftext|>\r\ntwo <|endoftext|>\n\n2\n<|endoftext|>"
    (tmp_path / "my.txt").write_bytes(text)
    train, val = prepare.prepare(str(tmp_path / "my.txt"), tmp_path)
    assert train.read_bytes() == shard([*b"two <|endoftext|>\n\n2\n\0"])
    assert val.read_bytes() == shard([*b"one\n\0"])

def test_files_are_documents_and_a_single_one_is_cut_at_blank_lines(tmp_path):
    (xz := tmp_path / "my.txt.xz").write_bytes(lzma.compress(b"\nA:\nlonger one\n\n \r\n\n  B:\nspeech\n"))
    (gz := tmp_path / "novels.txt.gz").write_bytes(gzip.compress(b"second"))
    train, val = prepare.prepare([gz, xz], tmp_path / "new")
    assert (train.name, val.name) == ("novels_train_000000.bin", "novels_val_000000.bin")
    assert len(documents_of(train)) == 1 and documents_of(val) == [b"second"]
    for files in xz, [xz, xz]:
        train, val = prepare.prepare(files, tmp_path)
        assert (train.name, val.name) == ("my_train_000000.bin", "my_val_000000.bin")
        assert documents_of(train) + documents_of(val) == [b"A:\nlonger one", b"  B:\nspeech"]

def test_split_is_of_whole_documents_in_any_order(monkeypatch):
    rng = random.Random(0)
    documents = [rng.randbytes(rng.randrange(1, 2000)) for _ in range(300)]
    documents += documents[:100]                                                    # duplicates
    train, val = prepare.split(documents)
    assert collections.Counter(train + val) == collections.Counter(documents) and not set(train) & set(val)
    assert 0.04 < sum(map(len, set(val))) / sum(map(len, set(documents))) <= 0.05   # a document less than 5%
    assert set(prepare.split(documents[::-1])[1]) == set(val)
    monkeypatch.setattr(prepare, "VAL_MAX", 3000)
    assert sum(map(len, set(prepare.split(documents)[1]))) <= 3000

def test_split_holds_out_the_shortest_where_none_fits():
    assert prepare.split([b"x" * 9, b"y" * 5, b"y" * 5, b"z" * 7]) == ([b"x" * 9, b"z" * 7], [b"y" * 5] * 2)
    assert [len(part) for part in prepare.split([b"x", b"y"])] == [1, 1]

def test_python_corpus_is_the_standard_library_without_packages(tmp_path, monkeypatch):
    lib = tmp_path / "lib"
    for name in "b.py", "a/z.py", "a.py", "site-packages/x.py", "a/__pycache__/x.py", "dist-packages/x.py":
        (lib / name).parent.mkdir(parents=True, exist_ok=True)
        (lib / name).write_text(name)
    monkeypatch.setattr(prepare.sysconfig, "get_path", {"stdlib": str(lib)}.get)
    assert prepare.standard_library() == [lib / "a/z.py", lib / "a.py", lib / "b.py"]
    train, val = prepare.prepare("python", tmp_path)
    assert sorted(documents_of(train) + documents_of(val)) == [b"a.py", b"a/z.py", b"b.py"]

def test_long_text_is_several_shards_and_a_shorter_one_replaces_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD", 10)
    for text, sizes in (b"ab\n\n" + b"c" * 24, [9, 8, 8, 3]), (b"ab\n\ncde", [4, 3]):
        (tmp_path / "t.txt").write_bytes(text)
        assert [prepare.check_shard(path) for path in prepare.prepare(tmp_path / "t.txt", tmp_path)] == sizes
    assert files_in(tmp_path) == ["t.txt", "t_train_000000.bin", "t_val_000000.bin"]

@pytest.mark.parametrize("args, message", [
    ([], "prepare.py FILE"), (["pyton"], "cannot read pyton .* one of python, shakespeare, fineweb"),
    (["fineweb", "104"], "1 to 103"), (["fineweb", "x"], "fineweb is a corpus"),
    (["x.xz"], "cannot read x.xz"), (["x.gz"], "cannot read x.gz"),
    (["1", "1"], "no two different documents"), (["0"], "no two different")])
def test_user_errors_are_one_message(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    damaged = {"x.xz": b"not xz", "x.gz": gzip.compress(b"x")[:-9]}
    for name, data in {**damaged, "1": b"one", "0": b" \n"}.items(): Path(name).write_bytes(data)
    with pytest.raises(SystemExit, match=message): prepare.main(args)

BODY = shard(np.random.default_rng(0).integers(0, 50257, 10**5))
HALF, VAL = len(BODY) // 2, "fineweb_val_000000.bin"

@pytest.fixture
def server(monkeypatch):
    """A local server of `body`: answers each request as the next of `script` says, the last for good."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_GET(self):
            how, body = s.script[min(len(s.asked), len(s.script) - 1)], s.body
            s.asked.append((self.path[1:], begin := int(self.headers["Range"][len("bytes="):-1])))
            if how == "resume" and begin >= len(body): how = 416
            if isinstance(how, int): return self.send_error(how)
            if how != "resume": begin = 0
            self.send_response(206 if begin else 200)
            if begin: self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            self.wfile.write(body[begin:HALF] if how == "drop" else body[begin:])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.asked, s.waits, s.body, s.url = [], [], BODY, f"http://127.0.0.1:{s.server_port}/"
        for name in "FINEWEB", "SHAKESPEARE": monkeypatch.setattr(prepare, name, s.url)
        monkeypatch.setattr(prepare.time, "sleep", s.waits.append)
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=s.serve_forever, args=[0.01], daemon=True).start()
        yield s
        s.shutdown()

@pytest.mark.parametrize("left, script, asked", [
    (b"", ["drop", "resume"], [0, HALF]), (b"", ["drop", 503, "resume"], [0, HALF, HALF]),
    (b"", ["drop", "whole"], [0, HALF]),                                    # Range ignored: from the start
    (BODY[:HALF], ["resume"], [HALF]), (BODY + b"old", ["resume"], [len(BODY) + 3, 0])])    # an earlier run's
def test_download_is_bitwise_right_whatever_the_connection_does(server, tmp_path, left, script, asked):
    if left: (tmp_path / (VAL + ".part")).write_bytes(left)
    server.script = script
    prepare.download(prepare.FINEWEB + VAL, tmp_path / VAL, prepare.check_shard)
    assert server.asked == [(VAL, begin) for begin in asked]
    assert (tmp_path / VAL).read_bytes() == BODY and files_in(tmp_path) == [VAL]

@pytest.mark.parametrize("how, body, tries, fault", [
    (503, BODY, 6, "503"), (429, BODY, 6, "429"), (404, BODY, 1, "404"), ("whole", shard(magic=7), 1, " 7"),
    ("whole", BODY[:-2], 1, "truncated"), ("drop", BODY, 6, f"closed after {HALF} of {len(BODY)} bytes")])
def test_failed_download_says_what_to_do_and_leaves_no_shard(server, tmp_path, how, body, tries, fault):
    server.script, server.body = [how], body
    with pytest.raises(ValueError, match=fault) as error: prepare.prepare("fineweb", tmp_path)
    for said in prepare.FINEWEB, f"tries: {tries}", f"by hand to {tmp_path}", "python data/prepare.py python":
        assert said in str(error.value)
    assert len(server.asked) == tries and server.waits == [0, 1, 2, 3, 4, 5][:tries]
    assert files_in(tmp_path) == (["fineweb_train_000001.bin.part"] if how == "drop" else [])

def test_fineweb_downloads_only_what_is_missing_or_bad(server, tmp_path):
    server.script, names = ["whole"], ["fineweb_train_000001.bin", "fineweb_train_000002.bin", VAL]
    (tmp_path / names[0]).write_bytes(BODY)
    (tmp_path / names[1]).write_bytes(BODY[:-1])
    assert prepare.prepare("fineweb", tmp_path, 2) == [tmp_path / name for name in names]
    assert [name for name, _ in server.asked] == names[1:] and files_in(tmp_path) == names

def test_shakespeare_is_split_into_speeches(server, tmp_path):
    server.script, server.body = ["whole"], b"A:\nspeak.\n\nB:\nno.\n"
    assert [documents_of(p) for p in prepare.prepare("shakespeare", tmp_path)] == [[b"A:\nspeak."], [b"B:\nno."]]

# ---- train_gpt.py ------------------------------------------------------------------------------------------

TINY = ("--layers=1 --width=128 --heads=2 --hidden=128 --sequence=32 --batch=4 --tokens_per_step=128 --lr=3e-3 "
        "--eval_tokens=256 --sample_tokens=4 --log_every=1 --corpus=tiny --device=cpu").split()
PAPER_SIZES = {"30m": 30_482_560, "50m": 49_556_736, "100m": 102_777_856, "200m": 203_188_480}    # the paper, C4 runs

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A directory of its own with a small corpus; signal handlers as they were. -> run(args) that calls main."""
    tokens = np.frombuffer(b"the quick brown fox jumps over the lazy dog\n" * 40, np.uint8)
    for split in ("train", "val"):
        prepare.write_shard(tmp_path / f"tiny_{split}_000000.bin", tokens)
    monkeypatch.setattr(train_gpt, "DATA", tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *args: train_gpt.main([*args])
    for s, handler in handlers.items():
        signal.signal(s, handler)

def saved(name):
    return torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)

def losses(name):
    records = [json.loads(line) for line in open(f"runs/{name}/log.jsonl")]
    return {r["step"]: r["loss"] for r in records if "loss" in r}

@pytest.mark.parametrize("preset", PAPER_SIZES)
def test_presets_have_the_sizes_of_the_paper(preset):
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(**train_gpt.PRESETS[preset]))
    assert sum(p.numel() for p in [*model.blocks.parameters(), *model.norm.parameters()]) == PAPER_SIZES[preset]

def test_presets_124m_and_1_9b():
    with torch.device("meta"):
        small, large = (train_gpt.GPT(train_gpt.Config(**train_gpt.PRESETS[p])) for p in ("124m", "1.9b"))
    assert sum(p.numel() for p in small.blocks.parameters() if p.dim() == 2) == 12 * 12 * 768**2    # nanoGPT's
    assert 1.8e9 < sum(p.numel() for p in large.parameters()) < 2.0e9

@pytest.mark.parametrize("recipe", quartet.RECIPES)
def test_twenty_steps_lower_the_loss(tiny, recipe):
    tiny("cpu", *TINY, "--steps=20", f"--recipe={recipe}", "--name=a")
    loss = losses("a")
    assert sorted(loss) == [*range(1, 21)] and loss[20] < loss[1] - 1.5    # from log 256 = 5.5 nats

@pytest.mark.parametrize("recipe", quartet.RECIPES)
def test_zero_initialised_output_projections_train(recipe):
    c = train_gpt.Config(layers=2, width=128, heads=2, hidden=128, sequence=32)
    torch.manual_seed(0)
    model = train_gpt.GPT(c, functools.partial(quartet.Linear, recipe=recipe))
    outputs = [w for b in model.blocks for w in (b.out.weight, b.down.weight)]
    for w in outputs:
        torch.nn.init.zeros_(w)
    optimizer, x = train_gpt.make_optimizer(model, c, "cpu"), torch.randint(0, 256, (4, 33))
    for _ in range(3):
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all((w != 0).any() for w in outputs)

def test_a_resumed_run_equals_the_straight_one(tiny, monkeypatch):
    tiny("cpu", *TINY, "--steps=8", "--name=straight")
    at_step(monkeypatch, 4, signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        tiny("cpu", *TINY, "--steps=8", "--name=stopped")
    assert stop.value.code == 0 and saved("stopped")["step"] == 4
    monkeypatch.undo_step()
    tiny("resume", "stopped")
    assert losses("stopped") == losses("straight")
    for part in ("model", "rng"):
        a, b = (saved(name)[part] for name in ("straight", "stopped"))
        assert all(torch.equal(a[k], b[k]) for k in a if a[k] is not None)

def at_step(monkeypatch, step, signum):
    """Send this process a signal in the middle of a step, once."""
    rate = train_gpt.learning_rate
    def learning_rate(c, i):
        if i == step - 1:
            os.kill(os.getpid(), signum)
        return rate(c, i)
    monkeypatch.setattr(train_gpt, "learning_rate", learning_rate)
    monkeypatch.undo_step = lambda: monkeypatch.setattr(train_gpt, "learning_rate", rate)

def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tiny, monkeypatch, capsys):
    at_step(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        tiny("cpu", *TINY, "--steps=5", "--name=a")
    assert stop.value.code == 130 and saved("a")["step"] == 2
    assert "python train_gpt.py resume runs/a" in capsys.readouterr().out

def test_resume_drops_log_lines_after_the_checkpoint(tiny, monkeypatch):
    at_step(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(SystemExit):
        tiny("cpu", *TINY, "--steps=4", "--name=a")
    monkeypatch.undo_step()
    with open("runs/a/log.jsonl", "a") as f:
        f.write('{"step": 4, "loss": -1.0}\n')                      # a crash after step 4, before its checkpoint
    tiny("resume", "a")
    assert sorted(losses("a")) == [1, 2, 3, 4] and losses("a")[4] > 0

def test_data_order_is_a_function_of_seed_and_step(tiny, tmp_path):
    c = train_gpt.Config(sequence=8, batch=16, corpus="two", vocab_size=600, eval_tokens=64)
    for i, start in enumerate((0, 300)):                            # two shards of different tokens
        prepare.write_shard(tmp_path / f"two_train_{i:06d}.bin", np.arange(start, start + 200 + i))
    data, again = train_gpt.Shards(c, "train"), train_gpt.Shards(c, "train")
    x, y = data.random(c, 3, 1, "cpu")
    assert torch.equal(x, again.random(c, 3, 1, "cpu")[0])
    others = (data.random(c, 4, 1, "cpu"), data.random(c, 3, 0, "cpu"), data.random(
        dataclasses.replace(c, seed=2), 3, 1, "cpu"))
    assert not any(torch.equal(x, other) for other, _ in others)
    assert torch.equal(y, x + 1)                                    # targets follow; no window crosses shards
    places = np.arange(data.ends[-1])
    x, y = data.at(places, "cpu")
    assert sorted({*x.flatten().tolist(), *y.flatten().tolist()}) == [*range(200), *range(300, 501)]
    assert [x.tolist() for x, _ in data.in_order(c, "cpu")] == [np.arange(64).reshape(8, 8).tolist()]

def test_a_step_is_the_mean_of_its_micro_batches(tiny):
    tiny("cpu", *TINY, "--steps=1", "--batch=1", "--recipe=bf16", "--name=a")
    c = train_gpt.Config(**saved("a")["config"])
    torch.manual_seed(c.seed)
    model, data = train_gpt.GPT(c), train_gpt.Shards(c, "train")
    mean = np.mean([model(*data.random(c, 1, micro, "cpu")).item() for micro in range(4)])
    assert abs(losses("a")[1] - mean) < 1e-5

def test_validation_is_the_mean_over_all_predicted_tokens(tiny):
    tiny("cpu", *TINY, "--steps=1", "--eval_tokens=160", "--name=a")           # 5 windows: batches of 4 and 1
    c = train_gpt.Config(**saved("a")["config"])
    model, data = train_gpt.GPT(c, functools.partial(quartet.Linear, recipe=c.recipe)), train_gpt.Shards(c, "val")
    model.load_state_dict(saved("a")["model"])
    windows = data.at(np.arange(5) * 32, "cpu")
    assert abs(json.load(open("runs/a/result.json"))["val_loss"] - model(*windows).item()) < 1e-5

def test_sampling(tiny):
    tiny("cpu", *TINY, "--steps=1", "--name=a")
    c = dataclasses.replace(train_gpt.Config(**saved("a")["config"]), sample_tokens=50)
    model = train_gpt.GPT(c)
    draw = lambda **knobs: [*train_gpt.sample(model, [1, 2], dataclasses.replace(c, **knobs), "cpu")]
    likeliest = model(torch.tensor([[1, 2]]))[0, -1].topk(3).indices.tolist()
    assert draw(temperature=0.0) == draw(top_k=1) and draw(temperature=0.0)[0] == likeliest[0]
    assert draw() == draw() != draw(seed=2)
    assert {draw(seed=s, top_k=3, temperature=9.0)[0] for s in range(40)} == {*likeliest}

def test_compare_trains_every_recipe_on_equal_terms_and_ends_with_a_table(tiny, capsys):
    tiny("cpu", *TINY, "--steps=3", "--recipe=bf16,rtn,quartet2", "--name=a")
    table = open("runs/a/compare.txt").read()
    assert table in capsys.readouterr().out and [r.split()[0] for r in table.splitlines()[1:]] == ["bf16", "rtn", "quartet2"]
    for recipe in ("rtn", "quartet2"):
        assert abs(losses(f"a/{recipe}")[1] - losses("a/bf16")[1]) < 0.02      # same weights, same data
    stamp = os.stat("runs/a/bf16/result.json").st_mtime_ns
    tiny("resume", "a")                                                        # nothing is trained again
    assert os.stat("runs/a/bf16/result.json").st_mtime_ns == stamp

def test_eval_prints_each_forward(tiny, capsys):
    tiny("cpu", *TINY, "--steps=3", "--recipe=bf16", "--name=a")
    capsys.readouterr()
    tiny("eval", "a", "--recipe=bf16,rtn,four_six")
    rows = [line.replace(",", " ").split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [r[0] for r in rows] == ["bf16", "rtn", "four_six"] and rows[0][2] == "0.0000"
    assert abs(float(rows[0][1]) - json.load(open("runs/a/result.json"))["val_loss"]) < 1e-4
    assert all(abs(math.exp(float(r[1])) / float(r[3]) - 1) < 1e-3 for r in rows)

def test_knobs_keep_blocks_and_the_last_steps_in_bf16(tiny, monkeypatch):
    seen, forward = [], train_gpt.GPT.forward
    def spy(model, *args):
        seen.append([getattr(b.qkv, "recipe", "bf16") for b in model.blocks])
        return forward(model, *args)
    monkeypatch.setattr(train_gpt.GPT, "forward", spy)
    tiny("cpu", *TINY, "--layers=2", "--bf16_blocks=1", "--bf16_end=0.5", "--steps=4", "--name=a", "--eval_every=9")
    assert seen[:4] == [["quartet2", "bf16"]] * 2 + [["bf16", "bf16"]] * 2

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny):
    with pytest.raises(train_gpt.UserError, match="step 2: loss .* norm nan.*--lr"):
        tiny("cpu", *TINY, "--lr=1e25", "--steps=9", "--save_every=1", "--name=a")
    assert saved("a")["step"] == 1 and all(w.isfinite().all() for w in saved("a")["model"].values())

@pytest.mark.parametrize("args, message", [
    (["--recipe=quartet"], "unknown recipe 'quartet'.*did you mean 'quartet2'"),
    (["--recipes=bf16"], "unknown knob --recipes: did you mean 'recipe'"),
    (["30M"], "unknown preset '30M'.*30m"), (["--steps=many"], "--steps=many.*int"), (["--steps"], "needs a value"),
    (["--steps=0"], "too small"), (["--backend=cuda"], "auto, torch"), (["--width=130"], "multiple of twice the heads"),
    (["--batch=3"], "must be a multiple of batch x sequence"), (["cpu", "gpu"], "at most one preset"), (["eval"], "name of a run"),
    (["--corpus=none"], r"none_train_\*.bin.*python data/prepare.py none"), (["--vocab_size=100"], "token 122, beyond"),
    (["--sequence=4096", "--tokens_per_step=16384"], "too few for --sequence=4096"), (["resume", "none"], "no checkpoint"),
    (["--hidden=96"], r"Linear\(128, 192\).*out_features % 128"), (["--name=taken"], "runs/taken exists.*another --name")])
def test_mistakes_get_one_line_that_names_the_value_and_the_way_out(tiny, args, message):
    os.makedirs("runs/taken")
    words = [a for a in args if not a.startswith("--")]
    with pytest.raises((train_gpt.UserError, ValueError), match=message) as error:
        tiny(*words, *([] if words and words[0] in ("resume", "eval") else TINY), *[a for a in args if a.startswith("--")])
    assert "\n" not in str(error.value) and os.listdir("runs") == ["taken"] and not os.listdir("runs/taken")

def test_bad_checkpoints(tiny, tmp_path):
    tiny("cpu", *TINY, "--steps=1", "--name=a")
    whole = open("runs/a/checkpoint.pt", "rb").read()
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)
    for content, message in ((whole[:-1000], "not a whole checkpoint"), (b"", "not a whole checkpoint"),
                             (pickle.dumps(Evil()), "not a whole checkpoint"), (None, "not written by")):
        torch.save({"model": {}}, "runs/a/checkpoint.pt")
        if content is not None:
            open("runs/a/checkpoint.pt", "wb").write(content)
        with pytest.raises(train_gpt.UserError, match=message):
            tiny("sample", "a")
    assert not (tmp_path / "hacked").exists()
    open("runs/a/checkpoint.pt", "wb").write(whole)
    with pytest.raises(train_gpt.UserError, match=r"another model: --layers=2 \(saved: 1\)"):
        tiny("resume", "a", "--layers=2")

def test_a_directory_that_cannot_be_written(tiny):
    open("runs", "w").close()
    with pytest.raises(train_gpt.UserError, match="cannot write runs/"):
        tiny("cpu", *TINY, "--steps=1")

def test_default_names_are_unique(tiny):
    c = train_gpt.Config()
    assert len({train_gpt.new_directory(c, "cpu") for _ in range(3)}) == 3

def test_without_a_c_compiler_training_goes_on_uncompiled(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert train_gpt.pick_device(train_gpt.Config(compile="on", device="cpu")) == ("cpu", False)
    assert "no C compiler" in capsys.readouterr().out

def test_help_shows_every_knob_and_preset(capsys):
    train_gpt.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{f.name}: " in text for f in dataclasses.fields(train_gpt.Config)) and all(p in text for p in train_gpt.PRESETS)

# ---- README.md ---------------------------------------------------------------------------------------------

def test_commands_of_the_readme_run(tmp_path):
    """Every command but pip and pytest, in order, in a directory of its own, with few steps."""
    blocks = re.findall(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    commands = [c.split(" #")[0].strip() for block in blocks for line in block.splitlines() for c in line.split("&&")]
    commands = [c for c in commands if not c.startswith(("pip ", "python -m pytest"))]
    assert len(commands) > 6 and all(c.startswith("python ") for c in commands)
    short = "--steps=2 --eval_tokens=1024 --sample_tokens=4 --device=cpu --batch=4 --tokens_per_step=1024"
    for command in commands:
        words = shlex.split(command)
        words = [sys.executable, str(HERE / words[1]), *words[2:], *(short.split() if words[1] == "train_gpt.py" else [])]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, (command, done.stderr)
