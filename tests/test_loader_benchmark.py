"""The loader benchmark: contestants deliver whole epochs or are called wrong, CPU seconds are all counted, its report fits together."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import loader
from benchmarks.loader_contestants import (
    CONTESTANTS,
    DALI,
    OURS,
    TORCHVISION,
    WEBDATASET,
    Spec,
    check_epoch,
    expected,
)
from benchmarks.reference import unpack_shards
from benchmarks.report_files import read_result
from ddpm_dist.pack import pack

CACHED = "ddpm_dist, cpu, cache host"
SMALL = ["--turns", "5", "--turn-seconds", "0.05", "--batch", "8"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """30 images: no multiple of the batch, so that batches straddle epochs."""
    folder = tmp_path_factory.mktemp("loader")
    index = pack("shapes", folder / "shards", num=30, size=16, samples_per_shard=10, workers=1).index
    unpack_shards(index.folder, folder / "folder")
    return index, folder


def spec(folder, name, **changes):
    values = {"size": 16, "batch": 8, "workers": 0, "threads": 1, **changes}
    return Spec(name, str(folder / "shards"), str(folder / "folder"), **values)


@pytest.mark.parametrize("name", [OURS, CACHED, DALI, WEBDATASET, TORCHVISION])
def test_everybody_delivers_an_epoch(packed, name):
    index, folder = packed
    stream = CONTESTANTS[name](spec(folder, name, endless=name != WEBDATASET))
    assert check_epoch(stream, expected(index)) is None
    stream.close()


def test_webdataset_goes_on_after_an_epoch(packed):
    _, folder = packed
    stream = CONTESTANTS[WEBDATASET](spec(folder, WEBDATASET))
    assert [len(labels) for _, labels in itertools.islice(stream, 12)] == [8] * 12


def test_what_is_not_an_epoch_is_called_wrong(packed):
    index, folder = packed
    wanted = expected(index)

    def check(change):
        """The second batch of our stream is changed; all of it lies in the first epoch."""
        stream = CONTESTANTS[OURS](spec(folder, OURS))
        changed = (change(*batch) if number == 1 else batch for number, batch in enumerate(stream))
        return check_epoch(changed, wanted)

    def dropped(pixels, labels):
        pixels[3], labels[3] = pixels[4], labels[4]
        return pixels, labels

    assert check(lambda pixels, labels: (pixels.flip(0), labels.flip(0))) is None
    assert "the first 30 images are 29 different" in check(dropped)
    assert "labels" in check(lambda pixels, labels: (pixels, (labels + 1) % 10))
    assert "brightness" in check(lambda pixels, labels: (pixels.flip(0), labels))
    assert "float32 images" in check(lambda pixels, labels: (pixels.float(), labels))
    two = itertools.islice(CONTESTANTS[OURS](spec(folder, OURS)), 2)
    assert "ends after 16 of 30" in check_epoch(two, wanted)


def test_takes_turns_and_the_report_fits_together(packed, tmp_path, capsys):
    index, folder = packed
    words = [
        "--shards",
        str(folder / "shards"),
        "--json",
        str(tmp_path / "loader.json"),
        "--markdown",
        str(tmp_path / "t.md"),
    ]
    chosen = [OURS, "ddpm_dist, mixed", DALI, WEBDATASET]
    assert loader.main([*words, *SMALL, *itertools.chain(*(("--only", name) for name in chosen))]) == 0
    report = read_result(tmp_path / "loader.json").data  # checked against the schema
    assert (
        report["size"] == 16 and report["images"] == 30 and report["cores"] == 1 and report["dataloader_workers"] == 1
    )
    assert report["kb_per_image"] == pytest.approx(index.samples["size"].mean() / 1000)
    entries = {each["name"]: each for each in report["entries"]}
    assert list(entries) == chosen
    if entries["ddpm_dist, mixed"]["problem"] is not None:
        assert entries["ddpm_dist, mixed"] == {"name": "ddpm_dist, mixed", "problem": "needs a GPU"}
    ours, theirs = entries[OURS], entries[DALI]
    for each in (ours, theirs, entries[WEBDATASET]):
        assert each["problem"] is None and len(each["images_per_sec_turns"]) == 5
        assert each["images_per_sec"] == statistics.median(each["images_per_sec_turns"])
    ratios = [a / b for a, b in zip(ours["images_per_sec_turns"], theirs["images_per_sec_turns"], strict=True)]
    assert ours["to_dali"]["median"] == statistics.median(ratios) and "to_dali" not in theirs
    parts = report["parts_us"]
    assert all(value > 0 for value in parts.values()) and parts["of that pread"] < parts["read and checksum"]
    printed = capsys.readouterr().out
    assert f"decode {parts['decode']:.1f}" in printed and printed == (tmp_path / "t.md").read_text()


def test_one_that_leaves_out_an_image_is_wrong_not_fast(tmp_path, monkeypatch):
    def forgetful(shards, target):
        unpack_shards(shards, target)
        next(target.rglob("*.jpg")).unlink()
        return target

    monkeypatch.setattr(loader, "unpack_shards", forgetful)
    words = ["--images", "40", "--size", "16", "--only", TORCHVISION, "--json", str(tmp_path / "report.json")]
    assert loader.main([*SMALL, *words]) == 1
    (entry,) = read_result(tmp_path / "report.json").data["entries"]
    assert entry == {"name": TORCHVISION, "problem": "wrong: the first 40 images are 39 different ones"}


BURNS = """
import subprocess, sys, threading, time
from benchmarks.loader_process import CpuMeter
burn = "import time\\nwhile time.process_time() < {}: pass\\nprint(flush=True)\\ninput()"
def start(seconds):
    child = subprocess.Popen([sys.executable, "-c", burn.format(seconds)], stdin=-1, stdout=-1)
    child.stdout.readline()
    return child
