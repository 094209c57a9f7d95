"""The tests of quartet.py, in its order; then of kernels.py, and of what README.md promises.

Each test is named for the property that it shows. A tolerance is derived where it stands, or else bits are
compared. "5 sigma" are 5 standard errors: chance alone goes beyond them once in 1.7 million times. Seeds are
fixed, so what passes once passes always. Tests of train_gpt.py and of data/ are in data/tests.
"""
import contextlib
import copy
import functools
import itertools
import math
import operator
import os
import re
import shlex
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import bfloat16, equal, float8_e4m3fn, library, nn, tensor, uint8
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
sys.path[:0] = [str(HERE / "data/evidence"), str(HERE / "data/tests")]
from background import in_background, python, scripts      # before the environment changes

if not GPU:
    # Kernels then run in Python. Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl

import kernels
import quartet
import train_gpt
from quartet import (
    NVFP4, RECIPES, ROTATIONS, Gemm, Linear, Recipe, decode, e2m1, e4m3, four_six, ms_eden, pack, philox,
    quantize_model, rotate, rotation, round_scale, rtn, scale_search, sr, transpose, uniform, unpack)

import bench
import demonstrate
from small_runs import one_thread      # a fixture: tensors are small here, too

# The interpreter computes both branches of a tl.where, and numpy warns of the one that is not taken.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
pytest_plugins = ["background"]
parametrize = pytest.mark.parametrize
needs_gpu = pytest.mark.skipif(not GPU, reason="PyTorch sees no GPU here")
needs_compiler = pytest.mark.skipif(
    not GPU and not shutil.which("g++"), reason="torch.compile needs a C++ compiler for a CPU")


# ---- What the tests share: grids, inputs, comparisons, statistics ------------------------------------------

def e4m3_value(byte):
    """What a byte of E4M3, 0 to 126, stands for: 4 bits of exponent, 3 of mantissa. (127 is NaN.)"""
    exponent, mantissa = divmod(byte, 8)
    if exponent == 0:
        return mantissa * 2.0**-9
    return (8 + mantissa) * 2.0 ** (exponent - 10)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])                # by code, 0 to 7
E4M3 = np.array([e4m3_value(byte) for byte in range(127)])   # by byte
# What round_scale makes: 4 significant bits.
FOUR_BITS = np.array([digits * 2.0**power for power in range(-129, 60) for digits in range(8, 16)])

# The functions of (x, R, seed) under test, and one that is known to be biased.
QUANTIZERS = {name: f for name, f in quartet.QUANTIZERS.items() if name != "bf16"}
QUANTIZERS["sr_four_six"] = lambda x, R, seed: demonstrate.sr_four_six(x, seed)
RECIPES_4BIT = [recipe for recipe in RECIPES if recipe != "bf16"]
every_quantizer = parametrize("name", QUANTIZERS)
every_4bit_recipe = parametrize("recipe", RECIPES_4BIT)


@pytest.fixture(scope="session", autouse=True)
def list_what_is_skipped(request):
    """As with pytest -rs."""
    request.config.pluginmanager.getplugin("terminalreporter").reportchars += "s"


