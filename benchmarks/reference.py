"""The baseline: a single-device training loop written the way small DDPM programs are written.

Nothing here is tuned, on purpose: fp32, ``nn.MultiheadAttention`` with its defaults (it returns the attention matrix),
``nn.Upsample``, AdamW with its defaults, an exponential moving average that visits one parameter after the other in
Python, ``loss.item()`` in every step, and torchvision's ``ImageFolder`` behind a ``DataLoader``. The network computes
what ``ddpm_dist.models.build_model("unet_conditional")`` computes and has the same parameter names, so it is also what
the tests compare the fast network with.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each followed by GroupNorm(1), with a GELU between them."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x + self.double_conv(x)) if self.residual else self.double_conv(x)


class Down(nn.Module):
    """Halve the image, two double convolutions, add the embedding."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int):
        super().__init__()
        self.maxpool_conv = nn.Sequential(
            nn.MaxPool2d(2), DoubleConv(c_in, c_in, residual=True), DoubleConv(c_in, c_out)
        )
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        x = self.maxpool_conv(x)
        emb = self.emb_layer(emb)[:, :, None, None].repeat(1, 1, x.shape[-2], x.shape[-1])
        return x + emb


class Up(nn.Module):
    """Double the image, join the skip connection, two double convolutions, add the embedding."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = nn.Sequential(DoubleConv(c_in, c_in, residual=True), DoubleConv(c_in, c_out, c_in // 2))
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))

    def forward(self, x: torch.Tensor, skip: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        x = self.conv(torch.cat([skip, self.up(x)], dim=1))
        emb = self.emb_layer(emb)[:, :, None, None].repeat(1, 1, x.shape[-2], x.shape[-1])
        return x + emb


class SelfAttention(nn.Module):
    """Attention over all pixels and a feed-forward part, each added to its input."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.channels, self.size = channels, size
        self.mha = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.ln = nn.LayerNorm([channels])
        self.ff_self = nn.Sequential(
            nn.LayerNorm([channels]), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, self.channels, self.size * self.size).swapaxes(1, 2)
        normed = self.ln(x)
        attended, _ = self.mha(normed, normed, normed)
        x = attended + x
        x = self.ff_self(x) + x
        return x.swapaxes(2, 1).reshape(-1, self.channels, self.size, self.size)


