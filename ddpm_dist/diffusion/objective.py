"""The training objective: what the network predicts and how far it is off."""

from __future__ import annotations

import torch
from torch import Tensor


def mse_per_image(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image: (B, C, H, W) twice -> (B,) float32 (Ho et al. 2020, equation 14).

    Kept per image so that the caller can average over a global batch whatever its split.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def drop_labels(labels: Tensor, dropped: Tensor) -> Tensor:
    """Labels (B,) int64 with -1 where ``dropped`` (B,) bool, for classifier-free guidance (Ho & Salimans 2022, algorithm 1)."""
    return torch.where(dropped, -1, labels)
