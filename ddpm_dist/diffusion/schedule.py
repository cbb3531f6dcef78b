"""Noise schedules: how much of the image and how much noise x_t holds, and what the network says about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SCHEDULES = ("linear", "cosine", "sigmoid", "betas", "mixing")
NOISES = ("gaussian", "uniform")
PREDICTIONS = ("epsilon", "x0", "v")


@dataclass(frozen=True)
class Schedule:
    """A forward process x_t = signal_t x_0 + spread_t noise, and what the network was trained to predict from x_t.

    All but "mixing" are variance preserving, signal_t^2 + spread_t^2 = 1: q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) with
    abar_t = prod of (1 - beta_s) for s <= t (Ho et al. 2020, equation 4).

    timesteps: T; t runs over 0..T-1. t_min: the smallest t that is trained and sampled.
    schedule:
        "linear": betas from beta_start to beta_end (Ho et al. 2020, section 4);
        "cosine": abar(u) = cos^2((u + 0.008) / 1.008 pi/2) at u = t / T, betas at most 0.999 (Nichol & Dhariwal 2021, equation 17);
        "sigmoid": betas = beta_start + (beta_end - beta_start) sigmoid(s), s from -6 to 6 (Xu et al. 2022, arXiv 2203.02923, code);
        "betas": those in ``given_betas``, T numbers in (0, 1];
        "mixing": signal 1 - a and spread a with a = (t + 1/2) / T: a straight line from the image to the noise.
    zero_terminal_snr: shift and scale sqrt(abar) so that x_{T-1} is pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    noise: "gaussian", or "uniform" over the range of the pixel values (with "mixing").
    prediction: "epsilon" (the noise), "x0", or "v" = signal noise - spread x_0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D).

    Tables are float64 on the CPU. Raises ValueError for what does not go together.
    """

    timesteps: int = 1000
    t_min: int = 0
    schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    given_betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False
    noise: str = "gaussian"
    prediction: str = "epsilon"
    _device_tables: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, valid in (("schedule", SCHEDULES), ("noise", NOISES), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: {', '.join(valid)}")
        if not 0 <= self.t_min < self.timesteps:
            raise ValueError(f"t_min {self.t_min} must be below timesteps {self.timesteps}, and not negative")
        given = self.given_betas
        if (self.schedule == "betas") != (given is not None):
            raise ValueError("schedule 'betas' and a list of betas belong together: give both or neither")
        if given is not None and (len(given) != self.timesteps or not all(0 < beta <= 1 for beta in given)):
            raise ValueError(
                f"betas must be {self.timesteps} (timesteps) numbers in (0, 1], not {len(given)} of any kind"
            )
        if given is not None and any(beta == 1 for beta in given[:-1]):
            raise ValueError("betas: only the last one may be 1, after it nothing of the image is left")
        if self.schedule == "mixing" and (self.zero_terminal_snr or self.prediction == "v"):
            raise ValueError("schedule 'mixing' has no v prediction and no zero_terminal_snr: predict x0 or epsilon")
        if self.noise == "uniform" and self.schedule != "mixing":
            raise ValueError("noise 'uniform' needs schedule 'mixing': the other schedules are made for Gaussian noise")
        if not bool((self.spread > 0).all()):
            raise ValueError(
                f"the first betas are so small that x_{int((self.spread <= 0).nonzero()[0])} holds no noise: raise them"
            )
        if self.timesteps > 1 and not bool((self.signal[:-1] > 0).all()):
            raise ValueError(
                f"the betas are so large that nothing of the image is left in x_{int((self.signal[:-1] <= 0).nonzero()[0])} and "
                "after it: lower them (beta_end), or take fewer timesteps"
            )
        if self.prediction == "epsilon" and float(self.signal[-1]) == 0.0:
            raise ValueError(
                "the last x_t is pure noise (zero terminal SNR), from which epsilon says nothing about the image: predict v or x0"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Schedule:
        """From the section ``diffusion`` of a configuration or what a weight file says; other keys (loss, range) are ignored."""
        known = {item.name for item in dataclasses.fields(cls) if item.init}
        own = {key: value for key, value in values.items() if key in known}
        if values.get("betas") is not None:
            own["given_betas"] = tuple(values["betas"])
        return cls(**own)

    @property
    def is_mixing(self) -> bool:
        return self.schedule == "mixing"

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar_t, (T,) float64. ValueError for "mixing", which has none."""
        if self.is_mixing:
            raise ValueError("schedule 'mixing' has no alphas_cumprod")
        return self._cached("alphas_cumprod", self._alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - abar_t / abar_{t-1}, (T,) float64."""
        abar = self.alphas_cumprod
        return 1.0 - abar / torch.cat([abar.new_ones(1), abar[:-1]])

    @property
    def signal(self) -> Tensor:
        """How much of x_0 is in x_t: (T,) float64, falling."""
        return 1.0 - self._amount() if self.is_mixing else self.alphas_cumprod.sqrt()

    @property
    def spread(self) -> Tensor:
        """How much noise is in x_t: (T,) float64, rising."""
        return self._amount() if self.is_mixing else (1.0 - self.alphas_cumprod).sqrt()

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio (signal_t / spread_t)^2, (T,) float64."""
        return (self.signal / self.spread).square()

    def table(self, name: str, device: torch.device) -> Tensor:
        """``signal``, ``spread`` or ``snr`` as float32 (T,) on ``device``, made once."""
        return self._cached(f"{name} {device}", lambda: getattr(self, name).to(torch.float32).to(device))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = signal_t x_0 + spread_t noise. x0, noise (B, C, H, W) float; t (B,) int64."""
        signal = self.table("signal", x0.device)[t].view(-1, 1, 1, 1)
        spread = self.table("spread", x0.device)[t].view(-1, 1, 1, 1)
        return signal * x0 + spread * noise

    def _amount(self) -> Tensor:
        return (torch.arange(self.timesteps, dtype=torch.float64) + 0.5) / self.timesteps

    def _cached(self, key: str, make: Any) -> Tensor:
        if key not in self._device_tables:
            self._device_tables[key] = make()
        return self._device_tables[key]

    def _plain_betas(self) -> Tensor:
        count = self.timesteps
        if self.schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, count, dtype=torch.float64)
        if self.schedule == "sigmoid":
            s = torch.linspace(-6, 6, count, dtype=torch.float64).sigmoid()
            return self.beta_start + (self.beta_end - self.beta_start) * s
        if self.schedule == "cosine":
            edges = torch.arange(count + 1, dtype=torch.float64) / count
            abar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
            return (1.0 - abar[1:] / abar[:-1]).clamp(max=0.999)
        return torch.tensor(self.given_betas, dtype=torch.float64)

    def _alphas_cumprod(self) -> Tensor:
        abar = torch.cumprod(1.0 - self._plain_betas(), dim=0)
        if self.zero_terminal_snr:
            root = abar.sqrt()
            first, last = root[0], root[-1]
            abar = ((root - last) * first / (first - last)).square() if self.timesteps > 1 else abar * 0.0
        return abar
