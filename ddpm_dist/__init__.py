"""Distributed training of class-conditional diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(path: str) -> nn.Module:
    """The network of a weights file (``weights.safetensors``), in eval mode, ready for ``ddpm_dist.diffusion.sample``.

    It carries its noise schedule as ``network.schedule`` and its pixel range as ``network.value_range``. Raises UserError for a
    file that is not one of ours or is damaged.
    """
    from ddpm_dist.models.weights import load_weights
    from ddpm_dist.sample import _schedule

    network, diffusion = load_weights(path)
    network.schedule = _schedule(diffusion)
    network.value_range = diffusion.get("range", [-1.0, 1.0])
    return network.eval()
