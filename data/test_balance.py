"""Tests of quartet.balance: what it makes cancels and equals moments, lowers errors, and lasts with a run."""
import json
import pytest
import torch
import export, quartet, train_gpt
from quartet import Linear, balance, calibrate, decode, quantized_weights, scale_search, turned
from train_gpt import UserError

def uneven(rows, K, seed):
    """(rows, K) float32 whose second moments lie mostly in a few directions."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(K, K, generator=g))[0]
    return torch.randn(rows, K, generator=g) * torch.logspace(0, -1.5, K) @ directions
x, w, dy = uneven(1024, 256, 0), uneven(384, 256, 1), torch.randn(1024, 384, generator=torch.manual_seed(2))
nmse = lambda a, e: ((a.double() - e).square().sum() / e.square().sum()).item()

def test_turns_cancel_and_make_moments_equal():
    turn = balance(x, w)
    exact = x.double() @ w.double().T
    T, U = (torch.block_diag(*t).double() for t in turn)
    assert turn.dtype == torch.bfloat16 and nmse(x.double() @ T @ U.T @ w.double().T, exact) < 1e-5
    for i in 0, 128:
        A, B = (t[:, i:i + 128].double() for t in (x, w))
        A, B = (m / m.diagonal().mean() + 1e-3 * torch.eye(128) for m in (A.T @ A, B.T @ B))
        a, b = (by[i:i + 128, i:i + 128].T @ m @ by[i:i + 128, i:i + 128] for m, by in ((A, T), (B, U)))
        assert (a - b).norm() / a.norm() < 4 * 2.0**-9                  # T twice and U twice, each to bf16
    x16 = x.bfloat16()
    assert torch.equal(turned(x16, None, 0), x16)
    assert nmse(turned(turned(x16, turn, 0), turn, 1, back=True), x16.double()) < 1e-3

def test_products_of_turned_operands_err_less_as_the_trace_says():
    turn, exact = balance(x, w), x.double() @ w.double().T
    errs = lambda a, b: nmse(decode(scale_search(a)).double() @ decode(scale_search(b)).double().T, exact)
    before, after = errs(x, w), errs(turned(x.bfloat16(), turn, 0), turned(w.bfloat16(), turn, 1))
    def trace(a, b): return sum((p.square().sum() * q.square().sum()).item() for p, q in zip(a, b))
    split = lambda t: t.view(len(t), 2, 128).transpose(0, 1)
    says = trace(*(split(turned(t.bfloat16(), turn, i).float()) for i, t in enumerate((x, w))))
    expected = says / trace(split(x), split(w))             # a model: as if all rounding errors were white
    assert after / before < 0.6 and 0.8 * expected < after / before < 1.25 * expected

@pytest.mark.parametrize("x, w", [(torch.zeros(256, 128), w[:, :128]), (x[:, :128], torch.zeros(8, 128)),
                                  (x[:3, :128] * 1e30, w[:5, :128] * 1e-30)])
def test_no_input_is_too_plain(x, w):
    turn = balance(x, w)
    eye = turn[0].double() @ turn[1].double().mT
    assert turn.isfinite().all() and (eye - torch.eye(128)).abs().max() < 0.1
def test_what_is_not_finite_is_rotated_alone_and_other_widths_are_not_turned():
    T, U = balance(torch.full((8, 128), torch.inf), w[:, :128])[:, 0].double()
    assert torch.equal(T, U) and torch.equal(T @ T.T, torch.eye(128))
    narrow = Linear(144, 128, recipe="quintet")
    calibrate(narrow, torch.ones(1, 144))
    assert not hasattr(narrow, "turn")
def test_a_run_of_another_recipe_goes_on_with_turns_from_its_first_step():
    c = train_gpt.Config(steps=400)
    at = lambda checkpoint, first: [s for s in range(first, 61) if train_gpt.calibrates(c, s, checkpoint)]
    assert at(None, 1) == [1, 21, 41] and at(dict(step=6, turns={}), 7) == [7, 21, 41]
    assert at(dict(step=6, turns=dict(a=1)), 7) == [21, 41]

def run(turn, once=False, recipe="quintet"):
    """y, dx, dw of a Linear on x, dy; turn: calibrated on x."""
    linear = Linear(256, 384, recipe=recipe)
    linear.weight.data = w.clone()
    if turn: calibrate(linear, x)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    if once:
        with quantized_weights(linear): y = linear(leaf)
    else: y = linear(leaf)
    return linear, (y, *torch.autograd.grad(y, (leaf, linear.weight), dy))

def test_a_calibrated_layer_errs_less_and_its_gradients_are_those_of_its_forward():
    (_, plain), (linear, found) = run(False), run(True)
    x16, w16, dy16 = (t.bfloat16().double() for t in (x, w, dy))
    exact = x16 @ w16.T, dy16 @ w16, dy16.T @ x16
    errors = [[nmse(a, e) for a, e in zip(r, exact)] for r in (plain, found)]
    assert errors[1][0] < 0.6 * errors[0][0]
    turn = linear.turn
    def hat(t, i):
        return turned(decode(scale_search(turned(t, turn, i)), torch.bfloat16), turn, 1 - i, back=True)
    x_hat, w_hat, mean = hat(x.bfloat16(), 0).double(), hat(w.bfloat16(), 1).double(), [0, 0]
    for i in range(32):
        torch.manual_seed(i)
        leaf = x.clone().requires_grad_()
        grads = torch.autograd.grad(linear(leaf), (leaf, linear.weight), dy)
        mean = [m + g.double() / 32 for m, g in zip(mean, grads)]
    for m, e in zip(mean, (dy16 @ w_hat, dy16.T @ x_hat)): assert nmse(m, e) < 2e-3    # of one draw: 0.02
    assert "turn" not in linear.state_dict()

def test_weights_turned_and_quantized_once_give_the_same_bits():         # kernels.py too: test_quartet.py
    assert all(map(torch.equal, run(True)[1], run(True, once=True)[1]))

def test_other_recipes_are_not_turned():
    linear, (y, *_) = run(True, recipe="quartet2")
    assert not hasattr(linear, "turn")
    quartet.quantize_model(seq := torch.nn.Sequential(linear), "quintet")
    calibrate(seq, x)
    quartet.quantize_model(seq, "quartet2")
    assert hasattr(linear, "turn") and torch.equal(linear(x), y)

@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run "a" of quintet, 4 steps."""
    monkeypatch.chdir(tmp_path)
    train_gpt.main("cpu --layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --steps=4 "
                   "--name=a --save_every=2 --tokens_per_step=128 --eval_tokens=128 --sample_tokens=1 "
                   "--device=cpu --recipe=quintet".split())

