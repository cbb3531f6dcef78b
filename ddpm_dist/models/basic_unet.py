"""A very small UNet of six 5x5 convolutions that sees neither the timestep nor labels.

With its default keywords it has 309,057 parameters and is the first network of the small program it comes from, which
predicts the image from a mixture of image and noise; weights trained there load here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_dist.models import checks
from ddpm_dist.models.blocks import keep_memory_format, nearest2x


class BasicUnet(nn.Module):
    """5x5 convolutions and SiLU, ``width * channel_mults[l]`` channels at level l (0 = full resolution), skips by sum.

    in_channels: of the image. num_classes: only None. image_size: divisible by 2^(len(channel_mults) - 1). The last
    convolution is followed by SiLU too, so the result is above -0.28: for images in [0, 1].
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: None = None,
        width: int = 32,
        channel_mults: Sequence[int] = (1, 2, 2),
        image_size: int = 28,
    ):
        super().__init__()
        checks.refuse_labels("basic_unet", num_classes, ["context_unet", "unet_conditional", "adm_unet"])
        checks.check_counts(in_channels=in_channels, width=width, image_size=image_size)
        checks.check_mults(channel_mults)
        halvings = len(channel_mults) - 1
        reason = f"the {halvings} halvings of model.channel_mults={list(channel_mults)}"
        checks.check_halvings(image_size, halvings, reason)
        self.in_channels, self.num_classes, self.image_size = in_channels, None, image_size
        channels = [in_channels, *(width * mult for mult in channel_mults)]
        ends = list(zip(channels, channels[1:], strict=False))
        self.down_layers = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in ends)
        self.up_layers = nn.ModuleList(nn.Conv2d(b, a, 5, padding=2) for a, b in reversed(ends))

    def forward(self, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Predict from a noisy image alone.

        x: (B, in_channels, H, W) floating point; t and y are ignored. Returns a tensor with the shape of x. Raises
        UserError for image sides that cannot be halved often enough.
        """
        levels = len(self.down_layers)
        checks.check_image(x, 2 ** (levels - 1))
        h, skips = x, []
        for level, layer in enumerate(self.down_layers):
            h = F.silu(layer(h))
            if level < levels - 1:
                skips.append(h)
                h = F.max_pool2d(h, 2)
        for level, layer in enumerate(self.up_layers):
            if level > 0:
                h = nearest2x(h) + skips.pop()
            h = F.silu(layer(h))
        return keep_memory_format(h, x)


def keywords_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read in_channels, width and channel_mults off a state dict; {} for that of something else."""
    channels: list[int] = []
    while len(shape := shapes.get(f"down_layers.{len(channels)}.weight", ())) == 4:
        channels.append(shape[0])
    if not channels or "up_layers.0.weight" not in shapes or math.gcd(*channels) == 0:
        return {}
    width = math.gcd(*channels)
    return {
        "in_channels": shapes["down_layers.0.weight"][1],
        "width": width,
        "channel_mults": [count // width for count in channels],
    }
