"""One contestant of ``benchmarks.loader`` in a process of its own, pinned to its cores; and the CPU seconds that it costs.

The process reads commands from its standard input, each a word and a JSON object of options, and answers each with one line of JSON:
"epoch" (one epoch against what ``loader_contestants.expected`` found), "turn", and the functions of ``MEASURES``. It ends with its input.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.loader_turns import in_turns

if TYPE_CHECKING:
    from benchmarks.loader_contestants import Spec

SETTLE = 12  # batches before a turn, more than anybody keeps ready (per worker of a DataLoader two more)
SMALLEST_TURN = 5  # batches
_TICK = os.sysconf("SC_CLK_TCK")
# What else a process can be asked for: functions of the spec and the options, and the modules they are in.
MEASURES = {
    "parts": "benchmarks.loader_limits", "indexing": "benchmarks.loader_reading", "check": "benchmarks.loader_reading",
    "read": "benchmarks.loader_streaming", "cold": "benchmarks.loader_streaming",
}  # fmt: skip


class Failed(Exception):
    """A process could not do what it was asked for; the text is its ``problem``."""


def members(session: int) -> list[int]:
    """The processes of a session, this one first where it belongs to it."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _stat(int(name))) is not None and int(stat[3]) == session:
            found.append(int(name))
    return sorted(found, key=lambda process: process != os.getpid())


def cpu_seconds(processes: list[int]) -> float:
    """CPU time of all threads of these processes so far, and of their children that have ended and were waited for."""
    return sum(sum(map(int, stat[11:15])) / _TICK for p in processes if (stat := _stat(p)) is not None)


def _stat(process: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name, which may hold anything; see proc_pid_stat(5). None: it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


class CpuMeter:
    """``used()``: CPU seconds of this session (threads, children, children of children) since the meter was made."""

    def __init__(self) -> None:
        self._session = os.getsid(0)
        self._before = members(self._session)
        self._start = cpu_seconds(self._before)

    def used(self) -> float:
        used = cpu_seconds(self._before) - self._start  # first: looking for new ones is not the contestant's work
        return used + cpu_seconds([p for p in members(self._session) if p not in self._before])


@dataclass
class Contestant:
    """The parent's side of one contestant and what was measured of it, one number per turn."""

    spec: Spec
    problem: str | None = None
    failed: bool = False
    rates: list[float] = field(default_factory=list)
    cpu_s_per_1000: list[float] = field(default_factory=list)
    cores_used: list[float] = field(default_factory=list)
    process: subprocess.Popen | None = None

    def start(self, cores: list[int]) -> None:
        """Start the process. It is a session of its own, so that its CPU time can be told from others'."""
        words = [sys.executable, "-m", "benchmarks.loader_process", json.dumps({**asdict(self.spec), "cores": cores})]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(len(cores))}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=variables
        )

    def ask(self, command: str, **options: Any) -> dict[str, Any] | None:
        """The answer; None once something has gone wrong, which ends the process and becomes its ``problem``."""
        if self.problem is not None:
            return None
        try:
            self.process.stdin.write(f"{command} {json.dumps(options)}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has no answer either
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"problem": f"failed: its process ended with code {self.process.wait()}"}
        if "problem" in answer:
            self.problem, self.failed = answer["problem"], True
            self.close()
            return None
        return answer

    def must(self, command: str, **options: Any) -> dict[str, Any]:
        """The answer. Raises Failed where there is none."""
        answer = self.ask(command, **options)
        if answer is None:
            raise Failed(self.problem)
        return answer

    def turn(self, seconds: float) -> None:
        """Measure one turn, then wait until the process is at rest."""
        found = self.ask("turn", seconds=seconds)
        if found is not None:
            self.rates.append(found["images"] / found["seconds"])
            self.cpu_s_per_1000.append(1000 * found["cpu_seconds"] / found["images"])
            self.cores_used.append(found["cpu_seconds"] / found["seconds"])
            self.rest()

    def forget(self) -> None:
        """Drop what was measured: it was the warm-up."""
        self.rates, self.cpu_s_per_1000, self.cores_used = [], [], []

    def rest(self, limit: float = 60.0) -> None:
        """Wait until its buffers are full again: the others must not pay for that."""
        quiet, end = 0, time.monotonic() + limit
        group = members(self.process.pid)
        before = cpu_seconds(group)
        while quiet < 3:
            time.sleep(0.05)
            now = cpu_seconds(group)
            quiet = quiet + 1 if now - before < 1.5 / _TICK else 0
            before = now
            if time.monotonic() > end:
                self.problem, self.failed = f"failed: it still works {limit:.0f} s after its turn", True
                self.close()
                return

    def close(self) -> None:
        """End the process."""
        if self.process is None:
            return
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process = None


def take_turns(
    contestants: list[Contestant], turns: int, seconds: float, told: Callable[[str], None] = lambda text: None
) -> None:
    """All measure their turns. ``told``: called with a line after each."""
    for turn in range(turns):
        for place in in_turns(range(len(contestants)), turn):
            contestants[place].turn(seconds)
        told(f"turn {turn + 1} of {turns}")


def main() -> None:
    """The contestant's side."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    words = json.loads(sys.argv[1])
    os.sched_setaffinity(0, words.pop("cores"))  # before anything below starts threads
    import traceback

    from benchmarks.loader_contestants import CONTESTANTS, Spec

    def reply(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    spec = Spec(**words)
    try:
        stream = CONTESTANTS[spec.name](spec)
        for line in sys.stdin:
            command, options = line.split(maxsplit=1)
            reply(_do(command, json.loads(options), spec, stream))
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0][:200]
        reply({"problem": f"failed: {type(error).__name__}: {first}"})
    os._exit(0)  # DALI and the workers of a DataLoader take their time to end


def _do(command: str, options: dict[str, Any], spec: Spec, stream: Any) -> dict[str, Any]:
    if command == "turn":
        return _turn(stream, options["seconds"], SETTLE + 2 * spec.workers)
    if command == "epoch":
        return _epoch(options["expected"], spec, stream)
    return getattr(importlib.import_module(MEASURES[command]), command)(spec, **options)


def _epoch(expected: str, spec: Spec, stream: Any) -> dict[str, Any]:
    import numpy as np

    from benchmarks.loader_contestants import CONTESTANTS, WEBDATASET, check_epoch

    if spec.name == WEBDATASET:  # the epochs of several workers overlap, unless it stops after one
        stream = CONTESTANTS[spec.name](replace(spec, endless=False))
    problem = check_epoch(stream, np.load(expected))
    return {} if problem is None else {"problem": problem}


def _turn(stream: Any, at_least: float, settle: int) -> dict[str, float]:
    for _ in range(settle):
        next(stream)
    _finish()
    images = batches = 0
    meter, start = CpuMeter(), time.monotonic()
    while batches < SMALLEST_TURN or time.monotonic() - start < at_least:
        images += len(next(stream)[1])
        batches += 1
    _finish()
    elapsed = time.monotonic() - start
    return {"images": images, "seconds": elapsed, "cpu_seconds": meter.used()}


def _finish() -> None:
    """Wait for copies to the GPU, where there are any."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
