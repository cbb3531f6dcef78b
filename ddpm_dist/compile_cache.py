"""What torch.compile makes is kept beside the runs, so that a restart, also on another node, does not make it again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAME = ".compile_cache"
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # of torch; Triton's kernels go below it, too


def keep_beside(run: Path) -> str | None:
    """Use the folder .compile_cache beside the run directory, unless the environment names one. Call before anything compiles.

    torch's own place is below /tmp: on a cluster that is another one on every node, and gone with the job. The folder holds
    programs, which are run when they are found again: one that others could write to is not used.

    Returns why it is not used, None if all is well.
    """
    if _named_by_the_user():
        return None
    folder = (run.absolute().parent / NAME).resolve()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return f"others could put programs into {folder}: make it yours alone (chmod 700) or set {VARIABLE}"
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{folder} cannot be written"
    except OSError as error:
        return f"{folder}: {error.strerror}"
    os.environ[VARIABLE] = str(folder)
    return None


def _named_by_the_user() -> bool:
    """Parts of torch write their own place into the environment when they are imported, which happens early: that is no wish."""
    value = os.environ.get(VARIABLE)
    places = sys.modules.get("torch._inductor.runtime.cache_dir_utils")  # there if it was that part
    default = getattr(places, "default_cache_dir", None)
    return bool(value) and not (default is not None and value == default())
