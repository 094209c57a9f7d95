"""What tests wait for and other processes compute: it starts with the session, and uses a second core.

A test module that has such work names this one in `pytest_plugins`, and imports it before pytest does so:
PYTEST_DONT_REWRITE says that this is meant.
"""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# As it was before any test set something: a newcomer's.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"

DATA = Path(__file__).resolve().parents[1]
# How a command begins. Tests lower the largest size of a file for a moment: what is started then is not to
# inherit that. And a core that is wanted by this process is left to it.
START = ["sh", "-c", 'ulimit -S -f unlimited; exec "$@"', "sh"]
if shutil.which("nice"):
    START.append("nice")

WORK = {}      # functions of a directory, by name

# Runs scripts, one after another, each in a fork: so the large imports, which take seconds, are done once.
IN_FORKS = """
import json, os, runpy, sys
import torch, torch._dynamo, torch.distributed.checkpoint.state_dict, triton
for number, command in enumerate(json.loads(sys.argv[1])):
    if not os.fork():
        sys.argv = command
        sys.path[0] = os.path.dirname(command[0])
        os.dup2(os.open(f"{number}.out", os.O_WRONLY | os.O_CREAT), 1)
        runpy.run_path(command[0], run_name="__main__")
        sys.exit()
    if os.wait()[1]:
        sys.exit(f"failed: {command}")
"""


def in_background(work):
    """Decorate a function of a directory: a fixture, its result. Four are worked on at a time."""
    assert work.__name__ not in WORK
    WORK[work.__name__] = work

    @pytest.fixture(scope="session", name=work.__name__)
    def result(background):
        return background[work.__name__].result()

    return result


def python(*arguments, cwd, **variables):
    """Run Python with these arguments in a directory -> subprocess.CompletedProcess, with texts."""
    return subprocess.run([*START, sys.executable, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT | variables,
                          text=True, capture_output=True)


def start(*arguments, cwd, output):
    """Start Python with these arguments in a directory -> subprocess.Popen. What it says goes to a file."""
    with open(output, "w") as f:
        return subprocess.Popen([*START, sys.executable, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT,
                                stdout=f, stderr=subprocess.STDOUT)


def scripts(commands, directory):
    """Run scripts, [[path, word, ...], ...], in a directory -> what each prints. All must succeed."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = python("-c", IN_FORKS, words, cwd=directory)
    assert done.returncode == 0, done.stderr
    printed = [(directory / f"{number}.out").read_text() for number in range(len(commands))]
    assert all(printed)
    return printed


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """A Future of each work that a test of this session waits for, by name."""
    # The corpus is made before any of them, so that no two make it at once.
    if not any(DATA.glob("python_val_*.bin")):
        assert python(DATA / "prepare.py", "python", cwd=DATA).returncode == 0
    awaited = {name for item in request.session.items for name in item.fixturenames}
    pool = ThreadPoolExecutor(4)
    yield {name: pool.submit(work, tmp_path_factory.mktemp(name))
           for name, work in WORK.items() if name in awaited}
    pool.shutdown(cancel_futures=True)


def pytest_collection_modifyitems(items):
    """Tests that wait come last."""
    items.sort(key=lambda item: not WORK.keys().isdisjoint(item.fixturenames))
