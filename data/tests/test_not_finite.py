"""Tests of training through steps without a finite gradient, and of what train_gpt.py names then."""
import json, math
from pathlib import Path
import pytest
import torch
import train_gpt

KNOBS = dict(layers=2, width=128, heads=1, hidden=128, sequence=16, batch=2, tokens_per_step=32, lr=0.01,
             eval_tokens=64, sample_tokens=1, device="cpu", log_every=1)

def model():
    torch.manual_seed(0)
    c = train_gpt.Config(**train_gpt.PRESETS["cpu"] | KNOBS)
    made = train_gpt.GPT(c)
    made.use_recipe("quartet2", "torch")
    return made, *torch.randint(0, 256, (2, 2, 16))

def test_nothing_is_found_where_all_is_finite():
    made, *batch = model()
    assert train_gpt.first_not_finite(made, [batch]).startswith("nothing")

@pytest.mark.parametrize("name, what", [
    ("blocks.1.up", "the weight of blocks.1.up"), ("embedding", "the weight of embedding"),
    ("blocks.0.norm2", "the weight of blocks.0.norm2")])
def test_a_weight_is_named(name, what):
    made, *batch = model()
    made.get_submodule(name).weight.data[3] = math.inf
    assert train_gpt.first_not_finite(made, [batch]) == what

def test_inputs_outputs_and_gradients_are_named_in_the_order_of_computing():
    made, *batch = model()
    made.blocks[1].out.register_forward_hook(lambda m, args, y: y * math.nan)
    assert train_gpt.first_not_finite(made, [batch]) == "the output of blocks.1.out"
    made, *batch = model()
    made.blocks[1].down.register_forward_pre_hook(lambda m, args: (args[0] * math.inf,))
    assert train_gpt.first_not_finite(made, [batch]) == "the input of blocks.1.down"
    made, *batch = model()
    made.blocks[0].up.register_forward_hook(lambda m, args, y: y.register_hook(lambda dy: dy / 0) and None)
    assert train_gpt.first_not_finite(made, [batch]) == "the gradient dy of blocks.0.up"

def test_a_norm_without_weights_is_looked_at_too():
    made, *batch = model()
    made.blocks[0].norm1 = torch.nn.RMSNorm(128, elementwise_affine=False)
    made.embedding.weight.data[batch[0][0, 0]] = math.inf
    assert train_gpt.first_not_finite(made, [batch]) == "the weight of embedding"
    made.embedding.weight.data[batch[0][0, 0]] = 3e38
    assert train_gpt.first_not_finite(made, [batch]) != "the weight of embedding"

def train(name, **more):
    knobs = KNOBS | dict(recipe="quartet2", name=name) | more
    train_gpt.main(["cpu", *(f"--{knob}={value}" for knob, value in knobs.items())])

def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    predict, make, calls = train_gpt.GPT.predict, train_gpt.make_optimizer, []
    def spoiled(self, x, targets):
        calls.append(0)
        return predict(self, x, targets) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(train_gpt.GPT, "predict", spoiled)
    train("spoiled", steps=5)
    records = [json.loads(line, parse_constant=lambda c: 1 / 0) for line in open("runs/spoiled/log.jsonl")]
    steps = {r["step"]: r for r in records if "loss" in r}
    for key in "loss", "grad_norm": assert [s for s in steps if steps[s][key] is None] == [3]
    assert "step 3 skipped: loss nan, norm nan; 1 so far" in capsys.readouterr().out
    assert json.loads(Path("runs/spoiled/result.json").read_text())["skipped"] == 1
    def optimizer(*args):                                   # the same run, leaving that step out
        made, step, steps = make(*args), torch.optim.AdamW.step, []
        def lazy(): return steps.append(0) or (None if len(steps) == 3 else step(made))
        made.step = lazy
        return made
    monkeypatch.setattr(train_gpt.GPT, "predict", predict)
    monkeypatch.setattr(train_gpt, "make_optimizer", optimizer)
    train("left_out", steps=5)
    a, b = (torch.load(f"runs/{name}/checkpoint.pt", weights_only=True) for name in ("spoiled", "left_out"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for p, q in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(p[k], q[k]) for k in p)
    monkeypatch.setattr(train_gpt, "make_optimizer", make)
    Path("runs/spoiled/result.json").unlink()
    train_gpt.main(["resume", "spoiled"])
    assert json.loads(Path("runs/spoiled/result.json").read_text())["skipped"] == 1     # still known

def test_ten_in_a_row_stop_the_run_and_name_the_first_operand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def spoil(model, c, make=train_gpt.make_optimizer):
        model.blocks[0].down.weight.data[0, 0] = math.nan
        return make(model, c)
    monkeypatch.setattr(train_gpt, "make_optimizer", spoil)
    with pytest.raises(train_gpt.UserError, match="step 10: 10 steps in a row.*weight of blocks.0.down"):
        train("a", steps=20)
    assert len([line for line in open("runs/a/log.jsonl") if "loss" in line]) == 10
