"""The runs behind the README's results: recipes and their parts, on equal data, seeds and steps.

    python data/evidence/experiments.py SIZE GROUP ... [--seeds=1,2] [--corpus=novels] [--jobs=1] [--steps=N]

SIZE is one of SIZES below, a GROUP one of GROUPS or names of rows by commas. Each GPU trains --jobs runs at a
time. Other knobs, such as --steps, are train_gpt.py's. A finished run leaves its log,
data/evidence/results/SIZE-CORPUS-ROW-SEED.jsonl, and is not repeated. One that was stopped, by Ctrl-C or
SIGTERM, goes on from there. With other knobs, either is an error. data/evidence/figures.py draws them all.

The comparison that settles, from step 0, written down before its runs. Corpus `installed` (data/prepare.py):
all runs of a seed have one corpus hash in their headers. Training reads 0.7 times its length (at 30m 1.1),
in windows that begin anywhere, and validation documents that no training has. Rows of a seed share data, init
and order. One H200 a run.

    10m bf16,quartet2,quintet --corpus=installed --seeds=31,...,54          262M bytes, 24 seeds
    30m bf16,quartet2,quintet --corpus=installed --steps=1526 --seeds=31,...,35     400M bytes, 5 seeds
    30m quartet2@152+bf16,quintet --corpus=installed --steps=1526 --seeds=41,...,46
                                                                            branches at 10%, 6 seeds
    10m rivals --corpus=installed --seeds=31,...,38                         8 of those seeds

Primary: the mean over the 24 seeds of quintet's minus quartet2's last validation loss, at 10m: quintet is
better if the 95% interval (Student's t) lies below 0. Secondary, by paired t-tests with Holm's correction
over the family: the same at 30m, from scratch and from the branch; quintet minus quartet2_dampen; quintet
minus quartet2_cage. Beside them, without a test: the share of quartet2's gap to bf16 that is closed, at both
sizes, with Fieller's interval; the gap of every rival. What has run is reported whichever way it went; seeds
are taken in order and none is left out.

Whether quintet closes half of the gap if inputs are in two terms in the last tenth of the steps
(--two_terms_end=0.1), written down after 2 of these seeds had shown so from step 3000 on (README.md, section
4), and before its runs:

    10m quintet_two_end --corpus=installed --seeds=31,...,54
    30m quintet_two_end --corpus=installed --steps=1526 --seeds=31,...,35

It does if the share of quartet2's mean gap that it closes, over the 24 seeds at 10m, is at least 50%, and the
lower end of Fieller's 95% interval above 40%. Beside it, without a test: the same at 30m; and the loss that a
model so trained has if inputs are in one term again.

Which part of a recipe the gap comes from that arises before the last quarter of the steps. Rows train in 4
bits up to step 3000 and then in bf16, so that only what weights have missed is left; no test, two seeds:

    10m quartet2@1000+bf16,quartet2_then_bf16,quartet2_original_then_bf16,fwd_four_six_then_bf16,
    bwd_eden_then_bf16,quintet_two_then_bf16 --corpus=installed --seeds=31,32

Expected above bf16, in 1e-3 nats: quartet2 4; with the backward pass from bf16 operands 4; 4-bit forward
alone 3; 4-bit backward alone 1; quintet with inputs in two terms 1.5.

An earlier test of quintet, of two rounds of rotation then, written down before its runs:
`10m quartet2@1000+bf16,quintet --seeds=21,...,28`. It is better than quartet2 if the 95% interval (Student's
t) of the mean paired difference of the last losses lies below 0; the goal is that this mean is 15% of
quartet2's mean gap to bf16 or more.

Whether it matters how GEMMs add, in float32 or as FP4 tensor cores do, written down before its runs:

    cpu quartet2,quartet2_blackwell,quartet2_nudged --corpus=python --seeds=1,...,12 --eval_tokens=65536

A run whose sums differ in a last digit soon is another run. It matters how GEMMs add if the 95% interval
(Student's t) of the mean over seeds of quartet2_blackwell's minus quartet2's last validation loss excludes 0.
Beside it stands the same of quartet2_nudged, where the embedding of one byte begins 1% larger: what two runs
differ by if nothing matters. (Written down first was another control, 1% of one weight of a quantized layer.
It was given up after four runs, because in 4 bits that changed nothing for 96 steps.)

The same once more with 10.6M parameters, from a common start, where runs differ by less. Written down before
its runs, on an H200:

    10m_short quartet2@200+quartet2_blackwell,quartet2_nudged --corpus=installed --seeds=1,...,4

Two seeds differ by what happens early, and by more than two 4-bit recipes do. So a GROUP may be START+GROUP,
where START is ROW@STEP, as in quartet2@3400+forward. Then all rows of a seed go on from that step of that
row, and leave SIZE-CORPUS-STARTROW-from-STEP-ROW-SEED.jsonl.
"""
import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import ideas
import quartet
import train_gpt
from quartet import Gemm, Recipe
from train_gpt import UserError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"                           # logs of runs that have finished
RUNS = HERE.parents[1] / "runs" / "experiments"      # runs that have not, and steps that others start from
CHILDREN = []                                        # the processes that train
STOPPING = threading.Event()                         # whether a signal has come that stops them


