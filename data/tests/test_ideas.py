"""Tests of ideas.py: each row trains, and changes what it says, and nothing else."""
import math
from types import SimpleNamespace

import pytest
import torch

import experiments
import ideas
import quartet
import small_runs    # which finds ideas.py
import train_gpt

# Nothing is rounded to 4 bits.
EXACT = quartet.Recipe("bf16", "bf16", dx=experiments.EXACT, dw=experiments.EXACT)


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    """What an idea changes is as before after a test."""
    for module, names in ((train_gpt, ("build", "update", "ramp", "save", "in_bf16_forward")),
                          (quartet, ("dampen", "RECIPES")),
                          (quartet.Linear, ("forward", "__init__"))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(quartet, "RECIPES", dict(quartet.RECIPES, exact=EXACT))
    monkeypatch.setattr(quartet, "QUANTIZERS", dict(quartet.QUANTIZERS))


def layer(recipe, out_features=128, in_features=256):
    torch.manual_seed(0)
    return quartet.Linear(in_features, out_features, recipe=recipe, backend="torch")


def run_of(model, step, steps=1000):
    return SimpleNamespace(model=model, c=SimpleNamespace(steps=steps), step=step)


@pytest.mark.parametrize("row", ideas.IDEAS)
def test_every_idea_trains(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ideas, "WINDOW", 2)
    experiments.register()
    recipe, *knobs = experiments.KNOBS[row]
    words = [*experiments.SIZES["tiny"].split(), "--corpus=python", "--steps=4", "--eval_tokens=128",
             "--sample_tokens=1", "--name=run", f"--recipe={recipe}", *knobs]
    experiments.main(["train", row, *words])
    assert math.isfinite(float(torch.load("runs/run/checkpoint.pt", weights_only=True)["log"]["val_loss"]))


def test_what_oscillates_is_reset_and_what_moves_is_not():
    linear = layer("rtn")
    run = run_of(linear, step=200)
    w = linear.weight.data
    w.zero_()
    w[:, 0] = 6.0                                      # by a scale of 1 the grid is E2M1's
    with torch.no_grad():
        for i in range(ideas.WINDOW):
            run.step = 201 + i
            w[0, 1] = 0.3                              # stays
            w[0, 2] = 1.24 + 0.02 * (i % 2)            # goes to and fro over the border at 1.25
            w[0, 3] = i / ideas.WINDOW * 3             # goes from 0 to 3
            before = w.clone()
            ideas.reset(run)
    changed = (w != before).nonzero().tolist()
    assert run.step % ideas.WINDOW == 0
    assert changed == [[0, 2]] and w[0, 2] in (1.0, 1.5)


def test_nothing_is_reset_before_an_eighth_of_the_steps():
    linear = layer("quintet")
    run = run_of(linear, step=0, steps=8 * ideas.WINDOW + 1)
    with torch.no_grad():
        for i in range(ideas.WINDOW):
            run.step += 1
            linear.weight[0, 2] = 1.24 + 0.02 * (i % 2)
            before = linear.weight.clone()
            ideas.reset(run)
    assert torch.equal(linear.weight, before)


def test_a_coupled_pull_is_as_large_as_the_gradient_in_the_end():
    linear = layer("quintet")
    gradient = torch.randn(linear.weight.shape)
    linear.weight.grad = gradient.clone()
    with torch.no_grad():
        ideas.pull_gradient(run_of(linear, step=1000))
    added = linear.weight.grad - gradient
    lost = linear.weight - quartet.on_grid(linear.weight.bfloat16(), "quintet").float()
    torch.testing.assert_close(added.square().mean(), gradient.square().mean())
    # Descent goes from w to Q(w).
    torch.testing.assert_close(added / added.norm(), lost.detach() / lost.detach().norm())


def test_the_average_is_of_the_last_tenth():
    linear = layer("quintet")
    run = run_of(linear, step=0, steps=40)
    with torch.no_grad():
        for step in range(1, 41):
            run.step = step
            linear.weight.fill_(float(step))
            ideas.average(run)
            assert (linear.weight == (38.5 if step == 40 else step)).all()


@pytest.mark.parametrize("of_dy", [False, True])
def test_a_split_mean_token_changes_nothing_but_rounding(of_dy):
    linear = layer("exact")
    x = (torch.randn(4, 32, 256) + 3 * torch.randn(256)).bfloat16().requires_grad_()
    dy = (torch.randn(4, 32, 128) + torch.randn(128)).bfloat16()

    def products():
        return [t.double() for t in (linear(x), *torch.autograd.grad(linear(x), (x, linear.weight), dy))]

    before = products()
    ideas.in_4_bits(ideas.partial(ideas.split_forward, of_dy=of_dy))
    after = products()
    # The rest, both products and their sum are rounded to bf16, by 2^-9 of themselves each; no part is
    # larger than the whole.
    for a, b in zip(after, before):
        assert not torch.equal(a, b)
        assert (a - b).norm() < 4 * 2.0**-9 * b.norm()


def test_where_the_mean_token_dominates_4_bits_lose_far_less_without_it():
    linear = layer("rtn")
    x = (torch.randn(128, 256) + 30 * torch.randn(256)).bfloat16()
    exact = x.double() @ linear.weight.double().T

    def error():
        return ((linear(x) - exact).norm() / exact.norm()).item()

    # The rest, which alone is rounded to 4 bits, is a 30th of the whole; the mean, its product and the sum
    # are rounded to bf16.
    before = error()
    ideas.in_4_bits(ideas.partial(ideas.split_forward, of_dy=False))
    assert error() < before / 25 + 3 * 2.0**-9


def test_a_low_rank_branch_is_what_4_bits_need_not_hold():
    linear = layer("exact")
    w = linear.weight.detach()
    linear.register_buffer("branch", ideas.largest(w))
    assert torch.linalg.matrix_rank(linear.branch) == ideas.RANK
    # No other matrix of that rank is nearer.
    values = torch.linalg.svdvals(w.double())
    rest = (w - linear.branch).double().norm()
    torch.testing.assert_close(rest, values[ideas.RANK:].norm(), rtol=1e-4, atol=0)

    x = torch.randn(8, 256).bfloat16()
    before = linear(x)
    ideas.in_4_bits(ideas.low_rank_forward)
    after = linear(x)
    assert not torch.equal(after, before)
    # Both parts of the weight, both products and their sum are rounded to bf16; no part is larger than the
    # whole.
    assert (after - before).norm() < 5 * 2.0**-9 * before.norm()


def linear_and_exact():
    """A layer of quintet, an x, and their product in float64."""
    linear = layer("quintet")
    linear.weight.data = quartet.on_grid(linear.weight.detach().bfloat16(), "quintet").float()
    x = torch.randn(4, 32, 256).bfloat16()
    return linear, x, x.double() @ linear.weight.detach().double().T


def test_along_all_singular_vectors_nothing_of_x_is_lost():
    linear, x, exact = linear_and_exact()
    linear.register_buffer("branch", linear.weight.detach())
    before = linear(x)
    ideas.in_4_bits(ideas.rest_forward)
    assert (linear(x) - exact).norm() < 4 * 2.0**-9 * exact.norm() < (before - exact).norm()

    # Along none nothing changes.
    linear.branch = torch.zeros_like(linear.branch)
    assert torch.equal(linear(x), before)


def test_late_x_is_exact_and_w_in_4_bits():
    linear, x, exact = linear_and_exact()
    _, change, knob = ideas.IDEAS["quintet_x_end"]
    change()
    assert knob == "--bf16_forward_end=0.1"
    c = train_gpt.Config(recipe="quintet", steps=10, bf16_forward_end=0.1)
    errors = []
    for step in 9, 10:
        linear.recipe = train_gpt.recipe_of(c, step)
        errors.append(((linear(x) - exact).norm() / exact.norm()).item())
    # Of x is lost 8% of its size (NMSE 6.7e-3); then nothing, and y is rounded to bf16.
    assert 0.07 < errors[0] < 0.1
    assert errors[1] < 2.0**-9

    # The weight is still pulled, and rounded: another one has another product.
    assert quartet.RECIPES[linear.recipe].dampen == 10
    linear.weight.data += 1e-3 * torch.randn(linear.weight.shape)
    y = linear(x)
    on_grid = quartet.on_grid(linear.weight.detach().bfloat16(), "quintet").double()
    assert (y - x.double() @ on_grid.T).norm() < 2.0**-9 * y.norm()


def test_a_pull_by_another_power():
    ideas.ramp_by(2)
    assert train_gpt.ramp(0.5) == 0.25
