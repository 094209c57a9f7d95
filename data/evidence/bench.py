"""What `python kernels.py` does: check the kernels against quartet.py and time them on the GPU that is here.

    python kernels.py [--json=FILE]                     check, bit for bit, and time; FILE keeps all of it
    python kernels.py --target=sm_100a [--dump=DIR]     compile for a GPU that need not be here, and count

Which quantizers it takes follows from the tables: kernels.MODES, quartet.QUANTIZERS, quartet.RECIPES. A new
row there is checked, timed and compiled, and nothing is to be added here.
"""
import argparse
import functools
import gc
import hashlib
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import triton
import triton.language as tl
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


# The recipes whose kernels must not spill. Others may, a little: sr does on Hopper.
MAIN = ("quartet2", "quintet")


def backward_gemms():
    """All Gemms in quartet.RECIPES."""
    return [gemm for row in quartet.RECIPES.values() if row for gemm in (row.dx, row.dw)]


def unrotated_quantizers():
    """What recipes give a dy that is not rotated."""
    return {gemm.dy for gemm in backward_gemms() if gemm.rotation is None}


def backward_quantizers():
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
    """Those of `quantizers` that training can launch flat: all without noise, and `unrotated_quantizers`."""
    unrotated = unrotated_quantizers()
    return [name for name in quantizers() if not kernels.MODES[mode_of(name)[0]].noise or name in unrotated]


def tile_quantizers():
    """The modes that training can launch on tiles: all with noise, and `backward_quantizers`."""
    return [name for name, mode in kernels.MODES.items() if mode.noise or name in backward_quantizers()]


# ---- 2. Compile for a GPU that is not here, and count ------------------------------------------------------

class Target(NamedTuple):
    """A GPU, by its published numbers."""
    capability: int
    instructions: float    # lane-instructions/s: multiprocessors x 128 x clock
    bandwidth: float       # bytes/s
    shared: int            # bytes of shared memory a multiprocessor; a program takes 1 KiB more than it asks
    warps: int             # a multiprocessor
    bf16: float = 0.0      # dense FLOP/s in bf16
    fp4: float = 0.0       # and in FP4


TARGETS = {
    "sm_90a": Target(90, 30e12, 3.35e12, 228 << 10, 64),                           # H100
    "sm_100a": Target(100, 35e12, 8e12, 228 << 10, 64, 2.25e15, 9e15),             # B200
    "sm_103a": Target(103, 35e12, 8e12, 228 << 10, 64, 2.25e15, 13.1e15),          # B300
    "sm_120a": Target(120, 52e12, 1.79e12, 100 << 10, 48, 0.2095e15, 1.676e15),    # RTX 5090
}
REGISTERS = 2**16          # of a multiprocessor

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
    "values": "*bf16",
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
    "unit": "*fp64",
    "total": "*fp32",
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


def split(options):
    """Options of kernels.py -> the constants of the kernel, in capitals, and those of the compiler."""
    constants = {name: value for name, value in options.items() if name.isupper()}
    return constants, {name: value for name, value in options.items() if name not in constants}


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
        both, both_options = split(kernels.tile_options(major, mode))
        transpose, transpose_options = split(kernels.tile_options(major, ""))
        main = mode in main_quantizers()
        yield Configuration(
            f"both {mode}", kernels.tile_kernel,
            constants | both | from_bf16 | {"ROW": mode, "COL": mode},
            both_options, GROUP * both["COLUMNS"], BF16 + 2 * result, main)
        yield Configuration(
            f"requantize {mode}", kernels.tile_kernel,
            constants | transpose | no_rows | {"ROW": "", "COL": mode},
            transpose_options, GROUP * transpose["COLUMNS"], STORED + result, main)


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


def gemm_configuration(name, kernel, options, size):
    """The Configuration of a GEMM, per output of size bytes; what it reads is not counted."""
    constants, options = split(options)
    return Configuration(name, kernel, constants, options, constants["BM"] * constants["BN"], size, False)


