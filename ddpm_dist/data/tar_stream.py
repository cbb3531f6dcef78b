"""The members of a tar that is read once, from its beginning to its end, strictly.

Tar libraries are lenient: they stop silently at the first damaged header and pass over data behind the end mark, so
samples would be lost without a word. This reader refuses such archives, names the place, and never trusts a size. It holds
a piece of the archive in memory, whatever the archive claims, and hashes everything on its way.

The format is POSIX ustar with the pax (``x``, ``g``) and GNU long name (``L``) extensions:
https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple
from zlib import adler32

BLOCK = 512
CHUNK = 1 << 20
MAX_EXTENDED = 1 << 20  # a long name or a pax header needs far less; a larger one is an attack or damage
REGULAR, FOLDER, EXTENSIONS = (b"0", b"\0", b"7"), b"5", (b"x", b"g", b"L", b"K")  # the type flags that may occur
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # gzip, bzip2, xz, zstd, zip
ZEROS = bytes(BLOCK)
ADLER = 65521
FIELDS = struct.Struct("124x11sc12x6s2sc355x").unpack


class Member(NamedTuple):
    """One regular file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


class BrokenTar(Exception):
    """The archive cannot be read any further. ``reason``: in two or three words; the message says what and where."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Tape:
    """A file that is read forward only and hashed on the way.

    Args:
        read: returns the next bytes, at most as many as asked for; empty at the end.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self._data, self._begin = read, b"", 0
        self._hash = hashlib.sha256()

    def take(self, position: int, size: int) -> bytes:
        """Bytes from ``position`` on, fewer where the file ends. Positions may not go back behind the last :meth:`skip`."""
        begin = position - self._begin
        if begin + size > len(self._data):
            self._advance(position, size)
            begin = position - self._begin
        return self._data[begin : begin + size]

    def skip(self, position: int) -> int:
        """Go forward to ``position``, or to the end of the file where that comes first; returns where it stopped."""
        if position > self._begin + len(self._data):
            self._advance(position, 0)
        return min(position, self._begin + len(self._data))

    def rest(self, position: int) -> bool:
        """Read to the end; whether all that follows ``position`` is zero."""
        self._advance(position, 0)
        zero, piece = True, self._data
        while True:
            zero = zero and piece.count(0) == len(piece)
            piece = self._more()
            if not piece:
                break
            self._begin, self._data = self._begin + len(self._data), piece
        return zero

    def finish(self) -> tuple[int, str]:
        """Read to the end; returns the number of bytes and the sha256 (hex)."""
        self._data, begin = b"", self._begin + len(self._data)
        while piece := self._more():
            begin += len(piece)
        self._begin = begin
        return begin, self._hash.hexdigest()

    def _advance(self, position: int, size: int) -> None:
        """Drop what lies before ``position``, and read until ``size`` bytes from there are in memory."""
        end = self._begin + len(self._data)
        pieces = [self._data[position - self._begin :]] if position < end else []
        while end < position + size:
            piece = self._more()
            if not piece:
                break
            end += len(piece)
            if end > position:
                pieces.append(piece[max(0, len(piece) - (end - position)) :])
        self._data = b"".join(pieces)
        self._begin = min(position, end)

    def _more(self) -> bytes:
        piece = self._read(CHUNK)
        self._hash.update(piece)
        return piece


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as in webdataset: ``a/b.seg.png`` -> (``a/b``, ``seg.png``). Hidden files: ("", "")."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")


def ustar_name(header: bytes) -> str:
    """The file name in a 512 byte tar header (prefix and name joined)."""
    end = header.find(b"\0", 0, 100)
    name = header[: end if end >= 0 else 100].decode("utf-8", "surrogateescape")
    if header[345] == 0 or header[257:263] != b"ustar\0":
        return name
    return f"{_text(header[345:500])}/{name}"


