"""Timing loops against each other: turns, single steps, medians, peak memory and the rate that MFU is relative to."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Of so many steps at least a percentile says something: a twentieth of 20 is one step.
ENOUGH = {5: 20, 50: 1, 95: 20, 99: 100}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Clock:
    """Moments of the work on a device: CUDA events, which wait for nothing, or the monotonic clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def now(self) -> Any:
        """A moment for :meth:`between`."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds. On CUDA after the device has passed both."""
        return begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Take down when the body begins and ends, for :meth:`take`."""
        begin = self.now()
        yield
        self.spans[name].append((begin, self.now()))

    def take(self, name: str) -> list[float]:
        """Seconds of each span of this name so far, which are forgotten."""
        finish_work(self.device)
        return [self.between(*pair) for pair in self.spans.pop(name, [])]


@dataclass
class Contender:
    """One training loop. ``step()`` trains on one batch of ``images``; ``waited()`` is the seconds spent on data so far."""

    name: str
    images: int
    step: Callable[[], Any]
    waited: Callable[[], float]
    seconds: list[float] = field(default_factory=list)  # per step, one number per turn
    single: list[float] = field(default_factory=list)  # every step of every turn
    wait_share: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def turn(self, steps: int, settle: int, device: torch.device) -> None:
        """Time ``steps`` steps after ``settle`` untimed ones."""
        clock = Clock(device)
        for _ in range(settle):
            self.step()
        finish_work(device)
        reset_peak(device)
        start, waited = time.perf_counter(), self.waited()
        marks = [clock.now()]
        for _ in range(steps):
            self.step()
            marks.append(clock.now())
        finish_work(device)
        elapsed = time.perf_counter() - start
        self.seconds.append(elapsed / steps)
        self.single += [clock.between(*pair) for pair in zip(marks, marks[1:], strict=False)]
        self.wait_share.append(min(1.0, (self.waited() - waited) / elapsed))
        self.peak_bytes = max(self.peak_bytes, peak_bytes(device))

    def report(self, flops_per_image: int, peak: float, nominal: float = 0.0, ranks: int = 1) -> dict[str, Any]:
        """Medians and extremes over the turns. peak, nominal: FLOP/s of all ranks, 0 where it is not known."""
        rates = [self.images / seconds for seconds in self.seconds]
        median = statistics.median(rates)
        shares = {
            key: flops_per_image / whole if whole else None for key, whole in (("mfu", peak), ("mfu_nominal", nominal))
        }
        return {
            "images_per_sec": median,
            "images_per_sec_lowest": min(rates),
            "images_per_sec_highest": max(rates),
            "images_per_sec_turns": rates,
            "step_ms": 1e3 * statistics.median(self.seconds),
            "step_ms_turns": [1e3 * seconds for seconds in self.seconds],
            "step_percentiles": percentiles(self.single),
            "data_wait_frac": statistics.median(self.wait_share),
            "peak_memory_gb": self.peak_bytes / 1e9,
            "peak_memory_mb_per_image": self.peak_bytes / 1e6 * ranks / self.images,
            "tflops": median * flops_per_image / 1e12,
            "tflops_turns": [rate * flops_per_image / 1e12 for rate in rates],
            **{key: share and median * share for key, share in shares.items()},
            "mfu_turns": [rate * shares["mfu"] for rate in rates] if peak else None,
            "mfu_nominal_turns": [rate * shares["mfu_nominal"] for rate in rates] if nominal else None,
        }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """How many single steps there are, and in ms those percentiles that so many steps can tell."""
    found: dict[str, float] = {"steps": len(seconds)}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [*seconds] * 99
    for percent, enough in ENOUGH.items():
        if len(seconds) >= enough:
            found[f"p{percent}_ms"] = 1e3 * cuts[percent - 1]
    return found


def matmul_rate(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s of a large matrix product in ``precision`` (bf16, fp16, fp32), and in words what was measured.

    Call it several times, between other work, and take the highest.
    """
    size, products = (8192, 20) if device.type == "cuda" else (2048, 4)
    dtype = DTYPES[precision]
    words = str(dtype).removeprefix("torch.")
    if device.type == "cuda" and precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        words += " (TF32)"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    a @ b  # the library chooses its kernel
    for _ in range(products):
        with clock.span("product"):
            a @ b
    return 2 * size**3 / min(clock.take("product")), f"measured, {words} matrix product of {size}"


def finish_work(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """From now on counts what :func:`peak_bytes` says."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest resident set
    except OSError:
        pass


def peak_bytes(device: torch.device) -> int:
    """Bytes: the most since ``reset_peak``; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
