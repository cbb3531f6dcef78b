"""Reading through a warm shard cache, against reading the same files where they lie."""

import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from shard_server import ShardServer

from ddpm_dist.data.shard_cache import ShardCache
from ddpm_dist.data.shards import checksum

SAMPLE = 4096  # bytes: a JPEG of 64 x 64 pixels


def seconds_to_read(open_shard: Callable[[int], int], shards: int, samples: int, seed: int) -> float:
    """Open ``shards`` one after the other and read ``samples`` samples of each in random order, as Index.read_many does."""
    places = random.Random(seed).sample(range(samples), samples)
    began = time.perf_counter()
    for number in range(shards):
        handle = open_shard(number)
        for place in places:
            checksum(os.pread(handle, SAMPLE, place * SAMPLE))
        os.close(handle)
    return time.perf_counter() - began


def warm_ratio(folder: Path, shards: int = 8, samples: int = 1000, rounds: int = 7) -> float:
    """Speed through the cache over speed of the local files: the median of pairs that follow each other."""
    server, data = ShardServer(), [random.Random(seed).randbytes(samples * SAMPLE) for seed in range(shards)]
    paths = [folder / f"{number}.tar" for number in range(shards)]
    for path, content in zip(paths, data, strict=True):
        path.write_bytes(content)
    try:
        listed = [server.add(path.name, content) for path, content in zip(paths, data, strict=True)]
        with ShardCache(folder / "cache", 2 * shards * samples * SAMPLE) as cache:

            def through_cache(number: int) -> int:
                cache.want(listed[number + 1 : number + 9])
                return cache.open(*listed[number])

            for number in range(shards):
                os.close(through_cache(number))
            ratios = []
            for seed in range(rounds):
                local = seconds_to_read(lambda number: os.open(paths[number], os.O_RDONLY), shards, samples, seed)
                ratios.append(local / seconds_to_read(through_cache, shards, samples, seed))
            assert cache.bytes_fetched == sum(map(len, data))
    finally:
        server.close()
    return statistics.median(ratios)


def test_a_warm_cache_is_no_detour(tmp_path):
    """How near to local speed it comes is for benchmarks.loader to measure; half of it would be a mistake on the most loaded machine."""
    ratio = warm_ratio(tmp_path)
    print(f"through the cache: {ratio:.3f} of local speed")
    assert ratio >= 0.5
