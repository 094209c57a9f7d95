"""Tables and pictures: of the runs that experiments.py keeps, of runs of your own, and of how it works.

    python data/evidence/figures.py [--base=ROW]     tables; and all pictures, into data/evidence/figures/
    python data/evidence/figures.py runs/*           your own runs, going on or done: a table; beside them
                                                     curves.png

Pictures take matplotlib. Losses are in nats: of validation, at the end; in training, the mean over the last
tenth of the steps (each 20th is kept). A gap is to bf16 of the same seed, batches and last step, in 1e-3
nats, with the 95% interval of its mean over seeds (Student's t). Speed and memory: of runs with a GPU alone
(--jobs=1). Tables have every log in data/evidence/results/; pictures have the rows that can be trained today.
Validated in bf16: the gap if neither forward pass is in 4 bits, which is what the weights have.
A second table tells what rows close of the base's gap (Fieller's interval), after which share of the steps
they have the last losses of the base and of bf16 (median over seeds, and in how many of these), and how far
above them they are in equal time. Between two validations losses are taken to fall evenly.
Last come the tests that experiments.py states for corpus `installed`.
data/evidence/results/bias-*.jsonl, of data/evidence/bias.py --out, become a picture too.
"""
import argparse
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import experiments
import quartet
import train_gpt

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
FIGURES = HERE / "figures"


# ---- 1. Runs and their differences -------------------------------------------------------------------------

class Run(NamedTuple):
    """One run."""
    validated: dict      # {step: validation loss}
    trained: dict        # {step: training loss}
    result: dict         # what it ended with: val_loss, tokens_per_s, ...
    header: dict = {}    # what it began with: config, parameters, ...


def read():
    """The logs of RESULTS -> {(size, corpus, start): {row: {seed: Run}}}.

    start: ROW-from-STEP, from which runs went on, or "". That ROW, which went on as it was, is among them.
    """
    runs = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        name = re.fullmatch(r"([^-]+)-([^-]+)-(?:([^-]+-from-\d+)-)?([^-]+)-(\d+)", path.stem)
        if not name:
            continue                                  # of bias.py
        size, corpus, start, row, seed = name.groups(default="")
        rows = runs.setdefault((size, corpus, start), {})
        rows.setdefault(row, {})[int(seed)] = read_run(path)

    for (size, corpus, start), rows in runs.items():
        row, _, step = start.partition("-from-")
        seeds = {seed for found in rows.values() for seed in found}
        for seed, run in runs.get((size, corpus, ""), {}).get(row, {}).items():
            if seed in seeds:
                rows.setdefault(row, {})[seed] = after(run, int(step))
    return runs


def read_run(path):
    """The Run in a log. What a log tells as null is NaN."""
    *records, result = map(json.loads, path.read_text().splitlines())
    result = {name: math.nan if value is None else value for name, value in result.items()}
    validated = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    trained = {r["step"]: r["loss"] for r in records if "loss" in r}
    header = records[0] if records else {}
    return Run(validated, trained, result, header)


def after(run, first):
    """A Run without its steps up to `first`."""
    validated = {step: loss for step, loss in run.validated.items() if step > first}
    trained = {step: loss for step, loss in run.trained.items() if step > first}
    return run._replace(validated=validated, trained=trained)


def final(run):
    """The validation loss at the end."""
    return run.result["val_loss"]


def in_bf16(run):
    """The validation loss at the end, of a forward pass in bf16; NaN of a run that was not validated so."""
    return run.result.get("val_loss_in_bf16", math.nan)


def training(run):
    """The mean training loss of the last tenth of the steps; NaN without any."""
    last = [loss for step, loss in run.trained.items() if step > 0.9 * max(run.trained)]
    return statistics.mean(last or [math.nan])


def pairs(rows, row, base):
    """{seed: [Run of row, of base]}, if last validated at one step; training losses of common steps."""
    found = {}
    for seed, other in rows.get(base, {}).items():
        run = rows.get(row, {}).get(seed)
        if run is None:
            continue
        if run.validated and other.validated and max(run.validated) != max(other.validated):
            continue
        common = run.trained.keys() & other.trained.keys()
        found[seed] = [r._replace(trained={step: r.trained[step] for step in r.trained if step in common})
                       for r in (run, other)]
    return found


def differences(rows, row, base, value=final):
    """{seed: row - base}, in 1e-3 nats, of each of their pairs that has that value."""
    found = {seed: 1e3 * (value(run) - value(other)) for seed, (run, other) in pairs(rows, row, base).items()}
    return {seed: difference for seed, difference in found.items() if math.isfinite(difference)}


def paired(rows, row, base, value=final):
    """`differences`, [row - base, ...]."""
    return list(differences(rows, row, base, value).values())


def interval(values):
    """values, one a seed -> their mean, and half its 95% interval: NaN of one value."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan
    return mean, quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)


def outside(t, freedom):
    """The probability that Student's t, of so many degrees of freedom, is not between -t and t.

    Abramowitz and Stegun, 26.7.3 and 26.7.4: a finite sum of powers of a cosine.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return 1 - inside


def quantile(freedom):
    """The t with `outside` it 5%: the 97.5% quantile of Student's t."""
    low, high = 0.0, 100.0
    for _ in range(60):
        t = (low + high) / 2
        if outside(t, freedom) > 0.05:
            low = t
        else:
            high = t
    return t


