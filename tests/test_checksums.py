"""Many files are read at once, and their checksums are those of hashlib, with and without a program of ours."""

from __future__ import annotations

import hashlib
import io
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_dist import native
from ddpm_dist.config import Data
from ddpm_dist.data import checksums
from ddpm_dist.data.checksums import AVX2, AVX512, Rows, digests
from ddpm_dist.data.decoder import Decoder
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import BadSample
from ddpm_dist.pack import pack


def expected(files: list[bytes]) -> bytes:
    return b"".join(hashlib.blake2b(file, digest_size=8).digest() for file in files)


def random_files(seed: int, count: int) -> list[bytes]:
    """Lengths at and beside the ends of blocks, and any; among them empty files."""
    random = np.random.default_rng(seed)
    ends = [0, 1, 127, 128, 129, 255, 256, 257, 4096]
    sizes = np.where(random.random(count) < 0.5, random.choice(ends, count), random.integers(0, 20_000, count))
    return [random.bytes(size) for size in sizes]


@pytest.fixture
def asked_anew():
    checksums._library.cache_clear()
    yield
    checksums._library.cache_clear()


@pytest.mark.parametrize("flags", [(), AVX2, AVX512], ids=["plain", "avx2", "avx512"])
def test_the_program_finds_what_hashlib_finds(asked_anew, monkeypatch, flags):
    if not native.instructions().issuperset(flags):
        pytest.skip("this processor has no such instructions")
    load = native.load
    monkeypatch.setattr(native, "instructions", lambda: frozenset(AVX2))
    monkeypatch.setattr(native, "load", lambda source, _: load(source, [f"-m{flag}" for flag in flags]))
    assert checksums._library() is not None
    for count in (8, 9, 64, 257):
        for seed in range(5):
            files = random_files(seed, count)
            assert digests(files) == expected(files)


@pytest.fixture
def two_shards(tmp_path):
    """Two files, what lies in them, and where: (handles, offsets, sizes, files) in an order that jumps between them."""
    random = np.random.default_rng(5)
    files = [random.bytes(size) for size in random.integers(1, 5000, 100)]
    names = [tmp_path / name for name in "ab"]
    for k, name in enumerate(names):
        name.write_bytes(b"--" + b"".join(files[k::2]))
    opened = [os.open(name, os.O_RDONLY) for name in names]
    sizes = np.array([len(file) for file in files], np.uint32)
    offsets = np.empty(100, np.uint64)
    for k in range(2):
        offsets[k::2] = 2 + np.cumsum([0, *sizes[k:-2:2]])
    order = random.permutation(100)
    yield [opened[k % 2] for k in order], offsets[order], sizes[order], [files[k] for k in order]
    for handle in opened:
        os.close(handle)


def test_many_files_become_rows(two_shards):
    handles, offsets, sizes, files = two_shards
    rows, found = checksums.read_rows(handles, offsets, sizes)
    assert list(rows) == files and rows[3:5] == files[3:5] and found == expected(files)
    assert rows.table.shape == (100, sizes.max())
    assert not any(row[size:].any() for row, size in zip(rows.table, sizes, strict=True))
    assert not rows.end_as_jpegs()


def test_what_cannot_become_rows_is_read_in_another_way(two_shards, tmp_path, monkeypatch):
    handles, offsets, sizes, _ = two_shards
    assert checksums.read_rows(handles[:7], offsets[:7], sizes[:7]) is None
    assert checksums.read_rows(handles, offsets, sizes) is not None
    with monkeypatch.context() as small:
        small.setattr(checksums, "AT_ONCE", 1000)
        assert checksums.read_rows(handles, offsets, sizes) is None
    uneven = sizes.copy()
    uneven[:] = 1
    uneven[0] = 1000
    assert checksums.read_rows(handles, offsets, uneven) is None
    os.truncate(tmp_path / "a", 1000)
    assert checksums.read_rows(handles, offsets, sizes) is None


