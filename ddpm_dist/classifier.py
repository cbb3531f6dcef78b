"""A small convolutional classifier of real images, the judge of generated ones (see ``ddpm_dist.evaluate``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

FEATURES = 64
BATCH = 64
WIDTHS = (16, 32, 64, 96, 128, 128)  # channels after every halving


class Classifier(nn.Module):
    """Convolutions that halve the image down to about 4x4, then FEATURES numbers, then one logit per class.

    Args:
        channels: 1 or 3.
        size: the smaller side of the images in pixels.
        num_classes: number of logits.
    """

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        # The first convolution of a large image already halves it: that is where the time would go.
        layers: list[nn.Module] = [_conv(channels, WIDTHS[0], stride=2 if size >= 48 else 1)]
        side = size // 2 if size >= 48 else size
        level = 0
        while side >= 8 and level < len(WIDTHS) - 1:
            layers += [_conv(WIDTHS[level], WIDTHS[level + 1], stride=2), _conv(WIDTHS[level + 1], WIDTHS[level + 1])]
            side //= 2
            level += 1
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.neck = nn.Linear(16 * WIDTHS[level], FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float in [-1, 1] -> (B, FEATURES) float >= 0, the input of the last layer."""
        return F.relu(self.neck(self.body(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float in [-1, 1] -> (B, num_classes) logits."""
        return self.head(self.features(x))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def split(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A fixed random split of ``count`` images: int64 ids of the 80 % to train on and of the 20 % held out."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(count)
    held_out = max(1, count // 5)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@contextmanager
def _few_threads(images: np.ndarray) -> Iterator[None]:
    """One CPU thread for small images: more of them mostly wait for each other, ten times longer on a busy machine.

    It also keeps the result independent of the number of cores.
    """
    before = torch.get_num_threads()
    if max(images.shape[2:]) <= 32:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    seed: int = 0,
    device: torch.device | str | None = None,
    passes: float | None = None,
) -> Classifier:
    """Train a classifier; the same input gives the same classifier on the same kind of machine.

    The caller's random state is left as it was. Light augmentation: every batch is shifted by up to 1/8 of the size.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers in 0..num_classes-1.
        num_classes: number of classes.
        seed: for the weights, the order and the shifts.
        device: where to train; None takes the GPU if there is one.
        passes: how often every image is seen; None: about 25,000 images in all, at least 3 passes.

    Returns:
        The classifier in eval mode on ``device``.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    count = len(images)
    if passes is None:
        passes = max(3.0, 25_000 / count)
    steps = max(20, math.ceil(passes * count / BATCH))
    order = np.random.Generator(np.random.Philox(seed + 1))
    queue = np.concatenate([order.permutation(count) for _ in range(math.ceil(steps * BATCH / count))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(images.shape[1], min(images.shape[2:]), num_classes)
    net = net.to(device).train()
    with _few_threads(images):
        _train(net, images, labels, queue, steps, order)
    return net.eval()


def _train(
    net: Classifier, images: np.ndarray, labels: np.ndarray, queue: np.ndarray, steps: int, order: np.random.Generator
) -> None:
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        chosen = queue[step * BATCH : (step + 1) * BATCH]
        x = _shifted(_to_input(images[chosen], device), order)
        y = torch.as_tensor(labels[chosen], dtype=torch.int64, device=device)
        loss = F.cross_entropy(net(x), y, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def predict(net: Classifier, images: np.ndarray, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Classes and penultimate features of images.

    Args:
        net: a trained classifier.
        images: (N, C, H, W) uint8 of the size and channels it was trained on.

    Returns:
        classes (N,) int64 and features (N, FEATURES) float64.
    """
    device = next(net.parameters()).device
    classes, features = [], []
    with _few_threads(images):
        for begin in range(0, len(images), batch):
            found = net.features(_to_input(images[begin : begin + batch], device))
            features.append(found.double().cpu().numpy())
            classes.append(net.head(found).argmax(dim=1).cpu().numpy())
    return np.concatenate(classes), np.concatenate(features)


def _to_input(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 -> float in [-1, 1]."""
    return torch.as_tensor(images, device=device).float() / 127.5 - 1


def _shifted(x: torch.Tensor, order: np.random.Generator) -> torch.Tensor:
    """The batch in four groups, each shifted by its own random offset; the border is repeated."""
    height, width = x.shape[-2:]
    reach_y, reach_x = max(1, height // 8), max(1, width // 8)
    padded = F.pad(x, (reach_x, reach_x, reach_y, reach_y), mode="replicate")
    parts = []
    for part in padded.chunk(4):
        top, left = order.integers(0, 2 * reach_y + 1), order.integers(0, 2 * reach_x + 1)
        parts.append(part[:, :, top : top + height, left : left + width])
    return torch.cat(parts)