def configurations(major):
    """Yield what training launches on GPUs of a compute capability `major`.x; with FP4 tensor cores also the
    GEMM in Triton; and the one of --gemm=blackwell.
    """
    native = major >= 10
    yield from flat_configurations(native)
    yield from tile_configurations(major)
    yield from encode_configurations(native)
    if native:
        options = kernels.GEMM_OPTIONS.get(major, kernels.GEMM_OPTIONS[10])
        yield gemm_configuration("gemm", kernels.gemm_kernel, options, BF16)
    yield gemm_configuration(
        "emulated gemm", kernels.emulated_gemm_kernel, kernels.EMULATED_GEMM_OPTIONS, 4.0)


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

    What cuobjdump warns of goes to stderr, and is no part of that. RuntimeError if it fails.
    """
    cubin = f"{file}.cubin"
    Path(cubin).write_bytes(compiled.asm["cubin"])
    Path(f"{file}.ptx").write_text(compiled.asm["ptx"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([cuobjdump, "-res-usage", "-sass", cubin], capture_output=True, text=True)
    if shown.returncode:
        raise RuntimeError(f"{cuobjdump} failed on {cubin}: {shown.stderr}")
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
    """The text of `disassemble` -> Count. RuntimeError if the text is not as expected."""
    registers = re.search(r"REG:(\d+)", sass)
    stack = re.search(r"STACK:(\d+)", sass)
    instructions = re.findall(r"^\s+/\*\w{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", sass, re.M)
    if not (registers and stack and instructions):
        raise RuntimeError(f"no registers, stack or instructions in what cuobjdump printed: {sass[:200]!r}")
    counts = dict.fromkeys(KINDS, 0)
    for instruction in instructions:
        counts[kind_of(instruction)] += 1
    spills = instructions.count("LDL") + instructions.count("STL")
    return Count(int(registers[1]), int(stack[1]), spills, counts)


class Cost(NamedTuple):
    """What a Configuration takes on a GPU. Instructions and times are for a value, times in 1e-15 seconds."""
    found: Count
    shared: int               # bytes of shared memory, a program
    programs: int             # that a multiprocessor runs at once
    warps: int                # of these
    shares: list              # instructions of each of KINDS, of all lanes
    by_bytes: float           # time that memory needs
    by_instructions: float    # time that the multiprocessors need to issue them
    ptx: str


def cost_of(c, gpu, file):
    """Compile Configuration c for a Target, leave FILE.cubin, FILE.ptx, FILE.sass -> Cost. Raises what Triton
    does.
    """
    compiled = compile_kernel(c, gpu.capability)
    found = count(disassemble(compiled, file))
    warps = c.options.get("num_warps", 4)
    shared = compiled.metadata.shared
    # A warp gets registers 256 at a time.
    registers = triton.cdiv(32 * found.registers, 256) * 256 * warps
    programs = min(REGISTERS // registers, gpu.shared // (shared + 1024), gpu.warps // warps)
    shares = [n * 32 * warps / c.values for n in found.instructions.values()]
    return Cost(found, shared, programs, programs * warps, shares,
                c.size / gpu.bandwidth * 1e15, sum(shares) / gpu.instructions * 1e15, compiled.asm["ptx"])


def compile_for(target, dump):
    """Compile every kernel for a target, print what it costs there -> whether none fails, and none of `main`
    spills.

    Instructions are static: a thread's, of all paths (encode's include the rare ones), times threads by
    values; loops are unrolled. The bound is bytes or instructions over what the GPU can do, the larger; the
    sum of both is what it would take if nothing overlapped. dump: a directory for cubins, PTX and SASS.
    """
    gpu = TARGETS[target]
    print(f"{target}: per value, and ns per million values. Programs and warps: on a multiprocessor at once")
    kinds = "".join(f"{kind:>9}" for kind in KINDS)
    print(f"{'kernel':28}{'registers':>10}{'shared':>8}{'spills':>7}{'programs':>9}{'warps':>6}{kinds}"
          f"{'all':>7}{'bytes':>7}{'bound':>7}{'sum':>6}  by")
    good = True
    bounds = {}
    sums = {}
    for c in configurations(gpu.capability // 10):
        try:
            cost = cost_of(c, gpu, Path(dump, f"{target}-{c.name}".replace(" ", "-")))
        except Exception as e:                      # Triton has no common class for what a compiler may raise
            print(f"{c.name:28} does not compile: {type(e).__name__} {e}")
            good = False
            continue
        found = cost.found
        if c.main and (found.spills or found.stack):
            good = False
        if not cost.programs:
            print(f"{c.name:28} does not fit on a multiprocessor")
            good = False
        if c.kernel is kernels.gemm_kernel and "kind::mxf4nvf4" not in cost.ptx:
            print(f"{c.name:28} has no FP4 instruction")
            good = False

        bounds[c.name] = max(cost.by_bytes, cost.by_instructions)
        sums[c.name] = cost.by_bytes + cost.by_instructions
        reason = "bytes"
        if cost.by_instructions >= cost.by_bytes:
            reason = f"instructions, {cost.by_instructions / cost.by_bytes:.1f} times bytes"
        columns = "".join(f"{share:9.1f}" for share in cost.shares)
        print(f"{c.name:28}{found.registers:10}{cost.shared:8}{found.spills:7}{cost.programs:9}{cost.warps:6}"
              f"{columns}{sum(cost.shares):7.1f}{c.size:7.2f}{bounds[c.name]:7.0f}"
              f"{sums[c.name]:6.0f}  {reason}")
    if good and gpu.fp4:
        predict(sums, bounds, gpu)
    return good


# A model's width h, its MLP's f, its speed-up over bf16, measured in arXiv:2601.22813 on an RTX 5090: forward
# and backward of linears of (in, out) = (h, 3h) (h, h) (h, 2f) (f, h)
PAPER = {
    "800M": (2048, 5632, 3.12),
    "3B": (3072, 8192, 3.64),
    "7B": (4096, 11008, 3.89),
    "22B": (6144, 16384, 4.19)
}


def predict(sums, bounds, gpu):
    """Print how fast PAPER's layers could be, by sums and by bounds, ns per million values, and by peaks."""
    print(f"PREDICTED, from these sums to these bounds (encode: bytes), and published peaks of "
          f"{gpu.bf16 / 1e12:g} and {gpu.fp4 / 1e12:g}\nTFLOP/s, which no GEMM reaches; nothing was run: "
          f"forward + backward over bf16, {TOKENS} tokens; in brackets\nwhat the paper measured, on an RTX "
          "5090")
    # Most instructions of encode_kernel are of its rare path, so only its bytes count. It follows each of the
    # other kernels, once for each result.
    encode = (SCALE + 1 / BLOCK) / gpu.bandwidth
    found = []
    for times in sums, bounds:
        costs = {op: 1e-15 * t + encode * (2 if op.startswith("both") else 1) for op, t in times.items()}
        found.append(speed_ups(costs, gpu.bf16, gpu.fp4))
    for (model, low), (_, high) in zip(*found):
        *_, paper = PAPER[model]
        ranges = [f"{recipe} {low[recipe]:.2f} to {high[recipe]:.2f}" for recipe in MAIN]
        print(f"{model:>5}: {', '.join(ranges)} ({paper})")


