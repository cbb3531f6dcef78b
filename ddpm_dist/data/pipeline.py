"""From the index to pixels on the device: read bytes, decode through DALI, deliver micro-batches ahead of need.

The order says which samples form a micro-batch; a reader fetches and checks their bytes; DALI decodes, cuts, resizes and
mirrors them to uint8; the trainer normalises. Nothing here remembers a position: a loader is told its first step.
"""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import philox
from ddpm_dist.config import Data
from ddpm_dist.data import augment
from ddpm_dist.data.bad_samples import BadSamples
from ddpm_dist.data.cache import Cache
from ddpm_dist.data.choose_order import make_order, shards_ahead
from ddpm_dist.data.order import BatchPlan, SampleOrder
from ddpm_dist.data.raw import open_decoder
from ddpm_dist.data.reading import Reader
from ddpm_dist.data.remote_source import public_name, refuse_command
from ddpm_dist.data.shard_cache import ShardCache
from ddpm_dist.data.shards import MAX_CHECKED_FILES, Index
from ddpm_dist.data.workers import LEAST_AHEAD, local_ranks, readers
from ddpm_dist.errors import BadSample, UserError
from ddpm_dist.runtime import Runtime

CACHE_SHARE = 0.5  # of the disk, for fetched shards, unless data.cache_dir_gb says otherwise
FETCHERS = 8  # threads of a node that fetch shards ahead of need
LOOK_AHEAD = 0.05  # seconds: looking for the shards to come takes as long as reading a few small images, and little changes in a step
PREFETCH = LEAST_AHEAD  # micro-batches that wait decoded, where nothing is said
T = TypeVar("T")


@dataclass
class MicroBatch:
    """What one rank sees in one micro-step. ``pixels``: uint8 (B, C, H, W); ``labels``: int64 (B,), -1 = no label."""

    step: int
    slots: np.ndarray
    ids: np.ndarray
    pixels: Tensor
    labels: Tensor
    ready: Any = None  # CUDA event of the copy to the device
    replaced: int = 0  # how many stand for samples that cannot be used (data.on_bad=skip)


class Loader:
    """Runs a source of micro-batches in a background thread.

    ``seconds_waited``: what the consumer waited for it; ``replaced``: images so far that stand for bad ones.
    """

    def __init__(self, batches: Iterator[MicroBatch], device: torch.device, ahead: int = PREFETCH) -> None:
        """ahead: micro-batches that wait decoded, at least 1."""
        self.seconds_waited, self.replaced = 0.0, 0
        self._taken, self._waiting = 0, False
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._device = device
        self._thread = threading.Thread(target=self._produce, args=(batches,), name="loader", daemon=True)
        self._thread.start()

    def _produce(self, batches: Iterator[MicroBatch]) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            for batch in batches:
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> MicroBatch:
        """The next micro-batch, ready for the current stream. Raises what the background thread met."""
        start = time.monotonic()
        self._taken, self._waiting = self._taken + 1, True
        item = self._queue.get()
        self._waiting = False
        self.seconds_waited += time.monotonic() - start
        if item is None:
            raise RuntimeError("the loader was asked for more steps than it was started for")
        if isinstance(item, BaseException):
            raise item
        self.replaced += item.replaced
        if item.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(item.ready)
            item.pixels.record_stream(stream)
            item.labels.record_stream(stream)
        return item

    @property
    def doing(self) -> str:
        """What the consumer is at, in words; from any thread."""
        return f"{'waiting for the data of' if self._waiting else 'computing'} micro-batch {self._taken}"

    def close(self) -> None:
        """End the background thread."""
        self._stop.set()
        self._thread.join(timeout=30)


