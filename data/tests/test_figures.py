"""Tests of figures.py on runs of one's own, and of what train_gpt.py prints as it samples."""
import json, runpy, sys, types
from pathlib import Path
import pytest
import torch
import figures, train_gpt

def write(path, recipe, losses, **config):
    """A log as train_gpt.py writes it, whose last lines are damaged and torn."""
    path.mkdir(parents=True)
    config = dict(recipe=recipe, steps=9, tokens_per_step=4000, name=path.name, **config)
    records = [dict(start=0, config=config)]
    for step, loss in enumerate(losses, 1): records += [dict(step=step, loss=loss + 1, ms=2.0)]
    records += [dict(step=step, val_loss=loss) for step, loss in enumerate(losses, 1)]
    lines = [*map(json.dumps, records), '{"step" 3, "ms": 1}', '\0"ms": 1}', '{"step": 4, "lo']
    (path / "log.jsonl").write_text("\n".join(lines))

def test_runs_are_tabled_beside_the_bf16_run_that_is_like_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs/c/bf16", "bf16", [3.0, 2.0, 1.5], seed=1)
    write(tmp_path / "runs/c/rtn", "rtn", [3.0, 2.25], seed=1)          # still training
    write(tmp_path / "runs/other", "rtn", [3.0, 2.0, 1.0], seed=2)
    figures.main(["runs/c", "runs/other"])
    _, bf16, rtn, other, last = (line.split() for line in capsys.readouterr().out.splitlines())
    assert last[:2] == ["no", "pictures:"] or (tmp_path / "runs/curves.png").stat().st_size > 1000
    assert bf16 == ["runs/c/bf16", "bf16", "3/9", "2.5000", "1.5000", "0.0", "2000.0"]
    assert rtn == ["runs/c/rtn", "rtn", "2/9", "3.2500", "2.2500", "250.0", "2000.0"]   # bf16's 2.0
    assert other[-2] == "nan"
    for name, text in ("empty", ""), ("torn", '{"start": 0, "conf'):        # and one that has no log
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "log.jsonl").write_text(text)
    (tmp_path / "bad/new").mkdir()
    (tmp_path / "bad/curves.png").touch()
    write(tmp_path / "bad/begun", "rtn", [], seed=2)
    figures.main([str(path) for path in (tmp_path / "bad").iterdir()])
    printed = capsys.readouterr().out
    assert printed.count("log.jsonl: nothing yet, skipped") == 2 and "0/9          nan" in printed
    with pytest.raises(SystemExit, match="no log.jsonl in bad/torn"): figures.main(["bad/torn"])
    assert figures.main(["--help"]) is None and figures.__doc__ in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no log.jsonl in nothing"): figures.main(["nothing"])
    monkeypatch.setattr(figures, "follow", lambda paths: open("runs"))          # as a disk that is read only
    assert figures.main(["runs"]) is None and "no pictures: [Errno" in capsys.readouterr().out

def test_a_table_tells_deviation_gaps_of_validation_and_training_and_speed_alone(capsys):
    """Over 3 seeds bf16 ends at 1 to 1.002; rtn 0.01 above, and in training 0.02, of which one has no log."""
    def run(end, trained, jobs):
        steps = {step: trained + (step < 37) * jobs for step in range(1, 41)}       # the last tenth: 37 to 40
        return {40: end}, steps if trained else {}, dict(val_loss=end, tokens_per_s=1e3 * jobs, peak_gib=jobs,
                                                         jobs=jobs)
    ends = {1: 1.0, 2: 1.002, 3: 1.001}
    rows = dict(bf16={seed: run(end, 2.0, 1) for seed, end in ends.items()},
                rtn={seed: run(end + 0.01, 2.02 * (seed < 3), 2) for seed, end in ends.items()})
    figures.table("10m", "a", "", rows)
    *_, bf16, rtn = capsys.readouterr().out.splitlines()
    assert bf16.split() == "bf16 3 1.0010 1.00 0.00 +- 0.00 0.00 +- 0.00 1 1.0".split()
    assert rtn.split() == "rtn 3 1.0110 1.00 10.00 +- 0.00 20.00 +- 0.00".split()
    rows["sr"] = {1: run(1.0005, 2.0, 2)}               # of a good seed: below bf16's mean, yet worse
    rows["other"] = {9: run(0.5, 2.0, 2)}               # without a bf16 run: last
    figures.table("10m", "a", "", rows, "rtn")
    assert "to rtn" in (printed := capsys.readouterr().out) and "0.00 +- 0.00   -10.00 +- 0.00" in printed
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == ["bf16", "sr", "rtn", "other"]
    assert figures.paired(rows, "rtn", "bf16", figures.training) == pytest.approx([20, 20])
    for row, steps in dict(whole=(37, 38, 40), torn=(37, 40)).items():         # one loss was lost
        rows[row] = {1: ({40: 1.0}, {step: float(step) for step in steps}, dict(val_loss=1.0))}
    assert figures.paired(rows, "torn", "whole", figures.training) == [0]
    rows["long"] = {1: ({40: 1.0, 80: 0.9}, {}, dict(val_loss=0.9)), 2: ({}, {}, dict(val_loss=1.0))}
    assert figures.paired(rows, "long", "bf16") == pytest.approx([-2])      # not with another last step
    assert figures.binned({1: 1.0, 2: 2.0, 3: 4.0, 5: 9.0}, {1: 0.0, 2: 0.0, 3: 1.0}, 2) == {2: 1500, 3: 3000}

@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run "a" of one step, in runs/."""
    monkeypatch.chdir(tmp_path)
    train_gpt.main("cpu --layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --steps=1 "
                   "--name=a --tokens_per_step=128 --eval_tokens=128 --sample_tokens=9 --device=cpu".split())

def test_a_sample_streams_in_whole_characters_and_by_any_recipe(trained, monkeypatch, capsys):
    capsys.readouterr()
    train_gpt.main(["sample", "a"])
    own = Path("runs/a/sample.txt").read_text(encoding="utf-8")
    assert own.startswith("def ") and capsys.readouterr().out == own + "\n"
    train_gpt.main(["sample", "a", "--recipe=rtn", "--seed=2"])
    assert capsys.readouterr().out.startswith("def ")
    c = train_gpt.Config(prompt="x")
    monkeypatch.setattr(train_gpt, "sample", lambda *_: iter([*"\u20ac".encode(), 0xff, 0xe2]))
    pieces = [*train_gpt.sample_text(None, c, "cpu")]
    assert pieces == ["x", "", "", "\u20ac", "\ufffd", "", "\ufffd"]     # at once, but bytes of one wait

def test_a_prompt_of_tokens_that_the_model_has_not_got_is_left_out(monkeypatch):
    gpt2 = types.SimpleNamespace(encode_ordinary=lambda text: [7, 600, 9], eot_token=700, n_vocab=701,
                                 decode_single_token_bytes=lambda t: b"%d " % t)
    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=lambda name: gpt2))
    monkeypatch.setattr(train_gpt, "sample", lambda model, prompt, c, device: [len(prompt)])
    for vocabulary, text in (512, "7 9 2 "), (50304, "7 600 9 3 "), (5, "0 1 "):
        assert "".join(train_gpt.sample_text(None, train_gpt.Config(vocab_size=vocabulary), "cpu")) == text

def test_ctrl_c_ends_a_sample_without_a_traceback(trained, monkeypatch):
    def interrupt(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(torch, "load", interrupt)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "sample", "a"])
    with pytest.raises(SystemExit) as stop: runpy.run_path(train_gpt.__file__, run_name="__main__")
    assert stop.value.code == 130
