"""Exponential moving averages of the weights, each stored once in the whole job: rank r keeps 1/W of every average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_dist.checkpoint.format import Piece, Reader
from ddpm_dist.config import Ema
from ddpm_dist.engines.power_function import gamma_of, keep_of
from ddpm_dist.runtime import Runtime


class ShardedEMA:
    """fp32 averages of this rank's share of the weights, updated without communication; only :meth:`gather` communicates.

    shares: this rank's part of the fp32 parameters as live views (``Engine.shares``).
    ema.half_lives: images after which a weight's contribution has halved, so that the average does not depend on the batch
    size; one step of G images keeps 0.5^(G / half_life). (A factor of 0.995 per step is a half-life of 138.3 G images.) During the
    first ``ema.warmup`` images such an average is a copy of the weights.
    ema.sigma_rels: widths of power function averages, relative to the length of the run so far (see ``power_function``); they are
    numbered behind the others.
    The position in all of these is ``images_seen``, so nothing but the averages has to be saved.
    """

    def __init__(self, shares: list[Piece], ema: Ema, runtime: Runtime) -> None:
        self._half_lives, self._warmup = ema.half_lives, ema.warmup
        self._gammas = [gamma_of(sigma_rel) for sigma_rel in ema.sigma_rels]
        self._shares, self._runtime = shares, runtime
        self._sources = [share.data for share in shares]
        self.averages = [[source.to(torch.float32, copy=True) for source in self._sources] for _ in range(len(self))]
        self._on_host = bool(self._sources) and self._sources[0].device.type == "cpu"
        self._layout: list[list[tuple[str, tuple[int, ...], int, int]]] | None = None

    def __len__(self) -> int:
        return len(self._half_lives) + len(self._gammas)

    @torch.no_grad()
    def reset(self) -> None:
        """Make every average a copy of the weights."""
        for average in self.averages:
            if average:
                torch._foreach_copy_(average, self._sources)

    def weights(self, images_seen: int, global_batch: int) -> list[float]:
        """How much of the weights each average takes in the step that brings the run to ``images_seen``; 1: it becomes a copy.

        Rounded to float32, so that it is the same number on the host and in a tensor.
        """
        half_lives = [
            1.0 if images_seen <= self._warmup else -math.expm1(-math.log(2.0) * global_batch / half_life)
            for half_life in self._half_lives
        ]
        powers = [1.0 - keep_of(gamma, images_seen, global_batch) for gamma in self._gammas]
        return [float(np.float32(weight)) for weight in half_lives + powers]

    def update(self, images_seen: int, global_batch: int, skipped: Tensor) -> None:
        """After a step that brought the run to ``images_seen``. skipped: 0-dim float tensor, 1 leaves the averages alone."""
        weights = self.weights(images_seen, global_batch)
        self.blend(weights, skipped, [weight == 1.0 for weight in weights])

    @torch.no_grad()
    def blend(self, weights: Sequence[float] | Tensor, skipped: Tensor, copied: Sequence[bool]) -> None:
        """average += weight (source - average) for what :meth:`weights` says, or for that as a float32 tensor on the device.

        copied: which of the weights are 1. skipped: as for :meth:`update`.
        """
        if not self._sources:
            return
        for average, weight, copy in zip(self.averages, weights, copied, strict=True):
            if copy:  # also of the weights that a skipped step left as they were
                torch._foreach_copy_(average, self._sources)
            elif self._on_host:  # looking at numbers costs nothing here
                if not skipped:
                    torch._foreach_lerp_(average, self._sources, float(weight))
            else:
                # A tensor weight, so that a skipped step needs no look at the flag from the host.
                change = torch._foreach_sub(self._sources, average)
                torch._foreach_mul_(change, weight * (1.0 - skipped))
                torch._foreach_add_(average, change)

    def gather(self, index: int) -> dict[str, Tensor]:
        """The whole average ``index`` by parameter name, on every rank (collective; for previews)."""
        device = self._runtime.device
        if self._layout is None:
            mine = [(share.tensor, share.shape, share.start, share.data.numel()) for share in self._shares]
            self._layout = [[] for _ in range(self._runtime.world_size)]
            dist.all_gather_object(self._layout, mine, group=self._runtime.control)
        sizes = [sum(count for *_, count in shares) for shares in self._layout]
        padded = torch.zeros(max(sizes), device=device)
        position = 0
        for average in self.averages[index]:
            padded[position : position + average.numel()] = average.contiguous().flatten()
            position += average.numel()
        parts = [torch.zeros(max(sizes), device=device) for _ in sizes]
        dist.all_gather(parts, padded)
        whole: dict[str, Tensor] = {}
        for shares, part in zip(self._layout, parts, strict=True):
            position = 0
            for name, shape, start, count in shares:
                if name not in whole:
                    whole[name] = torch.empty(shape, device=device)
                whole[name].view(-1)[start : start + count] = part[position : position + count]
                position += count
        return whole

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of every average, for a checkpoint."""
        for index, average in enumerate(self.averages):
            for share, tensor in zip(self._shares, average, strict=True):
                yield Piece(f"ema.{index}/{share.tensor}", share.shape, share.start, tensor)

    @torch.no_grad()
    def load(self, reader: Reader) -> None:
        """Take this rank's share from a checkpoint of any engine and world size."""
        for index, average in enumerate(self.averages):
            for share, tensor in zip(self._shares, average, strict=True):
                stop = share.start + tensor.numel()
                tensor.copy_(reader.read(f"ema.{index}/{share.tensor}", share.start, stop).view(tensor.shape))
