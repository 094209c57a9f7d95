"""Ideas for closing more of the gap to bf16 than quintet does: rows of experiments.py.

Each is a function of IDEAS, {row: (recipe, function)}: it changes train_gpt.py or quartet.py in the process
that trains the row. All rows but the low-rank branch are quintet with one thing changed. README.md, section
4, has what came of them. What was expected, written down before the runs, as a row's loss minus quintet's in
1e-3 nats at the 10m size, where quartet2's gap is 18:

    quintet_reset          oscillating weights reset, beside the pull: -1. It begins at an eighth of the
                           steps, where the pull is nothing yet; late both do the same.
    quintet_reset_alone    in the pull's place: 0 to +1
    quintet_coupled        the pull as a part of the gradient, which AdamW's moments see: +1, since AdamW
                           makes steps of one length of it
    quintet_t2, _t8        the pull by t^2, by t^8: within 1
    quintet_average        the weights averaged over the last tenth: -2, but +2 in 4 bits if averaging takes
                           them off the grid again
    quintet_mean           the mean token split off in the forward pass: -1 (one try before: nothing)
    quintet_mean_dy        and of dy: the same
    quartet2_low_rank      minus quartet2: 32 singular vectors of each weight in bf16: -3 (published: from
                           56% less of the gap to worse than none)

Late in training most of what quintet leaves comes from x: the pull makes w nearly exact. So these aim at x:

    quintet_two            (a row of experiments.py) x in two terms, the second 4 bits of what the first has
                           lost, forward only: a fourth GEMM. -7
    quintet_two_end        (likewise) that in the last tenth of the steps: -5
    quintet_x_end          x in bf16 in the last tenth, w in 4 bits, as models are served whose weights alone
                           are in 4 bits: -5, as before, for a second term loses next to nothing
    quintet_forward_end    (a row of experiments.py) x and w in bf16 then: -6
    quintet_rest           what x has lost, along 32 singular vectors of each weight, in bf16: -1.5

A run that is stopped and goes on loses what an idea has gathered by itself: up to 200 steps of the paths of
weights, the average so far, and one step of the low-rank branch.
"""
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

import demonstrate
import quartet
import train_gpt

WINDOW = 200          # steps, of an oscillation and of a low-rank branch
RATIO = 4.0           # of the paths of Q(w) and w, from which on w oscillates: ALTO's constant
BEGIN = 1 / 8         # of the steps, before which nothing is reset
AVERAGED = 0.1        # of the steps, the last ones
RANK = 32


# ---- 1. Around the optimizer's steps -----------------------------------------------------------------------

def around_updates(before=None, after=None):
    """Let train_gpt.py call before(run), and after(run), around each step of its optimizers.

    run has model, c, step (from 1) and whatever these functions keep there.
    """
    build = train_gpt.build
    update = train_gpt.update

    def building(c, directory, checkpoint, *others):
        model, net, optimizers = build(c, directory, checkpoint, *others)
        run = SimpleNamespace(model=model, c=c, step=checkpoint["step"] if checkpoint else 0)

        @torch.no_grad()
        def updating(optimizers, norm):
            run.step += 1
            if before:
                before(run)
            update(optimizers, norm)
            if after:
                after(run)

        train_gpt.update = updating
        return model, net, optimizers

    train_gpt.build = building


def weights_and_values(model):
    """Yield (name, weight (N, K) float32, its quantized values (N, K) float32) of all quantized layers."""
    for name, m in quartet.quantized_layers(model).items():
        values = quartet.backend_of(m, m.weight).on_grid(m.weight.bfloat16(), m.recipe)
        yield name, m.weight, values.float()


# ---- 2. Weights that come to rest in other ways ------------------------------------------------------------