def speed_ups(costs, bf16, fp4):
    """Yield models of PAPER, each with {recipe of MAIN: how fast its layers are over bf16's}.

    costs: {op: seconds for a value of what it reads}; GEMMs in bf16 and of 4-bit operands: FLOP/s.
    """
    for model, (h, f, _) in PAPER.items():
        # values of all four linears
        x = TOKENS * (3 * h + f)
        w = 4 * h * h + 3 * h * f
        dy = TOKENS * (5 * h + 2 * f)
        flop = 6 * TOKENS * w
        speeds = {}
        for recipe in MAIN:
            row = quartet.RECIPES[recipe]
            taken = flop / fp4
            taken += x * (costs[f"quantize {row.x}"] + costs[f"requantize {row.dw.other}"])
            taken += w * (costs[f"quantize {row.w}"] + costs[f"requantize {row.dx.other}"])
            taken += dy * costs[f"both {row.dx.dy}"]
            speeds[recipe] = flop / bf16 / taken
        yield model, speeds


# ---- 3. The first run on a GPU -----------------------------------------------------------------------------
#
# What an owner of a GPU sees: the machine, whether every op gives quartet.py's bits, how the GEMMs add, how
# long all takes. A fault must not hide another, so what raises is told, and the rest goes on. Only after a
# fault of the device, such as a wrong address, nothing runs any more in this process.

class DeviceFailed(Exception):
    """The GPU takes no more work from this process."""


class Report:
    """Keeps what the first run finds in a file, if there is one: a line of JSON each. Tells what is wrong."""

    def __init__(self, path=None):
        self.path = path
        self.good = True
        self.costs = {}     # {op: seconds for a value of what it reads}, as training launches it
        self.flops = {}     # {GEMM: FLOP/s}
        if path:
            open(path, "x").close()     # an earlier report is not lost

    def keep(self, kind, **record):
        """Keep a record at once: what comes later may fail."""
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps(dict(kind=kind, **record)) + "\n")

    def fault(self, text):
        """Print and keep what is wrong: the run will end with status 1."""
        self.good = False
        print(f"WRONG: {text}", flush=True)
        self.keep("fault", text=text)

    def note(self, text):
        """Print and keep what could not be done here, though nothing is wrong."""
        print(f"left out: {text}", flush=True)
        self.keep("note", text=text)

    def attempt(self, name, f):
        """f(), or None if it raises, which is a fault, unless memory is short. DeviceFailed: the GPU has."""
        try:
            found = f()
            wait_for_gpu()                          # a kernel that fails does so later than its launch
            return found
        except DeviceFailed:
            raise
        except torch.OutOfMemoryError:
            self.note(f"{name}: takes more memory than is free")
        except Exception as e:                      # whatever a compiler, a driver or PyTorch raises
            self.fault(f"{name}: {type(e).__name__}: {e}")
            try:
                wait_for_gpu()
            except Exception:
                raise DeviceFailed from e


