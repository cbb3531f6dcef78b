"""The rungs of the ladder: training steps on the same batch that differ in one switch, and the check that they compute the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.environment import cpu_has_bf16
from benchmarks.reference import ReferenceEMA, ReferenceUNet
from ddpm_dist import attention_backends, philox
from ddpm_dist.config import Config
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import MicroBatch, normalise
from ddpm_dist.models import build_model
from ddpm_dist.runtime import Runtime
from ddpm_dist.step import TrainStep


class Setting:
    """What all rungs share: configuration, first weights, and a batch that stays on the device."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device, self.images = config, device, config.train.global_batch
        data = config.data
        self.shape = (data.channels, data.image_size, data.image_size)
        torch.manual_seed(config.run.seed)
        width = config.network_keywords().get("width", 64)
        self.original = ReferenceUNet(data.channels, data.num_classes, width, data.image_size)
        slots = torch.arange(self.images, device=device)
        pixels = philox.uint8(config.run.seed, philox.SYNTHETIC_PIXELS, 0, slots, self.shape)
        numbers = np.arange(self.images, dtype=np.int64)
        self.batch = MicroBatch(0, numbers, numbers, pixels, slots % data.num_classes)
        self.keep = 0.5 ** (self.images / config.ema.half_lives[0])

    def draws(self, step: int) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise (B, C, H, W) of step ``step``: those that ``TrainStep`` draws."""
        seed, d = self.config.run.seed, self.config.diffusion
        t = philox.host_integers(seed, philox.TIMESTEPS, step, self.images, d.t_min, d.timesteps)
        slots = torch.arange(self.images, device=self.device)
        return torch.from_numpy(t).to(self.device), philox.normal(seed, philox.TRAIN_NOISE, step, slots, self.shape)


@dataclass(frozen=True)
class Switches:
    """What is on; every rung has one more than the rung before."""

    tf32: bool = False
    cudnn_benchmark: bool = False
    sdpa: bool = False
    bf16: bool = False
    channels_last: bool = False
    engine: bool = False
    compiled: bool = False
    sdpa_backend: bool = False
    step_graph: bool = False

    @property
    def precision(self) -> str:
        """The least exact arithmetic that is on."""
        return "bf16" if self.bf16 else "tf32" if self.tf32 else "fp32"

    def apply(self, device: torch.device) -> None:
        """Set what is global to the process."""
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
            torch.backends.cudnn.benchmark = self.cudnn_benchmark

    def make(self, setting: Setting) -> PlainStep | OurStep:
        """The step with these switches, from the first weights."""
        network: nn.Module = copy.deepcopy(setting.original)
        if self.sdpa:
            network = build_model("unet_conditional", **setting.config.network_keywords())
            network.load_state_dict(setting.original.state_dict())
        return OurStep(setting, network, self) if self.engine else PlainStep(setting, network, self)


NEEDS_A_GPU = "needs a GPU"
REFERENCE = (
    "the original loop's step: float32 throughout (TF32 off), attention that stores its weights, bilinear interpolation, AdamW with its "
    "defaults, an average that visits one parameter after the other, loss.item()"
)
WHAT = {
    "tf32": "TF32 for float32 convolutions and matrix products (PyTorch's own default: only the convolutions)",
    "cudnn_benchmark": "cudnn.benchmark: convolution kernels are chosen by measuring them",
    "sdpa": "our network, same weights: scaled_dot_product_attention instead of stored weights; also no repeated embeddings and, on a "
    "GPU, upsampling by slices and sums",
    "bf16": "bfloat16 autocast around the network",
    "channels_last": "channels_last for weights and images",
    "engine": "the step of ddpm_dist: fused AdamW, foreach average, guard against non-finite steps, Philox draws, no loss.item()",
    "compiled": "torch.compile of the network (on a GPU also of the noise)",
    "sdpa_backend": "the kernel of each attention: on a GPU train.attention=measured, the backend that was measured fastest for its shape; "
    "on a CPU with AVX-512 our own where it pays, as train.attention=auto chooses",
    "step_graph": "train.cuda_graph=true: the whole step (forward, backward, optimizer, average) is one CUDA graph",
}


def missing(name: str, config: Config, device: torch.device) -> str | None:
    """Why there is no such rung on this device, with this configuration; None: there is."""
    cuda = device.type == "cuda"
    if name in ("tf32", "cudnn_benchmark", "step_graph") and not cuda:
        return NEEDS_A_GPU
    if name == "sdpa_backend" and not cuda and (why := _no_kernel_of_ours(config)):
        return f"a CPU has one fused backend, which torch takes by itself ({why})"
    if name == "bf16" and config.train.precision != "bf16":
        weak = not cuda and not cpu_has_bf16()
        return "this processor has no bf16 arithmetic" if weak else f"train.precision={config.train.precision}"
    if name == "channels_last" and not config.train.channels_last:
        return "train.channels_last=false"
    if name == "compiled" and not config.train.compile:
        return "train.compile=false" if cuda else "on a CPU only with --compile: it takes minutes"
    return None


def _no_kernel_of_ours(config: Config) -> str | None:
    from ddpm_dist.models import attention_cpu

    dtype = attention_backends.DTYPES.get(config.train.precision, torch.float32)
    shapes = attention_backends.attention_shapes(config)
    if not any(attention_cpu.pays(tokens, width, dtype) for tokens, _, width in shapes):
        return "ours pays for no shape here"
    return attention_cpu.why_not(dtype)


def ladder(config: Config, device: torch.device) -> list[tuple[str, str, Switches, str | None]]:
    """(name, what it changes, the switches that are on, why it is left out or None), from the reference to our step."""
    on = Switches()
    rungs: list[tuple[str, str, Switches, str | None]] = [("reference", REFERENCE, on, None)]
    for field in fields(Switches):
        absent = missing(field.name, config, device)
        if absent is None:
            on = replace(on, **{field.name: True})
        rungs.append((field.name, WHAT[field.name], on, absent))
    return rungs


class PlainStep:
    """The step of ``reference.ReferenceLoop`` on the fixed batch: same operations, same order. No label is dropped."""

    def __init__(self, setting: Setting, network: nn.Module, switches: Switches) -> None:
        config, device = setting.config, setting.device
        layout = torch.channels_last if switches.channels_last else torch.contiguous_format
        self.setting, self.layout, self.bf16 = setting, layout, switches.bf16
        self.network = network.to(device=device, memory_format=layout)
        self.averaged = copy.deepcopy(network).eval().requires_grad_(False)
        optim, d = config.optim, config.diffusion
        self.optimizer = torch.optim.AdamW(
            network.parameters(), optim.lr, tuple(optim.betas), optim.eps, optim.weight_decay
        )
        self.ema = ReferenceEMA(setting.keep)
        self.mse = nn.MSELoss()
        self.first, self.last = d.t_min, d.timesteps
        self.alphas_cumprod = torch.cumprod(1.0 - torch.linspace(d.beta_start, d.beta_end, d.timesteps).to(device), 0)
        self.images = normalise(setting.batch.pixels, config.data.range, layout)
        self.labels = setting.batch.labels

    def __call__(self) -> None:
        """One step with draws of its own, as the original makes them."""
        t = torch.randint(self.first, self.last, (self.images.shape[0],)).to(self.setting.device)
        self._train(t, torch.randn_like(self.images))

    def checked(self, step: int) -> float:
        """Step ``step`` with the draws that all rungs share; returns the loss."""
        t, noise = self.setting.draws(step)
        return self._train(t, noise.contiguous(memory_format=self.layout))

    def _train(self, t: Tensor, noise: Tensor) -> float:
        signal = torch.sqrt(self.alphas_cumprod[t])[:, None, None, None]
        spread = torch.sqrt(1 - self.alphas_cumprod[t])[:, None, None, None]
        noisy = signal * self.images + spread * noise
        with torch.autocast(self.images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            predicted = self.network(noisy, t, self.labels)
        loss = self.mse(noise, predicted.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update(self.averaged, self.network)
        return loss.item()

    def weights(self) -> Tensor:
        return flat(self.network.named_parameters())

    def average(self) -> Tensor:
        return flat(self.averaged.named_parameters())

    def moments(self) -> Tensor:
        return flat((name, self.optimizer.state[p]["exp_avg"]) for name, p in self.network.named_parameters())


class OurStep:
    """``TrainStep`` with our engine and average, as the trainer calls it; the loader hands out the fixed batch."""

    def __init__(self, setting: Setting, network: nn.Module, switches: Switches) -> None:
        config = setting.config.model_copy(deep=True)
        config.train.precision = "bf16" if switches.bf16 else "fp32"
        config.train.channels_last, config.train.compile = switches.channels_last, switches.compiled
        config.train.cuda_graph, config.train.attention = switches.step_graph, "auto"
        runtime = Runtime(0, 1, 0, setting.device, None)
        if switches.sdpa_backend:
            config.train.attention = "measured" if setting.device.type == "cuda" else "auto"
            attention_backends.pin(network, config, setting.images, runtime)
        self._batch, self._number = setting.batch, 0
        self._step = TrainStep(config, runtime, plan_batches(setting.images, None, 1), network)

    def next(self) -> MicroBatch:
        """The part of a loader."""
        return self._batch

    def __call__(self) -> None:
        self._step(self._number, self)
        self._number += 1

    def checked(self, step: int) -> float:
        self._number = step + 1
        return float(self._step(step, self).loss)

    def _pieces(self, kind: str, of: Any) -> Tensor:
        return flat((p.tensor.removeprefix(kind), p.data) for p in of.pieces() if p.tensor.startswith(kind))

    def weights(self) -> Tensor:
        return self._pieces("model/", self._step.engine)

    def average(self) -> Tensor:
        return self._pieces("ema.0/", self._step.ema)

    def moments(self) -> Tensor:
        return self._pieces("optim.exp_avg/", self._step.engine)


def flat(named: Iterable[tuple[str, Tensor]]) -> Tensor:
    """All numbers in one float32 vector on the CPU, sorted by name, whatever the memory format."""
    return torch.cat([value.detach().float().reshape(-1).cpu() for _, value in sorted(named, key=lambda pair: pair[0])])


@dataclass
class Answer:
    """What a rung computes on the shared draws: losses of the first steps, the first moment after one step (0.1 of the gradient),
    and the relative distance of the average after one step to what it should be."""

    losses: list[float]
    moments: Tensor
    average_error: float


def answer(step: PlainStep | OurStep, setting: Setting, steps: int) -> Answer:
    """Train the first ``steps`` steps of ``step``, which must not have made any."""
    losses, start = [step.checked(0)], flat(setting.original.named_parameters())
    expected = setting.keep * start.double() + (1 - setting.keep) * step.weights().double()
    average_error, moments = distance(step.average(), expected), step.moments()
    losses += [step.checked(number) for number in range(1, steps)]
    return Answer(losses, moments, average_error)


def distance(found: Tensor, expected: Tensor) -> float:
    """Euclidean distance relative to the length of ``expected``; infinite where a number is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf


