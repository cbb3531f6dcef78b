"""The shard cache's folder: its budget, what goes first, fetching ahead, and several processes in it."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import environment
from forked import wait_until
from shard_server import ShardServer

from ddpm_dist.data import fetching, shard_cache
from ddpm_dist.data.shard_cache import ShardCache
from ddpm_dist.errors import UserError

SIZE = 200_000

# Opens shards in a process of its own; says what it is doing and in the end what it fetched.
READER = """
import hashlib, json, os, sys
from ddpm_dist.data.shard_cache import ShardCache
from pathlib import Path
folder, budget, ahead, shards = json.loads(sys.argv[1])
with ShardCache(Path(folder), budget, patience=20) as cache:
    if ahead:
        cache.want(map(tuple, shards))
    print("begins", flush=True)
    for url, size, sha256 in shards:
        handle = cache.open(url, size, sha256)
        assert hashlib.sha256(os.pread(handle, size + 1, 0)).hexdigest() == sha256
        os.close(handle)
    print(json.dumps({"fetched": cache.bytes_fetched, "hits": cache.hits}), flush=True)
"""


@pytest.fixture
def server():
    server = ShardServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(shard_cache, "POLL", 0.05)


@pytest.fixture
def readers():
    running: list[subprocess.Popen] = []

    def start(folder: Path, budget: int, shards: list, ahead: bool = False) -> subprocess.Popen:
        command = [sys.executable, "-c", READER, json.dumps([str(folder), budget, ahead, shards])]
        running.append(subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def content(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def add(server: ShardServer, count: int, **how) -> list[tuple[str, int, str]]:
    return [server.add(f"{number}.tar", content(number), **how) for number in range(count)]


def read(cache: ShardCache, shard: tuple[str, int, str]) -> bytes:
    handle = cache.open(*shard)
    data = os.pread(handle, SIZE + 1, 0)
    os.close(handle)
    return data


def here(folder: Path, shards: list) -> list[int]:
    return [number for number, shard in enumerate(shards) if (folder / f"{shard[2]}.tar").exists()]


def asked(server: ShardServer) -> list[int]:
    return [int(path[1:].split(".")[0]) for path, _ in server.requests]


def taken(folder: Path) -> int:
    return sum(int(p.name.split(".")[1]) if p.suffix == ".part" else p.stat().st_size for p in folder.iterdir())


def test_the_shards_used_longest_ago_go_and_their_descriptors_stay_good(server, tmp_path):
    shards = add(server, 5)
    (tmp_path / "notes.txt").write_bytes(b"x" * SIZE)  # not ours: neither counted nor removed
    with ShardCache(tmp_path, 3 * SIZE) as cache:
        handles = []
        for shard in shards[:3]:
            handles.append(cache.open(*shard))
            time.sleep(0.02)  # the file system's clock ticks every few milliseconds
        os.close(cache.open(*shards[0]))
        time.sleep(0.02)
        for number, expected in ((3, [0, 2, 3]), (4, [0, 3, 4])):
            os.close(cache.open(*shards[number]))
            time.sleep(0.02)
            assert here(tmp_path, shards) == expected
        assert os.pread(handles[1], SIZE, 0) == content(1) and os.pread(handles[2], SIZE, 0) == content(2)
        for handle in handles:
            os.close(handle)
    assert (tmp_path / "notes.txt").exists()


def test_fetches_ahead_in_order_within_the_budget(server, tmp_path):
    shards = add(server, 6)
    with ShardCache(tmp_path, 3 * SIZE, workers=2) as cache:
        cache.want(shards)
        wait_until(lambda: here(tmp_path, shards) == [0, 1, 2])
        time.sleep(0.2)
        assert here(tmp_path, shards) == [0, 1, 2] and set(asked(server)) == {0, 1, 2}
        assert read(cache, shards[0]) == content(0)
        wait_until(lambda: here(tmp_path, shards) == [1, 2, 3])
        # What is wanted sooner takes the place of what is wanted later.
        cache.want([shards[5], shards[1], shards[2], shards[3]])
        wait_until(lambda: here(tmp_path, shards) == [1, 2, 5])
        assert [read(cache, shards[number]) for number in (5, 1, 2)] == [content(5), content(1), content(2)]
        assert (cache.hits, cache.misses) == (4, 0)
        assert read(cache, shards[4]) == content(4) and cache.misses == 1


def test_what_is_wanted_no_longer_is_not_begun(server, tmp_path):
    gate = threading.Event()
    shards = add(server, 4, hold=gate)
    with ShardCache(tmp_path, 10 * SIZE, workers=1) as cache:
        cache.want(shards[:3])
        wait_until(lambda: asked(server) == [0])
        cache.want([shards[3]])
        gate.set()
        wait_until(lambda: here(tmp_path, shards) == [0, 3])
        assert read(cache, shards[3]) == content(3) and asked(server) == [0, 3]


def test_a_reader_waits_for_nothing_but_its_own_shard(server, tmp_path):
    never = threading.Event()
    shards = [server.add(f"{number}.tar", content(number), hold=never if number >= 2 else None) for number in range(6)]
    with ShardCache(tmp_path, 10 * SIZE, workers=2) as cache:
        cache.want(shards[2:4])  # both threads are busy with shards that do not come
        wait_until(lambda: sorted(asked(server)) == [2, 3])
        assert read(cache, shards[0]) == content(0) and read(cache, shards[1]) == content(1)
        assert here(tmp_path, shards) == [0, 1]
        never.set()


def test_what_nothing_can_begin_without_comes_alone(server, tmp_path):
    """At a start: the line is not shared with what is needed later. Shards that are here, or cannot be had, hold nobody up."""
    gates = [threading.Event() for _ in range(5)]
    shards = [server.add(f"{number}.tar", content(number), hold=gates[number]) for number in range(5)]
    with ShardCache(tmp_path, 10 * SIZE) as cache:
        cache.want(shards, urgent=[shards[1][2], shards[0][2], "f" * 64])
        wait_until(lambda: len(asked(server)) >= 2)
        time.sleep(0.3)
        assert sorted(asked(server)) == [0, 1]
        gates[0].set()
        wait_until(lambda: here(tmp_path, shards) == [0])
        cache.want(shards, urgent=[shards[4][2]])  # only the first call counts
        time.sleep(0.3)
        assert sorted(asked(server)) == [0, 1]
        gates[1].set()
        wait_until(lambda: sorted(asked(server)) == [0, 1, 2, 3, 4])
        for gate in gates:
            gate.set()
    with ShardCache(tmp_path, 10 * SIZE) as cache:
        more = [server.add("gone.tar", content(7), status=[404]), server.add("8.tar", content(8))]
        cache.want([shards[0], *more], urgent=[shards[0][2], more[0][2]])
        wait_until(lambda: here(tmp_path, [more[1]]) == [0])


def test_the_first_batch_comes_before_the_third_shard(server, tmp_path):
    last = threading.Event()
    shards = [server.add(f"{number}.tar", content(number), hold=last if number >= 2 else None) for number in range(4)]
    with ShardCache(tmp_path, 10 * SIZE) as cache:
        cache.want(shards)
        assert [read(cache, shard) for shard in shards[:2]] == [content(0), content(1)]
        assert here(tmp_path, shards) == [0, 1]
        last.set()
        assert read(cache, shards[2]) == content(2)


def test_a_failure_ahead_of_need_is_told_when_the_shard_is_needed_and_not_repeated_until_then(server, tmp_path):
    shards = add(server, 3)
    server.files["/1.tar"].status = [404, 404, 200]
    with ShardCache(tmp_path, 10 * SIZE, workers=1) as cache:
        cache.want(shards)
        wait_until(lambda: here(tmp_path, shards) == [0, 2])
        cache.want(shards)
        assert read(cache, shards[0]) == content(0)
        with pytest.raises(UserError, match="1.tar cannot be fetched: the server answers 404"):
            cache.open(*shards[1])
        assert asked(server) == [0, 1, 2, 1]
        assert read(cache, shards[1]) == content(1)


def test_closing_ends_what_is_on_its_way(server, tmp_path):
    shards = add(server, 3, hold=threading.Event())
    cache = ShardCache(tmp_path, 10 * SIZE)
    cache.want(shards)
    failed = []

    def wait() -> None:
        with pytest.raises(RuntimeError, match="closed") as error:
            cache.open(*shards[0])
        failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: sorted(asked(server)) == [0, 1, 2])
    time.sleep(0.1)  # until the headers are there
    began = time.monotonic()
    cache.close()
    thread.join(10)
    assert len(failed) == 1 and time.monotonic() - began < 4
    assert not [name for name in os.listdir(tmp_path) if name != "lock"]
    with pytest.raises(RuntimeError, match="closed"):
        cache.open(*shards[0])


def test_two_processes_share_one_download(server, readers, tmp_path):
    shards = add(server, 3, speed=1_000_000)
    both = [readers(tmp_path, 10 * SIZE, shards, ahead) for ahead in (False, True)]
    told = [json.loads(process.communicate(timeout=30)[0].splitlines()[-1]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(each["fetched"] for each in told) == 3 * SIZE and sorted(asked(server)) == [0, 1, 2]


def test_a_process_killed_while_it_fetches_blocks_nobody(server, readers, tmp_path):
    (shard,) = add(server, 1, speed=150_000)
    first = readers(tmp_path, 10 * SIZE, [shard])
    part = tmp_path / f"{shard[2]}.{SIZE}.part"
    wait_until(lambda: part.exists() and part.stat().st_size > SIZE // 4)
    with ShardCache(tmp_path, 10 * SIZE, patience=20) as cache:
        found = []
        thread = threading.Thread(target=lambda: found.append(read(cache, shard)))
        thread.start()
        time.sleep(0.1)
        assert not found and len(server.requests) == 1
        first.kill()
        assert first.wait() == -signal.SIGKILL
        server.files["/0.tar"].speed = None
        thread.join(20)
        # It went on where the other one was killed.
        assert found == [content(0)] and cache.bytes_fetched <= SIZE * 3 // 4
    assert server.requests[1][1]["Range"].startswith("bytes=")


def test_a_process_that_is_stopped_is_told_of(server, readers, tmp_path):
    (shard,) = add(server, 1, speed=100_000)
    first = readers(tmp_path, 10 * SIZE, [shard])
    part = tmp_path / f"{shard[2]}.{SIZE}.part"
    wait_until(lambda: part.exists() and part.stat().st_size > 0)
    os.kill(first.pid, signal.SIGSTOP)
    with ShardCache(tmp_path, 10 * SIZE, patience=0.5) as cache:
        with pytest.raises(UserError, match=r"0\.tar cannot be had in .*: another process on this node"):
            cache.open(*shard)


def test_several_processes_hold_the_budget_together(server, readers, tmp_path):
    shards = add(server, 8, speed=4_000_000)
    orders = [random.Random(seed).sample(shards, len(shards)) for seed in range(3)]
    processes = [readers(tmp_path, 4 * SIZE, order, ahead=True) for order in orders]
    most = 0
    while any(process.poll() is None for process in processes):
        try:
            most = max(most, taken(tmp_path))
        except OSError:
            continue  # a file went or got its name meanwhile
    assert [process.returncode for process in processes] == [0, 0, 0]
    # A listing that is not one moment may meet a file under both of its names.
    assert 3 * SIZE <= most <= 5 * SIZE
    assert taken(tmp_path) <= 4 * SIZE


def test_leftovers_of_a_killed_process_count_and_go_first(server, tmp_path):
    (tmp_path / ("f" * 64 + f".{2 * SIZE}.part")).write_bytes(b"x")
    os.utime(tmp_path / ("f" * 64 + f".{2 * SIZE}.part"), (1, 1))
    shards = add(server, 2)
    with ShardCache(tmp_path, 3 * SIZE) as cache:
        assert read(cache, shards[0]) == content(0) and taken(tmp_path) == 3 * SIZE
        assert read(cache, shards[1]) == content(1) and here(tmp_path, shards) == [0, 1]
        assert taken(tmp_path) == 2 * SIZE


def test_two_caches_on_one_folder_and_what_another_wants_goes_last(server, tmp_path):
    shards = add(server, 4)
    with ShardCache(tmp_path, 2 * SIZE) as mine, ShardCache(tmp_path, 2 * SIZE) as other:
        mine.want(shards[:2])
        wait_until(lambda: here(tmp_path, shards) == [0, 1])
        other.want(shards[2:])
        time.sleep(0.3)
        assert here(tmp_path, shards) == [0, 1]  # what is fetched ahead makes no room where others wait for theirs
        assert read(other, shards[2]) == content(2)  # what is needed now does
        assert len(here(tmp_path, shards[:2])) == 1
        # What was here for it is not taken from a process.
        assert [read(mine, shard) for shard in shards[:2]] == [content(0), content(1)] and mine.misses == 0


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/cache cannot be used as data.cache_dir: Not a directory"):
        ShardCache(tmp_path / "file" / "cache", SIZE)
