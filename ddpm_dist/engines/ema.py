"""Exponential moving averages of the weights, each stored once in the whole job: rank r keeps 1/W of every average."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_dist.checkpoint.format import Piece, Reader
from ddpm_dist.engines.partition import partition


class ShardedEMA:
    """fp32 averages updated from the local weights without communication; only :meth:`gather` communicates.

    half_lives: images after which a weight's contribution has halved, so that the average does not depend on the batch
    size; one step of G images keeps 0.5^(G / half_life). (A factor of 0.995 per step is a half-life of 138.3 G images.)
    warmup: images during which the average is a copy of the weights.
    """

    def __init__(
        self, parameters: dict[str, Tensor], half_lives: list[float], warmup: int, rank: int, world_size: int
    ) -> None:
        self.half_lives, self.warmup = half_lives, warmup
        self._parameters = parameters
        self._shares = partition({name: tensor.shape for name, tensor in parameters.items()}, world_size)
        self._mine = self._shares[rank]
        self._sources = [rows.of(parameters[rows.name].detach()) for rows in self._mine]
        self.averages = [[source.to(torch.float32, copy=True) for source in self._sources] for _ in half_lives]

    @torch.no_grad()
    def reset(self) -> None:
        """Make every average a copy of the weights."""
        for average in self.averages:
            if average:
                torch._foreach_copy_(average, self._sources)

    @torch.no_grad()
    def update(self, images_seen: int, global_batch: int, skipped: Tensor) -> None:
        """After a step that brought the run to ``images_seen``. skipped: 0-dim float tensor, 1 leaves the averages alone."""
        if not self._sources:
            return
        for half_life, average in zip(self.half_lives, self.averages, strict=True):
            if images_seen <= self.warmup:
                torch._foreach_copy_(average, self._sources)
                continue
            weight = 1.0 - 0.5 ** (global_batch / half_life)
            if skipped.device.type == "cpu":  # looking at the flag costs nothing here
                if not skipped:
                    torch._foreach_lerp_(average, self._sources, weight)
                continue
            # A tensor weight, so that a skipped step needs no look at the flag from the host.
            change = torch._foreach_sub(self._sources, average)
            torch._foreach_mul_(change, weight * (1.0 - skipped))
            torch._foreach_add_(average, change)

    def gather(self, index: int) -> dict[str, Tensor]:
        """The whole average ``index`` by parameter name, on every rank (collective; for previews and export)."""
        device = next(iter(self._parameters.values())).device
        mine = [average.contiguous().flatten() for average in self.averages[index]]
        flat = torch.cat(mine) if mine else torch.empty(0, device=device)
        sizes = [sum(rows.of(self._parameters[rows.name]).numel() for rows in share) for share in self._shares]
        parts = [torch.zeros(max(sizes), device=device) for _ in sizes]
        padded = torch.zeros(max(sizes), device=device)
        padded[: flat.numel()] = flat
        dist.all_gather(parts, padded)
        whole = {
            name: torch.empty(tensor.shape, dtype=torch.float32, device=device)
            for name, tensor in self._parameters.items()
        }
        for share, part in zip(self._shares, parts, strict=True):
            position = 0
            for rows in share:
                target = rows.of(whole[rows.name])
                target.copy_(part[position : position + target.numel()].view(target.shape))
                position += target.numel()
        return whole

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of every average, for a checkpoint."""
        for index, average in enumerate(self.averages):
            for rows, tensor in zip(self._mine, average, strict=True):
                shape = self._parameters[rows.name].shape
                start, _ = rows.flat_range(shape)
                yield Piece(f"ema.{index}/{rows.name}", tuple(shape), start, tensor)

    @torch.no_grad()
    def load(self, reader: Reader) -> None:
        """Take this rank's share from a checkpoint of any world size."""
        for index, average in enumerate(self.averages):
            for rows, tensor in zip(self._mine, average, strict=True):
                start, stop = rows.flat_range(self._parameters[rows.name].shape)
                tensor.copy_(reader.read(f"ema.{index}/{rows.name}", start, stop).view(tensor.shape))