# Largest relative errors against the first rung: loss of the first step, its gradient, losses of the later steps.
TOLERANCES = {"fp32": (1e-4, 1e-3, 1e-3), "tf32": (1e-3, 1e-2, 1e-2), "bf16": (2e-2, 5e-2, 5e-2)}
AVERAGE_TOLERANCE = 1e-6  # against the rung's own weights: float32 rounds by 1.2e-7


def compare(own: Answer, first: Answer, precision: str) -> tuple[dict[str, float], str | None]:
    """The errors of a rung, and what is wrong with it."""
    by_step = [abs(mine - theirs) / abs(theirs) for mine, theirs in zip(own.losses, first.losses, strict=True)]
    by_step = [error if math.isfinite(error) else math.inf for error in by_step]
    errors = {
        "loss_error": by_step[0],
        "gradient_error": distance(own.moments, first.moments),
        "later_loss_error": max(by_step[1:], default=0.0),
        "average_error": own.average_error,
    }
    limits = dict(zip(("loss_error", "gradient_error", "later_loss_error"), TOLERANCES[precision], strict=True))
    words = {
        "loss_error": "the loss of the first step",
        "gradient_error": "the gradient of the first step",
        "later_loss_error": f"a loss of steps 2 to {len(by_step)}",
        "average_error": "the average",
    }
    for name, limit in {**limits, "average_error": AVERAGE_TOLERANCE}.items():
        if not errors[name] <= limit:
            return errors, f"wrong: {words[name]} is off by {errors[name]:.1e} (at most {limit:.0e} for {precision})"
    return errors, None
