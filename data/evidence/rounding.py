"""What it costs a trained model to round which operand of its forward pass, by which quantizer.

    python data/evidence/rounding.py RUN ... [--tokens=4194304] [--out=FILE]

Each checkpoint is validated in bf16, and then with parts in 4 bits: x, w or both, of all hidden layers; then
x of layers of one kind, and of one block. Nothing is trained. Two rows help to read the others. "noise" is x
plus normal noise that has, in each block of 16, the mean square of what scale_search loses there: if it costs
as much, only the squared error of a rounding counts. "two terms" is x as --two_terms_end has it.
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import quartet
import train_gpt

QUANTIZERS = "rtn", "four_six", "scale_search"
EXACT = quartet.Gemm(None, dy="bf16", other="bf16")


class Part(NamedTuple):
    """What is in 4 bits."""
    name: str
    row: quartet.Recipe     # of these layers; all others are in bf16
    layers: list            # their names


def noise(x, R, seed):
    """In place of a quantizer's x (..., K): x plus noise, in bf16. See the top of this file."""
    lost = x - quartet.decode(quartet.scale_search(x))
    size = lost.unflatten(-1, (-1, quartet.BLOCK)).square().mean(-1, keepdim=True).sqrt()
    drawn = torch.randn_like(lost).unflatten(-1, (-1, quartet.BLOCK)) * size
    return quartet.unquantized(x + drawn.flatten(-2), None, seed)


def parts(names):
    """Yield all Parts of a model, names being those of its hidden layers: blocks.0.qkv and so on."""
    def row(x, w, two_terms=False):
        return quartet.Recipe(x, w, EXACT, EXACT, two_terms=two_terms)

    # All layers
    for q in QUANTIZERS:
        yield Part(f"x and w, {q}", row(q, q), names)
    for q in QUANTIZERS:
        yield Part(f"w, {q}", row("bf16", q), names)
    for q in QUANTIZERS:
        yield Part(f"x, {q}", row(q, "bf16"), names)
    yield Part("x, noise", row("noise", "bf16"), names)
    yield Part("x in two terms, scale_search", row("scale_search", "bf16", two_terms=True), names)
    yield Part("x in two terms and w, scale_search", row("scale_search", "scale_search", two_terms=True),
               names)

    # Some
    x = row("scale_search", "bf16")
    kinds = dict.fromkeys(name.split(".")[-1] for name in names)
    for kind in kinds:
        yield Part(f"x of {kind}, scale_search", x, [name for name in names if name.endswith(f".{kind}")])
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in names)
    for block in blocks:
        yield Part(f"x of {block}, scale_search", x, [name for name in names if name.startswith(f"{block}.")])


def use(model, part):
    """Let a model's hidden layers multiply by a Part; None: all in bf16."""
    model.use_recipe("bf16", "torch")
    if part is None:
        return
    quartet.RECIPES[part.name] = part.row
    for name in part.layers:
        m = model.get_submodule(name)
        m.recipe = part.name
        # The kernels know nothing of noise.
        m.backend = "torch" if part.row.x == "noise" else "auto"


def measure(run, tokens):
    """Yield {"part": name, "loss": nats a token} of each Part of a run; of all in bf16 first."""
    # Compiled, each part would be another program.
    model, c = train_gpt.load_model(run, recipe="bf16", compile="off", device="auto")
    c = dataclasses.replace(c, eval_tokens=tokens or c.eval_tokens)
    data = train_gpt.Shards(c, train_gpt.find_corpus(c), "val", model.rope.device.type)
    names = [name for name, m in model.named_modules() if isinstance(m, quartet.Linear)]
    for part in [None, *parts(names)]:
        use(model, part)
        torch.manual_seed(c.seed)      # for the noise
        yield dict(part=part.name if part else "bf16", loss=train_gpt.evaluate(model, data, c))


def main(argv):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="of train_gpt.py: paths, or names in runs/")
    parser.add_argument("--tokens", type=int, help="of validation text at most (the run's eval_tokens)")
    parser.add_argument("--out", help="the numbers, a line of JSON each")
    options = parser.parse_args(argv)
    quartet.QUANTIZERS["noise"] = noise
    quartet.load_kernels()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = []
    for run in options.runs:
        print(f"\n{run}, {device}, torch {torch.__version__}")
        print(f"{'in 4 bits':36}{'loss':>10}{'1e-3 nats above bf16':>23}")
        base = None
        for found in measure(run, options.tokens):
            loss = found["loss"]
            base = loss if base is None else base
            print(f"{found['part']:36}{loss:10.4f}{1e3 * (loss - base):23.2f}", flush=True)
            lines.append(json.dumps(dict(run=run, device=device, torch=torch.__version__, **found)))
            if options.out:
                Path(options.out).write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (train_gpt.UserError, ValueError, OSError) as e:
        sys.exit(f"rounding.py: {e}")
