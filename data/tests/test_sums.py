"""Tests of sums.py: it counts outputs that differ, of every GEMM of a model, and leaves all as it was."""
import json
from pathlib import Path

import pytest
import torch

import quartet
import small_runs
import sums


def nvfp4_values(shape, seed):
    """Decoded NVFP4 of random values, float32, the largest of which is 6."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).clamp(-4, 4)
    x[0, 0] = 6.0
    return quartet.decode(quartet.rtn(x))


@pytest.mark.parametrize("amax, scale", [(1536.0, 1.0), (3.0, 1.0), (2.0, 4 / 3), (-7.0, 7 / 6), (0.0, 1.0)])
def test_the_scale_of_others_is_what_amax_over_1536_has_beside_a_power_of_two(amax, scale):
    found = sums.scale_of_others(torch.tensor([0.0, amax]))
    assert found.item() == torch.tensor(scale).item()


def test_operands_that_others_need_not_round_give_one_product_and_others_another():
    a = nvfp4_values((32, 256), 1)
    b = nvfp4_values((48, 256), 2)
    # 6 / 1536 is a power of two.
    rounded, exact = sums.rounded_gemm(a, b, 1)
    assert torch.equal(rounded, exact)
    assert torch.equal(exact, quartet.fp4_gemm(a, b))

    # Of 5 / 1536, m is 5/3.
    a = a.clamp(-5, 5)
    rounded, exact = sums.rounded_gemm(a, b, 1)
    scaled = a.double() * (5 / 3)
    expected = scaled @ b.double().T
    terms = scaled.abs() @ b.double().abs().T
    # The result is rounded to bf16, by 2^-8 of itself at most, and float32 sums by 256 * 2^-23 of the terms.
    sums_err = 256 * 2.0**-23 * terms
    assert ((exact - expected).abs() <= 2.0**-8 * expected.abs() + sums_err).all()
    # And here values of a, by 2^-8 of themselves.
    assert ((rounded - expected).abs() <= 2.0**-8 * (expected.abs() + 2 * terms) + sums_err).all()
    assert not torch.equal(rounded, exact)


def test_outputs_that_differ_are_counted():
    # Columns of such different size that float32 sums depend on their order.
    generator = torch.Generator().manual_seed(3)
    power = torch.randint(-16, 16, (32,), generator=generator)
    a = nvfp4_values((256, 512), 1) * 2.0 ** power.repeat_interleave(16)
    b = nvfp4_values((256, 512), 2)
    count = sums.Count()
    y = count(a, b)
    assert torch.equal(y, quartet.gemm(a, b))
    outputs, plain, _ = count.found["y"]
    assert outputs == 256 * 256
    assert plain == (y != quartet.fp4_gemm(a, b)).sum() > 0


def test_every_gemm_of_a_model_is_looked_at(place, capsys):
    small_runs.train(recipe="quartet2", layers=2)
    sums.main(["a", "--batch=2", "--out=sums.jsonl"])
    # All is as it was.
    assert quartet.gemm is sums.gemm
    assert quartet.wgrad_gemm.__module__ == "quartet"

    # (outputs, inputs) of the layers of a block; 2 blocks, 2 windows of 32 tokens
    layers = [(384, 128), (128, 128), (256, 128), (128, 128)]
    expected = dict(
        y=2 * 64 * sum(n for n, _ in layers),
        dx=2 * 64 * sum(k for _, k in layers),
        dw=2 * sum(n * k for n, k in layers),
    )
    found = json.loads(Path("sums.jsonl").read_text())["gemms"]
    assert {kind: outputs for kind, (outputs, _, _) in found.items()} == expected
    # To round operands changes far more than to add in another order.
    assert all(plain < rounded for _, plain, rounded in found.values())
    assert "2 x 32 tokens" in capsys.readouterr().out


def test_the_long_account_has_the_kept_numbers():
    evidence = Path(sums.__file__).parent
    account = (evidence / "README.md").read_text()
    kept = [json.loads(line)["gemms"] for name in ("cpu", "h200")
            for line in open(evidence / f"results/sums-{name}.jsonl")]
    all_outputs = others = 0
    for gemms in kept:
        for kind, (outputs, plain, rounded) in gemms.items():
            assert f"| {kind} | {outputs:,} | {plain} | {rounded / outputs:.1%} |" in account
            all_outputs += outputs
            others += plain
    assert f"{others} of {all_outputs / 1e9:.1f} billion outputs differ" in account
    share = f"one in {all_outputs / others / 1e6:.1f} million"
    assert share in account and share in (evidence.parents[1] / "README.md").read_text()
