"""Tests of experiments.py: runs are kept and not repeated; figures.py pairs them by seeds."""
import contextlib
import json
import multiprocessing.connection
import os
import re
import runpy
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import experiments
import figures
import quartet
import small_runs
import train_gpt
from train_gpt import UserError

SHORT = ["--corpus=python", "--steps=2", "--eval_tokens=128", "--eval_every=1", "--sample_tokens=1"]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Directories of their own for logs, runs and pictures; what main() changes is put back."""
    for module in experiments, figures:
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiments, "CHILDREN", [])      # no signal to those of another test
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures")
    for name in "QUANTIZERS", "RECIPES":
        monkeypatch.setattr(quartet, name, dict(getattr(quartet, name)))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path / "results"
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


# ---- Runs in processes that are forked, as each Python that imports torch takes seconds --------------------

SERVER = multiprocessing.get_context("forkserver")

# Process.start() looks which other processes have ended. If it did so while another thread waits for one of
# them, only one of the two would get the exit status, and the other 255.
STATUS = threading.Lock()


@pytest.fixture(scope="module")
def server():
    """A process that has imported all that a run needs, to fork runs from."""
    SERVER.set_forkserver_preload(["test_experiments", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))      # where it finds them
        patch.setenv("OMP_NUM_THREADS", "1")
        SERVER.Process().start()


def be_a_run(arguments, cwd, output):
    """What a forked process does: it is `python experiments.py train ...`, and prints to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(cwd)
    sys.argv = arguments
    runpy.run_path(experiments.__file__, run_name="__main__")


class Forked:
    """What experiments.py needs of subprocess.Popen."""

    def __init__(self, command, cwd, env, stdout, stderr, text):
        python, *arguments = command
        assert python == sys.executable
        assert arguments[:2] == [experiments.__file__, "train"]
        self.output = cwd / "output"
        self.process = SERVER.Process(target=be_a_run, args=(arguments, cwd, self.output))
        with STATUS:
            self.process.start()

    def communicate(self):
        multiprocessing.connection.wait([self.process.sentinel])
        with STATUS:
            self.process.join()
        self.returncode = self.process.exitcode
        return self.output.read_text(), None

    def send_signal(self, signum):
        with contextlib.suppress(ProcessLookupError):      # it has ended
            os.kill(self.process.pid, signum)


def replace_popen(patch, popen):
    """Only in experiments.py: other threads of this process start commands, too."""
    patch.setattr(experiments, "subprocess", SimpleNamespace(PIPE=None, STDOUT=None, Popen=popen))


@pytest.fixture
def forked(server, monkeypatch):
    replace_popen(monkeypatch, Forked)


# ---- The tests ---------------------------------------------------------------------------------------------

def read(log):
    """The records in a log."""
    return [json.loads(line) for line in open(log)]


def fails_if_it_trains(*run):
    pytest.fail(f"trained: {run}")


def test_a_run_that_ends_in_two_terms_tells_what_one_term_would_lose(results, forked):
    experiments.main(["tiny", "quintet,quintet_two_end", *SHORT, "--steps=10"])
    one, two = [read(results / f"tiny-python-{row}-1.jsonl") for row in ("quintet", "quintet_two_end")]
    assert "val_loss_in_one_term" not in one[-1]
    assert two[0]["recipe"] == "quintet; from step 10 on quintet+two_terms"
    losses = {two[-1][name] for name in ("val_loss", "val_loss_in_one_term", "val_loss_in_bf16")}
    assert len(losses) == 3
    assert max(losses) - min(losses) < 0.1


def test_runs_are_kept_not_repeated_and_paired_by_seed(results, forked, monkeypatch, capsys):
    experiments.main(["tiny", "bf16,fwd_rtn", "--jobs=2", *SHORT])
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    assert len(before) == 2

    # The same for one seed more: what is missing is trained.
    experiments.main(["tiny", "bf16,fwd_rtn", "--jobs=2", "--seeds=1,2", *SHORT])
    names = sorted(path.name for path in results.iterdir())
    assert names == [f"tiny-python-{row}-{seed}.jsonl" for row in ("bf16", "fwd_rtn") for seed in (1, 2)]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    # Each run is another, and a difference is between runs of one seed.
    rows = figures.read()["tiny", "python", ""]
    loss = {}
    for row, runs in rows.items():
        loss[row] = {seed: run.result["val_loss"] for seed, run in runs.items()}
        assert all(run.result["jobs"] == 2 for run in runs.values())
        # By a forward pass in bf16, which is bf16's own.
        in_bf16 = {seed: figures.in_bf16(run) for seed, run in runs.items()}
        assert (in_bf16 == loss[row]) == (row == "bf16")
        assert all(abs(in_bf16[seed] - loss[row][seed]) < 0.1 for seed in in_bf16)
    assert loss["bf16"][1] != loss["bf16"][2]
    assert loss["bf16"][1] != loss["fwd_rtn"][1]
    expected = [1e3 * (loss["fwd_rtn"][seed] - loss["bf16"][seed]) for seed in (1, 2)]
    assert figures.paired(rows, "fwd_rtn", "bf16") == expected

    # The table
    monkeypatch.setattr(figures, "draw", lambda runs: None)
    capsys.readouterr()
    figures.main()
    printed = capsys.readouterr().out
    assert f"{sum(expected) / 2:9.2f} +-" in printed
    assert "ktok/s" in printed
    assert not figures.fastest(rows["bf16"])            # of runs that shared a GPU no speed is told
    with pytest.raises(SystemExit, match="no row 'bf15': bf16, fwd_rtn"):
        figures.main(["--base=bf15"])


