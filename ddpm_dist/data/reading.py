"""The files of a micro-batch from the shards: by the loader's own thread while that is quick, by several threads where storage is slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ddpm_dist.data import checksums
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError

READERS = 4
# Seconds for an image. From the page cache it takes 10 microseconds, and there each further thread only costs: they pass Python's lock
# around after every file. A network file system answers in some 500, and then it is waiting that has to be shared.
SLOW, QUICK = 200e-6, 50e-6
CALM = 32  # quick micro-batches after which the threads are given up again

Files = Sequence[bytes]


class Reader:
    """Reads micro-batches ahead of need. Use as a context manager; not thread-safe."""

    def __init__(self, index: Index, slow: bool = False, readers: int = READERS) -> None:
        self.slow = slow
        self._index, self._calm, self._readers = index, 0, readers
        checksums.prepare()
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="reader")  # starts threads when it is first asked

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, ids: np.ndarray) -> Callable[[], Files]:
        """Begin to read the samples ``ids`` (int64 (B,)); the result waits for their files in this order.

        The result raises UserError (``one_rank``: the others read other samples) naming the first that is damaged or cannot be read.
        """
        if not self.slow:
            return lambda: self._finish(*self._part(ids))
        parts = [self._pool.submit(self._part, part) for part in np.array_split(ids, min(self._readers, len(ids)))]

        def join() -> Files:
            found = [part.result() for part in parts]
            return self._finish([file for files, _ in found for file in files], sum(took for _, took in found))

        return join

    def __call__(self, ids: np.ndarray) -> Files:
        """Read them now."""
        return self.start(ids)()

    def _part(self, ids: np.ndarray) -> tuple[Files, float]:
        begin = time.monotonic()
        try:
            files = self._index.read_many(ids)
        except UserError as error:
            error.one_rank = True
            raise
        return files, time.monotonic() - begin

    def _finish(self, files: Files, took: float) -> Files:
        """took: seconds, those of all threads added."""
        each = took / max(1, len(files))
        self._calm = self._calm + 1 if each < QUICK else 0
        self.slow = each > SLOW or (self.slow and self._calm < CALM)
        return files