@pytest.fixture(scope="module", autouse=True)
def faster_interpreter():
    """Triton's interpreter prepares triton.language in each call of a @jit function, half of its time.

    Once a launch is enough: it is prepared as long as static_print is Python's print. (Triton's own functions
    know it as core, ours as tl.)
    """
    from triton.runtime import interpreter
    prepare = interpreter._patch_lang

    def prepare_once(fn):
        if fn.__globals__.get("tl", tl.core).static_print is not print:
            return prepare(fn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not GPU:
        pytest.skip("PyTorch sees no GPU here")
    return request.param


@contextlib.contextmanager
def no_synchronisation():
    """Within it, what makes the CPU wait for the GPU is an error."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    """Numbers drawn from N(0, 1)."""
    return torch.randn(*shape, generator=generator(seed))


def integers(*shape, seed=0):
    """Whole numbers from -9 to 9, as float32: sums of them, as in x R, are exact in any order."""
    return torch.randint(-9, 10, shape, generator=generator(seed)).float()


def wide(octaves, rows=32, K=256):
    """N(0, 1) (rows, K), rows times powers of two, 2^-octaves to 2^octaves: block scales of all kinds."""
    powers = torch.linspace(-octaves, octaves, rows).round()
    return normal(rows, K) * 2.0 ** powers[:, None]


def with_value(x, value):
    """x (M, K) with one element replaced."""
    x = x.clone()
    x[3, 5] = value
    return x


def quantize(name, x, seed=0):
    """x by a name of QUANTIZERS, not rotated -> NVFP4."""
    return QUANTIZERS[name](x, None, seed)


def nearest(v, grid):
    """The oracle: of an ascending grid the value nearest to |v|, with v's sign; ties: the even index."""
    magnitude = v.abs().double().numpy()
    middle = (grid[1:] + grid[:-1]) / 2
    # The two differ at ties only.
    low = np.searchsorted(middle, magnitude, "left")
    high = np.searchsorted(middle, magnitude, "right")
    even = np.where(low % 2 == 0, low, high)
    return torch.from_numpy(grid[even]).float().copysign(v)


def all_of(t):
    """Dtype, shape and bytes of a tensor: what `same` compares. (NaN equals NaN, and 0.0 is not -0.0.)"""
    t = t.detach().cpu()
    return t.dtype, t.shape, t.reshape(-1).view(uint8).numpy().tobytes()


def same(a, b):
    """Whether two sequences hold tensors of the same dtypes, shapes and bits."""
    return [all_of(t) for t in a] == [all_of(t) for t in b]


def assert_independent(rows):
    """No two of the rows (n, samples) correlate, to 5 sigma, and none is constant.

    The odds: of 5,000 pairs of independent rows, one is beyond 5 sigma in one of 350 seeds.
    """
    assert rows.std(-1).min() > 0
    correlations = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / rows.shape[1] ** 0.5


def assert_mean(draws, target, span):
    """The mean over draws (B, ...) is target, within 5 sigma and a term for draws that are not normal.

    The term is that of the empirical Bernstein inequality (Maurer, Pontil 2009), which holds for any draws
    from an interval of size span. Its odds are those of 5 sigma: exp(-5^2 / 2), that is 12.5 nats.
    """
    B = len(draws)
    bound = 5 * draws.std(0) / B**0.5 + 7 / 3 * 12.5 * span / (B - 1)
    assert ((draws.mean(0) - target).abs() <= bound).all()


def relative(t, x):
    """t, x (M, K) -> sum(t) / sum(x^2), and its standard error, from the scatter over tiles of 16 x 128."""
    def tile_sums(v):
        return v.double().view(len(v) // 16, 16, -1, 128).sum((1, 3))

    t = tile_sums(t)
    squares = tile_sums(x.square())
    share = t.sum() / squares.sum()
    sigma = (t - share * squares).std() * t.numel() ** 0.5 / squares.sum()
    return share.item(), sigma.item()


def convergence(draws, target):
    """B draws (M, K) -> B times the squared error of their mean, over that of one draw; and its sigma.

    It is 1 in the mean if draws are unbiased, and B if all are equal.
    """
    B = len(draws)
    draws = torch.stack(list(draws)).double()
    one = (draws - target).square().sum(-1).mean(0)
    excess = B * (draws.mean(0) - target).square().sum(-1) - one       # in the mean 0 if unbiased
    sigma = excess.std() * len(target) ** 0.5 / one.sum()
    return (1 + excess.sum() / one.sum()).item(), sigma.item()


# ---- Commands that are run ---------------------------------------------------------------------------------
#
# In processes of their own, while other tests run.

@in_background
def compiled_for_fp4(directory):
    """README.md's command to compile for a Blackwell -> a directory with the results, and what it prints."""
    command, = re.findall(r"^python (kernels\.py .*?) *#", README, re.M)
    done = python(*shlex.split(command), f"--dump={directory}", cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


# What makes a run of train_gpt.py take seconds.
SHORT = """--layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --tokens_per_step=128
           --steps=2 --eval_tokens=128 --sample_tokens=1 --device=cpu""".split()


@in_background
def commands_of_the_readme(directory):
    """Run all other commands of README.md, but for the installation -> what each script has printed last."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line for block in blocks for line in re.split("&&|\n", block) if line]
    commands = []
    for line in lines:
        program, script, *words = shlex.split(line, comments=True)
        if script in ("install", "kernels.py"):
            continue
        assert program == "python"
        if script == "train_gpt.py":
            words += SHORT
        commands.append([HERE / script, *words])
    assert len(commands) > 6
    return dict(zip([script.name for script, *_ in commands], scripts(commands, directory)))


# ---- 1. The two small floats -------------------------------------------------------------------------------
#
# The grids are small enough to try all their values, ties and gaps.

every_grid = parametrize(
    "rounding, grid", [(e2m1, E2M1), (e4m3, E4M3), (round_scale, FOUR_BITS)], ids=["e2m1", "e4m3", "scale"])


@every_grid
def test_rounding_goes_to_the_nearest_with_ties_to_even(rounding, grid):
    # All values, all ties, and their neighbours among float32.
    v = torch.from_numpy(np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])).float()
    below = v.nextafter(tensor(0.0))
    above = v.nextafter(tensor(math.inf))
    v = torch.cat([v, below, above])
    v = v[v >= grid[0]]
    assert equal(rounding(v), nearest(v, grid))
    assert equal(rounding(-v), -nearest(v, grid))


@every_grid
def test_stochastic_rounding_goes_to_a_neighbour_by_u_without_bias(rounding, grid):
    # u runs through 0/m, 1/m .. (m - 1)/m. Of these, m f rounded up lie below a fraction f: the mean is exact
    # to a gap / m, and wholly where f = 0.
    m = 2**10
    low = tensor(grid[:-1])
    high = tensor(grid[1:])
    u = (torch.arange(m) / m)[:, None].expand(m, len(low))
    for f, sign in itertools.product((0, 1e-3, 0.25, 0.3, 0.5, 0.999), (1, -1)):
        v = (low + f * (high - low)).float()
        r = sign * rounding(sign * v.expand(m, -1), u).double()
        assert ((r == low) | (r == high)).all()
        assert ((r.mean(0) - v).abs() * m <= (high - low) * (f > 0)).all()


@parametrize("u", [
    None,
    torch.zeros(1),
    torch.full((1,), 1 - 2.0**-24),
], ids=["none", "0", "1-"])
def test_rounding_saturates_keeps_nan_and_makes_no_negative_zero(u):
    for rounding, top in (e2m1, 6.0), (e4m3, 448.0):
        beyond = tensor([top * 1.01, top * 1e30, math.inf])
        assert (rounding(beyond, u) == top).all()
        assert (rounding(-beyond, u) == -top).all()
    assert round_scale(tensor([math.inf, -math.inf]), u).isnan().all()
    for rounding in e2m1, e4m3, round_scale:
        assert rounding(tensor([math.nan]), u).isnan()
        r = rounding(tensor([0.0, -0.0, -1e-45, -1e-3, -0.2]), u)
        assert not (r.signbit() & (r == 0)).any()


# ---- 2. NVFP4 tensors --------------------------------------------------------------------------------------
#
# Every byte is decoded; every quantizer keeps what the class promises, whatever it is given.

@parametrize("tensor_scale", [2.0**-123, 1.0, 2.0**110])
def test_every_byte_with_every_scale_decodes_exactly_in_float32_and_bf16_and_packs_back(tensor_scale):
    byte = torch.arange(256, dtype=uint8)
    code = torch.stack([byte & 15, byte >> 4], -1)                     # the low half comes first
    # Each row holds all bytes, 32 blocks, with one scale.
    scale = torch.arange(127, dtype=uint8).view(float8_e4m3fn)
    t = NVFP4(byte.expand(127, 256), scale[:, None].expand(127, 32), tensor(tensor_scale))
    q = np.array([*E2M1, *-E2M1])[code.flatten()]
    exact = torch.from_numpy(np.outer(E4M3, q)) * tensor_scale
    assert equal(decode(t).double(), exact)
    assert equal(decode(t, bfloat16).double(), exact)

    usable = (code != 8).all(-1)                                       # 8 is -0.0, which no quantizer makes
    assert equal(pack(unpack(byte))[usable], byte[usable])


SIZED = {
    "wide": wide(40),
    "one huge value": with_value(normal(32, 128), -1e30),
    "small": normal(2, 16, 128) * 1e-30,
    "about TINY": wide(15) * 2.0**-119,
    "below TINY": torch.full((16, 128), 1e-42),
}


@every_quantizer
@parametrize("x", SIZED.values(), ids=SIZED)
def test_quantizers_return_what_nvfp4_promises_exact_in_bf16(name, x):
    t = quantize(name, x)
    *lead, K = x.shape
    assert t.codes.dtype == uint8
    assert t.codes.shape == (*lead, K // 2)
    assert not (t.codes & 15 == 8).any()                               # no -0.0
    assert not (t.codes >> 4 == 8).any()

    assert t.block_scale.dtype == float8_e4m3fn
    assert t.block_scale.shape == (*lead, K // 16)
    assert (t.block_scale.float() >= 0).all()
    # The largest is in the upper binade, unless the tensor scale is the least there is.
    assert x.abs().max() < 2.0**-112 or 240 <= t.block_scale.float().max() <= 448

    assert t.tensor_scale.dtype == torch.float32
    assert t.tensor_scale.shape == ()
    assert t.tensor_scale >= 2.0**-123
    assert math.frexp(t.tensor_scale)[0] == 0.5                        # a power of two

    assert decode(t).isfinite().all()
    assert equal(decode(t, bfloat16).float(), decode(t))


@every_quantizer
def test_quantizers_take_any_float_with_any_strides(name):
    for dtype in torch.float16, bfloat16, torch.float64:
        x = normal(16, 2, 128).to(dtype).transpose(0, 1)
        assert same(quantize(name, x), quantize(name, x.float().contiguous()))


@every_quantizer
def test_zeros_and_nothing_have_tensor_scale_1_and_no_other_bit(name):
    for x in torch.zeros(16, 128), -torch.zeros(16, 128), torch.zeros(0, 128), torch.zeros(16, 0):
        t = quantize(name, x)
        assert t.tensor_scale == 1
        assert not t.codes.any()
        assert not t.block_scale.float().any()
        assert same([decode(t)], [x.abs()])


@every_quantizer
def test_powers_of_two_move_the_tensor_scale_only(name):
    # Decisions are made in a block's own unit: no square overflows at 2^100 or vanishes at 2^-100.
    x = normal(64, 512, seed=1)
    expected = quantize(name, x)
    for power in 100, -100, -119:                                      # -119 meets the least tensor scale
        t = quantize(name, x * 2.0**power)
        assert same([t.codes], [expected.codes])
        assert equal(decode(t) * 2.0**-power, decode(expected))
        assert t.tensor_scale == max(expected.tensor_scale * 2.0**power, 2.0**-123)


@every_quantizer
@parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_makes_all_decode_to_nan(name, value):
    x = with_value(normal(32, 256), value)
    R, _ = rotation("rht128", generator())
    for t in QUANTIZERS[name](x, None, 0), QUANTIZERS[name](x, R, 0):
        assert decode(t).isnan().all()
        assert decode(t, bfloat16).isnan().all()
        # Nothing is left that could be mistaken for a number.
        assert not t.codes.any()
        assert not t.block_scale.view(uint8).any()


# (4/6: but for ties to the last bit.)
@parametrize("f, used", [(rtn, {6.0}), (four_six, {4.0, 6.0})])
def test_16x16_blocks_have_the_same_codes_transposed(f, used):
    # 4/6 takes 6 in the left half, and 4 in the right one, where 4.0 is frequent.
    x = normal(128, 256)
    right = x[:, 128:]
    x[:, 128:] = torch.where(right > 0, 4.0, right.clamp(-4, 4))
    t = f(x, (16, 16))
    assert same(transpose(t), f(x.T, (16, 16)))
    assert {unpack(half).max().item() for half in t.codes.chunk(2, 1)} == used


# ---- 3. Blocks and scales ----------------------------------------------------------------------------------
#
# What decides something is specified to the bit. Here it is computed again, number by number.

def halving_sum(v):
    """The sum of a list, 2^k long: the first half plus the second, element by element, and so on."""
    while len(v) > 1:
        half = len(v) // 2
        v = [a + b for a, b in zip(v[:half], v[half:])]
    return v[0]


def test_sums_and_quotients_are_rounded_as_stated(device):
    t = normal(2, 16, 3, 16) * 10.0 ** normal(2, 16, 3, 16, seed=1)
    # 2 x 3 blocks of 16 x 16: along each row first, then over the rows.
    expected = [[halving_sum([halving_sum(list(row[column])) for row in rows]) for column in range(3)]
                for rows in t.numpy()]
    found = quartet.block_sum(t.to(device)).cpu()
    assert equal(found.view(2, 3), tensor(np.array(expected)))

    found = quartet.divide_by(t.to(device), 6.0).cpu()
    assert equal(found, torch.from_numpy(t.numpy() / np.float32(6)))


@parametrize("eighths", range(8, 16))
def test_the_largest_block_scale_is_stored_as_256_to_448_or_as_240(eighths):
    # Of all mantissas only 1.875 does not fit: 1.875 * 256 > 448.
    t = rtn(torch.full((1, 16), 6 * eighths / 8))
    expected = (1 / 256, 32 * eighths) if eighths < 15 else (1 / 128, 240)
    assert (t.tensor_scale.item(), t.block_scale.float().item()) == expected


# ---- 4. Round to nearest (RTN) -----------------------------------------------------------------------------
#
# By hand; and by the formula of others, where their tensor scale happens to be a power of two.

def test_a_block_by_hand():
    x = tensor([[6, -6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -0.3, 0, -0.0, 4.9, 1e-9, -3]])
    t = rtn(x)
    assert t.codes.tolist() == [[0xF7, 0x66, 0x44, 0x22, 0x00, 0x09, 0x60, 0xD0]]
    # The scale is 1 = 256 * 2^-8, and 256 is byte 0x78.
    assert t.block_scale.view(uint8).tolist() == [[0x78]]
    assert t.tensor_scale == 2.0**-8


def peers_formula(b, top, tensor_scale):
    """Blocks b (..., 16) as others quantize them -> q, s, squared errors, and whether s is normal in E4M3.

    s = E4M3(amax / top / tensor scale), the quotient in float32; q = the values nearest to b / s / tensor
    scale, in float64.
    """
    exact = b.abs().amax(-1) / top / tensor_scale
    s = nearest(exact, E4M3).double()
    scale = s[..., None] * tensor_scale
    q = nearest(b / scale.clamp(min=1e-99), E2M1).double()
    return q, s, (q * scale - b).square().sum(-1), exact >= 2.0**-6


@parametrize("k", [-20, 0, 9])
@parametrize("f, most", [(rtn, 448), (four_six, 256)])
def test_codes_and_scales_equal_the_peers_formula(f, most, k):
    # Peers take amax / (6 * most) for the tensor scale: 2^k here. Some block scales are below 2^-6.
    x = wide(7) * 2.0 ** (k + 1)
    x[0, 0] = 6 * most * 2.0**k
    b = x.view(len(x), -1, 16)
    q, s, error, sure = peers_formula(b, 6.0, 2.0**k)
    if f is four_six:
        q4, s4, error4, _ = peers_formula(b, 4.0, 2.0**k)
        four = error4 < error
        q = torch.where(four[..., None], q4, q)
        s = torch.where(four, s4, s)
        # Errors are off by 7 * 2^-24 of themselves in float32 (a difference, counted twice, a square, 4
        # sums). Within twice that the choice may differ.
        sure = sure & ((error4 / error - 1).abs() > 14 * 2.0**-24)
    t = f(x)
    assert t.tensor_scale == 2.0**k
    assert 0.8 < sure.float().mean() < 1
    assert equal(unpack(t.codes).view(q.shape)[sure].double(), q[sure])
    assert equal(t.block_scale.double()[sure], s[sure])


# ---- 5. Four Over Six (4/6), and a search over scales ------------------------------------------------------
#
# The choice among scales, made again in float64.

def test_a_tie_of_4_over_6_goes_to_6():
    # 6 and 3 are exact with amax to 6; as 4 and 2, they are exact, too.
    assert four_six(tensor([6.0, 3.0] * 8)).codes.tolist() == [0x57] * 8


def test_scale_search_takes_the_scale_of_least_error():
    few = F.pad(normal(4, 16), (0, 496))                               # one block of values, then zeros
    x = torch.cat([normal(64, 512), normal(64, 512, seed=1) ** 3, few])
    b = x.view(len(x), -1, 16).double()

    # All candidates in float64, (..., 5, 16).
    amax = b.abs().amax(-1)
    grid = tensor(FOUR_BITS)
    six = torch.searchsorted(grid, nearest(amax / 6, FOUR_BITS).double())
    s = grid[six[..., None] + tensor([-1, 0, 1, 4, 5])] * (amax > 0)[..., None]
    q = nearest(b[..., None, :] / s[..., None].clamp(min=1e-99), E2M1).double()
    least = (q * s[..., None] - b[..., None, :]).square().sum(-1).amin(-1)

    # The choice is made by errors in float32, each off by 7 * 2^-24 as in 4/6: so it may miss by 14 * 2^-24.
    # Twice that is allowed.
    found = (decode(scale_search(x)).view(b.shape).double() - b).square().sum(-1)
    assert (found <= least * (1 + 28 * 2.0**-24)).all()
    assert (found >= least * (1 - 1e-12)).all()
    assert found.sum() < (decode(four_six(x)) - x).square().sum()


# ---- 6. Noise, and stochastic rounding (SR) ----------------------------------------------------------------
#
# Of the hash, its published answers; of noise, its independence; of SR, its mean.

def philox_by_hand(seed, counter):
    """Philox4x32 of 7 rounds as Salmon et al. write it, in Python's integers -> four words."""
    c = [counter % 2**32, counter >> 32, 0, 0]
    key = [seed % 2**32, seed % 2**64 >> 32]
    for _ in range(7):
        a = c[0] * 0xD2511F53
        b = c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ key[0], b % 2**32, a >> 32 ^ c[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


def test_philox_known_answers_and_all_64_bits_of_seed_and_counter():
    # kat_vectors of Random123
    assert philox_by_hand(0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    counters = [0, 1, 2**32 - 1, 2**32, 2**40 + 17]
    for seed in 0, 1, 2**32, 0x0123456789ABCDEF, 2**63 + 12345, 2**64 - 1, -1, -2**63:
        expected = [philox_by_hand(seed, counter) for counter in counters]
        as_int64 = tensor((seed + 2**63) % 2**64 - 2**63)
        assert philox(seed, tensor(counters)).tolist() == expected
        assert philox(as_int64, tensor(counters)).tolist() == expected


# sr draws for each value, ms_eden for each block of 16.
@parametrize("name, step", [("sr", 1), ("ms_eden", 16)])
def test_noise_is_shared_by_no_rows_seeds_or_neighbours(name, step):
    # All values are equal: errors show the noise.
    x = torch.ones(16, 1024 * step)
    noise = [decode(quantize(name, x, seed))[:, ::step] for seed in (0, 1, 2, 2**32, -1, 10**9)]
    assert_independent(torch.cat(noise))
    neighbours = noise[0].reshape(-1, 64).T
    assert_independent(neighbours)


def test_sr_of_an_amax_just_above_6_does_not_round_beyond_6():
    # Of a float32 next to 6 the scale is 1, and the quotient above 6. This seed's first u is 2^-24.
    x = torch.zeros(1, 16)
    x[0, 0] = tensor(6.0).nextafter(tensor(7.0))
    seed = 2303947
    assert uniform(seed, x, x)[0][0, 0] == 2.0**-24
    for v in x, -x:
        expected = sr(v, seed)
        assert decode(expected)[0, 0] == 6 * v[0, 0].sign()
        assert same(kernels.sr(v.to(DEVICE), seed), expected)


def test_sr_never_clips():
    # An octave of amaxes; and those next to which the rounding of the scale turns.
    turns = tensor([(digits + 0.5) / 8 * 2.0**e * 96 / 17 for digits in range(8, 16) for e in (-3, -2)])
    steps = torch.arange(-9, 10, dtype=torch.int32)
    near = (turns.view(torch.int32)[:, None] + steps).view(torch.float32)
    amax = torch.cat([torch.linspace(1, 2, 2**16), near.flatten()])
    t = sr(F.pad(amax[:, None], (0, 15)), 0)
    scale = t.block_scale.float()[:, 0] * t.tensor_scale
    # SR_MAX and the quotient are rounded to float32: 2^-23. Upwards, a scale may go from 8.5/8 to 9/8, by
    # 18/17, and it is 17/16 of amax / 6 by design: 18/16.
    assert (6 * scale >= amax * (1 - 2.0**-23)).all()
    assert (6 * scale <= amax * 18 / 16).all()


# Rows from 1 to 2^-20 of the largest: scales as in E4M3's normal numbers, its sub-normal ones, and below.
SIZES = 2.0 ** -tensor([0.0, 1, 9, 13, 15, 16, 17, 18, 19, 20])


def draws_of_every_scale(f):
    """4096 draws, by f, of x (10, 128), which is `SIZES` times N(0, 1).

    -> draws (4096, 10, 8, 16), x in blocks (10, 8, 16), amaxes (10, 8, 1), and the step of sub-normal scales.
    """
    x = normal(10, 128) * SIZES[:, None]
    t = f(x.expand(4096, 10, 128))                     # rows draw apart
    # Many scales are sub-normal, and many are not.
    assert 0.3 < (t.block_scale.float() < 2.0**-6).float().mean() < 0.9
    b = x.view(10, 8, 16)
    draws = decode(t).view(-1, 10, 8, 16)
    amax = b.abs().amax(-1, keepdim=True)
    step = 2.0**-9 * t.tensor_scale
    return draws, b, amax, step


def test_sr_is_unbiased_element_by_element_also_at_sub_normal_scales():
    draws, b, amax, step = draws_of_every_scale(lambda x: sr(x, 0))
    # A value is at most 6 scales of at most 9/8 amax / 6 and a step.
    assert_mean(draws, b, span=2 * (9 / 8 * amax + 6 * step))


# ---- 7. Rotations ------------------------------------------------------------------------------------------
#
# Entries are integers, so what is said of R holds exactly.

@pytest.fixture
def signs(monkeypatch):
    """The signs of the rotations that a test makes, as a list that grows."""
    signs = []
    rotation_from = quartet.rotation_from

    def spy(name, d):
        signs.append(d)
        return rotation_from(name, d)

    monkeypatch.setattr(quartet, "rotation_from", spy)
    return signs


@parametrize("name, size, rounds", [
    ("rht16", 16, 1), ("rht32", 32, 1), ("rht128", 128, 1), ("rht128x2", 128, 2), ("rht128x3", 128, 3)])
def test_rotations_are_integer_cancel_in_a_product_and_begin_with_new_signs(name, size, rounds, signs):
    # Sylvester's matrix, and of it what lies in blocks along the diagonal.
    H = functools.reduce(torch.kron, [tensor([[1.0, 1.0], [1.0, -1.0]])] * 7)
    H *= torch.block_diag(*[torch.ones(size, size)] * (128 // size))
    g = generator()
    x = torch.randint(-4, 5, (2, 3, 2, 128), generator=g).float()      # sums of integers are exact
    for _ in range(20):
        R, n = rotation(name, g)
        expected = torch.eye(128)
        for d in signs[-1][:rounds]:
            expected = expected @ torch.diag(d) @ H
        assert equal(R, expected)
        assert (R.bfloat16() == R).all()
        assert isinstance(n, int)
        assert n == size**rounds
        assert equal(R @ R.T, n * torch.eye(128))
        assert equal(rotate(x.flatten(2), R), (x @ R).flatten(2))
    assert rotate(x, None) is x
    # All signs are new, also those of one R.
    assert_independent(torch.cat(signs))


def test_entries_after_three_rounds_are_multiples_of_4_far_below_what_bf16_rounds():
    """An entry is a sum of 128 terms +-W, each W 2 modulo 4 or each 0. Above 1024, bf16 has multiples of 8.

    The W of a row have a sum of squares of 2^14. So, by Hoeffding, P(|entry| > t) <= 2 exp(-t^2 / 2^15):
    3e-14 at 1024.
    """
    entries = torch.stack([rotation("rht128x3", generator(seed))[0] for seed in range(300)])
    assert (entries % 4 == 0).all()
    assert 500 < entries.abs().max() < 800


# ---- 8. MS-EDEN --------------------------------------------------------------------------------------------
#
# What is exact in each draw; what is right in the mean of many; and where the mean stays wrong.

def test_ms_eden_by_hand():
    # One value in a group: after one round all are +-6, or +-1.5. The first scale is 6 / 6.07 (or a quarter),
    # the EDEN factor 6.07 / 6, and their product 1.
    R, n = rotation("rht128", generator())
    x = F.one_hot(tensor([5, 77]), 128) * tensor([[6.0], [-1.5]])
    t = ms_eden(x, R, 1)
    assert equal(decode(t) @ R.T / n, x)
    assert (unpack(t.codes).abs() == 6).all()


@pytest.fixture
def exact_scales(monkeypatch):
    """Within it, ms_eden rounds no scale, and returns decoded values."""
    monkeypatch.setattr(quartet, "round_scale", lambda s, u=None: s)
    monkeypatch.setattr(quartet, "assemble", lambda shape, q, s, u=None: (q * s).view(shape))


@parametrize("name, four_six", [*((name, False) for name in ROTATIONS), ("rht128x3", True)])
def test_each_block_keeps_its_length_before_its_scale_is_rounded(name, four_six, exact_scales):
    x = wide(30)
    R, _ = rotation(name, generator())
    found = ms_eden(x, R, 0, four_six).double().view(-1, 16)
    exact = rotate(x, R).double().view(-1, 16)
    length = (found * exact).sum(-1) / (exact * exact).sum(-1)
    # The EDEN factor is a quotient of two sums with 5 roundings a term, and s, v and q s are rounded: in all
    # less than 14 roundings by 2^-24.
    assert (length - 1).abs().max() < 14 * 2.0**-24


def group_factor(a, b):
    """The quotient of the sums of a and of b, blocks (., 1, K/16, 16), over each group of 128."""
    def group_sums(t):
        return t.sum((1, 3)).view(-1, 8).sum(-1)

    return (group_sums(a) / group_sums(b)).repeat_interleave(8).view(len(a), 1, -1, 1)


def test_one_eden_factor_for_a_groups_scaled_values_would_leave_a_bias(exact_scales, monkeypatch):
    monkeypatch.setattr(quartet, "eden_factor", lambda v, q: group_factor(v * v, v * q))
    x = normal(2048, 1024, seed=4)
    found, sigma = relative((ms_eden(x, None, 1) - x) * x, x)
    # quartet.py says 9e-4: half of its last digit, and 5 sigma, which must be few enough to tell it from 0.
    assert abs(found + 9e-4) < 0.5e-4 + 5 * sigma < 3e-4


def test_one_eden_factor_for_a_group_would_leave_a_larger_error(monkeypatch):
    x = normal(2048, 1024, seed=4)
    b = x.view(2048, 1, -1, 16)
    s = b.abs().amax(-1, keepdim=True) / quartet.EDEN_MAX
    q = e2m1(b / s)
    product = b * s * q
    found = decode(ms_eden(x, None, 1))
    monkeypatch.setattr(quartet, "eden_factor", lambda v, q: group_factor(b * b, product))
    of_groups = decode(ms_eden(x, None, 1))
    # Right along x, but for the noise of the scales: nearer to 0 than the 9e-4 above, by 3 sigma or more
    along, sigma = relative((of_groups - x) * x, x)
    assert abs(along) < 5 * sigma < 9e-4 - 3 * sigma
    error = (found - x).square().sum()
    error_of_groups = (of_groups - x).square().sum()
    assert 1.08 < error_of_groups / error < 1.09       # quartet.py says 8 to 9%


def test_ms_eden_is_unbiased_along_each_block_also_at_sub_normal_scales():
    draws, b, amax, step = draws_of_every_scale(lambda x: ms_eden(x, None, 0))
    along = (draws * b).sum(-1, keepdim=True) / b.square().sum(-1, keepdim=True)
    # The scale, amax / 6 or more, moves by two steps of 1/8 of itself, and two sub-normal steps.
    assert_mean(along, torch.ones(10, 8, 1), span=1 / 4 + 2 * step / (amax / 6))


def with_outliers(value):
    """N(0, 1) (64, 128), and in each row, somewhere, one value."""
    x = normal(64, 128)
    row = torch.arange(64)
    x[row, row * 37 % 128] = value
    return x


# Inputs (64, 128): spread out, or with one or two values that dominate a group.
GROUPS = {
    "normal": normal(64, 128),
    "with a mean": normal(64, 128) + 10,
    "one 100 in 128": with_outliers(100.0),
    "one 300 in 128": with_outliers(300.0),
    "two near-equal": F.pad(tensor([[1.0, 0.88]]), (0, 126)).repeat(64, 1),
    "two near-equal, apart": torch.zeros(64, 128),
}
GROUPS["two near-equal, apart"][:, 0] = 1.0
GROUPS["two near-equal, apart"][:, 70] = 0.88
# What remains of a bias: input, rotation, with 4/6 -> at least 1.5. What was found stands beside it.
BIASED = {
    ("one 100 in 128", "rht128", False),       # 27
    ("one 300 in 128", "rht128", False),       # 107
    ("two near-equal", "rht128", False),       # 187
    ("two near-equal", "rht128x2", False),     # 7
    ("two near-equal", "rht128x2", True),      # 15
    ("two near-equal, apart", "rht128", False),     # 187
    ("two near-equal, apart", "rht128x2", False),   # 2.0
    ("two near-equal, apart", "rht128x2", True),    # 8
    ("one 300 in 128", "rht128x2", True),      # 2.8
}


@parametrize("name, four_six", [
    ("rht128", False), ("rht128x2", False), ("rht128x2", True), ("rht128x3", False)])
@parametrize("kind", GROUPS)
def test_ms_eden_averages_to_x(name, four_six, kind):
    x = GROUPS[kind]
    g = generator()
    draws = []
    for seed in range(256):
        R, n = rotation(name, g)
        draws.append(decode(ms_eden(x, R, seed, four_six)) @ R.T / n)
    found, sigma = convergence(draws, x)
    if (kind, name, four_six) in BIASED:
        assert found - 5 * sigma > 1.5
    elif (kind, name) == ("one 300 in 128", "rht128x2"):
        assert 0.9 < found < 1.5                       # 1.1: a little is left
    else:
        assert abs(found - 1) < 5 * sigma < 0.15


def test_4_over_6_in_ms_eden_takes_the_larger_cosine_whatever_the_scale():
    x = normal(64, 1024, seed=2)
    b = x.view(64, -1, 16).double()

    def cosine(q):
        return F.cosine_similarity(q.double(), b, dim=-1)

    def with_amax_to(top):
        """The cosine if amax maps to 6.07 = 6 * 16/17 / 0.93, or, for 4, to two thirds of it."""
        v = b / b.abs().amax(-1, keepdim=True) * top * 16 / 17 / 0.93
        return cosine(nearest(v, E2M1))

    six = with_amax_to(6.0)
    four = with_amax_to(4.0)
    taken = cosine(unpack(ms_eden(x, None, 0, True).codes).view(b.shape))
    assert (taken >= torch.maximum(six, four) - 1e-6).all()
    assert 0.2 < (four > six).double().mean() < 0.8


# ---- 9. The table of recipes: its quantizers ---------------------------------------------------------------
#
# Errors and biases, as the paper and quartet.py state them, and how much memory it takes.

@parametrize("name, nmse, bias", [        # times 1e-3; paper's table 1, and quartet.py
    ("rtn", 9.0, -4.5),
    ("rtn_16x16", 12.4, -9.1),
    ("four_six", 7.6, -3.4),
    ("four_six_16x16", 12.4, -9.0),
    ("scale_search", 6.7, -7.4),
    ("scale_search_16x16", 11.6, -9.6),
    ("sr", 23.5, 0),
    ("ms_eden", 9.3, 0),
    ("ms_eden_46", 8.1, 0),
    ("sr_four_six", 17.5, 7.3)])
def test_nmse_and_bias_on_normal_values(name, nmse, bias):
    x = normal(1024, 1024, seed=3)
    error = decode(quantize(name, x, 1)) - x
    for t, expected in (error.square(), nmse), (error * x, bias):
        found, sigma = relative(t, x)
        assert abs(found - expected * 1e-3) < 0.05e-3 + 5 * sigma      # half the last digit, and 5 sigma


@parametrize("name", ["ms_eden", "ms_eden_46"])
def test_eden_max_with_0_93_errs_less_than_with_0_90_or_0_96(name, monkeypatch):
    x = normal(1024, 1024, seed=3)

    def error():
        return F.mse_loss(decode(quantize(name, x, 1)), x)

    least = error()
    for clip in 0.90, 0.96:
        monkeypatch.setattr(quartet, "EDEN_MAX", quartet.SR_MAX / clip)
        assert error() > least


def memory_needed(f, x):
    """The most memory at once that f(x) takes, in copies of x."""
    with torch.profiler.profile(profile_memory=True) as profile:
        f(x)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    allocated = [event.nbytes() for event in events if event.name() == "[memory]"]
    return np.cumsum(allocated).max() / x.nbytes


def test_no_quantizer_needs_many_copies_of_its_input():
    x = normal(1024, 512)
    R, _ = rotation("rht128", generator())
    # 4.2, 6.3, 5.4, and 8.1, as philox computes in int64
    assert 1 < memory_needed(rtn, x) < 4.5
    assert 1 < memory_needed(four_six, x) < 6.5
    assert 1 < memory_needed(lambda x: ms_eden(x, R, 0), x) < 6
    assert 1 < memory_needed(lambda x: sr(x, 0), x) < 8.5


# ---- 10. The three GEMMs -----------------------------------------------------------------------------------
#
# y is compared with float64. Gradients are random: their mean is compared with what it must be.

# By which quantizers a recipe multiplies x and w forward; and which recipes quantize the original x for dw.
FORWARD = {
    "rtn": ("rtn", "rtn"),
    "nvidia": ("rtn", "rtn_16x16"),
    "four_six": ("four_six", "four_six_16x16"),
    "tetrajet2": ("rtn", "rtn"),
    "quartet2": ("four_six", "four_six"),
    "quintet": ("scale_search", "scale_search"),
}
ORIGINAL_X = ("nvidia", "four_six")


def layer(recipe, *shape, bias=False, device="cpu"):
    """A Linear(128, 128), x and dy of a shape (..., 128): N(0, 1) in bf16 values, which no cast changes."""
    def sample(seed, *shape):
        return normal(*shape, seed=seed).bfloat16().float().to(device)

    linear = Linear(128, 128, bias, recipe, device=device)
    linear.weight.data = sample(0, 128, 128)
    return linear, sample(1, *shape).requires_grad_(), sample(2, *shape)


def step(linear, x, dy):
    """Forward and backward, noise from seed 0 -> y, dx, dw, and the bias's gradient if there is one."""
    torch.manual_seed(0)
    y = linear(x)
    return y.detach(), *torch.autograd.grad(y, (x, *linear.parameters()), dy)


def nvfp4_bytes(t):
    return t.numel() * 4.5 / 8 + 4


@every_4bit_recipe
def test_y_and_mean_gradients_are_those_of_what_is_kept_without_synchronisation(recipe, device, monkeypatch):
    B = 64
    linear, x, dy = layer(recipe, 128, 128, device=device)
    if recipe in ORIGINAL_X:
        # x is rotated and goes to nearest. By one fixed rotation it is the same in all draws.
        R, n = rotation("rht16", torch.Generator(device).manual_seed(0))
        monkeypatch.setattr(quartet, "rotation_from", lambda name, signs: (R, n) if name else (None, 1))
    step(linear, x, dy)                                # cuBLAS sets itself up
    kept = []
    with no_synchronisation():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            y = linear(x)
        draws = [torch.autograd.grad(y, (x, linear.weight), dy, retain_graph=True) for _ in range(B)]

    x = x.detach()
    x_bytes = x.numel() * 2 + 2 if recipe in ORIGINAL_X else nvfp4_bytes(x)
    assert sum(kept) == nvfp4_bytes(linear.weight) + x_bytes

    x_name, w_name = FORWARD[recipe]
    a = decode(quantize(x_name, x))
    b = decode(quantize(w_name, linear.weight.detach()))
    exact = a.double() @ b.double().T
    magnitudes = a.double().abs() @ b.double().abs().T
    # bf16 rounds by 2^-8; 128 float32 additions by 128 * 2^-24 of the sum of magnitudes.
    assert ((y - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-17 * magnitudes).all()

    if recipe in ORIGINAL_X:
        a = R @ decode(rtn(x.T @ R)).T / n
    # rtn: all draws are equal, and wrong. Else the mean is right, to 0.08: that is 5 sigma, 5 (2/8000)^0.5,
    # where there are as few as 8000 degrees of freedom.
    expected = B if recipe == "rtn" else 1
    for gradients, target in zip(zip(*draws), (dy @ b, dy.T @ a)):
        found, _ = convergence(gradients, target)
        assert abs(found - expected) < 0.08


@parametrize("x_kind", ["bf16", "four_six"])
@parametrize("w_kind", ["bf16", "rtn_16x16"])
def test_operands_left_in_bf16_are_multiplied_as_they_are(x_kind, w_kind, monkeypatch):
    plain = Gemm(None, "bf16", "bf16")
    rotated = Gemm("rht128", "bf16", "bf16")
    as_stored = Gemm(None, "bf16", None if w_kind == "rtn_16x16" else "bf16")
    for dx_row, dw_row in (plain, rotated), (as_stored, plain):
        monkeypatch.setitem(RECIPES, "mine", Recipe(x_kind, w_kind, dx_row, dw_row))
        linear, x, dy = layer("mine", 128, 128)
        y, dx, dw = step(linear, x, dy)
        a = decode(quartet.quantize(x_kind, x.detach()))
        b = decode(quartet.quantize(w_kind, linear.weight.detach()))
        for found, exact in (y, a @ b.T), (dx, dy @ b), (dw, dy.T @ a):
            # What rounds are the results, and operands times R: each by at most 2^-8, in the mean by less.
            assert (found - exact).norm() / exact.norm() < 2.0**-8
        with quartet.quantized_weights(linear):
            assert same([linear(x)], [y])


@parametrize("quantizer", ["rtn", "rtn_16x16", "four_six", "four_six_16x16", "scale_search"])
def test_what_x_loses_by_quantizing_is_exact_in_bf16(quantizer, device):
    # Every significand of a block's amax, in the middle of its block, beside all values of 12 octaves below.
    significands = 1 + torch.arange(128) / 128
    values = (2.0 ** -torch.arange(1, 13)[:, None] * significands).flatten()
    values = torch.cat([values, -values])[torch.randperm(24 * 128)]
    x = values.repeat(128, 1).view(128, -1, 12)
    amax = significands[:, None, None].expand(-1, x.shape[1], 2)
    x = torch.cat([x[..., :6], amax, -amax, x[..., 6:]], -1).flatten(1).bfloat16().to(device)
    found = x - decode(quartet.quantize(quantizer, x), bfloat16)
    assert found.dtype == bfloat16
    assert equal(found.double(), x.double() - decode(quartet.quantize(quantizer, x)).double())


IN_TWO_TERMS = {f"{recipe} in two terms": RECIPES[recipe]._replace(two_terms=True)
                for recipe in ("nvidia", "quartet2", "quintet")}


@parametrize("recipe", IN_TWO_TERMS)
def test_a_second_term_of_x_makes_y_nearly_that_of_x_and_changes_no_gradient(recipe, device, monkeypatch):
    monkeypatch.setitem(RECIPES, recipe, IN_TWO_TERMS[recipe])
    one, x, dy = layer(recipe.split()[0], 200, 128, device=device)
    two, _, _ = layer(recipe, 200, 128, device=device)
    y, *gradients = step(one, x, dy)
    y_two, *gradients_two = step(two, x, dy)
    assert same(gradients_two, gradients)

    # The sum of two products of 4-bit values, of which one is the product of one term.
    quantizer, w_quantizer = FORWARD[recipe.split()[0]]
    x = x.detach()
    w = decode(quartet.quantize(w_quantizer, one.weight.detach()))
    first = decode(quartet.quantize(quantizer, x))
    second = decode(quartet.quantize(quantizer, x - first))
    expected = (first + second).double() @ w.double().T
    torch.testing.assert_close(y_two.double(), expected, rtol=2**-7, atol=0.05)

    # Of the first term's error, which is a share of x, little is left: that share of it, and bf16's.
    exact = x @ w.T
    share = (first - x).norm() / x.norm()
    left = (y_two - exact).norm() / (y - exact).norm()
    assert left < 1.5 * share
    assert left > 0.7 * share


def test_noise_and_signs_are_shared_by_no_operands_layers_or_steps(signs, monkeypatch):
    noise = []

    def spy(*arguments):
        noise.append(uniform(*arguments))
        return noise[-1]

    monkeypatch.setattr(quartet, "uniform", spy)
    one, x, dy = layer("tetrajet2", 128, 128)
    two, _, _ = layer("tetrajet2", 128, 128)
    for _ in range(2):
        two(one(x)).backward(dy)
    # 2 steps, 2 layers, 2 GEMMs, 2 operands or 2 rounds
    u = torch.stack([u.flatten() for u, _ in noise])
    d = torch.cat(signs)
    assert u.shape == (16, 128 * 128)
    assert d.shape == (16, 128)
    assert (d.abs() == 1).all()
    assert_independent(u)
    assert_independent(d)


def rounded(x, toward_zero):
    """A Fraction as float32 rounds it, in Python's integers: to nearest with ties to even, or toward zero."""
    if not x:
        return Fraction(0)
    # The last of 24 bits. (No number here is sub-normal.)
    last = Fraction(2) ** (math.floor(math.log2(abs(x))) - 23)
    if abs(x) >= 2**24 * last:      # log2 has rounded
        last *= 2
    units, rest = divmod(abs(x), last)
    up = rest > last / 2
    if rest == last / 2:
        up = units % 2
    if up and not toward_zero:
        units += 1
    if x < 0:
        units = -units
    return units * last


def fractions(t):
    return [Fraction(v) for v in t.double().flatten().tolist()]


def test_a_sum_toward_zero_is_the_exact_one_without_what_float32_cannot_hold():
    # Of all sizes
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-40, 40, (2, 3000), generator=generator)
    a, b = torch.randn(2, 3000, generator=generator) * 2.0**exponents
    # Near each other, where sums cancel
    units = torch.randint(-9, 9, (1000,), generator=generator)
    b[:1000] = -a[:1000] * (1 + units * 2.0**-23)
    # Halves of a last bit, on both sides of it
    exponents = a[1000:1500].frexp().exponent
    last_bit = 2.0 ** (exponents - 24.0)
    b[1000:1500] = last_bit * tensor([0.5, -0.5, 1.5, -1.5, 0.25]).repeat(100)
    found = quartet.add_toward_zero(a.to(DEVICE), b.to(DEVICE))
    exact = [x + y for x, y in zip(fractions(a), fractions(b))]
    assert fractions(found) == [rounded(x, toward_zero=True) for x in exact]
    assert (found.cpu() != a + b).float().mean() > 0.1


def varied(M, K, spread, seed):
    """NVFP4 (M, K) of all codes, with scales from 2^-9 to 448, and values like these."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (M, K // 2), generator=generator).to(uint8)
    exponent = spread * (torch.rand(M, K // 16, generator=generator) - 0.5)
    scale = (2.0**exponent).clamp(2.0**-9, 448)
    return NVFP4(codes, scale.to(float8_e4m3fn), tensor(2.0**-30))


@parametrize("K", [16, 64, 80, 320])
def test_fp4_matmul_is_the_published_probe_in_whole_numbers(K):
    """Also the float64 product of 64 values is exact."""
    a = varied(5, K, 18, seed=1)
    b = varied(4, K, 18, seed=2)
    found = quartet.fp4_matmul(a, b, n=128)
    # q * block scale is a whole number of 2^-10, and the tensor scale 2^-30.
    rows = [[int(v * 2**40) for v in fractions(row)] for row in decode(a)]
    columns = [[int(v * 2**40) for v in fractions(row)] for row in decode(b)]
    differs = 0
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        products = list(map(operator.mul, row, column))
        total = Fraction(0)
        for k in range(0, K, 64):
            group = sum(products[k:k + 64])
            assert abs(group) < 2**49
            group = rounded(Fraction(group), toward_zero=False)
            total = rounded(total + group, toward_zero=True)
        expected = tensor(float(total / 2**80 / 128), dtype=torch.float64)
        assert equal(found[i, j], expected.bfloat16())
        differs += total != sum(products)
    # Float32 has not held all of them.
    assert differs or K < 320


def emulated(a, b, n=1):
    """kernels.fp4_gemm of NVFP4 tensors, moved to DEVICE."""
    a = NVFP4(*(part.to(DEVICE) for part in a))
    b = NVFP4(*(part.to(DEVICE) for part in b))
    return kernels.fp4_gemm(decode(a, bfloat16), a.tensor_scale, decode(b, bfloat16), b.tensor_scale, n).cpu()


@parametrize("f", [quartet.fp4_matmul, emulated])
@parametrize("M, K", [(0, 64), (3, 0), (2, 16)])
def test_an_fp4_gemm_takes_any_shape_and_what_is_not_finite_makes_nan(f, M, K):
    a = rtn(normal(M, K))
    b = rtn(normal(2, K, seed=1))
    assert equal(f(a, b), quartet.matmul(a, b))
    bad = b._replace(tensor_scale=tensor(math.nan))
    assert f(a, bad).isnan().all() or not K


def test_fp4_gemm_adds_in_float32_whatever_the_default_dtype():
    a = torch.zeros(1, 192, device=DEVICE)
    b = torch.zeros(1, 192, device=DEVICE)
    a[0, ::64] = tensor([2688, 6 * 2.0**-9, -2688])
    b[0, ::64] = tensor([2688, 6 * 2.0**-9, 2688])
    torch.set_default_dtype(torch.float64)
    try:
        # The first sum's last bit in float32 is 0.5: it loses the second, 1.4e-4. The third takes it away.
        assert quartet.fp4_gemm(a, b).item() == 0
    finally:
        torch.set_default_dtype(torch.float32)


def twice(t, sign=0):
    """NVFP4 (M, K) -> (M, 2 K): once more beside itself, with sign=8 with the other sign."""
    codes = torch.cat([t.codes, t.codes ^ (sign | sign << 4)], 1)
    scale = torch.cat([t.block_scale.view(uint8)] * 2, 1).view(float8_e4m3fn)
    return t._replace(codes=codes, block_scale=scale)


def test_products_that_cancel_leave_zero_at_every_size():
    """CUDA's 2.0**n of float64 has a wrong last digit for one n in eight, and fp4_gemm divides by a power."""
    a = decode(twice(varied(8, 32, 4, seed=1))).to(DEVICE)
    b = decode(twice(varied(8, 32, 4, seed=2), sign=8)).to(DEVICE)
    for power in range(-50, 50):
        assert not quartet.fp4_gemm(a * 2.0**power, b).any()
        assert not quartet.fp4_gemm(a, b * 2.0**power).any()


@parametrize("M, N, K", [(1, 1, 48), (66, 33, 80), (130, 40, 512)])
def test_the_emulated_gemm_has_the_bits_of_fp4_matmul(M, N, K):
    # Half of the products cancel the others: what is left are the roundings of every step.
    a = twice(varied(M, K, 18, seed=1))
    b = twice(varied(N, K, 18, seed=2), sign=8)
    for power, n in (0, 1), (-60, 128), (-110, 128), (110, 128):
        a = a._replace(tensor_scale=tensor(2.0**power))
        assert equal(emulated(a, b, n), quartet.fp4_matmul(a, b, n))
    if K == 512:
        a = a._replace(tensor_scale=tensor(1.0))
        expected = quartet.fp4_matmul(a, b)
        assert (quartet.matmul(a, b) != expected).float().mean() > 0.5


def heard_in(module, monkeypatch):
    """What fp4_gemm of quartet or kernels will be called with, [(arguments, result), ...]."""
    heard = []
    fp4_gemm = module.fp4_gemm

    def hearing(*args):
        y = fp4_gemm(*args)
        heard.append((args, y))
        return y

    monkeypatch.setattr(module, "fp4_gemm", hearing)
    return heard


@parametrize("backend", ["torch", "triton"])
@parametrize("recipe", FORWARD)
def test_a_linear_adds_as_fp4_tensor_cores_do_if_asked(recipe, backend, monkeypatch):
    heard = heard_in(quartet, monkeypatch)
    heard_by_kernels = heard_in(kernels, monkeypatch)
    linear, x, dy = layer(recipe, 40, 128, device=DEVICE)
    if RECIPES[recipe].dx.rotation is None:
        # Then N need not be whole tiles, and of what was padded a GEMM takes a part.
        weight = linear.weight.data[:48].clone()
        linear = Linear(128, 48, recipe=recipe, device=DEVICE)
        linear.weight.data = weight
        dy = dy[:, :48].contiguous()
    quartet.check(recipe, backend)      # which imports the kernels
    linear.backend = backend
    plain = step(linear, x, dy)
    assert not heard and not heard_by_kernels
    monkeypatch.setattr(quartet, "GEMM", "blackwell")
    found = step(linear, x, dy)
    assert (len(heard), len(heard_by_kernels)) == ((3, 0) if backend == "torch" else (0, 3))
    # Sums that differ in float32's last bits are the same in bf16, or neighbours, 2^-7 of themselves apart.
    for y, expected in zip(found, plain):
        assert ((y - expected).abs() <= 2.0**-7 * expected.abs()).all()
    for (a, _, b, _, n), y in heard_by_kernels:
        assert equal(y, quartet.fp4_gemm(a, b, n))


@parametrize("backend", ["torch", "triton"])
def test_gemms_of_what_is_not_quantized_are_added_in_float64(backend, monkeypatch):
    exact = Gemm(None, dy="bf16", other="bf16")
    monkeypatch.setitem(RECIPES, "forward", RECIPES["rtn"]._replace(dx=exact, dw=exact, original=True))
    monkeypatch.setattr(quartet, "GEMM", "blackwell")
    linear, x, dy = layer("forward", 128, 128, device=DEVICE)
    quartet.check("forward", backend)      # which imports the kernels
    linear.backend = backend
    with torch.no_grad():
        x.zero_()
        x[:3] = tensor([[2.0**24], [1.0], [-2.0**24]])
    _, _, dw = step(linear, x, torch.ones_like(dy))
    assert (dw == 1).all()


def test_fp4_gemms_scale_with_their_operands():
    a = rtn(normal(64, 256))
    b = rtn(normal(32, 256, seed=1))
    for f in quartet.fp4_matmul, emulated:
        y = f(a, b)
        for power, n in (110, 1), (90, 2**21), (-100, 1):
            larger = a._replace(tensor_scale=a.tensor_scale * 2.0**power)
            assert equal(f(larger, b, n), y * (2.0**power / n))


def test_what_remains_of_tensor_scales_whose_product_float32_cannot_hold():
    a = varied(66, 128, 18, seed=1)._replace(tensor_scale=tensor(2.0**-71))
    b = varied(33, 128, 18, seed=2)._replace(tensor_scale=tensor(2.0**-80))
    expected = quartet.fp4_matmul(a, b)
    assert expected.count_nonzero() > 100
    assert equal(emulated(a, b), expected)


@parametrize("sign", [1, -1])
def test_the_emulated_gemm_leaves_infinity(sign):
    one = torch.ones((), device=DEVICE)
    b = torch.ones(2, 128, device=DEVICE, dtype=bfloat16)
    a = b.clone()
    a[0, 0] = sign * math.inf
    # Divided by n, the largest float32 would stay finite.
    assert kernels.fp4_gemm(a, one, b, one, 4).tolist() == [[sign * math.inf] * 2, [32.0] * 2]


def test_torch_knows_what_the_emulated_gemm_returns():
    a = rtn(normal(20, 32).to(DEVICE))
    b = rtn(normal(3, 32, seed=1).to(DEVICE))
    args = decode(a, bfloat16), a.tensor_scale, decode(b, bfloat16), b.tensor_scale, 2
    library.opcheck(kernels.fp4_gemm, args)
    with pytest.raises(ValueError, match="a sums over 32 values, b over 16"):
        kernels.fp4_gemm(*args[:2], args[2][:, :16], *args[3:])


# ---- 11. The linear layer ----------------------------------------------------------------------------------
#
# What nn.Linear promises, for each recipe: shapes, dtypes, strides, autocast, NaN.

def test_linear_is_nn_linear_but_for_its_recipe():
    with torch.random.fork_rng():                      # both start from the same state
        plain = nn.Linear(128, 128)
    linear = Linear(128, 128, bias=True, recipe="bf16")
    _, x, dy = layer("bf16", 50, 128)
    assert same(linear.parameters(), plain.parameters())
    assert same(step(linear, x, dy), step(plain, x, dy))
    linear.recipe = "quartet2"
    again = copy.deepcopy(linear)
    linear.load_state_dict(plain.state_dict())         # strict: the same keys
    assert "recipe='quartet2'" in repr(again)
    assert same(step(again, x, dy), step(linear, x, dy))


@every_4bit_recipe
@parametrize("shape", [(128,), (50, 128), (2, 3, 128), (2, 1, 5, 128), (0, 128), (2, 0, 128)])
def test_leading_dimensions_are_tokens_and_missing_tokens_are_zeros(recipe, shape):
    def pad(t):
        """(..., 128) -> (128, 128), zeros below."""
        t = t.detach().reshape(-1, 128)
        return F.pad(t, (0, 0, 0, 128 - len(t)))

    linear, x, dy = layer(recipe, *shape, bias=True)
    y, dx, dw, db = step(linear, x, dy)
    y_padded, dx_padded, dw_padded, _ = step(linear, pad(x).requires_grad_(), pad(dy))
    assert y.shape == shape
    assert dx.shape == shape
    assert equal(db, dy.reshape(-1, 128).sum(0))
    assert same((pad(y - linear.bias), pad(dx), dw), (y_padded - linear.bias, dx_padded, dw_padded))


@every_4bit_recipe
def test_strides_dtypes_autocast_and_what_bf16_drops_make_no_difference(recipe):
    linear, x, dy = layer(recipe, 256, 128)
    expected = step(linear, x, dy)
    x0 = x.detach()

    strided = x0.T.contiguous().T.requires_grad_()
    assert same(step(linear, strided, dy.T.contiguous().T), expected)

    # Rounded away by bf16, half of whose last place is 2^-9.
    more = 1 + 2.0**-10
    linear.weight.data *= more
    assert same(step(linear, (x0 * more).requires_grad_(), dy * more), expected)

    for dtype in bfloat16, torch.float64:
        y, dx, dw = step(linear, x0.to(dtype).requires_grad_(), dy.to(dtype))
        assert y.dtype == dx.dtype == dtype
        assert same((y.float(), dx.float(), dw), expected)

    # Autocast sets the dtype of y, whether backward runs within it or outside.
    linear.bias = nn.Parameter(normal(128))
    dy = dy.bfloat16()
    with torch.autocast("cpu", bfloat16):
        y, *inside = step(linear, x, dy)
        torch.manual_seed(0)
        graph = linear(x)
    outside = torch.autograd.grad(graph, (x, *linear.parameters()), dy)
    y_expected, *gradients = expected
    assert same([y, *inside[:2]], [y_expected.bfloat16() + linear.bias.bfloat16(), *gradients])
    assert same(inside, outside)


@every_4bit_recipe
@parametrize("backend", ["torch", "triton"])
def test_a_small_power_of_two_on_an_operand_is_one_on_the_results(recipe, backend, monkeypatch):
    # As where a CPU has bf16 units; but these take sub-normal sums as 0, and float64 does not.
    def gemm(a, b, n=1):
        return (a.double() @ b.double().T / n).bfloat16()

    monkeypatch.setattr(quartet, "gemm", gemm)
    monkeypatch.setattr(quartet, "CPU_DTYPE", bfloat16)
    linear, x, dy = layer(recipe, 128, 128, device=DEVICE if backend == "triton" else "cpu")
    quantize_model(linear, recipe, backend=backend)
    # Columns that are small already. dy is large, so that gradients are no sub-normal numbers.
    x.data[:, 64:] *= 2.0**-6
    linear.weight.data[:, 64:] *= 2.0**-6
    dy *= 2.0**60
    y, dx, dw = step(linear, x, dy)

    x.data *= 2.0**-112
    assert same(step(linear, x, dy), (y * 2.0**-112, dx, dw * 2.0**-112))
    x.data *= 2.0**112
    linear.weight.data *= 2.0**-112
    assert same(step(linear, x, dy), (y * 2.0**-112, dx * 2.0**-112, dw))


@every_4bit_recipe
@parametrize("where", ["x", "dy"])
def test_what_is_not_finite_comes_out_as_nan(recipe, where):
    linear, x, dy = layer(recipe, 128, 128)
    broken = x if where == "x" else dy
    broken.data[3, 5] = math.inf
    y, dx, dw = step(linear, x, dy)
    assert dw.isnan().all()
    assert (y if where == "x" else dx).isnan().all()


# ---- A. Custom ops, and what torch.compile needs -----------------------------------------------------------

@parametrize("recipes, backend", [
    (["nvidia", "bf16"], "torch"), (["quartet2", "rtn", "nvidia"], "triton")])
def test_compiled_is_eager_to_the_bit(recipes, backend):
    # By inductor, with 4/6 and MS-EDEN: data/tests/test_recipes.py
    torch._dynamo.reset()
    x = normal(20, 128).to(DEVICE).requires_grad_()
    dy = normal(20, 128, seed=1).to(DEVICE)
    layers = [Linear(128, 128, r == "nvidia", r, backend, DEVICE) for r in recipes]
    model = nn.Sequential(*layers)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(step(compiled, x, dy), step(model, x, dy))
    if backend == "triton":
        # torch 2.11 made gradients 0 of a dtype that was kept by .to
        with torch.autocast(DEVICE, bfloat16):
            assert same(step(compiled, x, dy.bfloat16()), step(model, x, dy.bfloat16()))


@needs_gpu
@parametrize("quantizer", quartet.QUANTIZERS)
def test_compiled_for_a_gpu_it_rounds_as_eager_if_told_to(quantizer):
    # In bf16 many values lie halfway between two codes, and many scales between two scales.
    x = normal(4096, 2048).to(DEVICE, bfloat16)
    seed = tensor(3, device=DEVICE)

    def quantize(x, seed):
        return tuple(quartet.quantize(quantizer, x, seed=seed))

    torch._dynamo.reset()
    compiled = torch.compile(quantize, fullgraph=True, options=quartet.AS_EAGER)
    assert same(compiled(x, seed), quantize(x, seed))


class Added(nn.Module):
    """Two layers whose outputs are added, as attention and MLP are in GPT-J or PaLM: they get one dy."""

    def __init__(self, recipe, checkpointed):
        super().__init__()
        self.a, self.b = [Linear(128, 128, recipe=recipe, device=DEVICE) for _ in range(2)]
        self.b.load_state_dict(self.a.state_dict())        # only noise differs
        self.checkpointed = checkpointed

    def add(self, x):
        return self.a(x) + self.b(x)

    def forward(self, x):
        if self.checkpointed:
            return torch.utils.checkpoint.checkpoint(self.add, x, use_reentrant=False)
        return self.add(x)


# For a CPU inductor takes a minute each.
@parametrize("checkpointed", [False, True])
@parametrize("compiler", ["aot_eager_decomp_partition", pytest.param("inductor", marks=needs_gpu)])
def test_no_two_layers_share_their_noise_also_compiled(compiler, checkpointed, monkeypatch):
    """The compiler makes one of two equal calls; these must not be equal. Bits are those of eager."""
    noisy = Gemm(None, dy="sr", other="bf16")
    monkeypatch.setitem(RECIPES, "mine", Recipe("bf16", "bf16", noisy, noisy))      # soon compiled
    torch._dynamo.reset()
    model = Added("mine", checkpointed)
    x = normal(32, 128).to(DEVICE).requires_grad_()
    dy = normal(32, 128, seed=1).to(DEVICE)

    def gradients(f):
        torch.manual_seed(0)
        return torch.autograd.grad(f(x), (x, model.a.weight, model.b.weight), dy)

    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    found = gradients(compiled)
    _, dw_a, dw_b = found
    assert not equal(dw_a, dw_b)
    assert same(found, gradients(model))


@parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_no_two_calls_share_a_draw_and_they_stay_in_order(compiler):
    def draws(x):
        return quartet.draw(x, 4), quartet.draw(x, 4), quartet.draw(x + 1, 4)

    def seeded(f):
        torch.manual_seed(0)
        return f(torch.ones(3, device=DEVICE))

    torch._dynamo.reset()
    compiled = torch.compile(draws, fullgraph=True, backend=compiler)
    found = seeded(compiled)
    assert len(torch.stack(found).unique()) == 12
    assert same(found, seeded(draws))


# ---- B. Backends -------------------------------------------------------------------------------------------

def test_a_recipe_without_kernels_takes_the_reference(monkeypatch):
    monkeypatch.setitem(quartet.QUANTIZERS, "mine", lambda x, R, seed: rtn(x))
    monkeypatch.setitem(RECIPES, "mine", RECIPES["quartet2"]._replace(x="mine"))
    monkeypatch.setattr(quartet, "kernels", kernels)
    linear = Linear(128, 128, recipe="mine", backend="torch")
    assert linear(torch.ones(2, 128)).shape == (2, 128)
    with pytest.raises(ValueError, match="'triton' needs a mode .* of 'mine'.*'torch'"):
        Linear(128, 128, recipe="mine", backend="triton")
    assert quartet.resolve("auto", "cuda", "rtn") == "triton"
    assert quartet.resolve("auto", "cuda", "mine") == "torch"
    assert quartet.resolve("auto", "cpu", "rtn") == "torch"


# ---- C. Checks ---------------------------------------------------------------------------------------------

@parametrize("call, error", [
    (lambda: rtn(torch.ones(2, 16, dtype=torch.int32)), "torch.int32.*float"),
    (lambda: four_six(torch.ones(4, 24)), r"\(4, 24\).*pad.*16"),
    (lambda: sr(tensor(1.0), 0), r"\(\).*pad.*16"),
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
    with pytest.raises(ValueError, match=error):
        call()


@parametrize("backend", ["torch", "triton"])
def test_a_gradient_of_a_gradient_is_an_error(backend):
    linear = Linear(128, 128, backend=backend, device=DEVICE)
    x = normal(2, 128).to(DEVICE).requires_grad_()
    loss = linear(x).sum()
    with pytest.raises(RuntimeError, match="no second derivative.*bf16"):
        torch.autograd.grad(loss, x, create_graph=True)

    # In bf16 there is one.
    linear.recipe = "bf16"
    gradient, = torch.autograd.grad(linear(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert linear.weight.grad.any()


# ---- D. Models ---------------------------------------------------------------------------------------------

def transformer(head):
    """Eleven layers with one Linear already; a head; a subclass of nn.Linear, which is not to be switched."""
    def pair():
        return nn.Sequential(nn.Linear(32, 128), Linear(128, 32, recipe="rtn"))

    return nn.ModuleDict({
        "layers": nn.ModuleList(pair() for _ in range(11)),
        "other": nn.modules.linear.NonDynamicallyQuantizableLinear(32, 8),
        "head": nn.Linear(32, head),
    })


def test_quantize_model_switches_linears_in_place():
    model = transformer(128)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    calls = []
    model["head"].register_forward_hook(lambda *_: calls.append(1))
    names = quantize_model(model, "nvidia", skip=["layers.1"])         # which is not layers.10
    assert names == [f"layers.{i}.{j}" for i in range(11) if i != 1 for j in (0, 1)] + ["head"]
    assert {(type(modules[name]), modules[name].recipe) for name in names} == {(Linear, "nvidia")}
    assert type(modules["layers.1.0"]) is nn.Linear
    assert modules["layers.1.1"].recipe == "rtn"

    # The same objects as before (modules and parameters are equal only to themselves), hooks included.
    assert dict(model.named_modules()) == modules
    assert dict(model.named_parameters()) == parameters
    x = normal(3, 32)
    fresh = Linear(32, 128, True, "nvidia")
    fresh.load_state_dict(model["head"].state_dict())
    assert equal(model["head"](x), fresh(x))
    assert calls == [1]

    assert quantize_model(model, "bf16", skip=["head", "layers"]) == []
    assert type(model["other"]) is not Linear
    root = nn.Linear(32, 128)
    assert quantize_model(root, "quartet2") == [""]
    assert type(root) is Linear
    assert root(x).shape == (3, 128)


@parametrize("recipe, skip, error", [
    ("quartet2", ["layer"], "'layer'"),
    ("quartet2", [], "layers.0.1.*128, 32.*out_features % 128"),
    ("nvidia", [], r"head\(32, 100\).*out_features % 16"),
    ("rtn", ["head", "layers.11"], "'layers.11'"),
    ("fp4", [], "fp4.*bf16, rtn, nvidia, four_six, tetrajet2, quartet2")])
def test_quantize_model_changes_nothing_where_it_cannot_change_all(recipe, skip, error):
    model = transformer(100)
    with pytest.raises(ValueError, match=error):
        quantize_model(model, recipe, skip)
    assert {getattr(m, "recipe", "rtn") for m in model.modules()} == {"rtn"}
    assert type(model["layers"][0][0]) is nn.Linear


@parametrize("recipe, backend", [
    *((recipe, "torch") for recipe in RECIPES_4BIT), ("nvidia", "triton"), ("quartet2", "triton")])
def test_weights_quantized_once_change_nothing_and_must_not_change(recipe, backend):
    linear, x, dy = layer(recipe, 50, 128, device=DEVICE)
    quantize_model(linear, recipe, backend=backend)
    places = set()
    for _ in range(2):
        expected = step(linear, x, dy)
        weight = linear.weight.detach().clone()
        with quartet.quantized_weights(linear):
            linear.weight.data.fill_(math.nan)         # .data changes no version
            assert same(step(linear, x, dy), expected)                 # of the weight as it was
        linear.weight.data.copy_(weight * 2)
        places.add(tuple(t.data_ptr() for t in linear.weight_nvfp4))
    assert len(places) == 1

    with pytest.raises(RuntimeError, match="a weight changed"), quartet.quantized_weights(linear):
        with torch.no_grad():
            linear.weight.mul_(2)


# ---- kernels.py: on a GPU, or interpreted ------------------------------------------------------------------
#
# They are held to quartet.py's bits. Only the sums of a rotation have an order of their own: what is rotated
# here is integers, whose sums are exact.

INPUTS = {
    "ragged": normal(3, 5, 144),
    "wide": wide(40),                         # two programs
    "below E4M3": wide(11),                   # many sub-normal scales
    "zeros": torch.zeros(16, 128),
    "nothing": torch.zeros(0, 16),
    "no columns": torch.zeros(16, 0),
    "tiny": torch.full((16, 128), 1e-42),
    "huge": with_value(wide(3), 1e30),
    # Divided by the tensor scale, the second block's scale is no float32 any more.
    "vanishing": torch.cat([torch.full((8, 16), 1e34), torch.full((8, 16), 2.0**-48)]),
    "transposed": normal(128, 48).T,
    "unaligned": normal(2049)[1:].view(16, 128),
    "nan": with_value(wide(2), math.nan),
    "inf": with_value(wide(2), -math.inf),
}


def function_of_kernels(name, seed):
    """kernels.py's function of x for a quantizer's name, or None where it has none."""
    mode = name.removesuffix("_16x16")
    if mode not in kernels.MODES:
        return None
    if name.startswith("ms_eden"):
        return lambda x: kernels.ms_eden(x, None, seed, name == "ms_eden_46")
    if name in quartet.NOISY:
        return lambda x: getattr(kernels, mode)(x, seed)
    rows = 1 if mode == name else 16
    return lambda x: getattr(kernels, mode)(x, (rows, 16))


@every_quantizer
@parametrize("kind", INPUTS)
def test_quantizers_and_kernels_give_the_same_bits_on_every_device(name, kind):
    x = INPUTS[kind]
    if name.endswith("_16x16") and math.prod(x.shape[:-1]) % 16:
        with pytest.raises(ValueError, match="pad"):
            quantize(name, x)
        return
    seed = 2**63 - 1
    f = function_of_kernels(name, seed)
    versions = [x, x.bfloat16()]
    if kind == "wide":
        versions.append(x.half())
    for v in versions:
        expected = quantize(name, v, seed)
        v = v.to(DEVICE)
        assert same(quantize(name, v, tensor(seed, device=DEVICE)), expected)
        assert f is None or same(f(v), expected)


def as_nvfp4(operand):
    """codes, scales, tensor scale and values of an op of kernels.py -> NVFP4 on the CPU, and the values."""
    codes, scale, tensor_scale, decoded = (t.cpu() for t in operand)
    return NVFP4(codes, scale.view(float8_e4m3fn), tensor_scale), decoded


@parametrize("mode", kernels.MODES)
@parametrize("kind", ["wide", "below E4M3", "vanishing"])
def test_values_that_a_kernel_decodes_are_those_of_its_codes(mode, kind):
    x = INPUTS[kind].bfloat16().to(DEVICE)
    found, values = as_nvfp4(kernels.quantize(x, mode, 1, tensor(3, device=DEVICE), True, True))
    assert same([values], [decode(found, bfloat16)])


# By three rounds, with a part of x so small that some scales are sub-normal; by other rotations at one size,
# of fewer rows.
@parametrize("quantizer, name, size", [
    *((quantizer, "rht128x3", 2.0**-16) for quantizer in kernels.MODES if quantizer != "four_six"),
    *(("rtn", name, 1) for name in ROTATIONS if name != "rht128x3")])
def test_one_read_rotates_and_quantizes_both_ways(quantizer, name, size):
    x = integers(140 if size < 1 else 20, 256)
    x[:, 128:] *= size
    x[128:] *= size
    g = generator()
    row_R, _ = rotation(name, g)
    col_R, _ = rotation(name, g)
    row_seed = tensor(5)
    col_seed = tensor(2**40 + 1)
    both = kernels.rotate_quantize(
        [x.bfloat16().to(DEVICE)],
        quantizer, kernels.permuted(row_R).to(DEVICE), row_seed.to(DEVICE),
        quantizer, kernels.permuted(col_R).to(DEVICE), col_seed.to(DEVICE),
        True, True)
    rows, rows_decoded = as_nvfp4(both[:4])
    columns, columns_decoded = as_nvfp4(both[4:])

    assert same(rows, quartet.quantize(quantizer, x, row_R, row_seed))
    x_t = F.pad(x, (0, 0, 0, -len(x) % 128)).T
    expected = quartet.quantize(quantizer, x_t, col_R, col_seed)
    assert same(columns, expected)
    assert same([rows_decoded], [decode(rows, bfloat16)])
    assert same([columns_decoded], [decode(columns, bfloat16)])
    assert size == 1 or (columns.block_scale.float() < 2.0**-6).any()


def in_rows(scale, R, C):
    """Swizzled scales -> (R, C), by the formula of torch.nn.functional.scaled_mm."""
    r = torch.arange(R, device=scale.device)[:, None]
    c = torch.arange(C, device=scale.device)
    tile = r // 128 * math.ceil(C / 4) + c // 4
    at = tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    return scale.view(uint8)[at].view(float8_e4m3fn)


@parametrize("shape", [(140, 96), (256, 320)])
@parametrize("quantizer", ["rtn", "ms_eden"])
def test_swizzled_scales_are_the_plain_ones_elsewhere_and_zeros(quantizer, shape):
    x = wide(11, *shape).bfloat16().to(DEVICE)
    seed = tensor(3, device=DEVICE)
    plain = kernels.quantize(x, quantizer, 1, seed, True, False, False)
    swizzled = kernels.quantize(x, quantizer, 1, seed, True, False, True)
    codes, scale, tensor_scale, _ = plain
    assert same([codes, kernels.swizzle(scale), tensor_scale], swizzled[:3])
    # For torch.compile an op has the same shapes.
    with FakeTensorMode() as fake:
        for found, swizzle in (plain, False), (swizzled, True):
            guess = kernels.quantize(fake.from_tensor(x), quantizer, 1, None, True, False, swizzle)
            assert [t.shape for t in guess] == [t.shape for t in found]


MIXED = {
    "mixed 1": Recipe("bf16", "four_six", Gemm("rht16", "bf16", "sr"), Gemm(None, "bf16", "rtn")),
    "mixed 2": Recipe("rtn", "bf16", Gemm(None, "sr", "bf16"), Gemm("rht16", "rtn", "bf16"), original=True),
    "mixed 3": Recipe("bf16", "bf16", Gemm(None, "bf16", "bf16"), Gemm(None, "bf16", "bf16")),
}


FP4 = GPU and torch.cuda.get_device_capability() >= (10, 0)    # whether this GPU has FP4 tensor cores


@pytest.fixture
def fp4_tensor_cores(monkeypatch):
    """F.scaled_mm. Where it cannot run, by quartet.matmul, after PyTorch has checked it, on meta tensors."""
    if FP4:
        return
    real = F.scaled_mm

    def meta(t):
        return [meta(part) for part in t] if isinstance(t, list) else t.to("meta")

    def nvfp4(codes, scales):
        scale, tensor_scale = scales
        codes = codes.view(uint8)
        return NVFP4(codes, in_rows(scale, len(codes), codes.shape[1] // 8), tensor_scale)

    def scaled_mm(a, b, a_scales, kinds, b_scales, *rest):
        real(meta(a), meta(b), meta(a_scales), kinds, meta(b_scales), *rest)
        return quartet.matmul(nvfp4(a, a_scales), nvfp4(b.T, b_scales))

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)


@parametrize("recipe, shape", [
    *((recipe, (20, 32, 128)) for recipe in [*RECIPES_4BIT, *MIXED, *IN_TWO_TERMS]),
    *((recipe, shape) for recipe in ("nvidia", "quartet2") for shape in ((140, 144, 128), (20, 160, 256)))])
def test_linear_gives_the_same_bits_with_kernels_and_on_fp4_tensor_cores(
        recipe, shape, monkeypatch, fp4_tensor_cores):
    for name, row in (MIXED | IN_TWO_TERMS).items():
        monkeypatch.setitem(RECIPES, name, row)
    M, K, N = shape
    x = integers(M, K).to(DEVICE).requires_grad_()
    w = integers(N, K).to(DEVICE)
    dy = integers(M, N).to(DEVICE)
    reference = Linear(K, N, recipe=recipe, backend="torch", device=DEVICE)
    linear = Linear(K, N, recipe=recipe, backend="triton", device=DEVICE)
    reference.weight.data = w
    linear.weight.data = w
    expected = step(reference, x, dy)

    monkeypatch.setattr(kernels, "native", lambda w, row: False)
    assert same(step(linear, x, dy), expected)
    native = K % 32 == 0 and recipe not in MIXED
    if native:
        monkeypatch.setattr(kernels, "native", lambda w, row: True)
        assert same(step(linear, x, dy), expected)
    with quartet.quantized_weights(linear):
        assert same(step(linear, x, dy), expected)
    assert equal(quartet.on_grid(w.bfloat16(), recipe), kernels.on_grid(w.bfloat16(), recipe))
    if not native:
        torch._dynamo.reset()
        linear.compile(backend="aot_eager", fullgraph=True)
        assert same(step(linear, x, dy), expected)


@pytest.fixture
def interpreted_dot_scaled(monkeypatch):
    """tl.dot_scaled for the interpreter, which knows no scales of E4M3. (Skips where Triton is too old.)"""
    if GPU:
        if not FP4:
            pytest.skip("no FP4 tensor cores here")
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    if not hasattr(InterpreterBuilder, "create_dot_scaled"):
        pytest.skip("Triton 3.6 interprets no tl.dot_scaled")

    def values(codes, scale):
        scale = tensor(scale.data).view(float8_e4m3fn)
        return decode(NVFP4(tensor(codes), scale, 1.0))

    def dot_scaled(self, a, a_scale, _, b, b_scale, *rest):
        *_, y = rest
        product = values(a.data, a_scale) @ values(b.data.T, b_scale).T
        return TensorHandle(y.data + product.numpy(), y.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot_scaled", dot_scaled)


def test_gemm_multiplies_what_it_is_given(interpreted_dot_scaled):
    a = rtn(normal(140, 288).to(DEVICE))
    b = rtn(normal(1200, 288).to(DEVICE))
    exact = decode(a).double() @ decode(b).double().T
    magnitudes = decode(a).double().abs() @ decode(b).double().abs().T
    # bf16 rounds by 2^-8 (the interpreter truncates: 2^-7), 288 float32 sums by 288 * 2^-24 of magnitudes.
    last_place = 2.0**-8 if GPU else 2.0**-7
    bound = last_place * exact.abs() + 2.0**-15 * magnitudes
    assert ((kernels.gemm(a, b) - exact).abs() <= bound).all()


class Training:
    """A step of two layers on a GPU: `run` is what trains, `gradients(run)` what it leaves."""

    def __init__(self, recipe, device):
        torch.manual_seed(1)
        linear = functools.partial(Linear, recipe=recipe, backend="triton", device=device)
        self.model = nn.Sequential(linear(384, 256), linear(256, 128))
        self.x = normal(256, 384).to(device)
        self.dy = normal(256, 128).to(device)

    def run(self, x, dy):
        self.model(x).backward(dy)

    def gradients(self, run):
        # A graph adds to the gradients where they are: they keep their places.
        for p in self.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.zero_()
        torch.manual_seed(0)
        run(self.x, self.dy)
        found = [p.grad.clone() for p in self.model.parameters()]
        torch.cuda.synchronize()                       # streams share the gradients
        return found


@needs_gpu
@every_4bit_recipe
def test_a_step_runs_on_any_stream_and_gpu_and_as_a_cuda_graph_without_synchronisation(recipe):
    first = Training(recipe, "cuda:0")
    expected = first.gradients(first.run)
    with no_synchronisation():
        with torch.cuda.stream(torch.cuda.Stream()):
            on_a_stream = first.gradients(first.run)
        graph = train_gpt.as_graph(first.run, first.x, first.dy)
    assert same(on_a_stream, expected)
    assert same(first.gradients(graph), expected)

    last = Training(recipe, f"cuda:{torch.cuda.device_count() - 1}")   # while GPU 0 is the current one
    assert same(last.gradients(last.run), expected)


@needs_gpu
def test_offsets_beyond_2_31_and_long_rows():
    def both_ways(x):
        return kernels.rotate_quantize([x], "rtn", R, seed, "rtn", R, seed, True, True)

    R = kernels.permuted(rotation("rht128")[0]).cuda()
    seed = tensor(0, device="cuda")
    x = torch.randn(2**17 + 128, 16384, dtype=bfloat16, device="cuda")
    last = x[-128:].contiguous()
    assert equal(kernels.rtn(x).codes[-128:], kernels.rtn(last).codes)
    found = both_ways(x)
    expected = both_ways(last)
    codes, codes_t = found[0::4]
    values, values_t = found[3::4]
    assert same([codes[-128:], codes_t[:, -64:]], expected[0::4])
    assert same([values[-128:], values_t[:, -128:]], expected[3::4])


@parametrize("gemm", ["plain", "blackwell"])
def test_one_program_serves_all_counts_of_tokens(gemm, monkeypatch):
    # This imports triton, for which the interpreter must have been chosen.
    from torch._dynamo.backends.common import aot_autograd

    programs = []

    def compiler(graph, inputs):
        programs.append(graph)
        return graph.forward

    monkeypatch.setattr(quartet, "GEMM", gemm)
    torch._dynamo.reset()
    linear = Linear(64, 128, recipe="quartet2", backend="triton", device=DEVICE)
    compiled = torch.compile(
        linear, fullgraph=True, dynamic=True,
        backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    # Below, between and above the layer's sizes
    for tokens in 32, 96, 130:
        x = torch.randn(tokens, 64, device=DEVICE, requires_grad=True)
        compiled(x).sum().backward()
    assert len(programs) == 2                          # forward, backward
    torch._dynamo.reset()


def test_nothing_is_made_that_nobody_reads(monkeypatch):
    """With w frozen nvidia rotates nothing. It keeps x in bf16: without FP4 cores no GEMM takes its codes."""
    quartet.check("nvidia", "triton")      # which imports the kernels
    monkeypatch.setattr(kernels, "tile_kernel", None)
    monkeypatch.setattr(kernels, "native", lambda w, row: False)
    linear, x, dy = layer("nvidia", 128, 128, device=DEVICE)
    linear.backend = "triton"
    linear.weight.requires_grad_(False)
    parts = []
    operand = kernels.operand

    def heard(quantizer, t, seed, wanted):
        parts.append(wanted)
        return operand(quantizer, t, seed, wanted)

    monkeypatch.setattr(kernels, "operand", heard)
    y = linear(x)
    assert parts[0] == kernels.BF16_PARTS
    torch.autograd.grad(y, x, dy)


def rows_of_columns(*shape):
    """What kernels.rotate_quantize would return of x^T, for an x without memory."""
    x = torch.empty(shape, dtype=bfloat16, device="meta")
    return kernels.rotate_quantize([x], "", None, None, "rtn", None, None, False, True)


def test_more_tokens_than_a_tile_can_count_are_refused():
    """Places within a tile of 128 rows are computed in 32 bits: 127 rows of 2^24 values, and the rest."""
    assert 128 * 2**24 <= 2**31
    *_, decoded = rows_of_columns(2**24, 128)
    assert decoded.shape == (128, 2**24)
    with pytest.raises(ValueError, match="not 16777344 and 128"):
        rows_of_columns(2**24 + 128, 128)
    assert 2**22 // kernels.tile_options(9, "")["COLUMNS"] > 65535
    with pytest.raises(ValueError, match="not 128 and 4194304"):
        rows_of_columns(128, 2**22)


def checked(*shapes):
    """The bench.Report of its check of these shapes."""
    report = bench.Report()
    bench.check(report, DEVICE, shapes)
    return report


def test_the_check_of_kernels_passes_and_sees_a_wrong_bit(monkeypatch, capsys):
    assert checked((20, 128), (16, 144)).good
    monkeypatch.setitem(quartet.QUANTIZERS, "rtn", quartet.QUANTIZERS["four_six"])
    assert not checked((16, 128)).good
    assert "WRONG: 16 x 128, quantize rtn: codes" in capsys.readouterr().out


def test_the_check_of_gemms_tells_another_order_from_a_wrong_sum(fp4_tensor_cores, monkeypatch, capsys):
    def nvfp4(codes, scale, tensor_scale):
        return NVFP4(codes, scale.view(float8_e4m3fn), tensor_scale)

    def as_probed(a, b):
        return quartet.fp4_matmul(nvfp4(*a), nvfp4(*b))

    def wrong_once(a, b):
        y = as_probed(a, b)
        y[0, 0] = -y[0, 0]
        return y

    def lines_by(gemm):
        monkeypatch.setattr(kernels, "gemm", gemm)
        bench.check_gemms(report, DEVICE, True, [(128, 128, 2048)])
        return [line for line in capsys.readouterr().out.splitlines() if "in Triton" in line]

    # One adds as the probe says, two in float32: no fault. In the interpreter the emulated one takes long.
    emulated = kernels.fp4_gemm
    monkeypatch.setattr(kernels, "fp4_gemm", lambda a, _, b, __: quartet.fp4_gemm(a, b))
    report = bench.Report()
    *rows, verdict = lines_by(as_probed)
    assert len(rows) == 3 and all(line.split("in Triton")[1].split()[0] == "100.0000%" for line in rows)
    assert verdict == "the GEMM in Triton: most like fp4_matmul, in 49,152 of 49,152 outputs"
    # Where half cancels, every other rule is told apart.
    others = [float(share[:-1]) for share in rows[2].split("in Triton")[1].split()[1:]]
    assert len(others) == 4 and max(others) < 50
    assert report.good

    rows = lines_by(wrong_once)
    assert rows[0].split("in Triton")[1].split()[0] == "99.9939%" and not report.good
    assert rows[1] == ("WRONG: 128 x 128 x 2048, 4/6, in Triton: some outputs are far from "
                       "quartet.fp4_matmul's")

    # One that adds to nearest is no fault, and is named.
    report = bench.Report()
    nearest = bench.RULES["nearest"]
    *_, verdict = lines_by(lambda a, b: nearest(nvfp4(*a), nvfp4(*b)))
    assert report.good and "most like nearest, in 49,152 of 49,152" in verdict

    # The emulated one must be what it emulates. (One group of 64 and its negative leave 0, also times that.)
    monkeypatch.setattr(kernels, "fp4_gemm", lambda *args: emulated(*args) * (1 + 2.0**-8))
    report = bench.Report()
    bench.check_gemms(report, DEVICE, False, [(32, 32, 128)])
    assert capsys.readouterr().out.count(", emulated: not the bits of quartet.fp4_matmul") == 2
    assert not report.good


# For other GPUs: data/tests/test_bench.py
def test_kernels_compile_for_fp4_tensor_cores_without_spills(compiled_for_fp4):
    directory, printed = compiled_for_fp4
    names = [c.name for c in bench.configurations(10)]
    rows = printed.splitlines()[2:2 + len(names)]
    assert [row[:28].rstrip() for row in rows] == names
    columns = {row[:28].rstrip(): row[28:].split() for row in rows}
    # Registers, shared memory, spills, programs, warps, five kinds of instructions, all of them, ...
    assert not any(int(columns[c.name][2]) for c in bench.configurations(10) if c.main)
    assert float(columns["both ms_eden"][10]) <= 30
    assert float(columns["requantize ms_eden"][10]) <= 22.5
    assert {name.split()[-1].removesuffix("_16x16") for name in names} == {*kernels.MODES, "gemm"}
    assert "PREDICTED" in printed
    assert ".target sm_100a" in (directory / "sm_100a-both-ms_eden.ptx").read_text()


# ---- README.md ---------------------------------------------------------------------------------------------
#
# Commands run as they stand, but for options that make them short.

def test_commands_of_the_readme_run(commands_of_the_readme):
    assert {"train_gpt.py", "figures.py", "quartet.py"} <= commands_of_the_readme.keys()


def test_ci_installs_by_the_line_of_the_readme_and_runs_its_commands_there():
    install = re.search(r"^(pip install .*)\npython train_gpt.py$", README, re.M)[1]
    assert "`python -m pytest`" in README
    lines = (HERE / ".ci/run").read_text().splitlines()
    begin = lines.index(install)
    end = lines.index("deactivate")
    assert begin < lines.index("python -m pytest") < end
    assert any(line.startswith("python train_gpt.py ") for line in lines[begin:end])


def words_and_numbers(text):
    """Text -> the text with # for each number; and pairs, each number and the size of its last digit."""
    number = r"-?\d+(?:\.\d+)?"
    pairs = []
    for digits in re.findall(number, text):
        _, _, decimals = digits.partition(".")
        pairs.append((float(digits), 10.0 ** -len(decimals)))
    return re.sub(r"\s+", " ", re.sub(number, "#", text)), pairs


def test_the_article_quotes_what_it_prints(commands_of_the_readme):
    """Sections end with their output: word for word, numbers to 2% or 2 in the last digit, as CPUs differ."""
    article = (HERE / "quartet.py").read_text()
    quoted = re.findall(r"^# ---- (\d+)\. (?:.|\n)*?^# Printed:\n((?:#     .*\n)+)", article, re.M)
    printed = re.split(r"^(\d+)\. .*\n", commands_of_the_readme["quartet.py"], flags=re.M)[1:]
    assert [section for section, _ in quoted] == printed[::2] == [str(section) for section in range(1, 13)]
    for (_, comment), text in zip(quoted, printed[1::2]):
        words, quoted_numbers = words_and_numbers(comment.replace("#     ", ""))
        expected_words, numbers = words_and_numbers(text)
        assert words == expected_words
        for (found, digit), (expected, _) in zip(quoted_numbers, numbers):
            assert abs(found - expected) <= max(0.02 * abs(expected), 2.01 * digit)
