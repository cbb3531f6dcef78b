"""The sections of the configuration: their keys, defaults and limits.

Budgets and intervals are counted in images unless a comment says otherwise; they take effect at the first step that
reaches the multiple.
"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ddpm_dist.diffusion.schedule import Schedule

_FLOAT = re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+")


class Section(BaseModel):
    """Unknown keys are errors, numbers stay numbers; ``3e-4`` is a number although YAML 1.1 calls it a string."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, value in values.items():
            if name in cls.model_fields:
                values[name] = _to_number(value, _kinds(cls.model_fields[name].annotation))
        return values


def _kinds(annotation: Any) -> set[type]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, list):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else set()


def _to_number(value: Any, kinds: set[type]) -> Any:
    if isinstance(value, list):
        return [_to_number(item, kinds) for item in value]
    if isinstance(value, str) and kinds & {int, float} and str not in kinds and _FLOAT.fullmatch(value):
        value = float(value.replace("_", ""))
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    return value


class Run(Section):
    name: str = Field("ddpm", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    dir: str | None = None  # default runs/<name>
    seed: int = Field(0, ge=0, lt=2**63)

    @property
    def folder(self) -> Path:
        return Path(self.dir) if self.dir else Path("runs") / self.name


class MixPart(Section):
    shards: str = Field(min_length=1)  # a folder with an index
    weight: float = Field(1.0, gt=0)  # relative to the others; shares are rounded to a thousandth


class Data(Section):
    source: Literal["shards", "synthetic"] = "shards"
    shards: str | None = None  # the folder that holds index.json
    image_size: int = Field(64, ge=1, le=8192)
    channels: Literal[1, 3] = 3
    num_classes: int | None = Field(None, ge=1)  # null: unlabelled
    range: list[float] = Field([-1.0, 1.0], min_length=2, max_length=2)  # pixel values the network sees
    flip: bool = False
    crop: Literal["none", "center", "random_resized"] = "none"
    crop_scale: list[float] = Field([0.8, 1.0], min_length=2, max_length=2)  # share of the area, random_resized
    # brightness, contrast, saturation, hue
    color_jitter: list[float] = Field([0.0, 0.0, 0.0, 0.0], min_length=4, max_length=4)
    decoder: Literal["auto", "cpu", "mixed"] = "auto"  # auto: mixed on a GPU for images of 256 pixels and more
    # share of JPEGs for the GPU's decoding hardware; null: DALI's choice
    hw_decoder_load: float | None = Field(None, ge=0, le=1)
    threads: int | None = Field(None, ge=1)  # of DALI, per rank; null: cores / ranks of the machine, 4 at most
    # micro-batches that wait decoded; null: 3, of small ones up to 8, see data/workers.py
    prefetch: int | None = Field(None, ge=1)
    readers: int | None = Field(None, ge=1)  # threads that read files, where storage is slow; null: 2 per core, 4 to 16
    cache: Literal["auto", "gpu", "host", "none"] = "auto"  # the decoded images, where they fit; see data/cache.py
    cache_gb: float | None = Field(None, gt=0)  # bytes that they may take, per rank; null: auto takes a tenth of a GPU
    order: Literal["auto", "full", "blocks"] = "auto"  # auto: full up to full_shuffle samples, then blocks of shards
    full_shuffle: int = Field(20_000_000, ge=1)  # samples; a full permutation takes 16 bytes of memory each, per rank
    block_shards: int = Field(16, ge=1)  # shards whose samples are permuted together
    lanes: int = Field(1, ge=1)  # parts of the batch with shards of their own; divides train.global_batch
    mix: list[MixPart] | None = Field(None, min_length=1)  # several data sets instead of data.shards
    balance: Literal["none", "class"] = "none"  # class: every class equally often
    cache_dir: str | None = Field(None, min_length=1)  # on a local disk: shards are fetched to it, once per node
    # what it may take; null: what the set needs, half of the disk at most
    cache_dir_gb: float | None = Field(None, gt=0)
    allow_pipe: bool = False  # run the commands of shards that are named "pipe:command"
    fetch_patience: float = Field(600.0, gt=0)  # seconds for which a shard may stay away
    # a damaged sample ends the run, or the one behind it in the index stands in for it
    on_bad: Literal["stop", "skip"] = "stop"

    @field_validator("range")
    @classmethod
    def _range(cls, value: list[float]) -> list[float]:
        if not value[0] < value[1]:
            raise ValueError("the first number must be below the second")
        return value

    @field_validator("color_jitter")
    @classmethod
    def _jitter(cls, value: list[float]) -> list[float]:
        if any(not 0 <= strength <= most for strength, most in zip(value, (10, 10, 10, 0.5), strict=True)):
            raise ValueError("must be four numbers: brightness, contrast and saturation from 0, hue from 0 to 0.5")
        return value

    @model_validator(mode="after")
    def _grey(self) -> Data:
        if self.channels == 1 and any(self.color_jitter[2:]):
            raise ValueError(
                "data.color_jitter: grey images have neither saturation nor hue; set the last two numbers to 0"
            )
        return self

    @field_validator("crop_scale")
    @classmethod
    def _scale(cls, value: list[float]) -> list[float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("must be two numbers with 0 < first <= second <= 1")
        return value


class Model(BaseModel):
    """``name`` and the network's own keywords; those that follow from ``data`` are filled in from there."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = "unet_conditional"

    @property
    def keywords(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Diffusion(Section):
    timesteps: int = Field(1000, ge=1, le=1_000_000)
    t_min: int = Field(0, ge=0)  # the smallest timestep that is drawn; 1 in the reference program
    schedule: Literal["linear", "cosine", "sigmoid", "betas", "mixing"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    betas: list[float] | None = Field(None, max_length=100_000)  # all of them, with schedule: betas
    zero_terminal_snr: bool = False  # rescale the schedule so that it ends in pure noise
    noise: Literal["gaussian", "uniform"] = "gaussian"
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"
    loss: Literal["mse", "mse_sum"] = "mse"  # mean or sum over an image's pixels; mean over the images
    # weight the timesteps by min(SNR, gamma), 5 in the paper; null: all the same
    min_snr_gamma: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> Diffusion:
        Schedule.from_mapping(self.model_dump())  # raises ValueError for what does not go together
        return self


class Train(Section):
    images: int = Field(1_000_000, ge=1, lt=2**53)  # budget, rounded up to whole steps
    global_batch: int = Field(64, ge=1, lt=2**31)
    micro_batch: int | None = Field(None, ge=1)  # per rank; default global_batch / ranks
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    channels_last: bool = False
    # replay the whole step as one CUDA graph: for small batches per GPU (DDP, no accumulation)
    cuda_graph: bool = False
    # Kernel of attention: chosen by rule (torch's choice, on CPUs with AVX-512 ours where it is faster), the fastest for each shape as
    # measured at the first start, or always one: a backend of scaled_dot_product_attention, or avx512, ours for CPUs.
    attention: Literal["auto", "measured", "flash", "efficient", "cudnn", "math", "avx512"] = "auto"
    grad_clip: float | None = Field(None, gt=0)  # largest gradient norm
    label_dropout: float = Field(0.1, ge=0, le=1)
    # How gradients are summed; tree: in one order for every world size, so that parameters are equal to the bit (slow, DDP only).
    reduction: Literal["all_reduce", "tree"] = "all_reduce"
    log_every: int = Field(50, ge=1)  # in steps
    max_skipped_steps: int = Field(50, ge=1)  # non-finite steps in a row that stop the run
    hang_seconds: float | None = Field(600.0, ge=1)  # a rank that does nothing for so long ends the job; null: never
    audit: bool = False
    audit_params_every: int = Field(0, ge=0)  # in steps; 0 = never
    init_from: str | None = Field(None, min_length=1)  # weights to start a new run from


class Optim(Section):
    name: Literal["adamw", "adam"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(0, ge=0)  # images of linear warm-up
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_images: int | None = Field(None, ge=1)  # default train.images, fixed at the first start

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must lie in [0, 1)")
        return value


class Ema(Section):
    half_lives: list[float] = [500_000.0]  # in images
    warmup: int = Field(0, ge=0)  # images during which an average with a half-life is a copy of the weights
    # Power function averages, by their relative width; from two of them any other can be made after the run. They are numbered
    # behind those of half_lives, which may then be [].
    sigma_rels: list[float] = []
    snapshot_every: int | None = Field(None, ge=1)  # images between two snapshots of the averages; null: none

    @field_validator("half_lives")
    @classmethod
    def _half_lives(cls, value: list[float]) -> list[float]:
        if any(half_life <= 0 for half_life in value):
            raise ValueError("must be positive numbers of images")
        return value

    @field_validator("sigma_rels")
    @classmethod
    def _sigma_rels(cls, value: list[float]) -> list[float]:
        if any(not 0.001 <= sigma_rel <= 0.2886 for sigma_rel in value):
            raise ValueError("must be widths in 0.001 .. 0.2886 (typical: [0.05, 0.10])")
        if len(set(value)) < len(value):
            raise ValueError("holds the same width twice")
        return value

    @model_validator(mode="after")
    def _some(self) -> Ema:
        if not self.half_lives and not self.sigma_rels:
            raise ValueError("half_lives and sigma_rels are both empty: name at least one average")
        return self


class Engine(Section):
    name: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: Literal[0, 1, 2, 3] | None = None  # of DeepSpeed; null: 1
    offload_optimizer: bool = False  # optimizer state and fp32 weights in host memory (DeepSpeed, stages 1 to 3)
    param_dtype: Literal["fp32", "bf16"] = "fp32"  # bf16: weights in bf16 with fp32 masters (DeepSpeed, stages 1 to 3)
    deepspeed: dict[str, Any] = {}  # merged into the generated DeepSpeed configuration

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # true equals 1
            raise ValueError("must be 0, 1, 2 or 3")
        return value

    @property
    def stage(self) -> int:
        """The ZeRO stage in force."""
        return 1 if self.zero_stage is None else self.zero_stage

    @model_validator(mode="after")
    def _fits(self) -> Engine:
        if self.name == "ddp":
            given = {"zero_stage": self.zero_stage is not None, "offload_optimizer": self.offload_optimizer,
                     "param_dtype": self.param_dtype != "fp32", "deepspeed": bool(self.deepspeed)}  # fmt: skip
            for key in (key for key, is_set in given.items() if is_set):
                default = {
                    "zero_stage": "null",
                    "offload_optimizer": "false",
                    "param_dtype": "fp32",
                    "deepspeed": "{}",
                }[key]
                raise ValueError(
                    f"engine.{key} is DeepSpeed's: set engine.name=deepspeed, or engine.{key}={default} for DDP"
                )
        elif self.stage == 0:
            for key, is_set in (
                ("offload_optimizer", self.offload_optimizer),
                ("param_dtype", self.param_dtype == "bf16"),
            ):
                if is_set:
                    raise ValueError(
                        f"engine.{key} needs engine.zero_stage 1, 2 or 3: in stage 0 nothing is partitioned"
                    )
        return self


class Checkpoint(Section):
    every: int = Field(100_000, ge=1)
    keep_last: int = Field(3, ge=1)  # a count
    keep_every: int | None = Field(None, ge=1)


class Sampling(Section):
    every: int | None = Field(None, ge=1)  # null: no previews
    num: int = Field(64, ge=1)
    sampler: Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun", "mixing"] = "ddpm"
    steps: int | None = Field(None, ge=1)  # null: every timestep
    spacing: Literal["leading", "trailing", "linspace"] = "linspace"
    eta: float = Field(0.0, ge=0, le=1)  # noise of ddim
    guidance: float = Field(3.0, ge=0)  # without labels it has no meaning and is not used
    # lowest and highest guided timestep; null: all
    guidance_interval: list[int] | None = Field(None, min_length=2, max_length=2)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    # of ddpm; a number from 0 (posterior) to 1 (beta) lies between them
    variance: Literal["beta", "posterior"] | float = "beta"
    # clip: keep the predicted image in data.range at every step
    thresholding: Literal["none", "clip", "dynamic"] = "none"
    percentile: float = Field(0.995, gt=0, le=1)  # of dynamic thresholding

    @field_validator("variance", mode="before")
    @classmethod
    def _variance(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if not number and value not in ("beta", "posterior"):
            raise ValueError("must be beta, posterior, or a number from 0 (posterior) to 1 (beta)")
        return float(value) if number else value

    def options(self, labelled: bool) -> dict[str, Any]:
        """The keywords of ``diffusion.sample`` that this section speaks of."""
        values = self.model_dump(exclude={"every", "num"})
        return values if labelled else {**values, "guidance": 0.0, "guidance_interval": None}


class Validation(Section):
    shards: str | None = None  # a folder of images that are not trained on; null: no validation
    # images between two validations, at the next log step; null: checkpoint.every
    every: int | None = Field(None, ge=1)
    images: int | None = Field(2048, ge=1)  # how many of them, from all over the set; null: all


class Tracking(Section):
    mlflow: bool = True
    uri: str | None = None  # null: sqlite file in the run directory's parent
    experiment: str = "ddpm_dist"
