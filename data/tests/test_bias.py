"""The tests of data/evidence/bias.py: floors that are known to be there or not, and the command on a tiny run."""
import json
import numpy as np
import pytest
import torch
import bias, prepare, quartet, train_gpt

KNOBS = dict(layers=1, width=128, heads=1, hidden=128, sequence=64, steps=1, device="cpu")
LAYERS = [f"blocks.0.{name}" for name in ("qkv", "out", "up", "down")]
BF16 = quartet.Gemm(None, "bf16", "bf16")                                     # a backward GEMM that quantizes nothing

@pytest.fixture(autouse=True)
def tables(monkeypatch):
    for name in "RECIPES", "QUANTIZERS": monkeypatch.setattr(quartet, name, dict(getattr(quartet, name)))
    torch.manual_seed(0)

def normal(outlier=1.0):
    """x, w, dy of one layer, 128 x 128; outlier: factor of the first feature of dy."""
    x, w, dy = torch.randn(3, 128, 128)
    dy[:, 0] *= outlier
    return x.bfloat16(), w.bfloat16(), dy.bfloat16()

# error: 1e3 times that of one draw. NMSE a and b of two operands make a + b + a b.
@pytest.mark.parametrize("method, outlier, error, biased", [
    ("sr", 1, 47.6, ()), ("sr rht128", 1, 47.6, ()), ("sr 4/6", 1, 35.3, ("dx", "dw")),
    ("ms_eden", 1, 18.7, ()), ("ms_eden x2", 1, 18.7, ()),
    ("ms_eden", 100, None, ("dx",)), ("ms_eden x2", 100, None, ())])    # dx = dy w sums over the outliers
def test_floor_is_seen_where_the_mean_is_wrong_and_nowhere_else(method, outlier, error, biased):
    name = bias.register("quartet2", ("both",))[method, "both"]
    for gemm, r in zip(("dx", "dw"), bias.measure(*normal(outlier), name, [1, 4, 16, 64])):
        if gemm in biased:
            assert r["floor"] > 5 * r["sigma"] and r["slope"] > -0.9
            assert abs(r["floor"] - (r["error"][-1] - r["error"][0] / 64)) < 3 * r["sigma"]
            assert bias.bound(r) == (r["floor"], True) and " +- " in bias.shown(r)
        else:
            assert abs(r["floor"]) < 3 * r["sigma"] < r["error"][-2] and bias.shown(r)[0] == "<"
            assert abs(r["slope"] + 1) < (0.1 if outlier == 1 else 0.3)     # with one dy, few dw outweigh all
        assert error is None or abs(r["error"][0] * 1e3 / error - 1) < 0.1

def test_outliers_bias_the_gradients_of_quartet2_and_not_of_quintet():
    for recipe, biased in ("quartet2", True), ("quintet", False):
        assert bias.bound(bias.measure(*normal(100), recipe, [1, 4, 16, 64])[0])[1] == biased

@pytest.mark.parametrize("recipe", ["quartet2", "nvidia"])
def test_exact_is_the_gradient_of_the_same_forward_but_for_rounding_it_to_bf16(recipe):
    quartet.RECIPES["none"] = quartet.RECIPES[recipe]._replace(dx=BF16, dw=BF16, original=False)
    for r in bias.measure(*normal(), "none", [1, 4, 16]):
        assert 0 < max(r["error"]) < 2**-16                             # half a step of bf16 is 2^-8 at most

def test_captured_tensors_make_the_gradients_of_the_model():
    quartet.RECIPES["none"] = quartet.Recipe("four_six", "four_six", BF16, BF16)
    c = train_gpt.Config(**KNOBS)
    model = train_gpt.GPT(c)
    model.use_recipe("none", "torch")
    found = bias.capture(model, *torch.randint(0, 256, (2, 2, 64)))
    assert list(found) == LAYERS
    for name, (x, w, dy) in found.items():
        layer = quartet.Linear(*w.T.shape, recipe="none", dtype=w.dtype)
        layer.weight.data = w
        layer(x).backward(dy)
        assert torch.equal(layer.weight.grad.float(), model.get_submodule(name).weight.grad)

def test_command_prints_and_writes_every_layer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bias, "METHODS", {m: bias.METHODS[m] for m in ("sr 4/6", "ms_eden 4/6")})
    prepare.write_shard(tmp_path / "my_val_000000.bin", np.random.default_rng(0).integers(0, 256, 1000))
    c = train_gpt.Config(**KNOBS, recipe="bf16", corpus=str(tmp_path / "my"))
    torch.save(dict(config=vars(c), model=train_gpt.GPT(c).state_dict()),
               tmp_path / "checkpoint.pt")
    bias.main([str(tmp_path), "--draws=16", "--batch=1", "--operands=on"])
    rows = [json.loads(line) for line in (tmp_path / "bias.jsonl").read_text().splitlines()]
    assert [(r["layer"], r["gemm"], r["method"], r["operand"]) for r in rows] == [
        (layer, gemm, method, operand) for layer in LAYERS for gemm, other in (("dx", "w"), ("dw", "x"))
        for method in bias.METHODS for operand in ("both", "dy", other)]
    assert all(r["forward"] == "quartet2" and r["B"] == [1, 4, 16] and len(r["error"]) == 3 for r in rows)
    text = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in text if "tokens" in line] == LAYERS
    assert len(text) == 4 * 14 + 2 + 12 + 1 and "of 4" in text[-2]      # four tables, the summary, the path
    for wrong, message in (("--draws=100", "a power of 4"), ("--recipe=bf16", "not a quantized forward"),
                           ("--batch=0", "from 1")):
        with pytest.raises(train_gpt.UserError, match=message): bias.main([str(tmp_path), wrong])
