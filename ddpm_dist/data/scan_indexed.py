"""Examining shards that have an index: is every image where the index says, the same to the bit, and can it be decoded?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ddpm_dist.data.full_decode import decode
from ddpm_dist.data.image_header import MAX_PIXELS, BadImage, read_header
from ddpm_dist.data.index_file import checksum
from ddpm_dist.data.process_pool import in_order
from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.shard_source import opened
from ddpm_dist.data.shards import Index
from ddpm_dist.data.tar_stream import BrokenTar, Tape, members, split_name
from ddpm_dist.data.tars import MAX_IMAGE_BYTES, Finding

STALE = "stale index"


def examine(folder: Path, workers: int, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[int, list[Finding]]]:
    """For every shard of the index in ``folder``, in order: its bytes, and everything that is wrong.

    Raises:
        UserError: the index itself is damaged, a process died.
    """
    index = Index.load(folder)
    work: Callable[[int], tuple[int, list[Finding]]] = functools.partial(_examine, folder, max_pixels)
    yield from in_order(work, range(len(index.shards)), workers, lambda number: public_name(index.location(number)))
    if index.root is None:
        listed = {shard.name for shard in index.shards}
        extra = sorted(path for path in folder.glob("*.tar") if path.name not in listed)
        yield 0, [Finding(str(path), "", STALE, "the index does not know this shard") for path in extra]


@functools.lru_cache(maxsize=1)
def _index(folder: Path) -> tuple[Index, np.ndarray]:
    index = Index.load(folder)
    return index, np.cumsum([0, *(shard.samples for shard in index.shards)])


def _examine(folder: Path, max_pixels: int, number: int) -> tuple[int, list[Finding]]:
    index, ends = _index(folder)
    location, shard = index.location(number), index.shards[number]
    findings: list[Finding] = []

    def add(key: str, reason: str, detail: str) -> None:
        findings.append(Finding(location, key, reason, detail))

    records = index.rows(np.arange(ends[number], ends[number + 1]))
    columns = (records[name].tolist() for name in ("offset", "size", "checksum", "width", "height"))
    wanted = {offset: values for offset, *values in zip(*columns, strict=True)}
    try:
        with opened(location) as source:
            tape = Tape(source.read)
            try:
                for member in members(tape):
                    row = wanted.pop(member.offset, None)
                    if row is not None:
                        key = split_name(member.name)[0]
                        fits = member.size == row[0] <= MAX_IMAGE_BYTES
                        data = tape.take(member.offset, row[0]) if fits else b""
                        if checksum(data) != row[1]:
                            add(key, "changed image", "its bytes are not those that were indexed: damaged, or replaced")
                            continue
                        try:
                            header = read_header(data, max_pixels)
                            if [header.width, header.height] != row[2:]:
                                add(
                                    key,
                                    STALE,
                                    f"{header.width} x {header.height} pixels, the index says {row[2]} x {row[3]}",
                                )
                            decode(data, header)
                        except BadImage as error:
                            add(key, error.reason, str(error))
            except BrokenTar as error:
                add("", error.reason, str(error))
            size, sha256 = tape.finish()
    except OSError as error:
        add("", "unreadable shard", error.strerror or str(error))
        return 0, findings
    if wanted:
        add("", STALE, f"{len(wanted)} of its {shard.samples} images are not where the index says")
    if (size, sha256) != (shard.bytes, shard.sha256) and not findings:
        add("", STALE, "it was changed after it was indexed, though not in its images")
    return size, findings
