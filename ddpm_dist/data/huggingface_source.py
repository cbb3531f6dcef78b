"""Hugging Face image data sets on disk: image folders with splits and metadata files, and parquet files that hold the images.

    ROOT/train/cat/1.jpg                          folders as classes
    ROOT/train/metadata.jsonl (or .csv)           rows with file_name and a label; names are relative to that file
    ROOT/data/train-00000-of-00004.parquet        rows with an image {bytes, path} and a label

Without split folders everything in ROOT is taken. Class numbers come from all splits, so they are the same in each. Layouts:
https://huggingface.co/docs/datasets/image_load
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from ddpm_dist.data.sources import Files, Source, open_folder, printable
from ddpm_dist.errors import UserError

LABEL, METADATA = "label", ("metadata.jsonl", "metadata.csv")
SPLITS = (
    "train",
    "test",
    "valid",
    "validation",
    "val",
    "dev",
)  # folders whose classes count, beside the one that is wanted
MAX_LABEL = 1_000_000


def open_huggingface(root: Path, split: str | None, label_key: str | None) -> Source:
    """Open the split (default train) of a data set below ``root``; ``label_key``: the column of labels, default ``label``.

    Raises:
        UserError: no such split, no images, damaged or incomplete metadata, names that lead outside, pyarrow missing.
    """
    wanted = split or "train"
    if not root.is_dir():
        raise UserError(f"the folder {printable(root)} cannot be read: not a folder")
    parquets = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet"), *root.glob("*/*.parquet")])
    if parquets:
        from ddpm_dist.data.parquet_source import open_parquet

        named = [path for path in dict.fromkeys(parquets) if _is_of(path, wanted, root)]
        if not named and split is None:
            named = list(dict.fromkeys(parquets))
        if not named:
            raise UserError(
                f"no parquet file of the split {wanted!r} below {printable(root)} (such as {wanted}-00000.parquet)"
            )
        return open_parquet(named, label_key, [path for path in dict.fromkeys(parquets) if path not in named])
    folder = root / wanted
    if not folder.is_dir():
        if split is not None:
            raise UserError(f"no split {split!r} below {printable(root)}: there is no folder of that name")
        folder = root
    file = _metadata_in(folder)
    if file is None:
        if label_key is not None:
            raise UserError(f"--label-key needs a {METADATA[0]} or {METADATA[1]} in {printable(folder)}")
        return open_folder(folder) if folder == root else _of_all_splits(root, folder)
    siblings = [] if folder == root else [_metadata_in(place) for place in sorted(root.iterdir()) if place.is_dir()]
    rows = _rows(file, label_key)
    others = [row[1] for other in siblings if other and other != file for row in _rows(other, label_key)]
    labels, classes = number_labels(str(file), [label for _, label in rows], others)
    return Files("huggingface", [folder / name for name, _ in rows], labels, classes)


def _of_all_splits(root: Path, folder: Path) -> Source:
    """Class folders of one split, numbered among those of all splits."""
    found = open_folder(folder)
    if found.classes is None:
        return found
    splits = [place for place in root.iterdir() if place.name in SPLITS and place.is_dir()]
    names = {place.name for split in splits for place in split.iterdir() if place.is_dir() and place.name[0] != "."}
    classes = sorted(names | set(found.classes))
    number = {name: label for label, name in enumerate(classes)}
    items = [found.item(position) for position in range(len(found))]
    moved = Files("huggingface", found.paths, [number[found.classes[item.label]] for item in items], classes)
    moved.notes = found.notes
    return moved


def _is_of(path: Path, split: str, root: Path) -> bool:
    return path.name.startswith((f"{split}-", f"{split}.")) or (path.parent.name == split and path.parent != root)


def _metadata_in(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _rows(file: Path, label_key: str | None) -> list[tuple[str, Any]]:
    """File name and label (None: there is no such column) of every row, sorted by name."""
    found = []
    key = label_key or LABEL
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, filter(str.strip, lines))
            for number, row in enumerate(rows, 1):
                name = row.get("file_name") if isinstance(row, dict) else None
                if not isinstance(name, str) or not name:
                    raise UserError(f"{printable(file)}: row {number} has no file_name")
                if name.startswith("/") or ".." in name.split("/") or "\0" in name:
                    raise UserError(f"{printable(file)}: row {number} leads outside of its folder ({printable(name)})")
                if label_key is not None and key not in row:
                    raise UserError(f"{printable(file)}: row {number} has no {label_key}")
                found.append((name, row.get(key)))
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{printable(file)} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read: {error.strerror}") from None
    if not found:
        raise UserError(f"{printable(file)} names no images")
    found.sort(key=lambda row: row[0])
    for (name, _), (after, _) in zip(found, found[1:], strict=False):
        if name == after:
            raise UserError(f"{printable(file)} names {printable(name)} twice")
    return found


def number_labels(where: str, labels: list[Any], others: list[Any]) -> tuple[list[int] | None, list[str] | None]:
    """Class numbers and names; numbers stay what they are, names are counted in sorted order. ``others``: labels of other splits.

    Raises UserError: some labels are missing, or neither number nor name.
    """
    if all(label is None for label in labels):
        return None, None
    both = labels + [label for label in others if label is not None]
    for label in both:
        if label is None or label == "" or isinstance(label, bool) or not isinstance(label, (int, str)):
            raise UserError(
                f"{printable(where)}: a label is {label!r}, neither a number nor a name: label all images or none"
            )
    try:
        numbers = [int(label) for label in both]
    except ValueError:
        names = sorted({str(label) for label in both})
        place = {name: number for number, name in enumerate(names)}
        return [place[str(label)] for label in labels], names
    if min(numbers) < 0 or max(numbers) > MAX_LABEL:
        raise UserError(f"{printable(where)}: labels must be in 0..{MAX_LABEL}, found {min(numbers)}..{max(numbers)}")
    return numbers[: len(labels)], [str(number) for number in range(max(numbers) + 1)]