def reset(run):
    """Set weights that oscillate to their quantized values.

    Over a window of steps such a weight's quantized value moves RATIO times as far as the weight itself, or
    farther. TetraJet-v2's OsciReset (arXiv:2510.27527), with the constants of AMD's ALTO.
    """
    if not hasattr(run, "paths"):
        run.paths = {}
    ends = run.step % WINDOW == 0
    for name, w, q in weights_and_values(run.model):
        if name not in run.paths:
            zero = torch.zeros_like(w)
            run.paths[name] = SimpleNamespace(w=w.clone(), q=q, of_w=zero, of_q=zero.clone())
            continue
        path = run.paths[name]
        path.of_w += (w - path.w).abs()
        path.of_q += (q - path.q).abs()
        if ends:
            if run.step >= BEGIN * run.c.steps:
                oscillates = (path.of_q > 0) & (path.of_q >= RATIO * path.of_w)
                w.copy_(torch.where(oscillates, q, w))
            path.of_w.zero_()
            path.of_q.zero_()
        path.w.copy_(w)
        path.q = q


def without_pull():
    """Leave out the pull."""
    quartet.dampen = lambda model, share: None


def reset_alone():
    """`reset` in the pull's place."""
    without_pull()
    around_updates(after=reset)


def pull_gradient(run):
    """Add the pull to the gradients: in the end as large as the gradient itself, in the root mean square."""
    t = run.step / run.c.steps
    for _, w, q in weights_and_values(run.model):
        lost = w - q
        size = w.grad.square().mean().sqrt() / lost.square().mean().sqrt().clamp(min=1e-30)
        w.grad += train_gpt.ramp(t) * size * lost


def coupled():
    """`pull_gradient` in the pull's place."""
    without_pull()
    around_updates(before=pull_gradient)


def ramp_by(power):
    """The pull by another power of t."""
    train_gpt.ramp = lambda t: t**power


def average(run):
    """Average all weights over the last steps; the last validation is of the average."""
    last = run.c.steps
    first = math.floor((1 - AVERAGED) * last) + 1
    if run.step < first:
        return
    if not hasattr(run, "sums"):
        run.sums = [torch.zeros_like(p) for p in run.model.parameters()]
        run.summed = 0
    run.summed += 1
    for total, p in zip(run.sums, run.model.parameters()):
        total += p
        if run.step == last:
            p.copy_(total / run.summed)


# ---- 3. A part of the product in bf16 ----------------------------------------------------------------------

def in_4_bits(forward):
    """Let layers of 4 bits multiply by forward(plain, layer, x), plain being quartet.Linear.forward."""
    plain = quartet.Linear.forward

    def either(layer, x):
        if quartet.RECIPES[layer.recipe] is None:
            return plain(layer, x)
        return forward(plain, layer, x)

    quartet.Linear.forward = either


class SplitGradient(torch.autograd.Function):
    """y (M, N), which x (M, K) and w (N, K) made by a recipe -> y. Its backward pass takes the mean token of
    dy away, and multiplies it in bf16: dx gets mean w, and dw gets mean^T times the sum of x.
    """

    @staticmethod
    def forward(ctx, y, x, w):
        ctx.save_for_backward(x, w)
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        mean = dy.float().mean(0, keepdim=True).to(w.dtype)
        dx = (mean @ w).to(x.dtype).expand_as(x)
        dw = mean.T @ x.float().sum(0, keepdim=True).to(w.dtype)
        return dy - mean.to(dy.dtype), dx, dw


def split_forward(plain, layer, x, of_dy):
    """Multiply the mean token of x in bf16, or also that of dy. (Averis, arXiv:2603.10444)

    The mean is over all tokens of the batch. That it tells something of later tokens does not matter: but for
    the rounding, it cancels.
    """
    w = layer.weight.bfloat16()
    tokens = x.reshape(-1, x.shape[-1])
    mean = tokens.float().mean(0, keepdim=True).bfloat16()
    rest = tokens - mean.to(x.dtype)
    y = plain(layer, rest)
    if of_dy:
        y = SplitGradient.apply(y, rest, w)
    y = y + F.linear(mean, w).to(y.dtype)
    return y.view(*x.shape[:-1], layer.out_features)


