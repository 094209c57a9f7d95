"""A run that is killed again and again ends with the same bits. KILLS=30: so many times instead of 3."""
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from background import in_background, python
from small_runs import checkpoint, records, words, write_corpus
import train_gpt

pytest_plugins = ["background"]
KILLS = int(os.environ.get("KILLS", 3))
KNOBS = dict(steps=20, eval_every=10, save_every=1, sample_tokens=1)


def start(name):
    """Begin a run, or go on, in a process of its own -> its number. A fork: the imports are done."""
    child = os.fork()
    if child:
        return child

    # Here is the child. It must not return.
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run = Path("runs", name)
        if any((run / file).exists() for file in train_gpt.CHECKPOINTS):
            train_gpt.main(["resume", name])
        else:
            shutil.rmtree(run, ignore_errors=True)
            train_gpt.main(words(name=name, **KNOBS))
        status = 0
    finally:
        os._exit(status)


def end_of(child):
    """Wait for a process -> its status: 0, or the signal that has ended it."""
    return os.waitpid(child, 0)[1]


def main():
    """Train straight, and killed KILLS times; exit status 0 if both end with the same bits."""
    # To make an optimizer imports this, which takes seconds. Imported here, it is there in each fork.
    import torch._dynamo
    train_gpt.DATA = Path.cwd()
    write_corpus(Path.cwd())

    # How long is a run?
    before = time.perf_counter()
    assert end_of(start("straight")) == 0
    duration = time.perf_counter() - before

    # Kill another, again and again.
    moments = random.Random(1)
    killed = 0
    while killed < KILLS:
        child = start("killed")
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if end_of(child) == signal.SIGKILL:
            killed += 1
        else:
            shutil.rmtree("runs/killed")      # it had ended: begin again
        print(killed, sorted(path.name for path in Path("runs").glob("killed/*")))
    assert end_of(start("killed")) == 0

    # All that is in a checkpoint must be the same, weights, moments, generators, but for two leaves: the name
    # and the text of the log, which has times.
    straight = tree_leaves(checkpoint("straight"))
    resumed = tree_leaves(checkpoint("killed"))
    same = [torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(straight, resumed)]
    assert len(straight) == len(resumed)
    assert same.count(False) == 2

    # So are the logs: each step is there once.
    for key, count in [("loss", KNOBS["steps"]), ("val_loss", KNOBS["steps"] // KNOBS["eval_every"])]:
        values = [record[key] for record in records("killed") if key in record]
        assert values == [record[key] for record in records("straight") if key in record]
        assert len(values) == count


@in_background
def killed_again_and_again(directory):
    # In a process of one thread: a fork has no threads but its own.
    return python(__file__, cwd=directory)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_kills_at_random_moments_change_nothing(killed_again_and_again):
    done = killed_again_and_again
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main()
