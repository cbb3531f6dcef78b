"""Attention on a CPU with AVX-512, by a program of our own (attention_cpu.cpp), as an operation of torch.

torch's own spends most of its time beside the products when heads are narrow, and gains nothing from bf16 then: at heads of 16 features,
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
from ddpm_dist.models.blocks import Attention, attend

WIDTHS = (16, 32, 64)  # of a head
FLAGS = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
MANY = 1 << 20  # tokens
# Largest relative distance from float64 at the first use; rounding alone costs a quarter of it.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


CAN = native.instructions()
HAS_AVX512 = all(flag in CAN for flag in NEEDED)
HAS_BF16 = HAS_AVX512 and "avx512_bf16" in CAN
HAS_AMX = "amx_bf16" in CAN  # matrix units, which torch's own makes use of


def why_not(dtype: torch.dtype) -> str | None:
    """Why this machine cannot compute it on such numbers; None: it can. The first call may compile, which takes seconds."""
    if dtype not in CLOSE:
        return f"it is for float32 and bfloat16, not {dtype}"
    if not HAS_AVX512 or (dtype == torch.bfloat16 and not HAS_BF16):
        return f"this processor has no AVX-512{' BF16' if HAS_AVX512 else ''} instructions"
    found = _answer(dtype)
    return found if isinstance(found, str) else None


def pays(tokens: int, width: int, dtype: torch.dtype) -> bool:
    """Whether it was measured faster than torch's own, for so many tokens and features of a head (``benchmarks.ladder``: attention).

    In float32 few tokens or wide heads are quicker in a matrix library. In bf16 it was faster for all, but on processors with matrix
    units nobody has measured it: there torch's own stays.
    """
    if dtype == torch.bfloat16:
        return HAS_BF16 and not HAS_AMX and width in WIDTHS
    return dtype == torch.float32 and HAS_AVX512 and width in (16, 32) and tokens >= 1024


def use_in(network: nn.Module, dtype: torch.dtype) -> str | None:
    """Let it compute every attention of ``network`` where it pays on such numbers, unless another backend was chosen.

    Returns why it cannot where it would pay for enough tokens; nothing is compiled for networks where it never pays.
    """
    modules = [
        module
        for module in network.modules()
        if isinstance(module, Attention)
        and module.backend in (None, *WHERE_IT_PAYS.values())
        and pays(MANY, module.out_proj.in_features // module.heads, dtype)
    ]
    if not modules:
        return None
    if reason := why_not(dtype):
        return reason
    for module in modules:
        module.backend = WHERE_IT_PAYS[dtype]
    return None


# Backends for ``blocks.attend``, one for each type, because that is what ``why_not`` has to be asked before. Other numbers go to torch.
def float32_where_it_pays(qkv: Tensor) -> Tensor:
    return _computed(qkv, torch.float32, pays(qkv.shape[1], qkv.shape[-1], torch.float32))


def bfloat16_where_it_pays(qkv: Tensor) -> Tensor:
    return _computed(qkv, torch.bfloat16, pays(qkv.shape[1], qkv.shape[-1], torch.bfloat16))


def float32_always(qkv: Tensor) -> Tensor:
    return _computed(qkv, torch.float32, True)


def bfloat16_always(qkv: Tensor) -> Tensor:
    return _computed(qkv, torch.bfloat16, True)


WHERE_IT_PAYS = {torch.float32: float32_where_it_pays, torch.bfloat16: bfloat16_where_it_pays}
ALWAYS = {torch.float32: float32_always, torch.bfloat16: bfloat16_always}


def _computed(qkv: Tensor, dtype: torch.dtype, ours: bool) -> Tensor:
    return attention(qkv) if ours and qkv.dtype == dtype and qkv.device.type == "cpu" else attend(qkv, None)


def attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of every head, with gradients.

    qkv: (B, N, 3, heads, D) float32 or bfloat16 on the CPU, D one of ``WIDTHS``: query, key and value of every token. Returns
    (B, N, heads, D) of the same type. Sums are float32; of bfloat16 the weights and their gradients are rounded to bfloat16, as in torch's
    kernels. The result of an image does not depend on the other images or on the number of threads.

    Raises:
        NotBuilt: the machine cannot compute it (``why_not``).
    """
    return _op(qkv)[0]


