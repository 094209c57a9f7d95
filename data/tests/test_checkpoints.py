"""A run that is killed again and again ends with the same bits. KILLS=30: so many times instead of 3."""
import os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
import prepare, train_gpt

KNOBS = dict(layers=1, width=128, heads=2, hidden=128, sequence=32, batch=2, tokens_per_step=64, steps=30,
             eval_every=10, eval_tokens=64, save_every=2, sample_tokens=1, lr=3e-3, corpus="tiny",
             device="cpu")

def start(name):
    """Begin a run, or go on, in a process of its own -> its number. A fork: the imports are done."""
    if pid := os.fork(): return pid
    run, status = Path("runs", name), 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if any((run / checkpoint).exists() for checkpoint in train_gpt.CHECKPOINTS):
            train_gpt.main(["resume", name])
        else:
            shutil.rmtree(run, ignore_errors=True)
            train_gpt.main(["cpu", f"--name={name}", *(f"--{knob}={value}" for knob, value in KNOBS.items())])
        status = 0
    finally: os._exit(status)

def main():
    """Train straight, and killed KILLS times; exit status 0 if both end with the same bits."""
    train_gpt.DATA = Path.cwd()
    tokens = np.frombuffer(b"the quick brown fox jumps over the lazy dog\n" * 40, np.uint8)
    for split in "train", "val": prepare.write_shard(Path(f"tiny_{split}_000000.bin"), tokens)
    before = time.perf_counter()
    assert os.waitpid(start("straight"), 0)[1] == 0
    duration, moments, killed = time.perf_counter() - before, random.Random(1), 0
    while killed < int(os.environ.get("KILLS", 3)):
        pid = start("killed")
        time.sleep(moments.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] == signal.SIGKILL: killed += 1
        else: shutil.rmtree("runs/killed")                               # it had ended: begin again
        print(killed, sorted(p.name for p in Path("runs").glob("killed/*")))
    assert os.waitpid(start("killed"), 0)[1] == 0
    a, b = (tree_leaves(torch.load(f"runs/{name}/checkpoint.pt", weights_only=True))
            for name in ("straight", "killed"))
    same = [torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b)]
    assert len(a) == len(b) and same.count(False) == 1                   # the name
    losses = [[line for line in open(f"runs/{name}/log.jsonl") if '"loss"' in line]
              for name in ("straight", "killed")]
    assert len(losses[0]) == len(losses[1]) == 30

@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_kills_at_random_moments_change_nothing(tmp_path):
    environment = os.environ | dict(OMP_NUM_THREADS="1")                 # a fork has no threads but its own
    done = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout

if __name__ == "__main__": main()
