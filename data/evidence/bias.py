"""How biased are the gradients of a trained model's linear layers, by each way to quantize the backward pass?

    python data/evidence/bias.py RUN [--draws=1024] [--batch=4] [--recipe=quartet2] [--operands=on] [--out=FILE]

Takes x, w and dy of every hidden layer of a checkpoint from one batch of validation text, under the forward
pass of a recipe, and quantizes the same two backward GEMMs again and again. Per layer, GEMM and method:

    error(B) = ||mean of B draws - exact||^2 / ||exact||^2,     B = 1, 4, 16, ... draws

The exact dx = dy w and dw = dy^T x take w and x as the forward quantized them: only the backward errs. Where
its mean is right, error(B) = error(1) / B, of slope -1 (printed: that of the last two B). Where it is not,
error(B) ends at a floor, the squared relative bias. Draws are independent, so the inner products between the
mean errors of different sixteenths of the draws have that floor as their mean: no fit is needed. Its standard
error is a jackknife over the sixteenths, 1.4 times too wide where there is no floor. A floor below 3 standard
errors is not told from 0, and printed as a bound: < those 3, plus the estimate if that is positive.

The least floor to be seen is such a bound, or what rounding each draw to bf16 leaves: 2.8e-6 if nothing else
errs, and next to nothing, below 1e-7 on N(0, 1), where draws scatter more widely than bf16 values lie. With
--operands=on also dy alone and w or x alone are quantized, and the other is in bf16, rotated before.
"""
import argparse, dataclasses, functools, json, math, statistics, sys
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import quartet, train_gpt
import demonstrate                          # beside this file

METHODS = {                                 # the rotation and quantizer of dx and dw
    "sr": (None, "sr"), "sr rht128": ("rht128", "sr"), "sr 4/6": ("rht128", "sr_four_six"),
    "ms_eden": ("rht128", "ms_eden"), "ms_eden x2": ("rht128x2", "ms_eden"),
    "ms_eden 4/6": ("rht128x2", "ms_eden_46")}
PARTS, SIGMAS = 16, 3                       # of the draws; standard errors above 0 of a floor that counts

def register(recipe, operands):
    """Add to quartet.RECIPES a recipe's forward with each backward -> {(method, operand): its new name}."""
    quartet.QUANTIZERS["sr_four_six"] = lambda x, R, seed: demonstrate.sr_four_six(quartet.rotate(x, R), seed)
    x, w, names = quartet.RECIPES[recipe].x, quartet.RECIPES[recipe].w, {}
    for method, (R, q) in METHODS.items():
        for operand, pair in dict(both=(q, q), dy=(q, "bf16"), other=("bf16", q)).items():
            if operand in operands:
                name = names[method, operand] = f"{recipe}, backward {method}, {operand}"
                quartet.RECIPES[name] = quartet.Recipe(x, w, quartet.Gemm(R, *pair), quartet.Gemm(R, *pair))
    return names

def capture(model, tokens, targets):
    """One forward and backward pass -> {name: bf16 x (M, K), w (N, K), dy (M, N)} of its quantized layers."""
    layers = model.quantized_linears()
    found = {}
    def hook(name, m, args, y):
        bf16 = lambda *tensors: tuple(t.detach().bfloat16().flatten(0, -2) for t in tensors)
        y.register_hook(lambda dy: found.update({name: bf16(*args, m.weight, dy)}))
    for name, m in layers.items(): m.register_forward_hook(functools.partial(hook, name))
    model(tokens, targets).backward()
    return {name: found[name] for name in layers}

def measure(x, w, dy, recipe, sizes):
    """x, w, dy of `capture` -> for dx, for dw: {B: sizes, error: [error(B)], slope, floor, sigma: its error}.

    floor = mean over k != l of <m_k, m_l> / ||exact||^2,  m_k the mean error of draws k, k + 16, k + 32, ...
    """
    layer = quartet.Linear(*w.T.shape, recipe=recipe, device=w.device, dtype=w.dtype)
    layer.weight.data, leaf = w, x.clone().requires_grad_()
    xq, wq = quartet.QUANTIZERS[quartet.RECIPES[recipe].x](x, None, None), quartet.quantized(w, recipe)
    exact = [a.double() @ quartet.decode(quartet.NVFP4(*b)).double() for a, b in ((dy, wq), (dy.T, xq))]
    norms, errors = [e.square().sum() for e in exact], ([], [])
    sums = [torch.zeros(PARTS, *e.shape, device=e.device) for e in exact]
    def draw(part):
        for s, d, e in zip(sums, torch.autograd.grad(layer(leaf), (leaf, layer.weight), dy), exact):
            s.index_add_(0, part, (d - e).float()[None])        # of errors: float32 is plenty
    parts = torch.arange(PARTS, device=x.device).split(1)
    with quartet.quantized_weights(layer):
        run = train_gpt.as_graph(draw, parts[0]) if x.is_cuda else draw
        for s in sums: s.zero_()                                # of draws while it was recorded
        for b in range(1, sizes[-1] + 1):
            run(parts[b % PARTS])
            if b in sizes:                                      # kept on the device: nothing waits for it
                for error, s in zip(errors, sums): error.append((s.sum(0) / b).double().square().sum())
    found = []
    for error, s, norm in zip(errors, sums, norms):
        gram = sum(c.double() @ c.double().T for c in s.flatten(1).split(2**20, 1)) * (PARTS / b)**2 / norm
        row = (gram.sum(1) - gram.diagonal()) / (PARTS - 1)     # of part k with the others, on average
        sigma = 2 * row.std() * (PARTS - 1) / (PARTS - 2) / PARTS**0.5          # jackknife
        error = (torch.stack(error) / norm).tolist()
        found.append(dict(B=sizes, error=error, slope=math.log(error[-1] / error[-2], sizes[-1] / sizes[-2]),
                          floor=row.mean().item(), sigma=sigma.item()))
    return found