@functools.cache
def _answer(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The program for such numbers, or why there is none; asked once. One for each type: older compilers know AVX-512, but not for bf16."""
    try:
        flags = ["-mavx512bf16"] if dtype == torch.bfloat16 else []
        library = native.load(Path(__file__).with_suffix(".cpp"), [*FLAGS, *flags])
    except native.NotBuilt as reason:
        return str(reason)
    flag, pointer, number = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    library.attention_forward.argtypes = [flag] + [pointer] * 3 + [number] * 5
    library.attention_backward.argtypes = [flag] + [pointer] * 5 + [number] * 5
    error = _distance(library, dtype)
    if error > CLOSE[dtype]:
        return f"its result is off by {error:.1e} in {dtype} here: the compiler or the processor is at fault"
    return library


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    if reason := why_not(dtype):
        raise native.NotBuilt(reason)
    return _answer(dtype)  # type: ignore[return-value]


def _distance(library: ctypes.CDLL, dtype: torch.dtype) -> float:
    """Of output and gradients from the formulas in float64, on fixed numbers, for a number of tokens that fills no block."""
    tokens, heads, width = 70, 2, 16
    numbers = torch.arange(tokens * 3 * heads * width, dtype=torch.float64)
    qkv = (6 * (numbers * 0.7548776662).frac() - 3).reshape(1, tokens, 3, heads, width).to(dtype)
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
    out, logs = qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, heads, 2, tokens, dtype=torch.float32)
    _check(library.attention_forward(
        qkv.dtype == torch.bfloat16, qkv.data_ptr(), out.data_ptr(), logs.data_ptr(),
        batch, tokens, heads, width, torch.get_num_threads(),
    ))  # fmt: skip
    return out, logs


def _backward(library: ctypes.CDLL, qkv: Tensor, out: Tensor, logs: Tensor, gradient: Tensor) -> Tensor:
    batch, tokens, _, heads, width = qkv.shape
    result = torch.empty_like(qkv)
    _check(library.attention_backward(
        qkv.dtype == torch.bfloat16, qkv.data_ptr(), out.data_ptr(), logs.data_ptr(), gradient.data_ptr(), result.data_ptr(),
        batch, tokens, heads, width, torch.get_num_threads(),
    ))  # fmt: skip
    return result


def _check(code: int) -> None:
    if code == 1:
        raise MemoryError("attention on the CPU: out of memory")
    if code:
        raise RuntimeError(f"attention on the CPU: heads have {', '.join(map(str, WIDTHS))} features")


# Where the outputs of an operation become others it needs another name: programs that torch.compile has kept know them by it.
@torch.library.custom_op("ddpm_dist::attention_avx512", mutates_args=(), device_types="cpu")
def _op(qkv: Tensor) -> tuple[Tensor, Tensor]:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"attention takes (B, N, 3, heads, D): query, key and value of every token, not {tuple(qkv.shape)}"
        )
    return _forward(_library(qkv.dtype), qkv.contiguous())


@_op.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    return qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, heads, 2, tokens, dtype=torch.float32)


@torch.library.custom_op("ddpm_dist::attention_avx512_backward", mutates_args=(), device_types="cpu")
def _op_backward(qkv: Tensor, out: Tensor, logs: Tensor, gradient: Tensor) -> Tensor:
    return _backward(_library(qkv.dtype), qkv.contiguous(), out.contiguous(), logs.contiguous(), gradient.contiguous())


@_op_backward.register_fake
def _(qkv: Tensor, out: Tensor, logs: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _: None) -> Tensor | None:
    return None if gradient is None else _op_backward(*ctx.saved_tensors, gradient)


_op.register_autograd(_differentiate, setup_context=_save)
