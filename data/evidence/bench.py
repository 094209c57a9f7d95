"""What `python kernels.py` does: check the kernels against quartet.py and time them on the GPU that is here.

    python kernels.py                                   check, bit for bit, and time
    python kernels.py --target=sm_100a [--dump=DIR]     compile for a GPU that need not be here, and count

Which quantizers it takes follows from the tables: kernels.MODES, quartet.QUANTIZERS, quartet.RECIPES. A new
row there is checked, timed and compiled, and nothing is to be added here.
"""
import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import kernels
import quartet
from quartet import BLOCK, GROUP, NVFP4

TOKENS = 16384


# ---- 1. What there is to check, to time and to compile -----------------------------------------------------
#
# A quantizer runs in up to three forms: quantize_kernel takes x as it is (flat); tile_kernel takes one read
# of dy and makes two results (both), or takes stored NVFP4 and makes its transpose (requantized).

def mode_of(name):
    """A name of quartet.QUANTIZERS -> its name in kernels.MODES, if there, and how many rows share a scale.

    Example: "rtn_16x16" -> "rtn", 16.
    """
    if name.endswith("_16x16"):
        return name.removesuffix("_16x16"), BLOCK
    return name, 1


def quantizers():
    """The names in quartet.QUANTIZERS that the kernels have a mode for."""
    return [name for name in quartet.QUANTIZERS if mode_of(name)[0] in kernels.MODES]


# The recipes whose kernels must not spill. Others' may, a little: sr does under some versions of Triton.
MAIN = ("quartet2", "quintet")


def backward_gemms():
    """All Gemms in quartet.RECIPES."""
    return [gemm for row in quartet.RECIPES.values() if row for gemm in (row.dx, row.dw)]


def unrotated():
    """What recipes give a dy that is not rotated."""
    return {gemm.dy for gemm in backward_gemms() if gemm.rotation is None}


def backward():
    """What recipes have in backward GEMMs."""
    return {name for gemm in backward_gemms() for name in (gemm.dy, gemm.other)}


def main_quantizers():
    """What recipes of MAIN quantize with."""
    names = set()
    for recipe in MAIN:
        row = quartet.RECIPES[recipe]
        names |= {row.x, row.w, row.dx.dy, row.dx.other, row.dw.dy, row.dw.other}
    return names


def flat_quantizers():
    """Those of `quantizers` that can run flat: all without noise, and `unrotated` ones."""
    return [name for name in quantizers() if not kernels.MODES[mode_of(name)[0]].noise or name in unrotated()]


def tile_quantizers():
    """The modes that can run on tiles: all with noise, and `backward` ones."""
    return [name for name, mode in kernels.MODES.items() if mode.noise or name in backward()]


# ---- 2. Compile for a GPU that is not here, and count ------------------------------------------------------

class Target(NamedTuple):
    """A GPU, by its published numbers."""
    capability: int
    instructions: float    # lane-instructions/s: multiprocessors x 128 x clock
    bandwidth: float       # bytes/s
    bf16: float = 0.0      # dense FLOP/s in bf16
    fp4: float = 0.0       # and in FP4


TARGETS = {
    "sm_90a": Target(90, 30e12, 3.35e12),                          # H100
    "sm_100a": Target(100, 35e12, 8e12, 2.25e15, 9e15),            # B200
    "sm_103a": Target(103, 35e12, 8e12, 2.25e15, 13.1e15),         # B300
    "sm_120a": Target(120, 52e12, 1.79e12, 0.2095e15, 1.676e15)    # RTX 5090
}

# Types of the kernels' arguments, by name or by its last word, without _ptr.
TYPES = {
    "x": "*bf16",
    "x_scale": "*u8",
    "x_tensor_scale": "*fp32",
    "R": "*bf16",
    "seed": "*i64",
    "codes": "*u8",
    "scale": "*bf16",
    "largest": "*i32",
    "decoded": "*bf16",
    "block_scale": "*u8",
    "tensor_scale": "*fp32",
    "n": "fp32",
    "a": "*u8",
    "a_scale": "*fp8e4nv",
    "a_tensor_scale": "*fp32",
    "b": "*u8",
    "b_scale": "*fp8e4nv",
    "b_tensor_scale": "*fp32",
    "y": "*bf16",
    **dict.fromkeys(("count", "columns", "size", "M", "N", "K"), "i32")
}

