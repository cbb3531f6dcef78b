"""Distributed training of class-conditional diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(path: str) -> nn.Module:
    """The network of a weights file (``model.safetensors``), in eval mode, ready for ``ddpm_dist.diffusion.sample``.

    It carries its noise schedule as ``network.schedule``, its pixel range as ``network.value_range`` and the names of its labels as
    ``network.classes`` (None where the file has none). Raises UserError for a file that is not one of ours or is damaged.
    """
    from ddpm_dist.models.weights import load_described
    from ddpm_dist.sample_source import schedule_of

    network, says = load_described(path)
    network.schedule = schedule_of(says.diffusion)
    network.value_range = says.diffusion.get("range", [-1.0, 1.0])
    network.classes = says.classes
    return network.eval()
