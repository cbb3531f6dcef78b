"""Work in several processes: results in order, errors and deaths in their turn, nothing left behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import struct
import sys
import time

import pytest

from ddpm_dist.data.process_pool import AHEAD, in_order
from ddpm_dist.errors import UserError

MUCH = 4 << 20  # far more than a pipe holds


def double(number: int) -> tuple[int, int]:
    time.sleep(0.05 if number % 3 == 0 else 0.0)
    return 2 * number, os.getpid()


def grow(data: bytes) -> bytes:
    return data + data


def fail_at_5(number: int) -> int:
    if number == 5:
        raise KeyError("five")
    return number


def die_at_5(number: int) -> bytes:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes(MUCH)


def die_while_sending(number: int) -> bytes:
    """The length of the result is in the pipe, and of the result itself the beginning."""
    if number == 2:
        pipe = sys._getframe(1).f_locals["parent"]
        os.write(pipe.fileno(), struct.pack("!i", MUCH) + b"begun")
        os.kill(os.getpid(), signal.SIGKILL)
    return b""


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order_from_all_processes(workers):
    results, pids = zip(*in_order(double, range(20), workers), strict=True)
    assert list(results) == [2 * number for number in range(20)]
    assert len(set(pids)) == workers and (os.getpid() in pids) == (workers == 1)


def test_large_items_and_results_do_not_wait_for_each_other():
    results = list(in_order(grow, (bytes([number]) * MUCH for number in range(8)), 2))
    assert [result[0] for result in results] == list(range(8)) and {len(result) for result in results} == {2 * MUCH}


def test_an_endless_source_is_read_no_further_than_needed():
    read = []
    source = (read.append(number) or number for number in itertools.count())
    before = set(multiprocessing.active_children())
    results = in_order(double, source, 2)
    assert [next(results)[0] for _ in range(3)] == [0, 2, 4]
    assert len(set(multiprocessing.active_children()) - before) == 2
    results.close()
    assert len(read) <= 3 + 2 * AHEAD and set(multiprocessing.active_children()) == before


def test_an_error_comes_in_its_turn_with_the_traceback_of_its_process():
    results = in_order(fail_at_5, range(100), 2)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="five") as caught:
        next(results)
    assert "in fail_at_5" in str(caught.value.__cause__)


@pytest.mark.parametrize("work, last", [(die_at_5, 5), (die_while_sending, 2)])
def test_a_killed_process_is_an_error_that_names_its_item(work, last):
    results = in_order(work, range(100), 2, "shard {}".format)
    for _ in range(last):
        next(results)
    with pytest.raises(UserError, match=rf"a process died .* at shard {last}: try again with fewer"):
        next(results)
