"""Tables of what ``benchmarks.loader`` measures beside the loaders themselves; they also stand in the report of all benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.report_text import number, plain, span
from benchmarks.scaling_table import markdown

Row = tuple[str, ...]
DATA_HEADER = ("", "median", "lowest .. highest", "target", "")
FORMATS_HEADER = ("format", "images/s", "lowest .. highest", "CPU microseconds per image", "bytes per image", "images/s to jpg",
                  "per CPU second to jpg")  # fmt: skip


def verdict(good: bool) -> str:
    """On a target."""
    return "reached" if good else "not reached"


def data_rows(report: dict[str, Any]) -> Iterator[Row]:
    """A row for each number of the sections indexing, check and streaming, with its target where it has one."""
    for name in ("indexing", "check", "streaming"):
        found = report.get(name)
        if found is None:
            continue
        if found.get("problem") is not None:
            yield (name, plain(found["problem"]), "-", "-", "-")
        else:
            yield from {"indexing": _indexing, "check": _check, "streaming": _streaming}[name](found)


def _indexing(found: dict[str, Any]) -> Iterator[Row]:
    speed, target = found["mb_per_cpu_second"], found["target"]
    yield _row("indexing, MB/s of one core", speed, f"at least {target:g}", verdict(speed["median"] >= target))
    yield _row("indexing, to reading and hashing the same bytes", found["to_plain"])


def _check(found: dict[str, Any]) -> Iterator[Row]:
    whole, target = found["check_to_dali"], found["target"]
    yield _row("check of every image, times DALI's decoding alone", whole, f"at most {target:g}",
               verdict(whole["median"] <= target))  # fmt: skip
    yield _row("its decoding without the rest, times DALI's", found["strict_to_dali"])
    yield _row("check of every image, times Pillow's decoding", found["check_to_pillow"])


def _streaming(found: dict[str, Any]) -> Iterator[Row]:
    target = found["target"]
    for label, part in (
        ("files read through a warm shard cache, to local ones", found["reading"]),
        ("our loader on a warm shard cache, to local shards", found["loader"]),
    ):
        ratio = part["to_local"]
        yield _row(label, ratio, f"at least {target:g}", verdict(ratio["median"] >= target))
    for start in found["cold"]:
        sent = start["shards_sent"]
        good = verdict(sent["highest"] < start["target"])  # in every start, not only in most
        name = plain(start["name"])
        yield (f"cold start: shards sent at the first batch, {name}", f"{sent['median']:g}",
               f"{sent['lowest']:g} .. {sent['highest']:g}", f"below {start['target']}", good)  # fmt: skip
        yield _row(f"cold start: first batch, of the time for the whole set, {name}", start["first_to_whole"])


def _row(label: str, found: dict[str, float], target: str = "-", good: str = "-") -> Row:
    return (label, number(found["median"]), span(found["lowest"], found["highest"]), target, good)


def format_rows(report: dict[str, Any]) -> Iterator[Row]:
    """A row for each format of the section formats, or one that says why there are none."""
    found = report.get("formats") or {"entries": []}
    if found.get("problem") is not None:
        yield (plain(found["problem"]), *["-"] * 6)
        return
    for each in found["entries"]:
        if each["problem"] is not None:
            yield (plain(each["name"]), plain(each["problem"]), *["-"] * 5)
            continue
        rate, cost = each["images_per_sec"], each["cpu_us_per_image"]
        ratios = [f"{each[key]['median']:.2f}" if each.get(key) else "-" for key in ("to_jpg", "per_cpu_second_to_jpg")]
        yield (plain(each["name"]), number(rate["median"]), span(rate["lowest"], rate["highest"]), number(cost["median"]),
               f"{each['bytes_per_image']:,.0f}", *ratios)  # fmt: skip


def section_lines(report: dict[str, Any]) -> list[str]:
    """Both tables with a sentence before each; nothing for a report without the sections."""
    lines: list[str] = []
    if rows := list(data_rows(report)):
        lines += [_about(report), "", *markdown([DATA_HEADER, *rows]), ""]
    if rows := list(format_rows(report)):
        count = (report["formats"] or {}).get("images")
        images = f"The same {count:,} images" if count else "The same images"
        lines += [f"{images} in each format through our loader, one core:", "", *markdown([FORMATS_HEADER, *rows]), ""]
    return lines[:-1]


def _about(report: dict[str, Any]) -> str:
    words = ["Indexing and check: CPU time of one process, shards in the page cache."]
    found = report.get("streaming")
    if found and found.get("problem") is None:
        cold = found["cold"]
        alone = ", ".join(f"{start['shard_s']:g} s ({plain(start['name'])})" for start in cold)
        words.append(
            f"Streaming: {found['images']:,} images in {found['shards']} shards behind an HTTP server on loopback; in a cold start blocks "
            f"of one shard, batches of {cold[0]['batch']}, and a shard that comes alone takes {alone}."
        )
    return " ".join(words)
