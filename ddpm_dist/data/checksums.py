"""Checksums of many files at once, as the loader compares them with the index: blake2b, eight files in the lanes of a vector.

The numbers are those of ``index_file.digest``. One file after the other was a twentieth of what the loader does for a picture of 64 x 64
pixels. Where the program (checksums.cpp) cannot be compiled, or the processor is none that it was measured on, hashlib does it.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_dist import native
from ddpm_dist.data.index_file import digest

FEW = 8  # below, lanes stay empty
# Of the processor, and for the compiler.
AVX512 = ("avx512f", "avx512vl", "avx512dq", "avx512bw")
AVX2 = ("avx2",)
_once = threading.Lock()  # several threads read; one of them compiles


def digests(files: Sequence[bytes]) -> bytes:
    """The 8 bytes of :func:`index_file.digest` of each file, one behind the other. The first call may compile, which takes a second."""
    if len(files) < FEW:
        return b"".join(map(digest, files))
    with _once:
        library = _library()
    return b"".join(map(digest, files)) if library is None else _by(library, files)


@functools.cache
def _library() -> ctypes.CDLL | None:
    can = native.instructions()
    flags = next((flags for flags in (AVX512, AVX2) if can.issuperset(flags)), None)
    if flags is None:
        return None
    try:
        library = native.load(Path(__file__).with_suffix(".cpp"), [f"-m{flag}" for flag in flags])
    except native.NotBuilt:
        return None
    library.checksums.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p]
    library.checksums.restype = None
    # Lengths around the 128 bytes of a block, more files than lanes.
    files = [bytes(range(256)) * 2 + bytes(extra) for extra in range(140)] + [bytes(size) for size in range(140)]
    return library if _by(library, files) == b"".join(map(digest, files)) else None


def _by(library: ctypes.CDLL, files: Sequence[bytes]) -> bytes:
    count = len(files)
    pointers = (ctypes.c_char_p * count)(*files)
    sizes = np.fromiter(map(len, files), np.uint64, count)
    found = np.empty(count, "<u8")
    library.checksums(pointers, sizes.ctypes.data, count, found.ctypes.data)
    return found.tobytes()
