"""What every report of a benchmark has to hold, and the kinds of numbers in it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Model(BaseModel):
    """Strict: a number that became text is damage."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Hardware(Model):
    cpu: Annotated[str, Field(min_length=1)]
    cores: Count
    cpu_bf16: bool
    memory_gb: Positive
    gpus: list[str]
    driver: str | None = None  # of the GPUs
    load_average: NotNegative
    stolen_share: Annotated[float, Field(ge=0, le=1)] | None = None  # of the processors' time, given to other machines


class Environment(Model):
    hardware: Hardware
    versions: dict[str, str | None]
    threads: Count
    commit: str | None
    command: Annotated[str, Field(min_length=1)]


class Report(Model):
    """What every report has."""

    benchmark: str
    environment: Environment

    @model_validator(mode="after")
    def _known_device(self) -> Report:
        if str(getattr(self, "device", "")).startswith("cuda") and not self.environment.hardware.gpus:
            raise ValueError("measured on a GPU that environment.hardware.gpus does not name")
        return self


class Numbers(Model):
    """Something that was measured, or the problem that kept it from it (``needed`` names what the first kind has)."""

    problem: str | None = None
    needed: ClassVar[tuple[str, ...]] = ("images_per_sec", "lowest", "highest")

    @model_validator(mode="after")
    def _measured_or_not(self) -> Numbers:
        if self.problem is None:
            missing = [name for name in self.needed if getattr(self, name, None) is None]
            if missing:
                raise ValueError(f"{', '.join(missing)} missing, and no problem that explains it")
        low, middle, high = (getattr(self, name, None) for name in ("lowest", "images_per_sec", "highest"))
        if None not in (low, middle, high):
            in_order(low, middle, high)
        return self


def in_order(low: float, middle: float, high: float) -> None:
    if not low * (1 - 1e-9) <= middle <= high * (1 + 1e-9):
        raise ValueError(f"the median {middle:g} is not between the lowest {low:g} and the highest {high:g}")


def in_config(config: dict[str, Any], *keys: str, kind: type = str) -> None:
    for key in keys:
        if not isinstance(config.get(key), kind):
            raise ValueError(f"config.{key} is {config.get(key)!r}, not a {kind.__name__}")
