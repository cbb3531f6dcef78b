"""Every file operation of a save, in one place, so that each of them can be made to fail (or to be the last) in a test."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

# A test may set this; it is called before each operation with its name and path.
before_operation: Callable[[str, Path], None] | None = None


def _announce(operation: str, path: Path) -> None:
    if before_operation is not None:
        before_operation(operation, path)


def make_folder(path: Path, parents: bool = False) -> None:
    """``parents`` stays False below a generation folder: one that a takeover has renamed must not come back."""
    _announce("make_folder", path)
    path.mkdir(parents=parents, exist_ok=True)


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write a new file and flush it to the disk; returns {"bytes", "sha256"} of what was handed in."""
    _announce("open", path)
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            size += len(view)
            while view:
                _announce("write", path)
                view = view[file.write(view) :]
        _announce("fsync", path)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_locked(path: Path, describe: Callable[[bool, int], bytes]) -> int:
    """Write and flush a new file and keep it open and locked; returns the descriptor, whose closing frees the lock.

    ``describe(locked, device)`` gives the content: whether the file system has locks, and the file's device number.
    """
    _announce("open", path)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            locked = False
        data = describe(locked, os.fstat(handle).st_dev)
        while data:
            _announce("write", path)
            data = data[os.write(handle, data) :]
        _announce("fsync", path)
        os.fsync(handle)
    except BaseException:
        os.close(handle)
        raise
    return handle


def flush_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    _announce("fsync_folder", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Atomic; an existing file at ``target`` is replaced."""
    _announce("rename", source)
    os.rename(source, target)


def remove_tree(path: Path) -> None:
    """A folder with its content; of a link or a file only itself."""
    _announce("remove_tree", path)
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
