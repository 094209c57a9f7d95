"""Small runs for the tests of train_gpt.py: how they are started, and how what they leave behind is read."""
import contextlib
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

# What is tested stands in three folders, and is imported by its bare name.
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "data/evidence"), str(TESTS)]

import prepare
import quartet
import train_gpt

# Held by work in the background (background.py) that writes files in this process, and by a test that makes
# writing fail, or counts it, for a moment: that is so in all threads.
WRITING = threading.Lock()

# Knobs of a run that takes a fraction of a second.
SMALL = dict(layers=1, width=128, heads=2, hidden=128, sequence=32, batch=2, tokens_per_step=64, steps=4,
             lr=3e-3, eval_tokens=64, sample_tokens=2, corpus="tiny", device="cpu", name="a")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads make no small model faster, and where another program runs they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(**knobs):
    """The command line of a small run, but for these knobs."""
    return ["cpu", *(f"--{knob}={value}" for knob, value in (SMALL | knobs).items())]


def train(**knobs):
    """Train a small run, but for these knobs, in runs/a or under another name."""
    train_gpt.main(words(**knobs))


def write_corpus(directory):
    """Make the corpus `tiny` in a directory: 1760 bytes of English, to train on and to validate on."""
    tokens = np.frombuffer(b"the quick brown fox jumps over the lazy dog\n" * 40, np.uint8)
    for split in ("train", "val"):
        prepare.write_shard(directory / f"tiny_{split}_000000.bin", tokens)


def shards(c, split, device="cpu"):
    """The Shards of a split of c's corpus, whose batches come to a device."""
    return train_gpt.Shards(c, train_gpt.find_corpus(c), split, device)


@contextlib.contextmanager
def training_in(directory):
    """Within it runs are trained in a directory, on its own corpus. All is then as it was before."""
    write_corpus(directory)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "DATA", directory)
        patch.setattr(quartet, "RECIPES", dict(quartet.RECIPES))      # --bf16_forward_end adds a row
        patch.chdir(directory)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)      # train_gpt.py sets it on a GPU


# ---- What a run leaves behind ------------------------------------------------------------------------------

def records(run="a"):
    """The records of its log, [{...}, ...]. ValueError for NaN and Infinity, which are no JSON."""
    def refuse(constant):
        raise ValueError(f"{constant} in the log of {run}")

    with open(f"runs/{run}/log.jsonl") as log:
        return [json.loads(line, parse_constant=refuse) for line in log]


def logged(run="a", key="loss"):
    """What its log says of each step, {step: value}."""
    return {record["step"]: record[key] for record in records(run) if key in record}


def result(run="a"):
    return json.loads(Path(f"runs/{run}/result.json").read_text())


def checkpoint(run="a", name="checkpoint.pt"):
    """What is in a checkpoint; weights and moments are whole, also of one that is a directory."""
    path = Path(f"runs/{run}/{name}")
    if not path.is_dir():
        return torch.load(path, weights_only=True)
    saved = torch.load(path / train_gpt.HEAD, weights_only=True)
    metadata = train_gpt.Parts(path, saved["files"]).read_metadata()
    tensors = {name: torch.empty(t.size) for name, t in metadata.state_dict_metadata.items()}
    train_gpt.load_parts(path, saved, tensors, together=False)

    # Names are model.WEIGHT and optimizer.WEIGHT.MOMENT.
    state = {}
    for name, t in tensors.items():
        if name.startswith("optimizer."):
            weight, _, moment = name.removeprefix("optimizer.").rpartition(".")
            state.setdefault(weight, {})[moment] = t
    saved["model"] = {name.removeprefix("model."): t for name, t in tensors.items()
                      if name.startswith("model.")}
    return saved | dict(optimizer=dict(state=state))


def write_checkpoint(path, c, step=1):
    """Write a checkpoint of a new model of Config c, which can be read, and cannot go on."""
    log = dict(text="", skipped=0, val_loss=math.nan)
    torch.save(dict(config=vars(c), step=step, log=log, model=train_gpt.GPT(c).state_dict(), optimizer={},
                    generators=[], corpus="", code="", processes=1, files={}), path)


def go_back(run="a"):
    """Make the checkpoint before the last one the last."""
    os.replace(f"runs/{run}/previous.pt", f"runs/{run}/checkpoint.pt")


def same(a, b):
    """Whether two dicts of tensors, such as the weights in two checkpoints, are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- What goes wrong on purpose ----------------------------------------------------------------------------

def spoil_losses(monkeypatch, passes):
    """Make the loss NaN in these forward passes, counted from 1 -> a list that grows by one in each pass.

    Its elements are the weight of blocks.0.up as the passes found it.
    """
    predict = train_gpt.GPT.predict
    found = []

    def spoiled(model, x, targets):
        found.append(model.blocks[0].up.weight.detach().clone())
        loss = predict(model, x, targets)
        if len(found) in passes:
            loss = loss * math.nan
        return loss

    monkeypatch.setattr(train_gpt.GPT, "predict", spoiled)
    return found
