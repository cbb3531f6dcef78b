"""One host's part of a start that hosts.py makes: runs the launcher, hands stop requests on to the ranks, returns our exit code.

The first line of the input is the job, as JSON. Then "go" starts it, "stop" asks the ranks to save and leave, "end" kills. The end of the
input (hosts.py was killed, the connection is lost) is a stop, too, and GRACE seconds later an end. Only the standard library is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from ddpm_dist import processes, rendezvous
from ddpm_dist.errors import FAILED, UserError, exit_codes

READY = "ddpm_dist: this host is ready"
GRACE = 60.0  # seconds for a last save when nobody is left who could ask for patience
LAST_WORDS = 10.0  # seconds that ranks have when their launcher is gone

_signals: list[int] = []


@exit_codes
def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda received, frame: _signals.append(received))
    orders = Orders()
    line = orders.line()
    if line is None:
        return FAILED
    job = json.loads(line)
    os.environ.update(job["environment"])
    check(job)
    if job["wait"]:
        print(READY, flush=True)
        if orders.line() != "go":  # another host cannot start
            return FAILED
    with tempfile.TemporaryDirectory(prefix="ddpm_dist_") as folder:
        return run(job, orders, Path(folder))


def check(job: dict[str, Any]) -> None:
    """Whether this host can take part. Raises UserError with its name; changes into the working folder."""

    def wrong(text: str) -> UserError:
        return UserError(f"{job['name']}: {text}")

    try:
        os.chdir(job["folder"])
    except OSError as error:
        raise wrong(
            f"cannot work in {job['folder']} ({error.strerror}): it has to be there on every host, on a shared file system"
        ) from None
    missing = [name for name in ("torch", "pydantic", *job["needs"]) if importlib.util.find_spec(name) is None]
    if missing:
        raise wrong(f"{sys.executable} has no {', '.join(missing)}: give every host the same environment")
    address, port = job["address"], job["port"]
    try:
        socket.getaddrinfo(address, port)
    except OSError:
        raise wrong(
            f"{address}, where the ranks meet, is no name known here: set MASTER_ADDR to an address of the first host"
        ) from None
    if job["index"] == 0 and not rendezvous.is_free(port):
        raise wrong(f"port {port} is taken by another program: set MASTER_PORT to a free one, or unset it")


def run(job: dict[str, Any], orders: Orders, folder: Path) -> int:
    """The launcher from its start to the end of its last rank."""
    said = folder / "exit.json"
    launcher = subprocess.Popen(
        command(job, folder), env=environment(job) | {"DDPM_DIST_EXIT_JSON": str(said)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if job["wait"] else None, stderr=subprocess.STDOUT if job["wait"] else None,
        start_new_session=True, preexec_fn=_before_launcher,
    )  # fmt: skip
    output = threading.Thread(target=pass_on, args=(launcher.stdout,), daemon=True)
    if job["wait"]:
        output.start()
    ranks: dict[int, str] = {}
    asked, told, deadline = False, set(), None
    next_look = 0.0
    while launcher.poll() is None:
        order = orders.line(0.2)
        now = time.monotonic()
        if now >= next_look:
            ranks, next_look = ranks_below(launcher.pid), now + 1
        if order is None and deadline is None:
            asked, deadline = True, now + GRACE
        asked = asked or order == "stop" or bool(_signals)
        if asked:
            ask_to_stop(launcher.pid, told)
        if order == "end" or (deadline is not None and now > deadline):
            kill_all(launcher.pid)
    # The ranks die with torchrun. Those of a deepspeed command that was killed save first.
    until = time.monotonic() + LAST_WORDS
    while (
        left := [pid for pid, born in ranks.items() if born and processes.born(pid) == born]
    ) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        _kill(pid, signal.SIGKILL)
    if job["wait"]:
        output.join(timeout=5)
    return exit_code(launcher.returncode, said, job["index"])


def pass_on(output: IO[bytes]) -> None:
    """What the ranks print, also when nobody reads it any more: then they must not stumble over it while they save."""
    while block := os.read(output.fileno(), 65_536):
        with contextlib.suppress(OSError):
            os.write(1, block)


def ask_to_stop(launcher: int, told: set[tuple[int, str]]) -> None:
    """Send USR1, once, to every rank that has a handler by now; call it again for those that are still starting.

    Not TERM or INT, with which launchers end their workers. Not twice: Python takes its handlers away before it exits.
    """
    for rank in set(ranks_below(launcher).items()) - told:
        caught = re.search(r"^SigCgt:\s*(\w+)", processes.read(rank[0], "status"), re.MULTILINE)
        if caught and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:
            _kill(rank[0], signal.SIGUSR1)
            told.add(rank)


def command(job: dict[str, Any], folder: Path) -> list[str]:
    """The launcher with everything behind it."""
    options, meeting = job["options"], [f"--master_addr={job['address']}", f"--master_port={job['port']}"]
    rank = f"--node_rank={job['index']}"
    if job["launcher"] == "deepspeed":
        hosts = folder / "hosts"
        hosts.write_text("".join(f"{name} slots={slots}\n" for name, slots in job["hosts"]))
        launcher = ["deepspeed.launcher.runner", f"--hostfile={hosts}", "--no_ssh", rank, *meeting, *options]
        launcher.append("--module")
    else:
        # The static rendezvous ranks the hosts in the order of the list; "c10d" would rank them by name.
        launcher = [
            "torch.distributed.run", f"--nnodes={len(job['hosts'])}", rank, f"--nproc_per_node={rank_count(job)}",
            "--rdzv_backend=static", f"--rdzv_id={job['port']}", *meeting, *options, "-m",
        ]  # fmt: skip
    return [sys.executable, "-m", *launcher, "ddpm_dist.train", *job["arguments"]]


def rank_count(job: dict[str, Any]) -> int:
    """How many ranks this host gets: what the list or PROCESSES_PER_NODE says, else one per GPU, else one."""
    option = re.findall(r"--nproc[-_]per[-_]node[= ](\d+)", " ".join(job["options"]))
    given = option[-1] if option else job["hosts"][job["index"]][1] or os.environ.get("PROCESSES_PER_NODE")
    if given:
        return int(given)
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))


def environment(job: dict[str, Any]) -> dict[str, str]:
    values = {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    values.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // rank_count(job))))
    if shutil.which("nvidia-smi") is None:
        values.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed has to be told
    # A stop is for the ranks: torchrun would give them 30 seconds. Which name it reads depends on its version.
    return values | {
        "PET_SIGNALS_TO_HANDLE": "SIGQUIT",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",
        "PYTHONUNBUFFERED": "1",
    }


def exit_code(returned: int, said: Path, index: int) -> int:
    """0, 2, 75 or 1: what rank 0 wrote (or another rank that alone met bad input), because launchers say something else."""
    with contextlib.suppress(OSError, ValueError):
        code = json.loads(said.read_text())["code"]
        if code is not None:
            return int(code)
    # Without rank 0's word it is no success; deepspeed says 0 when the process below it was killed.
    return FAILED if returned < 0 or index == 0 else returned


def _before_launcher() -> None:
    """In the new process: it dies with this one, and ignores stop signals, as ranks do until they have handlers of their own."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Orders:
    """The lines of the standard input, with a time limit."""

    def __init__(self) -> None:
        self._bytes, self._open = b"", True

    def line(self, seconds: float | None = None) -> str | None:
        """The next line; "" if none comes in time; None when none can come any more."""
        until = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._bytes:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._open:
                time.sleep(left or 0.0)
                return None
            if not select.select([0], [], [], left)[0]:
                return ""
            more = os.read(0, 65_536)
            self._open = bool(more)
            self._bytes += more
        line, _, self._bytes = self._bytes.partition(b"\n")
        return line.decode()


def ranks_below(launcher: int) -> dict[int, str]:
    """Process id -> start time of the ranks of this launcher; not of what the ranks have started."""
    found, callers = {}, {launcher}
    for pid, parent in _descendants(launcher):
        if parent not in callers:
            continue
        if any(word.startswith("RANK=") for word in processes.strings(pid, "environ")):
            found[pid] = processes.born(pid)
        else:
            callers.add(pid)
    return found


def kill_all(launcher: int) -> None:
    for pid in [launcher, *(pid for pid, _ in _descendants(launcher))]:
        _kill(pid, signal.SIGKILL)


def _descendants(root: int) -> list[tuple[int, int]]:
    """(process, parent) of everything below a process, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            children.setdefault(processes.parent(int(entry.name)), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        parent = todo.pop(0)
        found += [(pid, parent) for pid in children.get(parent, [])]
        todo += children.get(parent, [])
    return found


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())
