"""Plain versions of the networks of the small programs that ours come from, for tests to compare with.

Nothing here is shared with ddpm_dist: torch's own layers, each formula written out, one size. Tensor names are those of the
programs' checkpoints. (That of unet_conditional is ``benchmarks.reference.ReferenceUNet``, that of unet2d a network of diffusers.)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def randomise(network: nn.Module, seed: int) -> nn.Module:
    """Move every parameter and every statistic away from its initial value, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            scale = max(0.3 * float(p.std()), 0.03) if p.numel() > 1 else 0.1
            p.add_(scale * torch.randn(p.shape, generator=generator))
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(4690)
    return network.eval()


class FilmBlock(nn.Module):
    def __init__(self, before: int, after: int, up: bool):
        super().__init__()
        self.up = up
        self.time_condition = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2 * after))
        self.norm1 = nn.GroupNorm(32, before)
        self.norm2 = nn.GroupNorm(32, after)
        self.short_cut = nn.Conv2d(before, after, kernel_size=1)
        resample = nn.Conv2d(before, before, kernel_size=3, stride=1 if up else 2, padding=1)
        self.sample = nn.Sequential(nn.Upsample(scale_factor=2), resample) if up else resample
        self.conv1 = nn.Conv2d(before, after, kernel_size=3, padding=1, groups=32)
        self.conv2 = nn.Conv2d(after, after, kernel_size=3, padding=1)

    def forward(self, x, time):
        resampled = self.sample(self.norm1(x))
        scale_and_shift = self.time_condition(time)
        half = scale_and_shift.shape[1] // 2
        scale, shift = scale_and_shift[:, :half, None, None], scale_and_shift[:, half:, None, None]
        h = self.conv1(F.silu(resampled))
        h = h + scale * h + shift
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.short_cut(resampled)


class ReferenceFilmUnet(nn.Module):
    """18,430,115 parameters, dropout left out (for eval mode). ``forward(x, t)``."""

    def __init__(self):
        super().__init__()
        self.init_conv = nn.Conv2d(3, 32, kernel_size=7, padding=3)
        self.time_mlp = nn.Sequential(nn.Identity(), nn.Linear(32, 128), nn.GELU())
        self.downs = nn.ModuleList(
            [
                FilmBlock(32, 64, up=False),
                FilmBlock(64, 128, up=False),
                FilmBlock(128, 256, up=False),
                FilmBlock(256, 512, up=False),
            ]
        )
        self.ups = nn.ModuleList(
            [
                FilmBlock(1024, 256, up=True),
                FilmBlock(512, 128, up=True),
                FilmBlock(256, 64, up=True),
                FilmBlock(128, 32, up=True),
            ]
        )
        self.output = nn.Conv2d(32, 3, kernel_size=1)

    def forward(self, x, t):
        frequencies = torch.tensor([math.exp(-math.log(10000) * i / 15) for i in range(16)])
        angles = t.view(-1, 1) * frequencies.view(1, -1)
        time = self.time_mlp(torch.cat([torch.sin(angles), torch.cos(angles)], dim=1))
        d0 = self.downs[0](self.init_conv(x), time)
        d1 = self.downs[1](d0, time)
        d2 = self.downs[2](d1, time)
        d3 = self.downs[3](d2, time)
        u0 = self.ups[0](torch.cat([d3, d3], dim=1), time)
        u1 = self.ups[1](torch.cat([u0, d2], dim=1), time)
        u2 = self.ups[2](torch.cat([u1, d1], dim=1), time)
        u3 = self.ups[3](torch.cat([u2, d0], dim=1), time)
        return self.output(u3)


class ReferenceBasicUnet(nn.Module):
    """309,057 parameters. ``forward(x)``."""

    def __init__(self):
        super().__init__()

        def conv(before, after):
            return nn.Conv2d(before, after, kernel_size=5, padding=2)

        self.down_layers = nn.ModuleList([conv(1, 32), conv(32, 64), conv(64, 64)])
        self.up_layers = nn.ModuleList([conv(64, 64), conv(64, 32), conv(32, 1)])

    def forward(self, x):
        full = F.silu(self.down_layers[0](x))
        half = F.silu(self.down_layers[1](F.max_pool2d(full, 2)))
        quarter = F.silu(self.down_layers[2](F.max_pool2d(half, 2)))
        x = F.silu(self.up_layers[0](quarter))
        x = F.silu(self.up_layers[1](F.interpolate(x, scale_factor=2) + half))
        return F.silu(self.up_layers[2](F.interpolate(x, scale_factor=2) + full))


