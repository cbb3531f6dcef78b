"""JSON-lines files of a run (metrics.jsonl, audit.jsonl): appended line by line, cut back to a checkpoint's step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from ddpm_dist.errors import UserError
from ddpm_dist.tracking.progress import warn


class Workplace(Protocol):
    """Where new versions of a run's files are made before they replace the old ones (see checkpoint/ownership.py)."""

    def aside(self, target: Path) -> Path: ...

    def place(self, target: Path) -> None: ...


def to_line(record: dict) -> bytes:
    """One JSON object and a newline, UTF-8.

    Non-finite floats become ``null`` (JSON has no NaN); numpy and torch scalars become numbers.

    Raises TypeError for values that JSON cannot hold.
    """
    try:
        text = json.dumps(record, allow_nan=False, default=_plain)
    except (ValueError, RecursionError):
        text = json.dumps(_finite(record), allow_nan=False, default=_plain)
    return text.encode() + b"\n"


def _plain(value):
    """Numpy and torch scalars to Python numbers, paths to strings."""
    if hasattr(value, "item"):
        return _finite(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written to a JSON line")


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_lines(path: Path, after: int = -1) -> Iterator[dict]:
    """The records of a JSON-lines file whose integer ``step`` is greater than ``after``, in file order.

    Lines that cannot be read (a torn last line, a damaged block) are passed over; a missing file has no records.
    """
    try:
        stream = open(path, "rb")
    except FileNotFoundError:
        return
    with stream:
        for line in stream:
            record = _parse(line)
            if record is not None and record["step"] > after:
                yield record


def _parse(line: bytes) -> dict | None:
    """The record of one line, or None if the line is torn, is no JSON object or has no integer ``step``."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the first covers UnicodeDecodeError too
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record


def cut_back(path: Path, step: int, workplace: Workplace | None = None) -> None:
    """Drop the lines with ``record["step"] > step`` and a torn last line from a JSON-lines file.

    The shortened file is written aside (None: beside the old one), made durable and renamed; a file that needs no change is not touched, and a
    missing file is left missing. Damaged lines in the middle are dropped with a warning that counts them. The remaining
    lines keep their bytes.
    """
    path = Path(path)
    try:
        source = open(path, "rb")
    except FileNotFoundError:
        return
    aside = path.with_name(path.name + ".incomplete") if workplace is None else workplace.aside(path)
    try:
        with source, open(aside, "wb") as kept:
            changed, damaged = _copy_until(source, kept, step)
        if changed and workplace is not None:
            workplace.place(path)
        elif changed:
            os.replace(aside, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot cut back to step {step} ({error.strerror}); make room or fix access, start again"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    if damaged:
        warn(f"{path}: {damaged} damaged line(s) dropped")


def _copy_until(source: BinaryIO, kept: BinaryIO, step: int) -> tuple[bool, int]:
    """Copy the lines up to ``step`` durably; whether anything was left out, and how many damaged whole lines."""
    changed, damaged = False, 0
    for line in source:
        record = _parse(line)
        if record is not None and record["step"] <= step:
            kept.write(line)
        else:
            changed = True
            damaged += record is None and line.endswith(b"\n")
    kept.flush()
    os.fsync(kept.fileno())
    return changed, damaged


class JsonLines:
    """An append-only JSON-lines file whose every line reaches the operating system before ``append`` returns.

    A write that fails (disk full, quota) warns once, is counted in ``lost`` and leaves no half line behind: the file is
    truncated to its last whole line. Later lines are tried again, so logging resumes when there is room.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.lost = 0
        self._file: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size

    def append(self, record: dict) -> None:
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        line = to_line(record)
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError as error:
            self._drop_half_line()
            self.lost += 1
            if self.lost == 1:
                warn(
                    f"{self.path}: cannot write ({error.strerror}); the run goes on, lines are lost until there is room"
                )
            return
        self._size += len(line)

    def _drop_half_line(self) -> None:
        with suppress(OSError):  # cut_back() drops what is torn when the run is continued
            os.ftruncate(self._file, self._size)

    def close(self) -> None:
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        if self.lost:
            warn(f"{self.path}: {self.lost} line(s) could not be written")
