"""Where the time of our pipeline on the CPU goes: its parts one after the other, in microseconds of CPU time per image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.loader_contestants import Spec, settings
from ddpm_dist.data import pipeline
from ddpm_dist.data.checksums import digests
from ddpm_dist.data.decoder import Decoder
from ddpm_dist.data.order import SampleOrder
from ddpm_dist.data.reading import Reader
from ddpm_dist.data.shards import Index

ROUNDS, BATCHES = 5, 64


def parts(spec: Spec, seconds: float) -> dict[str, float]:
    """Microseconds of CPU time per image of each part: median of five rounds, ``seconds`` for each part, batches in random order.

    order: who is in the batch and what is done to it; read: the bytes from the file (in the page cache) and the table; checksum: of these
    bytes; decode: DALI from bytes to pixels, fed and run, and the copy that the trainer gets.
    """
    index = Index.load(spec.shards)
    data = settings(spec, index)
    order = SampleOrder(len(index), 0)
    decode = Decoder(index, data, spec.batch, torch.device("cpu"), "cpu")
    # Many different images: what was read a moment ago lies in the processor's cache, and costs a fraction.
    count = max(1, min(BATCHES, len(index) // spec.batch))
    batches = [np.arange(start, start + spec.batch) for start in range(0, count * spec.batch, spec.batch)]
    chosen = [order.locate(positions)[1] for positions in batches]
    read_files = Reader(index)
    files = [read_files(ids) for ids in chosen]
    listed = [list(each) for each in files]
    rows = [index.samples[ids] for ids in chosen]
    place = [
        list(zip(index.shard_of(ids).tolist(), row["size"].tolist(), row["offset"].tolist(), strict=True))
        for ids, row in zip(chosen, rows, strict=True)
    ]

    def ordered(turn: int) -> None:
        epochs, ids = order.locate(batches[turn])
        pipeline._treatment(index, data, 0, epochs, ids)

    def read(turn: int) -> None:
        read_files(chosen[turn])

    def summed(turn: int) -> None:
        digests(listed[turn])

    def syscalls(turn: int) -> None:
        for number, size, offset in place[turn]:
            index._pread(number, size, offset)

    def decoded(turn: int) -> None:
        decode(chosen[turn], files[turn], None, None, chosen[turn])

    actions = {
        "order": ordered, "read and checksum": read, "of that checksum": summed, "of that pread": syscalls, "decode": decoded,
    }  # fmt: skip
    rounds = [
        {name: _microseconds(action, count, spec.batch, seconds / ROUNDS) for name, action in actions.items()}
        for _ in range(ROUNDS)
    ]
    return {name: statistics.median(each[name] for each in rounds) for name in actions}


def _microseconds(action: Callable[[int], Any], batches: int, images: int, at_least: float) -> float:
    """CPU time of all threads per image; the first calls are not timed."""
    for turn in range(min(2, batches)):
        action(turn)
    rounds, start, cpu = 0, time.monotonic(), time.process_time()
    while rounds == 0 or time.monotonic() - start < at_least:
        for turn in range(batches):
            action(turn)
        rounds += 1
    return 1e6 * (time.process_time() - cpu) / (batches * rounds * images)


def sentence(found: dict[str, float], cpu_s_per_1000: float) -> str:
    """What the parts say about the CPU time of our pipeline."""
    whole = 1000 * cpu_s_per_1000
    steps = [name for name in found if not name.startswith("of that")]
    largest = max(steps, key=lambda name: found[name])
    listed = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    return (
        f"an image costs {whole:.1f} microseconds of CPU time; the parts alone, in one thread: {listed}. {largest.capitalize()} is the "
        f"largest; threads and queue cost {whole - sum(found[name] for name in steps):.1f} beside the parts"
    )
