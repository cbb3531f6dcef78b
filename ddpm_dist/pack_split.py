"""Images held out for validation (``--split-validation``), and images that are there more than once.

On which side an image falls depends on nothing but the bytes that are stored, so both copies of an image fall on the same side: the two
folders share no sample, whatever the workers, parts and order. The share is met as by tossing a coin for every different image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddpm_dist.data.index_file import checksum
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError

SHOWN = 3


def validation_folder(out: Path) -> Path:
    """Where the images that are held out go: beside ``out``."""
    return out.with_name(out.name + "-validation")


def check_share(share: float | None) -> None:
    """Raises UserError unless it is None or in 0..1, both ends excluded."""
    if share is not None and not 0 < share < 1:
        raise UserError(f"--split-validation must lie between 0 and 1 (0.02 holds out one image in 50), found {share}")


def is_held_out(data: bytes, share: float) -> bool:
    """Whether the image with these stored bytes belongs to validation."""
    return checksum(data) < int(share * 2**64)


def no_validation(out: Path) -> UserError:
    """What is wrong when nothing was held out."""
    return UserError(
        f"no image was held out for {validation_folder(out)}: too few images for this share, raise --split-validation"
    )


def duplicates(index: Index) -> list[str]:
    """A note about samples whose image is stored byte for byte before them, or nothing."""
    checksums = index.samples["checksum"]
    first, inverse = np.unique(checksums, return_index=True, return_inverse=True)[1:]
    again = np.flatnonzero(first[inverse] != np.arange(len(checksums)))  # return_index names the first of equals
    if not len(again):
        return []
    shown = [f"{index.key_of(int(k))} as {index.key_of(int(first[inverse[k]]))}" for k in again[:SHOWN]]
    more = ", ..." if len(again) > SHOWN else ""
    return [
        f"{len(again)} images in {index.folder} are the same as an earlier one, byte for byte ({', '.join(shown)}{more})"
    ]
