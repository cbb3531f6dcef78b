"""The shard cache against a real HTTP server that is slow, cuts connections, answers 503 and sends wrong bytes."""

import hashlib
import os
import random
import resource
import threading
import time

import pytest
from shard_server import ShardServer

from ddpm_dist.data import fetching, shard_cache
from ddpm_dist.data.shard_cache import ShardCache
from ddpm_dist.errors import UserError

SIZE = 300_000


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
def cache(tmp_path):
    with ShardCache(tmp_path / "cache", 10 * SIZE, patience=20) as cache:
        yield cache


def content(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def whole(handle: int) -> bytes:
    data = os.pread(handle, 1 << 30, 0)
    os.close(handle)
    return data


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def ranges(server: ShardServer) -> list[str | None]:
    return [headers.get("Range") for _, headers in server.requests]


def test_fetched_once_and_found_again_after_a_restart_without_being_read(server, cache, tmp_path):
    shard = server.add("a.tar", content(0))
    assert whole(cache.open(*shard)) == content(0) and whole(cache.open(*shard)) == content(0)
    assert (cache.hits, cache.misses, cache.bytes_fetched) == (1, 1, SIZE) and cache.seconds_waited > 0
    assert names(tmp_path / "cache") == [f"{shard[2]}.tar"]
    cache.close()
    # Another content of the same size: what is complete is not hashed again, only a changed size is noticed.
    path = tmp_path / "cache" / f"{shard[2]}.tar"
    path.write_bytes(content(1))
    with ShardCache(tmp_path / "cache", 10 * SIZE) as again:
        assert whole(again.open(*shard)) == content(1) and len(server.requests) == 1
        path.write_bytes(content(1)[:-1])
        assert whole(again.open(*shard)) == content(0) and len(server.requests) == 2


def test_a_descriptor_is_for_reading_only_and_not_inherited(server, cache):
    handle = cache.open(*server.add("a.tar", content(0)))
    with pytest.raises(OSError):
        os.write(handle, b"x")
    assert not os.get_inheritable(handle)
    os.close(handle)


@pytest.mark.parametrize("length", ["header", "chunked", "none"])
def test_a_cut_download_goes_on_where_it_stopped(server, cache, length):
    shard = server.add("a.tar", content(0), cut=[100_000, 50_000, None], length=length)
    assert whole(cache.open(*shard)) == content(0)
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"] and cache.bytes_fetched == SIZE


@pytest.mark.parametrize("answer", ["ignore", "other"])
def test_without_ranges_it_starts_again(server, cache, answer):
    shard = server.add("a.tar", content(0), cut=[100_000, 200_000, None, None, None], ranges=answer)
    assert whole(cache.open(*shard)) == content(0)
    assert ranges(server)[:2] == [None, "bytes=100000-"]
    assert cache.bytes_fetched == SIZE + (300_000 if answer == "ignore" else 100_000)


def test_a_connection_cut_at_the_same_place_each_time(server, tmp_path):
    with ShardCache(tmp_path / "cache", SIZE, patience=0.4) as cache:
        with pytest.raises(UserError, match=r"a\.tar stays away: the connection was cut \(\d+ tries"):
            cache.open(*server.add("a.tar", content(0), cut=[100_000], ranges="ignore"))


def test_a_server_that_lies_about_ranges_is_not_asked_for_one_again(server, cache):
    shard = server.add("a.tar", content(0), cut=[100_000, None, 100_000, None], ranges="lie")
    assert whole(cache.open(*shard)) == content(0)
    assert ranges(server) == [None, "bytes=100000-", None, None]


def test_goes_on_after_a_restart(server, cache, tmp_path):
    shard = server.add("a.tar", content(0), cut=[100_000], ranges="obey")
    cache.close()
    with ShardCache(tmp_path / "cache", 10 * SIZE, patience=0.3) as first:
        server.files["/a.tar"].status = [200, 503]
        with pytest.raises(UserError, match=r"a\.tar stays away.*503.*100000 of 300000 bytes"):
            first.open(*shard)
    assert names(tmp_path / "cache") == [f"{shard[2]}.{SIZE}.part"]
    server.files["/a.tar"].status, server.files["/a.tar"].cut = [200], [None]
    with ShardCache(tmp_path / "cache", 10 * SIZE) as second:
        assert whole(second.open(*shard)) == content(0) and second.bytes_fetched == 200_000
    assert ranges(server)[-1] == "bytes=100000-"


def test_a_beginning_that_is_wrong_is_thrown_away(server, cache, tmp_path):
    shard = server.add("a.tar", content(0))
    for wrong in (b"x" * 1000, b"x" * SIZE, b"x" * (SIZE + 1)):
        part = tmp_path / "cache" / f"{shard[2]}.{SIZE}.part"
        part.write_bytes(wrong)
        assert whole(cache.open(*shard)) == content(0)
        (tmp_path / "cache" / f"{shard[2]}.tar").unlink()


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_asks_again_after_a_passing_refusal(server, cache, code):
    shard = server.add("a.tar", content(0), status=[code, code, 200])
    assert whole(cache.open(*shard)) == content(0) and len(server.requests) == 3


def test_gives_up_in_bounded_time(server, tmp_path):
    shard = server.add("a.tar", content(0), status=[503])
    with ShardCache(tmp_path / "cache", SIZE, patience=0.5) as cache:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:\d+/a\.tar stays away: the server answers 503"):
            cache.open(*shard)
        assert time.monotonic() - began < 5
    assert 3 < len(server.requests) < 30
    assert names(tmp_path / "cache") == []
    server.close()
    with ShardCache(tmp_path / "cache", SIZE, patience=0.2) as cache:
        with pytest.raises(UserError, match="a.tar stays away: Connection refused"):
            cache.open(*shard)


def test_a_trickle_counts_as_staying_away_and_a_slow_server_does_not(server, tmp_path, monkeypatch):
    with ShardCache(tmp_path / "cache", SIZE, patience=0.4) as cache:
        slow = server.add("slow.tar", content(0), speed=400_000)  # 0.75 seconds
        assert whole(cache.open(*slow)) == content(0)
        monkeypatch.setattr(fetching, "LEAST_SPEED", 500_000)
        trickle = server.add("trickle.tar", content(1), speed=100_000)
        with pytest.raises(UserError, match="stays away: it comes at less than 500 kB/s"):
            cache.open(*trickle)


@pytest.mark.parametrize("code", [404, 403, 401, 410])
def test_a_lasting_refusal_is_said_at_once(server, cache, code):
    shard = server.add("a.tar", content(0), status=[code])
    with pytest.raises(UserError, match=rf"a\.tar cannot be fetched: the server answers {code}"):
        cache.open(*shard)
    assert len(server.requests) == 1


def test_one_wrong_byte(server, cache, tmp_path):
    shard = server.add("a.tar", content(0), flip=[1234, None])
    assert whole(cache.open(*shard)) == content(0) and len(server.requests) == 2
    shard = server.add("b.tar", content(1), flip=[1234])
    with pytest.raises(UserError, match=r"b\.tar is not the one that was indexed, fetched twice: its sha256"):
        cache.open(*shard)
    assert len(server.requests) == 4 and f"{shard[2]}.tar" not in names(tmp_path / "cache")
    assert not [name for name in names(tmp_path / "cache") if name.endswith(".part")]


@pytest.mark.parametrize("length", ["header", "chunked", "none"])
@pytest.mark.parametrize("change", [-1000, 1000])
def test_another_size(server, tmp_path, length, change):
    with ShardCache(tmp_path / "cache", 10 * SIZE, patience=1) as cache:
        url, size, _ = server.add("a.tar", content(0), length=length)
        with pytest.raises(UserError, match=r"a\.tar is not the one that was indexed.*has (300000|more) bytes"):
            cache.open(url, size + change, hashlib.sha256(b"other").hexdigest())
    assert names(tmp_path / "cache") == []


def test_redirects_are_followed_without_the_password(server, cache):
    _, size, sha256 = server.add("real.tar", content(0))
    server.add("a.tar", b"", redirect=f"http://{server.host}/real.tar?Signature=abc")
    assert whole(cache.open(f"http://me:secret@{server.host}/a.tar", size, sha256)) == content(0)
    first, second = (headers for _, headers in server.requests)
    assert first["Authorization"].startswith("Basic ") and "Authorization" not in second
    server.add("b.tar", b"", redirect="file:///etc/passwd")
    with pytest.raises(UserError, match=r"b\.tar cannot be fetched: the server answers 302 \(Found\)$"):
        cache.open(f"http://{server.host}/b.tar", size, "0" * 64)
    server.add("c.tar", b"", redirect=f"http://{server.host}/c.tar")
    with pytest.raises(UserError, match="cannot be fetched"):
        cache.open(f"http://{server.host}/c.tar", size, "0" * 64)


def test_disk_full(server, cache, tmp_path):
    shard = server.add("a.tar", content(0))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limit[1]))
    try:
        with pytest.raises(
            UserError, match=r"cache \(data\.cache_dir\) cannot take shard http.*a\.tar of 300000 bytes: File too large"
        ):
            cache.open(*shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(tmp_path / "cache") == []
    assert whole(cache.open(*shard)) == content(0)


def test_larger_than_the_budget(server, cache):
    with pytest.raises(UserError, match=r"a\.tar has 3\.0 MB, data\.cache_dir_gb allows 3\.0 MB: raise it"):
        cache.open(*server.add("a.tar", content(0, 10 * SIZE + 1)))
    assert server.requests == []


def test_threads_that_open_the_same_shard_share_one_download(server, cache):
    shard = server.add("a.tar", content(0), speed=2_000_000)
    found = []
    threads = [threading.Thread(target=lambda: found.append(whole(cache.open(*shard)))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [content(0)] * 5 and len(server.requests) == 1


def test_threads_that_wait_get_the_reason_too(server, cache):
    shard = server.add("a.tar", content(0), flip=[5], speed=1_000_000)
    reasons = []

    def read() -> None:
        with pytest.raises(UserError, match="fetched twice") as error:
            cache.open(*shard)
        reasons.append(str(error.value))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(reasons) == 3 and len(set(reasons)) == 1 and len(server.requests) == 2
