"""Summing gradients in an order that does not depend on the number of ranks.

Addition of floating point numbers is not associative, so an all-reduce over 2 and over 4 ranks differ in the last bits. Here every
micro-batch is a leaf of one binary tree over the whole global batch, and the tree is summed in the same order whoever holds which leaf:
with the same micro-batch, 1, 2 and 4 ranks end up with the same bits. The price is one backward pass per leaf and gathering O(log)
partial sums; it is for audits, not for speed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Node = tuple[int, int, list[Tensor]]  # level, index within the level, the sum


class TreeSum:
    """Sums lists of tensors over leaves ``first_leaf``, ``first_leaf + 1`` ... of a tree that ``world_size`` ranks share."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._nodes: list[Node] = []

    def add(self, leaf: int, tensors: list[Tensor]) -> None:
        """The next leaf of this rank (consecutive numbers). The tensors are taken over."""
        self._nodes.append((0, leaf, tensors))
        _merge(self._nodes)

    def total(self) -> list[Tensor]:
        """The sum over all leaves of all ranks, the same bits on every rank (collective). Starts over for the next step."""
        nodes, self._nodes = self._nodes, []
        if self._world_size > 1:
            nodes = self._everybody(nodes)
        _merge_all(nodes)
        # Leaves that do not fill a power of two leave several roots; they are added from the last to the first.
        result = nodes.pop()[2]
        while nodes:
            torch._foreach_add_(nodes[-1][2], result)
            result = nodes.pop()[2]
        return result

    def _everybody(self, mine: list[Node]) -> list[Node]:
        places: list[list[tuple[int, int]]] = [[] for _ in range(self._world_size)]
        dist.all_gather_object(places, [(level, index) for level, index, _ in mine])
        most = max(len(place) for place in places)
        gathered: list[list[list[Tensor]]] = [[[] for _ in range(most)] for _ in places]
        like = mine[0][2]
        for tensor in range(len(like)):  # one tensor at a time: only its copies are held twice
            for number in range(most):
                value = mine[number][2][tensor] if number < len(mine) else torch.zeros_like(like[tensor])
                parts = [torch.empty_like(like[tensor], memory_format=torch.contiguous_format) for _ in places]
                dist.all_gather(parts, value.contiguous())
                for rank, part in enumerate(parts):
                    gathered[rank][number].append(part)
        return [
            (level, index, gathered[rank][number])
            for rank, place in enumerate(places)
            for number, (level, index) in enumerate(place)
        ]


def _merge(nodes: list[Node]) -> None:
    """Merge the last two nodes as long as they are siblings."""
    while len(nodes) > 1 and nodes[-1][0] == nodes[-2][0] and nodes[-2][1] % 2 == 0:
        level, index, right = nodes.pop()
        _, _, left = nodes.pop()
        torch._foreach_add_(left, right)
        nodes.append((level + 1, index // 2, left))


def _merge_all(nodes: list[Node]) -> None:
    """Merge siblings anywhere, lower levels first, until none are left."""
    waiting, done = nodes[::-1], []
    while waiting:
        done.append(waiting.pop())
        _merge(done)
    nodes[:] = done
