"""Images inside a zip or an uncompressed tar: read where they lie, nothing is unpacked and no file is written.

A folder packed as an archive gives what the folder gives: one folder per class, or images without folders and labels, in the same
order. Folders around all class folders (``photos/cat/1.jpg``) are passed over.
"""

from __future__ import annotations

import functools
import os
import stat
import zipfile
import zlib
from pathlib import Path

from ddpm_dist.data.encode import BadImage, Item, channels_of, open_image
from ddpm_dist.data.sources import SUFFIXES, printable
from ddpm_dist.data.tar_stream import BrokenTar, Tape, members
from ddpm_dist.data.tars import MAX_IMAGE_BYTES
from ddpm_dist.errors import UserError

MAX_NAMES = 20_000_000  # of files in an archive: what is kept of them takes about 200 bytes each
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Archive:
    """The images of a zip or tar, a ``ddpm_dist.data.sources.Source``."""

    image_format = "jpg"

    def __init__(
        self, path: Path, names: list[str], places: dict[str, tuple[int, int]] | None, other: list[str]
    ) -> None:
        self.name, self.notes = "archive", []
        self._path, self._places = path, places
        self.classes, self._entries = _classes(path, names)
        if other:
            self.notes.append(f"passed over {len(other)} files that are no images (such as {printable(other[0])})")

    def __len__(self) -> int:
        return len(self._entries)

    def item(self, position: int) -> Item:
        label, name = self._entries[position]
        if self._places is None:
            load = functools.partial(_from_zip, str(self._path), name)
        else:
            load = functools.partial(_from_tar, str(self._path), *self._places[name])
        return Item(f"{printable(self._path)}:{printable(name)}", label, load)

    def channels(self) -> int:
        first = None
        for position in range(len(self)):
            item = self.item(position)
            try:
                return channels_of(open_image(item.load()))
            except (OSError, BadImage) as error:
                first = first or f"{item.name} ({error})"
        raise UserError(f"none of the {len(self)} images can be read; the first: {first}")


def open_archive(path: Path) -> Archive:
    """Open a zip or tar file.

    Raises:
        UserError: not such an archive, damaged, compressed as a whole, with links, names that lead outside or occur twice, or not laid out
            as one folder per class or one flat list.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        names, places = (_zip_names(path), None) if zipped else _tar_names(path)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, BrokenTar) as error:
        raise UserError(
            f"{printable(path)} is neither a folder nor a zip or tar archive that can be read: {error}"
        ) from None
    images, other = [], []
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise UserError(f"{printable(path)} holds a name that leads outside of it ({printable(name)}): not used")
        if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
            (images if os.path.splitext(name)[1].lower() in SUFFIXES else other).append(name)
    if any(name.endswith((".cls", ".json", ".txt")) and "/" not in name for name in other) and not any(
        "/" in name for name in images
    ):
        raise UserError(
            f"{printable(path)} holds labels beside its images, as webdataset shards do: use python -m ddpm_dist.index"
        )
    if not images:
        raise UserError(f"no images in {printable(path)}: expected one folder per class, or image files")
    return Archive(path, images, places, sorted(other))


def _classes(path: Path, names: list[str]) -> tuple[list[str] | None, list[tuple[int, str]]]:
    """Class names, and label and name of every image, in the order of ``open_folder``."""
    split = [name.split("/") for name in names]
    depths = {len(parts) for parts in split}
    around = 0
    while min(depths) - around > 2 and len({parts[around] for parts in split}) == 1:
        around += 1
    depths = {depth - around for depth in depths}
    if depths == {1}:
        return None, [(-1, name) for name in sorted(names)]
    if depths != {2}:
        example = names[max(range(len(names)), key=lambda k: len(split[k]))]
        raise UserError(
            f"{printable(path)} is not laid out as one folder per class, or as images without folders (such as {printable(example)})"
        )
    classes = sorted({parts[around] for parts in split})
    for name in classes:
        if not name.isprintable():
            raise UserError(f"{printable(path)} has a class folder with unprintable characters ({printable(name)})")
    label = {name: number for number, name in enumerate(classes)}
    return classes, sorted((label[parts[around]], name) for parts, name in zip(split, names, strict=True))


def _once(path: Path, names: list[str]) -> list[str]:
    if len(names) > MAX_NAMES:
        raise UserError(f"{printable(path)} holds {len(names):,} files, at most {MAX_NAMES:,} are taken: split it")
    if len(set(names)) != len(names):
        twice = next(name for name, after in zip(sorted(names), sorted(names)[1:], strict=False) if name == after)
        raise UserError(f"{printable(path)} holds {printable(twice)} twice: make the archive anew")
    return names


def _zip_names(path: Path) -> list[str]:
    found = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if stat.S_ISLNK(info.external_attr >> 16):
                raise UserError(f"{printable(path)} holds a link ({printable(info.filename)}): links are not followed")
            if not info.is_dir():
                found.append(info.filename)
    return _once(path, found)


def _tar_names(path: Path) -> tuple[list[str], dict[str, tuple[int, int]]]:
    with open(path, "rb", buffering=0) as file:
        found = [(member.name.removeprefix("./"), member.offset, member.size) for member in members(Tape(file.read))]
    _once(path, [name for name, _, _ in found])
    return [name for name, _, _ in found], {name: (offset, size) for name, offset, size in found}


@functools.lru_cache(maxsize=1)
def _opened(path: str, changed: int) -> zipfile.ZipFile:
    """Its directory is read once per process, and again if the file is another one."""
    return zipfile.ZipFile(path)


def _from_zip(path: str, name: str) -> bytes:
    try:
        archive = _opened(path, os.stat(path).st_mtime_ns)
        info = archive.getinfo(name)
        if info.flag_bits & 1:
            raise BadImage("encrypted")
        if info.compress_type not in METHODS:
            raise BadImage("compressed in a way other than deflate")
        _check_size(info.file_size)
        with archive.open(info) as file:
            data = file.read(info.file_size + 1)  # what is announced, whatever the compressed bytes hold
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise BadImage(f"damaged in the archive: {error}") from None
    return data


def _from_tar(path: str, offset: int, size: int) -> bytes:
    _check_size(size)
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise BadImage("the archive was cut short meanwhile")
    return data


def _check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise BadImage(f"the file has {size} bytes, at most {MAX_IMAGE_BYTES} are taken")