def low_rank_forward(plain, layer, x):
    """Multiply RANK singular vectors of the weight in bf16, and the rest of it in 4 bits."""
    tokens = x.reshape(-1, x.shape[-1]).bfloat16()
    rest = (layer.weight - layer.branch).bfloat16()
    apply = quartet.backend_of(layer, layer.weight).QuantizedMatmul.apply
    y = apply(tokens, rest, layer.recipe, *quartet.NOTHING) + F.linear(tokens, layer.branch.bfloat16())
    return y.view(*x.shape[:-1], layer.out_features)


def find_branches(run):
    """Take the largest singular vectors of each weight: at the start, and anew every WINDOW steps."""
    if hasattr(run, "found") and run.step % WINDOW:
        return
    run.found = True
    for m in quartet.quantized_layers(run.model).values():
        m.branch.copy_(largest(m.weight))


def largest(w):
    """w (N, K) -> of its singular values the RANK largest, (N, K), float32."""
    U, s, V = torch.linalg.svd(w.float(), full_matrices=False)
    return U[:, :RANK] * s[:RANK] @ V[:RANK]


def low_rank(forward):
    """Multiply by a `forward` that takes layer.branch, of `find_branches`; the first step has none yet."""
    plain = quartet.Linear.__init__

    def init(layer, *args, **kwargs):
        plain(layer, *args, **kwargs)
        layer.register_buffer("branch", torch.zeros_like(layer.weight.detach()), persistent=False)

    quartet.Linear.__init__ = init
    in_4_bits(forward)
    around_updates(after=find_branches)


# ---- 4. What x has lost ------------------------------------------------------------------------------------

@torch.no_grad()
def lost(layer, x):
    """x (..., K) minus its quantized values, (..., K) bf16. For recipes that quantize x as they do w."""
    tokens = x.reshape(-1, x.shape[-1]).bfloat16()
    rest = tokens - quartet.backend_of(layer, layer.weight).on_grid(tokens, layer.recipe)
    return rest.view(x.shape)


def rest_forward(plain, layer, x):
    """y of x, and of what it has lost, along RANK singular vectors of the weight, in bf16."""
    y = plain(layer, x)
    with torch.no_grad():
        rest = F.linear(lost(layer, x), layer.branch.bfloat16())
    return y + rest.to(y.dtype)


def x_in_bf16_late():
    """In the last steps, those of --bf16_forward_end, only x is in bf16, and w in 4 bits."""
    def name_of(recipe):
        name = f"{recipe}+x_in_bf16"
        quartet.RECIPES[name] = quartet.RECIPES[recipe]._replace(x="bf16")
        return name

    train_gpt.in_bf16_forward = name_of


# ---- 5. The rows -------------------------------------------------------------------------------------------

def sr_46(x, R, seed):
    """SR with 4/6, which is biased, as a quantizer of quartet.QUANTIZERS: experiments.py has rows of it."""
    return demonstrate.sr_four_six(quartet.rotate(x, R), seed)


IDEAS = {    # row: its recipe, what changes train_gpt.py or quartet.py, its knobs
    "quintet_reset": ("quintet", partial(around_updates, after=reset)),
    "quintet_reset_alone": ("quintet", reset_alone),
    "quintet_coupled": ("quintet", coupled),
    "quintet_t2": ("quintet", partial(ramp_by, 2)),
    "quintet_t8": ("quintet", partial(ramp_by, 8)),
    "quintet_average": ("quintet", partial(around_updates, after=average)),
    "quintet_mean": ("quintet", partial(in_4_bits, partial(split_forward, of_dy=False))),
    "quintet_mean_dy": ("quintet", partial(in_4_bits, partial(split_forward, of_dy=True))),
    "quartet2_low_rank": ("quartet2", partial(low_rank, low_rank_forward)),
    "quintet_x_end": ("quintet", x_in_bf16_late, "--bf16_forward_end=0.1"),
    "quintet_rest": ("quintet", partial(low_rank, rest_forward)),
}
