"""Tests of train_gpt.py with two processes on a CPU: the same training as with one, and the same again."""
import contextlib
import dataclasses
import gc
import os
import pickle
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from background import in_background, python, start
from small_runs import ROOT, WRITING, checkpoint, records, same, words, write_corpus
import quartet
import train_gpt

pytest_plugins = ["background"]
KNOBS = dict(batch=1, tokens_per_step=128, steps=6, eval_every=3, save_every=3, sample_tokens=1, log_every=1)
PATIENCE = 1800      # seconds after which what waits for ever is ended; a machine may be slow


# ---- The runs, all from one process, whose imports take longer than a run: this file as a script -----------
#
# Nothing here asks for a GPU before the forks: after that PyTorch has none in a fork, and fails.

def be_a_process(rank, processes, port, name, command, random):
    """What a forked process does: it is one of those that torchrun starts, prints to a file, and ends."""
    status = 1
    signal.alarm(PATIENCE)      # a process that waits for the other for ever is ended
    try:
        train_gpt.RANK = rank
        train_gpt.WORLD = processes
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.dup2(os.open(f"{name}-{rank}.out", os.O_WRONLY | os.O_CREAT), 1)
        sys.stdout.reconfigure(line_buffering=True)      # os._exit, below, writes nothing that is left
        if random and rank == 1:
            train_gpt.Shards.random = random
        train_gpt.main(command)
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@contextlib.contextmanager
def free_port():
    """A port that within this goes to no other program, but to one that is told it and listens there.

    Both reuse addresses, as PyTorch's stores do, and this socket never listens: so they do not collide.
    """
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", 0))
        yield s.getsockname()[1]


def run(name, processes, command=None, random=None, **knobs):
    """Train in forked processes -> their exit statuses, by rank.

    command: arguments of train_gpt.py, or else knobs are. random: what rank 1 calls for Shards.random.
    """
    command = command or words(**KNOBS | dict(name=name) | knobs)
    children = []
    with free_port() as port:
        for rank in range(processes):
            child = os.fork()
            if not child:
                be_a_process(rank, processes, str(port), name, command, random)
            children.append(child)
        return [os.waitpid(child, 0)[1] for child in children]


def resume_from_step_3(name, other, processes):
    """Go on, in a run of its own, from the checkpoint before the last of another -> exit statuses."""
    Path("runs", name).mkdir()
    train_gpt.copy(Path(f"runs/{other}/previous.pt"), Path(f"runs/{name}/checkpoint.pt"))
    return run(name, processes, ["resume", name])


RANDOM = train_gpt.Shards.random


def the_model():
    return next(m for m in gc.get_objects() if isinstance(m, train_gpt.GPT))


def fail(*arguments):
    raise ValueError("broken on purpose")


def stop(data, step, micro):
    """A signal comes to rank 1 in the last micro-batch of step 4."""
    if step == 4 and micro == 1:
        signal.raise_signal(signal.SIGTERM)
    return RANDOM(data, step, micro)


def die(data, step, micro):
    """Rank 1 is killed in step 4."""
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return RANDOM(data, step, micro)


def spoil(data, step, micro):
    """A weight of rank 1 alone, or of its share of the weights, is not finite."""
    weight = the_model().blocks[0].up.weight
    getattr(weight, "to_local", weight.detach)().detach()[0, 0] = float("nan")
    return RANDOM(data, step, micro)


def accumulate(data, step, micro):
    """Between micro-batches a process has its half of each gradient, and no whole ones."""
    if micro > 0:
        matrices = [p for p in the_model().parameters() if p.dim() == 2]
        assert matrices
        assert all(2 * p.grad.to_local().numel() == p.numel() for p in matrices)
    return RANDOM(data, step, micro)


