"""Tests of data/evidence/bench.py: a row of the tables is all that a new quantizer needs to be taken in.

Run as a script, this file is `python kernels.py` with fewer quantizers: test_bench.py NAME ..., where NAME is
of a toy, or "main" for those of the two recipes of README.md's first table.
"""
import collections
import json
import os
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

from background import in_background, python

pytest_plugins = ["background"]
# numpy divides where a kernel does, and then drops the result.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interpret(patch):
    """On a CPU kernels run in Python: so Triton is told when it is imported, and when they run."""
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")


# Only for these tests: what others start takes the environment as it is.
with pytest.MonkeyPatch.context() as patch:
    if __name__ != "__main__":
        interpret(patch)
    import bench
    import kernels
    import quartet
    from kernels import Mode, tl

RECIPES = [name for name, row in quartet.RECIPES.items() if row]
quantize_blocks = kernels.quantize_blocks


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch)


# ---- Toys: as a forker adds a quantizer --------------------------------------------------------------------

def toy(x):
    """RTN of half of x."""
    return quartet.rtn(x.float() / 2)


def blocks_with_toys(b, first, i, seed, QUANTIZER, ROWS, BF16):
    """kernels.quantize_blocks with branches for the toys, for jit. Triton does not compile "refused"."""
    HALF: tl.constexpr = 0.5
    if QUANTIZER == "refused":
        HALF: tl.constexpr = 0.5
    if QUANTIZER == "toy" or QUANTIZER == "refused":
        q, s = quantize_blocks(b * HALF, first, i, seed, "rtn", ROWS, BF16)
    else:
        q, s = quantize_blocks(b, first, i, seed, QUANTIZER, ROWS, BF16)
    return q, s


def recipe_of(name):
    """A recipe that has a quantizer everywhere."""
    return quartet.Recipe(name, name, *[quartet.Gemm("rht128", dy=name, other=name)] * 2)


def leave_only(patch, *names):
    """Toys take the place of all other modes, each with a recipe that uses it everywhere."""
    patch.setattr(kernels, "quantize_blocks", kernels.jit(blocks_with_toys))
    patch.setattr(kernels, "MODES", {name: Mode() for name in names})
    patch.setattr(quartet, "RECIPES", {name: recipe_of(name) for name in names})
    patch.setattr(bench, "MAIN", names)
    patch.setattr(quartet, "QUANTIZERS", {name: quartet.rotated(toy) for name in names})


def leave_main(patch):
    """Leave quartet2 and quintet and their quantizers, of which some make noise."""
    names = bench.main_quantizers()
    patch.setattr(kernels, "MODES", {name: mode for name, mode in kernels.MODES.items() if name in names})
    patch.setattr(quartet, "RECIPES", {name: quartet.RECIPES[name] for name in bench.MAIN})
    patch.setattr(quartet, "QUANTIZERS", {name: quartet.QUANTIZERS[name] for name in names})


# ---- What there is to compile ------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, recipe, forms", [
    (Mode(), None, {"quantize"}),
    (Mode(), recipe_of("toy"), {"quantize", "both", "requantize"}),
    (Mode(noise=1), None, {"both", "requantize"}),
    (Mode(noise=1), quartet.NVIDIA._replace(dx=quartet.Gemm(None, dy="toy", other=None)),
     {"quantize", "both", "requantize"}),
    (Mode(noise=3), None, {"both", "requantize", "encode"}),
])
@pytest.mark.parametrize("major", [9, 10, 12])
def test_a_new_mode_is_listed_in_the_forms_that_training_can_launch(mode, recipe, forms, major, monkeypatch):
    before = {c.name for c in bench.configurations(major)}
    monkeypatch.setitem(kernels.MODES, "toy", mode)
    monkeypatch.setitem(quartet.QUANTIZERS, "toy", quartet.rotated(toy))
    if recipe:
        monkeypatch.setitem(quartet.RECIPES, "mine", recipe)
    after = {c.name for c in bench.configurations(major)}
    assert after - before == {f"{form} toy" for form in forms}
    assert before <= after


