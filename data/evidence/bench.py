"""What `python kernels.py` does: check the kernels against quartet.py and time them on the GPU that is here.

    python kernels.py                                   check, bit for bit, and time
    python kernels.py --target=sm_100a [--dump=DIR]     compile for a GPU that need not be here, and count
"""
import argparse, re, subprocess, sys, tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import kernels, quartet
from kernels import GEMM_OPTIONS, GROUP, LAUNCH, MODES, NVFP4, permuted, quantize, rotate_quantize

# ---- 1. Compile for a GPU that is not here, and count ------------------------------------------------------
# capability, lane-instructions/s (multiprocessors x 128 x clock), bytes/s, dense FLOP/s in bf16 and in FP4
TARGETS = dict(sm_90a=(90, 30e12, 3.35e12), sm_100a=(100, 35e12, 8e12, 2.25e15, 9e15),        # H100, B200
               sm_103a=(103, 35e12, 8e12, 2.25e15, 13.1e15),                                  # B300
               sm_120a=(120, 52e12, 1.79e12, 0.2095e15, 1.676e15))                            # RTX 5090
TYPES = dict(x="*bf16", R="*bf16", seed="*i64", codes="*u8", scale="*bf16", largest="*i32", decoded="*bf16",
             block_scale="*u8", x_scale="*u8", a_scale="*fp8e4nv", b_scale="*fp8e4nv", n="fp32", a="*u8", b="*u8",
             y="*bf16", **dict.fromkeys(("tensor_scale", "x_tensor_scale", "a_tensor_scale", "b_tensor_scale"), "*fp32"),
             **dict.fromkeys(("count", "columns", "size", "M", "N", "K"), "i32"))  # by name or last word
KINDS = dict(float="F(?!2|LO)|MUFU|HMMA|HGMMA", convert="F2|I2", memory="U?LD|U?ST|ATOM|RED|UBLK",
             control="B|EXIT|WARPSYNC|NOP|S2|CS2|DEPBAR|CALL|RET|ELECT|SYNCS", integer="")     # the first fit
# A layer's width h, its MLP's f, its speed-up over bf16, measured in arXiv:2601.22813 on an RTX 5090: forward
# and backward of linears of (in, out) = (h, 3h) (h, h) (h, 2f) (f, h)
PAPER = {"800M": (2048, 5632, 3.12), "3B": (3072, 8192, 3.64), "7B": (4096, 11008, 3.89),
         "22B": (6144, 16384, 4.19)}
TOKENS = 16384

def configurations(major):
    """What training launches: name, kernel, constants (None: absent), options, values and bytes a value."""
    native, options = major >= 10, kernels.tile_options(major)
    skip, out = ("decoded", 0.5) if native else ("codes", 2.0)          # what no GEMM takes; else bytes
    flat = dict(ROWS=1, FP4=native, B=256, **({"decoded_ptr": None} if native else {}))
    for q in ("rtn", "four_six", "scale_search", "sr"):         # bytes: 2 in, codes, decoded, 1/8 of scales
        yield (f"quantize {q}", kernels.quantize_kernel, dict(flat, QUANTIZER=q),
               dict(num_warps=MODES[q].warps), 4096, 2.625 + 2 * (not native))
    tile = {f"row_{skip}": None, f"col_{skip}": None, "SWIZZLED": native, "COL": "ms_eden",
            **{name: options.pop(name) for name in ("FP4", "H")}}
    both = dict(tile, ROW="ms_eden", x_scale_ptr=None, x_tensor_scale_ptr=None)
    yield "both ms_eden", kernels.tile_kernel, both, options, 16384, 2 + 2 * (out + 0.125)
    absent = dict.fromkeys(["row_R", "row_seed", "row_codes", "row_scale", "row_largest", "row_decoded"])
    again = dict(tile, ROW="", **absent)
    yield "requantize ms_eden", kernels.tile_kernel, again, options, 16384, 0.5625 + out + 0.125
    encode = dict(NOISE=1, SWIZZLED=native, B=1024, **{"decoded_ptr" if native else "codes_ptr": None})
    yield "encode ms_eden", kernels.encode_kernel, encode, {}, 32768, 0.1875
    if native:                                      # values of y; bytes: of y alone
        options = dict(GEMM_OPTIONS[major])
        tile = {name: options.pop(name) for name in ("BM", "BN", "BK")}
        yield "gemm", kernels.gemm_kernel, tile, options, tile["BM"] * tile["BN"], 2.0

