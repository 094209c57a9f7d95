"""Tests of quartet.py beside test_quartet.py: rows that cannot be computed, and where its layers are used."""
import contextlib
import copy
import os
import pickle
import re
import shutil
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import quartet
from quartet import RECIPES, Gemm, Linear, Recipe
from background import in_background, python
from small_runs import ROOT

pytest_plugins = ["background"]

EDEN = Gemm("rht128", "ms_eden", "ms_eden")
SR = Gemm(None, "sr", None)                  # the other operand as it is
ROTATED_SR = Gemm("rht128", "sr", None)


@pytest.fixture
def add_recipe(monkeypatch):
    """A function that adds a row to RECIPES, under a name."""
    def add(name, row):
        monkeypatch.setitem(RECIPES, name, row)

    return add


@pytest.mark.parametrize("name, nmse", [      # times 1e-3
    (None, 9.32),
    ("rht128", 9.38),
    ("rht128x2", 9.32),
    ("rht128x3", 9.38),
])
def test_ms_eden_errs_as_stated_where_rotations_leave_scales(name, nmse):
    generator = torch.Generator().manual_seed(0)
    errors = []
    for seed in range(16):
        x = torch.randn(512, 512, generator=generator)
        R = None
        if name:
            R, _ = quartet.rotation(name, generator)
        exact = quartet.rotate(x, R).double()
        error = quartet.decode(quartet.ms_eden(x, R, seed)) - exact
        errors.append(1e3 * error.square().sum() / exact.square().sum())
    errors = torch.stack(errors)

    # Half a digit, and 5 sigma, which is small
    tolerance = 0.005 + 5 * errors.std() / 4
    assert abs(errors.mean() - nmse) < tolerance
    assert tolerance < 0.06


# ---- Rows that cannot be computed --------------------------------------------------------------------------

@pytest.mark.parametrize("row, named", [
    (Recipe("rtn", "rtn", SR, EDEN), "w='rtn', dx=Gemm(rotation=None, dy='sr', other=None)"),
    (Recipe("rtn", "bf16", SR, EDEN), "w='bf16'"),
    (Recipe("rtn", "rtn_16x16", ROTATED_SR, EDEN), "dx=Gemm(rotation='rht128', dy='sr', other=None)"),
    (Recipe("rtn", "rtn", EDEN, ROTATED_SR, True), "dw=Gemm(rotation='rht128', dy='sr', other=None)"),
    (Recipe("rtn", "rtn_16x16", Gemm(None, None, None), EDEN), "dx=Gemm(rotation=None, dy=None, other=None)"),
])
def test_none_for_a_quantizer_where_w_does_not_transpose_as_it_is_is_refused(row, named, add_recipe):
    add_recipe("mine", row)
    message = f"'mine'.*{re.escape(named)}.*{{None}} cannot stand.*in 16x16 blocks that is not rotated"
    with pytest.raises(ValueError, match=message):
        Linear(128, 128, recipe="mine")
    with pytest.raises(ValueError, match=message):
        quartet.quantize_model(torch.nn.Linear(128, 128), "mine")


@pytest.mark.parametrize("row", [Recipe("rtn", "rtn_16x16", SR, EDEN), Recipe("rtn", "rtn", EDEN, EDEN)])
def test_what_transposes_as_it_is_or_is_quantized_again_is_taken(row, add_recipe):
    add_recipe("mine", row)
    Linear(128, 128, recipe="mine")


@pytest.mark.parametrize("row, message", [
    (Recipe("rtn", "rtm", EDEN, EDEN), "{'rtm'} cannot stand"),
    (Recipe("rtn", "rtn", Gemm("rht", "sr", "sr"), EDEN), "{'rht'} cannot stand.*names of ROTATIONS"),
    (Recipe("rtn", "rtn", EDEN, Gemm("ms_eden", "rht128", "ms_eden")), "{.*'rht128'.*} cannot stand"),
    (Recipe("rtn", None, EDEN, EDEN), "{None} cannot stand"),
    (Recipe("sr", "rtn", EDEN, EDEN), "{'sr'} cannot stand.*for x and w without noise"),
])
def test_a_row_of_unknown_names_is_refused(row, message, add_recipe):
    add_recipe("mine", row)
    with pytest.raises(ValueError, match=message):
        Linear(128, 128, recipe="mine")


