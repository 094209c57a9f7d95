"""Tests of export.py: the layout of Llama or Qwen3 computes the trained model, and other software reads it."""
import dataclasses
import importlib.util
import json
import math
import os
import resource
import shlex
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import export
import prepare
import quartet
import small_runs
import train_gpt

KNOBS = dict(
    layers=2, width=128, heads=2, hidden=256, sequence=32, batch=2, steps=2, tokens_per_step=64, lr=0.01,
    eval_tokens=64, sample_tokens=1, device="cpu", bf16_last=1, tokenizer="bytes",
)
PACKAGES = ("safetensors", "transformers", "compressed_tensors")
lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_safetensors = pytest.mark.skipif("safetensors" in lacking, reason="needs safetensors")
needs_all = pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(PACKAGES)}")


@pytest.fixture(scope="module", params=[("quartet2", 1, "false"), ("nvidia", 0, "true")])
def trained(request, tmp_path_factory):
    """A directory where runs/a is a run of two steps: a recipe, so many heads of keys, QK norm or not."""
    place = tmp_path_factory.mktemp("trained")
    tokens = np.frombuffer(b"the quick brown fox jumps over the lazy dog\n" * 40, np.uint8)
    for split in ("train", "val"):
        prepare.write_shard(place / f"tiny_{split}_000000.bin", tokens)
    recipe, kv_heads, qk_norm = request.param
    knobs = KNOBS | dict(recipe=recipe, kv_heads=kv_heads, qk_norm=qk_norm, name="a", corpus=place / "tiny")
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
def llama(c, tensors, tokens, rounded=lambda x, divisor: x):
    """A Llama of these tensors. rounded(x, divisor): what becomes of inputs that have a global scale."""
    def linear(x, name):
        if f"{name}.input_global_scale" in tensors:
            x = rounded(x, tensors[f"{name}.input_global_scale"])
        return F.linear(x, decoded(tensors, name))

    return export.llama(c, tokens, lambda name: tensors[f"{name}.weight"], linear)


@pytest.mark.parametrize("packed", [False, True])
def test_the_layout_computes_the_trained_model(run, packed):
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


@pytest.mark.parametrize("qk_norm, kind", [("false", "Llama"), ("true", "Qwen3")])
def test_a_block_that_neither_has_is_refused_by_name(qk_norm, kind):
    c = train_gpt.Config(**KNOBS | dict(qk_norm=qk_norm, mlp="relu2"))
    with pytest.raises(train_gpt.UserError, match=f"--mlp=relu2: {kind} has no such block"):
        export.tensors(c, train_gpt.GPT(c).state_dict(), False)


@pytest.mark.parametrize("name, shape, message", [
    ("blocks.0.up", [256, 128], r"blocks.0.up.weight is \[256, 128\], and in a Llama \[512, 128\]"),
    ("embedding", [256, 64], r"embedding.weight is \[256, 64\], and in a Llama \[256, 128\]"),
    ("blocks.0.q_norm", [64], r"blocks.0.q_norm.weight is \[64\], and in a Llama missing"),
    ("head", None, r"head.weight is missing, and in a Llama \[256, 128\]"),
])
def test_weights_that_a_llama_has_not_are_refused_by_name(name, shape, message):
    c = train_gpt.Config(**KNOBS)
    state = train_gpt.GPT(c).state_dict()
    if shape:
        state[f"{name}.weight"] = torch.ones(shape)
    else:
        del state[f"{name}.weight"]
    with pytest.raises(train_gpt.UserError, match=f"not the Llama of train_gpt.py.*{message}"):
        export.tensors(c, state, False)


def cap_logits(monkeypatch):
    predict = train_gpt.GPT.predict
    monkeypatch.setattr(train_gpt.GPT, "predict", lambda *args: predict(*args).tanh())


def normalise_embedding(monkeypatch):
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda m, x: F.rms_norm(forward(m, x), (128,)))


@pytest.mark.parametrize("fork", [cap_logits, normalise_embedding])
def test_a_model_with_the_weights_of_a_llama_that_computes_something_else_is_refused(fork, monkeypatch):
    c = train_gpt.Config(**KNOBS)
    state = train_gpt.GPT(c).state_dict()
    state["head.weight"] *= 100
    export.tensors(c, state, False)
    fork(monkeypatch)
    with pytest.raises(train_gpt.UserError, match="not the Llama of train_gpt.py.*its logits are others, by"):
        export.tensors(c, state, False)