def wait_for_gpu():
    """Wait until the GPU has done all that it was given; raises what it found wrong."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def smi(device):
    """What nvidia-smi says of a CUDA device, {field: text}; nothing if it is not there."""
    fields = ["driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit"]
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(fields, values)) if len(values) == len(fields) else {}


def machine(device):
    """What there is to know of a CUDA device and of the software, {what: value}."""
    p = torch.cuda.get_device_properties(device)
    return dict(
        gpu=p.name,
        capability=f"{p.major}.{p.minor}",
        multiprocessors=p.multi_processor_count,
        memory_gib=round(p.total_memory / 2**30, 1),
        l2_mib=p.L2_cache_size / 2**20,
        shared_kib=p.shared_memory_per_block_optin / 2**10,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        cuda=torch.version.cuda,
        code=code_hash(),
        **smi(device),
    )


def code_hash():
    """The first 8 digits of the sha256 of quartet.py and kernels.py."""
    sha = hashlib.sha256()
    for module in quartet, kernels:
        sha.update(Path(module.__file__).read_bytes())
    return sha.hexdigest()[:8]


# ---- 4. The check: every op, in the forms that training launches, against quartet.py -----------------------

class Case(NamedTuple):
    """An op of kernels.py on some inputs, and what quartet.py makes of them."""
    name: str              # of its Configuration
    inputs: list
    results: list          # (rows, columns) of each
    op: Callable           # (parts) -> all parts of its Operands. parts: as kernels.FP4_PARTS
    reference: Callable    # () -> NVFP4 of each


def flat_case(name, x, seed):
    """x (M, K) by a name of `quantizers`: codes, and the other parts too if wanted."""
    mode, rows = mode_of(name)
    f = quartet.QUANTIZERS[name]
    return Case(
        f"quantize {name}",
        [x],
        [x.shape],
        lambda parts: kernels.quantize(x, mode, rows, seed, True, *parts[1:]),
        lambda: [f(x, None, seed)])


def both_case(mode, x, R, seed, seed_t):
    """x R and x^T R by a mode; of an x (M, N) without whole groups of 128 along N only x^T R."""
    f = quartet.QUANTIZERS[mode]
    P = kernels.permuted(R)
    M, N = x.shape
    row = mode if N % GROUP == 0 else ""
    results = [(M, N)] * bool(row) + [(N, triton.cdiv(M, GROUP) * GROUP)]

    def reference():
        transposed = f(quartet.whole_groups(x).T, R, seed_t)
        return [f(x, R, seed), transposed] if row else [transposed]

    return Case(
        f"both {mode}",
        [x],
        results,
        lambda parts: kernels.rotate_quantize([x], row, P, seed, mode, P, seed_t, *parts),
        reference)


def requantized_case(mode, t, R, seed):
    """The transpose of t NVFP4 (M, K), times R, by a mode."""
    f = quartet.QUANTIZERS[mode]
    P = kernels.permuted(R)
    M, K = len(t.codes), 2 * t.codes.shape[1]
    scale = t.block_scale.view(torch.uint8)
    swizzled = kernels.swizzle(scale)

    def op(parts):
        # Where results are swizzled, so is what they are made of.
        packed = [t.codes, swizzled if parts == kernels.FP4_PARTS else scale, t.tensor_scale]
        return kernels.rotate_quantize(packed, "", None, None, mode, P, seed, *parts)

    return Case(
        f"requantize {mode}",
        [t.codes, scale],
        [(K, triton.cdiv(M, GROUP) * GROUP)],
        op,
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


PARTS = (kernels.NVFP4_PARTS, kernels.BF16_PARTS, kernels.FP4_PARTS)


def differing_parts(case, parts):
    """Names of the parts of a Case's result that are not quartet.py's, to the bit."""
    expected = []
    for t in case.reference():
        scale = t.block_scale.view(torch.uint8)
        expected += [t.codes, kernels.swizzle(scale) if parts[2] else scale, t.tensor_scale]
        expected.append(quartet.decode(t, torch.bfloat16))
    found = case.op(parts)
    names = (*NVFP4._fields, "decoded") * len(case.results)
    # A part that was not wanted is empty: codes or decoded values.
    unwanted = {name for name, wanted in (("codes", parts[0]), ("decoded", parts[1])) if not wanted}
    return [name for name, a, b in zip(names, found, expected, strict=True)
            if not torch.equal(a, b) and not (name in unwanted and not a.numel())]


def check(report, device, shapes):
    """Compare the ops with quartet.py, bit for bit, on x (M, K) of shapes, and print a line for each op.

    x is integers, every other 128 rows times 2^-16: sums of x R are exact, some scales sub-normal.
    """
    todo = {}    # {op: [(shape, its Case), ...]}
    for M, K in shapes:
        x = torch.randint(-9, 10, (M, K), device=device).bfloat16()
        group = torch.arange(M, device=device)[:, None] // GROUP
        x *= 2.0 ** (-16 * (group % 2))
        for case in cases(x, quantizers(), tile_quantizers()):
            todo.setdefault(case.name, []).append((f"{M} x {K}", case))

    for name, found in todo.items():
        begin = time.perf_counter()
        faults = 0
        for shape, case in found:
            for parts in PARTS:
                wrong = report.attempt(f"{shape}, {name}", lambda: differing_parts(case, parts))
                if wrong:
                    report.fault(f"{shape}, {name}: {', '.join(wrong)} not as quartet.py's")
                if wrong is None or wrong:
                    faults += 1
        seconds = time.perf_counter() - begin
        if not faults:
            print(f"{name:28}{seconds:6.1f} s  as quartet.py's, shapes: {len(found)}", flush=True)
        report.keep("check", op=name, faults=faults, shapes=[shape for shape, _ in found], seconds=seconds)


SIGNIFICANDS = 2**23
AT_ONCE = 2**13    # of these, in a program


@triton.jit
def reciprocals_kernel(out_ptr, B: tl.constexpr):
    """kernels.reciprocal of all float32 from 1 to 2, in order."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + i, kernels.reciprocal(kernels.from_bits(i + 0x3F800000)))