def compile_for(target, dump):
    """Compile every kernel for a target, print what it costs there -> whether none fails or spills.

    Instructions are static: a thread's, of all paths (encode's include the rare ones), times threads by
    values; loops are unrolled. The bound is bytes or instructions over what the GPU can do, the larger.
    dump: a directory for cubins, PTX and SASS.
    """
    capability, issue, bandwidth, *flops = TARGETS[target]
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    print(f"{target}: per value, and ns per million values")
    print(f"{'kernel':20}{'registers':>10}{'shared':>8}{'spills':>7}",
          *(f"{kind:>8}" for kind in KINDS), f"{'bytes':>6}{'bound':>7}  by")
    good, bounds = True, {}
    for name, kernel, constants, options, values, size in configurations(capability // 10):
        signature = {n: "constexpr" if n in constants else TYPES.get(n.removesuffix("_ptr")) or
                     TYPES[n.removesuffix("_ptr").split("_")[-1]] for n in kernel.arg_names}
        if name.startswith("requantize"):
            signature["x_ptr"] = "*u8"
        attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values())
                      if kind[0] == "*" or kind == "i32"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        try:
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options | LAUNCH)
        except Exception as e:                      # Triton has no common class for what a compiler may raise
            print(f"{name:20} does not compile: {type(e).__name__} {e}")
            good = False
            continue
        file = str(Path(dump, f"{target}-{name}".replace(" ", "-")))
        Path(file + ".cubin").write_bytes(compiled.asm["cubin"])
        command = [cuobjdump, "-res-usage", "-sass", file + ".cubin"]
        shown = subprocess.run(command, capture_output=True, text=True)     # its warnings are no answer
        if shown.returncode: sys.exit(f"kernels.py: {cuobjdump} failed on {file}.cubin: {shown.stderr}")
        sass = shown.stdout
        for suffix, text in ("ptx", compiled.asm["ptx"]), ("sass", sass):
            Path(f"{file}.{suffix}").write_text(text)
        registers, stack = (int(re.search(rf"{word}:(\d+)", sass)[1]) for word in ("REG", "STACK"))
        codes = re.findall(r"^\s+/\*\w{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", sass, re.M)
        kinds = [next(kind for kind, pattern in KINDS.items() if re.match(pattern, c)) for c in codes]
        share, spills = options.get("num_warps", 4) * 32 / values, sum(c in ("LDL", "STL") for c in codes)
        good = good and not spills and not stack
        if kernel is kernels.gemm_kernel and "kind::mxf4nvf4" not in compiled.asm["ptx"]:
            print(f"{name:20} has no FP4 instruction")
            good = False
        by_bytes, by_issue = size / bandwidth * 1e15, len(codes) * share / issue * 1e15
        rare = kernel is kernels.encode_kernel      # most of its instructions: do not count them
        bounds[name] = by_bytes if rare else max(by_bytes, by_issue)
        print(f"{name:20}{registers:10}{compiled.metadata.shared:8}{spills:7}"
              + "".join(f"{kinds.count(kind) * share:9.1f}" for kind in KINDS)
              + f"{size:7.2f}{max(by_bytes, by_issue):7.0f}  " + ("bytes" if by_bytes > by_issue else
              f"instructions, {by_issue / by_bytes:.1f} times bytes"))
    if good and flops:
        predict(bounds, *flops)
    return good

