"""Keeping the image that a prediction implies inside the range of pixel values."""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLDINGS = ("none", "clip", "dynamic")


def threshold(x0: Tensor, kind: str, value_range: tuple[float, float] | list[float], percentile: float) -> Tensor:
    """x0 (B, C, H, W) floating point inside ``value_range``, or as it is ("none").

    "clip" cuts values off (as the code of Ho et al. 2020 does): it stops contrast from running away under guidance or with few steps.
    "dynamic" takes, for each image, the ``percentile`` (0..1) of the distances from the middle of the range; where it lies outside
    of the range, the image is clipped there and scaled back into the range (Saharia et al. 2022, arXiv 2205.11487, section 2.3).
    """
    if kind == "none":
        return x0
    low, high = value_range
    if kind == "clip":
        return x0.clamp(low, high)
    middle, half = (low + high) / 2, (high - low) / 2
    centred = x0 - middle
    limit = _quantile(centred.abs().flatten(1), percentile).clamp(min=half).view(-1, 1, 1, 1)
    return middle + torch.minimum(torch.maximum(centred, -limit), limit) * (half / limit)


def _quantile(rows: Tensor, q: float) -> Tensor:
    """Of each row, with linear interpolation; (B, N) -> (B,). torch.quantile takes 16 million elements only."""
    position = q * (rows.shape[1] - 1)
    lower = int(position)
    ordered = rows.sort(dim=1).values
    upper = min(lower + 1, rows.shape[1] - 1)
    return torch.lerp(ordered[:, lower], ordered[:, upper], position - lower)
