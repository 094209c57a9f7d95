"""Where quartet.py differs from the code that the authors of Quartet II published: each choice, measured.

    python data/evidence/differences.py

The left column follows their code (github.com/IST-DASLab/Quartet-II: its emulation, unless CUDA is named)
and the paper's formulas, written anew; the right column is quartet.py. On N(0, 1) in bf16, 4096 x 1024.
"""
import math, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import quartet
from quartet import E2M1_MAX, E4M3_MAX, GROUP, block_sum, blocks, e2m1, e4m3, divide_by, ratio, rotate

def normal(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16().float()
def nmse(a, x): return ((a - x).double().square().sum() / x.double().square().sum()).item()

def exact(v): return f"{v:.1e}" if abs(v) > 1e-6 else "0"      # what float32 sums leave is none

def rtn_by_amax(x):
    """RTN with the tensor scale amax / (6 * 448), which needs all of x before the first block.

    x (M, K) float32 -> decoded (M, K) float32.
    """
    b, amax, unit = blocks(x)
    tensor_scale = x.abs().max() / (E2M1_MAX * E4M3_MAX)
    s = e4m3(divide_by(amax * unit, E2M1_MAX) / tensor_scale) * tensor_scale
    return (e2m1(ratio(b, s)) * s).view(x.shape)

def alignment(x, R, group):
    """1 - <y, mean of its MS-EDEN> / <y, y> of y = x R, one EDEN factor for `group` scaled values, 16 or 128.

    Rounding the product of scale and factor is unbiased, so the mean over draws has it unrounded. Their scale
    is rounded to E4M3 before the factor is known, ours is not.
    """
    b, amax, unit = blocks(rotate(x, R))
    s = divide_by(amax, quartet.EDEN_MAX) * unit
    s = quartet.round_scale(s) if group == GROUP else s
    v = ratio(b, s)
    q = e2m1(v)
    sums = [block_sum(t).view(-1, group // 16).sum(1) for t in (v * v, v * q)]
    factor = (sums[0] / sums[1]).repeat_interleave(group // 16).view(s.shape)
    return 1 - ((b * q * s * factor).double().sum() / (b * b).double().sum()).item()

def sr_by_neighbours(v, u):
    """SR of v between the grid points below and at or above it that differ from v: grid points move, too."""
    grid = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    low, high = grid[torch.searchsorted(grid, v) - 1], grid[torch.searchsorted(grid, v, right=True)]
    return torch.where(u < (v - low) / (high - low), high, low)

def bias(x, name, draws=1024):
    """MS-EDEN's bias b and the noise of the mean of draws, rotated back, with new signs in each; over ||x||.

    noise^2 = spread of the draws / draws, b^2 = ||mean - x||^2 - noise^2, or 0: none is seen below noise.
    """
    g, total, squares = torch.Generator().manual_seed(1), torch.zeros(x.shape, dtype=torch.float64), 0.0
    for i in range(draws):
        R, n = quartet.rotation(name, g)
        error = rotate(quartet.decode(quartet.ms_eden(x, R, i)), R.T).double() / n - x
        total, squares = total + error, squares + error.square().sum()
    mean = (total / draws).square().sum()
    noise = (squares / draws - mean) / (draws - 1)
    return [(t / x.double().square().sum()).sqrt().item() for t in ((mean - noise).clamp(min=0), noise)]

def measure():
    """Yield difference, what is measured, counted or calculated, theirs, ours, both as text."""
    x, R = normal(4096, 1024), quartet.rotation("rht128", torch.Generator().manual_seed(0))[0]
    theirs, ours = rtn_by_amax(x), quartet.decode(quartet.rtn(x))
    yield "tensor scale: amax / (6 * 448); a power of two", "passes over x before codes are final", "2", "1"
    yield "", "NMSE of RTN x 1e3", *(f"{1e3 * nmse(t, x):.2f}" for t in (theirs, ours))
    yield ("", "decoded values that bf16 changes",
           *(f"{(t.bfloat16().float() != t).float().mean():.0%}" for t in (theirs, ours)))
    b, amax, unit = blocks(x)
    v = ratio(b, quartet.round_scale(divide_by(amax, E2M1_MAX)) * unit)
    tie = torch.stack([v.abs() == t for t in (0.25, 1.25, 2.5, 5.0)]).any(0).float().mean()
    yield "ties: away from zero; to even, as the hardware", "values that this decides", f"{tie:.2%}", "none"
    yield ("EDEN factor: of 128 scaled values; of a block", "1 - <y, Q(y)> / <y, y>, without noise",
           *(exact(alignment(x, R, group)) for group in (GROUP, 16)))
    H, groups = R * torch.tensor(128**-0.5).bfloat16(), x.double().view(-1, GROUP)
    lost = (1 - (groups @ r.double()).square().sum() / n / groups.square().sum()
            for r, n in ((H, 1), (R, GROUP)))
    yield "R: entries bf16(128^-0.5) (CUDA); integers", "1 - ||x R||^2 / ||x||^2", *map(exact, lost)
    u = torch.rand(10000, generator=torch.Generator().manual_seed(0))
    four = torch.full_like(u, 4.0)
    yield ("SR: a grid point moves; stays", "standard deviation of 4.0 after SR",
           *(f"{f(four, u).std():.2f}" for f in (sr_by_neighbours, e2m1)))
    chance = lambda streams: -math.expm1(-1000**2 / 2 / streams)
    yield ("noise: a seed of 10^6; of 2^64", "chance that two of 1000 draws are the same",
           *(f"{chance(n):.0e}" for n in (1e6, 2.0**64)))
    outlier = normal(16, GROUP).index_fill(1, torch.tensor(0), 100.0)
    found = (bias(outlier, name) for name in ("rht128", "rht128x3"))
    yield ("rounds of RHT: one; three (quintet)", "bias, one 100 in 128 (1024 draws; <: noise)",
           *(f"{b:.1%}" if b > noise else f"< {noise:.1%}" for b, noise in found))

def main():
    """Print all differences."""
    print(f"{'difference: theirs; ours':50}{'measured, counted or calculated':44}{'theirs':>8}{'ours':>9}")
    for difference, what, theirs, ours in measure(): print(f"{difference:50}{what:44}{theirs:>8}{ours:>9}")

if __name__ == "__main__": main()