def predict(bounds, bf16, fp4):
    """Print how fast PAPER's layers could be, by bounds in ns per million values and GEMMs in FLOP/s."""
    print(f"PREDICTED, from these bounds (encode: bytes) and published peaks of {bf16 / 1e12:g} and "
          f"{fp4 / 1e12:g} TFLOP/s; nothing was run:\nforward + backward over bf16, {TOKENS} tokens; in "
          "brackets what the paper measured on an RTX 5090")
    again, dy_both, encode = (1e-15 * n * bounds[f"{name} ms_eden"] for name, n in (
        ("requantize", 1), ("both", 1), ("encode", 2)))
    for model, (h, f, paper) in PAPER.items():
        x, w, dy = TOKENS * (3 * h + f), 4 * h * h + 3 * h * f, TOKENS * (5 * h + 2 * f)       # values
        times = [6 * TOKENS * w / fp4 + (x + w) * (1e-15 * bounds[f"quantize {q}"] + again + encode)
                 + dy * (dy_both + encode) for q in ("four_six", "scale_search")]
        quartet2, quintet = (6 * TOKENS * w / bf16 / time for time in times)
        print(f"{model:>5}: quartet2 {quartet2:.2f} ({paper}), quintet {quintet:.2f}")

# ---- 2. Check and time on the GPU that is here -------------------------------------------------------------
def cases(x, flat, rotated):
    """Yield ops on x (M, K): name, inputs, ours(decoded) -> all `finished`, theirs() -> NVFP4 of each.

    decoded: values too, or, rotated, instead of codes, as a GEMM in bf16 takes them.
    """
    R, _ = quartet.rotation("rht128x2", torch.Generator(x.device))
    t, P, (seed, again) = quartet.rtn(x), permuted(R), torch.tensor([5, 2**40 + 1], device=x.device)
    packed = [t.codes, t.block_scale.view(torch.uint8), t.tensor_scale]
    turned = lambda x: F.pad(x, (0, 0, 0, -len(x) % GROUP)).T
    for name in flat:
        q, rows, f = name.removesuffix("_16x16"), 16 if "16x16" in name else 1, quartet.QUANTIZERS[name]
        if len(x) % rows == 0:
            ours = lambda decoded: quantize(x, q, rows, seed, True, decoded)
            yield name, [x], ours, lambda: [f(x, None, seed)]
    for q in rotated:
        f, col = quartet.QUANTIZERS[q], (q, P, again, 1.0)
        yield (f"{q}, both ways", [x],
               lambda decoded: rotate_quantize([x], q, P, seed, *col, not decoded, decoded),
               lambda: [f(x, R, seed), f(turned(x), R, again)])
        yield (f"{q}, requantized", packed,
               lambda decoded: rotate_quantize(packed, "", None, None, *col, not decoded, decoded),
               lambda: [f(turned(quartet.decode(t, torch.bfloat16)), R, again)])

