"""Pictures of images: grids (PNG) and the reverse process (GIF), written aside and renamed.

Grids with words around them are made in ``captions.py``, the curves of a run in ``loss_curve.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_dist.tracking.metrics import Workplace

PADDING = 2  # pixels between images and around them
BACKGROUND = 255
VISIBLE = 56  # images are enlarged to about this many pixels
VISIBLE_GIF = 40  # noise does not compress: twice the size is four times the bytes
GREYS, COLORS = 16, 64  # of a GIF


def save_grid(
    images: np.ndarray,
    path: Path,
    columns: int,
    row_labels: list[str] | None = None,
    scale: int | None = None,
    workplace: Workplace | None = None,
) -> None:
    """Save images as a PNG grid, row by row.

    Args:
        images: (N, C, H, W) uint8 with C = 1 or 3; the last row may be short.
        path: PNG file; its folder is made.
        columns: images per row.
        row_labels: one text per row, written on its left.
        scale: integer enlargement without smoothing; None picks one that makes small images visible.
        workplace: where the file is made before it is renamed to ``path``; None: beside it.

    Raises:
        ValueError: wrong dtype, shape, columns, scale or number of labels.
        OSError: the file cannot be written; an older file at ``path`` stays whole.
    """
    picture = grid(images, columns, scale, row_labels)
    write_aside(path, lambda stream: picture.save(stream, format="PNG", optimize=True), workplace)


def save_gif(
    frames: Sequence[np.ndarray],
    path: Path,
    columns: int,
    milliseconds: int = 80,
    hold_last: int = 1500,
    scale: int | None = None,
    row_labels: list[str] | None = None,
) -> None:
    """Save a sequence of image sets as a GIF that loops for ever.

    Args:
        frames: each (N, C, H, W) uint8, all of one shape; at least one.
        path, columns, scale, row_labels: as for ``save_grid``; the default scale is smaller.
        milliseconds: time per frame (GIF counts in steps of 10).
        hold_last: time for the last frame.

    Raises:
        ValueError, OSError: as for ``save_grid``, and ValueError for no frames or frames of different shapes.
    """
    if not frames:
        raise ValueError("a GIF needs at least one frame")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError("all frames of a GIF need the same shape")
    if scale is None:
        scale = enlargement(frames[0], VISIBLE_GIF)
    save_frames([grid(frame, columns, scale, row_labels) for frame in frames], path, milliseconds, hold_last)


def save_frames(pictures: Sequence[Image.Image], path: Path, milliseconds: int = 80, hold_last: int = 1500) -> None:
    """Save pictures of one size and mode (L or RGB) as ``save_gif`` does its grids. Raises OSError."""
    pictures = _few_colors(list(pictures))
    times = [milliseconds] * (len(pictures) - 1) + [hold_last]
    options = {"save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0, "optimize": False}
    write_aside(path, lambda stream: pictures[0].save(stream, format="GIF", **options))


def enlargement(images: np.ndarray, visible: int) -> int:
    """The integer factor that brings (..., H, W) images closest to ``visible`` pixels, at least 1."""
    return max(1, round(visible / max(images.shape[-2:])))


def grid(
    images: np.ndarray, columns: int, scale: int | None = None, row_labels: list[str] | None = None
) -> Image.Image:
    """The images as one picture, mode L for one channel and RGB for three; arguments and errors as in ``save_grid``."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), not {images.dtype} {images.shape}")
    count, channels, height, width = images.shape
    if scale is None:
        scale = enlargement(images, VISIBLE)
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, not {columns} and {scale}")
    rows = -(-count // columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows")
    cell_h, cell_w = height * scale, width * scale
    canvas = np.full(
        (rows * (cell_h + PADDING) + PADDING, columns * (cell_w + PADDING) + PADDING, channels), BACKGROUND, np.uint8
    )
    for index, image in enumerate(images):
        top = PADDING + index // columns * (cell_h + PADDING)
        left = PADDING + index % columns * (cell_w + PADDING)
        large = image.repeat(scale, axis=1).repeat(scale, axis=2)
        canvas[top : top + cell_h, left : left + cell_w] = large.transpose(1, 2, 0)
    picture = Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)
    return picture if row_labels is None else _with_labels(picture, row_labels, cell_h)


def _with_labels(picture: Image.Image, labels: list[str], cell: int) -> Image.Image:
    """The picture with a column of texts on its left, each in the middle of its row of ``cell`` pixels."""
    font = ImageFont.load_default(size=max(10, min(20, cell // 3)))
    margin = round(max(font.getlength(label) for label in labels)) + 12
    wide = Image.new(picture.mode, (picture.width + margin, picture.height), "white")
    wide.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(wide)
    for row, label in enumerate(labels):
        middle = PADDING + row * (cell + PADDING) + cell / 2
        draw.text((margin - 6, middle), label, fill="black", font=font, anchor="rm")
    return wide


def _few_colors(pictures: list[Image.Image]) -> list[Image.Image]:
    """The pictures with one common palette, undithered: dither and noise would make the file large."""
    if pictures[0].mode == "L":
        step = 255 / (GREYS - 1)
        palette = np.repeat(np.round(np.arange(GREYS) * step), 3).astype(np.uint8).tobytes()
        indexed = []
        for picture in pictures:
            image = Image.fromarray(np.round(np.asarray(picture) / step).astype(np.uint8), mode="P")
            image.putpalette(palette)
            indexed.append(image)
        return indexed
    # The last frames matter most, so the palette is made from a few frames that include the last.
    chosen = [pictures[len(pictures) // 2], pictures[3 * len(pictures) // 4], pictures[-1], pictures[-1]]
    sheet = Image.new("RGB", (pictures[0].width, pictures[0].height * len(chosen)))
    for index, picture in enumerate(chosen):
        sheet.paste(picture, (0, index * picture.height))
    palette = sheet.quantize(COLORS, dither=Image.Dither.NONE)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]


def write_aside(path: Path, save: Callable[[BinaryIO], object], workplace: Workplace | None = None) -> None:
    """Make a file with ``save``, aside, and rename it to ``path``; its folder is made. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".incomplete") if workplace is None else workplace.aside(path)
    try:
        with open(aside, "wb") as stream:
            save(stream)
        if workplace is None:
            os.replace(aside, path)
        else:
            workplace.place(path)
    finally:
        aside.unlink(missing_ok=True)
