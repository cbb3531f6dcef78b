"""Shards behind an HTTP server against the same shards on the local disk: once they are cached, and from a cold start.

The server is a thread of the benchmark, the loaders are processes of their own. ``read`` and ``cold`` run there, and times of both sides
are compared on the monotonic clock, which is the same for all processes of a machine.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_contestants import Spec, settings
from benchmarks.loader_process import Contestant, Failed, take_turns
from benchmarks.loader_server import ShardServer, all_together, each_connection, unlimited
from benchmarks.loader_turns import in_turns, interleaved, ratio, spread
from ddpm_dist import index as indexer
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.data.pipeline import FETCHERS, Loader, open_index, shard_batches
from ddpm_dist.data.shards import Index, checksum
from ddpm_dist.errors import OK, UserError
from ddpm_dist.runtime import Runtime

WARM_TARGET = 0.8  # of the speed of local shards
COLD_TARGET = 3  # shards: fewer are completely sent when the first batch is there
COLD_STARTS = 5  # with each limit: they take seconds
SHARD_SECONDS = 0.3  # that a connection takes for a shard in a cold start
LINE_SECONDS = 0.08  # that the whole of a shared line takes for one; far more than decoding the first batch
BATCHES_PER_SHARD = 4  # in a cold start: shards are far larger than batches
EACH, TOGETHER = "each connection limited", "all connections limited together"


def streaming(
    spec: Spec, expected: Path, turns: int, seconds: float, scratch: Path, cores: list[int]
) -> dict[str, Any]:
    """The section of the report. Raises Failed where a loader does not deliver what is in the shards.

    Args:
        spec: the shards, which are served and also read where they lie.
        expected: what an epoch holds, see ``loader_contestants.expected``.
        scratch: a folder for index and caches.
        cores: those of each loader.
    """
    index = Index.load(spec.shards)
    about = {"images": len(index), "shards": len(index.shards), "mb": float(index.shard_bytes.sum()) / 1e6}
    with ShardServer(Path(spec.shards)) as server:
        remote = replace(spec, shards=str(index_of(server, index, scratch / "remote")))
        server.forget()
        warm = _warm(spec, remote, expected, server, turns, seconds, scratch / "cache", cores)
        cold = _cold(remote, index, server, scratch / "cold", cores)
    return {**about, "target": WARM_TARGET, **warm, "cold": cold}


def index_of(server: ShardServer, index: Index, folder: Path) -> Path:
    """The index that ``ddpm_dist.index`` makes of the served shards."""
    urls, said = [server.url(shard.name) for shard in index.shards], io.StringIO()
    with contextlib.redirect_stdout(said):  # the benchmark's output is its report
        code = indexer.main([*urls, "--out", str(folder), "--workers", "1"])
    if code != OK:
        raise UserError(f"python -m ddpm_dist.index does not take the shards from the server:\n{said.getvalue()}")
    return folder


def _warm(
    near_spec: Spec, far_spec: Spec, expected: Path, server: ShardServer, turns: int, seconds: float, cache: Path, cores: list[int]
) -> dict[str, Any]:  # fmt: skip
    order = {"order": "blocks"}
    near = Contestant(replace(near_spec, data=order))
    far = Contestant(replace(far_spec, data={**order, "cache_dir": str(cache)}))
    both = [near, far]
    try:
        for each in both:
            each.start(cores)
        for each in both:
            each.must("epoch", expected=str(expected))  # fills the cache
            each.turn(seconds / 2)
            each.forget()
        fetched = server.sent
        take_turns(both, turns, seconds)
        found = far.must("read", local=near_spec.shards, turns=turns, seconds=seconds)
    finally:
        for each in both:
            each.close()
    if near.problem is not None:  # during its turns
        raise Failed(near.problem)
    loader = {
        "images_per_sec": spread(far.rates), "local_images_per_sec": spread(near.rates), "to_local": ratio(far.rates, near.rates),
        "cpu_to_local": ratio(near.cpu_s_per_1000, far.cpu_s_per_1000),
        "images_per_sec_turns": far.rates, "local_images_per_sec_turns": near.rates,
    }  # fmt: skip
    later = server.sent - fetched  # nothing, if the cache was warm
    return {"loader": loader, "reading": found, "fetched_mb": fetched / 1e6, "fetched_later_mb": later / 1e6}


def _cold(spec: Spec, index: Index, server: ShardServer, cache: Path, cores: list[int]) -> list[dict[str, Any]]:
    largest = max(shard.bytes for shard in index.shards)
    batch = max(1, min(shard.samples for shard in index.shards[:-1] or index.shards) // BATCHES_PER_SHARD)
    alone = {EACH: SHARD_SECONDS, TOGETHER: LINE_SECONDS}
    limits = {
        name: lambda limit=limit, name=name: limit(largest / alone[name])
        for name, limit in ((EACH, each_connection), (TOGETHER, all_together))
    }
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in limits}
    one = Contestant(replace(spec, batch=batch, data={"order": "blocks", "block_shards": 1}))
    try:
        one.start(cores)
        one_cold_start(one, server, unlimited, cache)  # warm-up: imports, memory
        for turn in range(COLD_STARTS):
            for name in in_turns(list(limits), turn):
                starts[name].append(one_cold_start(one, server, limits[name](), cache))
    finally:
        one.close()
    return [
        {
            "name": name, "shard_s": alone[name], "batch": batch, "target": COLD_TARGET,
            **{key: spread([start[key] for start in starts[name]]) for key in starts[name][0]},
            "shards_sent_turns": [start["shards_sent"] for start in starts[name]],
        }
        for name in limits
    ]  # fmt: skip


def one_cold_start(one: Contestant, server: ShardServer, pace: Callable, folder: Path) -> dict[str, float]:
    """What a loader that begins with an empty cache does. Raises Failed.

    Seconds from opening the index to the first batch and to the last one of an epoch, their ratio, and how many shards the server had
    completely sent when the first batch was there.
    """
    server.forget()
    server.pace = pace
    try:
        answer = one.must("cold", cache_dir=str(folder))
    finally:
        server.pace = unlimited
        shutil.rmtree(folder, ignore_errors=True)
    first, whole = (answer[name] - answer["began"] for name in ("first", "end"))
    return {
        "shards_sent": server.sent_by(answer["first"]), "first_batch_s": first, "whole_set_s": whole, "first_to_whole": first / whole,
    }  # fmt: skip


def cold(spec: Spec, cache_dir: str) -> dict[str, float]:
    """The trainer's loader from an empty ``cache_dir`` through one epoch: when it began, had its first batch, and ended (monotonic)."""
    began = time.monotonic()
    data = settings(replace(spec, data={**spec.data, "cache_dir": cache_dir}), Index.load(spec.shards))
    index, device = open_index(data, ""), torch.device("cpu")
    plan, alone = BatchPlan(spec.batch, 1, spec.batch), Runtime(0, 1, 0, device, None)
    steps = -(-len(index) // spec.batch)
    loader = Loader(shard_batches(index, data, plan, alone, 0, range(steps), "cpu"), device)
    try:
        loader.next()
        first = time.monotonic()
        for _ in range(1, steps):
            loader.next()
        return {"began": began, "first": first, "end": time.monotonic()}
    finally:
        index.close()
        loader.close()


def read(spec: Spec, local: str, turns: int, seconds: float) -> dict[str, Any]:
    """Shard after shard opened, its samples read in random order and compared with their checksums: through the cache, and as local files.

    In MB of images per second, not of CPU time: that the cache makes a reader wait must count. Raises UserError where something had to be
    fetched.
    """
    near, data = Index.load(local), settings(spec, Index.load(spec.shards))
    far = open_index(data, "")
    cache, count = far.cache, len(far.shards)
    listed = [(far.location(n), far.shards[n].bytes, far.shards[n].sha256) for n in range(count)]
    order, numbers = np.random.default_rng(0), near.shard_of(np.arange(len(near)))
    rows = [order.permutation(near.samples[numbers == n]) for n in range(count)]
    samples = [list(zip(*(row[name].tolist() for name in ("size", "offset", "checksum")), strict=True)) for row in rows]
    megabytes = float(near.samples["size"].sum()) / 1e6

    def through(open_shard: Callable[[int], int]) -> Callable[[], float]:
        def read_all() -> float:
            for number, places in enumerate(samples):
                handle = open_shard(number)
                for size, offset, wanted in places:
                    if checksum(os.pread(handle, size, offset)) != wanted:
                        raise UserError(f"{listed[number][0]}: another image than the index describes")
                os.close(handle)
            return megabytes

        return read_all

    def cached(number: int) -> int:
        cache.want(listed[number + 1 : number + 1 + FETCHERS])
        return cache.open(*listed[number])

    actions = {
        "cache": through(cached),
        "local": through(lambda number: os.open(near.location(number), os.O_RDONLY | os.O_CLOEXEC)),
    }
    try:
        rates = interleaved(actions, turns, seconds, time.perf_counter)
        if cache.bytes_fetched:
            raise UserError(f"the cache was not warm: {cache.bytes_fetched:,} bytes were fetched")
    finally:
        far.close()
    return {
        "mb_per_second": spread(rates["cache"]), "local_mb_per_second": spread(rates["local"]),
        "to_local": ratio(rates["cache"], rates["local"]),
        "mb_per_second_turns": rates["cache"], "local_mb_per_second_turns": rates["local"],
    }  # fmt: skip
