"""Random inputs, held against a second and slower definition of the formats, in float64.

    python -m pytest data/tests/test_fuzz.py --fuzz=60                     for about 60 seconds
    python -m pytest data/tests/test_fuzz.py --fuzz=1 --fuzz_seed=N        case N of each test

The definitions in section 1 share no code with quartet.py. They are written with tables and float64. Where
quartet.py says that a float32 decides something, `float32` rounds to it; so codes and scales must agree to
the bit, those of both backends. A case is made from one integer. Each run tries new ones, and a failure names
the command that repeats it. On a GPU the kernels run natively; elsewhere Triton interprets them.
"""
import collections
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch

import quartet

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = [name for name in quartet.QUANTIZERS if name != "bf16"]
RECIPES = [recipe for recipe in quartet.RECIPES if recipe != "bf16"]

# The interpreter computes both branches of a tl.where, and numpy warns of the one that is not taken.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
]


# ---- 1. The definitions ------------------------------------------------------------------------------------
#
# A small float is the table of its values. The index is the code of E2M1, or the byte of E4M3. So a value is
# even where its index is.

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SIGNED_E2M1 = np.concatenate([-E2M1[:0:-1], E2M1])
# Numbers of 4 significant bits: for scales in units of a block (below), amax / 6 and its neighbours.
FOUR_BITS = np.array([digits * 2.0**power for power in range(-12, 6) for digits in range(8, 16)])
# E4M3 has those from 2^-6 to 448, and below the multiples of 2^-9.
NORMAL = (FOUR_BITS >= 2.0**-6) & (FOUR_BITS <= 448)
E4M3 = np.concatenate([np.arange(8) * 2.0**-9, FOUR_BITS[NORMAL]])
TENSOR_SCALES = 2.0 ** np.arange(-123, 128)


