"""The loaders that ``benchmarks.loader`` compares, each as an endless stream of batches, and what an epoch of it has to hold.

Every contestant delivers (images uint8 of shape (B, 3, S, S) or (B, S, S, 3), labels int64 (B,)). All read the same JPEGs, which
have the size that is asked for, so nobody resizes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_dist.config import Data
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.data.pipeline import Loader, open_index, shard_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.runtime import Runtime

Batch = tuple[torch.Tensor, torch.Tensor]
SHUFFLED = 1000  # samples in the shuffle buffers of DALI's reader and of webdataset


@dataclass(frozen=True)
class Spec:
    """What a contestant is told. ``shards``: a packed folder; ``folder``: the same files, one subfolder per class.

    size: side of the images; workers: processes of a DataLoader; threads: of DALI. endless: only webdataset can do without.
    data: further settings of the section ``data`` of a configuration, for our own loader.
    """

    name: str
    shards: str
    folder: str
    size: int
    batch: int
    workers: int
    threads: int
    endless: bool = True
    data: dict[str, Any] = field(default_factory=dict)


def settings(spec: Spec, index: Index) -> Data:
    """The ``data`` section of a configuration that trains on these shards."""
    own = {"shards": spec.shards, "image_size": spec.size, "channels": index.channels, "num_classes": index.num_classes}
    return Data(**own, **spec.data)


def ours(decoder: str, cache: str) -> Callable[[Spec], Iterator[Batch]]:
    """The trainer's own loader. ``decoder`` mixed or ``cache`` gpu deliver on the GPU, the others in the host's memory."""

    def stream(spec: Spec) -> Iterator[Batch]:
        index = open_index(settings(spec, Index.load(spec.shards)), "")
        on_gpu = decoder == "mixed" or cache == "gpu"
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        plan, alone = BatchPlan(spec.batch, 1, spec.batch), Runtime(0, 1, 0, device, None)
        batches = shard_batches(index, settings(spec, index), plan, alone, 0, range(1 << 40), decoder, cache)
        loader = Loader(batches, device)
        try:
            while True:
                found = loader.next()
                yield found.pixels, found.labels
        finally:
            loader.close()

    return stream


def dali(spec: Spec) -> Iterator[Batch]:
    """DALI's own reader of webdataset shards; labels come as text and are made numbers here."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=spec.batch, num_threads=spec.threads, device_id=None, prefetch_queue_depth=2)
    def graph():
        encoded, text = fn.readers.webdataset(
            paths=_tars(spec), ext=["jpg;jpeg", "cls"], random_shuffle=True, initial_fill=SHUFFLED, seed=0
        )
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB), fn.pad(text, fill_value=ord(" "))

    pipe = graph()
    pipe.build()
    while True:
        images, text = pipe.run()
        pixels, letters = images.as_array(), text.as_array()  # copies
        labels = np.ascontiguousarray(letters).view(f"S{letters.shape[1]}")[:, 0].astype(np.int64)
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)


def webdataset(spec: Spec) -> Iterator[Batch]:
    """webdataset behind its DataLoader: shards and a buffer of samples shuffled, Pillow decodes."""
    import warnings

    import webdataset as wds

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it

    samples = (
        wds.WebDataset(_tars(spec), shardshuffle=100, seed=0)
        .shuffle(SHUFFLED)
        .decode("rgb8")
        .to_tuple("jpg;jpeg", "cls")
    )
    if spec.endless:
        samples = samples.repeat()
    yield from wds.WebLoader(samples, batch_size=spec.batch, num_workers=spec.workers)


def torchvision(spec: Spec) -> Iterator[Batch]:
    """torchvision's ImageFolder behind a DataLoader: a random order without an end, Pillow decodes."""
    from torchvision import datasets, transforms

    class Endless(torch.utils.data.RandomSampler):
        def __iter__(self):
            while True:  # no pause between epochs
                yield from super().__iter__()

    files = datasets.ImageFolder(spec.folder, transform=transforms.PILToTensor())
    labels = [int(name.removeprefix("class")) for name in files.classes]  # a class may have no image, and no folder
    files.target_transform = labels.__getitem__
    yield from torch.utils.data.DataLoader(
        files,
        batch_size=spec.batch,
        sampler=Endless(files),
        num_workers=spec.workers,
        persistent_workers=spec.workers > 0,
    )


def _tars(spec: Spec) -> list[str]:
    return sorted(str(path) for path in Path(spec.shards).glob("*.tar"))


DALI, WEBDATASET, TORCHVISION = (
    "DALI readers.webdataset, cpu",
    "webdataset + DataLoader",
    "torchvision ImageFolder + DataLoader",
)
OURS = "ddpm_dist, cpu"
CONTESTANTS: dict[str, Callable[[Spec], Iterator[Batch]]] = {
    OURS: ours("cpu", "none"),
    "ddpm_dist, cpu, cache host": ours("cpu", "host"),
    "ddpm_dist, mixed": ours("mixed", "none"),
    "ddpm_dist, mixed, cache gpu": ours("mixed", "gpu"),
    DALI: dali,
    WEBDATASET: webdataset,
    TORCHVISION: torchvision,
}
NEED_GPU = ("ddpm_dist, mixed", "ddpm_dist, mixed, cache gpu")


def expected(index: Index) -> np.ndarray:
    """What an epoch holds: float64 (N, 2) rows of (label, mean of the pixels as Pillow decodes them), sorted."""
    from PIL import Image

    rows = [
        (index.samples["label"][i], np.asarray(Image.open(io.BytesIO(index.read(i))).convert("RGB")).mean())
        for i in range(len(index))
    ]
    return _sorted(np.array(rows, dtype=np.float64))


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def check_epoch(batches: Iterator[Batch], wanted: np.ndarray) -> str | None:
    """Take one epoch from the stream; None when it is complete and right, else what is wrong with it.

    Right: the first N images have N different contents, and sorted they have the labels and brightness that Pillow finds (decoders
    round differently: within 2 of 255).
    """
    digests, rows = set(), []
    while len(rows) < len(wanted):
        pixels, labels = next(batches, (None, None))
        if pixels is None:
            return f"wrong: an epoch ends after {len(rows):,} of {len(wanted):,} images"
        pixels = pixels.cpu().numpy()
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(labels):
            return f"wrong: a batch has {pixels.dtype} images of shape {pixels.shape} and {len(labels)} labels"
        for image, label in zip(pixels, labels.tolist(), strict=True):
            if len(rows) == len(wanted):
                break
            # One layout for all, so that means are taken in the same order and contents compare.
            digests.add(hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest())
            rows.append((label, image.mean()))
    found = _sorted(np.array(rows, dtype=np.float64))
    if len(digests) != len(wanted):
        return f"wrong: the first {len(wanted):,} images are {len(digests):,} different ones"
    if (found[:, 0] != wanted[:, 0]).any():
        return "wrong: the labels of an epoch are not those of the data set"
    worst = float(np.abs(found[:, 1] - wanted[:, 1]).max())
    return f"wrong: the brightness of an image is off by {worst:.1f} of 255" if worst > 2 else None
