"""Work on many items in several processes, results in the order of the items.

``concurrent.futures.ProcessPoolExecutor`` has one pipe for the results of all its processes. Where one of them is killed while it
writes into it, the reader waits for the rest of that result for ever, since the others keep the pipe open. Here every process has a
pipe of its own, which ends with it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ddpm_dist.errors import UserError

T, R = TypeVar("T"), TypeVar("R")
AHEAD = 3  # items in the air for each process


class _InProcess(Exception):
    """The traceback of an error as the process saw it, shown as its cause."""


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int, name: Callable[[T], str] = str) -> Iterator[R]:
    """``work`` of every item, in their order; at most a few items for each process are held in memory.

    With one worker everything happens in this process. Whatever ``work`` raises is raised here, in its turn.

    Args:
        name: of an item, for the error.

    Raises:
        UserError: a process was gone before its result was there; at which item.
    """
    if workers == 1:
        yield from map(work, items)
        return
    # Fresh processes, not forks: a fork of a process that runs threads (torch, DALI) may hang.
    context = multiprocessing.get_context("spawn")
    processes, idle = [], queue.SimpleQueue[Connection]()
    threads = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends with the process
            processes.append(process)
            idle.put(ours)
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(threads.submit(_ask, idle, item, name))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for process in processes:
            process.terminate()
        threads.shutdown(wait=True, cancel_futures=True)
        for process in processes:
            process.join()
        while not idle.empty():
            idle.get().close()


def _ask(idle: queue.SimpleQueue[Connection], item: Any, name: Callable[[Any], str]) -> Any:
    """In a thread of the parent: the result of ``item``, from a process that has nothing to do."""
    process = idle.get()
    try:
        process.send(item)
        result, error, trace = process.recv()
    except (EOFError, OSError):
        raise UserError(
            f"a process died (killed for lack of memory?) at {name(item)}: try again with fewer --workers"
        ) from None
    finally:
        idle.put(process)
    if error is not None:
        raise error from _InProcess(f"\n{trace}")
    return result


def _serve(parent: Connection, work: Callable[[Any], Any]) -> None:
    """In a process: results for items, until the parent has no more. Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = parent.recv()
        except EOFError:
            return
        try:
            reply = (work(item), None, "")
        except Exception as error:
            reply = (None, error, traceback.format_exc())
        parent.send(reply)


def _end_with_parent() -> None:
    """Even one that was killed is not outlived."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
