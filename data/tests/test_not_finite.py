"""Tests of training through steps without a finite gradient."""
import pytest

import small_runs
import train_gpt
from small_runs import checkpoint, logged, result, same, spoil_losses


def leave_out(monkeypatch, number):
    """Let the optimizers leave out this step, counted from 1."""
    update = train_gpt.update
    steps = []

    def lazy(optimizers, norm):
        steps.append(0)
        if len(steps) != number:
            update(optimizers, norm)

    monkeypatch.setattr(train_gpt, "update", lazy)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(place, monkeypatch, capsys,
                                                                         optimizer):
    def train(**knobs):
        small_runs.train(optimizer=optimizer, **knobs)

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


def test_the_checkpoint_before_a_decay_is_kept_also_after_such_a_step(place, monkeypatch):
    spoil_losses(monkeypatch, [3])
    small_runs.train(name="spoiled", schedule="wsd", decay=0.5, steps=4)
    assert checkpoint("spoiled", "stable.pt")["step"] == 3
