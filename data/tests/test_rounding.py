"""Tests of rounding.py: it rounds what it says, and nothing else."""
import json
from pathlib import Path

import pytest
import torch

import quartet
import rounding
import small_runs
import train_gpt


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """rounding.py's quantizer is gone after a test."""
    monkeypatch.setattr(quartet, "QUANTIZERS", dict(quartet.QUANTIZERS))


@pytest.fixture
def found(place):
    """{run: {part: loss}} of two small runs."""
    small_runs.train(recipe="quartet2", layers=2)
    small_runs.train(recipe="quartet2", layers=2, seed=2, name="b")
    rounding.main(["a", "b", "--tokens=512", "--out=parts.jsonl"])
    losses = {}
    for line in open("parts.jsonl"):
        record = json.loads(line)
        losses.setdefault(record["run"], {})[record["part"]] = record["loss"]
    return losses


def loss_by(run, recipe, layers=""):
    """The validation loss of a run, layers whose names end or begin so by a recipe, all others in bf16."""
    model, c = train_gpt.load_model(run, recipe="bf16", eval_tokens=512, device="auto")
    for name, m in model.named_modules():
        if isinstance(m, quartet.Linear) and (name.startswith(layers) or name.endswith(layers)):
            m.recipe = recipe
    return train_gpt.evaluate(model, small_runs.shards(c, "val", model.rope.device.type), c)


def test_each_part_is_what_it_is_called(found):
    for run, losses in found.items():
        assert losses["bf16"] == loss_by(run, "bf16")
        assert losses["x and w, four_six"] == loss_by(run, "quartet2")
        for recipe, x, w in ("only x", "scale_search", "bf16"), ("only w", "bf16", "rtn"):
            quartet.RECIPES[recipe] = quartet.Recipe(x, w, rounding.EXACT, rounding.EXACT)
        assert losses["w, rtn"] == loss_by(run, "only w")
        assert losses["x, scale_search"] == loss_by(run, "only x")
        assert losses["x of down, scale_search"] == loss_by(run, "only x", ".down")
        assert losses["x of blocks.1, scale_search"] == loss_by(run, "only x", "blocks.1.")
        assert len(losses) == len(set(losses.values()))

        # A second term takes nearly all of it away.
        lost = [abs(losses[part] - losses["bf16"])
                for part in ("x, scale_search", "x in two terms, scale_search")]
        assert lost[1] < 0.3 * lost[0]
    assert found["a"] != found["b"]


def test_kinds_and_blocks_are_parts_of_the_model():
    names = [f"blocks.{i}.{kind}" for i in range(11) for kind in ("qkv", "out", "up", "down")]
    parts = [part.layers for part in rounding.parts(names)]
    some = [layers for layers in parts if layers != names]
    assert len(some) == 4 + 11
    for layers in some[:4], some[4:]:
        assert sorted(sum(layers, [])) == sorted(names)


def test_noise_has_the_mean_square_of_what_is_lost_and_is_normal():
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(1))
    x[:32] *= 100
    lost = (x - quartet.decode(quartet.scale_search(x))).unflatten(-1, (-1, 16))
    torch.manual_seed(0)
    # Without the rounding to bf16
    values = torch.stack([rounding.noise(x, None, None).codes.float() - x for _ in range(8)])
    noise = values.unflatten(-1, (-1, 16))
    size = lost.square().mean(-1).sqrt()
    ratio = noise.square().mean((0, -1)).sqrt() / size
    assert abs(ratio.mean() - 1) < 0.01
    assert abs((noise / size[..., None]).pow(4).mean() - 3) < 0.1
    assert abs((noise * lost).sum() / (noise[0].norm() * lost.norm())) < 0.03


def test_mistakes_are_told_in_one_line(place):
    with pytest.raises(train_gpt.UserError, match="nothing"):
        rounding.main(["nothing"])
    assert not Path("parts.jsonl").exists()
