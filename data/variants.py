"""Forward passes that are not recipes: what else might bring a quantized forward closer to bf16.

    python data/variants.py RUN [VARIANT ...]       loss of a trained model, 1e-3 nats above its bf16 forward

RUN is a run of train_gpt.py, by name or path. Without a list: all of VARIANTS that do not need training. As
rows of data/experiments.py they train instead: forward quantized, backward in bf16, straight through.
"""
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch, torch.nn.functional as F
import quartet, train_gpt
from quartet import e2m1, over, ratio, rotation_from, round_scale, turned

LAYERS = "qkv", "out", "up", "down"

class Variant(NamedTuple):
    """y = x w^T of a layer, computed on decoded values."""
    x: str = "four_six"         # quantizer of x: bf16, rtn, four_six, scale_search, deep: from -4 to 8,
                                # eden: rtn, its scale corrected as in MS-EDEN and rounded to nearest
    w: str = "four_six"         # of w
    layers: tuple = LAYERS      # quantized; the others stay in bf16
    rotate: tuple = ()          # layers whose x and w are turned by one fixed H128, signs first
    balance: tuple = ()         # layers whose x and w are turned by quartet.balance, found once
    weigh: bool = False         # errors count by the other operand's mean square in that column
    equalize: float = 0.0       # x / c and w c, c a power of two: 1 levels the columns of x, 0.5 both alike
    order: str = ""             # of columns, by mean square of x: sort: alike side by side; spread: apart
    extra: float = 0.0          # this share of the columns, where errors cost most, takes two terms of x
    pull: float = 0.0           # training: towards its quantized value, as weight decay pulls towards 0
    reset: tuple = ()           # training: period, window, ratio of OsciReset, see `install`; -n: n changes
    stay: float = 0.0           # a block of w keeps its codes until others have an error less by this share

def signs(device): return torch.arange(128, device=device)[None] * 37 % 128 % 3 % 2 * 2.0 - 1.0  # any will do
search = dict(x="scale_search", w="scale_search")
VARIANTS = {
    "v_rtn": Variant("rtn", "rtn"), "v_four_six": Variant(), "v_search": Variant(**search),
    "v_deep": Variant("deep", "deep"), "v_x": Variant(w="bf16"), "v_w": Variant("bf16"),
    **{f"v_x_{layer}": Variant(w="bf16", layers=(layer,)) for layer in LAYERS},
    **{f"v_w_{layer}": Variant("bf16", layers=(layer,)) for layer in LAYERS},
    "v_rotate": Variant(rotate=("qkv", "up")),
    **{f"v_rotate_{layer}": Variant(rotate=(layer,)) for layer in LAYERS},
    "v_balance": Variant(**search, balance=LAYERS),
    **{f"v_balance_{layer}": Variant(**search, balance=(layer,)) for layer in LAYERS},
    "v_weigh": Variant(**search, weigh=True),
    "v_equalize": Variant(equalize=0.5), "v_equalize_x": Variant(equalize=1.0),
    "v_all": Variant(**search, weigh=True, equalize=0.5),
    "v_sort": Variant(**search, weigh=True, order="sort"),
    "v_spread": Variant(**search, weigh=True, order="spread"),
    "v_extra": Variant(**search, weigh=True, extra=1 / 8),
    "v_eden": Variant("eden", "eden"), "v_turn": Variant(**search, rotate=("qkv", "up")),
    "v_pull": Variant(pull=1.0), "v_pull_10": Variant(pull=10.0), "v_reset": Variant(reset=(200, 50, 8.0)),
    "v_w_reset": Variant("bf16", reset=(200, 50, 8.0)),
    **{f"v_search_{name}": Variant(**search, reset=r) for name, r in dict(
        reset=(200, 50, 8.0), reset_often=(100, 50, 8.0), reset_always=(50, 50, 8.0),
        reset_more=(200, 50, 4.0), reset_less=(200, 50, 16.0), reset_all=(200, 1, 0.0),
        reset_all_often=(50, 1, 0.0), reset_3=(200, 50, -3.0), reset_6=(200, 50, -6.0)).items()},
    **{f"v_search_pull_{pull}": Variant(**search, pull=pull) for pull in (10, 100, 1000)},
    **{f"v_search_stay_{stay}": Variant(**search, stay=stay / 100) for stay in (10, 30)},
}

