"""Version 2 of the index: for shards that lie anywhere, and for tables that are too large to be read before the first step.

Beside the small ``index.json`` lie

- ``index.npy``: one record of ``SAMPLE_DTYPE`` per sample, as in version 1;
- ``blocks.npy``: the sha256 of every ``BLOCK`` records, so that a part of the table can be checked when it is first used;
- ``shards.npy`` and ``names.txt``: first sample, bytes, sha256 and name of every shard. A name is relative to ``root`` (a folder, or the
  beginning of a URL; null: this folder), or complete where root is empty.

The fingerprint is a sha256 over the blocks' hashes, the shards (without root: a copy elsewhere is the same data), classes, channels and
format. So it is checked at the start from a few megabytes, whatever the number of samples.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist.data.index_file import (
    FORMAT,
    IMAGE_FORMATS,
    LARGE_VERSION,
    NO_LABEL,
    SAMPLE_DTYPE,
    Shard,
    damaged,
    durable,
    file_sha256,
    is_count,
    is_hash,
    is_names,
    refuse_records,
)

BLOCK = 1 << 14  # records: 0.46 MB; a shard that is touched costs reading one or two of them
LET_GO = 64  # blocks after whose check the memory that they are mapped to is given back
SHARD_DTYPE = np.dtype([("end", "<u8"), ("bytes", "<u8"), ("name_end", "<u8"), ("sha256", "V32")])
FORMATS = (*IMAGE_FORMATS, "mixed")
TABLES = ("shards.npy", "names.txt", "blocks.npy")
RANGES = ("label", "height", "width")


class ShardTable(Sequence[Shard]):
    """The shards of an index, in order, made when they are asked for. ``ends``: (S,) int64, one past each shard's last sample."""

    def __init__(self, rows: np.ndarray, names: Any) -> None:
        self._rows, self._names = rows, names
        self.ends = rows["end"].astype(np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Shard:
        if not 0 <= number < len(self):
            raise IndexError(number)
        row = self._rows[number]
        before = self._rows[number - 1] if number else None
        first, start = (int(before["end"]), int(before["name_end"])) if number else (0, 0)
        name = bytes(self._names[start : int(row["name_end"]) - 1]).decode("utf-8")
        return Shard(name, int(row["end"]) - first, int(row["bytes"]), row["sha256"].tobytes().hex())

    @property
    def bytes(self) -> np.ndarray:
        """(S,) uint64: the size of every shard."""
        return self._rows["bytes"]


def write_large_index(
    folder: Path, shards: Iterable[Shard], samples: np.ndarray, classes: list[str] | None, channels: int, image_format: str, root: str | None
) -> str:  # fmt: skip
    """Write the files of an index into ``folder``, flushed to disk, and return the fingerprint.

    Args:
        samples: (N,) array of ``SAMPLE_DTYPE``, shard after shard; may be memory-mapped: it is read in blocks.
        root: what the shards' names are relative to: a folder or the beginning of a URL; None: ``folder``; "": the names are complete.
    """
    hashes, found = [], {name: [] for name in RANGES}
    with open(folder / "index.npy", "xb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": samples.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for begin in range(0, len(samples), BLOCK):
            block = np.ascontiguousarray(samples[begin : begin + BLOCK])
            file.write(block.data)
            hashes.append(hashlib.sha256(block.data).digest())
            for name in RANGES:
                found[name] += [int(block[name].min()), int(block[name].max())]
        file.flush()
        os.fsync(file.fileno())
    rows, names, end = [], bytearray(), 0
    for shard in shards:
        end += shard.samples
        names += shard.name.encode("utf-8") + b"\n"
        rows.append((end, shard.bytes, len(names), bytes.fromhex(shard.sha256)))
    table = np.array(rows, dtype=SHARD_DTYPE)
    durable(folder / "blocks.npy", lambda file: np.save(file, np.array(hashes, dtype="V32"), allow_pickle=False))
    durable(folder / "shards.npy", lambda file: np.save(file, table, allow_pickle=False))
    durable(folder / "names.txt", lambda file: file.write(names))
    head = {
        "format": FORMAT, "version": LARGE_VERSION, "samples": len(samples), "shards": len(rows), "classes": classes, "channels": channels,
        "image_format": image_format, "root": root, "block": BLOCK,
        "ranges": {name: [min(values), max(values)] for name, values in found.items()},
        "sha256": {name: file_sha256(folder / name) for name in TABLES},
    }  # fmt: skip
    head["fingerprint"] = fingerprint(head)
    durable(folder / "index.json", lambda file: file.write((json.dumps(head, indent=1) + "\n").encode("ascii")))
    return head["fingerprint"]


def fingerprint(head: dict[str, Any]) -> str:
    """sha256 (hex) over what defines the data; ``root`` is no part of it."""
    parts = {key: head[key] for key in ("samples", "classes", "channels", "image_format", "block", "ranges", "sha256")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def check_head(path: Path, head: dict[str, Any]) -> None:
    """Types and ranges of an index.json of version 2. Raises UserError."""

    def is_root(value: object) -> bool:
        return value is None or (isinstance(value, str) and "\0" not in value and len(value) < 4096)

    def is_ranges(value: object) -> bool:
        return isinstance(value, dict) and set(value) == set(RANGES) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in pair) and pair[0] <= pair[1]
            for pair in value.values()
        )  # fmt: skip

    def is_hashes(value: object) -> bool:
        return isinstance(value, dict) and set(value) == set(TABLES) and all(is_hash(each) for each in value.values())

    rules = {
        "samples": (lambda value: is_count(value) and value > 0, "a positive count"),
        "shards": (lambda value: is_count(value) and value > 0, "a positive count"),
        "block": (lambda value: is_count(value) and value > 0, "a positive count"),
        "channels": (lambda value: is_count(value) and value in (1, 3), "1 or 3"),
        "image_format": (lambda value: isinstance(value, str) and value in FORMATS, f"one of {', '.join(FORMATS)}"),
        "classes": (lambda value: value is None or (value != [] and is_names(value)), "null or a list of names"),
        "root": (is_root, "null or text"),
        "ranges": (is_ranges, f"the least and the largest {', '.join(RANGES)}"),
        "sha256": (is_hashes, f"a sha256 for each of {', '.join(TABLES)}"),
        "fingerprint": (is_hash, "a sha256"),
    }
    for key, (good, what) in rules.items():
        if key not in head or not good(head[key]):
            raise damaged(path, f"{key} is not {what}")
    if fingerprint(head) != head["fingerprint"]:
        raise damaged(path, "the fingerprint does not fit the data it stands for")
    low, high = head["ranges"]["label"]
    if head["classes"] is None and (low, high) != (NO_LABEL, NO_LABEL):
        raise damaged(path, "samples have labels, but there are no classes")
    if head["classes"] is not None and not 0 <= low <= high < len(head["classes"]):
        raise damaged(path, f"labels {low} to {high} for {len(head['classes'])} classes")


def read_shards(folder: Path, head: dict[str, Any]) -> ShardTable:
    """The table of the shards, checked. Raises UserError."""
    rows = _load(folder, "shards.npy", head, SHARD_DTYPE, head["shards"])
    path, names = folder / "names.txt", _mapped(folder / "names.txt", head)
    ends, name_ends = rows["end"].astype(np.int64), rows["name_end"].astype(np.int64)
    if (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != head["samples"]:
        raise damaged(folder / "shards.npy", "the numbers of samples do not fit together")
    if (np.diff(name_ends, prepend=0) <= 1).any() or name_ends[-1] != len(names):
        raise damaged(path, "the names do not fit the shards")
    text = np.frombuffer(names, dtype=np.uint8)
    if (
        len(np.flatnonzero(text == ord("\n"))) != len(rows)
        or (text[name_ends - 1] != ord("\n")).any()
        or (text == 0).any()
    ):
        raise damaged(path, "the names do not fit the shards")
    listed = bytes(names).decode("utf-8", "strict").split("\n")[:-1] if _is_utf8(names) else None
    if listed is None:
        raise damaged(path, "not UTF-8")
    if len(set(listed)) != len(listed):
        raise damaged(path, "the same shard is listed twice")
    for name in listed:
        if not safe_name(name, head["root"]):
            raise damaged(path, f"{name!r} leads out of the place of the shards")
    return ShardTable(rows, names)


def safe_name(name: str, root: str | None) -> bool:
    """Whether a shard's name stays below ``root``; with root "" it is complete and may be anything."""
    return root == "" or not (
        name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in name.split("/"))
    )


class LargeTable:
    """The records of ``index.npy``, each block checked before any of it is used."""

    def __init__(self, folder: Path, head: dict[str, Any], shards: ShardTable) -> None:
        self._path, self._head, self._shards = folder / "index.npy", head, shards
        self._hashes = _load(folder, "blocks.npy", head, np.dtype("V32"), -(-head["samples"] // head["block"]))
        try:
            mapped = np.load(self._path, mmap_mode="r", allow_pickle=False)
            self.records = np.asarray(mapped)  # a plain view: memmap indexing is slow
        except OSError as error:
            raise damaged(self._path, f"cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise damaged(self._path, f"not a NumPy table ({error})") from None
        if self.records.dtype != SAMPLE_DTYPE or self.records.shape != (head["samples"],):
            raise damaged(
                self._path, f"{self.records.shape} records of {self.records.dtype} where {head['samples']} are expected"
            )
        self._checked = np.zeros(len(self._hashes), dtype=bool)
        self._mapping, self._touched = mapped._mmap, 0

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The records of these samples. Raises UserError where a block is damaged."""
        for block in np.unique(np.asarray(ids) // self._head["block"]):
            if not self._checked[block]:
                self.check(int(block))
        return self.records[ids]

    def check(self, block: int) -> None:
        """Compare a block with its hash, and every number in it with what it may be. Raises UserError."""
        begin = block * self._head["block"]
        rows = np.ascontiguousarray(self.records[begin : begin + self._head["block"]])
        if hashlib.sha256(rows.data).digest() != self._hashes[block].tobytes():
            raise damaged(self._path, f"records {begin} to {begin + len(rows) - 1} are damaged (sha256 differs)")
        for name, (low, high) in self._head["ranges"].items():
            if rows[name].min() < low or rows[name].max() > high:
                raise damaged(self._path, f"records {begin} to {begin + len(rows) - 1}: a {name} outside {low}..{high}")
        before = self.records[begin - 1] if begin else None
        refuse_records(self._path, rows, begin, self._shards.ends, self._shards.bytes, self._shards, before)
        self._checked[block] = True
        self._touched += 1
        if self._touched % LET_GO == 0:  # what was read stays in the system's cache, but no longer counts as ours
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def all(self) -> np.ndarray:
        """All records. Raises UserError where a block is damaged."""
        for block in np.flatnonzero(~self._checked):
            self.check(int(block))
        return self.records


def _load(folder: Path, name: str, head: dict[str, Any], dtype: np.dtype, count: int) -> np.ndarray:
    path = folder / name
    try:
        if file_sha256(path) != head["sha256"][name]:
            raise damaged(path, "damaged, cut short or not the one that index.json belongs to (sha256 differs)")
        table = np.load(path, allow_pickle=False)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise damaged(path, f"not a NumPy table ({error})") from None
    if table.dtype != dtype or table.shape != (count,):
        raise damaged(path, f"{table.shape} records of {table.dtype} where {count} are expected")
    return table


def _mapped(path: Path, head: dict[str, Any]) -> Any:
    try:
        if file_sha256(path) != head["sha256"][path.name]:
            raise damaged(path, "damaged, cut short or not the one that index.json belongs to (sha256 differs)")
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read ({error})") from None


def _is_utf8(data: Any) -> bool:
    try:
        bytes(data).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
