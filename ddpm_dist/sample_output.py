"""What sampling shows and writes beside a folder of images: progress, grids, arrays, GIFs and the picture of the steps."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_dist.errors import UserError
from ddpm_dist.previews import class_rows
from ddpm_dist.tracking.captions import below, beside, captioned, save_picture
from ddpm_dist.tracking.pictures import VISIBLE_GIF, enlargement, grid, save_frames, save_grid

LONGEST = 20  # columns of a grid that compares


def targets(a: argparse.Namespace) -> list[Path]:
    """The files that were asked for."""
    return [*a.out, *(path for path in (a.gif, a.steps_picture, a.forward_process) if path)]


def check_targets(a: argparse.Namespace) -> None:
    """Find out before the work whether its results can be written. UserError naming the target."""
    for path in targets(a):
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file, or use --out-dir for one PNG per image")
    for folder in {path.parent for path in targets(a)} | ({a.out_dir} if a.out_dir else set()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror}; choose another place for the images"
            ) from None


class Bar:
    """Progress in reverse steps on a terminal, images/sec beside it."""

    def __init__(self, steps: int, is_main: bool) -> None:
        from tqdm import tqdm

        show = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=steps, unit="step", disable=not show, desc="sampling")
        self._start, self._images = time.monotonic(), 0

    def step(self) -> None:
        self._bar.update()

    def done(self, images: int) -> None:
        self._images += images
        self._bar.set_postfix_str(f"{self._images / (time.monotonic() - self._start):.2f} images/sec per process")

    def close(self) -> None:
        self._bar.close()


def write_arrays(path: Path, images: np.ndarray, labels: np.ndarray, scales: list[float]) -> None:
    """The arrays images (N, C, H, W) uint8 and labels (N,) as .npz, aside and renamed.

    images: (S, num, C, H, W), labels: (num,), one set of images for each of S guidance scales. With several of them N is S num,
    scale after scale, and a third array says which: guidance (N,).
    """
    arrays = {"images": images.reshape(-1, *images.shape[2:]), "labels": np.tile(labels, len(scales))}
    if len(scales) > 1:
        arrays["guidance"] = np.repeat(np.array(scales), len(labels))
    aside = path.with_name(path.name + ".incomplete")
    try:
        with open(aside, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_grid(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    scales: list[float],
    names: list[str] | None,
    real: np.ndarray | None,
) -> None:
    """The images as PNG. Of one scale and without real ones: a row for each class. Else they are compared: a column for each class,
    below each other the images of every guidance scale and the real ones.

    images: (S, num, C, H, W) uint8 for S scales; labels: (num,), -1 unlabelled; names: of the classes; real: (num, C, H, W) uint8 of
    the same labels, or None.
    """
    if len(scales) == 1 and real is None:
        picture, columns = class_rows(images[0], labels)
        save_grid(picture, path, columns)
        return
    labelled = labels.max(initial=-1) >= 0
    sets = [
        (f"generated, {guidance_words(s)}" if labelled else "generated", own)
        for s, own in zip(scales, images, strict=True)
    ]
    if real is not None:
        sets.append(("real", real))
    blocks = []
    for places, classes in class_columns(labels):
        shown = None
        if len({label for label in classes if label >= 0}) > 1:
            shown = [(names[label] if names else str(label)) if label >= 0 else "" for label in classes]
        for number, (heading, own) in enumerate(sets):
            cells = np.where((places >= 0).reshape(-1, 1, 1, 1), own[places.flatten()], np.uint8(255))
            blocks.append(captioned(cells, places.shape[1], heading, column_labels=shown if number == 0 else None))
    save_picture(below(blocks), path)


def guidance_words(scale: float) -> str:
    """A guidance scale in both conventions."""
    return f"guidance {scale:g} (w = {scale - 1:g})"


def class_columns(labels: np.ndarray) -> list[tuple[np.ndarray, list[int]]]:
    """Lay images out so that every column shows one class, in the order in which the classes come.

    Few classes get several columns each, so that the grid is nearly a square; with more than fit into 20 columns there are several
    grids. Each: positions in ``labels`` (rows, columns), -1 for a blank; and the label of every column, -1 but for a class's first.
    """
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    classes, most = labels[np.sort(first)].tolist(), int(counts.max())
    wide = max(1, min(LONGEST, most, round(len(labels) ** 0.5 / len(classes))))  # columns of a class
    rows, grids = -(-most // wide), []
    for begin in range(0, len(classes), LONGEST // wide):
        some = classes[begin : begin + LONGEST // wide]
        places = np.full((rows, len(some) * wide), -1, dtype=np.int64)
        for number, label in enumerate(some):
            own = np.full(rows * wide, -1, dtype=np.int64)
            found = np.flatnonzero(labels == label)
            own[: len(found)] = found
            places[:, number * wide : (number + 1) * wide] = own.reshape(rows, wide)
        grids.append((places, [label if j == 0 else -1 for label in some for j in range(wide)]))
    return grids


def write_gif(path: Path, frames: list[list[np.ndarray]], labels: np.ndarray, scales: list[float]) -> None:
    """The reverse process. frames: for each guidance scale the frames, (B, C, H, W) uint8, of the first B images; the scales run
    side by side."""
    shown = len(frames[0][0])
    shown -= shown % len(np.unique(labels[:shown]))  # full columns
    large = enlargement(frames[0][0], VISIBLE_GIF)

    def picture(images: np.ndarray, scale: float) -> Image.Image:
        arranged, columns = class_rows(images[:shown], labels[:shown])
        return (
            grid(arranged, columns, large)
            if len(scales) == 1
            else captioned(arranged, columns, guidance_words(scale), scale=large)
        )

    moments = zip(*frames, strict=True)
    save_frames([beside([picture(*pair) for pair in zip(now, scales, strict=True)]) for now in moments], path)


def write_steps(
    path: Path,
    seen: list[dict[int, np.ndarray]],
    x0: list[dict[int, np.ndarray]],
    timesteps: list[int],
    scales: list[float],
) -> None:
    """The reverse process step by step: a row for each shown step, on the left x as the network sees it, on the right the image it
    predicts. seen, x0: for each guidance scale, (B, C, H, W) uint8 by the number of the step (from 0)."""
    parts = []
    for scale, before, predicted in zip(scales, seen, x0, strict=True):
        words = [f"step {k + 1}, t = {timesteps[k]}" for k in before]
        left, right = (np.concatenate(list(images.values())) for images in (before, predicted))
        columns = len(next(iter(before.values())))
        more = f", {guidance_words(scale)}" if len(scales) > 1 else ""
        parts.append(
            beside([
                captioned(left, columns, f"x, as the network sees it{more}", words),
                captioned(right, columns, "predicted image x0"),
            ])
        )  # fmt: skip
    save_picture(below(parts, gap=16), path)