class Recorder:
    """Stands for a kernel: keeps what it is launched with, as {argument: value}, and computes nothing."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(dict(zip(self.kernel.arg_names, args)) | options)
        return launch


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_launches_is_listed(recipe, monkeypatch):
    recorders = {}
    for name in "quantize_kernel", "tile_kernel", "encode_kernel":
        recorders[name] = Recorder(getattr(kernels, name))
        monkeypatch.setattr(kernels, name, recorders[name])
    layer = quartet.Linear(128, 128, recipe=recipe, device=DEVICE)
    x = torch.randn(128, 128, device=DEVICE).bfloat16().requires_grad_()
    y = kernels.QuantizedMatmul.apply(x, layer.weight.bfloat16(), recipe, *quartet.NOTHING)
    y.sum().backward()

    listed = {(c.name.split()[0], *map(c.constants.get, ("QUANTIZER", "ROWS", "ROW", "COL", "NOISE")))
              for c in bench.configurations(9)}
    launched = set()
    for a in recorders["quantize_kernel"].launches:
        launched.add(("quantize", a["QUANTIZER"], a["ROWS"], None, None, None))
    for a in recorders["tile_kernel"].launches:
        # Of both results of a bf16 tensor, training may want one.
        if a["x_scale_ptr"] is None:
            launched |= {("both", None, None, mode, mode, None) for mode in (a["ROW"], a["COL"]) if mode}
        else:
            launched.add(("requantize", None, None, a["ROW"], a["COL"], None))
    for a in recorders["encode_kernel"].launches:
        launched.add(("encode", None, None, None, None, a["NOISE"]))
    assert len(launched) >= 4
    assert launched <= listed


# ---- The check, and compiling ------------------------------------------------------------------------------

def test_the_check_takes_a_new_mode_in_every_form_and_sees_where_it_is_wrong(monkeypatch, capsys):
    leave_only(monkeypatch, "toy")
    x = torch.ones(20, 128, device=DEVICE).bfloat16()
    names = [case.name for case in bench.cases(x, bench.quantizers(), bench.tile_quantizers())]
    assert names == ["quantize toy", "both toy", "requantize toy"]
    report = bench.Report()
    bench.check(report, DEVICE, [(20, 128)])
    assert report.good
    assert [line.split(" s  ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "as quartet.py's, shapes: 1"] * 3

    monkeypatch.setitem(quartet.QUANTIZERS, "toy", quartet.rotated(quartet.rtn))
    bench.check(report, DEVICE, [(20, 128)])
    assert not report.good
    # Each with the parts that quartet.py, a GEMM in bf16 and FP4 tensor cores take.
    expected = [f"WRONG: 20 x 128, {name}" for name in names for _ in bench.PARTS]
    assert [line.rpartition(": ")[0] for line in capsys.readouterr().out.splitlines()] == expected


def in_place_of_a_gpu(monkeypatch):
    """Let bench.first_run run here: on small shapes, what MAIN needs, each op once, all of it in 1 ms."""
    leave_main(monkeypatch)
    monkeypatch.setitem(quartet.RECIPES, "bf16", None)
    monkeypatch.setattr(bench, "TIMED", [(128, 128)])
    monkeypatch.setattr(bench, "TOKENS", 128)
    monkeypatch.setattr(bench, "SHAPES", [(20, 128)])
    monkeypatch.setattr(bench, "SIGNIFICANDS", 2**15)
    monkeypatch.setattr(bench, "GEMM_SHAPES", [(32, 32, 128)])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device, seconds: 1e12)
    monkeypatch.setattr(bench, "LAYER", (128, 128))
    monkeypatch.setattr(bench, "PAPER", {"small": (128, 128, 3.0)})
    monkeypatch.setattr(bench, "machine", lambda device: dict(gpu="none"))
    monkeypatch.setattr(bench, "this_gpu", lambda device, bandwidth: bench.TARGETS["sm_90a"])
    monkeypatch.setattr(bench, "cold_timer", lambda device: lambda f: [f(), 1e-3][1])
    monkeypatch.setattr(bench, "cost_of", lambda c, gpu, file: bench.Cost(None, 0, 1, 8, [], 1e6, 3e6, ""))
    monkeypatch.setattr(torch, "compile", lambda f: f)


def test_the_first_run_prints_its_sections_and_keeps_what_it_finds(monkeypatch, capsys, tmp_path):
    in_place_of_a_gpu(monkeypatch)
    report = bench.Report(tmp_path / "found.jsonl")
    bench.first_run(report, torch.device(DEVICE), False)
    assert report.good
    printed = capsys.readouterr().out
    sections = re.findall(r"^(\d)\. ", printed, re.M)
    assert sections == ["1", "2", "3", "4"]

    # Without NaN, which is no JSON
    found = [json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "found.jsonl")]
    kinds = collections.Counter(record["kind"] for record in found)
    ops = [c.name for c in bench.configurations(9) if c.name.split()[0] in ("quantize", "both", "requantize")]
    assert kinds["machine"] == kinds["block"] == 1 and kinds["gemm"] == 6
    checked = {record["op"] for record in found if record["kind"] == "check"}
    assert checked == {*ops, "quantize ms_eden"}       # which no recipe launches
    # With codes and with decoded values.
    times = [record for record in found if record["kind"] == "time"]
    assert len(times) == 2 * len(ops) and {record["seconds"] for record in times} == {1e-3}
    assert "nan" not in printed
    # Of codes alone, which training on such a GPU does not launch, there is no prediction.
    assert all((record["least"] is None) == ("decoded" not in record["op"]) for record in times)
    assert {record["recipe"] for record in found if record["kind"] == "layer"} == {"bf16", *bench.MAIN}
    assert kinds["time of gemm"] == 3 and "right for all 32,768 significands" in printed

    # Each op and GEMM takes 1 ms, of 128 x 128 values. So count what the four layers of a block read.
    x = 3 + 1
    w = dy = 3 + 1 + 2 + 1
    gemms = 3 * w
    ops = 2 * x + 2 * w + dy
    block, = [record for record in found if record["kind"] == "block"]
    assert block["parts"] == {recipe: pytest.approx(gemms / (gemms + ops)) for recipe in bench.MAIN}
    assert f"(parts: {gemms / (gemms + ops):.2f})" in printed


def test_what_raises_is_told_and_hides_nothing_else(monkeypatch, capsys, tmp_path):
    in_place_of_a_gpu(monkeypatch)
    quantize = kernels.quantize

    def broken(x, quantizer, *rest):
        if quantizer == "scale_search":
            raise RuntimeError("no such instruction")
        return quantize(x, quantizer, *rest)

    monkeypatch.setattr(kernels, "quantize", broken)
    report = bench.Report(tmp_path / "found.jsonl")
    bench.first_run(report, torch.device(DEVICE), False)
    assert not report.good
    printed = capsys.readouterr().out
    assert "WRONG: 20 x 128, quantize scale_search: RuntimeError: no such instruction" in printed
    assert "WRONG: quintet: RuntimeError" in printed
    found = [json.loads(line) for line in open(tmp_path / "found.jsonl")]
    assert {record["op"] for record in found if record["kind"] == "check" and not record["faults"]} == {
        "quantize four_six", "quantize ms_eden", "both ms_eden", "requantize ms_eden"}
    layers = [record["recipe"] for record in found if record["kind"] == "layer"]
    assert layers == ["quartet2", "bf16"]
    assert "left out: what the times add up to: 'quantize scale_search' is not there" in printed


def test_recipes_take_turns_and_one_slow_turn_does_not_count(monkeypatch):
    ran = []

    def time_linear(recipe, K, N, device, seconds):
        ran.append((recipe, K))
        slow = len(ran) in (3, 6)
        return K * (10 if slow else 1)

    monkeypatch.setattr(bench, "time_linear", time_linear)
    times = bench.time_in_turns(("bf16", "rtn"), [(1, 2), (3, 4)], None, None)
    assert times == {"bf16": 4, "rtn": 4}
    assert ran == 3 * [("bf16", 1), ("bf16", 3), ("rtn", 1), ("rtn", 3)]


def test_a_reciprocal_that_is_one_bit_off_is_seen(monkeypatch, capsys):
    class Wrong:
        def __getitem__(self, grid):
            def launch(out, *arguments, **options):
                s = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)
                out.copy_(1 / s)
                out.view(torch.int32)[12345] += 1
            return launch

    monkeypatch.setattr(bench, "reciprocals_kernel", Wrong())
    report = bench.Report()
    bench.check_reciprocals(report, torch.device("cpu"))
    assert not report.good
    assert "of 8,388,608 significands 1 are not correctly rounded" in capsys.readouterr().out


def test_what_could_not_be_done_is_no_fault(monkeypatch, capsys, tmp_path):
    in_place_of_a_gpu(monkeypatch)

    def no_disassembler(c, gpu, file):
        raise RuntimeError("cuobjdump failed")

    def too_large(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 1000 GiB")

    monkeypatch.setattr(bench, "cost_of", no_disassembler)
    monkeypatch.setattr(bench, "time_block", too_large)
    report = bench.Report(tmp_path / "found.jsonl")
    bench.first_run(report, torch.device(DEVICE), False)
    assert report.good
    printed = capsys.readouterr().out
    assert "left out: small: takes more memory than is free" in printed
    assert "left out: both ms_eden, decoded, prediction: RuntimeError: cuobjdump failed" in printed
    found = [json.loads(line) for line in open(tmp_path / "found.jsonl")]
    assert sum(record["kind"] == "note" for record in found) > 1
    assert any(record["kind"] == "time" and record["seconds"] == 1e-3 for record in found)


def test_after_a_fault_of_the_gpu_the_rest_is_told_not_to_have_run(monkeypatch, capsys, tmp_path):
    in_place_of_a_gpu(monkeypatch)
    failed = []

    def wait():
        if failed:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(bench, "wait_for_gpu", wait)
    monkeypatch.setattr(kernels, "rotate_quantize", lambda *arguments: failed.append(1))
    report = bench.Report(tmp_path / "found.jsonl")
    bench.first_run(report, torch.device(DEVICE), False)
    assert not report.good
    *_, wrong, last = filter(None, capsys.readouterr().out.splitlines())
    assert wrong.startswith("WRONG: 20 x 128, both ms_eden: ")
    assert last == "WRONG: after that the GPU took no more work: the rest has not run"
    assert json.loads((tmp_path / "found.jsonl").read_text().splitlines()[-1])["kind"] == "fault"


def test_what_it_needs_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(bench.kernels, "INTERPRET", True)
    with pytest.raises(SystemExit, match="--target compiles, and TRITON_INTERPRET=1 interprets: unset it"):
        bench.main(["--target=sm_90a"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU; --target works anywhere"):
        bench.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quartet, "load_kernels", lambda: "a C compiler (apt install gcc)")
    with pytest.raises(SystemExit, match="kernels.py needs a C compiler"):
        bench.main([])


def compile_in(directory, *words, target="sm_90a"):
    """Compile for a GPU that need not be here -> directory, with the results, and the process, ended."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "data" / "evidence")])
    words = [*words, f"--dump={directory}", f"--target={target}"]
    return directory, python(*words, cwd=directory, PYTHONPATH=path)


