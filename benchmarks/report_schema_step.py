"""What the reports on the training step have to hold: throughput, its kernels, its memory, and the way to the first one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from benchmarks.report_base import Count, Model, NotNegative, Positive, Real, Report, in_config, in_order


class Loop(Model):
    """One contender of train_throughput."""

    images_per_sec: Positive
    images_per_sec_lowest: Positive
    images_per_sec_highest: Positive
    step_ms: Positive
    data_wait_frac: NotNegative
    step_percentiles: dict[str, Positive] | None = None  # "steps": how many; "p50_ms" and others
    peak_memory_gb: NotNegative
    peak_memory_mb_per_image: NotNegative | None = None
    tflops: Positive
    mfu: Positive | None
    mfu_nominal: Positive | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Loop:
        in_order(self.images_per_sec_lowest, self.images_per_sec, self.images_per_sec_highest)
        return self


class Training(Report):
    config: dict[str, Any]
    device: str
    world_size: Count
    batch_per_rank: Count
    turns: Count
    training_gflop_per_image: Positive
    peak_tflops_per_device: NotNegative
    peak_source: str
    nominal_tflops_per_device: Positive | None = None
    memory: str
    ddpm_dist: Loop
    compute_only: Loop | None = None
    # What a part takes of a step; differences of steps can be negative by noise.
    data_frac: Real | None = None
    data_frac_turns: list[Real] | None = None
    ema_frac: NotNegative | None = None
    ema_frac_turns: list[NotNegative] | None = None
    logging_frac: NotNegative | None = None
    logging_frac_turns: list[NotNegative] | None = None
    ema_measured: str | None = None
    log_every: Count | None = None
    launches_per_step: Count | None = None
    kernels_per_step: Count | None = None
    aten_ops_per_step: Count | None = None
    reference: Loop | None = None
    ratio: Positive | None = None
    ratio_lowest: Positive | None = None
    ratio_highest: Positive | None = None
    reference_skipped: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Training:
        in_config(self.config, "data.source", "model.name", "train.precision")
        in_config(self.config, "data.image_size", kind=int)
        ratios = (self.ratio_lowest, self.ratio, self.ratio_highest)
        if self.reference is not None and None in ratios:
            raise ValueError("a reference without ratio, ratio_lowest and ratio_highest")
        if self.ratio is not None and None not in ratios:
            in_order(*ratios)
        return self


class Kernel(Model):
    name: str
    flop_per_byte: Positive  # arithmetic intensity
    tflops: Positive
    group: str | None = None
    ms: Positive | None = None  # of all its runs in a step


class WholeStep(Model):
    """A step beside the sum of its kernels, each the best way."""

    ms: Positive
    to_best: Positive


class Kernels(Report):
    """For the roofline: both roofs measured in the same run."""

    peak_tflops: Positive
    peak_gb_per_sec: Positive
    kernels: Annotated[list[Kernel], Field(min_length=1)]
    steps: dict[str, WholeStep] | None = None


class Activations(Report):
    """Peak memory of a step per image, against what autograd has to keep."""

    device: str
    batches: Annotated[list[Count], Field(min_length=1)]
    minimum_mb_per_image: Positive
    peak_mb_per_image: Positive
    ratio: Positive
    largest: list[dict[str, Any]] = []


class Start(Model):
    until_first_step_s: Positive
    until_first_step_s_turns: Annotated[list[Positive], Field(min_length=1)]
    first_step_s: Positive
    total_s: Positive
    files_compiled: NotNegative


class Startup(Report):
    device: str
    network: str
    image_size: Count
    precision: str
    processes: Count
    batch_per_rank: Count
    turns: Count
    starts: dict[Literal["first", "second"], Start]
    second_to_first: Positive
    second_to_first_turns: list[Positive]

    @model_validator(mode="after")
    def _whole(self) -> Startup:
        if len(self.starts) < 2:
            raise ValueError("starts needs the first and the second")
        return self
