"""Post-training quantization of any causal language model that transformers loads: perplexity on a text.

    python data/perplexity.py MODEL TEXT [--window=2048] [--batch=1] [--tokens=N] [--device=cpu]

MODEL: a name on the Hugging Face hub, or a directory. TEXT: a file in UTF-8. As usual for WikiText-2, it is
one sequence of tokens, cut into windows without overlap; each token but a window's first is predicted from
those before it in the window. Every nn.Linear but the head is quantized, by quartet.quantize_model: experts
that a model keeps in one 3-D tensor are not; how much of it is quantized is printed. Needs the package
transformers.
"""
import argparse, math, sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quartet

def rows():
    """Make recipes of all post-training quantizations -> their names; only their forward pass is defined.

    weights, in blocks of 1x16 or 16x16; or inputs, too, always 1x16. The first, bf16 of all, is the base.
    """
    exact, found = quartet.Gemm(None, "bf16", "bf16"), {"all in bf16": ("bf16", "bf16")}
    for q in "rtn", "four_six", "scale_search":
        for block in "", "_16x16":
            found[f"{q}{block}, weights"] = "bf16", q + block
            found[f"{q}{block}, and inputs"] = q, q + block
    quartet.RECIPES.update({name: quartet.Recipe(*xw, exact, exact) for name, xw in found.items()})
    return list(found)

def show(losses, more=lambda loss: ""):
    """Print losses, (name, nats a token) one after another, as a table; differences are to the first."""
    print(f"{'forward pass':30}{'loss':>9}{'difference':>12}{'perplexity':>12}", flush=True)
    base = None
    for name, loss in losses:
        base = loss if base is None else base
        perplexity, kind = math.inf if loss > 700 else math.exp(loss), "3e" if loss > 16 else "3f"
        print(f"{name:30}{loss:9.4f}{loss - base:12.4f}{perplexity:12.{kind}}{more(loss)}", flush=True)

@torch.no_grad()
def evaluate(model, windows, batch, note=lambda done: None):
    """windows (n, T) int64 -> mean cross-entropy of tokens 2 to T of each, in nats. note: of progress."""
    total = torch.zeros((), dtype=torch.float64)
    with quartet.quantized_weights(model):
        for i in range(0, len(windows), batch):
            tokens = windows[i:i + batch].to(model.device)
            logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").double().cpu()
            note(min(i + batch, len(windows)))
    return total.item() / (len(windows) * (windows.shape[1] - 1))

def head_of(model):
    """Names of the module that makes logits, () if there is none: these are not quantized."""
    return tuple(name for name, m in model.named_modules() if m is model.get_output_embeddings())

def losses(model, windows, batch):
    """Yield name, loss: the model as it is, then quantized by each of `rows`; progress goes to stderr."""
    def run(name):
        def note(done): print(f"\r{name}: {done} of {len(windows)} windows\33[K", end="\r", file=sys.stderr)
        loss = evaluate(model, windows, batch, note if sys.stderr.isatty() else lambda done: None)
        if sys.stderr.isatty(): print("\33[K", end="", file=sys.stderr)
        return name, loss
    yield run("as it is")
    for name in rows():
        quartet.quantize_model(model, name, skip=head_of(model))
        yield run(name)

def main(argv):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a name on the Hugging Face hub, or a directory")
    parser.add_argument("text", type=Path, help="a file in UTF-8")
    parser.add_argument("--window", type=int, default=2048, help="tokens of context")
    parser.add_argument("--batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--tokens", type=int, help="of the text, at most; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    for knob, least in dict(window=2, batch=1, tokens=2).items():
        if (value := getattr(a, knob)) is not None and value < least:
            raise ValueError(f"--{knob}={value}: too small, it must be at least {least}")
    try: torch.empty(1, device=a.device)
    except (RuntimeError, AssertionError):          # the latter of a PyTorch without CUDA
        raise ValueError(f"--device={a.device}: PyTorch has none here; leave the knob out") from None
    try: from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
    except ImportError as e: raise ValueError(f"{e}: pip install transformers") from None
    try: text = a.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as e: raise ValueError(f"{a.text}: not in UTF-8, {e}") from None
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(a.model), AutoConfig.from_pretrained(a.model)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method not in (None, "compressed-tensors"): raise ValueError(f"by {method}: take the original")
        decoded = dict(quantization_config=CompressedTensorsConfig(dequantize=True)) if method else {}
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto", **decoded).to(a.device).eval()
    except Exception as e:                          # of transformers, and of what it reads files by
        if "allocate" in str(e): raise
        raise ValueError(f"cannot load {a.model}: {type(e).__name__}: {e}") from None
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][:a.tokens]
    n = len(tokens) // a.window
    if not n: raise ValueError(f"{a.text}: {len(tokens)} tokens, less than a --window={a.window}: shorten it")
    most, known = getattr(model.config, "max_position_embeddings", a.window), model.get_input_embeddings()
    if a.window > most: raise ValueError(f"--window={a.window}: the model knows {most} positions, take these")
    if tokens.max() >= len(known.weight):
        raise ValueError(f"{a.model}: its tokenizer makes token {tokens.max()}, it has {len(known.weight)}")
    for recipe in *rows(), "bf16": swapped = quartet.quantize_model(model, recipe, skip=head_of(model))
    if not swapped: raise ValueError(f"{a.model} has no nn.Linear but its head: nothing to quantize here")
    size = sum(model.get_submodule(name).weight.numel() for name in swapped) / model.num_parameters()
    print(f"{a.model}: {len(swapped)} linear layers, {size:.0%} of the parameters; {n} windows of {a.window} "
          f"tokens, {a.device}")
    show(losses(model, tokens[:n * a.window].view(n, a.window), a.batch))

if __name__ == "__main__":
    try: main(sys.argv[1:])
    except (ValueError, OSError) as e: sys.exit(f"perplexity.py: {e}")
    except RuntimeError as e:
        if "allocate" not in str(e): raise
        sys.exit(f"perplexity.py: out of memory, try a smaller --batch or --window. {str(e).splitlines()[0]}")
