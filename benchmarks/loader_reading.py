"""What it costs to index shards and to check every image in them, beside the least that anybody has to do for it.

Both functions run in the process of a contestant of ``benchmarks.loader`` on one core; the shards lie in the page cache. Speed is in CPU
time of the process, all of its threads added, so that other programs on the machine do not count.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.loader_contestants import Spec
from benchmarks.loader_turns import interleaved, ratio, spread
from ddpm_dist.data.full_decode import decode, strict_jpeg
from ddpm_dist.data.image_header import MAX_PIXELS, read_header
from ddpm_dist.data.labels import LabelRule
from ddpm_dist.data.scan import scan_location
from ddpm_dist.data.shards import Index
from ddpm_dist.data.tars import Wanted
from ddpm_dist.errors import UserError

INDEX_TARGET = 150.0  # MB of shards per CPU second
CHECK_TARGET = 1.5  # times the CPU time of decoding alone
SAMPLES = 2500  # images, as many whole shards as hold them: enough not to lie in the processor's cache
LABELS = LabelRule("cls", meaning="number")


def indexing(spec: Spec, turns: int, seconds: float) -> dict[str, Any]:
    """``ddpm_dist.index`` reading shards, labels and headers included; beside it the same bytes read and hashed (sha256), nothing more.

    Speeds in MB per CPU second. Raises UserError where the scan finds another shard than the index describes.
    """
    index = Index.load(spec.shards)
    numbers = some_shards(index)
    megabytes = sum(index.shards[number].bytes for number in numbers) / 1e6

    def plain() -> float:
        for number in numbers:
            with open(index.location(number), "rb", buffering=0) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != index.shards[number].sha256:
                    raise UserError(f"{index.location(number)} changed while it was measured")
        return megabytes

    def scan() -> float:
        scan_shards(index, numbers, Wanted(LABELS))
        return megabytes

    rates = interleaved({"scan": scan, "plain": plain}, turns, seconds, time.process_time)
    return {
        "mb_per_cpu_second": spread(rates["scan"]), "plain_mb_per_cpu_second": spread(rates["plain"]),
        "to_plain": ratio(rates["scan"], rates["plain"]), "to_target": spread([rate / INDEX_TARGET for rate in rates["scan"]]),
        "target": INDEX_TARGET, "images": sum(index.shards[number].samples for number in numbers), "mb": megabytes,
        "mb_per_cpu_second_turns": rates["scan"], "plain_mb_per_cpu_second_turns": rates["plain"],
    }  # fmt: skip


def check(spec: Spec, turns: int, seconds: float) -> dict[str, Any]:
    """``ddpm_dist.index --check``: shards read, and every image decoded; beside it the decoding of the same images alone, from memory.

    CPU microseconds per image of: the check; strict, the part of it that decodes; dali, DALI's decoder on the host with one thread, fed as
    in training; pillow. Raises UserError where the check finds something wrong with the images.
    """
    index = Index.load(spec.shards)
    numbers = some_shards(index)
    files = index.read_many(samples_of(index, numbers))
    headers = [read_header(file, MAX_PIXELS) for file in files]

    def checked() -> float:
        scan_shards(index, numbers, Wanted(LABELS, decode=decode))
        return len(files)

    def strict() -> float:
        for file, header in zip(files, headers, strict=True):
            decode(file, header)
        return len(files)

    actions = {
        "check": checked,
        "strict": strict,
        "dali": dali_decoder(files, spec.batch),
        "pillow": pillow_decoder(files),
    }
    rates = interleaved(actions, turns, seconds, time.process_time)
    costs = {f"{name}_us": [1e6 / rate for rate in each] for name, each in rates.items()}
    return {
        **{name: spread(each) for name, each in costs.items()}, **{f"{name}_turns": each for name, each in costs.items()},
        "check_to_dali": ratio(costs["check_us"], costs["dali_us"]), "strict_to_dali": ratio(costs["strict_us"], costs["dali_us"]),
        "check_to_pillow": ratio(costs["check_us"], costs["pillow_us"]),
        "target": CHECK_TARGET, "images": len(files), "simplejpeg": strict_jpeg() is not None,
    }  # fmt: skip


def some_shards(index: Index, samples: int = SAMPLES) -> list[int]:
    """Numbers of the first shards that hold so many samples together; all where there are fewer."""
    numbers, found = [], 0
    for number, shard in enumerate(index.shards):
        if found >= samples:
            break
        numbers.append(number)
        found += shard.samples
    return numbers


def samples_of(index: Index, numbers: list[int]) -> np.ndarray:
    """Ids of the samples of these shards, which are the first ones."""
    return np.arange(sum(index.shards[number].samples for number in numbers))


def scan_shards(index: Index, numbers: list[int], wanted: Wanted) -> None:
    """Scan shards as ``ddpm_dist.index`` does; a scan that did not see all of them would be fast for nothing, so it raises UserError."""
    for number in numbers:
        shard, scanned = index.shards[number], scan_location(index.location(number), wanted)
        found = scanned.found
        if scanned.error or found.findings:
            raise UserError(f"{index.location(number)}: {scanned.error or found.findings[0]}")
        if (found.sha256, len(found.samples)) != (shard.sha256, shard.samples):
            raise UserError(f"{index.location(number)}: the scan found another shard than the index describes")


def dali_decoder(files: list[bytes], batch: int) -> Callable[[], float]:
    """Decodes all files; returns their number."""
    from nvidia.dali import fn, pipeline_def, tensors, types

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        encoded = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)

    pipe = graph()
    pipe.build()
    arrays = [np.frombuffer(file, dtype=np.uint8) for file in files]

    def decoded() -> float:
        count = 0
        for begin in range(0, len(arrays), batch):
            part = [tensors.TensorCPU(array) for array in arrays[begin : begin + batch]]
            pipe.feed_input("files", tensors.TensorListCPU(part))
            (images,) = pipe.run()
            count += len(images)
        return count

    return decoded


def pillow_decoder(files: list[bytes]) -> Callable[[], float]:
    """Decodes all files; returns their number."""
    from PIL import Image

    def decoded() -> float:
        for file in files:
            with Image.open(io.BytesIO(file)) as image:
                image.load()
        return len(files)

    return decoded
