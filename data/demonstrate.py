"""The sections of quartet.py in numbers: what `python quartet.py` prints."""
import torch
from quartet import *

def sr_four_six(x, seed):
    """SR, and a mistake: the better of two draws, one with amax to 6, one to 4, is biased. As quartet.sr."""
    b, amax, unit = blocks(x)
    b, (u, again) = b / unit, uniform(seed, b, amax)
    scales = [round_scale(over(amax, SR_MAX * top / 6)) for top in (6, 4)]
    q, s = best(b, ((e2m1(ratio(b, s), v), s) for s, v in zip(scales, (u, uniform(seed + 1, b)[0]))))
    return assemble(x.shape, q, s * unit, again)

def flips(recipe, steps=400):
    """Train w (128, 128) towards N(0, 1) -> the share of quantized weights that a step changes at the end."""
    torch.manual_seed(0)
    m, target, changed = Linear(128, 128, recipe=recipe), torch.randn(128, 128), []
    optimizer, values = torch.optim.Adam(m.parameters()), on_grid(m.weight.bfloat16(), recipe)
    for step in range(1, steps + 1):
        m.weight.grad = values - target                         # of (Q(w) - target)^2 / 2, straight through
        lr = optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps) + 1e-3
        optimizer.step()
        dampen(m, lr * (step / steps) ** 4)
        before, values = values, on_grid(m.weight.bfloat16(), recipe)
        changed.append((before != values).double().mean().item())
    return sum(changed[-40:]) / 40

def main():
    g = torch.manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    nmse = lambda a, x: ((a - x).double().square().sum() / x.double().square().sum()).item()
    print("1. E2M1:", *(f"+-{v:g}" for v in unpack(torch.arange(8, dtype=torch.uint8))[::2]))
    x, (R, n) = normal(1024, 1024), rotation("rht128", g)
    (b, amax, unit), t, xR = blocks(x), rtn(x), rotate(x, R)
    print(f"2. N(0, 1) in NVFP4: {sum(p.nbytes for p in t) * 8 / x.numel():.2f} bits a value, tensor scale "
          f"{t.tensor_scale:g}, exact in bf16: {torch.equal(decode(t), decode(t, torch.bfloat16).float())}")
    print(f"3-7. NMSE x 1e3 on N(0, 1){'here':>24}{'paper, table 1':>18}")
    for name, paper, t, of in (
            ("RTN", 9.0, t, x), ("RTN, 16x16 blocks", 12.4, rtn(x, (16, 16)), x),
            ("always 4, never 6", "-", assemble(x.shape, *nearest(b, [round_scale(amax / 4) * unit])), x),
            ("4/6", 7.6, four_six(x), x), ("4/6, 16x16 blocks", 12.4, four_six(x, (16, 16)), x),
            ("scale search", "-", scale_search(x), x), ("SR", 23.5, sr(x, 1), x),
            ("SR with 4/6 (biased)", 17.5, sr_four_six(x, 1), x),
            ("MS-EDEN", 9.4, ms_eden(x, R, 1), xR), ("MS-EDEN with 4/6", "-", ms_eden(x, R, 1, True), xR)):
        print(f"     {name:34}{nmse(decode(t), of) * 1e3:10.2f}{paper:>18}")
    x = torch.tensor([10.0, 20.0, 30.0, 40.0] + [0.0] * 12)     # the example of arXiv:2512.02010
    for name, v, top in (("RTN", decode(rtn(x)), 6), ("4/6", decode(four_six(x)), 4)):
        print(f"4. 10 20 30 40 by {name}: scale {v.max() / top:g}, decoded", *(f"{a:g}" for a in v[:4]),
              f"- squared error {(v - x).square().sum() / 4:.2f} a value")
    eden = lambda v, i, R, n, *how: rotate(decode(ms_eden(v, R, i, *how)), R.T) / n     # i: the seed
    draws = {"sr": lambda v, i: decode(sr(v, i)), "sr with 4/6": lambda v, i: decode(sr_four_six(v, i)),
             "ms_eden rht128": lambda v, i: eden(v, i, *rotation("rht128", g)),
             "ms_eden rht128x2": lambda v, i: eden(v, i, *rotation("rht128x2", g)),
             "the same with 4/6": lambda v, i: eden(v, i, *rotation("rht128x2", g), True)}
    sizes, outlier = (1, 4, 16, 64, 256), normal(64, 128).index_fill(1, torch.tensor(0), 100.0)
    print("5-7. error of the mean of B draws, x B / mean error of a draw: 1 where unbiased, within\n"
          "     the noise of draws; +-: its standard deviation at B=256\n" + " " * 42,
          *(f"{f'B={B}':>8}" for B in sizes), f"{'+-':>8}")
    for label, v in (("N(0, 1)", normal(64, 128)), ("one 100 in 128", outlier)):
        for name, draw in draws.items():
            errors = torch.stack([draw(v, i).double() - v for i in range(1, 257)])
            one, sums = errors.square().mean(0).sum(-1), errors.cumsum(0)       # (64,), of a draw; and sums
            rows = [sums[B - 1].square().sum(-1) / B / one.mean() for B in sizes]
            sigma = (rows[-1] - one / one.mean()).std() / len(v) ** 0.5
            print(f"     {name}, {label}".ljust(42), *(f"{r.mean():8.2f}" for r in [*rows, sigma]))
    print(f"8-9. one linear layer on N(0, 1): NMSE x 1e3\n     {'recipe':12}{'y':>9}{'dx':>9}{'dw':>9}")
    x, w, dy = (normal(512, 512) for _ in range(3))
    exact = (x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double())
    for recipe in RECIPES:
        layer = Linear(512, 512, recipe=recipe)
        layer.weight.data = w
        y = layer(x.requires_grad_())
        found = y, *torch.autograd.grad(y, (x, layer.weight), dy)
        print(f"     {recipe:12}" + "".join(f"{nmse(a, e) * 1e3:9.2f}" for a, e in zip(found, exact)))
    print("10. weights with best values between two grid points: at the end of training "
          f"{flips('quartet2'):.1%} of them flip in a step, dampened {flips('quintet'):.1%}")
