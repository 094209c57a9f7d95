"""The tests: quartet.py in its order, kernels.py, README; others in data/tests. Each is named for a property.

Tolerances are exhaustive or derived, else bits are compared; "5 sigma": 5 standard errors. Seeds are fixed.
"""
import copy, functools, math, os, re, shlex, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pytest
import torch, torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.cuda.is_available()
DEVICE, ENVIRONMENT = "cuda" if GPU else "cpu", dict(os.environ)         # a newcomer's, for subprocesses
if not GPU: os.environ["TRITON_INTERPRET"] = "1"     # before triton is imported: kernels run in Python
import kernels, quartet, train_gpt
from quartet import (NVFP4, RECIPES, ROTATIONS, Gemm, Linear, Recipe, decode, e2m1, e4m3, four_six, ms_eden, pack,
                     philox, quantize_model, rotate, rotation, round_scale, rtn, scale_search, sr, transpose,
                     uniform, unpack)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "data/evidence"))
import bench, demonstrate

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])                            # by code, 0 to 7
E4M3 = np.array([(m + 8 * (e > 0)) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127])
FOUR_BITS = np.array([m * 2.0**e for e in range(-129, 60) for m in range(8, 16)])  # what round_scale makes
QUANTIZERS = {**quartet.QUANTIZERS, "sr_four_six": lambda x, R, seed: demonstrate.sr_four_six(x, seed)}
del QUANTIZERS["bf16"]
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
every_4bit_recipe = pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "bf16"])
@pytest.fixture(scope="session", autouse=True)
def list_what_is_skipped(request):      # as with -rs
    request.config.pluginmanager.getplugin("terminalreporter").reportchars += "s"

@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not GPU: pytest.skip("PyTorch sees no GPU here")
    yield request.param
    if request.param == "cuda": torch.cuda.set_sync_debug_mode("default")

def quantize(name, x, seed=0): return QUANTIZERS[name](x, None, seed)
def generator(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))
def wide(octaves, rows=64, K=256):
    """N(0, 1) with rows times powers of two of 2^-octaves .. 2^octaves: block scales of all kinds."""
    return normal(rows, K) * 2.0 ** torch.linspace(-octaves, octaves, rows).round()[:, None]
def with_value(x, value): return x.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value))
def nearest(v, grid):
    """The oracle: the value of an ascending grid nearest to |v|, with v's sign; ties: even index."""
    a, middle = v.abs().double().numpy(), (grid[1:] + grid[:-1]) / 2
    low, high = (np.searchsorted(middle, a, side) for side in ("left", "right"))  # differ at ties only
    return torch.from_numpy(grid[np.where(low % 2 == 0, low, high)]).float().copysign(v)
