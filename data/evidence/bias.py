"""How biased are the gradients of a trained model's linear layers, by each way to quantize the backward pass?

    python data/evidence/bias.py RUN [--draws=1024] [--batch=4] [--recipe=ROW] [--operands=on] [--out=FILE]
    python data/evidence/bias.py families [--draws=1024]

The first takes x, w and dy of every hidden layer of a checkpoint from one batch of validation text, under the
forward pass of a recipe, and quantizes the same two backward GEMMs again and again. Per layer, GEMM and
method:

    error(B) = ||mean of B draws - exact||^2 / ||exact||^2,     B = 1, 4, 16, ... draws

The exact dx = dy w and dw = dy^T x take w and x as the backward pass gets them, quantized by the forward pass
(or, where the method's name has "bf16", as they were before): only the backward errs. Where its mean is
right, error(B) = error(1) / B, of slope -1 (printed: that of the last two B). Where it is not, error(B) ends
at a floor, the squared relative bias. Draws are independent, so the inner products between the mean errors of
different sixteenths of the draws have that floor as their mean: no fit is needed. Its standard error is a
jackknife over the sixteenths, 1.4 times too wide where there is no floor. A floor below 3 standard errors is
not told from 0, and printed as a bound: < those 3, plus the estimate if that is positive.

The least floor to be seen is such a bound, or what rounding each draw to bf16 leaves: 2.8e-6 if nothing else
errs, and next to nothing, below 1e-7 on N(0, 1), where draws scatter more widely than bf16 values lie. With
--operands=on also dy alone and w or x alone are quantized, and the other is in bf16, rotated before.

How near does the mean come to the gradient of x and w that were never quantized? The last two columns: the
squared error relative to that gradient, of all draws; and bits, log2(error of a quarter of them / error of
all), of errors that are not squared: 1 where the error falls as 1 / sqrt(B).

The second takes single groups of 128 values, of many kinds. It quantizes each after one, two and three rounds
of rotation, and compares the mean of what is rotated back with the group. Of the options it takes --draws.
"""
import argparse
import functools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import quartet
import train_gpt

import demonstrate    # beside this file


class Method(NamedTuple):
    """How both operands of dx and of dw are quantized."""
    rotation: str | None
    quantizer: str
    original: bool = False    # the backward pass quantizes x and w as they were before the forward pass


METHODS = {
    "sr": Method(None, "sr"),
    "sr rht128": Method("rht128", "sr"),
    "sr 4/6": Method("rht128", "sr_four_six"),
    "ms_eden": Method("rht128", "ms_eden"),
    "ms_eden x2": Method("rht128x2", "ms_eden"),
    "ms_eden 4/6": Method("rht128x2", "ms_eden_46"),
    "ms_eden x3": Method("rht128x3", "ms_eden"),
    "x3 of bf16": Method("rht128x3", "ms_eden", original=True),
}
PARTS = 16    # of the draws
SIGMAS = 3    # so many standard errors above 0, a floor counts


# ---- 1. The gradients to quantize, and how -----------------------------------------------------------------

def register(recipe, operands):
    """Add to quartet.RECIPES a recipe's forward with each backward -> {(method, operand): its new name}.

    operands: of "both", "dy" (alone), "other" (w in dx, x in dw, alone).
    """
    quartet.QUANTIZERS["sr_four_six"] = lambda x, R, seed: demonstrate.sr_four_six(quartet.rotate(x, R), seed)
    forward = quartet.RECIPES[recipe]
    names = {}
    for method, (R, q, original) in METHODS.items():
        gemms = {
            "both": quartet.Gemm(R, dy=q, other=q),
            "dy": quartet.Gemm(R, dy=q, other="bf16"),
            "other": quartet.Gemm(R, dy="bf16", other=q)
        }
        for operand in operands:
            name = f"{recipe}, backward {method}, {operand}"
            gemm = gemms[operand]
            quartet.RECIPES[name] = quartet.Recipe(forward.x, forward.w, gemm, gemm, original=original)
            names[method, operand] = name
    return names