def compile_reciprocals(capability):
    """Compile the kernel of check_reciprocals. Raises what Triton does."""
    source = bench.ASTSource(
        fn=bench.reciprocals_kernel,
        signature={"out_ptr": "*fp32", "B": "constexpr"},
        constexprs={"B": bench.AT_ONCE})
    bench.triton.compile(source, bench.GPUTarget("cuda", capability, 32), kernels.LAUNCH)


@in_background
def compiled_for_hopper(directory):
    return compile_in(directory, __file__, "main")


@in_background
def compiled_for_b300(directory):
    return compile_in(directory, __file__, "main", target="sm_103a")


@in_background
def compiled_for_rtx(directory):
    return compile_in(directory, __file__, "main", target="sm_120a")


@in_background
def compiled_toy(directory):
    return compile_in(directory, __file__, "toy")


@in_background
def compiled_refused(directory):
    return compile_in(directory, __file__, "refused")


def test_a_new_mode_compiles_in_every_form_and_what_does_not_is_told(compiled_toy, compiled_refused):
    _, toys = compiled_toy
    assert toys.returncode == 0, toys.stdout + toys.stderr
    rows = toys.stdout.splitlines()[2:]
    assert [row[:28].rstrip() for row in rows] == [
        "quantize toy", "both toy", "requantize toy", "encode toy", "emulated gemm"]

    # The interpreter runs "refused": here is why compiling is tested, too.
    _, refused = compiled_refused
    assert refused.returncode == 1
    assert refused.stdout.count("does not compile") == 3
    assert "encode refused" in refused.stdout


