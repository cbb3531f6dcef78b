"""What a JSON file of each benchmark has to hold before a table is made of it; keys that are not named here are kept."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from benchmarks.report_base import Count, Model, NotNegative, Numbers, Positive, Real, Report, in_config, in_order
from benchmarks.report_schema_loader import Loader, Ratio
from benchmarks.report_schema_step import Activations, Kernels, Startup, Training


class Rung(Numbers):
    name: str
    what: str
    images_per_sec: Positive | None = None
    lowest: Positive | None = None
    highest: Positive | None = None
    to_first: Positive | None = None
    to_before: Positive | None = None
    peak_memory_gb: NotNegative | None = None


class Part(Numbers):
    """One way to compute one part of the network; what else its entry says describes the part."""

    needed: ClassVar[tuple[str, ...]] = ("ms",)
    variant: str
    ms: Positive | None = None
    lowest_ms: Positive | None = None
    highest_ms: Positive | None = None
    fastest: bool | None = None
    max_difference: float | None = None


class Ladder(Report):
    batch: Count
    rungs: Annotated[list[Rung], Field(min_length=1)]
    attention: list[Part] = []
    upsampling: list[Part] = []


class SamplingEntry(Numbers):
    needed: ClassVar[tuple[str, ...]] = ("images_per_sec", "step_ms", "evaluations")
    problem: str | None
    system: Literal["ddpm_dist", "diffusers", "reference"]
    sampler: str
    captured: bool
    batch: Count
    guidance: Real
    evaluations: int | None
    step_ms: Positive | None = None
    images_per_sec: Positive | None = None
    whole_run_images_per_sec: Positive | None = None
    to_reference: Ratio = None  # left out where there is none
    to_diffusers: Ratio = None  # left out where there is none
    to_eager: Ratio = None  # left out where there is none

    @model_validator(mode="after")
    def _whole(self) -> SamplingEntry:
        if self.problem is None and "whole_run_images_per_sec" not in self.model_fields_set:
            raise ValueError("whole_run_images_per_sec missing")
        return self


class Sampling(Report):
    device: str
    network: str
    image_size: Count
    parameters: Count
    precision: str
    channels_last: bool
    compile: bool
    turns: Count
    diffusers: str
    reference_skipped: str | None
    entries: Annotated[list[SamplingEntry], Field(min_length=1)]


class Scores(Model):
    recognized: NotNegative
    recognized_per_class: Annotated[dict[str, NotNegative], Field(min_length=1)]
    frechet: Real
    frechet_real: Real
    held_out_accuracy: NotNegative
    diversity: NotNegative


class QualityEntry(Model):
    sampler: str
    network_calls: Count
    seconds: Positive
    scores: Scores


class Quality(Report):
    run: str
    num: Count
    guidance: Real
    found: Annotated[list[QualityEntry], Field(min_length=1)]


class Way(Model):
    update_ms: Positive
    bytes_per_rank: Count
    times_sharded: Positive


class Ema(Report):
    device: str
    parameters: Count
    averages: Count
    ranks: Count
    ways: Annotated[dict[str, Way], Field(min_length=1)]


class Checkpoint(Report):
    device: str
    world_size: Count
    engine: str
    batch_per_rank: Count
    bytes_per_rank: Count
    turns: Count
    step_s: Positive
    save_copy_s: Real  # differences of steps: noise can make them negative
    save_stall_s: Real
    save_until_published_s: Positive
    torch_save_s: Positive
    resume_s: Positive
    torch_load_s: Positive
    stall_in_steps: Real
    stall_to_torch_save: Real
    resume_in_steps: Positive
    resume_to_torch_load: Positive


class State(Model):
    held: Positive
    saved: Positive


class Engine(Model):
    calculated: State
    images_per_sec: Positive | None = None
    to_ddp: Positive | None = None
    to_ddp_turns: list[Positive] | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None


class Engines(Report):
    processes: Count
    batch_per_rank: Count
    parameters: Count
    averages: Count
    precision: str
    turns: Count
    measured: bool
    engines: Annotated[dict[str, Engine], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> Engines:
        for name, engine in self.engines.items() if self.measured else ():
            for key in ("images_per_sec", "to_ddp", "peak_bytes", "saved_bytes"):
                if getattr(engine, key) is None:
                    raise ValueError(f"engines.{name}.{key} missing, though it says it was measured")
        return self


class Point(Model):
    mode: Literal["strong", "weak"]
    ranks: Count
    nodes: Count
    global_batch: Count
    batch_per_rank: Count
    images_per_sec: Positive
    images_per_sec_lowest: Positive
    images_per_sec_highest: Positive
    step_s: Positive
    wait_s: NotNegative
    exposed_s: Real | None
    exposed_frac: Real | None
    efficiency: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Point:
        in_order(self.images_per_sec_lowest, self.images_per_sec, self.images_per_sec_highest)
        if (self.exposed_s is None) != (self.exposed_frac is None):
            raise ValueError("exposed_s without exposed_frac, or the other way round")
        return self


class Scaling(Report):
    device: str
    parameters: Count
    config: dict[str, Any]
    points: Annotated[list[Point], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> Scaling:
        in_config(self.config, "train.precision")
        return self


SCHEMAS: dict[str, type[Report]] = {
    "train_throughput": Training, "ladder": Ladder, "loader": Loader, "sampling": Sampling, "sampler_quality": Quality,
    "ema": Ema, "checkpoint": Checkpoint, "engines": Engines, "scaling": Scaling, "kernels": Kernels,
    "activations": Activations, "startup": Startup,
}  # fmt: skip
