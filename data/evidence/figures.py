"""Tables and pictures of the runs that data/evidence/experiments.py keeps in data/evidence/results/, and of quantizers.

    python data/evidence/figures.py [--base=ROW]   tables; pictures too, into data/evidence/figures/, if matplotlib is there
    python data/evidence/figures.py runs/*         your own runs, going on or done: a table, curves as runs/curves.png

Losses are in nats: of validation, at the end; in training, the mean over the last tenth of the steps (each
20th is kept, of old runs none). A gap is to bf16 of the same seed, batches and last step, in 1e-3 nats, with
the 95% interval of its mean over seeds (Student's t). Speed and memory: of runs with a GPU alone (--jobs=1).
data/evidence/results/bias-*.jsonl, of data/evidence/bias.py --out, become a picture too.
"""
import json, math, os, re, statistics, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import quartet, train_gpt

RESULTS, FIGURES = HERE / "results", HERE / "figures"
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, the normal's is close
T = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131

def interval(values):
    """values, one a seed -> their mean, and half its 95% interval: NaN of one value."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1: return mean, math.nan
    return mean, (T[n - 2] if n - 2 < len(T) else 1.96) * statistics.stdev(values) / math.sqrt(n)

def read():
    """The logs of RESULTS -> {(size, corpus, start): {row: {seed: (validated, trained, result)}}}.

    validated, trained: losses by step. start: ROW-from-STEP, from which runs went on, or "". That ROW, which
    went on as it was, is among them.
    """
    runs = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        name = re.fullmatch(r"([^-]+)-([^-]+)-(?:([^-]+-from-\d+)-)?([^-]+)-(\d+)", path.stem)
        if not name: continue       # of data/evidence/bias.py
        size, corpus, start, row, seed = name.groups(default="")
        *records, result = map(json.loads, path.read_text().splitlines())
        result = {key: math.nan if value is None else value for key, value in result.items()}
        run = *({r["step"]: r[key] for r in records if key in r} for key in ("val_loss", "loss")), result
        runs.setdefault((size, corpus, start), {}).setdefault(row, {})[int(seed)] = run
    for (size, corpus, start), rows in runs.items():
        row, _, step = start.partition("-from-")
        for seed, (*losses, result) in runs.get((size, corpus, ""), {}).get(row, {}).items():
            late = ({s: loss for s, loss in by_step.items() if s > int(step)} for by_step in losses)
            if any(seed in v for v in rows.values()): rows.setdefault(row, {})[seed] = *late, result
    return runs

def training(validated, trained, result):
    """The mean loss of the last tenth of the steps; NaN without any."""
    last = [loss for step, loss in trained.items() if step > 0.9 * max(trained)]
    return statistics.mean(last or [math.nan])

def pairs(rows, row, base):
    """Runs of row and base, a pair a seed, if last validated at one step; training losses of common steps."""
    both = [(rows[row][seed], rows[base][seed]) for seed in rows.get(base, ()) if seed in rows[row]]
    both = [pair for pair in both if len({max(validated) for validated, *_ in pair if validated}) < 2]
    return [[(v, {s: t[s] for s in t if s in a[1] and s in b[1]}, r) for v, t, r in (a, b)] for a, b in both]

def paired(rows, row, base, value=lambda *run: run[-1]["val_loss"]):
    """Differences row - base in 1e-3 nats, one for each of their pairs that has that value."""
    found = (value(*run) - value(*other) for run, other in pairs(rows, row, base))
    return [1e3 * difference for difference in found if math.isfinite(difference)]

def speed(runs):
    """The result of the fastest of the runs, by seed, that had a GPU alone; {} if none had."""
    alone = (result for *_, result in runs.values() if result.get("jobs") == 1)
    return max(alone, key=lambda result: result["tokens_per_s"], default={})

def table(size, corpus, start, rows, base="quartet2"):
    """Print every row, by gap to bf16: seeds, loss, its deviation, that gap, to `base`; speed, memory."""
    print(f"\n{size}, {corpus}{', ' * bool(start)}{start.replace('-', ' ')}: differences in 1e-3 nats, by seed, +- 95%")
    print(f"row                  seeds  val loss deviates      gap to bf16{'to ' + base:>17}"
          "  bf16 in training  ktok/s   GiB")
    final = {row: [result["val_loss"] for *_, result in v.values()] for row, v in rows.items()}
    mean = {row: statistics.mean(losses) for row, losses in final.items()}
    for row in sorted(rows, key=lambda row: (interval(paired(rows, row, "bf16") or [math.inf]), mean[row])):
        found = (paired(rows, row, *what) for what in (("bf16",), (base,), ("bf16", training)))
        cells = ["{:9.2f} +-{:5.2f}".format(*interval(f)) if f else " " * 17 for f in found]
        if best := speed(rows[row]): cells += [f"{best['tokens_per_s'] / 1e3:8.0f}{best['peak_gib']:6.1f}"]
        deviation = f"{1e3 * statistics.stdev(final[row]):9.2f}" if len(final[row]) > 1 else " " * 9
        print(f"{row:20}{len(rows[row]):6}{mean[row]:10.4f}", deviation, *cells, sep="")

def binned(losses, base, width):
    """Differences losses - base, by step, in 1e-3 nats -> {the last of every `width` steps: their mean}."""
    bins, steps = {}, sorted(losses.keys() & base.keys())
    for step in steps:
        last = min(-(-step // width) * width, steps[-1])
        bins.setdefault(last, []).append(1e3 * (losses[step] - base[step]))
    return {step: statistics.mean(values) for step, values in bins.items()}

def nmse(name):
    """NMSE of a quantizer on N(0, 1), rotated if it takes that."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 1024, generator=g)
    R = quartet.rotation("rht128x2", g)[0] if name.startswith("ms_eden") else None
    y = quartet.rotate(x, R)
    return ((quartet.decode(quartet.QUANTIZERS[name](x, R, 1)) - y).square().sum() / y.square().sum()).item()

