"""Building blocks shared by the networks.

All of them have static shapes, read nothing back from the device, keep channels_last tensors in channels_last, and
run under autocast and ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpm_dist.models import checks


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps ``t`` (B,) as (B, dim) float32: sines in the first half, cosines in the second.

    The angles are t / 10000^(2i/dim) for i = 0 .. dim/2 - 1 (Vaswani et al. 2017, section 3.5, not interleaved).
    They are computed in float32 whatever autocast says: bfloat16 cannot tell t = 999 from t = 1000.
    """
    exponents = torch.arange(0, dim, 2, device=t.device, dtype=torch.float32) / dim
    angles = t.float()[:, None] * (1.0 / 10000.0**exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off. (The meta device knows no autocast.)"""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class LabelEmbedding(nn.Embedding):
    """Class embedding in which every label outside 0 .. num_classes - 1 (-1 = dropped) gives a zero row.

    Computed as one-hot times table: the backward pass is then a matrix product too, with the same result on every
    run (index-based ones add with atomics when compiled), and the table gets a gradient even when every label is
    dropped, so no rank of a data-parallel run ever has an unused parameter.
    """

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) integers to (B, embedding_dim) in the table's dtype."""
        one_hot = labels[:, None] == torch.arange(self.num_embeddings, device=labels.device)
        with without_autocast(labels.device.type):
            return one_hot.to(self.weight.dtype) @ self.weight

    def added(self, emb: Tensor, y: Tensor | None) -> Tensor:
        """emb (B, embedding_dim) plus the rows of labels y (B,) int64, None = all dropped. UserError for unknown labels."""
        if y is None:
            y = torch.full(emb.shape[:1], -1, dtype=torch.int64, device=emb.device)
        checks.check_labels(y, self.num_embeddings)
        return emb + self(y)


class Float32Linear(nn.Linear):
    """A linear layer computed in float32 at least, whatever autocast says: for inputs that bfloat16 would blur."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), float32 (float64 in a float64 network)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(x.device.type):
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class DoubleConv(nn.Module):
    """conv3x3 - GroupNorm(1) - GELU - conv3x3 - GroupNorm(1); with ``residual`` GELU(x + that)."""

    def __init__(self, c_in: int, c_out: int, c_mid: int | None = None, residual: bool = False):
        super().__init__()
        c_mid = c_mid or c_out
        self.residual = residual
        self.double_conv = nn.Sequential(
            nn.Conv2d(c_in, c_mid, 3, padding=1, bias=False),
            nn.GroupNorm(1, c_mid),
            nn.GELU(),
            nn.Conv2d(c_mid, c_out, 3, padding=1, bias=False),
            nn.GroupNorm(1, c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H, W)."""
        y = self.double_conv(x)
        return F.gelu(x + y) if self.residual else y


class Down(nn.Module):
    """Max-pool by 2, a residual and a plain double convolution, plus the embedding on every pixel."""

    def __init__(self, c_in: int, c_out: int, embedding_dim: int):
        super().__init__()
        self.maxpool_conv = nn.Sequential(
            nn.MaxPool2d(2), DoubleConv(c_in, c_in, residual=True), DoubleConv(c_in, c_out)
        )
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, c_out))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, c_in, H, W) and (B, embedding_dim) to (B, c_out, H/2, W/2)."""
        return self.maxpool_conv(x) + self.emb_layer(emb)[:, :, None, None]


class Up(nn.Module):
    """Upsample by 2, concatenate after the skip, a residual and a plain double convolution, plus the embedding."""

    def __init__(self, c_in: int, c_out: int, embedding_dim: int):
        super().__init__()
        self.conv = nn.Sequential(DoubleConv(c_in, c_in, residual=True), DoubleConv(c_in, c_out, c_in // 2))
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, c_out))

    def forward(self, x: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        """(B, c, H, W), skip (B, c_in - c, 2H, 2W) and (B, embedding_dim) to (B, c_out, 2H, 2W)."""
        x = self.conv(torch.cat([skip, upsample2x(x)], dim=1))
        return x + self.emb_layer(emb)[:, :, None, None]


AttentionBackend = SDPBackend | Callable[[Tensor], Tensor] | None


def attend(qkv: Tensor, backend: AttentionBackend) -> Tensor:
    """Attention of every head: (B, N, 3, heads, D), query, key and value of every token, to (B, N, heads, D).

    backend: of ``scaled_dot_product_attention``, None lets torch choose; or a function that does the whole.
    """
    if callable(backend) and not isinstance(backend, SDPBackend):
        return backend(qkv)
    # Split before the transpose: the backward pass then writes the three gradients straight into one tensor.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with the parameters and the initialisation of ``nn.MultiheadAttention``.

    backend: as in ``attend`` (``ddpm_dist.attention_backends`` measures and pins).
    """

    backend: AttentionBackend = None

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, channels) to the same shape."""
        qkv = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(attend(qkv.unflatten(-1, (3, self.heads, -1)), self.backend).flatten(2))


class SelfAttention(nn.Module):
    """Pre-norm attention over all pixels and a feed-forward part of the same width, each added to its input."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.mha = Attention(channels, heads)
        self.ln = nn.LayerNorm([channels])
        self.ff_self = nn.Sequential(
            nn.LayerNorm([channels]), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        tokens = x.flatten(2).transpose(1, 2)  # of a channels_last tensor this is a view
        tokens = tokens + self.mha(self.ln(tokens))
        tokens = tokens + self.ff_self(tokens)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def upsample2x(x: Tensor) -> Tensor:
    """Bilinear upsampling by 2 with aligned corners, (B, C, H, W) to (B, C, 2H, 2W), the same dtype.

    The native backward pass adds with atomics on GPUs and when compiled, so there the result would differ from run to
    run. Eager on the CPU it is deterministic, and the quickest way.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
    return _upsample2x_by_shifts(x)


def _upsample2x_by_shifts(x: Tensor) -> Tensor:
    """``upsample2x`` from slices and sums only: no index is computed, so no atomics, and one kernel when compiled."""
    if x.is_contiguous():
        return _stretch(_stretch(x, 2), 3).to(x.dtype)
    x_last = x.permute(0, 2, 3, 1)  # work on the layout of channels_last so that the result keeps it
    return _stretch(_stretch(x_last, 1), 2).to(x.dtype).permute(0, 3, 1, 2)


def _stretch(x: Tensor, dim: int) -> Tensor:
    """Linear upsampling by 2 with aligned corners along ``dim``, in float32 at least.

    Output j lies at j (n-1)/(2n-1) of the input: j = 2k lies k/(2n-1) before input k, and j = 2k+1 lies (n-1-k)/(2n-1)
    after it. At both ends that distance is 0, so what stands in for the missing neighbour does not matter.
    """
    n = x.shape[dim]
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = [1] * x.dim()
    shape[dim] = n
    distance = torch.arange(n, device=x.device, dtype=dtype).view(shape) / (2 * n - 1)
    left = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, n - 1)], dim)
    right = torch.cat([x.narrow(dim, 1, n - 1), x.narrow(dim, n - 1, 1)], dim)
    even = x + distance * (left - x)
    odd = x + distance.flip(dim) * (right - x)
    return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)


def nearest2x(x: Tensor) -> Tensor:
    """Repeat every pixel in a 2x2 square, (B, C, H, W) to (B, C, 2H, 2W), in the memory format of ``x``.

    What ``F.interpolate`` does by default, but its backward pass is a sum: compiled, that of ``interpolate`` adds with
    atomics, and the result would differ from run to run.
    """
    batch, channels, height, width = x.shape
    if x.is_contiguous():
        wide = x[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
        return wide.contiguous().view(batch, channels, 2 * height, 2 * width)
    wide = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return wide.contiguous().view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Nearest2x(nn.Module):
    """:func:`nearest2x` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        return nearest2x(x)


def keep_memory_format(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` (B, C, H, W) in the memory format of ``like`` (contiguous or channels_last)."""
    if like.is_contiguous():
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)
