"""A UNet of residual blocks with adaptive GroupNorm and attention at chosen levels, with or without labels.

The design of Dhariwal & Nichol 2021 (arXiv 2105.05233, section 3 and table 4), "ADM": time and label scale and shift a
normalisation in every residual block, resampling happens inside residual blocks, attention heads have a fixed number of
channels, and the last convolution of every residual block, the last projection of every attention and the last
convolution of the network start at zero, so the network starts as its skip connections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_dist.errors import UserError
from ddpm_dist.models import checks
from ddpm_dist.models.blocks import Attention, LabelEmbedding, keep_memory_format, nearest2x, sinusoidal_embedding
from ddpm_dist.models.dropout import Dropout


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or the most below (a power of 2) that divide the channels and leave 4 in a group."""
    fitting = (groups for groups in (32, 16, 8, 4, 2) if channels % groups == 0 and channels // groups >= 4)
    return nn.GroupNorm(next(fitting, 1), channels)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all of its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))) (1 + scale) + shift)), where scale and shift come from the embedding.

    resample: None, "down" (mean of 2x2 pixels) or "up" (every pixel four times), of x and before the first convolution.
    """

    def __init__(self, c_in: int, c_out: int, embedding_dim: int, dropout: float, resample: str | None = None):
        super().__init__()
        self.resample = resample
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_dim, 2 * c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, c_in, H, W) and SiLU of the embedding (B, embedding_dim) to (B, c_out, H', W')."""
        h = self.conv1(self._resampled(F.silu(self.norm1(x))))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(self._resampled(x)) + self.conv2(self.dropout(F.silu(h)))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return nearest2x(x) if self.resample == "up" else x


class AttentionBlock(nn.Module):
    """x + attention over all pixels of norm(x)."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = Attention(channels, channels // head_channels)
        zeroed(self.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Layer(nn.Module):
    """A residual block, and attention where ``head_channels`` is a number."""

    def __init__(self, c_in: int, c_out: int, embedding_dim: int, dropout: float, head_channels: int | None):
        super().__init__()
        self.residual = ResidualBlock(c_in, c_out, embedding_dim, dropout)
        self.attention = nn.Identity() if head_channels is None else AttentionBlock(c_out, head_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, c_in, H, W) and SiLU of the embedding to (B, c_out, H, W)."""
        return self.attention(self.residual(x, emb))


