"""Tests of train_gpt.py: what it computes. How runs are stopped, resumed and damaged: test_runs.py."""
import ast
import dataclasses
import json
import os
import pickle
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import quartet
import train_gpt
from quartet import RECIPES
from background import in_background, python
from small_runs import (
    ROOT, WRITING, checkpoint, go_back, logged, records, result, same, shards, spoil_losses, train, words,
    write_corpus
)

pytest_plugins = ["background"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")

# Each test trains in a directory of its own.
pytestmark = pytest.mark.usefixtures("place")


# ---- The model ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, size", [
    # the C4 runs'
    ("30m", 30_482_560),
    ("50m", 49_556_736),
    ("100m", 102_777_856),
    ("200m", 203_188_480),
    # nanoGPT's; 1.85e9 with embedding and head
    ("124m", (12 * 12 * 768 + 25) * 768),
    ("1.9b", 1_644_300_288),
])
def test_presets_have_the_sizes_of_the_paper(preset, size):
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(**train_gpt.PRESETS[preset]))
    assert sum(p.numel() for p in [*model.blocks.parameters(), *model.norm.parameters()]) == size


def test_the_model_is_causal_and_starts_as_the_paper_says():
    c = train_gpt.Config(layers=2, width=256, heads=2, hidden=256, sequence=32)
    model = train_gpt.GPT(c)
    model.use_recipe("quartet2", "torch")

    # Token 20 changes no logits before its own.
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 20] ^= 1
    equal = (model(tokens) == model(other)).all(-1)[0]
    assert equal[:20].all()
    assert not equal[20:].any()

    # Weights are drawn with a deviation of 0.02, divided by sqrt(2 layers) where they add to the residual
    # stream: to 5 sigma.
    block = model.blocks[1]
    for w, std in [(model.head.weight, 0.02), (block.down.weight, 0.01), (block.up.weight, 0.02)]:
        assert abs(w.std().item() / std - 1) < 5 / (2 * w.numel())**0.5


def test_grouped_queries_qk_norm_and_the_square_of_relu_compute_what_they_say():
    def block(**knobs):
        torch.manual_seed(0)
        c = train_gpt.Config(layers=1, width=128, heads=4, hidden=128, sequence=16, vocab_size=64, **knobs)
        model = train_gpt.GPT(c)
        return model.blocks[0], model.rope

    x = torch.randn(2, 16, 128)

    # Each key and value head is that of two queries: as if it stood there twice.
    grouped, rope = block(kv_heads=2)
    full, _ = block()
    assert grouped.qkv.weight.shape == (256, 128)
    q, k, v = grouped.qkv.weight.detach().unflatten(0, (8, 32)).split([4, 2, 2])
    full.load_state_dict(grouped.state_dict() | {"qkv.weight": torch.cat(
        [q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)]).flatten(0, 1)})
    torch.testing.assert_close(grouped(x, rope), full(x, rope))

    # With QK norm the lengths of queries and keys make no difference.
    for qk_norm, same_result in (("true", True), ("false", False)):
        normed, rope = block(qk_norm=qk_norm)
        before = normed(x, rope)
        normed.qkv.weight.data[:256] *= 50
        assert torch.allclose(normed(x, rope), before, atol=1e-5) == same_result

    relu2, rope = block(mlp="relu2")
    h = x + attention_of(relu2, x, rope)
    expected = h + relu2.down(F.relu(relu2.up(relu2.norm2(h))) ** 2)
    torch.testing.assert_close(relu2(x, rope), expected)


def attention_of(block, x, rope):
    """What a block adds to x before its MLP."""
    weight = block.down.weight
    block.down.weight = torch.nn.Parameter(torch.zeros_like(weight))
    found = block(x, rope) - x
    block.down.weight = weight
    return found


