"""Encoded images to pixels of the training size, through DALI: decode, cut, resize, mirror."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.config import Data
from ddpm_dist.data.checksums import Rows
from ddpm_dist.data.shards import Index
from ddpm_dist.data.workers import decode_threads
from ddpm_dist.errors import BadSample, UserError

LARGE = 256  # pixels: below, "mixed" decodes mostly on the host as well, and a core feeds more small images than a GPU trains on


def resolve_decoder(decoder: str, device: torch.device, index: Any = None) -> str:
    """ "auto" is "mixed" on a GPU for images of 256 pixels and more, else "cpu". UserError where "mixed" cannot run.

    index: of the images; None: as if they were large.
    """
    if decoder == "auto":
        side = max(index.ranges["height"][1], index.ranges["width"][1]) if index is not None else LARGE
        raw = index is not None and index.image_format == "raw"  # the GPU has no decoder for it, and needs none
        return "mixed" if device.type == "cuda" and side >= LARGE and not raw else "cpu"
    if decoder == "mixed" and device.type != "cuda":
        raise UserError(
            "data.decoder=mixed decodes on a GPU and there is none (a run that started with it needs one: cpu and GPU "
            "decoding differ in pixels); set data.decoder=cpu for a new run"
        )
    return decoder


def is_whole(index: Index, settings: Data) -> bool:
    """Whether every image already has the training size, so that nothing is cut or resized."""
    whole = [settings.image_size] * 2
    return index.ranges["height"] == index.ranges["width"] == whole and settings.crop != "random_resized"


class Decoder:
    """One DALI pipeline of fixed batch size, fed from outside.

    decoder: "cpu" or "mixed". decoded: it is fed with the pixels of whole images instead of their files; what follows is the same.
    only_decode: the other half, whole images as they are.
    """

    def __init__(
        self,
        index: Index,
        settings: Data,
        batch: int,
        device: torch.device,
        decoder: str,
        decoded: bool = False,
        only_decode: bool = False,
    ) -> None:
        try:
            from nvidia.dali import fn, pipeline_def, tensors, types
        except ImportError as error:
            raise UserError(
                f"NVIDIA DALI cannot be imported ({error}): install it with pip install 'ddpm_dist[cuda13]' (or cuda12), "
                "or use data.source=synthetic for a benchmark"
            ) from None
        self._index, self._device, self._batch = index, device, batch
        size, grey = settings.image_size, settings.channels == 1
        whole = only_decode or is_whole(index, settings)
        flip = settings.flip and not only_decode
        colours = any(settings.color_jitter) and not only_decode
        hardware = {} if settings.hw_decoder_load is None else {"hw_decoder_load": settings.hw_decoder_load}
        on_gpu = decoder == "mixed"

        @pipeline_def(
            batch_size=batch,
            num_threads=decode_threads(settings),
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=1,
        )
        def graph():
            if decoded:
                place = "gpu" if on_gpu else "cpu"
                images = fn.external_source(name="images", device=place, dtype=types.UINT8, ndim=3, layout="HWC")
            else:
                encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
                # The index holds the size before any EXIF rotation, and windows are cut from that.
                images = fn.decoders.image(
                    encoded, device=decoder, output_type=types.GRAY if grey else types.RGB, adjust_orientation=False,
                    **(hardware if on_gpu else {}),
                )  # fmt: skip
            if not whole:
                start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
                shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
                images = fn.slice(images, start=start, shape=shape, axes=(0, 1))
                images = fn.resize(images, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
            if flip:
                mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
                images = fn.flip(images, horizontal=mirror)
            if colours:
                factors = fn.external_source(name="colours", dtype=types.FLOAT, ndim=1)
                brightness, contrast, saturation, hue = (factors[place] for place in range(4))
                if grey:
                    images = fn.brightness_contrast(images, brightness=brightness, contrast=contrast)
                else:
                    images = fn.color_twist(
                        images, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
                    )
            return images

        self._whole, self._flip, self._colours, self._decoded = whole, flip, colours, decoded
        self._shape = (batch, size, size, settings.channels)
        self._tensors = tensors
        self._pipe = graph()
        self._pipe.build()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_gpu = on_gpu
        self._given: deque[tuple[np.ndarray, Sequence[Any]]] = deque()  # of the batches that DALI works on
        self._labels: deque[Tensor] = deque()

    def __call__(
        self, ids: np.ndarray, images: Sequence[Any], windows: np.ndarray, mirror: np.ndarray, labels: np.ndarray,
        colours: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """:meth:`start` and :meth:`finish` of one batch."""
        self.start(ids, images, windows, mirror, labels, colours)
        return self.finish()

    def start(
        self, ids: np.ndarray, images: Sequence[Any], windows: np.ndarray, mirror: np.ndarray, labels: np.ndarray,
        colours: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Give DALI's threads B images of the batch size. At most two batches may be started and not finished.

        images: files as bytes, or with ``decoded`` (H, W, C) uint8 arrays or tensors; windows: (B, 4) int32; mirror: (B,) bool;
        colours: (B, 4) as ``augment.colours`` makes them, needed with data.color_jitter.
        """
        self._feed(ids, images, windows, mirror, colours)
        self._labels.append(torch.from_numpy(labels))

    def finish(self) -> tuple[Tensor, Tensor, Any]:
        """The oldest batch that was started: (pixels (B, C, H, W) uint8, labels (B,) int64, CUDA event of both) on the device.

        Raises UserError naming the image that cannot be decoded.
        """
        with self._output() as output:
            labels = self._labels.popleft()
            if not self._on_gpu:
                return delivered(_copied(output), labels, self._stream)
            with torch.cuda.stream(self._stream):
                pixels = torch.empty(self._shape, dtype=torch.uint8, device=self._device)
                self._take(output.as_tensor(), pixels)
                labels = labels.pin_memory().to(self._device, non_blocking=True)
                ready = torch.cuda.Event()
                ready.record(self._stream)
            return pixels.permute(0, 3, 1, 2), labels, ready

    def whole_images(self, ids: np.ndarray, encoded: Sequence[bytes]) -> list[Tensor]:
        """With ``only_decode``: each image as it is, (H, W, C) uint8, on the GPU where it is decoded there."""
        self._feed(ids, encoded, None, None, None)
        with self._output() as output:
            if not self._on_gpu:
                return [torch.from_numpy(np.array(output.at(i))) for i in range(len(ids))]
            found = []
            with torch.cuda.stream(self._stream):
                for i in range(len(ids)):
                    image = output[i]
                    found.append(torch.empty(tuple(image.shape()), dtype=torch.uint8, device=self._device))
                    self._take(image, found[-1])
            return found

    def _take(self, source: Any, target: Tensor) -> None:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        feed_ndarray(source, target, cuda_stream=self._stream)
        self._stream.synchronize()  # in the loader's thread only: DALI reuses its buffer for the next batch

    def _feed(
        self, ids: np.ndarray, images: Sequence[Any], windows: np.ndarray | None, mirror: np.ndarray | None, colours: np.ndarray | None
    ) -> None:  # fmt: skip
        self._pipe.feed_input("images", images if self._decoded else self._listed(images))
        if not self._whole:
            self._pipe.feed_input("start", np.ascontiguousarray(windows[:, :2]))
            self._pipe.feed_input("shape", np.ascontiguousarray(windows[:, 2:]))
        if self._flip:
            self._pipe.feed_input("mirror", mirror.astype(np.int32))
        if self._colours:
            self._pipe.feed_input("colours", colours)
        self._pipe.schedule_run()
        self._given.append((ids, images))

    def _listed(self, files: Sequence[bytes]) -> Any:
        """As DALI takes it quickest: a table at once, bytes in half the time of arrays of them, a list of tensors in half that of arrays."""
        if isinstance(files, Rows) and not self._on_gpu and files.end_as_jpegs():
            return self._tensors.TensorListCPU(files.table)
        held = list(files)  # while the tensors refer to them; the list of tensors copies
        return self._tensors.TensorListCPU([self._tensors.TensorCPU(file) for file in held])

    @contextmanager
    def _output(self) -> Iterator[Any]:
        """Of the oldest batch; DALI uses its memory again afterwards."""
        ids, images = self._given.popleft()
        try:
            (output,) = self._pipe.share_outputs()
        except RuntimeError as error:
            raise self._blame(ids, images, error) from None
        yield output
        self._pipe.release_outputs()

    def _blame(self, ids: np.ndarray, encoded: Sequence[bytes], error: RuntimeError) -> BaseException:
        """DALI does not say which image of a batch it could not decode: try them one by one."""
        if self._decoded:
            return error
        from nvidia.dali import fn, pipeline_def

        @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def single():
            return fn.decoders.image(fn.external_source(name="encoded", ndim=1), device="cpu")

        pipe = single()
        for sample, data in zip(ids, encoded, strict=True):
            try:
                pipe.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8)])
                pipe.run()
            except RuntimeError:
                where = self._index.describe(int(sample))
                return BadSample(f"{where} cannot be decoded; repair or remove it and pack again", int(sample))
        return error


def _copied(output: Any) -> np.ndarray:
    """A batch of one size, as memory of its own. DALI's ``as_array`` of a list copies once already."""
    pixels = output.as_array()
    return pixels if pixels.flags.owndata else pixels.copy()


def delivered(pixels: np.ndarray, labels: Tensor, stream: Any) -> tuple[Tensor, Tensor, Any]:
    """Pixels (B, H, W, C) and labels (B,) from the host as :meth:`Decoder.finish` returns them; stream: of the GPU, None on a CPU."""
    images = torch.from_numpy(pixels)
    if stream is None:
        return images.permute(0, 3, 1, 2), labels, None
    with torch.cuda.stream(stream):
        images = images.pin_memory().to(stream.device, non_blocking=True)
        labels = labels.pin_memory().to(stream.device, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(stream)
    return images.permute(0, 3, 1, 2), labels, ready
