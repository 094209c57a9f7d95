"""Tests of perplexity.py: post-training quantization."""
import importlib.util
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import export
import perplexity
import quartet

lacks_transformers = importlib.util.find_spec("transformers") is None
needs_transformers = pytest.mark.skipif(lacks_transformers, reason="needs transformers")
lacks_gguf = any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate"))
needs_gguf = pytest.mark.skipif(lacks_gguf, reason="needs gguf and accelerate")

EVIDENCE = Path(__file__).resolve().parents[1] / "evidence"

# What makes a model of transformers a small one.
SMALL = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    """rows() adds recipes: they are gone after the test."""
    monkeypatch.setattr(quartet, "RECIPES", dict(quartet.RECIPES))


class Bigram(torch.nn.Module):
    """Logits of the next token from this one alone, called as transformers' models are."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 64)
        self.linear = torch.nn.Linear(64, 128)
        self.head = torch.nn.Linear(128, 32)
        self.device = torch.device("cpu")

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens, use_cache):
        return SimpleNamespace(logits=self.head(self.linear(self.embedding(tokens))))


def test_the_loss_is_the_mean_over_all_tokens_but_a_windows_first_and_the_head_is_left_alone(capsys):
    # The model as it is
    torch.manual_seed(0)
    model = Bigram()
    windows = torch.randint(0, 32, (5, 16))
    log_p = F.log_softmax(model(windows, False).logits.double(), -1)
    places = [(i, t) for i in range(5) for t in range(1, 16)]
    expected = -sum(log_p[i, t - 1, windows[i, t]] for i, t in places) / len(places)
    losses = perplexity.evaluate(model, windows, 2)
    assert losses.shape == (5,) and abs(losses.mean() - expected) < 1e-6
    first = -sum(log_p[0, t - 1, windows[0, t]] for t in range(1, 16)) / 15
    assert abs(losses[0] - first) < 1e-6

    # The table of all rows
    perplexity.show(perplexity.measure(model, windows, 2, perplexity.rows()[1:]))
    lines = capsys.readouterr().out.splitlines()[1:]
    loss = {line[:30].strip(): float(line[30:39]) for line in lines}
    assert len(loss) == 14
    assert type(model.head) is torch.nn.Linear and type(model.linear) is quartet.Linear

    # One of them, by hand; it is computed in bf16.
    w = quartet.decode(quartet.rtn(model.linear.weight.detach().bfloat16()))
    with torch.no_grad():
        logits = model.head(F.linear(model.embedding(windows), w, model.linear.bias))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    effect = abs(loss["rtn_weights"] - loss["as it is"])
    assert abs(loss["rtn_weights"] - expected) < 3e-4 < effect


def test_a_layer_that_16_does_not_divide_is_left_alone():
    model = Bigram()
    model.gate = torch.nn.Linear(64, 1)
    model.narrow = torch.nn.Linear(24, 64)
    assert perplexity.unfit(model) == ["gate", "narrow"]
    assert perplexity.left_alone(model) == ["head", "gate", "narrow"]
    for recipe in perplexity.rows():
        assert quartet.quantize_model(model, recipe, skip=perplexity.left_alone(model)) == ["linear"]


@pytest.mark.parametrize("knob, way_out", [
    ("--window=1", "at least"),
    ("--window=-3", "at least"),
    ("--batch=0", "at least"),
    ("--tokens=-1", "at least"),
    ("--tokens=0", "at least"),
    ("--device=cuda:99", "leave the knob out"),
    ("--device=gpu", "leave the knob out"),
    ("--rows=rtn", "'rtn' is none of rtn_weights, .*, scale_search_16x16_both$"),
    ("--rows=rtn_weights,rtn_bth", "'rtn_bth' is none of"),
    ("--rows=", "'' is none of"),
])
def test_a_knob_that_cannot_be_is_an_error_before_a_model_is_loaded(knob, way_out):
    with pytest.raises(ValueError, match=f"{knob}: .*{way_out}"):
        perplexity.main(["model", "text", knob])


def test_a_large_loss_is_shown_too(capsys):
    losses = dict(good=1.0, bad=20.0, diverged=71293.0, lost=math.nan)
    perplexity.show([(name, torch.full((3,), loss).double()) for name, loss in losses.items()])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[-1] for line in lines] == ["2.718", "4.852e+08", "inf", "nan"]


def test_each_row_is_compared_with_the_first_and_the_one_above_by_windows(capsys):
    # c - b is -0.2, -0.1 and 0: its mean is -0.1, its standard deviation 0.1. c - "as it is" is 0.7 to 0.9.
    measured = [
        ("as it is", torch.tensor([1.0, 2.0, 3.0]).double()),
        ("b", torch.tensor([1.9, 2.9, 3.9]).double()),
        ("c", torch.tensor([1.7, 2.8, 3.9]).double()),
    ]
    perplexity.show(measured)
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split("  ")[-1].strip() == "perplexity"
    _, b, c = [[float(number) for number in line[30:].split()] for line in lines]
    assert b == [2.9, 0.9, 0.0, 0.9, 0.0, round(math.exp(2.9), 3)]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert c[1] == 0.8 and c[2] == pytest.approx(half, rel=0.01)
    assert c[3] == -0.1 and c[4] == pytest.approx(half, rel=0.01)


@pytest.mark.parametrize("windows, quantile, tolerance", [
    (3, 4.303, 1e-2),
    (4, 3.182, 2e-3),
    (9, 2.306, 4e-4),
    (31, 2.042, 4e-4),
    (152, 1.976, 4e-4),
])
def test_the_interval_is_students(windows, quantile, tolerance):
    torch.manual_seed(0)
    differences = torch.randn(windows).double()
    mean = sum(differences.tolist()) / windows
    variance = sum((d - mean)**2 for d in differences.tolist()) / (windows - 1)
    expected = quantile * math.sqrt(variance / windows)
    assert perplexity.half_interval(differences) == pytest.approx(expected, rel=tolerance)
    assert math.isnan(perplexity.half_interval(differences[:2]))


@needs_transformers
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_all_layers_but_the_head_are_swapped_and_bf16_changes_nothing(family, tied):
    import transformers
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    tokens = torch.randint(0, 64, (2, 16))

    @torch.no_grad()
    def logits():
        return model(tokens).logits

    before = logits()
    names = quartet.quantize_model(model, "bf16", skip=perplexity.left_alone(model))
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert set(linears) == {*names, "lm_head"} and len(names) == 14
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.equal(logits(), before)
    quartet.quantize_model(model, "rtn", skip=perplexity.left_alone(model))
    assert 0 < (logits() - before).norm() < 0.5 * before.norm()


@pytest.fixture
def command(tmp_path, capsys):
    """A function that runs the command on text and model/, with a tokenizer of bytes -> printed lines.

    file: of the model, if it is in one.
    """
    directory = tmp_path / "model"
    directory.mkdir()
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), export.byte_tokenizer()):
        (directory / name).write_text(json.dumps(content))
    text = tmp_path / "text"
    text.write_text("abcd" * 40)

    def run(*knobs, file=""):
        perplexity.main([str(directory / file), str(text), *knobs])
        return capsys.readouterr().out.splitlines()

    return run


@needs_transformers
def test_the_command_measures_a_model_on_a_text(command, tmp_path):
    import transformers
    directory = tmp_path / "model"
    text = tmp_path / "text"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    lines = command("--window=64", "--tokens=150")
    assert "7 linear layers, 53% of the parameters; 2 windows of 64 tokens" in lines[0] and len(lines) == 17
    assert re.fullmatch("[0-9]+ seconds", lines[-1])

    # Chosen rows give the same numbers, in the order chosen; both first rows stay.
    chosen = command("--window=64", "--tokens=150", "--rows=rtn_both,rtn_weights")
    assert chosen[:4] == lines[:4] and len(chosen) == 7
    for name, line in zip(["rtn_both", "rtn_weights"], chosen[4:]):
        same, = [other for other in lines if other.split()[0] == name]
        assert line.split()[:3] == same.split()[:3]

    # Most models are kept in bf16, and quantizing to bf16 changes them not at all.
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    lines = command("--window=32")
    assert len(lines) == 17 and lines[3].split()[4:6] == ["0.0000", "0.0000"]

    def refused(message, *knobs):
        with pytest.raises(ValueError, match=message):
            command(*knobs)

    # Windows that the text or the model has not got
    refused("160 tokens.*--window=999", "--window=999")
    text.write_text("abcd" * 2000)
    refused("--window=4096: the model knows 2048 positions", "--window=4096")
    text.write_text("abcd" * 40)

    # Models that do not fit the tokenizer, have nothing to quantize (GPT-2's layers are no nn.Linear), ...
    config.vocab_size = 100
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    refused("its tokenizer makes token 100, it has 100", "--window=64")
    gpt2 = transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=1, n_head=1, n_positions=64)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(directory)
    refused("no nn.Linear but its head", "--window=64")

    # ... are half a download, or quantized already
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused("cannot load .*model: SafetensorError", "--window=64")
    config.quantization_config = dict(quant_method="fp8")
    config.save_pretrained(directory)
    refused("by fp8: take the original", "--window=64")

    text.write_bytes(b"caf\xe9")
    refused("text: not in UTF-8", "--window=64")


@needs_transformers
def test_experts_that_are_no_linear_layers_are_told_by_the_share_of_what_is_quantized(command, tmp_path):
    import transformers
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4))
    model.save_pretrained(tmp_path / "model")
    lines = command("--window=64", "--tokens=64")
    linears = [m for name, m in model.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"]
    share = sum(m.weight.numel() for m in linears) / sum(p.numel() for p in model.parameters())
    assert f"{len(linears)} linear layers, {share:.0%} of the parameters" in lines[0]


@needs_transformers
def test_a_gate_of_one_column_is_listed_and_stays_as_it_is(command, tmp_path):
    import transformers
    config = transformers.Qwen2MoeConfig(**SMALL, num_experts=2, num_experts_per_tok=1)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    for knobs in [], ["--rows=scale_search_16x16_both"]:
        lines = command("--window=64", "--tokens=64", *knobs)
        assert lines[0].endswith("16 does not divide them: model.layers.0.mlp.shared_expert_gate")
        assert len(lines) == (6 if knobs else 17) + 1


@needs_transformers
@needs_gguf
def test_a_gguf_file_measures_as_the_model_that_it_holds(command, tmp_path):
    import gguf
    import transformers
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    expected = command("--window=32", "--rows=rtn_both")

    writer = gguf.GGUFWriter(tmp_path / "model/small.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokenizer, _ = export.byte_tokenizer()
    # transformers wants a merge: of letters that no text here has, to a token in the place of another such.
    tokens = list(tokenizer["model"]["vocab"])
    tokens[255] = "XY"
    writer.add_token_list(tokens)
    writer.add_token_merges(["X Y"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[-2]
        if layer in ("q_proj", "k_proj"):
            # RoPE turns neighbouring rows in GGUF, the halves of a head in transformers.
            tensor = tensor.unflatten(0, (heads[layer[0]], 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    # Without the directory's own files, so that all is read from this one
    for path in (tmp_path / "model").iterdir():
        if path.name != "small.gguf":
            path.unlink()
    lines = command("--window=32", "--rows=rtn_both", file="small.gguf")
    assert lines[1:-1] == expected[1:-1]


def test_the_section_about_smollm2_has_the_numbers_of_the_kept_file():
    kept = (EVIDENCE / "results/perplexity-smollm2.txt").read_text()
    readme = (EVIDENCE / "README.md").read_text()
    section = readme[readme.index("## 9. "):readme.index("## 10. ")]
    sentences = " ".join(section.split())

    # Its table
    measured = {}
    row = r"^(as it is|all in bf16|\w+_(?:weights|both))((?: +[-.0-9]+){6})$"
    for name, numbers in re.findall(row, kept, re.M):
        measured[name] = [float(number) for number in numbers.split()]
    assert list(measured) == ["as it is", *perplexity.rows()]
    operands = ("weights", "both", "16x16_weights", "16x16_both")

    def line(title, quantizer, column):
        cells = []
        for operand in operands:
            row = measured[f"{quantizer}_{operand}"]
            cells.append(f"{1e3 * row[column]:.1f} +- {1e3 * row[column + 1]:.1f}")
        return f"| {title} | {' | '.join(cells)} |"

    found = [text for text in section.splitlines() if re.match(r"\| .* \+- [0-9.]+ \|$", text)]
    assert found == [
        line("rtn", "rtn", 1),
        line("four_six", "four_six", 1),
        line("scale_search", "scale_search", 1),
        line("four_six minus rtn", "four_six", 3),
        line("scale_search minus four_six", "scale_search", 3),
    ]

    # What its text says of the run; the command stands in both.
    windows, length = re.search(r"; (\d+) windows of (\d+) tokens, \w+$", kept, re.M).groups()
    seconds, = re.findall(r"^(\d+) seconds$", kept, re.M)
    assert f", {seconds} seconds:" in kept and f"It took {seconds} seconds" in sentences
    assert f"in {windows} windows of {length} tokens" in sentences
    assert f"first {int(windows) * int(length):,} tokens" in sentences
    first = measured["as it is"]
    assert f"the loss is {first[0]:.4f} nats a token, perplexity {first[-1]:.3f}" in sentences
    command, = re.findall(r"^python data/perplexity.py .*$", section, re.M)
    assert f"\n{command}\n" in kept and command.endswith(f"--tokens={int(windows) * int(length)}")

    # And of the squared errors of the weights
    error = {}
    for name, value in re.findall(r"^(\w+) +(0\.\d{6})$", kept, re.M):
        error[name] = f"{1e3 * float(value):.1f}e-3"
    assert error["four_six_16x16"] == error["rtn_16x16"]
    large = f"{error['scale_search_16x16']} of their squares where four_six and rtn have {error['rtn_16x16']}"
    small = f"{error['scale_search']}, {error['four_six']} and {error['rtn']}"
    assert large in sentences and small in sentences

    # And of searches over fewer scales, against rtn
    cost = {}
    for steps, numbers in re.findall(r"^16x16: search of ([-0-9 ]+?)  +([-0-9. ]+)$", kept, re.M):
        _, difference, half, *_ = [float(number) for number in numbers.split()]
        word = "more" if difference > 0 else "less"
        cost[steps] = f"{1e3 * abs(difference):.1f} +- {1e3 * half:.1f} {word} than rtn"
    assert f"amax / 6 costs {cost['0 -1']}" in sentences
    assert f"other four costs {cost['0 1 4 5']}" in sentences
