"""Saving without stopping, publishing all or nothing, keeping what is needed, finding the newest intact one.

A save: the step pays for a copy of this rank's pieces to host memory; a thread writes and flushes them into
``step_N.incomplete/``; when every rank has said that its file is durable, rank 0 adds state and manifest and renames the folder to
``step_N/``. A published folder is never written again, and state that is not finite is never published.

Folders are built, set aside and removed by way of ``work``, a folder that belongs to one owner of the run directory and vanishes
when another takes over (see ownership.py): from then on every rename of the old owner fails.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddpm_dist.checkpoint import files
from ddpm_dist.checkpoint.format import (
    MANIFEST,
    STATE,
    Damaged,
    Piece,
    Reader,
    check_files,
    manifest_text,
    read_manifest,
    write_pieces,
)
from ddpm_dist.checkpoint.retention import Retention, folder_name, published
from ddpm_dist.errors import UserError, in_words
from ddpm_dist.runtime import Runtime

_LEFTOVER = re.compile(r"step_\d{8,}\.(incomplete|removed)")


class CheckpointStore:
    """The checkpoints of one run. Every public method except ``failure`` is collective.

    ``work`` is the owner's :attr:`Workplace.work`, on every rank; None stands for ``root`` itself, for a caller who knows that
    nobody else writes there.
    """

    def __init__(
        self,
        root: Path,
        runtime: Runtime,
        keep_last: int,
        keep_every: int | None,
        global_batch: int,
        work: Path | None = None,
    ) -> None:
        self.root, self._runtime, self._work = root, runtime, work or root
        self._retention = Retention(keep_last, keep_every, global_batch)
        # A group of its own: the saving threads talk while the training threads do.
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self.failure: str | None = None  # why the last save came to nothing
        self.saved_step = 0

    def save(self, step: int, pieces: Iterable[Piece], state: dict[str, Any]) -> None:
        """Start saving; returns when the pieces are copied to host memory. Waits for the save before, if it still runs."""
        self.wait()
        error = None
        if self._runtime.is_main:
            try:
                self._prepare(step)
            except OSError as reason:
                error = f"{reason.strerror}: {reason.filename}"
        error = self._runtime.broadcast(error)
        if error is not None:
            self._report(step, error)
            return
        copies = [piece.to_host() for piece in pieces]
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._run, args=(step, copies, state), name="checkpoint")
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the save that runs; returns why it (or the one before) failed, None when it is published."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.failure

    def _prepare(self, step: int) -> None:
        if self._work == self.root:
            files.make_folder(self.root, parents=True)
        target = self._unfinished(step)
        if target.exists():  # from a save that did not finish
            files.remove_tree(target)
        files.make_folder(target)

    def _unfinished(self, step: int) -> Path:
        return self._work / f"{folder_name(step)}.incomplete"

    def _run(self, step: int, pieces: list[Piece], state: dict[str, Any]) -> None:
        folder = self._unfinished(step)
        outcome: tuple[str, Any]
        try:
            _check_finite(pieces)
            name = f"rank_{self._runtime.rank:05d}.safetensors"
            facts, table = write_pieces(folder / name, pieces)
            outcome = ("written", (name, facts, table))
        except Exception as error:  # whatever it is, the other ranks must hear of it
            outcome = ("failed", f"rank {self._runtime.rank}: {_reason(error)}")
        pieces.clear()
        try:
            error = self._commit(step, folder, state, self._exchange(outcome))
        except Exception as reason:
            error = f"rank {self._runtime.rank}: {_reason(reason)}"
        if error is None:
            self.failure, self.saved_step = None, step
        else:
            self._report(step, error)

    def _exchange(self, outcome: tuple[str, Any]) -> list[tuple[str, Any]] | None:
        runtime = self._runtime
        gathered: list[Any] | None = [None] * runtime.world_size if runtime.is_main else None
        dist.gather_object(outcome, gathered, dst=0, group=self._group)
        return gathered

    def _commit(self, step: int, folder: Path, state: dict[str, Any], outcomes: list | None) -> str | None:
        """Rank 0 publishes when every rank has written; all ranks return the same error or None."""
        box: list[str | None] = [None]
        if outcomes is not None:
            try:
                errors = [text for kind, text in outcomes if kind == "failed"]
                if errors:
                    raise OSError(errors[0])
                self._publish(step, folder, state, [content for _, content in outcomes])
            except Exception as error:
                box[0] = _reason(error)
                self._discard(folder)
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[0] is None and outcomes is not None:
            self._prune(step)
        return box[0]

    def _publish(self, step: int, folder: Path, state: dict[str, Any], written: list[tuple]) -> None:
        facts = {name: fact for name, fact, _ in written}
        facts[STATE] = files.write(folder / STATE, [json.dumps(state, indent=1).encode()])
        files.write(folder / MANIFEST, [manifest_text(step, facts, [table for _, _, table in written])])
        files.flush_folder(folder)
        target = self.root / folder_name(step)
        if target.exists():
            raise FileExistsError(f"{target} exists already; published checkpoints are never overwritten")
        files.rename(folder, target)
        files.flush_folder(self.root)
        self._retention.trust(target)

    def _discard(self, folder: Path) -> None:
        try:
            files.remove_tree(folder)
        except OSError:
            pass  # it stays as .incomplete, which nobody reads; the next start removes it

    def _report(self, step: int, error: str) -> None:
        self.failure = error
        if self._runtime.is_main and self._work.exists():  # else another process has taken over, which the trainer says
            newest = published(self.root)
            print(
                f"warning: the checkpoint of step {step} could not be written: {error}. "
                f"{f'The newest one is {newest[0][1].name}' if newest else 'There is none yet'}; "
                "training goes on and the next save tries again",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _prune(self, saved: int) -> None:
        """Remove what retention does not keep. Whatever goes wrong here, the checkpoint just saved is published."""
        try:
            surplus = self._retention.surplus(self.root, saved)
        except Exception as error:
            surplus = []
            print(f"warning: {self.root} could not be tidied: {_reason(error)}", file=sys.stderr, flush=True)
        for folder in surplus:
            removed = self._work / f"{folder.name}.removed"
            try:
                # Renamed first: a folder that is half removed must not look like a checkpoint.
                files.rename(folder, removed)
                files.remove_tree(removed)
            except OSError as error:
                print(f"warning: could not remove {folder}: {error.strerror}", file=sys.stderr, flush=True)

    def tidy(self) -> None:
        """Remove what an interrupted save or removal left behind (call while owning the run directory)."""
        self._runtime.together(self._tidy)

    def _tidy(self) -> None:
        if not self._runtime.is_main:
            return
        try:
            files.make_folder(self.root, parents=True)
            leftovers = [path for path in self.root.iterdir() if _LEFTOVER.fullmatch(path.name)]
        except OSError as error:
            raise UserError(f"{self.root} cannot be used for checkpoints: {in_words(error)}; set run.dir") from None
        for path in leftovers:
            try:
                files.remove_tree(path)
            except OSError as error:
                print(f"warning: could not remove {path}: {error.strerror}", file=sys.stderr, flush=True)

    def newest(self) -> Reader | None:
        """The newest intact checkpoint, or None when the run has none.

        One that is damaged is named, set aside as ``step_N.corrupt`` and the one before it is used. UserError when there were
        checkpoints and none is intact: starting over silently would lose the run.
        """
        runtime, refused = self._runtime, []
        while True:
            candidates = runtime.broadcast([str(path) for _, path in published(self.root)] if runtime.is_main else None)
            if not candidates:
                break
            folder = Path(candidates[0])
            problem = self._problem(folder)
            if problem is None:
                return Reader(folder, read_manifest(folder))
            refused.append(problem)
            runtime.together(lambda: self._set_aside(folder, problem))  # noqa: B023 (called at once)
        if refused or any(runtime.broadcast(self._corrupt_folders() if runtime.is_main else None)):
            details = "\n  ".join(refused) or ", ".join(runtime.broadcast(self._corrupt_folders()))
            raise UserError(
                f"no intact checkpoint in {self.root}:\n  {details}\nrestore one of them from a backup, or start a new "
                "run under another run.name"
            )
        return None

    def _set_aside(self, folder: Path, problem: str) -> None:
        if not self._runtime.is_main:
            return
        name, number = f"{folder.name}.corrupt", 1
        while (self.root / name).exists():
            number += 1
            name = f"{folder.name}.corrupt{number}"
        # By way of the work folder, so that a former owner cannot do it to a checkpoint of its successor.
        files.rename(folder, self._work / name)
        files.rename(self._work / name, self.root / name)
        print(f"warning: {problem}; set aside as {name}, trying the one before", file=sys.stderr, flush=True)

    def _corrupt_folders(self) -> list[str]:
        return [path.name for path in self.root.glob("step_*.corrupt*")] if self.root.is_dir() else []

    def _problem(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, agreed by all ranks; each rank reads its share of the files."""

        def check() -> str | None:
            try:
                manifest = read_manifest(folder)
                check_files(folder, manifest, self._runtime.rank, self._runtime.world_size)
                Reader(folder, manifest)
            except Damaged as reason:
                return str(reason)
            except OSError as reason:
                return f"{reason.filename}: {reason.strerror}"
            return None

        error = self._runtime.together(check)  # a version that is too new is no damage: it ends the start on every rank
        found: list[str | None] = [None] * self._runtime.world_size
        dist.all_gather_object(found, error, group=self._runtime.control)
        return next((text for text in found if text is not None), None)


def _check_finite(pieces: Iterable[Piece]) -> None:
    """Raises ValueError naming the first tensor that holds a NaN or an infinity: nobody could use such a checkpoint."""
    for piece in pieces:
        if piece.data.is_floating_point() and piece.data.numel():
            # Both ends of the range are NaN if any element is; no mask of the tensor's size is needed.
            if not all(torch.isfinite(end) for end in torch.aminmax(piece.data)):
                raise ValueError(f"{piece.tensor} is not finite (it holds a NaN or an infinity)")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return str(error) or type(error).__name__
