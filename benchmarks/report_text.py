"""Small pieces of the generated Markdown: links, numbers, and the line that says where a table comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.report_files import Folder, Result

NOT_YET = "not yet measured"


@dataclass(frozen=True)
class Page:
    """A document; its links are relative to the folder it lies in."""

    path: Path

    def link(self, target: Path, text: str) -> str:
        where = os.path.relpath(target.resolve(), self.path.resolve().parent)
        return f"[{plain(text)}]({quote(Path(where).as_posix())})"

    def source(self, result: Result, folder: Folder) -> str:
        """File, commit, command, and what else the number depends on, in one line."""
        environment = result.environment
        words = [
            f"commit {commit(environment.commit)}",
            f"`{environment.command.replace('`', chr(39))}`",
            many(environment.threads, "thread"),
            f"load average {environment.hardware.load_average:.1f}",
        ]
        stolen = environment.hardware.stolen_share
        if stolen is not None and stolen >= 0.01:
            words.append(f"{stolen:.0%} of its time taken by the host")
        driver = environment.hardware.driver
        if driver and driver != folder.driver:
            words.append(f"driver {driver}")
        for name, version in environment.versions.items():
            if version and name not in folder.versions:
                words.append(f"{name} {version}")
        return f"{self.link(result.path, result.path.name)}: {', '.join(words)}"

    def sources(self, results: list[Result], folder: Folder) -> list[str]:
        """A list, one line for each file, with an empty line before it."""
        return ["", *(f"- {self.source(result, folder)}" for result in results)]


def commit(name: str | None) -> str:
    """Shortened; "+changes" (files differed from the commit) stays."""
    if not name:
        return "unknown"
    digits, plus, rest = name.partition("+")
    return digits[:9] + plus + rest


def plain(text: str) -> str:
    """Text that cannot end a table's cell or a line."""
    return " ".join(str(text).split()).replace("|", "\\|")


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def many(count: int, what: str) -> str:
    """ "1 rank", "8 ranks"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def span(low: float, high: float) -> str:
    return f"{number(low)} .. {number(high)}"


def percent(share: float) -> str:
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.2g} %"


def with_span(ratio: Any) -> str:
    """A ``report_schema.Ratio``: the median, and the turns in brackets."""
    return f"{ratio.median:.2f} ({span(ratio.lowest, ratio.highest)})"


def share(value: float | None, turns: list[float] | None) -> str:
    """A share of something with its turns, as percent; "-" where there is none. Differences can be below 0."""
    if value is None:
        return "-"
    return percent(value) + (f" ({percent(min(turns))} .. {percent(max(turns))})" if turns else "")


def gigabytes(size: float) -> str:
    """Bytes as GB, or as MB below 100 MB."""
    return f"{number(size / 1e9)} GB" if size >= 1e8 else f"{number(size / 1e6)} MB"
