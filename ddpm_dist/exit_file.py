"""exit.json: why a start ended, for the scripts around it, because torchrun exits with 1 whatever its workers returned."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_dist.errors import FAILED

if TYPE_CHECKING:
    from ddpm_dist.trainer import Trainer


def is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def forget_last_exit() -> None:
    """Empty the file of DDPM_DIST_EXIT_JSON: what an earlier start left there must not be taken for this one's code."""
    wanted = os.environ.get("DDPM_DIST_EXIT_JSON")
    if wanted and is_rank_0() and Path(wanted).is_file():
        with contextlib.suppress(OSError):
            os.truncate(wanted, 0)


def write_exit(trainer: Trainer | None, code: int | None, reason: str) -> None:
    """exit.json in the run directory (if this process owns one) and where DDPM_DIST_EXIT_JSON says.

    torchrun exits with 1 whatever its workers returned; the launch scripts read the code from here. A rank that alone met bad
    input writes too, and rank 0, which then only sees a peer vanish, does not replace its words. code None: about to train;
    said only where DDPM_DIST_EXIT_JSON says, for a script that has to know how far a run was that was killed.
    """
    workplace = trainer.workplace if trainer is not None else None
    wanted = os.environ.get("DDPM_DIST_EXIT_JSON")
    said = {"code": code, "reason": reason, "step": trainer.completed if trainer is not None else None}

    def write(path: Path, values: dict[str, Any], place: Callable[[Path, str], None]) -> None:
        try:
            if code != FAILED or read_exit(path).get("code") is None:
                place(path, json.dumps(values) + "\n")
        except OSError as error:
            print(f"warning: {path} could not be written: {error.strerror}", file=sys.stderr, flush=True)

    if code is not None and workplace is not None and workplace.taken_over() is None:
        write(trainer.folder / "exit.json", said, workplace.write_text)
    if wanted:
        run = str(trainer.folder.absolute()) if trainer is not None else None
        said |= {"start_step": trainer.start_step if trainer is not None else None, "run": run}
        write(Path(wanted), said, replace_text)


def read_exit(path: Path) -> dict[str, Any]:
    """What an exit file says; {} for a missing, empty or foreign one."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def replace_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".incomplete")
    aside.write_text(text)
    os.replace(aside, path)