def capture(model, tokens, targets):
    """One forward and backward pass -> {name: bf16 x (M, K), w (N, K), dy (M, N)} of its quantized layers."""
    layers = model.quantized_linears()
    found = {}

    # x and w are seen in the forward pass; dy, the gradient of y, in the backward pass.
    def keep(name, *tensors):
        found[name] = tuple(t.detach().bfloat16().flatten(0, -2) for t in tensors)

    def hook(name, m, args, y):
        y.register_hook(lambda dy: keep(name, *args, m.weight, dy))

    for name, m in layers.items():
        m.register_forward_hook(functools.partial(hook, name))
    model(tokens, targets).backward()
    return {name: found[name] for name in layers}


# ---- 2. The mean of many draws -----------------------------------------------------------------------------

def exact_gemms(x, w, dy):
    """dx (M, K), dw (N, K) float64, of x (M, K), w (N, K), dy (M, N) as they are."""
    dy = dy.double()
    return dy @ w.double(), dy.T @ x.double()


def as_backward_gets_them(x, w, recipe):
    """x (M, K), w (N, K) -> the same as the backward pass of a recipe gets them."""
    row = quartet.RECIPES[recipe]
    if row.original:
        return x, w
    return quartet.decode(quartet.quantize(row.x, x)), quartet.decode(quartet.quantized(w, recipe))


def measure(x, w, dy, recipe, sizes):
    """x, w, dy of `capture` -> `estimate` of dx, and of dw, from sizes[-1] draws by a recipe.

    sizes: the numbers B of draws whose mean is measured, ascending.
    """
    exact = exact_gemms(*as_backward_gets_them(x, w, recipe), dy)
    unquantized = exact_gemms(x, w, dy)
    forward = [(a - b).float() for a, b in zip(exact, unquantized)]      # what the forward pass has changed
    layer = quartet.Linear(*w.T.shape, recipe=recipe, device=w.device, dtype=w.dtype)
    layer.weight.data = w
    leaf = x.clone().requires_grad_()

    # A draw is one backward pass. Draw b adds to part b % PARTS of the sums, of errors: for these float32 is
    # plenty.
    sums = [torch.zeros(PARTS, *e.shape, device=e.device) for e in exact]
    parts = torch.arange(PARTS, device=x.device).split(1)

    def draw(part):
        gradients = torch.autograd.grad(layer(leaf), (leaf, layer.weight), dy)
        for s, gradient, e in zip(sums, gradients, exact):
            s.index_add_(0, part, (gradient - e).float()[None])

    errors = [[] for _ in exact]
    distances = [[] for _ in exact]      # to the gradient of what was never quantized
    with quartet.quantized_weights(layer):
        run = draw
        if x.is_cuda:
            run = train_gpt.as_graph(draw, parts[0])
            for s in sums:
                s.zero_()    # of draws while it was recorded
        for b in range(1, sizes[-1] + 1):
            run(parts[b % PARTS])
            if b in sizes:
                # These numbers stay on the device, so that nothing waits for them.
                for error, distance, s, f in zip(errors, distances, sums, forward):
                    mean = s.sum(0) / b
                    error.append(mean.double().square().sum())
                    distance.append((mean + f).double().square().sum())

    found = []
    for error, distance, s, e, u in zip(errors, distances, sums, exact, unquantized):
        r = estimate(torch.stack(error), s, e.square().sum(), sizes)
        r["unquantized"] = (torch.stack(distance) / u.square().sum()).tolist()
        found.append(r)
    return found


def estimate(error, sums, norm, sizes):
    """What the draws tell of one GEMM -> {B: sizes, error: [error(B)], slope, floor, sigma: its error}.

    error (sizes,): ||mean of B draws - exact||^2. sums (PARTS, ...): the errors of the draws, added up. norm:
    ||exact||^2.

    floor = mean over k != l of <m_k, m_l> / norm,  m_k the mean error of draws k, k + 16, k + 32, ...
    """
    draws = sizes[-1]
    # gram[k, l] = <m_k, m_l> / norm, by chunks: all in float64 would take much memory.
    gram = sum(c.double() @ c.double().T for c in sums.flatten(1).split(2**20, 1))
    gram = gram * (PARTS / draws) ** 2 / norm
    others = (gram.sum(1) - gram.diagonal()) / (PARTS - 1)     # of each part with the others, on average
    # The jackknife: without part k the mean changes by 2 / (PARTS - 2) of how far others[k] is off.
    sigma = 2 * others.std() * (PARTS - 1) / (PARTS - 2) / PARTS**0.5
    error = (error / norm).tolist()
    return {
        "B": sizes,
        "error": error,
        "slope": math.log(error[-1] / error[-2], sizes[-1] / sizes[-2]),
        "floor": others.mean().item(),
        "sigma": sigma.item()
    }


