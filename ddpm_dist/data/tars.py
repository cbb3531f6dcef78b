"""Reading webdataset tars strictly: where every image lies, what its label is, and whether the archive is whole.

Tar libraries are lenient: they stop silently at the first damaged header and pass over data behind the end mark, so
samples would be lost without a word. This reader refuses such archives, names the place, and never trusts a size.

The format is POSIX ustar with the pax (``x``, ``g``) and GNU long name (``L``) extensions:
https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_dist.data.index_file import NO_LABEL, SAMPLE_DTYPE, Shard, checksum
from ddpm_dist.errors import UserError

BLOCK = 512
MAX_EXTENDED = 1 << 20  # a long name or a pax header needs far less; a larger one is an attack or damage
MAX_LABEL_BYTES = 20
IMAGE_SUFFIXES = {"jpg": "jpg", "jpeg": "jpg", "png": "png"}
MODES = {"L": 1, "RGB": 3}
REGULAR, FOLDER, EXTENSIONS = (b"0", b"\0", b"7"), b"5", (b"x", b"g", b"L", b"K")  # the type flags that may occur


class Member(NamedTuple):
    """One regular file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Scan:
    """What a shard holds: the shard's entry, its samples, and the image formats and channel counts that occur."""

    shard: Shard
    samples: np.ndarray
    formats: frozenset[str]
    channels: frozenset[int]


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as in webdataset: ``a/b.seg.png`` -> (``a/b``, ``seg.png``). Hidden files: ("", "")."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")


def ustar_name(header: bytes) -> str:
    """The file name in a 512 byte tar header (prefix and name joined)."""
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def members(data: bytes | mmap.mmap, where: str) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order.

    Args:
        data: the whole archive.
        where: what error messages call it.

    Raises:
        UserError: the archive is empty, cut short or damaged, or holds links, devices or sparse files.
    """
    total, position, long_name, pax = len(data), 0, "", {}
    if total == 0:
        raise UserError(f"{where}: the file is empty, not a tar archive")
    while True:
        header = data[position : position + BLOCK]
        if len(header) < BLOCK:
            raise UserError(f"{where}: cut short at byte {position}: the end-of-archive mark is missing")
        if header.count(0) == BLOCK:
            _check_end(data, position, where)
            return
        kind, size = _check_header(header, position, where)
        if "size" in pax and kind in REGULAR:
            size = pax["size"]
        start = position + BLOCK
        if size > total - start:
            raise UserError(
                f"{where}: cut short or damaged: the header at byte {position} announces {size} bytes, "
                f"{total - start} are left"
            )
        position = start + -(-size // BLOCK) * BLOCK
        if kind in EXTENSIONS:
            if size > MAX_EXTENDED:
                raise UserError(f"{where}: the extended header at byte {start - BLOCK} claims {size} bytes")
            if kind == b"x":
                pax = _pax_records(bytes(data[start : start + size]), start, where)
            elif kind == b"L":
                long_name = _text(data[start : start + size])
            continue
        if kind in REGULAR:
            yield Member(pax.get("path") or long_name or ustar_name(header), start, size)
        elif kind != FOLDER:
            raise UserError(
                f"{where}: {ustar_name(header)!r} at byte {start - BLOCK} is not a regular file (type {kind!r}): "
                "write the tar with plain files only"
            )
        long_name, pax = "", {}


def scan_shard(path: str | os.PathLike, check_image=None) -> Scan:
    """Read a whole shard and say what it holds.

    Every sample needs exactly one image (jpg, jpeg or png; grey or RGB); a label is an ASCII integer in ``key.cls``.
    Either all samples of a shard have a label or none. Files of other types are passed over. Only the header of an
    image is parsed unless ``check_image(data)`` is given, which may raise ValueError with a reason.

    Raises:
        UserError: "shard:key: reason".
    """
    path = Path(path)
    records, formats, channels = [], set(), set()
    with _mapped(path) as data:
        for key, files in _samples(data, str(path)):
            where = f"{path}:{key}"
            image = _image_of(files, where)
            content = data[image.offset : image.offset + image.size]
            if check_image is not None:
                try:
                    check_image(content)
                except ValueError as error:
                    raise UserError(f"{where}: {error}") from None
            kind, mode, width, height = _image_header(content, where)
            formats.add(kind)
            channels.add(MODES[mode])
            label = _label(data, files.get("cls"), where)
            records.append((image.offset, checksum(content), image.size, label, height, width))
        sha256 = hashlib.sha256(data).hexdigest()
    samples = np.array(records, dtype=SAMPLE_DTYPE)
    if not len(samples):
        raise UserError(f"{path}: holds no samples")
    labelled = samples["label"] != NO_LABEL
    if labelled.any() and not labelled.all():
        missing = int((~labelled).sum())
        raise UserError(f"{path}: {missing} of {len(samples)} samples have no .cls file: label all or none")
    shard = Shard(path.name, len(samples), os.path.getsize(path), sha256)
    return Scan(shard, samples, frozenset(formats), frozenset(channels))


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[bytes | mmap.mmap]:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                yield b""
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _samples(data: bytes | mmap.mmap, where: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """Consecutive members of the same key, as {extension: member}."""
    current, files, seen = "", {}, set()
    for member in members(data, where):
        key, extension = split_name(member.name)
        if not key:
            continue
        if key != current:
            if current:
                yield current, files
            if key in seen:
                raise UserError(f"{where}:{key}: the key occurs twice, or its files do not stand together")
            seen.add(key)
            current, files = key, {}
        if extension in files:
            raise UserError(f"{where}:{key}: .{extension} occurs twice")
        files[extension] = member
    if current:
        yield current, files


def _image_of(files: dict[str, Member], where: str) -> Member:
    found = [member for extension, member in files.items() if extension in IMAGE_SUFFIXES]
    if len(found) != 1:
        names = ", ".join(member.name for member in found) or "none"
        raise UserError(f"{where}: needs exactly one image (.jpg, .jpeg or .png), found {names}")
    if found[0].size == 0:
        raise UserError(f"{where}: the image is empty")
    if found[0].size >= 1 << 32:
        raise UserError(f"{where}: the image has 4 GiB or more")
    return found[0]


def _image_header(content: bytes, where: str) -> tuple[str, str, int, int]:
    """Format, mode, width and height as Pillow finds them in the first bytes."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            kind, mode, (width, height) = image.format, image.mode, image.size
    except Exception:  # Pillow raises many types on damaged headers
        raise UserError(f"{where}: not a JPEG or PNG image") from None
    if mode not in MODES:
        raise UserError(f"{where}: image mode {mode} is neither 8 bit grey nor 8 bit RGB")
    if max(width, height) > 65535:
        raise UserError(f"{where}: {width} x {height} pixels; at most 65535 a side are possible")
    return IMAGE_SUFFIXES[kind.lower()], mode, width, height


