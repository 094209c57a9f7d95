"""Tests of figures.py, and of what train_gpt.py prints as it samples."""
import json
import math
import re
import runpy
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch

import experiments
import figures
import quartet
import train_gpt
from figures import Run


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Directories of their own for logs and pictures."""
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures")
    figures.RESULTS.mkdir()
    return figures.RESULTS


def write(path, recipe, losses, **config):
    """A log as train_gpt.py writes it, whose last lines are damaged and torn."""
    config = dict(recipe=recipe, steps=9, tokens_per_step=4000, name=path.name, **config)
    records = [dict(start=0, config=config)]
    for step, loss in enumerate(losses, 1):
        records.append(dict(step=step, loss=loss + 1, ms=2.0))
        records.append(dict(step=step, val_loss=loss))
    lines = [json.dumps(record) for record in records]
    lines += ['{"step" 3, "ms": 1}', '\0"ms": 1}', '{"step": 4, "lo']
    path.mkdir(parents=True)
    (path / "log.jsonl").write_text("\n".join(lines))


def keep(results, row, loss, seed=1, **header):
    """A log as experiments.py keeps it, of the 10m and the corpus installed."""
    records = [
        dict(start=0, **header),
        dict(step=1, loss=loss),
        dict(step=1, val_loss=loss),
        dict(val_loss=loss, tokens_per_s=1e6, peak_gib=1.0, jobs=1),
    ]
    (results / f"10m-installed-{row}-{seed}.jsonl").write_text("\n".join(map(json.dumps, records)))


def test_runs_are_tabled_beside_the_bf16_run_that_is_like_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs/c/bf16", "bf16", [3.0, 2.0, 1.5], seed=1)
    write(tmp_path / "runs/c/rtn", "rtn", [3.0, 2.25], seed=1)          # still training
    write(tmp_path / "runs/other", "rtn", [3.0, 2.0, 1.0], seed=2)
    figures.main(["runs"])
    _, bf16, rtn, other, last = (line.split() for line in capsys.readouterr().out.splitlines())
    assert last[:2] == ["no", "pictures:"] or (tmp_path / "runs/curves.png").stat().st_size > 1000
    assert bf16 == ["runs/c/bf16", "bf16", "3/9", "2.5000", "1.5000", "0.0", "2000.0"]
    assert rtn == ["runs/c/rtn", "rtn", "2/9", "3.2500", "2.2500", "250.0", "2000.0"]   # bf16's 2.0
    assert other[-2] == "nan"


def test_runs_that_have_not_begun_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in ("empty", ""), ("torn", '{"start": 0, "conf'):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "log.jsonl").write_text(text)
    (tmp_path / "bad/new").mkdir()                                      # without a log
    (tmp_path / "bad/curves.png").touch()
    write(tmp_path / "bad/begun", "rtn", [], seed=2)
    figures.main([str(path) for path in (tmp_path / "bad").iterdir()])
    printed = capsys.readouterr().out
    assert printed.count("log.jsonl: nothing yet, skipped") == 2
    assert "0/9          nan" in printed
    assert "bad/new: no log.jsonl in it" in printed
    odd = [
        dict(step="1", loss=1.0),
        dict(loss=1.0),
        dict(step=1, loss=[1]),
        dict(config=dict(recipe=1)),
        dict(step=10**400, loss=1.0),
        dict(step=1, ms=10**400),
    ]
    for number, record in enumerate(odd):
        write(tmp_path / f"odd/{number}", "rtn", [])
        with open(tmp_path / f"odd/{number}/log.jsonl", "a") as log:
            log.write("\n" + json.dumps(record))
        if "config" in record:
            with pytest.raises(SystemExit, match="odd/3/log.jsonl has a config that"):
                figures.main(["odd/3"])
        else:
            figures.main([f"odd/{number}"])
    for path in "bad/torn", "nothing":
        with pytest.raises(SystemExit, match=f"nothing in {path}"):
            figures.main([path])


def test_help_is_the_docstring_and_a_full_disk_is_told(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        figures.main(["--help"])
    assert figures.__doc__ in capsys.readouterr().out
    monkeypatch.setattr(figures, "follow", lambda paths: open("/"))     # as a disk that is read only
    figures.main(["runs"])
    assert "no pictures: [Errno" in capsys.readouterr().out


def test_a_table_tells_deviation_gaps_of_validation_and_training_and_speed_alone(capsys):
    """Over 3 seeds bf16 ends at 1 to 1.002; rtn 0.01 above, and in training 0.02, of which one has no log."""
    def run(end, trained, jobs):
        # The last tenth of 40 steps is 37 to 40.
        steps = {step: trained + (step < 37) * jobs for step in range(1, 41)} if trained else {}
        return Run({40: end}, steps, dict(val_loss=end, tokens_per_s=1e3 * jobs, peak_gib=jobs, jobs=jobs))

    ends = {1: 1.0, 2: 1.002, 3: 1.001}
    rows = {
        "bf16": {seed: run(end, 2.0, 1) for seed, end in ends.items()},
        "rtn": {seed: run(end + 0.01, 2.02 * (seed < 3), 2) for seed, end in ends.items()},
    }
    figures.table("10m", "a", "", rows)
    *_, bf16, rtn = capsys.readouterr().out.splitlines()
    assert bf16.split() == "bf16 3 1.0010 1.00 0.00 +- 0.00 0.00 +- 0.00 1 1.0".split()
    assert rtn.split() == "rtn 3 1.0110 1.00 10.00 +- 0.00 20.00 +- 0.00".split()
    assert figures.paired(rows, "rtn", "bf16", figures.training) == pytest.approx([20, 20])

    # Rows stand in the order of their gaps, not of their losses; without a bf16 run they are last.
    rows["sr"] = {1: run(1.0005, 2.0, 2)}               # of a good seed: below bf16's mean, yet worse
    rows["other"] = {9: run(0.5, 2.0, 2)}
    figures.table("10m", "a", "", rows, "rtn")
    printed = capsys.readouterr().out
    assert "to rtn" in printed
    assert "0.00 +- 0.00   -10.00 +- 0.00" in printed
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == ["bf16", "sr", "rtn", "other"]


def test_pairs_have_the_same_steps():
    def run(trained):
        return Run({40: 1.0}, {step: float(step) for step in trained}, dict(val_loss=1.0))

    # One training loss was lost.
    rows = dict(whole={1: run([37, 38, 40])}, torn={1: run([37, 40])})
    assert figures.paired(rows, "torn", "whole", figures.training) == [0]

    # Seed 1 has another last step; seed 2 tells none.
    rows["bf16"] = {1: run([]), 2: run([])._replace(result=dict(val_loss=1.002))}
    rows["long"] = {1: Run({40: 1.0, 80: 0.9}, {}, dict(val_loss=0.9)), 2: Run({}, {}, dict(val_loss=1.0))}
    assert figures.paired(rows, "long", "bf16") == pytest.approx([-2])


def rows_of(**losses):
    """{row: {seed: Run}}, a Run of 100 steps for each last loss, which falls evenly from 2 at step 50."""
    def run(loss):
        return Run({50: 2.0, 100: loss}, {}, dict(val_loss=loss, jobs=1, peak_gib=1.0, tokens_per_s=1.0))

    return {row: {seed: run(loss) for seed, loss in enumerate(values)} for row, values in losses.items()}


def test_ends_of_the_share_closed_are_where_students_test_begins_to_reject():
    generator = torch.Generator().manual_seed(0)
    for seeds in 3, 5, 9, 40:
        noise = 0.002 * torch.randn(3, seeds, generator=generator)
        bf16, quartet2, quintet = (noise + torch.tensor([[1.0], [1.02], [1.015]])).tolist()
        rows = rows_of(bf16=bf16, quartet2=quartet2, quintet=quintet)
        share, low, high = figures.share_closed(rows, "quintet", "quartet2")
        gap = statistics.mean(quartet2) - statistics.mean(bf16)
        assert share == pytest.approx((statistics.mean(quartet2) - statistics.mean(quintet)) / gap)
        def rejects(s):
            left = [q2 - q - s * (q2 - b) for b, q2, q in zip(bf16, quartet2, quintet)]
            mean, half = figures.interval(left)
            return abs(mean) > half

        assert low < share < high
        for end, outward in (low, -1e-6), (high, 1e-6):
            assert rejects(end + outward) and not rejects(end - outward)

    # A gap that may be 0, and one seed
    rows = rows_of(bf16=[1.0, 1.1, 0.9], quartet2=[1.01, 1.0, 1.02], quintet=[1.0, 1.0, 1.0])
    assert all(map(math.isnan, figures.share_closed(rows, "quintet", "quartet2")[1:]))
    rows = rows_of(bf16=[1.0], quartet2=[1.02], quintet=[1.015])
    share, *ends = figures.share_closed(rows, "quintet", "quartet2")
    assert share == pytest.approx(0.25) and all(map(math.isnan, ends))


def test_steps_and_losses_between_validations():
    run = Run({10: 3.0, 20: 2.0, 40: 1.0}, {}, {})
    found = [figures.step_of(run, loss) for loss in (4.0, 3.0, 2.5, 1.25, 1.0, 0.9)]
    assert found == [10, 10, 15, 35, 40, math.inf]
    assert [figures.loss_at(run, step) for step in (10, 15, 30, 40)] == [3.0, 2.5, 1.5, 1.0]
    assert math.isnan(figures.loss_at(run, 9))


def test_progress_tells_what_is_closed_in_how_many_steps_and_in_equal_time(capsys):
    rows = rows_of(bf16=[1.0, 1.0, 1.0], quartet2=[1.2, 1.201, 1.199], quintet=[1.1, 1.101, 1.3], one=[1.15])
    # Quintet at 3/4 of the speed of quartet2, which has half of bf16's
    for row, speed in dict(bf16=8.0, quartet2=4.0, quintet=3.0).items():
        for run in rows[row].values():
            run.result["tokens_per_s"] = speed
    figures.progress("", rows)
    *_, bf16, quartet2, quintet = capsys.readouterr().out.splitlines()
    assert bf16.split() == "bf16 90% (3 of 3)".split()
    assert quartet2.split() == "quartet2 never (0 of 3) 1000.00 +- 0.00".split()
    # Half way from 2.0 to its end, quintet is 0.35, 0.3495, 0.451 above quartet2's. When bf16 ends, it has no
    # validation yet.
    assert quintet.split() == (
        "quintet 16%, -129% to 159% 94% (2 of 3) never (0 of 3) 383.50 +-145.22".split())

    # Of rows that end in another way neither steps nor times are told.
    rows["quintet"][1] = rows["quintet"][1]._replace(header=dict(config=dict(steps=9, bf16_end=0.1)))
    figures.progress("", rows)
    *_, quintet = capsys.readouterr().out.splitlines()
    assert quintet.split() == "quintet 16%, -129% to 159%".split()
    del rows["quintet"][1].header["config"]["bf16_end"]

    # Of branches steps are told, times are not; of a row that shares one seed nothing.
    figures.progress("quartet2-from-50", rows)
    assert "383.50" not in capsys.readouterr().out
    figures.progress("", dict(bf16=rows["bf16"], quartet2=rows["quartet2"], one=rows["one"]))
    assert not capsys.readouterr().out


def test_bins_end_at_multiples_of_their_width_and_at_the_last_step():
    losses = {1: 1.0, 2: 2.0, 3: 4.0, 5: 9.0}
    assert figures.binned(losses, {1: 0.0, 2: 0.0, 3: 1.0}, 2) == {2: 1500, 3: 3000}


def test_the_interval_is_students():
    mean, half = figures.interval([1.0, 2.0, 3.0, 4.0])                  # deviation 1.291, t 3.1824
    assert mean == 2.5
    assert abs(half - 3.1824 * 1.29099 / 2) < 1e-4


def test_probabilities_and_quantiles_are_students():
    """By the integral of its density. Printed tables have 12.706, 3.182, 2.042 and 1.984.

    The trapezium rule errs by width^2 / 12 times the difference of the slopes at both ends, which are below
    1/3: on both sides by less than 2 (12.71 / 4000)^2 / 12 / 3 < 1e-6.
    """
    for n in (*range(1, 31), 99):
        scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
        t = figures.quantile(n)
        for end, expected in (t, 0.05), (0.7, figures.outside(0.7, n)), (6.0, figures.outside(6.0, n)):
            width = end / 4000
            density = [scale * (1 + (i * width) ** 2 / n) ** (-(n + 1) / 2) for i in range(4001)]
            inside = 2 * width * (sum(density) - (density[0] + density[-1]) / 2)
            assert abs(1 - inside - expected) < 1e-6, (n, end)
    assert [round(figures.quantile(n), 3) for n in (1, 3, 30, 99)] == [12.706, 3.182, 2.042, 1.984]
    assert figures.outside(0.0, 4) == 1

    # The interval ends at 0 where p is 5%.
    values = [1.0, 2.0, 4.0, 3.5]
    mean, half = figures.interval(values)
    assert figures.p_value([value - mean + half for value in values]) == pytest.approx(0.05)
    assert figures.p_value([value - mean - half for value in values]) == pytest.approx(0.05)
    assert math.isnan(figures.p_value([1.0])) and math.isnan(figures.p_value([]))
    assert figures.p_value([1.0, 1.0]) == pytest.approx(0)


def test_holms_correction():
    """Of a family of m, the smallest p times m, the next times m - 1, ..., and never less than one before."""
    assert figures.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert figures.holm([0.4, 0.5]) == pytest.approx([0.8, 0.8])
    assert figures.holm([0.9, 0.2]) == pytest.approx([0.9, 0.4])
    # What has not run yet is in the family.
    assert figures.holm([0.01, math.nan]) == pytest.approx([0.02, 1.0])


def test_stated_tests_take_their_seeds_and_no_others(capsys):
    def rows(seeds, **losses):
        return {row: {seed: Run({9: loss + seed % 3 * lift}, {}, dict(val_loss=loss + seed % 3 * lift))
                      for seed in seeds} for row, (loss, lift) in losses.items()}

    # Quintet is 10, 5, 0 below quartet2, seed by seed; dampening alone is known of three of 8 seeds.
    whole = rows([*range(31, 54), 99], quintet=(1.0, 0.006), quartet2=(1.01, 0.001))
    part = rows([31, 32, 33, 54], quartet2_dampen=(1.008, 0.001))
    branch = rows([41], quintet=(1.0, 0.0), quartet2=(1.01, 0.0))
    figures.verdicts({
        ("10m", "installed", ""): whole | part,
        ("30m", "installed", "quartet2-from-152"): branch,
        ("10m", "novels", ""): rows(range(31, 54), quintet=(2.0, 0.0), quartet2=(1.0, 0.0)),
    })
    primary, scratch, one, dampen, cage = capsys.readouterr().out.splitlines()[3:]
    expected = [-10 + 5 * (seed % 3) for seed in range(31, 54)]
    mean, half = figures.interval(expected)
    p = figures.p_value(expected)
    assert primary == f"{'quartet2, 10m':40} 23 of 24{mean:9.2f} +-{half:5.2f}{p:9.2g}"
    assert scratch == f"{'quartet2, 30m':40}  0 of  5"
    assert one == f"{'quartet2, 30m quartet2 from 152':40}  1 of  6"
    p = figures.p_value([-8 + 5 * (seed % 3) for seed in (31, 32, 33)])
    assert dampen.split()[-2:] == [f"{p:.2g}", f"{min(1, 4 * p):.2g}"]
    assert cage == f"{'quartet2_cage, 10m':40}  0 of  8"


def test_half_of_the_gap_is_closed_if_the_interval_allows_no_less_than_40_percent(capsys):
    def printed(late, seeds):
        noise = {seed: 1e-4 * (seed % 5 - 2) for seed in seeds}
        losses = dict(bf16=1.0, quartet2=1.02, quintet_two_end=late)
        return figures.half_closed({("10m", "installed", ""): {
            row: {seed: Run({9: loss}, {}, dict(val_loss=loss + noise[seed] * (row == "quintet_two_end")))
                  for seed in seeds} for row, loss in losses.items()}})

    printed(1.0099, range(31, 55))
    closed, verdict = capsys.readouterr().out.splitlines()[1:]
    assert re.fullmatch(r"quintet_two_end, 24 of 24 seeds: closes 50% of quartet2's gap, 50% to 51%", closed)
    assert verdict == "half of it is 50%, with a lower end above 40%: yes"
    # Less than half; some of the seeds; seeds that are none of the test's; none
    printed(1.0102, range(31, 55))
    assert capsys.readouterr().out.endswith(": no\n")
    printed(1.0099, range(31, 54))
    assert capsys.readouterr().out.endswith(": not all seeds have run\n")
    printed(1.0, [30, 55])
    assert not capsys.readouterr().out
    figures.half_closed({})


def test_pictures_of_runs_quantizers_and_means(results, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot", reason="pictures need matplotlib")
    parameters = "9, 1,500,000 without embedding and head"
    header = dict(config=dict(steps=10, tokens_per_step=100000), parameters=parameters)
    for row, loss in ("nvidia", 1.05), ("gone", 1.2):
        keep(results, row, loss, **header)
    for seed, loss in enumerate((1.1, 1.3, 1.1, 1.3, 1.2), 1):
        keep(results, "bf16", 1.0, seed, **header)
        keep(results, "quartet2", loss, seed, **header)
    means = [dict(gemm=gemm, method="sr", operand=operand, B=[1, 4], error=[0.1, 0.02])
             for gemm in ("dx", "dw") for operand in ("both", "dy")]
    (results / "bias-10m.jsonl").write_text("\n".join(map(json.dumps, means)))

    # What each picture has in it, when it is saved
    drawn = {}
    save = figures.save

    def look(plt, name):
        figure = plt.gcf()
        bars = [[bar.get_width() for bar in ax.patches] for ax in figure.axes]
        curves = [[list(line.get_ydata()) for line in ax.lines] for ax in figure.axes]
        drawn[name] = bars, curves, figure.findobj(plt.Text)
        save(plt, name)

    monkeypatch.setattr(figures, "save", look)
    monkeypatch.setattr(figures, "DRAWS", 16)
    figures.main()
    assert {path.name for path in figures.FIGURES.iterdir()} == drawn.keys() == {
        "rows-10m-installed.svg", "gap-10m-installed.svg", "speed-10m-installed.svg", "nmse.svg",
        "bias-10m.svg", "gemms.png", "block.png", "rounds.png", "gap.png",
    }

    # Of "both", dx and dw: B error(B) / error(1)
    _, curves, _ = drawn["bias-10m.svg"]
    assert curves == [[pytest.approx([1.0, 0.8])]] * 2

    # Gaps of 100 to 300: their mean, and words of the logs. A row that cannot be trained today is left out.
    bars, _, _ = drawn["rows-10m-installed.svg"]
    assert bars == [pytest.approx([50, 200])]
    bars, _, texts = drawn["gap.png"]
    assert bars == [[pytest.approx(200)]]
    words = " ".join(text.get_text() for text in texts)
    assert "1.5M parameters, Python source" in words
    assert "\n5 seeds" in words
    assert "200.0 ± 124.2" in words
    # One seed beside five is told, not drawn.
    assert " 1 of 5 seeds" in words


def test_pictures_name_rows_that_can_be_trained_each_in_its_own_words():
    assert figures.NAMES.keys() <= (quartet.RECIPES | experiments.ROWS | experiments.KNOBS).keys()
    assert len(set(figures.NAMES.values())) == len(figures.NAMES)


def test_one_round_levels_off_and_more_do_not():
    """As rounds.png has it: R is that of quartet.rotation, and so is the error of one draw."""
    one = figures.distances(1, 256)
    three = figures.distances(3, 256)
    assert list(one) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert one[256] > 0.8 * one[64]
    assert three[256] == pytest.approx(three[1] / 16, rel=0.1)

    # The same by the functions of the article, draw by draw
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128, generator=g)
    x[0] = 100.0
    errors = []
    for seed in range(256):
        R, n = quartet.rotation("rht128x3", g)
        errors.append(quartet.rotate(quartet.decode(quartet.ms_eden(x, R, seed)), R.T) / n - x)
    expected = torch.stack(errors).square().sum(-1).mean().sqrt() / x.norm()
    assert three[1] == pytest.approx(expected.item(), rel=0.05)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run "a" of one step, in runs/."""
    monkeypatch.chdir(tmp_path)
    train_gpt.main("cpu --layers=1 --width=128 --heads=1 --hidden=128 --sequence=64 --batch=2 --steps=1 "
                   "--name=a --tokens_per_step=128 --eval_tokens=128 --sample_tokens=9 --device=cpu".split())


