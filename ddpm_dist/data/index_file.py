"""The files of an index, ``index.json`` and ``index.npy``: writing, reading, and checking every number in them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ddpm_dist.errors import UserError

FORMAT = "ddpm_dist-index"
VERSION, LARGE_VERSION = 1, 2  # the second: large_index.py
IMAGE_FORMATS = ("jpg", "png", "webp", "raw")
NO_LABEL = -1
MAX_JSON_BYTES = 256 << 20  # about a million shards; anything above is not an index

# 28 bytes: offset and size of the image bytes inside the shard, their checksum, label (-1 = none), pixels.
SAMPLE_DTYPE = np.dtype(
    [("offset", "<u8"), ("checksum", "<u8"), ("size", "<u4"), ("label", "<i4"), ("height", "<u2"), ("width", "<u2")]
)


def digest(data: bytes) -> bytes:
    """The 8 bytes of the checksum of a sample's image bytes: blake2b."""
    return hashlib.blake2b(data, digest_size=8).digest()


def checksum(data: bytes) -> int:
    """The same as a number, as the table of the index holds it: little endian, 64 bit."""
    return int.from_bytes(digest(data), "little")


def file_sha256(path: Path) -> str:
    """sha256 of a file as hex digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Shard:
    """One tar file: its name inside the folder, how many samples it holds, its size in bytes and its sha256."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write_index(
    folder: Path, shards: list[Shard], samples: np.ndarray, classes: list[str] | None, channels: int, image_format: str
) -> str:
    """Write ``index.npy`` and ``index.json`` into ``folder``, flushed to disk, and return the fingerprint.

    Args:
        samples: (N,) array of ``SAMPLE_DTYPE``, shard after shard.
    """
    durable(folder / "index.npy", lambda file: np.save(file, samples, allow_pickle=False))
    head = {
        "format": FORMAT,
        "version": VERSION,
        "samples": len(samples),
        "classes": classes,
        "channels": channels,
        "image_format": image_format,
        "index_sha256": file_sha256(folder / "index.npy"),
        "shards": [asdict(shard) for shard in shards],
    }
    head["fingerprint"] = fingerprint(shards, samples, classes, channels, image_format)
    text = json.dumps(head, indent=1) + "\n"
    durable(folder / "index.json", lambda file: file.write(text.encode("ascii")))
    return head["fingerprint"]


def fingerprint(
    shards: list[Shard], samples: np.ndarray, classes: list[str] | None, channels: int, image_format: str
) -> str:
    """sha256 (hex) over what defines the data: shard names and counts, sample table, classes, channels and format."""
    parts = {
        "shards": [[shard.name, shard.samples] for shard in shards],
        "table": hashlib.sha256(np.ascontiguousarray(samples)).hexdigest(),
        "classes": classes,
        "channels": channels,
        "image_format": image_format,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def durable(path: Path, write) -> None:
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


# ---- reading and checking -------------------------------------------------------------------------------------------

REMEDY = "pack again (python -m ddpm_dist.pack), or copy the folder again"


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; {REMEDY}")


def read_head(folder: Path) -> dict:
    """What index.json holds, of a version that is known; not checked any further. Raises UserError."""
    path = folder / "index.json"
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".incomplete")
        hint = f" ({unfinished} is there: that pack did not finish)" if unfinished.exists() else ""
        raise UserError(f"no shard folder {folder}{hint}: make it with python -m ddpm_dist.pack SOURCE --out {folder}")
    if not path.is_file():
        state = "is empty" if not any(folder.iterdir()) else "holds no index.json"
        raise UserError(f"shard folder {folder} {state}: data.shards must name the folder that pack wrote (--out)")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise damaged(path, f"larger than {MAX_JSON_BYTES >> 20} MiB, so not an index")
        head = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise damaged(path, "not valid JSON") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise damaged(path, f"not an index of ddpm_dist (no format {FORMAT!r})")
    if head.get("version") not in (VERSION, LARGE_VERSION):
        raise UserError(
            f"{path}: index version {head.get('version')!r} is not one this program knows (it knows {VERSION} and {LARGE_VERSION}): "
            "update ddpm_dist, or pack again"
        )
    return head


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def check_head(path: Path, head: dict) -> None:
    """Types and ranges of an index.json of version 1; the shard entries become ``Shard`` objects."""
    rules = {
        "samples": (is_count, "a count"),
        "channels": (lambda value: is_count(value) and value in (1, 3), "1 or 3"),
        "image_format": (
            lambda value: isinstance(value, str) and value in IMAGE_FORMATS,
            f"one of {', '.join(IMAGE_FORMATS)}",
        ),
        "classes": (lambda value: value is None or (value != [] and is_names(value)), "null or a list of names"),
        "index_sha256": (is_hash, "a sha256"),
        "fingerprint": (is_hash, "a sha256"),
        "shards": (lambda value: isinstance(value, list) and value != [], "a list of shards"),
    }
    for key, (good, what) in rules.items():
        if key not in head or not good(head[key]):
            raise damaged(path, f"{key} is not {what}")
    head["shards"] = [_check_shard(path, number, entry) for number, entry in enumerate(head["shards"])]
    if len({shard.name for shard in head["shards"]}) != len(head["shards"]):
        raise damaged(path, "the same shard is listed twice")
    total = sum(shard.samples for shard in head["shards"])
    if total != head["samples"]:
        raise damaged(path, f"the shards hold {total} samples, but samples is {head['samples']}")


