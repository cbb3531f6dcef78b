"""A small class-conditional convolutional GAN, the plain opponent of a diffusion model in ``benchmarks.gan_baseline``.

Generator and discriminator are those of DCGAN (Radford et al. 2016, arXiv 1511.06434, section 3) for any size that halves down to 4 .. 7
pixels. The label enters the generator beside the latent vector, and the discriminator as a projection: logit = w f(x) + e(y) f(x)
(Miyato & Koyama 2018, arXiv 1802.05637, equation 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_dist.data.pipeline import Loader, normalise
from ddpm_dist.errors import RunFailed, UserError

LATENT = 64
BETAS = (0.5, 0.999)  # of Adam, DCGAN section 3


def halvings(size: int) -> tuple[int, int]:
    """(smallest size, how often ``size`` is halved to get there). UserError for sizes that do not halve to 4 .. 7 pixels."""
    small, count = size, 0
    while small > 7 and small % 2 == 0:
        small, count = small // 2, count + 1
    if count == 0 or not 4 <= small <= 7:
        raise UserError(
            f"image size {size} does not halve down to 4 .. 7 pixels: take 8, 12, 16, 28, 32, 64, 96 or the like"
        )
    return small, count


class Generator(nn.Module):
    """(B, LATENT) standard normal numbers and (B,) labels to (B, channels, size, size) in [-1, 1]."""

    def __init__(self, channels: int, size: int, num_classes: int, width: int) -> None:
        super().__init__()
        small, count = halvings(size)
        now = width * 2 ** (count - 1)
        self.embed = nn.Embedding(num_classes, LATENT)
        self.first = nn.Sequential(
            nn.Linear(2 * LATENT, now * small * small, bias=False), nn.Unflatten(1, (now, small, small)),
            nn.BatchNorm2d(now), nn.ReLU(),
        )  # fmt: skip
        layers: list[nn.Module] = []
        for _ in range(count - 1):
            layers += [nn.ConvTranspose2d(now, now // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(now // 2), nn.ReLU()]
            now //= 2
        self.body = nn.Sequential(*layers, nn.ConvTranspose2d(now, channels, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.body(self.first(torch.cat([z, self.embed(y)], dim=1)))


class Discriminator(nn.Module):
    """(B, channels, size, size) in [-1, 1] and (B,) labels to (B,) logits: how real, and how much of that class."""

    def __init__(self, channels: int, size: int, num_classes: int, width: int) -> None:
        super().__init__()
        small, count = halvings(size)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        now = width
        for _ in range(count - 1):
            layers += [nn.Conv2d(now, 2 * now, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * now), nn.LeakyReLU(0.2)]
            now *= 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(now * small * small, 1)
        self.embed = nn.Embedding(num_classes, now * small * small)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.body(x)
        return self.head(features)[:, 0] + (self.embed(y) * features).sum(dim=1)


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), those of batch norm around 1 (DCGAN, section 3)."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def train_gan(
    loader: Loader,
    steps: int,
    batch: int,
    shape: tuple[int, int, int],
    num_classes: int,
    lr: float,
    seed: int,
    device: torch.device,
    width: int = 32,
    on_step: Callable[[int, float, float], None] = lambda step, real, fake: None,
) -> Generator:
    """Train on ``steps`` batches of the loader, one update of each network per batch, with the non-saturating loss
    (Goodfellow et al. 2014, arXiv 1406.2661, section 3).

    The same arguments give the same generator on the same kind of machine; the caller's random state is left as it was.
    on_step(step, loss of the discriminator, loss of the generator) every 100 steps and at the last one; step counts from 1.

    Returns the generator in eval mode. Raises RunFailed when a loss is no longer finite.
    """
    channels, size, _ = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, judge = (
            kind(channels, size, num_classes, width).apply(_initialise) for kind in (Generator, Discriminator)
        )
    generator, judge = generator.to(device).train(), judge.to(device).train()
    optimizers = [torch.optim.Adam(net.parameters(), lr=lr, betas=BETAS) for net in (judge, generator)]
    draws = torch.Generator().manual_seed(seed)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    for step in range(1, steps + 1):
        item = loader.next()
        real, labels = normalise(item.pixels, [-1.0, 1.0], torch.contiguous_format), item.labels
        fake = generator(torch.randn(batch, LATENT, generator=draws).to(device), labels)
        loss_judge = F.softplus(-judge(real, labels)).mean() + F.softplus(judge(fake.detach(), labels)).mean()
        _update(optimizers[0], loss_judge)
        loss_generator = F.softplus(-judge(fake, labels)).mean()
        _update(optimizers[1], loss_generator)
        if step % 100 == 0 or step == steps:
            losses = loss_judge.item(), loss_generator.item()
            if not all(abs(loss) < float("inf") for loss in losses):
                raise RunFailed(
                    f"the GAN's losses at step {step} are {losses[0]} and {losses[1]}: lower the rate (--lr)"
                )
            on_step(step, *losses)
    return generator.eval()


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


@torch.no_grad()
def generate(generator: Generator, labels: Tensor, seed: int, batch: int = 256) -> Tensor:
    """(N, C, H, W) in [-1, 1] for ``labels`` (N,), on the labels' device; a function of the seed and the order of the labels."""
    z = torch.randn(len(labels), LATENT, generator=torch.Generator().manual_seed(seed + 1)).to(labels.device)
    return torch.cat([generator(*part) for part in zip(z.split(batch), labels.split(batch), strict=True)])
