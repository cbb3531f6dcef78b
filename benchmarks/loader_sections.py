"""The parts of ``benchmarks.loader`` beside the comparison of the loaders: indexing, checking, streaming, formats of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_contestants import Spec, expected
from benchmarks.loader_formats import FIRST, formats, sets_of, small_set
from benchmarks.loader_process import Contestant, Failed
from benchmarks.loader_streaming import streaming
from ddpm_dist.data.shards import Index

SECTIONS = ("indexing", "check", "streaming", "formats")
PART = 0.25  # of a turn of the loaders: there is much to measure


def measure_sections(
    names: list[str], spec: Spec, index: Index, generated: bool, turns: int, seconds: float, scratch: Path, core: int,
    told: Callable[[str], None],
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """{name: section} of the report, and whether none of them failed; one that did is {"problem": why}.

    Args:
        names: of ``SECTIONS``.
        spec, index: the benchmark's images.
        generated: they are those of ``ddpm_dist.pack shapes``.
        turns, seconds: of the loaders.
        core: where all processes run, one at a time.
        told: called with a line about what was done.
    """
    found: dict[str, Any] = {}
    about = {"turns": turns, "seconds": PART * seconds}
    sets: dict[str, Index] = {}
    if "formats" in names:
        sets = sets_of(index, generated, scratch)
    elif "streaming" in names:
        sets = {FIRST: small_set(index, generated, FIRST, scratch)}
    for name in names:
        try:
            if name == "streaming":
                small = _on(spec, sets[FIRST])
                np.save(scratch / "streaming.npy", expected(sets[FIRST]))
                found[name] = streaming(small, scratch / "streaming.npy", scratch=scratch, cores=[core], **about)
            elif name == "formats":
                found[name] = formats(_on(spec, sets[FIRST]), sets, scratch=scratch, cores=[core], **about)
            else:
                found[name] = _alone(spec, name, about, core)
        except Failed as problem:
            found[name] = {"problem": str(problem)}
        told(f"{name}: {found[name].get('problem') or 'measured'}")
    problems = [each.get("problem") for each in found.values()]
    problems += [each["problem"] for each in found.get("formats", {}).get("entries", [])]
    return found, not any(problems)


def _on(spec: Spec, index: Index) -> Spec:
    """The same contestant on other shards and one core."""
    batch = min(spec.batch, len(index))
    return Spec(spec.name, str(index.folder), spec.folder, spec.size, batch, workers=0, threads=1)


def _alone(spec: Spec, command: str, options: dict[str, Any], core: int) -> dict[str, Any]:
    one = Contestant(spec)
    try:
        one.start([core])
        return one.must(command, **options)
    finally:
        one.close()
