"""Pictures of what the run has learned so far, made by all ranks together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ddpm_dist.config import Config
from ddpm_dist.diffusion import Schedule, sample, to_uint8
from ddpm_dist.diffusion.reverse import NotFinite
from ddpm_dist.models import build_model
from ddpm_dist.runtime import Runtime
from ddpm_dist.tracking.metrics import Workplace
from ddpm_dist.tracking.pictures import save_grid
from ddpm_dist.tracking.progress import warn


def preview(
    config: Config,
    runtime: Runtime,
    weights: dict[str, torch.Tensor],
    schedule: Schedule,
    path: Path,
    workplace: Workplace | None = None,
) -> None:
    """Save a grid of ``sampling.num`` images made with ``weights`` (a state dict); collective, rank 0 writes the file.

    One row for each class. The images depend on the run's seed only, so that successive previews show the same digits
    getting better.
    """
    # A network of its own: the one in training may be wrapped, compiled or spread over the ranks.
    twin = build_model(config.model.name, **config.network_keywords()).to(runtime.device).eval()
    twin.load_state_dict(weights)
    num, classes = config.sampling.num, config.data.num_classes
    mine = torch.arange(runtime.rank, num, runtime.world_size)
    images = np.zeros((0, config.data.channels, config.data.image_size, config.data.image_size), dtype=np.uint8)
    if len(mine):
        try:
            generated = sample(
                twin,
                labels=mine % classes if classes else None,
                indices=mine,
                shape=images.shape[1:],
                schedule=schedule,
                value_range=config.data.range,
                seed=config.run.seed,
                device=runtime.device,
                **config.sampling.options(labelled=classes is not None),
            )
            images = to_uint8(generated, config.data.range).cpu().numpy()
        except NotFinite as error:  # the other ranks wait for this one's images, and a picture is never worth the run
            images = np.zeros((len(mine), *images.shape[1:]), dtype=np.uint8)
            warn(f"the preview {path} has black images: {error}")
    gathered = runtime.gather((mine.numpy(), images))
    if gathered is None:
        return
    whole = np.zeros((num, *images.shape[1:]), dtype=np.uint8)
    for indices, part in gathered:
        whole[indices] = part
    grid, columns = class_rows(whole, np.arange(num) % classes if classes else np.full(num, -1))
    try:
        save_grid(grid, path, columns, workplace=workplace)
    except OSError as error:  # a picture is never worth the run
        warn(f"the preview {path} could not be written: {error.strerror or error}")


def class_rows(images: np.ndarray, labels: np.ndarray, longest: int = 20) -> tuple[np.ndarray, int]:
    """Lay images out so that every row shows one class: (images in grid order with blanks filled in, columns).

    images: (N, C, H, W) uint8; labels: (N,) integers. A class with more than ``longest`` images gets several rows. With a single
    class, or as few as one image of each, the grid is a square.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.max() < 2:
        return images, max(1, round(len(labels) ** 0.5))
    most = int(counts.max())
    columns = -(-most // -(-most // longest))  # rows of a class as even as they get
    rows = []
    for label in classes:
        own = images[labels == label]
        blank = np.full((-len(own) % columns, *images.shape[1:]), 255, dtype=images.dtype)
        rows += [own, blank]
    return np.concatenate(rows), columns
