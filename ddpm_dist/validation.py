"""The loss on images that are not trained on, at fixed timesteps and noise, so that it is comparable between runs and moments."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ddpm_dist import philox
from ddpm_dist.config import Config
from ddpm_dist.data.pipeline import normalise
from ddpm_dist.data.shards import CHECKED_AT_ONCE, Index
from ddpm_dist.diffusion import Schedule, objective
from ddpm_dist.diffusion.noise import draw
from ddpm_dist.models import build_model
from ddpm_dist.real_images import RealImages
from ddpm_dist.runtime import Runtime

CHUNK = 32  # images that go through the network together: the same ones for every number of ranks, so that the result is, too
SEED = 0  # not run.seed: runs with other seeds are compared
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def timesteps(count: int, first: int, last: int) -> np.ndarray:
    """A timestep of first..last-1 for each of ``count`` images, int64: evenly spread for any count (multiples of the golden ratio)."""
    places = np.modf(0.5 + np.arange(count) * GOLDEN)[0]
    return (first + np.floor(places * (last - first))).astype(np.int64)


class Validation:
    """Images kept decoded on the host, and what is done to them. Every rank has its chunks only."""

    def __init__(self, config: Config, runtime: Runtime, training: Index | None) -> None:
        """UserError where the shards cannot be used; ``warning``: text if images of theirs are trained on, too."""
        self._config, self._runtime = config, runtime
        data = config.data.model_copy(update={"shards": config.validation.shards})
        classes = training.classes if training is not None else None
        real = RealImages.open(data, None, classes, "the run", "validation.shards=FOLDER")
        count = min(config.validation.images or len(real.index), len(real.index))
        self.warning = _shared(real.index, training)
        # From all over the set: shards may be sorted by class.
        ids = np.linspace(0, len(real.index) - 1, count).round().astype(np.int64)
        self._t = timesteps(count, config.diffusion.t_min, config.diffusion.timesteps)
        self._labels = real.index.rows(ids)["label"].astype(np.int64)
        self.images = count
        chunks = [np.arange(begin, min(begin + CHUNK, count)) for begin in range(0, count, CHUNK)]
        self._mine = chunks[runtime.rank :: runtime.world_size]
        self._pixels = [real.read(ids[chunk]) for chunk in self._mine]

    @torch.no_grad()
    def loss(self, weights: dict[str, Tensor], schedule: Schedule) -> float | None:
        """The mean squared error of the prediction with ``weights`` (a state dict), over all images; float32 arithmetic.

        Not weighted by timestep and without dropped labels, whatever the training objective does. Collective: a number on rank 0,
        None elsewhere.
        """
        config, device = self._config, self._runtime.device
        # A network of its own: the one in training may be wrapped, compiled or spread over the ranks.
        twin = build_model(config.model.name, **config.network_keywords()).to(device).eval()
        twin.load_state_dict(weights)
        losses = np.zeros(self.images)
        for chunk, pixels in zip(self._mine, self._pixels, strict=True):
            x0 = normalise(torch.from_numpy(pixels).to(device), config.data.range, torch.contiguous_format)
            slots, t = torch.from_numpy(chunk).to(device), torch.from_numpy(self._t[chunk]).to(device)
            noise = draw(
                schedule.noise, SEED, philox.VALIDATION_NOISE, 0, slots, tuple(x0.shape[1:]), config.data.range
            )
            labels = torch.from_numpy(self._labels[chunk]).to(device) if config.data.num_classes else None
            prediction = twin(schedule.add_noise(x0, noise, t), t, labels)
            wanted = objective.target(schedule, x0, noise, t)
            losses[chunk] = objective.mse_per_image(prediction, wanted).double().cpu().numpy()
        gathered = self._runtime.gather((self._mine, losses))
        if gathered is None:
            return None
        whole = np.zeros(self.images)
        for chunks, part in gathered:
            for chunk in chunks:
                whole[chunk] = part[chunk]
        return float(whole.mean())


def _shared(held_out: Index, training: Index | None) -> str | None:
    """A warning if images are in both sets, by their checksums."""
    if training is None or len(training) > CHECKED_AT_ONCE or len(held_out) > CHECKED_AT_ONCE:
        return None
    both = np.isin(held_out.samples["checksum"], training.samples["checksum"])
    if not both.any():
        return None
    first = held_out.describe(int(np.argmax(both)))
    return f"{int(both.sum()):,} of {len(held_out):,} validation images are trained on, too (the first: {first})"
