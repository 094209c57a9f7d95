"""Tests of train_gpt.py: what it computes. How runs are stopped, resumed and damaged: test_runs.py."""
import ast, dataclasses, json, math, os, pickle, resource, runpy, shutil, signal, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
import prepare, quartet, train_gpt
from quartet import RECIPES
from test_runs import result

ROOT = Path(train_gpt.__file__).parent
GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="PyTorch sees no GPU here")

@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request): return request.param

TINY = ("--layers=1 --width=128 --heads=2 --hidden=128 --sequence=32 --tokens_per_step=128 --eval_tokens=256 "
        "--sample_tokens=4 --log_every=1 --corpus=tiny --device=cpu --lr=3e-3 --name=a").split()
@pytest.fixture
def tiny(place): return lambda *args: train_gpt.main(["cpu", *TINY, *args])
def saved(name="a"): return torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)
def losses(name="a", key="loss"):
    return {r["step"]: r[key] for r in map(json.loads, open(f"runs/{name}/log.jsonl")) if key in r}

@pytest.mark.parametrize("preset, size", [
    ("30m", 30_482_560), ("50m", 49_556_736), ("100m", 102_777_856), ("200m", 203_188_480),     # the C4 runs'
    ("124m", (12 * 12 * 768 + 25) * 768), ("1.9b", 1_644_300_288)])  # nanoGPT's; 1.85e9 with embedding, head
def test_presets_have_the_sizes_of_the_paper(preset, size):
    with torch.device("meta"): model = train_gpt.GPT(train_gpt.Config(**train_gpt.PRESETS[preset]))
    assert sum(p.numel() for p in [*model.blocks.parameters(), *model.norm.parameters()]) == size

@pytest.mark.parametrize("recipe, zeros", [*((recipe, False) for recipe in RECIPES), ("quartet2", True)])
def test_twenty_steps_lower_the_loss_also_from_output_projections_of_zeros(tiny, monkeypatch, recipe, zeros):
    def initial(w, mean=0.0, std=1.0): w.data.normal_(mean, 0.0 if std == 0.01 else std)     # 0.02 / 2
    if zeros: monkeypatch.setattr(torch.nn.init, "normal_", initial)
    tiny(f"--layers={1 + zeros}", "--steps=20", f"--recipe={recipe}")
    assert sorted(losses()) == [*range(1, 21)] and losses()[20] < losses()[1] - 1.5  # from log 256 = 5.5 nats
    assert all(w.any() for w in saved()["model"].values())

@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tiny, monkeypatch, capsys, device, signum, code):
    tiny("--steps=8", "--name=straight", f"--device={device}")
    rate, interrupt = train_gpt.learning_rate, lambda i: i == 3 and signal.raise_signal(signum)  # in step 4
    monkeypatch.setattr(train_gpt, "learning_rate", lambda c, i: interrupt(i) or rate(c, i))
    with pytest.raises(SystemExit) as stop: tiny("--steps=8", f"--device={device}")
    assert stop.value.code == code and saved()["step"] == 4
    assert "python train_gpt.py resume runs/a" in capsys.readouterr().out
    with open("runs/a/log.jsonl", "a") as f: f.write('{"step": 9, "loss": -1.0}\n')      # a crash's, later
    train_gpt.main(["resume", "a"])
    assert losses() == losses("straight") and sorted(losses()) == [*range(1, 9)]
    a, b = ({**saved(name)["model"], **saved(name)["generators"][0]} for name in ("straight", "a"))
    assert all(torch.equal(a[k], b[k]) for k in a if a[k] is not None)

