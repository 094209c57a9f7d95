"""Tests of quartet.py beside test_quartet.py: rows that cannot be computed, and where its layers are used."""
import copy, os, pickle, shutil, subprocess, sys, types, warnings
from pathlib import Path
import pytest
import torch, torch.utils.checkpoint
import quartet
from quartet import RECIPES, Gemm, Linear

EDEN = Gemm("rht128", "ms_eden", "ms_eden")
def Recipe(x, w, dx, dw, original=False): return quartet.Recipe(x, w, Gemm(*dx), Gemm(*dw), original)

@pytest.mark.parametrize("name, nmse", [(None, 9.32), ("rht128", 9.38), ("rht128x2", 9.32),
                                        ("rht128x3", 9.38)])                        # times 1e-3
def test_ms_eden_errs_as_stated_where_rotations_leave_scales(name, nmse):
    g, errors = torch.Generator().manual_seed(0), []
    for seed in range(16):
        x, R = torch.randn(512, 512, generator=g), name and quartet.rotation(name, g)[0]
        t, y = quartet.ms_eden(x, R, seed), quartet.rotate(x, R)
        errors.append(1e3 * (quartet.decode(t) - y).double().square().sum() / y.double().square().sum())
    mean, sigma = torch.stack(errors).mean(), torch.stack(errors).std() / 4
    assert abs(mean - nmse) < 0.005 + 5 * sigma < 0.06                          # half a digit, and 5 sigma

@pytest.mark.parametrize("row, message", [
    (Recipe("rtn", "rtn", (None, "sr", None), EDEN), r"w='rtn', dx=Gemm\(rotation=None, dy='sr', other=None\)"),
    (Recipe("rtn", "bf16", (None, "sr", None), EDEN), "w='bf16'"),
    (Recipe("rtn", "rtn_16x16", ("rht128", "sr", None), EDEN), r"dx=Gemm\(rotation='rht128', dy='sr', other=None\)"),
    (Recipe("rtn", "rtn", EDEN, ("rht128", "sr", None), True), r"dw=Gemm\(rotation='rht128', dy='sr', other=None\)"),
    (Recipe("rtn", "rtn_16x16", (None, None, None), EDEN), r"dx=Gemm\(rotation=None, dy=None, other=None\)")])
def test_none_for_a_quantizer_where_w_does_not_transpose_as_it_is_is_refused(row, message, monkeypatch):
    monkeypatch.setitem(RECIPES, "mine", row)
    for make in (lambda: Linear(128, 128, recipe="mine"),
                 lambda: quartet.quantize_model(torch.nn.Linear(128, 128), "mine")):
        with pytest.raises(ValueError, match=f"'mine'.*{message}.*{{None}} cannot stand.*in 16x16 blocks that is not rotated"): make()
    for good in Recipe("rtn", "rtn_16x16", (None, "sr", None), EDEN), Recipe("rtn", "rtn", EDEN, EDEN):
        monkeypatch.setitem(RECIPES, "mine", good)
        Linear(128, 128, recipe="mine")

@pytest.mark.parametrize("row, message", [
    (Recipe("rtn", "rtm", EDEN, EDEN), "{'rtm'} cannot stand"),
    (Recipe("rtn", "rtn", ("rht", "sr", "sr"), EDEN), "{'rht'} cannot stand.*names of ROTATIONS"),
    (Recipe("rtn", "rtn", EDEN, ("ms_eden", "rht128", "ms_eden")), "{.*'rht128'.*} cannot stand"),
    (Recipe("rtn", None, EDEN, EDEN), "{None} cannot stand"),
    (Recipe("sr", "rtn", EDEN, EDEN), "{'sr'} cannot stand.*for x and w without noise")])
def test_a_row_of_unknown_names_is_refused(row, message, monkeypatch):
    monkeypatch.setitem(RECIPES, "mine", row)
    with pytest.raises(ValueError, match=message): Linear(128, 128, recipe="mine")

