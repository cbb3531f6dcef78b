"""How much memory does a training step take per image, against the least that autograd has to keep for the backward pass?

    python -m benchmarks.activations                                      # the flagship network
    python -m benchmarks.activations --batches 64,128 --compile --json activations.json --markdown activations.md
    python -m benchmarks.activations model.width=16 data.image_size=32    # a smaller network

Minimum: the bytes of the different storages that autograd saves in one step (parameters and buffers left out, each storage once, however
many operations keep it). Peak: the most that is allocated during a step beyond what is allocated before it. Both per image, as the slope
between two batch sizes: what does not grow with the batch (gradients, weights in another precision) drops out of both. Memory is counted
by PyTorch's allocators, on a GPU as max_memory_allocated and on a CPU from the profiler's record of every allocation: bytes that were asked
for, the same in every run; what an allocator keeps in reserve is not in them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.environment import environment, settings_of
from benchmarks.kernels_names import DTYPES
from benchmarks.kernels_step import Workload, settings
from benchmarks.ladder_rungs import OurStep
from benchmarks.ladder_table import number
from benchmarks.options import check_memory
from benchmarks.output import check_target, machine, publish
from benchmarks.sampling_entrant import free_memory, limit_memory
from ddpm_dist.errors import UserError, exit_codes

LARGEST = 20  # tensors of the report
PHASES = ("forward", "backward", "update")
METHOD = {
    "cuda": "max_memory_allocated of PyTorch's CUDA allocator",
    "cpu": "every allocation of PyTorch's CPU allocator, from its profiler",
}


@dataclass
class Saved:
    """One storage that autograd keeps: its bytes, the first tensor saved of it, and the modules that were running whenever one was."""

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    modules: list[str] = field(default_factory=list)  # such as "inc.double_conv.2 GELU"; "loss": none


class Savings:
    """Collects what autograd saves within ``watch()``. network: whose modules give the names; its parameters and buffers do not count."""

    def __init__(self, network: nn.Module, named: bool = True) -> None:
        self.found: list[Saved] = []
        self._network, self._named, self._stack = network, named, ["loss"]
        self._own = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
        self._seen: dict[int, Saved] = {}
        self._alive: list[StorageWeakRef] = []  # as long as these exist no other storage gets the same number

    @contextmanager
    def watch(self) -> Iterator[None]:
        """A context around forward and backward."""
        handles = [
            handle
            for name, module in self._network.named_modules()
            if self._named
            for handle in self._follow(name, module)
        ]
        try:
            with saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _follow(self, name: str, module: nn.Module) -> Iterable[Any]:
        label = f"{name} {type(module).__name__}".strip()
        yield module.register_forward_pre_hook(lambda *_: self._stack.append(label))
        yield module.register_forward_hook(lambda *_: self._stack.pop() and None, always_call=True)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            if storage._cdata not in self._seen:
                self._alive.append(StorageWeakRef(storage))
                self._seen[storage._cdata] = Saved(storage.nbytes(), tuple(tensor.shape), tensor.dtype)
                self.found.append(self._seen[storage._cdata])
            modules = self._seen[storage._cdata].modules
            if self._stack[-1] not in modules:
                modules.append(self._stack[-1])
        return tensor

    @property
    def bytes(self) -> int:
        """Of all storages."""
        return sum(each.bytes for each in self.found)


def slope(values: tuple[float, float], batches: tuple[int, int]) -> float:
    """Per image."""
    return (values[1] - values[0]) / (batches[1] - batches[0])


def peaks(step: Callable[[], Any], inner: Any, device: torch.device) -> dict[str, int]:
    """Bytes beyond what was allocated before the step, at most in each of ``PHASES``. inner: the ``TrainStep`` in it."""
    found = dict.fromkeys(PHASES, 0)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

        def ended(phase: str) -> None:
            found[phase] = torch.cuda.max_memory_allocated(device) - before
            torch.cuda.reset_peak_memory_stats(device)

        _marked(step, inner.engine, ended)
        ended(PHASES[-1])
        return found

    def mark(phase: str) -> None:
        with record_function(f"end of {phase}"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _marked(step, inner.engine, mark)
    phases, allocated = list(PHASES), 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("end of "):
            phases.remove(event.name().removeprefix("end of "))
        elif event.name() == "[memory]":
            allocated += event.nbytes()
            found[phases[0]] = max(found[phases[0]], allocated)
    return found


def _marked(step: Callable[[], Any], engine: Any, ended: Callable[[str], None]) -> None:
    """Run the step; ``ended(phase)`` is called before the next phase begins."""

    def after(phase: str, action: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (ended(phase), action(*args))[1]

    engine.backward, engine.step = after("forward", engine.backward), after("backward", engine.step)
    try:
        step()
    finally:
        del engine.backward, engine.step  # those of the class again


@dataclass
class Measured:
    """One batch size."""

    images: int
    savings: Savings
    phases: dict[str, int]  # bytes
    peaks: list[int]  # of the repeats


def at(work: Workload, compiled: bool, repeats: int) -> Measured:
    """Measure steps of this batch size."""
    step: OurStep = work.step(compiled)
    inner = step._step
    for _ in range(3 if compiled else 2):
        step()
    savings = Savings(inner._network, named=not compiled)
    with savings.watch():
        step()
    found = [peaks(step, inner, work.device) for _ in range(repeats)]
    most = [max(each.values()) for each in found]
    phases = {phase: int(statistics.median(each[phase] for each in found)) for phase in PHASES}
    return Measured(work.images, savings, phases, most)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.batch = args.batches[0]
    config = settings(args, device)
    if device.type == "cpu":
        limit_memory(args.memory_gb)
    found = []
    for images in args.batches:
        found.append(at(Workload(config, device, images), config.train.compile, args.repeats))
        free_memory()
        print(f"batch {images}: done", file=sys.stderr, flush=True)
    small, large = found
    minimum = slope((small.savings.bytes, large.savings.bytes), args.batches)
    peak = slope((statistics.median(small.peaks), statistics.median(large.peaks)), args.batches)
    kept, kinds = sorted(large.savings.found, key=lambda each: -each.bytes), {}
    for each in kept:
        kind = each.modules[0].rpartition(" ")[2]
        kinds[kind] = [a + b for a, b in zip(kinds.get(kind, [0, 0]), (1, each.bytes), strict=True)]
    total = large.savings.bytes
    return {
        "benchmark": "activations", "environment": environment(), "device": str(device), "batches": list(args.batches),
        "config": settings_of(config),
        "method": METHOD[device.type], "repeats": args.repeats,
        "minimum_mb_per_image": minimum / 1e6, "peak_mb_per_image": peak / 1e6, "ratio": peak / minimum,
        "minimum_mb": [each.savings.bytes / 1e6 for each in found], "peak_mb": [statistics.median(each.peaks) / 1e6 for each in found],
        "peak_mb_per_image_turns": [slope(pair, args.batches) / 1e6 for pair in zip(small.peaks, large.peaks, strict=True)],
        "peak_mb_repeats": [[bytes_ / 1e6 for bytes_ in each.peaks] for each in found],
        "phases_mb_per_image": {phase: slope((small.phases[phase], large.phases[phase]), args.batches) / 1e6 for phase in PHASES},
        "kinds": [
            {"kind": kind, "tensors": count, "mb": size / 1e6, "share": size / total}
            for kind, (count, size) in sorted(kinds.items(), key=lambda item: -item[1][1])
        ],
        "largest": [
            {"module": each.modules[0], "also": each.modules[1:], "shape": list(each.shape), "dtype": DTYPES.get(each.dtype, str(each.dtype)),
             "mb_per_image": each.bytes / 1e6 / large.images, "share": each.bytes / total}
            for each in kept[:LARGEST]
        ],
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    config = report["config"]
    phases = ", ".join(f"{phase} {number(value)}" for phase, value in report["phases_mb_per_image"].items())
    lines = [
        f"{machine(report)}, torch {report['environment']['versions'].get('torch')}; {config['model.name']} at "
        f"{config['data.image_size']}x{config['data.image_size']}, {config['train.precision']}"
        f"{', channels_last' if config['train.channels_last'] else ''}{', compiled' if config['train.compile'] else ''}; slope between "
        f"batch {report['batches'][0]} and {report['batches'][1]}; {report['method']}",
        "",
        "| per image | MB |",
        "|---|---:|",
        f"| saved for the backward pass | {report['minimum_mb_per_image']:.2f} |",
        f"| peak of a step | {report['peak_mb_per_image']:.2f} |",
        f"| peak to saved | {report['ratio']:.3f} |",
        "",
        f"Peak within each phase, MB per image: {phases}.",
        "",
        "| kept by | tensors | MB of the larger batch | share |",
        "|---|---:|---:|---:|",
        *(
            f"| {each['kind']} | {each['tensors']} | {number(each['mb'])} | {100 * each['share']:.1f} % |"
            for each in report["kinds"]
        ),
        "",
        "| largest tensors | shape | MB per image | share | also kept by |",
        "|---|---|---:|---:|---|",
    ]
    for each in report["largest"]:
        shape = "x".join(str(side) for side in each["shape"])
        lines.append(
            f"| {each['module']} | {shape} {each['dtype']} | {each['mb_per_image']:.3f} | {100 * each['share']:.1f} % | "
            f"{', '.join(each['also']) or '-'} |"
        )
    return "\n".join(lines)


def _batches(text: str) -> tuple[int, int]:
    try:
        small, large = (int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--batches {text}: two numbers, such as 4,8") from None
    if not 1 <= small < large:
        raise UserError(f"--batches {text}: the first at least 1, the second larger")
    return small, large


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.activations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="cifar64", help="a YAML file or the name of a packaged config")
    add("--batches", default="64,128" if torch.cuda.is_available() else "4,8", help="the two batch sizes")
    add("--repeats", type=int, default=3, help="measured steps of each, at least 1: the bytes are exact")
    add("--compile", action="store_true", help="the compiled step (on a CPU it takes minutes)")
    add("--threads", type=int, help="CPU threads")
    add("--memory-gb", type=float, help="on a CPU: what may be allocated (default: what is free)")
    add("--json", type=Path, help="write the report to this file")
    add("--markdown", type=Path, help="write the tables to this file")
    add("overrides", nargs="*", metavar="section.key=value", help="for example model.width=16")
    args = parser.parse_intermixed_args(argv)
    args.batches = _batches(args.batches)
    for name, value in (("repeats", args.repeats), ("threads", args.threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    return args


@exit_codes
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.activations``."""
    args = parse(argv)
    check_memory(args.memory_gb)
    check_target(args.json)
    check_target(args.markdown, "--markdown")
    found = measure(args)
    publish(found, markdown(found), args.json, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