# ---- 1. What is compared -----------------------------------------------------------------------------------
#
# A row is a recipe of quartet.py, or one of these: recipes with one part changed, or with one part alone in
# 4 bits. A row of KNOBS is a recipe that is trained with a knob of train_gpt.py.

TEN_MILLION = ("30m --layers=6 --width=384 --heads=3 --hidden=1024 --batch=128 --tokens_per_step=65536"
               " --lr=1.5e-3")
SIZES = {    # arguments of train_gpt.py
    "10m": f"{TEN_MILLION} --steps=4000",
    "10m_short": f"{TEN_MILLION} --steps=800",
    "30m": "30m --batch=128",
    "100m": "100m --batch=64",
    "cpu": "cpu",
    "tiny": "30m --layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --tokens_per_step=128"
            " --steps=20 --lr=1e-3 --compile=off --device=cpu",
}
COMMON = "--eval_tokens=4194304 --eval_every=500 --save_every=1000000 --sample_tokens=64 --log_every=20"

# What runs must share to be compared.
DECIDES = ("layers", "width", "heads", "hidden", "vocab_size", "sequence", "tokens_per_step", "steps", "lr",
           "weight_decay", "clip", "eval_tokens")

EXACT = Gemm(None, dy="bf16", other="bf16")          # a backward GEMM of unquantized operands
EDEN = Gemm("rht128", dy="ms_eden", other="ms_eden")
EDEN_X2 = Gemm("rht128x2", dy="ms_eden", other="ms_eden")
EDEN_46 = Gemm("rht128x2", dy="ms_eden_46", other="ms_eden_46")
QUARTET2 = quartet.RECIPES["quartet2"]
QUINTET = quartet.RECIPES["quintet"]


def forward(x, w):
    """A recipe whose forward pass alone is quantized."""
    return Recipe(x, w, dx=EXACT, dw=EXACT)


def backward(gemm):
    """A recipe whose backward pass alone is quantized, dx and dw alike."""
    return Recipe("bf16", "bf16", dx=gemm, dw=gemm)


def both(quantizer, gemm):
    """A recipe with one quantizer for x and w, and dx and dw alike."""
    return Recipe(quantizer, quantizer, dx=gemm, dw=gemm)


