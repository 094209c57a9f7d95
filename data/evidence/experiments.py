"""The runs behind the README's results: recipes and their parts, on equal data, seeds and steps.

    python data/evidence/experiments.py SIZE GROUP ... [--seeds=1,2,3] [--corpus=novels] [--steps=N] [--jobs=1]

SIZE is one of SIZES below, a GROUP one of GROUPS or names of rows by commas. Each GPU trains --jobs runs at a
time. A finished run leaves its log, data/evidence/results/SIZE-CORPUS-ROW-SEED.jsonl, and is not repeated; one
stopped by Ctrl-C or SIGTERM goes on from there. With other knobs, either is an error. data/evidence/figures.py draws them all.

The comparison that settles, from step 0, written down before its runs. Corpus `installed` (data/prepare.py): all
runs of a seed have one corpus hash in their headers, and it is read less than once, in validation documents that no
training has. Rows of a seed share data, init and order. One H200 a run.

    10m bf16,quartet2,quintet --corpus=installed --seeds=31,...,54          262M bytes, 24 seeds
    30m bf16,quartet2,quintet --corpus=installed --steps=1526 --seeds=31,...,35        400M bytes, 5 seeds
    30m quartet2@152+bf16,quintet --corpus=installed --steps=1526 --seeds=41,...,46    branches at 10%, 6 seeds
    10m rivals --corpus=installed --seeds=31,...,38                         8 of those seeds

Primary: the mean over the 24 seeds of quintet's minus quartet2's last validation loss, at 10m: quintet is better if
the 95% interval (Student's t) lies below 0. Secondary, by paired t-tests with Holm's correction over the family: the
same at 30m, from scratch and from the branch; quintet minus quartet2_dampen; quintet minus quartet2_cage. Beside
them, without a test: the share of quartet2's gap to bf16 that is closed, at both sizes, with Fieller's interval; the
gap of every rival. What has run is reported whichever way it went; seeds are taken in order and none is left out.

An earlier test of quintet, of two rounds of rotation then, written down before its runs: `10m quartet2@1000+bf16,quintet --seeds=21,...,28`. It is
better than quartet2 if the 95% interval (Student's t) of the mean paired difference of the last losses lies
below 0; the goal is that this mean is 15% of quartet2's mean gap to bf16 or more.

Two seeds differ by what happens early, and by more than two 4-bit recipes do. So a GROUP may be START+GROUP,
START being ROW@STEP, as in quartet2@3400+forward: then all rows of a seed go on from that step of that row,
and leave SIZE-CORPUS-STARTROW-from-STEP-ROW-SEED.jsonl.

Logs of corpus novels called quintet_x2 were written when the recipe quintet had two rounds of rotation; their
records say quintet.

Results of rows v_* are of code that is gone, of commit 0b41500. There, v_search is fwd_search, v_quintet_46
quintet_unturned, v_quintet_turned quintet, v_quintet_pull_10 quintet_unturned_dampen10, v_quartet2_pull_10
quartet2_dampen10, v_search_turned_pull_10 fwd_search_turned_dampen10, v_search_pull_5 and _20
fwd_search_dampen5 and 20, v_plain plain; the others have the same name.
"""
import json, math, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import demonstrate, quartet, train_gpt
from quartet import Gemm, Recipe

RESULTS, RUNS, CHILDREN = HERE / "results", HERE.parents[1] / "runs" / "experiments", []    # processes of runs
SIZES = {   # arguments of train_gpt.py
    "10m": "30m --layers=6 --width=384 --heads=3 --hidden=1024 --batch=128 --tokens_per_step=65536"
           " --steps=4000 --lr=1.5e-3",
    "30m": "30m --batch=128", "100m": "100m --batch=64",
    "tiny": "30m --layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --tokens_per_step=128"
            " --steps=20 --lr=1e-3 --compile=off --device=cpu"}
COMMON = "--eval_tokens=4194304 --eval_every=500 --save_every=1000000 --sample_tokens=64 --log_every=20"

DECIDES = ("layers", "width", "heads", "hidden", "vocab_size", "sequence", "tokens_per_step", "steps", "lr",
           "weight_decay", "clip", "eval_tokens")       # what runs must share to be compared

