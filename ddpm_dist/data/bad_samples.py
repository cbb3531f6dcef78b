"""data.on_bad=skip: another sample stands in for one that cannot be used, the same one on every rank and after every resume."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ddpm_dist.errors import BadSample, RunFailed

MOST = 0.5  # share of the set; if more of it is bad, something else is wrong


class BadSamples:
    """What was found so far. A sample's stand-in is the first good one behind it in the index (the first of all behind the last).

    That depends on the data alone, not on who found out when: a stand-in that turns out to be bad itself is passed over as well.
    """

    def __init__(self, samples: int, told: Callable[[str], None]) -> None:
        self._samples, self._told = samples, told
        self._found: set[int] = set()

    def add(self, error: BadSample) -> None:
        """Remember the sample of ``error``. Raises RunFailed when hardly any are left."""
        self._found.add(error.sample)
        self._told(f"left out: {error}")
        if len(self._found) > MOST * self._samples:
            raise RunFailed(
                f"{len(self._found)} of {self._samples} samples cannot be used, the last one: {error}. Nothing was skipped for good: repair "
                "the shards, or examine them with python -m ddpm_dist.index --check"
            )

    def replace(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """(ids with stand-ins, how many there are)."""
        if not self._found:
            return ids, 0
        places = [place for place, sample in enumerate(ids.tolist()) if sample in self._found]
        if places:
            ids = ids.copy()
        for place in places:
            sample = int(ids[place])
            while sample in self._found:
                sample = (sample + 1) % self._samples
            ids[place] = sample
        return ids, len(places)
