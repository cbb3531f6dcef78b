"""Curves of one run or several: the loss as logged and smoothed, and the learning rate where it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_dist.tracking.metrics import read_lines
from ddpm_dist.tracking.pictures import write_aside

LOG_FROM = 8.0  # the axis of the loss is logarithmic where the smoothed loss changes by this factor or more
SCALES = ("auto", "log", "linear")


@dataclass(frozen=True)
class Curve:
    """What metrics.jsonl says: arrays of one length, in the order of the images seen."""

    images: np.ndarray  # int64
    losses: np.ndarray  # float64, positive
    rates: np.ndarray  # float64, NaN where none is recorded

    @property
    def smoothed(self) -> np.ndarray:
        """The losses as a line that can be followed, (N,)."""
        return smooth(self.losses, len(self.losses) // 20) if len(self.losses) >= 10 else self.losses

    @property
    def final(self) -> float:
        """Geometric mean of the last twentieth of the losses."""
        return float(np.exp(np.log(self.losses[-max(1, len(self.losses) // 20) :]).mean()))


def read_curve(metrics_jsonl: Path) -> Curve:
    """The curve of a metrics.jsonl; lines without a finite positive loss are left out.

    Raises:
        ValueError: no line is left.
        OSError: the file cannot be read.
    """
    rows = []
    for record in read_lines(Path(metrics_jsonl)):
        seen, loss, rate = record.get("images_seen"), record.get("loss"), record.get("lr")
        if all(isinstance(value, int | float) for value in (seen, loss)) and 0 < loss < float("inf"):
            rows.append((seen, loss, rate if isinstance(rate, int | float) else np.nan))
    if not rows:
        raise ValueError(f"{metrics_jsonl}: no line with a loss")
    images, losses, rates = zip(*sorted(rows, key=lambda row: row[0]), strict=True)
    return Curve(
        np.array(images, dtype=np.int64), np.array(losses, dtype=np.float64), np.array(rates, dtype=np.float64)
    )


def save_loss_curve(curves: Mapping[str, Curve], path: Path, scale: str = "auto") -> None:
    """Draw the loss of one run or several over the images seen, and below it the learning rate if any of them changes it.

    Args:
        curves: by the name that the legend shows.
        path: PNG file; its folder is made.
        scale: of the loss, "log" or "linear"; "auto": log where a smoothed loss changes by a factor of 8 or more.

    Raises:
        ValueError: no curve, or an unknown scale.
        OSError: the file cannot be written.
    """
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if not curves or scale not in SCALES:
        raise ValueError(f"nothing to draw, or a scale other than {', '.join(SCALES)}")
    changing = any(np.ptp(curve.rates[np.isfinite(curve.rates)]) > 0 for curve in curves.values() if _has_rates(curve))
    figure = Figure(figsize=(9, 6.6 if changing else 4.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if changing else 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + changing])
    loss, rate = panels[0, 0], panels[-1, 0]
    colors = rcParams["axes.prop_cycle"].by_key()["color"]
    for number, (name, curve) in enumerate(curves.items()):
        color, smoothed = colors[number % len(colors)], curve.smoothed
        loss.plot(curve.images, curve.losses, color=color, alpha=0.3, linewidth=0.9)
        loss.plot(curve.images, smoothed, color=color, linewidth=2, label=f"{name}, {curve.final:.3g}")
        if changing:
            rate.plot(curve.images, curve.rates, color=color, linewidth=1.6)
    every = np.concatenate([curve.smoothed for curve in curves.values()])
    if scale == "log" or (scale == "auto" and every.max() / every.min() >= LOG_FROM):
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a loss rarely spans more than two decades
        loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        loss.yaxis.set_minor_formatter(NullFormatter())
    else:  # single high losses would press everything else to the ground
        loss.set_ylim(0, 1.15 * every.max())
    loss.set_ylabel("loss", fontsize=13)
    loss.legend(
        frameon=False,
        fontsize=12,
        title="faint: as logged, strong: smoothed\nnumber: mean of the last 5 %",
        title_fontsize=11,
    )
    if changing:
        rate.set_ylabel("learning rate", fontsize=13)
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate.set_xlabel("images seen", fontsize=13)
    rate.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in panels[:, 0]:
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    write_aside(path, lambda stream: figure.savefig(stream, format="png"))


def _has_rates(curve: Curve) -> bool:
    return bool(np.isfinite(curve.rates).any())


def smooth(values: Sequence[float] | np.ndarray, reach: int) -> np.ndarray:
    """Geometric mean over at most ``reach`` values on either side, fewer at the steep beginning.

    Args:
        values: positive numbers.
    """
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.asarray(values, dtype=np.float64)))])
    index = np.arange(len(values))
    side = np.minimum(np.minimum(index // 4, reach), len(values) - 1 - index)
    return np.exp((logs[index + side + 1] - logs[index - side]) / (2 * side + 1))
