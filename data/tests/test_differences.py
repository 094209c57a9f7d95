"""Tests of differences.py: what stands there for the authors' code has the properties of theirs."""
import re
from pathlib import Path
import torch
import differences, quartet

def test_the_amax_makes_a_tensor_scale_that_uses_all_of_e4m3_and_the_papers_nmse():
    x = differences.normal(1024, 1024)
    assert abs(1e3 * differences.nmse(differences.rtn_by_amax(x), x) - 9.0) < 0.1       # table 1
    top = differences.rtn_by_amax(x).abs().max()
    assert torch.isclose(top, x.abs().max(), rtol=1e-6)                 # the largest value is 6 * 448 exactly

def test_stochastic_rounding_by_neighbours_is_right_on_average_but_moves_grid_points():
    v = torch.tensor([0.0, 0.3, 1.0, 2.5, 4.0, -4.0, -5.5]).repeat(100000, 1)
    u = torch.rand(v.shape, generator=torch.Generator().manual_seed(0))
    for sr in differences.sr_by_neighbours, quartet.e2m1:
        assert ((sr(v, u).mean(0) - v[0]).abs() < 0.02).all()
    assert {*differences.sr_by_neighbours(v, u)[:, 4].tolist()} == {3.0, 6.0}

def test_each_difference_is_seen_on_its_side_and_stands_in_the_readme(capsys):
    differences.main()
    printed, readme = capsys.readouterr().out, (Path(__file__).parents[2] / "README.md").read_text()
    cells = [re.split("  +", line.strip()) for line in printed.splitlines()]
    shown = [re.split("  +", line.strip()) for line in readme.splitlines()]
    assert all(shown.count(row) == 1 for row in cells)
    rows = {what: (theirs, ours) for *_, what, theirs, ours in cells}
    aligned = rows["1 - <y, Q(y)> / <y, y>, without noise"]
    assert 4e-4 < float(aligned[0]) < 8e-4 and aligned[1] == "0"          # their notebook: 5.6e-4
    assert rows["decoded values that bf16 changes"][1] == "0%"
    assert rows["1 - ||x R||^2 / ||x||^2"][1] == "0"
    outlier = rows["bias, one 100 in 128 (1024 draws; <: noise)"]
    assert 3 < float(outlier[0].rstrip("%")) < 5 and outlier[1] == "< 0.3%"         # (0.097^2 / 1024)^0.5

def test_a_bias_is_told_from_the_noise_of_the_draws():
    x = differences.normal(64, 128)
    b, noise = differences.bias(x, "rht128x2", 64)
    assert b < noise / 2 and abs(noise / (9.3e-3 / 64) ** 0.5 - 1) < 0.05      # one draw: NMSE 9.3e-3
