"""Pack images into webdataset shards with an index.

    python -m ddpm_dist.pack SOURCE --out DIR                  # one process, with a worker for every CPU
    python -m ddpm_dist.pack SOURCE --out DIR --part 3/16      # task 3 of 16 (from 0) of an array job packs its share
    python -m ddpm_dist.pack --merge --out DIR                 # when all tasks are done: joins the parts

    python -m ddpm_dist.pack folder --root photos.zip --out DIR --split-validation 0.02    # 2 % go to DIR-validation

All tasks run the same command, each with its own number, in any order, on machines that see the same files. What the merge makes is
what one process makes, byte for byte; with --skip-bad, --split-validation and shards of 2 GB it is the same samples in the same order,
and shards end elsewhere. A task or a merge that was interrupted is simply started again; a part that is there already is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist import pack_merge, pack_parts, pack_split
from ddpm_dist.data.encode import DEFAULT_QUALITY, MAX_SIDE, PACK_FORMATS, Recipe
from ddpm_dist.data.publish import check_free, disk_errors, folder_in_one_piece
from ddpm_dist.data.shards import Index
from ddpm_dist.data.sources import SOURCES, open_source
from ddpm_dist.data.writer import Tally, fill_folder
from ddpm_dist.errors import UserError, exit_codes
from ddpm_dist.pack_summary import Packed, part_summary, summary
from ddpm_dist.parts import Part, parse_part

DEFAULT_PER_SHARD = 10_000
MAX_SIZE = 16_384


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
    split_validation: float | None = None,
    label_key: str | None = None,
    progress: bool = False,
) -> Packed:
    """Pack a source into ``out``: webdataset tars, index.json and index.npy. Same input, same bytes.

    The folder appears when it is complete: everything is written to ``OUT.incomplete`` first. More than one worker
    means new processes, so a script that calls this needs the usual ``if __name__ == "__main__"``.

    Args:
        source, root, split, num, seed, download, label_key: see ``ddpm_dist.data.sources.open_source``.
        size: side in pixels (shorter side scaled by Lanczos, centre cut out); None keeps the source's size.
        image_format: "jpg", "png", "webp" (lossless) or "raw" (uncompressed); None = png for digits, else jpg.
        quality: JPEG quality 1..100. None = 95, and files that are right as they are get stored byte for byte.
        channels: 1 or 3; None = those of the source, for mixed files those of the first that can be read.
        samples_per_shard: at most so many samples in a tar (and at most about 2 GB).
        workers: processes that encode; None = one for every CPU this process may use.
        skip_bad: leave out images that cannot be read instead of stopping.
        split_validation: share of the images, 0..1, that goes to the folder ``OUT-validation`` instead, see ``pack_split``.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        UserError: bad options, missing data, an image that cannot be read, ``out`` not empty, disk full.
    """
    job = _Job(
        source, Path(out), root=root, split=split, size=size, image_format=image_format, quality=quality, channels=channels,
        samples_per_shard=samples_per_shard, workers=workers, download=download, num=num, seed=seed, skip_bad=skip_bad,
        split_validation=split_validation, label_key=label_key, progress=progress,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:  # first of all, so that a bad --out is found before long work
        folder, validation = (place and stack.enter_context(folder_in_one_piece(place)) for place in job.outs())
        tally = job.fill(folder, range(len(job.images)), job.recipe(), validation=validation)
        if not tally.labels and not tally.held_out:
            raise UserError(f"none of the {len(job.images)} images can be read; the first: {tally.names[0]}")
        if not tally.labels:
            raise UserError("all images were held out for validation: lower --split-validation")
        if validation and not tally.held_out:
            raise pack_split.no_validation(job.out)
    return _packed(Index.load(out), tally, job.images.notes, validation and _validation_of(out))


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
        recipe = job.recipe()
        described = pack_parts.describe(job.images, job.options(), recipe)
        outs = [place for place in job.outs() if place]
        for place in outs:
            check_free(place)
        kept = [pack_parts.find_whole(place, part, described) for place in outs]
        if None not in kept:
            return kept[0], True
        per_shard, count = job.samples_per_shard, len(job.images)
        shards = part.share(-(-count // per_shard))
        positions = range(min(shards.start * per_shard, count), min(shards.stop * per_shard, count))
        with contextlib.ExitStack() as stack:
            folders = [stack.enter_context(pack_parts.part_in_one_piece(place, part, described)) for place in outs]
            tally = job.fill(folders[0], positions, recipe, shards.start, *folders[1:])
            recorded = pack_parts.write_record(folders[0], part, described, tally, job.images.notes)
            for folder in folders[1:]:
                pack_parts.write_record(folder, part, described, Tally(labels=tally.held_out), [])
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
    split_validation: float | None = None
    label_key: str | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        _check_options(self.size, self.image_format, self.quality, self.channels, self.samples_per_shard, self.workers)
        pack_split.check_share(self.split_validation)
        self.images = open_source(
            self.source, root=self.root, split=self.split, size=self.size, num=self.num, seed=self.seed,
            download=self.download, label_key=self.label_key,
        )  # fmt: skip
        if self.quality is not None and (self.image_format or self.images.image_format) != "jpg":
            raise UserError("--quality is for --format jpg: leave it away, or choose jpg")
        if not len(self.images):
            raise UserError(f"the source {self.source} is empty: nothing to pack")
        if self.source in ("folder", "huggingface"):
            _check_apart(Path(self.root), self.out)

    def recipe(self) -> Recipe:
        """How every image is stored; reads images until it knows how many channels they have."""
        channels = self.channels or self.images.channels()
        return Recipe(self.image_format or self.images.image_format, channels, self.size, self.quality)

    def outs(self) -> tuple[Path, Path | None]:
        """The folder to make, and the one of the images that are held out, if any are."""
        return self.out, pack_split.validation_folder(self.out) if self.split_validation else None

    def fill(
        self, folder: Path, positions: range, recipe: Recipe, first: int = 0, validation: Path | None = None
    ) -> Tally:
        return fill_folder(
            folder, self.images, positions, recipe, per_shard=self.samples_per_shard, workers=self.workers,
            skip_bad=self.skip_bad, progress=self.progress, first=first, validation=validation,
            held_out=functools.partial(pack_split.is_held_out, share=self.split_validation),
        )  # fmt: skip

    def options(self) -> dict[str, Any]:
        """The options that decide what is packed, beside the recipe."""
        names = (
            "source",
            "root",
            "split",
            "samples_per_shard",
            "num",
            "seed",
            "skip_bad",
            "split_validation",
            "label_key",
        )
        return {name: getattr(self, name) for name in names}


def _packed(index: Index, tally: Tally, notes: list[str], validation: Index | None) -> Packed:
    notes = notes + tally.notes(index.classes, index.channels) + pack_split.duplicates(index)
    if validation is not None:
        notes += pack_split.duplicates(validation)
    return Packed(index, _common_side(index), tally.skipped, tally.names, notes, validation)


def _validation_of(out: str | os.PathLike) -> Index | None:
    folder = pack_split.validation_folder(Path(out))
    return Index.load(folder) if (folder / "index.json").is_file() else None


def _check_options(size, image_format, quality, channels, samples_per_shard, workers) -> None:
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise UserError(f"--size must be in 1..{MAX_SIZE} pixels, found {size}")
    if image_format is not None and image_format not in PACK_FORMATS:
        raise UserError(f"--format must be one of {', '.join(PACK_FORMATS)}, found {image_format!r}")
    if image_format == "webp" and size is not None and size > MAX_SIDE["webp"]:
        raise UserError(
            f"--format webp takes at most {MAX_SIDE['webp']} pixels a side, found --size {size}: choose png"
        )
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


def build_parser() -> argparse.ArgumentParser:
    """The command line of pack."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_dist.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", choices=list(SOURCES), help=", ".join(SOURCES))
    add("--out", required=True, metavar="DIR", help="folder to make; must not exist or be empty")
    add(
        "--root",
        metavar="PATH",
        help="where the images are (folder: also a .zip or .tar) or torchvision keeps its data (default datasets)",
    )
    add("--split", metavar="NAME", help="train (default) or test; celeba also valid and all")
    add("--label-key", metavar="KEY", help="huggingface: the column of labels (default label)")
    add("--size", type=int, metavar="N", help="scale to N x N pixels (default: digits 16, shapes 64, else unchanged)")
    add(
        "--format",
        choices=PACK_FORMATS,
        help="webp without loss; raw: pixels as they are, several times larger, nothing to decode; default: png for digits, else jpg",
    )
    add("--quality", type=int, metavar="Q", help=f"JPEG quality, 1..100 (default {DEFAULT_QUALITY})")
    add("--channels", type=int, choices=(1, 3), help="1 grey, 3 RGB (default: as the source, or its first image)")
    add("--samples-per-shard", type=int, default=DEFAULT_PER_SHARD, metavar="N", help="default %(default)s")
    add("--workers", type=int, metavar="N", help="processes that encode (default: one per CPU)")
    add("--download", action="store_true", help="let torchvision fetch what is not there")
    add("--num", type=int, metavar="N", help="shapes: how many images (default 20000)")
    add("--seed", type=int, metavar="S", help="shapes: which images (default 0)")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read instead of stopping")
    add(
        "--split-validation",
        type=float,
        metavar="SHARE",
        help="hold out this share (0.02) in DIR-validation; no image is in both",
    )
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
        expected = _expected(parser, source, options)
        held_out = pack_split.validation_folder(Path(os.path.realpath(out)))
        if pack_parts.parts_folder(held_out).is_dir():
            pack_merge.merge(held_out, expected)
        merged = pack_merge.merge(out, expected)
        packed = _packed(merged.index, merged.tally, merged.notes, _validation_of(out))
        print(summary(packed, merged.source or source))
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
