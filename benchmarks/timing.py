"""Timing two loops against each other: turns, medians, peak memory and the rate that MFU is relative to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddpm_dist.flops import peak_flops


@dataclass
class Contender:
    """One training loop. ``step()`` trains on one batch of ``images``; ``waited()`` is the seconds spent on data so far."""

    name: str
    images: int
    step: Callable[[], Any]
    waited: Callable[[], float]
    seconds: list[float] = field(default_factory=list)  # per step, one number per turn
    wait_share: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def turn(self, steps: int, settle: int, device: torch.device) -> None:
        """Time ``steps`` steps after ``settle`` untimed ones."""
        for _ in range(settle):
            self.step()
        _finish_work(device)
        _reset_peak(device)
        start, waited = time.perf_counter(), self.waited()
        for _ in range(steps):
            self.step()
        _finish_work(device)
        elapsed = time.perf_counter() - start
        self.seconds.append(elapsed / steps)
        self.wait_share.append(min(1.0, (self.waited() - waited) / elapsed))
        self.peak_bytes = max(self.peak_bytes, _peak(device))

    def report(self, flops_per_image: int, peak: float) -> dict[str, Any]:
        """Medians and extremes over the turns."""
        rates = [self.images / seconds for seconds in self.seconds]
        median = statistics.median(rates)
        return {
            "images_per_sec": median,
            "images_per_sec_lowest": min(rates),
            "images_per_sec_highest": max(rates),
            "images_per_sec_turns": rates,
            "step_ms": 1e3 * statistics.median(self.seconds),
            "data_wait_frac": statistics.median(self.wait_share),
            "peak_memory_gb": self.peak_bytes / 1e9,
            "tflops": median * flops_per_image / 1e12,
            "mfu": median * flops_per_image / peak if peak else None,
        }


def peak_rate(device: torch.device) -> tuple[float, str]:
    """FLOP/s that MFU is relative to, and its source: the data sheet's bf16 rate, else a large float32 matrix product.

    The second is a measurement: call it several times, between other work, and take the highest.
    """
    if known := peak_flops(device):
        return known, "data sheet, dense bf16"
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        _finish_work(device)
        start = time.perf_counter()
        a @ a
        _finish_work(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured, float32 matrix product of {size}"


def _finish_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest resident set
    except OSError:
        pass


def _peak(device: torch.device) -> int:
    """Bytes: the most since ``_reset_peak``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
