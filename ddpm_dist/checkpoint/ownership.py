"""One writer per run directory.

The owner is whoever holds the newest ``checkpoints/generation_N/``. Taking over is one atomic rename of that folder to
``generation_(N+1)``: of several takers one succeeds, and a former owner that was only paused finds its folder gone (see workplace.py).

A thread of the owner touches ``generation_N/owner.json`` every two seconds. Whoever wants the directory watches whether that time
changes, without comparing it with a clock of its own. The directory is free at once

* when the owner has released it;
* when the owner ran under this very kernel and its lock on owner.json is free: the process has ended;
* when the owner was an earlier start of this SLURM job;

and otherwise when owner.json has not changed for DDPM_DIST_TAKEOVER_SECONDS (60).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ddpm_dist.checkpoint import files
from ddpm_dist.checkpoint.workplace import (
    GENERATION,
    GONE,
    OWNER,
    Seen,
    Workplace,
    generation_folder,
    look,
    newest_generation,
    who,
)
from ddpm_dist.errors import RunFailed, UserError, in_words

HEARTBEAT_SECONDS = 2.0
TAKEOVER_SECONDS = 60.0
ATTEMPTS = 20


class Ownership:
    """Holds a run directory until :meth:`release`, or until another process takes it over (:attr:`lost`).

    Raises UserError naming the owner when the directory is in use, or when it cannot be written, and RunFailed when it is lost again
    before this is ready. ``patience``: seconds without a sign of life after which another owner is taken for dead (default
    DDPM_DIST_TAKEOVER_SECONDS).
    """

    def __init__(self, folder: Path, patience: float | None = None) -> None:
        self.folder = folder
        self.lost = False  # set by the heartbeat
        self._patience = takeover_seconds() if patience is None else patience
        self._me = {**_identity(), "token": uuid.uuid4().hex}
        self._handle = -1  # holds the lock on owner.json
        try:
            files.make_folder(folder / "checkpoints", parents=True)
            self.workplace = self._acquire()
            _sweep(self.workplace)
            files.make_folder(self.workplace.work)
        except OSError as error:
            self._close()
            place = getattr(self, "workplace", None)
            words = place.taken_over() if place is not None and error.errno in GONE else None
            if words is not None:  # by somebody who came right behind this process, or while it was paused here
                raise RunFailed(words) from None
            raise UserError(f"run directory {folder} cannot be written: {in_words(error)}; set run.dir") from None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the directory back; the next process need not wait. Does nothing to a directory that was taken over."""
        self._ended.set()
        self._thread.join(HEARTBEAT_SECONDS)  # it may hang in a file system that does not answer
        aside = self.workplace.work / OWNER
        with contextlib.suppress(OSError):
            aside.write_text(json.dumps({**self._me, "generation": self.workplace.number, "released": True}))
            os.rename(aside, self.workplace.generation / OWNER)
        self._close()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # one that passes is no reason to stop
                os.utime(self.workplace.generation / OWNER)
            if self.workplace.taken_over() is not None:
                self.lost = True
                return

    # -- taking it -----------------------------------------------------------------------------------------------------

    def _acquire(self) -> Workplace:
        for _ in range(ATTEMPTS):
            newest = newest_generation(self.folder)
            number = self._make_first() if newest is None else self._take(newest)
            if number is not None:  # else another process was quicker: look again
                return Workplace(self.folder, number, self._me["token"])
        raise UserError(
            f"{self.folder / 'checkpoints'}: its generation folder cannot be taken over (is it a folder, and do other "
            "processes start in this run directory?); choose another run.name"
        )

    def _make_first(self) -> int | None:
        aside = self.folder / "checkpoints" / f"generation.{self._me['token']}.incomplete"
        first = generation_folder(self.folder, 1)
        try:
            files.make_folder(aside)
            self._write_owner(aside / OWNER, 1)
            files.rename(aside, first)
        except OSError as error:
            if aside.exists():
                _remove(aside)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, *GONE):
                raise
            return None
        if newest_generation(self.folder) != 1:
            # While this process looked, another had made generation 1 and a third had taken it over.
            _remove(first)
            return None
        files.flush_folder(first.parent)
        return 1

    def _take(self, number: int) -> int | None:
        """Take over generation ``number`` when it is free; the new number, None when it is not there any more."""
        old, new = generation_folder(self.folder, number), generation_folder(self.folder, number + 1)
        if not self._wait_until_free(old, number):
            return None
        # Written before the claim and carried along by it: after the claim nothing needs space on the disk.
        prepared = f"{OWNER}.{self._me['token']}"
        try:
            self._write_owner(old / prepared, number + 1)
            files.rename(old, new)
            files.rename(new / prepared, new / OWNER)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return None
        files.flush_folder(new.parent)
        return number + 1

    def _write_owner(self, path: Path, generation: int) -> None:
        self._close()
        facts = {**self._me, "generation": generation, "released": False}
        self._handle = files.write_locked(
            path, lambda locked, device: json.dumps({**facts, "locked": locked, "device": device}).encode()
        )

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _wait_until_free(self, generation: Path, number: int) -> bool:
        """True when it may be taken, False when it is gone. UserError when its owner shows a sign of life."""
        begin, first, told = time.monotonic(), None, False
        while True:
            waited = time.monotonic() - begin  # before looking: this process may be paused, too
            seen = look(generation)
            if seen.looks is None and not generation.exists():
                return False
            if self._free(seen, number):
                return True
            first = first or seen
            if first.looks != seen.looks:
                raise UserError(
                    f"run directory {self.folder} is in use by another process ({who(seen.owner)}); wait for it, stop it, or "
                    "choose another run.name"
                )
            if waited >= self._patience:
                _say(
                    f"warning: taking over run directory {self.folder} from {who(seen.owner)}, which has shown no sign of life "
                    f"for {waited:.0f} s"
                )
                return True
            if not told and waited > 2 * HEARTBEAT_SECONDS:
                told = True
                _say(
                    f"run directory {self.folder} belongs to {who(seen.owner)}, which shows no sign of life; taking over in "
                    f"{self._patience - waited:.0f} s unless it does"
                )
            time.sleep(min(0.2, max(0.0, self._patience - waited)))

    def _free(self, seen: Seen, number: int) -> bool:
        owner = seen.owner
        if owner.get("generation") != number:
            return False  # somebody has claimed it and is about to say who it is (or died just then)
        if owner.get("released"):
            return True
        # One kernel and one mount see the same locks; two mounts (one in each container, say) need not.
        if seen.unlocked and (owner.get("boot"), owner.get("device")) == (self._me["boot"], seen.device):
            return True
        if owner.get("slurm_job") is None or _slurm_job(owner) != _slurm_job(self._me):
            return False
        earlier = owner.get("slurm_restarts")
        return isinstance(earlier, int) and earlier < self._me["slurm_restarts"]


