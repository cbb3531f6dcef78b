"""Whether a SLURM job that trains goes on: the scripts in slurm/ ask before and after every attempt.

    python -m ddpm_dist.requeue begin FOLDER         # exit code 0: train; 1: the last restarts got nowhere, stop
    python -m ddpm_dist.requeue end FOLDER CODE      # CODE of srun; exit code 75: requeue the job, else: end with that code

FOLDER belongs to one job. exit.json in it is what rank 0 says (DDPM_DIST_EXIT_JSON), history.json has a record per attempt. An attempt
that ended without ``end``, because its node was lost, is judged by the next ``begin``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ddpm_dist.errors import BAD_USAGE, FAILED, OK, REQUEUE, UserError, exit_codes

RESTARTS = 3  # so many in a row may begin where the attempt before them began
ASKED, PAUSE = 6, 5.0  # how often scontrol is asked while it does not answer, seconds in between


@dataclass
class Attempt:
    """One start of the job.

    Attributes:
        restart: SLURM_RESTART_COUNT of it.
        start_step: completed steps of the checkpoint it began with; None if it never got that far.
        step: the last completed step that it spoke of.
        code: 0, 1, 2 or 75; None if it was killed.
        reason: in words.
        then: what was decided after it: "done", "requeued", "stopped"; "ended by SLURM"; None while it runs.
    """

    restart: int
    start_step: int | None = None
    step: int | None = None
    code: int | None = None
    reason: str = ""
    then: str | None = None

    def hear(self, said: Mapping[str, Any]) -> None:
        """Take over what rank 0 wrote into exit.json."""
        for name, kind in (("start_step", int), ("step", int), ("code", int), ("reason", str)):
            if type(value := said.get(name)) is kind and (name != "code" or value in (OK, FAILED, BAD_USAGE, REQUEUE)):
                setattr(self, name, value)

    def __str__(self) -> str:
        start = "before it had a first step" if self.start_step is None else f"begun at step {self.start_step}"
        end = "was killed" if self.code is None else f"ended with code {self.code} ({self.reason})"
        return f"{start}, {end}" + (f" after step {self.step}" if self.step is not None else "")


@dataclass(frozen=True)
class Job:
    """What SLURM says of the job. state: RUNNING, COMPLETING, CANCELLED, ...; restarts: how often it was requeued so far."""

    state: str
    restarts: int = 0
    reason: str = ""


def stuck(attempts: list[Attempt]) -> bool:
    """Whether the last attempt and the three before it all began at the same step or earlier, and it saved no later one.

    An attempt that never got to its first step is taken to have begun where the one before it began or saved. What a user
    started again after it was done, or after bad input, counts from there.
    """
    begins, reached = [], 0
    for attempt in attempts:
        if attempt.code in (OK, BAD_USAGE):
            begins, reached = [], 0
            continue
        begin = reached if attempt.start_step is None else attempt.start_step
        reached = max(begin, attempt.step or 0) if attempt.code == REQUEUE else begin
        begins.append(begin)
    last = [*begins[-RESTARTS - 1 :], reached]
    return len(begins) > RESTARTS and all(later <= earlier for earlier, later in zip(last, last[1:], strict=False))


def decide(attempts: list[Attempt], srun_code: int, job: Job | None) -> tuple[int, str, str]:
    """After the last of ``attempts``: (exit code of the batch script, what is recorded as ``then``, what to tell the user).

    srun_code counts where the attempt has no code of its own. job: None if SLURM does not answer.
    """
    last = attempts[-1]
    if last.code == OK or (last.code is None and srun_code == OK):
        return OK, "done", "done"
    if last.code == BAD_USAGE or (last.code is None and last.start_step is None and srun_code == BAD_USAGE):
        return BAD_USAGE, "stopped", "bad input, see the error above; not requeued"
    if job is None:
        return FAILED, "stopped", "SLURM's controller does not answer, so not requeued; sbatch again continues the run"
    if job.restarts > last.restart:
        return FAILED, "ended by SLURM", "SLURM has requeued this job already"
    if job.state != "RUNNING" and job.reason != "TimeLimit":
        return FAILED, "ended by SLURM", f"the job is {job.state}: cancelled, or restarted by SLURM; not requeued by us"
    how = last.reason if last.code is not None else f"killed, srun ended with {srun_code}"
    if stuck(attempts):
        return FAILED, "stopped", f"not requeued: {NO_PROGRESS} The last attempt: {last}; srun ended with {srun_code}"
    if last.code == REQUEUE:
        return REQUEUE, "requeued", f"stopped by {how} after step {last.step}; requeueing"
    return REQUEUE, "requeued", f"crashed ({how}); requeueing (until {RESTARTS} restarts in a row make no progress)"


NO_PROGRESS = (
    f"no progress over {RESTARTS} restarts, each began where the one before had begun. Look for the cause in the logs of all nodes; "
    "sbatch again continues the run."
)


def job_name(environ: Mapping[str, str]) -> str:
    """What scontrol calls this job. Of an array the task only: the number of one of them is that of the whole array, too."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def ask_slurm(job: str) -> Job | None:
    """The state of ``job`` from scontrol; None if it does not answer for half a minute or more."""
    for turn in range(ASKED):
        time.sleep(PAUSE if turn else 0)
        try:
            done = subprocess.run(
                ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if found := re.search(r" JobState=(\S+) Reason=(\S+)", done.stdout):
            restarts = re.search(r" Restarts=(\d+)", done.stdout)
            return Job(found[1], int(restarts[1]) if restarts else 0, found[2])
    return None


def begin(folder: Path, restart: int) -> tuple[int, str]:
    """Record a new attempt in ``folder`` and judge those before it: (0 or 1, what to tell the user). UserError: not writable."""
    attempts = read_history(folder / "history.json")
    if attempts and restart <= attempts[-1].restart:
        attempts = []  # of another job with this number: another cluster, or one that began to count again
    if attempts and attempts[-1].then is None:
        attempts[-1].hear(read_object(folder / "exit.json"))
        attempts[-1].then = "ended by SLURM"
    if stuck(attempts):
        write(folder / "history.json", attempts)
        return FAILED, f"not started: {NO_PROGRESS} The last attempt: {attempts[-1]}"
    before = f"; the attempt before: {attempts[-1]}" if attempts else ""
    write(folder / "history.json", [*attempts, Attempt(restart)])
    # What the attempt before has left there must not be taken for this one's words.
    write_text(folder / "exit.json", "")
    return OK, f"restart {restart}{before}" if restart else "first start"


def end(folder: Path, srun_code: int, job: Job | None) -> tuple[int, str]:
    """Judge the attempt that has just ended: (exit code of the batch script, 75 = requeue; what to tell the user)."""
    attempts = read_history(folder / "history.json") or [Attempt(0)]
    attempts[-1].hear(read_object(folder / "exit.json"))
    code, attempts[-1].then, words = decide(attempts, srun_code, job)
    write(folder / "history.json", attempts)
    return code, words


def read_history(path: Path) -> list[Attempt]:
    """The attempts so far; [] where there is no file, or one that is not whole."""
    known = {field.name for field in fields(Attempt)}
    try:
        attempts = [
            Attempt(**{name: value for name, value in record.items() if name in known})
            for record in read_object(path).get("attempts", [])
        ]
    except (TypeError, AttributeError):
        return []
    whole = all(
        isinstance(attempt.restart, int)
        and all(isinstance(n, int | None) for n in (attempt.start_step, attempt.step, attempt.code))
        for attempt in attempts
    )
    return attempts if whole else []


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} for a missing, empty or broken file."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def write(path: Path, attempts: list[Attempt]) -> None:
    write_text(path, json.dumps({"attempts": [asdict(attempt) for attempt in attempts]}, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".incomplete")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; set DDPM_DIST_LOGS to a folder that all nodes can write"
        ) from None


@exit_codes
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_dist.requeue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("begin", "end"):
        one = actions.add_parser(action)
        one.add_argument("folder", type=Path)
        if action == "end":
            one.add_argument("code", type=int, help="exit code of srun")
    arguments = parser.parse_args(argv)
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        raise UserError("this is no SLURM job (SLURM_JOB_ID is not set): the scripts in slurm/ call this")
    if arguments.action == "begin":
        code, words = begin(arguments.folder, int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    else:
        code, words = end(arguments.folder, arguments.code, ask_slurm(job_name(os.environ)))
    print(f"job {number}: {words}", file=sys.stdout if code in (OK, REQUEUE) else sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
