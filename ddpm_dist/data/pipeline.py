"""From the index to pixels on the device: read bytes, decode through DALI, deliver micro-batches ahead of need.

The order says which samples form a micro-batch; a reader fetches and checks their bytes; DALI decodes, cuts, resizes and
mirrors them to uint8; the trainer normalises. Nothing here remembers a position: a loader is told its first step.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import philox
from ddpm_dist.config import Data
from ddpm_dist.data import augment
from ddpm_dist.data.order import BatchPlan, SampleOrder
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.runtime import Runtime

PREFETCH = 3  # micro-batches that wait decoded
_READERS = 4


@dataclass
class MicroBatch:
    """What one rank sees in one micro-step. ``pixels``: uint8 (B, C, H, W); ``labels``: int64 (B,), -1 = no label."""

    step: int
    slots: np.ndarray
    ids: np.ndarray
    pixels: Tensor
    labels: Tensor
    ready: Any = None  # CUDA event of the copy to the device


class Loader:
    """Runs a source of micro-batches in a background thread; ``seconds_waited`` is what the consumer waited for it."""

    def __init__(self, batches: Iterator[MicroBatch], device: torch.device) -> None:
        self.seconds_waited = 0.0
        self._taken, self._waiting = 0, False
        self._queue: queue.Queue = queue.Queue(maxsize=PREFETCH)
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


def open_index(settings: Data, pack_hint: str) -> Index:
    """Load and check the index of ``data.shards`` against the configuration. UserError with the remedy."""
    if settings.shards is None:
        raise UserError(f"data.shards is not set: name the folder with the packed shards.\n{pack_hint}")
    if not os.path.isdir(settings.shards):
        raise UserError(f"the shard folder {settings.shards} (data.shards) does not exist.\n{pack_hint}")
    index = Index.load(settings.shards)
    index.check_files()
    labels = index.samples["label"]
    if settings.num_classes is not None:
        if (labels < 0).any():
            first = int(np.argmax(labels < 0))
            raise UserError(
                f"{settings.shards}: {index.describe(first)} has no label but data.num_classes={settings.num_classes}; "
                "set data.num_classes=null for an unlabelled set"
            )
        if labels.size and int(labels.max()) >= settings.num_classes:
            first = int(np.argmax(labels >= settings.num_classes))
            raise UserError(
                f"{settings.shards}: {index.describe(first)} has label {int(labels[first])}, outside 0.."
                f"{settings.num_classes - 1}; set data.num_classes={int(labels.max()) + 1} or pack the set again"
            )
    return index


def resolve_decoder(decoder: str, device: torch.device) -> str:
    """ "auto" is "mixed" (GPU) on a GPU and "cpu" without one. UserError where "mixed" cannot run."""
    if decoder == "auto":
        return "mixed" if device.type == "cuda" else "cpu"
    if decoder == "mixed" and device.type != "cuda":
        raise UserError(
            "data.decoder=mixed decodes on a GPU and there is none (a run that started with it needs one: cpu and GPU "
            "decoding differ in pixels); set data.decoder=cpu for a new run"
        )
    return decoder


def shard_batches(
    index: Index, settings: Data, plan: BatchPlan, runtime: Runtime, seed: int, steps: range, decoder: str
) -> Iterator[MicroBatch]:
    """Micro-batches of this rank for ``steps`` (counted from 0), decoded by DALI."""
    order = SampleOrder(len(index.samples), seed)
    decode = Decoder(index, settings, plan.micro_batch, runtime.device, decoder)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="reader") as pool:
        pending: list[tuple] = []
        for step in steps:
            for micro in range(plan.accumulation):
                slots = plan.slots(runtime.rank, micro)
                epochs, ids = order.locate(step * plan.global_batch + slots)
                parts = np.array_split(ids, min(_READERS, len(ids)))
                pending.append((step, slots, epochs, ids, [pool.submit(_read, index, part) for part in parts]))
                if len(pending) == 2:  # the bytes of the next micro-batch are on their way while this one is decoded
                    yield _finish(pending.pop(0), index, settings, decode, seed)
        for item in pending:
            yield _finish(item, index, settings, decode, seed)


def _read(index: Index, ids: np.ndarray) -> list[np.ndarray]:
    return [np.frombuffer(index.read(int(sample)), dtype=np.uint8) for sample in ids]


def _finish(item: tuple, index: Index, settings: Data, decode: Decoder, seed: int) -> MicroBatch:
    step, slots, epochs, ids, parts = item
    encoded = [data for part in parts for data in _result(part)]
    rows = index.samples[ids]
    random = settings.flip or settings.crop == "random_resized"
    uniform = augment.draws(seed, epochs, ids, augment.DRAWS) if random else None
    windows = augment.windows(settings.crop, settings.crop_scale, rows["height"], rows["width"], uniform)
    mirror = (uniform[:, -1] < 0.5) if settings.flip else np.zeros(len(ids), dtype=bool)
    labels = rows["label"] if settings.num_classes is not None else np.full(len(ids), -1)
    pixels, labels, ready = decode(ids, encoded, windows, mirror, labels.astype(np.int64))
    return MicroBatch(step, slots, ids, pixels, labels, ready)


def _result(future: Future) -> list[np.ndarray]:
    try:
        return future.result()
    except UserError as error:
        error.one_rank = True  # the other ranks read other samples
        raise


class Decoder:
    """One DALI pipeline of fixed batch size, fed from outside."""

    def __init__(self, index: Index, settings: Data, batch: int, device: torch.device, decoder: str) -> None:
        try:
            from nvidia.dali import fn, pipeline_def, types
        except ImportError as error:
            raise UserError(
                f"NVIDIA DALI cannot be imported ({error}): install it with pip install 'ddpm_dist[cuda13]' (or cuda12), "
                "or use data.source=synthetic for a benchmark"
            ) from None
        self._index, self._device, self._batch = index, device, batch
        size, grey = settings.image_size, settings.channels == 1
        rows = index.samples
        whole = (
            bool((rows["height"] == size).all() and (rows["width"] == size).all()) and settings.crop != "random_resized"
        )
        on_gpu = decoder == "mixed"

        @pipeline_def(
            batch_size=batch,
            num_threads=decode_threads(),
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=1,
        )
        def graph():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            # The index holds the size before any EXIF rotation, and windows are cut from that.
            images = fn.decoders.image(
                encoded, device=decoder, output_type=types.GRAY if grey else types.RGB, adjust_orientation=False
            )
            if not whole:
                start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
                shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
                images = fn.slice(images, start=start, shape=shape, axes=(0, 1))
                images = fn.resize(images, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
            if settings.flip:
                mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
                images = fn.flip(images, horizontal=mirror)
            return images

        self._whole, self._flip = whole, settings.flip
        self._shape = (batch, size, size, settings.channels)
        self._pipe = graph()
        self._pipe.build()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_gpu = on_gpu

    def __call__(self, ids, encoded, windows, mirror, labels) -> tuple[Tensor, Tensor, Any]:
        self._pipe.feed_input("encoded", encoded)
        if not self._whole:
            self._pipe.feed_input("start", np.ascontiguousarray(windows[:, :2]))
            self._pipe.feed_input("shape", np.ascontiguousarray(windows[:, 2:]))
        if self._flip:
            self._pipe.feed_input("mirror", mirror.astype(np.int32))
        try:
            (images,) = self._pipe.run()
        except RuntimeError as error:
            raise self._blame(ids, encoded, error) from None
        labels = torch.from_numpy(labels)
        if self._stream is None:
            pixels = torch.from_numpy(np.array(images.as_array()))
            return pixels.permute(0, 3, 1, 2), labels, None
        with torch.cuda.stream(self._stream):
            if self._on_gpu:
                from nvidia.dali.plugin.pytorch import feed_ndarray

                pixels = torch.empty(self._shape, dtype=torch.uint8, device=self._device)
                feed_ndarray(images.as_tensor(), pixels, cuda_stream=self._stream)
                self._stream.synchronize()  # in this thread only: DALI reuses its buffer for the next batch
            else:
                host = torch.from_numpy(np.array(images.as_array())).pin_memory()
                pixels = host.to(self._device, non_blocking=True)
            labels = labels.pin_memory().to(self._device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return pixels.permute(0, 3, 1, 2), labels, ready

    def _blame(self, ids: np.ndarray, encoded: list[np.ndarray], error: RuntimeError) -> BaseException:
        """DALI does not say which image of a batch it could not decode: try them one by one."""
        from nvidia.dali import fn, pipeline_def

        @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def single():
            return fn.decoders.image(fn.external_source(name="encoded", ndim=1), device="cpu")

        pipe = single()
        for sample, data in zip(ids, encoded, strict=True):
            try:
                pipe.feed_input("encoded", [data])
                pipe.run()
            except RuntimeError:
                found = UserError(
                    f"{self._index.describe(int(sample))} cannot be decoded; repair or remove it and pack again"
                )
                found.one_rank = True
                return found
        return error


def decode_threads() -> int:
    """DALI threads of this process: the cores of the machine shared by its ranks, four at the most."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


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
