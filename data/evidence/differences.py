"""Where quartet.py differs from the code that the authors of Quartet II published: each choice, measured.

    python data/evidence/differences.py

The left column follows their code (github.com/IST-DASLab/Quartet-II: its emulation, unless CUDA is named)
and the paper's formulas, written anew; the right column is quartet.py. On N(0, 1) in bf16, 4096 x 1024.
"""
import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import quartet
from quartet import E2M1_MAX, E4M3_MAX, GROUP, block_sum, blocks, divide_by, e2m1, e4m3, ratio, rotate


def normal(*shape):
    """Numbers drawn from N(0, 1), float32 of bf16 values: always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def nmse(found, exact):
    """Squared error over squared values."""
    return ((found - exact).double().square().sum() / exact.double().square().sum()).item()


# ---- What stands for the authors' code ---------------------------------------------------------------------

def rtn_by_amax(x):
    """RTN with the tensor scale amax / (6 * 448), which needs all of x before the first block.

    x (M, K) float32 -> decoded (M, K) float32.
    """
    b, amax, unit = blocks(x)
    tensor_scale = x.abs().max() / (E2M1_MAX * E4M3_MAX)
    s = e4m3(divide_by(amax * unit, E2M1_MAX) / tensor_scale) * tensor_scale
    return (e2m1(ratio(b * unit, s)) * s).view(x.shape)


def alignment(x, R, group):
    """1 - <y, mean of its MS-EDEN> / <y, y> of y = x R, one EDEN factor for `group` scaled values, 16 or 128.

    Rounding the product of scale and factor is unbiased, so the mean over draws has it unrounded. Their scale
    is rounded to E4M3 before the factor is known, ours is not.
    """
    b, amax, unit = blocks(rotate(x, R))
    b = b * unit
    s = divide_by(amax, quartet.EDEN_MAX) * unit
    if group == GROUP:
        s = quartet.round_scale(s)
    v = ratio(b, s)
    q = e2m1(v)

    def group_sum(t):
        return block_sum(t).view(-1, group // 16).sum(1)

    factor = group_sum(v * v) / group_sum(v * q)
    factor = factor.repeat_interleave(group // 16).view(s.shape)
    return 1 - ((b * q * s * factor).double().sum() / (b * b).double().sum()).item()


def sr_by_neighbours(v, u):
    """SR of v between the grid points below and at or above it that differ from v: grid points move, too."""
    grid = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    low = grid[torch.searchsorted(grid, v) - 1]
    high = grid[torch.searchsorted(grid, v, right=True)]
    return torch.where(u < (v - low) / (high - low), high, low)


# ---- The measurements --------------------------------------------------------------------------------------
#
# Each function without arguments yields Rows of one difference.

class Row(NamedTuple):
    """A line of the table."""
    difference: str    # theirs; ours
    what: str          # is measured, counted or calculated
    theirs: str
    ours: str


def shown(value):
    """A small number as text. What float32 sums leave is 0."""
    return f"{value:.1e}" if abs(value) > 1e-6 else "0"


def tensor_scale():
    x = normal(4096, 1024)
    theirs = rtn_by_amax(x)
    ours = quartet.decode(quartet.rtn(x))

    def changed(t):
        return f"{(t.bfloat16().float() != t).float().mean():.0%}"

    yield Row("tensor scale: amax / (6 * 448); a power of two", "passes over x before codes are final",
              "2", "1")
    yield Row("", "NMSE of RTN x 1e3", f"{1e3 * nmse(theirs, x):.2f}", f"{1e3 * nmse(ours, x):.2f}")
    yield Row("", "decoded values that bf16 changes", changed(theirs), changed(ours))


def ties():
    b, amax, _ = blocks(normal(4096, 1024))
    v = ratio(b, quartet.round_scale(divide_by(amax, E2M1_MAX)))
    # The ties whose neighbour of even code is the one nearer to 0.
    tie = torch.isin(v.abs(), torch.tensor([0.25, 1.25, 2.5, 5.0])).float().mean()
    yield Row("ties: away from zero; to even, as the hardware", "values that this decides",
              f"{tie:.2%}", "none")


def eden_factor():
    x = normal(4096, 1024)
    R, _ = quartet.rotation("rht128", torch.Generator().manual_seed(0))
    yield Row("EDEN factor: of 128 scaled values; of a block", "1 - <y, Q(y)> / <y, y>, without noise",
              shown(alignment(x, R, GROUP)), shown(alignment(x, R, 16)))


def rotation_matrix():
    groups = normal(4096, 1024).double().view(-1, GROUP)
    R, n = quartet.rotation("rht128", torch.Generator().manual_seed(0))

    def lost(R, n):
        length = (groups @ R.double()).square().sum() / n
        return shown(1 - length / groups.square().sum())

    H = R * torch.tensor(n**-0.5).bfloat16()
    yield Row("R: entries bf16(128^-0.5) (CUDA); integers", "1 - ||x R||^2 / ||x||^2", lost(H, 1), lost(R, n))


def grid_points():
    u = torch.rand(10000, generator=torch.Generator().manual_seed(0))
    four = torch.full_like(u, 4.0)
    yield Row("SR: a grid point moves; stays", "standard deviation of 4.0 after SR",
              f"{sr_by_neighbours(four, u).std():.2f}", f"{e2m1(four, u).std():.2f}")


def seeds():
    def chance(streams):
        # of a birthday: two of 1000 draws pick the same of so many streams
        return f"{-math.expm1(-1000**2 / 2 / streams):.0e}"

    yield Row("noise: a seed of 10^6; of 2^64", "chance that two of 1000 draws are the same",
              chance(1e6), chance(2.0**64))


def bias(x, name, draws=1024):
    """MS-EDEN's bias b and the noise of the mean of draws, rotated back, with new signs in each; over ||x||.

    noise^2 = spread of the draws / draws, b^2 = ||mean - x||^2 - noise^2, or 0: none is seen below noise.
    """
    g = torch.Generator().manual_seed(1)
    total = torch.zeros(x.shape, dtype=torch.float64)
    squares = 0.0
    for seed in range(draws):
        R, n = quartet.rotation(name, g)
        error = rotate(quartet.decode(quartet.ms_eden(x, R, seed)), R.T).double() / n - x
        total += error
        squares += error.square().sum()
    mean = (total / draws).square().sum()
    noise = (squares / draws - mean) / (draws - 1)
    norm = x.double().square().sum()
    return ((mean - noise).clamp(min=0) / norm).sqrt().item(), (noise / norm).sqrt().item()


def rounds():
    outlier = normal(16, GROUP)
    outlier[:, 0] = 100.0

    def seen(name):
        b, noise = bias(outlier, name)
        return f"{b:.1%}" if b > noise else f"< {noise:.1%}"

    yield Row("rounds of RHT: one; three (quintet)", "bias, one 100 in 128 (1024 draws; <: noise)",
              seen("rht128"), seen("rht128x3"))


def main(argv=None):
    """Print all differences."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    print(f"{'difference: theirs; ours':50}{'measured, counted or calculated':44}{'theirs':>8}{'ours':>9}")
    for section in tensor_scale, ties, eden_factor, rotation_matrix, grid_points, seeds, rounds:
        for row in section():
            print(f"{row.difference:50}{row.what:44}{row.theirs:>8}{row.ours:>9}")


if __name__ == "__main__":
    main()