@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_recipe_of_the_original_operands_quantizes_them_and_not_what_the_forward_pass_kept(backend, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1": pytest.skip("no GPU")
    seen, ms_eden = [], quartet.ms_eden
    monkeypatch.setitem(quartet.QUANTIZERS, "ms_eden", lambda x, R, seed: seen.append(x) or ms_eden(x, R, seed))
    monkeypatch.setitem(RECIPES, "mine", RECIPES["quartet2"]._replace(original=True))
    torch.manual_seed(0)
    m, x, dy = Linear(128, 256, recipe="mine", backend=backend).to(device), *torch.randn(2, 128, 256, device=device)
    x = x[:, :128].clone().requires_grad_()
    def gradients():
        torch.manual_seed(1)
        return torch.autograd.grad(m(x), (x, m.weight), dy)
    found = gradients()
    m.backend = "torch"
    expected = gradients()
    w16, x16 = m.weight.detach().bfloat16().T, x.detach().bfloat16().T
    assert torch.equal(seen[-3].bfloat16(), w16) and torch.equal(seen[-1].bfloat16(), x16)     # dy, w; dy, x
    for a, b in zip(found, expected): assert (a - b).norm() <= 2.0**-8 * b.norm()   # sums in another order
    m.recipe = "quartet2"
    for a, b in zip(gradients(), expected): assert (a - b).norm() > 0.05 * b.norm()

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler for a CPU")
def test_compiled_for_a_cpu_is_eager_to_the_bit():
    torch._dynamo.reset()
    torch.manual_seed(0)
    m, (x, dy) = Linear(128, 128, recipe="quartet2"), torch.randn(2, 20, 128)
    def step(f):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        return y, *torch.autograd.grad(y, (leaf, m.weight), dy)
    assert all(map(torch.equal, step(torch.compile(m, fullgraph=True)), step(m)))
    torch._dynamo.reset()

@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["nvidia", "quartet2"])
def test_checkpointed_activations_give_the_same_gradients(recipe, reentrant):
    torch.manual_seed(0)
    m, x = Linear(128, 128, recipe=recipe), torch.randn(20, 128, requires_grad=True)
    def gradients(f):
        torch.manual_seed(1)
        x.grad = m.weight.grad = None
        f(x).square().sum().backward()
        return x.grad, m.weight.grad
    checkpointed = lambda x: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=reentrant)
    assert all(map(torch.equal, gradients(checkpointed), gradients(m)))

def test_a_copy_made_within_quantized_weights_is_free_of_it():
    m, x = Linear(128, 128), torch.ones(2, 128)
    with quartet.quantized_weights(m): other = copy.deepcopy(m)
    other.weight.data.zero_()
    assert not other(x).any() and m(x).any()

def test_kernels_have_square_blocks_for_x_and_w_only():
    """They would take 1x16 blocks in a backward: the reference takes over."""
    kernels = pytest.importorskip("kernels")
    assert kernels.supports(RECIPES["nvidia"])
    assert not kernels.supports(RECIPES["quartet2"]._replace(dw=Gemm("rht128", "rtn_16x16", "rtn")))
    kernels.supports(RECIPES["nvidia"]._replace(w=None))        # refused by `quartet.check`, in its words
    assert {name for name, mode in kernels.MODES.items() if mode.noise} == quartet.NOISY