def test_a_sample_streams_in_whole_characters_and_by_any_recipe(trained, monkeypatch, capsys):
    capsys.readouterr()
    train_gpt.main(["sample", "a"])
    own = Path("runs/a/sample.txt").read_text(encoding="utf-8")
    assert own.startswith("def ")
    assert capsys.readouterr().out == own + "\n"
    train_gpt.main(["sample", "a", "--recipe=rtn", "--seed=2"])
    assert capsys.readouterr().out.startswith("def ")

    # Characters come at once, but bytes of one wait for the last of them, which the sample may end before.
    c = train_gpt.Config(prompt="x")
    monkeypatch.setattr(train_gpt, "sample", lambda *_: iter([*"\u20ac".encode(), 0xff, 0xe2]))
    pieces = list(train_gpt.sample_text(None, c))
    assert pieces == ["x", "", "", "\u20ac", "\ufffd", ""]


def test_a_prompt_of_tokens_that_the_model_has_not_got_is_left_out(monkeypatch):
    gpt2 = types.SimpleNamespace(
        encode_ordinary=lambda text: [7, 600, 9],
        eot_token=700,
        n_vocab=701,
        decode_single_token_bytes=lambda token: b"%d " % token,
    )
    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=lambda name: gpt2))
    monkeypatch.setattr(train_gpt, "sample", lambda model, prompt, c: [len(prompt)])
    for vocabulary, text in (512, "7 9 2 "), (50304, "7 600 9 3 "), (5, "0 1 "):
        c = train_gpt.Config(vocab_size=vocabulary, tokenizer="gpt2")
        assert "".join(train_gpt.sample_text(None, c)) == text


