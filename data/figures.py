"""Tables and pictures of the runs that data/experiments.py keeps in data/results/, and of quantizers.

    python data/figures.py          tables; pictures too, into data/figures/, where matplotlib is installed
    python data/figures.py runs/*   your own runs, going on or done: a table, and curves into runs/curves.png

Losses are final validation losses in nats; a gap is to bf16 of the same seed, in 1e-3 nats, with the 95%
interval of its mean over seeds (Student's t). data/results/bias-*.jsonl, of data/bias.py --out, become a
picture too.
"""
import json, math, os, statistics, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch
import quartet

RESULTS, FIGURES = HERE / "results", HERE / "figures"
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, the normal's is close
T = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131

def interval(values):
    """values, one a seed -> their mean, and half its 95% interval: NaN of one value."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1: return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, (T[n - 2] if n - 2 < len(T) else 1.96) * deviation / math.sqrt(n)

def read():
    """The logs of RESULTS -> {(size, corpus, start): {row: {seed: (validation losses by step, result)}}}.

    start: ROW@STEP, from which runs went on, or "". That ROW, which went on as it was, is among them.
    """
    runs = {}
    for path in sorted(RESULTS.glob("*-*-*-*.jsonl")):
        size, corpus, row, seed = path.stem.rsplit("-", 3)
        start, _, row = row.rpartition("+")
        *records, result = map(json.loads, path.read_text().splitlines())
        losses = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
        runs.setdefault((size, corpus, start), {}).setdefault(row, {})[int(seed)] = losses, result
    for (size, corpus, start), rows in runs.items():
        row, _, step = start.partition("@")
        for seed, (losses, result) in runs.get((size, corpus, ""), {}).get(row, {}).items():
            late = {s: loss for s, loss in losses.items() if s > int(step)}
            if any(seed in v for v in rows.values()): rows.setdefault(row, {})[seed] = late, result
    return runs

def paired(rows, row, base, value=lambda losses, result: result["val_loss"]):
    """Differences row - base in 1e-3 nats, one for every seed that both have."""
    return [1e3 * (value(*rows[row][seed]) - value(*rows[base][seed]))
            for seed in rows.get(base, ()) if seed in rows[row]]

def table(size, corpus, start, rows):
    """Print every row, best first: seeds, loss and its deviation, gap to bf16 and to quartet2; speed, memory.

    And how far the loss at a quarter of the steps tells the last: the correlation over seeds.
    """
    print(f"\n{size}, {corpus}{', from ' * bool(start)}{start}: differences in 1e-3 nats, by seed, +- 95%")
    print(f"{'row':20}{'seeds':>6}{'val loss':>10}{'deviates':>9}{'gap to bf16':>17}{'to quartet2':>17}"
          + f"{'ktok/s':>8}{'GiB':>6}" * (not start))
    final = {row: [result["val_loss"] for _, result in v.values()] for row, v in rows.items()}
    mean = {row: statistics.mean(losses) for row, losses in final.items()}
    for row in sorted(rows, key=mean.get):
        cells = [f"{a:9.2f} +-{b:5.2f}" if found else " " * 17 for base in ("bf16", "quartet2")
                 for found in [paired(rows, row, base)] for a, b in [interval(found or [math.nan])]]
        speed, memory = (max(result[k] for _, result in rows[row].values())
                         for k in ("tokens_per_s", "peak_gib"))
        deviation = f"{1e3 * statistics.stdev(final[row]):9.2f}" if len(final[row]) > 1 else " " * 9
        print(f"{row:20}{len(rows[row]):6}{mean[row]:10.4f}{deviation}{''.join(cells)}"
              + f"{speed / 1e3:8.0f}{memory:6.1f}" * (not start))
    for row, runs in rows.items():
        quarter = [losses.get(max(losses, default=0) // 4) for losses, _ in runs.values()]
        if len(quarter) > 2 and None not in quarter:
            told = statistics.correlation(quarter, final[row])
            print(f"{row}: the loss at a quarter of the steps correlates with the last by {told:.2f}")

def nmse(name):
    """NMSE of a quantizer on N(0, 1), rotated if it takes that."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 1024, generator=g)
    R = quartet.rotation("rht128x2", g)[0] if name.startswith("ms_eden") else None
    y = quartet.rotate(x, R)
    return ((quartet.decode(quartet.QUANTIZERS[name](x, R, 1)) - y).square().sum() / y.square().sum()).item()