ROWS = {
    # Forward alone. 16x16: blocks of w.
    "fwd_rtn": forward("rtn", "rtn"),
    "fwd_four_six": forward("four_six", "four_six"),
    "fwd_rtn_16x16": forward("rtn", "rtn_16x16"),
    "fwd_four_six_16x16": forward("four_six", "four_six_16x16"),
    "fwd_search": forward("scale_search", "scale_search"),
    "fwd_search_dampen": forward("scale_search", "scale_search")._replace(dampen=10.0),
    # One operand of the forward pass alone.
    "x_four_six": forward("four_six", "bf16"),
    "w_four_six": forward("bf16", "four_six"),
    "x_search": forward("scale_search", "bf16"),
    "w_search": forward("bf16", "scale_search"),
    # Backward alone.
    "bwd_sr": backward(Gemm("rht128", dy="sr", other="sr")),
    "bwd_sr_46": backward(Gemm("rht128", dy="sr_46", other="sr_46")),
    "bwd_eden": backward(EDEN),
    "bwd_eden_x2": backward(EDEN_X2),
    "bwd_eden_46": backward(EDEN_46),
    "bwd_four_six": backward(Gemm("rht128x2", dy="four_six", other="four_six")),
    # Quartet II with one part changed.
    "quartet2_rtn": both("rtn", EDEN),
    "quartet2_search": both("scale_search", EDEN),
    "quartet2_x2": both("four_six", EDEN_X2),
    "quartet2_46": both("four_six", EDEN_46),
    "quartet2_dy": both("four_six", Gemm("rht128x2", dy="ms_eden", other="four_six")),
    # To pull w towards its quantized value is CAGE's idea, arXiv:2510.18784. The first grows by a ramp of
    # this project's own, 10 (t/T)^4, the second by CAGE's (CHANGES).
    "quartet2_dampen": QUARTET2._replace(dampen=10.0),
    "quartet2_cage": QUARTET2._replace(dampen=10.0),
    # Backward from x and w in bf16, not from what the forward pass stored.
    "quartet2_original": QUARTET2._replace(original=True),
    # quintet with two rounds of rotation; with inputs in two terms in all steps.
    "quintet_x2": QUINTET._replace(dx=EDEN_X2, dw=EDEN_X2),
    "quintet_two": QUINTET._replace(two_terms=True),
}
KNOBS = {    # row: its recipe, its knobs
    "quartet2_end": ("quartet2", "--bf16_end=0.1"),
    "quartet2_last": ("quartet2", "--bf16_last=1"),     # 15% of the blocks or a little more
    "quartet2_blackwell": ("quartet2", "--gemm=blackwell"),
    "quartet2_nudged": ("quartet2",),                   # its start is changed by `nudge`
    "quintet_forward_end": ("quintet", "--bf16_forward_end=0.1"),
    "quintet_two_end": ("quintet", "--two_terms_end=0.1"),
    "quartet2_two_end": ("quartet2", "--two_terms_end=0.1"),
    **{f"{recipe}_then_bf16": (recipe, "--bf16_end=0.25")
       for recipe in ("quartet2", "quartet2_original", "fwd_four_six", "bwd_eden", "quintet_two")},
    **{f"{recipe}_linear": (recipe, "--schedule=wsd", "--decay=0.9", "--final_lr=0")     # linear decay to 0
       for recipe in ("bf16", "quartet2", "quintet")},
    **{row: (recipe, *knobs) for row, (recipe, _, *knobs) in ideas.IDEAS.items()}
}


GROUPS = {
    "rivals": "nvidia four_six tetrajet2 quartet2_dampen quartet2_cage quartet2_end quartet2_last"
              " quartet2_original",
    "recipes": "bf16 nvidia four_six tetrajet2 quartet2 quintet",
    "close": "bf16 quartet2 quintet",
    "forward": "bf16 fwd_rtn_16x16 fwd_four_six_16x16 fwd_rtn fwd_four_six fwd_search fwd_search_dampen",
    "operands": "bf16 x_four_six w_four_six x_search w_search",
    "backward": "bf16 bwd_sr bwd_sr_46 bwd_eden bwd_eden_x2 bwd_eden_46 bwd_four_six",
    "parts": "bf16 quartet2_rtn quartet2 quartet2_search quartet2_x2 quartet2_46 quartet2_dampen quintet",
}


