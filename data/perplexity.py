"""Post-training quantization of any causal language model that transformers loads: perplexity on a text.

    python data/perplexity.py MODEL TEXT [--rows=rtn_weights,rtn_both] [--window=2048] [--batch=1]
                              [--tokens=N] [--device=cpu]

As usual for WikiText-2, the text is one sequence of tokens, cut into windows without overlap; each token but
a window's first is predicted from those before it in the window. Every nn.Linear but the head is quantized,
by quartet.quantize_model: experts that a model keeps in one 3-D tensor are not, nor layers that blocks of 16
do not divide, such as a gate of one column; these, and how much is quantized, are printed. Needs the package
transformers, and for a GGUF file gguf and accelerate.

A row of the table is a forward pass: rtn_16x16_weights quantizes weights by rtn in blocks of 16x16, rtn_both
also inputs, always in 1x16. Each row is compared with the first and with the one above it, window by window.
+- is half of the 95% interval of that difference (Student's t). It takes windows as independent; neighbours
often share an article.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quartet


# ---- 1. Losses ---------------------------------------------------------------------------------------------

BASE = "all in bf16"


def rows():
    """Make recipes of all post-training quantizations -> their names; only their forward pass is defined.

    weights, in blocks of 1x16 or 16x16; or both, weights and inputs, these always in 1x16. BASE is the first.
    """
    operands = {BASE: ("bf16", "bf16")}      # quantizers of x and w
    for block in ("", "_16x16"):
        for q in ("rtn", "four_six", "scale_search"):
            operands[f"{q}{block}_weights"] = ("bf16", q + block)
        for q in ("rtn", "four_six", "scale_search"):
            operands[f"{q}{block}_both"] = (q, q + block)
    exact = quartet.Gemm(None, "bf16", "bf16")
    for name, (x, w) in operands.items():
        quartet.RECIPES[name] = quartet.Recipe(x, w, exact, exact)
    return list(operands)


def unfit(model):
    """Names of the layers that one of `rows` cannot quantize, the head not counted."""
    recipes = rows()
    found = []
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings():
            try:
                for recipe in recipes:
                    quartet.check(recipe, "auto", m.in_features, m.out_features)
            except ValueError:
                found.append(name)
    return found


def left_alone(model):
    """Names of what is not quantized: what makes logits, if there is such a module, and what does not fit."""
    return [name for name, m in model.named_modules() if m is model.get_output_embeddings()] + unfit(model)


def progress(text):
    """Show text in the last line of a terminal, until something else is printed there; "" clears it."""
    if sys.stderr.isatty():
        print(f"\r{text}\33[K", end="\r", file=sys.stderr)


@torch.no_grad()
def evaluate(model, windows, batch, name=""):
    """windows (n, T) int64 -> (n,) float64, mean cross-entropy of tokens 2 to T of each, in nats.

    name: for progress.
    """
    found = []
    with quartet.quantized_weights(model):
        for i in range(0, len(windows), batch):
            tokens = windows[i:i + batch].to(model.device)
            logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
            found.append(losses.view(len(tokens), -1).double().mean(1).cpu())
            progress(f"{name}: {min(i + batch, len(windows))} of {len(windows)} windows")
    progress("")
    return torch.cat(found)


def measure(model, windows, batch, names):
    """Yield name, losses of windows: the model as it is, then by BASE, then by each of names."""
    yield "as it is", evaluate(model, windows, batch, "as it is")
    for name in [BASE, *names]:
        quartet.quantize_model(model, name, skip=left_alone(model))
        yield name, evaluate(model, windows, batch, name)


def half_interval(differences):
    """differences (n,) -> half of the 95% interval of their mean, by Student's t: NaN of fewer than 3."""
    n = len(differences)
    if n < 3:
        return math.nan
    # The quantile's expansion in 1 / degrees of freedom (Abramowitz and Stegun 26.7.5): 0.8% too small for
    # n = 3, and exact to four digits from n = 8 on.
    d = n - 1
    t = 1.95996 + 2.37227 / d + 2.82250 / d**2 + 2.55585 / d**3 + 1.58953 / d**4
    return t * differences.std().item() / math.sqrt(n)


def show(measured):
    """Print (name, losses of windows (n,), in nats a token), one after another, as a table."""
    print(f"{'forward pass':30}{'loss':>9}{'minus first':>13}{'+-':>9}{'minus above':>13}{'+-':>9}"
          f"{'perplexity':>12}", flush=True)
    first = above = None
    for name, losses in measured:
        if first is None:
            first = above = losses
        loss = losses.mean().item()
        columns = f"{name:30}{loss:9.4f}"
        for other in (first, above):
            differences = losses - other
            columns += f"{differences.mean():13.4f}{half_interval(differences):9.4f}"
        perplexity = math.inf if loss > 700 else math.exp(loss)      # beyond, exp would overflow
        digits = ".3e" if loss > 16 else ".3f"
        print(f"{columns}{perplexity:12{digits}}", flush=True)
        above = losses


