"""Tests of export.py: Llama's layout computes what the trained model does, and other software reads it."""
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import export
import prepare
import quartet
import train_gpt

KNOBS = dict(
    layers=2, width=128, heads=2, hidden=256, sequence=32, batch=2, steps=2, tokens_per_step=64, lr=0.01,
    eval_tokens=64, sample_tokens=1, device="cpu", bf16_last=1,
)
PACKAGES = ("safetensors", "transformers", "compressed_tensors")
lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_safetensors = pytest.mark.skipif("safetensors" in lacking, reason="needs safetensors")
needs_all = pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(PACKAGES)}")


@pytest.fixture(scope="module", params=[("quartet2", 1), ("nvidia", 0)])
def trained(request, tmp_path_factory):
    """A directory where runs/a is a run of two steps, by a recipe, with so many heads of keys."""
    place = tmp_path_factory.mktemp("trained")
    tokens = np.frombuffer(b"the quick brown fox jumps over the lazy dog\n" * 40, np.uint8)
    for split in ("train", "val"):
        prepare.write_shard(place / f"tiny_{split}_000000.bin", tokens)
    recipe, kv_heads = request.param
    knobs = KNOBS | dict(recipe=recipe, kv_heads=kv_heads, name="a", corpus=place / "tiny")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        monkeypatch.setattr(train_gpt, "listen", lambda stop: None)      # signals are left to pytest
        train_gpt.main(["cpu", *(f"--{knob}={value}" for knob, value in knobs.items())])
    return place


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Config and weights of a copy of the run, runs/a of the current directory."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    c, _, checkpoint = train_gpt.load("eval", "a", {})
    return c, checkpoint["model"]


def some_tokens(length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, length), generator=generator)


@torch.no_grad()
def logits_of(c, state, tokens):
    """By the trained model, with the weights that its forward pass multiplies, and inputs as they are."""
    model = train_gpt.GPT(c)
    model.load_state_dict(state)
    quantize = quartet.QUANTIZERS[quartet.RECIPES[c.recipe].w]
    block = model.blocks[0]
    for layer in (block.qkv, block.out, block.up, block.down):
        t = quantize(layer.weight.bfloat16(), None, None)
        layer.weight.copy_(quartet.decode(t))
    return model(tokens)


def decoded(tensors, name):
    """The weight of a layer from its tensors in the format nvfp4-pack-quantized, or as it is."""
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].float()
    packed = tensors[f"{name}.weight_packed"]
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    q = torch.cat([values, -values])[codes].unflatten(-1, (-1, 16))
    scale = tensors[f"{name}.weight_scale"].float() / tensors[f"{name}.weight_global_scale"]
    return (q * scale[..., None]).flatten(-2)


