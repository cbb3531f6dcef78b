"""Packing in parts: every task of an array job packs its share of a source, and a merge joins the parts.

    OUT.parts/00003-of-00016/                 part 3 of 16, whole: its tars, their index, and part.json
    OUT.parts/00003-of-00016.*.incomplete/    a part that is being made, or was when its task was killed
    OUT.parts/merged/                         what a merge that was interrupted has moved together so far

Parts are cut where shards end, so the merged folder is, byte for byte, what one process makes of the same source. Three things
move the ends of shards: images that --skip-bad leaves out, images that --split-validation puts into the other folder (every part fills
its own shards of both), and shards that reach 2 GB before they have all their samples. Then the merged folder holds the same samples
in the same order, but its shards end elsewhere and its fingerprint is another.

A part records its recipe: the options, and which images the source has (their names and labels, not their content).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL

from ddpm_dist.data.encode import Recipe
from ddpm_dist.data.publish import Busy, fsync_folder, lock_folder
from ddpm_dist.data.shards import Index
from ddpm_dist.data.sources import Source, printable
from ddpm_dist.data.writer import Tally
from ddpm_dist.errors import UserError
from ddpm_dist.parts import Part

FORMAT, VERSION = "ddpm_dist-part", 1
RECORD, MERGED = "part.json", "merged"
_WHOLE = re.compile(r"(\d{5,})-of-(\d{5,})")
_UNFINISHED = re.compile(_WHOLE.pattern + r"\.[0-9a-f]{8}\.incomplete")


@dataclass(frozen=True)
class Recorded:
    """A whole part and what its part.json says: recipe, what was left out and converted, notes of the source."""

    part: Part
    recipe: dict[str, Any]
    samples: int
    tally: Tally
    notes: list[str]


def parts_folder(out: Path) -> Path:
    """Where the parts of ``out`` lie until they are merged."""
    return out.with_name(out.name + ".parts")


def name_of(part: Part) -> str:
    """The name of a whole part's folder."""
    return f"{part.number:05d}-of-{part.count:05d}"


def describe(images: Source, options: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What two parts must have in common to be parts of the same data set, as JSON takes it.

    options: ``source``, ``root`` and what else decides which images there are.
    """
    root = None if options["root"] is None else str(Path(options["root"]))  # as in the names of the images
    digest = hashlib.sha256(json.dumps(images.classes).encode())
    for position in range(len(images)):
        item = images.item(position)
        digest.update(f"{item.name.removeprefix(printable(root or ''))}\t{item.label}\n".encode())
    return {
        **options,
        "root": root and printable(os.path.abspath(root)),
        "format": recipe.image_format,
        **{name: getattr(recipe, name) for name in ("size", "quality", "channels")},
        "images": len(images),
        "names_and_labels": digest.hexdigest()[:16],
        "Pillow": PIL.__version__,  # another one may encode otherwise
    }


def differences(recipe: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [key for key in {**recipe, **other} if recipe.get(key) != other.get(key)]
    return ", ".join(f"{key}: {recipe.get(key)} here, {other.get(key)} there" for key in keys)


# ---- one part -------------------------------------------------------------------------------------------------------


def find_whole(out: Path, part: Part, recipe: dict[str, Any]) -> Recorded | None:
    """The part if it is there, whole and made by this recipe.

    Raises UserError if the other parts that are there do not go with it, so that this is known before the work.
    """
    folder = parts_folder(out)
    found = whole_parts(folder)
    for number in found:
        if number.count != part.count:
            raise UserError(
                f"{folder} holds parts of a division into {number.count}, not {part.count}: "
                f"merge them, or remove {folder} to start anew"
            )
    others = (read_record(place, number) for number, place in found.items() if number != part)
    first = None
    for recorded in filter(None, others):
        if recorded.recipe == recipe:  # enough: the merge looks at all of them
            break
        first = first or recorded
    else:
        if first is not None:
            raise UserError(
                f"{folder / name_of(first.part)} was made otherwise ({differences(recipe, first.recipe)}): "
                f"give the same options and source, or remove {folder} to start anew"
            )
    return _usable(found[part], part, recipe) if part in found else None


def _usable(place: Path, part: Part, recipe: dict[str, Any]) -> Recorded | None:
    recorded = read_record(place, part)
    if recorded is None or recorded.recipe != recipe:
        return None
    # A merge that has begun has moved tars away, and knows itself what must be where.
    if recorded.samples and not (place.parent / MERGED).is_dir():
        try:
            Index.load(place).check_files()
        except UserError:
            return None
    return recorded


@contextlib.contextmanager
def part_in_one_piece(out: Path, part: Part, recipe: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder of this process's own to make a part in; when the block ends well it becomes the part.

    When the block raises, what it wrote is removed. Leftovers of killed tasks with the same number are removed first. If another
    process has finished the same part meanwhile, that one stays.

    Raises OSError.
    """
    parent = parts_folder(out)
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent, part)
    aside, lock = _own_folder(parent, part)
    try:
        try:
            yield aside
            fsync_folder(aside)
            _put_in_place(aside, parent / name_of(part), part, recipe)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # gone where all went well
    finally:
        os.close(lock)
    fsync_folder(parent)