def p_value(values):
    """Of Student's test, on both sides, that the mean of values is 0. NaN of fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan
    error = statistics.stdev(values) / math.sqrt(n)
    mean = abs(statistics.mean(values))
    return outside(mean / error if error else math.inf, n - 1)


def holm(p):
    """The p of a family of tests, by Holm's correction. One that is NaN, not known yet, counts as 1."""
    # The smallest is multiplied by the number of tests, the next by one less, and so on; none gets smaller
    # than one before it.
    known = [1.0 if math.isnan(value) else value for value in p]
    corrected = [0.0] * len(known)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, (len(known) - rank) * known[index])
        corrected[index] = min(1.0, largest)
    return corrected


def share_closed(rows, row, base, value=final):
    """The share of base's gap to bf16 that row closes -> share, low, high: its 95% interval, Fieller's.

    Over seeds that have all three. Low and high are NaN of one seed, or if the gap may be 0.
    """
    gap = differences(rows, base, "bf16", value)
    less = differences(rows, base, row, value)
    seeds = sorted(gap.keys() & less.keys())
    gap = [gap[seed] for seed in seeds]
    less = [less[seed] for seed in seeds]
    mean = statistics.mean(gap)
    closed = statistics.mean(less)
    n = len(seeds)
    if n == 1:
        return closed / mean, math.nan, math.nan

    # All shares s for which Student's test of the mean of less - s gap against 0 does not reject:
    # a s^2 - 2 b s + c <= 0.
    t2 = quantile(n - 1) ** 2 / n
    a = mean**2 - t2 * statistics.variance(gap)
    b = mean * closed - t2 * statistics.covariance(gap, less)
    c = closed**2 - t2 * statistics.variance(less)
    if mean <= 0 or a <= 0:
        return closed / mean, math.nan, math.nan
    root = math.sqrt(b * b - a * c)
    return closed / mean, (b - root) / a, (b + root) / a


def step_of(run, loss):
    """The step at which a Run's validation loss falls to `loss`; infinite if it stays above.

    Between validations it is taken to fall evenly.
    """
    before = None
    for step, found in sorted(run.validated.items()):
        if found <= loss:
            if before is None:
                return step
            earlier, higher = before
            return earlier + (step - earlier) * (higher - loss) / (higher - found)
        before = step, found
    return math.inf


def loss_at(run, step):
    """The validation loss of a Run at a step, between validations in proportion; NaN before the first."""
    steps = sorted(run.validated)
    for earlier, later in zip(steps, steps[1:]):
        if earlier <= step <= later:
            share = (step - earlier) / (later - earlier)
            return (1 - share) * run.validated[earlier] + share * run.validated[later]
    return math.nan