def register():
    """Make ROWS recipes, and SR with 4/6 a quantizer."""
    quartet.QUANTIZERS["sr_46"] = ideas.sr_46
    quartet.RECIPES.update(ROWS)


# ---- 2. Where runs are, and whether they are of one kind ---------------------------------------------------

def plain(row):
    """A row as part of a file's name. Example: quartet2@1000+bf16 -> quartet2-from-1000-bf16."""
    return row.replace("@", "-from-").replace("+", "-")


def log_of(size, corpus, row, seed):
    """Where the log of a finished run is."""
    return RESULTS / f"{size}-{corpus}-{plain(row)}-{seed}.jsonl"


def start_of(size, corpus, start, seed):
    """Where the checkpoint is that rows of ROW@STEP+GROUP go on from; start: ROW@STEP."""
    return RUNS / f"{size}-{corpus}-{plain(start)}-{seed}.pt"


def config(size):
    """All knobs of a size, {name: value}."""
    _, preset, knobs = train_gpt.parse([*SIZES[size].split(), *COMMON.split()])
    return vars(train_gpt.Config(**train_gpt.PRESETS[preset] | knobs))


def check(path, size, knobs):
    """UserError where a log or checkpoint has other knobs, or, of DECIDES, other than the size has."""
    if path.suffix == ".pt":
        saved, _, _ = train_gpt.load("eval", path, {})
        own = vars(saved)
    else:
        header, _, _ = path.read_text().partition("\n")
        own = json.loads(header).get("config", {})     # a log that does not tell its knobs is taken as it is

    of_size = config(size)
    wanted = {name: of_size[name] for name in DECIDES} | knobs
    for name, value in wanted.items():
        if name != "save_every" and own.get(name, value) != value:
            raise UserError(f"{path} has --{name}={own[name]}, not {value}: move it away, or take "
                            f"{own[name]}")


# ---- 3. One run --------------------------------------------------------------------------------------------
#
# A run is train_gpt.py in a process of its own, in a directory of its own, which is removed when its log has
# been copied to RESULTS. The process is this file again, `experiments.py train ROW ...`, so that it knows the
# rows.

def branch(start, run, recipe, knobs):
    """Make a run, a directory, that goes on from a kept checkpoint by another recipe, or with other knobs."""
    saved = torch.load(start, weights_only=True)
    _, _, changed = train_gpt.parse(knobs)
    saved["config"] |= dict(recipe=recipe, name="run", save_every=1000000) | changed
    # Its log begins at that step: no text yet, no skipped step, no validation loss.
    saved["log"] = dict(text="", skipped=0, val_loss=math.nan)
    torch.save(saved, run / "checkpoint.pt")


