"""Writing a shard folder: encode in parallel, write tars in order, publish the whole folder by one rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

from ddpm_dist.data.encode import Encoded, Item, Recipe, encode_chunk
from ddpm_dist.data.tars import Scan, scan_shard
from ddpm_dist.errors import UserError

CHUNK = 32  # images that travel to a worker process together
MAX_SHARD_BYTES = 2_000_000_000
OUR_FILES = re.compile(r"[a-z0-9-]+-\d{6,}\.tar|index\.(json|npy)")


# ---- encoding in parallel -------------------------------------------------------------------------------------------


def encode_all(items: Iterable[tuple[int, Item]], recipe: Recipe, workers: int) -> Iterator[Encoded]:
    """Encode every (position, item), results in the order of the items whatever ``workers`` is.

    At most a few chunks per worker are held in memory. With one worker everything happens in this process.

    Raises:
        UserError: a worker process died.
    """
    items = iter(items)
    chunks = iter(lambda: list(islice(items, CHUNK)), [])
    if workers == 1:
        for chunk in chunks:
            yield from encode_chunk(chunk, recipe)
        return
    # Fresh processes, not forks: a fork of a process that runs threads (torch, DALI) may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    pending = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(encode_chunk, chunk, recipe))
            if len(pending) >= 3 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process of pack died (killed for lack of memory?): try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and never outlive it, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- writing tars ---------------------------------------------------------------------------------------------------


class _Tar:
    """The file under a tar writer. After ``drop`` it swallows what finalisers still want to write."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "xb")

    def write(self, data: bytes) -> int:
        return len(data) if self.file.closed else self.file.write(data)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


def write_tars(folder: Path, name: str, encoded: Iterable[Encoded], extension: str, per_shard: int) -> list[Scan]:
    """Write samples into ``NAME-000000.tar`` and so on with ``webdataset.ShardWriter``, and read every tar back.

    A shard ends after ``per_shard`` samples or when it has reached 2 GB. The bytes depend only on the samples: no
    time, user or umask gets into them. A sample's key is its position in the source.

    Returns:
        What each shard holds, as found in the file that was written.

    Raises:
        OSError: the disk is full, for instance.
    """
    from webdataset import ShardWriter

    current: list[_Tar] = []
    scans: list[Scan] = []

    def opener(shard: str) -> _Tar:
        current[:] = [_Tar(folder / shard)]
        return current[0]

    def finished(shard: str) -> None:
        current[0].finish()
        scans.append(scan_shard(folder / shard))

    writer = None
    try:
        for sample in encoded:
            if writer is None:  # opens its first shard at once, which must not stay empty
                writer = ShardWriter(
                    f"{name}-%06d.tar", per_shard, MAX_SHARD_BYTES, finished, verbose=0, opener=opener,
                    encoder=False, mtime=0, user="", group="", mode=0o644,
                )  # fmt: skip
            files = {"__key__": f"{sample.position:08d}", extension: sample.data}
            if sample.label >= 0:
                files["cls"] = str(sample.label).encode("ascii")
            writer.write(files)
        if writer is not None:
            writer.close()
    except BaseException:
        for tar in current:
            tar.drop()
        raise
    return scans


# ---- a folder that appears complete or not at all --------------------------------------------------------------------


@contextlib.contextmanager
def folder_in_one_piece(out: Path) -> Iterator[Path]:
    """Yield ``OUT.incomplete`` to write into; when the block ends well it is flushed to disk and renamed to ``out``.

    When the block raises, what it wrote is removed. A leftover of a pack that was killed is replaced.

    Raises:
        UserError: ``out`` exists and is not an empty folder, another pack is writing there, something that is not ours
            lies in the way, or the file system refuses (full, read-only, no permission).
    """
    out = Path(os.path.realpath(out))
    aside = out.with_name(out.name + ".incomplete")
    try:
        _check_free(out)
        lock = _make_aside(aside)
        try:
            try:
                yield aside
                _fsync_folder(aside)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            _publish(aside, out)
        finally:
            os.close(lock)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space or choose another --out; nothing was kept" if full else "choose another --out"
        raise UserError(f"cannot write {out}: {error.strerror or error}; {advice}") from None


def _check_free(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another --out, or remove it first")
        if os.path.ismount(out):
            raise UserError(f"{out} is a mount point and cannot be replaced as a whole: use a folder inside it")
    elif os.path.lexists(out):
        raise UserError(f"{out} exists and is not a folder: choose another --out")


def _make_aside(aside: Path) -> int:
    """Create ``aside`` empty and lock it; returns the descriptor that holds the lock."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(aside):
        if aside.is_symlink() or not aside.is_dir():
            raise UserError(f"{aside} is in the way and is not a leftover of pack: move it away")
        lock = _lock(aside)
        try:
            with os.scandir(aside) as entries:
                alien = [entry.name for entry in entries if not _is_ours(entry)]
            if alien:
                raise UserError(
                    f"{aside} is in the way and holds something that pack did not write ({alien[0]}): move it away"
                )
            shutil.rmtree(aside)
        finally:
            os.close(lock)
    os.mkdir(aside)
    return _lock(aside)


def _is_ours(entry: os.DirEntry) -> bool:
    return OUR_FILES.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another pack is writing {folder}: wait for it, or choose another --out") from None
    except OSError:
        pass  # some network file systems have no locks; then two packs must not share one --out
    return descriptor


def _publish(aside: Path, out: Path) -> None:
    try:
        os.rename(aside, out)  # replaces an empty folder, and only an empty one
    except OSError as error:
        raise UserError(
            f"{out} cannot be put in place ({error.strerror}): the complete data is in {aside}, rename it yourself"
        ) from None
    _fsync_folder(out.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