def test_a_fork_that_quantizes_another_layer_and_weights_that_have_diverged_are_refused(monkeypatch):
    c = train_gpt.Config(**KNOBS)
    state = train_gpt.GPT(c).state_dict()
    with pytest.raises(train_gpt.UserError, match="logits of the model are not finite"):
        export.tensors(c, state | {"norm.weight": torch.full((128,), math.nan)}, False)
    monkeypatch.setattr(train_gpt.GPT, "quantized_linears", lambda model: dict(head=model.head))
    with pytest.raises(train_gpt.UserError, match="not the Llama of train_gpt.py.*head is quantized"):
        export.tensors(c, state, False)


def test_keys_that_queries_share_have_their_rows():
    c = train_gpt.Config(**KNOBS | dict(heads=4, kv_heads=2))
    state = train_gpt.GPT(c).state_dict()
    tensors, _ = export.tensors(c, state, False)
    rows = [len(tensors[f"model.layers.1.self_attn.{name}_proj.weight"]) for name in "qkvo"]
    assert rows == [128, 64, 64, 128]
    tokens = some_tokens(32)
    expected = logits_of(c, state, tokens)
    assert (llama(c, tensors, tokens) - expected).abs().max() < 1e-5 * expected.abs().max()


@needs_safetensors
def test_a_run_of_other_code_is_exported_only_if_asked_and_its_card_says_so(run):
    saved = torch.load("runs/a/checkpoint.pt", weights_only=True)
    torch.save(saved | dict(code="0123abcd"), "runs/a/checkpoint.pt")
    with pytest.raises(train_gpt.UserError, match="a was trained by code 0123abcd.*check out.*--other_code"):
        export.main(["a", "out"])
    export.main(["a", "out", "--other_code"])
    assert f"code {train_gpt.CODE}, and trained by 0123abcd" in Path("out/README.md").read_text()


@needs_safetensors
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_who_may_read_other_files_may_read_these(run, umask):
    before = os.umask(umask)
    try:
        export.main(["a", "new/out"])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [Path("new"), *Path("new").rglob("*")]}
    folders = {name: modes.pop(name) for name in ("new", "out")}
    assert {*folders.values()} == {0o777 & ~umask}
    assert {*modes.values()} == {0o666 & ~umask} and "model.safetensors" in modes


# ---- Inputs in 4 bits --------------------------------------------------------------------------------------

def inputs_of_layers(c, state):
    """The inputs of block 0's layers in the first validation batch, as they are quantized, {layer: bf16}."""
    model = train_gpt.GPT(c)
    model.load_state_dict(state)
    model.use_recipe(c.recipe, "torch")
    found = {}
    for name in ("qkv", "out", "up", "down"):
        def look(m, args, name=name):
            found[name] = args[0].bfloat16()

        getattr(model.blocks[0], name).register_forward_pre_hook(look)
    x, _ = next(small_runs.shards(c, "val").in_order())
    with torch.no_grad():
        model(x)
    return found


def rounded(x, divisor):
    """Inputs in 4 bits as compressed-tensors defines them: scales of blocks are found here, in E4M3."""
    b = x.float().unflatten(-1, (-1, 16))
    local = (divisor * (b.abs().amax(-1, keepdim=True) / 6)).clamp(max=448).to(torch.float8_e4m3fn)
    scale = local.float() / divisor
    grid = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    # Ties go to the even code: of the magnitudes to 0, 1, 2 and 4.
    odd = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    distance = ((b / torch.where(scale > 0, scale, 1.0))[..., None] - grid).abs()
    q = grid[(distance + 1e-6 * odd).argmin(-1)]
    return (q * scale).flatten(-2)


PARTS = dict(
    qkv=["self_attn.q", "self_attn.k", "self_attn.v"],
    out=["self_attn.o"],
    up=["mlp.gate", "mlp.up"],
    down=["mlp.down"],
)


