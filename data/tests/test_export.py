"""Tests of export.py: Llama's layout computes what the trained model does, and other software reads it."""
import importlib.util, resource, subprocess, sys
import pytest
import torch, torch.nn.functional as F
import export, quartet, train_gpt

KNOBS = dict(layers=2, width=128, heads=2, hidden=256, sequence=32, batch=2, steps=2, tokens_per_step=64,
             lr=0.01, eval_tokens=64, sample_tokens=1, device="cpu", corpus="python", bf16_blocks=1)
PACKAGES = "safetensors", "transformers", "compressed_tensors"
lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_safetensors = pytest.mark.skipif("safetensors" in lacking, reason="needs safetensors")

@pytest.fixture(params=["quartet2", "nvidia"])
def run(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = KNOBS | dict(recipe=request.param, name="a")
    train_gpt.main(["cpu", *(f"--{knob}={value}" for knob, value in knobs.items())])
    c, _, checkpoint = train_gpt.load("eval", "a", {})
    return c, checkpoint["model"]

def weights_only(c, state):
    """The trained model with the weights that its forward pass multiplies, inputs as they are."""
    model = train_gpt.GPT(c)
    model.load_state_dict(state)
    for block in model.blocks[:1]:
        for layer in block.qkv, block.out, block.up, block.down:
            t = quartet.QUANTIZERS[quartet.RECIPES[c.recipe].w](layer.weight.detach().bfloat16(), None, None)
            layer.weight.data = quartet.decode(t)
    return model

def llama(c, tensors, tokens):
    """Llama as transformers computes it, from its own names: RoPE turns the halves of a head."""
    def linear(x, name):
        if f"{name}.weight" in tensors: return F.linear(x, tensors[f"{name}.weight"].float())
        packed, scale, divisor = (tensors[f"{name}.weight_{k}"] for k in ("packed", "scale", "global_scale"))
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        w = torch.cat([values, -values])[codes].unflatten(-1, (-1, 16)) * (scale.float() / divisor)[..., None]
        return F.linear(x, w.flatten(-2))
    norm = lambda x, name: F.rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"].float(), 1e-5)
    heads = lambda x: x.unflatten(-1, (c.heads, -1)).transpose(1, 2)
    D = c.width // c.heads
    angle = torch.outer(torch.arange(tokens.shape[1]), 1e4 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)
    def rope(x): return x * angle.cos() + torch.cat([-x[..., D // 2:], x[..., :D // 2]], -1) * angle.sin()
    x = tensors["model.embed_tokens.weight"].float()[tokens]
    for i in range(c.layers):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (heads(linear(h, f"{at}.self_attn.{name}_proj")) for name in "qkv")
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        h = F.silu(linear(h, f"{at}.mlp.gate_proj")) * linear(h, f"{at}.mlp.up_proj")
        x = x + linear(h, f"{at}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")

@pytest.mark.parametrize("packed", [False, True])
def test_llamas_layout_computes_the_trained_model(run, packed):
    c, state = run
    tensors, ignore = export.tensors(c, state, packed)
    if packed:                                      # all else was rounded to bf16: so is the model's
        assert {"lm_head", "model.layers.1.self_attn.q_proj"} < {*ignore} and len(ignore) == 8
        state = {name: w if name.startswith("blocks.0.") and w.dim() == 2 else w.bfloat16().float()
                 for name, w in state.items()}
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): expected, found = weights_only(c, state)(tokens), llama(c, tensors, tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()     # float32 sums in another order

@needs_safetensors
def test_nothing_is_overwritten_and_what_has_no_nvfp4_weights_says_so(run, tmp_path, capsys):
    export.main(["a", "out", "--format=compressed-tensors"])
    assert "in NVFP4: 163,840 parameters, 4.50" in capsys.readouterr().out
    with pytest.raises(train_gpt.UserError, match="out exists"): export.main(["a", "out"])
    saved = torch.load("runs/a/checkpoint.pt", weights_only=True)
    saved["config"]["bf16_end"] = 0.1               # so the last steps; but before these weights are in NVFP4
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

def test_another_model_is_not_exported_as_a_llama():
    c = train_gpt.Config(**KNOBS)
    state = train_gpt.GPT(c).state_dict()
    narrow = state | {"blocks.0.up.weight": state["blocks.0.up.weight"][:c.hidden]}     # no gate
    for other in narrow, state | {"blocks.0.q_norm.weight": torch.ones(64)}:
        with pytest.raises(train_gpt.UserError, match="not train_gpt.py's Llama"):
            export.tensors(c, other, False)

@needs_safetensors
def test_a_full_disk_is_told(run):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(train_gpt.UserError, match="cannot write new.part.*too large"):
            export.main(["a", "new"])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    export.main(["a", "new"])

def test_the_tokenizer_has_a_token_for_every_byte():
    vocabulary = export.byte_tokenizer()[0]["model"]["vocab"]
    assert sorted(vocabulary.values()) == [*range(256)] and vocabulary["a"] == ord("a")

LOAD = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, tokens = sys.argv[1], torch.load("tokens.pt")
model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
tokenizer, text = AutoTokenizer.from_pretrained(directory), "caf\\u00e9\\n\\t  = \\u4e2d 'x'"
assert tokenizer(text)["input_ids"] == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
with torch.no_grad(): logits = model(tokens).logits.float()
made = model.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False)
weights = {name: p for name, p in model.state_dict().items() if name.endswith("proj.weight")}
torch.save(dict(logits=logits, weights=weights, made=made, wrong=[*map(len, info.values())]), "found.pt")
"""

@pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(PACKAGES)}")
@pytest.mark.parametrize("form", ["hf", "compressed-tensors"])
def test_transformers_loads_it_with_every_weight_bit_for_bit(run, form, tmp_path):
    c, state = run
    export.main(["a", form, f"--format={form}"])
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, "tokens.pt")
    # elsewhere: transformers takes the project's kernels.py for a package of that name if it sees it
    done = subprocess.run([sys.executable, "-c", LOAD, form], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower() and "unexpected" not in done.stderr.lower()
    found = torch.load("found.pt")
    assert not any(found["wrong"]) and len(found["weights"]) == 14 and found["made"].shape == (1, 12)
    for name, w in export.tensors(c, state, False)[0].items():
        if not name.endswith("proj.weight"): continue
        w = w.bfloat16() if form == "compressed-tensors" else w                 # of blocks not quantized
        assert torch.equal(found["weights"][name].float(), w.float()), name
    with torch.no_grad(): logits = weights_only(c, state)(tokens)
    error = (found["logits"] - logits).norm() / logits.norm()
    assert error < (1e-5 if form == "hf" else 2.0**-6)      # float32 sums; 10 roundings to bf16 or so
