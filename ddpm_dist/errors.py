"""Errors that users can act on, and the exit codes of every entry point."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

OK = 0
FAILED = 1
BAD_USAGE = 2
REQUEUE = 75  # EX_TEMPFAIL: stopped on request, start me again


class UserError(Exception):
    """Bad input: the message says what was wrong, where, and what to do. Entry points turn it into exit code 2."""


class BadSample(UserError):
    """A sample that cannot be used whoever reads it: its bytes are not those of the index, or they are no image. ``sample``: its id."""

    def __init__(self, message: str, sample: int) -> None:
        super().__init__(message)
        self.sample, self.one_rank = sample, True


class RunFailed(Exception):
    """The run itself went wrong (not its input) in a way that a traceback would not explain. Becomes exit code 1."""


def in_words(error: OSError) -> str:
    """What the system said, and of which path; a link that leads nowhere is called one."""
    path = error.filename
    if path is None:
        return error.strerror or str(error)
    for part in (Path(os.fsdecode(path)), *Path(os.fsdecode(path)).parents):
        with contextlib.suppress(OSError):
            if part.is_symlink() and not part.exists():
                return f"{part} is a link to {os.readlink(part)}, which does not exist"
    return f"{error.strerror} ({os.fsdecode(path)})"


def exit_codes(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap an entry point: ``UserError`` is printed without a traceback and becomes exit code 2.

    Under torchrun every rank meets the same bad input, so only rank 0 prints it; an error that only one rank can meet
    sets ``error.one_rank = True`` and is printed by that rank, with its number.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or OK
        except UserError as error:
            rank = os.environ.get("RANK", "0")
            if rank == "0" or getattr(error, "one_rank", False):
                prefix = f"error (rank {rank}): " if rank != "0" else "error: "
                print(f"{prefix}{error}", file=sys.stderr, flush=True)
            else:
                _let_rank_0_speak()
            return BAD_USAGE
        except RunFailed as error:
            if os.environ.get("RANK", "0") == "0" or getattr(error, "one_rank", False):
                print(f"failed: {error}", file=sys.stderr, flush=True)
            return FAILED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    return wrapped


def _let_rank_0_speak() -> None:
    """Rank 0 meets the same bad input and has to say and record it; a launcher ends it as soon as another rank has left."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10)


def leave(code: int) -> None:
    """End the process. After a failure without Python's teardown: other ranks may still talk to this one's threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (OK, REQUEUE):
        # Python's teardown gives signals back to the system: one that is repeated by a batch script would kill what has saved.
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, signal.SIG_IGN)
        sys.exit(code)
    os._exit(code)
