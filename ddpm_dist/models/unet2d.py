"""The UNet2DModel of Hugging Face's package diffusers (optional), as one of our networks, without labels.

With its default keywords it has 1,707,009 parameters and is the second network of the small program for MNIST; weights
trained there load here, under the same names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.errors import UserError
from ddpm_dist.models import checks
from ddpm_dist.models.blocks import keep_memory_format

_GROUPS = 32  # of every normalisation in there


def unet2d(
    in_channels: int = 1,
    num_classes: None = None,
    width: int = 32,
    channel_mults: Sequence[int] = (1, 2, 2),
    attention_levels: Sequence[int] = (1, 2),
    image_size: int = 28,
    layers_per_block: int = 2,
    timestep: int | None = None,
) -> nn.Module:
    """UNet2DModel with ``width * channel_mults[l]`` channels at level l (0 = full resolution), 8 per attention head.

    in_channels: of the image. num_classes: only None. width: all channels have to be divisible by 32. attention_levels:
    levels with attention; between the way down and the way up there is always one. image_size: divisible by
    2^(len(channel_mults) - 1). timestep: a number that is fed in place of every t (the original program feeds 0),
    None = the timesteps themselves.

    Raises UserError for keywords that do not fit, and where diffusers is not installed.
    """
    checks.refuse_labels("unet2d", num_classes, ["context_unet", "unet_conditional", "adm_unet"])
    checks.check_counts(layers_per_block=layers_per_block)
    checks.check_pyramid(in_channels, width, channel_mults, image_size)
    halvings = len(channel_mults) - 1
    checks.check_levels(attention_levels, halvings)
    channels = [width * mult for mult in channel_mults]
    if any(count % _GROUPS for count in channels):
        raise UserError(
            f"the channels {channels} of the levels must be divisible by {_GROUPS}: change model.width or "
            "model.channel_mults"
        )
    if timestep is not None and (type(timestep) is not int or timestep < 0):
        raise UserError(f"model.timestep must be a whole number from 0 on, or null for the real one, not {timestep!r}")
    attended = [level in attention_levels for level in range(halvings + 1)]
    network = _network_class()(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=in_channels,
        layers_per_block=layers_per_block,
        block_out_channels=tuple(channels),
        down_block_types=tuple("AttnDownBlock2D" if yes else "DownBlock2D" for yes in attended),
        up_block_types=tuple("AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attended)),
        norm_num_groups=_GROUPS,
    )
    network.in_channels, network.num_classes, network.image_size = in_channels, None, image_size
    network.timestep, network.halvings = timestep, halvings
    return network.train()


@functools.cache
def _network_class() -> type[nn.Module]:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise UserError(
            f'the network "unet2d" is a part of the package diffusers, which cannot be imported ({error}): install it '
            "with pip install 'ddpm_dist[diffusers]' (from a checkout: pip install -e '.[diffusers]')"
        ) from None

    class Unet2d(UNet2DModel):
        """UNet2DModel under the call of our networks."""

        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            """x (B, in_channels, H, W), t (B,) integers, y ignored; returns a tensor with the shape of x."""
            checks.check_image(x, 2**self.halvings)
            if self.timestep is not None:
                t = torch.full_like(t, self.timestep)
            return keep_memory_format(super().forward(x, t, return_dict=False)[0], x)

    return Unet2d


def keywords_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read in_channels, width, channel_mults, attention_levels and layers_per_block off a state dict, else {}.

    ``timestep`` and ``image_size`` leave no trace in it.
    """
    first = shapes.get("conv_in.weight", ())
    channels: list[int] = []
    while len(shape := shapes.get(f"down_blocks.{len(channels)}.resnets.0.conv2.weight", ())) == 4:
        channels.append(shape[0])
    if len(first) != 4 or not channels:
        return {}
    layers = 1
    while f"down_blocks.0.resnets.{layers}.conv2.weight" in shapes:
        layers += 1
    width = math.gcd(*channels)
    attended = [i for i in range(len(channels)) if f"down_blocks.{i}.attentions.0.to_q.weight" in shapes]
    return {
        "in_channels": first[1],
        "width": width,
        "channel_mults": [count // width for count in channels],
        "attention_levels": attended,
        "layers_per_block": layers,
    }
