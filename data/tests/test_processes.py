"""Tests of train_gpt.py with two processes on a CPU: the same training as with one, and the same again."""
import gc, json, os, re, shutil, signal, socket, subprocess, sys, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import numpy as np
import pytest
import torch
import prepare, quartet, train_gpt

KNOBS = dict(layers=1, width=128, heads=1, hidden=128, sequence=32, batch=1, tokens_per_step=128, steps=6,
             lr=3e-3, eval_every=3, eval_tokens=64, save_every=3, sample_tokens=1, device="cpu",
             corpus="tiny", log_every=1)

def run(name, processes, *arguments, instead=None, **knobs):
    """Train in forked processes, as torchrun would start them -> their exit statuses, by rank.

    arguments of train_gpt.py, or KNOBS and knobs; instead: what rank 1 calls instead of Shards.random.
    """
    arguments = arguments or ("cpu", *(f"--{k}={v}" for k, v in (KNOBS | dict(name=name) | knobs).items()))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1]: continue
        status = 1
        try:
            train_gpt.RANK, train_gpt.WORLD = rank, processes
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port)
            os.dup2(os.open(f"{name}-{rank}.out", os.O_WRONLY | os.O_CREAT), 1)
            torch.set_num_threads(1)
            if instead and rank == 1: train_gpt.Shards.random = instead
            train_gpt.main(list(arguments))
            status = 0
        except SystemExit as e: status = e.code
        except BaseException: traceback.print_exc()
        finally: os._exit(status)
    return [os.waitpid(pid, 0)[1] for pid in pids]

def the_model(): return next(m for m in gc.get_objects() if isinstance(m, train_gpt.GPT))
def fail(*arguments): raise ValueError("broken on purpose")
def stop(data, c, step, micro, device, random=train_gpt.Shards.random):
    if step == 4 and micro == 1: signal.raise_signal(signal.SIGTERM)
    return random(data, c, step, micro, device)
def spoil(data, c, step, micro, device, random=train_gpt.Shards.random):
    the_model().blocks[0].up.weight.data[0, 0] = float("nan")   # of rank 1 alone
    return random(data, c, step, micro, device)
def accumulate(data, c, step, micro, device, random=train_gpt.Shards.random):
    """Between micro-batches a process has its half of each gradient, and no whole ones."""
    if micro > 0:
        model = the_model()
        sizes = [(p.grad.to_local().numel(), p.numel()) for p in model.parameters() if p.dim() == 2]
        assert sizes and all(2 * part == whole for part, whole in sizes)
    return random(data, c, step, micro, device)