def binned(losses, base, width):
    """Differences losses - base, by step, in 1e-3 nats -> {the last of every `width` steps: their mean}."""
    bins = {}
    steps = sorted(losses.keys() & base.keys())
    for step in steps:
        last = min(-(-step // width) * width, steps[-1])
        bins.setdefault(last, []).append(1e3 * (losses[step] - base[step]))
    return {step: statistics.mean(values) for step, values in bins.items()}


def fastest(runs):
    """The result of the fastest of runs, {seed: Run}, that had a GPU alone; {} if none had."""
    alone = [run.result for run in runs.values() if run.result.get("jobs") == 1]
    return max(alone, key=lambda result: result["tokens_per_s"], default={})


# ---- 2. Tables ---------------------------------------------------------------------------------------------

def table(size, corpus, start, rows, base="quartet2"):
    """Print every row, by gap to bf16: seeds, loss, its deviation, that gap, to `base`; speed, memory."""
    title = ", ".join(filter(None, [size, corpus, start.replace("-", " ")]))
    print(f"\n{title}: differences in 1e-3 nats, by seed, +- 95%")
    print(f"row                  seeds  val loss deviates      gap to bf16{'to ' + base:>17}"
          "  bf16 in training  validated in bf16  ktok/s   GiB")

    losses = {row: [final(run) for run in runs.values()] for row, runs in rows.items()}
    mean = {row: statistics.mean(values) for row, values in losses.items()}
    gap = {row: interval(paired(rows, row, "bf16") or [math.inf]) for row in rows}
    for row in sorted(rows, key=lambda row: (gap[row], mean[row])):
        deviation = " " * 9
        if len(losses[row]) > 1:
            deviation = f"{1e3 * statistics.stdev(losses[row]):9.2f}"
        cells = [
            cell(paired(rows, row, "bf16")),
            cell(paired(rows, row, base)),
            cell(paired(rows, row, "bf16", training)),
            "  " + cell(paired(rows, row, "bf16", in_bf16)),
        ]
        best = fastest(rows[row])
        if best:
            cells.append(f"{best['tokens_per_s'] / 1e3:8.0f}{best['peak_gib']:6.1f}")
        print(f"{row:20}{len(rows[row]):6}{mean[row]:10.4f}", deviation, *cells, sep="")


def cell(differences):
    """Mean and interval of differences, or blanks without any."""
    if not differences:
        return " " * 17
    return "{:9.2f} +-{:5.2f}".format(*interval(differences))


def progress(start, rows, base="quartet2"):
    """Print what each row closes of base's gap to bf16; how soon it is where base and bf16 end; and where it
    is when they end, at the speeds of `fastest`, of rows that train in one way. Nothing if no row has two
    seeds in common with both.
    """
    gap = differences(rows, base, "bf16")
    shown = [row for row in rows if row not in (base, "bf16")
             and len(gap.keys() & differences(rows, row, base).keys()) > 1]
    if not shown:
        return
    print(f"{'':20}{'share of that':>20}{'steps to the last loss of':>38}{'above it, in the time of':>36}\n"
          f"{'':20}{'gap closed':>20}{base:>20}{'bf16':>18}{base:>18}{'bf16':>18}")
    for row in ("bf16", base, *shown):
        closed = ""
        if row in shown:
            share, low, high = share_closed(rows, row, base)
            closed = f"{share:.0%}"
            if not math.isnan(low):
                closed += f", {low:.0%} to {high:.0%}"
        cells = [f"{row:20}{closed:>20}"]
        if any(map(ends_otherwise, rows[row].values())):
            print(*cells)
            continue
        cells += [f"{steps_to(rows, row, goal):>{width}}" for goal, width in ((base, 20), ("bf16", 18))]
        if not start:
            cells += [f"{cell(in_time(rows, row, goal)):>18}" for goal in (base, "bf16")]
        print(*cells, sep="")


def ends_otherwise(run):
    """Whether its last steps train in another way: at another speed, and losses may jump there."""
    return any(value for knob, value in run.header.get("config", {}).items() if knob.endswith("_end"))


def steps_to(rows, row, goal):
    """After which share of the steps a row has another's last loss: the median, and in how many seeds."""
    shares = [step_of(run, final(other)) / max(run.validated)
              for run, other in pairs(rows, row, goal).values() if run.validated]
    if row == goal or not shares:
        return ""
    reached = sum(map(math.isfinite, shares))
    share = statistics.median(shares)
    when = f"{share:.0%}" if math.isfinite(share) else "never"
    return f"{when} ({reached} of {len(shares)})"


def in_time(rows, row, goal):
    """Differences, in 1e-3 nats, of a row on its way to the last loss of a faster one, when that one ends."""
    speeds = [fastest(rows.get(name, {})).get("tokens_per_s", math.nan) for name in (row, goal)]
    share = speeds[0] / speeds[1]
    if row == goal or not share <= 1:
        return []
    found = [loss_at(run, share * max(run.validated)) - final(other)
             for run, other in pairs(rows, row, goal).values() if run.validated]
    return [1e3 * difference for difference in found if math.isfinite(difference)]


class Test(NamedTuple):
    """A test of quintet's minus another row's last validation loss, as experiments.py states it."""
    size: str
    start: str         # ROW-from-STEP, from which both go on, or ""
    other: str
    seeds: range


PRIMARY = Test("10m", "", "quartet2", range(31, 55))
SECONDARY = (
    Test("30m", "", "quartet2", range(31, 36)),
    Test("30m", "quartet2-from-152", "quartet2", range(41, 47)),
    Test("10m", "", "quartet2_dampen", range(31, 39)),
    Test("10m", "", "quartet2_cage", range(31, 39)),
)


def verdicts(runs):
    """Print the tests of the comparison that settles, with p by Student's test and by Holm's correction.

    runs: of read(). Before all of a test's seeds are there, what is printed is no verdict.
    """
    found = []
    for test in (PRIMARY, *SECONDARY):
        rows = runs.get((test.size, "installed", test.start), {})
        by_seed = differences(rows, "quintet", test.other)
        found.append([by_seed[seed] for seed in test.seeds if seed in by_seed])
    primary, *secondary = [p_value(values) for values in found]

    print("\nthe comparison that settles: quintet in validation, in 1e-3 nats, +- 95%")
    print(f"{'minus':40}{'seeds':>9}{'difference':>17}{'p':>9}{'by Holm':>9}")
    corrected = [primary, *holm(secondary)]
    for test, values, p, by_holm in zip((PRIMARY, *SECONDARY), found, [primary, *secondary], corrected):
        name = f"{test.other}, {test.size} {test.start.replace('-', ' ')}"
        cells = [f"{name:40}{len(values):3} of{len(test.seeds):3}"]
        if len(values) > 1:
            cells.append(f"{cell(values)}{p:9.2g}")
            cells.append(f"{by_holm:9.2g}" if test in SECONDARY else "")
        print(*cells, sep="")


def half_closed(runs):
    """Print the test of half of the gap, as experiments.py states it, if any of its runs are there."""
    rows = {row: {seed: run for seed, run in of_row.items() if seed in PRIMARY.seeds}
            for row, of_row in runs.get((PRIMARY.size, "installed", ""), {}).items()}
    seeds = differences(rows, "quintet_two_end", "quartet2").keys() & rows.get("bf16", {}).keys()
    if seeds:
        share, low, high = share_closed(rows, "quintet_two_end", "quartet2")
        verdict = "yes" if share >= 0.5 and low > 0.4 else "no"
        if len(seeds) < len(PRIMARY.seeds):
            verdict = "not all seeds have run"
        print(f"\nquintet_two_end, {len(seeds)} of {len(PRIMARY.seeds)} seeds: closes {share:.0%} of "
              f"quartet2's gap, {low:.0%} to {high:.0%}")
        print(f"half of it is 50%, with a lower end above 40%: {verdict}")


# ---- 3. What pictures share --------------------------------------------------------------------------------

# What rows are called in pictures. A row that is not here keeps its name. To dampen w, as quintet does too,
# is CAGE's idea, arXiv:2510.18784; the ramp that is called ours is 10 (t/T)^4.
NAMES = {
    "rtn": "round to nearest",
    "nvidia": "NVIDIA's recipe",
    "four_six": "Four Over Six",
    "tetrajet2": "TetraJet-v2",
    "quartet2": "Quartet II",
    "quintet": "quintet (ours)",
    "quintet_x2": "quintet with two rounds of rotation",
    "quintet_two": "quintet, inputs in two terms",
    "quintet_two_end": "quintet, last 10% of steps: inputs in two terms",
    "quartet2_two_end": "Quartet II, last 10% of steps: inputs in two terms",
    "fwd_rtn": "forward only: RTN",
    "fwd_four_six": "forward only: 4/6",
    "fwd_rtn_16x16": "forward only: RTN, w in 16x16 blocks",
    "fwd_four_six_16x16": "forward only: 4/6, w in 16x16 blocks",
    "fwd_search": "forward only: scale search",
    "fwd_search_dampen": "forward only: scale search, w dampened",
    "x_four_six": "forward only, x only: 4/6",
    "w_four_six": "forward only, w only: 4/6",
    "x_search": "forward only, x only: scale search",
    "w_search": "forward only, w only: scale search",
    "bwd_sr": "backward only: SR",
    "bwd_sr_46": "backward only: SR with 4/6",
    "bwd_eden": "backward only: MS-EDEN",
    "bwd_eden_x2": "backward only: MS-EDEN, two rounds",
    "bwd_eden_46": "backward only: MS-EDEN with 4/6, two rounds",
    "bwd_four_six": "backward only: 4/6, two rounds",
    "quartet2_rtn": "Quartet II, forward by RTN",
    "quartet2_search": "Quartet II, forward by scale search",
    "quartet2_x2": "Quartet II, two rounds of rotation",
    "quartet2_46": "Quartet II, two rounds, MS-EDEN with 4/6",
    "quartet2_dy": "Quartet II, two rounds, MS-EDEN for dy only",
    "quartet2_dampen": "Quartet II, w dampened by our ramp",
    "quartet2_cage": "Quartet II, w dampened by CAGE's ramp",
    "quartet2_original": "Quartet II, backward from bf16 w and x",
    "quartet2_end": "Quartet II, last 10% of steps in bf16",
    "quartet2_last": "Quartet II, last block in bf16",
}

# Colours that colour-blind readers can tell apart: Okabe and Ito's.
BLACK = "#000000"
GREY = "#666666"
BLUE = "#0072B2"
ORANGE = "#E69F00"
RED = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
BROWN = "#8C3B00"

# Of whole recipes, in the order of legends.
COLORS = {"rtn": GREY, "nvidia": GREEN, "four_six": ORANGE, "tetrajet2": PURPLE, "quartet2": BLUE,
          "quintet": RED, "quintet_x2": BROWN}


def pyplot():
    """matplotlib.pyplot, set up: large letters, no frames, the same file each time."""
    import matplotlib.pyplot as plt
    plt.switch_backend("agg")
    plt.rcParams.update({
        "svg.hashsalt": "quartet",
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.dpi": 120,
        "mathtext.fontset": "cm",
    })
    return plt


def save(plt, name):
    """Write the picture to FIGURES / name, which ends in .svg or .png, and close it."""
    # No date and no version: a picture that has not changed leaves no difference.
    unwanted = {"Date": None} if name.endswith(".svg") else {"Software": None}
    FIGURES.mkdir(exist_ok=True)
    plt.savefig(FIGURES / name, metadata=unwanted)
    plt.close()
    print(f"wrote {FIGURES / name}")


def row_gaps(rows):
    """Rows that can be trained today -> {row: (mean gap to bf16, half its interval)}, the smallest first."""
    today = quartet.RECIPES | experiments.ROWS | experiments.KNOBS
    gaps = {}
    for row in rows:
        found = paired(rows, row, "bf16")
        if row in today and row != "bf16" and found:
            gaps[row] = interval(found)
    return dict(sorted(gaps.items(), key=lambda item: item[1]))


# ---- 4. Pictures of runs -----------------------------------------------------------------------------------

def draw_rows(plt, key, rows):
    """rows-*.svg: the gap of every row at the end."""
    gaps = row_gaps(rows)
    plt.figure(figsize=(7.5, 1 + 0.27 * len(gaps)))
    plt.barh(
        [NAMES.get(row, row) for row in gaps],
        [mean for mean, _ in gaps.values()],
        xerr=[half for _, half in gaps.values()],
        color=[COLORS.get(row, SKY) for row in gaps],
        height=0.7,
        error_kw=dict(elinewidth=1, capsize=2),
    )
    plt.margins(y=0.01)
    plt.gca().invert_yaxis()
    plt.xlabel("loss gap to bf16 at the end, 1e-3 nats")
    plt.tight_layout()
    save(plt, f"rows-{key}.svg")


def draw_gaps(plt, key, rows):
    """gap-*.svg: the gaps of whole recipes by step, in training and in validation."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.4))
    gaps = row_gaps(rows)
    for ax, title, field, width in (
        (axes[0], "training", "trained", 100),
        (axes[1], "validation", "validated", 1),
    ):
        for row in COLORS | quartet.RECIPES:
            if row in gaps:
                curves = [binned(getattr(run, field), getattr(base, field), width)
                          for run, base in pairs(rows, row, "bf16").values()]
                draw_curve(ax, [curve for curve in curves if curve], row)
        ax.set_title(title)
        ax.set_xlabel("step")
    axes[0].set_ylabel("loss gap to bf16, 1e-3 nats")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="upper center", ncols=3)
    plt.tight_layout(rect=(0, 0, 1, 1 - 0.08 * math.ceil(len(axes[1].lines) / 3)))
    save(plt, f"gap-{key}.svg")


def draw_curve(ax, curves, row):
    """The mean of a row's curves, [{step: value}, ...], at their common steps; its interval as a band."""
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    means = []
    halves = []
    for step in steps:
        mean, half = interval([curve[step] for curve in curves])
        means.append(mean)
        halves.append(half)
    low = [mean - half for mean, half in zip(means, halves)]
    high = [mean + half for mean, half in zip(means, halves)]
    line, = ax.plot(steps, means, label=NAMES.get(row, row), color=COLORS.get(row))
    ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_speed(plt, key, rows):
    """speed-*.svg: speed and memory of recipes; nothing if no run had a GPU alone."""
    best = {row: fastest(rows.get(row, {})) for row in quartet.RECIPES}
    best = {NAMES.get(row, row): result for row, result in best.items() if result}
    if not best:
        return
    _, axes = plt.subplots(1, 2, figsize=(7.5, 0.9 + 0.28 * len(best)), sharey=True)
    speeds = axes[0].barh(list(best), [result["tokens_per_s"] / 1e3 for result in best.values()], color=BLUE)
    memories = axes[1].barh(list(best), [result["peak_gib"] for result in best.values()], color=SKY)
    axes[0].bar_label(speeds, fmt=" %.0f")
    axes[1].bar_label(memories, fmt=" %.1f")
    axes[0].set_xlabel("thousand tokens/s")
    axes[1].set_xlabel("peak memory, GiB")
    for ax in axes:
        ax.margins(x=0.2)
    axes[0].invert_yaxis()
    plt.tight_layout()
    save(plt, f"speed-{key}.svg")


# Panels of README's first picture: of which runs, by which loss, and what is to be said of them.
PANELS = {
    ("30m", "novels", "quartet2-from-700"): (training, "novels,\nin training, from 24% of the steps on"),
    ("10m", "installed", ""): (final, "Python source,\nin validation, from the first step on"),
}


def draw_gap(plt, runs):
    """gap.png, README's first picture: what each recipe loses against bf16, in those of PANELS that ran."""
    panels = {key: said for key, said in PANELS.items() if row_gaps(runs.get(key, {}))}
    if not panels:
        return
    recipes = [row for row in quartet.RECIPES if any(row in runs[key] for key in panels) and row != "bf16"]
    # On novels, quintet had two rounds of rotation, as README says.
    stand_in = {"quintet": "quintet_x2"}
    size = 7.5, 1.5 + 0.38 * len(recipes)
    _, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, (key, (value, said)) in zip(axes[0], panels.items()):
        rows = runs[key]
        gaps_of = {}
        for recipe in recipes:
            row = recipe if recipe in rows else stand_in.get(recipe)
            gaps_of[recipe] = paired(rows, row, "bf16", value) if row in rows else []
        most = max(map(len, gaps_of.values()))
        seeds = set()
        for y, (recipe, gaps) in enumerate(gaps_of.items()):
            # Few seeds beside many would mislead: seeds differ by more than recipes.
            if not gaps or len(gaps) < most / 4:
                said_instead = f" {len(gaps)} of {most} seeds" if gaps else " not run yet"
                ax.text(0, y, said_instead, va="center", color=GREY)
                continue
            seeds.add(len(gaps))
            mean, half = interval(gaps)
            ax.barh(y, mean, xerr=half, height=0.6, color=COLORS.get(recipe, SKY),
                    error_kw=dict(elinewidth=1.5, capsize=4))
            number = f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"
            end = mean + (0 if math.isnan(half) else half)
            ax.annotate(number, (end, y), (5, 0), textcoords="offset points", va="center")

        # What was trained, as the logs tell
        run = next(iter(rows["bf16"].values()))
        parameters = run.header["parameters"].split(", ")[-1].split()[0]
        how_many = " to ".join(str(number) for number in sorted({min(seeds), max(seeds)}))
        ax.set_title(f"{int(parameters.replace(',', '')) / 1e6:.1f}M parameters, {said}\n"
                     f"{how_many} seeds", fontsize=10.5)
        ax.set_xlabel("loss above bf16's, 1e-3 nats a byte")
        ax.margins(x=0.25)
    axes[0, 0].set_yticks(range(len(recipes)), [NAMES.get(row, row) for row in recipes])
    axes[0, 0].invert_yaxis()
    plt.tight_layout()
    save(plt, "gap.png")


# ---- 5. Pictures of quantizers -----------------------------------------------------------------------------

def nmse(name):
    """NMSE of a quantizer on N(0, 1), rotated if it takes that."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 1024, generator=g)
    R = None
    if name.startswith("ms_eden"):
        R, _ = quartet.rotation("rht128x2", g)
    y = quartet.rotate(x, R)
    found = quartet.decode(quartet.QUANTIZERS[name](x, R, 1))
    return ((found - y).square().sum() / y.square().sum()).item()


def draw_nmse(plt):
    """nmse.svg: the error of every quantizer."""
    names = {
        "rtn": "round to nearest (RTN)",
        "rtn_16x16": "RTN, 16x16 blocks",
        "four_six": "Four Over Six (4/6)",
        "four_six_16x16": "4/6, 16x16 blocks",
        "scale_search": "scale search",
        "scale_search_16x16": "scale search, 16x16 blocks",
        "sr": "stochastic rounding (SR)",
        "ms_eden": "MS-EDEN",
        "ms_eden_46": "MS-EDEN with 4/6",
    }
    values = {name: 1e3 * nmse(name) for name in quartet.QUANTIZERS if name != "bf16"}
    plt.figure(figsize=(7.5, 3.2))
    bars = plt.barh(
        [names.get(name, name) for name in values],
        list(values.values()),
        # What draws noise is unbiased; the others are not.
        color=[ORANGE if name in quartet.NOISY else BLUE for name in values],
    )
    plt.bar_label(bars, fmt=" %.1f")
    plt.gca().invert_yaxis()
    plt.xlabel("squared error over squared values, N(0, 1), 1e-3 (orange: draws noise)")
    plt.tight_layout()
    save(plt, "nmse.svg")


METHODS = {    # of bias.py: what they are called, their colour
    "sr": ("SR", BLUE),
    "sr rht128": ("SR, rotated", SKY),
    "sr 4/6": ("SR with 4/6, rotated", ORANGE),
    "ms_eden": ("MS-EDEN, one round", RED),
    "ms_eden x2": ("MS-EDEN, two rounds", GREEN),
    "ms_eden 4/6": ("MS-EDEN with 4/6, two rounds", BLACK),
}


def draw_bias(plt, path):
    """bias-*.svg: how the mean of B quantized gradients converges, a line a layer."""
    records = [r for r in map(json.loads, path.read_text().splitlines()) if r["operand"] == "both"]
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 4.4), sharey=True)
    lines = {}
    for ax, gemm in zip(axes, ("dx", "dw")):
        for r in records:
            if r["gemm"] == gemm:
                label, color = METHODS.get(r["method"], (r["method"], GREY))
                scaled = [B * error / r["error"][0] for B, error in zip(r["B"], r["error"])]
                lines[label] = ax.loglog(r["B"], scaled, color=color, linewidth=0.8)
        ax.set_title(f"{gemm}, a line for each layer")
        ax.set_xlabel("B, draws in the mean")
    axes[0].set_ylabel("B error(B) / error(1): 1 if unbiased")
    shown = [line for line, *_ in lines.values()]
    figure.legend(shown, list(lines), loc="upper center", ncols=3, fontsize=10)
    plt.tight_layout(rect=(0, 0, 1, 0.87))
    save(plt, f"{path.stem}.svg")


# ---- 6. Pictures of how it works ---------------------------------------------------------------------------

def draw_gemms(plt):
    """gemms.png: the three GEMMs of a linear layer by quartet2, and which quantizer each operand gets."""
    _, ax = plt.subplots(figsize=(7.5, 6.4))
    plt.subplots_adjust(0, 0, 1, 1)
    ax.set_xlim(0, 150)
    ax.set_ylim(0, 128)
    ax.axis("off")

    # Places of columns and rows
    dy = 51
    x = 81
    w = 111
    result = 138
    source = 105
    forward = 78
    dgrad = 44
    wgrad = 12
    pale_blue = "#CFE6F5"
    pale_orange = "#FBE0B0"
    line = dict(arrowstyle="-|>", color=BLACK, shrinkA=0, shrinkB=0)

    def text(column, row, words, size=9.5, **how):
        ax.text(column, row, words, va="center", fontsize=size, linespacing=1.2, **how)

    def box(column, row, name, what, color="white"):
        frame = plt.matplotlib.patches.FancyBboxPatch(
            (column - 11, row - 7), 22, 14, "round,pad=0,rounding_size=2", facecolor=color, edgecolor=GREY)
        ax.add_patch(frame)
        text(column, row + 2, name, 15, ha="center")
        text(column, row - 4, what, 9, ha="center")

    def arrow(column, top, bottom, words):
        """From one box down to another, with what happens on the way."""
        ax.annotate("", (column, bottom + 7.3), (column, top - 7.3), arrowprops=line)
        text(column + 2, bottom + 14, words)

    def gemm(row, equation, words, first, times, second, name, shape):
        """What is left of a row of boxes, between them, and to their right."""
        text(2, row + 4.5, equation, 17)
        text(2, row - 4, words, color=GREY)
        text((first + times) / 2, row, "×", 17, ha="center")
        text((second + result) / 2, row, "=", 17, ha="center")
        box(result, row, name, f"bf16 {shape}")

    text(2, 122.5, "A linear layer by Quartet II: three GEMMs in NVFP4", 14)
    text(2, 117, "Coloured: NVFP4, in blocks of 16 along the axis that its GEMM sums over", color=GREY)
    text(2, source, "operands", color=GREY)
    box(dy, source, "$dy$", "bf16 (M, N)")
    box(x, source, "$x$", "bf16 (M, K)")
    box(w, source, "$w$", "bf16 (N, K)")

    gemm(forward, r"$y = x\,w^T$", "forward,\nsums over K", x, w, w, "$y$", "(M, N)")
    arrow(x, source, forward, "Four Over Six")
    arrow(w, source, forward, "Four Over Six")
    box(x, forward, "$x$", "blocks along K", pale_blue)
    box(w, forward, "$w$", "blocks along K", pale_blue)

    gemm(dgrad, r"$dx = dy\,w$", "backward, sums over N;\nthe rotation R cancels", dy, x, w, "$dx$", "(M, K)")
    arrow(dy, source, dgrad, "rotate,\nMS-EDEN")
    arrow(w, forward, dgrad, "requantize: decode,\ntranspose, rotate,\nMS-EDEN")
    box(dy, dgrad, r"$dy\,R$", "blocks along N", pale_orange)
    box(w, dgrad, "$w^T R$", "blocks along N", pale_orange)

    gemm(wgrad, "$dw = dy^T x$", "backward, sums over M;\nanother R cancels", dy, x, w, "$dw$", "(N, K)")
    arrow(x, forward, wgrad, "requantize: decode,\ntranspose, rotate,\nMS-EDEN")
    box(dy, wgrad, "$dy^T R$", "blocks along M", pale_orange)
    box(x, wgrad, "$x^T R$", "blocks along M", pale_orange)

    # dy goes to dw past dx.
    ax.plot([dy - 11, dy - 14, dy - 14], [source, source, wgrad], color=BLACK, linewidth=1)
    ax.annotate("", (dy - 11, wgrad), (dy - 14, wgrad), arrowprops=line)
    text(dy - 12, wgrad + 13, "transpose, rotate,\nMS-EDEN")
    save(plt, "gemms.png")


def draw_block(plt):
    """block.png: one block of 16 values, rounded with its amax at 6 and with its amax at 4."""
    g = torch.Generator().manual_seed(2318)           # a block for which 4 is clearly better
    b, amax, unit = quartet.blocks(torch.randn(1, 16, generator=g))
    b = b.abs() * unit                                # the grid is the same on both sides of zero
    grid = quartet.unpack(torch.arange(8, dtype=torch.uint8))[::2]

    _, axes = plt.subplots(2, 1, figsize=(7.5, 4.6), sharex=True)
    for ax, top, color, end in zip(axes, (6.0, 4.0), (BLUE, RED), ("", ". Four Over Six takes this")):
        # As four_six does it, for one of the two
        s = quartet.round_scale(quartet.divide_by(amax, top)) * unit
        q = quartet.e2m1(quartet.ratio(b, s))
        error = quartet.block_sum((q * s - b).square()).item()

        # The grid, from 0 to 6 times the scale
        points = (grid * s.item()).tolist()
        ax.hlines(0, 0, points[-1], color=BLACK, linewidth=1)
        ax.vlines(points, -0.1, 0.1, color=BLACK, linewidth=1.5)
        for point, value in zip(points, grid):
            ax.text(point, -0.17, f"{value:g}", ha="center", va="top")

        # Values, and where they go
        for value, rounded in zip(b.flatten().tolist(), (q * s).flatten().tolist()):
            ax.plot([value, rounded], [0.8, 0], color=color, linewidth=1)
            ax.plot(value, 0.8, "o", color=color, markersize=7, markeredgecolor="white")
        ax.set_title(f"largest value at {top:g}: squared error {error:.3f}{end}", color=color)
        ax.set_ylim(-0.5, 1)
        ax.axis("off")

    # Words beside each line
    *_, four, six = (grid * (amax * unit / 6).item()).tolist()
    words = dict(color=GREY, fontsize=10, va="center")
    axes[0].text((four + six) / 2, -0.23, "nothing between", ha="center", **words)
    axes[0].text(six * 1.05, 0.8, "16 values, without signs", **words)
    axes[0].text(six * 1.05, 0, "4-bit grid times block scale", **words)
    axes[1].text(six * 1.05, 0.8, "the same values, on a grid\n1.5 times as wide", **words)
    axes[1].text(six * 1.5, 0.25, "not used", ha="center", **words)
    plt.tight_layout()
    save(plt, "block.png")


DRAWS = 4096


def distances(rounds, draws, repeats=8):
    """How far the mean of B draws of MS-EDEN is from the exact value, over its norm -> {B: distance}.

    The value: a group of 128 from N(0, 1), of which one is 100 instead. rounds: of rotation. B: 1, 2, 4, ...,
    draws, a power of two. A distance is the root mean square over draws * repeats / B means.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(quartet.GROUP, generator=g)
    x[0] = 100.0

    # All draws at once: a row is x after a rotation of its own, signs and sums in turn.
    H = quartet.hadamard(quartet.GROUP, "cpu")
    signs = torch.randint(0, 2, (rounds, draws * repeats, quartet.GROUP), generator=g) * 2.0 - 1.0
    v = x
    for d in signs:
        v = quartet.rotate(v * d, H)
    v = quartet.decode(quartet.ms_eden(v, None, seed=0))
    for d in signs.flip(0):
        v = quartet.rotate(v, H.T) * d / quartet.GROUP
    errors = v - x

    found = {}
    B = 1
    while B <= draws:
        means = errors.unflatten(0, (-1, B)).mean(1)
        found[B] = (means.square().sum(-1).mean().sqrt() / x.norm()).item()
        B *= 2
    return found


def draw_rounds(plt):
    """rounds.png: what averaging leaves of the error of MS-EDEN, after one, two and three rounds."""
    _, ax = plt.subplots(figsize=(7.5, 4.8))
    lines = {
        1: ("one round of rotation: levels off, biased", RED, "o-"),
        2: ("two rounds", BLUE, "s-"),
        3: ("three rounds", GREEN, "^--"),
    }
    for rounds, (label, color, style) in lines.items():
        found = distances(rounds, DRAWS)
        ax.loglog(list(found), list(found.values()), style, color=color, label=label, markersize=6)
    unbiased = [found[1] / math.sqrt(B) for B in found]
    label = r"falls as $1/\sqrt{B}$: unbiased"
    ax.loglog(list(found), unbiased, color=GREY, alpha=0.3, linewidth=7, label=label)

    ax.set_title("MS-EDEN of 128 values: one is 100, the others ordinary noise")
    ax.set_xlabel("B, draws in the mean")
    ax.set_ylabel("distance of the mean from the exact\nvalue, over its norm")
    ticks = [B for B in found if B in (1, 4, 16, 64, 256, 1024, 4096)]
    ax.set_xticks(ticks, [str(B) for B in ticks])
    ax.set_yticks([0.1, 0.01, 0.001], ["10%", "1%", "0.1%"])
    ax.minorticks_off()
    ax.legend(loc="lower left")
    plt.tight_layout()
    save(plt, "rounds.png")


def draw(runs):
    """All pictures, into FIGURES."""
    plt = pyplot()
    for key, rows in runs.items():
        if row_gaps(rows):
            name = "-".join(filter(None, key))
            draw_rows(plt, name, rows)
            draw_gaps(plt, name, rows)
            draw_speed(plt, name, rows)
    draw_nmse(plt)
    for path in sorted(RESULTS.glob("bias-*.jsonl")):
        draw_bias(plt, path)
    draw_gemms(plt)
    draw_block(plt)
    draw_rounds(plt)
    draw_gap(plt, runs)


# ---- 7. Your own runs --------------------------------------------------------------------------------------

NEEDED = dict(recipe=str, steps=int, tokens_per_step=int)      # of a config


class Own(NamedTuple):
    """A run of train_gpt.py, going on or done."""
    config: dict
    trained: dict        # {step: training loss}
    validated: dict      # {step: validation loss}
    ms: dict             # {step: milliseconds that it took}


def records(log):
    """The records in a log.jsonl, [{...}, ...], without lines that are half written, torn or lost."""
    # Whatever is no record is left out: zeros, half a line, a number.
    found = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def read_own(log):
    """The run that writes a log.jsonl; None before its first record."""
    lines = records(log)
    configs = [r["config"] for r in lines if isinstance(r.get("config"), dict)]
    if not configs:
        return None
    config = configs[-1]
    if not train_gpt.fits({name: config.get(name) for name in NEEDED}, NEEDED):
        sys.exit(f"figures.py: {log} has a config that train_gpt.py does not write")
    values = []
    lines = [r for r in lines if train_gpt.fits(r.get("step"), int)]
    for name in ("loss", "val_loss", "ms"):
        values.append({r["step"]: r[name] for r in lines if train_gpt.fits(r.get(name), train_gpt.NUMBER)})
    return Own(config, *values)


def gaps_of(run, runs):
    """Gaps, {step: 1e-3 nats}, of an Own to the first of runs that is by bf16 and the same in all else."""
    free = ("recipe", "backend", "name", "log_every", "save_every")

    def decides(config):
        return {name: value for name, value in config.items() if name not in free}

    for other in runs:
        if other.config["recipe"] == "bf16" and decides(other.config) == decides(run.config):
            return binned(run.validated, other.validated, 1)
    return {}


def last(by_step):
    """The last value of {step: value}; NaN without any."""
    return list(by_step.values())[-1] if by_step else math.nan


def follow(paths):
    """Print a table of runs of train_gpt.py, directories, also of comparisons; draw their losses and gaps.

    A gap, in 1e-3 nats, is to the bf16 run that is the same in all else, at the last validation of both.
    """
    runs = {}
    logs = set()
    for path in paths:
        found = {log for log in Path(path).rglob("log.jsonl") if log.is_file()}
        if not found:
            print(f"{path}: no log.jsonl in it")
        logs |= found
    for log in sorted(logs):
        run = read_own(log)
        if run:
            runs[str(log.parent)] = run
        else:
            print(f"{log}: nothing yet, skipped")
    if not runs:
        sys.exit(f"figures.py: nothing in {', '.join(paths)}: it takes runs, or --base=ROW")
    gaps = {name: gaps_of(run, runs.values()) for name, run in runs.items()}

    # The table
    width = max(map(len, runs))
    print(f"{'run':{width}}  {'recipe':10}{'step':>14}{'loss':>8}{'val loss':>10}{'gap':>7}{'ktok/s':>8}")
    for name, run in runs.items():
        c = run.config
        rate = c["tokens_per_step"] / statistics.median_high(list(run.ms.values()) or [math.nan])
        print(f"{name:{width}}  {c['recipe']:10}{max(run.trained, default=0):7}/{c['steps']:<6}"
              f"{last(run.trained):8.4f}{last(run.validated):10.4f}{last(gaps[name]):7.1f}{rate:8.1f}")

    # The curves
    plt = pyplot()
    _, axes = plt.subplots(1, 3, figsize=(13, 4))
    for name, run in runs.items():
        for ax, curve in zip(axes, (run.trained, run.validated, gaps[name])):
            ax.plot(list(curve), list(curve.values()), label=name)
    for ax, title in zip(axes, ("training loss", "validation loss", "gap to bf16, 1e-3 nats")):
        ax.set_title(title)
        ax.set_xlabel("step")
    axes[0].legend(fontsize=8)
    plt.tight_layout()
    target = Path(os.path.commonpath([Path(name).absolute().parent for name in runs])) / "curves.png"
    target.unlink(missing_ok=True)      # it may be a link
    plt.savefig(target)
    plt.close()
    print(f"wrote {target}")


# ---- 8. The command line -----------------------------------------------------------------------------------

def tabulate(base):
    """Print all tables and draw all pictures. base: a row, or None for quartet2."""
    runs = read()
    if not runs:
        sys.exit(f"figures.py: nothing in {RESULTS}: run data/evidence/experiments.py first")
    names = sorted({row for rows in runs.values() for row in rows})
    if base and base not in names:
        sys.exit(f"figures.py: no row {base!r}: {', '.join(names)}")
    for key, rows in runs.items():
        table(*key, rows, base or "quartet2")
        _, _, start = key
        progress(start, rows, base or "quartet2")
    verdicts(runs)
    half_closed(runs)
    draw(runs)


def main(arguments=()):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="figures.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", help="a directory of train_gpt.py, or above such")
    parser.add_argument("--base", metavar="ROW", help="what the tables pair every row with (quartet2)")
    own = parser.parse_args(arguments)
    try:
        if own.runs:
            follow(own.runs)
        else:
            tabulate(own.base)
    except (ImportError, OSError) as e:
        print(f"no pictures: {e} (they take matplotlib, pip install matplotlib, and room to write)")


if __name__ == "__main__":
    main(sys.argv[1:])
