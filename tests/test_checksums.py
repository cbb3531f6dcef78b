"""Checksums of many files at once are those of hashlib, with and without a program of ours."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from ddpm_dist import native
from ddpm_dist.data import checksums
from ddpm_dist.data.checksums import AVX2, AVX512, digests

SOURCE = Path(checksums.__file__).with_suffix(".cpp")


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
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 257])
def test_the_program_finds_what_hashlib_finds(flags, count):
    if not native.instructions().issuperset(flags):
        pytest.skip("this processor has no such instructions")
    library = native.load(SOURCE, [f"-m{flag}" for flag in flags])
    library.checksums.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p]
    for seed in range(5):
        files = random_files(seed, count)
        assert checksums._by(library, files) == expected(files)


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
        by = checksums._by
        monkeypatch.setattr(checksums, "_by", lambda library, files: by(library, files)[:-1] + b"?")
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
