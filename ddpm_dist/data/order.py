"""Who sees which sample when: pure functions of (seed, step, slot), never of a rank or of what happened before.

Slot j of step s (steps counted from 0) is position p = s * G + j with G the global batch. Position p belongs to epoch
p // N and shows sample ``permutation(seed, epoch)[p % N]``. Batches straddle epochs, so every sample appears exactly once in
an epoch whatever G, N and the number of ranks are.

Sets that are too large for one permutation: ``block_order.py``; several sets and balanced classes: ``mixed_order.py``; which of them a
run has: ``choose_order.py``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ddpm_dist import philox
from ddpm_dist.errors import UserError


def permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of an epoch: int64 permutation of 0..samples-1.

    It sorts raw Philox words, whose stream is fixed for good, instead of using ``Generator.permutation``, whose stream numpy
    may change between releases.
    """
    return np.argsort(philox.host_words(seed, philox.ORDER, epoch, samples), kind="stable")


class SampleOrder:
    """Maps positions to samples, keeping the permutations of the epochs that a batch can touch."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids) of int64 positions, both int64 of the same shape."""
        epochs, offsets = np.divmod(positions, self.samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._permutation(int(epoch))[offsets[chosen]]
        return epochs, ids

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = permutation(self.seed, epoch, self.samples)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


@dataclass(frozen=True)
class BatchPlan:
    """How the slots of a global batch fall on ranks and micro-batches.

    Rank r works on slots r*G/W .. (r+1)*G/W - 1, ``micro_batch`` of them at a time, ``accumulation`` times per step.
    """

    global_batch: int
    world_size: int
    micro_batch: int

    @property
    def per_rank(self) -> int:
        return self.global_batch // self.world_size

    @property
    def accumulation(self) -> int:
        return self.per_rank // self.micro_batch

    def slots(self, rank: int, micro: int) -> np.ndarray:
        """Slots (int64) of micro-batch ``micro`` on ``rank``."""
        start = rank * self.per_rank + micro * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


def plan_batches(global_batch: int, micro_batch: int | None, world_size: int) -> BatchPlan:
    """Check that global_batch = micro_batch x ranks x accumulation. UserError lists the choices that are valid."""
    if world_size > global_batch:
        raise UserError(
            f"{world_size} ranks but train.global_batch={global_batch}: every rank needs at least one image per step; "
            f"start at most {global_batch} processes or raise train.global_batch"
        )
    if global_batch % world_size:
        lower = global_batch // world_size * world_size
        ranks = [n for n in divisors(global_batch) if n <= 4 * world_size]
        raise UserError(
            f"train.global_batch={global_batch} is not divisible by {world_size} ranks: use "
            f"{lower} or {lower + world_size}, or start {listed(ranks)} ranks"
        )
    per_rank = global_batch // world_size
    if micro_batch is None:
        micro_batch = per_rank
    if per_rank % micro_batch:
        raise UserError(
            f"train.micro_batch={micro_batch} does not divide the {per_rank} images of a rank "
            f"(train.global_batch={global_batch} / {world_size} ranks): choose {listed(divisors(per_rank))}"
        )
    return BatchPlan(global_batch, world_size, micro_batch)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def listed(numbers: list[int]) -> str:
    """ "1, 2 or 4"; of a long list its two ends."""
    shown = numbers if len(numbers) <= 12 else [*numbers[:6], *numbers[-6:]]
    return ", ".join(map(str, shown[:-1])) + (" or " if len(shown) > 1 else "") + str(shown[-1])