def test_ctrl_c_ends_a_sample_without_a_traceback(trained, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "load", interrupt)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "sample", "a"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(train_gpt.__file__, run_name="__main__")
    assert stop.value.code == 130


def test_the_table_of_the_readme_has_the_numbers_of_the_logs():
    """Gaps and speeds of every recipe, each from the logs that README's text names."""
    runs = figures.read()
    scratch = runs["10m", "installed", ""]
    branch = runs["30m", "novels", "quartet2-from-700"]
    branch["quintet"] = branch["quintet_x2"]          # README says that it had two rounds

    def gap(rows, recipe, value):
        if recipe == "bf16":
            return "0"
        found = figures.paired(rows, recipe, "bf16", value) if recipe in rows else []
        if not found or len(found) < len(rows["bf16"]) / 4:
            return ""
        mean, half = figures.interval(found)
        return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"

    def speed(rows, recipe):
        rates = [figures.fastest(rows.get(row, {})) for row in (recipe, "bf16")]
        if not all(rates):
            return ""
        return f"{rates[0]['tokens_per_s'] / rates[1]['tokens_per_s']:.0%}"

    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for recipe in quartet.RECIPES:
        line, = re.findall(rf"^\| {recipe}(?: \(ours\))? \|.*\|$", readme, re.M)
        *_, scratch_gap, branch_gap, h200, h100, _ = [cell.strip() for cell in line.split("|")]
        assert scratch_gap == gap(scratch, recipe, figures.final), recipe
        assert branch_gap == gap(branch, recipe, figures.training), recipe
        assert h200 == speed(scratch, recipe), recipe
        assert h100 == speed(branch, recipe), recipe


