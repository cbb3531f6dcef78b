"""Scanning many shards in parallel: each by one process, from its beginning to its end, results in the order of the shards."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import TypeVar

from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.shard_source import Refused, is_remote, opened, state
from ddpm_dist.data.tars import Found, Wanted, scan_stream
from ddpm_dist.data.writer import _start_worker
from ddpm_dist.errors import UserError

T, R = TypeVar("T"), TypeVar("R")
ATTEMPTS = 4  # at a remote shard


@dataclass
class Scanned:
    """A shard as it was found, what tells whether it is still the same, and why it could not be read (then the rest is void).

    ``refused``: labels that are findings because of what most labels of all shards are, and how often they occur.
    """

    found: Found
    mtime: int | None = None
    etag: str | None = None
    error: str | None = None
    reused: bool = False
    refused: dict[str, int] = field(default_factory=dict)


def scan_location(location: str, wanted: Wanted) -> Scanned:
    """Scan the shard at a location (see ``shard_source``). A remote one that breaks off is tried again from its beginning."""
    attempts = ATTEMPTS if is_remote(location) else 1
    for attempt in range(attempts):
        try:
            with opened(location) as source:
                found = scan_stream(source.read, location, wanted)
            if source.mtime is not None and state(location)[:2] != (source.bytes, source.mtime):
                return Scanned(found, error="it was changed while it was read")
            return Scanned(found, source.mtime, source.etag)
        except Refused as error:
            return Scanned(Found(location), error=str(error))
        except OSError as error:
            problem = error.strerror or str(error)
        if attempt + 1 < attempts:
            time.sleep(0.5 * 4**attempt)
    return Scanned(Found(location), error=problem)


def scan_all(locations: Iterable[str], wanted: Wanted, workers: int) -> Iterator[Scanned]:
    """:func:`scan_location` of each, by so many processes. Raises UserError where a process died."""
    return in_order(functools.partial(scan_location, wanted=wanted), locations, workers)


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``work`` of every item, in their order, at most a few results waiting. With one worker everything happens in this process.

    Raises:
        UserError: a process died.
    """
    if workers == 1:
        yield from map(work, items)
        return
    # Fresh processes, not forks: a fork of a process that runs threads may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= 3 * workers:
                yield waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool:
        names = ", ".join(public_name(str(item)) for item, _ in list(waiting)[: workers + 1])
        raise UserError(
            f"a process died (killed for lack of memory?) at one of {names}: try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
