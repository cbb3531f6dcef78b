"""A folder that appears complete or not at all: written aside, flushed to disk, put in place by one rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ddpm_dist.errors import UserError

OUR_FILES = re.compile(r"[a-z0-9-]+-\d{6,}\.tar|index\.(json|npy)")


@contextlib.contextmanager
def folder_in_one_piece(out: Path) -> Iterator[Path]:
    """Yield ``OUT.incomplete`` to write into; when the block ends well it is flushed to disk and renamed to ``out``.

    When the block raises, what it wrote is removed. A leftover of a pack that was killed is replaced.

    Raises:
        UserError: ``out`` exists and is not an empty folder, another pack is writing there, something that is not ours
            lies in the way, or the file system refuses (full, read-only, no permission).
    """
    out = Path(os.path.realpath(out))
    aside = out.with_name(out.name + ".incomplete")
    with disk_errors(out):
        check_free(out)
        lock = _make_aside(aside)
        try:
            try:
                yield aside
                fsync_folder(aside)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            publish(aside, out)
        finally:
            os.close(lock)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What the file system refuses becomes a UserError that names ``out``."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space or choose another --out; nothing was kept" if full else "choose another --out"
        raise UserError(f"cannot write {out}: {error.strerror or error}; {advice}") from None


def check_free(out: Path) -> None:
    """Raises UserError unless ``out`` can become the finished folder: it does not exist yet, or is an empty folder."""
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another --out, or remove it first")
        if os.path.ismount(out):
            raise UserError(f"{out} is a mount point and cannot be replaced as a whole: use a folder inside it")
    elif os.path.lexists(out):
        raise UserError(f"{out} exists and is not a folder: choose another --out")


def _make_aside(aside: Path) -> int:
    """Create ``aside`` empty and lock it; returns the descriptor that holds the lock."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(aside):
        if aside.is_symlink() or not aside.is_dir():
            raise UserError(f"{aside} is in the way and is not a leftover of pack: move it away")
        lock = lock_folder(aside)
        try:
            with os.scandir(aside) as entries:
                alien = [entry.name for entry in entries if not _is_ours(entry)]
            if alien:
                raise UserError(
                    f"{aside} is in the way and holds something that pack did not write ({alien[0]}): move it away"
                )
            shutil.rmtree(aside)
        finally:
            os.close(lock)
    os.mkdir(aside)
    return lock_folder(aside)


def _is_ours(entry: os.DirEntry) -> bool:
    return OUR_FILES.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


class Busy(UserError):
    """Another process holds the lock of a folder."""


def lock_folder(folder: Path) -> int:
    """Lock a folder until the returned descriptor is closed (or its process ends). Raises Busy if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Busy(f"another pack is writing {folder}: wait for it, or choose another --out") from None
    except OSError:
        pass  # some network file systems have no locks; then two packs must not share one --out
    return descriptor


def publish(aside: Path, out: Path) -> None:
    """Rename a flushed folder to ``out`` for good. Raises UserError that says where the data is if that is refused."""
    try:
        os.rename(aside, out)  # replaces an empty folder, and only an empty one
    except OSError as error:
        raise UserError(
            f"{out} cannot be put in place ({error.strerror}): the complete data is in {aside}, rename it yourself"
        ) from None
    fsync_folder(out.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
