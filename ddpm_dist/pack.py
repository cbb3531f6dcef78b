"""Pack images into webdataset shards with an index: ``python -m ddpm_dist.pack SOURCE --out DIR``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ddpm_dist.data.encode import DEFAULT_QUALITY, Encoded, Recipe
from ddpm_dist.data.shards import IMAGE_FORMATS, Index, write_index
from ddpm_dist.data.sources import SOURCES, Source, open_source
from ddpm_dist.data.writer import CHUNK, encode_all, folder_in_one_piece, write_tars
from ddpm_dist.errors import UserError, exit_codes

DEFAULT_PER_SHARD = 10_000
NAMES_SHOWN = 5
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
    _check_options(size, image_format, quality, channels, samples_per_shard, workers)
    images = open_source(source, root=root, split=split, size=size, num=num, seed=seed, download=download)
    image_format = image_format or images.image_format
    if quality is not None and image_format != "jpg":
        raise UserError("--quality is for --format jpg: leave it away, or choose jpg")
    if not len(images):
        raise UserError(f"the source {source} is empty: nothing to pack")
    if source == "folder":
        _check_apart(Path(root), Path(out))
    with folder_in_one_piece(Path(out)) as folder:  # first of all, so that a bad --out is found before long work
        recipe = Recipe(image_format, channels or images.channels(), size, quality)
        tally = _Tally(skip_bad)
        encoded = encode_all(_items(images), recipe, _worker_count(workers, len(images)))
        kept = tally.filter(_with_bar(encoded, len(images), images.name, progress))
        scans = write_tars(folder, images.name, kept, image_format, samples_per_shard)
        if not scans:
            raise UserError(f"none of the {len(images)} images can be read; the first: {tally.names[0]}")
        samples = np.concatenate([scan.samples for scan in scans])
        write_index(folder, [scan.shard for scan in scans], samples, images.classes, recipe.channels, image_format)
    index = Index.load(out)
    return Packed(index, _common_side(index), tally.skipped, tally.names, images.notes + tally.notes(images, recipe))


class _Tally:
    """Passes readable samples on, and keeps count of the others."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad, self.skipped, self.recoloured = skip_bad, 0, 0
        self.names: list[str] = []
        self.labels: Counter[int] = Counter()

    def filter(self, encoded: Iterable[Encoded]) -> Iterator[Encoded]:
        for sample in encoded:
            if sample.data is not None:
                self.recoloured += sample.recoloured
                self.labels[sample.label] += 1
                yield sample
                continue
            if not self.skip_bad:
                raise UserError(
                    f"{sample.name}: cannot be read as an image ({sample.reason}): repair or remove it, "
                    "or pass --skip-bad to leave such images out"
                )
            self.skipped += 1
            if len(self.names) < NAMES_SHOWN:
                self.names.append(f"{sample.name} ({sample.reason})")

    def notes(self, images: Source, recipe: Recipe) -> list[str]:
        found = []
        if self.recoloured:
            to = "grey" if recipe.channels == 1 else "RGB"
            found.append(f"converted {self.recoloured} images to {to} (--channels chooses)")
        empty = [name for label, name in enumerate(images.classes or []) if not self.labels[label]]
        if empty:
            found.append(f"classes without any image: {', '.join(empty)}")
        return found


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


def _items(images: Source):
    return ((position, images.item(position)) for position in range(len(images)))


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


def summary(packed: Packed, source: str) -> str:
    """The lines that pack ends with."""
    index = packed.index
    size = sum(shard.bytes for shard in index.shards)
    classes = "unlabelled" if index.classes is None else f"{len(index.classes)} classes"
    side = f"{packed.size} x {packed.size}" if packed.size else "mixed sizes"
    lines = [
        f"{index.folder}: {len(index):,} samples, {classes}, {side}, {'grey' if index.channels == 1 else 'RGB'} "
        f"{index.image_format}, {len(index.shards)} shards, {size:,} bytes",
        f"fingerprint {index.fingerprint}",
    ]
    if packed.skipped:
        more = ", ..." if packed.skipped > len(packed.skipped_names) else ""
        lines.append(f"left out {packed.skipped} unreadable images: {', '.join(packed.skipped_names)}{more}")
    lines += [f"note: {note}" for note in packed.notes]
    lines.append(f"next: {next_command(packed, source)}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line of pack."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_dist.pack",
        description="Pack images into webdataset shards with an index, ready for training.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", choices=list(SOURCES), help=", ".join(SOURCES))
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
    return parser


@exit_codes
def main(argv: list[str] | None = None) -> int | None:
    """Entry point: pack, then print what was made and the next command."""
    options = vars(build_parser().parse_args(argv))
    source, out = options.pop("source"), options.pop("out")
    options["image_format"] = options.pop("format")
    packed = pack(source, out, progress=True, **options)
    print(summary(packed, source))


if __name__ == "__main__":
    sys.exit(main())
