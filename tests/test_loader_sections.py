"""The loader benchmark beside its loaders: what is counted is what happened, ratios are of one turn, a failure is told."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import loader, loader_reading, loader_sections, loader_server, loader_streaming
from benchmarks.loader_contestants import OURS, Spec, settings
from benchmarks.loader_process import Contestant, Failed
from benchmarks.loader_sections import SECTIONS
from benchmarks.loader_server import ShardServer, all_together, each_connection
from benchmarks.loader_turns import in_turns, interleaved, ratio, spread
from benchmarks.report_files import read_result
from ddpm_dist.data.choose_order import make_order
from ddpm_dist.data.encode import PACK_FORMATS
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import pack

WORDS = ["--size", "16", "--images", "48", "--batch", "8", "--turns", "5", "--turn-seconds", "0.04"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Index:
    """Five shards of eight images."""
    return pack(
        "shapes", tmp_path_factory.mktemp("sections") / "s", num=40, size=16, samples_per_shard=8, workers=1
    ).index


def spec(source: Index, **changes) -> Spec:
    given = {"shards": str(source.folder), "folder": "", "size": 16, "batch": 2, "workers": 0, "threads": 1}
    return Spec(OURS, **{**given, **changes})


def spreads(turns: list[float], found: dict) -> bool:
    return len(turns) == 5 and found == spread(turns)


@pytest.mark.slow
def test_all_sections_are_measured_and_fit_together(tmp_path, capsys):
    only = itertools.chain(*(("--only", name) for name in SECTIONS))
    assert loader.main([*WORDS, *only, "--json", str(tmp_path / "loader.json")]) == 0
    report = read_result(tmp_path / "loader.json").data  # checked against the schema
    assert report["entries"] == [] and all(report[name].get("problem") is None for name in SECTIONS)

    found = report["indexing"]
    assert spreads(found["mb_per_cpu_second_turns"], found["mb_per_cpu_second"]) and found["images"] == 48
    pairs = zip(found["mb_per_cpu_second_turns"], found["plain_mb_per_cpu_second_turns"], strict=True)
    assert found["to_plain"] == spread([scan / plain for scan, plain in pairs])
    assert found["to_target"]["median"] == found["mb_per_cpu_second"]["median"] / 150

    found = report["check"]
    for name in ("check", "strict", "dali", "pillow"):
        assert spreads(found[f"{name}_us_turns"], found[f"{name}_us"])
    for name, other in (("check_to_dali", "dali"), ("check_to_pillow", "pillow")):
        pairs = zip(found["check_us_turns"], found[f"{other}_us_turns"], strict=True)
        assert found[name] == spread([check / alone for check, alone in pairs])

    found = report["streaming"]
    assert (found["images"], found["shards"]) == (48, 24)
    assert found["fetched_mb"] == pytest.approx(found["mb"]) and found["fetched_later_mb"] == 0
    for part, key in (("loader", "images_per_sec_turns"), ("reading", "mb_per_second_turns")):
        pairs = zip(found[part][key], found[part][f"local_{key}"], strict=True)
        assert found[part]["to_local"] == spread([far / near for far, near in pairs])
    for start in found["cold"]:
        assert spreads(start["shards_sent_turns"], start["shards_sent"]) and start["shards_sent"]["lowest"] >= 1
        assert start["shards_sent"]["highest"] <= 24
        assert 0 < start["first_batch_s"]["lowest"] and start["first_to_whole"]["highest"] <= 1

    entries = {each["name"]: each for each in report["formats"]["entries"]}
    assert set(entries) == set(PACK_FORMATS) and next(iter(entries)) == "jpg" and "to_jpg" not in entries["jpg"]
    for name in set(entries) - {"jpg"}:
        pairs = zip(entries[name]["images_per_sec_turns"], entries["jpg"]["images_per_sec_turns"], strict=True)
        assert entries[name]["to_jpg"] == spread([own / jpg for own, jpg in pairs])
    if "raw" in entries:
        assert 16 * 16 * 3 <= entries["raw"]["bytes_per_image"] < 16 * 16 * 3 + 64

    printed = capsys.readouterr().out
    reached = report["indexing"]["mb_per_cpu_second"]["median"] >= 150
    (line,) = [line for line in printed.splitlines() if line.startswith("| indexing, MB/s")]
    assert ("not reached" in line) == (not reached) and "images/s to jpg" in printed


def test_ratios_are_of_one_turn():
    """A machine that becomes ten times slower in the middle changes no ratio, though it changes the medians."""
    now, pace = [0.0], itertools.chain([1.0] * 6, itertools.repeat(10.0))
    calls = []

    def action(name: str, seconds: float):
        def act() -> float:
            calls.append(name)
            now[0] += seconds * next(pace)
            return 3.0

        return act

    rates = interleaved({"a": action("a", 1.0), "b": action("b", 2.0)}, 5, 0.0, lambda: now[0])
    assert calls == ["a", "b", *"ab", *"ba", *"ab", *"ba", *"ab"]
    assert rates["a"] == [3.0, 3.0, 0.3, 0.3, 0.3] and rates["b"] == [1.5, 1.5, 0.15, 0.15, 0.15]
    assert ratio(rates["a"], rates["b"]) == {"median": 2.0, "lowest": 2.0, "highest": 2.0}
    assert ratio([1.0, 4.0], [0.0, 2.0])["median"] == 2.0 and ratio([1.0], [0.0]) == {}
    assert in_turns("abc", 0) == ["a", "b", "c"] and in_turns("abc", 1) == ["c", "b", "a"]
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


# -- how many shards had been sent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_sent_at_the_first_batch_are_counted(shards, tmp_path, monkeypatch, count):
    """The first batch is handed over when so many shards have been sent; the others are sent only when the second batch is asked for."""
    second, asked = threading.Event(), []

    class Watched(loader_streaming.Loader):
        def next(self):
            asked.append(self)
            if len(asked) == 2:
                second.set()
            batch = super().next()
            while len(asked) == 1 and len(server.finished) < count:
                time.sleep(0.005)
            return batch

    monkeypatch.setattr(loader_streaming, "Loader", Watched)
    with ShardServer(shards.folder) as server:
        remote = loader_streaming.index_of(server, shards, tmp_path / "remote")
        own = spec(shards, shards=str(remote), data={"order": "blocks", "block_shards": 1})
        index = Index.load(remote)
        ids = make_order(index, settings(own, index), 0, own.batch).locate(np.arange(len(index)))[1]
        order = [Path(index.location(n)).name for n in dict.fromkeys(index.shard_of(ids).tolist())]
        assert len(order) == 5

        def pace(name: str, sent: int, began: float) -> None:
            if name not in order[:count]:
                assert second.wait(60)

        server.forget()
        one = SimpleNamespace(must=lambda command, cache_dir: loader_streaming.cold(own, cache_dir))
        found = loader_streaming.one_cold_start(one, server, pace, tmp_path / "cache")
        assert found["shards_sent"] == count and len(server.finished) == 5
        assert found["first_to_whole"] == found["first_batch_s"] / found["whole_set_s"] < 1
        assert server.pace is loader_server.unlimited and not (tmp_path / "cache").exists()
        assert len(asked) == 20  # batches of an epoch


def test_server_sends_shards_ranges_and_nothing_else(shards):
    name, whole = shards.shards[0].name, (shards.folder / shards.shards[0].name).read_bytes()
    with ShardServer(shards.folder) as server:

        def get(name: str, **headers: str) -> tuple[int, bytes]:
            with urllib.request.urlopen(
                urllib.request.Request(server.url(name), headers=headers), timeout=30
            ) as answer:
                return answer.status, answer.read()

        def counted(total: int) -> bool:
            """The other side may have read everything a moment before it is counted here."""
            deadline = time.monotonic() + 30
            while (server.sent, set(server.finished)) != (total, {name}) and time.monotonic() < deadline:
                time.sleep(0.01)
            return (server.sent, set(server.finished)) == (total, {name})

        assert get(name) == (200, whole) and counted(len(whole)) and server.requests == 1
        with server.lock:
            server.finished.clear()
        assert get(name, Range="bytes=1000-") == (206, whole[1000:])
        assert counted(2 * len(whole) - 1000)
        moment = server.finished[name]
        assert (server.sent_by(moment), server.sent_by(moment - 1e-6)) == (1, 0)
        for other, code, headers in (
            ("index.json", 404, {}),
            ("..%2Fs%2F" + name, 404, {}),
            (name, 416, {"Range": f"bytes={len(whole)}-"}),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(other, **headers)
            assert caught.value.code == code
        server.forget()
        assert (server.requests, server.sent, server.finished) == (0, 0, {})


def test_limits_of_the_server(monkeypatch):
    """By a clock of its own: with a limit for each connection two take as long as one, with one for all together twice as long."""
    clock = SimpleNamespace(now=100.0, slept=[])
    clock.monotonic = lambda: clock.now
    clock.sleep = clock.slept.append
    monkeypatch.setattr(loader_server, "time", clock)
    piece = loader_server.PIECE
    pace = each_connection(piece / 2)  # a piece takes two seconds
    for name, sent in (("a", 0), ("b", 0), ("a", piece), ("b", piece)):
        pace(name, sent, 100.0)
    assert clock.slept == [0.0, 0.0, 2.0, 2.0]
    clock.now = 103.0
    pace("a", 2 * piece, 100.0)
    pace("a", piece, 100.0)  # late already
    assert clock.slept[4:] == [1.0, 0.0]
    clock.slept.clear()
    pace = all_together(piece / 2)
    for name in "abab":
        pace(name, 0, 103.0)
    assert clock.slept == [0.0, 2.0, 4.0, 6.0]
    clock.now = 150.0  # what was not used is not saved up
    pace("a", 0, 103.0)
    pace("b", 0, 103.0)
    assert clock.slept[4:] == [0.0, 2.0]


# -- what must not pass as fast ----------------------------------------------------------------------------------------


def test_a_scan_that_does_not_see_every_image_is_an_error(shards, tmp_path):
    assert loader_reading.some_shards(shards, 17) == [0, 1, 2] and loader_reading.some_shards(shards, 1000) == [
        *range(5)
    ]
    assert loader_reading.samples_of(shards, [0, 1]).tolist() == [*range(16)]
    wanted = loader_reading.Wanted(loader_reading.LABELS)
    loader_reading.scan_shards(shards, [0, 1], wanted)
    copy = tmp_path / "s"
    shutil.copytree(shards.folder, copy)
    index = Index.load(copy)
    shutil.copy(copy / index.shards[1].name, copy / index.shards[0].name)
    with pytest.raises(UserError, match="another shard than the index describes"):
        loader_reading.scan_shards(index, [0], wanted)
    (copy / index.shards[2].name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="truncated tar"):
        loader_reading.scan_shards(index, [2], wanted)
    (copy / index.shards[3].name).unlink()
    with pytest.raises(UserError, match="No such file"):
        loader_reading.scan_shards(index, [3], wanted)


def test_decoders_to_compare_with_decode_every_image(shards):
    files = shards.read_many(np.arange(21))
    for decoder in (loader_reading.dali_decoder(files, 8), loader_reading.pillow_decoder(files)):
        assert decoder() == decoder() == 21
    with pytest.raises(Exception):  # noqa: B017 - each library has its own
        loader_reading.pillow_decoder([files[0][:100]])()


def test_a_section_that_fails_says_so_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def fails(self, command, **options):
        if command == "check":
            raise Failed("failed: MemoryError: too little")
        return real(self, command, **options)

    real = Contestant.must
    monkeypatch.setattr(Contestant, "must", fails)
    words = ["--only", "indexing", "--only", "check", "--json", str(tmp_path / "loader.json")]
    assert loader.main([*WORDS, *words]) == 1
    report = read_result(tmp_path / "loader.json").data
    assert report["check"] == {"problem": "failed: MemoryError: too little"} and "streaming" not in report
    assert report["indexing"]["images"] == 48 and "failed: MemoryError" in capsys.readouterr().out


def test_what_goes_wrong_in_a_process_becomes_the_problem(shards, tmp_path):
    (tmp_path / "s").mkdir()
    one = Contestant(spec(shards, shards=str(tmp_path / "s")))
    try:
        one.start([min(os.sched_getaffinity(0))])
        with pytest.raises(Failed, match="failed: UserError: shard folder .* is empty"):
            one.must("indexing", turns=5, seconds=0.01)
    finally:
        one.close()
    assert one.failed


def test_your_own_shards_are_packed_in_every_format_from_what_they_hold(shards, tmp_path):
    found = loader_sections.sets_of(shards, False, tmp_path)
    assert list(found) == sorted(PACK_FORMATS, key="jpg".__ne__)
    assert sorted(found["jpg"].read_many(np.arange(40))) == sorted(shards.read_many(np.arange(40)))  # byte for byte
    pixels = {
        name: sorted(
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes() for data in index.read_many(np.arange(40))
        )
        for name, index in found.items()
    }
    assert all(each == pixels["jpg"] for each in pixels.values())


@pytest.mark.parametrize(
    ("words", "loaders", "sections"),
    [
        ([], 7, 4),
        (["--no-data"], 7, 0),
        (["--only", OURS], 1, 0),
        (["--only", "check", "--only", OURS], 1, 1),
        (["--only", "streaming"], 0, 1),
    ],
)
def test_what_is_measured(words, loaders, sections):
    args = loader.parse(words)
    assert (len(args.loaders), len(args.sections)) == (loaders, sections)


def test_no_data_and_a_section_contradict_each_other(capsys):
    assert loader.main(["--no-data", "--only", "check"]) == 2
    assert "--no-data leaves out check" in capsys.readouterr().err