def in_words(differences):
    """As in the long account. Example: 0.5 +- 2.6"""
    mean, half = figures.interval(differences)
    return f"{round(mean, 1) + 0.0:.1f} +- {half:.1f}"     # + 0.0: no "-0.0"


def test_readme_and_the_long_account_have_the_numbers_from_scratch():
    account = (Path(figures.__file__).parent / "README.md").read_text()
    readme = (Path(figures.__file__).parents[2] / "README.md").read_text()
    runs = figures.read()["10m", "installed", ""]

    differences = figures.paired(runs, "quintet", "quartet2")
    between = in_words(differences)
    seeds = len(differences)
    for row, last in (("quartet2", ""), ("quintet", between + " ")):
        gaps = [in_words(figures.paired(runs, row, "bf16", value))
                for value in (figures.final, figures.training)]
        assert f"| {row} | {seeds} | {gaps[0]} | {gaps[1]} | {last}|" in account
    below = between.removeprefix("-").replace("+-", "±")
    closed = "{:.0%} ({:.0%} to {:.0%})".format(*figures.share_closed(runs, "quintet", "quartet2"))
    assert f"{seeds} seeds. Seed by seed, quintet is below quartet2 by {below}, {closed} of its gap" in readme
    assert f"it beat Quartet II in {sum(d < 0 for d in differences)} of {seeds} pairs" in readme
    p = f"p = {figures.p_value(differences):.4f}"
    assert p in readme and p in account

    # By which code
    def code(seeds):
        logs = []
        for row in "bf16", "quartet2", "quintet":
            logs += [run for seed, run in runs[row].items() if seed in seeds]
        found, = {run.header["versions"].split()[-1] for run in logs}
        return found

    words = " ".join(account.split())
    assert f"logs of seeds 31 to 50 have code {code(range(31, 51))}," in words
    assert f"those of 51 to 53 have code {code(range(51, 54))}," in words
    assert f"those of 54 code {code([54])}," in words

    # In steps and in time
    def late(row, goal):
        return in_words(figures.in_time(runs, row, goal))

    closed = "{:.0%}, {:.0%} to {:.0%}".format(*figures.share_closed(runs, "quintet", "quartet2"))
    steps = {row: figures.steps_to(runs, row, "quartet2") for row in ("bf16", "quintet")}
    late_quintet = late("quintet", "quartet2")
    assert f"| bf16 | | {steps['bf16']} | | |" in account
    assert f"| quartet2 | | | | {late('quartet2', 'bf16')} |" in account
    quintet = f"| quintet | {closed} | {steps['quintet']} | {late_quintet} | {late('quintet', 'bf16')} |"
    assert quintet in account
    level = f"the two come out level (quintet minus quartet2: {late_quintet.replace('+-', '±')})"
    assert f"in equal time {level}" in " ".join(readme.split())
    assert {figures.steps_to(runs, row, "bf16")[:9] for row in ("quartet2", "quintet")} == {"never (0 "}


