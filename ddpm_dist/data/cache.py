"""A set that fits into memory is decoded once, before the first step; batches are then gathered from there.

The pixels are those of the streaming path to the bit: decoding an image gives the same every time, and what differs from epoch to
epoch (window, mirror image) is done to the kept pixels by the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.config import Data
from ddpm_dist.data import augment
from ddpm_dist.data.decoder import Decoder
from ddpm_dist.data.shards import CHECKED_AT_ONCE, Index
from ddpm_dist.data.workers import local_ranks
from ddpm_dist.errors import UserError
from ddpm_dist.host_memory import free_host_memory

FILL = 256  # images that are decoded at a time
GPU_SHARE, HOST_SHARE = 0.1, 0.25  # of a GPU's memory, and of the host's free memory, for data.cache=auto

Read = Callable[[np.ndarray], list[np.ndarray]]


def bytes_of(index: Index, settings: Data) -> int:
    """What the decoded set needs: images of the training size, or whole ones where each epoch cuts other windows."""
    if is_cut(settings):
        rows = index.samples
        return int((rows["height"].astype(np.int64) * rows["width"]).sum()) * settings.channels
    return len(index) * settings.image_size**2 * settings.channels


def is_cut(settings: Data) -> bool:
    """Whether whole images are kept, because DALI does something else to them in each epoch than to mirror them."""
    return settings.crop == "random_resized" or any(settings.color_jitter)


def choose_place(index: Index, settings: Data, device: torch.device, decoder: str, images_left: int, ranks: int) -> str:
    """Where this rank keeps the decoded set: "gpu", "host" or "none". UserError where data.cache asks for what cannot be.

    images_left: that the run still reads, over all of ``ranks``. auto: on a GPU machine, where the set fits (see data.cache_gb) and
    the rank reads at least as many images as it would have to decode; on a CPU decoding is too quick to matter.
    """
    wanted = settings.cache
    if wanted == "none" or (wanted == "auto" and (device.type != "cuda" or images_left < ranks * len(index))):
        return "none"
    if wanted == "auto" and (len(index) > CHECKED_AT_ONCE or settings.on_bad == "skip"):
        return "none"
    if settings.on_bad == "skip":
        raise UserError(
            f"data.cache={wanted} does not go with data.on_bad=skip: leave bad samples out of the index (python -m ddpm_dist.index --check "
            "--quarantine), or set data.cache=none"
        )
    needed = bytes_of(index, settings)
    # On the CPU DALI resizes with other roundings than on a GPU, so cut images have to stay where they are resized.
    on_host_only = is_cut(settings) and decoder == "cpu"
    places = {"auto": ("gpu", "host"), "gpu": ("gpu",), "host": ("host",)}[wanted]
    why = []
    for place in places:
        if place == "gpu" and device.type != "cuda":
            why.append("there is no GPU")
        elif place == "gpu" and on_host_only:
            why.append(
                "random crops and colours of images that the CPU decodes are made on the CPU (use host, or data.decoder=mixed)"
            )
        else:
            room = _room(place, settings, device, share=wanted == "auto")
            if needed <= room:
                return place
            why.append(f"the decoded set needs {needed / 1e9:.2f} GB, {room / 1e9:.2f} GB are allowed or free")
    if wanted == "auto":
        return "none"
    raise UserError(f"data.cache={wanted}: {why[0]}; set data.cache=auto or none")


def _room(place: str, settings: Data, device: torch.device, share: bool) -> float:
    """Bytes for this rank's copy."""
    given = None if settings.cache_gb is None else settings.cache_gb * 1e9
    if place == "gpu":
        free, total = torch.cuda.mem_get_info(device)
        return min(free, given if given is not None else total * GPU_SHARE if share else free)
    free = (free_host_memory() or 0) / local_ranks()
    return min(free, given if given is not None else free * HOST_SHARE if share else free)


