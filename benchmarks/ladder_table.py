"""What ``benchmarks.ladder`` measured, as Markdown tables."""

from __future__ import annotations

from typing import Any

from benchmarks.output import machine


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: what was measured on what, the ladder, what each rung changes, attention backends, upsampling."""
    hardware = report["environment"]["hardware"]
    tolerances = "; ".join(
        f"{name} {t['loss_error']:.0e}, {t['gradient_error']:.0e}, {t['later_loss_error']:.0e}"
        for name, t in report["tolerances"].items()
    )
    lines = [
        f"{machine(report)}, torch {report['environment']['versions'].get('torch')}, load average {hardware['load_average']:.1f}; "
        f"{report['network']} with {report['parameters']:,} parameters at {report['image_size']}x{report['image_size']}, batch "
        f"{report['batch']}, compute only (a fixed batch on the device); medians of {report['turns']} interleaved turns of "
        f"{report['steps_per_turn']} steps",
        "",
        "| rung | images/s | lowest .. highest | to the first | to the one before | peak memory | loss, gradient error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += ["| " + " | ".join(_rung(each)) + " |" for each in report["rungs"]]
    lines += [
        "",
        f"Errors against {report['compared_with']}, after one step from the same weights on the same draws. Allowed (loss of the first "
        f"step, its gradient, losses up to step {report['check_steps']}): {tolerances}.",
        "",
        *(f"- {each['name']}: {each['what']}" for each in report["rungs"]),
    ]
    if report["attention"]:
        lines += ["", *_parts("attention backends", report["attention"], _attention)]
    if report["upsampling"]:
        lines += ["", *_parts("upsampling", report["upsampling"], _upsampling)]
    return "\n".join(lines)


def _rung(each: dict[str, Any]) -> list[str]:
    errors = (
        "-"
        if each["loss_error"] is None
        else ", ".join(
            f"{each[key]:.0e}" if each[key] is not None else "not finite" for key in ("loss_error", "gradient_error")
        )
    )
    if each["problem"]:
        return [each["name"], each["problem"], *["-"] * 4, errors]
    first = each["to_first"]
    return [
        each["name"],
        number(each["images_per_sec"]),
        f"{number(each['lowest'])} .. {number(each['highest'])}",
        "-" if first is None else f"{first:.2f} ({each['to_first_lowest']:.2f} .. {each['to_first_highest']:.2f})",
        "-" if each["to_before"] is None else f"{each['to_before']:.2f}",
        "-" if each["peak_memory_gb"] is None else f"{each['peak_memory_gb']:.2f} GB",
        errors,
    ]


def _parts(title: str, entries: list[dict[str, Any]], about: Any) -> list[str]:
    """One row for each shape, one column for each variant; the fastest in bold."""
    variants = list(dict.fromkeys(each["variant"] for each in entries))
    rows: dict[str, dict[str, str]] = {}
    for each in entries:
        if each["problem"]:
            cell = each["problem"].partition(":")[0]
        else:
            cell = f"{number(each['ms'])} ms (difference {each['max_difference']:.0e})"
            cell = f"**{cell}**" if each["fastest"] else cell
        rows.setdefault(about(each), {})[each["variant"]] = cell
    lines = [
        f"| {title}, forward and backward | {' | '.join(variants)} |",
        "|---|" + "---:|" * len(variants),
    ]
    return lines + [
        f"| {shape} | " + " | ".join(cells.get(variant, "-") for variant in variants) + " |"
        for shape, cells in rows.items()
    ]


def _attention(each: dict[str, Any]) -> str:
    return f"{', '.join(each['layers'])}: {each['tokens']} tokens, {each['heads']} heads of {each['head_dim']}, {each['dtype']}"


def _upsampling(each: dict[str, Any]) -> str:
    size = each["size"]
    return f"{', '.join(each['layers'])}: {each['channels']} channels, {size}x{size} to {2 * size}x{2 * size}, {each['dtype']}"


def number(value: float) -> str:
    """Three digits, whole numbers from 1,000 on."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