exact = Gemm(None, "bf16", "bf16")                # a backward GEMM of unquantized operands
forward = lambda x, w: Recipe(x, w, exact, exact)
backward = lambda *gemm: Recipe("bf16", "bf16", Gemm(*gemm), Gemm(*gemm))
both = lambda q, *gemm: Recipe(q, q, Gemm(*gemm), Gemm(*gemm))
eden = "rht128", "ms_eden", "ms_eden"
ROWS = {
    "fwd_rtn": forward("rtn", "rtn"), "fwd_four_six": forward("four_six", "four_six"),
    "fwd_rtn_16x16": forward("rtn", "rtn_16x16"), "fwd_four_six_16x16": forward("four_six", "four_six_16x16"),
    "fwd_search": forward("scale_search", "scale_search"),
    "fwd_search_dampen": forward("scale_search", "scale_search")._replace(dampen=10.0),
    "x_four_six": forward("four_six", "bf16"), "w_four_six": forward("bf16", "four_six"),
    "x_search": forward("scale_search", "bf16"), "w_search": forward("bf16", "scale_search"),
    "bwd_sr": backward("rht128", "sr", "sr"), "bwd_sr_46": backward("rht128", "sr_46", "sr_46"),
    "bwd_eden": backward(*eden), "bwd_eden_x2": backward("rht128x2", "ms_eden", "ms_eden"),
    "bwd_eden_46": backward("rht128x2", "ms_eden_46", "ms_eden_46"),
    "bwd_four_six": backward("rht128x2", "four_six", "four_six"),
    "quartet2_rtn": both("rtn", *eden), "quartet2_search": both("scale_search", *eden),
    "quartet2_x2": both("four_six", "rht128x2", "ms_eden", "ms_eden"),
    "quartet2_46": both("four_six", "rht128x2", "ms_eden_46", "ms_eden_46"),
    "quartet2_dy": both("four_six", "rht128x2", "ms_eden", "four_six"),
    "quartet2_dampen": quartet.RECIPES["quartet2"]._replace(dampen=10.0),
    "quartet2_cage": quartet.RECIPES["quartet2"]._replace(dampen=10.0),
    "quartet2_original": quartet.RECIPES["quartet2"]._replace(original=True),   # backward: of bf16 x and w
    "quintet_x2": quartet.RECIPES["quintet"]._replace(dx=Gemm("rht128x2", "ms_eden", "ms_eden"),
                                                      dw=Gemm("rht128x2", "ms_eden", "ms_eden")),
}
KNOBS = {   # rows with knobs: recipe, knobs; quartet2_last: 15% of the blocks or a little more
    "quartet2_end": ("quartet2", "--bf16_end=0.1"), "quartet2_last": ("quartet2", "--bf16_blocks=1")}
# How dampening grows with the share t of steps done, where not by train_gpt.ramp, t^4. CAGE's form, arXiv:2510.18784:
# silence, then a line. The length of its silence is chosen so that end and integral over t are those of t^4.
RAMPS = {"quartet2_cage": lambda t: max(0.0, (t - 0.6) / 0.4)}
GROUPS = {
    "rivals": "nvidia four_six tetrajet2 quartet2_dampen quartet2_cage quartet2_end quartet2_last quartet2_original",
    "recipes": "bf16 nvidia four_six tetrajet2 quartet2 quintet", "close": "bf16 quartet2 quintet",
    "forward": "bf16 fwd_rtn_16x16 fwd_four_six_16x16 fwd_rtn fwd_four_six fwd_search fwd_search_dampen",
    "operands": "bf16 x_four_six w_four_six x_search w_search",
    "backward": "bf16 bwd_sr bwd_sr_46 bwd_eden bwd_eden_x2 bwd_eden_46 bwd_four_six",
    "parts": "bf16 quartet2_rtn quartet2 quartet2_search quartet2_x2 quartet2_46 quartet2_dampen quintet",
}

def register():
    """Make ROWS recipes, and SR with 4/6 a quantizer."""
    quartet.QUANTIZERS["sr_46"] = lambda x, R, seed: demonstrate.sr_four_six(quartet.rotate(x, R), seed)
    quartet.RECIPES.update(ROWS)

def plain(row):
    """ROW, ROW@STEP or ROW@STEP+ROW as part of a file's name: quartet2@1000+bf16 -> quartet2-from-1000-bf16."""
    return row.replace("@", "-from-").replace("+", "-")
def log_of(size, corpus, row, seed): return RESULTS / f"{size}-{corpus}-{plain(row)}-{seed}.jsonl"
def start_of(size, corpus, start, seed): return RUNS / f"{size}-{corpus}-{plain(start)}-{seed}.pt"

def branch(start, run, recipe, knobs):
    """Make a run, a directory, that goes on from a kept checkpoint by another recipe, or with other knobs."""
    saved = torch.load(start, weights_only=True)
    saved["config"] |= dict(recipe=recipe, name="run", save_every=1000000) | train_gpt.parse(knobs)[2]
    torch.save(saved, run / "checkpoint.pt")