def test_inputs_of_4_bits_are_rounded_as_by_rtn_with_a_scale_that_the_package_would_propose(run):
    c, state = run
    tensors, _ = export.tensors(c, state, True, 4)
    for layer, x in inputs_of_layers(c, state).items():
        # vLLM multiplies by q, k and v at once, and by gate and up: they must share one.
        scales = [tensors[f"model.layers.0.{part}_proj.input_global_scale"] for part in PARTS[layer]]
        assert all(scale.shape == (1,) and scale.dtype == torch.float32 for scale in scales)
        assert len({scale.item() for scale in scales}) == 1
        # It is the next power of two below; the largest block scale, when it is rounded, may come to fit.
        mantissa, _ = torch.frexp(scales[0])
        assert mantissa == 0.5
        assert 0.5 < scales[0] * x.abs().max() / (448 * 6) < 17 / 16
        assert torch.equal(rounded(x, scales[0]), quartet.decode(quartet.rtn(x)))
    names = {name for name in tensors if name.endswith("input_global_scale")}
    assert len(names) == 7 and all(".layers.0." in name for name in names)


def test_a_layer_whose_inputs_are_zeros_gets_a_scale(run):
    c, state = run
    tensors, _ = export.tensors(c, state | {"blocks.0.norm2.weight": torch.zeros(c.width)}, True, 4)
    assert tensors["model.layers.0.mlp.up_proj.input_global_scale"] == 1


@needs_safetensors
def test_inputs_of_4_bits_need_the_format_that_says_so_and_the_corpus(run, trained):
    with pytest.raises(train_gpt.UserError, match="--inputs=4 needs --format=compressed-tensors"):
        export.main(["a", "out", "--inputs=4"])
    c, state = run
    c = dataclasses.replace(c, corpus="gone")
    with pytest.raises(train_gpt.UserError, match="no .*gone_val.*prepare.py FILES"):
        export.tensors(c, state, True, 4)


# ---- Tokenizers, config, model card ------------------------------------------------------------------------

def test_the_tokenizer_has_a_token_for_every_byte_and_a_name_for_the_end():
    tokenizer, settings = export.byte_tokenizer()
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values()) == [*range(256)] and vocabulary["a"] == ord("a")
    # The letter of byte 0 would be found in text.
    assert vocabulary["<|endoftext|>"] == 0 and "\u0100" not in vocabulary
    special, = tokenizer["added_tokens"]
    assert special["id"] == 0 and special["content"] == "<|endoftext|>" and special["special"]
    assert {settings[f"{kind}_token"] for kind in ("bos", "eos", "pad")} == {"<|endoftext|>"}


def export_new(directory, **knobs):
    """Export a new model, but for these knobs of KNOBS, at step 1 -> its config.json."""
    Path("runs/new").mkdir(parents=True)
    path = Path("runs/new/checkpoint.pt")
    small_runs.write_checkpoint(path, train_gpt.Config(**KNOBS | knobs))
    export.main(["new", directory, "--other_code"])
    return json.loads(Path(directory, "config.json").read_text())


@needs_safetensors
def test_of_gpt2s_tokens_it_prints_what_fetches_the_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = export_new("with space", vocab_size=50304, tokenizer="gpt2")
    assert config["eos_token_id"] == 50256
    assert json.loads(Path("with space/generation_config.json").read_text())["pad_token_id"] == 50256
    assert not Path("with space/tokenizer.json").exists()
    assert "GPT-2's" in Path("with space/README.md").read_text()

    # Run it, without the package that would download.
    line = next(line for line in capsys.readouterr().out.splitlines() if "AutoTokenizer" in line)
    assert line.startswith("(cd 'with space' && python -c ")
    calls = []

    class AutoTokenizer:
        def from_pretrained(*args, **knobs):
            calls.append((args, knobs))
            return types.SimpleNamespace(save_pretrained=calls.append)

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=AutoTokenizer))
    exec(shlex.split(line.partition(")    # ")[0])[-1])
    knobs = dict(model_max_length=32, pad_token="<|endoftext|>", padding_side="left")
    assert calls == [(("openai-community/gpt2",), knobs), "."]


@needs_safetensors
def test_of_tokens_that_it_does_not_know_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export_new("out", vocab_size=1000, tokenizer="gpt2")["eos_token_id"] is None
    assert "what its 1000 tokens mean is not known" in capsys.readouterr().out


