"""What is kept of the reverse process while it runs: the frames of the GIF and the rows of the picture of its steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.diffusion import to_uint8
from ddpm_dist.tracking.pictures import VISIBLE, enlargement

GIF_EVERY, GIF_LAST, GIF_ALL_UP_TO = 20, 7, 50
GIF_IMAGES, GIF_PIXELS = 64, 200_000  # noise does not compress: a frame of 8x8 coloured images of 64 pixels has 0.2 MB
STEP_ROWS, STEP_IMAGES, STEP_WIDTH = 10, 8, 640


def gif_frames(evaluations: int, every_timestep: bool) -> list[int]:
    """After which evaluations (from 0) a frame is taken: of all up to 50. Else of the first, every 20th and the last 7, counted from
    the end; where not every timestep is visited, of about 25 instead of every 20th."""
    if evaluations <= GIF_ALL_UP_TO:
        return list(range(evaluations))
    stride = GIF_EVERY if every_timestep else -(-evaluations // 25)
    left = [(k, evaluations - k) for k in range(evaluations)]
    return [k for k, count in left if k == 0 or count % stride == 0 or count <= GIF_LAST]


def step_rows(evaluations: int) -> list[int]:
    """Which evaluations (from 0) the picture of the steps shows: all up to 10, else 10 evenly spread, both ends among them."""
    return np.unique(np.linspace(0, evaluations - 1, STEP_ROWS).round().astype(np.int64)).tolist()


def gif_images(num: int, shape: tuple[int, int, int]) -> int:
    """How many of ``num`` images (C, H, W) the GIF shows."""
    return min(num, GIF_IMAGES, max(1, GIF_PIXELS // (shape[1] * shape[2])))


def step_images(num: int, shape: tuple[int, int, int]) -> int:
    """How many of ``num`` images (C, H, W) a row of the picture of the steps shows, twice."""
    wide = shape[2] * enlargement(np.empty(shape), VISIBLE)
    return min(num, STEP_IMAGES, max(1, STEP_WIDTH // wide))


Kept = list[tuple[str, int, np.ndarray, np.ndarray]]  # what, evaluation, indices (n,), pixels (n, C, H, W) uint8


@dataclass
class Recorder:
    """Keeps what the pictures need of one process' batches: "frame" (x after a step), "seen" (x before it), "x0" (the prediction).

    frames, rows: evaluations that the GIF and the picture of the steps show. first_frames, first_rows: they show the images
    with an index below these.
    """

    frames: frozenset[int]
    rows: frozenset[int]
    first_frames: int
    first_rows: int
    value_range: list[float]
    kept: Kept = field(default_factory=list)

    @property
    def first(self) -> int:
        """Images with an index below this one are looked at."""
        return max(self.first_frames if self.frames else 0, self.first_rows if self.rows else 0)

    def start(self, indices: Tensor, x: Tensor) -> None:
        """The noise x (B, C, H, W) that images ``indices`` (B,) begin with."""
        if 0 in self.rows:
            self._keep("seen", 0, indices, x, self.first_rows)

    def step(self, k: int, indices: Tensor, x: Tensor, x0: Tensor) -> None:
        """After evaluation k: the new x and the predicted image, both (B, C, H, W)."""
        if k in self.frames:
            self._keep("frame", k, indices, x, self.first_frames)
        if k in self.rows:
            self._keep("x0", k, indices, x0, self.first_rows)
        if k + 1 in self.rows:
            self._keep("seen", k + 1, indices, x, self.first_rows)

    def _keep(self, what: str, k: int, indices: Tensor, images: Tensor, first: int) -> None:
        chosen = torch.nonzero(indices < first).flatten()
        if len(chosen):
            pixels = to_uint8(images[chosen.to(images.device)], self.value_range).cpu().numpy()
            self.kept.append((what, k, indices[chosen].numpy(), pixels))


def assembled(kept: Iterable[tuple[str, int, np.ndarray, np.ndarray]], what: str, count: int) -> dict[int, np.ndarray]:
    """By evaluation, in order: the first ``count`` images (count, C, H, W) uint8, put together from all ranks' batches."""
    found: dict[int, np.ndarray] = {}
    for kind, k, indices, pixels in kept:
        if kind == what:
            whole = found.setdefault(k, np.zeros((count, *pixels.shape[1:]), dtype=np.uint8))
            whole[indices] = pixels
    return dict(sorted(found.items()))