class Level(nn.Module):
    """The layers of one resolution, on the way down or up, and the residual block that leads to the next."""

    def __init__(self, layers: list[Layer], leave: ResidualBlock | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.leave = leave


class AdmUnet(nn.Module):
    """``width * channel_mults[l]`` channels at level l (0 = full resolution), ``blocks`` layers per level down, one more up.

    in_channels: of the image. num_classes: labels, None = without. attention_levels: levels with attention (the deepest
    one also has it between the way down and the way up, whatever stands here). image_size: divisible by
    2^(len(channel_mults) - 1). dropout: before the last convolution of every residual block (the paper's
    ImageNet 64x64 model: 0.1). blocks: residual blocks per level. head_channels: channels of an attention head. The embedding of time and label has 4 * width features.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int | None = None,
        width: int = 128,
        channel_mults: Sequence[int] = (1, 2, 3, 4),
        attention_levels: Sequence[int] = (1, 2, 3),
        image_size: int = 64,
        dropout: float = 0.0,
        blocks: int = 2,
        head_channels: int = 64,
    ):
        super().__init__()
        check_keywords(
            in_channels, num_classes, width, channel_mults, attention_levels, image_size, dropout, blocks, head_channels
        )
        channels = [width * mult for mult in channel_mults]
        self.in_channels, self.num_classes, self.image_size = in_channels, num_classes, image_size
        self.width, self.levels = width, len(channels)
        dim = 4 * width
        heads = [head_channels if level in attention_levels else None for level in range(self.levels)]
        self.time = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        if num_classes is not None:
            self.label_emb = LabelEmbedding(num_classes, dim)

        current = channels[0]
        self.stem = nn.Conv2d(in_channels, current, 3, padding=1)
        skips, self.down, self.up = [current], nn.ModuleList(), nn.ModuleList()
        for level, count in enumerate(channels):
            layers = []
            for _ in range(blocks):
                layers.append(Layer(current, count, dim, dropout, heads[level]))
                current = count
                skips.append(current)
            leave = None
            if level < self.levels - 1:
                leave = ResidualBlock(current, current, dim, dropout, "down")
                skips.append(current)
            self.down.append(Level(layers, leave))
        self.middle = nn.ModuleList(
            [Layer(current, current, dim, dropout, head_channels), Layer(current, current, dim, dropout, None)]
        )
        for level, count in reversed(list(enumerate(channels))):
            layers = []
            for _ in range(blocks + 1):
                layers.append(Layer(current + skips.pop(), count, dim, dropout, heads[level]))
                current = count
            self.up.append(Level(layers, ResidualBlock(current, current, dim, dropout, "up") if level else None))
        self.out = nn.Sequential(group_norm(current), nn.SiLU(), zeroed(nn.Conv2d(current, in_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from a noisy image.

        x: (B, in_channels, H, W) floating point; t: (B,) integer timesteps; y: (B,) int64 labels, -1 = dropped, None = all
        dropped, ignored without classes. Returns a tensor with the shape and memory format of x. Raises UserError for
        image sides that cannot be halved often enough and for a label that the network does not have (on the CPU).
        """
        checks.check_image(x, 2 ** (self.levels - 1))
        emb = self.time(sinusoidal_embedding(t, self.width).to(x.dtype))
        if self.num_classes is not None:
            emb = self.label_emb.added(emb, y)
        emb = F.silu(emb).to(x.dtype)

        h = self.stem(x)
        skips = [h]
        for level in self.down:
            for layer in level.layers:
                h = layer(h, emb)
                skips.append(h)
            if level.leave is not None:
                h = level.leave(h, emb)
                skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for level in self.up:
            for layer in level.layers:
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            if level.leave is not None:
                h = level.leave(h, emb)
        return keep_memory_format(self.out(h), x)


def check_keywords(
    in_channels: Any,
    num_classes: Any,
    width: Any,
    channel_mults: Any,
    attention_levels: Any,
    image_size: Any,
    dropout: Any,
    blocks: Any,
    head_channels: Any,
) -> None:
    """Raise UserError naming the keyword whose value cannot be built."""
    checks.check_counts(blocks=blocks, head_channels=head_channels)
    checks.check_pyramid(in_channels, width, channel_mults, image_size, num_classes)
    if width % 2:
        raise UserError(f"model.width must be even (half sines, half cosines of the time), not {width}")
    deepest = len(channel_mults) - 1
    checks.check_levels(attention_levels, deepest)
    checks.check_dropout(dropout)
    for level in {*attention_levels, deepest}:
        count = width * channel_mults[level]
        if count % head_channels:
            raise UserError(
                f"model.head_channels={head_channels} does not divide the {count} channels of the attention at level "
                f"{level}: change model.head_channels, model.width or model.channel_mults"
            )


def keywords_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read in_channels, num_classes, width, channel_mults, attention_levels and blocks off a state dict, else {}.

    ``head_channels``, ``dropout`` and ``image_size`` leave no trace in it.
    """
    first, time = shapes.get("stem.weight", ()), shapes.get("time.0.weight", ())
    channels: list[int] = []
    while len(shape := shapes.get(f"down.{len(channels)}.layers.0.residual.conv2.weight", ())) == 4:
        channels.append(shape[0])
    if len(first) != 4 or len(time) != 2 or not channels or any(count % time[1] for count in channels):
        return {}
    blocks = 1
    while f"down.0.layers.{blocks}.residual.conv2.weight" in shapes:
        blocks += 1
    attention = "down.{}.layers.0.attention.norm.weight"
    return {
        "in_channels": first[1],
        "num_classes": shapes["label_emb.weight"][0] if len(shapes.get("label_emb.weight", ())) == 2 else None,
        "width": time[1],
        "channel_mults": [count // time[1] for count in channels],
        "attention_levels": [level for level in range(len(channels)) if attention.format(level) in shapes],
        "blocks": blocks,
    }
