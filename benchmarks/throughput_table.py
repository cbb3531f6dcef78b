"""A report of ``benchmarks.train_throughput`` as text."""

from __future__ import annotations

from typing import Any

from benchmarks.output import grid

COLUMNS = {"ddpm_dist": "ddpm_dist", "compute_only": "compute only", "reference": "reference"}
ROWS: list[tuple[str, str, str, float]] = [
    ("images/s, median", "images_per_sec", "{:.2f}", 1),
    ("images/s, lowest", "images_per_sec_lowest", "{:.2f}", 1),
    ("images/s, highest", "images_per_sec_highest", "{:.2f}", 1),
    ("step, median of the turns", "step_ms", "{:.1f} ms", 1),
    ("waiting for data", "data_wait_frac", "{:.1f} %", 100),
    ("peak memory", "peak_memory_gb", "{:.2f} GB", 1),
    ("peak memory per image", "peak_memory_mb_per_image", "{:.1f} MB", 1),
    ("arithmetic", "tflops", "{:.3f} TFLOP/s", 1),
    ("MFU, to the measured rate", "mfu", "{:.1f} %", 100),
    ("MFU, to the data sheet", "mfu_nominal", "{:.1f} %", 100),
]
COUNTS = {
    "launches_per_step": "launches by the host", "kernels_per_step": "kernels and copies on the device", "aten_ops_per_step": "aten operations",
}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    columns = [name for name in COLUMNS if name in report]
    hardware = report["environment"]["hardware"]
    where = (
        hardware["gpus"][0] if report["device"].startswith("cuda") else f"{hardware['cores']} cores {hardware['cpu']}"
    )
    rows = [["", *(COLUMNS[name] for name in columns)]]
    for label, key, form, factor in ROWS:
        values = [report[name].get(key) for name in columns]
        if any(value is not None for value in values):
            rows.append([label, *("-" if value is None else form.format(value * factor) for value in values)])
    for percent in (5, 50, 95, 99):
        values = [report[name]["step_percentiles"].get(f"p{percent}_ms") for name in columns]
        if any(value is not None for value in values):
            counts = {report[name]["step_percentiles"]["steps"] for name in columns}
            label = f"single steps, {percent} % (of {', '.join(map(str, sorted(counts)))})"
            rows.append([label, *("-" if value is None else f"{value:.1f} ms" for value in values)])
    nominal = report["nominal_tflops_per_device"]
    lines = [
        f"{report['world_size']} x {where}, batch {report['batch_per_rank']} per rank, {report['config']['data.source']} "
        f"data, {report['config']['train.precision']}, {report['training_gflop_per_image']:.2f} GFLOP per training image",
        grid(rows),
        f"MFU relative to {report['peak_tflops_per_device']:.3f} TFLOP/s ({report['peak_source']})"
        + (f", {nominal:.0f} by the data sheet" if nominal else ""),
        "of the step: " + ", ".join(f"{label} {share}" for label, share in shares(report).items()),
        *(f"{words} in a step: {report[key]:,}" for key, words in COUNTS.items() if key in report),
    ]
    if "ratio" in report:
        lines.append(
            f"{report['ratio']:.2f} times the baseline (median of {report['turns']} turns, "
            f"{report['ratio_lowest']:.2f} .. {report['ratio_highest']:.2f})"
        )
    else:
        lines.append(f"no baseline: {report['reference_skipped']}")
    return "\n".join(lines)


def shares(report: dict[str, Any]) -> dict[str, str]:
    """What each part takes of the step, such as {"data": "0.3 % (-0.2 .. 0.9 %)"}; only those that were measured."""
    found = {}
    for key, label in (("data_frac", "data"), ("ema_frac", "averages"), ("logging_frac", "records")):
        if report.get(key) is not None:
            turns = report[f"{key}_turns"]
            found[label] = f"{100 * report[key]:.2g} % ({100 * min(turns):.2g} .. {100 * max(turns):.2g} %)"
    return found
