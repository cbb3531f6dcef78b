"""data.on_bad=skip: another sample stands in for one that cannot be used, the same one on every rank and after every resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ddpm_dist.errors import BadSample, RunFailed

MOST = 0.5  # share of the set; if more of it is bad, something else is wrong


class BadSamples:
    """What was found so far. A sample's stand-in is the first good one behind it in the index (the first of all behind the last).

    That depends on the data alone, not on who found out when: a stand-in that turns out to be bad itself is passed over as well.

    Args:
        told: called with a sentence for every bad sample, once.
        labels: (N,) labels; then a stand-in has the same one, which keeps balanced classes balanced.
        names: names of the classes, for messages.
    """

    def __init__(
        self,
        samples: int,
        told: Callable[[str], None],
        labels: np.ndarray | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._samples, self._told, self._labels, self._names = samples, told, labels, names
        self._found: set[int] = set()
        self._members: dict[int, np.ndarray] = {}  # samples of the labels that were asked for

    def add(self, error: BadSample) -> None:
        """Remember the sample of ``error``. Raises RunFailed when hardly any are left."""
        self._found.add(error.sample)
        self._told(f"left out: {error}")
        if len(self._found) > MOST * self._samples:
            raise _failed(f"{len(self._found)} of {self._samples} samples cannot be used, the last one: {error}")

    def replace(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """(ids with stand-ins, how many there are). Raises RunFailed where no sample of a class is left."""
        if not self._found:
            return ids, 0
        places = [place for place, sample in enumerate(ids.tolist()) if sample in self._found]
        if places:
            ids = ids.copy()
        for place in places:
            ids[place] = self._stand_in(int(ids[place]))
        return ids, len(places)

    def _stand_in(self, sample: int) -> int:
        if self._labels is None:
            while sample in self._found:
                sample = (sample + 1) % self._samples
            return sample
        label = int(self._labels[sample])
        if label not in self._members:
            self._members[label] = np.flatnonzero(self._labels == label)
        members = self._members[label]
        first = int(np.searchsorted(members, sample))
        for step in range(1, len(members)):
            other = int(members[(first + step) % len(members)])
            if other not in self._found:
                return other
        name = f" ({self._names[label]})" if self._names and self._names[label] != str(label) else ""
        raise _failed(
            f"none of the {len(members)} samples of class {label}{name} can be used, so data.balance=class cannot show it"
        )


def _failed(what: str) -> RunFailed:
    error = RunFailed(
        f"{what}. Nothing was skipped for good: repair the shards, or examine them with python -m ddpm_dist.index --check"
    )
    error.one_rank = True  # the others read other samples
    return error
