"""The kernels of one training step: every operation PyTorch dispatches, with the layout of what it reads, its FLOPs and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from benchmarks.kernels_fused import Flow, size_of
from benchmarks.kernels_names import OUR_ATTENTION, group_of, name_of

# They compute nothing: new names for the same memory, memory that nobody has written yet, a look from the host.
NO_KERNEL = {
    "_unsafe_view",
    "_local_scalar_dense",
    "is_pinned",
    "_pin_memory",
    "lift_fresh",
    "scalar_tensor",
    "resize_",
    "set_",
}
ONLY_WRITTEN = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
NUMBERS = ("number", "float")  # types of arguments whose value changes nothing about the time


@dataclass(frozen=True)
class Spec:
    """A floating point tensor, without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> Spec:
        return Spec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


@dataclass
class Kernel:
    """One operation on one kind of input.

    arguments: by name in the schema; a ``Spec`` stands for a tensor of random numbers, a tensor (integers, flags, single numbers) for itself.
    outputs: what it returns, without what it writes in place. flops: 2 per multiply-add, elsewhere 1 for each element; 0 for copies.
    bytes: everything read and everything written, once.
    """

    function: OpOverload
    arguments: dict[str, Any]
    group: str
    name: str
    flops: int
    bytes: int
    outputs: list[Spec]
    count: int = 0

    @property
    def operation(self) -> str:
        """Such as "convolution_backward"."""
        return operation_of(self.function)


def operation_of(function: OpOverload) -> str:
    return function._schema.name.partition("::")[2]


def named(function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names in the schema; what has its default and was not given is left out."""
    names = [argument.name for argument in function._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def written(function: OpOverload) -> dict[str, int]:
    """Arguments that it writes in place: how often their bytes move (2: read and written)."""
    times = 1 if operation_of(function) in ONLY_WRITTEN else 2
    return {a.name: times for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write}


def computes(function: OpOverload, arguments: dict[str, Any], out: Any) -> bool:
    """Whether a kernel runs at all."""
    operation = operation_of(function)
    if function.is_view or function.namespace in ("profiler", "prim") or operation in NO_KERNEL:
        return False
    if operation.startswith(("empty", "new_empty")):
        return False
    return any(tensor.numel() for tensor in [*tensors(list(arguments.values())), *tensors(out)])


def moved(function: OpOverload, arguments: dict[str, Any], results: list[Tensor]) -> int:
    """Bytes read and written, each tensor once."""
    in_place, seen, total = written(function), set(), 0
    for name, value in arguments.items():
        for tensor in tensors(value):
            view = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if name in in_place or view not in seen:
                total += in_place.get(name, 1) * size_of(tensor)
            seen.add(view)
    return total + sum(size_of(tensor) for tensor in results)


def flops_of(function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, group: str) -> int:
    """By torch's own formulas; where there is none, one for each element of the largest argument or result."""
    if operation_of(function).startswith(OUR_ATTENTION):  # two products; backward five, the scores are computed again
        batch, tokens, _, heads, width = args[0].shape
        return (10 if operation_of(function).endswith("_backward") else 4) * batch * heads * tokens**2 * width
    formula = flop_registry.get(function._overloadpacket)
    if formula is not None:
        return formula(*args, **kwargs, out_val=out)
    if group == "copies":
        return 0
    return max(sum(t.numel() for t in tensors(value)) for value in [*args, *kwargs.values(), out])


def _keep(tensor: Tensor) -> Tensor:
    """A copy with the same repeated dimensions."""
    short = tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            short = short.narrow(dim, 0, 1)
    return short.detach().clone().expand(tensor.shape)


def is_data(tensor: Tensor) -> bool:
    """Whether random numbers can stand for it: not indices or flags, nor single numbers such as a step's count or its flag."""
    return tensor.is_floating_point() and tensor.numel() > 1


class Recorder(TorchDispatchMode):
    """Every kernel that runs inside, the same ones counted together: ``kernels``; ``flow``: which one reads what another wrote.

    ``updating``: set while the optimizer and the averages run, whose operations are a group of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flow, self.updating = Flow(), False
        self._kernels: dict[Any, Kernel] = {}

    @property
    def kernels(self) -> list[Kernel]:
        """In the order of their first run."""
        return list(self._kernels.values())

    def around(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """``update`` with ``updating`` set."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            before, self.updating = self.updating, True
            try:
                return update(*args, **kwargs)
            finally:
                self.updating = before

        return marked

    def __torch_dispatch__(self, function: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = named(function, args, kwargs)
        group = group_of(function, self.updating)
        key = (function, group, tuple(_signature(function, arguments)))
        kept = None
        if key not in self._kernels:  # before it runs: it may overwrite them
            kept = {
                name: tree_map(
                    lambda leaf: (
                        (Spec.of(leaf) if is_data(leaf) else _keep(leaf)) if isinstance(leaf, Tensor) else leaf
                    ),
                    value,
                )
                for name, value in arguments.items()
            }
        out = function(*args, **kwargs)
        if not computes(function, arguments, out):
            return out
        aliased = bool(written(function))
        results = [] if aliased else tensors(out)
        self.flow.add(group, arguments, written(function), results)
        if kept is not None:
            self._kernels[key] = Kernel(
                function, kept, group, name_of(operation_of(function), arguments, results),
                flops_of(function, args, kwargs, out, group), moved(function, arguments, results),
                [Spec.of(tensor) for tensor in results],
            )  # fmt: skip
        self._kernels[key].count += 1
        return out


def _signature(function: OpOverload, arguments: dict[str, Any]) -> Iterator[Any]:
    kinds = {argument.name: str(argument.type).lower() for argument in function._schema.arguments}
    for name, value in arguments.items():
        number = kinds[name].removeprefix("optional[").removesuffix("]") in NUMBERS
        yield name
        for leaf in tree_leaves(value):
            yield Spec.of(leaf) if isinstance(leaf, Tensor) else type(leaf).__name__ if number else repr(leaf)
