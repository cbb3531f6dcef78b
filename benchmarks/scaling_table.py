"""Joining the reports of ``benchmarks.scaling`` and showing them as one table."""

from __future__ import annotations

import statistics
from typing import Any

from ddpm_dist.errors import UserError

MODES = ("strong", "weak")


def join(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several that measured the same thing; the turns of the same point are put together.

    Raises:
        UserError: the reports differ in configuration, network or kind of device, so that one table would compare apples with pears.
    """
    first = reports[0]
    for other in reports[1:]:
        for key in ("device", "parameters", "config"):
            if other[key] != first[key]:
                names = f"{first.get('file', 'the first report')} and {other.get('file', 'another one')}"
                raise UserError(f"{names} cannot stand in one table: {_difference(key, first[key], other[key])}")
    points = _merge([point for report in reports for point in report["points"]], ("mode", "ranks", "nodes"))
    for mode in MODES:
        batch = "global_batch" if mode == "strong" else "batch_per_rank"
        found = sorted({point[batch] for point in points if point["mode"] == mode})
        if len(found) > 1:
            raise UserError(
                f"{mode} scaling with different batches ({batch} {', '.join(map(str, found))}) in one table"
            )
    points.sort(key=lambda point: (MODES.index(point["mode"]), point["ranks"], point["nodes"]))
    for point in points:
        _summarise(point)
        base = next(other for other in points if other["mode"] == point["mode"])
        point["efficiency"] = point["images_per_sec"] / base["images_per_sec"] * base["ranks"] / point["ranks"]
    reduced = _merge([entry for report in reports for entry in report["all_reduce"]], ("ranks", "nodes", "bytes"))
    for entry in reduced:
        entry["seconds"] = statistics.median(entry["seconds_turns"])
        entry["seconds_fastest"] = min(entry["seconds_turns"])
    kept = {key: value for key, value in first.items() if key != "file"}
    return {**kept, "points": points, "all_reduce": reduced}


def _difference(key: str, first: Any, other: Any) -> str:
    if not isinstance(first, dict):
        return f"{key} is {first} in one and {other} in the other"
    names = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
    return "they differ in " + ", ".join(f"{name} ({first.get(name)}, {other.get(name)})" for name in names[:3])


def _merge(entries: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    merged: dict[tuple, dict[str, Any]] = {}
    for entry in entries:
        place = tuple(entry[key] for key in keys)
        copy = {name: list(value) if isinstance(value, list) else value for name, value in entry.items()}
        if place not in merged:
            merged[place] = copy
            continue
        for name, value in copy.items():
            if name.endswith("_turns"):
                merged[place][name] += value
            elif name in ("global_batch", "batch_per_rank") and value != merged[place][name]:
                raise UserError(f"{place[0]} scaling with {name} {merged[place][name]} and {value} in one table")
    return list(merged.values())


def _summarise(point: dict[str, Any]) -> None:
    """Medians over the turns; the exchange is the median difference of a turn with it and the same turn without."""
    turns, without = point["step_s_turns"], point["without_exchange_s_turns"]
    point["step_s"] = statistics.median(turns)
    point["step_s_fastest"] = min(turns)
    point["without_exchange_s_fastest"] = min(without) if without else None
    point["images_per_sec"] = point["global_batch"] / point["step_s"]
    point["images_per_sec_lowest"] = point["global_batch"] / max(turns)
    point["images_per_sec_highest"] = point["global_batch"] / min(turns)
    point["wait_s"] = statistics.median(point["wait_s_turns"])
    point["input_alone_s"] = statistics.median(point["input_alone_s_turns"])
    point["without_exchange_s"] = statistics.median(without) if without else None
    differences = [one - other for one, other in zip(turns, without, strict=False)]
    point["exposed_s"] = statistics.median(differences) if differences else None
    point["exposed_frac"] = point["exposed_s"] / point["step_s"] if differences else None


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    hardware = report["environment"]["hardware"]
    machine = (
        hardware["gpus"][0] if report["device"] == "cuda" else f"{hardware['cpu']}, {hardware['cores']} cores per node"
    )
    header = (
        "mode", "nodes", "ranks", "global batch", "per rank", "images/s", "lowest .. highest", "step", "waiting for data",
        "exchange exposed", "of the step", "efficiency",
    )  # fmt: skip
    rows = [header]
    for point in report["points"]:
        exposed = point["exposed_s"]
        rows.append((
            point["mode"], str(point["nodes"]), str(point["ranks"]), str(point["global_batch"]), str(point["batch_per_rank"]),
            f"{point['images_per_sec']:.2f}", f"{point['images_per_sec_lowest']:.2f} .. {point['images_per_sec_highest']:.2f}",
            f"{1e3 * point['step_s']:.1f} ms", f"{1e3 * point['wait_s']:.1f} ms",
            "-" if exposed is None else f"{1e3 * exposed:.1f} ms",
            "-" if exposed is None else f"{point['exposed_frac']:.0%}", f"{point['efficiency']:.2f}",
        ))  # fmt: skip
    lines = [
        f"{machine}; {report['parameters']:,} parameters, {report['config']['train.precision']}",
        "",
        *markdown(rows),
    ]
    cores = hardware["cores"]
    if report["device"] == "cpu" and any(point["ranks"] > cores * point["nodes"] for point in report["points"]):
        lines += [
            "",
            f"Every rank has one thread and a node {cores} cores: W ranks on a node can reach at most {cores}/W there.",
        ]
    return "\n".join(lines)


def markdown(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table, aligned; the first row is the header and the first column stands to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]
