"""The training objective: what the network predicts, how far it is off, and how much that counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_dist.diffusion.schedule import Schedule


def target(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer for x_t = signal_t x0 + spread_t noise. All (B, C, H, W) float, t (B,) int64.

    epsilon: the noise (Ho et al. 2020, equation 14); x0: the image; v: signal_t noise - spread_t x0 (Salimans & Ho 2022,
    arXiv 2202.00512, appendix D).
    """
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "x0":
        return x0
    signal = schedule.table("signal", x0.device)[t].view(-1, 1, 1, 1)
    spread = schedule.table("spread", x0.device)[t].view(-1, 1, 1, 1)
    return signal * noise - spread * x0


def mse_per_image(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image: (B, C, H, W) twice -> (B,) float32 (Ho et al. 2020, equation 14).

    Kept per image so that the caller can average over a global batch whatever its split.
    """
    error = prediction.float() - target.float()
    if error.dim() == 4 and not error.is_contiguous():
        # In the order in memory: flattening would copy a channels_last tensor and hand back a gradient in the other format.
        error = error.permute(0, 2, 3, 1)
    return error.square().flatten(1).mean(dim=1)


def min_snr_weights(schedule: Schedule, gamma: float) -> Tensor:
    """(T,) float64: how much each timestep counts under min-SNR-gamma weighting (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    min(SNR, gamma) times the error of x0, in terms of what is predicted: divided by SNR for epsilon, by SNR + 1 for v.
    Where SNR is 0 (zero terminal SNR) the weight of v is 0.
    """
    snr = schedule.snr
    weight = snr.clamp(max=gamma)
    if schedule.prediction == "epsilon":
        return weight / snr
    return weight if schedule.prediction == "x0" else weight / (snr + 1.0)


def drop_labels(labels: Tensor, dropped: Tensor) -> Tensor:
    """Labels (B,) int64 with -1 where ``dropped`` (B,) bool, for classifier-free guidance (Ho & Salimans 2022, algorithm 1)."""
    return torch.where(dropped, -1, labels)