def test_data_order_is_a_function_of_seed_and_step(tiny, tmp_path):
    c = train_gpt.Config(sequence=8, batch=16, corpus="two", vocab_size=600, eval_tokens=64)
    for i, start in enumerate((0, 300)):                            # two shards of different tokens
        prepare.write_shard(tmp_path / f"two_train_{i:06d}.bin", np.arange(start, start + 200 + i))
    data, again = train_gpt.Shards(c, "train"), train_gpt.Shards(c, "train")
    x, y = data.random(c, 3, 1, "cpu")
    for other in ((c, 4, 1), (c, 3, 0), (dataclasses.replace(c, seed=2), 3, 1)):
        assert not torch.equal(x, data.random(*other, "cpu")[0])
    assert torch.equal(x, again.random(c, 3, 1, "cpu")[0]) and torch.equal(y, x + 1)  # no window of two
    x, y = data.at(np.arange(data.ends[-1]), "cpu")
    assert {*x.flatten().tolist(), *y.flatten().tolist()} == {*range(200), *range(300, 501)}
    assert [x.tolist() for x, _ in data.in_order(c, "cpu")] == [np.arange(64).reshape(8, 8).tolist()]

def test_losses_and_gradients_are_means_over_micro_batches_and_over_all_predicted_tokens(tiny):
    tiny("--steps=1", "--tokens_per_step=512", "--recipe=bf16")           # validates 2 batches of 4
    c = train_gpt.Config(**saved()["config"])
    torch.manual_seed(c.seed)
    model, data, val = train_gpt.GPT(c), train_gpt.Shards(c, "train"), train_gpt.Shards(c, "val")
    mean = sum(model(*data.random(c, 1, micro, "cpu")) for micro in range(4)) / 4
    mean.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip).item()
    model.load_state_dict(saved()["model"])
    windows = val.at(np.arange(8) * 32, "cpu")
    for found, expected in ((losses()[1], mean.item()), (losses(key="grad_norm")[1], norm),
                            (result()["val_loss"], model(*windows).item())):
        assert abs(found / expected - 1) < 1e-5                           # float32, added in another order

def test_the_model_is_causal_and_starts_as_the_paper_says():
    c = train_gpt.Config(layers=2, width=256, heads=2, hidden=256, sequence=32)
    model, tokens = train_gpt.GPT(c), torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))
    model.use_recipe("quartet2", "torch")
    same_until = (model(tokens) == model(tokens ^ (torch.arange(32) == 20))).all(-1)[0]
    assert same_until[:20].all() and not same_until[20:].any()
    block = model.blocks[1]
    for w, std in ((model.head.weight, 0.02), (block.down.weight, 0.01), (block.up.weight, 0.02)):
        assert abs(w.std().item() / std - 1) < 5 / (2 * w.numel())**0.5   # 0.02 / sqrt(2 layers): 5 sigma
    rates = [train_gpt.learning_rate(dataclasses.replace(c, steps=100, lr=1.0), i) for i in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)

def test_sampling_draws_by_seed_among_the_likeliest():
    c = train_gpt.Config(layers=1, width=128, heads=2, hidden=128, sequence=32, sample_tokens=50)
    torch.manual_seed(0)
    model = train_gpt.GPT(c)
    draw = lambda **knobs: [*train_gpt.sample(model, [1, 2], dataclasses.replace(c, **knobs), "cpu")]
    likeliest = model(torch.tensor([[1, 2]]))[0, -1].topk(3).indices.tolist()
    assert draw(temperature=0.0) == draw(temperature=1e-50) == draw(top_k=1)
    assert draw(temperature=0.0)[0] == likeliest[0]
    assert draw() == draw() != draw(seed=2) and draw(temperature=1e-3)[0] == likeliest[0]
    assert {draw(seed=s, top_k=3, temperature=9.0, sample_tokens=1)[0] for s in range(40)} == {*likeliest}

