"""Typed configuration: YAML files that name only what differs from the defaults, plus ``key=value`` overrides."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from ddpm_dist.config_files import apply_override, find_config, read_yaml
from ddpm_dist.config_sections import (
    Checkpoint,
    Data,
    Diffusion,
    Ema,
    Engine,
    MixPart,
    Model,
    Optim,
    Run,
    Sampling,
    Section,
    Tracking,
    Train,
    Validation,
)
from ddpm_dist.errors import UserError

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "Diffusion",
    "Ema",
    "Engine",
    "MixPart",
    "Model",
    "Optim",
    "Run",
    "Sampling",
    "Section",
    "Tracking",
    "Train",
    "Validation",
    "build_config",
    "flatten",
    "load_config",
]


class Config(Section):
    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()
    optim: Optim = Optim()
    ema: Ema = Ema()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    sampling: Sampling = Sampling()
    validation: Validation = Validation()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _across(self) -> Config:
        if self.train.reduction == "tree":
            if self.engine.name != "ddp":
                raise ValueError(
                    "train.reduction=tree works with engine.name=ddp only: DeepSpeed sums gradients itself"
                )
            if self.train.micro_batch is None:
                raise ValueError(
                    "train.reduction=tree needs train.micro_batch: a micro-batch is a leaf of the tree, the same for every world "
                    "size that the run may have (at most global_batch / ranks)"
                )
        if self.engine.param_dtype == "bf16" and self.train.precision != "bf16":
            raise ValueError(f"engine.param_dtype=bf16 needs train.precision=bf16 (it is {self.train.precision})")
        if self.sampling.steps is not None and self.sampling.steps > self.diffusion.timesteps - self.diffusion.t_min:
            raise ValueError(
                f"sampling.steps {self.sampling.steps} is more than the {self.diffusion.timesteps - self.diffusion.t_min}"
                " timesteps the run trains (diffusion.timesteps - diffusion.t_min); lower sampling.steps or leave it out"
            )
        if (self.sampling.sampler == "mixing") != (self.diffusion.schedule == "mixing"):
            raise ValueError(
                f"sampling.sampler={self.sampling.sampler} does not go with diffusion.schedule={self.diffusion.schedule}: "
                "the schedule 'mixing' is sampled by 'mixing', and no other one is"
            )
        interval = self.sampling.guidance_interval
        if interval is not None and not 0 <= interval[0] <= interval[1] < self.diffusion.timesteps:
            raise ValueError(
                f"sampling.guidance_interval {interval} must be two timesteps of 0..{self.diffusion.timesteps - 1}, the lower one first"
            )
        return self

    def network_keywords(self) -> dict[str, Any]:
        """The network's keywords: those of ``model`` plus what follows from ``data``. UserError on a contradiction."""
        derived = {
            "in_channels": self.data.channels,
            "image_size": self.data.image_size,
            "num_classes": self.data.num_classes,
        }
        if self.model.name == "context_unet":  # t / timesteps enters the network, and is to reach 1
            derived["timesteps"] = max(1, self.diffusion.timesteps - 1)
        own = self.model.keywords
        for name, value in derived.items():
            if name in own and own[name] != value:
                raise UserError(
                    f"model.{name}={own[name]} contradicts the rest of the configuration, from which {name} = {value} follows: "
                    f"leave model.{name} out"
                )
        return {**own, **derived}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for files and records: a user and password inside tracking.uri are left out."""
        values = self.model_dump(mode="json")
        if self.tracking.uri is not None:
            values["tracking"]["uri"] = re.sub(r"//[^/@]*@", "//", self.tracking.uri)
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)


def load_config(source: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read ``source`` (a path or the name of a packaged config such as ``digits``), apply ``section.key=value`` overrides.

    A file may say ``extends: other.yaml`` (relative to itself). Raises UserError naming file, key path and remedy.
    """
    values = read_yaml(find_config(source)) if source is not None else {}
    for override in overrides:
        apply_override(values, override)
    return build_config(values, str(source) if source is not None else "the command line")


def build_config(values: dict[str, Any], where: str) -> Config:
    """Validate a plain mapping. Raises UserError that lists every wrong key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise UserError(f"configuration ({where}):\n  " + "\n  ".join(lines)) from None


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1, cutoff=0.5)
        if not close:  # the right word in the wrong section
            everywhere = {f"{s}.{k}": k for s, f in Config.model_fields.items() for k in _valid_keys((s,))}
            close = [full for full, key in everywhere.items() if key == error["loc"][-1]][:1]
        hint = (
            f"did you mean {'.'.join([*map(str, error['loc'][:-1]), close[0]]) if '.' not in close[0] else close[0]}?"
            if close
            else f"valid keys: {', '.join(valid)}"
        )
        return f"{path}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if path:
        return f"{path}: {message[0].lower()}{message[1:]} (got {error['input']!r:.80})"
    return message


def _valid_keys(path: tuple) -> list[str]:
    fields = Config.model_fields
    for part in path:
        section = fields[part].annotation if part in fields else None
        fields = getattr(section, "model_fields", {})
    return list(fields)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
