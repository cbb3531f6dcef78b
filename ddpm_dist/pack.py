"""Pack images into webdataset shards with an index.

    python -m ddpm_dist.pack SOURCE --out DIR                  # one process, with a worker for every CPU
    python -m ddpm_dist.pack SOURCE --out DIR --part 3/16      # task 3 of 16 (from 0) of an array job packs its share
    python -m ddpm_dist.pack --merge --out DIR                 # when all tasks are done: joins the parts

All tasks run the same command, each with its own number, in any order, on machines that see the same files. What the merge makes is
what one process makes, byte for byte (exceptions: see ddpm_dist/pack_parts.py). A task or a merge that was interrupted
is simply started again; a part that is there already is kept.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist import pack_merge, pack_parts
from ddpm_dist.data.encode import DEFAULT_QUALITY, Recipe
from ddpm_dist.data.publish import check_free, disk_errors, folder_in_one_piece
from ddpm_dist.data.shards import IMAGE_FORMATS, Index
from ddpm_dist.data.sources import SOURCES, open_source
from ddpm_dist.data.writer import Tally, fill_folder
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.parts import Part, parse_part

DEFAULT_PER_SHARD = 10_000
MAX_SIZE = 16_384
CONFIGS = {("digits", 16): "configs/digits.yaml", ("shapes", 64): "configs/shapes64.yaml",
           ("cifar10", 64): "configs/cifar64.yaml"}  # fmt: skip


@dataclass
class Packed:
    """What a pack did.

    Attributes:
        index: the index of the finished folder.
        size: side in pixels of all images, or None if they differ.
        skipped: how many unreadable images were left out; ``skipped_names``: the first few, with the reason.
        notes: what else the user should know.
    """

    index: Index
    size: int | None
    skipped: int = 0
    skipped_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pack(
    source: str,
    out: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    size: int | None = None,
    image_format: str | None = None,
    quality: int | None = None,
    channels: int | None = None,
    samples_per_shard: int = DEFAULT_PER_SHARD,
    workers: int | None = None,
    download: bool = False,
    num: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
    progress: bool = False,
) -> Packed:
    """Pack a source into ``out``: webdataset tars, index.json and index.npy. Same input, same bytes.

    The folder appears when it is complete: everything is written to ``OUT.incomplete`` first. More than one worker
    means new processes, so a script that calls this needs the usual ``if __name__ == "__main__"``.

    Args:
        source, root, split, num, seed, download: see ``ddpm_dist.data.sources.open_source``.
        size: side in pixels (shorter side scaled by Lanczos, centre cut out); None keeps the source's size.
        image_format: "jpg" or "png"; None = png for digits, else jpg.
        quality: JPEG quality 1..100. None = 95, and files that are right as they are get stored byte for byte.
        channels: 1 or 3; None = those of the source, for mixed files those of the first that can be read.
        samples_per_shard: at most so many samples in a tar (and at most about 2 GB).
        workers: processes that encode; None = one for every CPU this process may use.
        skip_bad: leave out images that cannot be read instead of stopping.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        UserError: bad options, missing data, an image that cannot be read, ``out`` not empty, disk full.
    """
    job = _Job(
        source, Path(out), root=root, split=split, size=size, image_format=image_format, quality=quality, channels=channels,
        samples_per_shard=samples_per_shard, workers=workers, download=download, num=num, seed=seed, skip_bad=skip_bad,
        progress=progress,
    )  # fmt: skip
    with folder_in_one_piece(job.out) as folder:  # first of all, so that a bad --out is found before long work
        tally = job.fill(folder, range(len(job.images)), job.recipe())
        if not tally.labels:
            raise UserError(f"none of the {len(job.images)} images can be read; the first: {tally.names[0]}")
    return _packed(Index.load(out), tally, job.images.notes)


def pack_part(source: str, out: str | os.PathLike, part: Part, **options: Any) -> tuple[pack_parts.Recorded, bool]:
    """Pack one part of a source, to be joined with the others by ``ddpm_dist.pack_merge.merge``.

    Of S shards the part gets those from number ``S * part.number // part.count`` on; where there are more parts than shards,
    some are empty. A part that is there already, whole and of the same recipe, is kept.

    Args:
        source, out, options: as for ``pack``; ``download`` is refused, because all tasks would do it.

    Returns:
        The part, and whether it was there before.

    Raises:
        UserError: as ``pack``; other parts are there of another source, other options or another number of parts.
    """
    if options.pop("download", False):
        raise UserError(
            "--download with --part: every task would download; fetch the data once before, for example with "
            "python -c 'from torchvision.datasets import CIFAR10; CIFAR10(\"datasets\", download=True)'"
        )
    job = _Job(source, Path(os.path.realpath(out)), **options)
    with disk_errors(job.out):
        check_free(job.out)
        recipe = job.recipe()
        described = pack_parts.describe(job.images, job.options(), recipe)
        kept = pack_parts.find_whole(job.out, part, described)
        if kept is not None:
            return kept, True
        per_shard, count = job.samples_per_shard, len(job.images)
        shards = part.share(-(-count // per_shard))
        positions = range(min(shards.start * per_shard, count), min(shards.stop * per_shard, count))
        with pack_parts.part_in_one_piece(job.out, part, described) as folder:
            tally = job.fill(folder, positions, recipe, first=shards.start)
            recorded = pack_parts.write_record(folder, part, described, tally, job.images.notes)
    return recorded, False


@dataclass
class _Job:
    """What is packed and how: the options of ``pack``, checked, and the source, opened. Raises UserError."""

    source: str
    out: Path
    root: str | os.PathLike | None = None
    split: str | None = None
    size: int | None = None
    image_format: str | None = None
    quality: int | None = None
    channels: int | None = None
    samples_per_shard: int = DEFAULT_PER_SHARD
    workers: int | None = None
    download: bool = False
    num: int | None = None
    seed: int | None = None
    skip_bad: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        _check_options(self.size, self.image_format, self.quality, self.channels, self.samples_per_shard, self.workers)
        self.images = open_source(
            self.source, root=self.root, split=self.split, size=self.size, num=self.num, seed=self.seed,
            download=self.download,
        )  # fmt: skip
        if self.quality is not None and (self.image_format or self.images.image_format) != "jpg":
            raise UserError("--quality is for --format jpg: leave it away, or choose jpg")
        if not len(self.images):
            raise UserError(f"the source {self.source} is empty: nothing to pack")
        if self.source == "folder":
            _check_apart(Path(self.root), self.out)

    def recipe(self) -> Recipe:
        """How every image is stored; reads images until it knows how many channels they have."""
        channels = self.channels or self.images.channels()
        return Recipe(self.image_format or self.images.image_format, channels, self.size, self.quality)

    def fill(self, folder: Path, positions: range, recipe: Recipe, first: int = 0) -> Tally:
        return fill_folder(
            folder, self.images, positions, recipe, per_shard=self.samples_per_shard, workers=self.workers,
            skip_bad=self.skip_bad, progress=self.progress, first=first,
        )  # fmt: skip

    def options(self) -> dict[str, Any]:
        """The options that decide what is packed, beside the recipe."""
        names = ("source", "root", "split", "samples_per_shard", "num", "seed", "skip_bad")
        return {name: getattr(self, name) for name in names}


def _packed(index: Index, tally: Tally, notes: list[str]) -> Packed:
    notes = notes + tally.notes(index.classes, index.channels)
    return Packed(index, _common_side(index), tally.skipped, tally.names, notes)


def _check_options(size, image_format, quality, channels, samples_per_shard, workers) -> None:
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise UserError(f"--size must be in 1..{MAX_SIZE} pixels, found {size}")
    if image_format is not None and image_format not in IMAGE_FORMATS:
        raise UserError(f"--format must be one of {', '.join(IMAGE_FORMATS)}, found {image_format!r}")
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"--quality must be in 1..100, found {quality}")
    if channels is not None and channels not in (1, 3):
        raise UserError(f"--channels must be 1 or 3, found {channels}")
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard must be at least 1, found {samples_per_shard}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, found {workers}")


def _check_apart(root: Path, out: Path) -> None:
    """Shards inside the source folder would be taken for a class the next time."""
    root, out = Path(os.path.realpath(root)), Path(os.path.realpath(out))
    if out.is_relative_to(root):
        raise UserError(f"--out {out} lies inside --root {root}: choose a folder outside of it")


def _common_side(index: Index) -> int | None:
    heights, widths = np.unique(index.samples["height"]), np.unique(index.samples["width"])
    return int(heights[0]) if len(heights) == len(widths) == 1 and heights[0] == widths[0] else None


def next_command(packed: Packed, source: str) -> str:
    """The shell command that trains on what was packed."""
    index = packed.index
    words = ["python", "-m", "ddpm_dist.train"]
    config = CONFIGS.get((source, packed.size))
    if config:
        words += ["--config", config, f"data.shards={index.folder}"]
    else:
        classes = "null" if index.classes is None else len(index.classes)
        side = -(-(packed.size or 64) // 8) * 8  # the networks want a multiple of 8
        words += [f"run.name={source}", f"data.shards={index.folder}", f"data.image_size={side}",
                  f"data.channels={index.channels}", f"data.num_classes={classes}"]  # fmt: skip
    return shlex.join(words)


def summary(packed: Packed, source: str | None) -> str:
    """The lines that pack ends with; the next command only where the source is known."""
    index = packed.index
    size = sum(shard.bytes for shard in index.shards)
    classes = "unlabelled" if index.classes is None else f"{len(index.classes)} classes"
    side = f"{packed.size} x {packed.size}" if packed.size else "mixed sizes"
    lines = [
        f"{index.folder}: {len(index):,} samples, {classes}, {side}, {'grey' if index.channels == 1 else 'RGB'} "
        f"{index.image_format}, {len(index.shards)} shards, {size:,} bytes",
        f"fingerprint {index.fingerprint}",
        *_left_out(packed.skipped, packed.skipped_names),
        *(f"note: {note}" for note in packed.notes),
    ]
    if source is not None:
        lines.append(f"next: {next_command(packed, source)}")
    return "\n".join(lines)


def part_summary(recorded: pack_parts.Recorded, kept: bool, out: str) -> str:
    """The lines that the packing of a part ends with."""
    merge = shlex.join(["python", "-m", "ddpm_dist.pack", "--merge", "--out", out])
    lines = [
        f"part {recorded.part} of {out}: {recorded.samples:,} samples{', there already' if kept else ''}",
        *_left_out(recorded.tally.skipped, recorded.tally.names),
        f"when all {recorded.part.count} parts are there: {merge}",
    ]
    return "\n".join(lines)


def _left_out(skipped: int, names: list[str]) -> list[str]:
    more = ", ..." if skipped > len(names) else ""
    return [f"left out {skipped} unreadable images: {', '.join(names)}{more}"] if skipped else []


def build_parser() -> argparse.ArgumentParser:
    """The command line of pack."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_dist.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", choices=list(SOURCES), help=", ".join(SOURCES))
    add("--out", required=True, metavar="DIR", help="folder to make; must not exist or be empty")
    add("--root", metavar="PATH", help="where the images are (folder) or torchvision keeps its data (default datasets)")
    add("--split", metavar="NAME", help="train (default) or test; celeba also valid and all")
    add("--size", type=int, metavar="N", help="scale to N x N pixels (default: digits 16, shapes 64, else unchanged)")
    add("--format", choices=IMAGE_FORMATS, help="default: png for digits, else jpg")
    add("--quality", type=int, metavar="Q", help=f"JPEG quality, 1..100 (default {DEFAULT_QUALITY})")
    add("--channels", type=int, choices=(1, 3), help="1 grey, 3 RGB (default: as the source, or its first image)")
    add("--samples-per-shard", type=int, default=DEFAULT_PER_SHARD, metavar="N", help="default %(default)s")
    add("--workers", type=int, metavar="N", help="processes that encode (default: one per CPU)")
    add("--download", action="store_true", help="let torchvision fetch what is not there")
    add("--num", type=int, metavar="N", help="shapes: how many images (default 20000)")
    add("--seed", type=int, metavar="S", help="shapes: which images (default 0)")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read instead of stopping")
    add("--part", metavar="I/N", help="pack only part I (0 to N-1) of N, beside DIR, until --merge joins all parts")
    add("--merge", action="store_true", help="join the parts of DIR; SOURCE and its options may be given or left out")
    return parser


@exit_codes
def main(argv: list[str] | None = None) -> int | None:
    """Entry point: pack, then print what was made and the next command."""
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    source, out, part, merging = (options.pop(name) for name in ("source", "out", "part", "merge"))
    if merging:
        if part is not None:
            raise UserError("--merge comes when all parts are done: leave --part away")
        merged = pack_merge.merge(out, _expected(parser, source, options))
        print(summary(_packed(merged.index, merged.tally, merged.notes), merged.source or source))
        return
    if source is None:
        parser.error("the following arguments are required: SOURCE")
    options["image_format"] = options.pop("format")
    if part is None:
        print(summary(pack(source, out, progress=True, **options), source))
    else:
        print(part_summary(*pack_part(source, out, parse_part(part), progress=True, **options), out))


def _expected(parser: argparse.ArgumentParser, source: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a merge was given; they must be those of the parts."""
    given = {key: value for key, value in options.items() if value != parser.get_default(key)}
    for key in ("workers", "download"):  # they change nothing
        given.pop(key, None)
    if "root" in given:
        given["root"] = os.path.abspath(given["root"])
    return given | ({"source": source} if source else {})


if __name__ == "__main__":
    sys.exit(main())
