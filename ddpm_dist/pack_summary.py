"""What pack says at its end: what was made, what was left out, and the command that trains on it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from ddpm_dist import pack_parts
from ddpm_dist.data.shards import Index

CONFIGS = {("digits", 16): "configs/digits.yaml", ("shapes", 64): "configs/shapes64.yaml",
           ("cifar10", 64): "configs/cifar64.yaml"}  # fmt: skip
PNG_NOTE = (
    "note: DALI decodes PNG on the CPU; --format webp stores the same pixels in fewer bytes and is decoded about as fast, --format raw "
    "stores them as they are, in more bytes, and needs no decoder"
)


@dataclass
class Packed:
    """What a pack did.

    Attributes:
        index: the index of the finished folder.
        size: side in pixels of all images, or None if they differ.
        skipped: how many unreadable images were left out; ``skipped_names``: the first few, with the reason.
        notes: what else the user should know.
        validation: the index of the images that were held out.
    """

    index: Index
    size: int | None
    skipped: int = 0
    skipped_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    validation: Index | None = None


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
    if packed.validation is not None:
        words.append(f"validation.shards={packed.validation.folder}")
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
        *_held_out(packed),
        *_left_out(packed.skipped, packed.skipped_names),
        *(f"note: {note}" for note in packed.notes),
    ]
    if index.image_format == "png":
        lines.append(PNG_NOTE)
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


def _held_out(packed: Packed) -> list[str]:
    if packed.validation is None:
        return []
    held, kept = len(packed.validation), len(packed.index)
    shards = len(packed.validation.shards)
    return [f"{packed.validation.folder}: {held:,} samples held out ({held / (held + kept):.2%}), {shards} shards"]


def _left_out(skipped: int, names: list[str]) -> list[str]:
    more = ", ..." if skipped > len(names) else ""
    return [f"left out {skipped} unreadable images: {', '.join(names)}{more}"] if skipped else []
