"""How much arithmetic a training image costs and how much a device can do, for MFU."""

from __future__ import annotations

from typing import Any

import torch

# Dense bf16 matrix rates from the vendors' data sheets, FLOP/s.
_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
    "4090": 165e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float:
    """Nominal dense bf16 FLOP/s of a GPU, 0 where it is not known (and on CPUs)."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), 0.0)


def forward_flops(name: str, keywords: dict[str, Any]) -> int:
    """FLOP (2 per multiply-add) of one forward pass of one image, counted by torch on a network without data."""
    from torch.utils.flop_counter import FlopCounterMode

    from ddpm_dist.models import build_model

    with torch.device("meta"):
        twin = build_model(name, **keywords).eval()  # dropout costs nothing that is counted
        size = keywords["image_size"]
        x = torch.empty(1, keywords["in_channels"], size, size)
        t = torch.empty(1, dtype=torch.int64)
        y = torch.empty(1, dtype=torch.int64) if keywords["num_classes"] else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(x, t, y)
    return counter.get_total_flops()


def training_flops(name: str, keywords: dict[str, Any]) -> int:
    """FLOP of one training image: forward plus a backward pass of twice its cost."""
    return 3 * forward_flops(name, keywords)