def test_the_long_account_tells_how_far_seeds_differ_and_when():
    account = " ".join((Path(figures.__file__).parent / "README.md").read_text().split())
    runs = figures.read()
    scratch = runs["10m", "installed", ""]
    branches = runs["10m", "novels", "quartet2-from-1000"]

    # The spread of losses, and of differences seed by seed
    def deviation(rows, row):
        return 1e3 * statistics.stdev(figures.final(run) for run in rows[row].values())

    between = figures.paired(scratch, "quintet", "quartet2")
    from_start = figures.paired(branches, "quintet_x2", "quartet2")
    assert f"losses deviate by {deviation(branches, 'quartet2'):.1f} over seeds" in account
    assert f"difference of quintet and quartet2 by {statistics.stdev(from_start):.1f}." in account
    apart = f"{deviation(scratch, 'quartet2'):.1f} and {statistics.stdev(between):.1f} in section 2"
    assert f"it removes little: {apart}" in account
    assert f"the differences reach from {min(between):.1f} to {max(between):.1f}." in account

    # When the difference comes
    def at(step):
        pairs = figures.pairs(scratch, "quintet", "quartet2").values()
        return in_words([1e3 * (run.validated[step] - other.validated[step]) for run, other in pairs])

    assert f"{at(1000)} at step 1000, {at(2000)} at 2000, {at(3000)} at 3000." in account