def test_compare_trains_on_equal_terms_and_eval_prints_each_forward(tiny, capsys):
    tiny("--steps=3", "--recipe=bf16,rtn,quartet2")
    table, stamp = Path("runs/a/compare.txt").read_text(), os.stat("runs/a/bf16/result.json").st_mtime_ns
    assert table in capsys.readouterr().out
    assert [row.split()[0] for row in table.splitlines()[1:]] == ["bf16", "rtn", "quartet2"]
    first = [losses(f"a/{recipe}")[1] for recipe in ("bf16", "rtn", "quartet2")]
    assert max(first) - min(first) < 0.02                                      # same weights, same data
    train_gpt.main(["resume", "a"])                                            # nothing is trained again
    assert os.stat("runs/a/bf16/result.json").st_mtime_ns == stamp
    train_gpt.main(["eval", "a/bf16", "--recipe=bf16,rtn,four_six"])
    rows = [line.replace(",", " ").split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [r[0] for r in rows] == ["bf16", "rtn", "four_six"] and rows[0][2] == "0.0000"
    assert abs(float(rows[0][1]) - result("a/bf16")["val_loss"]) < 1e-4
    assert all(abs(math.exp(float(r[1])) / float(r[3]) - 1) < 1e-3 for r in rows)
    train_gpt.main(["eval", "a/bf16"])                                         # by all
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["forward", *RECIPES]

def test_knobs_keep_blocks_and_the_last_steps_in_bf16(tiny, monkeypatch):
    seen, forward = [], train_gpt.GPT.forward
    recipes = lambda model: [getattr(b.qkv, "recipe", "bf16") for b in model.blocks]
    monkeypatch.setattr(train_gpt.GPT, "forward", lambda m, *a: seen.append(recipes(m)) or forward(m, *a))
    tiny("--layers=2", "--bf16_blocks=1", "--bf16_end=0.5", "--steps=4", "--eval_every=9")
    assert seen[:4] == [["quartet2", "bf16"]] * 2 + [["bf16", "bf16"]] * 2

@pytest.mark.parametrize("args, message", [
    ("--recipe=quartet", "unknown recipe 'quartet'.*did you mean 'quartet2'"), ("--steps", "needs a value"),
    ("--recipes=bf16", "unknown knob --recipes: did you mean 'recipe'"), ("--steps=many", "steps=many.*int"),
    ("30M", "unknown preset '30M'.*30m"), ("--steps=0", "be from 1"), ("--backend=cuda", "auto, torch"),
    ("--width=130", "multiple of twice the heads"), ("--batch=3", "of 96, processes x batch x sequence"),
    ("cpu gpu", "takes one word, a preset"), ("eval", "or else a run"), ("resume none", "no checkpoint"),
    ("--init_from=none", "no checkpoint of none"), ("--prompt=\udce9", "--prompt.*UTF-8"),
    ("--corpus=none", r"none_train_\*.bin.*python data/prepare.py none"),
    ("--vocab_size=100", "token 122, beyond"), ("--hidden=96", r"blocks.0.up\(128, 192\).*out_features % 128"),
    ("--sequence=4096 --tokens_per_step=16384", "too few for --sequence=4096"),
    ("--name=taken", "runs/taken exists.*another"), ("--name=../a", "name='../a': it takes letters"), ("--name=two\nlines", "it takes letters"),
    ("--name=/a", "it takes letters"), ("--shard=true", "shard.*torchrun")])
def test_mistakes_get_one_line_that_names_the_value_and_the_way_out(tiny, args, message):
    os.makedirs("runs/taken")
    with pytest.raises(train_gpt.UserError, match=message) as error:
        train_gpt.main([*TINY, *args.split(" ")])
    assert "\n" not in str(error.value) and [*Path("runs").rglob("*")] == [Path("runs/taken")]

def test_checkpoints_are_whole_or_not_there_and_the_last_two_are_kept(tiny, monkeypatch):
    tiny("--steps=6", "--name=straight")
    tiny("--steps=6", "--save_every=2", "--sample_tokens=1")
    new, old, log = (Path(f"runs/a/{name}") for name in (*train_gpt.CHECKPOINTS, "log.jsonl"))
    assert torch.load(old, weights_only=True)["step"] == 4 and saved()["step"] == 6
    whole = new.read_bytes()
    new.write_bytes(whole[:9999] + bytes([whole[9999] ^ 1]) + whole[10000:])                # one bit
    with pytest.raises(train_gpt.UserError, match="not a whole checkpoint: remove it, and previous.pt"):
        train_gpt.main(["resume", "a"])
    new.unlink()                                                         # as if stopped between two renames, too
    log.write_text(log.read_text() + '{"step": 7, "lo')                  # torn
    train_gpt.main(["resume", "a"])
    assert losses() == losses("straight") and torch.load(old, weights_only=True)["step"] == 4
    a, b = (saved(name)["model"] for name in ("a", "straight"))
    assert all(torch.equal(a[k], b[k]) for k in b)
    shutil.copy(old, new)
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), new.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))        # as if the disk were full
    try:
        with pytest.raises(train_gpt.UserError, match="cannot write runs/a/.*too large.*make room"):
            train_gpt.main(["resume", "a"])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert new.read_bytes() == before and not Path("runs/a/checkpoint.pt.part").exists()

