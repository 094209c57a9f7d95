"""Tests of the README's section "Fork it": its diff applies, and its commands do what it says."""
import re
import shlex
import shutil

from background import in_background, python
from small_runs import ROOT

pytest_plugins = ["background"]
README = (ROOT / "README.md").read_text()


def apply(diff, root):
    """Apply hunks "@@ FILE, ...", without line numbers, to files in root: each fits in exactly one place."""
    for file, hunk in re.findall(r"^@@ (\S+),.*\n((?:[-+ ].*\n|\n)+)", diff, re.M):
        lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
        old = "\n".join(text for mark, text in lines if mark != "+")
        new = "\n".join(text for mark, text in lines if mark != "-")
        source = (root / file).read_text()
        assert source.count(old) == 1, (file, old)
        (root / file).write_text(source.replace(old, new))


@in_background
def commands_of_a_fork(directory):
    """What the README's two commands lead to in a copy of the repo with its diff, and in a wrong one."""
    fork = directory / "fork"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), ROOT / "README.md"]:
        copy = fork / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(path, copy)
    apply(re.search(r"```diff\n(.*?)```", README, re.S)[1], fork)

    # The second with a smaller model
    compare = re.search(r"`python (-m pytest -k \".*?\")`", README)[1]
    train = re.search(r"`python (train_gpt.py --recipe=.*?,mine)`", README)[1]
    short = (" cpu --layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --steps=1"
             " --tokens_per_step=128 --eval_tokens=128 --sample_tokens=1 --compile=off")

    # A fork of the fork where the kernel is wrong on some shapes: the test must see it.
    wrong = directory / "wrong"
    shutil.copytree(fork, wrong)
    line = '    elif QUANTIZER == "four"'
    apply(f"@@ kernels.py,\n-{line}:\n+{line} and ROWS > 1:\n", wrong)
    test = "test_quantizers_and_kernels_give_the_same_bits_on_every_device[ragged-four]"

    commands = [(fork, compare), (fork, train + short), (wrong, f"-m pytest test_quartet.py::{test}")]
    return [python(*shlex.split(command), cwd=place) for place, command in commands]


def test_the_new_quantizer_passes_its_test_in_both_files_and_trains(commands_of_a_fork):
    good, trained, bad = commands_of_a_fork
    assert good.returncode == 0 and " passed" in good.stdout, good.stdout + good.stderr
    assert trained.returncode == 0 and "\nmine " in trained.stdout, trained.stdout + trained.stderr
    assert bad.returncode == 1 and "1 failed" in bad.stdout, bad.stdout + bad.stderr
