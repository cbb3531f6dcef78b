"""One training step: micro-batches in, loss and updated weights out, nothing leaves the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_dist import philox
from ddpm_dist.audit import Audit
from ddpm_dist.config import Config, Optim
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.data.pipeline import Loader, normalise
from ddpm_dist.diffusion import objective
from ddpm_dist.diffusion.noise import draw
from ddpm_dist.diffusion.schedule import Schedule
from ddpm_dist.engines import ShardedEMA, make_engine
from ddpm_dist.models.dropout import prepare_micro_batch
from ddpm_dist.runtime import Runtime
from ddpm_dist.step_graph import StepGraph


@dataclass
class StepResult:
    """0-dim device tensors: mean loss over the global batch, gradient norm before clipping, 1.0 if the step was skipped."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


@dataclass
class Part:
    """What a micro-batch went through: x0 and noise (B, C, H, W), t and labels (B,) after dropping, losses (B,), and their part of the loss."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor | None
    losses: Tensor
    loss: Tensor


def learning_rate(optim: Optim, images_seen: int, global_batch: int) -> float:
    """The rate of the step that starts at ``images_seen`` images: linear warm-up, then constant, linear or cosine decay to 0.

    The warm-up is over with the step that brings the run to optim.warmup images, the decay at optim.decay_images. Rounded to
    float32, so that it is the same number on the host and in a tensor.
    """
    warm = min(1.0, (images_seen + global_batch) / optim.warmup) if optim.warmup else 1.0
    done = min(1.0, max(0, images_seen - optim.warmup) / max(1, optim.decay_images - optim.warmup))
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[optim.schedule]
    return float(np.float32(optim.lr * warm * decay))


class TrainStep:
    """The compute of training: network, engine, averages and the draws of every step.

    What a step needs from the host are the rows of :meth:`_draws`, the learning rate and the weights of the averages; everything else is
    a function of tensors on the device. So with train.cuda_graph the whole step is a graph that is replayed (``step_graph``).
    """

    def __init__(self, config: Config, runtime: Runtime, plan: BatchPlan, network: nn.Module) -> None:
        self.config, self.runtime, self.plan = config, runtime, plan
        d = config.diffusion
        self.schedule = Schedule.from_mapping(d.model_dump())
        self._weights: Tensor | None = None
        if d.min_snr_gamma is not None:
            self._weights = objective.min_snr_weights(self.schedule, d.min_snr_gamma).to(runtime.device, torch.float32)
        # mse_sum: over an image's numbers instead of their mean.
        self._factor = config.data.channels * config.data.image_size**2 if d.loss == "mse_sum" else 1
        self.memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self._network, self._settled = network, False
        self.engine = make_engine(config, network, runtime, plan)
        self.ema = ShardedEMA(self.engine.shares(), config.ema, runtime)
        self._prepare = self._noisy
        if config.train.compile and runtime.device.type == "cuda":
            # On the CPU the eager operations stay: there a compiled loop may round its tail differently.
            self._prepare = torch.compile(self._noisy)
        self.graph = StepGraph(self._whole, runtime.device) if config.train.cuda_graph else None

    def __call__(self, step: int, loader: Loader, audit: Audit | None = None) -> StepResult:
        """Run step ``step`` (counted from 0) on the next micro-batches of ``loader``."""
        plan = self.plan
        draws = self._draws(step)
        seen = step * plan.global_batch
        rate = learning_rate(self.config.optim, seen, plan.global_batch)
        weights = self.ema.weights(seen + plan.global_batch, plan.global_batch)
        if self.graph is not None:
            batch = loader.next()
            result, part = self.graph(batch.pixels, batch.labels, self._to_device(draws[:, batch.slots]), rate, weights)
            if audit is not None:
                audit.add(batch, part.x0, part.noise, part.t, part.labels, part.losses)
            return result
        total = torch.zeros((), device=self.runtime.device)
        for micro in range(plan.accumulation):
            batch = loader.next()
            last = micro == plan.accumulation - 1
            part = self._learn(batch.pixels, batch.labels, self._to_device(draws[:, batch.slots]), last)
            total += part.loss
            if audit is not None:
                audit.add(batch, part.x0, part.noise, part.t, part.labels, part.losses)
        return self._apply(total, rate, weights, weights)

    def _learn(self, pixels: Tensor, labels: Tensor, draws: Tensor, last: bool) -> Part:
        """Forward and backward of a micro-batch. pixels: uint8 (B, C, H, W); labels: int64 (B,); draws: its columns of :meth:`_draws`."""
        config = self.config
        slots, steps, t, dropped = draws
        x0, noise, x_t, target = self._prepare(pixels, slots, steps, t)
        labels = objective.drop_labels(labels, dropped.bool()) if config.data.num_classes else None
        prepare_micro_batch(self._network, config.run.seed, steps, slots)
        if not self._settled:
            self._settled = True
            self.engine.settle(x_t, t, labels)
        with self.engine.micro_step(last):
            prediction = self.engine(x_t, t, labels)
            losses = self._factor * objective.mse_per_image(prediction, target)
            if self._weights is not None:
                losses = losses * self._weights[t]
            loss = losses.sum() / self.plan.global_batch
            self.engine.backward(loss)
        return Part(x0, noise, t, labels, losses.detach(), loss.detach())

    def _apply(
        self, total: Tensor, rate: float | Tensor, weights: list[float], on_device: list[float] | Tensor
    ) -> StepResult:
        """Optimizer and averages; ``total``: this rank's loss. ``on_device``: the weights again, maybe as a tensor."""
        total = self.engine.all_reduce(total)
        norm, skipped = self.engine.step(rate, total)
        self.ema.blend(on_device, skipped, [weight == 1.0 for weight in weights])
        return StepResult(total, norm, skipped)

    def _whole(
        self, pixels: Tensor, labels: Tensor, draws: Tensor, rate: Tensor, on_device: Tensor, weights: list[float]
    ) -> tuple[StepResult, Part]:
        """A step of one micro-batch, from tensors on the device only; of ``weights`` it matters which are 1."""
        part = self._learn(pixels, labels, draws, last=True)
        return self._apply(part.loss.clone(), rate, weights, on_device), part

    def _draws(self, step: int) -> np.ndarray:
        """int64 (4, G): number, step, timestep in t_min..T-1 and label drop of every slot of the step.

        The step travels as a tensor, so that a compiled function is not compiled again for every step.
        """
        config, count = self.config, self.plan.global_batch
        d = config.diffusion
        t = philox.host_integers(config.run.seed, philox.TIMESTEPS, step, count, d.t_min, d.timesteps)
        dropped = philox.host_uniform(config.run.seed, philox.LABEL_DROP, step, count) < config.train.label_dropout
        return np.stack([np.arange(count), np.full(count, step), t, dropped])

    def _to_device(self, draws: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(draws))
        if self.runtime.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.runtime.device, non_blocking=True)
        return tensor

    def _noisy(self, pixels: Tensor, slots: Tensor, steps: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x_0, noise, x_t, what the network should answer), each (B, C, H, W) float32."""
        value_range, seed = self.config.data.range, self.config.run.seed
        x0 = normalise(pixels, value_range, self.memory_format)
        kind = self.schedule.noise
        noise = draw(kind, seed, philox.TRAIN_NOISE, steps, slots, tuple(x0.shape[1:]), value_range)
        noise = noise.contiguous(memory_format=self.memory_format)
        return x0, noise, self.schedule.add_noise(x0, noise, t), objective.target(self.schedule, x0, noise, t)
