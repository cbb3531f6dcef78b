"""Writing what one benchmark measured: its JSON file and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddpm_dist.errors import UserError


def check_target(path: Path | None, option: str = "--json") -> None:
    """UserError when a report could not be written, before anything is measured."""
    if path and not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: its folder does not exist")
    if path and path.is_dir():
        raise UserError(f"{option} {path}: that is a folder; name a file in it")


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write aside and rename."""
    if path:
        aside = path.with_name(path.name + ".incomplete")
        aside.write_text(json.dumps(report, indent=1) + "\n")
        aside.replace(path)


def publish(report: dict[str, Any], text: str, json_path: Path | None, markdown_path: Path | None) -> None:
    """Print the tables, and write report and tables where they are wanted."""
    print(text)
    write_report(json_path, report)
    if markdown_path:
        markdown_path.write_text(text + "\n")


def machine(report: dict[str, Any]) -> str:
    """What a report was measured on, in a few words: the GPU, or the processor with cores and threads."""
    hardware = report["environment"]["hardware"]
    if report["device"].startswith("cuda"):
        return hardware["gpus"][0]
    return f"{hardware['cores']} cores {hardware['cpu']}, {report['environment']['threads']} thread(s)"


def grid(rows: list[list[str]]) -> str:
    """Rows of cells as text, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
