"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def guided(
    network: Network, labels: Tensor | None, scale: float, rescale: float = 0.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (x, t) -> u + scale (c - u), with u the prediction without labels and c the one with them; float32.

    x (B, C, H, W), t (B,), labels (B,) int64. scale 0 is unconditional, 1 conditional (one forward each); everything else
    is one forward of a doubled batch. In the (1 + w) convention of the paper, scale = 1 + w.
    rescale 0..1: how far the standard deviation of each guided prediction is brought back to that of c, which keeps strong guidance
    from over-exposing images (Lin et al. 2023, arXiv 2305.08891, equations 15 and 16; they use 0.7).
    """
    if labels is None or scale == 0:
        return lambda x, t: network(x, t, None).float()
    if scale == 1:
        return lambda x, t: network(x, t, labels).float()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, -1)])
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        prediction = unconditional + scale * (conditional - unconditional)
        if rescale:
            ratio = _std(conditional) / _std(prediction).clamp(min=1e-12)
            prediction = prediction * (1.0 + rescale * (ratio - 1.0))
        return prediction

    return predict


def _std(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)
