"""Comparing reports: a regression is a number that became worse beyond the noise of both runs, and nothing else is."""

from __future__ import annotations

import copy

import pytest
from report_copies import MACHINE, RESULTS, ladder, loader, real, training, write

from benchmarks import report, report_compare


def compare(tmp_path, old, new) -> int:
    paths = write(tmp_path / "old.json", old), write(tmp_path / "new.json", new)
    return report.main(["--compare", *map(str, paths)])


def line(text: str, name: str) -> str:
    return next(each for each in text.splitlines() if each.strip().startswith(name + " "))


@pytest.mark.parametrize(
    ("rate", "spread", "code", "word"),
    [
        (10.0, 0.01, 0, "within the noise"),
        (9.0, 0.01, 1, "REGRESSION"),
        (9.0, 0.12, 0, "within the noise"),  # the ranges meet
        (9.83, 0.0001, 0, "within the noise"),  # apart, but less than 2 %
        (9.79, 0.0001, 1, "REGRESSION"),
        (11.0, 0.01, 0, "better"),
    ],
)
def test_rates(tmp_path, capsys, rate, spread, code, word):
    assert compare(tmp_path, training(4, 10.0, min(spread, 0.01)), training(4, rate, spread)) == code
    found = line(capsys.readouterr().out, "ddpm_dist.images_per_sec")
    assert found.endswith(word) and f"{rate / 10 - 1:+.1%}" in found


def test_less_is_better_for_times(tmp_path, capsys):
    old, new = real("sampling"), real("sampling")
    for each in new["entries"]:
        if each["system"] == "ddpm_dist" and each["sampler"] == "ddpm" and each["batch"] == 1 and each["guidance"] == 3:
            each["step_ms"] *= 3
            each["step_ms_turns"] = [3 * turn for turn in each["step_ms_turns"]]
    assert compare(tmp_path, old, new) == 1
    text = capsys.readouterr().out
    assert text.count("REGRESSION") == 1 and "+200.0%" in text
    assert compare(tmp_path, new, old) == 0
    assert " better" in capsys.readouterr().out


def test_others_becoming_slower_is_no_regression(tmp_path, capsys):
    old, new = training(4, 10.0), training(4, 10.0)
    for key in ("images_per_sec", "images_per_sec_lowest", "images_per_sec_highest"):
        new["reference"][key] /= 5
    sampling = real("sampling")
    for each in sampling["entries"]:
        if each["system"] != "ddpm_dist":
            each["step_ms_turns"] = [9 * turn for turn in each["step_ms_turns"]]
            each["step_ms"] *= 9
    assert compare(tmp_path, old, new) == 0
    assert "-80.0%" in line(capsys.readouterr().out, "reference.images_per_sec")
    assert compare(tmp_path, real("sampling"), sampling) == 0
    assert compare(tmp_path, loader(ddpm_dist=50.0, webdataset=50.0), loader(ddpm_dist=50.0, webdataset=5.0)) == 0
    assert compare(tmp_path, loader(ddpm_dist=50.0, webdataset=50.0), loader(ddpm_dist=5.0, webdataset=50.0)) == 1


def test_entries_are_paired_by_what_they_are(tmp_path, capsys):
    old = ladder(1.0, 2.0, 3.0, None)
    new = copy.deepcopy(old)
    new["rungs"].reverse()
    assert compare(tmp_path, old, new) == 0
    assert "REGRESSION" not in capsys.readouterr().out
    assert compare(tmp_path, old, ladder(1.0, 2.0, 2.5, None)) == 1
    text = capsys.readouterr().out
    assert "REGRESSION" in line(text, "rungs[rung 2].images_per_sec") and text.count("REGRESSION") == 1


def test_two_runs_of_a_noisy_machine(capsys):
    """Measured twice within hours, the second time under twice the load: no false alarm, in either direction."""
    paths = [str(RESULTS / MACHINE / f"{name}.json") for name in ("scaling", "scaling_again")]
    assert report.main(["--compare", *paths]) == 0
    assert report.main(["--compare", *reversed(paths)]) == 0
    assert "points[mode=weak, nodes=1, ranks=4, global_batch=8].images_per_sec" in capsys.readouterr().out


