"""Tests of training through steps without a finite gradient, and of what train_gpt.py names then."""
import math

import pytest
import torch

import train_gpt
from small_runs import SMALL, checkpoint, logged, result, same, spoil_losses, train


# ---- What is named -----------------------------------------------------------------------------------------

@pytest.fixture
def model():
    torch.manual_seed(0)
    made = train_gpt.GPT(train_gpt.Config(**SMALL | dict(layers=2)))
    made.use_recipe("quartet2", "torch")
    return made


@pytest.fixture
def batch():
    """Tokens and targets."""
    tokens, targets = torch.randint(0, 256, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    return tokens, targets


def found(model, batch):
    return train_gpt.first_not_finite(model, [batch])


def test_nothing_is_found_where_all_is_finite(model, batch):
    assert found(model, batch).startswith("nothing")


@pytest.mark.parametrize("name", [
    "blocks.1.up",
    "embedding",
    "blocks.0.norm2",
])
def test_a_weight_is_named(model, batch, name):
    model.get_submodule(name).weight.data[3] = math.inf
    assert found(model, batch) == f"the weight of {name}"


def spoil_output(model):
    model.blocks[1].out.register_forward_hook(lambda layer, inputs, y: y * math.nan)


def spoil_input(model):
    """Of a layer, by what is computed between two modules: the layer's output shows it."""
    model.blocks[1].down.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * math.inf,))


def spoil_norm(model):
    model.blocks[0].norm2.register_forward_hook(lambda layer, inputs, y: y * math.nan)


def spoil_block(model):
    model.blocks[0].register_forward_hook(lambda block, inputs, y: y * math.nan)


def spoil_loss(model):
    model.register_forward_hook(lambda model, inputs, loss: loss * math.nan)


def spoil_gradient(model):
    def divide(layer, inputs, y):
        y.register_hook(lambda dy: dy / 0)

    model.blocks[0].up.register_forward_hook(divide)


@pytest.mark.parametrize("spoil, what", [
    (spoil_output, "the output of blocks.1.out"),
    (spoil_input, "the output of blocks.1.down"),
    (spoil_norm, "the output of blocks.0.norm2"),
    (spoil_block, "the output of blocks.0"),
    (spoil_loss, "the output of the model"),
    (spoil_gradient, "the gradient dy of blocks.0.up"),
])
def test_outputs_and_gradients_are_named_in_the_order_of_computing(model, batch, spoil, what):
    """All that is computed from it is not finite either: the first is named."""
    spoil(model)
    assert found(model, batch) == what


def test_a_norm_without_weights_is_looked_at_too(model, batch):
    model.blocks[0].norm1 = torch.nn.RMSNorm(128, elementwise_affine=False)
    tokens, _ = batch
    row = model.embedding.weight.data[tokens[0, 0]]      # a view, of a row that is used
    row.fill_(math.inf)
    assert found(model, batch) == "the weight of embedding"

    # Finite, but its square overflows in the norms: the last of them has no finite gradient.
    row.fill_(3e38)
    assert found(model, batch) == "the gradient dy of blocks.1"


# ---- What a run does ---------------------------------------------------------------------------------------

def leave_out(monkeypatch, number):
    """Let the optimizers that train_gpt.py makes leave out this step, counted from 1."""
    make = train_gpt.make_optimizer
    steps = []

    def make_lazy(*args):
        optimizer = make(*args)

        def step():
            steps.append(0)
            if len(steps) != number:
                torch.optim.AdamW.step(optimizer)

        optimizer.step = step
        return optimizer

    monkeypatch.setattr(train_gpt, "make_optimizer", make_lazy)


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(place, monkeypatch, capsys):
    # The loss of step 3 is NaN: that is logged, as null, printed and counted.
    with monkeypatch.context() as patch:
        spoil_losses(patch, [3])
        train(name="spoiled", steps=5)
    for key in ("loss", "grad_norm"):
        assert [step for step, value in logged("spoiled", key).items() if value is None] == [3]
    assert "step 3 skipped: loss nan, norm nan; 1 so far" in capsys.readouterr().out
    assert result("spoiled")["skipped"] == 1

    # The same run, leaving that step out, ends with the same bits.
    with monkeypatch.context() as patch:
        leave_out(patch, 3)
        train(name="left_out", steps=5)
    spoiled = checkpoint("spoiled")
    left_out = checkpoint("left_out")
    assert same(spoiled["model"], left_out["model"])
    moments = left_out["optimizer"]["state"]
    assert all(same(state, moments[i]) for i, state in spoiled["optimizer"]["state"].items())

    # When it goes on, the count is still known.
    (place / "runs/spoiled/result.json").unlink()
    train_gpt.main(["resume", "spoiled"])
    assert result("spoiled")["skipped"] == 1


def test_ten_in_a_row_stop_the_run_and_name_the_first_operand(place, monkeypatch):
    make = train_gpt.make_optimizer

    def spoil_weight(model, c):
        model.blocks[0].down.weight.data[0, 0] = math.nan
        return make(model, c)

    monkeypatch.setattr(train_gpt, "make_optimizer", spoil_weight)
    with pytest.raises(train_gpt.UserError, match="step 10: 10 steps in a row.*weight of blocks.0.down"):
        train(steps=20, log_every=1)
    assert [*logged("a")] == [*range(1, 11)]
