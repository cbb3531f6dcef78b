"""Two ways to sample that ``benchmarks.sampling`` compares with: the loop of the original program, and diffusers' schedulers.

:class:`ReferenceSampling` is written the way small DDPM programs are, on purpose: two forward passes for guidance, attention that stores
its weights (``benchmarks.reference`` has the network), coefficients computed anew in every step, ``torch.randn``.
:class:`DiffusersSampling` is the loop of diffusers' pipelines around any network of ours: the scheduler's timesteps, one doubled batch
for guidance, ``scheduler.step``.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_dist.diffusion import Schedule
from ddpm_dist.diffusion.guidance import guided

# Our samplers as diffusers calls them; what is not said is diffusers' default.
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}


class Sampling(ABC):
    """A way to make one batch of images, a step (one visited timestep with all its forward passes) at a time.

    ``evaluations``: steps of a whole run. ``x``: (B, C, H, W), the images so far.
    """

    evaluations: int
    x: Tensor

    @abstractmethod
    def start(self) -> None:
        """Begin a batch."""

    @abstractmethod
    def step(self) -> None:
        """The next step; after the last one :meth:`start` has to come."""

    def whole(self) -> Tensor:
        """A whole run: (B, C, H, W) images."""
        self.start()
        for _ in range(self.evaluations):
            self.step()
        return self.x


class ReferenceSampling(Sampling):
    """Ancestral sampling from t = T - 1 down to 1 with sigma^2 = beta (Ho et al. 2020, algorithm 2), as the original does it.

    network: called as network(x, t, y) with y (B,) int64, or None for the unconditional forward pass. guidance 1: one forward pass in
    each step, anything else: two and their interpolation.
    """

    def __init__(
        self, network: nn.Module, shape: tuple[int, ...], labels: Tensor, guidance: float, schedule: Schedule
    ) -> None:
        self.network, self.shape, self.labels, self.guidance = network.eval(), shape, labels, guidance
        self.beta = torch.linspace(schedule.beta_start, schedule.beta_end, schedule.timesteps).to(labels.device)
        self.alpha = 1.0 - self.beta
        self.alpha_hat = torch.cumprod(self.alpha, dim=0)
        self.evaluations = schedule.timesteps - 1

    def start(self) -> None:
        self.x = torch.randn(self.shape).to(self.labels.device)
        self._left: Iterator[int] = iter(range(self.evaluations, 0, -1))

    @torch.no_grad()
    def step(self) -> None:
        i, x = next(self._left), self.x
        t = (torch.ones(self.shape[0]) * i).long().to(self.labels.device)
        predicted = self.network(x, t, self.labels)
        if self.guidance != 1:
            predicted = torch.lerp(self.network(x, t, None), predicted, self.guidance)
        alpha, alpha_hat, beta = (table[t][:, None, None, None] for table in (self.alpha, self.alpha_hat, self.beta))
        noise = torch.randn_like(x) if i > 1 else torch.zeros_like(x)
        mean = 1 / torch.sqrt(alpha) * (x - ((1 - alpha) / torch.sqrt(1 - alpha_hat)) * predicted)
        self.x = mean + torch.sqrt(beta) * noise


class DiffusersSampling(Sampling):
    """A scheduler of the package diffusers drives a network of ours. Raises ImportError where the package is not installed.

    network(x, t, y) answers what ``schedule.prediction`` says. dtype: of autocast, None for float32.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        labels: Tensor | None,
        guidance: float,
        schedule: Schedule,
        sampler: str,
        steps: int | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        import diffusers

        name, options = DIFFUSERS[sampler]
        prediction = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[schedule.prediction]
        self.scheduler = getattr(diffusers, name)(
            num_train_timesteps=schedule.timesteps,
            trained_betas=schedule.betas.numpy(),
            prediction_type=prediction,
            **options,
        )
        self.steps, self.shape, self.device, self.dtype = steps or schedule.timesteps, shape, device, dtype
        self.predict = guided(network.eval(), labels, guidance)
        self.scheduler.set_timesteps(self.steps)
        self.evaluations = len(self.scheduler.timesteps)

    def start(self) -> None:
        self.scheduler.set_timesteps(self.steps, device=self.device)
        self.x = torch.randn(self.shape, device=self.device) * self.scheduler.init_noise_sigma
        self._left = iter(self.scheduler.timesteps)

    @torch.no_grad()
    def step(self) -> None:
        t = next(self._left)
        x = self.scheduler.scale_model_input(self.x, t)
        with torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            predicted = self.predict(x, t.expand(self.shape[0]).long())
        self.x = self.scheduler.step(predicted, t, self.x).prev_sample
