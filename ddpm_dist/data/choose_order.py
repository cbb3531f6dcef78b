"""Which order a run has: a full permutation, blocks of shards, a mix of several data sets, or all classes equally often."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddpm_dist.data.block_order import LOOKED_AT, BlockOrder, Lanes
from ddpm_dist.data.mixed_order import ClassOrder, MixedOrder, set_seed
from ddpm_dist.data.order import SampleOrder
from ddpm_dist.errors import UserError

AHEAD = 64  # shards that are named ahead of their use


def kind_of(samples: int, settings: Any) -> str:
    """ "full" or "blocks": what ``data.order`` means for a set of so many samples."""
    if settings.order != "auto":
        return settings.order
    return "full" if samples <= settings.full_shuffle else "blocks"


def shard_ends(index: Any) -> np.ndarray:
    """(S,) int64: one past the last sample of each shard of an index."""
    ends = getattr(index.shards, "ends", None)
    return np.cumsum([shard.samples for shard in index.shards], dtype=np.int64) if ends is None else ends


def make_order(
    index: Any, settings: Any, seed: int, global_batch: int
) -> SampleOrder | BlockOrder | MixedOrder | ClassOrder:
    """The order of a run: an object with ``locate(positions) -> (epochs, ids)``.

    All but ``SampleOrder`` and ``ClassOrder`` also have ``shards_ahead(step, slots, count)``: those two may need any shard at any time.

    Args:
        index: an ``Index``; with ``data.mix`` something with ``parts``, the indexes of the sets in the order of ``settings.mix``.
        settings: the section ``data``: order, full_shuffle, block_shards, lanes, mix, balance.

    Raises:
        UserError: for settings that do not go together, or not with the data.
    """
    if settings.mix:
        if settings.balance != "none":
            raise UserError(
                "data.balance=class does not go with data.mix: give the sets weights instead, or mix nothing"
            )
        return _mix(index, settings, seed, global_batch)
    if settings.balance == "class":
        return _balanced(index, settings, seed)
    return _single(index, settings, seed, global_batch)


def _single(index: Any, settings: Any, seed: int, global_batch: int) -> SampleOrder | BlockOrder:
    Lanes(settings.lanes, global_batch)  # refused in every case: a set that grows must not make a configuration invalid
    if kind_of(len(index), settings) == "full":
        return SampleOrder(len(index), seed)
    return BlockOrder(shard_ends(index), seed, settings.block_shards, settings.lanes, global_batch)


def _mix(index: Any, settings: Any, seed: int, global_batch: int) -> MixedOrder:
    parts, lanes = list(index.parts), settings.lanes
    if len(parts) != len(settings.mix):
        raise UserError(f"data.mix names {len(settings.mix)} data sets, but {len(parts)} were opened")
    Lanes(lanes, global_batch)
    orders = [_single(part, settings, set_seed(seed, number), lanes) for number, part in enumerate(parts)]
    return MixedOrder(
        orders, [len(part) for part in parts], [each.weight for each in settings.mix], seed, lanes, global_batch,
        shards=[len(part.shards) for part in parts], names=[f"data.mix: {each.shards}" for each in settings.mix],
    )  # fmt: skip


def _balanced(index: Any, settings: Any, seed: int) -> ClassOrder:
    if index.classes is None:
        raise UserError("data.balance=class needs labels, and this data set has none: set data.balance=none")
    if kind_of(len(index), settings) != "full":
        raise UserError(
            f"data.balance=class needs the full permutation, which data.order={settings.order} and data.full_shuffle="
            f"{settings.full_shuffle:,} do not give to {len(index):,} samples: raise data.full_shuffle (16 bytes of memory per "
            "sample and rank), or set data.balance=none"
        )
    return ClassOrder(index.samples["label"], seed, index.classes)


def shards_ahead(order: Any, index: Any, step: int, slots: np.ndarray, global_batch: int) -> np.ndarray:
    """Numbers of the shards that the slots of a rank need from ``step`` on, soonest first, a few dozen of them.

    slots: int64, those of the rank in one step.
    """
    if hasattr(order, "shards_ahead"):
        return order.shards_ahead(step, slots, AHEAD)
    steps = max(2, LOOKED_AT // len(slots))
    positions = (np.arange(step, step + steps)[:, None] * global_batch + slots[None, :]).ravel()
    numbers = index.shard_of(order.locate(positions)[1])
    _, first = np.unique(numbers, return_index=True)
    return numbers[np.sort(first)][:AHEAD]
