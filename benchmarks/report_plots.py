"""The plots of ``benchmarks/REPORT.md``: throughput by batch, the ladder as a waterfall, the roofline, and scaling.

A picture carries a digest of what it was drawn from, so it is drawn again only when that changes (fonts and versions of matplotlib
would make other bytes of the same picture), and whether it is up to date can be said without drawing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.report_files import Folder
from benchmarks.report_tables import arithmetic, workload
from benchmarks.report_text import number
from benchmarks.scaling_plots import BLUE, GREEN, GREY, ORANGE

KEY = "drawn-from"
NAMED = 10  # kernels of the roofline that are named
MARKS = [(BLUE, "o", "-"), (GREEN, "^", "-."), (ORANGE, "s", "--"), ("#CC79A7", "D", ":"), ("#E69F00", "v", "-")]

# ---- what is drawn: plain lists and dictionaries, None where there is too little of it ------------------------------


def _throughput(folder: Folder) -> Any:
    lines: dict[str, list[list[float]]] = {}
    for found in (result.found for result in folder.of("train_throughput")):
        ranks = f", {found.world_size} ranks" if found.world_size > 1 else ""
        source = found.config["data.source"]
        for label, loop in (
            (f"{workload(found.config)}, {arithmetic(found.config)}, {source} data{ranks}", found.ddpm_dist),
            ("reference loop, fp32", found.reference),
        ):
            if loop is not None:
                rates = [loop.images_per_sec, loop.images_per_sec_lowest, loop.images_per_sec_highest]
                lines.setdefault(label, []).append([found.batch_per_rank, *rates])
    batches = {point[0] for points in lines.values() for point in points}
    return {label: sorted(points) for label, points in lines.items()} if len(batches) > 1 else None


def _ladder(folder: Folder) -> Any:
    for result in folder.of("ladder"):
        rungs = [
            [r.name, r.images_per_sec, r.lowest, r.highest, r.to_first] for r in result.found.rungs if r.problem is None
        ]
        if len(rungs) > 1:
            return {"batch": result.found.batch, "rungs": rungs}
    return None


def _roofline(folder: Folder) -> Any:
    found = next((result.found for result in folder.of("kernels")), None)
    if found is None:
        return None
    points = [[k.name, k.flop_per_byte, k.tflops, k.group or "kernel", k.ms] for k in found.kernels]
    return {"peak": found.peak_tflops, "bandwidth": found.peak_gb_per_sec, "kernels": points}


def _scaling(folder: Folder) -> Any:
    files = {}
    for result in folder.of("scaling"):
        if max(point.ranks for point in result.found.points) > 1:
            files[result.path.name] = [
                [p.mode, p.ranks, p.images_per_sec, p.images_per_sec_lowest, p.images_per_sec_highest, p.global_batch, p.batch_per_rank]
                for p in result.found.points
            ]  # fmt: skip
    if not files:
        return None
    cores = folder.of("scaling")[0].environment.hardware.cores
    return {"files": files, "cores": None if folder.on_gpu else cores}


# ---- drawing --------------------------------------------------------------------------------------------------------


def _draw_throughput(plt: Any, data: Any, title: str) -> Any:
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for (label, points), (color, marker, line) in zip(data.items(), MARKS * len(data), strict=False):
        batches, rates, lows, highs = zip(*points, strict=True)
        spread = [[a - b for a, b in zip(rates, lows, strict=True)], [b - a for a, b in zip(rates, highs, strict=True)]]
        axes.errorbar(batches, rates, yerr=spread, fmt=line, marker=marker, color=color, capsize=3, label=label)
    ticks = sorted({point[0] for points in data.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    if max(point[1] for points in data.values() for point in points) >= 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="images per rank and step", ylabel="images/s", ylim=(0, None), title=f"training, {title}")
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def _draw_ladder(plt: Any, data: Any, title: str) -> Any:
    rungs = data["rungs"]
    figure, axes = plt.subplots(figsize=(8.0, 1.3 + 0.36 * len(rungs)), layout="constrained")
    before = 0.0
    for place, (_, rate, low, high, _) in enumerate(rungs):
        first = place == 0
        color = GREY if first else GREEN if rate >= before else ORANGE
        axes.barh(place, abs(rate - before), left=min(rate, before), color=color, height=0.62)
        axes.errorbar(rate, place, xerr=[[rate - low], [high - rate]], fmt="none", ecolor="black", capsize=3, lw=1)
        if place + 1 < len(rungs):
            axes.plot([rate, rate], [place + 0.31, place + 0.69], color=GREY, lw=1)
        before = rate
    edge = max(rung[3] for rung in rungs)
    for place, (_, rate, _, high, ratio) in enumerate(rungs):
        words = f"{number(rate)}  ({ratio:.2f}x)" if ratio else number(rate)
        axes.text(max(rate, high) + 0.012 * edge, place, words, va="center", fontsize=8)
    axes.set_yticks(range(len(rungs)), [rung[0] for rung in rungs])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if edge >= 1000:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        xlabel="images/s (in brackets: to the first)",
        xlim=(0, 1.2 * edge),
        title=f"ladder, batch {data['batch']}, {title}",
    )
    return figure


def _draw_roofline(plt: Any, data: Any, title: str) -> Any:
    """One mark per kernel, of the colour of its group, larger where more of the step goes; the longest ones are named below."""
    peak, bandwidth, kernels = data["peak"], data["bandwidth"], data["kernels"]
    ridge = 1000 * peak / bandwidth  # TFLOP/s over GB/s
    intensities = [kernel[1] for kernel in kernels]
    edges = [min([*intensities, ridge]) / 3, ridge, 3 * max([*intensities, ridge])]
    # By time where it is known, else in the order of the report.
    longest = sorted(kernels, key=lambda kernel: -(kernel[4] or 0.0))[:NAMED]
    figure, axes = plt.subplots(figsize=(8.0, 4.4 + 0.19 * len(longest)), layout="constrained")
    axes.plot(edges, [edges[0] * bandwidth / 1000, peak, peak], color="#666666", lw=1.5)
    axes.annotate(
        f"{number(peak)} TFLOP/s",
        (edges[2], peak),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=GREY,
    )
    middle = (edges[0] * ridge) ** 0.5
    axes.annotate(
        f"{number(bandwidth)} GB/s", (middle, middle * bandwidth / 1000), xytext=(-6, 4), textcoords="offset points", ha="right", fontsize=8,
        color=GREY,
    )  # fmt: skip
    total = sum(kernel[4] or 0.0 for kernel in kernels)
    for group, (color, marker, _) in zip(
        dict.fromkeys(kernel[3] for kernel in kernels), MARKS * len(kernels), strict=False
    ):
        own = [kernel for kernel in kernels if kernel[3] == group]
        sizes = [30 + 500 * (kernel[4] or 0.0) / total if total else 40 for kernel in own]
        axes.scatter(
            [k[1] for k in own], [k[2] for k in own], sizes, color=color, marker=marker, alpha=0.65, lw=0, label=group
        )
    for place, kernel in enumerate(longest, 1):
        # Numbers beside each other do not cover each other.
        shift = (9, 4) if place % 2 else (-9, -11)
        axes.annotate(
            str(place), (kernel[1], kernel[2]), xytext=shift, textcoords="offset points", fontsize=8, ha="center"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="FLOP per byte of device memory", ylabel="TFLOP/s", title=f"roofline, {title}", ylim=(None, 2 * peak)
    )
    marks = axes.legend(loc="lower right", fontsize=8)
    for handle in marks.legend_handles:
        handle.set_sizes([40])
    lines = []
    for place, (name, intensity, rate, _, ms) in enumerate(longest, 1):
        roof = min(peak, intensity * bandwidth / 1000)
        lines.append(
            f"{place:2d}  {name}: {100 * rate / roof:.0f} % of its roof" + (f", {number(ms)} ms" if ms else "")
        )
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.02, ha="left", linespacing=1.35)
    return figure


def _draw_scaling(plt: Any, data: Any, title: str) -> Any:
    modes = [
        mode for mode in ("strong", "weak") if any(p[0] == mode for points in data["files"].values() for p in points)
    ]
    figure, panels = plt.subplots(1, len(modes), figsize=(4.3 * len(modes), 4.2), layout="constrained", squeeze=False)
    for axes, mode in zip(panels[0], modes, strict=True):
        base, ticks = None, set()
        for number_, (file, points) in enumerate(data["files"].items()):
            own = [point for point in points if point[0] == mode]
            if not own:
                continue
            color, marker, line = MARKS[number_ % len(MARKS)]
            _, ranks, rates, lows, highs, total, each = zip(*own, strict=True)
            spread = [
                [a - b for a, b in zip(rates, lows, strict=True)],
                [b - a for a, b in zip(rates, highs, strict=True)],
            ]
            places = [rank * (1 + 0.025 * number_) for rank in ranks]  # beside each other, not on top of each other
            axes.errorbar(
                places,
                rates,
                yerr=spread,
                fmt=line,
                marker=marker,
                color=color,
                capsize=3,
                label=f"{file}: median, lowest .. highest",
            )
            ticks |= set(ranks)
            if base is None:
                base = rates[0] / ranks[0]
                images = f"{total[0]} images per step" if mode == "strong" else f"{each[0]} images per rank and step"
        ticks = sorted(ticks)
        axes.plot(ticks, [base * rank for rank in ticks], "--", color=GREY, lw=1, label="ideal, from the first point")
        cores = data["cores"]
        if cores and max(ticks) > cores:
            axes.plot(
                ticks,
                [base * min(rank, cores) for rank in ticks],
                ":",
                color=GREY,
                lw=1.5,
                label=f"ideal on {cores} cores",
            )
        if max(ticks) > 8:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="ranks", ylim=(0, None), title=f"{mode} scaling, {images}")
    panels[0][0].set_ylabel("images/s")
    figure.suptitle(title)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    return figure


PLOTS: dict[str, tuple[Callable[[Folder], Any], Callable[[Any, Any, str], Any]]] = {
    "throughput": (_throughput, _draw_throughput), "ladder": (_ladder, _draw_ladder), "roofline": (_roofline, _draw_roofline),
    "scaling": (_scaling, _draw_scaling),
}  # fmt: skip

# ---- which of them there are ----------------------------------------------------------------------------------------


def _place(folder: Folder, name: str) -> Path:
    return folder.path / "plots" / f"{name}.png"


def _wanted(folder: Folder) -> dict[str, tuple[Any, str]]:
    """Name: what is drawn, and its digest."""
    wanted = {}
    for name, (collect, _) in PLOTS.items():
        data = collect(folder)
        if data is not None:
            words = json.dumps([folder.title, data], sort_keys=True).encode() + Path(__file__).read_bytes()
            wanted[name] = data, hashlib.sha256(words).hexdigest()
    return wanted


def _digest(path: Path) -> str | None:
    try:
        with Image.open(path) as picture:
            picture.verify()
            return picture.info.get(KEY)
    except (OSError, SyntaxError):
        return None


def up_to_date(folder: Folder) -> tuple[dict[str, Path], list[str]]:
    """The plots that are there and right, and what is wrong with the others. Draws nothing."""
    wanted = _wanted(folder)
    there = {
        name: _place(folder, name) for name, (_, digest) in wanted.items() if _digest(_place(folder, name)) == digest
    }
    wrong = [f"{_place(folder, name)} is not up to date" for name in wanted if name not in there]
    wrong += [
        f"{_place(folder, name)} has nothing behind it any more"
        for name in PLOTS
        if name not in wanted and _place(folder, name).exists()
    ]
    return there, wrong


def draw(folder: Folder) -> tuple[dict[str, Path], str | None]:
    """Draw what is not up to date and take away what has nothing behind it. The plots that are right now, and why some are not."""
    there, wrong = up_to_date(folder)
    wanted = _wanted(folder)
    for name in PLOTS:
        if name not in wanted:
            _place(folder, name).unlink(missing_ok=True)
    missing = [name for name in wanted if name not in there]
    if not missing:
        return there, None
    try:
        import matplotlib
    except ImportError:
        return there, f"matplotlib is not installed: {len(missing)} plot(s) of {folder.path} are left out"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {"font.size": 9, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "figure.dpi": 110}
    ):
        for name in missing:
            data, digest = wanted[name]
            figure = PLOTS[name][1](plt, data, folder.title)
            path = _place(folder, name)
            path.parent.mkdir(exist_ok=True)
            aside = path.with_name(path.name + ".incomplete")
            figure.savefig(aside, format="png", metadata={"Software": None, KEY: digest})
            plt.close(figure)
            aside.replace(path)
            there[name] = path
    return {name: there[name] for name in wanted}, None
