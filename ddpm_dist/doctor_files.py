"""What the doctor measures in one folder:  python -m ddpm_dist.doctor_files FOLDER WHAT. Prints JSON and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEGABYTES = 64
SMALL_FILES = 10
LOCKED = "import fcntl, sys; fcntl.{}(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def measure(folder: Path) -> dict[str, Any]:
    """Free space and kind of the file system, speed of writing, flushing, renaming and reading, and whether locks hold.

    A folder that does not exist yet is judged by the nearest one above it. ``error``: why nothing could be written, or None.
    """
    there = folder.absolute()
    while not there.is_dir() and there != there.parent:
        there = there.parent
    said: dict[str, Any] = {
        "folder": str(folder) if there == folder.absolute() else f"{folder}, so far {there}", "kind": kind(there), "error": None,
        "free_gb": shutil.disk_usage(there).free / 1e9, "read_mb_per_s": read_speed(there) if there == folder.absolute() else None,
    }  # fmt: skip
    file = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), there)
    if not file.is_dir():
        said["error"] = f"cannot be made: {file} is a file"
        return said
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor_", dir=there) as name:
            said |= written(Path(name))
    except OSError as error:
        said["error"] = f"cannot be written: {error.strerror}"
    return said


def written(folder: Path) -> dict[str, Any]:
    block = os.urandom(1 << 20)  # nothing that a file system could compress
    started = time.perf_counter()
    with open(folder / "large", "wb") as file:
        for _ in range(MEGABYTES):
            file.write(block)
        flush(file)
    speed = MEGABYTES * 1.048576 / (time.perf_counter() - started)
    started = time.perf_counter()
    for number in range(SMALL_FILES):  # as every file of a checkpoint, and at last its folder, is published
        with open(folder / "small.incomplete", "wb") as file:
            file.write(block[:1000])
            flush(file)
        os.rename(folder / "small.incomplete", folder / f"small{number}")
    publish = (time.perf_counter() - started) / SMALL_FILES * 1e3
    if (folder / "large").read_bytes()[-len(block) :] != block:
        raise OSError(5, "other bytes were read than were written")
    return {
        "write_mb_per_s": speed,
        "publish_ms": publish,
        **{name: locks(folder, name) for name in ("flock", "lockf")},
    }


def flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def locks(folder: Path, name: str) -> bool:
    """Whether a lock that this process holds is refused to another one, and given to it afterwards."""
    lock: Callable[[Any, int], None] = getattr(fcntl, name)
    other = [sys.executable, "-S", "-c", LOCKED.format(name), str(folder / "small0")]

    def taken_by_other() -> bool:
        return subprocess.run(other, stderr=subprocess.DEVNULL, timeout=30, check=False).returncode == 0

    try:
        with open(folder / "small0", "r+b") as file:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if taken_by_other():
                return False
            lock(file, fcntl.LOCK_UN)
            return taken_by_other()
    except OSError:
        return False


def read_speed(folder: Path) -> float | None:
    """MB/s of reading the largest shard below a folder, past the page cache where the system allows it; None without shards."""
    shards = [path for pattern in ("*.tar", "*/*.tar") for path in folder.glob(pattern)][:200]
    if not shards:
        return None
    largest = max(shards, key=lambda path: path.stat().st_size)
    with contextlib.suppress(OSError), open(largest, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, count = time.perf_counter(), 0
        while count < MEGABYTES << 20 and (block := file.read(1 << 20)):
            count += len(block)
        return count / 1e6 / (time.perf_counter() - started)
    return None


def kind(folder: Path) -> str:
    """The file system's name as /proc/mounts has it, such as ext4, nfs4 or lustre."""
    found, longest = "unknown", -1
    for line in Path("/proc/mounts").read_text(errors="replace").splitlines():
        _, place, name, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if folder.is_relative_to(place) and len(place) >= longest:
            found, longest = name, len(place)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
