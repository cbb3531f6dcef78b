"""A folder of our own files that is replaced as a whole: what is there stays until the new one is complete, then they change places."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ddpm_dist.data.publish import disk_errors, fsync_folder, lock_folder
from ddpm_dist.errors import UserError

AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def folder_replaced(out: Path, ours: frozenset[str]) -> Iterator[Path]:
    """Yield ``OUT.incomplete`` to write into; when the block ends well it is flushed to disk and takes the place of ``out``.

    When the block raises, what it wrote is removed and ``out`` is untouched.

    Args:
        out: does not exist yet, is empty, or holds nothing but files with names in ``ours``.

    Raises:
        UserError: ``out`` or ``OUT.incomplete`` holds something else, another process writes there, or the file system refuses.
    """
    out = Path(os.path.realpath(out))
    aside = out.with_name(out.name + ".incomplete")
    with disk_errors(out):
        refuse_alien(out, ours)
        refuse_alien(aside, ours)
        aside.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(aside)
        try:
            for name in os.listdir(aside):  # of a process that was killed
                os.unlink(aside / name)
            try:
                yield aside
                fsync_folder(aside)
                refuse_alien(out, ours)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            _change_places(aside, out)
            fsync_folder(out.parent)
        finally:
            os.close(lock)


def refuse_alien(folder: Path, ours: frozenset[str]) -> None:
    """UserError unless a folder may be replaced: it is not there, or holds nothing but plain files with names in ``ours``."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} exists and is not a folder: choose another --out")
    if os.path.ismount(folder):
        raise UserError(f"{folder} is a mount point and cannot be replaced as a whole: use a folder inside it")
    with os.scandir(folder) as entries:
        alien = sorted(e.name for e in entries if e.name not in ours or not e.is_file(follow_symlinks=False))
    if alien:
        raise UserError(
            f"{folder} holds {alien[0]}, which is no part of an index: choose another --out, a folder of its own"
        )


def _change_places(aside: Path, out: Path) -> None:
    if not out.exists():
        os.rename(aside, out)
        return
    if not _exchange(aside, out):  # a file system without that operation: for a moment there is no ``out``
        old = out.with_name(out.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
        os.rename(aside, out)
        aside = old
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the two names could be exchanged in one operation (Linux). Raises OSError where that was refused for good."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
