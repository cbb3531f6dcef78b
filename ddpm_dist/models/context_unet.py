"""A UNet with one global bottleneck vector, whose way up is multiplied by the label and shifted by the time.

With its default keywords (128 features, 10 classes) it has 6,585,601 parameters, whose names and shapes are those of the
small program for MNIST it comes from; weights trained there load here. Two properties of that program are kept because
trained weights depend on them: the time enters as t / timesteps, a single number in [0, 1], and a label as **minus** its
one-hot vector (all zero where it is dropped). Residual blocks divide by 1.414, not by the root of 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.errors import UserError
from ddpm_dist.models import checks
from ddpm_dist.models.batch_norm import BatchNorm2d
from ddpm_dist.models.blocks import Float32Linear, keep_memory_format


class ResidualConvBlock(nn.Module):
    """Twice conv3x3 - BatchNorm - GELU; with ``residual`` the second is added to the first (or the input) / 1.414."""

    def __init__(self, c_in: int, c_out: int, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.same_channels = c_in == c_out
        self.conv1 = nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), BatchNorm2d(c_out), nn.GELU())
        self.conv2 = nn.Sequential(nn.Conv2d(c_out, c_out, 3, padding=1), BatchNorm2d(c_out), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H, W)."""
        first = self.conv1(x)
        second = self.conv2(first)
        if not self.residual:
            return second
        return ((x if self.same_channels else first) + second) / 1.414


class Down(nn.Module):
    """Two convolutions, then max-pool by 2."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.model = nn.Sequential(ResidualConvBlock(c_in, c_out), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H/2, W/2)."""
        return self.model(x)


class Up(nn.Module):
    """Concatenate the skip, double the size by a transposed convolution, four convolutions."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.model = nn.Sequential(
            nn.ConvTranspose2d(c_in, c_out, 2, 2), ResidualConvBlock(c_out, c_out), ResidualConvBlock(c_out, c_out)
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, c, H, W) and skip (B, c_in - c, H, W) to (B, c_out, 2H, 2W)."""
        return self.model(torch.cat([x, skip], dim=1))


class Embedding(nn.Module):
    """Linear - GELU - Linear in float32: t / T as bfloat16 would be the same for neighbouring timesteps."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.model = nn.Sequential(Float32Linear(c_in, c_out), nn.GELU(), Float32Linear(c_out, c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in) to (B, c_out, 1, 1)."""
        return self.model(x)[:, :, None, None]


class ContextUnet(nn.Module):
    """Two halvings, then the mean over the whole image, and back; ``width`` features ("n_feat" in the original).

    in_channels: of the image. num_classes: labels, at least 1. width: divisible by 8 (groups of a normalisation).
    image_size: divisible by 4; the bottleneck is as large as a quarter of it. timesteps: what t is divided by.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 128,
        image_size: int = 28,
        timesteps: int = 400,
    ):
        super().__init__()
        if num_classes is None:
            raise UserError(
                'the network "context_unet" needs labels, but num_classes is null: set data.num_classes, or use '
                "unet or adm_unet"
            )
        checks.check_counts(
            in_channels=in_channels, num_classes=num_classes, width=width, image_size=image_size, timesteps=timesteps
        )
        if width % 8:
            raise UserError(f"model.width must be divisible by 8, not {width}")
        checks.check_halvings(image_size, 2, "the 2 halvings of context_unet")
        self.in_channels, self.num_classes, self.image_size = in_channels, num_classes, image_size
        self.timesteps = timesteps
        pooled = image_size // 4
        self.init_conv = ResidualConvBlock(in_channels, width, residual=True)
        self.down1 = Down(width, width)
        self.down2 = Down(width, 2 * width)
        self.to_vec = nn.Sequential(nn.AvgPool2d(pooled), nn.GELU())
        self.timeembed1 = Embedding(1, 2 * width)
        self.timeembed2 = Embedding(1, width)
        self.contextembed1 = Embedding(num_classes, 2 * width)
        self.contextembed2 = Embedding(num_classes, width)
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(2 * width, 2 * width, pooled, pooled), nn.GroupNorm(8, 2 * width), nn.ReLU()
        )
        self.up1 = Up(4 * width, width)
        self.up2 = Up(2 * width, width)
        self.out = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, in_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from a noisy image.

        x: (B, in_channels, H, W) floating point, sides divisible by image_size; t: (B,) integer timesteps; y: (B,) int64
        labels, -1 = dropped, None = all dropped. Returns a tensor with the shape and memory format of x. Raises
        UserError for images of another size and for a label that the network does not have (on the CPU).
        """
        checks.check_image(x, self.image_size)
        time = (t.float() / self.timesteps)[:, None]
        if y is None:
            y = torch.full_like(t, -1)
        checks.check_labels(y, self.num_classes)
        # A dropped label gives zeros, so every parameter of the embeddings is used in every step (with gradient 0).
        context = -(y[:, None] == torch.arange(self.num_classes, device=y.device)).to(torch.float32)

        x0 = self.init_conv(x)
        down1 = self.down1(x0)
        down2 = self.down2(down1)
        h = self.up0(self.to_vec(down2))
        h = self.up1(self._modulate(h, self.contextembed1(context), self.timeembed1(time)), down2)
        h = self.up2(self._modulate(h, self.contextembed2(context), self.timeembed2(time)), down1)
        return keep_memory_format(self.out(torch.cat([h, x0], dim=1)), x)

    @staticmethod
    def _modulate(h: Tensor, context: Tensor, time: Tensor) -> Tensor:
        return context.to(h.dtype) * h + time.to(h.dtype)


def keywords_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read in_channels, num_classes, width and image_size off a state dict; {} for that of something else.

    ``timesteps`` leaves no trace in it.
    """
    first, context = shapes.get("init_conv.conv1.0.weight", ()), shapes.get("contextembed1.model.0.weight", ())
    bottleneck = shapes.get("up0.0.weight", ())
    if not (len(first) == 4 and len(context) == 2 and len(bottleneck) == 4):
        return {}
    return {
        "in_channels": first[1],
        "num_classes": context[1],
        "width": first[0],
        "image_size": 4 * bottleneck[2],
    }