def open_index(settings: Data, pack_hint: str, key: str = "data.shards") -> Index:
    """Load and check the index of ``data.shards`` against the configuration. UserError with the remedy.

    key: how messages call the setting.
    """
    if settings.shards is None:
        raise UserError(f"{key} is not set: name the folder with the packed shards.\n{pack_hint}")
    if not os.path.isdir(settings.shards):
        raise UserError(f"the shard folder {settings.shards} ({key}) does not exist.\n{pack_hint}")
    index = Index.load(settings.shards)
    index.check_files()
    index.cache = _cache_of(index, settings)
    low, high = index.ranges["label"]
    if settings.num_classes is not None:
        if low < 0:
            first = int(np.argmax(index.samples["label"] < 0))
            raise UserError(
                f"{settings.shards}: {index.describe(first)} has no label but data.num_classes={settings.num_classes}; "
                "set data.num_classes=null for an unlabelled set"
            )
        if high >= settings.num_classes:
            first = int(np.argmax(index.samples["label"] >= settings.num_classes))
            raise UserError(
                f"{settings.shards}: {index.describe(first)} has label {int(index.samples['label'][first])}, outside 0.."
                f"{settings.num_classes - 1}; set data.num_classes={high + 1} or pack the set again"
            )
    return index


def _cache_of(index: Index, settings: Data) -> ShardCache | None:
    """Where the shards of an index are fetched to; None where they are read in place. UserError where they cannot be."""
    if settings.cache_dir is None:
        if index.is_remote():
            raise UserError(
                f"{settings.shards}: its shards are not on this machine ({public_name(index.location(0))}): set data.cache_dir to a folder "
                "on a local disk, where they are fetched to, and data.cache_dir_gb to what it may take"
            )
        return None
    for number in range(min(len(index.shards), MAX_CHECKED_FILES)):
        refuse_command(index.location(number), settings.allow_pipe)
    folder, whole = Path(settings.cache_dir), int(index.shard_bytes.sum())
    if settings.cache_dir_gb is not None:
        budget = int(settings.cache_dir_gb * 1e9)
    else:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        budget = min(whole, int(CACHE_SHARE * shutil.disk_usage(there).total))
    return ShardCache(folder, budget, max(1, FETCHERS // local_ranks()), settings.allow_pipe, settings.fetch_patience)


def shard_batches(
    index: Index,
    settings: Data,
    plan: BatchPlan,
    runtime: Runtime,
    seed: int,
    steps: range,
    decoder: str,
    cache: str = "none",
    told: Callable[[str], None] = lambda text: None,
) -> Iterator[MicroBatch]:
    """Micro-batches of this rank for ``steps`` (counted from 0), decoded by DALI; cache: see ``cache.choose_place``.

    told: called once for each bad sample that data.on_bad=skip leaves out, with a sentence, in the thread that reads.
    """
    balanced = settings.balance == "class"
    bad = BadSamples(len(index), told, index.samples["label"] if balanced else None, index.classes)
    order = make_order(index, settings, seed, plan.global_batch)

    def positions() -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        everything = np.concatenate([plan.slots(runtime.rank, micro) for micro in range(plan.accumulation)])
        next_look = 0.0
        for step in steps:
            if fetched and (step == steps.start or time.monotonic() >= next_look):
                next_look = time.monotonic() + LOOK_AHEAD
                urgent: Any = ()
                if step == steps.start:
                    first = order.locate(step * plan.global_batch + everything[: plan.micro_batch])[1]
                    urgent = np.unique(index.shard_of(first))
                index.want(shards_ahead(order, index, step, everything, plan.global_batch), urgent)
            for slots in (plan.slots(runtime.rank, micro) for micro in range(plan.accumulation)):
                yield step, slots, *order.locate(step * plan.global_batch + slots)

    fetched = any(part.cache is not None for part in getattr(index, "parts", [index]))
    wanted = positions()
    with Reader(index, readers=readers(settings)) as read:
        if cache != "none":
            kept = Cache(index, settings, plan.micro_batch, runtime.device, decoder, cache, read)
            for step, slots, epochs, ids in wanted:
                yield MicroBatch(step, slots, ids, *kept(ids, *_treatment(index, settings, seed, epochs, ids)))
            return
        taken: deque[tuple] = deque()  # from ``wanted``, and not yet delivered

        def take() -> Iterator[tuple]:
            for item in wanted:
                taken.append(item)
                yield item

        while True:
            again = list(taken)
            try:
                for batch in _decoded(
                    index, settings, plan, runtime, seed, decoder, read, itertools.chain(again, take()), bad
                ):
                    taken.popleft()
                    yield batch
                return
            except BadSample as error:
                if settings.on_bad != "skip":
                    raise
                bad.add(error)


def _decoded(
    index: Index, settings: Data, plan: BatchPlan, runtime: Runtime, seed: int, decoder: str, read: Reader, wanted: Iterator[tuple],
    bad: BadSamples,
) -> Iterator[MicroBatch]:  # fmt: skip
    """Micro-batches of ``wanted`` until one holds a sample that cannot be used: raises BadSample, and what had begun has to begin again."""
    decode = open_decoder(index, settings, plan.micro_batch, runtime.device, decoder)
    replaced = ((step, slots, epochs, *bad.replace(ids)) for step, slots, epochs, ids in wanted)
    reading = _ahead((*item, read.start(item[3])) for item in replaced)

    def started() -> Iterator[tuple[int, np.ndarray, np.ndarray, int]]:
        for step, slots, epochs, ids, count, files in reading:
            decode.start(ids, files(), *_treatment(index, settings, seed, epochs, ids))
            yield step, slots, ids, count

    for step, slots, ids, count in _ahead(started()):
        yield MicroBatch(step, slots, ids, *decode.finish(), count)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; before one is given the next is taken, so that what taking it begins goes on meanwhile."""
    before = next(items, None)
    if before is not None:
        for item in items:
            yield before
            before = item
        yield before


def _treatment(
    index: Index, settings: Data, seed: int, epochs: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """What is done to each image: its window (B, 4), whether it is mirrored (B,), its label (B,) int64, its colours (B, 4) or None."""
    rows = index.rows(ids)
    jitter = any(settings.color_jitter)
    random = settings.flip or settings.crop == "random_resized" or jitter
    count = augment.DRAWS_WITH_COLOURS if jitter else augment.DRAWS
    uniform = augment.draws(seed, epochs, ids, count) if random else None
    windows = augment.windows(settings.crop, settings.crop_scale, rows["height"], rows["width"], uniform)
    mirror = (uniform[:, augment.MIRROR] < 0.5) if settings.flip else np.zeros(len(ids), dtype=bool)
    labels = rows["label"] if settings.num_classes is not None else np.full(len(ids), -1)
    return windows, mirror, labels.astype(np.int64), augment.colours(settings.color_jitter, uniform) if jitter else None


SYNTHETIC_SAMPLES = 50_000


def synthetic_batches(
    settings: Data, plan: BatchPlan, runtime: Runtime, seed: int, steps: range
) -> Iterator[MicroBatch]:
    """Uniform random bytes made on the device, a function of (seed, sample): no shards and no DALI."""
    order = SampleOrder(SYNTHETIC_SAMPLES, seed)
    shape = (settings.channels, settings.image_size, settings.image_size)
    for step in steps:
        for micro in range(plan.accumulation):
            slots = plan.slots(runtime.rank, micro)
            _, ids = order.locate(step * plan.global_batch + slots)
            on_device = torch.from_numpy(ids)
            if runtime.device.type == "cuda":
                on_device = on_device.pin_memory().to(runtime.device, non_blocking=True)
            pixels = philox.uint8(seed, philox.SYNTHETIC_PIXELS, 0, on_device, shape)
            labels = on_device % settings.num_classes if settings.num_classes else torch.full_like(on_device, -1)
            ready = None
            if runtime.device.type == "cuda":
                ready = torch.cuda.Event()
                ready.record()
            yield MicroBatch(step, slots, ids, pixels, labels, ready)


def normalise(pixels: Tensor, value_range: list[float], memory_format: torch.memory_format) -> Tensor:
    """uint8 (B, C, H, W) to float32 in ``value_range``, 0 and 255 mapping to its ends."""
    low, high = value_range
    scaled = pixels.to(torch.float32) * ((high - low) / 255.0) + low
    return scaled.contiguous(memory_format=memory_format)
