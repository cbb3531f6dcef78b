"""What the programs that our networks come from trained: their diffusion processes, and what lies beside their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddpm_dist.errors import UserError


@dataclass(frozen=True)
class Original:
    """How an original program diffuses, how it samples, and keywords of its network that no shape shows."""

    diffusion: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    keywords: dict[str, Any] = field(default_factory=dict)


_LINEAR = {"timesteps": 1000, "t_min": 0, "schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
           "prediction": "epsilon", "loss": "mse", "range": [-1.0, 1.0]}  # fmt: skip
# It draws t from 1 .. 999 and never uses index 0.
_CIFAR64 = Original({**_LINEAR, "t_min": 1})
# Image and noise are mixed by a continuous amount in [0, 1); here in 1000 steps.
_MIXING = {"timesteps": 1000, "t_min": 0, "schedule": "mixing", "noise": "uniform", "prediction": "x0", "loss": "mse",
           "range": [0.0, 1.0]}  # fmt: skip
_MIXED = {"sampler": "mixing", "steps": 40}

ORIGINALS = {
    "unet_conditional": _CIFAR64,
    "unet": _CIFAR64,
    "film_unet": Original({**_LINEAR, "loss": "mse_sum"}, {"variance": "posterior"}),
    "basic_unet": Original(_MIXING, _MIXED),
    "unet2d": Original(_MIXING, _MIXED, {"timestep": 0}),
    # Its tables have T + 1 entries for t = 0 .. T, and it draws t from 1 .. T.
    "context_unet": Original({**_LINEAR, "timesteps": 401, "t_min": 1, "range": [0.0, 1.0]}),
}
# The tables that the program of context_unet keeps beside its weights, as functions of beta (float64, (T + 1,)).
TABLES = {
    "alpha_t": lambda beta: 1 - beta,
    "oneover_sqrta": lambda beta: (1 - beta).rsqrt(),
    "sqrt_beta_t": lambda beta: beta.sqrt(),
    "alphabar_t": lambda beta: (1 - beta).cumprod(0),
    "sqrtab": lambda beta: (1 - beta).cumprod(0).sqrt(),
    "sqrtmab": lambda beta: (1 - (1 - beta).cumprod(0)).sqrt(),
    "mab_over_sqrtmab": lambda beta: beta / (1 - (1 - beta).cumprod(0)).sqrt(),
}


def schedule_of_tables(tables: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The keys of a diffusion process that follow from the seven tables: timesteps, schedule and its betas.

    Betas in even steps become schedule "linear" (with exactly 1e-4 and 0.02 where that is what they are), any others "betas"
    with the list. Raises UserError naming a table that is missing, has another length or does not belong to the others.
    """
    missing = [name for name in TABLES if name not in tables]
    if missing:
        raise UserError(
            f"{where}: of the {len(TABLES)} schedule tables {', '.join(missing)} is missing: the file is damaged"
        )
    length = len(tables["sqrt_beta_t"]) if tables["sqrt_beta_t"].dim() == 1 else 0
    for name in TABLES:
        if tuple(tables[name].shape) != (length,) or length < 2 or not tables[name].is_floating_point():
            raise UserError(
                f"{where}: the schedule table {name} is {list(tables[name].shape)} ({tables[name].dtype}), but all of them "
                "must be of the same length (timesteps + 1), floating point"
            )
    # Of all tables the root is the one that keeps a small beta exactly.
    beta = tables["sqrt_beta_t"].double().square()
    if not bool(((beta > 0) & (beta < 1)).all()):
        raise UserError(f"{where}: the schedule table sqrt_beta_t holds values that are no roots of betas in (0, 1)")
    for name, formula in TABLES.items():
        if not _belongs(name, tables[name], formula(beta), beta):
            at = int((tables[name].double() - formula(beta)).abs().nan_to_num(torch.inf).argmax())
            raise UserError(
                f"{where}: the schedule table {name} does not belong to sqrt_beta_t: at t = {at} it is "
                f"{float(tables[name][at]):.6g}, but {float(formula(beta)[at]):.6g} follows from there"
            )
    read = [float(f"{float(beta[end]):.6g}") for end in (0, -1)]
    for first, last in ((_LINEAR["beta_start"], _LINEAR["beta_end"]), read):
        even = torch.linspace(first, last, length, dtype=torch.float64)
        # A root that was rounded once, of betas that were computed in float32.
        rounding = 4 * _epsilon(tables["sqrt_beta_t"]) * beta + 4 * _FLOAT32 * beta.max()
        if bool(((beta - even).abs() <= rounding).all()):
            return {"timesteps": length, "schedule": "linear", "beta_start": first, "beta_end": last}
    return {"timesteps": length, "schedule": "betas", "betas": beta.tolist()}


_FLOAT32 = torch.finfo(torch.float32).eps


def _epsilon(table: Tensor) -> float:
    """The relative rounding of a table: the original computes in float32, whatever it is stored in."""
    return max(torch.finfo(table.dtype).eps, _FLOAT32)


def _belongs(name: str, table: Tensor, expected: Tensor, beta: Tensor) -> bool:
    """Whether ``table`` is ``expected`` up to what the original's float32 and the rounding of both tables make of it.

    alpha is 1 - beta and abar a product of t of them, so each has an error of about float32's epsilon, t of them, not relative to
    beta or 1 - abar, which are small at the beginning.
    """
    t = torch.arange(1, len(beta) + 1, dtype=torch.float64)
    relative = 32 * _epsilon(table) + t * _FLOAT32
    if name in ("sqrtmab", "mab_over_sqrtmab"):
        relative = relative + (t + 2) * _FLOAT32 / TABLES["sqrtmab"](beta).square() + _FLOAT32 / beta
    smallest = torch.finfo(table.dtype).smallest_normal
    return bool(((table.double() - expected).abs() <= relative * expected.abs() + smallest).all())