def draw(runs):
    """Pictures into FIGURES: of each table gaps to bf16, at the end and by step; speed; NMSE; gradients."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "q", "axes.spines.top": False, "axes.spines.right": False})
    import matplotlib.pyplot as plt
    FIGURES.mkdir(exist_ok=True)
    def save(name):
        plt.tight_layout()
        plt.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
        plt.close()
        print(f"wrote {FIGURES / name}.svg")
    for key, rows in runs.items():
        name, base = "-".join(filter(None, key)), rows.get("bf16", {})
        gaps = {row: paired(rows, row, "bf16") for row in rows if row != "bf16"}
        gaps = {row: interval(found) for row, found in gaps.items() if found}
        order = sorted(gaps, key=lambda row: gaps[row][0])
        plt.figure(figsize=(6, 1 + 0.2 * len(order)))
        plt.barh(order, [gaps[row][0] for row in order], xerr=[gaps[row][1] for row in order])
        plt.gca().invert_yaxis(), plt.xlabel("loss gap to bf16 at the end, 1e-3 nats")
        save(f"rows-{name}")
        plt.figure(figsize=(6, 3.5))
        for row in [row for row in gaps if row in quartet.RECIPES]:
            steps = sorted(set.intersection(*(set(run[0]) for run in [*rows[row].values(), *base.values()])))
            curve = [interval(paired(rows, row, "bf16", lambda losses, _: losses[step])) for step in steps]
            line, = plt.plot(steps, [g for g, _ in curve], label=row)
            if len(rows[row]) > 1:
                plt.fill_between(steps, [g - h for g, h in curve], [g + h for g, h in curve],
                                 color=line.get_color(), alpha=0.15, linewidth=0)
        plt.xlabel("step"), plt.ylabel("loss gap to bf16, 1e-3 nats"), plt.legend(fontsize=7), plt.ylim(0)
        save(f"gap-{name}")
        if key[2]: continue                     # speed is that of whole runs
        names = [row for row in quartet.RECIPES if row in rows]
        _, axes = plt.subplots(1, 2, figsize=(6, 2.2), sharey=True)
        for ax, key, unit in zip(axes, ("tokens_per_s", "peak_gib"), ("tokens/s", "peak memory, GiB")):
            ax.barh(names, [max(result[key] for _, result in rows[name].values()) for name in names])
            ax.set_xlabel(unit)
        axes[0].invert_yaxis()
        save(f"speed-{name}")
    names = [name for name in quartet.QUANTIZERS if name != "bf16"]
    plt.figure(figsize=(6, 2.6))
    plt.barh(names, values := [1e3 * nmse(name) for name in names])
    for i, v in enumerate(values): plt.text(v, i, f" {v:.1f}", va="center", fontsize=7)
    plt.gca().invert_yaxis(), plt.xlabel("NMSE on N(0, 1), 1e-3")
    save("nmse")
    for path in sorted(RESULTS.glob("bias-*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        _, axes = plt.subplots(1, 2, figsize=(6, 3), sharey=True)
        for ax, gemm in zip(axes, ("dx", "dw")):
            for color, method in enumerate(dict.fromkeys(r["method"] for r in records)):
                for i, r in enumerate(r for r in records if (r["gemm"], r["method"]) == (gemm, method)):
                    ax.loglog(r["B"], r["error"], color=f"C{color}", linewidth=0.7, label="" if i else method)
            ax.set_title(gemm), ax.set_xlabel("draws in the mean")
        axes[0].set_ylabel("squared error of the mean"), axes[0].legend(fontsize=6)
        save(path.stem)

def follow(paths):
    """Print a table of runs of train_gpt.py, directories, also of comparisons; draw their losses and gaps.

    A gap, in 1e-3 nats, is to the bf16 run that is the same in all else, at the last validation of both.
    """
    logs = sorted({log for path in paths for log in Path(path).rglob("log.jsonl")})
    if not logs: sys.exit(f"figures.py: no log.jsonl in {', '.join(paths)}: give directories that hold runs")
    runs, free = {}, ("recipe", "backend", "name", "log_every", "save_every")
    for log in logs:
        lines = log.read_text().splitlines(True)                # the last one may be half written
        records = [json.loads(line) for line in lines if line[-1] == "\n"]
        config = next(r["config"] for r in records[::-1] if "config" in r)
        runs[str(log.parent)] = (config, {r["step"]: r["loss"] for r in records if r.get("loss")},
                                 {r["step"]: r["val_loss"] for r in records if r.get("val_loss")},
                                 [r["ms"] for r in records if "ms" in r] or [math.nan])
    same = {name: {k: v for k, v in run[0].items() if k not in free} for name, run in runs.items()}
    def gaps(name):
        like = [other for other in runs if same[other] == same[name] and runs[other][0]["recipe"] == "bf16"]
        base, own = runs[like[0]][2] if like else {}, runs[name][2]
        return {step: 1e3 * (own[step] - base[step]) for step in own if step in base}
    width = max(map(len, runs))
    print(f"{'run':{width}}  {'recipe':10}{'step':>14}{'loss':>8}{'val loss':>10}{'gap':>7}{'ktok/s':>8}")
    for name, (c, losses, validated, ms) in runs.items():
        last = lambda by_step: [*by_step.values(), math.nan][max(0, len(by_step) - 1)]
        rate = c["tokens_per_step"] / sorted(ms)[len(ms) // 2]
        print(f"{name:{width}}  {c['recipe']:10}{max(losses, default=0):7}/{c['steps']:<6}{last(losses):8.4f}"
              f"{last(validated):10.4f}{last(gaps(name)):7.1f}{rate:8.1f}")
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    _, axes = plt.subplots(1, 3, figsize=(13, 4))
    for name, (_, losses, validated, _) in runs.items():
        for ax, curve in zip(axes, (losses, validated, gaps(name))): ax.plot(*zip(*curve.items()), label=name)
    for ax, title in zip(axes, ("training loss", "validation loss", "gap to bf16, 1e-3")):
        ax.set_title(title), ax.set_xlabel("step")
    axes[0].legend(fontsize=6), plt.tight_layout()
    target = Path(os.path.commonpath([Path(path).absolute().parent for path in paths])) / "curves.png"
    plt.savefig(target, dpi=120)
    print(f"wrote {target}")

def main(arguments=()):
    try:
        if arguments: return follow(arguments)
        runs = read()
        if not runs: sys.exit(f"figures.py: nothing in {RESULTS}: run data/experiments.py first")
        for name, rows in runs.items(): table(*name, rows)
        draw(runs)
    except ImportError as e: print(f"no pictures: {e} (pip install matplotlib)")

if __name__ == "__main__": main(sys.argv[1:])
