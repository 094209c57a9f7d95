"""Write a trained model as a Llama, or with QK norm a Qwen3, for transformers, vLLM and what else reads those.

    python data/export.py RUN DIR [--format=hf|compressed-tensors] [--inputs=16|4] [--other_code]

hf                  layers that a recipe quantizes in bf16, the values that the forward pass multiplied; all
                    else in float32
compressed-tensors  the same values in 4 bits, `nvfp4-pack-quantized`: codes and scales as trained; all else
                    in bf16, which is what the package of that name decodes the codes to

A recipe like quartet2 trains with weights that are NVFP4, so neither rounds those again. DIR also gets a
tokenizer, if tokens are bytes, and a model card, README.md. Needs the package safetensors.

Inputs are not quantized unless you say so: software that loads the files multiplies these weights by inputs
of its own precision. With --inputs=4, of compressed-tensors, it also quantizes the inputs of these layers,
which is what FP4 tensor cores multiply in vLLM. Each layer then has an input_global_scale, (1,) float32. It
divides: a block of 16 inputs has the local scale E4M3(input_global_scale * amax / 6), found while the model
runs, and a value is q * local scale / input_global_scale. That package takes 448 * 6 / amax of inputs.
Ours is the next power of two below, which quartet.rtn chooses for the inputs of one validation batch.

So inputs are rounded as by quartet.rtn, to nearest, but with a tensor scale that stays: a block whose scale
would be beyond 448 is clipped. Runs by rtn, nvidia and tetrajet2 were trained by this rounding, but for the
clipping; others by a finer one, 4/6 or a search over scales, and their validation loss is by that.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quartet
import train_gpt
from train_gpt import UserError


# ---- 1. Tensors --------------------------------------------------------------------------------------------

# Names in train_gpt.GPT -> names in Llama and Qwen3: of the model, and of each block but its linear layers
MODEL_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
NORM_NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
# The linear layers of a block, which `split` renames
LINEARS = ("qkv", "out", "up", "down")


def architecture(c):
    """The name of the architecture that the model of a Config is: a Qwen3 is a Llama with QK norm."""
    return "Qwen3" if c.qk_norm == "true" else "Llama"


def half_split(w, heads):
    """Rows of w (heads * D, K) of q or k, so that RoPE turns row i with i + D/2 of a head, not 2i with 2i+1.

    train_gpt.rotary turns neighbours, transformers' Llama halves. Rows move, so blocks of 16 stay whole.
    """
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def split(layer, w, c):
    """A tensor with a row for every output of train_gpt.Block's layer -> {name in Llama: its rows}."""
    if layer == "qkv":
        kv_heads = c.kv_heads or c.heads
        q, k, v = w.unflatten(0, (c.heads + 2 * kv_heads, -1)).split([c.heads, kv_heads, kv_heads])
        return {
            "self_attn.q_proj": half_split(q.flatten(0, 1), c.heads),
            "self_attn.k_proj": half_split(k.flatten(0, 1), kv_heads),
            "self_attn.v_proj": v.flatten(0, 1),
        }
    if layer == "up":
        gate, up = w.chunk(2)
        return {"mlp.gate_proj": gate, "mlp.up_proj": up}
    if layer == "out":
        return {"self_attn.o_proj": w}
    return {"mlp.down_proj": w}


def packed_split(layer, t, input_scale, c):
    """A layer's weight, NVFP4 -> {name in Llama: tensor}, in 4 bits as `tensors` says."""
    out = {}
    scales = split(layer, t.block_scale, c)
    for name, codes in split(layer, t.codes, c).items():
        out[f"{name}.weight_packed"] = codes
        out[f"{name}.weight_scale"] = scales[name]
        # q, k and v share one, and so do gate and up: vLLM multiplies by them at once.
        out[f"{name}.weight_global_scale"] = 1 / t.tensor_scale.view(1)
        if input_scale is not None:
            out[f"{name}.input_global_scale"] = 1 / input_scale.view(1)
    return out


