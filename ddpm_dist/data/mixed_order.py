"""Orders that deal the positions of a run to parts: weighted mixing of several data sets, and all classes equally often.

Dealing has a period of M places. Each period holds every part an exact number of times, in an order that Philox shuffles anew for every
period. So which part a place belongs to, and which place of the part it is, follow from the place alone; nothing is counted on the way.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ddpm_dist.data.block_order import (
    ORDER_CLASSES,
    ORDER_IN_CLASS,
    ORDER_SEEDS,
    ORDER_SETS,
    BlockOrder,
    Lanes,
    shuffled,
)
from ddpm_dist.errors import UserError

PERIOD = 1000  # places of a mix: shares are rounded to a thousandth
CLASS_PERIOD = 1024  # at least; so that a batch touches a few periods only


class Dealer:
    """Deals the places 0, 1, 2, ... of a lane to parts. counts: (D,) how often each part occurs in a period, each at least once."""

    def __init__(self, counts: np.ndarray, seed: int, stream: int, lanes: int = 1) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.period = int(self.counts.sum())
        self._firsts = np.cumsum(self.counts) - self.counts
        self._pattern = np.repeat(np.arange(len(self.counts)), self.counts)
        self._seed, self._stream, self._lanes = seed, stream, lanes
        self._kept: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._limit = 2 * lanes + 2

    def deal(self, lanes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(parts, places in the parts) of places in lanes, int64 (B,)."""
        periods, inside = np.divmod(places, self.period)
        parts, within = np.empty_like(places), np.empty_like(places)
        codes = periods * self._lanes + lanes
        for code in np.unique(codes).tolist():
            chosen = np.flatnonzero(codes == code)
            period, lane = divmod(code, self._lanes)
            dealt, rank = self._dealt(period, lane)
            parts[chosen], within[chosen] = dealt[inside[chosen]], rank[inside[chosen]]
        return parts, within + periods * self.counts[parts]

    def begun(self, lane: int, place: int) -> np.ndarray:
        """(D,) int64: how many places of each part lie before ``place``."""
        period, inside = divmod(place, self.period)
        return period * self.counts + np.bincount(self._dealt(period, lane)[0][:inside], minlength=len(self.counts))

    def _dealt(self, period: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """For every place of a period its part, and how often that part occurs before it in the period."""
        key = (period, lane)
        if key not in self._kept:
            parts = self._pattern[shuffled(self._seed, self._stream, period, lane, self.period)]
            order = np.argsort(parts, kind="stable")
            rank = np.empty_like(order)
            rank[order] = np.arange(self.period) - self._firsts[parts[order]]
            self._kept[key] = parts, rank
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        return self._kept[key]


def shares(weights: Sequence[float], period: int = PERIOD, names: Sequence[str] | None = None) -> np.ndarray:
    """(D,) int64: how many of ``period`` places each part gets; largest remainders are rounded up, the sum is ``period``.

    Raises:
        UserError: for weights that are not positive numbers, and for one so small that its part would get no place.
    """
    values = np.asarray(weights, dtype=np.float64)
    named = [f"data.mix[{i}]" if names is None else names[i] for i in range(len(values))]
    if len(values) == 0:
        raise UserError("data.mix is empty: name at least one data set")
    for name, value in zip(named, values, strict=True):
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name}: weight {value:g} is not a positive number; leave the data set out instead")
    exact = values / values.max()  # first, so that the sum cannot overflow
    exact = exact / exact.sum() * period
    counts = np.floor(exact).astype(np.int64)
    for part in np.argsort(-(exact - counts), kind="stable")[: period - int(counts.sum())]:
        counts[part] += 1
    if (counts == 0).any():
        part = int(np.argmin(counts))
        raise UserError(
            f"{named[part]}: weight {values[part]:g} of {values.sum():g} is less than one image in {period:,}: raise it, or leave the "
            "data set out"
        )
    return counts


def set_seed(seed: int, number: int) -> int:
    """The seed of the order of data set ``number`` in a mix, so that sets of one size do not share their order."""
    words = np.random.Philox(key=[seed & (2**64 - 1), ORDER_SEEDS], counter=[0, 0, number, 0]).random_raw(1)
    return int(words[0] >> np.uint64(1))  # as the seeds of runs: below 2^63