class ReferenceUNet(nn.Module):
    """The network of the original program. ``forward(x, t, y)`` with y (B,) int64 or None for a whole batch without."""

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int | None = None,
        width: int = 64,
        image_size: int = 64,
        emb_dim: int = 256,
    ):
        super().__init__()
        w, size = width, image_size
        self.emb_dim = emb_dim
        self.inc = DoubleConv(in_channels, w)
        self.down1 = Down(w, 2 * w, emb_dim)
        self.sa1 = SelfAttention(2 * w, size // 2)
        self.down2 = Down(2 * w, 4 * w, emb_dim)
        self.sa2 = SelfAttention(4 * w, size // 4)
        self.down3 = Down(4 * w, 4 * w, emb_dim)
        self.sa3 = SelfAttention(4 * w, size // 8)
        self.bot1 = DoubleConv(4 * w, 8 * w)
        self.bot2 = DoubleConv(8 * w, 8 * w)
        self.bot3 = DoubleConv(8 * w, 4 * w)
        self.up1 = Up(8 * w, 2 * w, emb_dim)
        self.sa4 = SelfAttention(2 * w, size // 4)
        self.up2 = Up(4 * w, w, emb_dim)
        self.sa5 = SelfAttention(w, size // 2)
        self.up3 = Up(2 * w, w, emb_dim)
        self.sa6 = SelfAttention(w, size)
        self.outc = nn.Conv2d(w, in_channels, 1)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_dim)

    def time_embedding(self, t: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(0, self.emb_dim, 2, device=t.device).float() / self.emb_dim
        angles = t[:, None].float() * (1.0 / 10000**steps)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        emb = self.time_embedding(t)
        if y is not None:
            emb = emb + self.label_emb(y)
        x1 = self.inc(x)
        x2 = self.sa1(self.down1(x1, emb))
        x3 = self.sa2(self.down2(x2, emb))
        x4 = self.sa3(self.down3(x3, emb))
        x4 = self.bot3(self.bot2(self.bot1(x4)))
        x = self.sa4(self.up1(x4, x3, emb))
        x = self.sa5(self.up2(x, x2, emb))
        x = self.sa6(self.up3(x, x1, emb))
        return self.outc(x)


class ReferenceEMA:
    """One parameter after the other, a new tensor each."""

    def __init__(self, decay: float):
        self.decay = decay

    def update(self, averaged: nn.Module, network: nn.Module) -> None:
        for old, new in zip(averaged.parameters(), network.parameters(), strict=True):
            old.data = old.data * self.decay + (1 - self.decay) * new.data


class ReferenceLoop:
    """Network, optimizer, EMA and loader of the baseline; ``step()`` trains on one batch.

    ``folder`` is a folder with one subfolder of images per class. ``loaded_s`` adds up the seconds spent waiting for
    batches. The EMA is in its steady state from the first step (the original only copies during the first 2,000).
    """

    def __init__(
        self,
        folder: Path,
        image_size: int = 64,
        batch: int = 4,
        device: str | torch.device = "cpu",
        lr: float = 3e-4,
        width: int = 64,
        workers: int = 0,
    ):
        from torchvision import datasets, transforms

        convert = transforms.Compose(
            [
                transforms.RandomResizedCrop(image_size, scale=(0.8, 1.0)),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )
        images = datasets.ImageFolder(str(folder), transform=convert)
        if len(images) < batch:
            raise ValueError(f"{folder} holds {len(images)} images, fewer than one batch of {batch}")
        self.loader = torch.utils.data.DataLoader(
            images, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )
        self.device = torch.device(device)
        self.network = ReferenceUNet(num_classes=len(images.classes), width=width, image_size=image_size)
        self.network.to(self.device)
        self.averaged = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=lr)
        self.ema = ReferenceEMA(0.995)
        self.mse = nn.MSELoss()
        betas = torch.linspace(1e-4, 0.02, 1000).to(self.device)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self.loaded_s = 0.0
        self.batches = self._endless()

    def _endless(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> float:
        """Train on the next batch and return its loss."""
        start = time.perf_counter()
        images, labels = next(self.batches)
        self.loaded_s += time.perf_counter() - start
        images, labels = images.to(self.device), labels.to(self.device)
        t = torch.randint(1, 1000, (images.shape[0],)).to(self.device)
        signal = torch.sqrt(self.alphas_cumprod[t])[:, None, None, None]
        spread = torch.sqrt(1 - self.alphas_cumprod[t])[:, None, None, None]
        noise = torch.randn_like(images)
        noisy = signal * images + spread * noise
        kept = None if np.random.random() < 0.1 else labels
        loss = self.mse(noise, self.network(noisy, t, kept))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update(self.averaged, self.network)
        return loss.item()


def write_image_folder(folder: Path, images: int = 256, size: int = 64, classes: int = 10, seed: int = 0) -> Path:
    """Write JPEGs of coloured blobs on a gradient with sensor-like noise, one subfolder per class; return ``folder``.

    They compress like small photographs (about 2 kB at 64x64), so that decoding costs what real images cost.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    for number in range(images):
        corners = rng.uniform(0, 255, (2, 3))
        picture = corners[0] + (corners[1] - corners[0]) * (rows * rng.random() + columns * rng.random())[..., None]
        for _ in range(6):
            y, x, radius = rng.uniform(0, 1, 3) * (1, 1, 0.35)
            inside = ((rows - y) ** 2 + (columns - x) ** 2 < radius**2)[..., None]
            picture = np.where(inside, rng.uniform(0, 255, 3), picture)
        picture = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        target = folder / f"class{number % classes:02d}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(target / f"{number:06d}.jpg", quality=95)
    return folder


def unpack_shards(shards: Path, folder: Path, limit: int | None = None) -> Path:
    """Write the samples of a packed data set (at most ``limit``) as an image folder; return ``folder``.

    Unlabelled samples go to one subfolder. Raises ``UserError`` for a damaged or missing index.
    """
    from ddpm_dist.data.shards import Index

    index = Index.load(shards)
    count = len(index.samples) if limit is None else min(limit, len(index.samples))
    # Spread over the whole data set: shards may be sorted by class.
    for sample_id in np.linspace(0, len(index.samples) - 1, count, dtype=np.int64):
        label = int(index.samples[sample_id]["label"])
        target = folder / f"class{label:05d}"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{sample_id:09d}.{index.image_format}").write_bytes(index.read(int(sample_id)))
    return folder


def main() -> int:
    """Train the baseline on generated images for a few steps and print its speed."""
    import argparse

    parser = argparse.ArgumentParser(description="Train the baseline for a few steps and print images per second.")
    parser.add_argument("--shards", type=Path, help="packed data set to train on (default: generated images)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.shards:
            unpack_shards(args.shards, folder, limit=4096)
        else:
            write_image_folder(folder, images=max(64, args.batch), size=args.size)
        loop = ReferenceLoop(folder, image_size=args.size, batch=args.batch, device=args.device)
        loop.step()
        for step in range(args.steps):
            start = time.perf_counter()
            loss = loop.step()
            print(f"step {step + 1}: loss {loss:.4f}, {args.batch / (time.perf_counter() - start):.2f} images/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