def quantized_layers(c):
    """Names of the layers whose weights the forward pass of a Config quantizes."""
    train_gpt.known(c.recipe, quartet.RECIPES, f"recipe {c.recipe!r} is unknown, add it to quartet.py")
    recipe = quartet.RECIPES[c.recipe]
    if not recipe or recipe.w == "bf16":
        return []
    # A model without memory tells.
    with torch.device("meta"):
        return [*train_gpt.GPT(c).quantized_linears()]


def layout(c, state, quantized, packed=False, scales=None):
    """What `tensors` returns, but all else in the dtype that it has. quantized: names of layers in NVFP4."""
    out = {}
    ignore = ["lm_head"]
    for ours, theirs in MODEL_NAMES.items():
        out[f"{theirs}.weight"] = state[f"{ours}.weight"]
    for i in range(c.layers):
        block = f"blocks.{i}"
        at = f"model.layers.{i}"
        for ours, theirs in NORM_NAMES.items():
            out[f"{at}.{theirs}.weight"] = state[f"{block}.{ours}.weight"]
        if c.qk_norm == "true":
            # Ours have no gains.
            for name in "qk":
                out[f"{at}.self_attn.{name}_norm.weight"] = torch.ones(c.width // c.heads)

        for layer in LINEARS:
            w = state[f"{block}.{layer}.weight"]
            if f"{block}.{layer}" in quantized:
                t = quartet.NVFP4(*quartet.quantized(w.bfloat16(), c.recipe))
                if packed:
                    parts = packed_split(layer, t, scales.get(f"{block}.{layer}"), c)
                    for name, part in parts.items():
                        out[f"{at}.{name}"] = part
                    continue
                w = quartet.decode(t, torch.bfloat16)
            for name, rows in split(layer, w, c).items():
                out[f"{at}.{name}.weight"] = rows
                ignore.append(f"{at}.{name}")
    return out, ignore


# ---- 2. What is neither a Llama nor a Qwen3 ----------------------------------------------------------------

@torch.no_grad()
def llama(c, tokens, weight, linear):
    """tokens (B, T) -> the logits of a Llama or Qwen3 (B, T, vocab_size), as transformers computes them.

    weight(name) is the weight of a norm or of the embedding, linear(x, name) multiplies by that of a layer.
    """
    D = c.width // c.heads
    frequency = 1e4 ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(tokens.shape[1]), frequency).repeat(1, 2)

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], weight(name).float(), 1e-5)

    def heads(x):
        return x.unflatten(-1, (-1, D)).transpose(1, 2)

    def rope(x):
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    x = weight("model.embed_tokens").float()[tokens]
    for i in range(c.layers):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = [heads(linear(h, f"{at}.self_attn.{name}_proj")) for name in "qkv"]
        if c.qk_norm == "true":
            # Before they turn, ours after it: that changes no length.
            q = norm(q, f"{at}.self_attn.q_norm")
            k = norm(k, f"{at}.self_attn.k_norm")
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        h = F.silu(linear(h, f"{at}.mlp.gate_proj")) * linear(h, f"{at}.mlp.up_proj")
        x = x + linear(h, f"{at}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


def refuse_other_models(c, state):
    """UserError, which names what is odd, unless the model of a run is a Llama or a Qwen3."""
    # NanoChatForCausalLM of transformers has the block with qk_norm and relu2. But it also normalises the
    # embedding, which ours does not, and its norms have no gains, which ours would have to hand over to the
    # quantized layers after them. So it is no way out.
    kind = architecture(c)
    if c.mlp != "swiglu":
        raise UserError(f"--mlp={c.mlp}: {kind} has no such block, only --mlp=swiglu")

    # A fork may have another model. These are the shapes of all weights of ours.
    keys = (c.kv_heads or c.heads) * c.width // c.heads
    block = dict(norm1=[c.width], norm2=[c.width], qkv=[c.width + 2 * keys, c.width],
                 out=[c.width, c.width], up=[2 * c.hidden, c.width], down=[c.width, c.hidden])
    shapes = {"embedding.weight": [c.vocab_size, c.width]}
    for i in range(c.layers):
        shapes |= {f"blocks.{i}.{layer}.weight": shape for layer, shape in block.items()}
    shapes |= {"norm.weight": [c.width], "head.weight": [c.vocab_size, c.width]}

    other = f"the model is not the {kind} of train_gpt.py, so data/export.py must be changed, too: "
    found = {name: [*t.shape] for name, t in state.items()}
    for name in shapes | found:
        if found.get(name) != shapes.get(name):
            raise UserError(f"{other}{name} is {found.get(name, 'missing')}, and in a {kind} "
                            f"{shapes.get(name, 'missing')}")
    for name in quantized_layers(c):
        if name.rpartition(".")[2] not in LINEARS:
            raise UserError(f"{other}{name} is quantized")

    # Another activation has no shape. So compute a few logits both ways, in float32, nothing quantized.
    model = train_gpt.GPT(c).eval()
    model.load_state_dict(state, assign=True)
    weights, _ = layout(c, state, [])
    tokens = torch.arange(min(c.sequence, 32))[None] % c.vocab_size
    with torch.no_grad():
        expected = model(tokens)
    if not expected.isfinite().all():
        raise UserError("the logits of the model are not finite: the weights have diverged")
    logits = llama(c, tokens, lambda name: weights[f"{name}.weight"],
                   lambda x, name: F.linear(x, weights[f"{name}.weight"]))
    error = ((logits - expected).norm() / expected.norm()).item()
    if not error < 1e-3:
        raise UserError(f"{other}its logits are others, by {error:.1%}")


# ---- 3. Inputs in 4 bits, and all tensors ------------------------------------------------------------------

@torch.no_grad()
def input_scales(c, state):
    """The tensor scale of each quantized layer's inputs, {name: () float32}, a power of two.

    It is what quartet.rtn chooses for the inputs of the trained model in the first validation batch.
    UserError if the run's corpus is not here.
    """
    # The run's machine may have had a GPU, and this one none.
    c = dataclasses.replace(c, backend="auto")
    if not torch.cuda.is_available():
        c = dataclasses.replace(c, device="cpu")
    device = train_gpt.pick_device(c)
    data = train_gpt.Shards(c, train_gpt.find_corpus(c), "val", device)
    inputs, _ = next(data.in_order())
    model = train_gpt.GPT(c)
    model.load_state_dict(state)
    model.to(device).use_recipe(c.recipe, c.backend)

    # Each layer's amax, of its inputs in bf16 as they are quantized, becomes the largest block scale.
    found = {}
    for name, m in model.quantized_linears().items():
        def look(m, args, name=name):
            amax = args[0].bfloat16().abs().amax().float()
            largest = quartet.round_scale(quartet.divide_by(amax, quartet.E2M1_MAX))
            found[name] = quartet.choose_tensor_scale(largest).cpu()

        m.register_forward_pre_hook(look)
    model(inputs)
    for name, scale in found.items():
        if not scale.isfinite():
            raise UserError(f"the inputs of {name} are not finite: the weights have diverged")
    return found


def tensors(c, state, packed, inputs=16):
    """Config and state dict of a run -> {name: tensor} in that layout, and names of layers not in 4 bits.

    packed: of a quantized layer its weight_packed (N, K/2) uint8, weight_scale (N, K/16) E4M3 and
    weight_global_scale (1,), which divides: the inverse of the tensor scale, a power of two; with inputs of 4
    bits its input_global_scale (1,), which divides, too; all else is bf16. If not, its weight, bf16, exact;
    all else in float32. UserError if the run cannot be written so.
    """
    quantized = quantized_layers(c)
    refuse_other_models(c, state)
    if packed and not quantized:
        raise UserError(f"recipe {c.recipe} in the end, --bf16_first={c.bf16_first}, --bf16_last="
                        f"{c.bf16_last}: no weights are NVFP4: take --format=hf, or train otherwise")
    scales = {}
    if inputs == 4:
        scales = input_scales(c, state)
    out, ignore = layout(c, state, quantized, packed, scales)
    if packed:
        out = {name: t.bfloat16() if name.endswith(".weight") else t for name, t in out.items()}
    return out, ignore


# ---- 4. Config and tokenizer -------------------------------------------------------------------------------

# The token that ends a document, by data/prepare.py, and its name; and how many tokens there are
END = {"bytes": 0, "gpt2": 50256, "unknown": None}
END_NAME = "<|endoftext|>"
TOKENS = {"bytes": 256, "gpt2": 50257}


def tokenizer_of(c):
    """What the tokens of a run are: bytes, gpt2, or, if its vocabulary is smaller than theirs, unknown."""
    return c.tokenizer if c.vocab_size >= TOKENS[c.tokenizer] else "unknown"


def config(c, tokenizer, ignore=None, inputs=16):
    """config.json. ignore: the layers that are not NVFP4, or None if none is. inputs: their bits, 4 or 16."""
    dtype = "float32" if ignore is None else "bfloat16"
    made = dict(
        architectures=[f"{architecture(c)}ForCausalLM"],
        model_type=architecture(c).lower(),
        dtype=dtype,
        torch_dtype=dtype,
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads or c.heads,
        head_dim=c.width // c.heads,
        max_position_embeddings=c.sequence,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        # A pad_token_id here would keep that row of the embedding from being trained on.
        bos_token_id=END[tokenizer],
        eos_token_id=END[tokenizer],
    )
    if ignore is None:
        return made

    # What the package compressed-tensors is to know. These are its presets NVFP4A16 and NVFP4.
    weights = dict(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        dynamic=False,
        scale_dtype="torch.float8_e4m3fn",
    )
    activations = None
    if inputs == 4:
        # local: of the two scales only that of a block is found while the model runs.
        activations = weights | dict(dynamic="local", observer="static_minmax")
    group = dict(
        targets=["Linear"],
        weights=weights,
        input_activations=activations,
        output_activations=None,
        format="nvfp4-pack-quantized",
    )
    made["quantization_config"] = dict(
        quant_method="compressed-tensors",
        format="nvfp4-pack-quantized",
        quantization_status="compressed",
        config_groups=dict(group_0=group),
        ignore=ignore,
    )
    return made


def byte_tokenizer():
    """tokenizer.json and tokenizer_config.json of bytes: token i is byte i, and 0 ends a document.

    Text gets no token that it does not have, neither at its start nor at its end. In training a window begins
    anywhere in a document, so a prompt needs no 0 before it; train_gpt.py samples without one, too. Who wants
    a document's beginning writes <|endoftext|> there.
    """
    # Byte-level BPE writes a byte as a letter: printable ones as themselves, the others as 256, 257, ...
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(others)}

    # Token 0 has a name instead: its letter would be found in text, where it is two bytes. A byte 0 in text
    # is then unknown, which stands for the same token.
    letter[0] = END_NAME
    special = dict(
        id=0,
        content=END_NAME,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
        special=True,
    )
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    model = dict(
        type="BPE",
        unk_token=END_NAME,
        vocab={letter[byte]: byte for byte in range(256)},
        merges=[],
    )
    tokenizer = dict(
        version="1.0",
        added_tokens=[special],
        pre_tokenizer=level,
        decoder=level,
        model=model,
    )
    # A batch is padded on the left, since new text comes on the right. No other inputs than these two: older
    # versions of transformers add token_type_ids, which Llama refuses.
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=END_NAME,
        eos_token=END_NAME,
        pad_token=END_NAME,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, settings


