"""A picture of the forward process: real images at growing t, as the network is given them in training."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ddpm_dist import philox
from ddpm_dist.config import Data
from ddpm_dist.data.pipeline import normalise
from ddpm_dist.diffusion import Schedule, to_uint8
from ddpm_dist.diffusion.noise import draw
from ddpm_dist.real_images import RealImages
from ddpm_dist.tracking.captions import captioned

COLUMNS, ROWS, MOST_ROWS = 10, 8, 100


def noised(
    images: np.ndarray, schedule: Schedule, value_range: list[float], timesteps: list[int], seed: int = 0
) -> np.ndarray:
    """Every image at every timestep: x_t = signal_t x_0 + spread_t noise (``Schedule``), clipped to ``value_range``.

    The noise of an image is the same at all t, so that a row shows one image that disappears.

    Args:
        images: (N, C, H, W) uint8.
        timesteps: K integers in 0..T-1.
        seed: of the noise.

    Returns:
        (N, K, C, H, W) uint8.
    """
    x0 = normalise(torch.from_numpy(images), value_range, torch.contiguous_format)
    slots = torch.arange(len(images))
    noise = draw(schedule.noise, seed, philox.TRAIN_NOISE, 0, slots, tuple(x0.shape[1:]), value_range)
    at = [schedule.add_noise(x0, noise, torch.full((len(images),), t)) for t in timesteps]
    return to_uint8(torch.stack(at, dim=1), value_range).numpy()


def spread_timesteps(schedule: Schedule, count: int = COLUMNS) -> list[int]:
    """At most ``count`` different timesteps, evenly spread over 0..T-1, both ends among them."""
    return np.unique(np.linspace(0, schedule.timesteps - 1, count).round().astype(np.int64)).tolist()


def forward_picture(
    schedule: Schedule, data: Data, real: RealImages, classes: list[str] | None, labels: np.ndarray, seed: int
) -> Image.Image:
    """The picture: one row for each label of ``labels`` (N,) (-1: any image), one column for each of ten timesteps.

    Raises UserError for images that cannot be read.
    """
    ids = real.choose(labels)
    labels, ids = labels[ids >= 0], ids[ids >= 0]
    timesteps = spread_timesteps(schedule)
    images = noised(real.read(ids), schedule, data.range, timesteps, seed)
    names = None
    if labels.max(initial=-1) >= 0:
        names = [classes[label] if classes else str(label) for label in labels.tolist()]
    heading = f"forward process, {schedule.timesteps} timesteps, schedule {schedule.schedule}"
    if schedule.noise != "gaussian":
        heading += f", {schedule.noise} noise"
    words = [f"t = {timesteps[0]}", *map(str, timesteps[1:])]
    return captioned(images.reshape(-1, *images.shape[2:]), len(timesteps), heading, names, words)
