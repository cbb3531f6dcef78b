"""Shards of uncompressed pixels (PPM and PGM files) whose images have the training size: nothing to decode, so DALI is not asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.config import Data
from ddpm_dist.data.decoder import Decoder, delivered, is_whole
from ddpm_dist.data.shards import Index


def open_decoder(index: Index, settings: Data, batch: int, device: torch.device, decoder: str) -> Decoder | RawImages:
    """What makes pixels of files: for raw shards that only have to be joined :class:`RawImages`, for everything else DALI.

    decoder: "cpu" or "mixed". Both give the same pixels of a PPM or PGM file.
    """
    joined = (
        index.image_format == "raw"
        and index.channels == settings.channels
        and is_whole(index, settings)
        and not any(settings.color_jitter)
    )
    return RawImages(settings, device) if joined else Decoder(index, settings, batch, device, decoder)


class RawImages:
    """Stands in the place of a :class:`Decoder`: the same calls, the same results."""

    def __init__(self, settings: Data, device: torch.device) -> None:
        self._shape = (settings.image_size, settings.image_size)
        self._channels, self._flip = settings.channels, settings.flip
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._given: deque[tuple[Any, ...]] = deque()

    def start(
        self, ids: np.ndarray, images: Sequence[bytes], windows: np.ndarray, mirror: np.ndarray, labels: np.ndarray,
        colours: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """As :meth:`Decoder.start`; windows are whole images and colours None."""
        self._given.append((images, mirror, labels))

    def finish(self) -> tuple[Tensor, Tensor, Any]:
        """As :meth:`Decoder.finish`."""
        files, mirror, labels = self._given.popleft()
        pixels = np.empty((len(files), *self._shape, self._channels), dtype=np.uint8)
        for image, file in zip(pixels, files, strict=True):
            channels = 3 if file[1] == ord("6") else 1  # P6 or P5; one grey value becomes three equal ones
            begin = len(file) - image.shape[0] * image.shape[1] * channels
            image[:] = np.frombuffer(file, dtype=np.uint8, offset=begin).reshape(*self._shape, channels)
        if self._flip and mirror.any():
            pixels[mirror] = pixels[mirror, :, ::-1]
        return delivered(pixels, torch.from_numpy(labels), self._stream)