def test_a_loss_that_is_not_finite_leaves_a_good_checkpoint_and_bad_ones_are_never_executed(tiny, tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "hacked"),)
    with pytest.raises(train_gpt.UserError, match="10 steps in a row.*first: .*--lr"):
        tiny("--lr=1e25", "--steps=12", "--save_every=1")
    assert saved()["step"] == 1 and all(w.isfinite().all() for w in saved()["model"].values())
    whole = (path := Path("runs/a/checkpoint.pt")).read_bytes()
    torch.save({"model": {}}, "other.pt"), torch.save([1], "list.pt")
    for content, args, message in (
            (whole[:-1000], "sample a", "not a whole"), (b"", "sample a", "not a whole checkpoint"),
            (pickle.dumps(Evil(), protocol=2), "sample a", "not a whole checkpoint"),
            (Path("other.pt").read_bytes(), "sample a", "not written by"),
            (Path("list.pt").read_bytes(), "sample a", "not written by"),
            (whole, "eval a --layers=2", r"a run keeps what .*: --layers=2 \(saved: 1\)")):
        path.write_bytes(content)
        with pytest.raises(train_gpt.UserError, match=message): train_gpt.main(args.split())
    assert not (tmp_path / "hacked").exists()

def test_names_are_unique_help_is_whole_and_without_a_c_compiler_nothing_compiles(tiny, monkeypatch, capsys):
    assert len({train_gpt.new_directory(train_gpt.Config(), "cpu") for _ in range(3)}) == 3
    train_gpt.main(["--help"])
    text, knobs = capsys.readouterr().out, [f"{f.name}: " for f in dataclasses.fields(train_gpt.Config)]
    assert all(word in text for word in [*knobs, *train_gpt.PRESETS, *RECIPES])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert train_gpt.pick_device(train_gpt.Config(compile="on", device="cpu")) == ("cpu", False)
    assert "no C compiler" in capsys.readouterr().out

@needs_gpu
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "bf16"])
def test_both_backends_train_to_the_same_bits_where_rotations_are_exact(tiny, recipe, monkeypatch):
    monkeypatch.setattr(quartet, "rotation_from", lambda name, d: (torch.eye(128, device=d.device), 1))
    for name in "torch", "triton":                                       # 50 steps of the 30m preset
        knobs = dict(recipe=recipe, backend=name, name=name, batch=4, tokens_per_step=2048, steps=50,
                     device="cuda", compile="off")
        train_gpt.main(["30m", *TINY[6:], *(f"--{knob}={value}" for knob, value in knobs.items())])
    assert losses("torch") == losses("triton") and losses("torch")[50] < losses("torch")[1] - 1

