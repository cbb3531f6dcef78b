"""What sampling shows and writes beside a folder of images: progress, grids, arrays and GIFs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from ddpm_dist.diffusion import Schedule, to_uint8
from ddpm_dist.errors import UserError
from ddpm_dist.previews import class_rows

GIF_FRAMES = 48


def check_targets(a: argparse.Namespace) -> None:
    """Find out before the work whether its results can be written. UserError naming the target."""
    for path in [*a.out, *([a.gif] if a.gif else [])]:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file, or use --out-dir for one PNG per image")
    for folder in {path.parent for path in [*a.out, *([a.gif] if a.gif else [])]} | (
        {a.out_dir} if a.out_dir else set()
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write into {folder}: {error.strerror}; choose another place for the images"
            ) from None


class Bar:
    """Progress in reverse steps on a terminal, images/sec beside it; also collects the frames of the GIF."""

    def __init__(self, chunks: int, schedule: Schedule, steps: int | None, is_main: bool) -> None:
        from tqdm import tqdm

        self._steps = steps or schedule.timesteps - schedule.t_min
        self._frame_steps = set(np.unique(np.linspace(0, self._steps - 1, GIF_FRAMES).round().astype(int)).tolist())
        show = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=chunks * self._steps, unit="step", disable=not show, desc="sampling")
        self._start, self._images = time.monotonic(), 0

    def step(self, k: int, x: Tensor, record: list[np.ndarray] | None, value_range: list[float]) -> None:
        if record is not None and k in self._frame_steps:
            record.append(to_uint8(x, value_range).cpu().numpy())
        self._bar.update()

    def done(self, images: int) -> None:
        self._images += images
        self._bar.set_postfix_str(f"{self._images / (time.monotonic() - self._start):.2f} images/sec per process")

    def close(self) -> None:
        self._bar.close()


def write_images(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """A grid with a row for each class (.png), or the arrays (.npz). images: (N, C, H, W) uint8; labels: (N,) integers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        aside = path.with_name(path.name + ".incomplete")
        try:
            with open(aside, "wb") as file:
                np.savez_compressed(file, images=images, labels=labels)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        return
    from ddpm_dist.tracking.pictures import save_grid

    grid, columns = class_rows(images, labels)
    save_grid(grid, path, columns)


def write_gif(path: Path, frames: list[np.ndarray], labels: np.ndarray) -> None:
    """The reverse process: ``frames`` are (B, C, H, W) uint8, of the first B images."""
    from ddpm_dist.tracking.pictures import save_gif

    path.parent.mkdir(parents=True, exist_ok=True)
    shown = len(frames[0])
    shown -= shown % len(np.unique(labels[:shown]))  # full columns
    arranged = [class_rows(frame[:shown], labels[:shown]) for frame in frames]
    save_gif([frame for frame, _ in arranged], path, arranged[0][1])