class MixedOrder:
    """Maps positions to the samples of several data sets, which count one behind the other. Thread-safe where the orders are.

    Args:
        orders: an order for each set, with ``locate(positions)``. With lanes: L slots in its step (``BlockOrder(..., lanes=L,
            global_batch=L)``), so that each lane walks through a part of its own of every set; a full permutation needs nothing.
        sizes: samples of each set; ids of set d begin at the sum of the sizes before it.
        weights: how many images of each set there are, relative to the others; rounded to a thousandth of their sum.
        lanes, global_batch: L and G as in ``BlockOrder``.
        shards: how many shards each set has, for :meth:`shards_ahead`, which counts them one set behind the other.

    Raises:
        UserError: for weights that cannot be, and lanes that do not divide the batch.
    """

    def __init__(
        self, orders: Sequence[Any], sizes: Sequence[int], weights: Sequence[float], seed: int, lanes: int = 1, global_batch: int = 1,
        shards: Sequence[int] | None = None, names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.orders, self.samples, self.lanes = list(orders), int(sum(sizes)), Lanes(lanes, global_batch)
        self._dealer = Dealer(shares(weights, names=names), seed, ORDER_SETS, lanes)
        self._firsts = np.cumsum([0, *sizes])
        self._shards = shards
        self._lock = threading.Lock()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs of the sample's own set, sample ids) of int64 positions, both int64 of the same shape."""
        flat = np.asarray(positions, dtype=np.int64).reshape(-1)
        epochs, ids = np.empty_like(flat), np.empty_like(flat)
        lanes, places = self.lanes.split(flat)
        with self._lock:
            parts, within = self._dealer.deal(lanes, places)
            own = within * self.lanes.count + lanes  # with one slot per lane and step
            for part in np.unique(parts):
                chosen = parts == part
                epochs[chosen], found = self.orders[part].locate(own[chosen])
                ids[chosen] = found + self._firsts[part]
        return epochs.reshape(np.shape(positions)), ids.reshape(np.shape(positions))

    def shards_ahead(self, step: int, slots: np.ndarray, count: int) -> np.ndarray:
        """As ``BlockOrder.shards_ahead``; the places of a set are taken to lie evenly. A full permutation needs all its shards at once."""
        if self._shards is None:
            raise ValueError("shards_ahead needs the number of shards of every set")
        width, found = self.lanes.slots, {}
        firsts = np.cumsum([0, *self._shards])
        walks = []
        for lane in np.unique(np.asarray(slots) // width).tolist():
            with self._lock:
                begun = self._dealer.begun(lane, step * width)
            for part, order in enumerate(self.orders):
                walks.append(self._needs(order, part, int(firsts[part]), lane, int(begun[part]), step * width))
        for _, shard in heapq.merge(*walks):
            if len(found) >= count:
                break
            found[shard] = None
        return np.fromiter(found, dtype=np.int64, count=len(found))

    def _needs(
        self, order: Any, part: int, first: int, lane: int, begun: int, place: int
    ) -> Iterator[tuple[tuple[int, int], int]]:
        """((place, lane), shard) in the order of need, with shards numbered over all sets."""
        if not isinstance(order, BlockOrder):
            yield from (((place, lane), first + shard) for shard in range(self._shards[part]))
            return
        counts, period = int(self._dealer.counts[part]), self._dealer.period
        for (own, _), shard in order.needs(lane, begun):
            yield (place + (own - begun) * period // counts, lane), first + shard


class ClassOrder:
    """Shows every class equally often; within a class every sample once in each of the class's own epochs. Thread-safe.

    Classes without samples are left out: ``warnings`` (list of sentences) says which.

    Args:
        labels: (N,) integers from 0.
        names: names of the classes, for messages; classes behind the largest label count too.

    Raises:
        UserError: for samples without a label.
    """

    def __init__(self, labels: np.ndarray, seed: int, names: Sequence[str] | None = None) -> None:
        labels = np.asarray(labels)
        if (labels < 0).any():
            bad = int(np.argmax(labels < 0))
            raise UserError(
                f"data.balance=class: sample {bad} has no label; set data.balance=none for an unlabelled set"
            )
        counts = np.bincount(labels, minlength=0 if names is None else len(names))
        self.samples, self._seed = len(labels), seed
        self._classes = np.flatnonzero(counts)
        self.warnings = _left_out(np.flatnonzero(counts == 0), names)
        small = np.int32 if len(labels) < 2**31 else np.int64
        self._members = np.argsort(labels, kind="stable").astype(small)  # class after class
        self._counts = counts[self._classes]
        self._firsts = np.cumsum(self._counts) - self._counts
        self._shown = self._members.copy()  # each class in the order of the epoch that it is in
        self._epochs = np.full(len(self._classes), -1)
        rounds = -(-CLASS_PERIOD // len(self._classes))
        self._dealer = Dealer(np.full(len(self._classes), rounds), seed, ORDER_CLASSES)
        self._lock = threading.Lock()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs of the sample's class, sample ids) of int64 positions, both int64 of the same shape."""
        flat = np.asarray(positions, dtype=np.int64).reshape(-1)
        ids = np.full_like(flat, -1)
        with self._lock:
            parts, within = self._dealer.deal(np.zeros_like(flat), flat)
            epochs, offsets = np.divmod(within, self._counts[parts])
            self._shown_now(parts, epochs, offsets, ids, np.arange(len(flat)))
            missing = np.flatnonzero(ids < 0)  # a class that is in another epoch; few, where classes are large
            missing = missing[np.lexsort((epochs[missing], parts[missing]))]
            changes = (np.diff(parts[missing]) != 0) | (np.diff(epochs[missing]) != 0)
            for group in np.split(missing, np.flatnonzero(changes) + 1) if len(missing) else []:
                self._turn(int(parts[group[0]]), int(epochs[group[0]]))
                self._shown_now(parts, epochs, offsets, ids, group)
        return epochs.reshape(np.shape(positions)), ids.reshape(np.shape(positions))

    def _shown_now(
        self, parts: np.ndarray, epochs: np.ndarray, offsets: np.ndarray, ids: np.ndarray, chosen: np.ndarray
    ) -> None:
        """Fill in the ids of those of the chosen places whose class is in their epoch."""
        found = chosen[epochs[chosen] == self._epochs[parts[chosen]]]
        ids[found] = self._shown[self._firsts[parts[found]] + offsets[found]]

    def _turn(self, part: int, epoch: int) -> None:
        first, count = int(self._firsts[part]), int(self._counts[part])
        if count > 1:
            order = shuffled(self._seed, ORDER_IN_CLASS, epoch, int(self._classes[part]), count)
            self._shown[first : first + count] = self._members[first : first + count][order]
        self._epochs[part] = epoch


def _left_out(empty: np.ndarray, names: Sequence[str] | None) -> list[str]:
    if len(empty) == 0:
        return []
    shown = [str(number) if names is None else f"{number} ({names[number]})" for number in empty[:10].tolist()]
    more = f" and {len(empty) - len(shown)} more" if len(empty) > len(shown) else ""
    return [
        f"data.balance=class: no sample has class {', '.join(shown)}{more}; left out, the others are shown equally often"
    ]
