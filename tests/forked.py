"""Processes forked from a warm one: imports are paid once, and a child can be killed or paused at an exact file operation."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import ROOT, TINY

from ddpm_dist import train
from ddpm_dist.audit import Audit
from ddpm_dist.checkpoint import CheckpointStore, Ownership, Piece, Workplace, files, ownership
from ddpm_dist.runtime import Runtime

# The server that forks has imported everything and has no threads and no process group.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["forked", "ddpm_dist.trainer", "ddpm_dist.engines.ddp", "torch._dynamo", "torch.optim", "PIL.PngImagePlugin"]
)

# The rename that makes a process the owner: of the first generation, or of its name into a generation that was taken over.
OWNED = re.compile(r"/generation_00000001$|/generation_\d+/owner\.json$")


class Family:
    """Starts children and leaves none behind."""

    def __init__(self) -> None:
        self._children: list[multiprocessing.Process] = []
        # The server imports what it preloads before it takes over this process's sys.path.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

    def start(self, function: Callable, *arguments: Any) -> multiprocessing.Process:
        child = CONTEXT.Process(target=function, args=arguments)
        child.start()
        # Starting another child from another thread would look at this one's exit as well, and of two that look at the same time
        # one reads nothing and takes it for the code 255.
        multiprocessing.process._children.discard(child)
        self._children.append(child)
        return child

    def codes(self, *children: multiprocessing.Process, seconds: float = 60) -> list[int]:
        """Exit codes, -9 for a SIGKILL; none of the children may take longer than ``seconds``."""
        deadline = time.monotonic() + seconds
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
            assert child.exitcode is not None, f"{child} hangs"
        return [child.exitcode for child in children]

    def close(self) -> None:
        for child in self._children:
            if child.is_alive():
                child.kill()
            child.join()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def is_paused(child: multiprocessing.Process) -> bool:
    assert child.exitcode is None, f"ended with code {child.exitcode} before it was paused"
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def resume(child: multiprocessing.Process) -> None:
    os.kill(child.pid, signal.SIGCONT)


def contents(folder: Path) -> dict[str, Any]:
    """Every name below a folder, and what it holds; a file that was written again as it was is another one."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        facts, content, changed = path.stat(), None, None
        if path.is_file():
            content = path.read_bytes()
            changed = facts.st_mtime_ns if path.name != "owner.json" else None  # its owner's heartbeat may go on
        found[str(path.relative_to(folder))] = (facts.st_ino, changed, content)
    return found


# -- what the children do ----------------------------------------------------------------------------------------------


def strike_at(k: int, number: int) -> None:
    """Send this process signal ``number`` before its k-th file operation, counted from now and from 0."""
    seen = []

    def strike(operation: str, path: Path) -> None:
        seen.append(operation)
        if len(seen) == k + 1:
            os.kill(os.getpid(), number)

    files.before_operation = strike


def join(rank: int, world: int, meeting: Path) -> Runtime:
    store = dist.FileStore(str(meeting), world)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    return Runtime(rank, world, rank, torch.device("cpu"), dist.new_group(backend="gloo"))


def own(run: Path, runtime: Runtime, keep_last: int = 1, patience: float = 1000) -> tuple[Workplace, CheckpointStore]:
    """What a trainer does at its start: own the run directory, tidy up."""
    owner = runtime.together(lambda: Ownership(run, patience) if runtime.is_main else None)
    place = runtime.broadcast(owner.workplace if owner is not None else None)
    store = CheckpointStore(run / "checkpoints", runtime, keep_last, None, 1, place.work)
    store.owner = owner  # kept alive with the store
    store.tidy()
    return place, store


def save(store: CheckpointStore, runtime: Runtime, step: int) -> str | None:
    """Save one tensor of six elements, each of them ``step``; every rank has its part."""
    count = 6 // runtime.world_size
    piece = Piece("model/w", (6,), runtime.rank * count, torch.full((count,), float(step)))
    store.save(step, [piece], {"step": step})
    return store.wait()


def train_tiny(run: Path, log: Path, *overrides: str) -> None:
    """One process that trains the tiny network; ends with the program's exit code."""
    os._exit(_train(run, log, *overrides))


def _train(run: Path, log: Path, *overrides: str) -> int:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    ownership.HEARTBEAT_SECONDS = 0.2  # and with it the shortest patience: 0.6 s
    os.environ["DDPM_DIST_TAKEOVER_SECONDS"] = "0"
    arguments = ["--config", str(run.parent / "empty.yaml"), f"run.dir={run}", *TINY, "data.source=synthetic"]
    code = train.main([*arguments, *overrides])
    sys.stdout.flush()
    return code


def train_and_pause(run: Path, log: Path, k: int, *overrides: str) -> None:
    """As ``train_tiny``, but pause before the k-th operation on the run directory after it was taken.

    Whatever goes through Python is seen: opened, written, renamed, removed and touched files, by whatever thread.
    """
    seen, state = [0], {"owned": False, "busy": False}
    watched = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.truncate", "os.link", "write"}

    def look(event: str, arguments: tuple) -> None:
        if event not in watched or state["busy"]:
            return
        paths = [os.fsdecode(item) for item in arguments if isinstance(item, str | bytes | os.PathLike)]
        if not any(path.startswith(str(run)) for path in paths):
            return
        if not state["owned"]:
            state["owned"] = event == "os.rename" and bool(OWNED.search(paths[1]))
            return
        seen[0] += 1
        if seen[0] == k + 1:
            state["busy"] = True
            print("paused before", event, paths, flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(look)
    # Lines that are appended to open files.
    plain_write, audit_write = os.write, Audit.write

    def write(handle: int, data: bytes) -> int:
        look("write", (os.readlink(f"/proc/self/fd/{handle}"),))
        return plain_write(handle, data)

    def write_line(self: Audit, *arguments: Any) -> None:
        look("write", (str(run),))
        audit_write(self, *arguments)

    os.write, Audit.write = write, write_line
    code = _train(run, log, *overrides)
    print("operations:", seen[0], flush=True)
    os._exit(code)
