"""Several data sets as one (``data.mix``): their samples are numbered one set after the other."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist.config import Data
from ddpm_dist.data.pipeline import open_index
from ddpm_dist.data.shards import SAMPLE_DTYPE, Index
from ddpm_dist.errors import BadSample, UserError


class MixedIndex:
    """Answers as :class:`Index` does; ``parts``: the indexes of the sets."""

    def __init__(self, parts: Sequence[Index]) -> None:
        self.parts = list(parts)
        first = self.parts[0]
        for part in self.parts[1:]:
            for what in ("channels", "classes"):
                mine, theirs = getattr(first, what), getattr(part, what)
                if mine != theirs:
                    raise UserError(
                        f"data.mix: {first.folder} has {what} {_short(mine)}, {part.folder} has {_short(theirs)}: sets that are mixed "
                        "need the same (pack or index them again with the same classes and --channels)"
                    )
        self.folder: Path = first.folder
        self.classes, self.channels, self.num_classes = first.classes, first.channels, first.num_classes
        formats = {part.image_format for part in self.parts}
        self.image_format = formats.pop() if len(formats) == 1 else "mixed"
        self.ranges = {
            name: [
                min(part.ranges[name][0] for part in self.parts),
                max(part.ranges[name][1] for part in self.parts),
            ]
            for name in first.ranges
        }
        text = json.dumps([part.fingerprint for part in self.parts])
        self.fingerprint = hashlib.sha256(text.encode("ascii")).hexdigest()
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @functools.cached_property
    def samples(self) -> np.ndarray:
        """The records of all sets, one after the other (a copy)."""
        return np.concatenate([part.samples for part in self.parts])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """As :meth:`Index.rows`."""
        found = np.empty(np.shape(ids), dtype=SAMPLE_DTYPE)
        self._each(ids, lambda part, own, places: found.__setitem__(places, part.rows(own)))
        return found

    def read_many(self, ids: np.ndarray) -> list[bytes]:
        """As :meth:`Index.read_many`."""
        found: dict[int, bytes] = {}
        self._each(ids, lambda part, own, places: found.update(zip(places.tolist(), part.read_many(own), strict=True)))
        return [found[place] for place in range(len(ids))]

    def read(self, sample_id: int) -> bytes:
        """As :meth:`Index.read`."""
        return self.read_many(np.asarray([sample_id]))[0]

    def describe(self, sample_id: int) -> str:
        """As :meth:`Index.describe`."""
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        return self.parts[number].describe(int(sample_id - (self._ends[number - 1] if number else 0)))

    def want(self, numbers: np.ndarray, urgent: np.ndarray | Sequence[int] = ()) -> None:
        """As :meth:`Index.want`; shards are numbered one set after the other."""
        begin, urgent = 0, np.asarray(urgent, dtype=np.int64)
        for part in self.parts:
            end = begin + len(part.shards)
            part.want(*(some[(some >= begin) & (some < end)] - begin for some in (numbers, urgent)))
            begin = end

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        """As :meth:`Index.shard_of`; shards are numbered one set after the other."""
        found = np.empty(np.shape(ids), dtype=np.int64)
        begins = np.cumsum([0, *(len(part.shards) for part in self.parts)])
        for number, part in enumerate(self.parts):
            first = self._ends[number - 1] if number else 0
            places = np.flatnonzero((ids >= first) & (ids < self._ends[number]))
            found[places] = part.shard_of(ids[places] - first) + begins[number]
        return found

    def close(self) -> None:
        """As :meth:`Index.close`."""
        for part in self.parts:
            part.close()

    def _each(self, ids: np.ndarray, action: Callable[[Index, np.ndarray, np.ndarray], Any]) -> None:
        """``action(part, its own ids, their places in ids)`` for every set that occurs."""
        numbers = np.searchsorted(self._ends, ids, side="right")
        for number in np.unique(numbers):
            places, first = np.flatnonzero(numbers == number), int(self._ends[number - 1]) if number else 0
            try:
                action(self.parts[number], ids[places] - first, places)
            except BadSample as error:
                error.sample += first
                raise


def open_data(settings: Data, pack_hint: str) -> Index | MixedIndex:
    """What a run trains on: ``data.shards``, or the sets of ``data.mix``. UserError with the remedy."""
    if settings.mix is None:
        return open_index(settings, pack_hint)
    if settings.shards is not None:
        raise UserError(
            "data.shards and data.mix are both set: put the set of data.shards into data.mix, or leave one out"
        )
    folders = [part.shards for part in settings.mix]
    if len(set(folders)) < len(folders):
        raise UserError(f"data.mix names {max(folders, key=folders.count)} twice: give it one weight")
    return MixedIndex([open_index(settings.model_copy(update={"shards": each}), pack_hint) for each in folders])


def _short(value: Any) -> str:
    text = ", ".join(value[:5]) + (", ..." if len(value) > 5 else "") if isinstance(value, list) else str(value)
    return f"({len(value)}: {text})" if isinstance(value, list) else text
