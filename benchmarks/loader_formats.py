"""The same pixels in every format that ``ddpm_dist.pack`` writes, through our own loader on one core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_contestants import OURS, Spec, expected
from benchmarks.loader_process import Contestant, take_turns
from benchmarks.loader_turns import ratio, spread
from benchmarks.reference import unpack_shards
from ddpm_dist.data.encode import PACK_FORMATS
from ddpm_dist.data.shards import Index
from ddpm_dist.pack import pack

FIRST = "jpg"  # which the others are compared with
SHARDS = 24  # of each set; more than a loader fetches at a time
LEAST, PIXELS = 256, 2500 * 64**2  # images at least, and pixels in all that are packed


def small_set(source: Index, generated: bool, image_format: str, scratch: Path) -> Index:
    """A part of the benchmark's images in another format.

    generated: ``source`` is the beginning of ``ddpm_dist.pack shapes``, so the same images are drawn again and encoded once; else its
    JPEGs are decoded, and jpg keeps them byte for byte.
    """
    size = int(source.ranges["height"][0])
    count = min(len(source), max(LEAST, PIXELS // size**2))
    out, options = scratch / image_format, {"image_format": image_format, "samples_per_shard": -(-count // SHARDS)}
    if generated:
        return pack("shapes", out, size=size, num=count, workers=1, **options).index
    folder = scratch / "images"
    if not folder.exists():
        unpack_shards(source.folder, folder, count)
    return pack("folder", out, root=folder, workers=1, **options).index


def formats(
    spec: Spec, sets: dict[str, Index], turns: int, seconds: float, scratch: Path, cores: list[int]
) -> dict[str, Any]:
    """The section of the report. ``sets``: by format, jpg among them; an entry of one that was not delivered right has a problem."""
    contestants = {name: Contestant(replace(spec, name=OURS, shards=str(index.folder))) for name, index in sets.items()}
    try:
        for each in contestants.values():
            each.start(cores)
        for name, each in contestants.items():
            np.save(scratch / f"{name}.npy", expected(sets[name]))
            each.ask("epoch", expected=str(scratch / f"{name}.npy"))
            each.turn(seconds / 2)  # warm-up
            each.forget()
        take_turns(list(contestants.values()), turns, seconds)
    finally:
        for each in contestants.values():
            each.close()
    entries = [_entry(name, each, contestants[FIRST], sets[name]) for name, each in contestants.items()]
    return {"images": len(sets[FIRST]), "entries": entries}


def sets_of(source: Index, generated: bool, scratch: Path) -> dict[str, Index]:
    """:func:`small_set` in every format."""
    return {name: small_set(source, generated, name, scratch) for name in sorted(PACK_FORMATS, key=FIRST.__ne__)}


def _entry(name: str, own: Contestant, first: Contestant, index: Index) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": name,
        "bytes_per_image": float(index.samples["size"].mean()),
        "problem": own.problem,
    }
    if own.problem is not None:
        return result
    costs = [1000 * cost for cost in own.cpu_s_per_1000]
    result |= {"images_per_sec": spread(own.rates), "cpu_us_per_image": spread(costs)}
    result |= {"images_per_sec_turns": own.rates, "cpu_us_per_image_turns": costs}
    if first is not own and first.problem is None:
        result["to_jpg"] = ratio(own.rates, first.rates)
        result["per_cpu_second_to_jpg"] = ratio(first.cpu_s_per_1000, own.cpu_s_per_1000)
    return result
