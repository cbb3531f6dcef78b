"""One writer per run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path

from ddpm_dist.errors import UserError


class RunLock:
    """Holds ``lock`` in the run directory; the system releases it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """UserError naming the owner when another process holds it, or when the folder cannot be written."""
        path = folder / "lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"run directory {folder} cannot be written: {error.strerror}; set run.dir") from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._handle, 1000, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._handle)
            raise UserError(
                f"run directory {folder} is in use by another process ({owner}); wait for it, stop it, or choose another "
                "run.name"
            ) from None
        os.ftruncate(self._handle, 0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        os.pwrite(self._handle, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        os.close(self._handle)