def test_the_long_account_tells_how_much_of_a_gap_is_there_at_once():
    account = " ".join((Path(figures.__file__).parent / "README.md").read_text().split())
    runs = figures.read()

    def gaps(start, corpus, step):
        rows = runs["10m", corpus, start]
        at_once = figures.paired(rows, "quartet2", "bf16", lambda run: run.trained.get(step, math.nan))
        late = figures.paired(rows, "quartet2", "bf16", figures.training)
        return statistics.mean(at_once), statistics.mean(late)

    first, last = gaps("quartet2-from-3400", "novels", 3420)
    assert f"quartet2 is {first:.1f} above bf16 after 20 steps, and {last:.1f} over the last tenth" in account
    first, last = gaps("bf16-from-3000", "installed", 3020)
    assert f"in training {first:.1f} after 20 steps, {last:.1f} over the last tenth" in account

    # Backward passes alone, and the end in bf16
    rows = runs["10m", "novels", "quartet2-from-3400"]
    found = [figures.paired(rows, row, "bf16") for row in ("bwd_eden", "bwd_sr", "bwd_sr_46", "bwd_four_six")]
    least, *_, most = sorted(map(statistics.mean, found))
    assert f"the four backward passes that ran cost {least:.1f} to {most:.1f} (2 to 5 seeds)" in account
    assert {len(values) for values in found} == {2, 3, 4, 5}
    second = in_words(figures.paired(rows, "quartet2_x2", "quartet2"))
    assert f"A second round of rotation gains {second.removeprefix('-')}" in account
    readme = " ".join((Path(figures.__file__).parents[2] / "README.md").read_text().split())
    assert f"The second changed the loss by {second.replace('+-', '±')} thousandths" in readme
    scratch = runs["10m", "novels", ""]
    gap = figures.differences(scratch, "quartet2", "bf16")
    end, = figures.paired(scratch, "quartet2_end", "bf16")
    assert f"ended {end:.1f} above bf16, where quartet2 ended {gap[1]:.1f} above" in account
    assert f"over {len(gap)} seeds quartet2 leaves {min(gap.values()):.0f} to {max(gap.values()):.0f}:" in (
        account.replace("five", "5"))