def test_the_three_files_import_nothing_of_data_and_each_other_only():
    top = {p.stem for p in ROOT.glob("*.py")}
    below = {p.stem for p in (ROOT / "data").rglob("*.py")} - {"conftest"}
    assert not {"launch", "files"} & (top | below)
    allowed = {"quartet": {"kernels"}, "kernels": {"quartet"}, "train_gpt": {"quartet"}}
    for name, others in allowed.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert imported & (top | below | {"data"}) <= others

def test_scripts_import_the_three_files_and_one_sibling_and_put_the_root_first():
    scripts = [*(ROOT / "data").glob("*.py"), *(ROOT / "data/evidence").glob("*.py")]
    for path in scripts:
        source = path.read_text()
        siblings = {p.stem for p in scripts} - {path.stem}
        imported = {alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names}
        assert len(imported & siblings) <= 1, path
        if {"quartet", "train_gpt", "kernels"} & imported:
            up = len(path.relative_to(ROOT).parts) - 1
            assert source.count("sys.path") == 1 and "sys.path.insert(0, " in source and f"parents[{up}]" in source, path

def test_a_layer_that_a_fork_made_plain_stays_plain_when_recipes_switch(tiny, monkeypatch, capsys):
    made, seen, forward = train_gpt.Block.__init__, [], train_gpt.GPT.forward
    def fork(block, c, quantized):
        made(block, c, quantized)
        block.out = torch.nn.Linear(c.width, c.width, bias=False)
    def note(model, *tokens):
        block = model.blocks[0]
        seen.append((type(block.out), block.qkv.recipe))
        return forward(model, *tokens)
    monkeypatch.setattr(train_gpt.Block, "__init__", fork)
    monkeypatch.setattr(train_gpt.GPT, "forward", note)
    tiny("--steps=2", "--bf16_end=0.5", "--recipe=rtn")
    assert "rtn, in 3 linear layers" in capsys.readouterr().out
    train_gpt.main(["eval", "a", "--recipe=rtn,nvidia"])
    train_gpt.main(["sample", "a", "--recipe=four_six"])
    assert {kind for kind, _ in seen} == {torch.nn.Linear}
    assert dict.fromkeys(recipe for _, recipe in seen) == dict.fromkeys(["rtn", "bf16", "rtn", "nvidia", "four_six"])

@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "AdamW"])
def test_any_optimizer_skips_a_step_without_a_finite_gradient_and_groups_keep_their_learning_rates(tiny, monkeypatch, kind):
    def make(model, c):
        groups = [dict(params=[*model.blocks.parameters()]), dict(params=[*model.head.parameters()], lr=0.5 * c.lr)]
        return getattr(torch.optim, kind)(groups, lr=c.lr)
    predict, calls, rates = train_gpt.GPT.predict, [], []
    def spoiled(model, x, targets):
        calls.append(model.blocks[0].up.weight.detach().clone())
        return predict(model, x, targets) * (math.nan if len(calls) == 3 else 1)
    update = train_gpt.update
    def noting(optimizer, norm):
        rates.append([group["lr"] for group in optimizer.param_groups])
        update(optimizer, norm)
    monkeypatch.setattr(train_gpt, "make_optimizer", make)
    monkeypatch.setattr(train_gpt.GPT, "predict", spoiled)
    monkeypatch.setattr(train_gpt, "update", noting)
    tiny("--steps=5", "--batch=4", "--recipe=bf16", "--save_every=4")
    same = [torch.equal(a, b) for a, b in zip(calls[:4], calls[1:5])]
    assert same == [False, False, True, False]
    c = train_gpt.Config(**saved()["config"])
    expected = [[train_gpt.learning_rate(c, i), 0.5 * train_gpt.learning_rate(c, i)] for i in range(5)]
    assert rates == expected
    os.replace("runs/a/previous.pt", "runs/a/checkpoint.pt")                   # of step 4
    train_gpt.main(["resume", "a"])
    assert rates[5:] == expected[4:]