def draw(runs):
    """Pictures into FIGURES: of each table gaps to bf16, at the end and by step; speed; NMSE; gradients."""
    import matplotlib.pyplot as plt
    plt.switch_backend("svg"), FIGURES.mkdir(exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "q", "axes.spines.top": False, "axes.spines.right": False})
    def save(name):
        plt.tight_layout(), plt.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
        plt.close(), print(f"wrote {FIGURES / name}.svg")
    for key, rows in runs.items():
        name = "-".join(filter(None, key))
        gaps = {row: interval(found) for row in rows if row[:2] != "v_" and row != "bf16"
                for found in [paired(rows, row, "bf16")] if found}
        if not (order := sorted(gaps, key=gaps.get)): continue
        plt.figure(figsize=(6, 1 + 0.2 * len(order)))
        plt.barh(order, [gaps[row][0] for row in order], xerr=[gaps[row][1] for row in order])
        plt.gca().invert_yaxis(), plt.xlabel("loss gap to bf16 at the end, 1e-3 nats"), save(f"rows-{name}")
        _, axes = plt.subplots(1, 2, figsize=(8, 3))
        for row in [row for row in (*quartet.RECIPES, "quintet_x2") if row in gaps]:
            for ax, which, width in zip(axes, (1, 0), (100, 1)):
                found = [binned(run[which], base[which], width) for run, base in pairs(rows, row, "bf16")]
                found = [*filter(None, found)] or [{}]
                steps = sorted(set.intersection(*map(set, found)))
                curve = [interval([f[step] for f in found]) for step in steps]
                line, = ax.plot(steps, [gap for gap, _ in curve], label=row)
                ax.fill_between(steps, [g - h for g, h in curve], [g + h for g, h in curve],
                                color=line.get_color(), alpha=0.15, linewidth=0)
        for ax, what in zip(axes, ("training", "validation")): ax.set_title(what), ax.set_xlabel("step")
        axes[0].set_ylabel("loss gap to bf16, 1e-3 nats"), axes[0].legend(fontsize=7)
        save(f"gap-{name}")
        best = {row: found for row in quartet.RECIPES if (found := speed(rows.get(row, {})))}
        if not best: continue
        _, axes = plt.subplots(1, 2, figsize=(6, 2.2), sharey=True)
        for ax, field, unit in zip(axes, ("tokens_per_s", "peak_gib"), ("tokens/s", "peak memory, GiB")):
            ax.barh([*best], [result[field] for result in best.values()]), ax.set_xlabel(unit)
        axes[0].invert_yaxis(), save(f"speed-{name}")
    plt.figure(figsize=(6, 2.6))
    values = {name: 1e3 * nmse(name) for name in quartet.QUANTIZERS if name != "bf16"}
    plt.bar_label(plt.barh([*values], [*values.values()]), fmt=" %.3g", fontsize=7)
    plt.gca().invert_yaxis(), plt.xlabel("NMSE on N(0, 1), 1e-3"), save("nmse")
    for path in sorted(RESULTS.glob("bias-*.jsonl")):
        records = [r for r in map(json.loads, path.read_text().splitlines()) if r["operand"] == "both"]
        _, axes = plt.subplots(1, 2, figsize=(6, 3), sharey=True)
        for ax, gemm in zip(axes, ("dx", "dw")):
            for color, method in zip("C0 C1 C2 C3 C9 k".split(), dict.fromkeys(r["method"] for r in records)):
                for i, r in enumerate(r for r in records if (r["gemm"], r["method"]) == (gemm, method)):
                    ax.loglog(r["B"], [B * error / r["error"][0] for B, error in zip(r["B"], r["error"])],
                              color=color, linewidth=0.7, label="" if i else method)
            ax.set_title(f"{gemm} of each layer"), ax.set_xlabel("B, draws in the mean")
        axes[0].set_ylabel("B error(B) / error(1): 1 if unbiased"), axes[0].legend(fontsize=6)
        save(path.stem)

