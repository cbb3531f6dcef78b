"""Which checkpoints there are, and which of them are kept. Only intact ones count."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ddpm_dist.checkpoint.format import STEP_FOLDER, Damaged, check_files, read_manifest
from ddpm_dist.errors import UserError


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def published(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the published checkpoints, newest first: by number, never by clock."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), path) for path in root.iterdir() if (m := STEP_FOLDER.fullmatch(path.name)) and path.is_dir()]
    return sorted(found, reverse=True)


def reaches(step: int, global_batch: int, every: int | None) -> bool:
    """True for the first step whose images reach a new multiple of ``every``."""
    return every is not None and step * global_batch // every > (step - 1) * global_batch // every


class Retention:
    """Keeps the newest ``keep_last`` intact checkpoints and those at a multiple of ``keep_every`` images.

    A damaged one neither counts nor is removed: the next start sets it aside by name. To know, the files are hashed; a file
    whose inode, size and times are as they were is not hashed a second time by this process.
    """

    def __init__(self, keep_last: int, keep_every: int | None, global_batch: int) -> None:
        self._keep_last, self._keep_every, self._global_batch = keep_last, keep_every, global_batch
        self._known: dict[Path, tuple[Any, bool]] = {}  # what the files looked like, and whether they were intact

    def trust(self, folder: Path) -> None:
        """Take a checkpoint as intact that this process has just written and hashed on the way."""
        self._known[folder] = (_looks(folder), True)

    def surplus(self, root: Path, saved: int) -> list[Path]:
        """The folders to remove, never that of step ``saved``. Reads files: not for the training thread."""
        kept, surplus = 0, []
        for step, folder in published(root):
            protected = step == saved or reaches(step, self._global_batch, self._keep_every)
            if kept >= self._keep_last and protected:
                continue  # kept anyway: no need to read it
            if not self._is_intact(folder):
                continue
            kept += 1
            if kept > self._keep_last and not protected:
                surplus.append(folder)
        self._known = {folder: facts for folder, facts in self._known.items() if folder not in surplus}
        return surplus

    def _is_intact(self, folder: Path) -> bool:
        try:
            looks = _looks(folder)
        except OSError:
            return False
        known = self._known.get(folder)
        if known is not None and known[0] == looks:
            return known[1]
        intact = True
        try:
            check_files(folder, read_manifest(folder))
        except (Damaged, UserError, OSError) as error:  # UserError: of a newer version, which cannot be judged here
            intact = False
            print(
                f"warning: {error}; {folder.name} does not count for checkpoint.keep_last", file=sys.stderr, flush=True
            )
        self._known[folder] = (looks, intact)
        return intact


def _looks(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """What changes when a file of the folder changes: name, inode, size, times of content and of inode."""
    return sorted(
        (path.name, (s := path.lstat()).st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path in folder.iterdir()
    )
