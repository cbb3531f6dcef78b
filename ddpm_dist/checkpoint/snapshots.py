"""Snapshots: the averages alone, every ``ema.snapshot_every`` images, kept for good under ``snapshots/`` of the run directory.

From them averages of other lengths are made after the run (``ddpm_dist.reconstruct``). A snapshot has the format of a checkpoint and is
written the same way, beside training, but it is none: nothing resumes from it and no retention counts or removes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ddpm_dist.checkpoint import files
from ddpm_dist.checkpoint.find import SNAPSHOTS
from ddpm_dist.checkpoint.format import Piece
from ddpm_dist.checkpoint.retention import folder_name, published, reaches
from ddpm_dist.checkpoint.store import CheckpointStore
from ddpm_dist.errors import UserError, in_words
from ddpm_dist.runtime import Runtime

Take = Callable[
    [], tuple[Iterable[Piece], dict[str, Any]]
]  # this rank's pieces of the averages, and the state beside them


class Snapshots:
    """The snapshots of one run. Every method is collective. ``work``: the owner's :attr:`Workplace.work`.

    ``every`` None makes none. The set of snapshots is a function of the step: those of a run that was killed and continued are
    those of a run that was not.
    """

    def __init__(self, folder: Path, runtime: Runtime, every: int | None, global_batch: int, work: Path) -> None:
        self.root, self._work = folder / SNAPSHOTS, work / SNAPSHOTS
        self._runtime, self._every, self._global_batch = runtime, every, global_batch
        self._store = None
        if every is not None:
            # keep_every=1: each of them is to be kept.
            self._store = _Store(self.root, runtime, 1, 1, global_batch, self._work)

    def begin(self, step: int, take: Take) -> None:
        """Before training goes on behind ``step``: remove newer snapshots, which will be made again, and make up for a missing one.

        The checkpoint of a step may be there without its snapshot, never without an earlier one, because :meth:`wait` comes before
        each save. Raises UserError when snapshots cannot be kept here.
        """
        self._runtime.together(lambda: self._cut_back(step))
        if self._store is None or not step or not reaches(step, self._global_batch, self._every):
            return
        if self._runtime.broadcast(not (self.root / folder_name(step)).exists() if self._runtime.is_main else None):
            self._store.save(step, *take())

    def after_step(self, step: int, take: Take) -> None:
        """Start a snapshot when it is time for one."""
        if self._store is not None and reaches(step, self._global_batch, self._every):
            self._store.save(step, *take())

    def wait(self) -> None:
        """Wait for the snapshot that is being written."""
        if self._store is not None:
            self._store.wait()

    def _cut_back(self, step: int) -> None:
        if not self._runtime.is_main:
            return
        try:
            newer = [folder for found, folder in published(self.root) if found > step]
            if newer or self._every is not None:
                files.make_folder(self.root)
                files.make_folder(self._work)
                if self.root.stat().st_dev != self._work.stat().st_dev:
                    raise UserError(
                        f"{self.root} and {self.root.parent / 'checkpoints'} lie on different file systems: make {self.root} a link to "
                        "where the checkpoints are, or set ema.snapshot_every=null"
                    )
            for folder in newer:
                files.rename(folder, self._work / f"{folder.name}.removed")
                files.remove_tree(self._work / f"{folder.name}.removed")
        except OSError as error:
            raise UserError(
                f"{self.root} cannot be used for snapshots: {in_words(error)}; make room, or set ema.snapshot_every=null"
            ) from None


class _Store(CheckpointStore):
    def _report(self, step: int, error: str) -> None:
        self.failure = error
        if self._runtime.is_main:
            print(
                f"warning: the snapshot of the averages at step {step} could not be written: {error}; training goes on without it",
                file=sys.stderr,
                flush=True,
            )