def same(a, b):
    """Whether two sequences hold tensors of the same dtypes, shapes and bits."""
    bits = lambda t: (t.dtype, t.shape, t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return [*map(bits, a)] == [*map(bits, b)]
def assert_independent(rows):           # all pairs of rows, to 5 sigma
    assert rows.std(-1).min() > 0
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 5 / rows.shape[1]**0.5
def relative(t, x):
    """sum(t) / sum(x^2), and its standard error, from the scatter over tiles of 16 x 128 values."""
    t, xx = (v.double().view(len(v) // 16, 16, -1, 128).sum((1, 3)) for v in (t, x.square()))
    share = t.sum() / xx.sum()
    return share.item(), ((t - share * xx).std() * t.numel()**0.5 / xx.sum()).item()
def convergence(draw, target, B):
    """B * error of the mean of B draws / error of one: 1 if unbiased, B if all are equal; and its sigma."""
    draws = torch.stack([draw(i).double() for i in range(B)])
    single = (draws - target).square().sum(-1).mean(0)
    excess = B * (draws.mean(0) - target).square().sum(-1) - single      # of mean 0 if unbiased
    return (1 + excess.sum() / single.sum()).item(), (excess.std() * len(target)**0.5 / single.sum()).item()

# ---- 1. Small floats ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("rounding, grid", [(e2m1, E2M1), (e4m3, E4M3), (round_scale, FOUR_BITS)])
def test_rounding_goes_to_the_nearest_with_ties_to_even_or_by_u_to_a_neighbour_without_bias(rounding, grid):
    v = torch.from_numpy(np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])).float()    # codes, ties: exact
    v = torch.cat([v, *(v.nextafter(torch.tensor(end)) for end in (0.0, math.inf))])
    v = v[v >= grid[0]]
    assert torch.equal(rounding(v), nearest(v, grid)) and torch.equal(rounding(-v), -nearest(v, grid))
    # u runs through 0/m .. (m-1)/m, of which ceil(m f) are below the fraction f: the mean is exact to gap / m
    m, low, high = 2**10, torch.tensor(grid[:-1]), torch.tensor(grid[1:])
    u = (torch.arange(m) / m)[:, None].expand(m, len(low))
    for f, sign in ((f, sign) for f in (0, 1e-3, 0.25, 0.3, 0.5, 0.999) for sign in (1, -1)):
        v = (low + f * (high - low)).float()
        r = sign * rounding(sign * v.expand(m, -1), u).double()
        assert (((r == low) | (r == high)) & ((r.mean(0) - v).abs() * m <= (high - low) * (f > 0))).all()

@pytest.mark.parametrize("u", [None, torch.zeros(1), torch.full((1,), 1 - 2.0**-24)])
def test_rounding_saturates_keeps_nan_and_makes_no_negative_zero(u):
    for rounding, top in ((e2m1, 6.0), (e4m3, 448.0), (round_scale, math.nan)):     # NaN: of infinity
        r = rounding(torch.tensor([top * 1.01, 1e30 * top, math.inf, -top * 1.01, -1e30 * top, -math.inf]), u)
        assert torch.equal(r[:3], -r[3:]) and (r[:3] == top).all() if top == top else r.isnan().all()
        zeros = rounding(torch.tensor([0.0, -0.0, -1e-45, -1e-3, -0.2]), u)
        assert rounding(torch.tensor([math.nan]), u).isnan() and not (zeros.signbit() & (zeros == 0)).any()

# ---- 2. NVFP4 tensors --------------------------------------------------------------------------------------
@pytest.mark.parametrize("tensor_scale", [2.0**-123, 1.0, 2.0**110])
def test_every_byte_with_every_scale_decodes_exactly_in_float32_and_bf16_and_packs_back(tensor_scale):
    byte, scale = (torch.arange(n, dtype=torch.uint8) for n in (256, 127))
    code = torch.stack([byte & 15, byte >> 4], -1)                       # low half first
    scales = scale.view(torch.float8_e4m3fn)[:, None].expand(127, 32)
    t = NVFP4(byte.expand(127, 256), scales, torch.tensor(tensor_scale))
    exact = torch.from_numpy(np.outer(E4M3, np.array([*E2M1, *-E2M1])[code.flatten()])) * tensor_scale
    assert torch.equal(decode(t).double(), exact) and torch.equal(decode(t, torch.bfloat16).double(), exact)
    usable = (code != 8).all(-1)                                         # 8 is -0.0, which no quantizer makes
    assert torch.equal(pack(unpack(byte))[usable], byte[usable])

@every_quantizer
def test_quantizers_return_what_nvfp4_promises_exact_in_bf16(name):
    huge = with_value(normal(32, 128), -1e30)
    for x in (wide(40), huge, normal(2, 16, 128) * 1e-30, wide(15) * 2.0**-119, torch.full((16, 128), 1e-42)):
        codes, scale, tensor_scale = t = quantize(name, x)
        assert codes.dtype == torch.uint8 and codes.shape == (*x.shape[:-1], x.shape[-1] // 2)
        assert scale.dtype == torch.float8_e4m3fn and scale.shape == (*x.shape[:-1], x.shape[-1] // 16)
        assert tensor_scale.dtype == torch.float32 and tensor_scale.shape == ()
        assert tensor_scale >= 2.0**-123 and math.frexp(tensor_scale)[0] == 0.5     # a power of two
        assert not (codes & 15 == 8).any() and not (codes >> 4 == 8).any()  # no -0.0
        assert (scale.float() >= 0).all() and (x.abs().max() < 2.0**-112 or 240 <= scale.float().max() <= 448)
        assert torch.equal(decode(t, torch.bfloat16).float(), decode(t)) and decode(t).isfinite().all()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):         # any float, any strides
        x = normal(16, 2, 128).to(dtype).transpose(0, 1)
        assert same(quantize(name, x), quantize(name, x.float().contiguous()))
    for x in (torch.zeros(16, 128), -torch.zeros(16, 128), torch.zeros(0, 128), torch.zeros(16, 0)):
        codes, scale, tensor_scale = t = quantize(name, x)
        assert tensor_scale == 1 and not (codes.any() or scale.float().any()) and same([decode(t)], [x.abs()])

@every_quantizer
def test_powers_of_two_move_the_tensor_scale_only(name):
    # decisions are made in a block's own unit: no square overflows at 2^100 or vanishes at 2^-100
    expected = quantize(name, x := normal(64, 512, seed=1))
    for power in (100, -100, -119):                                      # -119 meets the least tensor scale
        t = quantize(name, x * 2.0**power)
        assert same(t[:1], expected[:1]) and torch.equal(decode(t) * 2.0**-power, decode(expected))
        assert t.tensor_scale == max(expected.tensor_scale * 2.0**power, 2.0**-123)

@every_quantizer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_makes_all_decode_to_nan(name, value):
    x = with_value(normal(32, 256), value)
    for t in quantize(name, x), ms_eden(x, rotation("rht128", generator())[0], 0):
        assert decode(t).isnan().all() and decode(t, torch.bfloat16).isnan().all()
        assert not t.codes.any() and not t.block_scale.view(torch.uint8).any()

@pytest.mark.parametrize("f", [rtn, four_six])
def test_16x16_blocks_have_the_same_codes_transposed(f):                 # 4/6: but for ties to the last bit
    x = normal(128, 256)
    x[:, 128:] = torch.where(x[:, 128:] > 0, 4.0, x[:, 128:].clamp(-4, 4))  # 4/6 picks 6 on the left, 4 here
    t = f(x, (16, 16))
    assert same(transpose(t), f(x.T, (16, 16)))
    assert {unpack(half).max().item() for half in t.codes.chunk(2, 1)} == ({6.0} if f is rtn else {4.0, 6.0})

def test_sums_and_quotients_are_rounded_as_stated(device):
    tree = lambda v: v[0] if len(v) == 1 else tree([a + b for a, b in zip(v, v[len(v) // 2:])])
    t = normal(2, 16, 3, 16) * 10.0 ** normal(2, 16, 3, 16, seed=1)
    expected = [[tree([tree(list(row[j])) for row in rows]) for j in range(3)] for rows in t.numpy()]
    assert torch.equal(quartet.block_sum(t.to(device)).cpu().view(2, 3), torch.tensor(np.array(expected)))
    assert torch.equal(quartet.divide_by(t.to(device), 6.0).cpu(), torch.from_numpy(t.numpy() / np.float32(6)))

@pytest.mark.parametrize("call, error", [
    (lambda: rtn(torch.ones(2, 16, dtype=torch.int32)), "torch.int32.*float"),
    (lambda: four_six(torch.ones(4, 24)), r"\(4, 24\).*pad.*16"),
    (lambda: sr(torch.tensor(1.0), 0), r"\(\).*pad.*16"),
    (lambda: rtn(torch.ones(24, 16), (16, 16)), r"\(24, 16\).*pad.*rows.*16"),
    (lambda: kernels.rtn(torch.ones(24, 16), (16, 16)), r"\(24, 16\).*pad.*rows.*16"),
    (lambda: kernels.ms_eden(torch.ones(4, 128), torch.eye(128), 0), r"float32 \(4, 128\).*bfloat16"),
    (lambda: rtn(torch.ones(16, 32), (32, 1)), r"block=\(32, 1\).*\(1, 16\)"),
    (lambda: ms_eden(torch.ones(4, 64), rotation("rht128")[0], 0), r"\(4, 64\).*pad.*128"),
    (lambda: rotation("rht64"), "rht64.*rht16, rht32, rht128"),
    (lambda: Linear(100, 128), r"\(100, 128\).*quartet2.*in_features % 16.*bf16.*skip"),
    (lambda: Linear(128, 128, backend="cuda"), "cuda.*auto, torch, triton"),
    (lambda: Linear(128, 128)(torch.ones(4, 64)), r"128.*\(4, 64\)"),
    (lambda: Linear(128, 128)(torch.ones(4, 128, dtype=torch.int64)), "int64")])
def test_what_cannot_be_done_is_an_error_that_names_the_way_out(call, error):
    with pytest.raises(ValueError, match=error): call()

# ---- 3, 4. RTN, Four Over Six and the search over scales ---------------------------------------------------
def test_blocks_by_hand():
    x = torch.tensor([[6, -6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -0.3, 0, -0.0, 4.9, 1e-9, -3]])
    t = rtn(x)                                                           # scale 1 = 256 (byte 0x78) * 2^-8
    assert t.codes.tolist() == [[0xF7, 0x66, 0x44, 0x22, 0x00, 0x09, 0x60, 0xD0]]
    assert t.block_scale.view(torch.uint8).tolist() == [[0x78]] and t.tensor_scale == 2.0**-8
    for eighths in range(8, 16):                                         # block scale 1 to 1.875, the largest
        t = rtn(torch.full((1, 16), 6 * eighths / 8))                    # 1.875 * 256 > 448
        expected = (1 / 256, 32 * eighths) if eighths < 15 else (1 / 128, 240)
        assert (t.tensor_scale.item(), t.block_scale.float().item()) == expected
    assert four_six(torch.tensor([6.0, 3.0] * 8)).codes.tolist() == [0x57] * 8  # exact onto 6 and 4: a tie
    # one value a group is +-6 all over after one round; its MS-EDEN scale 6 / 6.07 times S = 6.07 / 6 is 1
    R, n = rotation("rht128", generator())
    x = F.one_hot(torch.tensor([5, 77]), 128) * torch.tensor([[6.0], [-1.5]])
    t = ms_eden(x, R, 1)
    assert torch.equal(decode(t) @ R.T / n, x) and (unpack(t.codes).abs() == 6).all()

@pytest.mark.parametrize("k", [-20, 0, 9])
@pytest.mark.parametrize("f, most", [(rtn, 448), (four_six, 256)])
def test_codes_and_scales_equal_the_peers_formula(f, most, k):
    def peers(top):                     # E4M3(amax / top / tensor scale); nearest values; where s is normal
        raw = b.abs().amax(-1) / top / 2.0**k                            # float32, the rest float64
        s = nearest(raw, E4M3).double()
        q = nearest(b / (s * 2.0**k).clamp(min=1e-99)[..., None], E2M1).double()
        return q, s, (q * s[..., None] * 2.0**k - b).square().sum(-1), raw >= 2.0**-6
    x = wide(7) * 2.0 ** (k + 1)                                         # block scales also below 2^-6
    x[0, 0] = 6 * most * 2.0**k
    t, b = f(x), x.view(len(x), -1, 16)
    q, s, error, sure = peers(6.0)
    if f is four_six:
        q4, s4, error4, _ = peers(4.0)
        # float32 errors are off by 7 * 2^-24 of them (difference twice, square, 4 sums): within 14, a tie
        pick, sure = error4 < error, sure & ((error4 / error - 1).abs() > 14 * 2.0**-24)
        q, s = torch.where(pick[..., None], q4, q), torch.where(pick, s4, s)
    assert t.tensor_scale == 2.0**k and 0.8 < sure.float().mean() < 1
    assert torch.equal(unpack(t.codes).view(q.shape)[sure].double(), q[sure])
    assert torch.equal(t.block_scale.double()[sure], s[sure])

@pytest.mark.parametrize("name, nmse, bias", [                           # times 1e-3
    ("rtn", 9.0, -4.5), ("rtn_16x16", 12.4, -9.1), ("four_six", 7.6, -3.4), ("four_six_16x16", 12.4, -9.0),
    ("scale_search", 6.7, -7.4), ("scale_search_16x16", 11.6, -9.6), ("sr", 23.5, 0), ("ms_eden", 9.3, 0),
    ("ms_eden_46", 8.1, 0), ("sr_four_six", 17.5, 7.3)])
def test_nmse_and_bias_on_normal_values(name, nmse, bias, monkeypatch):
    x = normal(1024, 1024, seed=3)
    error = decode(quantize(name, x, 1)) - x
    for (found, sigma), expected in ((relative(error.square(), x), nmse), (relative(error * x, x), bias)):
        assert abs(found - expected * 1e-3) < 0.05e-3 + 5 * sigma        # half the last digit, and 5 sigma
    for c in (0.90, 0.96) if "ms_eden" in name else ():                  # EDEN_MAX, with 0.93, errs least
        monkeypatch.setattr(quartet, "EDEN_MAX", quartet.SR_MAX / c)
        assert F.mse_loss(decode(quantize(name, x, 1)), x) > error.square().mean()

def test_scale_search_takes_the_scale_of_least_error():
    x = torch.cat([normal(64, 512), normal(64, 512, seed=1) ** 3, F.pad(normal(4, 16), (0, 496))])
    t, b = scale_search(x), x.view(len(x), -1, 16).double()
    amax, grid = b.abs().amax(-1), torch.tensor(FOUR_BITS)
    at = torch.searchsorted(grid, nearest(amax / 6, FOUR_BITS).double())[..., None]
    s = grid[at + torch.tensor([-1, 0, 1, 4, 5])] * (amax > 0)[..., None]            # all, in float64
    q = nearest(b[..., None, :] / s[..., None].clamp(min=1e-99), E2M1).double()
    errors = (q * s[..., None] - b[..., None, :]).square().sum(-1)
    found = (decode(t).view(b.shape).double() - b).square().sum(-1)
    least = errors.amin(-1)                                              # float32 sums err by 14 * 2^-24, as
    assert (found <= least * (1 + 28 * 2.0**-24)).all() and (found >= least * (1 - 1e-12)).all()    # 4/6's
    assert found.sum() < (decode(four_six(x)) - x).square().sum()

# ---- 5. Stochastic rounding --------------------------------------------------------------------------------
def test_philox_known_answers_and_all_64_bits_of_seed_and_counter():
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
    assert integers(0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]   # kat_vectors of Random123

@pytest.mark.parametrize("name, step", [("sr", 1), ("ms_eden", 16)])
def test_noise_is_shared_by_no_rows_seeds_or_neighbours(name, step):
    x = torch.ones(16, 1024 * step)                                      # equal values: errors show the noise
    noise = torch.cat([decode(quantize(name, x, seed))[:, ::step] for seed in (0, 1, 2, 2**32, -1, 10**9)])
    assert_independent(noise)
    assert_independent(noise[:16].reshape(-1, 64).T)                     # neighbours

def test_sr_never_clips():
    # amaxes of an octave, and those near which the scale's rounding turns: none above 6 scales
    turns = torch.tensor([(m + 0.5) / 8 * 2.0**e * 96 / 17 for m in range(8, 16) for e in (-3, -2)])
    near = (turns.view(torch.int32)[:, None] + torch.arange(-9, 10, dtype=torch.int32)).view(torch.float32)
    amax = torch.cat([torch.linspace(1, 2, 2**16), near.flatten()])
    t = sr(F.pad(amax[:, None], (0, 15)), 0)
    scale = t.block_scale.float()[:, 0] * t.tensor_scale
    # SR_MAX and the quotient are rounded to float32; upwards, 8.5/8 goes to 9/8: 17/16 * 18/17 too large
    assert (6 * scale >= amax * (1 - 2.0**-23)).all() and (6 * scale <= amax * 18 / 16).all()

def assert_mean(a, target, span):
    """The mean of a over its B draws is target: to 5 sigma, plus what the empirical Bernstein inequality
    (Maurer, Pontil 2009) adds where draws are not normal but in an interval of size span, at 5^2 / 2 nats."""
    B = len(a)
    assert ((a.mean(0) - target).abs() <= 5 * a.std(0) / B**0.5 + 7 / 3 * 12.5 * span / (B - 1)).all()

def test_sr_is_unbiased_element_by_element_and_ms_eden_along_each_block_also_at_sub_normal_scales():
    B, sizes = 4096, 2.0 ** -torch.tensor([0.0, 1, 9, 13, 15, 16, 17, 18, 19, 20])[:, None]
    x = normal(10, 128) * sizes                                          # scales: to below sub-normal
    t, b = sr(x.expand(B, 10, 128), 0), x.view(10, 8, 16)                # rows draw apart: B draws
    amax, step = b.abs().amax(-1, keepdim=True), 2.0**-9 * t.tensor_scale  # of a block; of sub-normals
    assert_mean(decode(t).view(B, 10, 8, 16), b, 2 * (9 / 8 * amax + 6 * step))
    assert 0.3 < (t.block_scale.float() < 2.0**-6).float().mean() < 0.9
    t = ms_eden(x.expand(B, 10, 128), None, 0)
    along = (decode(t).view(B, 10, 8, 16) * b).sum(-1, keepdim=True) / b.square().sum(-1, keepdim=True)
    assert_mean(along, torch.ones(10, 8, 1), 1 / 4 + 2 * 2.0**-9 * t.tensor_scale / (amax / 6))

# ---- 6. Rotations ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, n", [("rht16", 16), ("rht32", 32), ("rht128", 128), ("rht128x2", 2**14), ("rht128x3", 2**21)])
def test_rotations_are_integer_cancel_in_a_product_and_begin_with_new_signs(name, n, monkeypatch):
    g, signs, rotation_from = generator(), [], quartet.rotation_from
    monkeypatch.setattr(quartet, "rotation_from", lambda name, d: signs.append(d) or rotation_from(name, d))
    H = functools.reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * 7)     # Sylvester
    H *= torch.block_diag(*[torch.ones(min(n, 128), min(n, 128))] * (128 // min(n, 128)))
    x = torch.randint(-4, 5, (2, 3, 2, 128), generator=g).float()        # sums of integers are exact
    for _ in range(20):
        R, found = rotation(name, g)
        D1, D2, D3 = (torch.diag(d) for d in signs[-1])
        expected = D1 @ H @ {"rht128x2": D2 @ H, "rht128x3": D2 @ H @ D3 @ H}.get(name, torch.eye(128))
        assert torch.equal(R, expected) and (R.bfloat16() == R).all()
        assert found == n and isinstance(found, int) and torch.equal(R @ R.T, n * torch.eye(128))
        assert torch.equal(rotate(x.flatten(2), R), (x @ R).flatten(2)) and rotate(x, None) is x
    assert_independent(torch.cat(signs))                                 # all anew, the two of one R, too

def test_entries_after_three_rounds_are_multiples_of_4_far_below_what_bf16_rounds():
    """A sum of 128 terms +-W, each W 2 modulo 4 or each 0; above 1024 bf16 has multiples of 8 only.

    By Hoeffding, since the W of a row have sum of squares 2^14: P(entry > t) <= 2 exp(-t^2 / 2^15), 3e-14 at 1024.
    """
    entries = torch.stack([rotation("rht128x3", generator(seed))[0] for seed in range(300)])
    assert (entries % 4 == 0).all() and 500 < entries.abs().max() < 800

# ---- 7. MS-EDEN --------------------------------------------------------------------------------------------
def test_eden_factor_is_per_block(monkeypatch):
    """Before its scale is rounded every block keeps its length; with one factor a group, a bias is left."""
    monkeypatch.setattr(quartet, "round_scale", lambda s, u=None: s)
    monkeypatch.setattr(quartet, "assemble", lambda shape, q, s, u=None: (q * s).view(shape))
    for name, four_six in [(name, False) for name in ROTATIONS] + [("rht128x3", True)]:
        x, (R, n) = wide(30), rotation(name, generator())
        a, y = ms_eden(x, R, 0, four_six).double().view(-1, 16), rotate(x, R).double().view(-1, 16)
        # float32: S is a quotient of two sums with 5 roundings a term; s, v and q s are rounded: 14 in all
        assert ((a * y).sum(-1) / (y * y).sum(-1) - 1).abs().max() < 14 * 2.0**-24
    def one_a_group(v, q):
        vv, vq = ((v * t).sum((1, 3)).view(-1, 8).sum(-1) for t in (v, q))
        return (vv / vq).repeat_interleave(8).view(len(v), 1, -1, 1)
    x = normal(2048, 1024, seed=4)
    monkeypatch.setattr(quartet, "eden_factor", one_a_group)
    found, sigma = relative((ms_eden(x, None, 1) - x) * x, x)
    assert abs(found + 9e-4) < 0.5e-4 + 5 * sigma < 3e-4

@pytest.mark.parametrize("name, how", [("rht128", []), ("rht128x2", []), ("rht128x2", [True]), ("rht128x3", [])])
@pytest.mark.parametrize("kind", ["normal", "with a mean", "one 100 in 128", "one 300 in 128", "two near-equal"])
def test_ms_eden_averages_to_x(name, how, kind):
    x, g = normal(64, 128) + 10 * (kind == "with a mean"), generator()
    if kind == "two near-equal": x = F.pad(torch.tensor([[1.0, 0.88]]), (0, 126)).repeat(64, 1)
    if "one" in kind: x[torch.arange(64), torch.arange(64) * 37 % 128] = float(kind[4:7])
    def draw(seed):
        R, n = rotation(name, g)
        return decode(ms_eden(x, R, seed, *how)) @ R.T / n
    found, sigma = convergence(draw, x, 256)
    remains = {("one 100 in 128", "rht128"), ("one 300 in 128", "rht128"),                        # 27, 107
               ("two near-equal", "rht128"), ("two near-equal", "rht128x2")}                      # 187; 7, 15
    if how: remains.add(("one 300 in 128", "rht128x2"))                                           # 2.8: 4/6
    if (kind, name) in remains: assert found - 5 * sigma > 1.5
    elif (kind, name) == ("one 300 in 128", "rht128x2"): assert 0.9 < found < 1.5                 # 1.1: little
    else: assert abs(found - 1) < 5 * sigma < 0.15

def test_4_over_6_in_ms_eden_takes_the_larger_cosine_whatever_the_scale():
    x = normal(64, 1024, seed=2)
    t, b = ms_eden(x, None, 0, True), x.view(64, -1, 16).double()
    cosines = []                                                         # of 6, of 4, of what was taken
    for top in (6.0, 4.0):
        v = b / b.abs().amax(-1, keepdim=True) * top * 16 / 17 / 0.93
        cosines.append(F.cosine_similarity(nearest(v, E2M1).double(), b, dim=-1))
    cosines.append(F.cosine_similarity(unpack(t.codes).view(b.shape).double(), b, dim=-1))
    assert (cosines[2] >= torch.maximum(*cosines[:2]) - 1e-6).all()
    assert 0.2 < (cosines[1] > cosines[0]).double().mean() < 0.8

def test_no_quantizer_needs_many_copies_of_its_input():
    x, (R, n) = normal(1024, 512), rotation("rht128", generator())
    # most memory at once, in float32 copies of x, itself not counted: 4.2, 6.3, 5.4 and (philox is int64) 8.1
    for f, most in ((rtn, 4.5), (four_six, 6.5), (lambda x: ms_eden(x, R, 0), 6), (lambda x: sr(x, 0), 8.5)):
        with torch.profiler.profile(profile_memory=True) as profile: f(x)
        events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        peak = np.cumsum([e.nbytes() for e in events if e.name() == "[memory]"]).max()
        assert 1 < peak / x.nbytes < most

# ---- 8, 9. Recipes and the linear layer --------------------------------------------------------------------
FORWARD = dict(rtn=("rtn", "rtn"), nvidia=("rtn", "rtn_16x16"), four_six=("four_six", "four_six_16x16"),
               tetrajet2=("rtn", "rtn"), quartet2=("four_six", "four_six"),
               quintet=("scale_search", "scale_search"))                 # quantizers of x, w
ORIGINAL_X = ("nvidia", "four_six")                                      # wgrad quantizes the original x

def layer(recipe, *shape, bias=False, device="cpu"):
    """A Linear(128, 128), x and dy of a shape (..., 128): N(0, 1) in bf16 values, which no cast changes."""
    linear = Linear(128, 128, bias, recipe, device=device)
    sample = lambda seed, *shape: normal(*shape, seed=seed).bfloat16().float().to(device)
    linear.weight.data = sample(0, 128, 128)
    return linear, sample(1, *shape).requires_grad_(), sample(2, *shape)
def step(linear, x, dy):                # y, dx, dw (and the bias's gradient)
    torch.manual_seed(0)
    y = linear(x)
    return y.detach(), *torch.autograd.grad(y, (x, *linear.parameters()), dy)

def test_linear_is_nn_linear_but_for_its_recipe():
    with torch.random.fork_rng(): plain = torch.nn.Linear(128, 128)      # leaves the same state to Linear
    linear, (_, x, dy) = Linear(128, 128, bias=True, recipe="bf16"), layer("bf16", 50, 128)
    assert same(linear.parameters(), plain.parameters()) and same(step(linear, x, dy), step(plain, x, dy))
    linear.recipe = "quartet2"
    again = copy.deepcopy(linear)
    linear.load_state_dict(plain.state_dict())                           # strict: the same keys
    assert "recipe='quartet2'" in repr(again) and same(step(again, x, dy), step(linear, x, dy))

@every_4bit_recipe
def test_y_and_mean_gradients_are_those_of_what_is_kept_without_synchronisation(recipe, device, monkeypatch):
    (linear, x, dy), kept, B = layer(recipe, 128, 128, device=device), [], 64
    R, n = rotation("rht16", torch.Generator(device).manual_seed(0))
    if recipe in ORIGINAL_X: monkeypatch.setattr(quartet, "rotation_from", lambda name, signs: (R, n) if name else (None, 1))
    step(linear, x, dy)                                                  # cuBLAS sets itself up
    if device == "cuda": torch.cuda.set_sync_debug_mode("error")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = linear(x)
    draws = [torch.autograd.grad(y, (x, linear.weight), dy, retain_graph=True) for _ in range(B)]
    if device == "cuda": torch.cuda.set_sync_debug_mode("default")
    nvfp4 = lambda t: t.numel() * 4.5 / 8 + 4
    assert sum(kept) == nvfp4(linear.weight) + (x.numel() * 2 + 2 if recipe in ORIGINAL_X else nvfp4(x))
    a, b = (decode(quantize(q, t.detach())) for q, t in zip(FORWARD[recipe], (x, linear.weight)))
    exact, magnitudes = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    # bf16 rounds by 2^-8; 128 float32 additions by 128 * 2^-24 of the sum of magnitudes
    assert ((y - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-17 * magnitudes).all()
    if recipe in ORIGINAL_X: a = R @ decode(rtn(x.detach().T @ R)).T / n   # rotated, rounded to nearest
    for i, target in enumerate((dy @ b, dy.T @ a)):
        found, _ = convergence(lambda k: draws[k][i], target, B)
        # rtn: all draws are equal, and wrong. Else 1 to 5 sigma, 5 (2/8000)^0.5 for 8000 degrees of freedom
        assert abs(found - (B if recipe == "rtn" else 1)) < 0.08

@pytest.mark.parametrize("x_kind", ["bf16", "four_six"])
@pytest.mark.parametrize("w_kind", ["bf16", "rtn_16x16"])
def test_operands_left_in_bf16_are_multiplied_as_they_are(x_kind, w_kind, monkeypatch):
    plain, rotated = (Gemm(R, "bf16", "bf16") for R in (None, "rht128"))
    for row in (plain, rotated), (Gemm(None, "bf16", None if w_kind == "rtn_16x16" else "bf16"), plain):
        monkeypatch.setitem(RECIPES, "mine", Recipe(x_kind, w_kind, *row))
        linear, x, dy = layer("mine", 128, 128)
        y, dx, dw = step(linear, x, dy)
        a, b = (decode(quartet.QUANTIZERS[kind](t.detach(), None, None))
                for kind, t in ((x_kind, x), (w_kind, linear.weight)))
        for found, exact in (y, a @ b.T), (dx, dy @ b), (dw, dy.T @ a):
            assert (found - exact).norm() / exact.norm() < 2.0**-8       # bf16 results; operands times R
        with quartet.quantized_weights(linear): assert same([linear(x)], [y])

def test_noise_and_signs_are_shared_by_no_operands_layers_or_steps(monkeypatch):
    noise, signs, rotation_from = [], [], quartet.rotation_from
    monkeypatch.setattr(quartet, "uniform", lambda *a: noise.append(uniform(*a)) or noise[-1])
    monkeypatch.setattr(quartet, "rotation_from", lambda name, d: signs.append(d) or rotation_from(name, d))
    (one, x, dy), two = layer("tetrajet2", 128, 128), layer("tetrajet2", 128, 128)[0]
    for _ in range(2): two(one(x)).backward(dy)
    u, d = torch.stack([n[0].flatten() for n in noise]), torch.cat(signs)
    assert u.shape == (16, 128 * 128) and d.shape == (16, 128) and (d.abs() == 1).all()  # step, layer, GEMM
    assert_independent(u), assert_independent(d)

@every_4bit_recipe
@pytest.mark.parametrize("shape", [(128,), (50, 128), (2, 3, 128), (2, 1, 5, 128), (0, 128), (2, 0, 128)])
def test_leading_dimensions_are_tokens_and_missing_tokens_are_zeros(recipe, shape):
    linear, x, dy = layer(recipe, *shape, bias=True)
    y, dx, dw, db = step(linear, x, dy)
    pad = lambda t: F.pad(t.detach().reshape(-1, 128), (0, 0, 0, 128 - t.numel() // 128))  # 128 tokens
    expected = step(linear, pad(x).requires_grad_(), pad(dy))
    assert y.shape == shape and dx.shape == shape and torch.equal(db, dy.reshape(-1, 128).sum(0))
    assert same((pad(y - linear.bias), pad(dx), dw), (expected[0] - linear.bias, *expected[1:3]))

@every_4bit_recipe
def test_strides_dtypes_autocast_and_what_bf16_drops_make_no_difference(recipe):
    linear, x, dy = layer(recipe, 256, 128)
    expected, strided = step(linear, x, dy), x.detach().T.contiguous().T.requires_grad_()
    assert same(step(linear, strided, dy.T.contiguous().T), expected)
    linear.weight.data *= 1 + 2.0**-10                                   # rounded away: half an ulp is 2^-9
    assert same(step(linear, x.detach().mul(1 + 2.0**-10).requires_grad_(), dy * (1 + 2.0**-10)), expected)
    for dtype in (torch.bfloat16, torch.float64):
        y, dx, dw = step(linear, x.detach().to(dtype).requires_grad_(), dy.to(dtype))
        assert y.dtype == dx.dtype == dtype and same((y.float(), dx.float(), dw), expected)
    linear.bias = torch.nn.Parameter(normal(128))
    with torch.autocast("cpu", torch.bfloat16):                          # sets the dtype of y
        y, *inside = step(linear, x, dy.bfloat16())
        torch.manual_seed(0)
        graph = linear(x)
    assert same([y, *inside[:2]], [expected[0].bfloat16() + linear.bias.bfloat16(), *expected[1:]])
    assert same(inside, torch.autograd.grad(graph, (x, *linear.parameters()), dy.bfloat16()))

@pytest.mark.parametrize("recipes, backend", [(["nvidia", "bf16", "quintet"], "torch"),
                                              (["quintet", "rtn", "nvidia"], "triton")])
def test_compiled_is_eager_to_the_bit(recipes, backend):
    torch._dynamo.reset()
    x, dy = normal(20, 128).to(DEVICE).requires_grad_(), normal(20, 128, seed=1).to(DEVICE)
    model = torch.nn.Sequential(*[Linear(128, 128, r == "nvidia", r, backend, DEVICE) for r in recipes])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(step(compiled, x, dy), step(model, x, dy))
    if backend == "triton":
        with torch.autocast(DEVICE, torch.bfloat16):     # torch 2.11 made gradients 0 of a dtype kept by .to
            assert same(step(compiled, x, dy.bfloat16()), step(model, x, dy.bfloat16()))

@every_4bit_recipe
@pytest.mark.parametrize("where", [0, 1])                                # in x; in dy
def test_what_is_not_finite_comes_out_as_nan(recipe, where):
    linear, *inputs = layer(recipe, 128, 128)
    inputs[where].data[3, 5] = math.inf
    y, dx, dw = step(linear, *inputs)
    assert dw.isnan().all() and (dx if where else y).isnan().all()
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
    assert dict(model.named_modules()) == modules and dict(model.named_parameters()) == parameters  # is
    fresh = Linear(32, 128, True, "nvidia")
    fresh.load_state_dict(model["head"].state_dict())
    assert torch.equal(model["head"](x), fresh(x)) and calls == [1]
    assert quantize_model(model, "bf16", skip=["head", "layers"]) == [] and type(model["other"]) is not Linear
    root = torch.nn.Linear(32, 128)
    assert quantize_model(root, "quartet2") == [""] and type(root) is Linear and root(x).shape == (3, 128)

@pytest.mark.parametrize("recipe, skip, error", [
    ("quartet2", ["layer"], "'layer'"), ("quartet2", [], "layers.0.1.*128, 32.*out_features % 128"),
    ("nvidia", [], r"head\(32, 100\).*out_features % 16"), ("rtn", ["head", "layers.11"], "'layers.11'"),
    ("fp4", [], "fp4.*bf16, rtn, nvidia, four_six, tetrajet2, quartet2")])
def test_quantize_model_changes_nothing_where_it_cannot_change_all(recipe, skip, error):
    model = transformer(100)
    with pytest.raises(ValueError, match=error): quantize_model(model, recipe, skip)
    assert {getattr(m, "recipe", "rtn") for m in model.modules()} == {"rtn"}
    assert type(model["layers"][0][0]) is torch.nn.Linear

# ---- kernels.py: on a GPU, or interpreted ------------------------------------------------------------------
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")      # numpy's, of NaN

INPUTS = {"ragged": lambda: normal(3, 5, 144), "wide": lambda: wide(40), "below E4M3": lambda: wide(11),
          "zeros": lambda: torch.zeros(16, 128), "nothing": lambda: torch.zeros(0, 16),
          "tiny": lambda: torch.full((16, 128), 1e-42), "huge": lambda: with_value(wide(3), 1e30),
          "transposed": lambda: normal(128, 48).T, "unaligned": lambda: normal(2049)[1:].view(16, 128),
          "nan": lambda: with_value(wide(2), math.nan), "inf": lambda: with_value(wide(2), -math.inf)}

@every_quantizer
@pytest.mark.parametrize("kind", INPUTS)
def test_quantizers_and_kernels_give_the_same_bits_on_every_device(name, kind):
    x, rows, seed = INPUTS[kind](), 16 if "16x16" in name else 1, 2**63 - 1
    if math.prod(x.shape[:-1]) % rows: return
    arguments = {"ms_eden": (None, seed), "ms_eden_46": (None, seed, True)}
    arguments = arguments.get(name, (seed,) if name in quartet.NOISY else ((rows, 16),))
    mode = name.removesuffix("_16x16")                                   # sr_four_six has none
    f = getattr(kernels, "ms_eden" if name == "ms_eden_46" else mode) if mode in kernels.MODES else None
    for v in (x, x.bfloat16(), *[x.half()] * (kind == "wide")):
        expected, v, on_device = quantize(name, v, seed), v.to(DEVICE), torch.tensor(seed, device=DEVICE)
        assert same(quantize(name, v, on_device), expected) and (not f or same(f(v, *arguments), expected))
def unflat(t): return NVFP4(t[0].cpu(), t[1].cpu().view(torch.float8_e4m3fn), t[2].cpu()), t[3]

@pytest.mark.parametrize("quantizer, name, size", [                   # of some rows: sub-normal scales
    *((q, "rht128x3", 2.0**-16) for q in kernels.MODES if q != "four_six"),
    *(("rtn", name, 1) for name in ROTATIONS if name != "rht128x3")])
def test_one_read_rotates_and_quantizes_both_ways(quantizer, name, size):
    g = generator()
    x = torch.randint(-9, 10, (140, 256), generator=g).float()           # integers: x R is exact
    x[:, 128:] *= size
    x[128:] *= size
    seeds, (R1, n), (R2, n) = torch.tensor([5, 2**40 + 1]), rotation(name, g), rotation(name, g)
    arguments = lambda i, R: (quantizer, kernels.permuted(R).to(DEVICE), seeds[i].to(DEVICE))
    both = kernels.rotate_quantize([x.bfloat16().to(DEVICE)], *arguments(0, R1), *arguments(1, R2), 1 / n,
                                   True, True)
    (first, a), (second, b) = unflat(both[:4]), unflat(both[4:])
    assert same(first, quartet.QUANTIZERS[quantizer](x, R1, seeds[0]))
    expected = quartet.QUANTIZERS[quantizer](F.pad(x, (0, 0, 0, 116)).T, R2, seeds[1])
    assert same(second, expected._replace(tensor_scale=expected.tensor_scale / n))
    assert same([a, b], [decode(first, torch.bfloat16), decode(second, torch.bfloat16)])
    assert size == 1 or (second.block_scale.float() < 2.0**-6).any()

def plain(scale, R, C):
    """Swizzled scales, any dtype -> (R, C), by the formula of torch.nn.functional.scaled_mm."""
    r, c = torch.arange(R, device=scale.device)[:, None], torch.arange(C, device=scale.device)
    at = (r // 128 * -(-C // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    return scale.view(torch.uint8)[at].view(torch.float8_e4m3fn)

@pytest.mark.parametrize("shape", [(140, 96), (256, 320)])
@pytest.mark.parametrize("quantizer", ["rtn", "ms_eden"])
def test_swizzled_scales_are_the_plain_ones_elsewhere_and_zeros(quantizer, shape):
    x, seed = wide(11, *shape).bfloat16().to(DEVICE), torch.tensor(3, device=DEVICE)
    a, b = (kernels.quantize(x, quantizer, 1, seed, True, False, swizzled) for swizzled in (False, True))
    assert same([a[0], kernels.swizzled(a[1]), a[2]], b[:3])
    with FakeTensorMode() as fake:                                       # for torch.compile: the same shapes
        for real in a, b:
            guess = kernels.quantize(fake.from_tensor(x), quantizer, 1, None, True, False, real is b)
            assert [t.shape for t in guess] == [t.shape for t in real]

MIXED = {"mixed 1": Recipe("bf16", "four_six", Gemm("rht16", "bf16", "sr"), Gemm(None, "bf16", "rtn")),
         "mixed 2": Recipe("rtn", "bf16", Gemm(None, "sr", "bf16"), Gemm("rht16", "rtn", "bf16"), True),
         "mixed 3": Recipe("bf16", "bf16", Gemm(None, "bf16", "bf16"), Gemm(None, "bf16", "bf16"))}
@pytest.mark.parametrize("recipe, shape", [
    *((r, (20, 160, 128)) for r in [*RECIPES, *MIXED] if r != "bf16"),
    *((r, shape) for r in ("nvidia", "quartet2") for shape in ((140, 144, 128), (20, 160, 256)))])
def test_linear_gives_the_same_bits_with_kernels_and_on_fp4_tensor_cores(recipe, shape, monkeypatch):
    real, meta = F.scaled_mm, lambda t: [*map(meta, t)] if isinstance(t, list) else t.to("meta")
    def scaled_mm(a, b, a_scales, kinds, b_scales, *rest):                          # imitates FP4 ones
        real(meta(a), meta(b), meta(a_scales), kinds, meta(b_scales), *rest)        # accepts them
        return quartet.matmul(*(NVFP4(t.view(torch.uint8), plain(s, len(t), t.shape[1] // 8), tensor_scale)
                                for t, (s, tensor_scale) in ((a, a_scales), (b.T, b_scales))))
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    for name, row in MIXED.items(): monkeypatch.setitem(RECIPES, name, row)
    (M, K, N), integers = shape, lambda *s: torch.randint(-9, 10, s, generator=generator()).float().to(DEVICE)
    x, w, dy = integers(M, K), integers(N, K), integers(M, N)                           # x R is exact
    reference, linear = (Linear(K, N, recipe=recipe, backend=b, device=DEVICE) for b in ("torch", "triton"))
    reference.weight.data = linear.weight.data = w
    expected = step(reference, x.requires_grad_(), dy)
    for native in (False, True) if K % 32 == 0 and recipe not in MIXED else (False,):
        monkeypatch.setattr(kernels, "native", lambda w, row: native)
        assert same(step(linear, x, dy), expected)
    with quartet.quantized_weights(linear): assert same(step(linear, x, dy), expected)
    assert torch.equal(*(backend.on_grid(w.bfloat16(), recipe) for backend in (quartet, kernels)))
    if native: return
    torch._dynamo.reset()
    linear.compile(backend="aot_eager", fullgraph=True)
    assert same(step(linear, x, dy), expected)

def test_gemm_multiplies_what_it_is_given(monkeypatch):                             # interpreted: E4M3 scales
    if GPU and kernels.major(torch.device("cuda")) < 10: pytest.skip("no FP4 tensor cores here")
    def dot_scaled(self, a, a_scale, _, b, b_scale, *rest):
        a, b = (decode(NVFP4(torch.tensor(codes), torch.tensor(s.data).view(torch.float8_e4m3fn), 1.0))
                for codes, s in ((a.data, a_scale), (b.data.T, b_scale)))
        return TensorHandle(rest[-1].data + (a @ b.T).numpy(), rest[-1].dtype)
    if not GPU:
        from triton.runtime.interpreter import InterpreterBuilder as builder, TensorHandle
        if not hasattr(builder, "create_dot_scaled"): pytest.skip("Triton 3.6 interprets no tl.dot_scaled")
        monkeypatch.setattr(builder, "create_dot_scaled", dot_scaled)
    a, b = (rtn(normal(*s).to(DEVICE)) for s in ((140, 288), (1200, 288)))
    exact, magnitudes = (f(decode(a).double()) @ f(decode(b).double()).T for f in (torch.clone, torch.abs))
    # bf16 rounds by 2^-8 (the interpreter truncates: 2^-7), 288 float32 sums by 288 * 2^-24 of magnitudes
    bound = 2.0 ** (-8 if GPU else -7) * exact.abs() + 2.0**-15 * magnitudes
    assert ((kernels.gemm(a, b) - exact).abs() <= bound).all()

@pytest.mark.parametrize("recipe, backend", [*((r, "torch") for r in RECIPES if r != "bf16"), *(
    (r, "triton") for r in ("nvidia", "quartet2"))])
def test_weights_quantized_once_change_nothing_and_must_not_change(recipe, backend):
    (linear, x, dy), places = layer(recipe, 50, 128, device=DEVICE), set()
    quantize_model(linear, recipe, backend=backend)
    for _ in range(2):                                                   # .data changes no version
        expected, weight = step(linear, x, dy), linear.weight.data
        with quartet.quantized_weights(linear):
            linear.weight.data = weight * math.nan
            assert same(step(linear, x, dy), expected)                   # of the weight as it was
        linear.weight.data = weight * 2
        places.add(tuple(t.data_ptr() for t in linear.weight_place))
    with pytest.raises(RuntimeError, match="a weight changed"), quartet.quantized_weights(linear):
        with torch.no_grad(): linear.weight.mul_(2)
    assert len(places) == 1

needs_gpu = pytest.mark.skipif(not GPU, reason="PyTorch sees no GPU here")

@needs_gpu
@every_4bit_recipe
def test_a_step_runs_on_any_stream_and_gpu_and_as_a_cuda_graph_without_synchronisation(recipe):
    def prepared(device):
        linear = functools.partial(Linear, recipe=recipe, backend="triton", device=device)
        torch.manual_seed(1)
        model = torch.nn.Sequential(linear(384, 256), linear(256, 128))
        def run(x, dy): model(x).backward(dy)
        def gradients(run):
            for p in model.parameters(): p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
            torch.manual_seed(0)
            run(x, dy)
            found = [p.grad.clone() for p in model.parameters()]
            torch.cuda.synchronize()                                     # streams share the gradients
            return found
        x, dy = normal(256, 384).to(device), normal(256, 128).to(device)
        return run, gradients, (x, dy)
    run, gradients, args = prepared("cuda:0")
    expected, stream = gradients(run), torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream): there = gradients(run)
        graph = train_gpt.as_graph(run, *args)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert same(there, expected) and same(gradients(graph), expected)
    run, gradients, _ = prepared(f"cuda:{torch.cuda.device_count() - 1}")     # while GPU 0 is the current one
    assert same(gradients(run), expected)

@needs_gpu
def test_offsets_beyond_2_31_and_long_rows():
    x = torch.randn(2**17 + 128, 16384, dtype=torch.bfloat16, device="cuda")
    R, seed = kernels.permuted(rotation("rht128")[0]).cuda(), torch.tensor(0, device="cuda")
    last = x[-128:].contiguous()
    assert torch.equal(kernels.rtn(x).codes[-128:], kernels.rtn(last).codes)
    a, b = (kernels.rotate_quantize([t], "rtn", R, seed, "rtn", R, seed, 1.0, True, True) for t in (x, last))
    assert torch.equal(a[0][-128:], b[0]) and torch.equal(a[3][-128:], b[3])
    assert torch.equal(a[4][:, -64:], b[4]) and torch.equal(a[7][:, -128:], b[7])

def test_a_recipe_without_kernels_takes_the_reference(monkeypatch):
    monkeypatch.setitem(quartet.QUANTIZERS, "mine", lambda x, R, seed: rtn(x))
    monkeypatch.setitem(RECIPES, "mine", RECIPES["quartet2"]._replace(x="mine"))
    monkeypatch.setattr(quartet, "kernels", kernels)
    assert Linear(128, 128, recipe="mine", backend="torch")(torch.ones(2, 128)).shape == (2, 128)
    with pytest.raises(ValueError, match="'triton' needs a mode .* of 'mine'.*'torch'"):
        Linear(128, 128, recipe="mine", backend="triton")
    for *case, backend in ("cuda", "rtn", "triton"), ("cuda", "mine", "torch"), ("cpu", "rtn", "torch"):
        assert quartet.resolve("auto", *case) == backend

def test_the_check_of_kernels_passes_and_sees_a_wrong_bit(monkeypatch, capsys):
    assert bench.check(DEVICE, [(20, 128)])
    monkeypatch.setitem(quartet.QUANTIZERS, "rtn", quartet.QUANTIZERS["four_six"])
    assert not bench.check(DEVICE, [(16, 128)]) and "16 x 128, rtn: codes" in capsys.readouterr().out

def test_kernels_compile_for_every_target_without_spills(tmp_path):
    lines = {"sm_90a": 9, "sm_100a": 16, "sm_120a": 16}                  # with FP4, a prediction too
    running = {target: subprocess.Popen(
        [sys.executable, HERE / "kernels.py", f"--target={target}", f"--dump={tmp_path}"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for target in lines}
    for target, process in running.items():
        out, warnings = process.communicate()
        assert process.returncode == 0 and out.count("\n") == lines[target], out + warnings
        assert f".target {target}" in (tmp_path / f"{target}-both-ms_eden.ptx").read_text()

# ---- README.md ---------------------------------------------------------------------------------------------
def test_commands_of_the_readme_run(tmp_path):
    blocks = re.findall(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    commands = [shlex.split(c, comments=True) for block in blocks for c in re.split("&&|\n", block) if c]
    commands = [c for c in commands if c[1] != "install"]
    assert len(commands) > 6 and all(c[0] == "python" for c in commands)
    short = ("--layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --tokens_per_step=128"
             " --steps=2 --eval_tokens=128 --sample_tokens=1 --device=cpu")
    def run(commands):
        for _, script, *words in commands:
            command = [sys.executable, HERE / script, *words, *short.split() * (script == "train_gpt.py")]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                                  env=ENVIRONMENT | dict(OMP_NUM_THREADS="1"))      # two commands at a time
            assert done.returncode == 0 and done.stdout, (command, done.stderr)
    trains = [c for c in commands if "mine" in " ".join(c)]                              # need each other
    with ThreadPoolExecutor() as pool:
        [*pool.map(run, (trains, [c for c in commands if c not in trains]))]

def test_ci_installs_by_the_line_of_the_readme_and_runs_its_commands_there():
    readme, lines = (HERE / "README.md").read_text(), (HERE / ".ci/run").read_text().splitlines()
    install = re.search(r"^(pip install .*) && python train_gpt.py$", readme, re.M)[1]
    assert "`python -m pytest`" in readme
    begin, end = lines.index(install), lines.index("deactivate")
    assert begin < lines.index("python -m pytest") < end
    assert any(line.startswith("python train_gpt.py ") for line in lines[begin:end])

def numbers_apart(text):
    """Text -> the text with # for each number, and the numbers with the size of their last digits."""
    number = r"-?\d+(?:\.\d+)?"
    found = [(float(n), 10.0 ** -len(n.partition(".")[2])) for n in re.findall(number, text)]
    return re.sub(r"\s+", " ", re.sub(number, "#", text)), found

def test_the_article_quotes_what_it_prints():
    """Sections end with their output: word for word; numbers within 2%, or 2 in the last digit, of another CPU's."""
    article = (HERE / "quartet.py").read_text()
    quoted = re.findall(r"^# ---- (\d+)\. (?:.|\n)*?^# Printed:\n((?:#     .*\n)+)", article, re.M)
    run = subprocess.run([sys.executable, HERE / "quartet.py"], capture_output=True, text=True, cwd="/")
    printed = re.split(r"^(\d+)\. .*\n", run.stdout, flags=re.M)[1:]
    assert [n for n, _ in quoted] == printed[::2] == [str(n) for n in range(1, 13)]
    for (_, comment), text in zip(quoted, printed[1::2]):
        (words, ours), (expected, theirs) = numbers_apart(comment.replace("#     ", "")), numbers_apart(text)
        assert words == expected
        assert all(abs(a - b) <= max(0.02 * abs(b), 2.01 * digit) for (a, digit), (b, _) in zip(ours, theirs))
