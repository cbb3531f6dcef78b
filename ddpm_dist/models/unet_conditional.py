"""The class-conditional UNet with attention at every level.

The flagship network: with its default keywords and 10 classes it has 23,335,299 parameters, whose names and shapes
are those of the small single-device program it comes from, so weights trained there load here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ddpm_dist.errors import UserError
from ddpm_dist.models import checks
from ddpm_dist.models.blocks import (
    DoubleConv,
    Down,
    LabelEmbedding,
    SelfAttention,
    Up,
    keep_memory_format,
    sinusoidal_embedding,
)


class UnetConditional(nn.Module):
    """UNet over L = len(channel_mults) - 1 halvings with c[l] = width * channel_mults[l] channels at level l.

    Level 0 is the full resolution. The way down ends each level l >= 1 with attention (``sa1`` .. ``saL``), the way
    up does so for levels L-1 .. 0 (``sa{L+1}`` .. ``sa{2L}``), at the levels in ``attention_levels`` (None: all).
    Use ``ddpm_dist.models.build_model("unet_conditional", ...)``; the keywords are described there.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int | None = None,
        width: int = 64,
        channel_mults: Sequence[int] = (1, 2, 4, 4),
        attention_levels: Sequence[int] | None = None,
        image_size: int = 64,
        embedding_dim: int = 256,
        heads: int = 4,
    ):
        super().__init__()
        check_keywords(
            in_channels, num_classes, width, channel_mults, attention_levels, image_size, embedding_dim, heads
        )
        channels = [width * mult for mult in channel_mults]
        self.levels = len(channels) - 1
        self.in_channels, self.num_classes, self.image_size = in_channels, num_classes, image_size
        self.embedding_dim = embedding_dim
        attended = range(len(channels)) if attention_levels is None else attention_levels

        def attention(name: str, level: int, features: int) -> None:
            if level in attended:
                self.add_module(name, SelfAttention(features, heads))

        self.inc = DoubleConv(in_channels, channels[0])
        for level in range(1, self.levels + 1):
            self.add_module(f"down{level}", Down(channels[level - 1], channels[level], embedding_dim))
            attention(f"sa{level}", level, channels[level])
        deepest = channels[-1]
        self.bot1 = DoubleConv(deepest, 2 * deepest)
        self.bot2 = DoubleConv(2 * deepest, 2 * deepest)
        self.bot3 = DoubleConv(2 * deepest, deepest)
        current = deepest
        for step, level in enumerate(reversed(range(self.levels)), start=1):
            out = channels[max(level - 1, 0)]
            self.add_module(f"up{step}", Up(current + channels[level], out, embedding_dim))
            attention(f"sa{self.levels + step}", level, out)
            current = out
        self.outc = nn.Conv2d(current, in_channels, 1)
        if num_classes is not None:
            self.label_emb = LabelEmbedding(num_classes, embedding_dim)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict (the noise, x0 or v, whatever it was trained for) from a noisy image.

        Args:
            x: (B, in_channels, H, W) floating point; H and W divisible by 2^L. The memory format is kept.
            t: (B,) integer timesteps, indices into the schedule.
            y: (B,) int64 labels 0 .. num_classes - 1, -1 = dropped; None = all dropped. Ignored without classes.

        Returns:
            Tensor with the shape of x.

        Raises:
            UserError: image sides that are not divisible, or a label that the network does not have (labels are
                checked on the CPU only: on a GPU it would cost a wait; there they count as dropped).
        """
        checks.check_image(x, 2**self.levels)
        emb = sinusoidal_embedding(t, self.embedding_dim)
        if self.num_classes is not None:
            emb = self.label_emb.added(emb, y)
        emb = emb.to(x.dtype)

        skips = [self.inc(x)]
        for level in range(1, self.levels + 1):
            skips.append(self._attend(level, getattr(self, f"down{level}")(skips[-1], emb)))
        h = self.bot3(self.bot2(self.bot1(skips.pop())))
        for step in range(1, self.levels + 1):
            h = getattr(self, f"up{step}")(h, skips.pop(), emb)
            h = self._attend(self.levels + step, h)
        return keep_memory_format(self.outc(h), x)

    def _attend(self, number: int, x: Tensor) -> Tensor:
        attention = getattr(self, f"sa{number}", None)
        return x if attention is None else attention(x)


def check_keywords(
    in_channels: Any,
    num_classes: Any,
    width: Any,
    channel_mults: Any,
    attention_levels: Any,
    image_size: Any,
    embedding_dim: Any,
    heads: Any,
) -> None:
    """Raise UserError naming the keyword whose value cannot be built."""
    checks.check_counts(embedding_dim=embedding_dim, heads=heads)
    checks.check_pyramid(in_channels, width, channel_mults, image_size, num_classes)
    if embedding_dim % 2:
        raise UserError(f"model.embedding_dim must be even (half sines, half cosines), not {embedding_dim}")
    levels = len(channel_mults) - 1
    checks.check_levels(attention_levels, levels, none="all")
    channels = [width * mult for mult in channel_mults]
    for level in range(levels + 1) if attention_levels is None else attention_levels:
        ends_up = {channels[max(level - 1, 0)]} if level < levels else set()
        for count in {channels[level]} | ends_up:
            if count % heads:
                raise UserError(
                    f"model.heads={heads} does not divide the {count} channels of the attention at level {level}: "
                    "change model.heads, model.width or model.attention_levels"
                )


def keywords_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read in_channels, num_classes, width, channel_mults, attention_levels and embedding_dim off a state dict.

    ``heads`` and ``image_size`` leave no trace in it. Gives {} for the state dict of something else.
    """
    first = shapes.get("inc.double_conv.0.weight", ())
    if len(first) != 4:
        return {}
    channels = [first[0]]
    while len(last := shapes.get(f"down{len(channels)}.maxpool_conv.2.double_conv.0.weight", ())) == 4:
        channels.append(last[0])
    levels = len(channels) - 1
    keywords: dict[str, Any] = {
        "in_channels": first[1],
        "width": math.gcd(*channels),
        "channel_mults": [count // math.gcd(*channels) for count in channels],
    }
    attended = [level for level in range(levels + 1) if f"sa{level or 2 * levels}.mha.in_proj_weight" in shapes]
    keywords["attention_levels"] = None if len(attended) == levels + 1 else attended
    keywords["num_classes"] = shapes["label_emb.weight"][0] if len(shapes.get("label_emb.weight", ())) == 2 else None
    embedding = shapes.get("down1.emb_layer.1.weight", ())
    if len(embedding) == 2:
        keywords["embedding_dim"] = embedding[1]
    return keywords