def config(size):
    """All knobs of a size, {name: value}."""
    _, preset, knobs = train_gpt.parse([*SIZES[size].split(), *COMMON.split()])
    return vars(train_gpt.Config(**train_gpt.PRESETS[preset] | knobs))

def check(path, size, knobs):
    """Raise UserError where a log or checkpoint has other knobs, or, of DECIDES, other than SIZES has."""
    plain = config(size)
    if path.suffix == ".pt": own = vars(train_gpt.load("eval", path, {})[0])
    else: own = json.loads(path.read_text().partition("\n")[0]).get("config", {})       # old logs have none
    for k, v in ({k: plain[k] for k in DECIDES} | knobs).items():
        if k != "save_every" and own.get(k, v) != v:
            raise train_gpt.UserError(f"{path} has --{k}={own[k]}, not {v}: move it away, or take {own[k]}")

def train(size, corpus, row, seed, gpu, jobs, knobs, keep=()):
    """One run, in a process of its own on one GPU: leaves its log in RESULTS, or prints why there is none.

    keep: steps from which others go on, as soon as they are there. A run that has its log ends at the last.
    """
    target, (start, _, row) = log_of(size, corpus, row, seed), row.rpartition("+")
    if (finished := target.exists()) and not keep: return   # of another such command, meanwhile
    directory = RUNS / target.stem
    run, (recipe, *more) = directory / "runs" / "run", KNOBS.get(row, (row,))
    begun = any((run / name).exists() for name in train_gpt.CHECKPOINTS)
    if not begun: shutil.rmtree(directory, ignore_errors=True)
    (run if start else directory).mkdir(parents=True, exist_ok=True)
    if start and not begun: branch(start_of(size, corpus, start, seed), run, recipe, more)
    if start or begun: arguments = ["resume", "run", "--save_every=1000000"]
    else: arguments = [*SIZES[size].split(), *COMMON.split(), f"--recipe={recipe}", f"--seed={seed}",
                       f"--corpus={corpus}", "--name=run", *more, *(f"--{k}={v}" for k, v in knobs.items())]
    if keep: arguments += [f"--save_every={math.gcd(*keep)}"]
    keep = {step: start_of(size, corpus, f"{row}@{step}", seed) for step in keep}
    arguments += [f"--end={target}"] * finished + [f"--keep={step}={path}" for step, path in keep.items()]
    child = subprocess.Popen([sys.executable, __file__, "train", row, *arguments], cwd=directory, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu})
    CHILDREN.append(child)
    printed, left = child.communicate()[0], keep.values() if finished else [run / "result.json"]
    if child.returncode or not all(path.exists() for path in left):
        return print(f"{target.stem} has not finished:\n{printed[-3000:]}", flush=True)
    if not finished:
        records = [json.loads(line) for line in open(run / "log.jsonl")]
        kept = [r for r in records if "loss" not in r or r["step"] % 20 == 0]   # training losses: each 20th
        kept.append(json.loads((run / "result.json").read_text()) | {"jobs": jobs})
        part = target.with_suffix(".part")
        part.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(part, target)
        print(f"{target.stem}: {kept[-1]}", flush=True)
    shutil.rmtree(directory)

def queue(size, rows, seeds, corpus, knobs, jobs):
    """Train what has no log yet, seed by seed, on all GPUs -> None, or what to say if some has none then."""
    RESULTS.mkdir(exist_ok=True)
    for log in (log_of(size, corpus, row, seed) for row in rows for seed in seeds):
        for path in log, *(RUNS / log.stem / "runs" / "run").glob("*.pt"):
            if path.exists(): check(path, size, knobs)
    runs = [(row, seed) for seed in seeds for row in rows if not log_of(size, corpus, row, seed).exists()]
    if not runs: print(f"all of these runs are there, in {RESULTS}: move logs away to train them again")
    starts = {}                                             # what must be trained, up to which steps, before
    for start, seed in dict.fromkeys((row.rpartition("+")[0], seed) for row, seed in runs):
        path, (row, _, step) = start_of(size, corpus, start, seed), start.partition("@")
        if start and path.exists(): check(path, size, knobs)
        elif start: starts.setdefault((row, seed), []).append(int(step))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    todo = [(*run, knobs, starts.get(run, ())) for run in dict.fromkeys([*starts, *runs])]
    training, lock = [], threading.RLock()                  # what others may wait for
    def ready(run):
        start = run[0].rpartition("+")[0]
        return not start or start_of(size, corpus, start, run[1]).exists()
    def work(gpu):
        while True:
            with lock:
                run = next(filter(ready, todo), None)
                if run: todo.remove(run), training.append(run)
                elif not training: return
            if not run: time.sleep(0.2); continue
            try: train(size, corpus, *run[:2], gpu, jobs, *run[2:])
            finally:
                with lock: training.remove(run) # or others might find neither its step there nor it training
    def stop(signum, frame):
        with lock: todo.clear()
        for child in CHILDREN: child.send_signal(signal.SIGTERM)    # saves, also after a Ctrl-C of its own
    for signum in (signal.SIGINT, signal.SIGTERM): signal.signal(signum, stop)
    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus.split(",") * jobs]    # "": a CPU
    for w in workers: w.start()
    for w in workers: w.join()
    left = sum(not log_of(size, corpus, *run).exists() for run in {*runs})
    if left: return f"experiments.py: not finished: {left} of the runs; the same command goes on with them"