def test_whether_all_end_as_jpegs():
    def rows(*files: bytes) -> Rows:
        table = np.zeros((len(files), 10), np.uint8)
        for row, file in zip(table, files, strict=True):
            row[: len(file)] = np.frombuffer(file, np.uint8)
        return Rows(table, np.array([len(file) for file in files], np.uint32))

    assert rows(b"abc\xff\xd9", b"\xff\xd9", b"12345678\xff\xd9").end_as_jpegs()
    for other in (b"abc\xff\xd8", b"abc\xfe\xd9", b"abc\xff\xd9\0", b"\xd9"):
        assert not rows(b"abc\xff\xd9", other).end_as_jpegs()


def test_few_and_many_files():
    for count in (0, 1, 7, 8, 100):
        files = random_files(count, count)
        assert digests(files) == expected(files)


def test_it_is_used_where_it_can_be(asked_anew):
    if not native.instructions().issuperset(AVX2):
        pytest.skip("this processor has no such instructions")
    assert checksums._library() is not None


@pytest.mark.parametrize("trouble", ["no compiler", "unknown processor", "wrong results"])
def test_without_the_program_hashlib_does_it(asked_anew, monkeypatch, tmp_path, trouble):
    if trouble == "no compiler":
        monkeypatch.setenv("CXX", "false")
        monkeypatch.setenv(native.VARIABLE, str(tmp_path))
    elif trouble == "unknown processor":
        monkeypatch.setattr(native, "instructions", frozenset)
    else:
        sums = checksums._sums
        monkeypatch.setattr(checksums, "_sums", lambda *words: sums(*words)[:-1] + b"?")
    files = random_files(3, 50)
    assert digests(files) == expected(files)
    assert checksums._library() is None


def test_many_threads_ask_at_once(asked_anew, monkeypatch, tmp_path):
    monkeypatch.setenv(native.VARIABLE, str(tmp_path))
    loads, load = [], native.load
    monkeypatch.setattr(native, "load", lambda *words: loads.append(words) or load(*words))
    files = [random_files(seed, 40) for seed in range(8)]
    found: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: digests(files[k])})) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[k] for k in range(8)] == [expected(files[k]) for k in range(8)]
    assert len(loads) == native.instructions().issuperset(AVX2)


def jpeg(seed: int, **options) -> bytes:
    random, target = np.random.default_rng(seed), io.BytesIO()
    side = 16 + 8 * (seed % 9)
    picture = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize((side, side + seed % 7))
    picture.save(target, "JPEG", **options)
    return target.getvalue()


@pytest.mark.parametrize("damage", [None, "the end is missing", "noise in the middle, then the mark"])
def test_rows_become_the_pixels_of_their_files(tmp_path, damage):
    """JPEGs of all kinds; DALI gets zeros behind them. A truncated one has no mark at its end, and is not given as a row."""
    options = [{"quality": 95, "subsampling": 0}, {"quality": 30}, {"progressive": True}, {"restart_marker_blocks": 2}]
    files = [jpeg(seed, **options[seed % 4]) for seed in range(40)]
    if damage == "the end is missing":
        files[7] = files[7][: len(files[7]) * 2 // 3]
    elif damage is not None:
        half = len(files[7]) // 2
        files[7] = files[7][:half] + np.random.default_rng(1).integers(0, 255, 40, np.uint8).tobytes() + b"\xff\xd9"
    sizes = np.array([len(file) for file in files], np.uint32)
    table = np.zeros((len(files), sizes.max()), np.uint8)
    for row, file in zip(table, files, strict=True):
        row[: len(file)] = np.frombuffer(file, np.uint8)
    rows = Rows(table, sizes)
    assert rows.end_as_jpegs() == (damage != "the end is missing")
    pack("shapes", tmp_path / "any", num=40, size=16, workers=1)
    index, settings = Index.load(tmp_path / "any"), Data(image_size=16, channels=3, num_classes=10)
    ids = np.arange(40)

    def pixels(given) -> list[np.ndarray] | str:
        decoder = Decoder(index, settings, 40, torch.device("cpu"), "cpu", only_decode=True)
        lengths = {decoder._listed(given).at(k).size for k in range(40)}
        assert (lengths == {sizes.max()}) == (given is rows and rows.end_as_jpegs())
        try:
            return [image.numpy() for image in decoder.whole_images(ids, given)]
        except BadSample as error:
            return str(error)

    one, other = pixels(files), pixels(rows)
    assert type(one) is type(other)
    if isinstance(one, str):
        assert damage is not None and one == other and index.key_of(7) in one
    else:
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