def test_a_stopped_run_goes_on_in_a_new_python(results, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    place = experiments.RUNS / "tiny-python-bf16-1"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    train_gpt.main([*experiments.SIZES["tiny"].split(), *SHORT, "--name=run", "--recipe=bf16"])
    (place / "runs/run/result.json").unlink()

    # Not with other knobs
    with pytest.raises(UserError, match="run/checkpoint.pt has --steps=2, not 3"):
        experiments.main(["tiny", "bf16", *SHORT, "--steps=3"])
    with pytest.raises(UserError, match="run/checkpoint.pt has --steps=2, not 20"):
        experiments.main(["tiny", "bf16", "--corpus=python"])

    experiments.main(["tiny", "bf16", *SHORT])
    log = read(results / "tiny-python-bf16-1.jsonl")
    assert [r["start"] for r in log if "start" in r] == [0, 2]
    assert log[-1]["recipe"] == "bf16"
    assert not place.exists()
    assert "tiny-python-bf16-1: {" in capsys.readouterr().out


def test_a_log_or_start_of_other_knobs_is_an_error_before_anything_is_trained(results, monkeypatch):
    monkeypatch.setattr(experiments, "train", fails_if_it_trains)
    results.mkdir()
    experiments.RUNS.mkdir()

    # A log
    log = results / "tiny-a-rtn-1.jsonl"
    log.write_text(json.dumps(dict(config=dict(steps=20, lr=1e-3, eval_every=7))) + "\n{}\n")
    experiments.main(["tiny", "rtn", "--corpus=a", "--lr=1e-3", "--save_every=3"])
    for knob, message in (
        ("--steps=9", "--steps=20, not 9: move it away, or take 20"),
        ("--eval_every=8", "--eval_every=7, not 8: move"),
    ):
        with pytest.raises(UserError, match=f"tiny-a-rtn-1.jsonl has {message}"):
            experiments.main(["tiny", "rtn@1+bf16", "--corpus=a", knob])

    # One that does not tell its knobs is taken as it is.
    log.write_text("{}\n")
    experiments.main(["tiny", "rtn", "--corpus=a", "--steps=9"])

    # A checkpoint to start from
    _, _, knobs = train_gpt.parse([*experiments.SIZES["tiny"].split(), "--steps=9"])
    small_runs.write_checkpoint(experiments.RUNS / "tiny-a-rtn-from-1-1.pt", train_gpt.Config(**knobs))
    with pytest.raises(UserError, match="tiny-a-rtn-from-1-1.pt has --steps=9, not 8: move"):
        experiments.main(["tiny", "rtn@1+bf16", "--corpus=a", "--steps=8"])


def test_rows_go_on_from_a_step_of_another(results, forked, monkeypatch, capsys):
    knobs = [*SHORT, "--steps=3", "--jobs=2"]

    # rtn is trained first, and its steps 1 and 2 are kept.
    experiments.main(["tiny", "rtn@1+rtn,bf16", "rtn@2+bf16", *knobs])
    names = sorted(path.name for path in results.iterdir())
    assert names == [f"tiny-python-{row}-1.jsonl" for row in ("rtn", "rtn-from-1-bf16", "rtn-from-2-bf16")]
    log = read(results / "tiny-python-rtn-from-1-bf16-1.jsonl")
    assert log[0]["start"] == 1
    assert log[-1]["recipe"] == "bf16"

    # A table has the steps after the start, also of the row that it is of.
    rows = figures.read()["tiny", "python", "rtn-from-1"]
    assert {row: list(runs[1].validated) for row, runs in rows.items()} == {"bf16": [2, 3], "rtn": [2, 3]}

    # Without the checkpoint, rtn is trained again, up to there, to the same weights.
    trunk = results / "tiny-python-rtn-1.jsonl"
    start = experiments.start_of("tiny", "python", "rtn@1", 1)
    before = trunk.stat().st_mtime_ns
    expected = torch.load(start, weights_only=False)["model"]
    start.unlink()
    experiments.main(["tiny", "rtn@1+rtn,quartet2", *knobs])
    assert trunk.stat().st_mtime_ns == before
    assert (results / "tiny-python-rtn-from-1-quartet2-1.jsonl").exists()
    again = torch.load(start, weights_only=False)["model"]
    assert all(torch.equal(again[name], expected[name]) for name in expected)

    # If the losses are others, as on another GPU, nothing goes on from there.
    aside = start.with_name("aside")
    start.rename(aside)
    whole = trunk.read_text()
    trunk.write_text(re.sub(r'("step": 1, "val_loss": )5', r"\g<1>6", whole))
    assert "not finished: 1 of" in experiments.main(["tiny", "rtn@1+nvidia", *knobs])
    assert not start.exists()
    assert f"step 1: not the losses of {trunk}, of another GPU" in capsys.readouterr().out

    # With it, what is there is not trained again.
    aside.rename(start)
    trunk.write_text(whole)
    monkeypatch.setattr(experiments, "train", fails_if_it_trains)
    experiments.main(["tiny", "rtn@1+bf16,quartet2", *knobs])
    assert "all of these runs are there" in capsys.readouterr().out
    for word in "rtn+bf16", "rtn@0+bf16", "rtn@3+bf16":
        with pytest.raises(UserError, match="not ROW@STEP.* from 1 to 2"):
            experiments.main(["tiny", word, *knobs])


def test_a_run_goes_on_from_a_step_as_soon_as_that_is_there(results, monkeypatch):
    other_has_ended = threading.Event()
    ended = []

    def train(size, corpus, row, seed, gpu, jobs, knobs, keep):
        for step in keep:
            experiments.start_of(size, corpus, f"{row}@{step}", seed).touch()
        if keep:
            other_has_ended.wait(300)
        ended.append(row)
        other_has_ended.set()

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


def test_a_nudged_run_starts_with_another_embedding_and_loss_and_no_other_row_does(monkeypatch, results):
    c = train_gpt.Config(layers=2, width=128, heads=1, hidden=128, vocab_size=256, recipe="quartet2")
    model = train_gpt.GPT(c)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    text = torch.tensor([[*b"a b c d "]])

    def loss():
        with torch.no_grad():
            return model(text[:, :-1], text[:, 1:]).item()

    def changed(row, checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "save", None)
            patch.setattr(train_gpt, "build", lambda *_: (model, None, []))
            patch.setattr(train_gpt, "main", lambda _: train_gpt.build(None, None, checkpoint))
            experiments.main(["train", row])
        return sum((t != start[name]).sum().item() for name, t in model.state_dict().items())

    before = loss()
    assert changed("quartet2", {}) == 0
    assert loss() == before
    assert changed("quartet2_nudged", {"log": {"text": '{"step": 1'}}) == 0      # it goes on
    assert changed("quartet2_nudged", {"log": {"text": ""}}) == 128              # a branch begins
    assert loss() != before
    nudged = model.embedding.weight.clone()
    changed("quartet2_nudged", {})
    assert (model.embedding.weight != nudged).sum() == 128


def test_the_ramp_of_cage_ends_as_ours_with_the_same_integral(monkeypatch):
    shares = [(i + 0.5) / 1000 for i in range(1000)]
    ours = train_gpt.ramp
    monkeypatch.setattr(train_gpt, "ramp", ours)      # to be put back
    experiments.CHANGES["quartet2_cage"]()
    cage = train_gpt.ramp
    assert cage(1.0) == ours(1.0) == 1.0 and cage(0.5) == 0.0
    # Both are 1/5, but for the rule of midpoints.
    assert abs(sum(map(cage, shares)) - sum(map(ours, shares))) < 0.01


def test_sigterm_waits_for_the_running_ones_and_starts_no_others(results, monkeypatch):
    both_train = threading.Barrier(2)
    told = threading.Event()
    done = []

    def train(size, corpus, row, seed, gpu, *rest):
        # When two train, one sends the signal. Both go on until what handles it has come to their processes.
        if not told.is_set() and not both_train.wait(300):
            os.kill(os.getpid(), signal.SIGTERM)
        told.wait(300)
        done.append((row, gpu))

    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setattr(experiments, "CHILDREN", [SimpleNamespace(send_signal=lambda signum: told.set())])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")                   # of more: these alone
    experiments.main(["tiny", "bf16,rtn,quartet2"])
    assert sorted(row for row, _ in done) == ["bf16", "rtn"]
    assert sorted(gpu for _, gpu in done) == ["2", "3"]


def test_a_run_that_is_being_started_when_a_signal_comes_is_stopped_too(results, monkeypatch):
    handled = threading.Event()
    signals = []

    class Starting:
        def __init__(self, *_, **__):
            os.kill(os.getpid(), signal.SIGTERM)
            handled.wait(300)

        def send_signal(self, signum):
            signals.append(signum)

        def communicate(self):
            self.returncode = -signal.SIGTERM
            return "", None

    replace_popen(monkeypatch, Starting)
    monkeypatch.setattr(experiments, "CHILDREN", [SimpleNamespace(send_signal=lambda signum: handled.set())])
    assert experiments.main(["tiny", "bf16", *SHORT]).startswith("experiments.py: not finished: 1 of")
    assert signals == [signal.SIGTERM]


def test_sigterm_to_this_process_alone_lets_the_running_ones_save(results, forked, capsys):
    run = experiments.RUNS / "tiny-python-bf16-1/runs/run"
    log = run / "log.jsonl"

    def stop_after_the_first_steps():
        while not log.exists() or '"loss"' not in log.read_text():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_the_first_steps, daemon=True).start()
    said = experiments.main(["tiny", "bf16,rtn", *SHORT, "--steps=5000", "--eval_every=5000"])
    assert said.startswith("experiments.py: not finished: 2 of")
    assert "saved. To go on" in capsys.readouterr().out
    assert not any(results.iterdir())
    assert 0 < torch.load(run / "checkpoint.pt", weights_only=True)["step"] < 5000


