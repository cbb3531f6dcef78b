"""Who owns which part of the model's tensors: rows (slices of the first dimension), balanced by element count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist.checkpoint.format import Piece


@dataclass(frozen=True)
class Rows:
    """Rows first..last-1 of the tensor ``name``. A tensor without dimensions counts as one row."""

    name: str
    first: int
    last: int

    def of(self, tensor: Tensor) -> Tensor:
        """The owned rows as a view. Rows are contiguous in both memory formats, so a channels_last weight needs no copy."""
        return tensor if tensor.dim() == 0 else tensor[self.first : self.last]

    def flat_range(self, shape: torch.Size) -> tuple[int, int]:
        """Where the rows lie in the row-major flattened tensor: [start, stop)."""
        row = 1
        for size in shape[1:]:
            row *= size
        return self.first * row, self.last * row


def partition(shapes: dict[str, torch.Size], world_size: int) -> list[list[Rows]]:
    """Cut the tensors, laid end to end in the given order, into ``world_size`` shares of equal size up to one row."""
    total = sum(shape.numel() for shape in shapes.values())
    bounds = [total * rank // world_size for rank in range(1, world_size)]
    shares: list[list[Rows]] = [[] for _ in range(world_size)]
    rank, position = 0, 0
    for name, shape in shapes.items():
        rows = shape[0] if len(shape) else 1
        size = shape.numel() // rows if rows else 0
        first = 0
        while first < rows:
            while rank < world_size - 1 and position >= bounds[rank]:
                rank += 1
            # Enough rows to reach the bound, rounded up: a row never belongs to two ranks.
            room = rows - first if rank == world_size - 1 else -((position - bounds[rank]) // max(size, 1))
            last = min(rows, first + max(1, room))
            shares[rank].append(Rows(name, first, last))
            position += (last - first) * size
            first = last
    return shares


def replicated_shares(parameters: dict[str, Tensor], rank: int, world_size: int) -> list[Piece]:
    """Rank ``rank``'s share of tensors that every rank holds whole, as live views."""
    shares = partition({name: tensor.shape for name, tensor in parameters.items()}, world_size)[rank]
    return [
        Piece(rows.name, tuple(shape), rows.flat_range(shape)[0], rows.of(parameters[rows.name].detach()))
        for rows in shares
        for shape in [parameters[rows.name].shape]
    ]


def same_rows(share: Piece, tensor: Tensor) -> Tensor:
    """The part of ``tensor`` (of the share's whole shape) that lies where the share lies, as a view."""
    if not share.shape:
        return tensor
    row = max(1, tensor[:1].numel())
    return tensor[share.start // row : share.start // row + share.data.shape[0]]