before = start(0.5)  # is there already: what it has burnt before does not count
meter = CpuMeter()
nothing = meter.used()
child = start(0.5)
alive = meter.used()
child.communicate(b"\\n")
ended = meter.used()
def work():
    end = time.thread_time() + 0.3
    while time.thread_time() < end: pass
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(nothing, alive, ended, meter.used())
before.communicate(b"\\n")
"""


def test_cpu_seconds_of_children_and_threads_are_counted():
    done = subprocess.run(
        [sys.executable, "-c", BURNS], cwd=ROOT, capture_output=True, text=True, start_new_session=True
    )
    nothing, alive, ended, thread = map(float, done.stdout.split())
    assert nothing < 0.1
    assert 0.45 < alive < 0.8
    assert alive - 0.05 < ended < alive + 0.1
    assert 0.25 < thread - ended < 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--turns", "4"], "--turns must be at least 5, not 4"),
        (["--cores", "100000"], "this process may use"),
        (["--turn-seconds", "0"], "--turn-seconds must be above 0"),
        (["--images", "8"], "--images must be at least 64, not 8"),
        (["--shards", "x", "--size", "64"], "leave out --size"),
        (["--shards", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--json", "/nowhere/at/all.json"], "its folder does not exist"),
    ],
)
def test_bad_options(words, said, capsys):
    assert loader.main(words) == 2
    assert said in capsys.readouterr().err


def test_shards_that_do_not_fit_are_refused(packed, tmp_path, capsys):
    _, folder = packed
    pack("shapes", tmp_path / "png", num=10, size=16, image_format="png", channels=1, workers=1)
    assert loader.main(["--shards", str(tmp_path / "png")]) == 2
    assert "found grey png, sides 16 to 16, 10 classes; pack with --format jpg" in capsys.readouterr().err
    assert loader.main(["--shards", str(folder / "shards")]) == 2
    assert "30 images, fewer than one batch of 64" in capsys.readouterr().err
    assert loader.main(["--shards", str(folder / "shards"), "--batch", "8", "--workers", "4"]) == 2
    assert "3 shards for 4 workers" in capsys.readouterr().err


def test_expected_is_sorted_by_label_then_brightness(packed):
    wanted = expected(packed[0])
    assert wanted.shape == (30, 2) and (wanted[:, 0] == np.repeat(np.arange(10), 3)).all()
    assert (np.diff(wanted[:, 1].reshape(10, 3)) >= 0).all()