def bound(r):
    """A record's floor where it is told from 0, else what it may be at most; and whether it is told."""
    seen = r["floor"] > SIGMAS * r["sigma"]
    return r["floor"] if seen else max(r["floor"], 0.0) + SIGMAS * r["sigma"], seen
def shown(r):
    value, seen = bound(r)
    return f"{value:.1e} +- {r['sigma']:.0e}" if seen else f"< {value:.1e}"

def summarize(records):
    """Print for each GEMM, method and operand: mean slope, median and largest floor over the layers."""
    print(f"\n{'over all layers':24}mean slope  {'median floor':20}{'largest floor':20}seen in")
    kinds = {}
    for r in records: kinds.setdefault(f"{r['gemm']} {r['method']:12}{r['operand']:9}", []).append(r)
    for kind, rows in kinds.items():
        median = sorted(rows, key=lambda r: r["floor"])[len(rows) // 2]
        real = [r for r in rows if bound(r)[1]]
        print(f"{kind}{statistics.fmean(r['slope'] for r in rows):10.2f}  {shown(median):20}"
              f"{shown(max(real or rows, key=bound)):20}{len(real)} of {len(rows)}")

def main(argv):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="of train_gpt.py: its path, or its name in runs/")
    parser.add_argument("--draws", type=int, default=1024, help="a power of 4, 16 or more")
    parser.add_argument("--batch", type=int, default=4, help="windows of validation text")
    parser.add_argument("--recipe", help="whose forward pass; default: the run's, quartet2 if that is bf16")
    parser.add_argument("--operands", choices=("on", "off"), default="off", help="each operand alone, too")
    parser.add_argument("--out", help="the numbers, a line of JSON a row; default: bias.jsonl in the run")
    a = parser.parse_args(argv)
    sizes = [4**i for i in range(a.draws.bit_length()) if 4**i <= a.draws]
    if a.draws < PARTS or sizes[-1] != a.draws:
        raise train_gpt.UserError(f"--draws={a.draws}: it takes a power of 4, {PARTS} or more")
    knobs = dict(batch=a.batch, backend="auto", device="auto", compile="off")
    c, directory, saved = train_gpt.load("eval", a.run, knobs)
    recipe = a.recipe or ("quartet2" if c.recipe == "bf16" else c.recipe)
    train_gpt.known(recipe, [r for r, row in quartet.RECIPES.items() if row],
                    f"--recipe={recipe} is not a quantized forward pass")
    c = dataclasses.replace(c, recipe=recipe)
    train_gpt.check(c)
    device, _ = train_gpt.pick_device(c)
    torch.manual_seed(c.seed)
    model = train_gpt.GPT(c).to(device)
    model.use_recipe(recipe, c.backend)
    model.load_state_dict(saved["model"])
    layers = capture(model, *train_gpt.Shards(c, "val").random(c, 0, 0, device))
    names = register(recipe, ("both", "dy", "other") if a.operands == "on" else ("both",))
    path, records = Path(a.out or directory / "bias.jsonl"), []
    with open(path, "w") as f:
        for layer, tensors in layers.items():
            print(f"\n{layer}, {len(tensors[0]):,} tokens".ljust(25)
                  + "".join(f"{f'B={B}':>9}" for B in sizes) + "  slope  floor", flush=True)
            found = {kind: measure(*tensors, name, sizes) for kind, name in names.items()}
            for i, gemm, other in (0, "dx", "w"), (1, "dw", "x"):
                for (method, operand), results in found.items():
                    r = dict(layer=layer, forward=recipe, gemm=gemm, method=method,
                             operand=other if operand == "other" else operand) | results[i]
                    f.write(json.dumps(r) + "\n")
                    records.append(r)
                    print(f"{gemm} {method:12}{r['operand']:9}{''.join(f'{e:9.1e}' for e in r['error'])}"
                          f"{r['slope']:7.2f}  {shown(r)}")
    summarize(records)
    print(f"written to {path}")

if __name__ == "__main__":
    try: main(sys.argv[1:])
    except (train_gpt.UserError, ValueError, OSError) as e: sys.exit(f"bias.py: {e}")
