"""Where images for packing come from: ``open_source`` turns a name and its options into a ``Source``."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ddpm_dist.data import shapes
from ddpm_dist.data.encode import BadImage, Item, channels_of, open_image
from ddpm_dist.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
DEFAULT_ROOT = "datasets"
DEFAULT_SHAPES = 20_000
DIGITS_SIZE, SHAPES_SIZE = 16, 64


class Source(Protocol):
    """A finite list of images.

    Attributes:
        name: goes into the shard names.
        classes: class names, or None if unlabelled.
        image_format: the format to store when none is asked for.
        notes: what the user should know (files that were passed over).
    """

    name: str
    classes: list[str] | None
    image_format: str
    notes: list[str]

    def __len__(self) -> int: ...

    def item(self, position: int) -> Item:
        """Image ``position``; cheap, the image itself is loaded by ``Item.load``."""
        ...

    def channels(self) -> int:
        """1 or 3: what the images have, or for mixed ones the first that can be read. Raises UserError if none can."""
        ...


class Digits:
    """The 1,797 handwritten digits of scikit-learn (8 x 8, values 0..16), enlarged by bicubic interpolation.

    Bicubic and not Lanczos: from so few pixels Lanczos leaves ripples in the black.
    """

    name, image_format = "digits", "png"
    classes = [str(digit) for digit in range(10)]

    def __init__(self, size: int | None = None) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("digits needs scikit-learn, which is not installed: pip install scikit-learn") from None
        bunch = load_digits()
        self.size = size or DIGITS_SIZE
        self.notes: list[str] = []
        self._images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        self._labels = bunch.target

    def __len__(self) -> int:
        return len(self._images)

    def item(self, position: int) -> Item:
        load = functools.partial(_enlarge, self._images[position], self.size)
        return Item(f"digits[{position}]", int(self._labels[position]), load)

    def channels(self) -> int:
        return 1


class Shapes:
    """Procedural images of ten shapes, see ``ddpm_dist.data.shapes``. Image i has label i % 10."""

    name, image_format = "shapes", "jpg"
    classes = shapes.SHAPES

    def __init__(self, num: int | None = None, seed: int | None = None, size: int | None = None) -> None:
        self.num = DEFAULT_SHAPES if num is None else num
        self.seed = seed or 0
        self.size = size or SHAPES_SIZE
        self.notes: list[str] = []
        if self.num < 1:
            raise UserError(f"--num must be at least 1, found {self.num}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed must be in 0..2**64-1, found {self.seed}")
        if self.size < 8:
            raise UserError(f"--size must be at least 8 for shapes, found {self.size}")

    def __len__(self) -> int:
        return self.num

    def item(self, position: int) -> Item:
        load = functools.partial(shapes.render, self.seed, position, self.size)
        return Item(f"shapes[{position}]", position % len(self.classes), load)

    def channels(self) -> int:
        return 3


class Files:
    """Image files on disk, ``paths`` in order.

    Args:
        labels: a class number per file, or None.
        classes: class names, or None; goes with ``labels``.
    """

    image_format = "jpg"

    def __init__(
        self, name: str, paths: Sequence[Path], labels: Sequence[int] | None, classes: list[str] | None
    ) -> None:
        self.name, self.classes = name, classes
        self.notes: list[str] = []
        self.paths, self._labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def item(self, position: int) -> Item:
        path = self.paths[position]
        label = -1 if self._labels is None else self._labels[position]
        return Item(printable(path), label, functools.partial(_read, str(path)))

    def channels(self) -> int:
        first = None
        for path in self.paths:
            try:
                return channels_of(open_image(_read(str(path))))
            except (OSError, BadImage) as error:
                first = first or f"{printable(path)} ({error})"
        raise UserError(f"none of the {len(self)} images can be read; the first: {first}")


def open_source(
    name: str,
    *,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    size: int | None = None,
    num: int | None = None,
    seed: int | None = None,
    download: bool = False,
    label_key: str | None = None,
) -> Source:
    """Open one of the sources by name.

    Args:
        name: digits, shapes, cifar10, mnist, fashion-mnist, celeba, folder or huggingface.
        root: where the files are (folder: required, a folder, or a zip or tar file; torchvision's: default ``datasets``).
        split: torchvision's sources and huggingface; train (default), test, for celeba also valid and all.
        size: side in pixels; digits and shapes are rendered at this size.
        num, seed: shapes only.
        download: torchvision's sources only: fetch what is not there.
        label_key: huggingface only: the column of labels.

    Raises:
        UserError: unknown name, an option that this source does not have, or data that is missing or damaged.
    """
    if name not in SOURCES:
        raise UserError(f"unknown source {name!r}: choose one of {', '.join(SOURCES)}")
    given = {
        "root": root,
        "split": split,
        "num": num,
        "seed": seed,
        "download": download or None,
        "label_key": label_key,
    }
    for option, value in given.items():
        if value is not None and option not in SOURCES[name]:
            raise UserError(f"--{option.replace('_', '-')} means nothing for the source {name}: leave it away")
    if name == "digits":
        return Digits(size)
    if name == "shapes":
        return Shapes(num, seed, size)
    if name == "huggingface":
        from ddpm_dist.data.huggingface_source import open_huggingface

        if root is None:
            raise UserError("--root is missing: name the folder that holds the data set")
        return open_huggingface(Path(root), split, label_key)
    if name == "folder":
        if root is not None and os.path.isfile(root):
            from ddpm_dist.data.archive_source import open_archive

            return open_archive(Path(root))
        return open_folder(root)
    from ddpm_dist.data.torchvision_sources import open_torchvision

    return open_torchvision(name, Path(root or DEFAULT_ROOT), split or "train", download)


# The sources, and which options each of them takes.
SOURCES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "shapes": ("num", "seed"),
    "cifar10": ("root", "split", "download"),
    "mnist": ("root", "split", "download"),
    "fashion-mnist": ("root", "split", "download"),
    "celeba": ("root", "split", "download"),
    "folder": ("root",),
    "huggingface": ("root", "split", "label_key"),
}


def open_folder(root: str | os.PathLike | None) -> Files:
    """Images in a folder: one subfolder per class (labels by sorted name), or flat and unlabelled.

    Names sort by code point, so "10" stands before "9". Hidden files and folders are passed over without a word, files
    that are no images with a note. Links are followed. Only one level of class folders is read.

    Raises:
        UserError: the folder is missing or holds no images, an empty class, or images beside or below class folders.
    """
    if root is None:
        raise UserError("--root is missing: name the folder that holds the images")
    root = Path(root)
    files, folders, other = _listing(root)
    if files and folders:
        raise UserError(
            f"{printable(root)} holds images ({printable(files[0].name)}) beside folders "
            f"({printable(folders[0].name)}): use one folder per class, or only images for unlabelled data"
        )
    if not folders:
        if not files:
            raise UserError(f"no images in {printable(root)}: expected one folder per class, or image files")
        source = Files("folder", files, None, None)
    else:
        source, skipped = _class_folders(root, folders)
        other = other + skipped
    if other:
        example = printable(other[0].relative_to(root))
        source.notes.append(f"passed over {len(other)} files that are no images (such as {example})")
    return source


def _class_folders(root: Path, folders: list[Path]) -> tuple[Files, list[Path]]:
    paths, labels, other = [], [], []
    for label, folder in enumerate(folders):
        _check_class_name(folder)
        files, below, skipped = _listing(folder)
        if below:
            raise UserError(
                f"{printable(folder)} holds a folder ({printable(below[0].name)}): classes are one level deep; "
                f"was --root {printable(folder)} meant?"
            )
        if not files:
            raise UserError(f"the class folder {printable(folder)} holds no images: remove it, or fill it")
        paths += files
        labels += [label] * len(files)
        other += skipped
    return Files("folder", paths, labels, [folder.name for folder in folders]), other


def _check_class_name(folder: Path) -> None:
    if not folder.name.isprintable():
        raise UserError(f"the class folder {printable(folder)} has unprintable characters in its name: rename it")


def _listing(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Image files, folders and other files, each sorted by name. A broken link counts by its name."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name)
            kinds = [entry.is_dir() for entry in entries]
    except OSError as error:
        raise UserError(f"the folder {printable(folder)} cannot be read: {error.strerror}") from None
    files, folders, other = [], [], []
    for entry, is_folder in zip(entries, kinds, strict=True):
        path = folder / entry.name
        kind = folders if is_folder else files if path.suffix.lower() in SUFFIXES else other
        kind.append(path)
    return files, folders, other


def printable(path: str | os.PathLike) -> str:
    """A path as text that any terminal and any log can take."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)[1:-1]


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _enlarge(pixels: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
