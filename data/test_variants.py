"""Tests of variants.py: what it multiplies is NVFP4, what must cancel cancels, and its weights count."""
import pytest
import torch
import quartet, train_gpt, variants
from variants import LAYERS, Variant, decoded

def normal(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
def layer(weight, **fields):
    made = torch.nn.Linear(*weight.shape[::-1], bias=False)
    made.__class__, made.kind, made.variant = variants.Layer, "up", Variant(**fields)
    made.weight.data = weight
    return made

@pytest.mark.parametrize("quantizer", ["rtn", "four_six", "scale_search"])
def test_values_are_those_of_quartet(quantizer):
    x = normal(64, 256) * 2.0 ** torch.arange(-4, 4).repeat_interleave(32)
    assert torch.equal(decoded(x, quantizer), quartet.decode(quartet.QUANTIZERS[quantizer](x, None, None)))

def test_gradients_pass_straight_through_to_the_operands_that_were_multiplied():
    x, w, dy = normal(32, 128).bfloat16().requires_grad_(), normal(64, 128), normal(32, 64).bfloat16()
    y = layer(w, x="four_six", w="rtn")(x)
    a, b = decoded(x.detach().float(), "four_six").bfloat16(), decoded(w.bfloat16().float(), "rtn").bfloat16()
    assert torch.equal(y, a @ b.T) and torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ b)

@pytest.mark.parametrize("fields", [dict(equalize=0.5), dict(order="spread"), dict(rotate=("up",)),
                                    dict(layers=("down",))])
def test_what_is_done_to_both_operands_cancels(fields):
    x, w = (normal(64, 256) * 2.0 ** (torch.arange(256) % 7)).bfloat16(), normal(128, 256).bfloat16().float()
    exact, plain = x.double() @ w.double().T, dict(x="bf16", w="bf16") if "layers" not in fields else {}
    error = (layer(w, **plain, **fields)(x) - exact).norm() / exact.norm()
    assert error < 2.0**-7                              # bf16: of y, and of rotated operands
    if "equalize" in fields: assert torch.equal(layer(w, **plain, **fields)(x), layer(w, **plain)(x))

def test_turning_is_that_of_quartet():
    x, w = normal(512, 128) * torch.logspace(0, -1.5, 128), normal(128, 128).bfloat16().float()
    made = layer(w, x="scale_search", w="scale_search", balance=("up",))
    made.register_buffer("turn", torch.zeros(2, 1, 128, 128, dtype=torch.bfloat16))
    made.calibrating = True
    y = made(x)
    linear = quartet.Linear(128, 128, recipe="quintet")
    linear.weight.data = w
    quartet.calibrate(linear, x.bfloat16())
    expected = linear(x.bfloat16())
    assert torch.equal(made.turn, linear.turn) and (y - expected).norm() < 2.0**-8 * expected.norm()   # bf16

def test_equalizing_levels_columns_and_a_weighed_search_lowers_the_weighed_error():
    x, weight = normal(512, 64), 2.0 ** (torch.arange(64) % 5)
    errors = [((decoded(x, "scale_search", m) - x).square() * weight).sum() for m in (None, weight)]
    assert errors[1] < errors[0]
    for share in 1.0, 0.5:
        a, b = variants.equalized(x * weight, normal(256, 64), share)
        in_a, in_b = (t.log2() / 2 for t in variants.columns(a, b))
        assert (in_a if share == 1 else in_a - in_b).abs().max() <= (0.5 if share == 1 else 1)

def test_a_second_term_of_x_lowers_its_error_where_it_costs_most():
    x, w = (normal(512, 256) * 2.0 ** (torch.arange(256) % 5)).bfloat16(), normal(128, 256).bfloat16().float()
    exact = x.double() @ w.double().T
    errors = [(layer(w, w="bf16", extra=extra)(x) - exact).square().sum() for extra in (0.0, 0.25, 1.0)]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.02 * errors[0]         # by chance: 0.75

def install(monkeypatch, **fields):
    """A small model, its optimizer and the weight of a layer, after `variants.install` of a Variant."""
    for module, name in (train_gpt.Block, "__init__"), (train_gpt, "make_optimizer"):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setitem(variants.VARIANTS, "v_new", Variant(**fields))
    variants.install("v_new")
    c = train_gpt.Config(**train_gpt.PRESETS["cpu"] | dict(layers=1, width=128, heads=1, hidden=128, steps=4))
    model = train_gpt.GPT(c)
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    return train_gpt.make_optimizer(model, c), model.blocks[0].up.weight

def test_a_pulled_weight_comes_to_rest_on_the_grid(monkeypatch):
    optimizer, w = install(monkeypatch, pull=1e3)
    off = lambda: (decoded(w.detach(), "four_six") - w).norm() / w.norm()
    before = off()
    for _ in range(4): optimizer.step()
    assert before > 0.07 and off() < 0.01

@pytest.mark.parametrize("least", [8.0, -3.0])
def test_a_weight_that_oscillates_is_reset_and_others_are_not(monkeypatch, least):
    optimizer, w = install(monkeypatch, w="rtn", reset=(6, 4, least))
    grid = torch.tensor([6, 1, 0.5, 2, 3, 4, 1.5, 0.5] * 2).repeat(8) * 2.0**-5
    w.data[:] = grid
    w.data[:, 1] += 2.0**-7                                             # between 1 and 1.5, ties to even
    jump = torch.zeros_like(w).index_fill(1, torch.tensor(1), 2.0**-9)
    steady = torch.zeros_like(w).index_fill(1, torch.tensor(2), 2.0**-10)
    for step in range(5):
        w.data += jump * (-1) ** step + steady
        moved = w.data.clone()
        for group in optimizer.param_groups: group["lr"] = 0.0
        optimizer.step()
        assert torch.equal(w.data, moved) or step == 4
    reset = decoded(moved.bfloat16().float(), "rtn")
    assert torch.equal(w.data[:, 1], reset[:, 1]) and not torch.equal(w.data[:, 1], moved[:, 1])
    assert torch.equal(w.data[:, 2:], moved[:, 2:])

def test_codes_stay_until_others_are_much_better():
    made = layer(normal(64, 128), x="bf16", w="scale_search", stay=0.1)
    made.register_buffer("before", torch.zeros_like(made.weight))
    decode = lambda: made(torch.eye(128)).T.float()
    first = decode()
    assert torch.equal(first, decoded(made.weight.detach().bfloat16().float(), "scale_search"))
    made.weight.data += 3e-3 * normal(64, 128).flip(0)
    nearest = decoded(made.weight.detach().bfloat16().float(), "scale_search")
    assert (decode() != first).sum() < 0.1 * (nearest != first).sum()
    made.weight.data = normal(64, 128).flip(0)
    assert torch.equal(decode(), decoded(made.weight.detach().bfloat16().float(), "scale_search"))

def test_the_command_prints_every_variant_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    knobs = dict(layers=1, width=128, heads=1, hidden=128, sequence=32, batch=2, steps=1, tokens_per_step=64,
                 eval_tokens=64, sample_tokens=1, device="cpu", recipe="bf16", name="a")
    train_gpt.main(["cpu", *(f"--{knob}={value}" for knob, value in knobs.items())])
    capsys.readouterr()
    variants.main(["a", "v_four_six", "v_all"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bf16", "v_four_six", "v_all"]
    with pytest.raises(train_gpt.UserError, match="'v_al'.*did you mean 'v_"): variants.main(["a", "v_al"])
    assert {layer for v in variants.VARIANTS.values() for layer in v.layers} == {*LAYERS}
