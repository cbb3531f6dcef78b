"""Which timesteps a sampler visits, and how much image and noise there is at each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist.diffusion.schedule import Schedule

SPACINGS = ("leading", "trailing", "linspace")
# Where x_t is pure noise, the logarithm of its signal would be -inf: solvers that work with it take this (2^-24 as abar).
STAND_IN = 2.0**-12


@dataclass(frozen=True)
class Path:
    """The timesteps of a sampler, from noise to image.

    timesteps: (n,) int64, falling. signal, spread: (n + 1,) float64, those of the timesteps, then of where the last step leads: the
    image itself (1, 0). abar_end: what ancestral sampling takes for the last abar; 1, or where every timestep down to t_min > 0 is
    trained, that of t_min - 1, so that the last step's beta is the schedule's own.
    """

    timesteps: Tensor
    signal: Tensor
    spread: Tensor
    abar_end: float

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def some_signal(self) -> Tensor:
        """``signal``, with a small number in place of 0."""
        return torch.where(self.signal > 0, self.signal, STAND_IN)

    @property
    def log_snr(self) -> Tensor:
        """lambda = log(signal / spread), (n + 1,) float64; the last one is infinite."""
        return (self.some_signal / self.spread).log()


def timesteps(schedule: Schedule, steps: int | None, spacing: str = "linspace") -> Tensor:
    """The timesteps that are visited, int64, from large to small: all of t_min..T-1, or ``steps`` of them evenly spaced.

    spacing, as in table 2 of Lin et al. 2023 (arXiv 2305.08891), for N = T - t_min: "linspace" has both ends, T-1 and t_min;
    "leading" t_min and its multiples of N // steps, so that T-1 is left out; "trailing" T-1 and every N / steps below it.
    Raises ValueError for an unknown spacing and for steps outside 1..N.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: {', '.join(SPACINGS)}")
    last, first = schedule.timesteps - 1, schedule.t_min
    count = last - first + 1
    if steps is None or steps == count:
        return torch.arange(last, first - 1, -1)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= count:
        raise ValueError(f"steps must lie in 1..{count}, a whole number, not {steps!r}")
    if spacing == "leading":
        return first + torch.arange(steps - 1, -1, -1) * (count // steps)
    if spacing == "trailing":
        edges = count - torch.arange(steps, dtype=torch.float64) * (count / steps)
        return first + edges.round().to(torch.int64) - 1
    if steps == 1:
        return torch.tensor([last])
    return torch.linspace(last, first, steps, dtype=torch.float64).round().to(torch.int64)


def path(schedule: Schedule, steps: int | None, spacing: str = "linspace") -> Path:
    """The path over the timesteps that :func:`timesteps` names. A mixing schedule is walked in equal shares of the noise, from all
    of it (spread 1) down, and its timesteps are the nearest there are."""
    visited = timesteps(schedule, steps, spacing)
    if schedule.is_mixing:
        amount = torch.arange(len(visited), 0, -1, dtype=torch.float64) / len(visited)
        visited = (
            (amount * schedule.timesteps - 0.5).round().to(torch.int64).clamp(schedule.t_min, schedule.timesteps - 1)
        )
        spread = torch.cat([amount, amount.new_zeros(1)])
        return Path(visited, 1.0 - spread, spread, 1.0)
    abar_end = 1.0
    if int(visited[-1]) == schedule.t_min > 0:
        abar_end = float(schedule.alphas_cumprod[schedule.t_min - 1])
    one = torch.ones(1, dtype=torch.float64)
    return Path(
        visited, torch.cat([schedule.signal[visited], one]), torch.cat([schedule.spread[visited], 0 * one]), abar_end
    )
