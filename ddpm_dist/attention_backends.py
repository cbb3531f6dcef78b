"""Which kernel computes each attention: torch's own choice, one by name, or for every shape the one that was measured fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpm_dist.config import Config
from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model
from ddpm_dist.models.blocks import Attention
from ddpm_dist.runtime import Runtime

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
Shape = tuple[int, int, int]  # tokens, heads, head_dim
REPEATS, REPEAT_SECONDS = 5, 0.01
MOST_WEIGHTS = 2**30  # bytes: more are not written to try the backend that stores them
CLEARLY = (
    0.97  # a backend replaces one that stands before it in BACKENDS if it takes no more than this part of its time
)


def backends_on(device: torch.device) -> list[str]:
    """What a device may have; what it really has also depends on the shape."""
    return list(BACKENDS) if device.type == "cuda" else ["flash", "math"]


def attention_shapes(config: Config) -> dict[Shape, list[str]]:
    """(tokens, heads, head_dim) of every attention of the configured network, and the names of the modules that have it."""
    found: dict[Shape, list[str]] = {}
    with torch.device("meta"):
        network = build_model(config.model.name, **config.network_keywords()).eval()
        x = torch.empty(1, config.data.channels, config.data.image_size, config.data.image_size)
        t = torch.empty(1, dtype=torch.int64)

    def note(name: str) -> Callable[[Attention, tuple[Tensor]], None]:
        def hook(module: Attention, inputs: tuple[Tensor]) -> None:
            _, tokens, channels = inputs[0].shape
            found.setdefault((tokens, module.heads, channels // module.heads), []).append(name)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        network(x, t, None)
    return found


def attend(qkv: Tensor, heads: int, backend: SDPBackend) -> Tensor:
    """Attention laid out as ``blocks.Attention`` lays it out: (B, N, 3 channels) to (B, N, channels)."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def seconds(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, backend: str) -> float | None:
    """Median seconds of forward and backward, None where the device cannot do it or has not the memory."""
    tokens, heads, head_dim = shape
    try:
        qkv = torch.randn(batch, tokens, 3 * heads * head_dim, device=device, dtype=dtype, requires_grad=True)
        gradient = torch.randn(batch, tokens, heads * head_dim, device=device, dtype=dtype)

        def timed(count: int) -> float:
            _finish(device)
            start = time.perf_counter()
            for _ in range(count):
                torch.autograd.grad(attend(qkv, heads, BACKENDS[backend]), qkv, gradient)
            _finish(device)
            return (time.perf_counter() - start) / count

        timed(1)
        count = max(1, min(100, int(REPEAT_SECONDS / timed(1))))
        return statistics.median(timed(count) for _ in range(REPEATS))
    except (RuntimeError, MemoryError):
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(measured: Mapping[str, float | None]) -> str | None:
    """The name with the least time; of two that are about equal the one that comes first. None: there is none."""
    best: str | None = None
    for name, value in measured.items():
        if value is not None and (best is None or value < CLEARLY * measured[best]):
            best = name
    return best


def pin(network: nn.Module, config: Config, batch: int, runtime: Runtime, recorded: Any = None) -> dict[str, str]:
    """Give every attention of ``network`` its backend, as train.attention says; returns them by name, for the checkpoint. Collective.

    batch: images in a micro-batch. recorded: what the checkpoint says; a run that goes on keeps what it has measured, because
    another kernel rounds in another way. Raises UserError where the device has no such kernel for a shape.
    """
    kind = config.train.attention
    layers = {name: module for name, module in network.named_modules() if isinstance(module, Attention)}
    if kind == "auto" or not layers:
        return {}
    device = runtime.device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision, torch.float32)
    chosen: dict[str, str] = {}
    for shape, names in attention_shapes(config).items():
        before = recorded.get(names[0]) if isinstance(recorded, Mapping) else None
        known = kind if kind != "measured" else before if before in backends_on(device) else None
        candidates = [known] if known else backends_on(device)
        chosen |= dict.fromkeys(names, _choose(shape, batch, dtype, runtime, candidates, kind))
    for name, module in layers.items():
        module.backend = BACKENDS[chosen[name]]
    return chosen


def _choose(shape: Shape, batch: int, dtype: torch.dtype, runtime: Runtime, candidates: list[str], kind: str) -> str:
    """The best of ``candidates`` on rank 0's device, the same on every rank."""

    def find() -> str | None:
        measured: dict[str, float | None] = {}
        for name in candidates:
            stored = batch * shape[1] * shape[0] ** 2 * dtype.itemsize
            if name != "math" or stored <= MOST_WEIGHTS or not any(measured.values()):
                measured[name] = seconds(shape, batch, dtype, runtime.device, name)
        best = fastest(measured)
        if kind == "measured" and len(measured) > 1 and best is not None:
            said = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in measured.items() if value is not None)
            print(f"attention over {shape[0]} tokens, {shape[1]} heads of {shape[2]}: {said}; {best} it is", flush=True)
        return best

    best = find() if runtime.is_main else None
    if runtime.world_size > 1:
        best = runtime.broadcast(best)
    if best is None:
        raise UserError(
            f"no {'/'.join(candidates)} attention for {shape[0]} tokens and {shape[1]} heads of {shape[2]} in {dtype} on {runtime.device} "
            "(train.attention); use train.attention=auto"
        )
    return best
