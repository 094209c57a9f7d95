"""Write a trained model in the layout of Hugging Face's Llama, for transformers, vLLM and what else reads it.

    python data/export.py RUN DIR [--format=hf|compressed-tensors]

hf                  linear layers in bf16, the values that the forward pass multiplied; all else in float32
compressed-tensors  the same values in 4 bits, `nvfp4-pack-quantized`: codes and scales as trained; all else
                    in bf16, which is what the package of that name decodes the codes to

A recipe like quartet2 trains with weights that are NVFP4, so neither rounds those again. Inputs are not
quantized: software that loads the files multiplies these weights by inputs of its own precision. Needs the
package safetensors.
"""
import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quartet
import train_gpt
from train_gpt import UserError


# ---- 1. Tensors --------------------------------------------------------------------------------------------

# Names in train_gpt.GPT -> names in Llama: of the model, and of each block but its linear layers
MODEL_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
NORM_NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


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


def packed_split(layer, t, c):
    """A layer's weight, NVFP4 -> {name in Llama: tensor}, in 4 bits as `tensors` says."""
    out = {}
    scales = split(layer, t.block_scale, c)
    for name, codes in split(layer, t.codes, c).items():
        out[f"{name}.weight_packed"] = codes
        out[f"{name}.weight_scale"] = scales[name]
        out[f"{name}.weight_global_scale"] = 1 / t.tensor_scale.view(1)      # q, k and v share one
    return out


def tensors(c, state, packed):
    """Config and state dict of a run -> {name: tensor} in Llama's layout, and names of layers not in 4 bits.

    packed: of a quantized layer its weight_packed (N, K/2) uint8, weight_scale (N, K/16) E4M3 and
    weight_global_scale (1,), which divides: the inverse of the tensor scale, a power of two; all else is
    bf16. If not, its weight, bf16, exact; all else in float32. UserError if the run cannot be written so.
    """
    # Which layers are NVFP4: a model without memory tells.
    train_gpt.known(c.recipe, quartet.RECIPES, f"recipe {c.recipe!r} is unknown, add it to quartet.py")
    recipe = quartet.RECIPES[c.recipe]
    quantized = {}
    if recipe and recipe.w != "bf16":
        with torch.device("meta"):
            quantized = train_gpt.GPT(c).quantized_linears()

    # A Llama has no other blocks. A fork may have another model.
    for name, value in dict(qk_norm="false", mlp="swiglu").items():
        if getattr(c, name) != value:
            raise UserError(f"--{name}={getattr(c, name)}: Llama has no such block, only --{name}={value}")
    if len(state) != 3 + 6 * c.layers or len(state["blocks.0.up.weight"]) != 2 * c.hidden:
        raise UserError("the model is not train_gpt.py's Llama: change `split` and `config` here, too")
    if packed and not quantized:
        raise UserError(f"recipe {c.recipe} in the end, --bf16_first={c.bf16_first}, --bf16_last="
                        f"{c.bf16_last}: no weights are NVFP4: take --format=hf, or train otherwise")

    out = {}
    ignore = ["lm_head"]
    for ours, theirs in MODEL_NAMES.items():
        out[f"{theirs}.weight"] = state[f"{ours}.weight"]
    for i in range(c.layers):
        block = f"blocks.{i}"
        at = f"model.layers.{i}"
        for ours, theirs in NORM_NAMES.items():
            out[f"{at}.{theirs}.weight"] = state[f"{block}.{ours}.weight"]

        for layer in ("qkv", "out", "up", "down"):
            w = state[f"{block}.{layer}.weight"]
            if f"{block}.{layer}" in quantized:
                t = quartet.NVFP4(*quartet.quantized(w.bfloat16(), c.recipe))
                if packed:
                    for name, part in packed_split(layer, t, c).items():
                        out[f"{at}.{name}"] = part
                    continue
                w = quartet.decode(t, torch.bfloat16)
            for name, rows in split(layer, w, c).items():
                out[f"{at}.{name}.weight"] = rows
                ignore.append(f"{at}.{name}")

    if packed:
        out = {name: t if ".weight_" in name else t.bfloat16() for name, t in out.items()}
    return out, ignore


# ---- 2. Files ----------------------------------------------------------------------------------------------

def config(c, ignore):
    """config.json. ignore: the layers that are not NVFP4, or None if none is."""
    end = 0 if c.vocab_size == 256 else 50256      # what ends a document: data/prepare.py
    dtype = "float32" if ignore is None else "bfloat16"
    made = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
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
        bos_token_id=end,
        eos_token_id=end,
    )
    if ignore is None:
        return made

    # What the package compressed-tensors is to know.
    weights = dict(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        dynamic=False,
        scale_dtype="torch.float8_e4m3fn",
    )
    group = dict(
        targets=["Linear"],
        weights=weights,
        input_activations=None,
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
    """tokenizer.json and tokenizer_config.json of bytes: token i is byte i, and 0 ends a document."""
    # Byte-level BPE writes a byte as a letter: printable ones as themselves, the others as 256, 257, ...
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    model = dict(
        type="BPE",
        dropout=None,
        unk_token=None,
        continuing_subword_prefix=None,
        end_of_word_suffix=None,
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=False,
        vocab={letter[byte]: byte for byte in range(256)},
        merges=[],
    )
    tokenizer = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[],
        normalizer=None,
        pre_tokenizer=level,
        post_processor=None,
        decoder=level,
        model=model,
    )
    return tokenizer, dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)


def export(run, directory, packed):
    """Write config.json, model.safetensors and, for bytes, a tokenizer into a new directory."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as e:
        raise UserError(f"{e}: pip install safetensors") from None

    # The weights are those that the forward pass after the last step multiplies.
    c, _, checkpoint = train_gpt.load("eval", run, {})
    if os.path.lexists(directory):
        raise UserError(f"{directory} exists: take another name, nothing is overwritten")
    c = dataclasses.replace(c, recipe=train_gpt.recipe_of(c, checkpoint["step"]))
    found, ignore = tensors(c, checkpoint["model"], packed)

    # Write all of it or nothing.
    files = {"config.json": config(c, ignore if packed else None)}
    if c.vocab_size == 256:
        files["tokenizer.json"], files["tokenizer_config.json"] = byte_tokenizer()
    part = directory.with_name(directory.name + ".part")
    with train_gpt.writing(part):
        # Remove what an export that was broken off, or somebody's link, has left there.
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        part.mkdir(parents=True)
        for name, content in files.items():
            (part / name).write_text(json.dumps(content, indent=1) + "\n")
        try:
            save_file(found, part / "model.safetensors", metadata=dict(format="pt"))
        except SafetensorError as e:
            raise UserError(f"cannot write {part}: {e}") from None
        part.rename(directory)

    # Say how large it is.
    size = sum(t.nbytes for t in found.values())
    values = sum(t.numel() for t in checkpoint["model"].values())
    print(f"{directory}: {values:,} parameters, {size:,} bytes, {8 * size / values:.2f} bits each")
    if packed:
        values = 2 * sum(t.numel() for name, t in found.items() if name.endswith("weight_packed"))
        size = sum(t.nbytes for name, t in found.items() if ".weight_" in name)
        print(f"in NVFP4: {values:,} parameters, {8 * size / values:.4f} bits each")
    if c.vocab_size != 256:
        print("its tokens are GPT-2's: take that tokenizer")


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
    a = parser.parse_args(argv)
    export(a.run, a.directory, a.format == "compressed-tensors")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ValueError, OSError) as e:
        sys.exit(f"export.py: {e}")