def check_reciprocals(report, device):
    """Of every significand: the instruction that kernels.reciprocal corrects may be another on each GPU."""
    begin = time.perf_counter()
    found = torch.empty(SIGNIFICANDS, device=device)
    with torch.cuda.device_of(found):
        reciprocals_kernel[(SIGNIFICANDS // AT_ONCE,)](found, AT_ONCE, **kernels.LAUNCH)
    s = (torch.arange(SIGNIFICANDS, dtype=torch.int32, device=device) + 0x3F800000).view(torch.float32)
    # 53 bits, rounded again to 24, are as if rounded once.
    wrong = (found != (1 / s.double()).float()).sum().item()
    seconds = time.perf_counter() - begin
    report.keep("reciprocals", wrong=wrong, of=SIGNIFICANDS, seconds=seconds)
    if wrong:
        report.fault(f"reciprocal: of {SIGNIFICANDS:,} significands {wrong:,} are not correctly rounded")
    else:
        print(f"{'reciprocal':28}{seconds:6.1f} s  right for all {SIGNIFICANDS:,} significands", flush=True)


# ---- 5. How the GEMMs add ----------------------------------------------------------------------------------

def operands(device):
    """Pairs of NVFP4 to multiply, {what: function of (rows of a, rows of b, K) -> a, b}."""
    R, _ = quartet.rotation("rht128x2", torch.Generator(device))

    def normal(rows, K):
        return torch.randn(rows, K, device=device).bfloat16()

    def by_four_six(M, N, K):
        return quartet.four_six(normal(M, K)), quartet.four_six(normal(N, K))

    def by_ms_eden(M, N, K):
        return quartet.ms_eden(normal(M, K), R, 1), quartet.ms_eden(normal(N, K), R, 2)

    def of_many_sizes(rows, K):
        powers = torch.randint(15, (K // BLOCK,), device=device).repeat_interleave(BLOCK)
        return quartet.four_six(normal(rows, K) * 2.0**powers)

    def cancelling(M, N, K):
        # Blocks of columns of different size, and then the same with the other sign: what is left of a sum
        # are the roundings on the way, which tell in which order, and how, it was added.
        return twice(of_many_sizes(M, K // 2)), twice(of_many_sizes(N, K // 2), sign=8)

    return {"4/6": by_four_six, "MS-EDEN": by_ms_eden, "cancelling": cancelling}


def twice(t, sign=0):
    """NVFP4 (M, K) -> (M, 2 K): once more beside itself, with sign=8 with the other sign."""
    codes = torch.cat([t.codes, t.codes ^ (sign | sign << 4)], 1)
    scale = torch.cat([t.block_scale.view(torch.uint8)] * 2, 1).view(torch.float8_e4m3fn)
    return t._replace(codes=codes, block_scale=scale)


def in_groups(size, add):
    """-> a function of NVFP4 a, b: a b^T in bf16 from exact sums of `size` products, which `add` adds up."""
    def multiply(a, b):
        total = torch.zeros(len(a.codes), len(b.codes), device=a.codes.device)
        groups = zip(quartet.decode(a).double().split(size, 1), quartet.decode(b).double().split(size, 1))
        for a_part, b_part in groups:
            total = add(total, (a_part @ b_part.T).float())
        return total.bfloat16()

    return multiply


# How a GEMM might add. The first is the published probe's rule, groups of 64 toward zero; others vary it.
RULES = {
    "fp4_matmul": quartet.fp4_matmul,
    "float32": quartet.matmul,
    "nearest": in_groups(64, torch.add),
    "by 32": in_groups(32, quartet.add_toward_zero),
    "by 128": in_groups(128, quartet.add_toward_zero),
}


def gemms(native):
    """The GEMMs that are here, {name: function of a, b NVFP4 -> a b^T}. native: FP4 tensor cores are."""
    def packed(t):
        return [t.codes, t.block_scale.view(torch.uint8), t.tensor_scale]

    def emulated(a, b):
        values = [quartet.decode(t, torch.bfloat16) for t in (a, b)]
        return kernels.fp4_gemm(values[0], a.tensor_scale, values[1], b.tensor_scale)

    found = {"in float32": quartet.matmul, "emulated": emulated}
    if native:
        found["scaled_mm"] = lambda a, b: kernels.scaled_mm(packed(a), packed(b))
        found["in Triton"] = lambda a, b: kernels.gemm(packed(a), packed(b))
    return found


def check_gemms(report, device, native, shapes):
    """Print how many outputs of each GEMM are those of quartet.fp4_matmul, and of other RULES.

    Another order of summation than the published one is no fault. Outputs that no order explains are one. The
    GEMM in float32 is quartet.matmul itself: its column is 100%, and the others tell how much it matters how
    a GEMM adds. The emulated one is fp4_matmul in Triton: that column must be 100%.
    """
    print("of a GEMM's outputs in bf16, so many have all the bits that they would have by a rule:\n"
          "fp4_matmul, what was published of a GB200: exact sums of 64 products, added toward zero; nearest: "
          "these added\nto nearest; by 32, by 128: sums of so many; float32: as GPUs add that have no FP4 "
          "tensor cores\n"
          f"{'M x N x K, operands, GEMM':44}{''.join(f'{rule:>12}' for rule in RULES)}")
    totals = {}
    for what, make in operands(device).items():
        for shape in shapes:
            title = f"{' x '.join(map(str, shape))}, {what}"
            report.attempt(title, lambda: check_sums(report, title, *make(*shape), native, totals))
    for name, (outputs, equal) in totals.items():
        rule = max(RULES, key=equal.get)
        print(f"the GEMM {name}: most like {rule}, in {equal[rule]:,} of {outputs:,} outputs", flush=True)


def check_sums(report, title, a, b, native, totals):
    """Print and keep the rows of check_gemms for one a NVFP4 (M, K) and one b NVFP4 (N, K).

    totals, {GEMM: (outputs, {rule: those that are equal})}, grows.
    """
    by_rule = {rule: multiply(a, b) for rule, multiply in RULES.items()}
    expected = by_rule["fp4_matmul"]
    # Sums of K terms err by K 2^-23 of their magnitudes, rounded toward zero or to nearest, and two roundings
    # to bf16 by 2^-8 of the result each.
    magnitude = quartet.decode(a).double().abs() @ quartet.decode(b).double().abs().T
    allowed = 2 * a.codes.shape[1] * 2.0**-23 * magnitude + 2.0**-7 * expected.abs()
    for name, f in gemms(native).items():
        named = f"{title}, {name}"
        y = report.attempt(named, lambda: f(a, b))
        if y is None:
            continue
        equal = {rule: (y == other).sum().item() for rule, other in by_rule.items()}
        print(f"{named:44}{''.join(f'{count / y.numel():12.4%}' for count in equal.values())}", flush=True)
        report.keep("gemm", gemm=name, of=title, outputs=y.numel(), equal=equal)
        outputs, before = totals.get(name, (0, dict.fromkeys(RULES, 0)))
        totals[name] = outputs + y.numel(), {rule: before[rule] + equal[rule] for rule in RULES}
        if name == "emulated" and equal["fp4_matmul"] < y.numel():
            report.fault(f"{named}: not the bits of quartet.fp4_matmul")
        if not ((y.double() - expected.double()).abs() <= allowed).all():
            report.fault(f"{named}: some outputs are far from quartet.fp4_matmul's")


# ---- 6. Times ----------------------------------------------------------------------------------------------

def cold_timer(device):
    """-> a function of f: the median seconds of f(), its launches one CUDA graph, from a cold L2 cache."""
    # To read twice as much as it holds leaves nothing else in it.
    fill = torch.zeros(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
    median = functools.partial(triton.testing.do_bench_cudagraph, return_mode="median")

    def seconds(f):
        def after_filling():
            fill.sum()
            f()

        # While a graph is recorded, Triton 3.8 must not unload the kernels of what is garbage.
        gc.collect()
        gc.disable()
        try:
            return 1e-3 * (median(after_filling) - median(fill.sum))
        finally:
            gc.enable()

    return seconds


def copy_bandwidth(device, seconds):
    """Bytes/s that a copy of 1 GiB reads and writes."""
    source, copy = torch.randn(2, 2**28, device=device)
    # Either may be faster.
    taken = min(seconds(lambda: copy.copy_(source)), seconds(lambda: torch.neg(source, out=copy)))
    return 2 * copy.nbytes / taken


def this_gpu(device, bandwidth):
    """The GPU that is here, as a Target."""
    p = torch.cuda.get_device_properties(device)
    clock = triton.runtime.driver.active.utils.get_device_properties(device.index)["sm_clock_rate"] * 1e3
    lanes = 64 if (p.major, p.minor) == (8, 0) else 128
    return Target(
        p.major * 10 + p.minor, p.multi_processor_count * lanes * clock, bandwidth,
        p.shared_memory_per_multiprocessor, p.max_threads_per_multi_processor // 32)


def time_encoding(case, quantizer, parts, device, seconds):
    """Seconds that encode_kernel takes for the results of a Case, of scales that are all 1."""
    buffers = [kernels.allocate(rows, columns, device, *parts) for rows, columns in case.results]
    for b in buffers:
        b.scale.fill_(1.0)
        b.largest.fill_(0x3F800000)                 # the bits of 1.0
    seed = torch.tensor(0, device=device)
    return seconds(lambda: [kernels.encode(b, quantizer, seed) for b in buffers])


def time_ops(report, x, native, seconds):
    """Print the time of ops on x (M, K), what is expected, and what torch.compile of quartet.py takes."""
    peak = copy_bandwidth(x.device, seconds)
    gpu = this_gpu(x.device, peak)
    print(f"\n{len(x)} x {x.shape[1]}, {x.numel():,} values; us, from a cold L2 cache; a copy: "
          f"{peak / 1e12:.2f} TB/s\nencode: its kernel alone; least: what bytes or instructions take, the "
          "larger; sum: both. Of the form that training launches\n"
          f"{'':33}{'all':>8}{'encode':>8}{'least':>8}{'sum':>8}{'of copy':>9}{'compiled':>10}{'ratio':>7}")
    listed = {c.name: c for c in configurations(gpu.capability // 10)}
    for case in cases(x, [name for name in flat_quantizers() if name in kernels.MODES], tile_quantizers()):
        for parts in (kernels.FP4_PARTS,) if native else (kernels.NVFP4_PARTS, kernels.BF16_PARTS):
            title = case.name + ", decoded" * parts[1]
            c = listed[case.name]
            report.attempt(title, lambda: time_op(report, title, case, parts, c, gpu, seconds))


def time_op(report, title, case, parts, c, gpu, seconds):
    """Print and keep a row of time_ops."""
    device = case.inputs[0].device
    out = case.op(parts)
    # Scales go through memory as bf16, there and back, too.
    size = sum(t.nbytes for t in case.inputs + out) + sum(4 * rows * k // BLOCK for rows, k in case.results)
    taken = seconds(lambda: case.op(parts))
    if parts != kernels.NVFP4_PARTS:
        report.costs.setdefault(case.name, taken / values_in(case))
    encoding = time_encoding(case, mode_of(case.name.split()[1])[0], parts, device, seconds)

    # Codes alone, which are not predicted, and faults leave gaps in the row.
    least = apart = None
    if parts != kernels.NVFP4_PARTS:
        try:
            least, apart = predicted(case, c, gpu)
        except Exception as e:                      # Triton 3.6 has no disassembler for a B300, say
            report.note(f"{title}, prediction: {type(e).__name__}: {e}")
    compiled = report.attempt(f"{title}, torch.compile", lambda: time_compiled(case, parts, seconds))
    ratio = f"{compiled / taken:7.1f}" if compiled else ""
    times = "".join(in_us(t) for t in (taken, encoding, least, apart))
    print(f"{title:33}{times}{size / taken / gpu.bandwidth:9.0%}{in_us(compiled):>10}{ratio}", flush=True)
    report.keep("time", op=title, bytes=size, seconds=taken, encoding=encoding, least=least, sum=apart,
                compiled=compiled, copy_bandwidth=gpu.bandwidth)


def in_us(seconds):
    """A column of time_ops; None: a gap."""
    return f"{'':8}" if seconds is None else f"{seconds * 1e6:8.1f}"


def values_in(case):
    """How many values a Case reads: of codes two a byte."""
    return case.inputs[0].numel() * (2 if case.name.startswith("requantize") else 1)


def predicted(case, c, gpu):
    """Seconds that a Case should take, encoding included -> at best, and if bytes and instructions add up."""
    with tempfile.TemporaryDirectory() as directory:
        cost = cost_of(c, gpu, Path(directory, "kernel"))
    values = values_in(case)
    encoded = sum(rows * columns for rows, columns in case.results)
    encode = encoded * (SCALE + 1 / BLOCK) / gpu.bandwidth
    least = max(cost.by_bytes, cost.by_instructions) * values * 1e-15
    apart = (cost.by_bytes + cost.by_instructions) * values * 1e-15
    return least + encode, apart + encode


def time_compiled(case, parts, seconds):
    """Seconds that what everybody has takes for a Case: torch.compile of quartet.py's function."""
    def rival():
        found = case.reference()
        return [quartet.decode(t, torch.bfloat16) for t in found] if parts[1] else found

    torch.compiler.reset()      # it gives up after some compilations of a function
    return seconds(torch.compile(rival))


def time_gemms(report, device, native, seconds):
    """Print how long the GEMMs take that a layer is made of."""
    K, N = LAYER
    print(f"\na GEMM, {TOKENS} x {K} x {N}: ms, TFLOP/s")
    a, b = [quartet.four_six(torch.randn(rows, K, device=device).bfloat16()) for rows in (TOKENS, N)]
    a16, b16 = [quartet.decode(t, torch.bfloat16) for t in (a, b)]
    normal = [torch.randn_like(t) for t in (a16, b16)]
    forms = {
        "bf16": lambda: quartet.gemm(*normal),
        "bf16, of decoded values": lambda: quartet.gemm(a16, b16),
        "emulated": lambda: kernels.fp4_gemm(a16, a.tensor_scale, b16, b.tensor_scale),
    }
    if native:
        a_q, b_q = [[t.codes, kernels.swizzle(t.block_scale), t.tensor_scale] for t in (a, b)]
        forms["scaled_mm"] = lambda: kernels.scaled_mm(a_q, b_q)
        forms["in Triton"] = lambda: kernels.gemm(a_q, b_q)

    def time_gemm(name, f):
        taken = seconds(f)
        report.flops[name] = 2 * TOKENS * K * N / taken
        print(f"{name:28}{taken * 1e3:8.3f}{report.flops[name] / 1e12:9.0f}", flush=True)
        report.keep("time of gemm", gemm=name, seconds=taken, shape=[TOKENS, K, N])

    for name, f in forms.items():
        report.attempt(f"time of the GEMM {name}", lambda: time_gemm(name, f))


def time_linear(recipe, K, N, device, seconds):
    """Seconds that a linear layer of K features in, N out takes by a recipe, forward and backward."""
    layer = quartet.Linear(K, N, recipe=recipe, backend="triton", device=device, dtype=torch.bfloat16)
    x = torch.randn(TOKENS, K, device=device).bfloat16().requires_grad_()
    dy = torch.randn(TOKENS, N, device=device).bfloat16()
    return seconds(lambda: torch.autograd.grad(layer(x), (x, layer.weight), dy))


def time_layers(report, device, seconds):
    """Print how long linear layers take, forward and backward: one by every recipe, and PAPER's."""
    print(f"\nlinear layer of {LAYER}, {TOKENS} tokens, forward + backward: ms, speed and time over bf16")
    # One that fails does not take part in the turns.
    recipes = [recipe for recipe, row in quartet.RECIPES.items() if kernels.supports(row)
               and report.attempt(recipe, lambda: time_linear(recipe, *LAYER, device, seconds))]
    report.attempt("layers", lambda: time_layer(report, recipes, device, seconds))

    print(f"\na block's layers, {TOKENS} tokens, forward + backward: speed over bf16, and what the times "
          "above add up to;\nin brackets what the paper measured on an RTX 5090")
    parts = {}
    fp4 = "scaled_mm" if "scaled_mm" in report.flops else "bf16, of decoded values"
    try:
        parts = dict(speed_ups(report.costs, report.flops["bf16"], report.flops[fp4]))
    except KeyError as e:
        report.note(f"what the times add up to: {e} is not there")
    for model in PAPER:
        report.attempt(model, lambda: time_block(report, model, parts.get(model, {}), device, seconds))


def time_block(report, model, parts, device, seconds):
    """Print and keep the time of the layers of a block of PAPER's, by bf16 and recipes of MAIN.

    parts: {recipe: the speed that its parts' times add up to}
    """
    h, f, paper = PAPER[model]
    layers = (h, 3 * h), (h, h), (h, 2 * f), (f, h)
    times = time_in_turns(("bf16", *MAIN), layers, device, seconds)
    speeds = []
    for recipe in MAIN:
        added = f" (parts: {parts[recipe]:.2f})" if recipe in parts else ""
        speeds.append(f"{recipe} {times['bf16'] / times[recipe]:.2f}{added}")
    print(f"{model:>5}: {', '.join(speeds)} ({paper})", flush=True)
    report.keep("block", model=model, seconds=times, parts=parts)


def time_layer(report, recipes, device, seconds):
    """Print and keep the time of one layer by each recipe, beside bf16."""
    times = time_in_turns(recipes, [LAYER], device, seconds)
    for recipe, taken in times.items():
        bf16 = times["bf16"]
        print(f"{recipe:12}{taken * 1e3:8.3f}{bf16 / taken:7.2f}{taken / bf16 - 1:+8.0%}", flush=True)
        report.keep("layer", recipe=recipe, seconds=taken, bf16=bf16)


def time_in_turns(recipes, layers, device, seconds):
    """-> {recipe: the median seconds that layers, of features (in, out), take together by it}.

    A GPU's clock varies as it gets warm, so recipes are compared that ran by turns.
    """
    taken = {recipe: [] for recipe in recipes}
    for _ in range(TURNS):
        for recipe, times in taken.items():
            times.append(sum(time_linear(recipe, *layer, device, seconds) for layer in layers))
    return {recipe: statistics.median(times) for recipe, times in taken.items()}


# ---- 7. The command line -----------------------------------------------------------------------------------

# Rows and columns that are whole tiles, and not; one row.
SHAPES = (1, 128), (140, 256), (16, 4096), (48, 144), (4112, 1536)
GEMM_SHAPES = (140, 144, 384), (256, 512, 2048), (2048, 1024, 8192)
TIMED = (TOKENS, 4096), (2 * TOKENS, 3072)
LAYER = 4096, 4096    # features in and out
TURNS = 3


def first_run(report, device, native):
    """All that `python kernels.py` prints."""
    sections = {
        "The machine": lambda: tell_machine(report, device),
        "Every op against quartet.py": lambda: check_all(report, device),
        "How the GEMMs add": lambda: check_gemms(report, device, native, GEMM_SHAPES),
        "Times": lambda: time_all(report, device, native),
    }
    print("this takes some ten minutes, most of them to compile: half a minute can pass without a line\n",
          flush=True)
    try:
        for number, (title, section) in enumerate(sections.items(), 1):
            print(f"{number}. {title}", flush=True)
            report.attempt(title, section)
            print()
    except DeviceFailed:
        report.fault("after that the GPU took no more work: the rest has not run")


def tell_machine(report, device):
    """Print and keep what `machine` knows."""
    found = machine(device)
    for what, value in found.items():
        print(f"{what:>18}  {value}")
    report.keep("machine", **found)


def check_all(report, device):
    """Whatever must have certain bits."""
    report.attempt("reciprocal", lambda: check_reciprocals(report, device))
    check(report, device, SHAPES)


def time_all(report, device, native):
    """The times of ops and layers."""
    torch.set_float32_matmul_precision("high")      # TF32 for the rival's x R: exact if x is bf16
    seconds = cold_timer(device)
    for M, K in TIMED:
        report.attempt(f"{M} x {K}", lambda: time_ops(
            report, torch.randn(M, K, device=device).bfloat16(), native, seconds))
    report.attempt("times of GEMMs", lambda: time_gemms(report, device, native, seconds))
    time_layers(report, device, seconds)


def main(argv=None):
    """The command line of kernels.py -> exit status: 1 if something raised or differed; with --target, if a
    kernel of MAIN spills, or any does not compile.
    """
    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="keep what is found, a record a line")
    parser.add_argument("--target", choices=TARGETS, help="compile for this GPU, here or not, and count")
    parser.add_argument("--dump", metavar="DIR", help="with --target: keep cubins, PTX, SASS there")
    arguments = parser.parse_args(argv)
    if arguments.target:
        if kernels.INTERPRET:
            sys.exit("kernels.py: --target compiles, and TRITON_INTERPRET=1 interprets: unset it")
        with tempfile.TemporaryDirectory() as directory:
            dump = Path(arguments.dump or directory)
            dump.mkdir(parents=True, exist_ok=True)
            return int(not compile_for(arguments.target, dump))
    if not torch.cuda.is_available():
        sys.exit("to check and time the kernels, python kernels.py needs a GPU; --target works anywhere")
    lacks = quartet.load_kernels()
    if lacks:
        sys.exit(f"kernels.py needs {lacks}")
    try:
        report = Report(arguments.json)
    except OSError as e:
        sys.exit(f"kernels.py: --json={arguments.json}: {e.strerror}; take another name")
    device = torch.device("cuda", torch.cuda.current_device())
    first_run(report, device, kernels.major(device) >= 10)
    print("no fault was found" if report.good else "something is WRONG: see above")
    if arguments.json:
        print(f"written to {arguments.json}")
    else:
        print("with --json=FILE all of it is kept; on a Blackwell, please send that (README.md)")
    return int(not report.good)


if __name__ == "__main__":
    sys.exit(main())
