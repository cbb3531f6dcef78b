"""CUDA graphs without CUDA: records the operations of a function and replays exactly those, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class HostRead(Exception):
    """A function that is captured asked the device for a number."""


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


class Recording(TorchDispatchMode):
    """Runs operations and notes them with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # what was changed in place, and what it was

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in READS:
            raise HostRead(f"{function} inside of a captured step")
        if function._schema.is_mutable:
            written = {arg.name for arg in function._schema.arguments if arg.alias_info and arg.alias_info.is_write}
            named = dict(zip([arg.name for arg in function._schema.arguments], args, strict=False)) | kwargs
            changed = tensors([value for name, value in named.items() if name in written])
            self.before += [(tensor, tensor.clone()) for tensor in changed]
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, tensors(result)))
        return result


class RecordedCapture:
    """The interface of ``step_graph.CUDACapture``. What the host computed while recording stays as it was then, as in a real graph."""

    replays = 0

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with Recording() as recording:
            outputs = function()
        for tensor, before in reversed(recording.before):  # a capture computes nothing
            tensor.detach().copy_(before)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for operation, args, kwargs, results in recording.operations:
                    if operation.is_view:
                        continue  # still looks at the same memory
                    for old, new in zip(results, tensors(operation(*args, **kwargs)), strict=True):
                        if old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return replay, outputs
