"""What one looks at first with new data: how many samples of each class, which image sizes, what is wrong."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.tars import Finding
from ddpm_dist.index_build import Result

BAR = 30  # characters
MANY, GAP = 100, 10  # classes, and how many times as many they are as without the labels that may be wrong
ALL_CLASSES, TOP, BOTTOM, SIZES = 20, 10, 5, 10


def by_reason(findings: Iterable[Finding]) -> list[str]:
    """A line for every reason, the most frequent first."""
    counts = Counter(finding.reason for finding in findings)
    wide = max((len(f"{count:,}") for count in counts.values()), default=0)
    return [f"  {count:{wide},}  {reason}" for reason, count in counts.most_common()]


def overview(result: Result) -> list[str]:
    """Counts, speed, and the histograms of labels and sizes."""
    labels = np.zeros(len(result.classes or []), np.int64)
    sizes: Counter[int] = Counter()
    for block in result.samples.blocks():
        if len(labels):
            labels += np.bincount(block["label"], minlength=len(labels))
        found, counts = np.unique(block["width"].astype(np.int64) << 16 | block["height"], return_counts=True)
        sizes.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    reused = sum(entry.scanned.reused for entry in result.shards)
    total = sum(entry.scanned.found.bytes for entry in result.shards)
    speed = f"{result.read / 1e6 / max(result.seconds, 1e-9):,.0f} MB/s, {result.seconds:.1f} s"
    lines = [
        f"{len(result.samples):,} samples in {len(result.shards):,} shards ({reused:,} unchanged, not read again), {total:,} bytes, "
        f"{result.read:,} read at {speed}",
        f"images: {result.image_format}, {'grey' if result.channels == 1 else 'RGB'}",
    ]  # fmt: skip
    if result.classes is not None:
        lines += _labels(result.classes, labels) + _stray(result, labels)
    return lines + _sizes(sizes)


def _labels(classes: list[str], counts: np.ndarray) -> list[str]:
    order = np.argsort(-counts, kind="stable")
    head = f"labels: {len(classes):,} classes, {counts.min():,} to {counts.max():,} samples each, median {np.median(counts):,.0f}"
    if len(classes) <= ALL_CLASSES:
        shown, gap = list(range(len(classes))), []
    else:
        shown, gap = order[:TOP].tolist(), order[-BOTTOM:].tolist()
    rows = [(_class(classes, n), int(counts[n])) for n in shown]
    lines = _bars(rows, int(counts.max()))
    if gap:
        lines += ["  ...", *_bars([(_class(classes, n), int(counts[n])) for n in gap], int(counts.max()))]
    empty = int((counts == 0).sum())
    return [head + (f"; {empty:,} without any sample" if empty else ""), *lines]


def _stray(result: Result, counts: np.ndarray) -> list[str]:
    """A hint where one wrong label seems to make most of the classes, or nothing.

    That is so where labels leave out most numbers, and without those above the widest gap there would be a tenth of the classes at most.
    """
    used, most = np.flatnonzero(counts), len(counts)
    if len(used) < 2 or most < MANY or used[-1] != most - 1 or result.classes[-1] != str(most - 1):
        return []  # few, or their names were given
    steps = (used[1:] + 1) / (used[:-1] + 1)
    limit = int(used[int(np.argmax(steps))]) + 1
    if steps.max() < GAP or len(used) * GAP > most:
        return []
    first = 0
    for block in result.samples.blocks():
        places = np.flatnonzero(block["label"] == most - 1)
        if len(places):
            first += int(places[0])
            break
        first += len(block)
    return [
        f"  the largest label is {most - 1:,} (in {public_name(result.location(first))}), but only {len(used):,} classes have samples: "
        f"if it is wrong, --num-classes {limit} makes it a finding"
    ]


def _class(classes: list[str], number: int) -> str:
    return classes[number] if classes[number] == str(number) else f"{number} {classes[number]}"[:40]


def _sizes(sizes: Counter[int]) -> list[str]:
    rows = [(f"{size >> 16} x {size & 0xFFFF}", count) for size, count in sizes.most_common(SIZES)]
    rest = sum(sizes.values()) - sum(count for _, count in rows)
    if rest:
        rows.append((f"{len(sizes) - SIZES:,} others", rest))
    return [f"sizes (width x height): {len(sizes):,}", *_bars(rows, max((count for _, count in rows), default=0))]


def _bars(rows: list[tuple[str, int]], most: int) -> list[str]:
    name, count = (
        max((len(text) for text in column), default=0) for column in ([r[0] for r in rows], [f"{r[1]:,}" for r in rows])
    )
    return [
        f"  {text:<{name}}  {value:>{count},}  {'#' * round(BAR * value / max(1, most))}".rstrip()
        for text, value in rows
    ]


def next_command(result: Result, out: Path) -> str:
    """The shell command that trains on the index."""
    sides = Counter()
    for block in result.samples.blocks():
        sides.update(np.minimum(block["height"], block["width"]).tolist())
    side = sides.most_common(1)[0][0]
    side = min(64, -(-side // 8) * 8)  # the networks want a multiple of 8
    words = [
        "python", "-m", "ddpm_dist.train", f"run.name={out.name}", f"data.shards={out}", f"data.image_size={side}",
        f"data.channels={result.channels}", f"data.num_classes={'null' if result.classes is None else len(result.classes)}",
    ]  # fmt: skip
    return shlex.join(words)
