"""The checkpoint format: tensors by name in pieces, whatever engine or world size wrote them.

A checkpoint is a folder ``step_00001000`` with

* ``rank_00000.safetensors`` ...: each rank's pieces. A piece is a contiguous part of a tensor in row-major order; a tensor that
  lies in one piece is stored under its own name and shape.
* ``state.json``: everything that is not a tensor (step, images seen, config, data fingerprint ...).
* ``manifest.json``: the format's version, size and sha256 of every file, and where each tensor's pieces lie. It carries its own
  sha256, so that no file of a checkpoint is trusted unread. Nothing is pickled.

Tensor names: ``model/NAME``, ``buffer/NAME``, ``optim.exp_avg/NAME``, ``optim.exp_avg_sq/NAME``, ``optim.step/NAME``, ``ema.K/NAME``
with the network's own parameter names.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpm_dist.checkpoint import files
from ddpm_dist.errors import UserError

STEP_FOLDER = re.compile(r"step_(\d{8,})")
FORMAT, VERSION = "ddpm_dist.checkpoint", 1
MANIFEST, STATE = "manifest.json", "state.json"
MAX_JSON_BYTES = 256 * 2**20
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bfloat16: "BF16", torch.float64: "F64",
           torch.bool: "BOOL", torch.uint8: "U8", torch.float16: "F16"}  # fmt: skip
_SIZES = {"F32": 4, "I64": 8, "I32": 4, "BF16": 2, "F64": 8, "BOOL": 1, "U8": 1, "F16": 2}


@dataclass(frozen=True)
class Piece:
    """``data``: elements start .. start + data.numel() - 1 of the flattened tensor ``tensor`` of shape ``shape``."""

    tensor: str
    shape: tuple[int, ...]
    start: int
    data: Tensor

    @property
    def whole(self) -> bool:
        return self.data.numel() == math.prod(self.shape)

    def to_host(self) -> Piece:
        """A private copy in host memory; on a GPU the copy is asynchronous: synchronise before reading it."""
        data = self.data.detach()
        if data.device.type == "cuda":
            host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
            host.copy_(data, non_blocking=True)
        else:
            host = data.clone(memory_format=torch.contiguous_format)
        return Piece(self.tensor, self.shape, self.start, host)


def write_pieces(path: Path, pieces: list[Piece]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write one safetensors file, streaming; returns (bytes and sha256 of the file, table of its pieces).

    Written here rather than by the safetensors package so that it is hashed on the way and no second copy is held.
    """
    header: dict[str, Any] = {}
    table, offset = [], 0
    for piece in pieces:
        key = piece.tensor if piece.whole else f"{piece.tensor}@{piece.start}"
        dtype = _DTYPES[piece.data.dtype]
        size = piece.data.numel() * piece.data.element_size()
        shape = list(piece.shape) if piece.whole else [piece.data.numel()]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        table.append({"tensor": piece.tensor, "dtype": dtype, "shape": list(piece.shape), "file": path.name, "key": key,
                      "start": piece.start, "stop": piece.start + piece.data.numel()})  # fmt: skip
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for piece in pieces:
            data = piece.data.contiguous()
            if data.numel():
                yield memoryview(data.flatten().view(torch.uint8).numpy())

    return files.write(path, chunks()), table


def manifest_text(step: int, written: dict[str, Any], tables: Iterable[list[dict[str, Any]]]) -> bytes:
    """The manifest as JSON, sealed with its own sha256. ``written``: file name -> {"bytes", "sha256"}."""
    tensors: dict[str, Any] = {}
    for table in tables:
        for row in table:
            entry = tensors.setdefault(row["tensor"], {"dtype": row["dtype"], "shape": row["shape"], "pieces": []})
            entry["pieces"].append([row["file"], row["key"], row["start"], row["stop"]])
    for name, entry in tensors.items():
        entry["pieces"].sort(key=lambda piece: piece[2])
        _check_cover(name, entry)
    body = {"format": FORMAT, "version": VERSION, "step": step, "files": written, "tensors": tensors}
    return json.dumps({"manifest": body, "sha256": _seal(body)}, indent=1).encode()


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_cover(name: str, entry: dict[str, Any]) -> None:
    end = 0
    for _, _, start, stop in entry["pieces"]:
        if start != end:
            raise ValueError(f"the pieces of {name} do not fit together at element {end}")
        end = stop
    if end != math.prod(entry["shape"]):
        raise ValueError(f"the pieces of {name} end at element {end} of {math.prod(entry['shape'])}")


class Damaged(Exception):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