def test_a_new_run_starts_from_the_weights_of_another_with_its_own_schedule_and_recipe(tiny):
    tiny("--steps=3", "--recipe=bf16", "--name=old")
    tiny("--steps=4", "--recipe=rtn", "--init_from=old", "--lr=1e-9", "--save_every=1")
    old, new = saved("old")["model"], saved("a")["model"]
    assert all((old[k] - new[k]).abs().max() < 1e-7 for k in old) and saved()["step"] == 4
    assert losses("a")[1] < losses("old")[1] - 0.1 and saved()["config"]["init_from"] == "old"
    shutil.rmtree("runs/old")                                   # it goes on without
    os.replace("runs/a/previous.pt", "runs/a/checkpoint.pt")
    train_gpt.main(["resume", "a"])
    assert saved()["step"] == 4
    for knobs in ["--layers=2"], ["--width=256"], ["--heads=1"]:
        with pytest.raises(train_gpt.UserError, match=f"weights of a have another shape: {knobs[0]}.*saved"):
            tiny("--name=b", "--init_from=a", *knobs)
        assert not Path("runs/b").exists()

@pytest.mark.parametrize("header, rest", [((), b""), ((0, 0, 0), b""), ((20240520, 2, 0), b""), ((20240520, 1, 3), b"12345")])
def test_a_damaged_shard_is_named(tiny, header, rest):
    whole = np.array([*header, *[0] * 253] * bool(header), "<i4")
    Path("tiny_val_000000.bin").write_bytes(whole.tobytes() + rest)
    with pytest.raises(train_gpt.UserError, match="tiny_val_000000.bin is no whole shard.*delete it"): tiny("--steps=1")

def test_a_failed_start_leaves_the_name_free(tiny, monkeypatch):
    def full(*args): raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")
    with monkeypatch.context() as m:
        m.setattr(train_gpt, "build", full)
        for recipe in "bf16", "bf16,rtn":
            with pytest.raises(train_gpt.UserError, match="too little memory, try a smaller --batch"):
                tiny("--steps=1", f"--recipe={recipe}")
            assert not Path("runs/a").exists()
    tiny("--steps=1")

def test_packages_of_the_same_names_elsewhere_are_not_imported(place):
    for name in ("launch", "files", "data", "prepare", "perplexity", "demonstrate", "train_gpt", "quartet", "kernels"):
        (place / "other" / name).mkdir(parents=True)
        (place / "other" / name / "__init__.py").write_text("raise SystemExit(f'the other {__name__}')")
    environment = os.environ | dict(PYTHONPATH=str(place / "other"), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    def run(*words): return subprocess.run([sys.executable, *map(str, words)], cwd=place, env=environment,
                                           capture_output=True, text=True)
    done = run(ROOT / "train_gpt.py", "cpu", *TINY, f"--corpus={place}/tiny", "--steps=1")
    assert done.returncode == 0 and "step 1/1" in done.stdout, done.stderr
    assert "no row 'nosuch'" in run(ROOT / "data/evidence/figures.py", "--base=nosuch").stderr
    assert run(ROOT / "data/evidence/experiments.py", "--help").returncode == 0
    code = f"import sys; sys.path[0] = {str(ROOT / 'data')!r}; import perplexity, quartet; print(quartet.load_kernels())"
    assert run("-c", code).stdout == "None\n"

@pytest.mark.parametrize("error", [ValueError("too many values to unpack"), RuntimeError("integer overflow, cannot allocate")])
def test_a_forks_own_bug_keeps_its_traceback(tiny, monkeypatch, error):
    def broken(*args, **knobs): raise error
    for name in "Linear", "quantized_weights":
        with monkeypatch.context() as m:
            m.setattr(quartet, name, broken)
            m.setattr(sys, "argv", ["train_gpt.py", "cpu", *TINY, f"--corpus={Path.cwd()}/tiny", "--steps=1"])
            with pytest.raises(type(error)) as shown: runpy.run_path(train_gpt.__file__, run_name="__main__")
            assert shown.value is error
        shutil.rmtree("runs/a", ignore_errors=True)
