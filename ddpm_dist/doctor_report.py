"""What the doctor's checks have in common: a line of the report, and time limits."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

STATES = ("ok", "note", "problem")
WIDTH = 130  # columns of a line


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        state: "ok", "note" or "problem".
        about: what was looked at, in a word.
        text: what was found.
        remedy: what to do; "" where nothing is to be done.
        values: numbers for --json.
    """

    state: str
    about: str
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        first, rest = f"{self.state:8} {self.about:11} ", " " * 21
        lines = textwrap.wrap(self.text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
        if self.remedy:
            lines += textwrap.wrap(
                self.remedy, WIDTH, initial_indent=" " * 18 + "-> ", subsequent_indent=rest, break_on_hyphens=False
            )
        return "\n".join(lines)


def limited(about: str, check: Callable[[], Iterable[Finding]], seconds: float) -> Iterable[Finding]:
    """The findings of a check as they come; a problem instead of the rest if it takes longer than ``seconds`` or fails itself."""
    found: queue.Queue[Finding | None] = queue.Queue()

    def work() -> None:
        try:
            for one in check():
                found.put(one)
        except Exception as error:
            found.put(Finding("problem", about, f"the check itself failed: {type(error).__name__}: {error}"))
        found.put(None)

    # A daemon: a check that hangs (a dead file server, a name server) is left behind.
    threading.Thread(target=work, name=about, daemon=True).start()
    until = time.monotonic() + seconds
    while True:
        try:
            one = found.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            yield Finding(
                "problem", about, f"no answer within {seconds:g} s", "something below it hangs: look there by hand"
            )
            return
        if one is None:
            return
        yield one


def call(command: list[str], seconds: float, **more: str) -> tuple[int | None, str, str]:
    """(exit code or None if it took longer, output, errors). Its whole process group is killed at the limit, nobody waits for it."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, env=os.environ | more,
        )  # fmt: skip
    except OSError as error:
        return 127, "", str(error)
    try:
        output, errors = process.communicate(timeout=seconds)
        return process.returncode, output, errors
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return None, "", f"no answer within {seconds:g} s"


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