# ---- 3. The report -----------------------------------------------------------------------------------------

def bound(r):
    """A record's floor where it is told from 0, else what it may be at most; and whether it is told."""
    noise = SIGMAS * r["sigma"]
    if r["floor"] > noise:
        return r["floor"], True
    return max(r["floor"], 0.0) + noise, False


def shown(r):
    """The `bound` of a record as text."""
    value, seen = bound(r)
    if seen:
        return f"{value:.1e} +- {r['sigma']:.0e}"
    return f"< {value:.1e}"


def bits(r):
    """How many bits nearer the mean of a record came to the unquantized gradient by 4 times the draws."""
    *_, before, last = r["unquantized"]
    return math.log2(before / last) / 2


def print_record(r):
    """Print the row of a record in its layer's table."""
    errors = "".join(f"{e:9.1e}" for e in r["error"])
    print(f"{r['gemm']} {r['method']:12}{r['operand']:9}{errors}{r['slope']:7.2f}  {shown(r):18}"
          f"{r['unquantized'][-1]:9.1e}{bits(r):6.2f}")


def summarize(records):
    """Print for each GEMM, method and operand: mean slope and bits, median and largest floor over layers."""
    print(f"\n{'over all layers':24}mean slope  {'median floor':20}{'largest floor':20}{'seen in':9}"
          "mean bits")
    kinds = {}
    for r in records:
        kinds.setdefault(f"{r['gemm']} {r['method']:12}{r['operand']:9}", []).append(r)
    for kind, rows in kinds.items():
        slope = statistics.fmean(r["slope"] for r in rows)
        median = sorted(rows, key=lambda r: r["floor"])[len(rows) // 2]
        seen = [r for r in rows if bound(r)[1]]
        largest = max(seen or rows, key=bound)
        told = f"{len(seen)} of {len(rows)}"
        print(f"{kind}{slope:10.2f}  {shown(median):20}{shown(largest):20}{told:9}"
              f"{statistics.fmean(map(bits, rows)):9.2f}")


# ---- 4. Groups of values of many kinds ---------------------------------------------------------------------

def families():
    """Groups of 128 values, {what they are: (64, 128) float32}."""
    g = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(64, quartet.GROUP, generator=g)

    def with_large(noise, *large):
        """Noise, with large values side by side, somewhere else in each group."""
        v = noise * normal()
        for row in range(len(v)):
            at = torch.randint(quartet.GROUP - len(large), (), generator=g)
            v[row, at:at + len(large)] = torch.tensor(large)
        return v

    return {
        "N(0, 1)": normal(),
        "10 + N(0, 1)": 10 + normal(),
        "N(0, 1) cubed": normal() ** 3,
        "exp(2 N(0, 1)), signed": (2 * normal()).exp() * normal().sign(),
        "a 100 in N(0, 1)": with_large(1.0, 100.0),
        "two 100 in N(0, 1)": with_large(1.0, 100.0, 100.0),
        "four 100 in N(0, 1)": with_large(1.0, 100.0, 100.0, 100.0, 100.0),
        "1, 127 zeros": with_large(0.0, 1.0),
        "1, 0.88, 126 zeros": with_large(0.0, 1.0, 0.88),
        "1, 0.88, 0.77, 125 zeros": with_large(0.0, 1.0, 0.88, 0.77),
    }


def bias_of(v, rounds, quantizer, draws):
    """The bias of MS-EDEN of v (G, 128) after a rotation, of its norm, in words."""
    g = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (draws, rounds, quartet.GROUP), generator=g) * 2.0 - 1.0
    sums = torch.zeros(PARTS, *v.shape)
    for b in range(draws):
        R, n = quartet.rotation_from("rht128" + f"x{rounds}" * (rounds > 1), signs[b])
        q = quartet.decode(quartet.quantize(quantizer, v, R, seed=b))
        sums[b % PARTS] += quartet.rotate(q, R.T) / n - v
    mean = sums.sum(0) / draws
    norm = v.double().square().sum()
    # Of this record only the floor and its error are read.
    r = estimate(torch.stack([norm, mean.double().square().sum()]), sums, norm, [1, draws])
    value, seen = bound(r)
    return f"{value ** 0.5:.2%}" if seen else f"< {value ** 0.5:.2%}"