# ---- What a layer computes ---------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_recipe_of_the_original_operands_quantizes_them_and_not_what_the_forward_pass_kept(
        backend, add_recipe, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU")

    # Note what the reference quantizes: dy and w for dx, then dy and x for dw.
    ms_eden = quartet.ms_eden
    operands = []

    def note(x, R, seed):
        operands.append(x)
        return ms_eden(x, R, seed)

    monkeypatch.setitem(quartet.QUANTIZERS, "ms_eden", note)
    add_recipe("mine", RECIPES["quartet2"]._replace(original=True))
    torch.manual_seed(0)
    layer = Linear(128, 256, recipe="mine", backend=backend).to(device)
    x = torch.randn(128, 128, device=device).requires_grad_()
    dy = torch.randn(128, 256, device=device)

    def gradients():
        torch.manual_seed(1)
        return torch.autograd.grad(layer(x), (x, layer.weight), dy)

    found = gradients()
    layer.backend = "torch"
    expected = gradients()
    _, w_seen, _, x_seen = operands[-4:]
    assert torch.equal(w_seen.bfloat16(), layer.weight.detach().bfloat16().T)
    assert torch.equal(x_seen.bfloat16(), x.detach().bfloat16().T)

    # Kernels add rotations up in another order. Gradients from what the forward pass kept are others.
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 2.0**-8 * b.norm()
    layer.recipe = "quartet2"
    for a, b in zip(gradients(), expected):
        assert (a - b).norm() > 0.05 * b.norm()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler for a CPU")
@pytest.mark.parametrize("x, dx", [("four_six", EDEN), ("bf16", Gemm("rht128", dy="bf16", other="bf16"))])
def test_compiled_for_a_cpu_is_eager_to_the_bit(x, dx, add_recipe):
    # 4/6, and MS-EDEN with its rotation and noise; rotated bf16. The C++ of a whole recipe takes g++ minutes.
    add_recipe("mine", Recipe(x, "bf16", dx, Gemm(None, "bf16", "bf16")))
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = Linear(128, 128, recipe="mine")
    x, dy = torch.randn(2, 20, 128)

    def step(f):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        return y, *torch.autograd.grad(y, (leaf, layer.weight), dy)

    assert all(map(torch.equal, step(torch.compile(layer, fullgraph=True)), step(layer)))
    torch._dynamo.reset()


def test_noise_is_drawn_also_while_tensors_are_made_without_memory():
    like = torch.empty(0)
    torch.manual_seed(0)
    expected = quartet.draw(like, 4)
    torch.manual_seed(0)
    with torch.device("meta"):
        assert torch.equal(quartet.draw(like, 4), expected)


@pytest.mark.parametrize("reduced, split", [(False, False), (True, True), (False, True)])
def test_a_gemm_leaves_pytorchs_flags_as_they_were(reduced, split):
    def flags():
        names = "allow_bf16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction_split_k"
        return tuple(getattr(cublas, name) for name in names)

    cublas = torch.backends.cuda.matmul
    before = flags()
    cublas.allow_bf16_reduced_precision_reduction = reduced, split
    try:
        quartet.gemm(torch.ones(16, 16), torch.ones(16, 16))
        assert flags() == (reduced, split)
    finally:
        cublas.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["nvidia", "quartet2"])
def test_checkpointed_activations_give_the_same_gradients(recipe, reentrant):
    torch.manual_seed(0)
    layer = Linear(128, 128, recipe=recipe)
    x = torch.randn(20, 128, requires_grad=True)

    def gradients(f):
        torch.manual_seed(1)
        x.grad = None
        layer.weight.grad = None
        f(x).square().sum().backward()
        return x.grad, layer.weight.grad

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    assert all(map(torch.equal, gradients(checkpointed), gradients(layer)))