# Kinds of instructions, by how their names begin; the first that fits.
KINDS = {
    "float": "F(?!2|LO)|MUFU|HMMA|HGMMA",
    "convert": "F2|I2",
    "memory": "U?LD|U?ST|ATOM|RED|UBLK",
    "control": "B|EXIT|WARPSYNC|NOP|S2|CS2|DEPBAR|CALL|RET|ELECT|SYNCS",
    "integer": ""
}

# Bytes a value of what the kernels read and write.
BF16 = 2.0
CODES = 0.5
SCALE = BF16 / BLOCK           # before the tensor scale is known
STORED = CODES + 1 / BLOCK     # NVFP4: codes, and scales of a byte


class Configuration(NamedTuple):
    """A kernel as training launches it."""
    name: str
    kernel: Any
    constants: dict    # of its arguments, those known when it is compiled; None: an absent pointer
    options: dict      # for the compiler
    values: int        # values that a program takes
    size: float        # bytes that it reads and writes for each of them
    main: bool = True  # whether a recipe of MAIN launches it


def flat_configurations(native):
    """Configurations of quantize_kernel. native: the GPU has FP4 tensor cores."""
    constants = {"FP4": native, "B": kernels.BLOCKS}
    size = BF16 + CODES + SCALE
    if native:
        constants["decoded_ptr"] = None
    else:
        size += BF16
    for name in flat_quantizers():
        mode, rows = mode_of(name)
        yield Configuration(
            f"quantize {name}", kernels.quantize_kernel,
            constants | {"QUANTIZER": mode, "ROWS": rows},
            {"num_warps": kernels.MODES[mode].warps},
            BLOCK * kernels.BLOCKS, size, name in main_quantizers())


def tile_configurations(major):
    """Configurations of tile_kernel by kernels.tile_options: both results of dy; the transpose of NVFP4."""
    native = major >= 10
    constants = {"SWIZZLED": native}
    absent = "decoded" if native else "codes"
    constants |= {f"row_{absent}": None, f"col_{absent}": None}
    result = SCALE + (CODES if native else BF16)
    from_bf16 = {"x_scale_ptr": None, "x_tensor_scale_ptr": None}
    no_rows = dict.fromkeys(("row_R", "row_seed", "row_codes", "row_scale", "row_largest", "row_decoded"))
    for mode in tile_quantizers():
        options = kernels.tile_options(major, mode)
        constants |= {"FP4": options.pop("FP4"), "W": options.pop("W")}
        main = mode in main_quantizers()
        yield Configuration(
            f"both {mode}", kernels.tile_kernel,
            constants | from_bf16 | {"ROW": mode, "COL": mode},
            options, GROUP * GROUP, BF16 + 2 * result, main)
        yield Configuration(
            f"requantize {mode}", kernels.tile_kernel,
            constants | no_rows | {"ROW": "", "COL": mode},
            options, GROUP * GROUP, STORED + result, main)


def encode_configurations(native):
    """Configurations of encode_kernel, one for each amount of noise, by the first mode that takes it."""
    absent = "decoded_ptr" if native else "codes_ptr"
    names = {}
    for name, mode in kernels.MODES.items():
        names.setdefault(mode.noise, name)
    for noise, name in names.items():
        yield Configuration(
            f"encode {name}", kernels.encode_kernel,
            {"NOISE": noise, "SWIZZLED": native, "B": kernels.SCALES, absent: None},
            {}, BLOCK * kernels.SCALES, SCALE + 1 / BLOCK)


def gemm_configurations(major):
    """The configuration of gemm_kernel, per value of y; bytes of y alone."""
    options = dict(kernels.GEMM_OPTIONS[major])
    constants = {name: options.pop(name) for name in ("BM", "BN", "BK")}
    values = constants["BM"] * constants["BN"]
    yield Configuration("gemm", kernels.gemm_kernel, constants, options, values, BF16)