def _label(data: bytes | mmap.mmap, member: Member | None, where: str) -> int:
    if member is None:
        return NO_LABEL
    text = bytes(data[member.offset : member.offset + min(member.size, MAX_LABEL_BYTES + 1)]).strip()
    if not text.isdigit() or len(text) > MAX_LABEL_BYTES or int(text) >= 1 << 31:
        raise UserError(f"{where}: the label in .cls must be a whole number from 0 to 2147483647, found {text!r}")
    return int(text)


def _check_header(header: bytes, position: int, where: str) -> tuple[bytes, int]:
    """Type and size of a header whose check sum is right."""
    try:
        stated = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        stated, size = -1, 0
    if stated != sum(header) - sum(header[148:156]) + 8 * ord(" "):  # the field itself counts as eight spaces
        raise UserError(f"{where}: damaged or not a tar archive: no valid header at byte {position}")
    return header[156:157], size


def _check_end(data: bytes | mmap.mmap, position: int, where: str) -> None:
    """Behind the end mark only zeros may follow: a second archive there would be lost without a word."""
    while position < len(data):
        piece = data[position : position + (1 << 20)]
        if piece.count(0) != len(piece):
            raise UserError(
                f"{where}: data follows the end-of-archive mark at byte {position} (two tars joined by cat?): "
                "make it one archive"
            )
        position += len(piece)


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
    return bytes(field).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_records(content: bytes, position: int, where: str) -> dict:
    """``path`` and ``size`` from records of the form "LENGTH KEY=VALUE\\n"."""
    found: dict = {}
    try:
        while content:
            length = int(content.split(b" ", 1)[0])
            record, content = content[:length], content[length:]
            if length < 5 or not record.endswith(b"\n"):
                raise ValueError
            key, _, value = record.split(b" ", 1)[1][:-1].partition(b"=")
            if key == b"path":
                found["path"] = _text(value)
            elif key == b"size":
                found["size"] = int(value)
                if found["size"] < 0:
                    raise ValueError
    except (ValueError, IndexError):
        raise UserError(f"{where}: damaged pax header at byte {position}") from None
    return found
