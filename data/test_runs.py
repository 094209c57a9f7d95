"""Tests of how runs of train_gpt.py are named, resumed and read: what goes on must fit what began."""
import json, signal, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import numpy as np
import pytest
import torch
import prepare, train_gpt

KNOBS = ("--layers=1 --width=128 --heads=1 --hidden=128 --sequence=32 --batch=2 --tokens_per_step=64"
         " --steps=4 --eval_tokens=64 --sample_tokens=2 --lr=3e-3 --corpus=tiny --device=cpu --name=a").split()

@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*words) in a directory of its own with a small corpus; signal handlers as they were."""
    tokens = np.frombuffer(b"the quick brown fox jumps over the lazy dog\n" * 40, np.uint8)
    for split in ("train", "val"): prepare.write_shard(tmp_path / f"tiny_{split}_000000.bin", tokens)
    monkeypatch.setattr(train_gpt, "DATA", tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *words: train_gpt.main(["cpu", *KNOBS, *words])
    for s, handler in handlers.items(): signal.signal(s, handler)

def result(run): return json.loads(Path(f"runs/{run}/result.json").read_text())
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
    train_gpt.main(["resume", "a", "--bf16_end=0"])
    assert seen == ["bf16"] * 2 + ["rtn"] * 5                               # two tokens; then validation, too
    assert result("a")["val_loss"] != before["val_loss"]

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
