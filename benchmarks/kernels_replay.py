"""Kernels of the step one at a time, on random numbers laid out as in the step, and the other ways to compute the same."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.utils._pytree import tree_map

from benchmarks.kernels_names import OUR_ATTENTION, is_attention
from benchmarks.kernels_record import Kernel, Spec, tensors, written
from benchmarks.ladder_parts import ON_A_CPU
from benchmarks.sampling_entrant import free_memory, out_of_memory
from ddpm_dist.attention_backends import SDPA

TURN_SECONDS = 0.02  # a repeat runs a kernel until it lasts about so long
MOST_RUNS = 50  # of a repeat; more launches than a GPU's queue holds would wait for the host
# Largest difference between two ways to compute the same, relative to the largest number.
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
# Of what these read no number is negative.
NOT_NEGATIVE = {"rstd", "exp_avg_sqs", "max_exp_avg_sqs"}
ROOTS = {"sqrt", "rsqrt", "log"}
FEW = 8  # channels; tensor cores want a multiple of eight

Run = Callable[[], list[Tensor]]


def random(spec: Spec, positive: bool = False) -> Tensor:
    """Normal random numbers in this layout; none is zero."""
    last = sum((length - 1) * stride for length, stride in zip(spec.shape, spec.stride, strict=True))
    numbers = torch.randn(last + 1, dtype=spec.dtype, device=spec.device)
    return (numbers.abs_().add_(0.1) if positive else numbers).as_strided(spec.shape, spec.stride)


def inputs(kernel: Kernel) -> dict[str, Any]:
    """Arguments for the kernel: random numbers, but indices, flags and single numbers as they were."""
    positive = kernel.operation in ROOTS

    def fill(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Spec):
            return random(leaf, positive or name in NOT_NEGATIVE)
        return leaf.clone() if isinstance(leaf, Tensor) and 0 not in leaf.stride() else leaf

    made = {name: tree_map(lambda leaf, name=name: fill(name, leaf), value) for name, value in kernel.arguments.items()}
    if is_attention(kernel.operation) and kernel.operation.endswith("_backward"):
        _attend(kernel, made)
    return made


def _attend(kernel: Kernel, made: dict[str, Any]) -> None:
    """What the forward kernel hands to its backward belongs to these queries: anything else would overflow."""
    if kernel.operation.startswith(OUR_ATTENTION):
        made["out"], made["logs"] = torch.ops.ddpm_dist.attention_avx512(made["qkv"])
        return
    forward = getattr(torch.ops.aten, kernel.operation.removesuffix("_backward")).default
    names = [argument.name for argument in forward._schema.arguments]
    chosen = {name: made[name] for name in names if name in made} | {"compute_log_sumexp": True}
    out = call(forward, {name: value for name, value in chosen.items() if name in names})
    made["out"], made["logsumexp"] = out[0], out[1]
    if "philox_seed" in made:
        found = dict(zip((result.name for result in forward._schema.returns), out, strict=True))
        made |= {name: found[name] for name in ("philox_seed", "philox_offset") if name in found}


def call(function: Any, arguments: dict[str, Any]) -> Any:
    """``function`` with arguments by their names in the schema: by position up to the first that is not given."""
    given, rest = [], dict(arguments)
    for argument in function._schema.arguments:
        if argument.kwarg_only or argument.name not in rest:
            break
        given.append(rest.pop(argument.name))
    return function(*given, **rest)


class Clock:
    """Seconds of a run: CUDA events around launches that wait in the queue, the monotonic clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, run: Callable[[], Any], count: int) -> float:
        """Mean seconds of ``count`` runs, one after the other."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                run()
            return (time.perf_counter() - start) / count
        # The GPU is kept busy until all launches wait in its queue, so that not the host's speed is measured.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        launching = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(2e9 * min(0.05, 2 * launching * count + 2e-5)))  # in cycles, about 2 GHz
        begin.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3 / count


@dataclass
class Way:
    """One way to compute a kernel. ``make()`` returns its run and what has to be restored before each repeat (what it overwrites)."""

    name: str
    make: Callable[[], tuple[Run, list[Tensor]]]
    context: Callable[[], AbstractContextManager] = nullcontext
    seconds: list[float] = field(default_factory=list)
    problem: str | None = None
    _run: Run | None = None
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _count: int = 1

    def open(self, clock: Clock) -> list[Tensor]:
        """Make the inputs, run once, see what came of it, and how often it fits into a repeat; returns what was computed."""
        with self.context():
            self._run, overwritten = self.make()
            self._kept = [(live, live.clone()) for live in overwritten]
            results = self._run()
            if overwritten:
                results = overwritten
                data = [pair for pair in self._kept if pair[0].numel() > 1]
                if data and all(torch.equal(live, before) for live, before in data):
                    self.problem = "it changed nothing"
            elif results and all(_empty(result) for result in results):
                self.problem = "it computed nothing but zeros"
            results = [result.clone() for result in results] if overwritten else results
            once = clock.time(self._run, 1)
            self._count = max(1, min(MOST_RUNS, int(TURN_SECONDS / max(once, 1e-7))))
        return results

    def turn(self, clock: Clock) -> None:
        """Measure once more, from the same inputs."""
        for live, before in self._kept:
            live.copy_(before)
        with self.context():
            self.seconds.append(clock.time(self._run, self._count))

    def close(self) -> None:
        self._run, self._kept = None, []

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do ``action`` unless something went wrong before. What a device cannot do is a result."""
        if self.problem is not None:
            return None
        try:
            return action(*arguments)
        except (RuntimeError, MemoryError) as error:
            self.problem = why(error)
        self.close()
        free_memory()
        return None

    def report(self) -> dict[str, Any]:
        """Milliseconds of one run, or the problem."""
        entry: dict[str, Any] = {"way": self.name, "ms": None, "problem": self.problem}
        if self.problem is None:
            entry |= {
                "ms": 1e3 * statistics.median(self.seconds),
                "lowest_ms": 1e3 * min(self.seconds),
                "highest_ms": 1e3 * max(self.seconds),
            }
        return entry