class TooNew(UserError):
    """A checkpoint of a version that this program does not know: it is not damaged, and an older one is no substitute for it."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parse and check the manifest and compare it with the names and sizes in the folder. Raises Damaged.

    A version this program does not know raises TooNew instead.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise Damaged(f"{path}: absurdly large")
        sealed = json.loads(path.read_bytes())
        body, seal = sealed["manifest"], sealed["sha256"]
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(f"{path}: not a manifest (damaged or cut off)") from None
    if not isinstance(body, dict) or len(sealed) != 2 or _seal(body) != seal:
        raise Damaged(f"{path}: does not match its own sha256")
    if body.get("format") != FORMAT:
        raise Damaged(f"{path}: format is {body.get('format')!r}, not {FORMAT}")
    if body.get("version") != VERSION:
        raise TooNew(
            f"{path}: format version {body.get('version')}, this ddpm_dist knows version {VERSION}; use a newer ddpm_dist"
        )
    try:
        _check_contents(folder, body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{path}: not a manifest of this format ({type(error).__name__}: {error})") from None
    return body


def _check_contents(folder: Path, body: dict[str, Any]) -> None:
    named = STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != int(body["step"]):
        raise Damaged(f"{folder / MANIFEST}: belongs to step {body['step']}, the folder is named {folder.name}")
    there = {entry.name for entry in folder.iterdir()}
    for name in sorted(set(body["files"]) - there):
        raise Damaged(f"{folder / name}: missing")
    for name in sorted(there - set(body["files"]) - {MANIFEST}):
        raise Damaged(f"{folder / name}: not part of this checkpoint (the manifest does not list it)")
    for name, facts in body["files"].items():
        if "/" in name or name.startswith(".") or (folder / name).is_symlink():
            raise Damaged(f"{folder / name}: not a plain file of this folder")
        size = (folder / name).stat().st_size
        if size != facts["bytes"]:
            raise Damaged(f"{folder / name}: {size} bytes, should be {facts['bytes']}")
    for name, entry in body["tensors"].items():
        _check_cover(name, entry)
        for file, _, _, _ in entry["pieces"]:
            if file not in body["files"]:
                raise Damaged(f"{folder / MANIFEST}: {name} lies in {file}, which is not a file of this checkpoint")


def check_files(folder: Path, manifest: dict[str, Any], share: int = 0, shares: int = 1) -> None:
    """Compare the sha256 of every ``shares``-th file with the manifest. Raises Damaged naming the file."""
    for name in sorted(manifest["files"])[share::shares]:
        if files.sha256(folder / name) != manifest["files"][name]["sha256"]:
            raise Damaged(f"{folder / name}: does not match its sha256 in {MANIFEST}")


class Reader:
    """Reads a checked checkpoint; only the pieces that are asked for are touched."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.step = folder, int(manifest["step"])
        self._tensors = manifest["tensors"]
        self._open: dict[str, Any] = {}
        try:
            self.state: dict[str, Any] = dict(json.loads((folder / STATE).read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise Damaged(f"{folder / STATE}: {error}") from None

    def hold(self) -> None:
        """Open every file now: from then on it does no harm when the folder is removed. Raises Damaged."""
        for file in {piece[0] for entry in self._tensors.values() for piece in entry["pieces"]}:
            self._file(file)

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that begin with ``prefix``."""
        return [name for name in self._tensors if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise Damaged(f"{self.folder / MANIFEST}: no tensor {name}")
        return tuple(self._tensors[name]["shape"])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, on the CPU. Raises Damaged for a tensor that is not there."""
        parts = []
        self.shape(name)
        for file, key, first, last in self._tensors[name]["pieces"]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                try:
                    flat = self._file(file).get_tensor(key).flatten()
                except SafetensorError as error:  # a manifest that some other program wrote
                    raise Damaged(f"{self.folder / file}: {error}") from None
                if flat.numel() != last - first:
                    raise Damaged(
                        f"{self.folder / file}: {key} has {flat.numel()} elements, should have {last - first}"
                    )
                parts.append(flat[low - first : high - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape."""
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).view(shape)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise Damaged(f"{self.folder / name}: {error}") from None
        return self._open[name]


def open_checkpoint(folder: Path) -> Reader:
    """Check one checkpoint completely and open it. UserError naming the damaged file: a named checkpoint has no substitute."""
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        return Reader(folder, manifest)
    except Damaged as error:
        raise UserError(f"checkpoint {folder.name} is damaged and refused: {error}; name another checkpoint") from None
