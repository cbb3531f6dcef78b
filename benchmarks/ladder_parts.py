"""Parts of the step on their own, forward and backward: the backends of attention and the ways to upsample, for every shape."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from benchmarks.sampling_entrant import free_memory, out_of_memory
from ddpm_dist.attention_backends import OURS, attention_shapes, backend_named, backends_on, why_not_ours
from ddpm_dist.config import Config
from ddpm_dist.models import blocks, build_model
from ddpm_dist.models.blocks import AttentionBackend, attend

ON_A_CPU = ("flash", "math")
TURN_SECONDS = 0.1  # a turn repeats a part until it lasts about so long
# Largest difference to float64, relative to the largest number.
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 5e-2}


@dataclass
class Variant:
    """One way to compute a part. ``run()`` returns (result, gradient of the input)."""

    name: str
    run: Callable[[], tuple[Tensor, Tensor]]
    seconds: list[float] = field(default_factory=list)
    iterations: int = 1
    difference: float | None = None
    problem: str | None = None

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action`` unless something went wrong before. What a device cannot do is a result."""
        if self.problem is not None:
            return
        try:
            action(*arguments)
        except (RuntimeError, MemoryError) as error:
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            self.problem = "out of memory" if out_of_memory(error) else f"not available: {first}"
        if self.problem is not None:
            free_memory()

    def open(self, expected: tuple[Tensor, Tensor], tolerance: float, seconds: float, device: torch.device) -> None:
        """Compare with float64 (``expected``, of the first image), warm up, and see how often it fits into ``seconds``."""
        self.difference = max(_difference(found[:1], want) for found, want in zip(self.run(), expected, strict=True))
        if not self.difference <= tolerance:
            self.problem = f"wrong: off by {self.difference:.1e} (at most {tolerance:.0e})"
            self.difference = self.difference if math.isfinite(self.difference) else None
            return
        self.run()
        self.iterations = max(1, min(1000, int(seconds / self._time(1, device))))

    def turn(self, device: torch.device) -> None:
        """Measure once more."""
        self.seconds.append(self._time(self.iterations, device))

    def _time(self, count: int, device: torch.device) -> float:
        """Seconds of one run, the mean of ``count``: CUDA events on a GPU, the monotonic clock elsewhere."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            begin.record()
            for _ in range(count):
                self.run()
            end.record()
            torch.cuda.synchronize(device)
            return begin.elapsed_time(end) / 1e3 / count
        start = time.perf_counter()
        for _ in range(count):
            self.run()
        return (time.perf_counter() - start) / count


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def take_turns(
    variants: list[Variant], expected: tuple[Tensor, Tensor], dtype: torch.dtype, turns: int, device: torch.device
) -> list[dict[str, Any]]:
    """Measure the variants in turns, every second one the other way round; the entries of the report."""
    for each in variants:
        each.attempt(each.open, expected, TOLERANCES[dtype], TURN_SECONDS, device)
    for number in range(turns):
        for each in variants[:: 1 if number % 2 == 0 else -1]:
            each.attempt(each.turn, device)
    medians = {each.name: statistics.median(each.seconds) for each in variants if each.problem is None}
    best = min(medians.values(), default=None)
    entries = []
    for each in variants:
        entry: dict[str, Any] = {"variant": each.name, "problem": each.problem, "max_difference": each.difference}
        if each.problem is None:
            entry |= {
                "ms": 1e3 * medians[each.name], "lowest_ms": 1e3 * min(each.seconds), "highest_ms": 1e3 * max(each.seconds),
                "fastest": medians[each.name] == best,
            }  # fmt: skip
        entries.append(entry)
    return entries


def upsampled_shapes(config: Config) -> dict[tuple[int, int], list[str]]:
    """{(channels, size): layers} of every upsampling of the network."""
    found: dict[tuple[int, int], list[str]] = {}
    with torch.device("meta"):
        network = build_model(config.model.name, **config.network_keywords()).eval()
        x = torch.empty(1, config.data.channels, config.data.image_size, config.data.image_size)
        t = torch.empty(1, dtype=torch.int64)

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.setdefault((inputs[0].shape[1], inputs[0].shape[2]), []).append(name)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, blocks.Up):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        network(x, t, None)
    return found


def attention_backends(
    config: Config, device: torch.device, dtype: torch.dtype, batch: int, turns: int
) -> list[dict[str, Any]]:
    """Every kernel that the device may have for every attention of the network, laid out as it lays them out."""
    entries = []
    for (tokens, heads, head_dim), names in attention_shapes(config).items():
        layers = [name.partition(".")[0] for name in names]
        torch.manual_seed(0)
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device).to(dtype).requires_grad_()
        gradient = torch.randn(batch, tokens, heads, head_dim, device=device).to(dtype)

        def run(backend: AttentionBackend, qkv: Tensor = qkv, gradient: Tensor = gradient) -> Any:
            out = attend(qkv, backend)
            return out.detach(), torch.autograd.grad(out, qkv, gradient)[0]

        one = qkv[:1].detach().double().requires_grad_()  # images do not depend on each other
        expected = run(SDPBackend.MATH, one, gradient[:1].double())
        there = [name for name in backends_on(device) if name != OURS or why_not_ours(head_dim, dtype, device) is None]
        variants = [Variant(name, lambda name=name: run(backend_named(name, dtype))) for name in there]
        about = {"layers": layers, "tokens": tokens, "heads": heads, "head_dim": head_dim, "dtype": _name(dtype)}
        entries += [about | entry for entry in take_turns(variants, expected, dtype, turns, device)]
    return entries


def doubling(size: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The matrix (2 size, size) of bilinear upsampling by 2 with aligned corners along one dimension.

    Output j lies at j (size - 1) / (2 size - 1) of the input: two entries in each row, which add up to 1.
    """
    position = torch.arange(2 * size, dtype=torch.float64) * (size - 1) / (2 * size - 1)
    distance = (position[:, None] - torch.arange(size, dtype=torch.float64)).abs()
    return (1.0 - distance).clamp(min=0.0).to(dtype=dtype, device=device)