def keep_checkpoints(keep, end):
    """Let train_gpt.py copy checkpoints to keep, {step: path}, and stop at the last of these if `end`.

    end: the log that the run has already. Its losses must be those, or rows of a seed had not one start.
    """
    save = train_gpt.save
    def losses(log):
        records = (json.loads(line) for line in open(log))
        return {(r["step"], k): r[k] for r in records for k in ("loss", "val_loss") if k in r and "step" in r}
    def keeping(directory, c, step, **state):
        save(directory, c, step, **state)
        if step in keep:
            before, now = (losses(log) for log in (end, directory / "log.jsonl")) if end else ({}, {})
            if wrong := [k for k in before.keys() & now.keys() if before[k] != now[k]]:
                raise train_gpt.UserError(f"step {min(wrong)[0]}: not the losses of {end}, of another GPU or "
                                          "code: take another seed, or move the logs of this one away")
            shutil.copy(directory / "checkpoint.pt", f"{keep[step]}.part")
            os.replace(f"{keep[step]}.part", keep[step])
        if end and step == max(keep): sys.exit()
    train_gpt.save = keeping

def main(arguments):
    register()
    if arguments[:1] == ["train"]:
        keep = dict(a[7:].split("=", 1) for a in arguments if a.startswith("--keep="))
        end = [a[6:] for a in arguments if a.startswith("--end=")]
        _, row, *arguments = arguments
        train_gpt.ramp = RAMPS.get(row, train_gpt.ramp)
        keep_checkpoints({int(step): path for step, path in keep.items()}, end and end[0])
        return train_gpt.main([a for a in arguments if not a.startswith(("--end=", "--keep="))])
    if {"-h", "--help"} & {*arguments}: return print(__doc__)
    words = [a for a in arguments if not a.startswith("--")]
    knobs = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
    if len(words) < 2: raise train_gpt.UserError("it takes a SIZE and a GROUP, or more: see --help")
    train_gpt.known(words[0], SIZES, f"unknown size {words[0]!r}")
    seeds, jobs, corpus = knobs.pop("seeds", "1"), knobs.pop("jobs", "1"), knobs.pop("corpus", "novels")
    if not re.fullmatch(r"\d+(,\d+)*", seeds):
        raise train_gpt.UserError(f"--seeds={seeds}: it takes whole numbers by commas, as in --seeds=1,2,3")
    if not re.fullmatch(r"[1-9]\d*", jobs): raise train_gpt.UserError(f"--jobs={jobs}: take --jobs=1 or more")
    if "-" in corpus: raise train_gpt.UserError(f"--corpus={corpus}: a name without - can be read in a log's name")
    if own := {"recipe", "seed", "name"} & {*knobs}:
        raise train_gpt.UserError(f"--{own.pop()} is a run's own here: rows name recipes, --seeds=1,2 seeds")
    knobs = train_gpt.parse([f"--{k}={v}" for k, v in knobs.items()])[2]
    size, *groups, wanted = *words, []
    steps = (config(size) | knobs)["steps"]
    for word in groups:
        start, plus, group = word.rpartition("+")
        first, at, step = start.partition("@")
        if start and not (step.isdigit() and 0 < int(step) < steps):
            raise train_gpt.UserError(f"{word}: not ROW@STEP+GROUP with a step from 1 to {steps - 1}")
        rows = GROUPS[group].split() if group in GROUPS else group.split(",")
        wanted += [start + plus + row for row in rows if not start or row != first] + [first] * bool(start)
    for row in wanted: train_gpt.known(row.split("+")[-1], quartet.RECIPES | KNOBS, f"unknown row {row!r}")
    return queue(size, wanted, [*map(int, seeds.split(","))], corpus, knobs, int(jobs))

if __name__ == "__main__":
    try: sys.exit(main(sys.argv[1:]))
    except (train_gpt.UserError, ValueError, OSError) as e: sys.exit(f"experiments.py: {e}")