def test_the_long_account_has_the_first_screening_of_ideas():
    account = " ".join((Path(figures.__file__).parent / "README.md").read_text().split())
    rows = figures.read()["10m", "installed", "quartet2-from-3000"]
    for row in rows.keys() - {"bf16", "quartet2", "quintet", "quartet2_low_rank"}:
        first, second = figures.paired(rows, row, "quintet")
        found = re.search(rf"\| {row}: [^|]*\|[^|]*\| (\S+) \| (\S+) \|", account)
        assert found.groups() == (f"{first:.1f}", f"{second:.1f}"), row
    quartet2, quintet = ["{:.1f} and {:.1f}".format(*figures.paired(rows, row, "bf16"))
                         for row in ("quartet2", "quintet")]
    assert f"quartet2 ends {quartet2} above bf16, quintet {quintet}." in account
    readme = " ".join((Path(figures.__file__).parents[2] / "README.md").read_text().split())
    ends = [statistics.mean(figures.paired(rows, row, "bf16"))
            for row in ("quintet_two_end", "quintet", "quartet2")]
    words = ("ended {:.1f} above bf16, which went on from the same weights; quintet ended {:.1f} and quartet2 "
             "{:.1f} above. These were two")
    assert words.format(*ends) in readme
    low_rank = rows["quartet2_low_rank"][31]
    losses = {row: figures.final(rows[row][31]) for row in ("bf16", "quintet", "quartet2")}
    above, below = [1e3 * (figures.final(low_rank) - losses[row]) for row in ("quintet", "quartet2")]
    assert f"(once: {above:.1f} above quintet, and {-below:.1f} below quartet2, without any pull)" in account
    end = 1e3 * (figures.final(low_rank) - losses["bf16"])
    weights = 1e3 * (figures.in_bf16(low_rank) - losses["bf16"])
    assert f"ends {end:.1f} above bf16; validated in bf16, its weights are {weights:.1f} above" in account
    throughout = figures.read()["10m", "installed", ""]["bf16"]
    late = [1e3 * (figures.final(rows["bf16"][seed]) - figures.final(throughout[seed])) for seed in (31, 32)]
    assert "end {:.1f} and {:.1f} above those".format(*late) in account


def test_readme_and_the_long_account_have_what_two_terms_close_from_scratch():
    account = " ".join((Path(figures.__file__).parent / "README.md").read_text().split())
    readme = " ".join((Path(figures.__file__).parents[2] / "README.md").read_text().split())
    rows = figures.read()["10m", "installed", ""]
    below = figures.paired(rows, "quintet_two_end", "quintet")
    closed = "{:.0%} of quartet2's gap, {:.0%} to {:.0%}".format(
        *figures.share_closed(rows, "quintet_two_end", "quartet2"))
    assert f"{len(below)} of its 24 seeds have run" in account
    assert f"it ends {in_words(below)[1:]} below quintet, and closes {closed}." in account
    assert f"from scratch, {len(below)} have run: there it closes {closed[:3]}" in readme
    in_one = figures.paired(rows, "quintet_two_end", "quintet", lambda run: run.result.get(
        "val_loss_in_one_term", run.result["val_loss"]))
    assert f"If inputs are in one term again, it is {in_words(in_one)} above quintet" in account
    log = figures.RESULTS / "10m-installed-quintet_two_end-31.jsonl"
    ms = {r["step"]: r["ms"] for r in map(json.loads, open(log)) if "ms" in r}
    one = statistics.median(ms[step] for step in ms if step <= 3600)
    two = statistics.median(ms[step] for step in ms if step > 3600)
    assert f"A step with two terms takes {two:.1f} ms on an H200, where one takes {one:.1f}" in account


