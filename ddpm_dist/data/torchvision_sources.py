"""Sources that torchvision downloads and reads: CIFAR-10, MNIST, Fashion-MNIST and CelebA."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_dist.data.encode import Item
from ddpm_dist.data.sources import Files, Source
from ddpm_dist.errors import UserError

CLASS_NAMES = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion-mnist": "FashionMNIST", "celeba": "CelebA"}
SPLITS = {"celeba": ("train", "valid", "test", "all")}


class Arrays:
    """Images that lie in memory.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        labels: (N,) integers.
    """

    image_format = "jpg"

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> None:
        self.name, self.classes = name, classes
        self.notes: list[str] = []
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def item(self, position: int) -> Item:
        load = functools.partial(Image.fromarray, self._images[position])
        return Item(f"{self.name}[{position}]", int(self._labels[position]), load)

    def channels(self) -> int:
        return 1 if self._images.ndim == 3 else 3


def open_torchvision(name: str, root: Path, split: str, download: bool) -> Source:
    """Open one of torchvision's data sets below ``root``.

    Raises:
        UserError: unknown split; the data is missing or damaged, with torchvision's reason.
    """
    splits = SPLITS.get(name, ("train", "test"))
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}: choose one of {', '.join(splits)}")
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UserError(f"{name} is read by torchvision, which cannot be imported: {error}") from None
    kind = getattr(datasets, CLASS_NAMES[name])
    options = {"split": split, "target_type": []} if name == "celeba" else {"train": split == "train"}
    try:
        data = kind(str(root), download=download, **options)
    except Exception as error:  # damaged files make torchvision raise nearly anything
        raise UserError(_missing(name, root, download, error)) from None
    if name == "celeba":
        pictures = root / "celeba" / "img_align_celeba"
        return Files("celeba", [pictures / filename for filename in data.filename], None, None)
    labels = np.asarray(data.targets)
    classes = [str(digit) for digit in range(10)] if name == "mnist" else list(data.classes)
    if len(labels) != len(data.data):
        raise UserError(f"{name} below {root}: {len(data.data)} images but {len(labels)} labels; fetch it again")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        position = int(wrong[0])
        raise UserError(
            f"{name}[{position}] below {root} has label {int(labels[position])}, outside 0..{len(classes) - 1}; "
            "fetch the data again"
        )
    return Arrays(name, np.asarray(data.data), labels, classes)


def _missing(name: str, root: Path, download: bool, error: Exception) -> str:
    reason = str(error).strip() or type(error).__name__
    if download:
        return f"{name} could not be downloaded to {root}: {reason}"
    return f"no usable {name} below {root}: add --download to fetch it, or name another --root (torchvision: {reason})"