def test_a_run_that_fails_is_told_at_the_end_and_the_others_are_trained(results, forked, monkeypatch, capsys):
    monkeypatch.setitem(experiments.KNOBS, "bad", ("bf16", "--lr=-1"))
    assert "not finished: 1 of" in experiments.main(["tiny", "bad,bf16", *SHORT])
    printed = capsys.readouterr().out
    assert "tiny-python-bad-1 has not finished:\nexperiments.py: --lr=-1.0: it must" in printed
    assert [path.name for path in results.iterdir()] == ["tiny-python-bf16-1.jsonl"]
    assert experiments.main(["tiny", "bf16", *SHORT]) is None


def test_what_is_unknown_is_an_error(results, capsys):
    for words, message in (
        ("tiny quartet3", "'quartet3': there are .*quartet2"),
        ("10n bf16", "unknown size '10n': there are 10m"),
        ("10m", "required: GROUP: see --help"),
        ("", "required: SIZE, GROUP: see --help"),
        ("tiny bf16 --jobs=0", "--jobs=0: take"),
        ("tiny bf16 --jobs=x", "--jobs=x: take"),
        ("tiny bf16 --seeds=", "--seeds=: it"),
        ("tiny bf16 --seeds=1,2,x", "--seeds=1,2,x: it takes.*as in --seeds=1,2,3"),
        ("tiny bf16 --corpus=a-b", "--corpus=a-b: a name without -"),
        ("tiny bf16 --stops=9", "--stops: there are .*steps"),
        ("tiny bf16 --steps=", "--steps=: it takes .* type int"),
        ("tiny bf16 --steps", "--steps: write --steps=VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            experiments.main(words.split())

    with pytest.raises(SystemExit, match="^0$"):
        experiments.main(["--help"])
    assert experiments.__doc__ in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing in .*experiments.py first"):
        figures.main()


def test_words_and_knobs_stand_in_any_order(results, monkeypatch):
    monkeypatch.setattr(experiments, "queue", lambda *what: what)
    expected = "tiny", ["bf16", "rtn", "quartet2"], [1, 2], "a", dict(steps=9, prompt="x y"), 3
    said = ["tiny", "bf16,rtn", "--steps=9", "--corpus=a", "quartet2", "--prompt=x y", "--jobs=3"]
    assert experiments.main([*said, "--seeds=1,2"]) == expected
    assert experiments.main(["--seeds", "1,2", *said]) == expected


def test_what_another_such_command_has_finished_meanwhile_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    replace_popen(monkeypatch, fails_if_it_trains)
    experiments.log_of("tiny", "python", "rtn", 1).write_text("{}\n")
    experiments.train("tiny", "python", "rtn", 1, "", 1, {})


def test_what_makes_a_run_itself_is_no_knob(results):
    for name, value in ("recipe", "rtn"), ("seed", 7), ("name", "x"):
        with pytest.raises(UserError, match=f"--{name} is a run's own"):
            experiments.main(["tiny", "bf16", f"--{name}={value}"])