def test_the_learning_rate_warms_up_for_a_tenth_and_falls_to_a_tenth():
    c = train_gpt.Config(steps=100, lr=1.0)
    rates = [train_gpt.learning_rate(c, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


# ---- Data --------------------------------------------------------------------------------------------------

def test_by_wsd_the_learning_rate_stays_and_falls_late_along_a_line():
    c = train_gpt.Config(steps=100, lr=1.0, schedule="wsd", warmup=0.05, decay=0.2, final_lr=0.5)
    rates = [train_gpt.learning_rate(c, step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(rates[5:81]) == {1.0}
    assert rates[80:] == pytest.approx([1 - 0.5 * i / 20 for i in range(20)])
    c = dataclasses.replace(c, decay=0.0)
    assert train_gpt.learning_rate(c, 99) == 1.0


@pytest.mark.parametrize("steps, warmup, decay", [
    (100, 0.05, 0.2),
    (7, 0.1, 0.3),
    (10, 0.0, 0.95),
    (3, 0.0, 0.34),
])
def test_the_step_before_the_decay_is_the_last_one_at_the_peak(steps, warmup, decay):
    c = train_gpt.Config(steps=steps, warmup=warmup, decay=decay, schedule="wsd", lr=1.0)
    peak = [step for step in range(1, steps + 1) if train_gpt.learning_rate(c, step - 1) == 1.0]
    assert train_gpt.before_decay(c) == max(peak) < steps
    # There is none by a cosine, without a decay, or where the decay begins as soon as the warm-up ends.
    for knobs in dict(schedule="cosine"), dict(decay=0.0), dict(warmup=0.6, decay=0.7):
        assert not train_gpt.before_decay(dataclasses.replace(c, **knobs))


def test_the_checkpoint_before_the_decay_of_wsd_is_kept_and_runs_start_from_it():
    train(schedule="wsd", decay=0.5, save_every=1, name="old")
    stable = checkpoint("old", "stable.pt")
    assert stable["step"] == 3
    train_gpt.main(["eval", "old/stable.pt", "--recipe=bf16"])
    train(init_from="old/stable.pt", lr=1e-9, steps=1)
    new = checkpoint()["model"]
    assert all((stable["model"][name] - new[name]).abs().max() < 1e-7 for name in new)


@pytest.mark.parametrize("batch", [2, 1])      # a step is one forward pass, or two
def test_a_step_quantizes_each_weight_once(batch, place, monkeypatch):
    quantized = quartet.quantized
    weights = []

    def count(w, recipe):
        weights.append(w)
        return quantized(w, recipe)

    monkeypatch.setattr(quartet, "quantized", count)
    monkeypatch.setattr(train_gpt, "evaluate", lambda *args: 0.0)
    monkeypatch.setattr(train_gpt, "sample_text", lambda *args: "")
    train(batch=batch, steps=3)
    assert len(weights) == 3 * 4


def test_data_order_is_a_function_of_seed_and_step(place):
    # Two shards of different tokens, each of which is one more than the one before
    prepare.write_shard(place / "two_train_000000.bin", np.arange(0, 200))
    prepare.write_shard(place / "two_train_000001.bin", np.arange(300, 501))
    c = train_gpt.Config(sequence=8, batch=16, corpus="two", vocab_size=600, eval_tokens=64)
    data = shards(c, "train")

    # A batch depends on seed, step and micro-batch, and on nothing else. No window is of two shards.
    x, y = data.random(3, 1)
    other_seed = shards(dataclasses.replace(c, seed=2), "train")
    for other in [data.random(4, 1), data.random(3, 0), other_seed.random(3, 1)]:
        assert not torch.equal(x, other[0])
    assert torch.equal(x, shards(c, "train").random(3, 1)[0])
    assert torch.equal(y, x + 1)

    # All places together reach every token.
    x, y = data.at(np.arange(data.ends[-1]))
    assert {*x.flatten().tolist(), *y.flatten().tolist()} == {*range(200), *range(300, 501)}
    in_order = [x.tolist() for x, _ in data.in_order()]
    assert in_order == [np.arange(64).reshape(8, 8).tolist()]


@pytest.mark.parametrize("header, rest", [
    (None, b""),
    ((0, 0, 0), b""),
    ((20240520, 2, 0), b""),
    ((20240520, 1, 3), b"12345"),
])
def test_a_damaged_shard_is_named(header, rest):
    content = b""
    if header:
        content = np.array([*header, *[0] * 253], "<i4").tobytes()
    Path("tiny_val_000000.bin").write_bytes(content + rest)
    with pytest.raises(train_gpt.UserError, match="tiny_val_000000.bin is no whole shard.*delete it"):
        train(steps=1)


# ---- Training ----------------------------------------------------------------------------------------------

def learn_in_twenty_steps(**knobs):
    train(steps=20, batch=4, tokens_per_step=128, **knobs)
    assert [*logged()] == [*range(1, 21)]
    assert logged()[20] < logged()[1] - 1.5      # from log 256 = 5.5 nats
    assert all(w.any() for w in checkpoint()["model"].values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_lower_the_loss(recipe):
    learn_in_twenty_steps(recipe=recipe)


def test_twenty_steps_lower_the_loss_also_from_output_projections_of_zeros(monkeypatch):
    def initial(w, mean=0.0, std=1.0):
        if std == 0.01:      # 0.02 / sqrt(2 layers): an output projection
            std = 0.0
        w.data.normal_(mean, std)

    monkeypatch.setattr(torch.nn.init, "normal_", initial)
    learn_in_twenty_steps(recipe="quartet2", layers=2)


def test_losses_and_gradients_are_means_over_micro_batches_and_over_all_predicted_tokens():
    # 4 micro-batches; a validation of 2 batches of 2
    train(steps=1, tokens_per_step=256, eval_tokens=128, recipe="bf16")

    # The same in plain PyTorch: the loss before the step, the gradient's norm, the loss after it.
    c = train_gpt.Config(**checkpoint()["config"])
    torch.manual_seed(c.seed)
    model = train_gpt.GPT(c)
    data = shards(c, "train")
    loss = sum(model(*data.random(1, micro)) for micro in range(4)) / 4
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
    model.load_state_dict(checkpoint()["model"])
    val_loss = model(*shards(c, "val").at(np.arange(4) * 32))

    # Float32 sums in another order
    assert logged(key="loss")[1] == pytest.approx(loss.item(), rel=1e-5)
    assert logged(key="grad_norm")[1] == pytest.approx(norm.item(), rel=1e-5)
    assert result()["val_loss"] == pytest.approx(val_loss.item(), rel=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(monkeypatch, capsys, device, number, code):
    train(steps=8, name="straight", device=device)

    # Stop another in step 4.
    learning_rate = train_gpt.learning_rate

    def interrupt(c, step):
        if step == 3:
            signal.raise_signal(number)
        return learning_rate(c, step)

    monkeypatch.setattr(train_gpt, "learning_rate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        train(steps=8, device=device)
    assert stopped.value.code == code
    assert checkpoint()["step"] == 4
    assert "python train_gpt.py resume runs/a" in capsys.readouterr().out

    # A step that a crash has logged, and not saved, is forgotten.
    with open("runs/a/log.jsonl", "a") as log:
        log.write('{"step": 9, "loss": -1.0}\n')
    monkeypatch.setattr(train_gpt, "learning_rate", learning_rate)
    train_gpt.main(["resume", "a"])
    assert logged() == logged("straight")
    assert [*logged()] == [*range(1, 9)]
    straight = checkpoint("straight")
    resumed = checkpoint()
    assert same(straight["model"], resumed["model"])
    states = zip(straight["generators"][0].values(), resumed["generators"][0].values())
    assert all(a is None and b is None or torch.equal(a, b) for a, b in states)


def test_knobs_keep_blocks_and_the_last_steps_in_bf16(monkeypatch):
    forward = train_gpt.GPT.forward
    passes = []

    def note(model, *tokens):
        passes.append([getattr(block.qkv, "recipe", "plain") for block in model.blocks])
        return forward(model, *tokens)

    monkeypatch.setattr(train_gpt.GPT, "forward", note)
    train(layers=3, bf16_first=1, bf16_last=1, bf16_end=0.5, eval_every=9)
    assert passes[:4] == [["plain", "quartet2", "plain"]] * 2 + [["plain", "bf16", "plain"]] * 2


@pytest.mark.parametrize("recipe", ["quartet2", "nvidia", "bf16"])
def test_the_last_steps_may_leave_4_bits_in_the_forward_pass_alone(recipe, monkeypatch):
    monkeypatch.setattr(quartet, "RECIPES", dict(RECIPES))      # it gets a row
    c = train_gpt.Config(recipe=recipe, steps=10, bf16_forward_end=0.3)
    names = [train_gpt.recipe_of(c, step) for step in range(1, 11)]
    last = f"{recipe}+bf16_forward" if recipe != "bf16" else "bf16"
    assert names == [recipe] * 7 + [last] * 3
    if recipe == "bf16":
        return

    # y is that of bf16; gradients are those of the recipe's own quantizers, of operands in bf16.
    quartet.check(last, "torch", 128, 128)
    torch.manual_seed(0)
    layer = quartet.Linear(128, 128, recipe=last)
    plain = quartet.Linear(128, 128, recipe="bf16", dtype=torch.bfloat16)
    plain.weight.data = layer.weight.detach().bfloat16()
    x = torch.randn(128, 128).bfloat16()
    torch.testing.assert_close(layer(x), plain(x))
    used = []
    quantize = quartet.quantize
    monkeypatch.setattr(quartet, "quantize", lambda name, *rest: used.append(name) or quantize(name, *rest))
    layer(x.requires_grad_()).float().sum().backward()
    backward = {"quartet2": ["ms_eden"] * 4, "nvidia": ["sr", "rtn", "sr", "rtn"]}[recipe]
    assert [name for name in used if name != "bf16"] == backward

    # A run does so.
    train(recipe=recipe, steps=4, bf16_forward_end=0.5, eval_every=9, name=recipe)
    assert checkpoint(recipe)["step"] == 4


@pytest.mark.parametrize("recipe", ["quintet", "nvidia", "bf16"])
def test_the_last_steps_may_multiply_inputs_in_two_terms(recipe, monkeypatch, capsys):
    monkeypatch.setattr(quartet, "RECIPES", dict(RECIPES))      # it gets a row
    c = train_gpt.Config(recipe=recipe, steps=10, two_terms_end=0.3, bf16_forward_end=0.2, bf16_end=0.1)
    names = [train_gpt.recipe_of(c, step) for step in range(1, 11)]
    if recipe == "bf16":
        assert names == ["bf16"] * 10
        return
    late = f"{recipe}+two_terms"
    assert names == [recipe] * 7 + [late, f"{recipe}+bf16_forward", "bf16"]
    assert train_gpt.recipes_by_step(c) == (
        f"{recipe}; from step 8 on {late}; from step 9 on {recipe}+bf16_forward; from step 10 on bf16")
    assert quartet.RECIPES[late] == RECIPES[recipe]._replace(two_terms=True)

    # A run does so, and what it ends with is what is validated, sampled, and loaded.
    train(recipe=recipe, steps=4, two_terms_end=0.5, eval_every=4, name="late")
    model, c = train_gpt.load_model("late")
    assert model.blocks[0].up.recipe == c.recipe == late
    data = train_gpt.Shards(c, train_gpt.find_corpus(c), "val", "cpu")
    assert train_gpt.evaluate(model, data, c) == records("late")[-1]["val_loss"]
    train_gpt.main(["eval", "late", f"--recipe={recipe}"])
    capsys.readouterr()
    with pytest.raises(train_gpt.UserError, match="--two_terms_end=1.5: it must be from 0 to 1"):
        train_gpt.check_knobs(dataclasses.replace(c, recipe=recipe, two_terms_end=1.5))


def test_a_model_is_loaded_in_one_line_with_the_forward_of_its_last_step(capsys):
    train(recipe="rtn", bf16_end=0.5, save_every=2)
    model, c = train_gpt.load_model("a")
    assert not model.training
    assert model.blocks[0].up.recipe == c.recipe == "bf16"
    tokens = torch.tensor([[*b"the"]])
    assert torch.equal(train_gpt.load_model("runs/a", recipe="bf16,rtn")[0](tokens), model(tokens))
    assert not torch.equal(train_gpt.load_model("a", recipe="rtn")[0](tokens), model(tokens))
    with pytest.raises(train_gpt.UserError, match="unknown recipe 'rt'"):
        train_gpt.load_model("a", recipe="rt")


def test_a_new_run_starts_from_the_weights_of_another_with_its_own_schedule_and_recipe():
    train(steps=3, recipe="bf16", name="old")
    train(recipe="rtn", init_from="old", lr=1e-9, save_every=1)
    old = checkpoint("old")["model"]
    new = checkpoint()
    assert new["step"] == 4
    assert new["config"]["init_from"] == "old"
    assert all((old[name] - new["model"][name]).abs().max() < 1e-7 for name in old)
    assert logged()[1] < logged("old")[1] - 0.1

    # It goes on without the other.
    shutil.rmtree("runs/old")
    go_back()
    train_gpt.main(["resume", "a"])
    assert checkpoint()["step"] == 4

    # Another shape is refused.
    for knob, value in dict(layers=2, width=256, heads=1).items():
        message = f"weights of a have another shape: --{knob}={value}.*saved"
        with pytest.raises(train_gpt.UserError, match=message):
            train(name="b", init_from="a", **{knob: value})
        assert not Path("runs/b").exists()


@needs_gpu
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "bf16"])
def test_both_backends_train_to_the_same_bits_where_rotations_are_exact(recipe, monkeypatch):
    """50 steps of the 30m preset."""
    def no_rotation(name, signs):
        return torch.eye(128, device=signs.device), 1

    monkeypatch.setattr(quartet, "rotation_from", no_rotation)
    for backend in ("torch", "triton"):
        knobs = dict(recipe=recipe, backend=backend, name=backend, batch=4, tokens_per_step=2048, steps=50,
                     eval_tokens=256, sample_tokens=4, lr=3e-3, corpus="tiny", device="cuda", compile="off")
        train_gpt.main(["30m", *(f"--{knob}={value}" for knob, value in knobs.items())])
    assert logged("torch") == logged("triton")
    assert logged("torch")[50] < logged("torch")[1] - 1


@needs_gpu
def test_memory_that_a_graph_keeps_is_counted(tmp_path, monkeypatch):
    x = torch.ones(2**26, device="cuda")                                # 0.25 GiB
    torch.cuda.reset_peak_memory_stats()
    replay = train_gpt.as_graph(lambda x: x.add(1).mul(2).sum(), x)     # three more, two of them in the graph
    held = torch.ones(2**28, device="cuda")                             # 1 GiB, beside them
    replay(x)
    monkeypatch.setattr(train_gpt, "sample_text", lambda model, c: "")
    log = SimpleNamespace(val_loss=0.0, skipped=0, rates=[])
    model = SimpleNamespace(rope=x, use_recipe=lambda recipe, backend: None)
    train_gpt.finish(train_gpt.Config(), tmp_path, log, model)
    assert json.loads((tmp_path / "result.json").read_text())["peak_gib"] >= 2


# ---- Evaluation and sampling -------------------------------------------------------------------------------

def test_sampling_draws_by_seed_among_the_likeliest():
    c = train_gpt.Config(layers=1, width=128, heads=2, hidden=128, sequence=32, sample_tokens=50)
    torch.manual_seed(0)
    model = train_gpt.GPT(c)
    likeliest = model(torch.tensor([[1, 2]]))[0, -1].topk(3).indices.tolist()

    def draw(**knobs):
        return [*train_gpt.sample(model, [1, 2], dataclasses.replace(c, **knobs))]

    # The likeliest token, by temperature or by number
    greedy = draw(temperature=0.0)
    assert greedy[0] == likeliest[0]
    assert greedy == draw(temperature=1e-50) == draw(top_k=1)
    assert draw(temperature=1e-3, sample_tokens=1) == likeliest[:1]

    # Others, by seed
    assert draw() == draw()
    assert draw() != draw(seed=2)
    first_tokens = [draw(seed=seed, top_k=3, temperature=9.0, sample_tokens=1)[0] for seed in range(40)]
    assert {*first_tokens} == {*likeliest}


def test_compare_trains_on_equal_terms_and_eval_prints_each_forward(capsys):
    recipes = ["bf16", "rtn", "quartet2"]
    train(steps=3, recipe=",".join(recipes))
    table = Path("runs/a/compare.txt").read_text()
    assert table in capsys.readouterr().out
    assert [row.split()[0] for row in table.splitlines()[1:]] == recipes

    # The same weights and data: first losses differ by the rounding alone.
    first_losses = [logged(f"a/{recipe}")[1] for recipe in recipes]
    assert max(first_losses) - min(first_losses) < 0.02

    # Nothing is trained again.
    finished = Path("runs/a/bf16/result.json")
    before = finished.stat().st_mtime_ns
    train_gpt.main(["resume", "a"])
    assert finished.stat().st_mtime_ns == before

    # The rows that eval prints: recipe, loss, difference to the first, bits per byte
    capsys.readouterr()
    train_gpt.main(["eval", "a/bf16", "--recipe=bf16,rtn,four_six"])
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [line.replace(",", " ").split() for line in lines]
    assert [row[0] for row in rows] == ["bf16", "rtn", "four_six"]
    assert rows[0][2] == "0.0000"
    assert abs(float(rows[0][1]) - result("a/bf16")["val_loss"]) < 1e-4
    for _, loss, difference, bits, *_ in rows:
        assert float(difference) == pytest.approx(float(loss) - float(rows[0][1]), abs=2e-4)
        assert float(bits) == pytest.approx(float(loss) / np.log(2), abs=2e-4)

    # Without --recipe by all
    train_gpt.main(["eval", "a/bf16"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["forward", *RECIPES]

    # Or by those that its layers fit: groups of 128 do not divide the outputs of this one.
    train(recipe="bf16", width=64, hidden=64, name="narrow")
    capsys.readouterr()
    train_gpt.main(["eval", "narrow"])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["forward", "bf16", "rtn", "nvidia", "four_six"]


# ---- Checkpoints -------------------------------------------------------------------------------------------

def test_checkpoints_are_whole_or_not_there_and_the_last_two_are_kept():
    train(steps=6, name="straight")
    train(steps=6, save_every=2, sample_tokens=1)
    last = Path("runs/a/checkpoint.pt")
    previous = Path("runs/a/previous.pt")
    log = Path("runs/a/log.jsonl")
    assert checkpoint("a", "previous.pt")["step"] == 4
    assert checkpoint()["step"] == 6

    # One bit of it is wrong.
    content = bytearray(last.read_bytes())
    content[9999] ^= 1
    last.write_bytes(content)
    with pytest.raises(train_gpt.UserError, match="not a whole checkpoint: remove it, and previous.pt"):
        train_gpt.main(["resume", "a"])

    # Without it, as if killed between the two renames, and with a torn log: the run goes on to the same bits.
    last.unlink()
    log.write_text(log.read_text() + '{"step": 7, "lo')
    train_gpt.main(["resume", "a"])
    assert logged() == logged("straight")
    assert same(checkpoint()["model"], checkpoint("straight")["model"])
    assert checkpoint("a", "previous.pt")["step"] == 4

    # The disk is full: what is there stays.
    shutil.copy(previous, last)
    before = last.read_bytes()
    with WRITING:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        try:
            with pytest.raises(train_gpt.UserError, match="cannot write runs/a/.*too large.*make room"):
                train_gpt.main(["resume", "a"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert last.read_bytes() == before
    assert not Path("runs/a/checkpoint.pt.part").exists()


def test_a_loss_that_is_not_finite_leaves_a_good_checkpoint():
    with pytest.raises(train_gpt.UserError, match="10 steps in a row.*lower --lr than 1e.25"):
        train(lr=1e25, steps=12, save_every=1)
    assert checkpoint()["step"] == 1
    assert all(w.isfinite().all() for w in checkpoint()["model"].values())


class Evil:
    """Executed where it is unpickled: it makes a directory."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_bad_checkpoints_are_named_and_never_executed():
    train(steps=1)
    path = Path("runs/a/checkpoint.pt")
    whole = path.read_bytes()
    torch.save({"model": {}}, "other.pt")
    torch.save([1], "list.pt")
    for content, command, message in [
        (whole[:-1000], "sample a", "not a whole checkpoint"),
        (b"", "sample a", "not a whole checkpoint"),
        (pickle.dumps(Evil(), protocol=2), "sample a", "not a whole checkpoint"),
        (Path("other.pt").read_bytes(), "sample a", "not written by"),
        (Path("list.pt").read_bytes(), "sample a", "not written by"),
        (whole, "eval a --layers=2", r"a run keeps what .*: --layers=2 \(saved: 1\)"),
    ]:
        path.write_bytes(content)
        with pytest.raises(train_gpt.UserError, match=message):
            train_gpt.main(command.split())
    assert not Path("hacked").exists()


# ---- The command line --------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, message", [
    # words
    ("30M", "unknown preset '30M'.*30m"),
    ("cpu gpu", "^train takes one preset, not cpu gpu: see"),
    ("eval", "eval takes one name of a run, not none"),
    ("resume none", "no run none with a checkpoint"),
    # a knob alone
    ("--steps", "--steps: write --steps=VALUE, without a space"),
    ("--steps=", "--steps=: it takes a value of type int"),
    ("--steps=many", "steps=many.*int"),
    ("--steps=0", "be from 1"),
    ("--backend=cuda", "auto, torch"),
    ("--recipes=bf16", "unknown knob --recipes: there are recipe, "),
    ("--recipe=rtn,bf16,rtn", "each recipe once"),
    ("--recipe=quartet", "unknown recipe 'quartet'.*there are .*quartet2"),
    ("--init_from=none", "no run none with a checkpoint"),
    ("--prompt=\udce9", "--prompt.*UTF-8"),
    ("--name=taken", "runs/taken exists.*another"),
    ("--name=../a", "name='../a': it takes up to 100 letters"),
    ("--name=two\nlines", "it takes up to 100 letters"),
    ("--name=/a", "it takes up to 100 letters"),
    # knobs together, with the corpus, with this machine
    ("--width=130", "multiple of twice the heads"),
    ("--kv_heads=3 --heads=4", "heads must be a multiple of kv_heads"),
    ("--layers=90 --width=1048576 --hidden=1048576", "the weights take .* GB, and this machine has"),
    ("--bf16_first=1", "no block of 1 is left"),
    ("--mlp=gelu", "mlp=gelu: there are swiglu, relu2"),
    ("--hidden=96", r"--backend=\w+ --width=\d+ --hidden=96: blocks.0.up\(128, 192\).*out_features % 128"),
    ("--batch=524289 --sequence=32", r"--batch=524289 --sequence=32: more than 2\^24 tokens"),
    ("--schedule=wsd --warmup=0.5 --decay=0.75", "--warmup=0.5 --decay=0.75: together more than all"),
    ("--batch=3", "of 96, processes x batch x sequence, 1 x 3 x 32: change it, or --batch; --batch=1 fits"),
    ("--corpus=", "corpus=: it takes a name"),
    ("--corpus=/", "corpus=/: it takes a name"),
    ("--lr=0 --head_lr=0.1", "--lr=0 --embedding_lr=0.0 --head_lr=0.1: .*lr, which must not be 0"),
    ("--corpus=" + 300 * "a", "no .*run python data/prepare.py FILES, of your text, the first .* named aaa"),
    ("--name=" + 300 * "a", "it takes up to 100 letters"),
    ("--corpus=none", r"none_train_\*.bin.*python data/prepare.py FILES, .* named none.txt"),
    ("--vocab_size=100", "token 122, beyond"),
    ("--sequence=4096 --tokens_per_step=16384", "too few for --sequence=4096"),
    ("--shard=true", "shard.*torchrun"),
])
def test_mistakes_get_one_line_that_names_the_value_and_the_way_out(command, message):
    """Nothing is written then."""
    taken = Path("runs/taken")
    taken.mkdir(parents=True)
    _, *knobs = words()
    with pytest.raises(train_gpt.UserError, match=message) as error:
        train_gpt.main([*knobs, *command.split(" ")])
    assert "\n" not in str(error.value)
    assert [*Path("runs").rglob("*")] == [taken]


def test_names_are_unique():
    names = [train_gpt.new_directory(train_gpt.Config(), "cpu") for _ in range(3)]
    assert len({*names}) == 3


def test_help_is_whole(capsys):
    train_gpt.main(["--help"])
    text = capsys.readouterr().out
    knobs = [f"{field.name}: " for field in dataclasses.fields(train_gpt.Config)]
    for word in [*knobs, *train_gpt.PRESETS]:
        assert word in text


@pytest.mark.parametrize("gemm", ["plain", "blackwell"])
def test_a_knob_chooses_how_gemms_add(gemm, monkeypatch, tmp_path):
    monkeypatch.setattr(quartet, "GEMM", quartet.GEMM)                   # to be put back
    c = train_gpt.Config(layers=1, width=128, heads=1, hidden=128, gemm=gemm)
    train_gpt.build(c, tmp_path, {}, "cpu", compiled=False)
    assert quartet.GEMM == gemm


@pytest.mark.parametrize("backend, options", [("torch", quartet.AS_EAGER), ("triton", None)])
def test_compiled_the_reference_rounds_as_eager(backend, options, monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, options: found.append(options))
    c = train_gpt.Config(layers=2, width=128, heads=1, hidden=128, backend=backend)
    train_gpt.build(c, tmp_path, {}, "cpu", compiled=True)
    assert found == [options] * 3


def test_without_a_c_compiler_auto_compiles_nothing_and_says_so(monkeypatch, capsys):
    # Of a GPU
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    c = train_gpt.Config()
    assert train_gpt.pick_device(c) == "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert not train_gpt.pick_compile(c, "cuda")
        assert "torch.compile needs a C compiler (apt install gcc)" in capsys.readouterr().out
    assert not train_gpt.pick_compile(dataclasses.replace(c, compile="off"), "cuda")
    assert train_gpt.pick_compile(dataclasses.replace(c, compile="on"), "cuda")

    # With one, and on a CPU
    monkeypatch.setattr(quartet, "load_kernels", lambda: None)
    assert train_gpt.pick_compile(c, "cuda")
    assert not train_gpt.pick_compile(c, "cpu")
    assert capsys.readouterr().out == ""


def test_a_failed_start_leaves_the_name_free(monkeypatch):
    def full_gpu(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")

    def full(*arguments):
        torch.empty(2**60, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        for recipe, build in ("bf16", full_gpu), ("bf16,rtn", full_gpu), ("bf16", full):
            patch.setattr(train_gpt, "build", build)
            with pytest.raises(train_gpt.UserError, match="too little memory, try a smaller --batch"):
                train(steps=1, recipe=recipe)
            assert not Path("runs/a").exists()

    # A bug in the first steps, of which there is no checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "update", fails_in_step_3())
        with pytest.raises(RuntimeError, match="a bug"):
            train()
    assert not Path("runs/a").exists()

    # A second Ctrl-C
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "update", lambda optimizers, norm: [signal.raise_signal(signal.SIGINT)
                                                                     for _ in range(2)])
        with pytest.raises(KeyboardInterrupt):
            train()
    assert not Path("runs/a").exists()

    # With one, the run stays.
    monkeypatch.setattr(train_gpt, "update", fails_in_step_3())
    with pytest.raises(RuntimeError, match="a bug"):
        train(save_every=2)
    assert checkpoint()["step"] == 2


def fails_in_step_3():
    steps = iter(range(1, 4))

    def update(optimizers, norm):
        if next(steps) == 3:
            raise RuntimeError("a bug")

    return update


def test_a_disk_without_room_for_checkpoints_is_told_at_the_start(monkeypatch):
    train(steps=2, save_every=1, name="before")
    size = Path("runs/before/checkpoint.pt").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size))
    with pytest.raises(train_gpt.UserError, match="needs 7 MB for checkpoints, .* room for 4: remove"):
        train(steps=1)
    assert not Path("runs/a").exists()

    # A comparison needs room for all of its runs.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * size))
    train(steps=1, name="alone")
    with pytest.raises(train_gpt.UserError, match="needs 11 MB for checkpoints, .* room for 9: remove"):
        train(steps=1, recipe="bf16,rtn", name="both")
    assert not Path("runs/both").exists()

    # A run that goes on has two of them already.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size))
    Path("runs/before/result.json").unlink()
    train_gpt.main(["resume", "before"])


@pytest.mark.parametrize("variables", [
    dict(RANK="1"),
    dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"),
    dict(RANK="two", WORLD_SIZE="4", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1"),
])
def test_a_process_of_a_group_that_is_not_told_whole_is_refused(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(train_gpt.UserError, match="RANK=.*, WORLD_SIZE=.*torchrun sets them all; unset RANK"):
        train()



# ---- Forks of it -------------------------------------------------------------------------------------------

def test_a_layer_that_a_fork_made_plain_stays_plain_when_recipes_switch(monkeypatch, capsys):
    make = train_gpt.Block.__init__
    forward = train_gpt.GPT.forward
    kinds = set()
    recipes = []

    def fork(block, c, quantized):
        make(block, c, quantized)
        block.out = torch.nn.Linear(c.width, c.width, bias=False)

    def note(model, *tokens):
        block = model.blocks[0]
        kinds.add(type(block.out))
        recipes.append(block.qkv.recipe)
        return forward(model, *tokens)

    monkeypatch.setattr(train_gpt.Block, "__init__", fork)
    monkeypatch.setattr(train_gpt.GPT, "forward", note)
    train(steps=2, bf16_end=0.5, recipe="rtn")
    assert "layers  3 quantized, " in capsys.readouterr().out
    train_gpt.main(["eval", "a", "--recipe=rtn,nvidia"])
    train_gpt.main(["sample", "a", "--recipe=four_six"])
    assert kinds == {torch.nn.Linear}
    assert {*recipes} == {"rtn", "bf16", "nvidia", "four_six"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_that_a_fork_adds_are_trained(monkeypatch, optimizer):
    make = train_gpt.GPT.__init__
    predict = train_gpt.GPT.predict

    def fork(model, c):
        make(model, c)
        model.places = torch.nn.Embedding(c.sequence, c.width)
        model.size = torch.nn.Parameter(torch.ones(()))

    def use(model, x, targets):
        return predict(model, (x + model.places.weight) * model.size, targets)

    monkeypatch.setattr(train_gpt.GPT, "__init__", fork)
    monkeypatch.setattr(train_gpt.GPT, "predict", use)
    train(steps=2, save_every=1, batch=2, sequence=32, sample_tokens=1, optimizer=optimizer, prompt="x" * 32)
    first = checkpoint(name="previous.pt")["model"]
    last = checkpoint()["model"]
    assert all((first[name] != last[name]).any() for name in last)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "AdamW"])
def test_any_optimizer_skips_a_step_without_a_finite_gradient_and_groups_keep_their_learning_rates(
        monkeypatch, kind):
    # The head has half the learning rate.
    def make(model, c):
        head = dict(params=[*model.head.parameters()], lr=0.5 * c.lr)
        groups = [dict(params=[*model.blocks.parameters()]), head]
        return [getattr(torch.optim, kind)(groups, lr=c.lr)]

    update = train_gpt.update
    rates = []

    def note(optimizers, norm):
        rates.append([group["lr"] for group in optimizers[0].param_groups])
        update(optimizers, norm)

    monkeypatch.setattr(train_gpt, "make_optimizers", make)
    monkeypatch.setattr(train_gpt, "update", note)
    weights = spoil_losses(monkeypatch, [3])
    train(steps=5, recipe="bf16", save_every=4)

    # The third step changes nothing; rates are those of the schedule.
    changes = [not torch.equal(a, b) for a, b in zip(weights[:4], weights[1:5])]
    assert changes == [True, True, False, True]
    c = train_gpt.Config(**checkpoint()["config"])
    schedule = [train_gpt.learning_rate(c, step) for step in range(5)]
    expected = [[lr, 0.5 * lr] for lr in schedule]
    assert rates == expected

    # Resumed from step 4 they are, too.
    go_back()
    train_gpt.main(["resume", "a"])
    assert rates[5:] == expected[4:]


def test_muon_has_the_matrices_of_the_blocks_and_each_group_its_learning_rate(monkeypatch):
    rates = []
    update = train_gpt.update

    def note(optimizers, norm):
        rates.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])
        update(optimizers, norm)

    monkeypatch.setattr(train_gpt, "update", note)
    knobs = dict(optimizer="muon", lr=0.02, embedding_lr=0.3, head_lr=0.008, save_every=2, recipe="quintet")
    train(**knobs)
    c = train_gpt.Config(**checkpoint()["config"])
    model = train_gpt.GPT(c)
    muon, adamw = train_gpt.make_optimizers(model, c)
    block = model.blocks[0]
    matrices = {block.qkv.weight, block.out.weight, block.up.weight, block.down.weight}
    assert {p for group in muon.param_groups for p in group["params"]} == matrices
    assert {p for group in adamw.param_groups for p in group["params"]} == {*model.parameters()} - matrices

    # By the schedule; the pull is that of AdamW's steps of the same length.
    shares = torch.tensor([1.0, 0.4, 15.0, 0.4])
    expected = [train_gpt.learning_rate(c, step) * shares for step in range(4)]
    torch.testing.assert_close(torch.tensor(rates), torch.stack(expected))
    assert train_gpt.pull(c, 0.02) == pytest.approx(0.02 / (0.2 * 128**0.5))
    assert train_gpt.pull(dataclasses.replace(c, optimizer="adamw"), 0.02) == 0.02

    # It goes on from step 2 to the same bits.
    straight = checkpoint()
    go_back()
    Path("runs/a/result.json").unlink()
    train_gpt.main(["resume", "a"])
    assert same(checkpoint()["model"], straight["model"])


def test_the_loss_falls_also_by_muon_in_nanochats_block():
    learn_in_twenty_steps(recipe="quartet2", optimizer="muon", lr=0.02, embedding_lr=0.1, head_lr=0.008,
                          schedule="wsd", qk_norm="true", mlp="relu2")


@pytest.mark.parametrize("preset, size, tokens", [("d12", 84934656, 1.48e9), ("d20", 393216000, 5.49e9)])
def test_nanochats_presets_have_its_shapes_and_read_12_tokens_a_parameter(preset, size, tokens):
    c = train_gpt.Config(**train_gpt.PRESETS[preset])
    train_gpt.check_knobs(c)
    with torch.device("meta"):
        model = train_gpt.GPT(c)
    assert sum(m.weight.numel() for m in model.quantized_linears().values()) == size
    assert c.width // c.heads == 128
    assert c.steps * c.tokens_per_step == pytest.approx(tokens, rel=1e-2)
    assert tokens == pytest.approx(12 * (size + model.head.weight.numel()), rel=1e-2)


@pytest.mark.parametrize("error", [
    ValueError("too many values to unpack"),
    RuntimeError("integer overflow, cannot allocate"),
])
@pytest.mark.parametrize("name", ["Linear", "quantized_weights"])
def test_a_forks_own_bug_keeps_its_traceback(place, monkeypatch, name, error):
    def broken(*arguments, **knobs):
        raise error

    monkeypatch.setattr(quartet, name, broken)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *words(corpus=place / "tiny", steps=1)])
    with pytest.raises(type(error)) as shown:
        runpy.run_path(train_gpt.__file__, run_name="__main__")
    assert shown.value is error


# ---- The rules that keep the three files apart from data/ --------------------------------------------------

def imports(path):
    """The modules that a file imports, anywhere in it, by their first names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_the_three_files_import_nothing_of_data_and_each_other_only():
    top = {path.stem for path in ROOT.glob("*.py")}
    below = {path.stem for path in (ROOT / "data").rglob("*.py")}
    assert not {"launch", "files"} & (top | below)
    ours = top | below | {"data"}
    for name, allowed in [("quartet", {"kernels"}), ("kernels", {"quartet"}), ("train_gpt", {"quartet"})]:
        assert imports(ROOT / f"{name}.py") & ours <= allowed


def test_scripts_import_the_three_files_and_one_sibling_and_put_the_root_first():
    scripts = [*(ROOT / "data").glob("*.py"), *(ROOT / "data/evidence").glob("*.py")]
    names = {path.stem for path in scripts}
    for path in scripts:
        imported = imports(path)
        assert len(imported & names - {path.stem}) <= 1, path
        if imported & {"quartet", "train_gpt", "kernels"}:
            source = path.read_text()
            up = len(path.relative_to(ROOT).parts) - 1
            assert source.count("sys.path") == 1, path
            assert "sys.path.insert(0, " in source, path
            assert f"parents[{up}]" in source, path


@in_background
def beside_other_packages(directory):
    """What scripts print where a folder on Python's path has packages of our names, which end the process."""
    with WRITING:
        write_corpus(directory)
        for name in ("launch", "files", "data", "prepare", "perplexity", "demonstrate", "train_gpt", "quartet",
                     "kernels"):
            package = directory / "other" / name
            package.mkdir(parents=True)
            (package / "__init__.py").write_text("raise SystemExit(f'the other {__name__}')")
    evidence = ROOT / "data/evidence"
    path = f"sys.path[0] = {str(ROOT / 'data')!r}"
    commands = [
        [ROOT / "train_gpt.py", *words(corpus=directory / "tiny", steps=1)],
        [evidence / "figures.py", "--base=nosuch"],
        [evidence / "experiments.py", "--help"],
        # A script of data/ finds our quartet.py, and this one our kernels.py.
        ["-c", f"import sys; {path}; import perplexity, quartet; print(quartet.load_kernels())"],
    ]
    variables = dict(PYTHONPATH=str(directory / "other"), TRITON_INTERPRET="1")
    return [python(*command, cwd=directory, **variables) for command in commands]


def test_packages_of_the_same_names_elsewhere_are_not_imported(beside_other_packages):
    trained, drawn, helped, found = beside_other_packages
    assert trained.returncode == 0, trained.stderr
    assert "step 1/1" in trained.stdout
    assert "no row 'nosuch'" in drawn.stderr
    assert helped.returncode == 0, helped.stderr
    assert found.stdout == "None\n"


# ---- Tokens ------------------------------------------------------------------------------------------------

def test_a_run_keeps_what_its_tokens_are_whatever_its_vocabulary(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiktoken", None)      # to import it is an error
    train(tokenizer="gpt2", name="a")
    assert "without a sample: GPT-2's tokens need tiktoken" in capsys.readouterr().out
    assert Path("runs/a/sample.txt").read_text().startswith("(GPT-2's tokens need tiktoken")
    train(vocab_size=512, tokenizer="bytes", name="b")
    assert Path("runs/b/sample.txt").read_text().startswith("def ")
    train(name="c")
    assert checkpoint("c")["config"]["tokenizer"] == "bytes"

    # Neither goes on with other tokens.
    with pytest.raises(train_gpt.UserError, match="--tokenizer=gpt2 .saved: bytes"):
        train_gpt.main(["eval", "c", "--tokenizer=gpt2"])
    message = "the weights of c have another shape: --tokenizer=gpt2 .saved: bytes"
    with pytest.raises(train_gpt.UserError, match=message):
        train(init_from="c", tokenizer="gpt2", name="d")


# ---- What a run says at its start --------------------------------------------------------------------------

@pytest.mark.parametrize("forward_end, end, expected", [
    (0, 0, "rtn"),
    (0.5, 0, "rtn; from step 6 on rtn+bf16_forward"),
    (0.5, 0.2, "rtn; from step 6 on rtn+bf16_forward; from step 9 on bf16"),
    (0.2, 0.5, "rtn; from step 6 on bf16"),
    (0.2, 0.2, "rtn; from step 9 on bf16"),
    (0, 1, "rtn; from step 1 on bf16"),
    (0, 1e-20, "rtn"),
])
def test_the_header_says_which_steps_train_by_another_recipe(forward_end, end, expected, monkeypatch):
    monkeypatch.setattr(quartet, "RECIPES", dict(RECIPES))
    c = train_gpt.Config(recipe="rtn", steps=10, bf16_forward_end=forward_end, bf16_end=end)
    assert train_gpt.recipes_by_step(c) == expected


def test_the_header_lists_which_layers_are_quantized_how_and_when(capsys):
    train(layers=3, bf16_first=1, steps=4, bf16_end=0.25, bf16_forward_end=0.5, sample_tokens=1)
    header = records()[0]
    assert header["recipe"] == "quartet2; from step 3 on quartet2+bf16_forward; from step 4 on bf16"
    assert header["operands"] == str(RECIPES["quartet2"])
    assert header["layers"] == (
        "8 quantized, 229,376 parameters: blocks.1-2.qkv, blocks.1-2.out, blocks.1-2.up, blocks.1-2.down; "
        "not: embedding, blocks.0.qkv, blocks.0.out, blocks.0.up, blocks.0.down, head")
    printed = capsys.readouterr().out
    assert all(f"{what:>10}  {header[what]}\n" in printed for what in ("recipe", "operands", "layers"))


def test_names_of_layers_in_blocks_that_follow_each_other_are_one():
    names = ["a.9.b", "a.10.b", "a.12.b", "a.12.c.3", "d"]
    assert train_gpt.in_short(names) == "a.9-10.b, a.12.b, a.12.c.3, d"
    assert train_gpt.in_short([]) == ""


def test_processes_with_another_corpus_or_without_a_gpu_of_their_own_are_told(monkeypatch):
    gather = train_gpt.gather
    monkeypatch.setattr(train_gpt, "gather", lambda value: [value, "of another machine"])
    with pytest.raises(train_gpt.UserError, match="not all processes have the same corpus tiny, or"):
        train()
    monkeypatch.setattr(train_gpt, "gather", gather)
    monkeypatch.setattr(train_gpt, "WORLD", 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(train_gpt.UserError, match="this machine has 2 GPUs, and no GPU 3: take a smaller"):
        train_gpt.start_processes("cuda", False)


def test_weights_that_other_code_has_trained_are_told(monkeypatch, capsys):
    train(name="a")
    monkeypatch.setattr(train_gpt, "CODE", "12345678")
    capsys.readouterr()
    for command in ["eval", "a", "--recipe=bf16"], ["sample", "a"], words(name="b", init_from="a"):
        train_gpt.main(command)
        assert "was trained by code" in capsys.readouterr().err


def test_a_comparison_and_a_file_of_a_run_are_told_apart_from_runs(capsys):
    train(recipe="bf16,rtn", steps=1)
    assert "(one seed: what differs by little may be chance;" in capsys.readouterr().out
    with pytest.raises(train_gpt.UserError, match="^a is a comparison: name one of its runs, a/RECIPE"):
        train_gpt.main(["eval", "a"])
    with pytest.raises(train_gpt.UserError, match="^a/rtn/checkpoint.pt is a file of a run: name the run, or"):
        train_gpt.main(["resume", "a/rtn/checkpoint.pt"])


def test_without_a_tokenizer_nothing_is_sampled(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)      # to import it is an error
    train(tokenizer="gpt2", name="a")
    with pytest.raises(train_gpt.UserError, match="GPT-2's tokens need tiktoken"):
        train_gpt.main(["sample", "a"])