def main():
    # To make an optimizer imports this, which takes seconds. Imported here, it is there in each fork.
    import torch._dynamo
    write_corpus(Path.cwd())
    KNOBS["corpus"] = Path.cwd() / "tiny"

    # One process; two, each with all weights; two that share them. Each by a recipe without noise and by one
    # with noise, which dampens after the last step.
    train_gpt.DAMPEN_EVERY = 6
    for name, processes, shard in [("one", 1, "false"), ("two", 2, "false"), ("shared", 2, "true")]:
        for recipe in ("bf16", "quintet"):
            assert not any(run(f"{name}-{recipe}", processes, recipe=recipe, shard=shard))

    # What goes on from them: the same, also without dampening; with fewer processes, and with more; a new run
    # from the weights.
    for name in ("two", "shared"):
        assert not any(resume_from_step_3(f"{name}-resumed", f"{name}-quintet", 2))
    train_gpt.DAMPEN_EVERY = 7
    assert not any(resume_from_step_3("undampened", "shared-quintet", 2))
    assert not any(resume_from_step_3("fewer", "two-bf16", 1))
    assert not any(resume_from_step_3("more", "shared-bf16", 4))
    assert not any(resume_from_step_3("more-noise", "shared-quintet", 4))
    assert all(resume_from_step_3("alone", "shared-bf16", 1))
    assert not any(run("started", 1, recipe="bf16", init_from="shared-bf16", lr=1e-9))

    # Muon
    for name, processes, shard in [("one", 1, "false"), ("two", 2, "false"), ("shared", 2, "true")]:
        assert not any(run(f"muon-{name}", processes, recipe="bf16", optimizer="muon", lr=0.02, shard=shard))
    assert not any(resume_from_step_3("muon-resumed", "muon-shared", 2))

    # Comparisons; gradients between micro-batches; then what goes wrong in rank 1 alone.
    assert not any(run("compared", 2, recipe="bf16,rtn", steps=2))
    assert all(run("diverged", 2, recipe="bf16,rtn", steps=11, lr=1e30))
    assert not any(run("accumulated", 2, random=accumulate, recipe="bf16", shard="true", steps=2))
    for shard in ("false", "true"):
        assert all(run(f"spoil-{shard}", 2, random=spoil, recipe="bf16", steps=11, shard=shard))
    assert all(run("fail", 2, random=fail))
    assert all(run("die", 2, random=die, recipe="bf16"))
    assert run("stop", 2, random=stop, recipe="bf16") == [0, 0]


# ---- The tests ---------------------------------------------------------------------------------------------

@in_background
def runs_of_processes(directory):
    """Directory, what the script has said, exit statuses of two machines: see on_two_machines."""
    done = python(__file__, cwd=directory)
    statuses = []
    if done.returncode == 0:
        statuses = two_machines(directory)
    return directory, done, statuses


@pytest.fixture
def trained(runs_of_processes, monkeypatch):
    """The working directory is where the runs are -> what they have said on stderr."""
    directory, done, _ = runs_of_processes
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(directory)
    return done.stderr


def losses(run):
    """In training and, where it validates, in validation, in the order of its log."""
    keys = ("loss", "val_loss")
    return torch.tensor([record[key] for record in records(run) for key in keys if key in record])


@pytest.mark.parametrize("name", ["two", "shared"])
def test_two_processes_train_as_one_does(trained, name):
    # Float32 sums in another order, no more
    one = losses("one-bf16")
    two = losses(f"{name}-bf16")
    assert len(one) == len(two) == 8
    assert (one - two).abs().max() < 1e-5
    one = checkpoint("one-bf16")["optimizer"]["state"]
    two = checkpoint(f"{name}-bf16")["optimizer"]["state"]
    assert one.keys() == two.keys()
    for weight, a in one.items():
        b = two[weight]
        assert a["step"] == b["step"] == 6
        assert all(a[key].shape == b[key].shape for key in a)
        assert (a["exp_avg"] - b["exp_avg"]).norm() < 1e-3 * a["exp_avg"].norm()

    # Here noise differs.
    assert 0 < (losses("one-quintet") - losses(f"{name}-quintet")).abs().max() < 0.02