@torch.no_grad()
def llama(c, tensors, tokens):
    """Llama as transformers computes it, from its own names: RoPE turns the halves of a head."""
    D = c.width // c.heads
    frequency = 1e4 ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(tokens.shape[1]), frequency).repeat(1, 2)

    def linear(x, name):
        return F.linear(x, decoded(tensors, name))

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"].float(), 1e-5)

    def heads(x):
        return x.unflatten(-1, (-1, D)).transpose(1, 2)

    def rope(x):
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    x = tensors["model.embed_tokens.weight"].float()[tokens]
    for i in range(c.layers):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = [heads(linear(h, f"{at}.self_attn.{name}_proj")) for name in "qkv"]
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        h = F.silu(linear(h, f"{at}.mlp.gate_proj")) * linear(h, f"{at}.mlp.up_proj")
        x = x + linear(h, f"{at}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("packed", [False, True])
def test_llamas_layout_computes_the_trained_model(run, packed):
    c, state = run
    tensors, ignore = export.tensors(c, state, packed)
    if packed:
        assert {"lm_head", "model.layers.1.self_attn.q_proj"} < {*ignore} and len(ignore) == 8
        # All else was rounded to bf16: so is the model's.
        for name, w in state.items():
            if not name.startswith("blocks.0.") or w.dim() != 2:
                state[name] = w.bfloat16().float()
    tokens = some_tokens(32)
    expected = logits_of(c, state, tokens)
    error = (llama(c, tensors, tokens) - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()      # float32 sums in another order


@needs_safetensors
def test_nothing_is_overwritten_and_what_has_no_nvfp4_weights_says_so(run, tmp_path, capsys):
    export.main(["a", "out", "--format=compressed-tensors"])
    c, _ = run
    size = f"{163840 - 16384 * c.kv_heads:,}"      # one head of keys and values less
    assert f"in NVFP4: {size} parameters, 4.50" in capsys.readouterr().out
    with pytest.raises(train_gpt.UserError, match="out exists"):
        export.main(["a", "out"])

    # With bf16_end the weights of the last steps are not NVFP4. Those of steps before are.
    saved = torch.load("runs/a/checkpoint.pt", weights_only=True)
    saved["config"]["bf16_end"] = 0.1
    torch.save(saved | dict(step=0), "runs/a/checkpoint.pt")
    export.main(["a", "before", "--format=compressed-tensors"])
    torch.save(saved, "runs/a/checkpoint.pt")
    with pytest.raises(train_gpt.UserError, match="recipe bf16 in the end.*--format=hf"):
        export.main(["a", "new", "--format=compressed-tensors"])
    assert not (tmp_path / "new").exists()


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(train_gpt.UserError, match="pip install safetensors"):
        export.export("a", tmp_path / "out", True)


def test_a_recipe_of_a_fork_is_an_error_that_names_it():
    with pytest.raises(train_gpt.UserError, match="recipe 'mine' is unknown, add it.*there are bf16, rtn"):
        export.tensors(train_gpt.Config(recipe="mine"), {}, False)


@pytest.mark.parametrize("knob, value", [("qk_norm", "true"), ("mlp", "relu2")])
def test_a_block_that_llama_has_not_is_refused_by_name(knob, value):
    c = train_gpt.Config(**KNOBS | {knob: value})
    with pytest.raises(train_gpt.UserError, match=f"--{knob}={value}: Llama has no such block"):
        export.tensors(c, train_gpt.GPT(c).state_dict(), False)


def test_another_model_is_not_exported_as_a_llama():
    c = train_gpt.Config(**KNOBS)
    state = train_gpt.GPT(c).state_dict()
    without_gate = {"blocks.0.up.weight": state["blocks.0.up.weight"][:c.hidden]}
    with_norm = {"blocks.0.q_norm.weight": torch.ones(64)}
    for other in (without_gate, with_norm):
        with pytest.raises(train_gpt.UserError, match="not train_gpt.py's Llama"):
            export.tensors(c, state | other, False)


@needs_safetensors
def test_a_link_that_is_there_already_is_not_followed(run):
    other = Path("other.txt")
    other.write_text("keep")
    Path("new.part").mkdir()
    Path("new.part/config.json").symlink_to(other.absolute())
    export.main(["a", "new"])
    Path("newer.part").symlink_to("new")
    export.main(["a", "newer"])
    os.mkfifo("newest.part")
    export.main(["a", "newest"])
    assert other.read_text() == "keep"
    assert not Path("new/config.json").is_symlink()
    assert not Path("newer").is_symlink()


@needs_safetensors
def test_a_full_disk_is_told(run):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(train_gpt.UserError, match="cannot write new.part.*too large"):
            export.main(["a", "new"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    export.main(["a", "new"])


def test_the_tokenizer_has_a_token_for_every_byte():
    tokenizer, _ = export.byte_tokenizer()
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values()) == [*range(256)] and vocabulary["a"] == ord("a")


# What transformers makes of a directory. It runs in a process that does not see the project's kernels.py,
# which transformers would take for a package of that name.
LOAD = """
import sys
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = sys.argv[1]
tokens = torch.load("tokens.pt")
model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(directory)
text = "caf\\u00e9\\n\\t  = \\u4e2d 'x'"
assert tokenizer(text)["input_ids"] == list(text.encode())
assert tokenizer.decode(list(text.encode())) == text
with torch.no_grad():
    logits = model(tokens).logits.float()
made = model.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False)
weights = {name: p for name, p in model.state_dict().items() if name.endswith("proj.weight")}
wrong = [*map(len, info.values())]
torch.save(dict(logits=logits, weights=weights, made=made, wrong=wrong), "found.pt")
"""


@needs_all
@pytest.mark.parametrize("form", ["hf", "compressed-tensors"])
def test_transformers_loads_it_with_every_weight_bit_for_bit(run, form, tmp_path):
    c, state = run
    export.main(["a", form, f"--format={form}"])
    tokens = some_tokens(24)
    torch.save(tokens, "tokens.pt")
    command = [sys.executable, "-c", LOAD, form]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower() and "unexpected" not in done.stderr.lower()

    # It has found all tensors, no others, and the values of all weights.
    found = torch.load("found.pt")
    assert not any(found["wrong"]) and len(found["weights"]) == 14 and found["made"].shape == (1, 12)
    expected, _ = export.tensors(c, state, False)
    for name, w in found["weights"].items():
        exact = expected[name]
        if form == "compressed-tensors":
            exact = exact.bfloat16()      # of blocks that are not quantized
        assert torch.equal(w.float(), exact.float()), name

    # float32 sums in another order, or 10 roundings to bf16 or so
    logits = logits_of(c, state, tokens)
    error = (found["logits"] - logits).norm() / logits.norm()
    assert error < {"hf": 1e-5, "compressed-tensors": 2.0**-6}[form]
