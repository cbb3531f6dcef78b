"""Real images for pictures: from the shards of a run, at the network's size, as training sees them without augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpm_dist.config import Data
from ddpm_dist.data import augment
from ddpm_dist.data.decoder import Decoder
from ddpm_dist.data.order import permutation
from ddpm_dist.data.pipeline import open_index
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError

AT_A_TIME = 256  # images that DALI decodes together


@dataclass(frozen=True)
class RealImages:
    """A shard folder opened for pictures. ``settings``: size, channels and crop of the run, without augmentation."""

    index: Index
    settings: Data

    @classmethod
    def open(
        cls, data: Data, shards: Path | None, classes: list[str] | None, title: str, option: str = "--shards FOLDER"
    ) -> RealImages:
        """The shards that ``data`` names, or those in ``shards``; ``classes``: names of the network's labels, if known.

        A random crop becomes the largest centred square, and nothing is mirrored. Raises UserError where there are no shards, or
        where they do not go with the network.
        """
        if shards is None and data.source == "synthetic":
            raise UserError(f"{title} was trained on synthetic data: name a folder of real images with --shards FOLDER")
        if shards is None and data.shards is None:
            raise UserError(f"{title} does not say which shards it was trained on: name them with --shards FOLDER")
        crop = "center" if data.crop == "random_resized" else data.crop
        folder = str(shards or data.shards)
        still = {"crop": crop, "flip": False, "color_jitter": [0.0] * 4}
        settings = data.model_copy(update={"source": "shards", "shards": folder, **still})
        index = open_index(settings, f"Name the folder with the images: {option}", option.partition("=")[0])
        if settings.num_classes is not None and None not in (classes, index.classes) and classes != index.classes:
            raise UserError(
                f"{folder} has the classes {', '.join(index.classes[:10])}, but {title} knows {', '.join(classes[:10])}: give "
                f"shards with the same classes ({option})"
            )
        return cls(index, settings)

    def choose(self, labels: np.ndarray) -> np.ndarray:
        """Sample ids (N,) int64 for labels (N,): the first images of each class in the order of the index, -1 where a class has no
        more. Unlabelled (all -1): images from all over the set, always the same ones. Raises UserError where there is none at all."""
        own = self.index.samples["label"]
        ids = np.full(len(labels), -1, dtype=np.int64)
        for label in np.unique(labels):
            wanted = np.flatnonzero(labels == label)
            there = np.flatnonzero(own == label) if label >= 0 else permutation(0, 0, len(self.index))
            ids[wanted[: len(there)]] = there[: len(wanted)]
        if (ids < 0).all():
            raise UserError(f"{self.settings.shards} holds no image of the classes that are shown: give other --shards")
        return ids

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Images (N, C, H, W) uint8, decoded, cut and resized as in training (on the CPU); white where the id is -1.

        Raises UserError naming the image that cannot be read or decoded, and where DALI is not installed.
        """
        size, channels = self.settings.image_size, self.settings.channels
        images = np.full((len(ids), channels, size, size), 255, dtype=np.uint8)
        places = np.flatnonzero(ids >= 0)
        if not len(places):
            return images
        batch = min(AT_A_TIME, len(places))
        decode = Decoder(self.index, self.settings, batch, torch.device("cpu"), "cpu")
        for begin in range(0, len(places), batch):
            some = places[begin : begin + batch]
            padded = ids[np.resize(some, batch)]  # DALI's batches have one size
            rows = self.index.rows(padded)
            encoded = [np.frombuffer(file, dtype=np.uint8) for file in self.index.read_many(padded)]
            windows = augment.windows(self.settings.crop, [1.0, 1.0], rows["height"], rows["width"], None)
            pixels, _, _ = decode(padded, encoded, windows, np.zeros(batch, dtype=bool), rows["label"].astype(np.int64))
            images[some] = pixels.numpy()[: len(some)]
        return images
