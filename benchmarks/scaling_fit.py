"""Fitting the model of ``scaling_model`` to a report of ``benchmarks.scaling``, and how far off it is on what was measured.

Fitted are only points with few ranks; those with more are predicted, which is the honest test of a model. The fastest turn of each point
is used, the one that other work on the machine disturbed least; errors are stated for the medians as well. Ranks on a node with fewer cores
than ranks take turns: everything they do takes ranks/cores times as long (CPU only; known beforehand, not fitted).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.scaling_model import Exchange, Link, exposed, gradient_exchange, ring_all_reduce

BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Calibration:
    """Seconds of a step of one rank: fixed + per_image x batch. ``inside``, ``between``: the links; ``overlap``: see ``exposed``."""

    fixed: float
    per_image: float
    inside: Link
    between: Link | None
    overlap: float
    parameters: int
    cores: int | None  # per node; None where ranks do not share them (GPUs)

    def share(self, point: dict[str, Any]) -> float:
        """How many times longer everything takes because a node's ranks share its cores."""
        return max(1.0, _per_node(point) / self.cores) if self.cores else 1.0

    def compute(self, point: dict[str, Any]) -> float:
        """Seconds of the step without exchange."""
        return self.share(point) * (self.fixed + self.per_image * point["batch_per_rank"])

    def exchange(self, point: dict[str, Any]) -> Exchange:
        """Seconds of the gradient exchange when nothing else runs."""
        found = gradient_exchange(
            4.0 * self.parameters, BUCKET, point["nodes"], _per_node(point), self.inside, self.between or self.inside
        )
        return Exchange(self.share(point) * found.total, self.share(point) * found.last)

    def step(self, point: dict[str, Any]) -> float:
        """Seconds of the whole step."""
        compute = self.compute(point)
        waiting = exposed(self.exchange(point), compute, self.overlap) if point["ranks"] > 1 else 0.0
        return max(compute + waiting, self.share(point) * point["input_alone_s"])

    def all_reduce(self, entry: dict[str, Any]) -> float:
        """Seconds of one bare all-reduce."""
        link = self.inside if entry["nodes"] == 1 else (self.between or self.inside)
        part = ring_all_reduce(entry["bytes"], _per_node(entry), self.inside) if entry["nodes"] > 1 else 0.0
        ranks = entry["ranks"] if entry["nodes"] == 1 else entry["nodes"]
        size = entry["bytes"] if entry["nodes"] == 1 else entry["bytes"] / _per_node(entry)
        return self.share(entry) * (part + ring_all_reduce(size, ranks, link))


