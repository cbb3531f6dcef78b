"""Files of a micro-batch: by one thread while that is quick, by several where storage makes them wait; always the same files."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from ddpm_dist.config import Data
from ddpm_dist.data import reading, shards
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import _ahead, shard_batches
from ddpm_dist.data.reading import CALM, READERS, SLOW, Reader
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import pack
from ddpm_dist.runtime import Runtime


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("reading") / "shapes"
    pack("shapes", folder, size=16, num=60, samples_per_shard=25, workers=1)
    return Index.load(folder)


@pytest.fixture
def storage(monkeypatch):
    """Every file takes as long as ``delay`` says, or until ``together`` lets it go; ``at_once``: the most threads that waited together."""

    class Storage:
        delay, at_once, names = 0.0, 0, set()
        together: threading.Barrier | None = None

        def __init__(self) -> None:
            self._now, self._lock, self._real = 0, threading.Lock(), Index._pread

        def pread(self, index: Index, *where: int) -> bytes:
            with self._lock:
                self._now += 1
                self.at_once = max(self.at_once, self._now)
                self.names.add(threading.current_thread().name)
            if self.together is not None and threading.current_thread().name.startswith("reader"):
                self.together.wait(60)
            time.sleep(self.delay)
            with self._lock:
                self._now -= 1
            return self._real(index, *where)

    made = Storage()
    monkeypatch.setattr(Index, "_pread", lambda self, *where: made.pread(self, *where))
    monkeypatch.setattr(Index, "_read_rows", lambda *words: None)  # which reads many files at once
    return made


def plain(index: Index, ids: np.ndarray) -> list[bytes]:
    return [index.read(int(sample)) for sample in ids]


def test_files_come_in_the_order_that_was_asked_for(index):
    ids = np.random.default_rng(0).permutation(60)
    for slow in (False, True):
        with Reader(index, slow) as read:
            assert list(read(ids)) == plain(index, ids)
            assert read(ids[:1]) == plain(index, ids[:1])
            assert read(ids[[5, 5]]) == plain(index, ids[[5, 5]])


def test_slow_storage_is_asked_by_several_threads_and_quick_one_by_none(index, storage, monkeypatch):
    ids = np.arange(40)
    with Reader(index) as read:
        storage.delay = 5 * SLOW
        first = read.start(ids)
        assert storage.at_once == 0  # nothing yet: the loader's own thread will do it
        first()
        assert read.slow and storage.at_once == 1 and storage.names == {threading.current_thread().name}
        # From now on no read ends before as many wait as there are readers; one thread would wait in vain.
        storage.together = threading.Barrier(READERS)
        second = read.start(ids)
        until(lambda: storage.at_once == READERS)  # they have begun, although nobody waits for them
        assert list(second()) == plain(index, ids)
        storage.together, storage.delay = None, 0.0
        monkeypatch.setattr(reading, "QUICK", 10.0)  # a loaded machine is not taken for slow storage
        monkeypatch.setattr(reading, "SLOW", 10.0)
        for _ in range(CALM):
            assert read.slow
            read(ids)
        assert not read.slow


def until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@pytest.mark.parametrize("slow", [False, True])
def test_what_is_damaged_is_named_and_only_of_this_rank(index, tmp_path, slow):
    import shutil

    shutil.copytree(index.folder, tmp_path / "copy")
    shard = tmp_path / "copy" / index.shards[1].name
    data = bytearray(shard.read_bytes())
    data[int(index.samples["offset"][30]) + 20] ^= 1
    shard.write_bytes(data)
    damaged = Index.load(tmp_path / "copy")
    with Reader(damaged, slow) as read:
        read(np.arange(30))
        with pytest.raises(UserError, match=index.key_of(30)) as caught:
            read(np.arange(20, 40))
        assert caught.value.one_rank


def test_a_run_sees_the_same_whether_storage_is_slow_or_not(index, storage):
    settings, plan = Data(image_size=16, num_classes=10, flip=True), plan_batches(8, None, 1)
    rank = Runtime(0, 1, 0, torch.device("cpu"), None)

    def run():
        return [
            (each.step, each.ids.tolist(), each.pixels.numpy().tobytes(), each.labels.tolist())
            for each in shard_batches(index, settings, plan, rank, 3, range(12), "cpu")
        ]

    quick = run()
    storage.delay = 2 * SLOW
    assert run() == quick and len(quick) == 12
    assert any(name.startswith("reader") for name in storage.names)


def test_a_file_is_not_closed_while_another_thread_reads_it(tmp_path, monkeypatch):
    pack("shapes", tmp_path / "many", size=16, num=64, samples_per_shard=1, workers=1)
    index, order = Index.load(tmp_path / "many"), np.random.default_rng(0)
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 1)
    with Reader(index, True) as read:
        for _ in range(60):
            read.slow = True
            ids = order.permutation(64)
            assert len(read(ids)) == 64  # raises where a file was closed, or another one has its descriptor


def test_ahead_takes_one_item_more_than_it_has_given():
    taken = []

    def items(count):
        for number in range(count):
            taken.append(number)
            yield number

    ahead = _ahead(items(3))
    assert next(ahead) == 0 and taken == [0, 1]
    assert next(ahead) == 1 and taken == [0, 1, 2]
    assert list(ahead) == [2]
    assert list(_ahead(items(0))) == [] and list(_ahead(items(1))) == [0]
