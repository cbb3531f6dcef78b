"""Threads, readers and micro-batches ahead: by cores, ranks and memory, printed at the start, and what the configuration says wins."""

import re

import pytest
from conftest import train

from ddpm_dist.config import Data
from ddpm_dist.data import workers


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many cores, ranks and bytes of free memory."""

    def be(cores: int, ranks: int, memory: int | None = 64 << 30) -> None:
        monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setattr(workers, "free_host_memory", lambda: memory)

    return be


@pytest.mark.parametrize(
    "cores, ranks, threads, readers",
    [(2, 1, 2, 4), (2, 2, 1, 4), (2, 8, 1, 4), (16, 1, 4, 16), (32, 4, 4, 16), (48, 8, 4, 12), (128, 8, 4, 16)],
)
def test_threads_by_cores_and_ranks(machine, cores, ranks, threads, readers):
    machine(cores, ranks)
    assert (workers.decode_threads(Data()), workers.readers(Data())) == (threads, readers)
    assert (workers.decode_threads(Data(threads=7)), workers.readers(Data(readers=1))) == (7, 1)


def test_small_micro_batches_are_decoded_further_ahead_where_memory_allows(machine):
    machine(16, 8)
    assert [workers.micro_batches_ahead(Data(), images) for images in (1, 8, 40, 64, 128, 1024)] == [8, 8, 7, 4, 3, 3]
    assert workers.micro_batches_ahead(Data(prefetch=2), 8) == 2
    machine(16, 8, memory=8 << 30)  # 54 MB for a rank
    large = Data(image_size=1024)  # 3 MB an image
    assert [workers.micro_batches_ahead(large, images) for images in (2, 4, 8, 64)] == [8, 4, 2, 1]
    machine(16, 8, memory=None)
    assert workers.micro_batches_ahead(large, 64) == 4


def test_a_run_says_what_it_chose_and_takes_what_it_is_told(tmp_path, digit_shards):
    chosen = train(tmp_path / "auto", "train.images=12", shards=digit_shards)
    assert chosen.returncode == 0, chosen.stderr
    assert re.search(
        r"decoder cpu, [1-4] thread\(s\) per rank, 8 micro-batches ahead, \d+ readers where", chosen.stdout
    )
    told = ("data.threads=3", "data.prefetch=1", "data.readers=2")
    given = train(tmp_path / "told", "train.images=12", *told, shards=digit_shards)
    assert given.returncode == 0, given.stderr
    assert "3 thread(s) per rank, 1 micro-batches ahead, 2 readers where" in given.stdout
