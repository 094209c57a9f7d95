"""Tests of quartet.dampen: where weights go, that they come to rest there, and when a run does it."""
import math

import pytest
import torch

import demonstrate
import quartet
import small_runs
import train_gpt
from quartet import Linear


def layers_of(*recipes):
    torch.manual_seed(0)
    return torch.nn.Sequential(*[Linear(128, 128, recipe=recipe) for recipe in recipes])


def test_weights_move_by_a_share_of_the_way_to_what_x_is_multiplied_by():
    model = layers_of("quintet", "quartet2", "bf16")
    before = [layer.weight.detach().clone() for layer in model]
    weight = model[0].weight
    values = quartet.decode(quartet.scale_search(before[0].bfloat16()))

    # A share of 0 moves nothing; quintet's strength is 10; other recipes do not dampen.
    quartet.dampen(model, torch.tensor(0.0))
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model, before))
    quartet.dampen(model, 0.03)
    assert torch.equal(weight, torch.lerp(before[0], values, 0.3))
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model[1:], before[1:]))

    # A share of 0.2 would be twice the way: they go all of it, and no further.
    weight.data.copy_(before[0])
    quartet.dampen(model, 0.2)
    quartet.dampen(model, torch.tensor(0.2))
    assert torch.equal(weight, values)

    # After 60 times 0.7^60 of the way is left: 5e-10.
    weight.data.copy_(before[0])
    for _ in range(60):
        quartet.dampen(model, 0.03)
    assert (weight - quartet.on_grid(weight.bfloat16(), "quintet")).abs().max() < 1e-6


def test_frozen_weights_stay_and_a_weight_of_two_layers_moves_once():
    model = layers_of("quintet", "quintet", "quintet")
    frozen, one, other = model
    frozen.weight.requires_grad_(False)
    other.weight = one.weight
    before = [layer.weight.detach().clone() for layer in model]
    quartet.dampen(model, 0.03)
    assert torch.equal(frozen.weight, before[0])
    values = quartet.on_grid(before[1].bfloat16(), "quintet").float()
    assert torch.equal(one.weight, torch.lerp(before[1], values, 0.3))


def test_a_weight_that_is_computed_is_not_dampened_in_silence():
    model = layers_of("quartet2", "quintet")
    for layer in model:
        torch.nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="weight of 1 is .* another recipe"):
        quartet.dampen(model, 0.03)

    # Nothing has moved then. Of a weight of two layers, the one that dampens decides.
    first, second = layers_of("quintet", "quintet")
    torch.nn.utils.parametrizations.weight_norm(second)
    before = first.weight.detach().clone()
    with pytest.raises(ValueError, match="weight of 1 is"):
        quartet.dampen(torch.nn.Sequential(first, second), 0.03)
    assert torch.equal(first.weight, before)
    second = Linear(128, 128, recipe="quartet2")
    second.weight = first.weight
    quartet.dampen(torch.nn.Sequential(first, second), 0.03)
    assert not torch.equal(first.weight, before)


def test_weights_between_two_grid_points_flip_to_the_end_unless_dampened():
    assert demonstrate.flips("quartet2", steps=200) > 0.2
    assert demonstrate.flips("quintet", steps=200) < 0.02


def test_a_run_dampens_by_learning_rate_and_progress_but_not_after_a_skipped_step(place, monkeypatch):
    monkeypatch.setattr(train_gpt, "DAMPEN_EVERY", 2)
    passes = small_runs.spoil_losses(monkeypatch, [4])
    shares = {}

    def note(model, share):
        shares[len(passes)] = share      # a forward pass a step

    monkeypatch.setattr(quartet, "dampen", note)
    small_runs.train(steps=7, lr=0.01)
    assert [*shares] == [2, 4, 6]
    assert shares[4] == 0
    for step in (2, 6):
        # Of 7 steps one warms up. A share is that of the two steps since the last.
        lr = 0.01 * (0.55 + 0.45 * math.cos(math.pi * (step - 2) / 6))
        assert shares[step] == pytest.approx(2 * lr * (step / 7)**4)