def check(device, shapes):
    """Compare the ops with quartet.py, bit for bit, on x (M, K) of shapes; print -> whether all agree.

    x is integers, every other 128 rows times 2^-16: sums of x R are exact, some scales sub-normal.
    """
    good, known = True, [name for name in quartet.QUANTIZERS if name.removesuffix("_16x16") in MODES]
    for M, K in shapes:
        x = torch.randint(-9, 10, (M, K), device=device).bfloat16()
        x *= 2.0 ** (-16 * (torch.arange(M, device=device)[:, None] // GROUP % 2))
        for name, _, ours, theirs in cases(x, known, ("rtn", "sr", "ms_eden", "ms_eden_46")):
            expected = [part for t in theirs() for part in (
                t.codes, t.block_scale.view(torch.uint8), t.tensor_scale, quartet.decode(t, torch.bfloat16))]
            for decoded in (False, True):
                parts = zip((*NVFP4._fields, "decoded") * 2, ours(decoded), expected)
                if wrong := [part for part, a, b in parts if a.numel() and not torch.equal(a, b)]:
                    print(f"{M} x {K}, {name}: {', '.join(wrong)} not as quartet.py's")
                    good = False
    print("every op gives quartet.py's bits:", good)
    return good

def seconds(f):
    """Median time of f(), all its launches, as one CUDA graph."""
    return triton.testing.do_bench_cudagraph(f, return_mode="median") * 1e-3

def time_quantizers(x, native):
    """Print the time of ops on x beside that of quartet.py's functions under torch.compile."""
    source, copy = torch.randn(2, 2**28, device=x.device)
    copies = lambda: copy.copy_(source), lambda: torch.neg(source, out=copy)        # either may be faster
    peak = 2 * copy.nbytes / min(map(seconds, copies))
    title = f"{len(x)} x {x.shape[1]}; a copy: {peak / 1e12:.2f} TB/s"
    print(f"\n{title:34}{'B/value':>8}{'us':>8}{'TB/s':>6}{'of copy':>8}{'compiled':>10}{'ratio':>6}")
    for name, inputs, ours, theirs in cases(x, ("rtn", "four_six", "scale_search", "sr"), ("ms_eden",)):
        for decoded in (False,) if native else (False, True):
            torch.compiler.reset()                  # else it gives up after some compilations of a function
            rival = torch.compile(lambda: [quartet.decode(t, torch.bfloat16) if decoded else t
                                           for t in theirs()])
            out = ours(decoded)                     # scales go through memory as bf16, there and back, too
            size = sum(t.nbytes for t in inputs + out) + 4 * sum(scale.numel() for scale in out[1::4])
            time, other = seconds(lambda: ours(decoded)), seconds(rival)
            print(f"{name + ', decoded' * decoded:34}{size / x.numel():8.2f}{time * 1e6:8.1f}"
                  f"{size / time / 1e12:6.2f}{size / time / peak:8.0%}{other * 1e6:10.1f}{other / time:6.1f}")

def benchmark(device, native):
    """Print the time of quantizers, and of linear layers forward and backward by every recipe."""
    torch.set_float32_matmul_precision("high")      # TF32 for the rival's x R: exact if x is bf16
    for shape in (TOKENS, 4096), (2 * TOKENS, 3072):
        time_quantizers(torch.randn(shape, device=device).bfloat16(), native)
    def ms(recipe, K, N):
        layer = quartet.Linear(K, N, recipe=recipe, backend="triton", device=device, dtype=torch.bfloat16)
        x, dy = (torch.randn(TOKENS, n, device=device).bfloat16() for n in (K, N))
        step = lambda: torch.autograd.grad(layer(x.requires_grad_()), (x, layer.weight), dy)
        return seconds(step) * 1e3
    print(f"\nlinear layer, {TOKENS} x 4096 x 4096, forward + backward: ms, speed over bf16, time over bf16")
    for recipe in (recipe for recipe, row in quartet.RECIPES.items() if kernels.supports(row)):
        bf16, time = (ms(r, 4096, 4096) for r in ("bf16", recipe))
        print(f"{recipe:12}{time:8.3f}{bf16 / time:7.2f}{time / bf16 - 1:+8.0%}")
    for model, (h, f, paper) in PAPER.items() if native else ():
        layers = (h, 3 * h), (h, h), (h, 2 * f), (f, h)
        bf16, time = (sum(ms(recipe, *layer) for layer in layers) for recipe in ("bf16", "quartet2"))
        print(f"{model:>5}: quartet2 {bf16 / time:.2f} times as fast as bf16 (paper, RTX 5090: {paper})")

def main():
    """The command line of kernels.py -> exit status."""
    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, help="compile for this GPU, here or not, and count")
    parser.add_argument("--dump", metavar="DIR", help="with --target: keep cubins, PTX, SASS there")
    arguments = parser.parse_args()
    if arguments.target:
        with tempfile.TemporaryDirectory() as directory:
            Path(arguments.dump or directory).mkdir(parents=True, exist_ok=True)
            return not compile_for(arguments.target, arguments.dump or directory)
    if not torch.cuda.is_available():
        sys.exit("to check and time the kernels, python kernels.py needs a GPU; --target works anywhere")
    good = check("cuda", [(1, 128), (140, 256), (16, 4096), (4112, 1536)])
    print(torch.cuda.get_device_name())
    benchmark("cuda", torch.cuda.get_device_capability() >= (10, 0))
    return not good

if __name__ == "__main__": sys.exit(main())
