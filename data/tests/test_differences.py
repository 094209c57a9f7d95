"""Tests of differences.py: what stands there for the authors' code has the properties of theirs."""
import re
from pathlib import Path

import torch

import differences
import quartet

README = Path(__file__).parents[1] / "evidence" / "README.md"


def test_the_amax_makes_a_tensor_scale_that_uses_all_of_e4m3_and_the_papers_nmse():
    x = differences.normal(1024, 1024)
    found = differences.rtn_by_amax(x)
    assert abs(1e3 * differences.nmse(found, x) - 9.0) < 0.1    # table 1
    # The largest value is 6 * 448 exactly.
    assert torch.isclose(found.abs().max(), x.abs().max(), rtol=1e-6)


def test_stochastic_rounding_by_neighbours_is_right_on_average_but_moves_grid_points():
    v = torch.tensor([0.0, 0.3, 1.0, 2.5, 4.0, -4.0, -5.5]).repeat(100000, 1)
    u = torch.rand(v.shape, generator=torch.Generator().manual_seed(0))
    for sr in differences.sr_by_neighbours, quartet.e2m1:
        assert ((sr(v, u).mean(0) - v[0]).abs() < 0.02).all()
    of_four = differences.sr_by_neighbours(v, u)[:, 4]
    assert set(of_four.tolist()) == {3.0, 6.0}


def cells(text):
    """Lines of text -> lists of what stands apart by two spaces or more."""
    return [re.split("  +", line.strip()) for line in text.splitlines()]


def test_each_difference_is_seen_on_its_side_and_stands_in_the_readme(capsys):
    differences.main([])
    printed = cells(capsys.readouterr().out)
    shown = cells(README.read_text())
    for row in printed:
        assert shown.count(row) == 1

    rows = {what: (theirs, ours) for *_, what, theirs, ours in printed}
    theirs, ours = rows["1 - <y, Q(y)> / <y, y>, without noise"]
    assert 4e-4 < float(theirs) < 8e-4    # their notebook: 5.6e-4
    assert ours == "0"
    _, ours = rows["decoded values that bf16 changes"]
    assert ours == "0%"
    _, ours = rows["1 - ||x R||^2 / ||x||^2"]
    assert ours == "0"
    theirs, ours = rows["bias, one 100 in 128 (1024 draws; <: noise)"]
    assert 3 < float(theirs.rstrip("%")) < 5
    assert ours == "< 0.3%"               # (0.097^2 / 1024)^0.5


def test_a_bias_is_told_from_the_noise_of_the_draws():
    x = differences.normal(64, 128)
    b, noise = differences.bias(x, "rht128x2", 64)
    assert b < noise / 2
    assert abs(noise / (9.3e-3 / 64) ** 0.5 - 1) < 0.05    # one draw: NMSE 9.3e-3
