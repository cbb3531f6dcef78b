"""One real training step on a fixed batch, for benchmarks that look into it."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.environment import cpu_has_bf16
from benchmarks.kernels_record import Recorder
from benchmarks.ladder_rungs import OurStep, Switches
from ddpm_dist import philox
from ddpm_dist.config import Config, load_config
from ddpm_dist.data.pipeline import MicroBatch
from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model


def settings(args: argparse.Namespace, device: torch.device) -> Config:
    """The configuration of the step: the file, fitted to the device, then the user's overrides.

    args: with ``config``, ``batch``, ``compile`` and ``overrides``. UserError for what the step of one process cannot do.
    """
    fitted = [
        "data.source=synthetic", f"train.global_batch={args.batch}", "train.micro_batch=null", "train.audit=false",
        f"train.compile={'true' if args.compile else 'false'}", "ema.warmup=0", "optim.warmup=0",
        "optim.schedule=constant", "optim.decay_images=1",  # average and weights move, as they do for most of a run
    ]  # fmt: skip
    if device.type == "cpu":
        fitted += [f"train.precision={'bf16' if cpu_has_bf16() else 'fp32'}", "train.channels_last=true"]
    config = load_config(args.config, [*fitted, *args.overrides])
    if config.train.precision == "fp16":
        raise UserError("train.precision=fp16: this benchmark knows fp32 and bf16")
    if config.engine.name != "ddp":
        raise UserError(f"engine.name={config.engine.name}: this benchmark runs in one process, with engine.name=ddp")
    if getattr(config.train, "cuda_graph", False):
        raise UserError("train.cuda_graph=true: a replayed step has no operations to look at; leave it out")
    if config.train.global_batch != args.batch or config.train.micro_batch not in (None, args.batch):
        raise UserError(
            "one step is one forward and backward pass: choose its images with --batch, without train.global_batch or train.micro_batch"
        )
    with torch.device("meta"):  # raises UserError for keywords that the network does not have
        build_model(config.model.name, **config.network_keywords())
    return config


class Workload:
    """Configuration, device and a batch that stays there: what ``OurStep`` asks of a setting, for any network."""

    def __init__(self, config: Config, device: torch.device, images: int | None = None) -> None:
        self.config = config.model_copy(deep=True)
        self.device, self.images = device, images or config.train.global_batch
        self.config.train.global_batch = self.images
        data = config.data
        slots = torch.arange(self.images, device=device)
        pixels = philox.uint8(
            config.run.seed, philox.SYNTHETIC_PIXELS, 0, slots, (data.channels, data.image_size, data.image_size)
        )
        numbers = np.arange(self.images, dtype=np.int64)
        labels = slots % data.num_classes if data.num_classes else torch.zeros_like(slots)
        self.batch = MicroBatch(0, numbers, numbers, pixels, labels)

    def step(self, compiled: bool) -> OurStep:
        """A training step with first weights; it changes what is global to the process."""
        train = self.config.train
        kernels = self.device.type == "cpu"  # as train.attention=auto chooses them
        switches = Switches(True, True, True, train.precision == "bf16", train.channels_last, True, compiled, kernels)
        switches.apply(self.device)
        torch.manual_seed(self.config.run.seed)
        return OurStep(self, build_model(self.config.model.name, **self.config.network_keywords()), switches)


def record(step: OurStep) -> Recorder:
    """Watch one step, not the first."""
    step()
    recorder, inner = Recorder(), step._step
    updates = [
        (of, name)
        for of, name in ((inner.engine, "step"), (inner.ema, "update"), (inner.ema, "blend"))
        if hasattr(of, name)
    ]
    for of, name in updates:
        setattr(of, name, recorder.around(getattr(of, name)))
    try:
        with recorder:
            step()
    finally:
        for of, name in updates:
            delattr(of, name)  # that of the class again
    return recorder