def test_a_run_keeps_its_turns(trained, capsys):
    c, directory, saved = train_gpt.load("eval", "a", {})
    assert sorted(saved["turns"]) == [f"blocks.0.{layer}" for layer in ("down", "out", "qkv", "up")]
    (directory / "previous.pt").rename(directory / "checkpoint.pt")
    train_gpt.main(["resume", "a"])                                     # from step 2, the same to the bit
    again = train_gpt.load("eval", "a", {})[2]
    for part in "model", "turns": assert all(torch.equal(t, again[part][n]) for n, t in saved[part].items())
    capsys.readouterr()
    train_gpt.main(["eval", "a", "--recipe=quintet"])
    loss = json.loads((directory / "result.json").read_text())["val_loss"]
    assert f"quintet {loss:.4f}" in " ".join(capsys.readouterr().out.split())
    tensors, _ = export.tensors(c, saved["model"], False, saved["turns"])
    w, turn = saved["model"]["blocks.0.out.weight"].bfloat16(), saved["turns"]["blocks.0.out"]
    w_hat = turned(decode(scale_search(turned(w, turn, 1)), torch.bfloat16), turn, 0, back=True)
    assert torch.equal(tensors["model.layers.0.self_attn.o_proj.weight"], w_hat)
    with pytest.raises(UserError, match="--format=hf"):
        export.tensors(c, saved["model"], True, saved["turns"])
