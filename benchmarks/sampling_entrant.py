"""One way to sample, timed in turns with others; and what happens where it does not fit into the memory."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reference_sampling import Sampling
from ddpm_dist.diffusion import Schedule
from ddpm_dist.diffusion.reverse import ReverseProcess

# What PyTorch says of the GPU, of the host's memory, and of a product of it that could not be made.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class OurSampling(Sampling):
    """``ReverseProcess``, which the trainer and ``ddpm_dist.sample`` use as well."""

    def __init__(
        self, network: nn.Module, shape: tuple[int, ...], labels: Tensor | None, schedule: Schedule, **options: Any
    ) -> None:
        self.process = ReverseProcess(network, schedule, shape, labelled=labels is not None, **options)
        self.labels, self.indices = labels, torch.arange(shape[0], device=options["device"])
        self.evaluations = len(self.process)

    def start(self) -> None:
        self.process.start(0, self.indices, self.labels)

    def step(self) -> None:
        self.process.step()

    def whole(self) -> Tensor:
        return self.process.run(0, self.indices, self.labels)


@dataclass
class Entrant:
    """One way to sample and what was measured of it; ``seconds`` per step, one number for each turn."""

    sampler: str
    system: str
    captured: bool
    make: Callable[[], Sampling]
    loop: Sampling | None = None
    evaluations: int = 0
    steps: int = 1  # of a turn
    seconds: list[float] = field(default_factory=list)
    whole_s: float | None = None
    problem: str | None = None
    _left: int = 0

    def open(self, warmup: int, turn_seconds: float, device: torch.device) -> None:
        """Build it, warm up, and see how many steps fit into a turn."""
        self.loop = self.make()
        self.evaluations = self.loop.evaluations
        self._left = 0
        self._run(min(warmup, self.evaluations), device)
        once = self._run(1, device)
        self.steps = max(1, min(self.evaluations, int(turn_seconds / once)))

    def turn(self, device: torch.device) -> None:
        self.seconds.append(self._run(self.steps, device) / self.steps)

    def _run(self, steps: int, device: torch.device) -> float:
        if self._left < steps:
            self.loop.start()
            self._left = self.evaluations
        self._left -= steps
        _wait(device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.loop.step()
        _wait(device)
        return time.perf_counter() - begin

    def time_whole(self, device: torch.device) -> None:
        _wait(device)
        begin = time.perf_counter()
        self.loop.whole()
        _wait(device)
        self.whole_s = time.perf_counter() - begin

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action`` unless something went wrong before; out of memory is a result, not an error."""
        if self.problem is not None:
            return
        try:
            action(*arguments)
            return
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Outside of the handler, whose traceback holds on to the tensors.
        self.problem, self.loop = "out of memory", None
        free_memory()


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what PyTorch raises when the GPU or the host has no memory left, also when that ended a capture."""
    seen: BaseException | None = error
    while seen is not None:
        words = str(seen).lower()
        if isinstance(seen, torch.OutOfMemoryError | MemoryError) or any(text in words for text in OUT_OF_MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    """Give back what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limit_memory(gigabytes: float | None) -> None:
    """Let allocations of this process fail beyond ``gigabytes`` (None: what is free now), before the kernel kills the process."""
    sizes = {"VmSize": 0, "MemAvailable": 0}
    try:
        for path in ("/proc/self/status", "/proc/meminfo"):
            for line in Path(path).read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in sizes:
                    sizes[name] = 1024 * int(rest.split()[0])
    except OSError:
        return  # not Linux
    more = int(gigabytes * 1e9) if gigabytes is not None else sizes["MemAvailable"]
    resource.setrlimit(resource.RLIMIT_AS, (sizes["VmSize"] + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
