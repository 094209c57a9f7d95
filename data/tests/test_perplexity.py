"""Tests of perplexity.py: post-training quantization."""
import importlib.util, json, math
from types import SimpleNamespace
import pytest
import torch, torch.nn.functional as F
import perplexity, quartet

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None,
                                        reason="needs transformers")

@pytest.fixture(autouse=True)
def recipes(monkeypatch): monkeypatch.setattr(quartet, "RECIPES", dict(quartet.RECIPES))     # rows() adds

class Bigram(torch.nn.Module):
    """Logits of the next token from this one alone, called as transformers' models are."""
    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.head = (torch.nn.Embedding(32, 64), torch.nn.Linear(64, 128),
                                                  torch.nn.Linear(128, 32))
        self.device = torch.device("cpu")
    def get_output_embeddings(self): return self.head
    def forward(self, tokens, use_cache):
        return SimpleNamespace(logits=self.head(self.linear(self.embedding(tokens))))

def test_the_loss_is_the_mean_over_all_tokens_but_a_windows_first_and_the_head_is_left_alone(capsys):
    torch.manual_seed(0)
    model, windows = Bigram(), torch.randint(0, 32, (5, 16))
    logits = model(windows, False).logits.double()
    places = [(i, t) for i in range(5) for t in range(1, 16)]
    expected = -sum(F.log_softmax(logits[i, t - 1], 0)[windows[i, t]] for i, t in places) / len(places)
    assert abs(perplexity.evaluate(model, windows, 2) - expected) < 1e-6
    perplexity.show(perplexity.losses(model, windows, 2))
    lines = capsys.readouterr().out.splitlines()[1:]
    loss = {line[:30].strip(): float(line[30:39]) for line in lines}
    assert len(loss) == 14 and type(model.head) is torch.nn.Linear and type(model.linear) is quartet.Linear
    w = quartet.decode(quartet.rtn(model.linear.weight.detach().bfloat16()))
    with torch.no_grad(): logits = model.head(F.linear(model.embedding(windows), w, model.linear.bias))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert abs(loss["rtn, weights"] - expected) < 3e-4 < abs(loss["rtn, weights"] - loss["as it is"])  # bf16

@pytest.mark.parametrize("knob, way_out", [
    *((knob, "at least") for knob in ("--window=1", "--window=-3", "--batch=0", "--tokens=-1", "--tokens=0")),
    *((f"--device={name}", "leave the knob out") for name in ("cuda:99", "gpu"))])
def test_a_knob_that_cannot_be_is_an_error_before_a_model_is_loaded(knob, way_out):
    with pytest.raises(ValueError, match=f"{knob}: .*{way_out}"): perplexity.main(["model", "text", knob])

def test_a_large_loss_is_shown_too(capsys):
    perplexity.show([("good", 1.0), ("bad", 20.0), ("diverged", 71293.0), ("lost", math.nan)])
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "2.718", "4.852e+08", "inf", "nan"]

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
    with torch.no_grad(): before = model(tokens).logits
    names = quartet.quantize_model(model, "bf16", skip=perplexity.head_of(model))
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert set(linears) == {*names, "lm_head"} and len(names) == 14 and type(model.lm_head) is torch.nn.Linear
    with torch.no_grad(): assert torch.equal(model(tokens).logits, before)
    quartet.quantize_model(model, "rtn", skip=perplexity.head_of(model))
    with torch.no_grad(): assert 0 < (model(tokens).logits - before).norm() < 0.5 * before.norm()

@needs_transformers
def test_the_command_measures_a_model_on_a_text(tmp_path, capsys):
    import export, transformers
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), export.byte_tokenizer()):
        (tmp_path / "model" / name).write_text(json.dumps(content))
    (tmp_path / "text").write_text("abcd" * 40)
    perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=64", "--tokens=150"])
    lines = capsys.readouterr().out.splitlines()
    assert "7 linear layers, 53% of the parameters; 2 windows of 64 tokens" in lines[0] and len(lines) == 16
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")    # as most are
    perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=64"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and lines[3].split()[4] == "0.0000"
    with pytest.raises(ValueError, match="160 tokens.*--window=999"):
        perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=999"])
    with pytest.raises(ValueError, match="--window=4096: the model knows 2048 positions"):
        (tmp_path / "long").write_text("abcd" * 2000)
        perplexity.main([str(tmp_path / "model"), str(tmp_path / "long"), "--window=4096"])
    config.vocab_size = 100
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="its tokenizer makes token 100, it has 100"):
        perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=64"])
    gpt2 = transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=1, n_head=1, n_positions=64)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "model")      # its layers are no nn.Linear
    with pytest.raises(ValueError, match="no nn.Linear but its head"):
        perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=64"])
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])                           # half a download
    with pytest.raises(ValueError, match="cannot load .*model: SafetensorError"):
        perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=64"])
    config.quantization_config = dict(quant_method="fp8")
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="by fp8: take the original"):
        perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=64"])
    (tmp_path / "text").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="text: not in UTF-8"):
        perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=64"])

@needs_transformers
def test_experts_that_are_no_linear_layers_are_told_by_the_share_of_what_is_quantized(tmp_path, capsys):
    import export, transformers
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), export.byte_tokenizer()):
        (tmp_path / "model" / name).write_text(json.dumps(content))
    (tmp_path / "text").write_text("abcd" * 40)
    perplexity.main([str(tmp_path / "model"), str(tmp_path / "text"), "--window=64", "--tokens=64"])
    linears = [m for name, m in model.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"]
    share = sum(m.weight.numel() for m in linears) / sum(p.numel() for p in model.parameters())
    assert f"{len(linears)} linear layers, {share:.0%} of the parameters" in capsys.readouterr().out
