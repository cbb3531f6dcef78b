"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def guided(network: Network, labels: Tensor | None, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (x, t) -> u + scale (c - u), with u the prediction without labels and c the one with them.

    x (B, C, H, W), t (B,), labels (B,) int64. scale 0 is unconditional, 1 conditional (one forward each); everything else
    is one forward of a doubled batch. In the (1 + w) convention of the paper, scale = 1 + w.
    """
    if labels is None or scale == 0:
        return lambda x, t: network(x, t, None)
    if scale == 1:
        return lambda x, t: network(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, -1)])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return predict
