"""A UNet whose blocks are scaled and shifted by the timestep (FiLM, Perez et al. 2018, arXiv 1709.07871), without labels.

With its default keywords it has 18,430,115 parameters, whose names and shapes are those of the small program for 96x96
faces it comes from; weights trained there load here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_dist.errors import UserError
from ddpm_dist.models import checks
from ddpm_dist.models.blocks import Nearest2x, keep_memory_format
from ddpm_dist.models.dropout import Dropout


class TimeFrequencies(nn.Module):
    """Sines, then cosines, of t exp(-ln(10000) i / (n - 1)) for i = 0 .. n - 1, n = dim / 2, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.count = dim // 2

    def forward(self, t: Tensor) -> Tensor:
        """(B,) integers to (B, dim) float32."""
        i = torch.arange(self.count, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(i * (-math.log(10000.0) / (self.count - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Block(nn.Module):
    """Normalise and resample; then a grouped and a plain convolution, with scale and shift from the time between them.

    The shortcut takes the normalised and resampled input, as the original has it.
    """

    def __init__(self, c_in: int, c_out: int, time_dim: int, up: bool, groups: int, dropout: float):
        super().__init__()
        self.time_condition = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, 2 * c_out))
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.short_cut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        if up:
            self.sample: nn.Module = nn.Sequential(Nearest2x(), nn.Conv2d(c_in, c_in, 3, padding=1))
        else:
            self.sample = nn.Conv2d(c_in, c_in, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, c_in, H, W) and (B, time_dim) to (B, c_out, 2H, 2W) or (B, c_out, H/2, W/2)."""
        x = self.sample(self.norm1(x))
        scale, shift = self.time_condition(time)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(x)) * (scale + 1) + shift
        h = self.conv2(F.silu(self.norm2(h)))
        return self.dropout(h) + self.short_cut(x)


class FilmUnet(nn.Module):
    """One block down and one up between any two levels, ``width * channel_mults[l]`` channels at level l (0 = full size).

    in_channels: of the image. num_classes: only None. image_size: divisible by 2^(len(channel_mults) - 1). dropout:
    after the last convolution of a block. time_dim: width of the time frequencies, even, at least 4 (four times as
    many features are made of them). groups: of the normalisations and the grouped convolutions, divides all channels.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: None = None,
        width: int = 32,
        channel_mults: Sequence[int] = (1, 2, 4, 8, 16),
        image_size: int = 96,
        dropout: float = 0.01,
        time_dim: int = 32,
        groups: int = 32,
    ):
        super().__init__()
        checks.refuse_labels("film_unet", num_classes, ["unet_conditional", "adm_unet"])
        checks.check_counts(
            in_channels=in_channels, width=width, image_size=image_size, time_dim=time_dim, groups=groups
        )
        checks.check_mults(channel_mults)
        checks.check_dropout(dropout)
        halvings = len(channel_mults) - 1
        if not halvings:
            raise UserError(f"model.channel_mults={list(channel_mults)}: this network needs two levels at least")
        reason = f"the {halvings} halvings of model.channel_mults={list(channel_mults)}"
        checks.check_halvings(image_size, halvings, reason)
        channels = [width * mult for mult in channel_mults]
        if time_dim % 2 or time_dim < 4:
            raise UserError(f"model.time_dim must be even and at least 4, not {time_dim}")
        if any(count % groups for count in channels):
            raise UserError(
                f"model.groups={groups} does not divide the channels {channels} of the levels: change model.groups, "
                "model.width or model.channel_mults"
            )
        self.in_channels, self.num_classes, self.image_size = in_channels, None, image_size
        features = 4 * time_dim
        self.init_conv = nn.Conv2d(in_channels, channels[0], 7, padding=3)
        self.time_mlp = nn.Sequential(TimeFrequencies(time_dim), nn.Linear(time_dim, features), nn.GELU())
        ends = list(zip(channels, channels[1:], strict=False))
        self.downs = nn.ModuleList(Block(a, b, features, False, groups, dropout) for a, b in ends)
        self.ups = nn.ModuleList(Block(2 * b, a, features, True, groups, dropout) for a, b in reversed(ends))
        self.output = nn.Conv2d(channels[0], in_channels, 1)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from a noisy image.

        x: (B, in_channels, H, W) floating point; t: (B,) integer timesteps; y is ignored. Returns a tensor with the
        shape and memory format of x. Raises UserError for image sides that cannot be halved often enough.
        """
        checks.check_image(x, 2 ** len(self.downs))
        time = self.time_mlp[0](t).to(x.dtype)
        for layer in self.time_mlp[1:]:
            time = layer(time)
        h, skips = self.init_conv(x), []
        for down in self.downs:
            h = down(h, time)
            skips.append(h)
        for up in self.ups:
            h = up(torch.cat([h, skips.pop()], dim=1), time)
        return keep_memory_format(self.output(h), x)


def keywords_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read in_channels, width, channel_mults, time_dim and groups off a state dict; {} for that of something else."""
    first, time = shapes.get("init_conv.weight", ()), shapes.get("time_mlp.1.weight", ())
    grouped = shapes.get("downs.0.conv1.weight", ())
    if not (len(first) == 4 and len(time) == 2 and len(grouped) == 4 and 0 < grouped[1] <= first[0]):
        return {}
    channels = [first[0]]
    while len(shape := shapes.get(f"downs.{len(channels) - 1}.conv2.weight", ())) == 4:
        channels.append(shape[0])
    width = math.gcd(*channels)
    return {
        "in_channels": first[1],
        "width": width,
        "channel_mults": [count // width for count in channels],
        "time_dim": time[1],
        "groups": channels[0] // grouped[1],
    }
