"""The pictures of docs/scaling.md, from the reports. Colours that colour-blind readers can tell apart, and markers besides."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scaling_model as model
from benchmarks.scaling_data import order_seconds
from benchmarks.scaling_fit import Calibration
from benchmarks.scaling_model import Link

# Okabe and Ito 2008, "Color universal design".
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def draw(folder: Path, measured: dict[str, Any], report: dict[str, Any], data: dict[str, Any]) -> None:
    """Write scaling_measured.png, scaling_predicted.png, scaling_checkpoints.png and scaling_data.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 110}):
        for name, function in (
            ("measured", lambda: _measured(plt, measured, report)), ("predicted", lambda: _predicted(plt, report)),
            ("checkpoints", lambda: _checkpoints(plt, report)), ("data", lambda: _data(plt, report, data)),
        ):  # fmt: skip
            figure = function()
            if figure.get_layout_engine() is None:
                figure.tight_layout()
            figure.savefig(folder / f"scaling_{name}.png", metadata={"Software": None})
            plt.close(figure)


def calibration(report: dict[str, Any]) -> Calibration:
    """The fitted model of a report, from its JSON form."""
    values = {field.name: report["calibration"][field.name] for field in fields(Calibration)}
    for name in ("inside", "between"):
        values[name] = Link(**values[name]) if values[name] else None
    return Calibration(**values)


def _measured(plt: Any, measured: dict[str, Any], report: dict[str, Any]) -> Any:
    found, fitted = calibration(report), report["calibration"]["fitted_ranks"]
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 4.1), layout="constrained")
    for axes, mode in zip(panels, ("strong", "weak"), strict=True):
        points = [point for point in measured["points"] if point["mode"] == mode]
        ranks = np.array([point["ranks"] for point in points])
        rates = np.array([point["images_per_sec"] for point in points])
        spread = [
            rates - [p["images_per_sec_lowest"] for p in points],
            [p["images_per_sec_highest"] for p in points] - rates,
        ]
        axes.errorbar(
            ranks, rates, yerr=spread, fmt="o", color=BLUE, capsize=4, label="measured: median, lowest, highest"
        )
        modelled = np.array([point["global_batch"] / found.step(point) for point in points])
        axes.plot(ranks, modelled, "-", color=ORANGE, label="model")
        inside = np.isin(ranks, fitted)
        axes.plot(ranks[inside], modelled[inside], "s", color=ORANGE, label="model, fitted here")
        axes.plot(ranks[~inside], modelled[~inside], "s", color=ORANGE, mfc="white", label="model, predicted here")
        single = points[0][
            "images_per_sec_highest"
        ]  # the model is fitted to the fastest turns, so ideals start there too
        axes.plot(ranks, single * ranks / ranks[0], "--", color=GREY, label="ideal")
        if found.cores:
            ceiling = single * np.minimum(ranks, found.cores) / ranks[0]
            axes.plot(ranks, ceiling, ":", color=GREY, label=f"ideal on {found.cores} cores")
        batch = points[0]["global_batch"] if mode == "strong" else points[0]["batch_per_rank"]
        axes.set_title(f"{mode} scaling, {batch} images per {'step' if mode == 'strong' else 'rank and step'}")
        axes.set(xlabel="ranks (gloo, one thread each)", ylabel="images/s", xticks=ranks, ylim=(0, None))
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    return figure


def _predicted(plt: Any, report: dict[str, Any]) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.8), sharey=True)
    styles = {"h100": (BLUE, "o", "-"), "a100": (GREEN, "^", "-."), "h100_ethernet": (ORANGE, "s", "--")}
    for axes, mode in zip(panels, ("weak", "strong"), strict=True):
        for key, (color, marker, line) in styles.items():
            profile = report["profiles"][key]
            rows = profile[mode]
            axes.plot(
                [row["gpus"] for row in rows], [100 * row["efficiency"] for row in rows], line, marker=marker, color=color,
                label=profile["name"],
            )  # fmt: skip
        rows = report["profiles"]["h100"][mode]
        what = (
            f"{rows[0]['batch_per_gpu']:.0f} images per GPU"
            if mode == "weak"
            else f"{8 * rows[0]['batch_per_gpu']:,.0f} images per step"
        )
        ticks = [8, 32, 128, 512, 2048] if mode == "weak" else [row["gpus"] for row in rows][::2]
        axes.set_xscale("log", base=2)
        axes.set(title=f"{mode} scaling, {what}", xlabel="GPUs, 8 per node", xticks=ticks, ylim=(0, 105))
        axes.set_xticklabels([f"{tick:,}" for tick in ticks])
    panels[0].set_ylabel("efficiency relative to one node, %")
    panels[0].legend(fontsize=7, loc="lower left")
    figure.suptitle(f"{report['workload']['name']}: {report['label']}")
    return figure


def _checkpoints(plt: Any, report: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    seconds = np.geomspace(5, 6 * 3600, 200)
    entries = {entry["gpus"]: entry for entry in report["checkpoints"][report["workload"]["name"]]}
    for gpus, color, line in ((64, GREEN, "-."), (512, BLUE, "-"), (4096, ORANGE, "--")):
        entry = entries[gpus]

        def useful(interval: float, entry: dict[str, Any] = entry) -> float:
            restart = report["site"]["restart"]
            return 100 * model.useful_fraction(interval, entry["save_s"], restart, entry["mtbf_s"], entry["publish_s"])

        axes.plot(seconds / 60, [useful(second) for second in seconds], line, color=color, label=f"{gpus:,} GPUs")
        axes.plot(entry["interval_s"] / 60, useful(entry["interval_s"]), "o", color=color, ms=8)
        axes.annotate(
            f"{entry['interval_s'] / 60:.1f} min", (entry["interval_s"] / 60, useful(entry["interval_s"])),
            textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8, color=color,
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = [0.1, 1, 10, 60, 360]
    axes.set(
        xlabel="minutes between checkpoints (dots: Daly's optimum)", ylabel="useful share of the time, %", ylim=(90, 100.3),
        xticks=ticks, title=f"{report['workload']['name']}: {report['label']}",
    )  # fmt: skip
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.legend(fontsize=8, loc="lower center")
    return figure


def _data(plt: Any, report: dict[str, Any], data: dict[str, Any]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.6))
    images = np.geomspace(1e6, 5e9, 60)
    left.plot(
        images,
        [order_seconds(n, report["order_coefficient"]) for n in images],
        "-",
        color=ORANGE,
        label="predicted: c N log2 N",
    )
    left.plot(
        [e["samples"] for e in data["order"]], [e["seconds"] for e in data["order"]], "o", color=BLUE, label="measured"
    )
    left.set(xlabel="images", ylabel="seconds", title="order of one epoch, one core")
    rows = [row for row in report["data"] if row["images"] >= 1e6]
    numbers = [row["images"] for row in rows]
    for key, color, marker, line, label in (
        ("order_peak_bytes_per_node", ORANGE, "s", "--", "orders of 8 ranks, peak"),
        ("order_kept_bytes_per_node", BLUE, "o", "-", "orders of 8 ranks, kept"),
        ("index_bytes", GREEN, "^", "-.", "index.npy, mapped, shared by the ranks"),
    ):  # fmt: skip
        right.plot(numbers, [row[key] / 1e9 for row in rows], line, marker=marker, color=color, label=label)
    right.axhline(2000, color=GREY, lw=1, ls=":", label="2 TB, a large node")
    right.set(xlabel="images", ylabel="GB per node", title=f"memory: {report['label']}")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=7, loc="lower right")
    return figure
