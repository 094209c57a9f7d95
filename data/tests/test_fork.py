"""Tests of the README's section "Fork it": its diff applies, and its commands do what it says."""
import os, re, shlex, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

def apply(diff, root):
    """Apply hunks "@@ FILE, ...", without line numbers, to files in root: each fits in exactly one place."""
    for file, hunk in re.findall(r"^@@ (\S+),.*\n((?:[-+ ].*\n|\n)+)", diff, re.M):
        lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
        old, new = ("\n".join(text for mark, text in lines if mark != skip) for skip in "+-")
        source = (root / file).read_text()
        assert source.count(old) == 1, (file, old)
        (root / file).write_text(source.replace(old, new))

@pytest.fixture
def fork(tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), ROOT / "README.md"):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    apply(re.search(r"```diff\n(.*?)```", README, re.S)[1], tmp_path)
    return tmp_path

def test_the_new_quantizer_passes_its_test_in_both_files_and_trains(fork):
    command = re.search(r"`python (-m pytest -k \".*?\")`", README)[1]
    train = re.search(r"`python (train_gpt.py --recipe=.*?,mine)`", README)[1]
    short = (" cpu --layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --steps=1"
             " --tokens_per_step=128 --eval_tokens=128 --sample_tokens=1 --compile=off")
    wrong = fork.parent / "wrong"
    shutil.copytree(fork, wrong)
    line = '    elif QUANTIZER == "four"'
    apply(f"@@ kernels.py,\n-{line}:\n+{line} and ROWS > 1:\n", wrong)
    def run(place, words):
        return subprocess.run([sys.executable, *shlex.split(words)], cwd=place, capture_output=True,
                              text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    test = "test_quantizers_and_kernels_give_the_same_bits_on_every_device[ragged-four]"
    one = f"-m pytest test_quartet.py::{test}"
    with ThreadPoolExecutor(2) as pool:
        good, trained, bad = pool.map(run, (fork, fork, wrong), (command, train + short, one))
    assert good.returncode == 0 and " passed" in good.stdout, good.stdout + good.stderr
    assert trained.returncode == 0 and "\nmine " in trained.stdout, trained.stdout + trained.stderr
    assert bad.returncode == 1 and "1 failed" in bad.stdout, bad.stdout + bad.stderr
