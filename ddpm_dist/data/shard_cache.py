"""Shards that lie elsewhere, fetched once per node into a folder: ahead of need, several at once, shared by the node's processes.

A reader waits for the shard that it opens and for nothing else: what is already here is opened at once, what is on its way is waited
for, and anything else it fetches itself, whatever the threads that fetch ahead are doing. ``cache_folder.py`` says what lies in the
folder, ``fetching.py`` how one shard comes, ``remote.py`` from where.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from ddpm_dist.data.cache_folder import CacheFolder, Elsewhere, NoRoom, Part, file_of
from ddpm_dist.data.fetching import Download, Patience, Stop, Stopped, Wanted
from ddpm_dist.data.remote_source import refuse_command
from ddpm_dist.errors import UserError

AHEAD = 64  # shards of a wanted list that are looked at; each holds a descriptor once it is here
POLL = 0.3  # seconds between looks at what other processes do


class _Coming:
    """A shard that a thread of this process is bringing."""

    def __init__(self) -> None:
        self.done, self.waiters = False, 0
        self.handle: int | None = None  # for one of the waiters
        self.error: Exception | None = None


class ShardCache:
    """The shard cache of a process; several processes and jobs may use the same folder. Thread-safe.

    Attributes:
        bytes_fetched: that this process fetched.
        seconds_waited: that readers waited in ``open``, those of all threads added.
        hits, misses: shards that were here when they were opened, and that had to be waited for.
    """

    def __init__(
        self, folder: Path, budget: int, workers: int = 4, allow_pipe: bool = False, patience: float = 600.0
    ) -> None:
        """
        Args:
            folder: on a local disk; made if needed.
            budget: bytes that all files of the folder may take together, unfinished ones counted whole. Files that were removed
                while somebody reads them take space until they are closed.
            workers: threads that fetch ahead of need.
            allow_pipe: whether ``pipe:`` URLs are run.
            patience: seconds for which a shard may stay away (nothing of it comes, or less than 20 kB/s) before that is an error.

        Raises:
            UserError: the folder cannot be made or written.
        """
        self.bytes_fetched, self.seconds_waited, self.hits, self.misses = 0, 0.0, 0, 0
        self._folder = CacheFolder(Path(folder), budget, patience)
        self._workers, self._allow_pipe, self._patience = workers, allow_pipe, patience
        self._change = threading.Condition()
        self._stop = Stop()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._damaged: set[tuple[int, int]] = set()  # files that were given up, see ``file_of``
        self._wanted: dict[str, Wanted] = {}
        # Until these are here nothing else is fetched ahead; None: before the first ``want``.
        self._urgent: set[str] | None = None
        self._kept: dict[str, int] = {}  # wanted and here: descriptors with a shared lock
        self._coming: dict[str, _Coming] = {}
        self._failed: set[str] = set()  # not fetched ahead again; a reader tries once more and gets the reason
        self._look_again: dict[str, float] = {}  # when; of shards that other processes are fetching
        self._full_until = 0.0

    def open(self, url: str, size: int, sha256: str) -> int:
        """A descriptor for reading the whole shard, which was compared with ``sha256`` (hex); the caller closes it.

        Waits until the shard is here. The descriptor stays good when the file is removed meanwhile.

        Raises:
            UserError: naming the shard (without credentials): it stays away, is not the one of the index, is a command that is not
                allowed, is larger than the budget, or the disk is full.
        """
        shard = self._checked(url, size, sha256)
        handle = self._take(shard)
        if handle is not None:
            with self._change:
                self.hits += 1
                self._has_come(sha256)
            return handle
        began = time.monotonic()
        try:
            return self._wait_for(shard)
        finally:
            with self._change:
                self.misses += 1
                self.seconds_waited += time.monotonic() - began
                self._has_come(sha256)
                self._room_may_be_free()

    def want(self, wanted: Iterable[tuple[str, int, str]], urgent: Iterable[str] = ()) -> None:
        """What will be opened next, soonest first: (url, size, sha256) each. Returns at once.

        Takes the place of what was wanted before; what has begun to come still comes. Whatever goes wrong is told by ``open``.

        urgent: sha256 of those without which nothing can begin. At the first call only they are fetched until they are here: on a line that
        all downloads share, everything else would make the first batch wait for the last of them.
        """
        shards = {}
        for url, size, sha256 in itertools.islice(wanted, AHEAD):
            with contextlib.suppress(UserError):
                shards.setdefault(sha256, self._checked(url, size, sha256))
        with self._change:
            old = dict(self._kept)
        # What is here already is opened at once: waking threads for that would cost more than it does.
        new = {sha256: self._folder.open(shard, keep=True) for sha256, shard in shards.items() if sha256 not in old}
        with self._change:
            for sha256, handle in new.items():
                if handle is not None:
                    self._let_go(sha256)
                    self._kept[sha256] = handle
            self._wanted = {} if self._closed else shards
            self._urgent = set(urgent) if self._urgent is None else self._urgent
            self._urgent &= shards.keys() - self._kept.keys()
            for sha256 in [sha256 for sha256 in self._kept if sha256 not in self._wanted]:
                self._let_go(sha256)
            if self._closed:
                return
            self._failed &= shards.keys()
            self._look_again = {sha256: when for sha256, when in self._look_again.items() if sha256 in shards}
            missing = len(shards) - len(self._kept)
            while len(self._threads) < min(self._workers, missing):
                thread = threading.Thread(target=self._fetch_ahead, name="shards", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._room_may_be_free()

    def give_up_if_damaged(self, url: str, size: int, sha256: str) -> None:
        """Remove the copy here if it is not the shard any more: the next ``open`` fetches it again.

        Reads the whole copy. For a reader that has found something wrong in it.
        """
        damaged = self._folder.remove_damaged(self._checked(url, size, sha256))
        with self._change:
            self._let_go(sha256)
            if damaged is not None:
                self._damaged.add(damaged)

    def close(self) -> None:
        """End what is on its way (its beginning stays in the folder). Descriptors that were handed out stay good."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._stop.stop()
        for thread in self._threads:
            thread.join(5)  # one that waits for a server to answer at all ends with the process
        with self._change:
            while self._kept:
                os.close(self._kept.popitem()[1])

    def __enter__(self) -> ShardCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, url: str, size: int, sha256: str) -> Wanted:
        shard = Wanted(url, size, sha256)
        refuse_command(url, self._allow_pipe)
        if size > self._folder.budget:
            raise UserError(
                f"shard {shard.name} has {readable(size)}, data.cache_dir_gb allows {readable(self._folder.budget)}: raise it, to "
                "several shards at least"
            )
        return shard

    def _take(self, shard: Wanted) -> int | None:
        """A descriptor for a reader, where the shard is here."""
        with self._change:
            self._wanted.pop(shard.sha256, None)
            handle = self._kept.pop(shard.sha256, None)
            if handle is not None and file_of(handle) in self._damaged:  # kept while it was found out
                os.close(handle)
                handle = None
            self._room_may_be_free()
        if handle is None:
            return self._folder.open(shard)
        self._folder.unkeep(handle)
        with contextlib.suppress(OSError):
            os.utime(handle)
        return handle

    def _let_go(self, sha256: str) -> None:
        """Close what is kept of a shard. Called with the lock."""
        handle = self._kept.pop(sha256, None)
        if handle is not None:
            os.close(handle)

    def _has_come(self, sha256: str) -> None:
        """Nothing has to wait for this shard any more, or it cannot be had. Called with the lock."""
        if self._urgent and sha256 in self._urgent:
            self._urgent.remove(sha256)
            self._change.notify_all()

    def _room_may_be_free(self) -> None:
        """Wake the threads if they have something to fetch. Called with the lock."""
        self._full_until = 0.0
        if len(self._wanted) > len(self._kept):
            self._change.notify_all()

    def _wait_for(self, shard: Wanted) -> int:
        while True:
            with self._change:
                coming = self._coming.get(shard.sha256)
                if self._closed:
                    raise RuntimeError("the shard cache is closed")
                if coming is None:
                    mine = self._coming[shard.sha256] = _Coming()
                    break
                coming.waiters += 1
                try:
                    self._change.wait_for(lambda coming=coming: coming.done or self._closed)
                finally:
                    coming.waiters -= 1
                if coming.handle is not None:
                    handle, coming.handle = coming.handle, None
                    return handle
                if isinstance(coming.error, UserError):
                    raise UserError(str(coming.error)) from None
            if (handle := self._take(shard)) is not None:
                return handle
        handle = None
        try:
            handle = self._bring(shard, now=True)
        except Stopped:
            raise RuntimeError("the shard cache is closed") from None
        except UserError as error:
            mine.error = error
            raise
        finally:
            with self._change:
                del self._coming[shard.sha256]
                mine.done = True
                if handle is not None:
                    self._failed.discard(shard.sha256)
                self._change.notify_all()
        assert handle is not None
        return handle

    def _fetch_ahead(self) -> None:
        """What each of the threads does."""
        while (task := self._next()) is not None:
            shard, coming = task
            handle: int | None = None
            try:
                handle = self._bring(shard, now=False)
            except Stopped:
                pass
            except Exception as error:
                coming.error = error
            with self._change:
                del self._coming[shard.sha256]
                coming.done = True
                if coming.error is not None:
                    self._failed.add(shard.sha256)
                if coming.error is not None or handle is not None:
                    self._has_come(shard.sha256)
                if handle is not None:
                    if coming.waiters and not self._closed:
                        self._folder.unkeep(handle)
                        coming.handle = handle
                    elif shard.sha256 in self._wanted and not self._closed:
                        self._let_go(shard.sha256)  # ``want`` may just have found the finished file
                        self._kept[shard.sha256] = handle
                    else:
                        os.close(handle)
                self._change.notify_all()

    def _next(self) -> tuple[Wanted, _Coming] | None:
        """The next shard to fetch ahead; None when the cache is closed."""
        with self._change:
            while not self._closed:
                now = time.monotonic()
                left = [sha256 for sha256 in self._wanted if sha256 not in self._kept and sha256 not in self._failed]
                left = [sha256 for sha256 in left if sha256 not in self._coming]
                left = [sha256 for sha256 in left if not self._urgent or sha256 in self._urgent]
                if now >= self._full_until:
                    for sha256 in left:
                        if now >= self._look_again.get(sha256, 0.0):
                            coming = self._coming[sha256] = _Coming()
                            return self._wanted[sha256], coming
                self._change.wait(POLL if left else None)
        return None

    def _bring(self, shard: Wanted, now: bool) -> int | None:
        """Get the shard here, or (unless it is needed ``now``) None where another process fetches it or there is no room yet."""
        patience = Patience(self._patience)
        while True:
            handle = self._folder.open(shard, keep=not now)
            if handle is not None:
                return handle
            try:
                part = self._claim(shard, now)
            except Elsewhere:
                what = "another process on this node fetches it and does not go on"
                patience.reached(self._folder.arrived(shard))
                if not now:
                    with self._change:
                        self._look_again[shard.sha256] = time.monotonic() + POLL
                    return None
            except NoRoom:
                what = "other downloads fill the budget: raise data.cache_dir_gb"
                if not now:
                    with self._change:
                        self._full_until = time.monotonic() + POLL
                    return None
            else:
                return self._download(shard, part, patience, keep=not now)
            if patience.left() <= 0:
                raise UserError(f"shard {shard.name} cannot be had in {self._folder.folder}: {what}")
            self._stop.wait(POLL / 10)

    def _claim(self, shard: Wanted, now: bool) -> Part:
        with self._change:
            order = list(self._wanted)
        place = order.index(shard.sha256) if shard.sha256 in order and not now else -1
        sooner, later = order[: max(place, 0)], order[place + 1 :]
        return self._folder.claim(shard, later, sooner, now, self._give_up)

    def _give_up(self, sha256: str) -> None:
        with self._change:
            self._let_go(sha256)

    def _download(self, shard: Wanted, part: Part, patience: Patience, keep: bool) -> int:
        def count(more: int) -> None:
            with self._change:
                self.bytes_fetched += more

        published = False
        try:
            Download(shard, part.handle, str(self._folder.folder), self._allow_pipe, patience, self._stop, count).run()
            handle = self._folder.publish(part)
            published = True
        finally:
            if not published:
                part.leave()
        if keep:
            self._folder.keep(handle)  # where it is removed at this very moment the descriptor is still good
        return handle


def readable(size: int) -> str:
    """Bytes in a unit in which they are not 0: "1.500 GB", "2.5 MB", "900 bytes"."""
    if size >= 1_000_000_000:
        return f"{size / 1e9:,.3f} GB"
    return f"{size / 1e6:,.1f} MB" if size >= 1_000_000 else f"{size:,} bytes"