def train(size, corpus, row, seed, gpu, jobs, knobs, keep=()):
    """One run, in a process of its own on one GPU: leaves its log in RESULTS, or prints why there is none.

    row: ROW or ROW@STEP+ROW. keep: steps from which others go on, as soon as they are there. A run that has
    its log already ends at the last of them.
    """
    # Another such command may have finished it meanwhile.
    target = log_of(size, corpus, row, seed)
    finished = target.exists()
    if finished and not keep:
        return

    # One that was stopped goes on. A new one that starts from a step of another goes on from that.
    start, _, row = row.rpartition("+")
    recipe, *more = KNOBS.get(row, (row,))
    directory = RUNS / target.stem
    run = directory / "runs" / "run"
    begun = any((run / name).exists() for name in train_gpt.CHECKPOINTS)
    if not begun:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        if start:
            run.mkdir(parents=True)
            branch(start_of(size, corpus, start, seed), run, recipe, more)

    # The command line
    if begun or start:
        arguments = ["resume", "run", "--save_every=1000000"]
    else:
        arguments = [*SIZES[size].split(), *COMMON.split(), "--name=run"]
        arguments += [f"--recipe={recipe}", f"--seed={seed}", f"--corpus={corpus}", *more]
        arguments += [f"--{name}={value}" for name, value in knobs.items()]
    kept = {step: start_of(size, corpus, f"{row}@{step}", seed) for step in keep}
    if keep:
        arguments.append(f"--save_every={math.gcd(*keep)}")
        arguments += [f"--keep={step}={path}" for step, path in kept.items()]
    if finished:
        arguments.append(f"--end={target}")

    # Train, and wait.
    child = subprocess.Popen(
        [sys.executable, __file__, "train", row, *arguments],
        cwd=directory,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    CHILDREN.append(child)
    if STOPPING.is_set():      # it came while this one was started
        child.send_signal(signal.SIGTERM)
    printed, _ = child.communicate()

    # What it must leave
    left = kept.values() if finished else [run / "result.json"]
    if child.returncode or not all(path.exists() for path in left):
        print(f"{target.stem} has not finished:\n{printed[-3000:]}", flush=True)
        return
    if not finished:
        keep_log(run, target, jobs)
    shutil.rmtree(directory)


def keep_log(run, target, jobs):
    """Copy the log of a run, a directory, to target, but of training losses each 20th; print the result."""
    records = [json.loads(line) for line in open(run / "log.jsonl")]
    records = [r for r in records if "loss" not in r or r["step"] % 20 == 0]
    result = json.loads((run / "result.json").read_text()) | {"jobs": jobs}
    part = target.with_suffix(".part")
    part.write_text("".join(json.dumps(r) + "\n" for r in [*records, result]))
    os.replace(part, target)
    print(f"{target.stem}: {result}", flush=True)


def losses_by_step(log):
    """The losses in a log -> {(step, "loss" or "val_loss"): loss}."""
    found = {}
    for line in open(log):
        record = json.loads(line)
        for kind in ("loss", "val_loss"):
            if kind in record and "step" in record:
                found[record["step"], kind] = record[kind]
    return found


def keep_checkpoints(keep, end):
    """Let train_gpt.py copy checkpoints to keep, {step: path}, and stop at the last of these if `end`.

    end: the log that the run has already, or None. Its losses must be those of now, or the rows of a seed
    would not have one start.
    """
    save = train_gpt.save

    def keeping(directory, c, step, **state):
        save(directory, c, step, **state)
        if step in keep:
            if end:
                refuse_other_losses(directory / "log.jsonl", end)
            part = f"{keep[step]}.part"
            shutil.copy(directory / "checkpoint.pt", part)
            os.replace(part, keep[step])
        if end and step == max(keep):
            sys.exit()

    train_gpt.save = keeping


# Some rows change train_gpt.py in the process that trains them: CHANGES has a function for each.

def ramp_of_cage():
    """Let dampening grow with the share t of steps done as in CAGE: silence, then a line.

    The length of its silence is chosen so that end and integral over t are those of train_gpt.ramp, t^4.
    """
    train_gpt.ramp = lambda t: max(0.0, (t - 0.6) / 0.4)


def nudge(model):
    """Make the embedding of a space larger by 1%. (Of a quantized weight such a change can round away.)"""
    with torch.no_grad():
        model.embedding.weight[ord(" ")] *= 1.01


def nudge_at_the_start():
    """Let train_gpt.py `nudge` a model that it makes, or goes on from as a `branch`, whose log is empty."""
    build = train_gpt.build

    def nudging(c, directory, checkpoint, *others):
        model, *built = build(c, directory, checkpoint, *others)
        if not checkpoint or not checkpoint["log"]["text"]:
            nudge(model)
        return model, *built

    train_gpt.build = nudging


CHANGES = {
    "quartet2_cage": ramp_of_cage,
    "quartet2_nudged": nudge_at_the_start,
    **{row: change for row, (_, change, *_) in ideas.IDEAS.items()}
}


def refuse_other_losses(log, end):
    """UserError where two logs of one run, the second of an earlier time, have different losses."""
    now = losses_by_step(log)
    before = losses_by_step(end)
    wrong = [key for key in before.keys() & now.keys() if before[key] != now[key]]
    if wrong:
        step, _ = min(wrong)
        raise UserError(f"step {step}: not the losses of {end}, of another GPU or code: take another seed, "
                        "or move the logs of this one away")


def train_row(arguments):
    """`train ROW [--keep=STEP=PATH ...] [--end=LOG] ...`: train_gpt.py with ROWS, in this process."""
    parser = argparse.ArgumentParser(prog="experiments.py train", allow_abbrev=False)
    parser.add_argument("row")
    parser.add_argument("--keep", action="append", default=[])
    parser.add_argument("--end")
    own, arguments = parser.parse_known_args(arguments)

    # {step: path}
    keep = {}
    for word in own.keep:
        step, _, path = word.partition("=")
        keep[int(step)] = path
    if own.row in CHANGES:
        CHANGES[own.row]()
    keep_checkpoints(keep, own.end)
    train_gpt.main(arguments)
    if Path("runs/run/result.json").exists():
        add_loss(Path("runs/run"), "val_loss_in_bf16", "bf16")
        saved, _, _ = train_gpt.load("eval", "runs/run", {})
        if saved.two_terms_end:
            add_loss(Path("runs/run"), "val_loss_in_one_term", saved.recipe)


def add_loss(run, name, recipe):
    """Add to a result, under a name, the last validation loss, had the forward pass been by a recipe.

    What is left of a gap in bf16 is in the weights; the rest is what 4 bits lose in validation alone.
    """
    model, c = train_gpt.load_model(str(run), recipe=recipe)
    data = train_gpt.Shards(c, train_gpt.find_corpus(c), "val", model.rope.device.type)
    loss = train_gpt.evaluate(model, data, c)
    path = run / "result.json"
    result = json.loads(path.read_text())
    result[name] = loss if math.isfinite(loss) else None
    path.write_text(json.dumps(result))


# ---- 4. All runs -------------------------------------------------------------------------------------------

def queue(size, rows, seeds, corpus, knobs, jobs):
    """Train what has no log yet, seed by seed, on all GPUs -> None, or what to say if some has none then."""
    # What is there, done or half done, must be of this kind.
    RESULTS.mkdir(exist_ok=True)
    for row in rows:
        for seed in seeds:
            log = log_of(size, corpus, row, seed)
            for path in [log, *(RUNS / log.stem / "runs" / "run").glob("*.pt")]:
                if path.exists():
                    check(path, size, knobs)

    # What is missing
    runs = [(row, seed) for seed in seeds for row in rows if not log_of(size, corpus, row, seed).exists()]
    if not runs:
        print(f"all of these runs are there, in {RESULTS}: move logs away to train them again")

    # What must be trained before, up to which steps: {(row, seed): [step, ...]}
    starts = {}
    for start, seed in dict.fromkeys((row.rpartition("+")[0], seed) for row, seed in runs):
        path = start_of(size, corpus, start, seed)
        row, _, step = start.partition("@")
        if start and path.exists():
            check(path, size, knobs)
        elif start:
            starts.setdefault((row, seed), []).append(int(step))

    def ready(run):
        """Whether the step is there that a run goes on from."""
        row, seed = run
        start, _, _ = row.rpartition("+")
        return not start or start_of(size, corpus, start, seed).exists()

    def train_it(run, keep, gpu):
        train(size, corpus, *run, gpu, jobs, knobs, keep)

    # On a machine without a GPU, one named "": a CPU.
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    todo = {run: starts.get(run, ()) for run in [*starts, *runs]}
    train_all(todo, ready, train_it, gpus.split(",") * jobs)

    left = sum(not log_of(size, corpus, *run).exists() for run in set(runs))
    if left:
        return f"experiments.py: not finished: {left} of the runs; the same command goes on with them"


def train_all(todo, ready, train_it, gpus):
    """Call train_it(run, keep, gpu) for all of todo, {run: keep}, at most one at a time for each of gpus.

    A run starts when ready(run), which others that train may bring about; what never gets ready is left out.
    After SIGINT or SIGTERM no other starts, and those that train save and end.
    """
    training = []
    lock = threading.RLock()

    def work(gpu):
        while True:
            # Take the first that is ready. If others train, one may get ready.
            with lock:
                run = next(filter(ready, todo), None)
                if run:
                    keep = todo.pop(run)
                    training.append(run)
                elif not training:
                    return
            if not run:
                time.sleep(0.2)
                continue
            try:
                train_it(run, keep, gpu)
            finally:
                # Under the lock, or others might find neither its step there nor it training.
                with lock:
                    training.remove(run)

    def stop(signum, frame):
        STOPPING.set()
        with lock:
            todo.clear()
        for child in CHILDREN:
            child.send_signal(signal.SIGTERM)        # saves, also after a Ctrl-C of its own

    STOPPING.clear()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


# ---- 5. The command line -----------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, of one line."""

    def error(self, message):
        raise UserError(f"{message}: see --help")


def rows_of(word, steps):
    """GROUP, START+GROUP, or rows by commas in a GROUP's place -> [row, ...]. UserError for what is unknown.

    Of START, ROW@STEP, that ROW itself comes last. steps: of a run.
    """
    start, plus, group = word.rpartition("+")
    first, _, step = start.partition("@")
    if start and not (step.isdigit() and 0 < int(step) < steps):
        raise UserError(f"{word}: not ROW@STEP+GROUP with a step from 1 to {steps - 1}")
    names = GROUPS[group].split() if group in GROUPS else group.split(",")
    rows = [start + plus + name for name in names if not start or name != first]
    if start:
        rows.append(first)
        names = [*names, first]
    for name in names:
        train_gpt.known(name, quartet.RECIPES | KNOBS, f"unknown row {name!r}")
    return rows


def main(arguments):
    """Do what the command line says -> None, or what has not finished."""
    register()
    if arguments[:1] == ["train"]:
        return train_row(arguments[1:])

    parser = Parser(
        prog="experiments.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("size", metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("groups", metavar="GROUP", nargs="+", help=", ".join(GROUPS))
    parser.add_argument("--seeds", default="1", help="whole numbers by commas (1)")
    parser.add_argument("--corpus", default="novels", help="of data/prepare.py (novels)")
    parser.add_argument("--jobs", default="1", help="runs at a time on one GPU (1)")
    own, others = parser.parse_known_args(arguments)

    # Others are groups that stand behind a knob, and knobs of train_gpt.py.
    words = own.groups + others
    groups = [word for word in words if not word.startswith("--")]
    _, _, knobs = train_gpt.parse([word for word in words if word.startswith("--")])

    # Mistakes
    train_gpt.known(own.size, SIZES, f"unknown size {own.size!r}")
    if not re.fullmatch(r"\d+(,\d+)*", own.seeds):
        raise UserError(f"--seeds={own.seeds}: it takes whole numbers by commas, as in --seeds=1,2,3")
    if not re.fullmatch(r"[1-9]\d*", own.jobs):
        raise UserError(f"--jobs={own.jobs}: take --jobs=1 or more")
    if "-" in own.corpus:
        raise UserError(f"--corpus={own.corpus}: a name without - can be read in a log's name")
    for name in ("recipe", "seed", "name"):
        if name in knobs:
            raise UserError(f"--{name} is a run's own here: rows name recipes, --seeds=1,2 seeds")

    # What to train
    steps = (config(own.size) | knobs)["steps"]
    rows = []
    for word in groups:
        rows += rows_of(word, steps)
    seeds = [int(seed) for seed in own.seeds.split(",")]
    return queue(own.size, rows, seeds, own.corpus, knobs, int(own.jobs))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, ValueError, OSError) as e:
        sys.exit(f"experiments.py: {e}")
