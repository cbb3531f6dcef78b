"""A contact sheet: random samples of every class, which is what shows first that labels are wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_dist.data.shard_source import read_part
from ddpm_dist.errors import UserError
from ddpm_dist.index_build import Result
from ddpm_dist.tracking.captions import captioned, save_picture

COLUMNS, MAX_ROWS, SIDE = 8, 24, 64
TRIES = 3  # times as many samples are drawn, for those that cannot be decoded


def save_sheet(result: Result, path: Path, seed: int, title: str) -> int:
    """Draw, decode and save. Returns how many images are on it.

    One row per class, of many classes a random choice; without labels simply random samples. The same seed and samples give the
    same picture.

    Raises:
        UserError: not one sample can be shown, or the file cannot be written.
    """
    random = np.random.default_rng(seed)
    rows = _draw(result, random)
    shown, labels = [], []
    for label, places in rows:
        images = []
        for place in places:
            if len(images) == COLUMNS:
                break
            image = _image(result, place)
            if image is not None:
                images.append(image)
        if images:
            blank = np.full((3, SIDE, SIDE), 255, np.uint8)
            shown += images + [blank] * (COLUMNS - len(images))
            labels.append(label)
    if not shown:
        raise UserError(f"--sheet {path}: not one sample can be read and decoded")
    picture = captioned(np.stack(shown), COLUMNS, heading=title, row_labels=labels if any(labels) else None)
    try:
        save_picture(picture, path)
    except OSError as error:
        raise UserError(f"--sheet {path} cannot be written: {error.strerror or error}") from None
    return len(labels) * COLUMNS


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
    return [(f"{classes[c]} ({counts[c]:,})"[:40], [p for p in places[c] if p >= 0]) for c in places]


def _image(result: Result, place: int) -> np.ndarray | None:
    """(3, SIDE, SIDE) uint8, the whole image on white; None if it cannot be read."""
    row = result.samples[place : place + 1][0]
    try:
        data = read_part(result.location(place), int(row["offset"]), int(row["size"]))
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "PPM")) as image:
            image.draft("RGB", (SIDE, SIDE))
            image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    except Exception:  # Pillow raises many types on damaged files; the sheet shows others instead
        return None
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(canvas).transpose(2, 0, 1)
