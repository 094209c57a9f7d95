"""Tests of how runs of train_gpt.py are named, resumed and read: what goes on must fit what began."""
import json, math, os, re, signal, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import numpy as np
import pytest
import torch
import files, prepare, train_gpt

KNOBS = ("--layers=1 --width=128 --heads=1 --hidden=128 --sequence=32 --batch=2"
         " --tokens_per_step=64 --steps=4 --eval_tokens=64 --sample_tokens=2 --lr=3e-3 --corpus=tiny"
         " --device=cpu --name=a").split()

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory of its own, with a small corpus, to train in; signal handlers stay as they were."""
    tokens = np.frombuffer(b"the quick brown fox jumps over the lazy dog\n" * 40, np.uint8)
    for split in ("train", "val"): prepare.write_shard(tmp_path / f"tiny_{split}_000000.bin", tokens)
    monkeypatch.setattr(train_gpt, "DATA", tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for s, handler in handlers.items(): signal.signal(s, handler)
    torch.use_deterministic_algorithms(False)               # train_gpt.py sets it on a GPU

@pytest.fixture
def train(place): return lambda *words: train_gpt.main(["cpu", *KNOBS, *words])

def result(run="a"): return json.loads(Path(f"runs/{run}/result.json").read_text())
def refused(message, *words):
    with pytest.raises(train_gpt.UserError, match=message): train_gpt.main([*words])

def test_a_stopped_comparison_goes_on_where_it_was_and_with_its_own_knobs_only(train, monkeypatch, capsys):
    train("--name=straight", "--recipe=bf16,rtn")
    rate, calls = train_gpt.learning_rate, []
    def interrupted(c, i):
        calls.append(c.recipe)
        if len(calls) == 6: signal.raise_signal(signal.SIGTERM)              # the second step of rtn
        return rate(c, i)
    monkeypatch.setattr(train_gpt, "learning_rate", interrupted)
    with pytest.raises(SystemExit): train("--recipe=bf16,rtn")
    assert capsys.readouterr().out.endswith("train_gpt.py resume runs/a\n")  # not runs/a/rtn
    refused(r"cannot change: --steps=5 \(saved: 4\), --lr=0.1 \(saved: 0.003\)", "resume", "a", "--steps=5",
            "--lr=0.1")
    refused("--recipe=quartet2: runs/a goes on with several", "resume", "a", "--recipe=quartet2")
    train_gpt.main(["resume", "a", "--recipe=bf16,rtn,four_six"])            # one more than it began with
    assert calls == ["bf16"] * 4 + ["rtn"] * 4 + ["four_six"] * 4
    a, b = (torch.load(f"runs/{name}/rtn/checkpoint.pt", weights_only=True) for name in ("straight", "a"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for words in ["--steps=5"], ["--recipe=rtn"]:                           # result.json would tell of others
        refused(f"cannot change: {words[0]}", "resume", "a/bf16", *words)
    rows = [line.split()[0] for line in Path("runs/a/compare.txt").read_text().splitlines()]
    assert rows == ["recipe", "bf16", "rtn", "four_six"]

def test_a_run_goes_on_by_one_recipe_under_its_name(train):
    train("--recipe=bf16")
    refused("--recipe=bf16,rtn: runs/a goes on with one", "resume", "a", "--recipe=bf16,rtn")
    refused(r"--name=b \(saved: a\)", "resume", "a", "--name=b")
    Path("runs/begun").mkdir()
    refused("runs/begun exists: .*remove it", "cpu", *KNOBS, "--name=begun")

def test_a_run_that_ended_in_bf16_is_evaluated_and_sampled_in_bf16(train, monkeypatch, capsys):
    train("--bf16_end=0.5", "--recipe=rtn", "--lr=0.1")
    before = result("a")
    Path("runs/a/result.json").unlink()
    train_gpt.main(["resume", "a"])
    assert before == {**result("a"), "tokens_per_s": before["tokens_per_s"], "peak_gib": before["peak_gib"]}
    seen, forward = [], train_gpt.GPT.forward
    note = lambda model, *a: seen.append(model.blocks[0].up.recipe) or forward(model, *a)
    monkeypatch.setattr(train_gpt.GPT, "forward", note)
    for words in ["a"], ["a", "--recipe=rtn"]: train_gpt.main(["sample", *words])
    assert seen == ["bf16"] * 2 + ["rtn"] * 2                               # two tokens each
    refused(r"cannot change: --bf16_end=0.0 \(saved: 0.5\)", "resume", "a", "--bf16_end=0")   # it has ended

def test_the_last_steps_in_bf16_are_counted_exactly_and_knobs_have_bounds(train):
    for end, steps in (0.1, 10), (0.9, 10), (0.9, 100), (0.3, 1000), (1.0, 7):
        c = train_gpt.Config(recipe="rtn", bf16_end=end, steps=steps)
        assert sum(train_gpt.recipe_of(c, i) == "bf16" for i in range(1, steps + 1)) == round(end * steps)
    for knob, most in dict(bf16_end=1, bf16_blocks=0, lr=1e38, seed=10**12).items():
        value = "inf" if knob == "lr" else str(most + 1)
        refused(f"--{knob}={value}.*: it must be from 0 to {re.escape(str(most))}", "cpu", *KNOBS,
                f"--{knob}={value}")

def test_ten_steps_in_a_row_without_a_gradient_end_a_run_also_between_two_lines(train, monkeypatch):
    """Steps 3 to 12 of 14 have none, and the run prints a line after each 20."""
    predict, calls = train_gpt.GPT.predict, []
    def spoiled(self, x, targets):
        calls.append(0)
        return predict(self, x, targets) * (float("nan") if 3 <= len(calls) <= 12 else 1)
    monkeypatch.setattr(train_gpt.GPT, "predict", spoiled)
    with pytest.raises(train_gpt.UserError, match="10 steps in a row"): train("--steps=14", "--log_every=20")
    records = [*map(json.loads, open("runs/a/log.jsonl"))]
    assert sum(r.get("grad_norm", 0) is None for r in records) == 10

def test_a_log_is_repaired_whole_or_not_at_all(train, monkeypatch):
    train("--recipe=bf16")
    log = Path("runs/a/log.jsonl")
    before = log.read_text()
    log.write_text(before + '{"step": 5, "lo')
    def crash(*paths): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(train_gpt.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt): train_gpt.main(["resume", "a", "--steps=5"])
    assert log.read_text() == before + '{"step": 5, "lo'
    refused("--steps=3: .*at step 4 now", "resume", "a", "--steps=3")
    damaged = before.replace('{"step": 2,', "\0\0\0", 1) + "\0\0"       # a block that no disk has got
    log.write_text(damaged)
    train_gpt.main(["resume", "a", "--steps=5"])
    records = [*map(json.loads, open(log))]
    assert [r["step"] for r in records if "loss" in r] == [1, 3, 4, 5]
    assert len(torch.load("runs/a/checkpoint.pt", weights_only=True)["code"]) == 8

def test_a_run_that_goes_on_by_other_code_or_on_other_text_says_so(train, capsys):
    train("--recipe=bf16")
    path = Path("runs/a/checkpoint.pt")
    torch.save(torch.load(path, weights_only=True) | dict(code="12345678", corpus="87654321"), path)
    assert "the checkpoint's" not in capsys.readouterr().out
    train_gpt.main(["resume", "a", "--steps=5"])
    now, printed = torch.load(path, weights_only=True), capsys.readouterr().out
    assert f"code {now['code']}, the checkpoint's: 12345678\n" in printed
    assert f"sha256 {now['corpus']}, the checkpoint's: 87654321\n" in printed
    refused("--recipe=bf16,rtn: one recipe samples", "sample", "a", "--recipe=bf16,rtn")

def test_a_signal_that_comes_twice_saves_as_one(train, monkeypatch):
    def stop(data, c, step, micro, device, random=train_gpt.Shards.random):
        if step == 2:
            for _ in range(2): signal.raise_signal(signal.SIGTERM)
        return random(data, c, step, micro, device)
    monkeypatch.setattr(train_gpt.Shards, "random", stop)
    with pytest.raises(SystemExit) as stopped: train()
    assert stopped.value.code == 0 and torch.load("runs/a/checkpoint.pt", weights_only=True)["step"] == 2

def test_a_recipe_that_diverges_does_not_end_the_others(train, capsys):
    train("--recipe=bf16,rtn", "--lr=1e30")
    assert capsys.readouterr().out.count("its logits are not finite: no sample") == 2
    assert len(Path("runs/a/compare.txt").read_text().splitlines()) == 3
    train_gpt.main(["sample", "a/rtn"])
    assert "no sample" in capsys.readouterr().out

def test_a_finished_run_keeps_its_speed(train):
    train("--log_every=1")
    before = result("a")
    train_gpt.main(["resume", "a"])
    assert result("a") == before and before["tokens_per_s"] > 0

def test_a_finished_run_may_change_where_it_is_read_and_a_stopped_one_may_end_where_it_is(train):
    train("--shard=false")
    train_gpt.main(["resume", "a", "--device=auto"])
    refused("cannot change: --lr=1.0", "resume", "a", "--lr=1")
    train("--name=b", "--save_every=2")
    Path("runs/b/result.json").unlink()
    Path("runs/b/previous.pt").replace("runs/b/checkpoint.pt")
    train_gpt.main(["resume", "b", "--steps=2"])                            # at step 2 of 4
    assert torch.load("runs/b/checkpoint.pt", weights_only=True)["step"] == 2 and result("b")["val_loss"] > 0

def test_a_bit_of_a_checkpoints_directory_is_seen(train):
    train()
    path = Path("runs/a/checkpoint.pt")
    whole = path.read_bytes()
    at = [m.start() for m in re.finditer(b"PK\1\2", whole)]                  # zip's record of an entry
    for i, place in enumerate(at):
        for offset, bit in (38, 16), (10, 8):           # "a directory"; "compressed"
            path.write_bytes(whole[:place + offset] + bytes([whole[place + offset] ^ bit])
                             + whole[place + offset + 1:])
            refused("not a whole checkpoint.*(train again|one before)", "sample", "a")
    assert len(at) > 20

def test_going_on_from_the_one_before_keeps_it(train):
    train("--save_every=2")
    new, old = Path("runs/a/checkpoint.pt"), Path("runs/a/previous.pt")
    good = old.read_bytes()
    new.write_bytes(b"damaged")
    train_gpt.main(["resume", "runs/a/previous.pt"])
    assert torch.load(new, weights_only=True)["step"] == 4 and old.read_bytes() == good
    assert Path("runs/a/aside.pt").read_bytes() == b"damaged"

def test_a_run_is_one_processs(train):
    train()
    with files.held(Path("runs/a")): refused("another process trains in runs/a", "resume", "a", "--steps=5")
    train_gpt.main(["resume", "a", "--steps=5"])
    train("--recipe=bf16,rtn", "--name=both")
    Path("runs/both/rtn/result.json").unlink()
    with files.held(Path("runs/both/rtn")):
        refused("another process trains in runs/both/rtn", "resume", "both")

def test_what_replaces_a_file_is_on_the_disk(train, monkeypatch):
    done = []
    for name in "fsync", "replace":
        def noting(*a, name=name, real=getattr(os, name)): return done.append(name), real(*a)
        monkeypatch.setattr(files.os, name, noting)
    files.write(Path("a.txt"), "a")
    files.save(Path(), train_gpt.Config(), 1)
    assert done == ["fsync", "replace"] * 2 and Path("a.txt").read_text() == "a"

def test_what_cannot_be_read_now_is_not_said_to_be_broken(train, monkeypatch):
    train()
    def full(*_, **__): raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")
    with monkeypatch.context() as m:
        m.setattr(torch, "load", full)
        with pytest.raises(RuntimeError, match="allocate"): train_gpt.main(["sample", "a"])
    Path("runs/a/checkpoint.pt").unlink()
    Path("runs/a/checkpoint.pt").mkdir()
    with pytest.raises(IsADirectoryError): train_gpt.main(["sample", "a"])

def test_a_streak_of_bad_steps_leaves_the_checkpoint_from_before_it(train, monkeypatch):
    """From step 3 of 14 a weight is infinite: nothing of that is kept, whatever --save_every."""
    forward, calls = train_gpt.GPT.forward, []
    def spoiled(model, *tokens):
        calls.append(0)
        if len(calls) == 3: model.head.weight.data[0] = math.inf
        return forward(model, *tokens)
    monkeypatch.setattr(train_gpt.GPT, "forward", spoiled)
    with pytest.raises(train_gpt.UserError, match="10 steps in a row"): train("--steps=14", "--save_every=1")
    for name in train_gpt.CHECKPOINTS:
        kept = torch.load(f"runs/a/{name}", weights_only=True)
        assert kept["step"] in (1, 2) and all(w.isfinite().all() for w in kept["model"].values())

def test_what_takes_one_process_says_so(train, monkeypatch):
    train()
    monkeypatch.setattr(train_gpt.launch, "WORLD", 2)
    for mode in "eval", "sample": refused(f"{mode} takes one process", mode, "a")

def test_a_name_is_looked_for_in_runs_first_and_any_batch_evaluates(train, capsys):
    train("--recipe=bf16")
    Path("a").mkdir()
    train_gpt.main(["eval", "a", "--batch=1", "--recipe=bf16"])              # 64 tokens: one batch or two
    assert f"{result('a')['val_loss']:.4f}" in capsys.readouterr().out

def test_a_corpus_reads_its_own_shards_only(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "DATA", tmp_path)
    names = ("two_train_000000", "two_train_000001", "two_train_train_000000", "two_train_x",
             "t[w]o_train_000000")
    for i, name in enumerate(names): prepare.write_shard(tmp_path / f"{name}.bin", np.full(40, i))
    for corpus, firsts in (("two", [0, 1]), ("two_train", [2]), ("t[w]o", [4])):
        c = train_gpt.Config(corpus=corpus, sequence=8)
        assert [shard[0] for shard in train_gpt.Shards(c, "train").shards] == firsts

def test_a_checkpoint_with_a_knob_that_is_gone_says_so(train):
    train("--recipe=bf16")
    saved = torch.load("runs/a/checkpoint.pt", weights_only=True)
    torch.save(saved | dict(config=saved["config"] | dict(dropout=0.1)), "runs/a/checkpoint.pt")
    refused("not written by this version", "sample", "a")
