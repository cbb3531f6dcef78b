"""Augmentation as data: which window of an image is used and whether it is mirrored.

Every draw is a function of (seed, epoch, sample), so it is the same for every batch split, world size and decoder.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ddpm_dist import philox

_TRIES = 10
RATIO = (3 / 4, 4 / 3)  # aspect ratios of a random resized crop


def draws(seed: int, epochs: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Uniform float64 numbers in [0, 1) for each (epoch, sample id): shape (len(ids), count)."""
    words = philox.uint32(seed, philox.AUGMENTATION, torch.from_numpy(epochs), torch.from_numpy(ids), count)
    return words.numpy() * 2.0**-32


def windows(
    crop: str, scale: list[float], heights: np.ndarray, widths: np.ndarray, uniform: np.ndarray | None
) -> np.ndarray:
    """The window of each image that is resized to the training size: int32 (B, 4) rows of (top, left, height, width).

    crop "none": the whole image (a non-square one is squashed); "center": the largest centred square;
    "random_resized": a window with a share of the area in ``scale`` and an aspect ratio in 3/4..4/3 (Szegedy et al. 2014,
    "Going deeper with convolutions", section 6), the whole image where ten tries do not fit. ``uniform``: (B, >=40) draws.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    zero = np.zeros_like(heights)
    if crop == "none":
        return np.stack([zero, zero, heights, widths], axis=1).astype(np.int32)
    if crop == "center":
        side = np.minimum(heights, widths)
        return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1).astype(np.int32)
    result = np.stack([zero, zero, heights, widths], axis=1)
    open_ = np.ones(len(heights), dtype=bool)
    for attempt in range(_TRIES):
        u = uniform[:, 4 * attempt : 4 * attempt + 4]
        area = heights * widths * (scale[0] + (scale[1] - scale[0]) * u[:, 0])
        ratio = np.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * u[:, 1])
        w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = open_ & (w > 0) & (h > 0) & (w <= widths) & (h <= heights)
        top = np.minimum((u[:, 2] * (heights - h + 1)).astype(np.int64), heights - h)
        left = np.minimum((u[:, 3] * (widths - w + 1)).astype(np.int64), widths - w)
        result[fits] = np.stack([top, left, h, w], axis=1)[fits]
        open_ &= ~fits
    return result.astype(np.int32)


MIRROR = 4 * _TRIES  # the draw that decides about the mirror image; those behind it change the colours
DRAWS = MIRROR + 1
DRAWS_WITH_COLOURS = DRAWS + 4  # the first DRAWS of them are the same


def colours(strength: list[float], uniform: np.ndarray) -> np.ndarray:
    """float32 (B, 4): factors of brightness, contrast and saturation, and the turn of the hue in degrees.

    strength: for each how far it may go from no change, as torchvision's ColorJitter has it: factors in 1 - s .. 1 + s (not below 0), the
    hue in -s .. s of a whole turn. uniform: (B, DRAWS_WITH_COLOURS).
    """
    change = (2.0 * uniform[:, DRAWS:] - 1.0) * np.asarray(strength)
    change[:, :3] = np.maximum(0.0, 1.0 + change[:, :3])
    change[:, 3] *= 360.0
    return change.astype(np.float32)