def test_another_package_named_kernels_is_not_taken_for_ours(tmp_path):
    (tmp_path / "kernels.py").write_text("")
    own = Path(quartet.__file__).parent
    paths = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path.append({str(own)!r})"
    done = subprocess.run([sys.executable, "-c", f"{paths}; import quartet; print(quartet.load_kernels())"],
                          env=os.environ | dict(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert f"cannot import name 'supports' from 'kernels' ({tmp_path}" in done.stdout, done.stderr

COMPILE_ONE = """
import triton, kernels
types = dict(scale="*bf16", largest="*i32", seed="*i64", block_scale="*u8", tensor_scale="*fp32", codes="*u8",
             decoded="*bf16", columns="i32", size="i32", inverse_n="fp32")
constants = dict(count=1, NOISE=16, SWIZZLED=False, B=128)
kernel = kernels.encode_kernel
signature = {n: "constexpr" if n in constants else types[n.removesuffix("_ptr")] for n in kernel.arg_names}
source = triton.compiler.ASTSource(kernel, signature, constants)
triton.compile(source, triton.backends.compiler.GPUTarget("cuda", 90, 32))
"""
def test_a_count_of_one_block_compiles():
    """Triton makes a constant of an argument that is 1, which has no dtype."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE_ONE], cwd=Path(quartet.__file__).parent, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr

def test_within_autocast_rotations_quantizers_and_gemms_give_the_same_bits():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    def results():
        R = quartet.rotation("rht128x2", torch.Generator().manual_seed(0))[0]
        quantized = [t for f in quartet.QUANTIZERS.values() for t in (f(x, R, 1), f(x, None, 1))]
        return [R, quartet.rotate(x, R), *(part for t in quantized for part in t),
                *(quartet.matmul(t, t) for t in quantized)]
    expected = results()
    with torch.autocast("cpu", torch.bfloat16): found = results()
    for a, b in zip(found, expected):
        same = lambda t: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist())
        assert same(a) == same(b)

def test_a_transformer_of_pytorch_multiplies_in_4_bits_also_in_evaluation_but_for_its_attention(monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", True)       # as it was, afterwards
    layer = torch.nn.TransformerEncoderLayer(128, 2, 128, dropout=0.0, batch_first=True)
    model, x = torch.nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 16, 128)
    padding = torch.arange(16).expand(2, 16) > 12
    assert quartet.quantize_model(model, "rtn") == ["layers.0.linear1", "layers.0.linear2"]
    calls, forward = [], quartet.QuantizedMatmul.forward
    monkeypatch.setattr(quartet.QuantizedMatmul, "forward", lambda *a: calls.append(1) or forward(*a))
    expected = model(x, src_key_padding_mask=padding)
    with torch.no_grad(): found = model(x, src_key_padding_mask=padding)
    assert torch.equal(found, expected) and len(calls) == 4
    assert not isinstance(model.layers[0].self_attn.out_proj, Linear)

def test_auto_says_once_why_it_is_not_triton_on_a_gpu_and_nothing_on_a_cpu(monkeypatch):
    def said(make):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            for _ in range(3): make()
        return [str(w.message) for w in found]
    auto, saved = lambda: Linear(128, 128, recipe="rtn"), pickle.dumps(Linear(128, 128, recipe="rtn"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said(auto) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_kernels = quartet.load_kernels
    monkeypatch.setattr(quartet, "load_kernels", lambda: "a C compiler")
    for make in auto, lambda: pickle.loads(saved), lambda: quartet.quantize_model(auto(), "quartet2"):
        text, = said(make)
        assert "needs a C compiler: 'auto' takes 'torch'" in text
    assert said(lambda: [Linear(128, 128, recipe="rtn", backend="torch"), Linear(1, 1, recipe="bf16")]) == []
    monkeypatch.setattr(quartet, "load_kernels", load_kernels)
    monkeypatch.setattr(quartet, "kernels", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for fast in True, False:                    # kernels.py runs, with a mode for each quantizer, or not
        monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(supports=lambda row: fast))
        assert "for each quantizer of 'rtn': 'auto' takes" in "".join(said(auto)) or fast and said(auto) == []

def test_a_bf16_weight_that_is_not_quantized_is_no_change_within_quantized_weights(monkeypatch):
    monkeypatch.setitem(RECIPES, "x", Recipe("rtn", "bf16", EDEN, EDEN))
    linear, x = Linear(128, 128, recipe="x", dtype=torch.bfloat16), torch.randn(4, 128)
    expected = linear(x)
    for _ in range(2):
        with quartet.quantized_weights(linear): assert torch.equal(linear(x), expected)

def test_quantized_weights_that_cannot_be_made_are_not_used(monkeypatch):
    model = torch.nn.Sequential(Linear(128, 128, recipe="rtn"), Linear(128, 128, recipe="rtn"))
    monkeypatch.setattr(model[1], "weight", None)
    with pytest.raises(AttributeError), quartet.quantized_weights(model): pass
    assert model[0].weight_nvfp4 == quartet.NOTHING