# README.md's command, which test_quartet.py runs, compiles every mode in every form for sm_100a. The limits
# are the most instructions for a value, both ways and requantized, and bytes of shared memory a program.
@pytest.mark.parametrize("target, both, requantize, shared", [
    ("sm_90a", 44, 28, 227 << 10),
    ("sm_103a", 30, 22.5, 227 << 10),
    ("sm_120a", 48, 36, 99 << 10),
])
def test_what_quartet2_and_quintet_launch_compiles_for_other_gpus_without_spills(
        target, both, requantize, shared, compiled_for_hopper, compiled_for_b300, compiled_for_rtx):
    if target == "sm_103a" and [*map(int, bench.triton.__version__.split(".")[:2])] < [3, 8]:
        pytest.skip("Triton 3.6 has no disassembler for sm_103a")
    compiled = dict(sm_90a=compiled_for_hopper, sm_103a=compiled_for_b300, sm_120a=compiled_for_rtx)
    directory, done = compiled[target]
    assert done.returncode == 0, done.stdout + done.stderr
    assert f".target {target}" in (directory / f"{target}-both-ms_eden.ptx").read_text()

    # Registers, shared memory, spills, programs, warps, five kinds of instructions, all of them, ...
    rows = {name: columns.split()
            for name, columns in re.findall(r"^(\w+ ?\w*) +(\d+ +\d+ .*)", done.stdout, re.M)}
    forms = sorted(name.split()[0] for name in rows if name != "gemm ")
    assert forms == ["both", "emulated", "encode", "encode", "quantize", "quantize", "requantize"]
    assert float(rows["both ms_eden"][10]) <= both
    assert float(rows["requantize ms_eden"][10]) <= requantize
    assert max(int(columns[1]) for columns in rows.values()) <= shared

    # FP4 tensor cores have a GEMM, and a prediction.
    fp4 = target != "sm_90a"
    assert fp4 == ("PREDICTED" in done.stdout) == ("gemm " in rows)