@pytest.mark.parametrize("name", ["two", "shared"])
def test_a_resumed_run_is_the_same_to_the_bit_with_noise_of_its_own_in_each_process(trained, name):
    straight = checkpoint(f"{name}-quintet")
    resumed = checkpoint(f"{name}-resumed")
    assert straight["step"] == resumed["step"] == 6
    assert same(straight["model"], resumed["model"])
    moments = resumed["optimizer"]["state"]
    assert all(same(state, moments[i]) for i, state in straight["optimizer"]["state"].items())

    # The states of the generators, by rank
    first, second = [generator["cpu"] for generator in straight["generators"]]
    first_again, second_again = [generator["cpu"] for generator in resumed["generators"]]
    assert not torch.equal(first, second)
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)


def test_a_run_goes_on_with_fewer_or_more_processes_on_the_same_data_with_other_noise(trained):
    for name, before, processes in [("fewer", "two-bf16", 1), ("more", "shared-bf16", 4)]:
        assert (losses(name) - losses(before)).abs().max() < 1e-5
        assert f"2 processes before, {processes} now" in Path(f"{name}-0.out").read_text()
    assert len(list(Path("runs/more/checkpoint.pt").glob("*.distcp"))) == 4

    # No process draws what another, or one of those before, has drawn.
    assert 0 < (losses("more-noise") - losses("shared-quintet")).abs().max() < 0.02
    saved = [checkpoint("more-noise")["generators"], checkpoint("shared-quintet")["generators"]]
    states = [generator["cpu"] for generators in saved for generator in generators]
    assert len({bytes(state.numpy()) for state in states}) == 4 + 2


def test_muon_in_two_processes_moves_as_in_one_and_goes_on_to_the_same_bits(trained):
    # Newton and Schulz iterate in bf16.
    for name in ("two", "shared"):
        assert (losses("muon-one") - losses(f"muon-{name}")).abs().max() < 0.01
    assert same(checkpoint("muon-shared")["model"], checkpoint("muon-resumed")["model"])


def test_one_process_starts_from_the_weights_of_two(trained):
    before = checkpoint("shared-bf16")["model"]
    after = checkpoint("started")["model"]
    assert all((before[name] - after[name]).abs().max() < 1e-7 for name in before)


def test_shards_of_weights_are_dampened(trained):
    before = checkpoint("undampened")["model"]
    after = checkpoint("shared-quintet")["model"]
    c = train_gpt.Config(**checkpoint("shared-quintet")["config"])
    share = torch.tensor(6 * train_gpt.learning_rate(c, 5))      # of 6 steps, and t = T
    for name, w in before.items():
        values = w
        if name.startswith("blocks.0") and w.dim() == 2:
            values = quartet.on_grid(w.bfloat16(), "quintet").float()
        assert torch.equal(after[name], torch.lerp(w, values, 10 * share))


def test_only_rank_0_prints_and_writes(trained):
    for name in ("two-quintet", "shared-quintet"):
        said = Path(f"{name}-0.out").read_text()
        assert said.count("step 6/6") == 1
        assert "2 x CPU" in said
        assert "of 128 tokens, 1 x 32 in a process" in said
        assert Path(f"{name}-1.out").read_text() == ""
        files = {path.name for path in Path("runs", name).iterdir()}
        assert files == {"log.jsonl", "checkpoint.pt", "previous.pt", "result.json", "sample.txt"}
    assert "gap to bf16" in Path("compared-0.out").read_text()
    assert len(Path("runs/compared/compare.txt").read_text().splitlines()) == 3


def test_a_recipe_that_diverges_does_not_end_the_others_of_a_comparison(trained):
    table = Path("runs/diverged/compare.txt").read_text().splitlines()
    assert [line.split()[:3] for line in table[1:]] == [["bf16", "nan", "nan"], ["rtn", "nan", "nan"]]
    assert trained.count("Diverged: runs/diverged: bf16, rtn has no finite validation loss") == 2