def decoded(b, quantizer, weight=None):
    """b (..., K) float32 -> what `quantizer` makes of it, decoded, scales of 4 bits and any exponent.

    weight (K,): of squared errors, where a scale is chosen.
    """
    if quantizer == "bf16": return b
    shape, b = b.shape, b.reshape(-1, b.shape[-1] // 16, 16)
    amax = b.abs().amax(-1, keepdim=True)
    s = round_scale(over(amax, 6.0))
    steps = dict(scale_search=quartet.SEARCH, deep=(0, *range(-4, 0), *range(1, 9))).get(quantizer, (0,))
    code = s.view(torch.int32)
    scales = [torch.where(code > 0, code + (n << 20), 0).view(torch.float32) for n in steps]
    if quantizer == "four_six": scales.append(round_scale(over(amax, 4.0)))
    weight = 1.0 if weight is None else weight.view(-1, 16)
    found = None
    for s in scales:
        q = e2m1(ratio(b, s))
        new = ((q * s - b).square() * weight).sum(-1, keepdim=True), q, s
        found = [torch.where(new[0] < found[0], n, f) for n, f in zip(new, found)] if found else new
    _, q, s = found
    if quantizer == "eden": s = round_scale(ratio((b * b).sum(-1, True), (q * b).sum(-1, True)))
    return (q * s).view(shape)

def columns(x, w):
    """x (..., K), w (N, K) -> their mean squares by column, (K,) float32."""
    return [t.detach().float().square().flatten(0, -2).mean(0).clamp(min=1e-30) for t in (x, w)]

def equalized(x, w, share):
    """x / c, w c, exact, for the power of two nearest to c = rms(x)^share rms(w)^(share - 1), by column."""
    in_x, in_w = (t.log2() / 2 for t in columns(x, w))
    c = torch.exp2((share * in_x - (1 - share) * in_w).round()).to(x.dtype)
    return x / c, w * c

class Layer(torch.nn.Linear):
    """nn.Linear by a Variant. Gradients are those of the decoded operands, straight through the rounding."""
    calibrating = False
    def forward(self, x):
        v, x, w = self.variant, x.bfloat16(), self.weight.bfloat16()
        if self.kind not in v.layers: return F.linear(x, w)
        if self.kind in v.rotate:
            R = rotation_from("rht128", signs(x.device))[0].bfloat16() * 128**-0.5
            x, w = ((t.unflatten(-1, (-1, 128)) @ R).flatten(-2) for t in (x, w))
        if self.kind in v.balance:
            if self.calibrating:
                with torch.autocast(x.device.type, enabled=False): self.turn.copy_(quartet.balance(x, w))
            x, w = (turned(t, self.turn, i) for i, t in enumerate((x, w)))
        if v.equalize: x, w = equalized(x, w, v.equalize)
        if v.order:
            index = columns(x, w)[0].argsort()
            index = index.view(16, -1).T.flatten() if v.order == "spread" else index
            x, w = x[..., index], w[:, index]
        in_x, in_w = columns(x, w) if v.weigh else (None, None)
        x_hat, w_hat = decoded(x.detach().float(), v.x, in_w), decoded(w.detach().float(), v.w, in_x)
        if v.stay:
            error = lambda t: (t - w.float()).unflatten(-1, (-1, 16)).square().sum(-1, True)
            new = error(w_hat) < error(self.before) * (1 - v.stay)
            w_hat = torch.where(new, *(t.unflatten(-1, (-1, 16)) for t in (w_hat, self.before))).flatten(-2)
            self.before.copy_(w_hat.detach())
        if v.extra:
            rest = x.detach() - x_hat
            cost = rest.square().flatten(0, -2).mean(0) * columns(x, w)[1]
            worst = cost >= cost.topk(int(v.extra * len(cost))).values[-1]
            x_hat = x_hat + decoded(rest, "rtn") * worst
        x, w = (t_hat.bfloat16() + (t - t.detach()) for t, t_hat in ((x, x_hat), (w, w_hat)))
        return F.linear(x, w)

def apply(blocks, name):
    """Make the layers of train_gpt.Blocks compute by VARIANTS[name]."""
    for block in blocks:
        for kind in LAYERS:
            layer = getattr(block, kind)
            layer.__class__, layer.kind, layer.variant = Layer, kind, VARIANTS[name]
            if kind in layer.variant.balance:
                eye = torch.eye(128, dtype=torch.bfloat16, device=layer.weight.device)
                layer.register_buffer("turn", eye.repeat(2, layer.in_features // 128, 1, 1), False)
            if layer.variant.stay: layer.register_buffer("before", torch.zeros_like(layer.weight), False)

@torch.no_grad()
def calibrate(model, tokens, targets):
    """Choose what a Variant turns x and w by: from a batch, once. (To train so: rows of experiments.py.)"""
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    for m in layers: m.calibrating = True
    with torch.compiler.set_stance("force_eager"): model(tokens, targets)
    for m in layers: m.calibrating = False

def install(name):
    """Let train_gpt.py train by VARIANTS[name] from now on, in this process."""
    init, make = train_gpt.Block.__init__, train_gpt.make_optimizer
    def block(self, *args):
        init(self, *args)
        apply([self], name)
    def optimizer(model, c):
        made, v = make(model, c), VARIANTS[name]
        quantize = torch.compile(decoded) if model.rope.is_cuda else decoded
        def pull(*_):                           # grows from nothing to v.pull: first find the place
            for w in weights:
                share = made.param_groups[0]["lr"] * v.pull * made.state[w]["step"] / c.steps
                w.data.lerp_(quantize(w.data.bfloat16().float(), v.w), share.to(w.device))
        def reset(*_):      # OsciReset, arXiv:2510.27527: at the end of a period, what moved `ratio` times
            period, window, least = v.reset                 # as far quantized as it did itself, rests
            step = int(made.state[weights[0]]["step"]) % period + window - period
            for w in weights if step >= 0 else ():
                now = torch.stack([w.data, quantize(w.data.bfloat16().float(), v.w)])
                path, last = watched.get(w, (None, None)) if step else (torch.zeros_like(now), now)
                if path is None: continue                           # resumed within a window
                path += (now - last).abs() if least >= 0 else (now != last).float()
                watched[w] = path, now
                rests = path[1] >= (least * path[0] if least >= 0 else -least)
                if step == window - 1: w.data.copy_(torch.where(rests, now[1], now[0]))
        weights, watched = [getattr(block, kind).weight for block in model.blocks for kind in v.layers], {}
        if v.pull: made.register_step_post_hook(pull)
        if v.reset: made.register_step_post_hook(reset)
        return made
    train_gpt.Block.__init__, train_gpt.make_optimizer = block, optimizer

def main(arguments):
    if not arguments or arguments[0].startswith("-"): sys.exit(__doc__)
    names = arguments[1:] or [name for name, v in VARIANTS.items() if not (v.pull or v.reset)]
    for name in names: train_gpt.known(name, VARIANTS, f"unknown variant {name!r}")
    c, _, checkpoint = train_gpt.load("eval", arguments[0], {})
    device, compiled = train_gpt.pick_device(c)
    model, data = train_gpt.GPT(c).to(device), train_gpt.Shards(c, "val")
    model.load_state_dict(checkpoint["model"])
    base = train_gpt.evaluate(model, data, c, device)
    print(f"bf16 {base:.4f} nats; above it, in 1e-3 nats:")
    for name in names:
        apply(model.blocks, name)
        torch.compiler.reset()
        if VARIANTS[name].balance: calibrate(model, *next(data.in_order(c, device)))
        loss = train_gpt.evaluate(torch.compile(model) if compiled else model, data, c, device)
        print(f"{name:16}{1e3 * (loss - base):8.2f}", flush=True)

if __name__ == "__main__":
    try: main(sys.argv[1:])
    except (train_gpt.UserError, ValueError, OSError) as e: sys.exit(f"variants.py: {e}")