class ContextConvs(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.GELU())
        self.conv2 = nn.Sequential(nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.GELU())

    def forward(self, x):
        return self.conv2(self.conv1(x))


class Inside(nn.Module):
    """A sequence under the name ``model``."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


class ReferenceContextUnet(nn.Module):
    """6,585,601 parameters with 128 features. ``forward(x, labels, time, mask)``: time = t / 400, mask 1 = label dropped."""

    def __init__(self, features: int = 128, classes: int = 10):
        super().__init__()
        f, self.classes = features, classes

        def embedding(before, after):
            return Inside(nn.Linear(before, after), nn.GELU(), nn.Linear(after, after))

        def up(before, after):
            convs = ContextConvs(after, after), ContextConvs(after, after)
            return Inside(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2), *convs)

        self.init_conv = ContextConvs(1, f)
        self.down1 = Inside(ContextConvs(f, f), nn.MaxPool2d(2))
        self.down2 = Inside(ContextConvs(f, 2 * f), nn.MaxPool2d(2))
        self.timeembed1, self.timeembed2 = embedding(1, 2 * f), embedding(1, f)
        self.contextembed1, self.contextembed2 = embedding(classes, 2 * f), embedding(classes, f)
        unpool = nn.ConvTranspose2d(2 * f, 2 * f, kernel_size=7, stride=7)
        self.up0 = nn.Sequential(unpool, nn.GroupNorm(8, 2 * f), nn.ReLU())
        self.up1, self.up2 = up(4 * f, f), up(2 * f, f)
        self.out = nn.Sequential(
            nn.Conv2d(2 * f, f, 3, padding=1), nn.GroupNorm(8, f), nn.ReLU(), nn.Conv2d(f, 1, 3, padding=1)
        )

    def forward(self, x, labels, time, mask):
        first = self.init_conv.conv1(x)
        full = (first + self.init_conv.conv2(first)) / 1.414  # one channel became many, so the input cannot be added
        half = self.down1(full)
        quarter = self.down2(half)
        vector = F.gelu(F.avg_pool2d(quarter, 7))
        context = F.one_hot(labels, self.classes).to(x.dtype) * (mask - 1).view(-1, 1)
        time = time.view(-1, 1)

        def spread(embedding, values):
            return embedding(values)[:, :, None, None]

        h = self.up0(vector)
        h = spread(self.contextembed1, context) * h + spread(self.timeembed1, time)
        h = self.up1(torch.cat([h, quarter], dim=1))
        h = spread(self.contextembed2, context) * h + spread(self.timeembed2, time)
        h = self.up2(torch.cat([h, half], dim=1))
        return self.out(torch.cat([h, full], dim=1))


def reference_unet2d() -> nn.Module:
    """The network of diffusers that unet2d is, with initial weights. 1,707,009 parameters."""
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def schedule_tables(last: int = 400, first_beta: float = 1e-4, last_beta: float = 0.02) -> dict[str, torch.Tensor]:
    """The seven float32 tables of last + 1 entries that the program of context_unet keeps beside its weights."""
    beta = torch.arange(last + 1, dtype=torch.float32) * ((last_beta - first_beta) / last) + first_beta
    alpha = 1 - beta
    alphabar = alpha.log().cumsum(0).exp()
    spread = (1 - alphabar).sqrt()
    return {
        "alpha_t": alpha,
        "oneover_sqrta": 1 / alpha.sqrt(),
        "sqrt_beta_t": beta.sqrt(),
        "alphabar_t": alphabar,
        "sqrtab": alphabar.sqrt(),
        "sqrtmab": spread,
        "mab_over_sqrtmab": (1 - alpha) / spread,
    }
