"""What the tests share: where modules are, and a place to train in."""
import signal, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "data/evidence"), str(ROOT / "data/tests")]
import numpy as np
import pytest
import torch
import prepare, train_gpt

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory of its own, with a small corpus, to train in; signal handlers stay as they were."""
    tokens = np.frombuffer(b"the quick brown fox jumps over the lazy dog\n" * 40, np.uint8)
    for split in ("train", "val"): prepare.write_shard(tmp_path / f"tiny_{split}_000000.bin", tokens)
    monkeypatch.setattr(train_gpt, "DATA", tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for s, handler in handlers.items(): signal.signal(s, handler)
    torch.use_deterministic_algorithms(False)               # train_gpt.py sets it on a GPU
