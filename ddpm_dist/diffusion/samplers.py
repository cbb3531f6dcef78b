"""Samplers: from noise to images, as functions of (seed, image index) only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_dist import philox
from ddpm_dist.diffusion.guidance import Network, guided
from ddpm_dist.diffusion.schedule import Schedule

SAMPLERS = ("ddpm",)
VARIANCES = ("beta", "posterior")
THRESHOLDINGS = ("none", "clip")


def timesteps(schedule: Schedule, steps: int | None) -> Tensor:
    """The timesteps that are visited, int64, from large to small: all of t_min..T-1, or ``steps`` of them evenly spaced."""
    count = schedule.timesteps - schedule.t_min
    if steps is None or steps == count:
        return torch.arange(schedule.timesteps - 1, schedule.t_min - 1, -1)
    if not 1 <= steps <= count:
        raise ValueError(f"steps must lie in 1..{count}, not {steps}")
    if steps == 1:
        return torch.tensor([schedule.timesteps - 1])
    return torch.linspace(schedule.timesteps - 1, schedule.t_min, steps, dtype=torch.float64).round().to(torch.int64)


def ddpm_coefficients(schedule: Schedule, visited: Tensor, variance: str) -> Tensor:
    """Coefficients of ancestral sampling, float32 (3, steps): x <- a x + b eps + c noise (Ho et al. 2020, algorithm 2).

    For neighbours t > s of ``visited`` the step's beta is 1 - abar_t / abar_s (Nichol & Dhariwal 2021, equation 19), which
    is beta_t when every timestep is visited. variance "beta": c^2 = beta; "posterior": beta (1 - abar_s) / (1 - abar_t)
    (Ho et al. 2020, section 3.2). No noise is added in the last step.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: {', '.join(VARIANCES)}")
    abar = schedule.alphas_cumprod[visited]
    # The last step ends where training begins: at t_min its beta is the schedule's own, from anywhere else it goes to x_0.
    before = torch.ones(1, dtype=torch.float64)
    if int(visited[-1]) == schedule.t_min > 0:
        before = schedule.alphas_cumprod[schedule.t_min - 1].reshape(1)
    previous = torch.cat([abar[1:], before])
    alpha = abar / previous
    beta = 1 - alpha
    scale = 1 / alpha.sqrt()
    noise = beta.sqrt() if variance == "beta" else (beta * (1 - previous) / (1 - abar)).sqrt()
    noise[-1] = 0
    return torch.stack([scale, -scale * beta / (1 - abar).sqrt(), noise]).to(torch.float32)


@torch.no_grad()
def sample(
    network: Network,
    labels: Tensor | None = None,
    *,
    shape: tuple[int, int, int] | None = None,
    count: int | None = None,
    schedule: Schedule | None = None,
    sampler: str = "ddpm",
    steps: int | None = None,
    guidance: float = 3.0,
    variance: str = "beta",
    thresholding: str = "none",
    value_range: tuple[float, float] | list[float] = (-1.0, 1.0),
    seed: int = 0,
    first: int = 0,
    indices: Tensor | None = None,
    device: torch.device | str | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Generate images; float32 (B, C, H, W) in the range the network was trained on, not clipped.

    labels: (B,) int64 on any device, None = unlabelled (then ``count`` says how many). shape: (C, H, W), by default what
    the network says of itself (in_channels, image_size). Image i of the call has the index first + i, or ``indices[i]``;
    its noise is a function of (seed, index, timestep), so a set of images may be split over calls and ranks at will.
    thresholding "clip" keeps the image that each prediction implies, x0 = (x - sqrt(1 - abar) eps) / sqrt(abar), inside
    ``value_range`` (as the code of Ho et al. 2020 does): it stops contrast from running away under guidance or with few steps.
    on_step(k, t, x) is called after each of the steps. Raises ValueError for unknown names and impossible step counts.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: {', '.join(SAMPLERS)}")
    if thresholding not in THRESHOLDINGS:
        raise ValueError(f"unknown thresholding {thresholding!r}: {', '.join(THRESHOLDINGS)}")
    schedule = schedule or getattr(network, "schedule", None) or Schedule()
    device = torch.device(device) if device is not None else next(network.parameters()).device
    if shape is None:
        shape = (network.in_channels, network.image_size, network.image_size)
    if indices is None:
        size = len(labels) if labels is not None else count
        if size is None:
            raise ValueError("say how many images: labels, count or indices")
        indices = torch.arange(first, first + size)
    indices = indices.to(device)
    labels = labels.to(device) if labels is not None else None

    visited = timesteps(schedule, steps)
    a, b, c = ddpm_coefficients(schedule, visited, variance).to(device)
    on_device = visited.to(device)
    signal = schedule.table("sqrt_alphas_cumprod", device)[on_device]
    spread = schedule.table("sqrt_one_minus_alphas_cumprod", device)[on_device]
    predict = guided(network, labels, guidance)
    # The starting noise has the step number T, which no timestep has.
    x = philox.normal(seed, philox.SAMPLE_NOISE, schedule.timesteps, indices, shape)
    for k, t in enumerate(visited.tolist()):
        epsilon = predict(x, on_device[k].expand(len(indices))).float()
        if thresholding == "clip":
            x0 = ((x - spread[k] * epsilon) / signal[k]).clamp(*value_range)
            epsilon = (x - signal[k] * x0) / spread[k]
        x = a[k] * x + b[k] * epsilon
        if k < len(visited) - 1:
            x = x + c[k] * philox.normal(seed, philox.SAMPLE_NOISE, on_device[k], indices, shape)
        if on_step is not None:
            on_step(k, t, x)
    return x


def to_uint8(images: Tensor, value_range: tuple[float, float] | list[float] = (-1.0, 1.0)) -> Tensor:
    """Images in ``value_range`` (clipped to it) as uint8, rounded to the nearest level."""
    low, high = value_range
    return ((images - low) * (255.0 / (high - low))).round().clamp(0, 255).to(torch.uint8)
