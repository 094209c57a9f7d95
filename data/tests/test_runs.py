"""Tests of how runs of train_gpt.py are named, resumed and read: what goes on must fit what began."""
import errno
import json
import math
import os
import re
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import train_gpt
from small_runs import (
    WRITING, checkpoint, go_back, logged, records, result, same, shards, spoil_losses, train, training_in,
    words
)

RUN = Path("runs/a")
LAST = RUN / "checkpoint.pt"
PREVIOUS = RUN / "previous.pt"

# Each test trains in a directory of its own.
pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run of 4 steps by quartet2, with checkpoints of steps 3 and 4; for `finished`."""
    place = tmp_path_factory.mktemp("trained")
    with training_in(place):
        train(save_every=3)
    return place / RUN


@pytest.fixture
def finished(place, trained):
    """It is runs/a here."""
    shutil.copytree(trained, RUN)


def resume(run="a", *knobs):
    train_gpt.main(["resume", run, *knobs])


def refused(message, *command):
    """The command ends with one line that the regular expression message fits."""
    with pytest.raises(train_gpt.UserError, match=message) as error:
        train_gpt.main([*command])
    assert "\n" not in str(error.value)


def change_times(directory):
    return {path: path.stat().st_mtime_ns for path in Path(directory).rglob("*")}


# ---- What goes on ------------------------------------------------------------------------------------------

def test_a_stopped_comparison_goes_on_where_it_was_and_with_its_own_knobs_only(monkeypatch, capsys):
    train(name="straight", recipe="bf16,rtn")

    # Stop another in the second step of rtn.
    learning_rate = train_gpt.learning_rate
    steps = []

    def interrupted(c, step):
        steps.append(c.recipe)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(c, step)

    monkeypatch.setattr(train_gpt, "learning_rate", interrupted)
    with pytest.raises(SystemExit):
        train(recipe="bf16,rtn")
    assert capsys.readouterr().out.endswith("train_gpt.py resume runs/a\n")      # not runs/a/rtn

    # It goes on with its own knobs only, and where it was.
    refused(r"a run keeps what it began with .*: --steps=5 \(saved: 4\), --lr=0.1 \(saved: 0.003\)",
            "resume", "a", "--steps=5", "--lr=0.1")
    refused("--recipe=quartet2 .saved: bf16,rtn", "resume", "a", "--recipe=quartet2")
    resume("a", "--log_every=3")
    assert steps == ["bf16"] * 4 + ["rtn"] * 4
    assert same(checkpoint("straight/rtn")["model"], checkpoint("a/rtn")["model"])
    table = (RUN / "compare.txt").read_text().splitlines()
    assert [row.split()[0] for row in table] == ["recipe", "bf16", "rtn"]

    # A result that is damaged is named.
    (RUN / "bf16/result.json").write_text("")
    refused("runs/a/bf16/result.json is damaged: remove it", "resume", "a")


def test_recipes_of_a_comparison_start_from_the_same_weights_whatever_becomes_of_their_source(monkeypatch):
    train(name="source", seed=2)
    train(name="straight", recipe="bf16,rtn", init_from="source")

    # The source is another one once bf16 has begun.
    learning_rate = train_gpt.learning_rate

    def and_replace_the_source(c, step):
        if c.recipe == "bf16":
            shutil.copyfile("runs/other/checkpoint.pt", "runs/source/checkpoint.pt")
        return learning_rate(c, step)

    train(name="other", seed=3)
    monkeypatch.setattr(train_gpt, "learning_rate", and_replace_the_source)
    train(recipe="bf16,rtn", init_from="source")
    assert same(checkpoint("straight/rtn")["model"], checkpoint("a/rtn")["model"])

    # Also if it goes on later
    shutil.rmtree(RUN / "rtn")
    resume("a")
    assert same(checkpoint("straight/rtn")["model"], checkpoint("a/rtn")["model"])


def test_what_cannot_be_read_is_not_called_damaged(finished, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", refuse)
        refused(r"^cannot read runs/a/checkpoint.pt \(Permission denied\)$", "resume", "a")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(train_gpt.UserError, match=r"^cannot read .*result.json \(Permission denied\)$"):
        train_gpt.read_json(RUN / "result.json", train_gpt.RESULT)
    monkeypatch.setattr(np, "fromfile", refuse)
    refused(r"^cannot read .*tiny_train_000000.bin \(Permission denied\)$", *words(name="b"))


@pytest.mark.parametrize("recipe", ["rtn", "bf16,rtn"])
def test_what_goes_on_by_other_code_or_text_is_refused(place, monkeypatch, recipe):
    """Also where the text differs in its last shard, or in validation; nothing is written then."""
    # A corpus of two shards; a run that was killed before its end, or a comparison before its second run.
    first = place / "tiny_train_000000.bin"
    last = place / "tiny_train_000001.bin"
    prepare.write_shard(last, np.frombuffer(b"pack my box with five dozen liquor jugs " * 40, np.uint8))
    train(recipe=recipe)
    if recipe == "rtn":
        (RUN / "result.json").unlink()
    else:
        (RUN / "bf16/result.json").unlink()
        shutil.rmtree(RUN / "rtn")
    before = change_times("runs")

    # Other text
    for path in (first, last, place / "tiny_val_000000.bin"):
        whole = path.read_bytes()
        prepare.write_shard(path, np.full(1700, 65))
        refused("runs/a began with corpus .*, and here is .*put it back.*--init_from=RUN", "resume", "a")
        path.write_bytes(whole)

    # Other code
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "CODE", "12345678")
        refused("runs/a began with code .*, and here is 12345678", "resume", "a")

    # With what it began with it goes on.
    assert change_times("runs") == before
    resume()


def test_a_run_goes_on_with_its_own_knobs_and_those_that_change_no_number(finished):
    go_back()
    for knob in ("--recipe=bf16,rtn", "--name=b", "--steps=5", "--shard=true", "--batch=1", "--eval_every=1",
                 "--compile=on"):
        refused(f"a run keeps .*--init_from\\): {knob} \\(saved: ", "resume", "a", knob)
    refused("runs/a/checkpoint.pt is a file of a run: name the run", "resume", "runs/a/checkpoint.pt")
    resume("a", "--steps=4", "--log_every=1", "--save_every=1", "--device=auto", "--prompt=x",
           "--sample_tokens=1", "--temperature=0", "--top_k=1")
    assert checkpoint()["step"] == 4


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_said_to_go_on():
    RUN.mkdir(parents=True)
    (RUN / "log.jsonl").write_text("{}")
    refused("runs/a exists: it has no checkpoint, remove it, or take another --name", *words())


def test_a_run_of_which_only_the_checkpoint_before_is_left_goes_on(finished):
    LAST.unlink()
    refused("runs/a exists: resume it", *words())
    refused("no run other with a checkpoint: in runs/: there are a$", "resume", "other")
    resume()


def test_a_comparison_that_is_interrupted_keeps_a_recipe_that_has_diverged(monkeypatch):
    """Though there is no checkpoint yet."""
    train = train_gpt.train

    def interrupted(c, *others):
        if c.recipe == "rtn":
            raise KeyboardInterrupt
        train(c, *others)

    monkeypatch.setattr(train_gpt, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_gpt.main(words(recipe="bf16,rtn", lr=1e30, steps=14))
    assert not list(RUN.rglob("*.pt"))
    assert result("a/bf16")["val_loss"] is None
    assert records("a/bf16")

    # The other one still trains if it goes on.
    monkeypatch.setattr(train_gpt, "train", train)
    refused("runs/a: bf16, rtn has no finite validation loss", "resume", "a")


def test_a_command_that_is_printed_is_one_for_a_shell(capsys):
    with pytest.raises(SystemExit):
        train_gpt.leave(Path("my runs/a$b"), 3, [])
    assert capsys.readouterr().out.endswith("train_gpt.py resume 'my runs/a$b'\n")


def test_a_name_that_is_taken_is_refused():
    Path("runs/begun").mkdir(parents=True)
    refused("runs/begun exists: .*remove it", *words(name="begun"))


def test_a_run_that_ended_in_bf16_is_evaluated_and_sampled_in_bf16(monkeypatch):
    train(bf16_end=0.5, recipe="rtn", lr=0.1)
    before = result()

    # Killed just before the end, there is nothing left to train, and no speed.
    (RUN / "result.json").unlink()
    resume()
    assert result() == before | dict(tokens_per_s=None)

    # A sample is of two tokens, one forward pass each.
    forward = train_gpt.GPT.forward
    recipes = []

    def note(model, *tokens):
        recipes.append(model.blocks[0].up.recipe)
        return forward(model, *tokens)

    monkeypatch.setattr(train_gpt.GPT, "forward", note)
    train_gpt.main(["sample", "a"])
    train_gpt.main(["sample", "a", "--recipe=rtn"])
    train_gpt.main(["sample", "a", "--bf16_end=0", "--steps=1"])
    assert recipes == ["bf16"] * 2 + ["rtn"] * 4


def test_the_last_steps_in_bf16_are_counted_exactly():
    for end, steps in [(0.1, 10), (0.9, 10), (0.9, 100), (0.3, 1000), (1.0, 7)]:
        c = train_gpt.Config(recipe="rtn", bf16_end=end, steps=steps)
        recipes = [train_gpt.recipe_of(c, step) for step in range(1, steps + 1)]
        assert recipes.count("bf16") == round(end * steps)


@pytest.mark.parametrize("knob, value, most", [
    ("bf16_end", "2", "1"),
    ("bf16_last", "2", "1"),
    ("lr", "inf", "1e+38"),
    ("seed", "1000000000001", "1000000000000"),
])
def test_knobs_have_bounds(knob, value, most):
    refused(f"--{knob}={value}.*: it must be from 0 to {re.escape(most)}", *words(**{knob: value}))


def test_a_signal_that_comes_twice_saves_as_one(monkeypatch):
    random = train_gpt.Shards.random

    def stop(data, step, micro):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return random(data, step, micro)

    monkeypatch.setattr(train_gpt.Shards, "random", stop)
    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == 0
    assert checkpoint()["step"] == 2


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    before = change_times(RUN)
    resume()
    assert "runs/a has ended" in capsys.readouterr().out
    assert result()["tokens_per_s"] > 0
    assert change_times(RUN) == before


def test_a_run_is_one_processs(finished):
    go_back()
    with train_gpt.held(RUN):
        refused("another process trains in runs/a", "resume", "a")
    resume()

    # So are those of a comparison.
    train(name="both", recipe="bf16,rtn", steps=1)
    Path("runs/both/rtn/result.json").unlink()
    with train_gpt.held(Path("runs/both/rtn")):
        refused("another process trains in runs/both/rtn", "resume", "both")


# ---- Steps without a finite gradient -----------------------------------------------------------------------

def test_ten_steps_in_a_row_without_a_gradient_end_a_run_also_between_two_lines(monkeypatch):
    """Steps 3 to 12 of 14 have none, and the run prints a line after each 20."""
    spoil_losses(monkeypatch, range(3, 13))
    with pytest.raises(train_gpt.UserError, match="10 steps in a row"):
        train(steps=14, log_every=20)
    assert [step for step, norm in logged(key="grad_norm").items() if norm is None] == [*range(3, 13)]


def test_a_streak_of_bad_steps_leaves_the_checkpoint_from_before_it(monkeypatch):
    """From step 3 of 14 a weight is infinite: nothing of that is kept, whatever --save_every."""
    forward = train_gpt.GPT.forward
    passes = []

    def spoiled(model, *tokens):
        passes.append(0)
        if len(passes) == 3:
            model.head.weight.data[0] = math.inf
        return forward(model, *tokens)

    monkeypatch.setattr(train_gpt.GPT, "forward", spoiled)
    with pytest.raises(train_gpt.UserError, match="10 steps in a row"):
        train(steps=14, save_every=1)
    for name in train_gpt.CHECKPOINTS:
        kept = checkpoint("a", name)
        assert kept["step"] in (1, 2)
        assert all(w.isfinite().all() for w in kept["model"].values())


def test_a_run_whose_last_validation_is_not_finite_ends_as_diverged(monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "evaluate", lambda model, data, c: math.nan)
    refused("runs/a: its validation loss is not finite.*lower --lr", *words())
    refused("runs/a: its validation loss is not finite", "resume", "a")
    refused("not all of these losses are finite", "eval", "a", "--recipe=bf16")
    refused("runs/c: bf16, rtn has no finite validation loss", *words(name="c", recipe="bf16,rtn"))
    assert result("c/rtn")["tokens_per_s"]
    assert result()["val_loss"] is None
    assert result()["tokens_per_s"]
    assert (RUN / "sample.txt").exists()


def test_a_recipe_that_diverges_does_not_end_the_others(capsys):
    # In too few steps to be noticed, and in enough
    for steps, ended in [(4, 0), (14, 2)]:
        command = words(recipe="bf16,rtn", lr=1e30, steps=steps, name=f"r{steps}")
        if ended:
            refused("runs/r14: bf16, rtn has no finite validation loss", *command)
        else:
            train_gpt.main(command)
        said = capsys.readouterr().out
        assert said.count("10 steps in a row") == ended
        assert said.count("its logits are not finite: no sample") == 2 - ended
        _, bf16, rtn = Path(f"runs/r{steps}/compare.txt").read_text().splitlines()
        assert "nan" in bf16
        assert "nan" in rtn
    train_gpt.main(["sample", "r4/rtn"])
    assert "no sample" in capsys.readouterr().out


def test_a_run_that_had_ended_but_for_its_sample_samples_by_its_recipe(monkeypatch):
    train(recipe="rtn")
    (RUN / "result.json").unlink()
    monkeypatch.setattr(train_gpt, "sample_text", lambda model, c: model.blocks[0].up.recipe)
    resume()
    assert (RUN / "sample.txt").read_text() == "rtn"


def test_a_clip_of_0_clips_nothing():
    for clip in (0, 1e30):
        train(clip=clip, name=f"clip-{clip:g}")
    assert same(checkpoint("clip-0")["model"], checkpoint("clip-1e+30")["model"])


# ---- Damage ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", ["torn", "zeros", "empty", "gone"])
def test_a_log_that_a_crash_has_damaged_is_whole_when_the_run_goes_on(finished, monkeypatch, damage):
    """Zeros are what a disk has that lost a block."""
    go_back()
    log = RUN / "log.jsonl"
    whole = log.read_text()
    if damage == "torn":
        log.write_text(whole + '{"step": 5, "lo')
    elif damage == "zeros":
        log.write_text(whole.replace('{"step": 2,', "\0\0\0", 1) + "\0\0")
    elif damage == "empty":
        log.write_text("")
    else:
        log.unlink()
    damaged = log.exists() and log.read_text()
    losses = [json.loads(line)["loss"] for line in whole.splitlines() if '"loss"' in line]

    # Killed while it is written: nothing has changed.
    def crash(*paths):
        raise KeyboardInterrupt

    with WRITING, monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            resume()
    assert (log.exists() and log.read_text()) == damaged
    assert not (RUN / "log.jsonl.part").exists()

    # Up to step 3 it is as it was, byte by byte; then come a header, and step 4, which is done again.
    resume()
    again = log.read_text()
    kept = os.path.commonprefix([again, whole])
    assert kept.count("\n") == 4
    assert [record.get("start") for record in records()] == [0, None, None, None, 3, None, None]
    assert logged() == {step: loss for step, loss in enumerate(losses, 1)}
    assert result()["val_loss"] == logged(key="val_loss")[4]


def test_what_was_logged_before_the_first_checkpoint_is_dropped():
    """A comparison was killed then: the log has steps, and a torn one, that nothing goes on from."""
    train(recipe="bf16,rtn")
    expected = logged("a/rtn")
    for name in (*train_gpt.CHECKPOINTS, "result.json"):
        (RUN / "rtn" / name).unlink(missing_ok=True)
    log = RUN / "rtn/log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "lo')
    resume()
    assert logged("a/rtn") == expected
    assert [record["step"] for record in records("a/rtn") if "loss" in record] == [1, 2, 3, 4]


def test_a_bit_of_a_checkpoints_directory_is_seen(finished):
    """A checkpoint is a zip archive, whose directory has no checksum."""
    whole = LAST.read_bytes()
    entries = [match.start() for match in re.finditer(b"PK\1\2", whole)]
    assert len(entries) > 20
    for entry in entries:
        # A bit that makes of the entry a directory, and one that makes it compressed
        for offset, bit in [(38, 16), (10, 8)]:
            damaged = bytearray(whole)
            damaged[entry + offset] ^= bit
            LAST.write_bytes(damaged)
            refused("not a whole checkpoint.*remove it", "sample", "a")


@pytest.mark.parametrize("name", ["seed", "lr", "steps", "recipe"])
def test_a_comparison_takes_no_checkpoint_of_another_run(name):
    train(recipe="bf16,rtn", save_every=2, name="c")
    run = Path("runs/c/rtn")
    (run / "result.json").unlink()
    other = dict(seed=2, lr=1e-4, steps=3, recipe="bf16")[name]
    train(**dict(recipe="rtn", save_every=2, name="other") | {name: other})
    shutil.copy("runs/other/checkpoint.pt", run / "checkpoint.pt")
    refused(f"runs/c/rtn is no run of this comparison: .*--{name}=", "resume", "c")


@pytest.mark.parametrize("kind", ["empty", "bf16's", "pipe"])
def test_a_comparison_takes_no_result_of_another(kind):
    train(recipe="bf16,rtn", steps=1, name="c")
    path = Path("runs/c/rtn/result.json")
    path.unlink()
    if kind == "empty":
        path.write_text("{}")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        shutil.copy("runs/c/bf16/result.json", path)
    refused("runs/c/rtn/result.json is (damaged|of bf16): remove it, then resume", "resume", "c")


def test_a_run_of_a_comparison_is_no_link():
    train(recipe="bf16,rtn", steps=1, name="c")
    shutil.move("runs/c/rtn", "elsewhere")
    Path("runs/c/rtn").symlink_to(Path("elsewhere").absolute())
    refused("runs/c/rtn is a link: remove it", "resume", "c")


@pytest.mark.parametrize("spoil", [
    lambda t: torch.zeros(1).expand(t.shape),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.long(),
])
def test_tensors_of_a_checkpoint_are_plain_numbers(finished, spoil):
    for mode, where in [("sample", "model head.weight"), ("resume", "optimizer state head.weight exp_avg")]:
        saved = checkpoint(name="previous.pt")
        *outer, last = where.split()
        holder = saved
        for name in outer:
            holder = holder[name]
        holder[last] = spoil(holder[last])
        torch.save(saved, LAST)
        (RUN / "result.json").unlink(missing_ok=True)
        refused("runs/a.*(other weights|not plain numbers|cannot be restored)", mode, "a")


def test_settings_of_the_optimizer_are_those_of_the_code(finished):
    straight = checkpoint()
    saved = checkpoint(name="previous.pt")
    for group in saved["optimizer"]["param_groups"]:
        group.update(weight_decay=1e30, eps=-1.0, betas=(0.1, 0.2), share=7.0)
    torch.save(saved, LAST)
    (RUN / "result.json").unlink()
    resume()
    assert same(checkpoint()["model"], straight["model"])


def test_a_damaged_checkpoint_names_the_one_before_which_is_kept(finished):
    before = checkpoint()["model"]
    previous = PREVIOUS.read_bytes()
    LAST.write_bytes(b"damaged")
    for mode in ("resume", "eval"):
        refused("runs/a/checkpoint.pt is not a whole checkpoint: remove it, and previous.pt", mode, "a")

    # Without it the run goes on from the one before.
    LAST.unlink()
    resume()
    assert checkpoint()["step"] == 4
    assert same(checkpoint()["model"], before)
    assert PREVIOUS.read_bytes() == previous


GONE = object()
UNKNOWN = "was not written by this version of train_gpt.py"


@pytest.mark.parametrize("where, value, message", [
    # what a checkpoint of other code, or somebody, may have
    ("config dropout", 0.1, UNKNOWN),
    ("config clip", GONE, UNKNOWN),
    ("config layers", "1", UNKNOWN),
    ("config lr", None, UNKNOWN),
    ("config", [1], UNKNOWN),
    ("model", GONE, UNKNOWN),
    ("step", "3", UNKNOWN),
    ("processes", None, UNKNOWN),
    ("extra", 1, UNKNOWN),
    ("config layers", 10**12, "--layers=1000000000000: it must be from 1 to 1000"),
    ("config width", 10**12, "--width=1000000000000: it must be"),
    ("config vocab_size", 2**30, "--vocab_size=1073741824: it must be"),
    ("config heads", 7, "multiple of twice the heads"),
    ("config lr", math.nan, "--lr=nan: it must be"),
    ("config batch", 2**30, "more than 2\\^24 tokens"),
    ("config device", "tpu", "--device=tpu: there are"),
    ("step", -1, "another step than"),
    ("step", 5, "another step than"),
    ("log", {}, UNKNOWN),
    ("log text", 1, UNKNOWN),
    ("config hidden", 256, "other weights than"),
    ("model head.weight", GONE, "other weights"),
    ("model head.weight", torch.zeros(1), "other weights"),
    ("model head.weight", 1, "other weights"),
    # what only a run that goes on takes
    ("optimizer", {}, "cannot be restored: "),
    ("optimizer state", {"head.weight": {"exp_avg": torch.zeros(1)}}, "cannot be restored: "),
    ("optimizer state", {}, "cannot be restored: "),
    ("optimizer state head.weight exp_avg", torch.zeros(1), "cannot be restored: "),
    ("optimizer state head.weight exp_avg", GONE, "cannot be restored: "),
    ("optimizer param_groups", [], "cannot be restored: "),
    ("generators", [], "cannot be restored: IndexError"),
    ("generators", [{"cpu": torch.zeros(3)}], "cannot be restored: "),
])
def test_what_a_checkpoint_cannot_hold_is_one_line_that_names_it(finished, where, value, message):
    saved = checkpoint(name="previous.pt")
    *outer, last = where.split()
    holder = saved
    for name in outer:
        holder = holder[name]
    holder[last] = value
    if value is GONE:
        del holder[last]
    torch.save(saved, LAST)
    (RUN / "result.json").unlink()
    refused(f"runs/a.*{message}", "resume", "a")


def test_an_evaluation_tells_if_the_text_of_the_run_has_changed(finished, place, capsys):
    train_gpt.main(["eval", "a", "--recipe=bf16"])
    assert "has changed" not in capsys.readouterr().err
    prepare.write_shard(place / "tiny_val_000000.bin", np.full(1700, 65))
    train_gpt.main(["eval", "a", "--recipe=bf16", "--sequence=16"])
    assert "has changed" not in capsys.readouterr().err
    train_gpt.main(["eval", "a", "--recipe=bf16"])
    assert "the corpus tiny has changed since the run" in capsys.readouterr().err


def test_knobs_that_the_code_of_a_run_did_not_have_take_their_defaults(finished, monkeypatch, capsys):
    def without_clip(saved):
        del saved["config"]["clip"]
        return saved | dict(code="12345678")

    torch.save(without_clip(checkpoint()), LAST)
    (RUN / "result.json").unlink()
    train_gpt.main(["eval", "a", "--recipe=bf16"])
    assert "was trained by code 12345678" in capsys.readouterr().err
    train(name="b", init_from="a", seed=2)
    refused("runs/a began with code 12345678, and here is", "resume", "a")

    # Of a comparison
    train(name="c", recipe="bf16,rtn")
    path = Path("runs/c/compare.json")
    path.write_text(json.dumps(without_clip(json.loads(path.read_text()))))
    refused("runs/c began with code 12345678, and here is", "resume", "c")


@pytest.mark.parametrize("content", [
    "", "[]", "{}", "null", "[" * 10**5, '{"config": {}}', "\\xff",
    '{"config": {}, "corpus": "", "code": "", "processes": 1}',
])
def test_a_damaged_comparison_is_one_line_that_names_the_file(place, content):
    Path("runs/c").mkdir(parents=True)
    Path("runs/c/compare.json").write_bytes(content.encode("latin-1"))
    refused("runs/c/compare.json (is damaged: .* resume c/RECIPE|was not written by)", "resume", "c")


def test_what_is_no_file_is_no_checkpoint(place):
    RUN.mkdir(parents=True)
    os.mkfifo(LAST)
    PREVIOUS.symlink_to("/dev/zero")
    refused("runs/a/checkpoint.pt is no file: remove it", "eval", "a")
    LAST.unlink()
    refused("runs/a/previous.pt is no file: remove it", "eval", "a")
    refused("no run /dev/zero with a checkpoint", "eval", "/dev/zero")


def test_what_cannot_be_read_now_is_not_said_to_be_broken(finished, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="allocate"):
        train_gpt.main(["sample", "a"])


def test_what_replaces_a_file_is_on_the_disk(monkeypatch):
    calls = []
    with WRITING, monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            def note(*arguments, name=name, call=getattr(os, name)):
                calls.append(name)
                call(*arguments)

            patch.setattr(os, name, note)
        train_gpt.write(Path("a.txt"), "a")
        train_gpt.save(Path(), train_gpt.Config(), 1)
    assert calls == ["fsync", "replace"] * 2
    assert Path("a.txt").read_text() == "a"


# ---- What is read ------------------------------------------------------------------------------------------

def test_a_name_is_looked_for_in_runs_first_and_any_batch_evaluates(finished, capsys):
    Path("a").mkdir()
    train_gpt.main(["eval", "a", "--batch=1", "--recipe=quartet2"])      # 64 tokens: two batches, and not one
    assert f"{result()['val_loss']:.4f}" in capsys.readouterr().out


def test_a_corpus_reads_its_own_shards_only(place):
    names = ["two_train_000000", "two_train_000001", "two_train_train_000000", "two_train_x",
             "t[w]o_train_000000"]
    for i, name in enumerate(names):
        prepare.write_shard(place / f"{name}.bin", np.full(40, i))
    for corpus, expected in [("two", [0, 1]), ("two_train", [2]), ("t[w]o", [4])]:
        c = train_gpt.Config(corpus=corpus, sequence=8)
        assert [shard[0] for shard in shards(c, "train").shards] == expected
