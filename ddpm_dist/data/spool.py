"""The samples of many shards while they are indexed: on disk, with the different labels counted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_dist.data.index_file import NO_LABEL, SAMPLE_DTYPE
from ddpm_dist.data.labels import MAX_CLASSES
from ddpm_dist.data.scan import Scanned
from ddpm_dist.errors import UserError


class Spool:
    """The samples of many shards in a temporary file, with labels translated when they are read. Read by slices, as an array is."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._rows = 0
        self._segments: list[tuple[int, int]] = []
        self._labels: np.ndarray | None = None
        self._ends = np.zeros(0, np.int64)

    def add(self, samples: np.ndarray) -> int:
        """Append samples; returns the row at which they begin. Raises UserError where the disk is full."""
        first = self._rows
        try:
            self._file.write(samples.tobytes())
        except OSError as error:
            raise UserError(f"the samples found so far cannot be kept ({error.strerror}): free some space") from None
        self._rows += len(samples)
        return first

    def arrange(self, segments: list[tuple[int, int]], labels: np.ndarray | None) -> None:
        """What the samples are, in order: first row and number of rows; and what becomes of every label (None: there are none)."""
        self._file.flush()
        self._segments, self._labels = segments, labels
        self._ends = np.cumsum([count for _, count in segments], dtype=np.int64)
        self._all = np.memmap(self._file, SAMPLE_DTYPE, "r") if self._rows else np.empty(0, SAMPLE_DTYPE)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, wanted: slice) -> np.ndarray:
        begin, end, _ = wanted.indices(len(self))
        pieces = []
        for number in range(int(np.searchsorted(self._ends, begin, side="right")), len(self._segments)):
            first, count = self._segments[number]
            start = int(self._ends[number]) - count
            if start >= end:
                break
            rows = np.array(self._all[first + max(0, begin - start) : first + min(count, end - start)])
            rows["label"] = NO_LABEL if self._labels is None else self._labels[rows["label"]]
            pieces.append(rows)
        return np.concatenate(pieces) if pieces else np.empty(0, SAMPLE_DTYPE)

    def segment(self, number: int) -> np.ndarray:
        """The samples of one segment."""
        end = int(self._ends[number])
        return self[end - self._segments[number][1] : end]

    def segment_of(self, row: int) -> int:
        """Which of the segments a sample is in."""
        return int(np.searchsorted(self._ends, row, side="right"))

    def blocks(self, size: int = 1 << 18) -> Iterator[np.ndarray]:
        """All samples, some at a time."""
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]


@dataclass
class Entry:
    """A shard that was scanned; its samples lie in a ``Spool``, ``count`` of them from row ``first`` on."""

    scanned: Scanned
    first: int
    count: int


class Texts:
    """The different labels of all shards, numbered as they come, and how often each occurs."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self._counts = np.zeros(0, np.int64)

    def add(self, scanned: Scanned, spool: Spool) -> Entry:
        """Move a shard's samples into the spool, with these numbers for labels. Raises UserError: too many different labels."""
        found = scanned.found
        rows, texts = found.samples, found.labels
        found.samples, found.labels = np.empty(0, SAMPLE_DTYPE), []  # there may be half a million shards
        # The last entry is for position -1, a sample without label.
        numbers = np.array([*(self.ids.setdefault(text, len(self.ids)) for text in texts), NO_LABEL], np.int32)
        if len(self.ids) > MAX_CLASSES:
            raise UserError(
                f"more than {MAX_CLASSES:,} different labels such as {texts[-1]!r}: captions? Choose another --label, or --unlabelled"
            )
        rows = rows.copy()
        rows["label"] = numbers[rows["label"]]
        for text in scanned.refused:  # no sample has them, but they count where it is asked what most labels are
            self.ids.setdefault(text, len(self.ids))
        self._counts = np.pad(self._counts, (0, len(self.ids) - len(self._counts)))
        self._counts += np.bincount(rows["label"] + 1, minlength=len(self.ids) + 1)[1:]
        self._counts[[self.ids[text] for text in scanned.refused]] += np.array(list(scanned.refused.values()), np.int64)
        return Entry(scanned, spool.add(rows), len(rows))

    def counts(self) -> dict[str, int]:
        """Of those that occur; a label may be known from samples that have other findings only."""
        counts = zip(self.ids, self._counts.tolist(), strict=True)
        return {text: count for text, count in counts if count}