@needs_safetensors
@pytest.mark.parametrize("knobs, said", [
    ([], "147,456 parameters of 4 linear layers are bf16"),
    (["--format=compressed-tensors"], "stored in 4.5 bits each.*does not quantize inputs (W4A16)"),
    (["--format=compressed-tensors", "--inputs=4"], "stored in 4.5 bits each.*quantizes the inputs.*(W4A4)"),
])
def test_the_model_card_says_what_the_model_is(run, trained, knobs, said):
    c, _ = run
    export.main(["a", "out", *knobs])
    text = Path("out/README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    front = front.splitlines()
    assert "library_name: transformers" in front and "pipeline_tag: text-generation" in front
    assert not any(line.startswith("license") for line in front)
    assert ("- compressed-tensors" in front) == bool(knobs)

    # What is known of the run, and nothing of the machine's paths
    saved = torch.load("runs/a/checkpoint.pt", weights_only=True)
    loss = json.loads(Path("runs/a/result.json").read_text())["val_loss"]
    header = json.loads(saved["log"]["text"].splitlines()[0])
    facts = [
        f"{loss:.4f} nats a token, {loss / math.log(2):.4f} bits a byte, after step 2,",
        "| 128, in 2 steps |",
        saved["corpus"],
        saved["code"],
        *(header[what] for what in ("versions", "device", "recipe", "layers")),
        f"operands | {quartet.RECIPES[c.recipe]} |",
        "In training, the layers that the table calls quantized multiplied NVFP4",
    ]
    for fact in facts:
        assert fact in body
    said = said.replace("147,456", f"{163840 - 16384 * c.kv_heads:,}")
    for part in said.split(".*"):
        assert part in body
    assert str(trained) not in text and str(Path.cwd()) not in text

    # The command line is that of the run.
    command = body.split("## Trained by")[1].split("```")[1].removeprefix("sh\n").strip()
    words = shlex.split(command)
    assert words[:2] == ["python", "train_gpt.py"]
    mode, preset, found = train_gpt.parse(words[2:])
    made = vars(train_gpt.Config(**train_gpt.PRESETS[preset] | found))
    differing = {name for name, value in vars(c).items() if made[name] != value}
    assert mode == "train" and made["corpus"] == "tiny"
    assert differing <= train_gpt.HARMLESS | {"name", "corpus", "tokenizer"}


def test_the_model_card_says_that_inputs_had_two_terms_and_have_one(monkeypatch):
    monkeypatch.setattr(quartet, "RECIPES", dict(quartet.RECIPES))      # it gets a row
    c = train_gpt.Config(**KNOBS | dict(two_terms_end=0.5))
    late = dataclasses.replace(c, recipe=train_gpt.recipe_of(c, c.steps))
    state = train_gpt.GPT(c).state_dict()
    one, two = [export.storage_in_words(config, state, True, 4) for config in (c, late)]
    assert two.startswith(one) and "two terms of 4 bits each; here they have one" in two[len(one):]
    assert export.storage_in_words(late, state, True, 16) == export.storage_in_words(c, state, True, 16)


def test_the_model_card_leaves_out_what_is_not_known():
    c = train_gpt.Config(**KNOBS | dict(steps=100, eval_every=30, init_from="/home/me/runs/b"))
    checkpoint = dict(config=vars(c), step=29, processes=2, code="c", corpus="d",
                      model=train_gpt.GPT(c).state_dict(),
                      log=dict(text="{}\n[]\n3\nno JSON\n", val_loss=math.nan))
    words = export.card(Path("x"), checkpoint, c, False, 16)
    assert "validation loss |" not in words and "device" not in words
    assert "the weights of `b`" in words and "/home" not in words
    assert "torchrun --nproc_per_node=2 train_gpt.py 30m" in words
    checkpoint |= dict(step=70, log=dict(text="", val_loss=2.0))
    words = export.card(Path("x"), checkpoint, c, False, 16)
    assert "2.0000 nats a token, 2.8854 bits a byte, after step 60" in words


# ---- Other software ----------------------------------------------------------------------------------------

FORMATS = dict(
    hf=[],
    packed=["--format=compressed-tensors"],
    w4a4=["--format=compressed-tensors", "--inputs=4"],
)

# What transformers makes of directories. It runs in a process that does not see the project's kernels.py,
# which transformers would take for a package of that name.
LOAD = """
import sys
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

def look_at(directory, tokens):
    # Text is its bytes, also the letter that stands for byte 0. One name is byte 0.
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "caf\\u00e9\\n\\t  = \\u4e2d 'x' \\u0100"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("a<|endoftext|>b\\0")["input_ids"] == [97, 0, 98, 0]
    assert tokenizer.decode([97, 0, 98], skip_special_tokens=True) == "ab"
    assert tokenizer.decode([97, 0, 98]) == "a<|endoftext|>b"
    for byte in range(1, 256):
        assert tokenizer.decode([byte]) == bytes([byte]).decode(errors="replace")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 32

    # Logits, and greedy text.
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert model.config.eos_token_id == model.generation_config.pad_token_id == 0
    greedy = dict(max_new_tokens=9, do_sample=False)
    made = model.generate(tokens[:1, :8], **greedy)
    with torch.no_grad():
        logits = model(tokens).logits.float()
    weights = {name: p.clone() for name, p in model.state_dict().items() if name.endswith("proj.weight")}
    if directory == "w4a4":
        # By now it is decoded. In float32 nothing but its inputs is rounded.
        torch.nn.Module.float(model)
        with torch.no_grad():
            logits = model(tokens).logits
    wrong = [*map(len, info.values())]
    torch.save(dict(logits=logits, weights=weights, made=made, wrong=wrong), f"{directory}.pt")

    # A batch is padded, and each text of it goes on as it does alone.
    batch = tokenizer(["abc", "abcdefgh"], padding=True, return_tensors="pt")
    assert [*batch] == ["input_ids", "attention_mask"]
    assert batch["input_ids"][0].tolist() == [0] * 5 + [97, 98, 99]
    assert batch["attention_mask"].tolist() == [[0] * 5 + [1] * 3, [1] * 8]
    if directory == "hf":
        both = model.generate(**batch, **greedy)
        alone = model.generate(**tokenizer("abc", return_tensors="pt"), **greedy)
        assert torch.equal(both[:1, 8:], alone[:, 3:])

    # Text ends where token 0 is the likeliest: here all are alike.
    model.lm_head.weight.data.zero_()
    ended = model.generate(**batch, **greedy)
    assert ended.shape == (2, 9) and ended[:, -1].tolist() == [0, 0]
    assert tokenizer.batch_decode(ended, skip_special_tokens=True) == ["abc", "abcdefgh"]

for directory in sys.argv[1:]:
    look_at(directory, torch.load("tokens.pt"))
"""


@needs_all
def test_transformers_loads_it_with_every_weight_bit_for_bit(run, tmp_path):
    c, state = run
    for form, knobs in FORMATS.items():
        export.main(["a", form, *knobs])
    tokens = some_tokens(24)
    torch.save(tokens, "tokens.pt")
    command = [sys.executable, "-c", LOAD, *FORMATS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower() and "unexpected" not in done.stderr.lower()

    weights, _ = export.tensors(c, state, False)
    tensors, _ = export.tensors(c, state, True, 4)
    expected = logits_of(c, state, tokens)
    # Nothing else tells 4 bits of inputs: without them logits are others.
    in_4_bits = llama(c, tensors, tokens, rounded)
    assert (in_4_bits - llama(c, tensors, tokens)).norm() > 1e-2 * expected.norm()

    for form in FORMATS:
        # It has found all tensors, no others, and the values of all weights.
        found = torch.load(f"{form}.pt")
        assert not any(found["wrong"]) and len(found["weights"]) == 14
        assert 8 < found["made"].shape[1] <= 17
        for name, w in found["weights"].items():
            exact = weights[name]
            if form != "hf":
                exact = exact.bfloat16()      # of blocks that are not quantized
            assert torch.equal(w.float(), exact.float()), name

        # float32 sums in another order, or 10 roundings to bf16 or so
        logits = in_4_bits if form == "w4a4" else expected
        error = (found["logits"] - logits).norm() / logits.norm()
        assert error < dict(hf=1e-5, packed=2.0**-6, w4a4=1e-5)[form]


@needs_all
@pytest.mark.parametrize("trained", [("quartet2", 1, "false")], indirect=True)
def test_the_line_that_it_prints_generates_text_also_where_our_kernels_are(run, tmp_path, capsys):
    export.main(["a", str(tmp_path / "out"), *FORMATS["w4a4"]])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "    # " in line]) == 4
    line = next(line for line in lines if "pipeline" in line)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", line], cwd=small_runs.ROOT, capture_output=True, text=True,
                          env=os.environ | dict(PATH=path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The ") and len(done.stdout) > 5
