"""Averages of any length after the run, put together from snapshots of the tracked ones (``--ema-sigma-rel`` of ddpm_dist.export).

Source: Karras et al. 2024 (arXiv 2312.02696), section 3.2; the profiles are those of ``engines/power_function.py``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_dist.checkpoint.find import SNAPSHOTS, held_open
from ddpm_dist.checkpoint.format import Reader
from ddpm_dist.checkpoint.retention import published
from ddpm_dist.engines.power_function import combination, gamma_of
from ddpm_dist.errors import UserError

# How far the combined profile may be from the wanted one, relative to its size. It is about the distance between two profiles
# whose sigma_rel differ by 1 %. For weights that walk at random from 0 the averages then differ by less than 1e-3 of their size
# (tests/test_power_function.py), and by less the slower the weights move.
MAX_RESIDUAL = 0.01


@dataclass(frozen=True)
class Reconstruction:
    """A linear combination of tracked averages at several steps."""

    sigma_rel: float
    residual: float  # of the profile
    steps: list[int]
    terms: list[tuple[Reader, int, float]]  # checkpoint, number of the average in it, weight

    def read(self, name: str) -> Tensor:
        """The parameter ``name``, summed in float64, as float32 on the CPU. Holds one tensor of one snapshot at a time."""
        total: Tensor | None = None
        for reader, number, weight in self.terms:
            value = reader.tensor(f"ema.{number}/{name}").to(torch.float64)
            total = value.mul_(weight) if total is None else total.add_(value, alpha=weight)
        assert total is not None
        return total.to(torch.float32)


def reconstruct(run: Path, end: Reader, sigma_rel: float) -> Reconstruction:
    """The average of width ``sigma_rel`` at the time of the checkpoint ``end``, from it and all snapshots of ``run`` before it.

    Raises UserError when the run tracks no power function averages, when ``sigma_rel`` is none, or when what was tracked is too far
    from it; damaged snapshots are named and left out.
    """
    try:
        gamma = gamma_of(sigma_rel)
    except ValueError as error:
        raise UserError(f"--ema-sigma-rel: {error}") from None
    tracked = sigma_rels_of(end)
    if not tracked:
        raise UserError(
            f"--ema-sigma-rel: {run} tracks no power function averages, so no other can be made from it; set "
            "ema.sigma_rels=[0.05,0.10] and ema.snapshot_every (train.images / 32, say) in a new run"
        )
    readers = [*_snapshots(run, end), end]
    profiles = [(reader, number, width) for reader in readers for number, width in tracked]
    gammas = np.array([gamma_of(width) for _, _, width in profiles])
    times = np.array([float(reader.state["images_seen"]) for reader, _, _ in profiles])
    weights, residual = combination(gammas, times, gamma, times[-1])
    steps = [reader.step for reader in readers]
    if residual > MAX_RESIDUAL:
        raise UserError(
            f"--ema-sigma-rel {sigma_rel}: the {len(steps)} snapshot(s) of {', '.join(str(width) for _, width in tracked)} up to step "
            f"{end.step} do not span it: relative residual of the profile {residual:.2g}, at most {MAX_RESIDUAL} is allowed. Choose a "
            "sigma_rel nearer to those, a later --step, or train with a smaller ema.snapshot_every"
        )
    terms = [(reader, number, float(weight)) for (reader, number, _), weight in zip(profiles, weights, strict=True)]
    return Reconstruction(sigma_rel, residual, steps, terms)


def sigma_rels_of(reader: Reader) -> list[tuple[int, float]]:
    """(number, sigma_rel) of the power function averages in a checkpoint; they are numbered behind those with a half-life."""
    ema = reader.state["config"]["ema"]
    return list(enumerate(ema.get("sigma_rels", []), start=len(ema["half_lives"])))


def _snapshots(run: Path, end: Reader) -> list[Reader]:
    """The intact snapshots before ``end``, oldest first."""
    found = []
    for step, folder in reversed(published(run / SNAPSHOTS)):
        if step >= end.step:
            continue
        try:
            reader = held_open(folder)
        except UserError as error:
            print(f"warning: {error}; left out", file=sys.stderr, flush=True)
            continue
        try:
            ours = reader.state["model"] == end.state["model"] and sigma_rels_of(reader) == sigma_rels_of(end)
            ours = ours and 0 < reader.state["images_seen"] < end.state["images_seen"]
        except (KeyError, TypeError):
            ours = False
        if not ours:
            raise UserError(
                f"{folder} has another network or other averages than {end.folder}: remove it, it is not of this run"
            )
        found.append(reader)
    return found
