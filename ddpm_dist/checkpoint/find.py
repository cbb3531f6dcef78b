"""Which checkpoint to read, for programs that only read: nothing is set aside or removed, and the run may be training."""

from __future__ import annotations

import sys
from pathlib import Path

from ddpm_dist.checkpoint.format import MANIFEST, Damaged, Reader, TooNew, open_checkpoint
from ddpm_dist.checkpoint.retention import folder_name, published
from ddpm_dist.errors import UserError

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # folders of a run directory


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is itself the folder of a checkpoint (or of a snapshot)."""
    return (path / MANIFEST).is_file()


def run_of(path: Path) -> Path:
    """The run directory that ``path`` is, or whose checkpoint or snapshot it is."""
    path = path.absolute()  # not resolved: checkpoints/ may be a link to another place
    return path.parent.parent if is_checkpoint(path) and path.parent.name in (CHECKPOINTS, SNAPSHOTS) else path


def newest_intact(run: Path) -> Reader:
    """The newest intact checkpoint of a run, its files held open. A damaged one is named on stderr and the one before it taken.

    Raises UserError when there is none, or no such folder, or when the newest is of a version that is not known here.
    """
    if not run.is_dir():
        raise UserError(f"{run} does not exist: give a run directory, a checkpoint folder or a weights file")
    if run.name in (CHECKPOINTS, SNAPSHOTS) and published(run):
        raise UserError(
            f"{run} is the folder of a run's {run.name}: give the run directory {run.parent}, or one of them"
        )
    for _ in range(10):
        problems, vanished = [], False
        for _, folder in published(run / CHECKPOINTS):
            try:
                return held_open(folder)
            except TooNew:
                raise
            except UserError as error:
                if not folder.exists():  # the run that trains has removed it: then there is a newer one
                    vanished = True
                    break
                problems.append(str(error))
                print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
        if not vanished:
            break
    if problems:
        raise UserError(f"no intact checkpoint in {run / CHECKPOINTS}: {problems[0]}")
    if aside := sorted(path.name for path in (run / CHECKPOINTS).glob("step_*.corrupt*")):
        raise UserError(
            f"no intact checkpoint in {run / CHECKPOINTS}: damaged ones were set aside ({', '.join(aside[:5])}); restore one from a "
            "backup"
        )
    raise UserError(f"{run} holds no checkpoint yet: train it first, or give a checkpoint folder or a weights file")


def at_step(run: Path, step: int) -> Reader:
    """The checkpoint of completed step ``step``, or else the snapshot of the averages at that step. UserError lists those there."""
    for kind in (CHECKPOINTS, SNAPSHOTS):
        folder = run / kind / folder_name(step)
        if folder.is_dir():
            return held_open(folder)
    there = {
        kind: ", ".join(str(found) for found, _ in reversed(published(run / kind))) for kind in (CHECKPOINTS, SNAPSHOTS)
    }
    raise UserError(
        f"{run} has nothing at step {step}; checkpoints: {there[CHECKPOINTS] or 'none'}; "
        f"snapshots of the averages: {there[SNAPSHOTS] or 'none'}"
    )


def held_open(folder: Path) -> Reader:
    """Check a checkpoint completely and open all its files, so that a removal while it is read does no harm. UserError if damaged."""
    try:
        reader = open_checkpoint(folder)
        reader.hold()
    except (Damaged, OSError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from None
    return reader