def _check_shard(path: Path, number: int, entry: object) -> Shard:
    if not isinstance(entry, dict) or set(entry) != {"name", "samples", "bytes", "sha256"}:
        raise damaged(path, f"shards[{number}] does not have exactly name, samples, bytes and sha256")
    name = entry["name"]
    # The name is joined to the folder, so it must stay a plain file name in it.
    if not isinstance(name, str) or not name.endswith(".tar") or "/" in name or "\\" in name or "\0" in name:
        raise damaged(path, f"shards[{number}].name {name!r} is not the plain name of a .tar file in this folder")
    if not is_count(entry["samples"]) or entry["samples"] == 0 or not is_count(entry["bytes"]):
        raise damaged(path, f"shards[{number}] ({name}): samples and bytes must be positive counts")
    if not is_hash(entry["sha256"]):
        raise damaged(path, f"shards[{number}] ({name}): sha256 is not a sha256")
    return Shard(**entry)


def read_table(folder: Path, head: dict) -> np.ndarray:
    path = folder / "index.npy"
    try:
        if file_sha256(path) != head["index_sha256"]:
            raise damaged(path, "damaged, cut short or not the one that index.json belongs to (sha256 differs)")
        samples = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # a plain view: memmap indexing is slow
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise damaged(path, f"not a NumPy table ({error})") from None
    if samples.dtype != SAMPLE_DTYPE or samples.shape != (head["samples"],):
        raise damaged(path, f"{samples.shape} records of {samples.dtype} where {head['samples']} samples are expected")
    return samples


def check_table(folder: Path, head: dict, samples: np.ndarray) -> None:
    """Every record must lie inside its shard, behind the one before it, with a label that the classes allow."""
    path, shards = folder / "index.npy", head["shards"]
    ends = np.cumsum([shard.samples for shard in shards])
    refuse_records(path, samples, 0, ends, np.array([shard.bytes for shard in shards], dtype=np.uint64), shards, None)
    label = samples["label"]
    if head["classes"] is None:
        _refuse_where(path, shards, ends, 0, label != NO_LABEL, "has a label, but there are no classes")
    else:
        bad = (label < 0) | (label >= len(head["classes"]))
        _refuse_where(path, shards, ends, 0, bad, f"has a label outside 0..{len(head['classes']) - 1}")
    expected = fingerprint(shards, samples, head["classes"], head["channels"], head["image_format"])
    if expected != head["fingerprint"]:
        raise damaged(folder / "index.json", "the fingerprint does not fit the data it stands for")


def ranges(samples: np.ndarray) -> dict[str, list[int]]:
    """Least and largest label, height and width."""
    return {name: [int(samples[name].min()), int(samples[name].max())] for name in ("label", "height", "width")}


def refuse_records(
    path: Path, rows: np.ndarray, begin: int, ends: np.ndarray, sizes: np.ndarray, shards: Sequence[Shard], before: np.void | None
) -> None:  # fmt: skip
    """UserError unless every record lies inside its shard, behind the one before it, and is not empty.

    Args:
        rows: records ``begin`` and following; before: the record before them, where there is one.
        ends, sizes: (S,) one past each shard's last sample, and its bytes (uint64).
    """
    ids = np.arange(begin, begin + len(rows))
    number = np.searchsorted(ends, ids, side="right")
    offset = rows["offset"].astype(np.uint64)
    end = offset + rows["size"]
    last = np.uint64(0) if before is None else np.uint64(int(before["offset"]) + int(before["size"]))
    previous = np.concatenate([[last], end[:-1]]).astype(np.uint64)  # where the sample before it in the same shard ends
    previous[ids == np.concatenate([[0], ends])[number]] = 0
    refuse = functools.partial(_refuse_where, path, shards, ends, begin)
    refuse((offset % 512 != 0) | (offset < previous + np.uint64(512)), "is not on a tar block behind the one before it")
    refuse((end > sizes[number]) | (end < offset), "does not lie inside its shard")
    refuse((rows["size"] == 0) | (rows["height"] == 0) | (rows["width"] == 0), "is empty")


def _refuse_where(
    path: Path, shards: Sequence[Shard], ends: np.ndarray, begin: int, bad: np.ndarray, what: str
) -> None:
    if bad.any():
        first = begin + int(np.argmax(bad))
        number = int(np.searchsorted(ends, first, side="right"))
        raise damaged(path, f"sample {first} (shard {shards[number].name}) {what}")