def test_the_long_account_has_what_quintet_closed_in_the_stated_test():
    account = (Path(figures.__file__).parent / "README.md").read_text()
    runs = figures.read()["10m", "novels", "quartet2-from-1000"]
    closed = "{:.0%}, {:.0%} to {:.0%}".format(*figures.share_closed(runs, "quintet_x2", "quartet2"))
    assert f"a third of quartet2's gap: {closed} by Fieller's interval" in account.replace("\n", " ")


def test_the_reviewer_is_answered_by_the_numbers_of_the_logs():
    account = " ".join((Path(figures.__file__).parent / "README.md").read_text().split())
    runs = figures.read()

    def in_training(size, start):
        rows = runs[size, "novels", start]
        share, _, _ = figures.share_closed(rows, "quintet_x2", "quartet2", figures.training)
        return f"{share:.0%}"

    small = in_training("10m", "quartet2-from-1000")
    middle = in_training("30m", "quartet2-from-700")
    large = in_training("100m", "quartet2-from-180")
    assert f"In training it is {small}." in account and f"closes {middle} of quartet2's gap" in account
    assert f"gap at 10.6M, {middle} at 30M (2 seeds) and {large} at 103M" in account
    assert f"quintet closed {small} of" in account

    rows = runs["10m", "installed", "quartet2-from-3000"]
    left = [statistics.mean(figures.paired(rows, row, "bf16"))
            for row in ("quintet_forward_end", "quartet2", "quintet_two_end")]
    assert "{:.1f} was left of {:.1f} (section 4, two seeds)".format(*left) in account
    assert f"Two terms of x left {left[2]:.1f}," in account
    rows = runs["10m", "installed", ""]
    found = [figures.paired(rows, row, "bf16", figures.in_bf16) for row in ("quintet", "quartet2")]
    weights = [in_words(values) for values in found]
    assert {len(values) for values in found} == {4} and "over 4 seeds from scratch" in account
    assert f"its weights are {weights[0]} above bf16, and quartet2's {weights[1]}." in account

    rows = runs["10m", "novels", "quartet2-from-3400"]
    costs = {row: f"{statistics.mean(figures.paired(rows, row, 'bf16')):.2f}" for row in rows}
    assert f"SR costs {costs['bwd_sr']}, SR with 4/6, which is biased, {costs['bwd_sr_46']}" in account
    assert f"rounding to nearest after rotations {costs['bwd_four_six']}." in account


def test_the_long_account_has_the_numbers_of_other_sums():
    account = (Path(figures.__file__).parent / "README.md").read_text()
    runs = figures.read()
    from_step_0 = runs["cpu", "python", ""]
    from_a_start = runs["10m_short", "installed", "quartet2-from-200"]
    for row in "quartet2_blackwell", "quartet2_nudged":
        lines = [line for line in account.splitlines() if line.startswith(f"| {row}: ")]
        for line, rows in zip(lines, (from_step_0, from_a_start), strict=True):
            found = figures.paired(rows, row, "quartet2")
            assert line.endswith(f"| {len(found)} | {in_words(found)} |")


def test_the_long_account_has_the_numbers_of_d12():
    account = (Path(figures.__file__).parent / "README.md").read_text()
    rows = figures.read()["d12", "installed", ""]
    for recipe, runs in rows.items():
        result = runs[1].result
        loss = result["val_loss"]
        speed = round(result["tokens_per_s"], -3)
        expected = f"| {recipe} | {loss:.4f} | {loss / math.log(2):.4f} | {speed:,.0f} |"
        assert expected in account


def test_the_long_account_has_the_numbers_of_the_change_to_4_bits():
    account = (Path(figures.__file__).parent / "README.md").read_text()
    branched = figures.read()["10m", "installed", "bf16-from-3000"]
    throughout = figures.read()["10m", "installed", ""]
    rows = {
        "quartet2 throughout": {row: {seed: throughout[row][seed] for seed in branched["quartet2"]}
                                for row in ("bf16", "quartet2")},
        "bf16, the last quarter by quartet2": branched,
    }
    for name, runs in rows.items():
        found = figures.paired(runs, "quartet2", "bf16")
        mean, half = figures.interval(found)
        assert f"| {name} | {len(found)} | {mean:.1f} +- {half:.1f} |" in account
