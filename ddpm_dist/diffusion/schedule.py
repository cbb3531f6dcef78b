"""Noise schedules: the betas of the forward process and everything that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """A forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (Ho et al. 2020, equation 4).

    timesteps: T, the number of betas; t runs over 0..T-1. t_min: the smallest t that is trained and sampled. Betas run
    linearly from beta_start to beta_end. Tables are float64 on the CPU; use :meth:`table` for a float32 copy on a device.
    """

    timesteps: int = 1000
    t_min: int = 0
    schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    _device_tables: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.schedule != "linear":
            raise ValueError(f"unknown schedule {self.schedule!r}: linear")
        if not 0 <= self.t_min < self.timesteps:
            raise ValueError(f"t_min {self.t_min} must lie in 0..{self.timesteps - 1}")

    @property
    def betas(self) -> Tensor:
        """(T,) float64."""
        return torch.linspace(self.beta_start, self.beta_end, self.timesteps, dtype=torch.float64)

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar_t = prod of (1 - beta_s) for s <= t, (T,) float64."""
        return torch.cumprod(1.0 - self.betas, dim=0)

    def table(self, name: str, device: torch.device) -> Tensor:
        """sqrt_alphas_cumprod or sqrt_one_minus_alphas_cumprod as float32 (T,) on ``device``, made once."""
        key = (name, str(device))
        if key not in self._device_tables:
            abar = self.alphas_cumprod
            values = {"sqrt_alphas_cumprod": abar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt()}[name]
            self._device_tables[key] = values.to(torch.float32).to(device)
        return self._device_tables[key]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A sample of q(x_t | x_0): sqrt(abar_t) x0 + sqrt(1 - abar_t) noise. x0, noise (B, C, H, W) float; t (B,) int64."""
        signal = self.table("sqrt_alphas_cumprod", x0.device)[t].view(-1, 1, 1, 1)
        spread = self.table("sqrt_one_minus_alphas_cumprod", x0.device)[t].view(-1, 1, 1, 1)
        return signal * x0 + spread * noise
