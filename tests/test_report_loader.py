"""The report of what the loader benchmark measures beside its loaders: tables, targets by the numbers, and older reports without them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from report_copies import MACHINE, loader, place, words, write

from benchmarks import report
from benchmarks.loader_tables import section_lines
from benchmarks.report_files import read_result


def spread(middle: float, low: float = 0.9, high: float = 1.1) -> dict[str, float]:
    return {"median": middle, "lowest": low * middle, "highest": high * middle}


def sections(
    speed: float = 200.0, check: float = 1.25, warm: float = 0.95, sent: tuple[int, int, int] = (1, 1, 2)
) -> dict[str, Any]:
    start = {
        "name": "each connection limited", "batch": 16, "shard_s": 0.4, "target": 3,
        "shards_sent": dict(zip(("lowest", "median", "highest"), sent, strict=True)),
        "first_batch_s": spread(0.5), "whole_set_s": spread(2.0), "first_to_whole": spread(0.25),
    }  # fmt: skip
    ratios = {"to_jpg": spread(1.75), "per_cpu_second_to_jpg": spread(1.8)}
    timed = {"images_per_sec": spread(20_000.0), "cpu_us_per_image": spread(55.0), "problem": None}
    return {
        "indexing": {
            "mb_per_cpu_second": spread(speed), "plain_mb_per_cpu_second": spread(800.0), "to_plain": spread(0.375), "target": 150.0,
        },
        "check": {
            "check_us": spread(60.0), "check_to_dali": spread(check), "strict_to_dali": spread(0.625), "check_to_pillow": spread(0.875),
            "target": 1.5,
        },
        "streaming": {
            "images": 2500, "shards": 24, "target": 0.8, "reading": {"to_local": spread(warm)}, "loader": {"to_local": spread(warm)},
            "cold": [start],
        },
        "formats": {
            "images": 2500,
            "entries": [
                {"name": "jpg", "bytes_per_image": 4321.0, **timed}, {"name": "raw", "bytes_per_image": 12_301.0, **timed, **ratios},
                {"name": "webp", "bytes_per_image": 3210.0, "problem": "wrong: the labels | of an epoch"},
            ],
        },
    }  # fmt: skip


def rows(lines: list[str], start: str) -> list[list[str]]:
    found = [line for line in lines if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found]


def test_tables_and_first_table_have_the_sections(tmp_path):
    folder = place(tmp_path)
    write(folder / "results" / MACHINE / "loader.json", {**loader(**{"ddpm_dist, cpu": 9000.0}), **sections()})
    assert report.main(words(folder)) == 0
    text, readme = ((folder / name).read_text().splitlines() for name in ("REPORT.md", "README.md"))
    assert rows(text, "indexing, MB/s")[0][1:] == ["200", "180 .. 220", "at least 150", "reached"]
    assert rows(text, "check of every image, times DALI")[0][1:] == ["1.25", "1.12 .. 1.38", "at most 1.5", "reached"]
    assert rows(text, "our loader on a warm shard cache, to local shards ")[-1][1:] == [
        "0.950",
        "0.855 .. 1.04",
        "at least 0.8",
        "reached",
    ]
    assert rows(text, "cold start: shards sent")[0][1:] == ["1", "1 .. 2", "below 3", "reached"]
    assert rows(text, "raw")[0][1:] == ["20,000", "18,000 .. 22,000", "55.0", "12,301", "1.75", "1.80"]
    assert rows(text, "jpg")[0][-2:] == ["-", "-"] and "wrong: the labels \\| of an epoch" in "\n".join(text)
    for start, cell in (
        ("indexing shards", "200 (180 .. 220), 64x64"), ("checking every image", "1.25 (1.12 .. 1.38), 64x64"),
        ("our loader on a warm", "0.95 (0.855 .. 1.04), 64x64"), ("cold start of a loader", "2 (each connection limited)"),
    ):  # fmt: skip
        assert rows(readme, start)[0][1].startswith(cell), start


@pytest.mark.parametrize(
    ("start", "missed"),
    [
        ("indexing, MB/s", {"speed": 149.9}),
        ("check of every image, times DALI", {"check": 1.51}),
        ("files read through", {"warm": 0.79}),
        ("our loader on a warm", {"warm": 0.79}),
        ("cold start: shards sent", {"sent": (1, 1, 3)}),  # one start of many
    ],
)
def test_targets_are_judged_by_the_numbers(start, missed):
    assert rows(section_lines(sections()), start)[0][-1] == "reached"
    lines = section_lines(sections(**missed))
    assert rows(lines, start)[0][-1] == "not reached"
    limits = {"speed": 150.0, "check": 1.5, "warm": 0.8, "sent": (0, 2, 2)}
    assert rows(section_lines(sections(**{key: limits[key] for key in missed})), start)[0][-1] == "reached"


def test_without_sections_nothing_is_said_of_them(tmp_path):
    folder = place(tmp_path)
    write(folder / "results" / MACHINE / "loader.json", loader(**{"ddpm_dist, cpu": 9000.0}))
    assert report.main(words(folder)) == 0
    for name in ("REPORT.md", "README.md"):
        text = (folder / name).read_text()
        assert "indexing" not in text and "cold start" not in text and "our loader, images/s" in text
    assert section_lines(loader(a=1.0)) == []


def test_sections_without_loaders_and_sections_that_failed(tmp_path):
    folder = place(tmp_path)
    data = {
        **loader(),
        **sections(),
        "check": {"problem": "failed: MemoryError"},
        "streaming": {"problem": "wrong: nothing came"},
    }
    write(folder / "results" / MACHINE / "loader.json", data)
    assert report.main(words(folder)) == 0
    text = (folder / "REPORT.md").read_text().splitlines()
    assert rows(text, "check")[0][:2] == ["check", "failed: MemoryError"] and not rows(text, "loader")
    assert rows(text, "streaming")[0][1] == "wrong: nothing came"
    readme = (folder / "README.md").read_text()
    assert "indexing shards" in readme and "checking every image" not in readme


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("indexing", "mb_per_cpu_second"), None),
        (("check", "check_to_dali", "median"), 9.0),  # above the highest
        (("streaming", "cold"), []),
        (("streaming", "cold", 0, "shards_sent", "lowest"), -1),
        (("formats", "entries", 0, "images_per_sec"), None),
    ],
)
def test_damaged_sections_are_refused(tmp_path, where, value):
    data = {**loader(a=1.0), **copy.deepcopy(sections())}
    inner = data
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(Exception, match=str(where[0])):
        read_result(write(tmp_path / "loader.json", data))


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(Exception, match="neither a loader nor anything else"):
        read_result(write(tmp_path / "loader.json", loader()))


def test_compare_knows_what_is_better(tmp_path, capsys):
    def compare(new: dict[str, Any]) -> tuple[int, str]:
        paths = [
            str(write(tmp_path / f"{name}.json", {**loader(), **each}))
            for name, each in (("old", sections()), ("new", new))
        ]
        code = report.main(["--compare", *paths])
        return code, capsys.readouterr().out

    assert compare(sections())[0] == 0
    code, said = compare(sections(check=2.5))
    assert code == 1 and "check.check_to_dali" in said and said.count("REGRESSION") == 1
    code, said = compare(sections(warm=0.5))
    assert code == 1 and said.count("REGRESSION") == 2
    assert compare(sections(check=0.5, warm=2.0))[0] == 0
