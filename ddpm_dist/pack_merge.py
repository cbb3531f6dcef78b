"""Joining the parts of a packed data set: tars are moved together, never copied, and get one index. See ``pack_parts``."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist.data.index_file import file_sha256
from ddpm_dist.data.publish import check_free, disk_errors, fsync_folder, lock_folder, publish
from ddpm_dist.data.shards import Index, Shard, write_index
from ddpm_dist.data.writer import NAMES_SHOWN, Tally
from ddpm_dist.errors import UserError
from ddpm_dist.pack_parts import MERGED, RECORD, Recorded, differences, name_of, parts_folder, read_record, whole_parts
from ddpm_dist.parts import Part


@dataclass(frozen=True)
class Merged:
    """The finished index, what became of the images, notes of the source, and its name.

    Where the parts had been merged before, nothing more than the index is known.
    """

    index: Index
    tally: Tally
    notes: list[str]
    source: str | None


def merge(out: str | os.PathLike, expected: dict[str, Any] | None = None) -> Merged:
    """Join all parts of ``out``: the tars are moved, not copied, and the index is written. The folder appears when it is complete.

    It may be interrupted at any time and called again; when the parts have been merged already, nothing is done.

    Args:
        expected: options that the parts must have been packed with; None for any.

    Raises:
        UserError: parts are missing, damaged or do not go together (says which task to run again), ``out`` is not empty, or
            the file system refuses.
    """
    shown, out = Path(out), Path(os.path.realpath(out))
    parts, removed = parts_folder(out), out.with_name(out.name + ".parts.removed")
    with disk_errors(out):
        if not parts.is_dir():
            if not (out / "index.json").is_file():
                raise UserError(
                    f"no parts of {out}: make them with python -m ddpm_dist.pack SOURCE --out {out} --part I/N"
                )
            index = Index.load(shown)
            shutil.rmtree(removed, ignore_errors=True)
            return Merged(index, _tally_of(index, []), ["there are no parts, so nothing was changed"], None)
        lock = lock_folder(parts)
        try:
            found = _all_parts(parts, expected or {})
            plan, indexes = _plan(parts, found)
            if not _is_result(out, plan):
                check_free(out)
                _move(plan, parts / MERGED)
                _write_index(parts / MERGED, plan, indexes)
                publish(parts / MERGED, out)
            shutil.rmtree(removed, ignore_errors=True)
            os.rename(parts, removed)
            shutil.rmtree(removed, ignore_errors=True)
        finally:
            os.close(lock)
        index = Index.load(shown)
        return Merged(index, _tally_of(index, found), found[0].notes, found[0].recipe["source"])


def _tally_of(index: Index, found: list[Recorded]) -> Tally:
    labels, counts = np.unique(index.samples["label"], return_counts=True)
    names = [name for recorded in found for name in recorded.tally.names][:NAMES_SHOWN]
    skipped, recoloured = (sum(getattr(r.tally, what) for r in found) for what in ("skipped", "recoloured"))
    return Tally(skipped, names, recoloured, Counter(dict(zip(labels.tolist(), counts.tolist(), strict=True))))


def _again(parts: list[Part]) -> str:
    """Which tasks have to run again."""
    shown = ", ".join(f"--part {part}" for part in parts[:NAMES_SHOWN])
    return f"run {'its task' if len(parts) == 1 else 'their tasks'} again ({shown}{', ...' if len(parts) > NAMES_SHOWN else ''})"


def _all_parts(folder: Path, expected: dict[str, Any]) -> list[Recorded]:
    """Every part, in order. Raises UserError unless all are there, can be read and have one recipe."""
    there = whole_parts(folder)
    counts = sorted({part.count for part in there})
    if len(counts) > 1:
        raise UserError(
            f"{folder} holds parts of divisions into {' and '.join(map(str, counts))}: remove those that are not wanted "
            f"(rm -r {folder}/*-of-{counts[0]:05d})"
        )
    if not there:
        raise UserError(f"{folder} holds no whole part yet: run the tasks (--part 0/N ... N-1/N) to their end first")
    missing = [part for number in range(counts[0]) if (part := Part(number, counts[0])) not in there]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {counts[0]} parts: {_again(missing)}, then merge")
    read = {part: read_record(place, part) for part, place in there.items()}
    damaged = [part for part, recorded in read.items() if recorded is None]
    if damaged:
        raise UserError(f"{there[damaged[0]] / RECORD} is damaged or missing: {_again(damaged)}, then merge")
    found = [recorded for recorded in read.values() if recorded is not None]
    # What most of them say; of a tie what the first says.
    usual = Counter(json.dumps(recorded.recipe, sort_keys=True) for recorded in found).most_common(1)[0][0]
    others = [r for r in found if json.dumps(r.recipe, sort_keys=True) != usual]
    if others:
        said = differences(others[0].recipe, json.loads(usual))
        raise UserError(
            f"{there[others[0].part]} was made otherwise than most parts ({said}): {_again([r.part for r in others])}, then merge"
        )
    if wrong := {key: value for key, value in expected.items() if found[0].recipe.get(key) != value}:
        said = differences(wrong, {key: found[0].recipe.get(key) for key in wrong})
        raise UserError(f"the parts in {folder} were packed otherwise ({said}): leave these options away with --merge")
    return found


@dataclass(frozen=True)
class _Move:
    """A shard of a part and what it becomes."""

    part: Part
    source: Path
    shard: Shard


def _plan(folder: Path, found: list[Recorded]) -> tuple[list[_Move], list[Index]]:
    """All shards in order, numbered from 0, and the indexes of the parts that have any."""
    moves: list[_Move] = []
    indexes = []
    for recorded in found:
        if not recorded.samples:
            continue
        place = folder / name_of(recorded.part)
        try:
            index = Index.load(place)
        except UserError as error:
            raise UserError(f"{error}; here: remove {place}, {_again([recorded.part])}, then merge") from None
        indexes.append(index)
        for shard in index.shards:
            name = f"{shard.name.rpartition('-')[0]}-{len(moves):06d}.tar"
            moves.append(_Move(recorded.part, place / shard.name, replace(shard, name=name)))
    if not moves:
        names = [name for recorded in found for name in recorded.tally.names]
        if not names:
            raise UserError(
                f"{folder} holds parts without any image: too few images for this --split-validation, raise it"
            )
        raise UserError(f"none of the {found[0].recipe['images']} images can be read; the first: {names[0]}")
    return moves, indexes


def _is_result(out: Path, plan: list[_Move]) -> bool:
    """Whether ``out`` is already what these parts make: a merge was interrupted after it had put it in place."""
    if not (out / "index.json").is_file():
        return False
    return Index.load(out).shards == [move.shard for move in plan]


def _move(plan: list[_Move], merged: Path) -> None:
    """Move all tars into ``merged``. What an interrupted merge has moved there is read and compared first."""
    lost = []
    for move in plan:
        there = merged / move.shard.name
        if _size(move.source) != move.shard.bytes and (
            move.source.exists() or _size(there) != move.shard.bytes or file_sha256(there) != move.shard.sha256
        ):
            lost.append(move)
    if lost:
        again = list(dict.fromkeys(move.part for move in lost))
        places = f"remove {lost[0].source.parent}" + (" and the others" if len(again) > 1 else "")
        raise UserError(f"{lost[0].source} is missing or damaged: {places}, {_again(again)}, then merge")
    merged.mkdir(exist_ok=True)
    for move in plan:
        if move.source.exists():
            os.rename(move.source, merged / move.shard.name)
    for extra in set(os.listdir(merged)) - {move.shard.name for move in plan}:
        os.unlink(merged / extra)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _write_index(merged: Path, plan: list[_Move], indexes: list[Index]) -> None:
    samples = np.concatenate([index.samples for index in indexes])
    first = indexes[0]
    shards = [move.shard for move in plan]
    write_index(merged, shards, samples, first.classes, first.channels, first.image_format)
    fsync_folder(merged)