def _sweep(workplace: Workplace) -> None:
    """Remove what former owners were making; a checkpoint that one of them was setting aside is kept as that."""
    root = workplace.folder / "checkpoints"
    for path in workplace.generation.iterdir():
        if path.name == OWNER:
            continue
        if path.is_dir():
            for corrupt in path.glob("step_*.corrupt*"):
                if not (root / corrupt.name).exists():
                    files.rename(corrupt, root / corrupt.name)
        _remove(path)
    for path in root.glob("generation*"):
        match = GENERATION.fullmatch(path.name)
        # A newer generation is another owner's, and this process about to find out that it has lost the directory.
        if (match and int(match[1]) < workplace.number) or path.name.endswith(".incomplete"):
            _remove(path)


def _remove(path: Path) -> None:
    try:
        files.remove_tree(path)
    except OSError as error:
        _say(f"warning: could not remove {path}: {error.strerror}")


def takeover_seconds() -> float:
    """DDPM_DIST_TAKEOVER_SECONDS, at least three heartbeats. UserError when it is not a number."""
    text = os.environ.get("DDPM_DIST_TAKEOVER_SECONDS", str(TAKEOVER_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(
            f"DDPM_DIST_TAKEOVER_SECONDS={text} is not a number of seconds; unset it or give one such as 60"
        )
    return max(seconds, 3 * HEARTBEAT_SECONDS)


def _identity() -> dict[str, Any]:
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = uuid.uuid4().hex  # not Linux: no two processes know that they share a kernel
    return {"host": socket.gethostname(), "boot": boot, "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"), "slurm_cluster": os.environ.get("SLURM_CLUSTER_NAME"),
            "slurm_restarts": int(restarts) if restarts.isdecimal() else 0}  # fmt: skip


def _slurm_job(owner: dict[str, Any]) -> tuple[Any, Any]:
    return owner.get("slurm_cluster"), owner.get("slurm_job")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