def write_record(folder: Path, part: Part, recipe: dict[str, Any], tally: Tally, notes: list[str]) -> Recorded:
    """Write the part.json of a part that is made in ``folder``, flushed to disk."""
    samples = tally.labels.total()
    says = {
        "format": FORMAT, "version": VERSION, "part": part.number, "parts": part.count, "recipe": recipe,
        "samples": samples, "skipped": tally.skipped, "skipped_names": tally.names,
        "recoloured": tally.recoloured, "notes": notes,
    }  # fmt: skip
    with open(folder / RECORD, "x", encoding="ascii") as file:
        file.write(json.dumps(says, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return Recorded(part, recipe, samples, tally, notes)


def _own_folder(parent: Path, part: Part) -> tuple[Path, int]:
    """A new folder and its lock. Two tasks with the same number have two, so that neither disturbs the other."""
    while True:
        aside = parent / f"{name_of(part)}.{secrets.token_hex(4)}.incomplete"
        os.mkdir(aside)
        try:  # until it is locked, another task may take it for a leftover
            lock = lock_folder(aside)
        except (Busy, FileNotFoundError):
            continue
        if aside.is_dir():
            return aside, lock
        os.close(lock)


def _remove_leftovers(parent: Path, part: Part) -> None:
    """What killed tasks with this number have left. A live task holds the lock of its folder."""
    for leftover in parent.glob(f"{name_of(part)}.*.incomplete"):
        with contextlib.suppress(Busy, FileNotFoundError):
            lock = lock_folder(leftover)
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)


def _put_in_place(aside: Path, place: Path, part: Part, recipe: dict[str, Any]) -> None:
    try:
        os.rename(aside, place)
        return
    except OSError:
        if not place.is_dir():
            raise
    if _usable(place, part, recipe) is None:  # damaged, or from another source
        old = place.with_name(f"{place.name}.{secrets.token_hex(4)}.incomplete")
        os.rename(place, old)
        os.rename(aside, place)
        shutil.rmtree(old, ignore_errors=True)


# ---- reading parts --------------------------------------------------------------------------------------------------


def whole_parts(folder: Path) -> dict[Part, Path]:
    """The whole parts in a folder in order of their numbers. Raises UserError if something lies there that is not ours."""
    if not folder.is_dir():
        return {}
    found = {}
    for entry in sorted(os.listdir(folder)):
        whole = _WHOLE.fullmatch(entry)
        if whole and int(whole[1]) < int(whole[2]):
            found[Part(int(whole[1]), int(whole[2]))] = folder / entry
        elif not _UNFINISHED.fullmatch(entry) and entry != MERGED:
            raise UserError(f"{folder} holds something that pack did not write ({printable(entry)}): move it away")
    return found


def read_record(place: Path, part: Part) -> Recorded | None:
    """What a part says of itself, None where that is damaged."""
    try:
        says = json.loads((place / RECORD).read_text("utf-8"))
        if (says["format"], says["version"], says["part"], says["parts"]) != (FORMAT, VERSION, part.number, part.count):
            return None
        tally = Tally(int(says["skipped"]), [str(name) for name in says["skipped_names"]], int(says["recoloured"]))
        return Recorded(part, dict(says["recipe"]), int(says["samples"]), tally, list(map(str, says["notes"])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