def main():
    """Every run that the tests look at, from one process: its imports take longer than a run."""
    tokens = np.random.default_rng(0).integers(32, 64, 4096, np.uint16)
    for split in "train", "val": prepare.write_shard(Path(f"tiny_{split}_000000.bin"), tokens)
    train_gpt.DATA, train_gpt.DAMPEN_EVERY = Path.cwd(), 6
    for name, processes, shard in ("one", 1, "false"), ("two", 2, "false"), ("shared", 2, "true"):
        for recipe in "bf16", "quintet":
            assert not any(run(f"{name}-{recipe}", processes, recipe=recipe, shard=shard))
        if processes == 2:                                  # go on from step 3 of 6
            Path(f"runs/{name}-resumed").mkdir()
            shutil.copy(f"runs/{name}-quintet/previous.pt", f"runs/{name}-resumed/checkpoint.pt")
            assert not any(run(f"{name}-resumed", 2, "resume", f"{name}-resumed"))
    train_gpt.DAMPEN_EVERY = 7
    assert not any(run("undampened", 2, recipe="quintet", shard="true"))
    Path("runs/fewer").mkdir()
    shutil.copy("runs/shared-bf16/previous.pt", "runs/fewer/checkpoint.pt")
    assert all(run("fewer", 1, "resume", "fewer"))
    assert not any(run("started", 1, recipe="bf16", init_from="shared-bf16", lr=1e-9))
    assert not any(run("compared", 2, recipe="bf16,rtn", steps=2))
    assert not any(run("accumulated", 2, instead=accumulate, recipe="bf16", shard="true", steps=2))
    assert all(run("spoil", 2, instead=spoil, steps=11))
    statuses = [run(f.__name__, 2, instead=f) for f in (fail, stop)]
    Path("statuses").write_text(json.dumps(statuses))

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("launch")
    done = subprocess.run([sys.executable, __file__], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "broken on purpose" in done.stderr
    assert len(re.findall("first: the weight of blocks.0.up", done.stderr)) == 2    # by rank 1
    assert "--shard=true needs several processes" in done.stderr                    # fewer
    return place

def checkpoint(place, name):
    return torch.load(place / "runs" / name / "checkpoint.pt", weights_only=True)
def losses(place, name):
    records = [json.loads(line) for line in open(place / "runs" / name / "log.jsonl")]
    return torch.tensor([r.get("loss", r.get("val_loss")) for r in records if "loss" in r or "val_loss" in r])

@pytest.mark.parametrize("name", ["two", "shared"])
def test_two_processes_train_as_one_does(place, name):
    one, two = (losses(place, f"{n}-bf16") for n in ("one", name))
    assert len(one) == len(two) == 8 and (one - two).abs().max() < 1e-5    # float32 sums in another order
    a, b = (checkpoint(place, f"{n}-bf16") for n in ("one", name))
    for p, q in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert p["step"] == q["step"] == 6 and all(p[k].shape == q[k].shape for k in p)
        assert (p["exp_avg"] - q["exp_avg"]).norm() < 1e-3 * p["exp_avg"].norm()
    one, two = (losses(place, f"{n}-quintet") for n in ("one", name))     # here noise differs
    assert 0 < (one - two).abs().max() < 0.02

@pytest.mark.parametrize("name", ["two", "shared"])
def test_a_resumed_run_is_the_same_to_the_bit_with_noise_of_its_own_in_each_process(place, name):
    a, b = (checkpoint(place, f"{name}-{n}") for n in ("quintet", "resumed"))
    assert a["step"] == b["step"] == 6 and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for i, p in a["optimizer"]["state"].items():
        assert all(torch.equal(p[k], b["optimizer"]["state"][i][k]) for k in p)
    assert len(a["generators"]) == 2
    assert not torch.equal(a["generators"][0]["cpu"], a["generators"][1]["cpu"])
    assert all(torch.equal(p["cpu"], q["cpu"]) for p, q in zip(a["generators"], b["generators"]))

def test_one_process_starts_from_the_weights_of_two(place):
    a, b = (checkpoint(place, name)["model"] for name in ("shared-bf16", "started"))
    assert all((a[k] - b[k]).abs().max() < 1e-7 for k in a)

def test_shards_of_weights_are_dampened(place):
    before, after = (checkpoint(place, name)["model"] for name in ("undampened", "shared-quintet"))
    lr = train_gpt.learning_rate(train_gpt.Config(**KNOBS), 5)
    for name, w in before.items():
        values = quartet.on_grid(w.bfloat16(), "quintet").float() if ".0" in name and w.dim() == 2 else w
        assert torch.equal(after[name], torch.lerp(w, values, torch.tensor(10 * 6 * lr)))

def test_only_rank_0_prints_and_writes(place):
    for name in "two-quintet", "shared-quintet":
        out = (place / f"{name}-0.out").read_text()
        assert out.count("step 6/6") == 1 and "2 x CPU" in out and "of 128 tokens, 1 x 32 in a process" in out
        assert (place / f"{name}-1.out").read_text() == ""
        names = {p.name for p in (place / "runs" / name).iterdir()}
        assert names == {"log.jsonl", "checkpoint.pt", "previous.pt", "result.json", "sample.txt"}
    assert "gap to bf16" in (place / "compared-0.out").read_text()
    assert len((place / "runs/compared/compare.txt").read_text().splitlines()) == 3

def test_a_process_that_fails_ends_the_others_and_one_that_gets_a_signal_stops_them_all_at_one_step(place):
    failed, stopped = json.loads((place / "statuses").read_text())
    assert all(failed) and stopped == [0, 0]
    assert checkpoint(place, "stop")["step"] == 4 and len(losses(place, "stop")) == 5       # 4 and 1 of val
    said = (place / "stop-0.out").read_text()
    assert "go on: torchrun --nproc_per_node=2 train_gpt.py resume runs/stop" in said

def test_one_process_reads_what_two_have_written(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(train_gpt, "DATA", place)
    train_gpt.main(["eval", "shared-bf16", "--recipe=bf16"])
    assert abs(float(capsys.readouterr().out.splitlines()[-1][12:21]) - losses(place, "one-bf16")[-1]) < 1e-4

def test_the_documented_command_works_and_what_needs_several_processes_says_so(tmp_path):
    words = [f"--{k}={v}" for k, v in (KNOBS | dict(steps=1, corpus="python")).items()]
    script = str(ROOT / "train_gpt.py")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", script, "cpu", *words]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and done.stdout.count("step 1/1") == 1, done.stderr

def test_memory_that_a_graph_keeps_is_counted():
    if not torch.cuda.is_available(): pytest.skip("PyTorch sees no GPU here")   # before: `run` cannot fork
    x = torch.ones(2**26, device="cuda")                        # 0.25 GiB
    torch.cuda.reset_peak_memory_stats()
    replay = train_gpt.as_graph(lambda x: x.add(1).mul(2).sum(), x)     # three more, two of them in the graph
    held = [torch.ones(2**28, device="cuda")]                   # 1, beside them
    replay(x)
    assert train_gpt.peak_memory("cuda") >= 2

def test_the_peak_is_that_of_the_card(monkeypatch):
    for name, peak in ("H100 80GB HBM3", 989e12), ("H100 PCIe", 756e12), ("H200 NVL", 835e12), ("T4", 0):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"NVIDIA {name}")
        assert train_gpt.describe("cuda") == (f"NVIDIA {name}", peak)

if __name__ == "__main__": main()