def members(tape: Tape) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order. The bytes of one can be taken from the tape until the next is asked for.

    Raises:
        BrokenTar: the archive is empty, cut short or damaged, or holds links, devices or sparse files.
    """
    position, long_name, pax = 0, "", {}
    while True:
        header = tape.take(position, BLOCK)
        if position == 0 and header.startswith(COMPRESSED):
            raise BrokenTar(
                "compressed tar", "compressed, so not a tar archive that can be read from its middle: unpack it"
            )
        if len(header) < BLOCK:
            if position == 0 and not header:
                raise BrokenTar("zero-byte tar", "the file is empty, not a tar archive")
            raise BrokenTar("truncated tar", f"cut short at byte {position}: the end-of-archive mark is missing")
        if header == ZEROS:
            if not tape.rest(position):  # a second archive there would be lost without a word
                raise BrokenTar(
                    "damaged tar",
                    f"data follows the end-of-archive mark at byte {position} (two tars joined by cat?): make it one archive",
                )
            return
        kind, size = _check_header(header, position)
        start = position + BLOCK
        if kind in REGULAR:
            size = pax.get("size", size)
            yield Member(pax.get("path") or long_name or ustar_name(header), start, size)
            if pax or long_name:
                long_name, pax = "", {}
        elif kind in EXTENSIONS:
            if size > MAX_EXTENDED:
                raise BrokenTar("damaged tar", f"the extended header at byte {position} claims {size} bytes")
            content = tape.take(start, size)
            if kind == b"x" and len(content) == size:
                pax = _pax_records(content, start)
            elif kind == b"L":
                long_name = _text(content)
        elif kind != FOLDER:
            raise BrokenTar(
                "damaged tar",
                f"{ustar_name(header)!r} at byte {position} is not a regular file (type {kind!r}): "
                "write the tar with plain files only",
            )
        else:
            long_name, pax = "", {}
        position = start + -(-size // BLOCK) * BLOCK
        there = tape.skip(start + size) - start
        if there < size:
            raise BrokenTar(
                "truncated tar",
                f"cut short or damaged: the header at byte {start - BLOCK} announces {size} bytes, {max(0, there)} are left",
            )


def _check_header(header: bytes, position: int) -> tuple[bytes, int]:
    """Type and size of a header whose check sum is right."""
    size_text, size_end, stated_text, stated_end, kind = FIELDS(header)
    try:
        # Nearly all writers fill these fields with digits up to a NUL.
        size = int(size_text, 8) if size_end == b"\0" and size_text.isdigit() else _number(header[124:136])
        stated = int(stated_text, 8) if stated_end[0] == 0 and stated_text.isdigit() else _number(header[148:156])
    except ValueError:
        stated, size = -1, 0
    # The sum of all bytes, with the field itself counted as eight spaces. Adler-32 has in its lower half one plus that sum modulo
    # 65521, and comes from C; damage that changes the sum by just that would need 257 bytes.
    total = (adler32(header) & 0xFFFF) - (adler32(header[148:156]) & 0xFFFF) + 8 * 32
    if not 0 <= stated <= 255 * BLOCK or (total - stated) % ADLER:
        raise BrokenTar("damaged tar", f"damaged or not a tar archive: no valid header at byte {position}")
    return kind, size


def _number(field: bytes) -> int:
    """An octal field, or GNU's base-256 one for sizes of 8 GiB and more. Raises ValueError."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("negative or too large")
        return int.from_bytes(field[1:], "big")
    text = field.rstrip(b" \0").lstrip(b" ")
    if not text.isdigit():  # int() would also take signs and underscores
        raise ValueError("not octal")
    return int(text, 8)


def _text(field: bytes) -> str:
    end = field.find(b"\0")
    return (field if end < 0 else field[:end]).decode("utf-8", "surrogateescape")


def _pax_records(content: bytes, position: int) -> dict:
    """``path`` and ``size`` from records of the form "LENGTH KEY=VALUE\\n"."""
    found: dict = {}
    try:
        while content:
            length = int(content[: content.index(b" ")])
            record, content = content[:length], content[length:]
            if length < 5 or not record.endswith(b"\n"):
                raise ValueError
            key, _, value = record[record.index(b" ") + 1 : -1].partition(b"=")
            if key == b"path":
                found["path"] = _text(value)
            elif key == b"size":
                found["size"] = int(value)
                if found["size"] < 0:
                    raise ValueError
    except (ValueError, IndexError):
        raise BrokenTar("damaged tar", f"damaged pax header at byte {position}") from None
    return found
