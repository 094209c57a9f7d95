"""Tests of how runs of train_gpt.py are named, resumed and read: what goes on must fit what began."""
import json, math, os, pickle, re, resource, shutil, signal
from pathlib import Path
import numpy as np
import pytest
import torch
import prepare, train_gpt

KNOBS = ("--layers=1 --width=128 --heads=1 --hidden=128 --sequence=32 --batch=2"
         " --tokens_per_step=64 --steps=4 --eval_tokens=64 --sample_tokens=2 --lr=3e-3 --corpus=tiny"
         " --device=cpu --name=a").split()

@pytest.fixture
def train(place): return lambda *words: train_gpt.main(["cpu", *KNOBS, *words])

def result(run="a"): return json.loads(Path(f"runs/{run}/result.json").read_text())
def refused(message, *words):
    with pytest.raises(train_gpt.UserError, match=message) as error: train_gpt.main([*words])
    assert "\n" not in str(error.value)

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
    refused(r"a run keeps what it began with .*: --steps=5 \(saved: 4\), --lr=0.1 \(saved: 0.003\)", "resume", "a", "--steps=5", "--lr=0.1")
    refused("--recipe=quartet2 .saved: bf16,rtn", "resume", "a", "--recipe=quartet2")
    train_gpt.main(["resume", "a", "--log_every=3"])
    assert calls == ["bf16"] * 4 + ["rtn"] * 4
    a, b = (torch.load(f"runs/{name}/rtn/checkpoint.pt", weights_only=True) for name in ("straight", "a"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    rows = [line.split()[0] for line in Path("runs/a/compare.txt").read_text().splitlines()]
    assert rows == ["recipe", "bf16", "rtn"]
    Path("runs/a/bf16/result.json").write_text("")
    refused("runs/a/bf16/result.json is damaged: remove it", "resume", "a")

def other_text(split, number):
    tokens = np.frombuffer(b"pack my box with five dozen liquor jugs " * 40, np.uint8)
    prepare.write_shard(Path(f"tiny_{split}_{number:06d}.bin"), tokens)

@pytest.mark.parametrize("recipe", ["rtn", "bf16,rtn"])
def test_what_goes_on_by_other_code_text_or_number_of_processes_is_refused(train, monkeypatch, recipe):
    """Also where the text differs in its last shard, or in validation; nothing is written then."""
    other_text("train", 1)
    train(f"--recipe={recipe}")
    for result_json in [*Path("runs/a").rglob("result.json")][:1]: result_json.unlink()
    if recipe != "rtn": shutil.rmtree("runs/a/rtn")
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    for split, number in ("train", 0), ("train", 1), ("val", 0):
        path = Path(f"tiny_{split}_{number:06d}.bin")
        whole = path.read_bytes()
        prepare.write_shard(path, np.full(1700, 65))
        refused("runs/a began with corpus .*, and here is .*put it back.*--init_from=RUN", "resume", "a")
        path.write_bytes(whole)
    with monkeypatch.context() as m:
        m.setattr(train_gpt, "CODE", "12345678")
        refused("runs/a began with code .*, and here is 12345678", "resume", "a")
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    train_gpt.main(["resume", "a"])

def test_a_run_goes_on_with_its_own_knobs_and_those_that_change_no_number(train):
    train("--recipe=bf16", "--save_every=3")
    Path("runs/a/previous.pt").replace("runs/a/checkpoint.pt")
    for words in "--recipe=bf16,rtn", "--name=b", "--steps=5", "--shard=true", "--batch=1", "--eval_every=1", "--compile=on":
        refused(f"a run keeps .*--init_from\\): {words} \\(saved: ", "resume", "a", words)
    refused("no checkpoint of runs/a/checkpoint.pt: in runs/: there are a", "resume", "runs/a/checkpoint.pt")
    train_gpt.main(["resume", "a", "--steps=4", "--log_every=1", "--save_every=1", "--device=auto", "--prompt=x",
                    "--sample_tokens=1", "--temperature=0", "--top_k=1"])
    assert torch.load("runs/a/checkpoint.pt", weights_only=True)["step"] == 4
    Path("runs/begun").mkdir()
    refused("runs/begun exists: .*remove it", "cpu", *KNOBS, "--name=begun")

def test_a_run_that_ended_in_bf16_is_evaluated_and_sampled_in_bf16(train, monkeypatch, capsys):
    train("--bf16_end=0.5", "--recipe=rtn", "--lr=0.1")
    before = result("a")
    Path("runs/a/result.json").unlink()                 # as if killed just before the end
    train_gpt.main(["resume", "a"])
    assert before == {**result("a"), "tokens_per_s": before["tokens_per_s"]} and result("a")["tokens_per_s"] is None
    seen, forward = [], train_gpt.GPT.forward
    note = lambda model, *a: seen.append(model.blocks[0].up.recipe) or forward(model, *a)
    monkeypatch.setattr(train_gpt.GPT, "forward", note)
    for words in ["a"], ["a", "--recipe=rtn"]: train_gpt.main(["sample", *words])
    assert seen == ["bf16"] * 2 + ["rtn"] * 2                               # two tokens each

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
    train("--recipe=bf16", "--save_every=3")
    log = Path("runs/a/log.jsonl")
    before = log.read_text()
    log.write_text(before + '{"step": 5, "lo')
    Path("runs/a/previous.pt").replace("runs/a/checkpoint.pt")          # of step 3
    def crash(*paths): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(train_gpt.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt): train_gpt.main(["resume", "a"])
    assert log.read_text() == before + '{"step": 5, "lo' and not Path("runs/a/log.jsonl.part").exists()
    damaged = before.replace('{"step": 2,', "\0\0\0", 1) + "\0\0"       # a block that no disk has got
    log.write_text(damaged)
    train_gpt.main(["resume", "a"])
    records = [*map(json.loads, open(log))]
    assert [r["step"] for r in records if "loss" in r] == [1, 3, 4]

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

def test_a_finished_run_is_left_as_it_is(train, capsys):
    train("--log_every=1")
    before, stamps = result("a"), {path: path.stat().st_mtime_ns for path in Path("runs/a").iterdir()}
    train_gpt.main(["resume", "a"])
    assert "runs/a has ended" in capsys.readouterr().out and before["tokens_per_s"] > 0
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("runs/a").iterdir()}

def test_a_bit_of_a_checkpoints_directory_is_seen(train):
    train()
    path = Path("runs/a/checkpoint.pt")
    whole = path.read_bytes()
    at = [m.start() for m in re.finditer(b"PK\1\2", whole)]                  # zip's record of an entry
    for i, place in enumerate(at):
        for offset, bit in (38, 16), (10, 8):           # "a directory"; "compressed"
            path.write_bytes(whole[:place + offset] + bytes([whole[place + offset] ^ bit])
                             + whole[place + offset + 1:])
            refused("not a whole checkpoint.*remove it", "sample", "a")
    assert len(at) > 20

def test_a_damaged_checkpoint_names_the_one_before_which_is_kept(train):
    train("--save_every=2")
    new, old = Path("runs/a/checkpoint.pt"), Path("runs/a/previous.pt")
    good, whole = old.read_bytes(), torch.load(new, weights_only=True)["model"]
    new.write_bytes(b"damaged")
    for mode in "resume", "eval": refused("runs/a/checkpoint.pt is not a whole checkpoint: remove it, and previous.pt", mode, "a")
    new.unlink()
    train_gpt.main(["resume", "a"])
    again = torch.load(new, weights_only=True)
    assert again["step"] == 4 and old.read_bytes() == good
    assert all(torch.equal(again["model"][k], whole[k]) for k in whole)

def test_a_run_is_one_processs(train):
    train("--save_every=3")
    Path("runs/a/previous.pt").replace("runs/a/checkpoint.pt")
    with train_gpt.held(Path("runs/a")): refused("another process trains in runs/a", "resume", "a")
    train_gpt.main(["resume", "a"])
    train("--recipe=bf16,rtn", "--name=both")
    Path("runs/both/rtn/result.json").unlink()
    with train_gpt.held(Path("runs/both/rtn")):
        refused("another process trains in runs/both/rtn", "resume", "both")

def test_what_replaces_a_file_is_on_the_disk(train, monkeypatch):
    done = []
    for name in "fsync", "replace":
        def noting(*a, name=name, real=getattr(os, name)): return done.append(name), real(*a)
        monkeypatch.setattr(train_gpt.os, name, noting)
    train_gpt.write(Path("a.txt"), "a")
    train_gpt.save(Path(), train_gpt.Config(), 1)
    assert done == ["fsync", "replace"] * 2 and Path("a.txt").read_text() == "a"

def test_what_cannot_be_read_now_is_not_said_to_be_broken(train, monkeypatch):
    train()
    def full(*_, **__): raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")
    with monkeypatch.context() as m:
        m.setattr(torch, "load", full)
        with pytest.raises(RuntimeError, match="allocate"): train_gpt.main(["sample", "a"])

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