def bits(t):
    """All that there is to a tensor: dtype, shape and bytes."""
    return t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()


def test_within_autocast_rotations_quantizers_and_gemms_give_the_same_bits():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))

    def results():
        R, _ = quartet.rotation("rht128x2", torch.Generator().manual_seed(0))
        tensors = [R, quartet.rotate(x, R)]
        for quantizer in quartet.QUANTIZERS.values():
            for rotation in (R, None):
                t = quantizer(x, rotation, 1)
                tensors += [*t, quartet.matmul(t, t)]
        return [bits(t) for t in tensors]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert results() == expected


# ---- Weights that are quantized once -----------------------------------------------------------------------

def test_a_copy_made_within_quantized_weights_is_free_of_it():
    layer = Linear(128, 128)
    x = torch.ones(2, 128)
    with quartet.quantized_weights(layer):
        other = copy.deepcopy(layer)
    other.weight.data.zero_()
    assert not other(x).any()
    assert layer(x).any()


def test_a_bf16_weight_that_is_not_quantized_is_no_change_within_quantized_weights(add_recipe):
    add_recipe("mine", Recipe("rtn", "bf16", EDEN, EDEN))
    layer = Linear(128, 128, recipe="mine", dtype=torch.bfloat16)
    x = torch.randn(4, 128)
    expected = layer(x)
    for _ in range(2):
        with quartet.quantized_weights(layer):
            assert torch.equal(layer(x), expected)


def test_weights_quantized_once_in_inference_mode_leave_nothing_that_training_cannot_use():
    def gradient(mode):
        torch.manual_seed(0)
        layer = Linear(128, 128)
        x = torch.randn(4, 128)
        with mode(), quartet.quantized_weights(layer):
            layer(x)
        with quartet.quantized_weights(layer):
            layer(x).sum().backward()
        return layer.weight.grad

    assert torch.equal(gradient(torch.inference_mode), gradient(torch.no_grad))


def test_a_model_made_in_inference_mode_can_have_its_weights_quantized_once():
    with torch.inference_mode():
        layer = Linear(128, 128)
        x = torch.randn(4, 128)
        with quartet.quantized_weights(layer):
            y = layer(x)
        assert torch.equal(y, layer(x))


def test_quantized_weights_that_cannot_be_made_are_not_used(monkeypatch):
    model = torch.nn.Sequential(Linear(128, 128, recipe="rtn"), Linear(128, 128, recipe="rtn"))
    calls = []

    def quantized(w, recipe):
        calls.append(w)
        if len(calls) == 2:
            raise MemoryError
        return quartet.rtn(w)

    monkeypatch.setattr(quartet, "quantized", quantized)
    with pytest.raises(MemoryError):
        with quartet.quantized_weights(model):
            pass
    assert model[0].weight_source == (None, None, None)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer.weight_orig


def spectral(layer):
    parametrizations.spectral_norm(layer)      # in training each look at the weight changes it
    return layer.parametrizations.weight.original


def offloaded(layer):
    """Its weight comes to memory when the layer is called, and goes again."""
    here = layer.weight
    away = torch.nn.Parameter(here.detach().to("meta"))
    layer.weight = away
    layer.register_forward_pre_hook(lambda m, x: setattr(m, "weight", here))
    layer.register_forward_hook(lambda m, x, y: setattr(m, "weight", away))
    return here


@pytest.mark.parametrize("form", [pruned, spectral, offloaded])
def test_a_weight_that_comes_when_its_layer_is_called_is_that_of_the_call(form):
    def output(within):
        torch.manual_seed(0)
        layer = Linear(128, 128)
        source = form(layer)
        x = torch.randn(4, 128)
        layer(x)
        with torch.no_grad():
            source.add_(torch.randn_like(source))      # a step of the optimizer
        with within(layer):
            return layer(x)

    assert torch.equal(output(quartet.quantized_weights), output(contextlib.nullcontext))


