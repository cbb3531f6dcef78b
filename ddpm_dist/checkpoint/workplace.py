"""Where the owner of a run directory makes new files, so that nothing of it arrives after another process has taken over.

``checkpoints/generation_N/owner.json`` says who the owner is, ``generation_N/work_TOKEN/`` is its workplace: every new version of a
file is made there and renamed to its place. A takeover renames ``generation_N`` (see ownership.py), and with that every rename of the
former owner fails.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWNER = "owner.json"
GENERATION = re.compile(r"generation_(\d{8,})")
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)  # ESTALE: how NFS says that another host has replaced a file


@dataclass(frozen=True)
class Workplace:
    """One generation of ownership, as every rank of the owner sees it."""

    folder: Path  # the run directory
    number: int
    token: str  # of this owner alone

    @property
    def generation(self) -> Path:
        return generation_folder(self.folder, self.number)

    @property
    def work(self) -> Path:
        # A name that never comes again: a network file system may know a renamed folder by its old name for a while, and a run
        # directory that was removed may have been made anew.
        return self.generation / f"work_{self.token}"

    def aside(self, target: Path) -> Path:
        """Where to make the new version of ``target``, a file of the run directory."""
        return self.work / target.name

    def place(self, target: Path) -> None:
        """Rename ``aside(target)`` to ``target``. OSError when another process has taken over."""
        aside = self.aside(target)
        try:
            os.rename(aside, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # checkpoints/ is a link to another file system, from where nothing can be renamed: ask just before it instead.
            beside = target.with_name(f"{target.name}.incomplete")
            shutil.copyfile(aside, beside)
            if self.taken_over() is not None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(aside)) from None
            os.replace(beside, target)
            aside.unlink()

    def write_text(self, target: Path, text: str) -> None:
        """Replace ``target`` as a whole. OSError when another process has taken over."""
        self.aside(target).write_text(text, encoding="utf-8")
        self.place(target)

    def remove(self, target: Path) -> None:
        """Remove a file of the run directory if it is there. Nothing happens when another process has taken over."""
        try:
            os.rename(target, self.aside(target))
        except OSError as error:
            if error.errno == errno.EXDEV and self.taken_over() is None:
                target.unlink(missing_ok=True)
            elif error.errno not in GONE:
                raise

    def renew(self, target: Path) -> None:
        """Put a copy in the place of ``target``, if there is one: what a former owner still has open is then another file."""
        if target.exists():
            shutil.copyfile(target, self.aside(target))
            self.place(target)

    def taken_over(self) -> str | None:
        """None while this generation is the owner's (as far as can be known); else what happened, in words."""
        try:
            # Opened rather than looked at: that makes NFS ask the server.
            os.close(os.open(self.work, os.O_RDONLY))
            return None
        except OSError as error:
            if error.errno not in GONE:
                return None
        try:
            newest = newest_generation(self.folder) or 0
            owner = look(generation_folder(self.folder, newest)).owner
            mine = owner.get("token") == self.token
            if newest > self.number or (newest and not mine):
                owner = {} if mine else owner  # mine: the other has claimed it and not yet said who it is
                return f"another process ({who(owner)}) has taken over run directory {self.folder}; nothing was written after that"
        except OSError:
            return None
        return f"{self.generation} is gone: run directory {self.folder} was moved or removed; nothing was written after that"


@dataclass(frozen=True)
class Seen:
    """owner.json at one moment. ``looks`` changes with every sign of life, None: no such file; ``unlocked``: its lock is free."""

    looks: tuple[int, int, int] | None
    owner: dict[str, Any]
    unlocked: bool
    device: int


def look(generation: Path) -> Seen:
    """Read a generation's owner.json; one that is damaged names no owner. Raises OSError when it cannot be read."""
    try:
        handle = os.open(generation / OWNER, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in GONE:
            return Seen(None, {}, False, 0)
        raise
    try:
        facts, owner, unlocked = os.fstat(handle), {}, False
        with contextlib.suppress(ValueError, RecursionError):
            owner = json.loads(os.pread(handle, 10_000, 0))
        if not isinstance(owner, dict):
            owner = {}
        if owner.get("locked"):
            with contextlib.suppress(OSError):
                # Shared: several processes that look at the same time must not take each other for the owner.
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                unlocked = True
        return Seen((facts.st_ino, facts.st_mtime_ns, facts.st_size), owner, unlocked, facts.st_dev)
    finally:
        os.close(handle)


def generation_folder(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"generation_{number:08d}"


def newest_generation(folder: Path) -> int | None:
    """The number of the current generation of a run directory, None before the first."""
    try:
        names = os.listdir(folder / "checkpoints")
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
    return max((int(match[1]) for name in names if (match := GENERATION.fullmatch(name))), default=None)


def who(owner: dict[str, Any]) -> str:
    """An owner in words."""
    if "host" not in owner:
        return "unknown"
    job = f", SLURM job {owner['slurm_job']}" if owner.get("slurm_job") else ""
    return f"host {owner['host']}, pid {owner.get('pid')}{job}"
