"""One shard into one file: goes on where it was cut, tries again with growing pauses, and compares size and sha256."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ddpm_dist.data.remote import open_source
from ddpm_dist.data.remote_source import Lasting, Passing, Source, public_name, refuse_command
from ddpm_dist.errors import UserError

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds to connect, and for which one read may wait
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
LEAST_SPEED = 20_000  # bytes/s; what comes slower for long counts as staying away
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Wanted:
    """A shard as the index describes it. Raises UserError where the index cannot mean it."""

    url: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256) or self.size <= 0 or "\0" in self.url:
            raise UserError(
                f"shard {self.name}: a size of {self.size} bytes or its sha256 cannot be right: index it again"
            )

    @property
    def name(self) -> str:
        """For messages: without credentials. Commands are told apart by the sha256."""
        return public_name(self.url) + (f" (sha256 {self.sha256[:12]}...)" if self.url.startswith("pipe:") else "")


class Patience:
    """How long nothing may happen: ``seconds``, and what arrives buys time back, up to that again."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._furthest = seconds, 0
        self._deadline = time.monotonic() + seconds

    def reached(self, place: int) -> None:
        """So many bytes are there. What was there before, and comes again after a cut, buys nothing."""
        if place > self._furthest:
            bought = (place - self._furthest) / LEAST_SPEED
            self._deadline = min(time.monotonic() + self.seconds, self._deadline + bought)
            self._furthest = place

    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._deadline - time.monotonic())


class Stopped(Exception):
    """The cache is being closed."""


class Stop:
    """Ends downloads from another thread."""

    def __init__(self) -> None:
        self._event, self._lock, self._sources = threading.Event(), threading.Lock(), set()

    def stop(self) -> None:
        """Make every download end with Stopped."""
        with self._lock:
            self._event.set()
            sources = list(self._sources)
        for source in sources:
            source.stop()

    def wait(self, seconds: float) -> None:
        """Raises Stopped, also at once."""
        if self._event.wait(seconds):
            raise Stopped

    @contextlib.contextmanager
    def watching(self, source: Source):
        """``stop`` reaches this source."""
        with self._lock:
            self._sources.add(source)
        try:
            self.wait(0)
            yield source
        finally:
            with self._lock:
                self._sources.discard(source)


class _Slow(Passing):
    """Time ran out while bytes came."""


class _Wrong(Exception):
    """What came is not the shard of the index; the text says why."""


class Download:
    """The bytes of ``shard`` into the file ``handle``, which may hold its beginning; ``run`` does it.

    Args:
        handle: descriptor, open for reading and writing; no one else writes to the file.
        folder: where the file lies, for messages.
        count: told of every number of bytes that came.
    """

    def __init__(
        self, shard: Wanted, handle: int, folder: str, allow_pipe: bool, patience: Patience, stop: Stop, count: Callable[[int], None]
    ) -> None:  # fmt: skip
        self._shard, self._handle, self._folder, self._allow_pipe = shard, handle, folder, allow_pipe
        self._patience, self._stop, self._count = patience, stop, count
        self._goes_on = True  # whether a download that was cut may go on where it stopped

    def run(self) -> None:
        """Returns when the file is whole, right and on disk.

        Raises:
            UserError: it stays away, is another one, or the disk is full.
            Stopped: the cache is being closed.
        """
        shard = self._shard
        refuse_command(shard.url, self._allow_pipe)
        try:
            self._take_over()
        except OSError as error:
            raise self._disk(error) from None
        for last_try in (False, True):
            try:
                self._fetch()
                if self._hash.hexdigest() != shard.sha256:
                    # What was here before, or a server that sends other bytes than the range it names, is not trusted twice.
                    self._goes_on = False
                    raise _Wrong("its sha256 is not the one in the index")
                os.fsync(self._handle)
                return
            except _Wrong as problem:
                self._start_again()
                self._patience = Patience(self._patience.seconds)
                if last_try:
                    raise UserError(
                        f"shard {shard.name} is not the one that was indexed, fetched twice: {problem}; it was damaged or replaced: "
                        "put the right one there, or run python -m ddpm_dist.index again"
                    ) from None
            except OSError as error:
                raise self._disk(error) from None

    def _fetch(self) -> None:
        pause, tries, began, reason = FIRST_PAUSE, 0, time.monotonic(), ""
        while self._place < self._shard.size:
            before = self._place
            tries += 1
            try:
                self._attempt()
                continue
            except Lasting as problem:
                raise UserError(f"shard {self._shard.name} cannot be fetched: {problem}") from None
            except Passing as problem:
                # At the end of patience whatever comes is too slow; what was wrong before says more.
                reason = reason if reason and isinstance(problem, _Slow) else str(problem)
                after = problem.after
            self._stop.wait(0)
            left = self._patience.left()
            if left <= 0:
                took = time.monotonic() - began
                raise UserError(
                    f"shard {self._shard.name} stays away: {reason} ({tries} tries in {took:.0f} seconds, {self._place} of "
                    f"{self._shard.size} bytes came); look after the store and start again: nothing is lost"
                )
            pause = FIRST_PAUSE if self._place > before else min(2 * pause, LONGEST_PAUSE)
            self._stop.wait(min(left, max(after, pause * random.uniform(0.5, 1.0))))

    def _attempt(self) -> None:
        size = self._shard.size
        timeout = min(TIMEOUT, max(1.0, self._patience.left()))
        with open_source(self._shard.url, self._place if self._goes_on else 0, timeout) as source:
            with self._stop.watching(source):
                if source.total is not None and source.total != size:
                    raise _Wrong(f"it has {source.total} bytes, the index says {size}")
                if source.begin != self._place:
                    self._start_again()
                while self._place < size:
                    data = source.read(min(CHUNK, size - self._place))
                    if not data:
                        source.ended()
                        if source.tells_end:
                            raise _Wrong(f"it has {self._place} bytes, the index says {size}")
                        raise Passing("the connection was cut")
                    self._write(data)
                    self._stop.wait(0)
                    if self._place < size and self._patience.left() <= 0:
                        raise _Slow(f"it comes at less than {LEAST_SPEED // 1000} kB/s")
                if source.total is None and source.read(1):
                    raise _Wrong(f"it has more bytes than the {size} that the index says")

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._count(len(data))
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._handle, rest, self._place)
            self._place, rest = self._place + written, rest[written:]
        self._patience.reached(self._place)

    def _take_over(self) -> None:
        """Begin with what an earlier download left."""
        self._place, self._hash = 0, hashlib.sha256()
        if os.fstat(self._handle).st_size > self._shard.size:
            return self._start_again()
        while data := os.pread(self._handle, CHUNK, self._place):
            self._stop.wait(0)
            self._hash.update(data)
            self._place += len(data)
        self._patience.reached(self._place)

    def _start_again(self) -> None:
        os.ftruncate(self._handle, 0)
        self._place, self._hash = 0, hashlib.sha256()

    def _disk(self, error: OSError) -> UserError:
        with contextlib.suppress(OSError):
            self._start_again()  # gives back what it took
        what = error.strerror or "input/output error"
        advice = "free some space there or lower data.cache_dir_gb" if error.errno in FULL else "look after the disk"
        return UserError(
            f"{self._folder} (data.cache_dir) cannot take shard {self._shard.name} of {self._shard.size} bytes: {what}; "
            f"{advice}, or choose another data.cache_dir"
        )