def matmul(a, b):
    """a b^T in float64. (By torch: numpy's threads would wait for those of other programs.)"""
    return (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()


def float32(v):
    """v (...) float64, rounded to float32."""
    return v.astype(np.float32).astype(np.float64)


def nearest(v, grid):
    """The index of the value of an ascending grid that is nearest to v; ties: the even index."""
    middle = (grid[1:] + grid[:-1]) / 2
    # The two differ at ties only.
    low = np.searchsorted(middle, v, "left")
    high = np.searchsorted(middle, v, "right")
    return np.where(low % 2 == 0, low, high)


def stochastic(v, grid, u):
    """The index of one of v's two neighbours in a grid: the upper one if u is below the fraction."""
    v = np.minimum(v, grid[-1])
    low = np.clip(np.searchsorted(grid, v, "right") - 1, 0, len(grid) - 2)
    fraction = float32((v - grid[low]) / (grid[low + 1] - grid[low]))
    return low + (u < fraction)


def to_e2m1(v):
    """v (...) -> the nearest E2M1 values."""
    return np.copysign(E2M1[nearest(abs(v), E2M1)], v)


def quotient(v, s):
    """v / s; 0 where s is 0."""
    return v / np.where(s > 0, s, np.inf)


def halving_sum(v):
    """v (blocks, n) -> (blocks, 1): the first half plus the second, in float32, and so on."""
    while v.shape[1] > 1:
        half = v.shape[1] // 2
        v = float32(v[:, :half] + v[:, half:])
    return v


def dot(v, q):
    """<v, q> of each block."""
    return halving_sum(float32(v * q))


def uniform(seed, count):
    """(count,) numbers in [0, 1): the upper 24 bits of words of Philox4x32, 7 rounds (Salmon et al. 2011)."""
    counter = np.arange((count + 3) // 4, dtype=np.uint64)
    word = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c = [counter, 0 * counter, 0 * counter, 0 * counter]
    key = [seed % 2**32, seed % 2**64 >> 32]
    for _ in range(7):
        a = c[0] * np.uint64(0xD2511F53)
        b = c[2] * np.uint64(0xCD9E8D57)
        c = [
            b >> half ^ c[1] ^ np.uint64(key[0]),
            b & word,
            a >> half ^ c[3] ^ np.uint64(key[1]),
            a & word,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    words = np.stack(c, 1).reshape(-1)[:count]
    return (words >> np.uint64(8)).astype(np.float64) * 2.0**-24


def rounded_by_least_error(v, scales):
    """Blocks v, each by the one of scales whose squared error is the least -> q, s. Ties: the earlier."""
    best_q = 0
    best_s = 0
    least = np.inf
    for s in scales:
        q = to_e2m1(quotient(v, s))
        difference = float32(q * s - v)
        error = dot(difference, difference)
        less = error < least
        best_q = np.where(less, q, best_q)
        best_s = np.where(less, s, best_s)
        least = np.where(less, error, least)
    return best_q, best_s


def ms_eden(v, top, u, four_six):
    """Blocks v of largest magnitudes top, in units -> q, s: nearest, and the scale times the EDEN factor."""
    s = float32(top / np.float32(6 * 16 / 17 / 0.93))
    v = float32(v * float32(quotient(1.0, s)))
    q = to_e2m1(v)
    if four_six:
        q4 = to_e2m1(float32(v * np.float32(2 / 3)))
        cosine_4 = float32(float32(dot(v, q4) ** 2) * dot(q, q))
        cosine_6 = float32(float32(dot(v, q) ** 2) * dot(q4, q4))
        q = np.where(cosine_4 > cosine_6, q4, q)
    factor = np.where(dot(v, q) > 0, float32(dot(v, v) / dot(v, q)), 1.0)
    return q, FOUR_BITS[stochastic(float32(s * factor), FOUR_BITS, u)] * (top > 0)


class Expected(NamedTuple):
    """What a quantizer must return for (M, K), and what that decodes to."""
    codes: np.ndarray      # (M, K/2) uint8
    scales: np.ndarray     # (M, K/16) uint8, bytes of E4M3
    tensor_scale: float
    values: np.ndarray     # (M, K) float64


def by_definition(name, x, seed):
    """x (M, K) float64, of float32 values, by a name of QUANTIZERS -> Expected."""
    M, K = x.shape
    if not np.isfinite(x).all():
        # Nothing remains that could be mistaken for a number.
        codes = np.zeros((M, K // 2), np.uint8)
        scales = np.zeros((M, K // 16), np.uint8)
        return Expected(codes, scales, np.nan, np.full((M, K), np.nan))

    # A block a row, its 16 columns one after another. Of 16x16 blocks a sum is over columns, then over rows.
    mode = name.removesuffix("_16x16")
    rows = 1 if mode == name else 16
    b = x.reshape(M // rows, rows, K // 16, 16).transpose(0, 2, 3, 1).reshape(-1, 16 * rows)
    amax = abs(b).max(1, keepdims=True)
    amax[amax < 2.0**-120] = 0
    # The unit of a block: a quarter of the power of two below amax.
    unit = 2.0 ** np.clip(np.frexp(amax)[1] - 3, -122, 125)
    v = float32(b / unit)
    top = amax / unit

    # Random numbers: for the values or for the scale of each block; then for scales that become sub-normal.
    noise = {"sr": 16, "ms_eden": 1, "ms_eden_46": 1}.get(mode, 0)
    u = uniform(seed, (noise + 1) * len(b))
    u_scale = u[noise * len(b):, None]
    u = u[:noise * len(b)].reshape(len(b), noise)

    # Scales s, and values q of E2M1.
    six = nearest(top / 6, FOUR_BITS)
    if mode == "rtn":
        q, s = rounded_by_least_error(v, [FOUR_BITS[six] * (top > 0)])
    elif mode == "four_six":
        four = nearest(top / 4, FOUR_BITS)
        q, s = rounded_by_least_error(v, [FOUR_BITS[scale] * (top > 0) for scale in (six, four)])
    elif mode == "scale_search":
        steps = 0, -1, 1, 4, 5
        q, s = rounded_by_least_error(v, [FOUR_BITS[six + step] * (top > 0) for step in steps])
    elif mode == "sr":
        s = FOUR_BITS[nearest(float32(top / np.float32(6 * 16 / 17)), FOUR_BITS)] * (top > 0)
        q = SIGNED_E2M1[stochastic(float32(quotient(v, s)), SIGNED_E2M1, u)]
    else:
        q, s = ms_eden(v, top, u, mode == "ms_eden_46")

    # The tensor scale: the least power of two, from 2^-123 on, that leaves no block scale above 448.
    s = s * unit
    largest = s.max(initial=0)
    tensor_scale = 1.0
    if largest > 0:
        tensor_scale = TENSOR_SCALES[np.searchsorted(448 * TENSOR_SCALES, largest)]
    stored = float32(s / tensor_scale)
    byte = nearest(stored, E4M3)
    if noise:
        byte = stochastic(stored, E4M3, u_scale)

    # Back to the shape of x.
    byte = byte.reshape(M // rows, K // 16).repeat(rows, 0)
    q = q.reshape(M // rows, K // 16, 16, rows).transpose(0, 3, 1, 2).reshape(M, K)
    code = nearest(abs(q), E2M1) + 8 * (q < 0)
    codes = code[:, ::2] + 16 * code[:, 1::2]
    values = q * (E4M3[byte] * tensor_scale).repeat(16, 1)
    return Expected(codes.astype(np.uint8), byte.astype(np.uint8), tensor_scale, values)


ROTATIONS = {     # name: size of H, rounds
    "rht16": (16, 1),
    "rht32": (32, 1),
    "rht128": (128, 1),
    "rht128x2": (128, 2),
    "rht128x3": (128, 3),
}


def rotation(name, signs):
    """R (128, 128) = D1 H D2 H ..., D of signs (3, 128); I for None.

    H: of Sylvester's matrix of 128 the blocks of a size along the diagonal.
    """
    if name is None:
        return np.eye(128)
    size, rounds = ROTATIONS[name]
    H = np.ones((1, 1))
    while len(H) < 128:
        H = np.block([[H, H], [H, -H]])
    H *= np.kron(np.eye(128 // size), np.ones((size, size)))
    R = np.eye(128)
    for d in signs[:rounds]:
        R = matmul(R * d, H)                           # H is symmetric
    return R


def rotated(x, R):
    """x (M, K), K % 128 == 0 -> x R, group by group; and whether float32 holds all sums on the way."""
    if not np.isfinite(x).all():
        return np.full_like(x, np.nan), True
    groups = x.reshape(-1, 128)
    # The last binary digit of each value, and of a group the last of all.
    mantissa, exponent = np.frexp(groups)
    digits = (abs(mantissa) * 2.0**53).astype(np.int64)
    last = np.where(digits > 0, np.ldexp((digits & -digits).astype(float), exponent - 53), np.inf)
    exact = matmul(abs(groups), abs(R.T)).max(1, initial=0) <= 2.0**24 * last.min(1, initial=np.inf)
    return matmul(groups, R.T).reshape(x.shape), exact.all()


# ---- 2. Random inputs --------------------------------------------------------------------------------------

WIDE_DTYPES = [torch.float32, torch.bfloat16, torch.float64]    # of float32's range
DTYPES = [*WIDE_DTYPES, torch.float16]


def pick(rng, *choices):
    """One of them; what stands there twice, twice as often."""
    return choices[rng.integers(len(choices))]


def random_values(rng, M, K, largest):
    """(M, K) float64, |v| <= largest: of one kind, times sizes of the tensor, of blocks and of elements."""
    kind = pick(rng, "normal", "normal", "equal", "ties", "powers", "sparse", "outlier", "constant")
    v = rng.standard_normal((M, K))
    sign = np.where(v < 0, -1.0, 1.0)
    if kind == "equal":
        v = sign
    elif kind == "ties":
        # Codes and the points halfway; each block has a 6; block scales and the points halfway.
        v = rng.integers(-24, 25, (M, K)) / 4
        v[:, ::16] = 6
        v *= rng.integers(16, 33, (M, K // 16)).repeat(16, 1) / 16
    elif kind == "powers":
        v = sign * 2.0 ** rng.integers(-8, 3, (M, K))
    elif kind == "sparse":
        v *= rng.random((M, K)) < 0.05                 # also -0.0
    elif kind == "outlier" and M:
        v[rng.integers(M), rng.integers(K)] *= 2.0 ** rng.integers(60)
    elif kind == "constant":
        v[:] = rng.standard_normal()

    def power(shape, *spreads):
        spread = pick(rng, *spreads)
        return rng.integers(-spread, spread + 1, shape)

    size = rng.integers(-150, 128) + power((M, K // 16), 0, 3, 12, 40, 140).repeat(16, 1)
    size += power((M, K), 0, 0, 0, 2, 30, 140)
    v = np.ldexp(v * pick(rng, 1.0, 1.0, rng.uniform(1, 2)), size)
    # Now and then, many values move to a neighbour in float32.
    v = np.clip(v, -largest, largest).astype(np.float32)
    if rng.random() < 0.3:
        v = np.where(rng.random((M, K)) < 0.5, v, np.nextafter(v, np.float32(pick(rng, 0, 1, -1))))
    return np.clip(v.astype(np.float64), -largest, largest)


def spoiled(rng, v):
    """v with one value or a few that are not finite: in one of six cases."""
    if v.size and rng.random() < 1 / 6:
        v = v.copy()
        for _ in range(pick(rng, 1, 1, 3)):
            row = rng.integers(v.shape[0])
            column = rng.integers(v.shape[1])
            v[row, column] = pick(rng, np.nan, np.inf, -np.inf)
    return v


def leading(rng, rows):
    """A shape of 1 to 4 axes, or of none, with so many rows."""
    shape = [rows]
    for _ in range(rng.integers(4)):
        divisor = pick(rng, *(d for d in (1, 2, 3, 4, 5, 16) if shape[-1] % d == 0))
        shape[-1:] = [divisor, shape[-1] // divisor]
    if rows == 1 and rng.random() < 0.5:
        shape = []
    return shape


def strided(rng, t):
    """t (..., K) with other strides. By "expand" it has other values, too: rows are repeated."""
    way = pick(rng, "plain", "transposed", "steps", "offset", "expand")
    if way == "transposed":
        t = t.mT.contiguous().mT if t.dim() > 1 else t
    elif way == "steps":
        t = t.repeat_interleave(2, -1)[..., ::2]
    elif way == "offset":
        t = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    elif way == "expand" and t.dim() > 1 and t.shape[0]:
        t = t[:1].expand(t.shape)
    return t


def as_tensor(rng, v, dtypes=DTYPES):
    """v (M, K) float64 -> a tensor (..., K) on DEVICE, of some shape, dtype and strides."""
    dtype = pick(rng, *dtypes)
    if dtype == torch.float16:
        # Into its range: the largest becomes 2^-4 to 2^15, if it is finite.
        largest = abs(v).max(initial=0, where=np.isfinite(v))
        v = np.ldexp(v, rng.integers(-4, 15) - int(np.frexp(largest)[1]))
    t = torch.from_numpy(v).to(DEVICE, dtype)
    return strided(rng, t.view(*leading(rng, len(v)), v.shape[1]))


def values_of(t):
    """t (..., K) -> its float32 values as (M, K) float64."""
    rows = t.shape[:-1].numel()
    return t.detach().float().cpu().double().reshape(rows, t.shape[-1]).numpy()


# ---- 3. The tests ------------------------------------------------------------------------------------------

@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def seconds(request):
    """How long all tests may take together."""
    option = request.config.getoption("--fuzz", default=None)
    if option is None:
        pytest.skip("random inputs for a minute: python -m pytest data/tests/test_fuzz.py --fuzz=60")
    return option


@pytest.fixture(scope="module")
def kernels(seconds):
    """kernels.py. Without a GPU it is interpreted: Triton reads that variable when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
            from triton.runtime import interpreter
            # It prepares triton.language in each call of a @jit function. Once a launch is enough: see
            # test_quartet.py.
            prepare = interpreter._patch_lang

            def prepare_once(fn):
                if fn.__globals__.get("tl", interpreter.tl.core).static_print is not print:
                    return prepare(fn)

            patch.setattr(interpreter, "_patch_lang", prepare_once)
        import kernels
        if not GPU:
            assert kernels.INTERPRET, "Triton was imported before this test: run this file alone"
            # A whole tile at once takes half the time of two halves.
            options = kernels.tile_options
            patch.setattr(kernels, "tile_options", lambda *args: options(*args) | {"W": 128})
        patch.setattr(kernels, "native", lambda w, row: False)         # GEMMs of decoded values
        # What takes seconds the first time, and is no part of the minute.
        kernels.ms_eden(torch.zeros(1, 128, device=DEVICE).bfloat16(), torch.eye(128, device=DEVICE), 0)
        yield kernels


@pytest.fixture
def fuzz(request, seconds, backend, capsys):
    """A function that calls check(rng, seed) for this test's share of the time, and prints what was tried."""
    only = request.config.getoption("--fuzz_seed", default=None)
    test = request.node.name
    # There are three tests of each backend. Interpreted kernels are slow.
    share = {"torch": 1 / 12, "triton": 3 / 12}[backend]

    def run(check):
        first = time.time_ns() // 1000 % 10**9 if only is None else only
        end = time.monotonic() + share * seconds
        tried = collections.Counter()
        seed = first
        while seed == first or time.monotonic() < end and only is None:
            try:
                tried[check(np.random.default_rng(seed), seed)] += 1
            except Exception as error:
                raise AssertionError(f"Case {seed} fails. To repeat it: python -m pytest --fuzz=1 "
                                     f"--fuzz_seed={seed} '{request.node.path}::{test}'") from error
            seed += 1
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(tried.items()))
        with capsys.disabled():
            print(f"\n{test}: {seed - first} inputs, from seed {first} on, none wrong ({kinds})")

    return run


def assert_as_expected(found, expected):
    """NVFP4 (..., K) has the bits of Expected (M, K), and decodes to its values in float32 and bf16."""
    for t, e in zip(found, expected):
        t = t.view(torch.uint8) if t.dim() else t      # the bytes of E4M3
        np.testing.assert_array_equal(t.cpu().numpy().reshape(np.shape(e)), e)
    for dtype in torch.float32, torch.bfloat16:
        decoded = quartet.decode(found, dtype).double().cpu().numpy().reshape(expected.values.shape)
        # Near the end of float32 a value may overflow; so it does in float32.
        np.testing.assert_array_equal(decoded, float32(expected.values))


def assert_operand_as_expected(found, expected):
    """The parts of kernels.Operand (M, K) have the bits and the values of Expected."""
    codes, block_scale, tensor_scale, decoded = found
    assert_as_expected(quartet.NVFP4(codes, block_scale.view(torch.float8_e4m3fn), tensor_scale), expected)
    np.testing.assert_array_equal(decoded.double().cpu().numpy(), float32(expected.values))


def as_int64(seed):
    return torch.tensor(seed, device=DEVICE)


def test_quantizers(fuzz, kernels, backend):
    def check(rng, seed):
        name = pick(rng, *NAMES)
        mode = name.removesuffix("_16x16")
        rows = 1 if mode == name else 16
        M = pick(rng, *(M for M in (0, 1, 1, 2, 16, 16, 17, 48, 128, 130) if M % rows == 0))
        K = pick(rng, *(K for K in (16, 32, 48, 128, 144, 256, 512) if M * K < 2**15))
        if backend == "triton" and GPU:
            # A kernel compiles for a second for each new kind of shape: test_quartet.py has more of them.
            M = pick(rng, *(M for M in (17, 130, 136, 144) if M % rows == 0))
            K = pick(rng, 48, 144)
        # Up to here no decoded value overflows. (An EDEN factor can be as large as 1.22.)
        largest = 3e38
        if mode.startswith("ms_eden"):
            largest = 2.6e38
        x = as_tensor(rng, spoiled(rng, random_values(rng, M, K, largest)))
        noise = int(rng.integers(-2**63, 2**63))
        expected = by_definition(name, values_of(x), noise)
        assert np.isfinite(float32(expected.values)).all() == np.isfinite(values_of(x)).all()
        if backend == "torch":
            assert_as_expected(quartet.quantize(name, x, None, noise), expected)
        else:
            x = x.reshape(M, K)
            if x.dtype != torch.bfloat16:
                x = x.float()
            assert_operand_as_expected(kernels.quantize(x, mode, rows, as_int64(noise), True, True), expected)
        return name

    fuzz(check)


def test_rotations(fuzz, kernels, backend):
    def check(rng, seed):
        name = pick(rng, *(name for name in NAMES if not name.endswith("_16x16")))
        rotation_name = pick(rng, *ROTATIONS)
        signs = rng.choice([-1.0, 1.0], (3, 128))
        R = rotation(rotation_name, signs)
        M = pick(rng, 1, 2, 17, 130)
        K = pick(rng, 128, 256)
        # Sums that float32 holds: of whole numbers; or of one number with the signs of a column of R, 1e34 at
        # most, up to which nothing overflows.
        x = rng.integers(-9, 10, (M, K)) * (rng.random((M, K)) < pick(rng, 1, 1, 0.05))
        size = 2.0 ** rng.integers(-122, 110, (M, 1))
        if rng.random() < 0.5:
            x = np.sign(R[:, rng.integers(128)])[np.arange(K) % 128] * np.ones((M, 1))
            size = pick(rng, 1e34, 10.0 ** rng.uniform(-36, 34, (M, 1)))
        x = torch.from_numpy(spoiled(rng, np.clip(x * size, -1e34, 1e34))).to(DEVICE, torch.bfloat16)
        noise = int(rng.integers(-2**63, 2**63))
        found_R, n = quartet.rotation_from(rotation_name, torch.from_numpy(signs).float().to(DEVICE))
        assert np.array_equal(found_R.cpu().numpy(), R)
        assert np.array_equal(matmul(R, R), n * np.eye(128))

        y, exact = rotated(values_of(x), R)
        assert exact
        expected = by_definition(name, y, noise)
        assert np.isfinite(float32(expected.values)).all() == np.isfinite(values_of(x)).all()
        if backend == "torch":
            assert_as_expected(quartet.quantize(name, x, found_R, noise), expected)
        else:
            found = kernels.rotate_quantize(
                [x], name, kernels.permuted(found_R), as_int64(noise), "", None, None, True, True)
            assert_operand_as_expected(found, expected)
        return name

    fuzz(check)


class Product(NamedTuple):
    """What a GEMM must compute: a b^T / n."""
    a: np.ndarray
    b: np.ndarray
    n: float = 1.0
    exact: bool = True     # whether no sum of a rotation was rounded: then a and b are known to the bit


def backward_product(gemm, noise, dy, other):
    """Product of dy and the other operand, given with the summed axis last, by a Gemm of RECIPES."""
    exact = [True]
    n = 1.0
    if gemm.rotation:
        R = rotation(gemm.rotation, noise.signs.cpu().numpy())
        n = (R[0] * R[0]).sum()
        (dy, other), exact = zip(rotated(dy, R), rotated(other, R))
    dy = by_definition(gemm.dy, dy, int(noise.dy)).values
    if gemm.other:
        other = by_definition(gemm.other, other, int(noise.other)).values
    return Product(dy, other, n, all(exact))


def products_by_definition(row, x, w, dy, noise):
    """The Products that make y, dx and dw, by a row of RECIPES."""
    def whole_groups(t):
        return np.pad(t, ((0, -len(t) % 128), (0, 0)))

    x_kept = x_q = by_definition(row.x, x, 0).values
    w_kept = w_q = by_definition(row.w, w, 0).values
    if row.original:
        x_kept = x
    if row.original and row.dx.other:
        w_kept = w
    return [
        Product(x_q, w_q),
        backward_product(row.dx, noise[0], dy, w_kept.T),
        backward_product(row.dw, noise[1], whole_groups(dy).T, whole_groups(x_kept).T),
    ]


def longest(t, axis):
    """No vector along this axis of t is longer."""
    return np.sqrt(t.shape[axis]) * abs(t).max(initial=0)


def shrunk(t, length, limit):
    """t, smaller by a power of two, if length exceeds a limit, so that it does not."""
    if length > limit:
        t = t * 2.0 ** -np.ceil(np.log2(length / limit))
    return t


def random_layer(rng, row, noise, M, K, N):
    """x (M, K), w (N, K), dy (M, N) for which nothing overflows: float64, and what kind they are."""
    rotates = row.dx.rotation or row.dw.rotation
    largest = 1e34 if rotates else 2.6e38
    kind = pick(rng, "whole", "wild", "aligned")
    shapes = (M, K), (N, K), (M, N)
    if kind == "whole":
        # Rotations of whole numbers are exact: so operands are compared to the bit.
        x, w, dy = (rng.integers(-9, 10, shape) * 2.0 ** rng.integers(-40, 40) for shape in shapes)
    elif kind == "wild":
        x, w, dy = (random_values(rng, *shape, largest) for shape in shapes)
    else:
        # The signs of a column of each rotation, which add up to the largest sums there can be.
        def signs(gemm, noise, count):
            R = rotation(gemm.rotation, noise.signs.cpu().numpy())
            return np.sign(R[:, rng.integers(128)] + 0.1)[np.arange(count) % 128]

        along_N = signs(row.dx, noise[0], N)
        along_M = signs(row.dw, noise[1], M)[:, None]
        size = 10.0 ** rng.uniform(-20, 34, 2)
        x = np.repeat(along_M, K, 1) * size[0]
        w = np.repeat(along_N[:, None], K, 1) * size[1]
        dy = along_M * along_N * largest
    # y to 2e38; gradients to 1e32 where rotated, as sums of rotated values are divided by n last.
    limit = 1e32 if rotates else 2e38
    x = shrunk(x, longest(x, 1) * longest(w, 1), 2e38)
    dy = shrunk(dy, longest(dy, 1) * longest(w, 0), limit)
    dy = shrunk(dy, longest(dy, 0) * longest(x, 0), limit)
    return spoiled(rng, x), w, spoiled(rng, dy), kind


def assert_product(found, gemm, expected):
    """found is what a GEMM has returned, gemm = (a, b, n, result), and that is the Product expected."""
    *_, result = gemm
    a = values_of(gemm[0])
    b = values_of(gemm[1])
    np.testing.assert_array_equal(values_of(found), values_of(result))
    for used, operand in (a, expected.a), (b, expected.b):
        assert np.isfinite(used).all() == np.isfinite(operand).all()
        if expected.exact:
            # The kernels leave out zeros at the end of an operand that is not rotated.
            np.testing.assert_array_equal(used, operand[:, :used.shape[1]])
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        assert found.isnan().all()
        return
    # bf16 rounds by 2^-8; each of the float32 additions by 2^-23 of the sum of magnitudes, if it truncates.
    # Below 2^-126, products and results may be zeros.
    y = matmul(a, b) / expected.n
    magnitudes = matmul(abs(a), abs(b)) / expected.n
    bound = 2.0**-8 * abs(y) + a.shape[1] * (2.0**-23 * magnitudes + 2.0**-126)
    error = abs(values_of(result) - y)
    assert (error <= bound).all(), f"an error of {(error / bound).max()} times its bound"


def test_linear(fuzz, kernels, backend, monkeypatch):
    gemms = []
    draws = []

    def spy(name, heard):
        real = getattr(quartet, name)

        def spied(*args):
            result = real(*args)
            heard.append((*args, result))
            return result

        monkeypatch.setattr(quartet, name, spied)

    spy("gemm", gemms)
    spy("draw_noise", draws)

    def check(rng, seed):
        recipe = pick(rng, *RECIPES)
        row = quartet.RECIPES[recipe]
        M = pick(rng, 0, 1, 2, 17, 128, 130)
        K = pick(rng, 16, 48, 128, 144)
        N = pick(rng, 128, 128, 128, 256) if row.dx.rotation else pick(rng, 16, 48, 128)
        torch.manual_seed(seed)
        noise = quartet.draw_noise(torch.empty(0, device=DEVICE), row)
        x, w, dy, kind = random_layer(rng, row, noise, M, K, N)
        if backend == "triton" and not GPU:
            # Triton's interpreter reads sub-normal bf16 wrongly.
            x, w, dy = (np.where(abs(t) < 2.0**-126, 0, t) for t in (x, w, dy))
        x = as_tensor(rng, x, WIDE_DTYPES)
        dy = torch.from_numpy(dy).to(DEVICE, x.dtype).view(*x.shape[:-1], N)
        w = torch.from_numpy(w).to(DEVICE, pick(rng, *WIDE_DTYPES))
        expected = products_by_definition(row, *(values_of(t.bfloat16()) for t in (x, w, dy)), noise)

        linear = quartet.Linear(K, N, recipe=recipe, backend=backend, device="meta")
        linear.weight = torch.nn.Parameter(w)
        gemms.clear()
        draws.clear()
        torch.manual_seed(seed)
        y = linear(x.requires_grad_())
        dx, dw = torch.autograd.grad(y, (x, linear.weight), dy)
        # The noise was what this test has drawn from the same seed.
        (*_, noise_used), = draws
        for used, known in zip(noise_used, noise):
            assert all(map(torch.equal, used, known))
        for found, gemm, product in zip((y, dx, dw), gemms, expected, strict=True):
            assert_product(found, gemm, product)
        return f"{recipe} {kind}"

    fuzz(check)
