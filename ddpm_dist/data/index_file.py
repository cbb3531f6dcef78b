"""The files of an index, ``index.json`` and ``index.npy``: writing, reading, and checking every number in them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ddpm_dist.errors import UserError

FORMAT = "ddpm_dist-index"
VERSION = 1
IMAGE_FORMATS = ("jpg", "png")
NO_LABEL = -1
MAX_JSON_BYTES = 256 << 20  # about a million shards; anything above is not an index

# 28 bytes: offset and size of the image bytes inside the shard, their checksum, label (-1 = none), pixels.
SAMPLE_DTYPE = np.dtype(
    [("offset", "<u8"), ("checksum", "<u8"), ("size", "<u4"), ("label", "<i4"), ("height", "<u2"), ("width", "<u2")]
)


def checksum(data: bytes) -> int:
    """64 bit checksum of a sample's image bytes: blake2b with an 8 byte digest, little endian."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


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
    _durable(folder / "index.npy", lambda file: np.save(file, samples, allow_pickle=False))
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
    _durable(folder / "index.json", lambda file: file.write(text.encode("ascii")))
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


def _durable(path: Path, write) -> None:
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


# ---- reading and checking -------------------------------------------------------------------------------------------

REMEDY = "pack again (python -m ddpm_dist.pack), or copy the folder again"


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; {REMEDY}")


def read_head(folder: Path) -> dict:
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
            raise _damaged(path, f"larger than {MAX_JSON_BYTES >> 20} MiB, so not an index")
        head = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise _damaged(path, "not valid JSON") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise _damaged(path, f"not an index of ddpm_dist (no format {FORMAT!r})")
    if head.get("version") != VERSION:
        raise UserError(
            f"{path}: index version {head.get('version')!r} is not one this program knows (it knows {VERSION}): "
            "update ddpm_dist, or pack again"
        )
    _check_head(path, head)
    return head


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _check_head(path: Path, head: dict) -> None:
    """Types and ranges of index.json; the shard entries become ``Shard`` objects."""
    rules = {
        "samples": (_is_count, "a count"),
        "channels": (lambda value: _is_count(value) and value in (1, 3), "1 or 3"),
        "image_format": (lambda value: isinstance(value, str) and value in IMAGE_FORMATS, "one of jpg, png"),
        "classes": (lambda value: value is None or (value != [] and _is_names(value)), "null or a list of names"),
        "index_sha256": (_is_hash, "a sha256"),
        "fingerprint": (_is_hash, "a sha256"),
        "shards": (lambda value: isinstance(value, list) and value != [], "a list of shards"),
    }
    for key, (good, what) in rules.items():
        if key not in head or not good(head[key]):
            raise _damaged(path, f"{key} is not {what}")
    head["shards"] = [_check_shard(path, number, entry) for number, entry in enumerate(head["shards"])]
    if len({shard.name for shard in head["shards"]}) != len(head["shards"]):
        raise _damaged(path, "the same shard is listed twice")
    total = sum(shard.samples for shard in head["shards"])
    if total != head["samples"]:
        raise _damaged(path, f"the shards hold {total} samples, but samples is {head['samples']}")


def _check_shard(path: Path, number: int, entry: object) -> Shard:
    if not isinstance(entry, dict) or set(entry) != {"name", "samples", "bytes", "sha256"}:
        raise _damaged(path, f"shards[{number}] does not have exactly name, samples, bytes and sha256")
    name = entry["name"]
    # The name is joined to the folder, so it must stay a plain file name in it.
    if not isinstance(name, str) or not name.endswith(".tar") or "/" in name or "\\" in name or "\0" in name:
        raise _damaged(path, f"shards[{number}].name {name!r} is not the plain name of a .tar file in this folder")
    if not _is_count(entry["samples"]) or entry["samples"] == 0 or not _is_count(entry["bytes"]):
        raise _damaged(path, f"shards[{number}] ({name}): samples and bytes must be positive counts")
    if not _is_hash(entry["sha256"]):
        raise _damaged(path, f"shards[{number}] ({name}): sha256 is not a sha256")
    return Shard(**entry)


def read_table(folder: Path, head: dict) -> np.ndarray:
    path = folder / "index.npy"
    try:
        if file_sha256(path) != head["index_sha256"]:
            raise _damaged(path, "damaged, cut short or not the one that index.json belongs to (sha256 differs)")
        samples = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # a plain view: memmap indexing is slow
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise _damaged(path, f"not a NumPy table ({error})") from None
    if samples.dtype != SAMPLE_DTYPE or samples.shape != (head["samples"],):
        raise _damaged(path, f"{samples.shape} records of {samples.dtype} where {head['samples']} samples are expected")
    return samples


def check_table(folder: Path, head: dict, samples: np.ndarray) -> None:
    """Every record must lie inside its shard, behind the one before it, with a label that the classes allow."""
    path, shards = folder / "index.npy", head["shards"]
    counts = [shard.samples for shard in shards]
    sizes = np.repeat(np.array([shard.bytes for shard in shards], dtype=np.uint64), counts)
    offset = samples["offset"].astype(np.uint64)
    end = offset + samples["size"]
    starts = np.cumsum([0, *counts[:-1]])
    before = np.concatenate([[0], end[:-1]]).astype(np.uint64)  # where the sample before it in the same shard ends
    before[starts] = 0
    refuse = functools.partial(_refuse_where, path, shards)
    refuse((offset % 512 != 0) | (offset < before + np.uint64(512)), "is not on a tar block behind the one before it")
    refuse((end > sizes) | (end < offset), "does not lie inside its shard")
    refuse((samples["size"] == 0) | (samples["height"] == 0) | (samples["width"] == 0), "is empty")
    label = samples["label"]
    if head["classes"] is None:
        refuse(label != NO_LABEL, "has a label, but there are no classes")
    else:
        refuse((label < 0) | (label >= len(head["classes"])), f"has a label outside 0..{len(head['classes']) - 1}")
    expected = fingerprint(shards, samples, head["classes"], head["channels"], head["image_format"])
    if expected != head["fingerprint"]:
        raise _damaged(folder / "index.json", "the fingerprint does not fit the data it stands for")


def _refuse_where(path: Path, shards: list[Shard], bad: np.ndarray, what: str) -> None:
    if bad.any():
        first = int(np.argmax(bad))
        number = int(np.searchsorted(np.cumsum([shard.samples for shard in shards]), first, side="right"))
        raise _damaged(path, f"sample {first} (shard {shards[number].name}) {what}")