def print_families(draws):
    """Print the bias of MS-EDEN for each of `families`, by rounds of rotation, without 4/6 and with it."""
    columns = [(rounds, quantizer) for quantizer in ("ms_eden", "ms_eden_46") for rounds in (1, 2, 3)]
    print(f"the bias of MS-EDEN, of the norm of 64 groups; {draws} draws; <: what noise may hide\n{'':26}" +
          "".join(f"{rounds} round{'s' * (rounds > 1)}".rjust(11) for rounds, _ in columns[:3]) +
          "".join(f"{rounds}, 4/6".rjust(11) for rounds, _ in columns[3:]))
    for what, v in families().items():
        print(f"{what:26}", end="")
        for rounds, quantizer in columns:
            print(f"{bias_of(v, rounds, quantizer, draws):>11}", end="", flush=True)
        print()


# ---- 5. The command line -----------------------------------------------------------------------------------

def parse(argv):
    """The command line -> its options, and the numbers of draws: 1, 4, 16, ... --draws. UserError for
    others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="of train_gpt.py: its path, or its name in runs/; or the word families")
    parser.add_argument("--draws", type=int, default=1024, help="a power of 4, 16 or more")
    parser.add_argument("--batch", type=int, default=4, help="windows of validation text")
    parser.add_argument("--recipe", help="whose forward pass; default: the run's, quartet2 if that is bf16")
    parser.add_argument("--operands", choices=("on", "off"), default="off", help="each operand alone, too")
    parser.add_argument("--out", help="the numbers, a line of JSON a row; default: bias.jsonl in the run")
    options = parser.parse_args(argv)
    sizes = [4**i for i in range(options.draws.bit_length()) if 4**i <= options.draws]
    if options.draws < PARTS or sizes[-1] != options.draws:
        raise train_gpt.UserError(f"--draws={options.draws}: it takes a power of 4, {PARTS} or more")
    return options, sizes


def load(options):
    """The run of a command line -> its directory, the recipe of the forward pass, `capture` of a batch."""
    knobs = dict(batch=options.batch, backend="auto", device="auto", compile="off")
    c, directory, _ = train_gpt.load("eval", options.run, knobs)
    recipe = options.recipe or c.recipe
    if recipe == "bf16" and not options.recipe:
        recipe = "quartet2"
    quantized = [name for name, row in quartet.RECIPES.items() if row]
    train_gpt.known(recipe, quantized, f"--recipe={recipe} is not a quantized forward pass")

    # As a checkpoint is evaluated, but trained for one backward pass.
    model, c = train_gpt.load_model(options.run, recipe=recipe, **knobs)
    torch.manual_seed(c.seed)
    data = train_gpt.Shards(c, train_gpt.find_corpus(c), "val", model.rope.device.type)
    return directory, recipe, capture(model, *data.random(0, 0))


def main(argv):
    """Do what the command line says."""
    options, sizes = parse(argv)
    if options.run == "families":
        print_families(options.draws)
        return
    directory, recipe, layers = load(options)
    operands = ("both", "dy", "other") if options.operands == "on" else ("both",)
    names = register(recipe, operands)
    path = Path(options.out or directory / "bias.jsonl")
    records = []
    with open(path, "w") as f:
        for layer, tensors in layers.items():
            tokens = len(tensors[0])
            columns = "".join(f"{f'B={B}':>9}" for B in sizes)
            print(f"\n{layer}, {tokens:,} tokens".ljust(25) + columns + f"  slope  {'floor':18}unquantized",
                  flush=True)
            found = {kind: measure(*tensors, name, sizes) for kind, name in names.items()}
            for i, gemm, other in (0, "dx", "w"), (1, "dw", "x"):
                for (method, operand), estimates in found.items():
                    if operand == "other":
                        operand = other
                    r = dict(layer=layer, forward=recipe, gemm=gemm, method=method, operand=operand)
                    r |= estimates[i]
                    f.write(json.dumps(r) + "\n")
                    records.append(r)
                    print_record(r)
    summarize(records)
    print(f"written to {path}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (train_gpt.UserError, ValueError, OSError) as e:
        sys.exit(f"bias.py: {e}")