def test_another_recipe_within_quantized_weights_is_what_multiplies():
    layer = Linear(128, 128, recipe="quartet2")
    x = torch.randn(4, 128)
    expected = Linear(128, 128, recipe="nvidia")
    expected.weight = layer.weight
    with quartet.quantized_weights(layer):
        layer.recipe = "nvidia"
        assert torch.equal(layer(x), expected(x))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_step_of_a_fused_optimizer_within_quantized_weights_is_an_error(kind):
    layer = Linear(128, 128)
    optimizer = getattr(torch.optim, kind)(layer.parameters(), lr=0.1, fused=True)
    with pytest.raises(RuntimeError, match="a weight changed"), quartet.quantized_weights(layer):
        layer(torch.ones(2, 128)).sum().backward()
        optimizer.step()
    with quartet.quantized_weights(layer):      # another's step is none of its
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()


def test_new_data_of_a_weight_within_quantized_weights_is_an_error():
    layer = Linear(128, 128)
    with pytest.raises(RuntimeError, match="a weight changed"), quartet.quantized_weights(layer):
        torch.nn.utils.vector_to_parameters(torch.ones(128 * 128), layer.parameters())


def test_what_was_quantized_once_is_neither_pickled_nor_copied():
    layer = Linear(128, 128)
    with quartet.quantized_weights(layer):
        pass
    x = torch.randn(4, 128)
    for other in pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer):
        assert other.weight_nvfp4 is quartet.NOTHING
        assert torch.equal(other(x), layer(x))


def test_a_parametrized_weight_is_computed_once_a_forward_pass():
    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, w):
            self.calls += 1
            return w

    layer = Linear(128, 128)
    counted = Counted()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", counted)
    before = counted.calls
    layer(torch.ones(2, 128))
    assert counted.calls == before + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_makes_no_difference(dtype):
    def gradients():
        torch.manual_seed(0)
        layer = Linear(128, 128, dtype=torch.float32)
        x = torch.ones(4, 128, dtype=torch.float32, requires_grad=True)
        return torch.autograd.grad(layer(x).sum(), [x, layer.weight])

    expected = gradients()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, gradients(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_fsdp2_has_left_whole_are_not_taken_for_the_own_ones():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(torch.nn.Sequential(Linear(128, 128, recipe="quintet")))
        x = torch.ones(2, 128)
        with torch.no_grad():
            model(x)
        assert type(model[0].weight) is torch.nn.Parameter      # whole, as the root leaves it
        before = model.state_dict()["0.weight"].full_tensor().clone()
        quartet.dampen(model, 0.05)
        assert not torch.equal(model.state_dict()["0.weight"].full_tensor(), before)

        with torch.no_grad():
            model(x)
        with quartet.quantized_weights(model):
            assert torch.equal(model(x), model(x))
            assert model[0].weight_nvfp4 is quartet.NOTHING
    finally:
        dist.destroy_process_group()


def test_another_weight_within_quantized_weights_is_what_multiplies():
    layer = Linear(128, 128)
    x = torch.randn(4, 128)
    other = torch.nn.Parameter(torch.randn(128, 128))
    expected = torch.func.functional_call(layer, {"weight": other}, (x,))
    with quartet.quantized_weights(layer):
        assert torch.equal(torch.func.functional_call(layer, {"weight": other}, (x,)), expected)
        layer.weight = other
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)


# ---- Other people's models ---------------------------------------------------------------------------------

def test_a_transformer_of_pytorch_multiplies_in_4_bits_also_in_evaluation_but_for_its_attention(monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", True)      # as it was, afterwards
    layer = torch.nn.TransformerEncoderLayer(128, 2, 128, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 1).eval()
    assert quartet.quantize_model(model, "rtn") == ["layers.0.linear1", "layers.0.linear2"]
    assert not isinstance(model.layers[0].self_attn.out_proj, Linear)

    # Count what is multiplied in 4 bits, with gradients and without: two layers each.
    forward = quartet.QuantizedMatmul.forward
    calls = []

    def note(*arguments):
        calls.append(0)
        return forward(*arguments)

    monkeypatch.setattr(quartet.QuantizedMatmul, "forward", note)
    x = torch.randn(2, 16, 128)
    padding = torch.arange(16).expand(2, 16) > 12
    expected = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)
    assert torch.equal(found, expected)
    assert len(calls) == 4


