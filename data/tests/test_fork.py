"""Tests of the README's section "Fork it": its diff applies, and its commands do what it says."""
import json
import re
import shlex
import shutil

from background import in_background, python
from small_runs import ROOT, WRITING

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


# A stand-in for the package wandb: each call is a line of a file.
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
def fork_of_the_repo(directory):
    """A copy of the repo with the README's diffs -> directory, what commands there have led to.

    The commands: the README's two; a test of a kernel that is wrong; and to resume a run of the comparison.
    """
    fork = directory / "fork"
    with WRITING:
        for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), ROOT / "README.md"]:
            copy = fork / path.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(path, copy)
        (fork / "wandb.py").write_text(WANDB)
        for diff in DIFFS:
            apply(diff, fork)

        # A fork of the fork where the kernel is wrong on some shapes: the test must see it.
        wrong = directory / "wrong"
        shutil.copytree(fork, wrong)
        line = '    elif QUANTIZER == "four"'
        apply(f"@@ kernels.py,\n-{line}:\n+{line} and ROWS > 1:\n", wrong)
    test = "test_quantizers_and_kernels_give_the_same_bits_on_every_device[ragged-four]"

    # The README's commands, the second with a smaller model
    compare = re.search(r"`python (-m pytest -k \".*?\")`", README)[1]
    train = re.search(r"`python (train_gpt.py --recipe=.*?,mine)`", README)[1]
    train = [*shlex.split(train), "cpu", "--name=a", "--steps=2", "--save_every=1", *SHORT]
    good = python(*shlex.split(compare), cwd=fork)
    trained = python(*train, cwd=fork)
    bad = python("-m", "pytest", f"test_quartet.py::{test}", cwd=wrong)

    # The last run goes on from its first step.
    run = fork / "runs/a/mine"
    with WRITING:
        (run / "result.json").unlink()
        (run / "previous.pt").replace(run / "checkpoint.pt")
    resumed = python("train_gpt.py", "resume", "a", cwd=fork)
    return fork, good, trained, bad, resumed


def test_the_new_quantizer_passes_its_test_in_both_files_and_trains(fork_of_the_repo):
    _, good, trained, bad, _ = fork_of_the_repo
    assert good.returncode == 0 and " passed" in good.stdout, good.stdout + good.stderr
    assert trained.returncode == 0 and "\nmine " in trained.stdout, trained.stdout + trained.stderr
    assert bad.returncode == 1 and "1 failed" in bad.stdout, bad.stdout + bad.stderr


def test_curves_go_to_wandb_also_of_comparisons_and_resumed_runs(fork_of_the_repo):
    fork, *_, resumed = fork_of_the_repo
    assert resumed.returncode == 0, resumed.stderr
    calls = [json.loads(line) for line in (fork / "calls.jsonl").read_text().splitlines()]
    runs = [knobs for name, *_, knobs in calls if name == "init"]
    assert [run["id"] for run in runs] == ["runs-a-bf16", "runs-a-quartet2", "runs-a-mine", "runs-a-mine"]
    assert all(run["resume"] == "allow" and run["config"]["steps"] == 2 for run in runs)
    logged = [(record.keys() & {"loss", "val_loss"}, knobs["step"])
              for name, record, knobs in (call for call in calls if call[0] == "log")]
    each = [({"loss"}, 1), ({"loss"}, 2), ({"val_loss"}, 2)]
    assert logged == 3 * each + each[1:]
    assert [name for name, *_ in calls].count("finish") == 4