def configurations(major):
    """Yield what training launches, and the GEMM beside it, on GPUs of a compute capability `major`.x."""
    native = major >= 10
    yield from flat_configurations(native)
    yield from tile_configurations(major)
    yield from encode_configurations(native)
    if native:
        yield from gemm_configurations(major)


def argument_type(name, c):
    """Triton's type of an argument of a Configuration's kernel."""
    if name in c.constants:
        return "constexpr"
    name = name.removesuffix("_ptr")
    if name == "x" and "x_scale_ptr" in c.kernel.arg_names and "x_scale_ptr" not in c.constants:
        return TYPES["codes"]      # x comes with its scales
    return TYPES.get(name) or TYPES[name.split("_")[-1]]


def compile_kernel(c, capability):
    """Configuration c -> what Triton compiles of it for a compute capability, times ten. Raises what Triton
    does."""
    signature = {name: argument_type(name, c) for name in c.kernel.arg_names}
    # As at a launch: pointers and sizes are known to be multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values())
               if kind.startswith("*") or kind == "i32"}
    source = ASTSource(fn=c.kernel, signature=signature, constexprs=c.constants, attrs=aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), c.options | kernels.LAUNCH)


def disassemble(compiled, file):
    """Write file.cubin, .ptx, .sass of a compiled kernel -> text: resources used, and the instructions.

    What cuobjdump warns of goes to stderr, and is no part of that. Exits with a message if it fails.
    """
    cubin = f"{file}.cubin"
    Path(cubin).write_bytes(compiled.asm["cubin"])
    Path(f"{file}.ptx").write_text(compiled.asm["ptx"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([cuobjdump, "-res-usage", "-sass", cubin], capture_output=True, text=True)
    if shown.returncode:
        sys.exit(f"kernels.py: {cuobjdump} failed on {cubin}: {shown.stderr}")
    Path(f"{file}.sass").write_text(shown.stdout)
    return shown.stdout


class Count(NamedTuple):
    """What a compiled kernel takes. Instructions are a thread's, of all paths; loops are unrolled."""
    registers: int
    stack: int             # bytes
    spills: int            # instructions that move registers to memory or back
    instructions: dict     # of each of KINDS


def kind_of(instruction):
    """The kind, of KINDS, of an instruction. Example: "FADD" -> "float"."""
    for kind, pattern in KINDS.items():
        if re.match(pattern, instruction):
            return kind


def count(sass):
    """The text of `disassemble` -> Count. Exits with a message if the text is not as expected."""
    registers = re.search(r"REG:(\d+)", sass)
    stack = re.search(r"STACK:(\d+)", sass)
    instructions = re.findall(r"^\s+/\*\w{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", sass, re.M)
    if not (registers and stack and instructions):
        sys.exit(f"kernels.py: no registers, stack or instructions in what cuobjdump printed: {sass[:200]!r}")
    counts = dict.fromkeys(KINDS, 0)
    for instruction in instructions:
        counts[kind_of(instruction)] += 1
    spills = instructions.count("LDL") + instructions.count("STL")
    return Count(int(registers[1]), int(stack[1]), spills, counts)


def compile_for(target, dump):
    """Compile every kernel for a target, print what it costs there -> whether none fails, and none of `main`
    spills.

    Instructions are static: a thread's, of all paths (encode's include the rare ones), times threads by
    values; loops are unrolled. The bound is bytes or instructions over what the GPU can do, the larger.
    dump: a directory for cubins, PTX and SASS.
    """
    gpu = TARGETS[target]
    print(f"{target}: per value, and ns per million values")
    kinds = "".join(f"{kind:>9}" for kind in KINDS)
    print(f"{'kernel':28}{'registers':>10}{'shared':>8}{'spills':>7}{kinds} {'bytes':>6}{'bound':>7}  by")
    good = True
    bounds = {}
    for c in configurations(gpu.capability // 10):
        try:
            compiled = compile_kernel(c, gpu.capability)
        except Exception as e:                      # Triton has no common class for what a compiler may raise
            print(f"{c.name:28} does not compile: {type(e).__name__} {e}")
            good = False
            continue
        found = count(disassemble(compiled, Path(dump, f"{target}-{c.name}".replace(" ", "-"))))
        if c.main and (found.spills or found.stack):
            good = False
        if c.kernel is kernels.gemm_kernel and "kind::mxf4nvf4" not in compiled.asm["ptx"]:
            print(f"{c.name:28} has no FP4 instruction")
            good = False

        threads = c.options.get("num_warps", 4) * 32
        shares = [n * threads / c.values for n in found.instructions.values()]
        by_bytes = c.size / gpu.bandwidth * 1e15
        by_instructions = sum(shares) / gpu.instructions * 1e15
        bounds[c.name] = max(by_bytes, by_instructions)
        reason = "bytes"
        if by_instructions >= by_bytes:
            reason = f"instructions, {by_instructions / by_bytes:.1f} times bytes"
        columns = "".join(f"{share:9.1f}" for share in shares)
        print(f"{c.name:28}{found.registers:10}{compiled.metadata.shared:8}{found.spills:7}{columns}"
              f"{c.size:7.2f}{bounds[c.name]:7.0f}  {reason}")
    if good and gpu.fp4:
        predict(bounds, gpu)
    return good


# A layer's width h, its MLP's f, its speed-up over bf16, measured in arXiv:2601.22813 on an RTX 5090: forward
# and backward of linears of (in, out) = (h, 3h) (h, h) (h, 2f) (f, h)
PAPER = {
    "800M": (2048, 5632, 3.12),
    "3B": (3072, 8192, 3.64),
    "7B": (4096, 11008, 3.89),
    "22B": (6144, 16384, 4.19)
}


def predict(bounds, gpu):
    """Print how fast PAPER's layers could be, by bounds in ns per million values and GEMMs in FLOP/s."""
    print(f"PREDICTED, from these bounds (encode: bytes) and published peaks of {gpu.bf16 / 1e12:g} and "
          f"{gpu.fp4 / 1e12:g} TFLOP/s; nothing was run:\nforward + backward over bf16, {TOKENS} tokens; in "
          "brackets what the paper measured on an RTX 5090")
    # Most instructions of encode_kernel are of its rare path, so only its bytes count. It follows each of the
    # other kernels, once for each result.
    encode = (SCALE + 1 / BLOCK) / gpu.bandwidth

    def cost(form, name):
        """Seconds a value."""
        return 1e-15 * bounds[f"{form} {name}"] + encode

    for model, (h, f, paper) in PAPER.items():
        # values of all four linears
        x = TOKENS * (3 * h + f)
        w = 4 * h * h + 3 * h * f
        dy = TOKENS * (5 * h + 2 * f)
        flop = 6 * TOKENS * w
        speeds = {}
        for recipe in "quartet2", "quintet":
            row = quartet.RECIPES[recipe]
            time = flop / gpu.fp4
            time += x * (cost("quantize", row.x) + cost("requantize", row.dw.other))
            time += w * (cost("quantize", row.w) + cost("requantize", row.dx.other))
            time += dy * (cost("both", row.dx.dy) + encode)
            speeds[recipe] = flop / gpu.bf16 / time
        print(f"{model:>5}: quartet2 {speeds['quartet2']:.2f} ({paper}), quintet {speeds['quintet']:.2f}")


# ---- 3. Check and time on the GPU that is here -------------------------------------------------------------

class Case(NamedTuple):
    """An op of kernels.py on some inputs, and what quartet.py makes of them."""
    name: str
    inputs: list
    ours: Callable      # (decoded) -> all parts of its Operands. decoded: with decoded values
    theirs: Callable    # () -> NVFP4 of each


def flat_case(name, x, seed):
    """x (M, K) by a name of `quantizers`: codes, and decoded values too if wanted."""
    mode, rows = mode_of(name)
    f = quartet.QUANTIZERS[name]
    return Case(
        name,
        [x],
        lambda decoded: kernels.quantize(x, mode, rows, seed, True, decoded),
        lambda: [f(x, None, seed)])


def both_case(mode, x, R, seed, seed_t):
    """x R and x^T R by a mode: codes or, if wanted, decoded values, as a GEMM in bf16 takes them."""
    f = quartet.QUANTIZERS[mode]
    P = kernels.permuted(R)
    return Case(
        f"{mode}, both ways",
        [x],
        lambda decoded: kernels.rotate_quantize(
            [x], mode, P, seed, mode, P, seed_t, not decoded, decoded),
        lambda: [f(x, R, seed), f(quartet.whole_groups(x).T, R, seed_t)])


def requantized_case(mode, t, R, seed):
    """The transpose of t NVFP4 (M, K), times R, by a mode, as in both_case."""
    f = quartet.QUANTIZERS[mode]
    P = kernels.permuted(R)
    packed = [t.codes, t.block_scale.view(torch.uint8), t.tensor_scale]
    return Case(
        f"{mode}, requantized",
        packed,
        lambda decoded: kernels.rotate_quantize(
            packed, "", None, None, mode, P, seed, not decoded, decoded),
        lambda: [f(quartet.whole_groups(quartet.decode(t, torch.bfloat16)).T, R, seed)])


def cases(x, flat, tile):
    """Yield Cases of x (M, K) bf16 by quantizers flat, names of `quantizers`, and by modes tile, on tiles."""
    R, _ = quartet.rotation("rht128x2", torch.Generator(x.device))
    seed, seed_t = torch.tensor([5, 2**40 + 1], device=x.device)
    for name in flat:
        _, rows = mode_of(name)
        if len(x) % rows == 0:
            yield flat_case(name, x, seed)
    stored = quartet.rtn(x)
    for mode in tile:
        yield both_case(mode, x, R, seed, seed_t)
        yield requantized_case(mode, stored, R, seed_t)


def differing_parts(case, decoded):
    """Names of the parts of a Case's result that are not quartet.py's, to the bit."""
    expected = []
    for t in case.theirs():
        expected += [t.codes, t.block_scale.view(torch.uint8), t.tensor_scale]
        expected.append(quartet.decode(t, torch.bfloat16))
    found = case.ours(decoded)
    names = (*NVFP4._fields, "decoded") * 2
    # A part that was not wanted is empty.
    return [part for part, a, b in zip(names, found, expected) if a.numel() and not torch.equal(a, b)]


def check(device, shapes):
    """Compare the ops with quartet.py, bit for bit, on x (M, K) of shapes; print -> whether all agree.

    x is integers, every other 128 rows times 2^-16: sums of x R are exact, some scales sub-normal.
    """
    good = True
    for M, K in shapes:
        x = torch.randint(-9, 10, (M, K), device=device).bfloat16()
        group = torch.arange(M, device=device)[:, None] // GROUP
        x *= 2.0 ** (-16 * (group % 2))
        for case in cases(x, quantizers(), tile_quantizers()):
            for decoded in False, True:
                wrong = differing_parts(case, decoded)
                if wrong:
                    print(f"{M} x {K}, {case.name}: {', '.join(wrong)} not as quartet.py's")
                    good = False
    print("every op gives quartet.py's bits:", good)
    return good


def seconds(f):
    """Median time of f(), all its launches, as one CUDA graph."""
    return triton.testing.do_bench_cudagraph(f, return_mode="median") * 1e-3


def copy_bandwidth(device):
    """Bytes/s that a copy of 1 GiB reads and writes."""
    source, copy = torch.randn(2, 2**28, device=device)
    # Either may be faster.
    time = min(seconds(lambda: copy.copy_(source)), seconds(lambda: torch.neg(source, out=copy)))
    return 2 * copy.nbytes / time


def time_quantizers(x, native):
    """Print the time of ops on x (M, K) beside that of quartet.py's functions under torch.compile."""
    peak = copy_bandwidth(x.device)
    title = f"{len(x)} x {x.shape[1]}; a copy: {peak / 1e12:.2f} TB/s"
    print(f"\n{title:34}{'B/value':>8}{'us':>8}{'TB/s':>6}{'of copy':>8}{'compiled':>10}{'ratio':>6}")
    # Of blocks of 1x16: the names that are modes.
    flat = [name for name in flat_quantizers() if name in kernels.MODES]
    for case in cases(x, flat, tile_quantizers()):
        for decoded in (False,) if native else (False, True):
            time_case(case, decoded, x.numel(), peak)


def time_case(case, decoded, values, peak):
    """Print a row of time_quantizers."""
    theirs = case.theirs

    def rival():
        found = theirs()
        if decoded:
            found = [quartet.decode(t, torch.bfloat16) for t in found]
        return found

    torch.compiler.reset()                          # else it gives up after some compilations of a function
    out = case.ours(decoded)
    # Scales go through memory as bf16, there and back, too.
    scales = sum(scale.numel() for scale in out[1::4])
    size = sum(t.nbytes for t in case.inputs + out) + 4 * scales
    time = seconds(lambda: case.ours(decoded))
    other = seconds(torch.compile(rival))
    name = case.name + ", decoded" * decoded
    print(f"{name:34}{size / values:8.2f}{time * 1e6:8.1f}{size / time / 1e12:6.2f}{size / time / peak:8.0%}"
          f"{other * 1e6:10.1f}{other / time:6.1f}")


def time_linear(recipe, K, N, device):
    """Milliseconds that a linear layer of K features in, N out takes by a recipe, forward and backward."""
    layer = quartet.Linear(K, N, recipe=recipe, backend="triton", device=device, dtype=torch.bfloat16)
    x = torch.randn(TOKENS, K, device=device).bfloat16().requires_grad_()
    dy = torch.randn(TOKENS, N, device=device).bfloat16()
    return 1e3 * seconds(lambda: torch.autograd.grad(layer(x), (x, layer.weight), dy))


def benchmark(device, native):
    """Print the time of quantizers, and of linear layers forward and backward by every recipe."""
    torch.set_float32_matmul_precision("high")      # TF32 for the rival's x R: exact if x is bf16
    for shape in (TOKENS, 4096), (2 * TOKENS, 3072):
        time_quantizers(torch.randn(shape, device=device).bfloat16(), native)

    print(f"\nlinear layer, {TOKENS} x 4096 x 4096, forward + backward: ms, speed over bf16, time over bf16")
    for recipe, row in quartet.RECIPES.items():
        if kernels.supports(row):
            bf16 = time_linear("bf16", 4096, 4096, device)
            time = time_linear(recipe, 4096, 4096, device)
            print(f"{recipe:12}{time:8.3f}{bf16 / time:7.2f}{time / bf16 - 1:+8.0%}")

    if native:
        for model, (h, f, paper) in PAPER.items():
            layers = (h, 3 * h), (h, h), (h, 2 * f), (f, h)
            bf16 = sum(time_linear("bf16", *layer, device) for layer in layers)
            time = sum(time_linear("quartet2", *layer, device) for layer in layers)
            speed = bf16 / time
            print(f"{model:>5}: quartet2 {speed:.2f} times as fast as bf16 (paper, RTX 5090: {paper})")


def main(argv=None):
    """The command line of kernels.py -> exit status: 1 if a kernel is wrong, spills or does not compile."""
    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, help="compile for this GPU, here or not, and count")
    parser.add_argument("--dump", metavar="DIR", help="with --target: keep cubins, PTX, SASS there")
    arguments = parser.parse_args(argv)
    if arguments.target:
        with tempfile.TemporaryDirectory() as directory:
            dump = Path(arguments.dump or directory)
            dump.mkdir(parents=True, exist_ok=True)
            return int(not compile_for(arguments.target, dump))
    if not torch.cuda.is_available():
        sys.exit("to check and time the kernels, python kernels.py needs a GPU; --target works anywhere")
    good = check("cuda", [(1, 128), (140, 256), (16, 4096), (4112, 1536)])
    print(torch.cuda.get_device_name())
    benchmark("cuda", torch.cuda.get_device_capability() >= (10, 0))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