def upsample_by_product(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns^T for every channel: (B, C, H, W) to (B, C, 2H, 2W), in the memory format of ``x`` without copying it."""
    batch, channels, height, width = x.shape
    if x.is_contiguous():
        return rows @ x @ columns.T
    last = x.permute(0, 2, 3, 1)  # channels_last: this is contiguous
    tall = rows @ last.reshape(batch, height, width * channels)
    wide = columns @ tall.view(batch * 2 * height, width, channels)
    return wide.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def interpolate(x: Tensor) -> Tensor:
    """PyTorch's own, which the original calls."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


def upsampling(
    config: Config, device: torch.device, dtype: torch.dtype, batch: int, turns: int, compiled: bool
) -> list[dict[str, Any]]:
    """The ways to upsample, for every size that occurs; ``compiled``: each of them under torch.compile as well."""
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    entries = []
    for (channels, size), layers in upsampled_shapes(config).items():
        torch.manual_seed(0)
        x = torch.randn(batch, channels, size, size, device=device).to(dtype=dtype, memory_format=layout)
        x.requires_grad_()
        gradient = torch.randn(batch, channels, 2 * size, 2 * size, device=device)
        gradient = gradient.to(dtype=dtype, memory_format=layout)
        matrix = doubling(size, dtype, device)

        def product(x: Tensor, matrix: Tensor = matrix) -> Tensor:
            return upsample_by_product(x, matrix, matrix)

        def run(way: Callable[[Tensor], Tensor], x: Tensor = x, gradient: Tensor = gradient) -> tuple[Tensor, Tensor]:
            out = way(x)
            return out.detach(), torch.autograd.grad(out, x, gradient)[0]

        one = x[:1].detach().double().requires_grad_()
        expected = run(interpolate, one, gradient[:1].double())
        ways = {"interpolate": interpolate, "shifts": blocks._upsample2x_by_shifts, "product": product}
        if compiled:
            ways |= {f"{name}, compiled": torch.compile(way, dynamic=False) for name, way in ways.items()}
        variants = [Variant(name, lambda way=way: run(way)) for name, way in ways.items()]
        about = {"layers": layers, "channels": channels, "size": size, "dtype": _name(dtype), "channels_last": config.train.channels_last}  # fmt: skip
        entries += [about | entry for entry in take_turns(variants, expected, dtype, turns, device)]
    return entries


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"
