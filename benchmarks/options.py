"""Options that several benchmarks have, checked in one way."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ddpm_dist.errors import UserError


def refuse_overrides(overrides: list[str], own: Mapping[str, str]) -> None:
    """UserError where the command line sets what the benchmark sets itself.

    own: key such as "run.dir": what to do instead, such as "--batch N".
    """
    for word in overrides:
        key = word.partition("=")[0].strip()
        if key in own:
            raise UserError(f"{word}: this benchmark sets {key} itself; {own[key]}")


SCRATCH = {
    "run.dir": "it works in a folder of its own that is removed at the end",
    "run.name": "it has no run of yours",
}


def check_memory(gigabytes: float | None) -> None:
    """UserError for a --memory-gb that is no amount of memory, or too little to start with."""
    if gigabytes is not None and not (math.isfinite(gigabytes) and gigabytes >= 0.5):
        raise UserError(f"--memory-gb must be at least 0.5, not {gigabytes}")