def test_a_process_that_fails_ends_the_others_and_one_that_gets_a_signal_stops_them_all_at_one_step(trained):
    assert "broken on purpose" in trained
    assert trained.count("UserError: another process of this run has ended, see what it says") >= 2

    # A weight that is not finite in rank 1 alone ends both, in each of two runs.
    assert trained.count("Diverged: step 10: 10 steps in a row had no finite gradient") == 4

    # 4 losses of training and 1 of validation.
    assert checkpoint("stop")["step"] == 4
    assert len(losses("stop")) == 5
    command = "torchrun --nproc_per_node=2 train_gpt.py resume runs/stop"
    assert f"go on: {command}" in Path("stop-0.out").read_text()


def test_one_process_reads_what_two_have_written(trained, capsys):
    assert "--shard=true needs several processes" in trained      # to train on, unlike to evaluate
    train_gpt.main(["eval", "shared-bf16", "--recipe=bf16"])
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert abs(float(row[1]) - losses("one-bf16")[-1]) < 1e-4


# ---- Checkpoints that are directories ----------------------------------------------------------------------

@pytest.fixture
def parts(trained, tmp_path, monkeypatch):
    """A copy of the run shared-bf16 in the working directory, which can be evaluated -> its checkpoint."""
    shutil.copytree("runs/shared-bf16", tmp_path / "runs/shared-bf16")
    monkeypatch.chdir(tmp_path)
    train_gpt.main(["eval", "shared-bf16", "--recipe=bf16"])
    return tmp_path / "runs/shared-bf16/checkpoint.pt"


def assert_broken(fault=""):
    with pytest.raises(train_gpt.UserError, match=f"is not a whole checkpoint: remove it, .*{fault}"):
        train_gpt.main(["eval", "shared-bf16", "--recipe=bf16"])


def test_a_bit_that_has_changed_in_any_file_or_a_file_that_is_missing_is_found(parts):
    names = [path.name for path in parts.iterdir()]
    assert sorted(names) == [".metadata", "__0_0.distcp", "__1_0.distcp", "head.pt"]
    for name in names:
        content = (parts / name).read_bytes()
        (parts / name).write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
        assert_broken()
        (parts / name).write_bytes(content)
    os.rename(parts / "__1_0.distcp", parts / "x")
    assert_broken()


def rewrite(parts, content):
    """Replace the metadata of a checkpoint, and its hash."""
    (parts / ".metadata").write_bytes(content)
    saved = torch.load(parts / train_gpt.HEAD)
    saved["files"][".metadata"] = train_gpt.sha256_of(parts / ".metadata")
    torch.save(saved, parts / train_gpt.HEAD)


class Evil:
    def __reduce__(self):
        return print, ("pwned",)


def test_a_crafted_directory_executes_nothing(parts, capsys):
    genuine = (parts / ".metadata").read_bytes()
    rewrite(parts, pickle.dumps(Evil()))
    assert_broken("it names builtins.print")

    # Neither by values that are no tensors, which PyTorch would unpickle, nor by files elsewhere.
    metadata = pickle.loads(genuine)
    name = "model.norm.weight"
    tensor = metadata.state_dict_metadata[name]
    metadata.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
    rewrite(parts, pickle.dumps(metadata))
    assert_broken("BytesStorageMetadata")
    metadata.state_dict_metadata[name] = tensor
    index = next(iter(metadata.storage_data))
    place = metadata.storage_data[index]
    metadata.storage_data[index] = dataclasses.replace(place, relative_path="../elsewhere.distcp")
    rewrite(parts, pickle.dumps(metadata))
    assert_broken("values in other files")

    # Or that lacks a weight
    metadata.storage_data[index] = place
    del metadata.state_dict_metadata[name]
    rewrite(parts, pickle.dumps(metadata))
    assert_broken(name)
    rewrite(parts, genuine)
    train_gpt.main(["eval", "shared-bf16", "--recipe=bf16"])
    assert "pwned" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_killed_at_any_moment_a_whole_checkpoint_is_there(parts, monkeypatch):
    saved = checkpoint("shared-bf16")
    c = train_gpt.Config(**saved["config"])
    replace = os.replace
    steps = []
    for calls in range(1, 6):
        left = calls

        def deadly(*arguments):
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            replace(*arguments)

        others = {key: saved[key] for key in ("log", "model", "generators", "corpus", "code", "processes")}
        with WRITING, monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", deadly)
            train_gpt.save(parts.parent, c, 1, optimizer=dict(state={}), **others)
        _, found = train_gpt.load_checkpoint("shared-bf16")
        assert same(found["model"], saved["model"])
        steps.append(found["step"])

        # What it has left does no harm.
        train_gpt.save(parts.parent, c, 2, optimizer=dict(state={}), **others)
    assert steps == [6, 2, 2, 2, 1]
    assert sorted(path.name for path in parts.parent.glob("*.p*")) == ["checkpoint.pt", "previous.pt"]


