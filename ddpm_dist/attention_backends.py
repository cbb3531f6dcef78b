"""Which kernel computes each attention: chosen by rule, one by name, or for every shape the one that was measured fastest."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from ddpm_dist.config import Config
from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model
from ddpm_dist.models.blocks import Attention, AttentionBackend, attend
from ddpm_dist.runtime import Runtime

OURS = "avx512"  # models/attention_cpu.py, which is imported where it is used
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = (*SDPA, OURS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of train.precision; else float32
Shape = tuple[int, int, int]  # tokens, heads, head_dim
REPEATS, REPEAT_SECONDS = 5, 0.01
MOST_WEIGHTS = 2**30  # bytes: more are not written to try the backend that stores them
CLEARLY = (
    0.97  # a backend replaces one that stands before it in BACKENDS if it takes no more than this part of its time
)


def backends_on(device: torch.device) -> list[str]:
    """What a device may have; what it really has also depends on the shape and the precision."""
    return list(SDPA) if device.type == "cuda" else ["flash", "math", OURS]


def backend_named(name: str, dtype: torch.dtype) -> AttentionBackend:
    """What ``blocks.attend`` takes; dtype: of the numbers."""
    if name != OURS:
        return SDPA[name]
    from ddpm_dist.models import attention_cpu

    return attention_cpu.ALWAYS[dtype]


def why_not_ours(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why avx512 cannot compute such heads here; None: it can. May compile it, which takes seconds."""
    if device.type != "cpu":
        return "avx512 is for CPUs"
    from ddpm_dist.models import attention_cpu

    if head_dim not in attention_cpu.WIDTHS:
        return f"avx512 is for heads of {', '.join(map(str, attention_cpu.WIDTHS))} features"
    return attention_cpu.why_not(dtype)


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


def seconds(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, backend: str) -> float | None:
    """Median seconds of forward and backward, None where the device cannot do it or has not the memory."""
    tokens, heads, head_dim = shape
    if backend == OURS and why_not_ours(head_dim, dtype, device):
        return None
    function = backend_named(backend, dtype)
    try:
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
        gradient = torch.randn(batch, tokens, heads, head_dim, device=device, dtype=dtype)

        def timed(count: int) -> float:
            _finish(device)
            start = time.perf_counter()
            for _ in range(count):
                torch.autograd.grad(attend(qkv, function), qkv, gradient)
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
    if not layers:
        return {}
    device, dtype = runtime.device, DTYPES.get(config.train.precision, torch.float32)
    if kind == "auto":
        _choose_ours(network, config, dtype, runtime)
        return {}
    reason = _reason_on_any(dtype, runtime) if device.type == "cpu" and kind in (OURS, "measured") else None
    there = [name for name in backends_on(device) if name != OURS or reason is None]
    chosen: dict[str, str] = {}
    for shape, names in attention_shapes(config).items():
        before = recorded.get(names[0]) if isinstance(recorded, Mapping) else None
        known = kind if kind != "measured" else before if before in there else None
        if known == OURS and reason:
            raise UserError(f"train.attention=avx512 is not possible: {reason}; use train.attention=auto")
        chosen |= dict.fromkeys(names, _choose(shape, batch, dtype, runtime, [known] if known else there, kind))
    for name, module in layers.items():
        module.backend = backend_named(chosen[name], dtype)
    return chosen


def _choose_ours(network: nn.Module, config: Config, dtype: torch.dtype, runtime: Runtime) -> None:
    """avx512 where it pays, on all ranks or none."""
    if runtime.device.type != "cpu":
        return
    from ddpm_dist.models import attention_cpu

    possible = any(attention_cpu.pays(tokens, width, dtype) for tokens, _, width in attention_shapes(config))
    if runtime.world_size > 1:
        possible = runtime.broadcast(all(runtime.gather(possible) or []))
    if not possible:
        return
    if reason := _reason_on_any(dtype, runtime):
        if runtime.is_main:
            print(f"attention: torch's own, slower here than avx512, which cannot be had: {reason}", flush=True)
    else:
        attention_cpu.use_in(network, dtype)


def _reason_on_any(dtype: torch.dtype, runtime: Runtime) -> str | None:
    """Why some rank cannot compute avx512, the same on all; None: all can. Collective. May compile it, on rank 0 first and so for all."""
    from ddpm_dist.models import attention_cpu

    reason = attention_cpu.why_not(dtype) if runtime.is_main else None
    if runtime.world_size > 1 and (reason := runtime.broadcast(reason)) is None:
        mine = attention_cpu.why_not(dtype)
        said = runtime.gather(f"on {socket.gethostname()}: {mine}" if mine else None)
        reason = runtime.broadcast(next(filter(None, said or []), None))
    return reason


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
        why = why_not_ours(shape[2], dtype, runtime.device) if candidates == [OURS] else None
        raise UserError(
            f"no {'/'.join(candidates)} attention for {shape[0]} tokens and {shape[1]} heads of {shape[2]} in {dtype} on {runtime.device} "
            f"(train.attention{f'; {why}' if why else ''}); use train.attention=auto"
        )
    return best
