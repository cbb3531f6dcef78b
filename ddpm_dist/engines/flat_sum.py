"""Adding up gradients over the ranks in one call, without hooks: what a captured step can replay."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class FlatSum:
    """One buffer that holds the gradients of all ``parameters`` one behind the other, each in its parameter's memory format.

    DistributedDataParallel exchanges its buckets while the backward pass still runs, from hooks on the host. A step that is replayed as a
    graph is one for small batches, where the launches that it saves are worth more than that overlap.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        first = parameters[0]
        self._flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        parts = self._flat.split([p.numel() for p in parameters])
        # as_strided: channels_last weights stay as they lie in memory, and the fused optimizer wants gradients that lie alike.
        self._views = [
            part.as_strided(p.size(), p.stride(), part.storage_offset())
            for part, p in zip(parts, parameters, strict=True)
        ]

    def total(self, gradients: list[Tensor]) -> list[Tensor]:
        """The sum over all ranks, the same on every rank (collective); overwritten by the next call."""
        torch._foreach_copy_(self._views, gradients)
        dist.all_reduce(self._flat)
        return self._views