def test_numbers_without_spread_are_listed(tmp_path, capsys):
    new = real("ema")
    new["ways"]["sharded over 8"]["update_ms"] *= 2
    assert compare(tmp_path, real("ema"), new) == 0
    found = line(capsys.readouterr().out, "ways.sharded over 8.update_ms")
    assert "+100.0%" in found and found.endswith("no spread measured")


def test_other_versions_and_settings_are_said(tmp_path, capsys):
    new = training(4, 10.0)
    new["environment"]["versions"]["torch"] = "9.9"
    new["config"]["train.channels_last"] = False
    assert compare(tmp_path, training(4, 10.0), new) == 0
    text = capsys.readouterr().out
    assert "torch " in text and " -> 9.9" in text and "train.channels_last True -> False" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["environment"]["hardware"].update(cpu="Other"), "hardware.cpu"),
        (lambda d: d["environment"]["hardware"].update(cores=64), "hardware.cores"),
        (lambda d: d["environment"]["hardware"].update(gpus=["H200"]), "hardware.gpus"),
        (lambda d: d["environment"].update(threads=1), "the number of threads"),
        (lambda d: d.update(batch_per_rank=8), "batch_per_rank is 4 in the first and 8 in the second"),
        (lambda d: d["config"].update({"data.image_size": 32}), "data.image_size"),
        (lambda d: d["config"].update({"model.name": "unet"}), "model.name"),
    ],
)  # fmt: skip
def test_different_things_are_refused(tmp_path, capsys, change, message):
    new = real("train_throughput")
    change(new)
    assert compare(tmp_path, real("train_throughput"), new) == 2
    said = capsys.readouterr()
    assert message in said.err and "cannot be compared" in said.err and said.out == ""


def test_different_benchmarks_are_refused(tmp_path, capsys):
    assert compare(tmp_path, real("ema"), real("engines")) == 2
    assert "the benchmark is ema in the first and engines in the second" in capsys.readouterr().err


def test_folders(tmp_path, capsys):
    for side, rate in (("old", 10.0), ("new", 5.0)):
        write(tmp_path / side / "train.json", training(4, rate))
        write(tmp_path / side / "ema.json", real("ema"))
        write(tmp_path / side / "model.json", real("scaling_model"))
        write(tmp_path / side / f"{side}_only.json", real("ema"))
    both = ["--compare", str(tmp_path / "old"), str(tmp_path / "new")]
    assert report.main(both) == 1
    said = capsys.readouterr()
    assert "regressions in: train.json" in said.out and "old_only.json" in said.err and "new_only.json" in said.err
    (tmp_path / "new" / "ema.json").write_text("{")  # a file that cannot be judged is not passed over
    assert report.main(both) == 2
    said = capsys.readouterr()
    assert "ema.json" in said.err and "regressions in: train.json" in said.out
    assert report.main(["--compare", str(RESULTS / MACHINE), str(RESULTS / MACHINE)]) == 0


def test_what_cannot_be_compared(tmp_path, capsys):
    good = str(write(tmp_path / "good.json", real("ema")))
    (tmp_path / "bad.json").write_text('{"benchmark": "ema"}')
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([good, str(tmp_path / "bad.json")], "not a whole report of ema"),
        ([good, str(tmp_path / "none.json")], "no such file or folder"),
        ([good, str(tmp_path)], "two files or two folders"),
        ([str(tmp_path), str(tmp_path / "empty")], "no report of the same name"),
    ):
        assert report.main(["--compare", *words]) == 2
        assert message in capsys.readouterr().err
    assert report.main(["--check", "--compare", good, good]) == 2


def test_a_fifth_less_is_seen_although_single_turns_overlap():
    turns = [1.7, 1.9, 2.0, 2.0, 2.05, 2.1, 2.2]

    def of(factor):
        rates = [factor * rate for rate in turns]
        return dict(report_compare.measures({"images_per_sec": factor * 2.0, "images_per_sec_turns": rates}))[
            "images_per_sec"
        ]

    def verdict(factor):
        return report_compare.verdict("ddpm_dist.images_per_sec", of(1.0), of(factor))

    assert of(1.0).low < of(0.8).high * 1.1 and verdict(0.85) == "REGRESSION"  # 1.70 .. 2.20 and 1.45 .. 1.87 overlap
    assert verdict(1.2) == "better" and verdict(0.95) == "within the noise" and verdict(1.0) == "within the noise"