# ---- 5. What people read -----------------------------------------------------------------------------------

FETCH = ("from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('openai-community/gpt2', "
         f"model_max_length={{length}}, pad_token='{END_NAME}', padding_side='left').save_pretrained('.')")
GENERATE = ("from transformers import pipeline; print(pipeline('text-generation', '{name}')"
            "('The ', max_new_tokens={length})[0]['generated_text'])")
SERVE = "vllm serve {there} --dtype bfloat16"
EVALUATE = "lm_eval --model hf --model_args pretrained={there} --tasks wikitext"


def generate(name, c):
    """A line of Python that shows what a model, by its name or directory, makes of a word."""
    return GENERATE.format(name=name, length=min(64, max(1, c.sequence // 2)))


def commands(directory, c, tokenizer, packed):
    """Command lines that use what is in a directory, [(command, what it needs or does), ...]."""
    there = shlex.quote(str(directory))
    decoder = " compressed-tensors" * packed
    # They run in the directory: in the project's, Python would take kernels.py for a package of that name.
    python = f'(cd {there} && python -c "{{}}")'
    lines = []
    if tokenizer == "gpt2":
        lines.append((python.format(FETCH.format(length=c.sequence)), "first, once: GPT-2's tokenizer"))
    # By itself vLLM would compute in float16 what is stored in float32.
    return lines + [
        (python.format(generate(".", c)), f"needs transformers{decoder}"),
        (SERVE.format(there=there), "needs vllm"),
        (EVALUATE.format(there=there), f"needs lm_eval[hf]{decoder}"),
        (f"hf upload {shlex.quote(directory.name)} {there}", "publishes it: read its README.md before"),
    ]


def command_of(checkpoint):
    """The command line that trains such a run."""
    # The preset 30m is all defaults. Paths of the machine are nobody's business.
    default = vars(train_gpt.Config())
    words = ["python", "train_gpt.py", "30m"]
    if checkpoint["processes"] > 1:
        words = ["torchrun", f"--nproc_per_node={checkpoint['processes']}", *words[1:]]
    for name, value in checkpoint["config"].items():
        if value != default[name] and name not in train_gpt.HARMLESS | {"name", "tokenizer"}:
            if name in ("corpus", "init_from"):
                value = Path(value).name
            words.append(f"--{name}={value}")
    return shlex.join(words)


def header_of(checkpoint):
    """What the log of a run says of it when it began, {what: text}."""
    # A log from elsewhere may say anything.
    found = {}
    for line in checkpoint["log"]["text"].splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "start" in record:
                found = {what: text for what, text in record.items() if isinstance(text, str)}
    return found


def loss_of(checkpoint, tokenizer):
    """The last validation loss of a run, in words."""
    c = train_gpt.Config(**checkpoint["config"])
    step = checkpoint["step"]
    loss = checkpoint["log"]["val_loss"]
    if step < c.steps:
        step -= step % c.eval_every
    if not step or not math.isfinite(loss):
        return ""
    words = f"{loss:.4f} nats a token"
    if tokenizer == "bytes":
        words += f", {loss / math.log(2):.4f} bits a byte"
    return f"{words}, after step {step:,}, of {c.eval_tokens:,} tokens at most"


def training_in_words(recipe):
    """How a run multiplied in training."""
    if quartet.RECIPES[recipe] is None:
        return "In training nothing was quantized."
    return ("In training, the layers that the table calls quantized multiplied NVFP4 by NVFP4, forward and "
            "backward: 4-bit values (E2M1) with a scale for every 16 of them (E4M3) and one for the tensor. "
            "`operands` names the quantizers of what their three products multiply, y = x wᵀ, dx = dy w and "
            "dw = dyᵀ x; quartet.py defines them. The validation loss is by the forward pass of the last step; "
            "where inputs are rounded otherwise, or not at all, it differs a little.")


def storage_in_words(c, state, packed, inputs):
    """How the weights of a run are stored, and what becomes of inputs."""
    layers = quantized_layers(c)
    count = sum(state[f"{name}.weight"].numel() for name in layers)
    if not layers:
        return "In these files nothing is 4-bit: all weights are float32."
    these = f"the {count:,} parameters of {len(layers)} linear layers"
    if not packed:
        return (f"In these files nothing is stored in 4 bits: {these} are bf16, with exactly the values "
                "that the forward pass multiplied, 4-bit values times scales; all others are float32. What "
                "loads the files does not quantize inputs.")
    words = (f"In these files {these} are stored in 4.5 bits each, the codes and scales that the forward "
             "pass multiplied (compressed-tensors, `nvfp4-pack-quantized`); all others are bf16. ")
    if inputs == 16:
        return words + "What loads the files does not quantize inputs (W4A16)."
    words += ("What loads the files quantizes the inputs of these layers, too (W4A4): to nearest, with a scale "
              "for every 16 and one of the layer, fixed by a batch of the validation split.")
    if quartet.RECIPES[c.recipe].two_terms:
        words += (" The last steps of training multiplied inputs in two terms of 4 bits each; here they have "
                  "one, so that the loss is higher.")
    return words


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
# license: none is stated; whoever publishes the weights adds one
---

# {name}

A language model of {size:,} parameters in the layout of {kind}, trained by the recipe `{recipe}`. It goes on
with text, and was not trained to follow instructions. {tokens}

| | |
|---|---|
{table}

## What is 4-bit in it

{training}

{storage}

## Use

NAME is this repository, or a directory with its files. It needs transformers{decoder}.

```sh
{commands}
```

## Trained by

```sh
{command}
```
"""


def card(directory, checkpoint, c, packed, inputs):
    """README.md, the model card: what is known of a run from its checkpoint. c has the recipe of its end."""
    state = checkpoint["model"]
    recipe = checkpoint["config"]["recipe"]
    tokenizer = tokenizer_of(c)
    tokens = {
        "bytes": f"Its tokens are bytes, and 0, `{END_NAME}`, ends a document.",
        "gpt2": f"Its tokens are GPT-2's, and `{END_NAME}` ends a document.",
        "unknown": f"What its {c.vocab_size} tokens mean is not known here.",
    }

    # The table. What is not known has no row.
    done = checkpoint["step"]
    rows = {
        "validation loss": loss_of(checkpoint, tokenizer),
        "tokens": f"{done * c.tokens_per_step:,}, in {done:,} steps",
        "context": f"{c.sequence:,} tokens",
        "started from": c.init_from and f"the weights of `{Path(c.init_from).name}`",
        **header_of(checkpoint),
    }
    # A path of the machine is nobody's business.
    if "corpus" in rows:
        rows["corpus"] = rows["corpus"].replace(c.corpus, Path(c.corpus).name)
    if checkpoint["code"] != train_gpt.CODE:
        rows["exported by"] = f"code {train_gpt.CODE}, and trained by {checkpoint['code']}"
    table = [f"| {what} | {value} |" for what, value in rows.items() if value]

    kind = architecture(c)
    tags = [kind.lower()] + ["nvfp4"] * bool(quartet.RECIPES[recipe]) + ["compressed-tensors"] * packed
    use = [f'python -c "{generate("NAME", c)}"', SERVE.format(there="NAME"), EVALUATE.format(there="NAME")]
    return CARD.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        name=directory.name,
        kind=kind,
        size=sum(t.numel() for t in state.values()),
        recipe=recipe,
        tokens=tokens[tokenizer],
        table="\n".join(table),
        training=training_in_words(recipe),
        storage=storage_in_words(c, state, packed, inputs),
        decoder=" and compressed-tensors" * packed,
        commands="\n".join(use),
        command=command_of(checkpoint),
    )


# ---- 6. Files ----------------------------------------------------------------------------------------------

def export(run, directory, packed, inputs=16, other_code=False):
    """Write config, weights, model card and, for bytes, a tokenizer into a new directory."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as e:
        raise UserError(f"{e}: pip install safetensors") from None
    if inputs == 4 and not packed:
        raise UserError("--inputs=4 needs --format=compressed-tensors: by hf, nothing quantizes inputs")

    # The weights are those that the forward pass after the last step multiplies, by the code that decides
    # which values these are.
    c, _, checkpoint = train_gpt.load("eval", run, {})
    if os.path.lexists(directory):
        raise UserError(f"{directory} exists: take another name, nothing is overwritten")
    if checkpoint["code"] != train_gpt.CODE and not other_code:
        raise UserError(f"{run} was trained by code {checkpoint['code']}, and here is {train_gpt.CODE}, "
                        "which may round to other weights: check out that code, or, if only words have "
                        "changed since, add --other_code")
    c = dataclasses.replace(c, recipe=train_gpt.recipe_of(c, checkpoint["step"]))
    state = checkpoint["model"]
    found, ignore = tensors(c, state, packed, inputs)

    tokenizer = tokenizer_of(c)
    special = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], END[tokenizer])
    files = {
        "config.json": config(c, tokenizer, ignore if packed else None, inputs),
        "generation_config.json": special,
    }
    if tokenizer == "bytes":
        files["tokenizer.json"], settings = byte_tokenizer()
        files["tokenizer_config.json"] = settings | dict(model_max_length=c.sequence)
    files = {name: json.dumps(content, indent=1) + "\n" for name, content in files.items()}
    files["README.md"] = card(directory, checkpoint, c, packed, inputs)

    # Write all of it or nothing.
    part = directory.with_name(directory.name + ".part")
    with train_gpt.writing(part):
        # Remove what an export that was broken off, or somebody's link, has left there.
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        part.mkdir(parents=True)
        for name, content in files.items():
            (part / name).write_text(content, encoding="utf-8")
        try:
            save_file(found, part / "model.safetensors", metadata=dict(format="pt"))
        except SafetensorError as e:
            raise UserError(f"cannot write {part}: {e}") from None
        # safetensors lets nobody else read it. It is to have the mode of any new file.
        shutil.copymode(part / "config.json", part / "model.safetensors")
        part.rename(directory)

    # Say how large it is, and how it is used.
    size = sum(t.nbytes for t in found.values())
    values = sum(t.numel() for t in state.values())
    print(f"{directory}: {values:,} parameters, {size:,} bytes, {8 * size / values:.2f} bits each")
    if packed:
        values = 2 * sum(t.numel() for name, t in found.items() if name.endswith("weight_packed"))
        size = sum(t.nbytes for name, t in found.items() if ".weight_" in name)
        print(f"in NVFP4: {values:,} parameters, {8 * size / values:.4f} bits each")
    if tokenizer == "unknown":
        print(f"what its {c.vocab_size} tokens mean is not known here: it has no tokenizer")
    for line, words in commands(directory, c, tokenizer, packed):
        print(f"{line}    # {words}")


def main(argv):
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="of train_gpt.py: its path, or its name in runs/")
    parser.add_argument("directory", metavar="DIR", type=Path, help="to be made")
    parser.add_argument("--format", choices=("hf", "compressed-tensors"), default="hf",
                        help="hf, unless you say otherwise")
    parser.add_argument("--inputs", choices=(16, 4), type=int, default=16,
                        help="bits of the inputs of layers in 4 bits: 16, as they come, or 4")
    parser.add_argument("--other_code", action="store_true",
                        help="export a run that other code has trained; it must round to the same values")
    a = parser.parse_args(argv)
    export(a.run, a.directory, a.format == "compressed-tensors", a.inputs, a.other_code)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ValueError, OSError) as e:
        sys.exit(f"export.py: {e}")
