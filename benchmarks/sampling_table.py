"""What ``benchmarks.sampling`` measured, as entries of its report and as a Markdown table."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.output import machine

if TYPE_CHECKING:
    from benchmarks.sampling import Entrant

NAMES = {"ddpm_dist": "ddpm_dist", "diffusers": "diffusers", "reference": "original program"}


def entry(own: Entrant, group: list[Entrant], batch: int, guidance: float) -> dict[str, Any]:
    """What is reported of one way to sample; ``group``: those that took turns with it."""
    result: dict[str, Any] = {
        "system": own.system, "sampler": own.sampler, "captured": own.captured, "batch": batch, "guidance": guidance,
        "evaluations": own.evaluations, "problem": own.problem,
    }  # fmt: skip
    if own.problem is not None:
        return result
    median = statistics.median(own.seconds)
    result |= {
        "measured_steps": own.steps * len(own.seconds),
        "step_ms": 1e3 * median,
        "step_ms_turns": [1e3 * seconds for seconds in own.seconds],
        "images_per_sec": batch / (own.evaluations * median),
        "whole_run_images_per_sec": batch / own.whole_s if own.whole_s else None,
    }
    for other in group:
        if other is own or other.problem is not None:
            continue
        same = other.sampler == own.sampler
        if other.system == "reference":
            result["to_reference"] = _ratio(other, own)
        elif own.system == "ddpm_dist" and other.system == "diffusers" and same:
            result["to_diffusers"] = _ratio(other, own)
        elif own.captured and other.system == "ddpm_dist" and same:
            result["to_eager"] = _ratio(other, own)
    return result


def _ratio(other: Entrant, own: Entrant) -> dict[str, float]:
    """How many times as many images ``own`` makes in the same time: median and extremes over the turns."""
    ratios = [
        (theirs * other.evaluations) / (mine * own.evaluations)
        for theirs, mine in zip(other.seconds, own.seconds, strict=True)
    ]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: what was measured on what, a table, and the numbers that the project promises something about."""
    lines = [
        f"{machine(report)}, torch {report['environment']['versions'].get('torch')}, {report['network']} with "
        f"{report['parameters']:,} parameters at {report['image_size']}x{report['image_size']}, {report['precision']}"
        f"{', channels_last' if report['channels_last'] else ''}{', compiled' if report['compile'] else ''}; "
        f"medians of {report['turns']} interleaved turns",
        "",
        "| batch | guidance | sampler | evaluations | program | step | images/s | whole runs | to the original | to diffusers | to eager |",
        "|---:|---:|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += ["| " + " | ".join(_cells(each)) + " |" for each in report["entries"]]
    if report["reference_skipped"]:
        lines += ["", f"Without the original program: {report['reference_skipped']}."]
    if report["diffusers"] == "absent":
        lines += ["", "Without diffusers: not installed, or it does not know this schedule."]
    return "\n".join([*lines, "", *headlines(report)])


def _cells(each: dict[str, Any]) -> list[str]:
    program = NAMES[each["system"]] + (", captured" if each["captured"] else "")
    guidance = "without" if each["guidance"] == 1 else f"{each['guidance']:g}"
    cells = [str(each["batch"]), guidance, each["sampler"], str(each["evaluations"] or "-"), program]
    if each["problem"]:
        return [*cells, each["problem"], *["-"] * 5]
    whole = each["whole_run_images_per_sec"]
    ratios = [
        f"{each[key]['median']:.2f}" if key in each else "-" for key in ("to_reference", "to_diffusers", "to_eager")
    ]
    return [
        *cells,
        f"{each['step_ms']:.1f} ms",
        _number(each["images_per_sec"]),
        _number(whole) if whole else "-",
        *ratios,
    ]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def headlines(report: dict[str, Any]) -> list[str]:
    """One line for each guided sampler of ours that has a ratio to the original, and for each captured step."""
    lines = []
    for each in report["entries"]:
        about = f"batch {each['batch']}, guidance {each['guidance']:g}, {each['sampler']}"
        for key, what in (("to_reference", "the original program's loop"), ("to_eager", "the eager step")):
            if each["system"] == "ddpm_dist" and each["guidance"] != 1 and key in each:
                ratio = each[key]
                lines.append(
                    f"- {about}{', captured' if each['captured'] else ''}: {ratio['median']:.2f} times {what} "
                    f"({ratio['lowest']:.2f} .. {ratio['highest']:.2f})"
                )
    return lines
