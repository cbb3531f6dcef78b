"""The bytes that must move where everything but products is fused: what a compiler can reach at best.

Operations that are no products (convolution, matrix product, attention) or parts of the optimizer can be joined as long as no product lies
between them. Their depth is the largest number of products on a way to them; all operations of one depth make one pass, which reads every
tensor from outside once and writes once what somebody outside reads. What stays within the pass costs nothing. Computing a value a second
time in a later pass instead of storing it is not considered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from benchmarks.kernels_names import FUSED


@dataclass
class Value:
    """The contents of one storage between two writes."""

    depth: int = 0
    fused: bool = False  # written inside a pass
    whole: int = 0  # bytes of the storage
    size: int = 0  # bytes that the pass wrote
    read_by: dict[int, dict[Any, int]] = field(
        default_factory=dict
    )  # depth of a pass: bytes of each view that it reads
    outside: bool = False  # read by a product or the optimizer


class Flow:
    """Fed with the operations in the order in which they run."""

    def __init__(self) -> None:
        self._values: list[Value] = []
        self._current: dict[int, Value] = {}
        self._alive: list[StorageWeakRef] = []  # as long as these exist no other storage gets the same number

    def add(self, group: str, arguments: dict[str, Any], in_place: Mapping[str, int], results: list[Tensor]) -> None:
        """One operation: what it reads, what of it is overwritten, and its results (after it ran)."""
        fused = group in FUSED
        inputs = [
            (name, leaf) for name, value in arguments.items() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)
        ]
        read = [(self._value(tensor), tensor) for name, tensor in inputs if in_place.get(name) != 1]
        depth = max([value.depth for value, _ in read], default=0)
        if fused:
            depth = max([value.depth if value.fused else value.depth + 1 for value, _ in read], default=1)
        for value, tensor in read:
            if fused:
                view = (tensor.storage_offset(), tensor.shape, tensor.stride())
                value.read_by.setdefault(depth, {})[view] = size_of(tensor)
            else:
                value.outside = True
        for tensor in [*(tensor for name, tensor in inputs if name in in_place), *results]:
            self._value(tensor)
            storage = tensor.untyped_storage()
            value = Value(depth, fused, storage.nbytes(), size_of(tensor))
            self._values.append(value)
            self._current[storage._cdata] = value

    def bytes(self) -> int:
        """Read and written by all passes."""
        total = 0
        for value in self._values:
            for depth, views in value.read_by.items():
                if not (value.fused and depth == value.depth):
                    total += min(value.whole, sum(views.values()))
            if value.fused and (value.outside or any(depth != value.depth for depth in value.read_by)):
                total += value.size
        return total

    def _value(self, tensor: Tensor) -> Value:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._current:
            self._alive.append(StorageWeakRef(storage))
            value = Value(whole=storage.nbytes())
            self._values.append(value)
            self._current[storage._cdata] = value
        return self._current[storage._cdata]


def size_of(tensor: Tensor) -> int:
    """Bytes of its elements, those that a broadcast repeats counted once."""
    count = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else min(length, 1)
    return count
