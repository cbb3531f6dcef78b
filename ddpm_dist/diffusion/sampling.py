"""``sample``: from noise to images, as a function of (seed, image index) only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.diffusion.guidance import Network
from ddpm_dist.diffusion.reverse import ReverseProcess, device_of
from ddpm_dist.diffusion.schedule import Schedule


def sample(
    network: Network,
    labels: Tensor | None = None,
    *,
    shape: tuple[int, int, int] | None = None,
    count: int | None = None,
    schedule: Schedule | None = None,
    value_range: tuple[float, float] | list[float] | None = None,
    seed: int = 0,
    first: int = 0,
    indices: Tensor | None = None,
    device: torch.device | str | None = None,
    on_step: Callable[[int, int, Tensor, Tensor], None] | None = None,
    **options: Any,
) -> Tensor:
    """Generate images; float32 (B, C, H, W) in the range the network was trained on, not clipped.

    labels: (B,) int64 on any device, None = unlabelled (then ``count`` says how many). shape: (C, H, W), by default what
    the network says of itself (in_channels, image_size); so are schedule and value_range, else linear betas and [-1, 1]. Image i of the call has the index first + i, or ``indices[i]``;
    its noise is a function of (seed, index, timestep), so a set of images may be split over calls and ranks at will.
    on_step(k, t, x, x0) is called after each evaluation k of the network, at timestep t, with the new x and the predicted image.

    options (of ``reverse.ReverseProcess``, which is the better choice for many batches of the same shape):
        sampler: "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun", or "mixing" for schedule "mixing".
        steps, spacing: how many timesteps and which, see ``spacing.timesteps``; None: all of them.
        eta: noise of "ddim", 0..1. variance: of "ddpm": "beta", "posterior", or a number between them, see ``samplers.ddpm``.
        guidance, guidance_rescale: see ``guidance.guided``. guidance_interval: (lowest, highest) timestep that is guided.
        thresholding, percentile: see ``thresholding.threshold``.
        dtype: of autocast. capture: False runs without a CUDA graph.

    Raises ValueError for unknown names, impossible step counts and what does not go together, NotFinite (a ValueError) for a
    network that answers with NaN.
    """
    schedule = schedule or getattr(network, "schedule", None) or Schedule()
    if device is None:
        device = device_of(network)
    if shape is None:
        shape = (network.in_channels, network.image_size, network.image_size)
    if value_range is None:
        value_range = getattr(network, "value_range", (-1.0, 1.0))
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.dim() != 1 or (labels.is_floating_point() and len(labels)):
            raise ValueError(
                f"labels must be whole numbers, one for each image, not {labels.dtype} {tuple(labels.shape)}"
            )
    if indices is None:
        size = len(labels) if labels is not None else count
        if size is None:
            raise ValueError("say how many images: labels, count or indices")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"count must be a whole number from 0 on, not {size!r}")
        indices = torch.arange(first, first + size)
    indices = torch.as_tensor(indices)
    if len(indices) == 0:
        return torch.empty(0, *shape, device=device)
    process = ReverseProcess(
        network, schedule, (len(indices), *shape), labelled=labels is not None, device=device, value_range=value_range,
        **options,
    )  # fmt: skip
    return process.run(seed, indices, labels, on_step)


def to_uint8(images: Tensor, value_range: tuple[float, float] | list[float] = (-1.0, 1.0)) -> Tensor:
    """Images in ``value_range`` (clipped to it) as uint8, rounded to the nearest level."""
    low, high = value_range
    return ((images - low) * (255.0 / (high - low))).round().clamp(0, 255).to(torch.uint8)
