"""Attention on a CPU with bf16 arithmetic, by a program of our own (attention_cpu.cpp), as an operation of torch.

torch's own computes the products of narrow heads in float32 or by a library that gains nothing from bf16 there: at heads of 16 features,
which the flagship has over 4,096 tokens, it was what a CPU's training step waited for most.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist import native
from ddpm_dist.models.blocks import Attention

WIDTHS = (16, 32, 64)  # of a head
FLAGS = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
CLOSE = 0.02  # largest relative distance from float64 at the first use; bf16 itself costs a quarter of it


def why_not() -> str | None:
    """Why this machine cannot compute it; None: it can. The first call may compile, which takes seconds."""
    try:
        _library()
    except native.NotBuilt as reason:
        return str(reason)
    return None


@functools.cache
def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def is_made_for_this() -> bool:
    """Whether the processor has the instructions; a compiler may still be missing."""
    return all(flag in _flags() for flag in NEEDED)


def pays() -> bool:
    """Whether it is what train.attention=auto takes here, if it compiles: not where the processor has matrix units, which torch's own
    makes use of (there nobody has measured which is faster)."""
    return is_made_for_this() and "amx_bf16" not in _flags()


def use_in(network: nn.Module) -> None:
    """Let every attention of ``network`` compute with it whose heads it can, and for which nothing else was chosen."""
    for module in network.modules():
        if (
            isinstance(module, Attention)
            and module.backend is None
            and module.out_proj.in_features // module.heads in WIDTHS
        ):
            module.backend = attention


@functools.cache
def _answer() -> ctypes.CDLL | str:
    """The program, or why there is none; asked once."""
    missing = [flag for flag in NEEDED if flag not in _flags()]
    if missing:
        return f"this processor has no {missing[-1]} instructions"
    try:
        library = native.load(Path(__file__).with_suffix(".cpp"), FLAGS)
    except native.NotBuilt as reason:
        return str(reason)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.attention_forward.argtypes = [pointer] * 3 + [number] * 5
    library.attention_backward.argtypes = [pointer] * 5 + [number] * 5
    error = _distance(library)
    return (
        library
        if error <= CLOSE
        else f"its result is off by {error:.1%} here: the compiler or the processor is at fault"
    )


def _library() -> ctypes.CDLL:
    found = _answer()
    if isinstance(found, str):
        raise native.NotBuilt(found)
    return found


def _distance(library: ctypes.CDLL) -> float:
    """Of output and gradients from the formulas in float64, on fixed numbers, for a number of tokens that fills no block."""
    tokens, heads, width = 70, 2, 16
    numbers = torch.arange(tokens * 3 * heads * width, dtype=torch.float64)
    qkv = (6 * (numbers * 0.7548776662).frac() - 3).reshape(1, tokens, 3, heads, width).bfloat16()
    gradient = qkv[:, :, 0].flip(1).contiguous()
    q, k, v, g = (part[0].transpose(0, 1).double() for part in (*qkv.unbind(2), gradient))  # (heads, tokens, width)
    weights = (q @ k.mT / width**0.5).softmax(-1)
    from_weights = g @ v.mT
    scores = weights * (from_weights - (weights * from_weights).sum(-1, keepdim=True)) / width**0.5
    right = torch.stack([scores @ k, scores.mT @ q, weights.mT @ g], 1).permute(2, 1, 0, 3)[None]
    out, logs = _forward(library, qkv)
    pairs = ((out, (weights @ v).transpose(0, 1)[None]), (_backward(library, qkv, out, logs, gradient), right))
    errors = [float((found.double() - expected).norm() / expected.norm()) for found, expected in pairs]
    return max(error if error == error else float("inf") for error in errors)  # not a number: wrong


def _forward(library: ctypes.CDLL, qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    out, logs = qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    _check(library.attention_forward(
        qkv.data_ptr(), out.data_ptr(), logs.data_ptr(), batch, tokens, heads, width, torch.get_num_threads()
    ))  # fmt: skip
    return out, logs


def _backward(library: ctypes.CDLL, qkv: Tensor, out: Tensor, logs: Tensor, gradient: Tensor) -> Tensor:
    batch, tokens, _, heads, width = qkv.shape
    result = torch.empty_like(qkv)
    _check(library.attention_backward(
        qkv.data_ptr(), out.data_ptr(), logs.data_ptr(), gradient.data_ptr(), result.data_ptr(),
        batch, tokens, heads, width, torch.get_num_threads(),
    ))  # fmt: skip
    return result


def _check(code: int) -> None:
    if code == 1:
        raise MemoryError("attention on the CPU: out of memory")
    if code:
        raise RuntimeError(f"attention on the CPU: heads have {', '.join(map(str, WIDTHS))} features")


@torch.library.custom_op("ddpm_dist::attention_cpu", mutates_args=(), device_types="cpu")
def _op(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return _forward(_library(), qkv.contiguous())


@_op.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    return qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("ddpm_dist::attention_cpu_backward", mutates_args=(), device_types="cpu")
def _op_backward(qkv: Tensor, out: Tensor, logs: Tensor, gradient: Tensor) -> Tensor:
    return _backward(_library(), qkv.contiguous(), out.contiguous(), logs.contiguous(), gradient.contiguous())


@_op_backward.register_fake
def _(qkv: Tensor, out: Tensor, logs: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _: None) -> Tensor | None:
    return None if gradient is None else _op_backward(*ctx.saved_tensors, gradient)


_op.register_autograd(_differentiate, setup_context=_save)


def attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of every head, with gradients.

    qkv: (B, N, 3, heads, D) bfloat16 on the CPU, D one of ``WIDTHS``: query, key and value of every token. Returns (B, N, heads, D)
    bfloat16. Weights and their gradients are rounded to bfloat16, sums are float32, as in torch's kernels. The result of an image does
    not depend on the other images or on the number of threads.

    Raises:
        NotBuilt: the machine cannot compute it (``why_not``).
    """
    return _op(qkv)[0]
