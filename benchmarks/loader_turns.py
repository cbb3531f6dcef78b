"""Turns: what is compared takes them one after the other, and ratios are of one turn each, because a shared machine changes its speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest of the turns."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of mine / theirs, each of one turn. Empty where no turn can be divided: in a test one can be shorter than a clock tick."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True) if b > 0]
    return spread(ratios) if ratios else {}


def in_turns(names: Sequence[T], turn: int) -> list[T]:
    """Who is at it when: every second turn the other way round."""
    return list(names)[:: 1 if turn % 2 == 0 else -1]


def interleaved(
    actions: Mapping[str, Callable[[], float]], turns: int, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """How much each action does in a second of ``clock``, one number for each turn.

    Args:
        actions: each does something whole and returns how much that was, in any unit. It is called once before anything is timed, and
            then in every turn until ``seconds`` have passed.
        clock: such as ``time.process_time``, the CPU time of all threads of this process, or ``time.perf_counter``.
    """
    for action in actions.values():
        action()
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns):
        for name in in_turns(list(actions), turn):
            end, done, start = time.monotonic() + seconds, 0.0, clock()
            while True:
                done += actions[name]()
                if time.monotonic() >= end:
                    break
            rates[name].append(done / (clock() - start))
    return rates
