"""Ends a job in bounded time when one of its ranks is gone, stopped or stuck, and says which.

A collective waits for a silent peer until its own timeout and then names nobody. So every rank has a thread that tells a small
store on rank 0, every other second, that it is alive and how far its main thread is. Rank 0 looks at all of them, the others look
at rank 0.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ddpm_dist.errors import FAILED
from ddpm_dist.runtime import Runtime

LEFT = b"left"
VERDICT = "verdict"
INTERVAL, LONGEST_INTERVAL = (
    0.5,
    2.0,
)  # seconds between two signs of life; of thousands of ranks rank 0 hears less often
NAMED = 8  # ranks that a message lists


@dataclass
class _Seen:
    """What rank 0 knows of a rank: its last words and for how long, in seconds, nothing in them has changed."""

    words: bytes = b""
    silent: float = 0.0  # no sign of life
    still: float = 0.0  # alive, but its main thread does not get on
    progress: str = ""

    def hear(self, words: bytes, seconds: float) -> None:
        self.silent = 0.0 if words != self.words else self.silent + seconds
        self.words = words
        progress = words.decode(errors="replace").partition(" ")[2]  # without the count of beats
        self.still = 0.0 if progress != self.progress or self.patient else self.still + seconds
        self.progress = progress

    @property
    def left(self) -> bool:
        return self.words == LEFT

    @property
    def patient(self) -> bool:
        return self.progress.startswith("patient")

    @property
    def steps(self) -> int:
        return int(self.progress.split()[1])


class Watch:
    """Start it on every rank together, call ``step`` after every step, ``stop`` before the process group ends.

    Args:
        seconds: a rank that gives no sign of life, or whose main thread does not finish a step, for so long ends the job.
            None: nobody watches.
        doing: what the main thread is at, in a few words; called from another thread.
        last_words: called with the message on the rank that speaks, before its process ends with exit code 1.
    """

    def __init__(
        self,
        runtime: Runtime,
        seconds: float | None,
        doing: Callable[[], str] = lambda: "",
        last_words: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._runtime, self._seconds, self._doing, self._last_words = runtime, seconds, doing, last_words
        self._steps = self._beats = self._patience = 0
        self._stopping, self._silent = threading.Event(), threading.Event()
        self._heard: list[bytes] | None = None  # what the last talk brought, until it is judged
        self._thread: threading.Thread | None = None
        if seconds is None:
            return
        self._interval = min(INTERVAL if runtime.world_size <= 512 else LONGEST_INTERVAL, seconds / 10)
        self._seen = [_Seen() for _ in range(runtime.world_size)] if runtime.is_main else [_Seen()]
        self._names = self._from_all(f"rank {runtime.rank} (process {os.getpid()} on {socket.gethostname()})")
        self._server: dist.TCPStore | None = None
        self._address = self._open_store()
        self._store, reached = None, True
        try:
            self._store = self._connect()
            self._speak()
        except (dist.DistError, RuntimeError, OSError):
            reached = False
        answers = self._from_all(reached)  # behind this line every rank has spoken once
        lost = [rank for rank, ok in enumerate(answers) if not ok]
        if lost:
            if runtime.is_main:
                print(f"warning: {self._list(lost)} cannot reach {self._address}: nobody will notice a rank that hangs",
                      file=sys.stderr, flush=True)  # fmt: skip
            return
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """The main thread has got on."""
        self._steps += 1

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """While the main thread does something that may take long (compiling, sampling, writing), it is not hurried."""
        self._patience += 1
        try:
            yield
        finally:
            self._patience -= 1

    def missing(self) -> str | None:
        """After a collective has failed: the ranks that give no sign of life any more, in words, with their hosts.

        Takes some seconds. None if all are there, or nobody watches.
        """
        if self._thread is None or not self._thread.is_alive():
            return None
        # Speaking, hearing and judging are each up to an interval late.
        time.sleep(6 * self._interval)
        gone = [rank for rank, seen in enumerate(self._seen) if not seen.left and seen.silent > 2.5 * self._interval]
        return self._list(gone) if gone else None

    def stop(self) -> None:
        """The end, of this rank, of watching and being watched."""
        self._stopping.set()
        if self._thread is not None:
            self._silent.wait(timeout=2 * LONGEST_INTERVAL)
            self._thread = None

    # -- in the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Judge by what was heard. Talking is another thread's: a call to a store that is stopped may never return."""
        threading.Thread(target=self._talk, name="watch talk", daemon=True).start()
        last = time.monotonic()
        while not self._stopping.wait(self._interval):
            now = time.monotonic()
            # After a pause of this very process (SIGSTOP, a suspended job) nobody can be blamed for the time it took.
            passed, last = min(now - last, 2 * self._interval), now
            heard, self._heard = self._heard, None
            for seen, words in zip(self._seen, heard or [seen.words for seen in self._seen], strict=True):
                seen.hear(words, passed)
            self._judge()

    def _talk(self) -> None:
        while True:
            stopping = self._stopping.is_set()
            try:
                self._speak(LEFT if stopping else None)
                self._listen()
            except (dist.DistError, RuntimeError, OSError):  # rank 0 is gone or stopped
                with contextlib.suppress(dist.DistError, RuntimeError, OSError):
                    self._store = self._connect()
            if stopping:
                return self._silent.set()
            self._stopping.wait(self._interval)

    def _speak(self, words: bytes | None = None) -> None:
        self._beats += 1
        mood = "patient" if self._patience else "busy"
        words = words or f"{self._beats} {mood} {self._steps} {self._doing()}".encode()
        if self._store is not None:
            self._store.set(str(self._runtime.rank), words)
        else:
            self._heard = [words]

    def _listen(self) -> None:
        if self._store is None:
            return
        if self._runtime.is_main:
            self._heard = self._store.multi_get([str(rank) for rank in range(self._runtime.world_size)])
            return
        said, verdict = self._store.multi_get(["0", VERDICT])
        self._heard = [said]
        if verdict:
            self._end(verdict.decode(), speak=False)

    def _judge(self) -> None:
        here = [(rank, seen) for rank, seen in enumerate(self._seen) if not seen.left]
        silent = [rank for rank, seen in here if seen.silent >= self._seconds]
        if silent:
            self._end(
                f"{self._list(silent)} gave no sign of life for {self._seconds:g} s (stopped, or its node is lost)"
            )
        if not self._runtime.is_main or any(seen.patient or seen.silent > 3 * self._interval for _, seen in here):
            return  # of a rank that has fallen silent the others are only waiting
        if not any(seen.still >= self._seconds for _, seen in here):
            return
        # Not the one that has stood still for longest: it may only have begun to wait first.
        behind = min(seen.steps for _, seen in here)
        suspects = [rank for rank, seen in here if seen.steps == behind]
        # In a step that all take together the one that waits for something else than the others holds them up.
        elsewhere = [rank for rank in suspects if "waiting" in self._seen[rank].progress]
        suspects = elsewhere or suspects
        words = self._seen[suspects[0]].progress.split(maxsplit=2)[2:]
        self._end(
            f"no step was finished for {self._seconds:g} s; {self._list(suspects)} stands at: {' '.join(words) or 'unknown'}. "
            "Where every rank stands is printed above (in the log of its node); train.hang_seconds sets the patience"
        )

    def _end(self, text: str, speak: bool = True) -> None:
        """The end of this process, and through the store of the others."""
        if self._stopping.is_set():
            return
        rank = self._runtime.rank
        if "no step was finished" in text:
            print(f"rank {rank} stands here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        # Where rank 0 is the one that is lost, rank 1 speaks, and the first of every node, for they may share rank 0's fate.
        if speak and (rank <= 1 or self._runtime.local_rank == 0):
            print(f"failed: {text}", file=sys.stderr, flush=True)
            if rank <= 1:
                self._last_words(text)
        if rank == 0 and self._store is not None:
            with contextlib.suppress(dist.DistError, RuntimeError, OSError):
                self._store.set(VERDICT, text)
            time.sleep(3 * self._interval)  # the others read it until here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)

    # -- names and addresses ---------------------------------------------------------------------------------------------

    def _from_all(self, mine: Any) -> list[Any]:
        said: list[Any] = [None] * self._runtime.world_size
        dist.all_gather_object(said, mine, group=self._runtime.control)
        return said

    def _list(self, ranks: list[int]) -> str:
        more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
        return ", ".join(self._names[rank] for rank in ranks[:NAMED]) + more

    def _open_store(self) -> tuple[str, int] | None:
        """Where the store is; rank 0 makes it, on any free port of the address where the ranks met. None without one."""
        if self._runtime.is_main and self._runtime.world_size > 1:
            _allow_open_files(self._runtime.world_size)
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            with contextlib.suppress(dist.DistError, RuntimeError, OSError):
                self._server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout())
                self._server.set(VERDICT, "")
        return self._runtime.broadcast((host, self._server.port) if self._server is not None else None)

    def _connect(self) -> dist.TCPStore | None:
        """A connection of the thread's own: the process group's would be held by whatever the main thread waits for."""
        if self._runtime.world_size == 1:
            return None
        if self._address is None:
            raise OSError("rank 0 has no store")
        return dist.TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=self._timeout())

    def _timeout(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=max(1.0, min(10.0, self._seconds / 2)))


def _allow_open_files(connections: int) -> None:
    """The usual 1,024 open files are too few for the connections of some thousand ranks; more may be had for the asking."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + connections if hard == resource.RLIM_INFINITY else min(hard, soft + connections)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
