"""Tests of experiments.py and figures.py: runs are kept and not repeated; tables pair seeds."""
import json, os, re, signal, threading, time
import pytest, torch
import experiments, figures
import quartet, train_gpt

SHORT = ["--corpus=python", "--steps=2", "--eval_tokens=128", "--eval_every=1", "--sample_tokens=1"]

@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in experiments, figures: monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures")
    for name in "QUANTIZERS", "RECIPES":                                 # main() adds to them
        monkeypatch.setattr(quartet, name, dict(getattr(quartet, name)))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path / "results"
    for signum, handler in handlers.items(): signal.signal(signum, handler)      # main() sets others

def test_runs_are_kept_not_repeated_and_paired_by_seed(results, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    experiments.main(["tiny", "bf16,fwd_rtn", "--jobs=2", *SHORT])
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    experiments.main(["tiny", "bf16,fwd_rtn", "--jobs=2", "--seeds=1,2", *SHORT])    # the missing
    names = sorted(path.name for path in results.iterdir())
    assert names == [f"tiny-python-{row}-{seed}.jsonl" for row in ("bf16", "fwd_rtn") for seed in (1, 2)]
    assert len(before) == 2 and all(path.stat().st_mtime_ns == time for path, time in before.items())
    rows = figures.read()["tiny", "python", ""]
    loss = {row: {seed: run[2]["val_loss"] for seed, run in rows[row].items()} for row in rows}
    assert loss["bf16"][1] != loss["bf16"][2] and loss["bf16"][1] != loss["fwd_rtn"][1]
    expected = [1e3 * (loss["fwd_rtn"][seed] - loss["bf16"][seed]) for seed in (1, 2)]
    assert figures.paired(rows, "fwd_rtn", "bf16") == expected
    capsys.readouterr()
    figures.main()
    printed = capsys.readouterr().out
    assert f"{sum(expected) / 2:9.2f} +-" in printed and "ktok/s" in printed
    assert all(result["jobs"] == 2 for run in rows.values() for *_, result in run.values())
    with pytest.raises(SystemExit, match="no row 'bf15': bf16, fwd_rtn"): figures.main(["--base=bf15"])
    assert not figures.speed(rows["bf16"])                  # of runs that shared a GPU none is told

def test_a_stopped_run_goes_on(results, monkeypatch, capsys):
    place = experiments.RUNS / "tiny-python-bf16-1"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    train_gpt.main([*experiments.SIZES["tiny"].split(), *SHORT, "--name=run", "--recipe=bf16"])
    (place / "runs/run/result.json").unlink()
    with pytest.raises(train_gpt.UserError, match="run/checkpoint.pt has --steps=2, not 3"):
        experiments.main(["tiny", "bf16", *SHORT, "--steps=3"])
    with pytest.raises(train_gpt.UserError, match="run/checkpoint.pt has --steps=2, not 20"):
        experiments.main(["tiny", "bf16", "--corpus=python"])
    experiments.main(["tiny", "bf16", *SHORT])
    log = [json.loads(line) for line in open(results / "tiny-python-bf16-1.jsonl")]
    assert [r["start"] for r in log if "start" in r] == [0, 2] and log[-1]["recipe"] == "bf16"
    assert not place.exists() and "tiny-python-bf16-1: {" in capsys.readouterr().out

def test_a_log_or_start_of_other_knobs_is_an_error_before_anything_is_trained(results, monkeypatch):
    """A log that does not tell its knobs is taken as it is."""
    monkeypatch.setattr(experiments, "train", lambda *run: pytest.fail(f"trained: {run}"))
    results.mkdir(), experiments.RUNS.mkdir()
    log, start = results / "tiny-a-rtn-1.jsonl", experiments.RUNS / "tiny-a-rtn-from-1-1.pt"
    log.write_text(json.dumps(dict(config=dict(steps=20, lr=1e-3, eval_every=7))) + "\n{}\n")
    experiments.main(["tiny", "rtn", "--corpus=a", "--lr=1e-3", "--save_every=3"])
    for more, message in ((["--steps=9"], "--steps=20, not 9: move it away, or take 20"),
                          (["--eval_every=8"], "--eval_every=7, not 8: move")):
        with pytest.raises(train_gpt.UserError, match=f"tiny-a-rtn-1.jsonl has {message}"):
            experiments.main(["tiny", "rtn@1+bf16", "--corpus=a", *more])
    log.write_text("{}\n")
    experiments.main(["tiny", "rtn", "--corpus=a", "--steps=9"])
    config = vars(train_gpt.Config(**train_gpt.parse(experiments.SIZES["tiny"].split())[2]))
    torch.save(dict(config=config | dict(steps=9), step=1), start)
    with pytest.raises(train_gpt.UserError, match="tiny-a-rtn-from-1-1.pt has --steps=9, not 8: move"):
        experiments.main(["tiny", "rtn@1+bf16", "--corpus=a", "--steps=8"])

def test_rows_go_on_from_a_step_of_another(results, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = [*SHORT, "--steps=3", "--jobs=2"]                    # trains rtn first, keeps its steps 1 and 2
    experiments.main(["tiny", "rtn@1+rtn,bf16", "rtn@2+bf16", *more])
    names = sorted(path.name for path in results.iterdir())
    assert names == [f"tiny-python-{row}-1.jsonl" for row in ("rtn", "rtn-from-1-bf16", "rtn-from-2-bf16")]
    log = [json.loads(line) for line in open(results / "tiny-python-rtn-from-1-bf16-1.jsonl")]
    assert [r.get("start") for r in log][0] == 1 and log[-1]["recipe"] == "bf16"
    rows = figures.read()["tiny", "python", "rtn-from-1"]
    assert {row: [*v[1][0]] for row, v in rows.items()} == {"bf16": [2, 3], "rtn": [2, 3]}   # after it
    trunk, start = results / "tiny-python-rtn-1.jsonl", experiments.start_of("tiny", "python", "rtn@1", 1)
    before, expected = trunk.stat().st_mtime_ns, torch.load(start, weights_only=False)["model"]
    start.unlink()                                              # trained again, up to there
    experiments.main(["tiny", "rtn@1+rtn,quartet2", *more])
    assert trunk.stat().st_mtime_ns == before and (results / "tiny-python-rtn-from-1-quartet2-1.jsonl").exists()
    again = torch.load(start, weights_only=False)["model"]
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    start.rename(aside := start.with_name("aside")), (whole := trunk.read_text())
    trunk.write_text(re.sub(r'("step": 1, "val_loss": )5', r"\g<1>6", whole))     # as if of another GPU
    assert "not finished: 1 of" in experiments.main(["tiny", "rtn@1+nvidia", *more]) and not start.exists()
    assert f"step 1: not the losses of {trunk}, of another GPU" in capsys.readouterr().out
    aside.rename(start), trunk.write_text(whole)
    monkeypatch.setattr(experiments, "train", lambda *run: pytest.fail(f"trained again: {run}"))
    experiments.main(["tiny", "rtn@1+bf16,quartet2", *more])
    assert "all of these runs are there" in capsys.readouterr().out
    for word in "rtn+bf16", "rtn@0+bf16", "rtn@3+bf16":
        with pytest.raises(train_gpt.UserError, match="not ROW@STEP.* from 1 to 2"):
            experiments.main(["tiny", word, *more])

def test_a_run_goes_on_from_a_step_as_soon_as_that_is_there(results, monkeypatch):
    other, ended = threading.Event(), []
    def train(size, corpus, row, seed, gpu, jobs, knobs, keep):
        for step in keep: experiments.start_of(size, corpus, f"{row}@{step}", seed).touch()
        if keep: other.wait(10)
        ended.append(row)
        other.set()
    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    experiments.RUNS.mkdir()
    experiments.main(["tiny", "rtn@1+bf16", "--jobs=2"])
    assert ended == ["rtn@1+bf16", "rtn"]

def test_the_step_is_there_before_the_run_ends(tmp_path, monkeypatch, results):
    monkeypatch.setattr(train_gpt, "save", train_gpt.save)              # to be put back
    monkeypatch.chdir(tmp_path)
    tiny = [*experiments.SIZES["tiny"].split(), *SHORT, "--steps=9", "--save_every=1", "--name=run"]
    with pytest.raises(SystemExit):
        experiments.main(["train", "rtn", "--keep=1=1.pt", "--keep=2=2.pt", f"--end={os.devnull}", *tiny])
    assert [torch.load(f"{step}.pt", weights_only=False)["step"] for step in (1, 2)] == [1, 2]
    assert not (tmp_path / "runs/run/result.json").exists()

def test_sigterm_waits_for_the_running_ones_and_starts_no_others(results, monkeypatch):
    done = []
    monkeypatch.setattr(experiments, "train", lambda *run: time.sleep(1) or done.append(run[2:5:2]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")                   # of more: these alone
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    experiments.main(["tiny", "bf16,rtn,quartet2"])
    assert sorted(row for row, _ in done) == ["bf16", "rtn"] and sorted(gpu for _, gpu in done) == ["2", "3"]

def test_sigterm_to_this_process_alone_lets_the_running_ones_save(results, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = experiments.RUNS / "tiny-python-bf16-1/runs/run"
    def stop():                                         # after the first steps
        while not ((log := run / "log.jsonl").exists() and '"loss"' in log.read_text()): time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    said = experiments.main(["tiny", "bf16,rtn", *SHORT, "--steps=5000", "--eval_every=5000"])
    assert said.startswith("experiments.py: not finished: 2 of")
    assert "saved. To go on" in capsys.readouterr().out and not any(results.iterdir())
    assert 0 < torch.load(run / "checkpoint.pt", weights_only=True)["step"] < 5000

def test_a_run_that_fails_is_told_at_the_end_and_the_others_are_trained(results, monkeypatch, capsys):
    monkeypatch.setitem(experiments.KNOBS, "bad", ("bf16", "--lr=-1"))
    assert "not finished: 1 of" in experiments.main(["tiny", "bad,bf16", *SHORT])
    printed = capsys.readouterr().out
    assert "tiny-python-bad-1 has not finished:\nexperiments.py: --lr=-1.0: it must" in printed
    assert [path.name for path in results.iterdir()] == ["tiny-python-bf16-1.jsonl"]
    assert experiments.main(["tiny", "bf16", *SHORT]) is None

def test_the_interval_is_students():
    mean, half = figures.interval([1.0, 2.0, 3.0, 4.0])                  # deviation 1.291, t 3.182
    assert mean == 2.5 and abs(half - 3.182 * 1.29099 / 2) < 1e-4

def test_pictures_of_runs_quantizers_and_means(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    results.mkdir()
    for row, loss in ("bf16", 1.0), ("quartet2", 1.1):
        log = (dict(step=1, loss=loss), dict(step=1, val_loss=loss),
               dict(val_loss=loss, tokens_per_s=1e6, peak_gib=1.0, jobs=1))
        (results / f"10m-a-{row}-1.jsonl").write_text("\n".join(map(json.dumps, log)))
    means = (dict(gemm=gemm, method="sr", operand=operand, B=[1, 4], error=[0.1, 0.02])
             for gemm in ("dx", "dw") for operand in ("both", "dy"))
    (results / "bias-10m.jsonl").write_text("\n".join(map(json.dumps, means)))
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.loglog", lambda ax, *curve, **style: drawn.append(curve))
    figures.main()
    assert drawn == [([1, 4], pytest.approx([1.0, 0.8]))] * 2   # "both", dx and dw: B error(B) / error(1)
    names = {path.name for path in figures.FIGURES.iterdir()}
    assert names == {"rows-10m-a.svg", "gap-10m-a.svg", "speed-10m-a.svg", "nmse.svg", "bias-10m.svg"}

def test_what_is_unknown_is_an_error(results, capsys):
    with pytest.raises(train_gpt.UserError, match="'quartet3'.*did you mean 'quartet2'"):
        experiments.main(["tiny", "quartet3"])
    with pytest.raises(train_gpt.UserError, match="unknown size '10n': did you mean '10m'"):
        experiments.main(["10n", "bf16"])
    with pytest.raises(train_gpt.UserError, match="a SIZE and a GROUP"): experiments.main(["10m"])
    for words, message in (
            ("--jobs=0", "--jobs=0: take"), ("--jobs=x", "--jobs=x: take"), ("--seeds 1,2", "--seeds=: it"),
            ("--seeds=1,2,x", "--seeds=1,2,x: it takes.*as in --seeds=1,2,3"),
            ("--stops=9", "--stops.*did you mean 'steps'"), ("--steps", "--steps=: it takes .* type int")):
        with pytest.raises(train_gpt.UserError, match=message):
            experiments.main(["tiny", "bf16", *words.split()])
    assert experiments.main(["--help"]) is None and capsys.readouterr().out == experiments.__doc__ + "\n"
    with pytest.raises(SystemExit, match="nothing in .*experiments.py first"): figures.main()

def test_what_another_such_command_has_finished_meanwhile_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiments.subprocess, "Popen", lambda *a, **k: pytest.fail("trains"))
    experiments.log_of("tiny", "python", "rtn", 1).write_text("{}\n")
    experiments.train("tiny", "python", "rtn", 1, "", 1, {})

def test_what_makes_a_run_itself_is_no_knob(results):
    for knob in "--recipe=rtn", "--seed=7", "--name=x":
        with pytest.raises(train_gpt.UserError, match=f"{knob[:6]}.* is a run's own"):
            experiments.main(["tiny", "bf16", knob])