def follow(paths):
    """Print a table of runs of train_gpt.py, directories, also of comparisons; draw their losses and gaps.

    A gap, in 1e-3 nats, is to the bf16 run that is the same in all else, at the last validation of both.
    """
    logs = sorted({log for path in paths for log in Path(path).rglob("log.jsonl")})
    runs, free = {}, ("recipe", "backend", "name", "log_every", "save_every")
    for log in logs:
        records = train_gpt.records(log)
        config = next((r["config"] for r in records[::-1] if "config" in r), None)
        if not config: print(f"{log}: nothing yet, skipped"); continue
        by_step = lambda key: {r["step"]: r[key] for r in records if r.get(key)}
        runs[str(log.parent)] = config, by_step("loss"), by_step("val_loss"), by_step("ms")
    if not runs: sys.exit(f"figures.py: no log.jsonl in {', '.join(paths)}: it takes runs, or --base=ROW")
    same = {name: {k: v for k, v in run[0].items() if k not in free} for name, run in runs.items()}
    def gaps(name):
        like = [other for other in runs if same[other] == same[name] and runs[other][0]["recipe"] == "bf16"]
        return binned(runs[name][2], runs[like[0]][2] if like else {}, 1)
    width = max(map(len, runs))
    print(f"{'run':{width}}  {'recipe':10}{'step':>14}{'loss':>8}{'val loss':>10}{'gap':>7}{'ktok/s':>8}")
    for name, (c, losses, validated, ms) in runs.items():
        last = lambda by_step: [*by_step.values(), math.nan][max(0, len(by_step) - 1)]
        rate = c["tokens_per_step"] / statistics.median_high([*ms.values()] or [math.nan])
        print(f"{name:{width}}  {c['recipe']:10}{max(losses, default=0):7}/{c['steps']:<6}{last(losses):8.4f}"
              f"{last(validated):10.4f}{last(gaps(name)):7.1f}{rate:8.1f}")
    import matplotlib.pyplot as plt
    plt.switch_backend("agg")
    _, axes = plt.subplots(1, 3, figsize=(13, 4))
    for name, (_, losses, validated, _) in runs.items():
        for ax, curve in zip(axes, (losses, validated, gaps(name))): ax.plot(*zip(*curve.items()), label=name)
    for ax, title in zip(axes, ("training loss", "validation loss", "gap to bf16, 1e-3")):
        ax.set_title(title), ax.set_xlabel("step")
    axes[0].legend(fontsize=6), plt.tight_layout()
    target = Path(os.path.commonpath([Path(path).absolute().parent for path in paths])) / "curves.png"
    plt.savefig(target, dpi=120), print(f"wrote {target}")

def main(arguments=()):
    if {"-h", "--help"} & {*arguments}: return print(__doc__)
    try:
        if arguments and arguments[0][:7] != "--base=": return follow(arguments)
        if not (runs := read()): sys.exit(f"figures.py: nothing in {RESULTS}: run data/evidence/experiments.py first")
        base = arguments[0][7:] if arguments else "quartet2"
        names = sorted({row for rows in runs.values() for row in rows})
        if arguments and base not in names: sys.exit(f"figures.py: no row {base!r}: {', '.join(names)}")
        for name, rows in runs.items(): table(*name, rows, base)
        draw(runs)
    except (ImportError, OSError) as e: print(f"no pictures: {e} (they take matplotlib, and room to write)")

if __name__ == "__main__": main(sys.argv[1:])
