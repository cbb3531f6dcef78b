"""Writing what one benchmark measured: its JSON file and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddpm_dist.errors import UserError


def check_target(path: Path | None) -> None:
    """UserError when the report could not be written, before anything is measured."""
    if path and not path.resolve().parent.is_dir():
        raise UserError(f"--json {path}: its folder does not exist")


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write aside and rename."""
    if path:
        aside = path.with_name(path.name + ".incomplete")
        aside.write_text(json.dumps(report, indent=1) + "\n")
        aside.replace(path)


def grid(rows: list[list[str]]) -> str:
    """Rows of cells as text, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