if __name__ == "__main__":
    _, name, *words = sys.argv
    if name == "main":
        leave_main(pytest.MonkeyPatch())
        # Of --target=sm_103a, 103
        capability = int(words[-1].removesuffix("a").rpartition("_")[2])
        compile_reciprocals(capability)
    else:
        leave_only(pytest.MonkeyPatch(), name)
    sys.exit(bench.main(words))


# ---- What data/evidence/README.md tells of a first run -----------------------------------------------------

def test_the_long_account_has_the_times_of_the_first_run():
    evidence = Path(bench.__file__).parent
    account = (evidence / "README.md").read_text()
    records = [json.loads(line) for line in open(evidence / "results/first-run-h200.jsonl")]
    times = {}
    for record in records:
        if record["kind"] == "time":
            times.setdefault(record["op"], record)         # of the first shape
    values = 16384 * 4096

    def cells(op):
        r = times[op]
        share = r["bytes"] / r["seconds"] / r["copy_bandwidth"]
        return (f"{r['bytes'] / values:.2f} | {r['seconds'] * 1e6:.0f} | {share:.0%} | "
                f"{r['compiled'] / r['seconds']:.1f}")

    rows = re.findall(r"^\| ((?:quantize|both|requantize) \w+) \| (.*) \|$", account, re.M)
    assert len(rows) == 6
    for op, row in rows:
        assert row == f"{cells(op)} | {cells(op + ', decoded')}"

    layers = {r["recipe"]: r["seconds"] for r in records if r["kind"] == "layer"}
    bf16 = statistics.median(r["bf16"] for r in records if r["kind"] == "layer")
    row = " | ".join(f"{layers[recipe] / bf16 - 1:+.0%}" for recipe in layers if recipe != "bf16")
    assert f"| H200 | {bf16 * 1e3:.2f} ms | {row} |" in account

    # What a layer takes, and its parts: w is a quarter of x and dy.
    us = {op: 1e6 * r["seconds"] for op, r in times.items()}
    alone = (1.25 * (us["quantize four_six, decoded"] + us["requantize ms_eden, decoded"])
             + us["both ms_eden, decoded"])
    more = 1e6 * (layers["quartet2"] - bf16)
    assert f"they take {alone:.0f} us alone, w being a quarter of x and dy" in account
    assert f"the layer takes {more:.0f} us" in account
    gemms = {r["gemm"]: 1e6 * r["seconds"] for r in records if r["kind"] == "time of gemm"}
    assert f"one of decoded values takes {gemms['bf16, of decoded values']:.0f} us" in account
    assert f"{gemms['bf16']:.0f}, presumably" in account
    # How the GEMMs add that are here
    same = {}
    for gemm in "in float32", "emulated":
        told = [r for r in records if r["kind"] == "gemm" and "cancelling" in r["of"] and r["gemm"] == gemm]
        same[gemm] = sum(r["equal"]["fp4_matmul"] for r in told) / sum(r["outputs"] for r in told)
    assert f"there {same['in float32']:.0%} of" in account and same["emulated"] == 1
    assert not any(r["kind"] == "fault" or r.get("faults") for r in records)