def _per_node(point: dict[str, Any]) -> int:
    return -(-point["ranks"] // point["nodes"])


def _two_terms(rows: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Non-negative a, b that make a x + b y = t for rows (x, y, t), with the least sum of squared relative errors."""
    table = np.array([(x / t, y / t) for x, y, t in rows])
    best: tuple[float, tuple[float, float]] = (float("inf"), (0.0, 0.0))
    candidates = [np.linalg.lstsq(table, np.ones(len(table)), rcond=None)[0]]
    for column in (0, 1):  # either term alone
        alone = np.zeros(2)
        alone[column] = table[:, column].sum() / max((table[:, column] ** 2).sum(), 1e-300)
        candidates.append(alone)
    for found in candidates:
        error = float(((table @ found - 1) ** 2).sum())
        if (found >= 0).all() and error < best[0]:
            best = (error, (float(found[0]), float(found[1])))
    return best[1]


def _fit_link(rows: list[tuple[float, int, float]]) -> Link:
    """From (bytes, ranks, seconds) of ring all-reduces."""
    latency, inverse = _two_terms([(2 * (ranks - 1), 2 * (ranks - 1) / ranks * size, t) for size, ranks, t in rows])
    return Link(1 / max(inverse, 1e-18), latency)


def fitted_ranks(report: dict[str, Any]) -> list[int]:
    """The numbers of ranks to fit on: the two smallest on one node."""
    return sorted({point["ranks"] for point in report["points"] if point["nodes"] == 1})[:2]


def fit(report: dict[str, Any]) -> Calibration:
    """Calibrate on the points of :func:`fitted_ranks`; the link between nodes on the fewest nodes above one.

    Without two different batches per rank everything is taken to grow with the batch (fixed = 0). Raises ValueError when the report has
    nothing to fit on.
    """
    fit_ranks = fitted_ranks(report)
    cores = report["environment"]["hardware"]["cores"] if report["device"] == "cpu" else None
    blank = Calibration(0, 0, Link(1, 0), None, 0, report["parameters"], cores)
    chosen = [p for p in report["points"] if p["ranks"] in fit_ranks and p["without_exchange_s_fastest"] is not None]
    reduced = [e for e in report["all_reduce"] if e["ranks"] in fit_ranks and e["nodes"] == 1]
    if not chosen or not reduced:
        raise ValueError(
            "nothing to fit on: measure with two or more ranks on one node, with the DDP engine (benchmarks.scaling)"
        )
    rows = [(1.0, p["batch_per_rank"], p["without_exchange_s_fastest"] / blank.share(p)) for p in chosen]
    if len({batch for _, batch, _ in rows}) < 2:
        rows = [(0.0, batch, seconds) for _, batch, seconds in rows]
    fixed, per_image = _two_terms(rows)
    inside = _fit_link([(e["bytes"], e["ranks"], e["seconds_fastest"] / blank.share(e)) for e in reduced])
    between = None
    if far := [e for e in report["all_reduce"] if e["nodes"] > 1]:
        fewest = min(e["nodes"] for e in far)
        rows = []
        for e in (e for e in far if e["nodes"] == fewest):
            rest = e["seconds_fastest"] / blank.share(e) - ring_all_reduce(e["bytes"], _per_node(e), inside)
            rows.append((e["bytes"] / _per_node(e), e["nodes"], max(rest, 0.05 * e["seconds_fastest"])))
        between = _fit_link(rows)

    def with_overlap(overlap: float) -> Calibration:
        return Calibration(fixed, per_image, inside, between, overlap, report["parameters"], cores)

    several = [p for p in chosen if p["ranks"] > 1]
    grid = np.linspace(0, 1, 101) if several else [0.0]
    best = min(
        grid, key=lambda o: sum((with_overlap(float(o)).step(p) / p["step_s_fastest"] - 1) ** 2 for p in several)
    )
    return with_overlap(float(best))


def errors(report: dict[str, Any], found: Calibration) -> dict[str, Any]:
    """Relative errors (predicted / measured - 1) of every measured point, and their summaries for fitted and predicted points."""
    rows, fit_ranks = [], fitted_ranks(report)

    def add(kind: str, name: str, entry: dict[str, Any], key: str, predicted: float) -> None:
        rows.append({
            "kind": kind, "point": name, "fitted": entry["ranks"] in fit_ranks and entry["nodes"] == 1, "predicted_s": predicted,
            "fastest_s": entry[f"{key}_fastest"], "median_s": entry[key], "error": predicted / entry[f"{key}_fastest"] - 1,
            "error_to_median": predicted / entry[key] - 1,
        })  # fmt: skip

    for point in report["points"]:
        name = f"{point['mode']}, {point['ranks']} rank{'s' * (point['ranks'] > 1)}" + (
            f", {point['nodes']} nodes" if point["nodes"] > 1 else ""
        )
        add("step", name, point, "step_s", found.step(point))
        if point["without_exchange_s"] is not None and point["ranks"] > 1:
            add("without exchange", name, point, "without_exchange_s", found.compute(point))
    for entry in report["all_reduce"]:
        name = f"{entry['bytes']:,} bytes, {entry['ranks']} ranks"
        add("all-reduce", name, entry, "seconds", found.all_reduce(entry))
    summary = {}
    for kind in ("step", "without exchange", "all-reduce"):
        for fitted in (True, False):
            chosen = [row for row in rows if row["kind"] == kind and row["fitted"] == fitted]
            if chosen:
                sizes, medians = ([abs(row[key]) for row in chosen] for key in ("error", "error_to_median"))
                summary[f"{kind}, {'fitted' if fitted else 'predicted'}"] = {
                    "points": len(chosen), "median": statistics.median(sizes), "largest": max(sizes),
                    "median_to_medians": statistics.median(medians),
                }  # fmt: skip
    return {"rows": rows, "summary": summary}