class Cache:
    """The decoded set. ``place``: "gpu" or "host". Built in the loader's thread; decodes everything at once.

    Raises UserError naming the image that cannot be read or decoded.
    """

    def __init__(
        self, index: Index, settings: Data, batch: int, device: torch.device, decoder: str, place: str, read: Read
    ):
        self._settings, self._device = settings, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        home = device if place == "gpu" else torch.device("cpu")
        self._cut = is_cut(settings)
        rows, channels = index.samples, settings.channels
        if self._cut:
            self._sizes = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
            self._starts = np.concatenate([[0], np.cumsum(self._sizes.prod(axis=1) * channels)])
            self._pixels = torch.empty(int(self._starts[-1]), dtype=torch.uint8, device=home)
        else:
            size = settings.image_size
            self._pixels = torch.empty(len(index), size, size, channels, dtype=torch.uint8, device=home)
        self._fill(index, device, decoder, read)
        self._decoder = Decoder(index, settings, batch, device, decoder, decoded=True) if self._cut else None

    def _fill(self, index: Index, device: torch.device, decoder: str, read: Read) -> None:
        still = self._settings.model_copy(update={"flip": False, "color_jitter": [0.0] * 4})
        batch = min(FILL, len(index))
        decode = Decoder(index, still, batch, device, decoder, only_decode=self._cut)
        chunks = [np.arange(begin, begin + batch) for begin in range(0, len(index), batch)]
        with ThreadPoolExecutor(1, thread_name_prefix="filler") as ahead:
            coming = ahead.submit(read, chunks[0] % len(index))
            for number, chunk in enumerate(chunks):
                ids, files = chunk % len(index), coming.result()  # batches have one size: the last one wraps around
                if number + 1 < len(chunks):
                    coming = ahead.submit(read, chunks[number + 1] % len(index))
                count = int((chunk < len(index)).sum())
                if self._cut:
                    for sample, image in zip(ids[:count], decode.whole_images(ids, files), strict=False):
                        self._image(int(sample)).copy_(image)
                    continue
                rows = index.rows(ids)
                windows = augment.windows(still.crop, [1.0, 1.0], rows["height"], rows["width"], None)
                pixels, _, ready = decode(ids, files, windows, np.zeros(batch, bool), rows["label"].astype(np.int64))
                if ready is not None:
                    ready.synchronize()
                self._pixels[chunk[0] : chunk[0] + count].copy_(pixels[:count].permute(0, 2, 3, 1))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # gathering uses a stream of its own

    def _image(self, sample: int) -> Tensor:
        """One whole image (H, W, C), a view."""
        height, width = self._sizes[sample].tolist()
        return self._pixels[self._starts[sample] : self._starts[sample + 1]].view(height, width, -1)

    def __call__(
        self, ids: np.ndarray, windows: np.ndarray, mirror: np.ndarray, labels: np.ndarray, colours: np.ndarray | None
    ) -> tuple[Tensor, Tensor, Any]:
        """As :class:`Decoder`, without the files."""
        if self._cut:
            images = [self._image(int(sample)) for sample in ids]
            if not self._pixels.is_cuda:  # for tensors DALI asks for the stream of a GPU
                images = [image.numpy() for image in images]
            return self._decoder(ids, images, windows, mirror, labels, colours)
        ids, flip, numbers = torch.from_numpy(ids), torch.from_numpy(mirror), torch.from_numpy(labels)
        if self._stream is None:
            return self._gather(ids, flip), numbers, None
        with torch.cuda.stream(self._stream):
            if self._pixels.is_cuda:
                pixels = self._gather(self._sent(ids), self._sent(flip))
            else:
                pixels = self._sent(self._gather(ids, flip))
            numbers = self._sent(numbers)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return pixels, numbers, ready

    def _gather(self, ids: Tensor, flip: Tensor) -> Tensor:
        pixels = self._pixels.index_select(0, ids)
        if self._settings.flip:
            pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(2), pixels)
        return pixels.permute(0, 3, 1, 2)

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)