def why(error: Exception) -> str:
    """What kept a way from running, in one line."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "out of memory" if out_of_memory(error) else f"not available: {first}"


def prepared(make: Callable[[], list[list[Way]]], kernels: int) -> list[list[Way]]:
    """The ways of some kernels from ``make``; where not even their inputs can be made, that is the problem of each."""
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        problem = why(error)
    free_memory()
    return [[Way("as it is", lambda: (list, []), problem=problem)] for _ in range(kernels)]


def _empty(result: Tensor) -> bool:
    return result.is_floating_point() and result.numel() > 1 and not bool(result.any())


def race(ways: list[Way], clock: Clock, turns: int) -> list[dict[str, Any]]:
    """Measure in turns, every second one the other way round. The first is the step's own: the others must compute the same."""
    expected: list[Tensor] | None = None
    for way in ways:
        results = way.attempt(way.open, clock)
        if way is ways[0]:
            expected = results
        elif results is not None and way.problem is None:
            way.problem = "nothing to compare with" if expected is None else wrong(results, expected)
        del results
    for number in range(turns):
        for way in ways[:: 1 if number % 2 == 0 else -1]:
            way.attempt(way.turn, clock)
    for way in ways:
        way.close()
    return [way.report() for way in ways]


def wrong(found: list[Tensor], expected: list[Tensor]) -> str | None:
    """What is wrong with results that should be ``expected``; None: nothing."""
    for mine, theirs in zip(found, expected, strict=False):
        if theirs.is_floating_point():
            mine = mine[tuple(slice(length) for length in theirs.shape)]  # the others are channels that were added
            error = float((mine.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            limit = TOLERANCES.get(theirs.dtype, TOLERANCES[torch.bfloat16])
            if not error <= limit:
                return (
                    f"wrong: off by {error:.1e} (at most {limit:.0e})" if math.isfinite(error) else "wrong: not finite"
                )
    return None


def ways_of(kernel: Kernel) -> list[Way]:
    """The kernel as it runs in the step and, for convolutions, in the other memory format and with more channels."""
    shared = inputs(kernel)
    own = Way("as it is", lambda: _replay(kernel, shared))
    if kernel.group != "convolution":
        return [own]
    ways = [own]
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        other = _convert(
            shared, lambda value, layout=layout: value.contiguous(memory_format=layout) if value.dim() == 4 else value
        )
        if [value.stride() for value in tensors(other)] != [value.stride() for value in tensors(shared)]:
            ways.append(Way(name, lambda other=other: _replay(kernel, other)))
    for channels in (4, FEW):
        if shared["input"].shape[1] < channels and shared["groups"] == 1:
            wider = {
                name: _pad(value, channels) if name in ("input", "weight") else value for name, value in shared.items()
            }
            ways.append(Way(f"{channels} input channels", lambda wider=wider: _replay(kernel, wider)))
    return ways


def _convert(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _pad(value: Tensor, channels: int) -> Tensor:
    """With zeros behind the input channels, in the same memory format."""
    layout = torch.contiguous_format if value.is_contiguous() else torch.channels_last
    return F.pad(value, (0, 0, 0, 0, 0, channels - value.shape[1])).contiguous(memory_format=layout)


def _replay(kernel: Kernel, arguments: dict[str, Any]) -> tuple[Run, list[Tensor]]:
    overwritten = [tensor for name in written(kernel.function) for tensor in tensors(arguments.get(name))]

    def run() -> list[Tensor]:
        return tensors(call(kernel.function, arguments))

    return run, overwritten


def attention_ways(forward: Kernel, backward: Kernel | None, device: torch.device) -> list[list[Way]]:
    """Forward and backward of one attention as they run in the step, and with every backend that the device may have."""
    made = inputs(forward)
    read = ("qkv",) if forward.operation == OUR_ATTENTION else ("query", "key", "value")
    ways, back = [Way("as it is", lambda: _replay(forward, made))], []
    others = inputs(backward) | {name: made[name] for name in read} if backward else {}
    if backward:
        _attend(backward, others)
        back = [Way("as it is", lambda: _replay(backward, others))]
    for name, backend in SDPA.items():
        if device.type != "cuda" and name not in ON_A_CPU:
            continue

        def context(backend: Any = backend) -> AbstractContextManager:
            return sdpa_kernel(backend)

        def once() -> tuple[list[Tensor], Tensor]:
            leaves = [made[key].detach().requires_grad_() for key in read]
            with torch.enable_grad():
                if len(leaves) > 1:
                    return leaves, F.scaled_dot_product_attention(*leaves, scale=made.get("scale"))
                q, k, v = (part.transpose(1, 2) for part in leaves[0].unbind(2))
                return leaves, F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        def there(once: Any = once) -> tuple[Run, list[Tensor]]:
            return (lambda: [once()[1].detach()]), []

        def back_again(once: Any = once) -> tuple[Run, list[Tensor]]:
            leaves, out = once()
            gradient = next(others[key] for key in ("grad_out", "grad_out_", "gradient") if key in others)
            return (lambda: list(torch.autograd.grad(out, leaves, gradient, retain_graph=True))), []

        ways.append(Way(name, there, context))
        if backward:
            back.append(Way(name, back_again, context))
    return [ways, back] if backward else [ways]
