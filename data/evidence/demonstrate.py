"""The sections of quartet.py in numbers: what `python quartet.py` prints, and the article quotes."""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import quartet
from quartet import Linear, blocks, decode, e2m1, e4m3, four_six
from quartet import ms_eden, rotate, rotation, rtn, scale_search, sr

PAPER = "paper, table 1"


def normal(*shape, seed=0):
    """Numbers drawn from N(0, 1), float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nmse(found, exact):
    """Squared error over squared values."""
    found = found.double()
    exact = exact.double()
    return ((found - exact).square().sum() / exact.square().sum()).item()


def print_nmse(name, found, exact, paper="-"):
    """Print a row of the tables of NMSE: what was found here, and what the paper has."""
    print(f"{name:22}{1e3 * nmse(found, exact):10.2f}{paper:>18}")


def sr_four_six(x, seed):
    """SR, and a mistake: the better of two draws, one with amax to 6, one to 4. It is biased.

    x, seed -> NVFP4, as quartet.sr.
    """
    b, amax, unit = blocks(x)
    u6, u_scale = quartet.uniform(seed, b, amax)
    u4, _ = quartet.uniform(seed + 1, b, amax)
    s6 = quartet.round_scale(quartet.divide_by(amax, quartet.SR_MAX))
    s4 = quartet.round_scale(quartet.divide_by(amax, quartet.SR_MAX * 4 / 6))
    q6 = e2m1(quartet.ratio(b, s6), u6)
    q4 = e2m1(quartet.ratio(b, s4), u4)
    error6 = quartet.block_sum((q6 * s6 - b).square())
    error4 = quartet.block_sum((q4 * s4 - b).square())
    four = error4 < error6
    q = torch.where(four, q4, q6)
    s = torch.where(four, s4, s6)
    return quartet.assemble(x.shape, q, s * unit, u_scale)


def always_four(x):
    """RTN with amax to 4 in every block."""
    b, amax, unit = blocks(x)
    s = quartet.round_scale(quartet.divide_by(amax, 4.0))
    return quartet.assemble(x.shape, e2m1(quartet.ratio(b, s)), s * unit)


DRAWS = 1, 4, 16, 64, 256


def print_draws():
    """Print the head of the tables of convergence."""
    counts = "".join(f"{f'B={B}':>8}" for B in DRAWS)
    print("B times the squared error of the mean of B draws, over that of one: 1 if unbiased, "
          "+- standard error")
    print(f"{'':34}{counts}{'+-':>8}")


def print_convergence(name, draw, x):
    """Print how the mean of B draws of x (64, 128) converges. +-: the standard error of the last column."""
    errors = torch.stack([draw(x, seed).double() - x for seed in range(1, DRAWS[-1] + 1)])
    one = errors.square().sum(-1).mean()
    # Of each B, as many means as the draws give. Rows of x are independent enough: they use other rows of R.
    means = [errors.unflatten(0, (-1, B)).mean(1) for B in DRAWS]
    columns = [B * mean.square().sum(-1).mean(0) / one for B, mean in zip(DRAWS, means)]
    spread = columns[-1].std() / len(x) ** 0.5
    print(f"{name:34}" + "".join(f"{c.mean():8.2f}" for c in columns) + f"{spread:8.2f}")


# ---- The sections, in the order of the article: each prints its numbers ------------------------------------

def floats():
    grid = quartet.unpack(torch.arange(8, dtype=torch.uint8))[::2]
    print("E2M1:", *(f"{v:g}" for v in grid))
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    print(f"E4M3: {len(every)} positive values from {every.min():g} to {every.max():g}, "
          f"kept by rounding: {torch.equal(e4m3(every), every)}")
    half = torch.full((10000,), 2.5)
    u, _ = quartet.uniform(0, half, half)
    print(f"2.5 to nearest: {e2m1(half)[0]:g}; stochastically 2 or 3, in the mean {e2m1(half, u).mean():.2f}")


def tensors():
    codes = quartet.pack(torch.tensor([1.5, -6.0]))
    print(f"codes of 1.5 and -6 in a byte: 0x{codes.item():X}")
    x = normal(1024, 1024)
    t = rtn(x)
    bits = sum(part.nbytes for part in t) * 8 / x.numel()
    changed = (decode(t) != decode(t, torch.bfloat16)).sum()
    print(f"N(0, 1), 1024 x 1024: {bits:.2f} bits a value; of the decoded values bf16 changes {changed}")


def scales():
    for values in (3.5, 1.25, 0.40625), (3.75, 1.25, 0.40625):
        s = torch.tensor(values).view(1, 1, -1, 1)
        t = quartet.assemble((1, 48), torch.ones(1, 1, 3, 16), s)
        stored = ", ".join(f"{v:g}" for v in t.block_scale.flatten().float())
        print(f"block scales {', '.join(map(str, values))}: "
              f"tensor scale 2^{t.tensor_scale.log2():.0f}, stored {stored}")


def nearest():
    x = normal(1024, 1024)
    print(f"{'NMSE x 1e3 on N(0, 1)':22}{'here':>10}{PAPER:>18}")
    print_nmse("RTN", decode(rtn(x)), x, 9.0)
    print_nmse("RTN, 16x16 blocks", decode(rtn(x, (16, 16))), x, 12.4)


def four_over_six():
    x = torch.tensor([10.0, 20.0, 30.0, 40.0] + [0.0] * 12)     # the example of arXiv:2512.02010
    for name, quantizer in ("RTN", rtn), ("4/6", four_six):
        v = decode(quantizer(x))
        shown = " ".join(f"{a:g}" for a in v[:4])
        print(f"10 20 30 40 by {name}: {shown}, squared error {(v - x).square().sum() / 4:.2f} a value")
    x = normal(1024, 1024)
    print(f"{'NMSE x 1e3 on N(0, 1)':22}{'here':>10}{PAPER:>18}")
    print_nmse("always 4, never 6", decode(always_four(x)), x)
    print_nmse("4/6", decode(four_six(x)), x, 7.6)
    print_nmse("4/6, 16x16 blocks", decode(four_six(x, (16, 16))), x, 12.4)
    print_nmse("scale search", decode(scale_search(x)), x)


def noise():
    x = normal(1024, 1024)
    print(f"{'NMSE x 1e3 on N(0, 1)':22}{'here':>10}{PAPER:>18}")
    print_nmse("SR", decode(sr(x, 1)), x, 23.5)
    print_nmse("SR with 4/6, biased", decode(sr_four_six(x, 1)), x, 17.5)
    print_draws()
    x = normal(64, 128)
    print_convergence("SR", lambda v, seed: decode(sr(v, seed)), x)
    print_convergence("SR with 4/6", lambda v, seed: decode(sr_four_six(v, seed)), x)


def rotations():
    x = normal(64, 128)
    x[:, 0] = 100.0
    peak = lambda v: (v.abs().amax(-1) / v.square().mean(-1).sqrt()).mean()
    print(f"64 groups, one value of 100 in each: largest over root mean square {peak(x):.2f}; rotated")
    for name in quartet.ROTATIONS:
        R, n = rotation(name, torch.Generator().manual_seed(0))
        exact = torch.equal(R @ R.T, n * torch.eye(128)) and torch.equal(R, R.bfloat16().float())
        print(f"    by {name:10}{peak(rotate(x, R)):6.2f}    R R^T = {n} I, in bf16 too: {exact}")


def eden():
    R, _ = rotation("rht128", torch.Generator().manual_seed(0))
    x = normal(1024, 1024)
    print(f"{'NMSE x 1e3 on N(0, 1)':22}{'here':>10}{PAPER:>18}")
    print_nmse("MS-EDEN", decode(ms_eden(x, R, 1)), rotate(x, R), 9.4)
    print_nmse("MS-EDEN with 4/6", decode(ms_eden(x, R, 1, four_six=True)), rotate(x, R))
    print_draws()
    row = torch.arange(64)
    outlier = normal(64, 128)
    outlier[row, row] = 100.0
    equals = torch.zeros(64, 128)
    equals[row, row] = 1.0
    equals[row, row ^ 1] = 0.88
    inputs = {"N(0, 1)": normal(64, 128), "one 100 in 128": outlier, "1, 0.88, 126 zeros": equals}
    for rounds in "rht128", "rht128x2", "rht128x3":
        g = torch.Generator().manual_seed(0)

        def draw(v, seed):
            R, n = rotation(rounds, g)
            return rotate(decode(ms_eden(v, R, seed)), R.T) / n

        for what, v in inputs.items():
            print_convergence(f"{rounds}, {what}", draw, v)


def recipes():
    x = normal(512, 512, seed=1)
    w = normal(512, 512, seed=2)
    dy = normal(512, 512, seed=3)
    g = torch.Generator().manual_seed(0)

    def error(quantizer, v, exact, R=None):
        return f"{1e3 * nmse(decode(quartet.quantize(quantizer, v, R, seed=4)), rotate(exact, R)):8.2f}"

    print(f"{'NMSE x 1e3 of operands':22}{'y: x':>8}{'w':>8}{'dx: dy':>8}{'w':>8}{'dw: dy':>8}{'x':>8}")
    for name, row in quartet.RECIPES.items():
        if row is None:
            continue
        w_q = decode(quartet.quantize(row.w, w))
        x_q = decode(quartet.quantize(row.x, x))
        cells = [error(row.x, x, x), error(row.w, w, w)]
        R, _ = quartet.rotation_from(row.dx.rotation, torch.randint(0, 2, (3, 128), generator=g) * 2.0 - 1.0)
        cells.append(error(row.dx.dy, dy, dy, R))
        if row.dx.other is None:
            cells.append(cells[1])                              # as stored
        else:
            cells.append(error(row.dx.other, w_q.T, w.T, R))
        R, _ = quartet.rotation_from(row.dw.rotation, torch.randint(0, 2, (3, 128), generator=g) * 2.0 - 1.0)
        cells.append(error(row.dw.dy, dy.T, dy.T, R))
        cells.append(error(row.dw.other, x.T if row.original else x_q.T, x.T, R))
        print(f"{name:22}" + "".join(cells))


def gemms():
    x = normal(512, 512, seed=1).requires_grad_()
    w = normal(512, 512, seed=2)
    dy = normal(512, 512, seed=3)
    exact = x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double()
    print(f"{'NMSE x 1e3 on N(0, 1)':22}{'y':>9}{'dx':>9}{'dw':>9}")
    torch.manual_seed(0)
    for recipe in quartet.RECIPES:
        layer = Linear(512, 512, recipe=recipe)
        layer.weight.data = w
        y = layer(x)
        found = y, *torch.autograd.grad(y, (x, layer.weight), dy)
        print(f"{recipe:22}" + "".join(f"{1e3 * nmse(a, e):9.2f}" for a, e in zip(found, exact)))
    late = quartet.RECIPES["quintet"]._replace(two_terms=True)
    w16 = w.bfloat16()
    y, _, _ = quartet.forward_gemm(late, x.detach().bfloat16(), w16, quartet.quantize(late.w, w16))
    print(f"{'quintet in two terms':22}{1e3 * nmse(y, exact[0]):9.2f}")

    # Values that differ in size along the axis of the sum are the hardest to add.
    a = normal(512, 2048, seed=4)
    b = four_six(normal(512, 2048, seed=5))
    differ = []
    for size in torch.ones(2048), (4 * normal(2048, seed=6)).exp():
        a_q = four_six(a * size)
        differ.append((quartet.matmul(a_q, b) != quartet.fp4_matmul(a_q, b)).sum())
    print("262144 sums of 2048 products by 4/6, added as FP4 tensor cores add and in float32:")
    print(f"in bf16 {differ[0]} differ; {differ[1]} if columns of x are multiplied by exp(4 N(0, 1))")


def layer():
    x = normal(512, 512).bfloat16().requires_grad_()
    shown = []
    for recipe in quartet.RECIPES:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            Linear(512, 512, recipe=recipe, dtype=torch.bfloat16)(x)
        shown.append(f"{recipe} {sum(kept) / 2 / x.numel():.2f}")
    print("bytes kept for the backward pass, a value of x and w:")
    print(", ".join(shown))


def flips(recipe, steps=400):
    """Train w (128, 128) towards N(0, 1) -> the share of quantized weights that a step changes at the end."""
    torch.manual_seed(0)
    m = Linear(128, 128, recipe=recipe)
    target = torch.randn(128, 128)
    optimizer = torch.optim.Adam(m.parameters())
    values = quartet.on_grid(m.weight.bfloat16(), recipe)
    changed = []
    for step in range(1, steps + 1):
        m.weight.grad = values - target                         # of (Q(w) - target)^2 / 2, straight through
        lr = 0.05 * (1 - step / steps) + 1e-3
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        quartet.dampen(m, lr * (step / steps) ** 4)
        before = values
        values = quartet.on_grid(m.weight.bfloat16(), recipe)
        changed.append((before != values).double().mean().item())
    return sum(changed[-40:]) / 40


def rest():
    print("of weights whose best value lies between two grid points, this share flips in a step at the end:")
    print(f"{flips('quartet2'):.1%}, and {flips('quintet'):.1%} if they are pulled")


SECTIONS = {
    "1. The two small floats": floats,
    "2. NVFP4 tensors": tensors,
    "3. Blocks and scales": scales,
    "4. Round to nearest (RTN)": nearest,
    "5. Four Over Six (4/6), and a search over scales": four_over_six,
    "6. Noise, and stochastic rounding (SR)": noise,
    "7. Rotations": rotations,
    "8. MS-EDEN": eden,
    "9. The table of recipes": recipes,
    "10. The three GEMMs": gemms,
    "11. The linear layer": layer,
    "12. Weights that come to rest": rest,
}


def main(argv=None):
    """Print all sections."""
    argparse.ArgumentParser(prog="quartet.py", description=__doc__).parse_args(argv)
    for title, section in SECTIONS.items():
        print(title)
        section()


if __name__ == "__main__":
    main()