# ---- Backends ----------------------------------------------------------------------------------------------

def warned(make):
    """The texts of the warnings that three calls of make lead to, as Python shows them by default."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            make()
    return [str(warning.message) for warning in found]


def make_auto():
    return Linear(128, 128, recipe="rtn")


def test_auto_says_once_why_it_is_not_triton_on_a_gpu_and_nothing_on_a_cpu(monkeypatch):
    pickled = pickle.dumps(make_auto())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warned(make_auto) == []

    # On a GPU, kernels.py cannot run for want of something.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(quartet, "load_kernels", lambda: "a C compiler")
        for make in [
            make_auto,
            lambda: pickle.loads(pickled),
            lambda: quartet.quantize_model(make_auto(), "quartet2"),
        ]:
            text, = warned(make)
            assert "needs a C compiler: 'auto' takes 'torch'" in text
        assert warned(lambda: Linear(128, 128, recipe="rtn", backend="torch")) == []
        assert warned(lambda: Linear(1, 1, recipe="bf16")) == []

    # It can run, with a mode for each quantizer of the row, or without.
    monkeypatch.setattr(quartet, "kernels", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(supports=lambda row: True))
    assert warned(make_auto) == []
    monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(supports=lambda row: False))
    text, = warned(make_auto)
    assert "for each quantizer of 'rtn': 'auto' takes" in text


def test_kernels_have_square_blocks_for_x_and_w_only():
    """They would take 1x16 blocks in a backward: the reference takes over."""
    kernels = pytest.importorskip("kernels")
    assert kernels.supports(RECIPES["nvidia"])
    assert not kernels.supports(RECIPES["quartet2"]._replace(dw=Gemm("rht128", "rtn_16x16", "rtn")))
    kernels.supports(RECIPES["nvidia"]._replace(w=None))      # refused by `quartet.check`, in its words
    assert {name for name, mode in kernels.MODES.items() if mode.noise} == quartet.NOISY


@in_background
def beside_another_package(directory):
    (directory / "kernels.py").write_text("")
    code = (f"import sys; sys.path[:0] = [{str(directory)!r}]; sys.path.append({str(ROOT)!r}); "
            "import quartet; print(quartet.load_kernels())")
    return directory, python("-c", code, cwd=directory, TRITON_INTERPRET="1")


def test_another_package_named_kernels_is_not_taken_for_ours(beside_another_package):
    directory, done = beside_another_package
    assert f"cannot import name 'supports' from 'kernels' ({directory}" in done.stdout, done.stderr


COMPILE_ONE = """
import kernels
import triton

types = dict(scale="*bf16", largest="*i32", seed="*i64", block_scale="*u8", tensor_scale="*fp32", codes="*u8",
             decoded="*bf16", columns="i32", size="i32")
constants = dict(count=1, NOISE=16, SWIZZLED=False, B=128)
kernel = kernels.encode_kernel
signature = {name: types.get(name.removesuffix("_ptr"), "constexpr") for name in kernel.arg_names}
source = triton.compiler.ASTSource(kernel, signature, constants)
triton.compile(source, triton.backends.compiler.GPUTarget("cuda", 90, 32))
"""


@in_background
def compiled_for_one(directory):
    return python("-c", COMPILE_ONE, cwd=directory, PYTHONPATH=str(ROOT))


def test_a_count_of_one_block_compiles(compiled_for_one):
    """Triton makes a constant of an argument that is 1, which has no dtype."""
    pytest.importorskip("triton")
    assert compiled_for_one.returncode == 0, compiled_for_one.stderr
