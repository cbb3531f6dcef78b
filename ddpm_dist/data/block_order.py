"""The order of samples for data sets that are too large for one permutation: shards are permuted, then samples inside blocks of shards.

An epoch permutes the S shards and cuts their list into ceil(S / K) blocks of at most K shards (sizes that differ by one at most). The
samples of a block are permuted together; the blocks follow each other. Everything is a pure function of (seed, epoch, block), so only
the list of the shards and the blocks that a batch touches are held.

Lanes. A rank that held every G-th position would need every shard of the set. So the slots of a step can be divided into L lanes: slot j
belongs to lane j // (G / L), and every lane walks through a contiguous part of its own of each epoch's order. A rank (or node) that works
on whole lanes touches their shards only. Lanes belong to the run, not to the machines: the order does not depend on the number of ranks.

The q-th place of lane l counts as position q * L + (L - 1 - l) of the run: a permutation of the positions of a step. So after any step as
many samples of each epoch have been seen as without lanes, the parts of an epoch differ by one sample at most, and no lane falls behind.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ddpm_dist.data.order import divisors, listed
from ddpm_dist.errors import UserError

# Streams of numpy's Philox, beside those in ddpm_dist/philox.py.
ORDER_SHARDS, ORDER_BLOCKS, ORDER_SETS, ORDER_SEEDS, ORDER_CLASSES, ORDER_IN_CLASS = 19, 20, 21, 22, 23, 24

LOOKED_AT = 1024  # places of a block that has begun whose shards are put into the exact order of their use
KEPT_EPOCHS = 3  # lists of shards: a batch touches two epochs, and what lies ahead of it a third


def shuffled(seed: int, stream: int, epoch: int, part: int, count: int) -> np.ndarray:
    """A permutation of 0..count-1 (int64), fixed for good by its arguments.

    It sorts raw Philox words whose lowest bits are replaced by their place: no two are equal, so every way to sort gives the same result,
    and the fastest one may be used. numpy promises the stream of ``random_raw`` for all releases.
    """
    # As an array: numpy makes floating point numbers of a list with a seed of 2^63 or more, and other seeds then give the same words.
    key = np.array([seed & (2**64 - 1), stream], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=[0, 0, epoch, part]).random_raw(count)
    bits = np.uint64(max(1, (count - 1).bit_length()))
    words >>= bits
    words <<= bits
    words |= np.arange(count, dtype=np.uint64)
    words.sort()
    words &= (np.uint64(1) << bits) - np.uint64(1)
    return words.view(np.int64)


class Lanes:
    """How the positions of a run fall on lanes, and the places of a lane on epochs. Raises UserError where L does not divide G."""

    def __init__(self, lanes: int, global_batch: int) -> None:
        if lanes < 1 or global_batch % lanes:
            raise UserError(
                f"data.lanes={lanes} does not divide train.global_batch={global_batch}: every lane needs the same number of "
                f"images per step; choose {listed(divisors(global_batch))}"
            )
        self.count, self.global_batch, self.slots = lanes, global_batch, global_batch // lanes

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lanes, places in them) of positions, int64 of the same shape."""
        if self.count == 1:
            return np.zeros_like(positions), positions
        steps, slots = np.divmod(positions, self.global_batch)
        lanes, inside = np.divmod(slots, self.slots)
        return lanes, steps * self.slots + inside

    def epochs(self, lanes: np.ndarray, places: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, offsets in the order of the epoch) of places in lanes, for a set of so many samples."""
        count = self.count
        if count == 1:
            return np.divmod(places, samples)
        epochs = (places * count + (count - 1 - lanes)) // samples
        before = epochs * samples  # (before + lane) // count places of a lane lie before its epoch
        first = self._below(lanes, before + samples) - self._below(lanes, before)
        return epochs, first + places - (before + lanes) // count

    def part(self, lane: int, epoch: int, samples: int) -> tuple[int, int]:
        """(first, end) of the part of an epoch's order that is the lane's."""
        ends = [
            self._below(np.int64(each), np.int64(x))
            for each in (lane, lane + 1)
            for x in (epoch * samples, (epoch + 1) * samples)
        ]
        return int(ends[1] - ends[0]), int(ends[3] - ends[2])

    def _below(self, lanes: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """How many places all lanes below ``lanes`` have had after so many positions: the sum of (positions + k) // L over k < lane."""
        whole, rest = np.divmod(positions, self.count)
        return lanes * whole + np.maximum(0, lanes + rest - self.count)