# ---- 2. The command line -----------------------------------------------------------------------------------
#
# Each mistake is a ValueError of one line, which names the value and the way out.

def check(a):
    """ValueError for knobs that cannot be, before a model is loaded."""
    for knob, least in dict(window=2, batch=1, tokens=2).items():
        value = getattr(a, knob)
        if value is not None and value < least:
            raise ValueError(f"--{knob}={value}: too small, it must be at least {least}")
    _, *names = rows()
    for name in a.rows.split(","):
        if name not in names:
            raise ValueError(f"--rows={a.rows}: {name!r} is none of {', '.join(names)}")
    try:
        torch.empty(1, device=a.device)
    except (RuntimeError, AssertionError):      # the latter of a PyTorch without CUDA
        raise ValueError(f"--device={a.device}: PyTorch has none here; leave the knob out") from None


def load(name, device):
    """A model's name, directory or .gguf -> its tokenizer, and the model; one in few bits is decoded."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
    except ImportError as e:
        raise ValueError(f"{e}: pip install transformers") from None
    place = dict(pretrained_model_name_or_path=name)
    if name.endswith(".gguf"):
        path = Path(name)
        place = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        config = AutoConfig.from_pretrained(**place)
        quantization = getattr(config, "quantization_config", None) or {}
        method = quantization.get("quant_method")
        if method not in (None, "compressed-tensors"):
            raise ValueError(f"by {method}: take the original")
        knobs = dict(dtype="auto")
        if method:
            knobs["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**place, **knobs)
        return tokenizer, model.to(device).eval()
    except Exception as e:      # of transformers, and of what it reads files by
        if "allocate" in str(e):
            raise
        raise ValueError(f"cannot load {name}: {type(e).__name__}: {e}") from None


def cut(text, tokenizer, model, a):
    """text -> windows (n, a.window) int64 of its tokens. ValueError if it has none that the model takes."""
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][:a.tokens]
    n = len(tokens) // a.window
    if not n:
        raise ValueError(f"{a.text}: {len(tokens)} tokens, less than a --window={a.window}: shorten it")
    most = getattr(model.config, "max_position_embeddings", a.window)
    if a.window > most:
        raise ValueError(f"--window={a.window}: the model knows {most} positions, take these")
    vocabulary = len(model.get_input_embeddings().weight)
    if tokens.max() >= vocabulary:
        raise ValueError(f"{a.model}: its tokenizer makes token {tokens.max()}, it has {vocabulary}")
    return tokens[:n * a.window].view(n, a.window)


def main(argv):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a name on the Hugging Face hub, or a directory; or "
                        "a GGUF file in one of these, MODEL/FILE.gguf")
    parser.add_argument("text", metavar="TEXT", type=Path, help="a file in UTF-8")
    names = rows()[1:]
    parser.add_argument("--rows", metavar="NAMES", default=",".join(names), help="rows of the table, by "
                        f"commas, in the order wanted; default: all, which are {', '.join(names)}")
    parser.add_argument("--window", type=int, default=2048, help="tokens of context; default: 2048")
    parser.add_argument("--batch", type=int, default=1, help="windows at a time; default: 1")
    parser.add_argument("--tokens", type=int, help="of the text, at most; default: all")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: cuda if there is one, else cpu")
    a = parser.parse_args(argv)

    # Read what it says.
    check(a)
    if not a.text.is_file():
        raise ValueError(f"{a.text} is no file of text")
    try:
        text = a.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{a.text}: not in UTF-8, {e}") from None
    tokenizer, model = load(a.model, a.device)
    windows = cut(text, tokenizer, model, a)

    # Before hours of work, say what will be quantized. bf16 changes no number.
    swapped = quartet.quantize_model(model, "bf16", skip=left_alone(model))
    if not swapped:
        raise ValueError(f"{a.model} has no nn.Linear but its head that fits: nothing to quantize here")
    if unfit(model):
        print(f"left as they are, as 16 does not divide them: {', '.join(unfit(model))}")
    size = sum(model.get_submodule(name).weight.numel() for name in swapped)
    print(f"{a.model}: {len(swapped)} linear layers, {size / model.num_parameters():.0%} of the parameters; "
          f"{len(windows)} windows of {a.window} tokens, {a.device}")
    start = time.perf_counter()
    show(measure(model, windows, a.batch, a.rows.split(",")))
    print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"perplexity.py: {e}")
    except RuntimeError as e:
        if "allocate" not in str(e):
            raise
        sys.exit(f"perplexity.py: out of memory, try a smaller --batch or --window. {str(e).splitlines()[0]}")
