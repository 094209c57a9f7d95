"""Does it matter how the GEMMs of a trained model add: in float32, as here, or as FP4 tensor cores do?

    python data/evidence/sums.py RUN ... [--batch=4] [--recipe=RECIPE] [--out=FILE]

One forward and backward pass of each checkpoint on a batch of validation text, by its own recipe. Every
output of every GEMM, y, dx and dw of all hidden layers, is computed twice from the same operands: by
quartet.gemm, which this project trains with, and by quartet.fp4_gemm, which adds as FP4 tensor cores were
seen to add (quartet.py, section 10). Both end in bf16. Printed is how many of the outputs differ.

Beside it, the same for emulation as others do it. Their tensor scales are not powers of two, so that a
decoded value, code * block scale * tensor scale, must be rounded to bf16 before a GEMM in bf16 takes it,
where an FP4 GEMM multiplies by the tensor scales at the end. The operands are the same here, but each tensor
scale is multiplied by the m in [1, 2) that amax / 1536 has beside a power of two: the tensor scale that
Quartet II's own code gives a tensor quantized by 4/6.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import quartet
import train_gpt

RANGE = 6 * 256    # Quartet II's amax in units of its tensor scale


def scale_of_others(t):
    """t, decoded values -> m in [1, 2), () float32: amax / 1536 = m 2^n. 1 where amax is 0."""
    mantissa, _ = (t.abs().amax().float() / RANGE).frexp()
    return torch.where(mantissa > 0, 2 * mantissa, 1.0)


def rounded_gemm(a, b, n):
    """a (M, K), b (N, K), decoded values, times `scale_of_others`, in bf16 -> a b^T / n (M, N) bf16.

    Returns that of a GEMM in bf16, which takes rounded values, and that of an FP4 GEMM, which does not.
    """
    a_scale = scale_of_others(a)
    b_scale = scale_of_others(b)
    a_rounded = (a.float() * a_scale).bfloat16().to(a.dtype)
    b_rounded = (b.float() * b_scale).bfloat16().to(b.dtype)
    return gemm(a_rounded, b_rounded, n), quartet.fp4_gemm(a, b, n / (a_scale * b_scale).item())


gemm = quartet.gemm
KINDS = {"forward_gemm": "y", "dgrad_gemm": "dx", "wgrad_gemm": "dw"}    # functions of quartet.py


class Count:
    """Takes the place of quartet.gemm, and counts outputs that another GEMM would make otherwise."""

    def __init__(self):
        self.kind = "y"
        # Of each GEMM: its outputs, those that FP4 tensor cores add to another value, and the others'.
        self.found = {kind: [0, 0, 0] for kind in KINDS.values()}

    def __call__(self, a, b, n=1):
        y = gemm(a, b, n)
        plain = (y != quartet.fp4_gemm(a, b, n)).sum().item()
        rounded, exact = rounded_gemm(a, b, n)
        other = (rounded != exact).sum().item()
        before = self.found[self.kind]
        self.found[self.kind] = [old + new for old, new in zip(before, (y.numel(), plain, other))]
        return y

    def during(self, function, kind):
        """A function of quartet.py, whose GEMM is of this kind."""
        def counted(*args):
            self.kind = kind
            return function(*args)

        return counted


def measure(run, batch, recipe):
    """-> {GEMM: [outputs, others of FP4 tensor cores, others of rounded operands]} of a run, and its text."""
    # By quartet.py itself: on a GPU with FP4 tensor cores, kernels.py would leave the GEMMs to these.
    knobs = dict(batch=batch, backend="torch", device="auto", compile="off", gemm="plain")
    if recipe:
        knobs["recipe"] = recipe
    model, c = train_gpt.load_model(run, **knobs)
    torch.manual_seed(c.seed)
    data = train_gpt.Shards(c, train_gpt.find_corpus(c), "val", model.rope.device.type)
    count = Count()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(quartet, "gemm", count))
        for name, kind in KINDS.items():
            counted = count.during(getattr(quartet, name), kind)
            stack.enter_context(mock.patch.object(quartet, name, counted))
        model(*data.random(0, 0)).backward()
    size = sum(p.numel() for block in model.blocks for p in block.parameters())
    name = (f"{c.name or run}, {c.recipe}, {size / 1e6:.1f}M parameters in blocks, "
            f"{batch} x {c.sequence} tokens")
    return count.found, name


def main(argv):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="of train_gpt.py: paths, or names in runs/")
    parser.add_argument("--batch", type=int, default=4, help="windows of validation text")
    parser.add_argument("--recipe", help="default: that of the run")
    parser.add_argument("--out", help="the numbers, a line of JSON a run")
    options = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}: of so many outputs, these are others in bf16")
    lines = []
    for run in options.runs:
        found, name = measure(run, options.batch, options.recipe)
        print(f"\n{name}\n{'':4}{'outputs':>15}{'by the sum':>15}{'by rounded operands':>22}")
        for kind, (outputs, plain, rounded) in found.items():
            print(f"{kind:4}{outputs:15,}{plain:15,}{rounded:15,}{rounded / outputs:7.1%}", flush=True)
        lines.append(json.dumps(dict(run=name, device=device, torch=torch.__version__, gemms=found)))
        if options.out:
            Path(options.out).write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (train_gpt.UserError, ValueError, OSError) as e:
        sys.exit(f"sums.py: {e}")
