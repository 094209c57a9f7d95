"""Tests of the README's section "Fork it": its diff applies, and its commands do what it says."""
import json
import re
import shlex
import shutil

from background import in_background, python
from small_runs import ROOT

pytest_plugins = ["background"]
README = (ROOT / "README.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.S)
SHORT = shlex.split("--layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2"
                    " --tokens_per_step=128 --eval_tokens=128 --sample_tokens=1 --compile=off")


def apply(diff, root):
    """Apply hunks "@@ FILE, ...", without line numbers, to files in root: each fits in exactly one place."""
    for file, hunk in re.findall(r"^@@ (\S+),.*\n((?:[-+ ].*\n|\n)+)", diff, re.M):
        lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
        old = "\n".join(text for mark, text in lines if mark != "+")
        new = "\n".join(text for mark, text in lines if mark != "-")
        source = (root / file).read_text()
        assert source.count(old) == 1, (file, old)
        (root / file).write_text(source.replace(old, new))


def copy_to(fork):
    """Copy the repo's text to a directory."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), ROOT / "README.md"]:
        copy = fork / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(path, copy)


@in_background
def commands_of_a_fork(directory):
    """What the README's two commands lead to in a copy of the repo with its diff, and in a wrong one."""
    fork = directory / "fork"
    copy_to(fork)
    apply(DIFFS[0], fork)

    # The second with a smaller model
    compare = re.search(r"`python (-m pytest -k \".*?\")`", README)[1]
    train = re.search(r"`python (train_gpt.py --recipe=.*?,mine)`", README)[1]

    # A fork of the fork where the kernel is wrong on some shapes: the test must see it.
    wrong = directory / "wrong"
    shutil.copytree(fork, wrong)
    line = '    elif QUANTIZER == "four"'
    apply(f"@@ kernels.py,\n-{line}:\n+{line} and ROWS > 1:\n", wrong)
    test = "test_quantizers_and_kernels_give_the_same_bits_on_every_device[ragged-four]"

    commands = [
        (fork, shlex.split(compare)),
        (fork, [*shlex.split(train), "cpu", "--steps=1", *SHORT]),
        (wrong, ["-m", "pytest", f"test_quartet.py::{test}"]),
    ]
    return [python(*command, cwd=place) for place, command in commands]


def test_the_new_quantizer_passes_its_test_in_both_files_and_trains(commands_of_a_fork):
    good, trained, bad = commands_of_a_fork
    assert good.returncode == 0 and " passed" in good.stdout, good.stdout + good.stderr
    assert trained.returncode == 0 and "\nmine " in trained.stdout, trained.stdout + trained.stderr
    assert bad.returncode == 1 and "1 failed" in bad.stdout, bad.stdout + bad.stderr


# A stand-in for the package: each call is a line of a file.
WANDB = """
import json
def note(name):
    def call(*arguments, **knobs):
        with open("calls.jsonl", "a") as f:
            f.write(json.dumps([name, *arguments, knobs]) + "\\n")
    return call
init, log, finish = map(note, ("init", "log", "finish"))
"""


@in_background
def calls_of_wandb(directory):
    """What a comparison, one of whose runs is resumed, gives to W&B: [[name, ...], ...]."""
    copy_to(directory)
    apply(DIFFS[1], directory)
    (directory / "wandb.py").write_text(WANDB)
    command = ["train_gpt.py", "cpu", "--steps=2", "--save_every=1", "--recipe=bf16,rtn", "--name=a", *SHORT]
    done = python(*command, cwd=directory)
    assert done.returncode == 0, done.stderr
    run = directory / "runs/a/rtn"
    (run / "result.json").unlink()
    (run / "previous.pt").replace(run / "checkpoint.pt")
    done = python("train_gpt.py", "resume", "a", cwd=directory)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (directory / "calls.jsonl").read_text().splitlines()]


def test_curves_go_to_wandb(calls_of_wandb):
    runs = [knobs for name, *_, knobs in calls_of_wandb if name == "init"]
    assert [knobs["id"] for knobs in runs] == ["runs-a-bf16", "runs-a-rtn", "runs-a-rtn"]
    assert all(knobs["resume"] == "allow" and knobs["config"]["steps"] == 2 for knobs in runs)
    logged = [(record.keys() & {"loss", "val_loss"}, knobs["step"]) for name, record, knobs in
              (call for call in calls_of_wandb if call[0] == "log")]
    each = [({"loss"}, 1), ({"loss"}, 2), ({"val_loss"}, 2)]
    assert logged == each + each + each[1:]
    assert [name for name, *_ in calls_of_wandb].count("finish") == 3
