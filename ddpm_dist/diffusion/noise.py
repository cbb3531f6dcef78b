"""The noise of the forward process and of the samplers, drawn without state."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_dist import philox


def draw(
    kind: str,
    seed: int | Tensor,
    stream: int,
    step: int | Tensor,
    slots: Tensor,
    shape: tuple[int, ...],
    value_range: tuple[float, float] | list[float],
) -> Tensor:
    """Noise of ``kind``, float32 (len(slots), *shape): "gaussian" with mean 0 and variance 1, or "uniform" over ``value_range``.

    The other arguments are those of ``philox.normal``.
    """
    if kind == "gaussian":
        return philox.normal(seed, stream, step, slots, shape)
    low, high = value_range
    words = philox.uint32(seed, stream, step, slots, torch.Size(shape).numel())
    # 24 bits: every value is exact in float32, and 1 is never reached.
    unit = (words >> 8).to(torch.float32) * 2.0**-24
    return (low + (high - low) * unit).reshape(-1, *shape)
