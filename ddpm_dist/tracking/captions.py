"""Grids of images with words around them: names above columns, words beside rows, a heading; put together into one picture.

Used by ``ddpm_dist.sample`` for generated above real rows, for the steps of the reverse process and for the forward process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_dist.tracking.pictures import PADDING, VISIBLE, enlargement, grid, write_aside

FONT, SMALLEST = 15, 9  # pixels; names that are too long for their column are written smaller, then cut
MARGIN = 6  # pixels between words and images


def captioned(
    images: np.ndarray,
    columns: int,
    heading: str | None = None,
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """A grid with words around it, black on white.

    Args:
        images: (N, C, H, W) uint8 with C = 1 or 3, row by row; the last row may be short.
        columns: images per row.
        heading: a line above everything, on the left.
        row_labels: one text per row, on its left.
        column_labels: one text per column, above it. What is wider than a column is written smaller, then cut.
        scale: integer enlargement without smoothing; None picks one that makes small images visible.

    Raises:
        ValueError: wrong dtype, shape, columns or scale, or another number of labels than rows or columns.
    """
    images = np.asarray(images)
    scale = scale or enlargement(images, VISIBLE)
    picture = grid(images, columns, scale)
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    rows = -(-len(images) // columns)
    for labels, count, what in ((row_labels, rows, "row"), (column_labels, columns, "column")):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {what} labels for {count} {what}s")
    font = _font(FONT, "".join([heading or "", *(row_labels or [])]))
    left = round(max(font.getlength(text) for text in row_labels)) + 2 * MARGIN if row_labels else 0
    line = FONT + MARGIN
    top = line * ((heading is not None) + (column_labels is not None))
    wide = max(left + picture.width, round(font.getlength(heading or "")) + 2 * MARGIN)
    canvas = Image.new(picture.mode, (wide, top + picture.height), "white")
    canvas.paste(picture, (left, top))
    draw = ImageDraw.Draw(canvas)
    if heading is not None:
        draw.text((left + PADDING, line / 2), heading, fill="black", font=font, anchor="lm")
    for row, text in enumerate(row_labels or []):
        middle = top + PADDING + row * (height + PADDING) + height / 2
        draw.text((left - MARGIN, middle), text, fill="black", font=font, anchor="rm")
    for column, text in enumerate(column_labels or []):
        middle = left + PADDING + column * (width + PADDING) + width / 2
        text, fitting = _fitted(text, width)
        draw.text((middle, top - MARGIN / 2), text, fill="black", font=fitting, anchor="ms")
    return canvas


def _fitted(text: str, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a font with which it is at most ``width`` pixels wide."""
    for size in range(FONT, SMALLEST - 1, -1):
        font = _font(size, text)
        if font.getlength(text) <= width:
            return text, font
    while len(text) > 1 and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + "..", font


def drawable(text: str) -> str:
    """The text with \\xXX, \\uXXXX or \\UXXXXXXXX for every character that no font here has: it would be drawn as a box, or not at all."""
    return "".join(letter if _has(letter) else letter.encode("unicode_escape").decode("ascii") for letter in text)


@functools.lru_cache(maxsize=1 << 14)
def _has(letter: str) -> bool:
    if letter.isascii() or not letter.isprintable():
        return letter.isprintable()
    font = _font(FONT, letter)
    drawn, box = font.getmask(letter), font.getmask("\U0010ffff")
    return 0 not in drawn.size and (drawn.size, bytes(drawn)) != (box.size, bytes(box))


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has little beside ASCII; for what is more that of matplotlib: Latin, Greek, Cyrillic, Arabic."""
    return ImageFont.load_default(size) if text.isascii() else _wider(size)


@functools.lru_cache(maxsize=16)
def _wider(size: int) -> ImageFont.FreeTypeFont:
    found = importlib.util.find_spec("matplotlib")  # which need not be imported for that
    for folder in (found and found.submodule_search_locations) or []:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(str(Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    return ImageFont.load_default(size)


def below(pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures of one mode below each other, their left edges in line, ``gap`` white pixels between them."""
    wide = max(picture.width for picture in pictures)
    canvas = Image.new(pictures[0].mode, (wide, sum(p.height for p in pictures) + gap * (len(pictures) - 1)), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height + gap
    return canvas


def beside(pictures: list[Image.Image], gap: int = 16) -> Image.Image:
    """Pictures of one mode side by side, their lower edges in line, ``gap`` white pixels between them."""
    high = max(picture.height for picture in pictures)
    canvas = Image.new(pictures[0].mode, (sum(p.width for p in pictures) + gap * (len(pictures) - 1), high), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, high - picture.height))
        left += picture.width + gap
    return canvas


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save as PNG, aside and renamed. OSError if it cannot be written; an older file at ``path`` stays whole."""
    write_aside(path, lambda stream: picture.save(stream, format="PNG", optimize=True))
