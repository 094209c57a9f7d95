"""Tests of quartet.dampen: where weights go, that they come to rest there, and when a run does it."""
import math
import pytest
import torch
import demonstrate, quartet, train_gpt
from quartet import Linear, dampen, on_grid

def model(*recipes):
    torch.manual_seed(0)
    return torch.nn.Sequential(*[Linear(128, 128, recipe=recipe) for recipe in recipes])

def test_weights_move_by_a_share_of_the_way_to_what_x_is_multiplied_by():
    m = model("quintet", "quartet2", "bf16")
    before = [layer.weight.detach().clone() for layer in m]
    dampen(m, torch.tensor(0.0))
    assert all(torch.equal(layer.weight, w) for layer, w in zip(m, before))
    dampen(m, 0.03)
    values = quartet.decode(quartet.scale_search(before[0].bfloat16()))
    assert torch.equal(m[0].weight, torch.lerp(before[0], values, 0.3))
    assert all(torch.equal(layer.weight, w) for layer, w in zip(m[1:], before[1:]))
    m[0].weight.data.copy_(before[0])
    dampen(m, 0.2), dampen(m, torch.tensor(0.2))                        # twice the way: at most all of it
    assert torch.equal(m[0].weight, values)
    m[0].weight.data.copy_(before[0])
    for _ in range(60): dampen(m, 0.03)                                 # 0.7^60 of the way is left: 5e-10
    assert (m[0].weight - on_grid(m[0].weight.bfloat16(), "quintet")).abs().max() < 1e-6

def test_weights_between_two_grid_points_flip_to_the_end_unless_dampened():
    assert demonstrate.flips("quartet2") > 0.2 and demonstrate.flips("quintet") < 0.02

def test_a_run_dampens_by_learning_rate_and_progress_but_not_after_a_skipped_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "DAMPEN_EVERY", 2)
    predict, shares, calls = train_gpt.GPT.predict, [], []
    def spoiled(self, x, targets):
        calls.append(0)
        return predict(self, x, targets) * (math.nan if len(calls) == 4 else 1)
    monkeypatch.setattr(train_gpt.GPT, "predict", spoiled)
    monkeypatch.setattr(quartet, "dampen", lambda model, share: shares.append((len(calls), share)))
    train_gpt.main("cpu --layers=1 --width=128 --heads=1 --hidden=128 --sequence=16 --batch=2 --steps=7 "
                   "--lr=0.01 --tokens_per_step=32 --eval_tokens=32 --sample_tokens=1 --device=cpu".split())
    assert [step for step, _ in shares] == [2, 4, 6] and shares[1][1] == 0
    for step, share in shares[::2]:
        lr = 0.01 * (0.55 + 0.45 * math.cos(math.pi * (step - 2) / 6))  # a step of 7 warms up
        assert share == pytest.approx(2 * lr * (step / 7) ** 4)