@dataclass(frozen=True)
class _Epoch:
    """The list of the shards of an epoch, and the offset at which each of its blocks begins."""

    shards: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class _Block:
    """The samples of a block in their order, its shards in that of the list, and the place in the block of each one's last sample."""

    ids: np.ndarray
    shards: np.ndarray
    last: np.ndarray


class BlockOrder:
    """Maps positions to samples, as :class:`ddpm_dist.data.order.SampleOrder` does, holding a few blocks only. Thread-safe.

    Args:
        shard_ends: (S,) int64, one past the last sample of each shard; every shard holds one sample or more.
        block_shards: K, the largest number of shards whose samples are permuted together.
        lanes, global_batch: L and G, see the head of this file; L must divide G. Position p is slot p % G of step p // G.

    Raises:
        UserError: for a K below 1, and lanes that do not divide the batch.
    """

    def __init__(
        self, shard_ends: np.ndarray, seed: int, block_shards: int = 16, lanes: int = 1, global_batch: int = 1
    ) -> None:
        if block_shards < 1:
            raise UserError(f"data.block_shards={block_shards}: a block needs one shard or more")
        self.ends, self.seed = np.asarray(shard_ends, dtype=np.int64), seed
        self.sizes = np.diff(self.ends, prepend=0)
        self.samples, self.lanes = int(self.ends[-1]), Lanes(lanes, global_batch)
        self.blocks = -(-len(self.ends) // block_shards)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._held: dict[tuple[int, int], _Block] = {}  # by epoch and block
        self._used: dict[int, list[tuple[int, int]]] = {}  # lane: the blocks of its latest positions
        self._lock = threading.Lock()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids) of int64 positions, both int64 of the same shape."""
        flat = np.asarray(positions, dtype=np.int64).reshape(-1)
        ids = np.empty_like(flat)
        lanes, places = self.lanes.split(flat)
        epochs, offsets = self.lanes.epochs(lanes, places, self.samples)
        with self._lock:
            made, used = False, {}
            for epoch, lane, block, chosen in self._groups(epochs, lanes, offsets):
                key = (epoch, block)
                if key not in self._held:
                    self._held[key], made = self._block(epoch, block), True
                ids[chosen] = self._held[key].ids[offsets[chosen] - self._epoch(epoch).starts[block]]
                used.setdefault(lane, []).append(key)
            self._used.update(used)
            if made:
                kept = set(itertools.chain.from_iterable(self._used.values()))
                self._held = {key: value for key, value in self._held.items() if key in kept}
        return epochs.reshape(np.shape(positions)), ids.reshape(np.shape(positions))

    def shards_ahead(self, step: int, slots: np.ndarray, count: int) -> np.ndarray:
        """The next shards that some slots need from ``step`` on, in the order of need: at most ``count`` different numbers (int64).

        What the rest of this epoch and the next one need is named, nothing beyond. The next 1,024 places of a block that has begun are
        looked at; its other shards follow. Those of later blocks are in the order of the epoch's list: all shards of a block are needed
        within a short time. A block in which only other slots of a lane have samples left is named, too.
        """
        found: dict[int, None] = {}
        lanes, inside = np.divmod(np.unique(slots), self.lanes.slots)
        walks = [
            self.needs(int(lane), step * self.lanes.slots, inside[lanes == lane]) for lane in np.unique(lanes)
        ]  # fmt: skip
        for _, shard in heapq.merge(*walks):
            if len(found) >= count:
                break
            found[shard] = None
        return np.fromiter(found, dtype=np.int64, count=len(found))

    def needs(self, lane: int, place: int, inside: np.ndarray | None = None) -> Iterator[tuple[tuple[int, int], int]]:
        """((step, slot), shard) in the order in which a lane needs shards from ``place`` on, to the end of the next epoch.

        A shard is named once for each block. inside: only these slots of the lane (numbers from 0), where the block that has begun is
        looked at.
        """
        width, last, begun = self.lanes.slots, None, True
        while True:
            with self._lock:
                epochs, offsets = self.lanes.epochs(np.array([lane]), np.array([place]), self.samples)
                epoch, offset = int(epochs[0]), int(offsets[0])
                last = epoch + 1 if last is None else last
                if epoch > last:
                    return
                starts = self._epoch(epoch).starts
                block = int(np.searchsorted(starts, offset, side="right")) - 1
                end = min(int(starts[block + 1]), self.lanes.part(lane, epoch, self.samples)[1])
                if begun:
                    held = self._held.get((epoch, block)) or self._block(epoch, block)
                    found = self._first_uses(held, place, offset - int(starts[block]), end - int(starts[block]), inside)
                else:
                    found = [(place, shard) for shard in self._shards(epoch, block).tolist()]
            for where, shard in found:
                yield (where // width, lane * width + where % width), shard
            place, begun = place + end - offset, False

    def _first_uses(
        self, block: _Block, place: int, begin: int, end: int, inside: np.ndarray | None
    ) -> list[tuple[int, int]]:
        """(place, shard) of the first uses; at ``place`` stands the sample ``begin`` of the block, and the lane leaves it before ``end``."""
        ids = block.ids[begin : min(end, begin + LOOKED_AT)]
        places = np.arange(place, place + len(ids))
        if inside is not None and len(inside) < self.lanes.slots:
            chosen = np.isin(places % self.lanes.slots, inside)
            places, ids = places[chosen], ids[chosen]
        shards, first = np.unique(np.searchsorted(self.ends, ids, side="right"), return_index=True)
        found = sorted(zip(places[first].tolist(), shards.tolist(), strict=True))
        behind, seen = place + min(end - begin, LOOKED_AT), set(shards.tolist())
        later = block.shards[block.last >= begin + LOOKED_AT] if end - begin > LOOKED_AT else []
        return found + [(behind, int(shard)) for shard in later if shard not in seen]

    def _groups(
        self, epochs: np.ndarray, lanes: np.ndarray, offsets: np.ndarray
    ) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(epoch, lane, block, which of the positions), for all that occur."""
        if len(epochs) == 0:
            return
        low = epochs.min()
        blocks = np.empty_like(epochs)
        for epoch in [low] if low == epochs.max() else np.unique(epochs):
            chosen = epochs == epoch
            blocks[chosen] = np.searchsorted(self._epoch(int(epoch)).starts, offsets[chosen], side="right") - 1
        codes = ((epochs - low) * self.lanes.count + lanes) * self.blocks + blocks
        order = np.argsort(codes, kind="stable")
        edges = [0, *(np.flatnonzero(np.diff(codes[order])) + 1).tolist(), len(codes)]
        for begin, end in itertools.pairwise(edges):
            chosen = order[begin:end]
            first = chosen[0]
            yield int(epochs[first]), int(lanes[first]), int(blocks[first]), chosen

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = shuffled(self.seed, ORDER_SHARDS, epoch, 0, len(self.ends))
            ends = np.cumsum(self.sizes[shards])
            edges = np.arange(1, self.blocks + 1) * len(shards) // self.blocks
            self._epochs[epoch] = _Epoch(shards, np.concatenate([[0], ends[edges - 1]]))
        self._epochs.move_to_end(epoch)
        while len(self._epochs) > KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _shards(self, epoch: int, block: int) -> np.ndarray:
        shards = self._epoch(epoch).shards
        return shards[block * len(shards) // self.blocks : (block + 1) * len(shards) // self.blocks]

    def _block(self, epoch: int, block: int) -> _Block:
        shards = self._shards(epoch, block)
        sizes = self.sizes[shards]
        behind = np.cumsum(sizes)
        order = shuffled(self.seed, ORDER_BLOCKS, epoch, block, int(behind[-1]))
        ids = np.arange(behind[-1]) + np.repeat(self.ends[shards] - behind, sizes)
        last = np.empty_like(shards)
        last[np.repeat(np.arange(len(shards)), sizes)[order]] = np.arange(
            behind[-1]
        )  # of several values the last one stays
        return _Block(ids[order], shards, last)
