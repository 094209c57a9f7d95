"""Tests of sums.py: it counts outputs that differ, of every GEMM of a model, and leaves the model as it was."""
import json
from pathlib import Path

import pytest
import torch

import quartet
import small_runs
import sums


def nvfp4_values(shape, seed, amax):
    """Decoded NVFP4 of random values, bf16, the largest of which is amax, a value of E2M1 times a power of two."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    x[0, 0] = 6.0
    return quartet.decode(quartet.rtn(x)) * (amax / 6)


def test_the_scale_of_others_is_what_amax_over_1536_has_beside_a_power_of_two():
    for amax, scale in (1536.0, 1.0), (3.0, 1.0), (2.0, 4 / 3), (-7.0, 7 / 6), (0.0, 1.0):
        assert sums.scale_of_others(torch.tensor([0.0, amax])).item() == pytest.approx(scale, rel=1e-6)


def test_operands_that_others_need_not_round_give_one_product_and_others_another():
    a = nvfp4_values((32, 256), 1, 6.0)
    b = nvfp4_values((48, 256), 2, 6.0)
    # 6 / 1536 is a power of two.
    rounded, exact = sums.rounded_gemm(a, b, 1)
    assert torch.equal(rounded, exact) and torch.equal(exact, quartet.fp4_gemm(a, b))

    # Of 5 / 1536, m is 5/3: values are rounded to 8 bits, and outputs err by some 2^-9 of their terms.
    a = a.clamp(-5, 5)
    rounded, exact = sums.rounded_gemm(a, b, 1)
    expected = (a.double() * (5 / 3)) @ b.double().T
    assert ((exact - expected).abs() <= 2.0**-8 * expected.abs()).all()
    terms = (a.double().abs() * (5 / 3)) @ b.double().abs().T
    assert ((rounded - expected).abs() <= 2.0**-8 * terms).all()
    assert 0.02 < (rounded != exact).double().mean() < 0.9


def test_outputs_that_differ_are_counted():
    # Columns of such different size that float32 sums depend on their order.
    power = torch.randint(-16, 16, (32,), generator=torch.Generator().manual_seed(3))
    a = nvfp4_values((256, 512), 1, 6.0) * 2.0 ** power.repeat_interleave(16)
    b = nvfp4_values((256, 512), 2, 6.0)
    count = sums.Count()
    y = count(a, b)
    assert torch.equal(y, quartet.gemm(a, b))
    outputs, plain, _ = count.found["y"].tolist()
    assert outputs == 256 * 256 and plain == (y != quartet.fp4_gemm(a, b)).sum() > 0


def test_every_gemm_of_a_model_is_looked_at(place, capsys):
    small_runs.train(recipe="quartet2", layers=2)
    sums.main(["a", "--batch=2", "--out=sums.jsonl"])
    assert quartet.gemm is sums.gemm
    found = json.loads(open("sums.jsonl").read())["gemms"]
    # (outputs, inputs) of the layers; 2 windows of 32 tokens
    layers = [(384, 128), (128, 128), (256, 128), (128, 128)]
    assert found["y"][0] == 2 * 64 * sum(n for n, _ in layers)
    assert found["dx"][0] == 2 * 64 * sum(k for _, k in layers)
    assert found["dw"][0] == 2 * sum(n * k for n, k in layers)
    # Power-of-two units leave sums exact, and others round.
    for outputs, plain, rounded in found.values():
        assert plain <= 1e-3 * outputs < rounded
    assert "2 x 32 tokens" in capsys.readouterr().out


def test_the_long_account_has_the_kept_numbers():
    evidence = Path(sums.__file__).parent
    account = (evidence / "README.md").read_text()
    kept = json.loads((evidence / "results/sums-cpu.jsonl").read_text())["gemms"]
    for kind, (outputs, plain, rounded) in kept.items():
        assert f"| {kind} | {outputs:,} | {plain} | {rounded / outputs:.1%} |" in account
