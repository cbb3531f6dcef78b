"""Writing a shard folder: encode in parallel, write tars in order, add their index."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from ddpm_dist.data.encode import Encoded, Item, Recipe, encode_chunk
from ddpm_dist.data.index_file import write_index
from ddpm_dist.data.process_pool import in_order
from ddpm_dist.data.sources import Source
from ddpm_dist.data.tars import Scan, scan_shard
from ddpm_dist.errors import UserError

CHUNK = 32  # images that travel to a worker process together
MAX_SHARD_BYTES = 2_000_000_000
NAMES_SHOWN = 5


# ---- encoding in parallel -------------------------------------------------------------------------------------------


def encode_all(items: Iterable[tuple[int, Item]], recipe: Recipe, workers: int) -> Iterator[Encoded]:
    """Encode every (position, item), results in the order of the items whatever ``workers`` is.

    At most a few chunks per worker are held in memory. With one worker everything happens in this process.

    Raises:
        UserError: a worker process died.
    """
    items = iter(items)
    chunks = iter(lambda: list(islice(items, CHUNK)), [])
    for encoded in in_order(functools.partial(encode_chunk, recipe=recipe), chunks, workers, _first_and_last):
        yield from encoded


def _first_and_last(chunk: list[tuple[int, Item]]) -> str:
    return f"one of the images {chunk[0][1].name} to {chunk[-1][1].name}"


# ---- writing tars ---------------------------------------------------------------------------------------------------


class _Tar:
    """The file under a tar writer. After ``drop`` it swallows what finalisers still want to write."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "xb")

    def write(self, data: bytes) -> int:
        return len(data) if self.file.closed else self.file.write(data)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


class TarWriter:
    """Writes samples into ``NAME-000000.tar`` and so on with ``webdataset.ShardWriter``, and reads every tar back.

    Use it in a ``with`` block; when that ends well the last tar is finished. The first shard has the number ``first``.

    A shard ends after ``per_shard`` samples or when it has reached 2 GB. The bytes depend only on the samples: no
    time, user or umask gets into them. A sample's key is its position in the source.

    Attributes:
        scans: what each shard holds, as found in the file that was written.
    """

    def __init__(self, folder: Path, name: str, extension: str, per_shard: int, first: int = 0) -> None:
        self.scans: list[Scan] = []
        self._folder, self._name, self._extension = folder, name, extension
        self._per_shard, self._first = per_shard, first
        self._tar: _Tar | None = None
        self._writer = None

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None and self._writer is not None:
                self._writer.close()
        finally:
            if self._tar is not None:
                self._tar.drop()  # closed already where all went well

    def write(self, sample: Encoded) -> None:
        """Add a sample that has data. Raises OSError: the disk is full, for instance."""
        if self._writer is None:  # opens its first shard at once, which must not stay empty
            from webdataset import ShardWriter

            self._writer = ShardWriter(
                f"{self._name}-%06d.tar", self._per_shard, MAX_SHARD_BYTES, self._finished, self._first, verbose=0,
                opener=self._open, encoder=False, mtime=0, user="", group="", mode=0o644,
            )  # fmt: skip
        files = {"__key__": f"{sample.position:08d}", self._extension: sample.data}
        if sample.label >= 0:
            files["cls"] = str(sample.label).encode("ascii")
        self._writer.write(files)

    def _open(self, shard: str) -> _Tar:
        self._tar = _Tar(self._folder / shard)
        return self._tar

    def _finished(self, shard: str) -> None:
        self._tar.finish()
        self.scans.append(scan_shard(self._folder / shard))

    def write_index(self, classes: list[str] | None, recipe: Recipe) -> None:
        """Write the index of what was written, after the block; without a sample there is none. Raises OSError."""
        if self.scans:
            samples = np.concatenate([scan.samples for scan in self.scans])
            shards = [scan.shard for scan in self.scans]
            write_index(self._folder, shards, samples, classes, recipe.channels, recipe.image_format)


# ---- a whole folder -------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the images: left out (with the first few names and reasons), recoloured, kept per label.

    ``held_out``: those that went to validation, per label; they are not among ``labels``.
    """

    skipped: int = 0
    names: list[str] = field(default_factory=list)
    recoloured: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    held_out: Counter[int] = field(default_factory=Counter)

    def readable(self, encoded: Iterable[Encoded], skip_bad: bool) -> Iterator[Encoded]:
        """Pass readable samples on and count the others. Raises UserError at the first unreadable one unless ``skip_bad``."""
        for sample in encoded:
            if sample.data is not None:
                self.recoloured += sample.recoloured
                yield sample
                continue
            if not skip_bad:
                raise UserError(
                    f"{sample.name}: cannot be read as an image ({sample.reason}): repair or remove it, "
                    "or pass --skip-bad to leave such images out"
                )
            self.skipped += 1
            if len(self.names) < NAMES_SHOWN:
                self.names.append(f"{sample.name} ({sample.reason})")

    def notes(self, classes: list[str] | None, channels: int) -> list[str]:
        """What the user should know of it."""
        found = []
        if self.recoloured:
            found.append(
                f"converted {self.recoloured} images to {'grey' if channels == 1 else 'RGB'} (--channels chooses)"
            )
        empty = [name for label, name in enumerate(classes or []) if not self.labels[label]]
        if empty:
            found.append(f"classes without any image: {', '.join(empty)}")
        return found


def fill_folder(
    folder: Path,
    images: Source,
    positions: range,
    recipe: Recipe,
    *,
    per_shard: int,
    workers: int | None,
    skip_bad: bool,
    progress: bool,
    first: int = 0,
    validation: Path | None = None,
    held_out: Callable[[bytes], bool] | None = None,
) -> Tally:
    """Write the images at ``positions`` of a source into ``folder``: tars, the first with the number ``first``, and their index.

    With ``validation`` those whose stored bytes ``held_out`` picks go into that folder instead, in the same way.

    Without one readable image (or any position) nothing is written. For the other arguments see ``ddpm_dist.pack.pack``.

    Raises:
        UserError: an image that cannot be read, a worker process that died.
        OSError: the disk is full, for instance.
    """
    tally = Tally()
    if not positions:
        return tally
    items = ((position, images.item(position)) for position in positions)
    encoded = encode_all(items, recipe, _worker_count(workers, len(positions)))
    kept = tally.readable(_with_bar(encoded, len(positions), images.name, progress), skip_bad)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(TarWriter(place, images.name, recipe.extension, per_shard, first))
            for place in (folder, validation)
            if place is not None
        ]
        for sample in kept:
            aside = validation is not None and held_out(sample.data)
            (tally.held_out if aside else tally.labels)[sample.label] += 1
            writers[aside].write(sample)
    for writer in writers:
        writer.write_index(images.classes, recipe)
    return tally


def _worker_count(workers: int | None, images: int) -> int:
    """One per usable CPU, but none that would find nothing to do: starting one costs more than a few chunks."""
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), -(-images // (8 * CHUNK)))
    return min(workers, -(-images // CHUNK))


def _with_bar(encoded: Iterator[Encoded], total: int, name: str, progress: bool) -> Iterator[Encoded]:
    if not progress:
        return encoded
    from tqdm import tqdm

    return iter(tqdm(encoded, total=total, desc=f"packing {name}", unit="img", disable=None, dynamic_ncols=True))