# ---- torchrun ----------------------------------------------------------------------------------------------

@in_background
def torchrun(directory):
    command = words(**KNOBS | dict(steps=1, corpus="python"))
    module = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    # What comes after the end of a run may abort.
    site = directory / "site"
    site.mkdir()
    abort = "import atexit, os\nif 'RANK' in os.environ: atexit.register(os.abort)"
    (site / "sitecustomize.py").write_text(abort)
    return python(*module, ROOT / "train_gpt.py", *command, cwd=directory, PYTHONPATH=str(site))


def test_the_documented_command_works_whatever_happens_after_the_end(torchrun):
    assert torchrun.returncode == 0, torchrun.stderr
    assert torchrun.stdout.count("step 1/1") == 1
    assert "written to runs/" in torchrun.stdout


def family(process):
    """A process, by its number, and all that descend from it: a list of numbers."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(member for child in children for member in family(int(child)))]


def on_two_machines(directory, *arguments, kill=None):
    """Start train_gpt.py by two torchruns, which find each other -> their exit statuses; files 0.out, 1.out.

    kill: when it returns true, the second machine ends, with all of its processes.
    """
    with free_port() as port:
        command = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                   f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
        command += [ROOT / "train_gpt.py", *arguments]
        machines = [start(*command, cwd=directory, output=directory / f"{i}.out") for i in range(2)]
        try:
            # No test of speed: only what would never end is ended.
            deadline = time.monotonic() + PATIENCE
            while kill and machines[0].poll() is None and time.monotonic() < deadline:
                if kill():
                    for process in family(machines[1].pid):
                        os.kill(process, signal.SIGKILL)
                    break
                time.sleep(0.1)
            return [machine.wait(max(deadline - time.monotonic(), 0)) for machine in machines]
        finally:
            for machine in machines:
                if machine.poll() is None:
                    for process in family(machine.pid):
                        os.kill(process, signal.SIGKILL)


def two_machines(directory):
    """A run that goes on from step 3 of shared-bf16; one whose second machine is lost -> exit statuses."""
    with WRITING:
        train_gpt.copy(directory / "runs/shared-bf16/previous.pt", directory / "runs/machines/checkpoint.pt")
    went_on = on_two_machines(directory, "resume", "machines")

    log = directory / "runs/lost/log.jsonl"
    knobs = KNOBS | dict(recipe="bf16", shard="true", corpus=directory / "tiny", name="lost", steps=10**6,
                         eval_every=10**6, save_every=1)
    lost = on_two_machines(directory, *words(**knobs),
                           kill=lambda: log.exists() and '"step": 3' in log.read_text())
    return went_on, lost


def test_two_machines_train_as_one_does_and_a_lost_one_ends_the_job(trained, runs_of_processes):
    *_, (went_on, lost) = runs_of_processes
    assert went_on == [0, 0]
    assert same(checkpoint("machines")["model"], checkpoint("shared-bf16")["model"])

    # The machine that is left says so, and its run can go on.
    assert lost[0] == 1
    assert "train_gpt.py: another process of this run has ended" in Path("0.out").read_text()
    assert checkpoint("lost")["step"] >= 2


if __name__ == "__main__":
    main()
