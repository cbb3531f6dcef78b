"""The folder of a shard cache: what lies in it, what it may hold, and who may write or remove what.

Files of ours are

- ``SHA256.tar``: a whole shard whose sha256 was compared; nothing else ever has this name;
- ``SHA256.SIZE.part``: the beginning of a shard of SIZE bytes; it counts as SIZE. Whoever holds its lock (flock) may write to it. A lock
  ends with its process, however that ends, and what the file holds then is where the next one goes on;
- ``lock``: held for the moments in which room is made or a file gets its final name.

Who will soon want a whole shard holds a shared lock on it; files that nobody wants go first, those used longest ago before others.
Whatever else lies in the folder is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_dist.data.fetching import Wanted
from ddpm_dist.errors import UserError

OURS = re.compile(r"([0-9a-f]{64})\.(?:tar|(\d{1,18})\.part)")
FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
LOCK_PAUSE = 0.005


class Elsewhere(Exception):
    """Another process fetches this shard."""


class NoRoom(Exception):
    """What is in use or wanted sooner fills the budget."""


def file_of(handle: int) -> tuple[int, int]:
    """Device and inode of an open file, which tell it from another of the same name."""
    found = os.fstat(handle)
    return found.st_dev, found.st_ino


@dataclass
class Part:
    """A shard that this process may write: its file, open and locked."""

    shard: Wanted
    path: Path
    handle: int

    def leave(self) -> None:
        """Let go of it; a beginning stays for whoever goes on with it."""
        with contextlib.suppress(OSError):
            if os.fstat(self.handle).st_size == 0:
                os.unlink(self.path)
        os.close(self.handle)


@dataclass
class _File:
    name: str
    sha256: str
    size: int
    used: float
    is_part: bool


class CacheFolder:
    """A folder of at most ``budget`` bytes, shared with other processes. Thread-safe.

    Raises:
        UserError: it cannot be made or written, or its file system has no locks.
    """

    def __init__(self, folder: Path, budget: int, patience: float) -> None:
        self.folder, self.budget = Path(folder), budget
        self._patience, self._mutex = patience, threading.Lock()
        with self._refusals():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            pass

    def open(self, shard: Wanted, keep: bool = False) -> int | None:
        """A descriptor of the whole shard, or None. keep: with a shared lock, so that others remove it last."""
        with contextlib.suppress(OSError):
            handle = os.open(self.folder / f"{shard.sha256}.tar", os.O_RDONLY | FLAGS)
            try:
                if os.fstat(handle).st_size == shard.size and (not keep or self.keep(handle)):
                    with contextlib.suppress(OSError):  # someone else's file
                        os.utime(handle)
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        return None

    def remove_damaged(self, shard: Wanted) -> tuple[int, int] | None:
        """Remove the file of a shard if its sha256 is not its name any more; returns which file that was (``file_of``)."""
        path = self.folder / f"{shard.sha256}.tar"
        with self._refusals():
            try:
                handle = os.open(path, os.O_RDONLY | FLAGS)
            except FileNotFoundError:
                return None
            with open(handle, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    return None
                damaged = os.fstat(handle)
                with self._alone(), contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.lstat(path), damaged):  # another process may have fetched it meanwhile
                        os.unlink(path)
                return file_of(handle)

    @staticmethod
    def keep(handle: int) -> bool:
        """Take the shared lock; False where the file is just being removed."""
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return os.fstat(handle).st_nlink > 0

    @staticmethod
    def unkeep(handle: int) -> None:
        """Give the shared lock back; the descriptor stays open."""
        fcntl.flock(handle, fcntl.LOCK_UN)

    def arrived(self, shard: Wanted) -> int:
        """How many bytes of the shard another process has."""
        try:
            return os.stat(self._part_path(shard)).st_size
        except OSError:
            return 0

    def claim(
        self, shard: Wanted, later: Sequence[str], sooner: Sequence[str], now: bool, give_up: Callable[[str], None]
    ) -> Part:
        """Make room for the shard and become the one that fetches it.

        Args:
            later, sooner: sha256 of what this process wants after this shard (soonest first), and before it.
            now: a reader waits: then others' and later shards make room too; else only what nobody wants sooner.
            give_up: called before a shard of ``later`` is removed.

        Raises:
            Elsewhere: another process fetches it (or has just finished).
            NoRoom: too much is in use.
            UserError: the folder refuses.
        """  # fmt: skip
        path = self._part_path(shard)
        if self._is_locked(path):  # many ask, so they ask without the lock of the folder
            raise Elsewhere
        with self._refusals(), self._alone():
            if (whole := self.open(shard)) is not None:
                os.close(whole)
                raise Elsewhere
            with contextlib.suppress(FileNotFoundError):  # of another size: not what its name says
                os.unlink(self.folder / f"{shard.sha256}.tar")
            handle = os.open(path, os.O_RDWR | os.O_CREAT | FLAGS, 0o666)
            part = Part(shard, path, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_nlink == 0:  # its owner gave it up at this moment
                    raise BlockingIOError
            except BlockingIOError:
                os.close(handle)
                raise Elsewhere from None
            except BaseException:
                os.close(handle)
                raise
            try:
                if not self._make_room(shard, list(later), set(sooner), now, give_up):
                    raise NoRoom
                os.utime(handle)
            except BaseException:
                part.leave()
                raise
        return part

    def publish(self, part: Part) -> int:
        """Give a whole and verified part its final name; returns a descriptor for reading. Raises UserError."""
        with self._refusals(), self._alone():
            handle = os.open(part.path, os.O_RDONLY | FLAGS)
            try:
                os.rename(part.path, self.folder / f"{part.shard.sha256}.tar")
            except BaseException:
                os.close(handle)
                raise
        os.close(part.handle)
        return handle

    def _part_path(self, shard: Wanted) -> Path:
        return self.folder / f"{shard.sha256}.{shard.size}.part"

    @staticmethod
    def _is_locked(path: Path) -> bool:
        try:
            handle = os.open(path, os.O_RDONLY | FLAGS)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError:
            return True
        finally:
            os.close(handle)

    def _make_room(self, shard: Wanted, later: list[str], sooner: set[str], now: bool, give_up: Callable) -> bool:
        """Remove files until the budget holds, this shard's part included; False where that cannot be done."""
        files = sorted(self._files(), key=lambda file: file.used)
        excess = sum(file.size for file in files) - self.budget
        if excess <= 0:
            return True
        files = [file for file in files if file.name != self._part_path(shard).name]
        wanted = sooner.union(later)
        unwanted = [file for file in files if file.sha256 not in wanted]
        whole = {file.sha256: file for file in files if not file.is_part}
        mine_later = [whole[sha256] for sha256 in reversed(later) if sha256 in whole]
        rounds = [(unwanted, False), (mine_later, now)]
        if now:
            rounds.append(([file for file in files if not file.is_part], True))
        gone: set[str] = set()
        for candidates, force in rounds:
            for file in candidates:
                if excess <= 0:
                    return True
                if file.name in gone:
                    continue
                if file.sha256 in wanted:
                    give_up(file.sha256)
                if self._remove(file, force):
                    gone.add(file.name)
                    excess -= file.size
        return excess <= 0

    def _files(self) -> Iterator[_File]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if found := OURS.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        facts = entry.stat(follow_symlinks=False)
                        size = int(found[2]) if found[2] else facts.st_size
                        yield _File(entry.name, found[1], size, facts.st_mtime, bool(found[2]))

    def _remove(self, file: _File, force: bool) -> bool:
        """Remove a file that nobody holds a lock on, or (force) any."""
        path = self.folder / file.name
        try:
            handle = os.open(path, os.O_RDONLY | FLAGS)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                force = True
            if force:
                os.unlink(path)
            return force
        except OSError:
            return False
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of the folder."""
        give_up_at = time.monotonic() + self._patience
        with self._mutex, self._refusals():
            handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | FLAGS, 0o666)
            try:
                while True:
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > give_up_at:
                            raise UserError(
                                f"another process holds {self.folder / 'lock'} and does not go on: end it, or choose another "
                                "data.cache_dir"
                            ) from None
                    time.sleep(LOCK_PAUSE)
                yield
            finally:
                os.close(handle)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be used as data.cache_dir: {error.strerror}; it must be a folder on a local disk where this "
                "user may write"
            ) from None
