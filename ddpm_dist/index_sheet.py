"""A contact sheet: random samples of every class, which is what shows first that labels are wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_dist.data.shard_source import NoParts, read_part
from ddpm_dist.errors import UserError
from ddpm_dist.index_build import Result
from ddpm_dist.tracking.captions import captioned, drawable, save_picture

COLUMNS, MAX_ROWS, SIDE = 8, 24, 64
NAME = 32  # characters of a class's name
GIVE_UP = 16  # samples of which not one could be read: a server that answers nobody
TRIES = 3  # times as many samples are drawn, for those that cannot be decoded


def save_sheet(result: Result, path: Path, seed: int, names: str) -> str:
    """Draw, decode and save. Returns "", or how many samples could not be shown and why.

    One row per class, of many classes a random choice; without labels simply random samples. The same seed and samples give the
    same picture.

    Args:
        names: what the samples are from, for the heading; without credentials.

    Raises:
        UserError: not one sample can be shown, or the file cannot be written.
    """
    random = np.random.default_rng(seed)
    rows, reader = _draw(result, random), _Reader(result)
    shown, labels = [], []
    for label, places in rows:
        images: list[np.ndarray] = []
        for place in places:
            if len(images) == COLUMNS:
                break
            image = reader.image(place)
            if image is not None:
                images.append(image)
        if images:
            blank = np.full((3, SIDE, SIDE), 255, np.uint8)
            shown += images + [blank] * (COLUMNS - len(images))
            labels.append(label)
    if not shown:
        raise UserError(f"--sheet {path}: not one sample can be read and decoded ({reader.reason})")
    heading = drawable(f"{len(result.samples):,} samples of {names}")[:100]
    if result.classes is not None and len(labels) < len(result.classes):
        heading = f"{len(labels):,} of {len(result.classes):,} classes; {heading}"
    picture = captioned(np.stack(shown), COLUMNS, heading=heading, row_labels=labels if any(labels) else None)
    try:
        save_picture(picture, path)
    except OSError as error:
        raise UserError(f"--sheet {path} cannot be written: {error.strerror or error}") from None
    return f"{reader.failed:,} samples could not be shown: {reader.reason}" if reader.failed else ""


def _caption(number: int, name: str, count: int) -> str:
    """A class's name, as far as there is room and the font has it, and always its count."""
    text = drawable(name)
    if len(text) > NAME:
        text = f"class {number}" if text != name else name[: NAME - 2] + ".."
    return f"{text} ({count:,})"


def _draw(result: Result, random: np.random.Generator) -> list[tuple[str, list[int]]]:
    """Rows: caption, and the samples to try."""
    count, classes = len(result.samples), result.classes
    if classes is None:
        picked = (
            random.permutation(count)[: TRIES * COLUMNS * 6]
            if count < 1 << 24
            else random.integers(0, count, TRIES * COLUMNS * 6)
        )
        return [("", picked[n::6].tolist()) for n in range(6)]
    counts = np.zeros(len(classes), np.int64)
    for block in result.samples.blocks():
        counts += np.bincount(block["label"], minlength=len(classes))
    present = np.flatnonzero(counts)
    if len(present) > MAX_ROWS:
        present = np.sort(random.choice(present, MAX_ROWS, replace=False))
    # Which of a class's samples, counted within the class; then their places, by one pass over the table.
    chosen = {int(c): random.permutation(min(counts[c], 1 << 20))[: TRIES * COLUMNS] for c in present}
    places: dict[int, list[int]] = {c: [-1] * len(which) for c, which in chosen.items()}
    before, begin = np.zeros(len(classes), np.int64), 0
    for block in result.samples.blocks():
        for c, which in chosen.items():
            at = np.flatnonzero(block["label"] == c)
            for n in np.flatnonzero((which >= before[c]) & (which < before[c] + len(at))):
                places[c][n] = begin + int(at[which[n] - before[c]])
            before[c] += len(at)
        begin += len(block)
    return [(_caption(c, classes[c], int(counts[c])), [p for p in places[c] if p >= 0]) for c in places]


class _Reader:
    """Reads samples. ``failed``: how many it could not; ``reason``: why, of the first."""

    def __init__(self, result: Result) -> None:
        self._result, self._whole_only = result, set()
        self.failed, self.reason, self._read = 0, "", False

    def image(self, place: int) -> np.ndarray | None:
        """(3, SIDE, SIDE) uint8, the whole image on white; None if it cannot be read."""
        row, location = self._result.samples[place : place + 1][0], self._result.location(place)
        if location in self._whole_only or (not self._read and self.failed >= GIVE_UP):
            self.failed += 1
            return None
        try:
            data = read_part(location, int(row["offset"]), int(row["size"]))
        except NoParts as error:  # another sample of it would not fare better
            self._whole_only.add(location)
            return self._missing(str(error))
        except (OSError, UserError) as error:
            return self._missing(getattr(error, "strerror", None) or str(error))
        self._read = True
        try:
            return _drawn(data)
        except Exception:  # Pillow raises many types on damaged files; the sheet shows others instead
            return self._missing("they cannot be decoded")

    def _missing(self, reason: str) -> None:
        self.failed, self.reason = self.failed + 1, self.reason or reason


def _drawn(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "PPM")) as image:
        image.draft("RGB", (SIDE, SIDE))
        image = image.convert("RGB")
    factor = SIDE // max(image.size)
    if factor > 1:  # every pixel as it is, only larger
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(canvas).transpose(2, 0, 1)
