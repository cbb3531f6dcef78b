"""What ``benchmarks.kernels`` measured, as Markdown tables."""

from __future__ import annotations

from typing import Any

from benchmarks.ladder_table import number
from benchmarks.output import machine


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: the step against its kernels, the groups, the kernels, what another way would give."""
    config, sums, fused = report["config"], report["sums"], report["fused"]
    kernels = [*report["kernels"], *report["other_kernels"]]
    lines = [
        f"{machine(report)}, torch {report['environment']['versions'].get('torch')}; {config['model.name']} at "
        f"{config['data.image_size']}x{config['data.image_size']}, batch {report['batch']}, {config['train.precision']}"
        f"{', channels_last' if config['train.channels_last'] else ''}; roofs: {number(report['peak_tflops'])} TFLOP/s and "
        f"{number(report['peak_gb_per_sec'])} GB/s ({report['peak_source']})",
        "",
        "| step | ms | lowest .. highest | images/s | to its kernels | to their best | to the best, fused |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, step in report["steps"].items():
        lines.append(
            f"| {name} | {number(step['ms'])} | {number(step['lowest_ms'])} .. {number(step['highest_ms'])} | {number(step['images_per_sec'])} "
            f"| {step['to_as_they_are']:.2f} | {step['to_best']:.2f} | {step['to_fused']:.2f} |"
        )
    fastest = "; ".join(
        f"{name}: {number(step['lowest_ms'])} ms, {step['to_fastest']:.2f} of its kernels and {step['to_best_fastest']:.2f} of their best"
        for name, step in report["steps"].items()
    )
    lines += [
        "",
        f"The fastest turn of the step against the fastest repeats of the kernels (where others use the machine as well, medians say little): "
        f"{fastest}.",
        "",
        f"Sum of the kernels: {number(sums['as_they_are_ms'])} ms; each the best way: {number(sums['best_ms'])} ms; with everything but "
        f"products and the optimizer at the bandwidth and fused: {number(sums['fused_ms'])} ms ({fused['bytes_gb']:.2f} GB must move, the "
        f"eager operations move {fused['eager_gb']:.2f} GB in {number(fused['eager_ms'])} ms). Products: "
        f"{report['recorded_gflop_per_image']:.2f} GFLOP per image as recorded (attention computes its scores twice, the first convolution "
        f"has no gradient of its input), {report['training_gflop_per_image']:.2f} counted for MFU.",
        "",
        "| group | kernels | launches | ms | share | best ms | GFLOP | GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in report["groups"]:
        lines.append(
            f"| {line['group']} | {line['kernels']} | {line['launches']} | {number(line['ms'])} | {100 * line['share']:.1f} % | "
            f"{number(line['best_ms'])} | {number(line['gflop'])} | {line['gbyte']:.2f} |"
        )
    lines += [
        "",
        "| kernel | runs | ms of all | share | TFLOP/s | GB/s | FLOP/byte | of its roof | best way |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    kernels.sort(key=lambda each: -(each["ms"] or 0.0))
    lines += [_row(each, sums["as_they_are_ms"]) for each in kernels[: len(report["kernels"]) + 5]]
    rest = kernels[len(report["kernels"]) + 5 :]
    if rest:
        lines += ["", f"{len(rest)} more kernels take {number(sum(each['ms'] or 0.0 for each in rest))} ms together."]
    for each in kernels:
        if each["problem"]:
            lines += ["", f"- {each['name']}: {each['problem']}"]
    return "\n".join(lines)


def _row(each: dict[str, Any], total: float) -> str:
    def cell(key: str, form: str = "") -> str:
        return "-" if each[key] is None else f"{each[key]:{form}}" if form else number(each[key])

    best = each["best"] or "-"
    if each["best_ms"] and each["ms"] and best != "as it is":
        best += f": {number(each['best_ms'])} ms"
    share = f"{100 * (each['ms'] or 0.0) / total:.1f} %" if total else "-"
    roof = "-" if each["percent_of_roof"] is None else f"{each['percent_of_roof']:.0f} %"
    return (
        f"| {each['name']} | {each['count']} | {cell('ms')} | {share} | {cell('tflops')} | {cell('gb_per_sec')} | "
        f"{cell('flop_per_byte')} | {roof} | {best} |"
    )
