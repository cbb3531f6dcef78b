"""Many files out of shards at once, and the checksums that the loader compares with the index: eight files in the lanes of a vector.

The numbers are those of ``index_file.digest`` (blake2b). One file after the other, reading and checksums were a tenth of what the loader
does for a picture of 64 x 64 pixels. Where the program (checksums.cpp) cannot be compiled, or the processor is none that it was measured on, hashlib does it.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist import native
from ddpm_dist.data.index_file import digest

FEW = 8  # below, lanes stay empty
AT_ONCE, MOST_ZEROS = 64 << 20, 3  # bytes of a table; how many times what is in it
# Of the processor, and for the compiler.
AVX512 = ("avx512f", "avx512vl", "avx512dq", "avx512bw")
AVX2 = ("avx2",)
_once = threading.Lock()  # several threads read; one of them compiles


class Rows(Sequence[bytes]):
    """The files of a batch as rows of a table, zeros behind each, so that DALI takes them at once; as a sequence, the files.

    table: uint8 (N, width); sizes: (N,) of the files in bytes.
    """

    def __init__(self, table: np.ndarray, sizes: np.ndarray) -> None:
        self.table, self.sizes = table, sizes

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[k] for k in range(len(self))[place]]
        return self.table[place, : self.sizes[place]].tobytes()

    def end_as_jpegs(self) -> bool:
        """Whether all end with the mark at which a JPEG decoder stops, so that it makes no difference what follows."""
        numbers, last = np.arange(len(self)), self.sizes.astype(np.int64) - 1
        return bool((self.table[numbers, last] == 0xD9).all() and (self.table[numbers, last - 1] == 0xFF).all())


def digests(files: Sequence[bytes]) -> bytes:
    """The 8 bytes of :func:`index_file.digest` of each file, one behind the other."""
    library = _program() if len(files) >= FEW else None
    if library is None:
        return b"".join(map(digest, files))
    pointers = (ctypes.c_char_p * len(files))(*files)
    return _sums(library, ctypes.addressof(pointers), np.fromiter(map(len, files), np.uint64, len(files)))


def read_rows(handles: Sequence[int], offsets: np.ndarray, sizes: np.ndarray) -> tuple[Rows, bytes] | None:
    """Files out of shards and their :func:`digests`, without a turn of Python for each.

    Args:
        handles: open files, one for each of what is to be read; offsets, sizes: (N,), in bytes.

    Returns None where it has to be done in another way: there is no program, there are few files, they are too large or too different,
    or one cannot be read whole.
    """
    count, width = len(handles), int(sizes.max())
    library = _program() if count >= FEW and count * width <= min(AT_ONCE, MOST_ZEROS * int(sizes.sum())) else None
    if library is None:
        return None
    offsets, lengths = np.ascontiguousarray(offsets, np.uint64), np.ascontiguousarray(sizes, np.uint64)
    table, files = np.empty((count, width), np.uint8), np.fromiter(handles, np.intc, count)
    if not library.read_rows(
        files.ctypes.data, offsets.ctypes.data, lengths.ctypes.data, count, width, table.ctypes.data
    ):
        return None
    pointers = np.arange(count, dtype=np.uint64) * np.uint64(width) + np.uint64(table.ctypes.data)
    return Rows(table, sizes), _sums(library, pointers.ctypes.data, lengths)


def prepare() -> None:
    """Compile now, where that is still to do: who measures how long reading takes would take it for slow storage."""
    _program()


def _program() -> ctypes.CDLL | None:
    with _once:
        return _library()


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
    pointer, number, size = ctypes.c_void_p, ctypes.c_long, ctypes.c_uint64
    library.checksums.argtypes, library.checksums.restype = [pointer, pointer, number, pointer], None
    library.read_rows.argtypes = [pointer, pointer, pointer, number, size, pointer]
    library.read_rows.restype = ctypes.c_bool
    # Lengths around the 128 bytes of a block, more files than lanes.
    files = [bytes(range(256)) * 2 + bytes(extra) for extra in range(140)] + [bytes(size) for size in range(140)]
    pointers = (ctypes.c_char_p * len(files))(*files)
    found = _sums(library, ctypes.addressof(pointers), np.fromiter(map(len, files), np.uint64, len(files)))
    return library if found == b"".join(map(digest, files)) else None


def _sums(library: ctypes.CDLL, pointers: int, sizes: np.ndarray) -> bytes:
    """pointers: address of the addresses of the files; sizes: uint64 (N,)."""
    found = np.empty(len(sizes), "<u8")
    library.checksums(pointers, sizes.ctypes.data, len(sizes), found.ctypes.data)
    return found.tobytes()
