"""A rank that is stopped, killed or stuck ends the job in bounded time and is named."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import join

from ddpm_dist.watch import Watch

SECONDS = 3.0
SAYS = re.compile(r"rank (\d+) \(process (\d+) on \S+\)")


def work(rank: int, world: int, folder: Path, stuck: int | None, tries: int = 1) -> None:
    """A job of endless steps that wait for each other; rank ``stuck`` waits for something that never comes, in step 5."""
    sys.stderr = open(folder / f"{rank}.err", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    runtime = join(rank, world, folder / "meeting")
    doing = ["computing"]
    watch = Watch(runtime, SECONDS, lambda: doing[0], (folder / f"{rank}.words").write_text)
    for step in range(1_000_000):
        if step == 5:
            (folder / f"{rank}.pid").write_text(str(os.getpid()))
            if rank == stuck:
                for attempt in range(tries):
                    doing[0] = f"waiting for data, attempt {attempt}"
                    time.sleep(SECONDS / 3)
                time.sleep(1000)
        torch.distributed.all_reduce(torch.zeros(1), group=runtime.control)
        time.sleep(0.01)
        watch.step()


def start(family, folder: Path, world: int, stuck: int | None = None, tries: int = 1) -> list:
    ranks = [family.start(work, rank, world, folder, stuck, tries) for rank in range(world)]
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.pid"))) < world:
        assert time.monotonic() < deadline, [path.read_text() for path in folder.glob("*.err")]
        time.sleep(0.05)
    return ranks


def words(folder: Path) -> str:
    """What was said, by whoever spoke, in all."""
    return "".join(path.read_text() for path in sorted(folder.glob("*.err")))


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stopped_rank_is_named_and_the_others_end(family, tmp_path, victim):
    ranks = start(family, tmp_path, 3)
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    others = [rank for number, rank in enumerate(ranks) if number != victim]
    assert family.codes(*others, seconds=60) == [1, 1]
    assert {SAYS.search(line).groups() for line in words(tmp_path).splitlines() if "failed:" in line} == {
        (str(victim), str(ranks[victim].pid))
    }
    # For exit.json: on rank 0, or rank 1 where rank 0 is the one.
    assert "no sign of life" in (tmp_path / f"{0 if victim else 1}.words").read_text()


@pytest.mark.parametrize("tries", [1, 1000])
def test_a_rank_that_gets_nowhere_is_named_and_every_rank_says_where_it_stands(family, tmp_path, tries):
    ranks = start(family, tmp_path, 3, stuck=2, tries=tries)
    assert family.codes(*ranks, seconds=60) == [1, 1, 1]
    said = (tmp_path / "0.words").read_text()
    assert SAYS.findall(said) == [("2", str(ranks[2].pid))] and "stands at: waiting for data" in said
    for rank in range(3):
        text = (tmp_path / f"{rank}.err").read_text()
        assert f"rank {rank} stands here:" in text and "in work" in text


def test_one_process_alone_is_watched(family, tmp_path):
    (only,) = start(family, tmp_path, 1, stuck=0)
    assert family.codes(only, seconds=60) == [1]
    assert SAYS.findall((tmp_path / "0.words").read_text()) == [("0", str(only.pid))]


def test_a_pause_of_the_whole_job_is_nobodys_fault(family, tmp_path):
    ranks = start(family, tmp_path, 2)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(2 * SECONDS)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGCONT)
    time.sleep(SECONDS / 2)
    assert [rank.exitcode for rank in ranks] == [None, None], words(tmp_path)


def long_silence(rank: int, folder: Path, patient: bool) -> None:
    runtime = join(rank, 2, folder / "meeting")
    watch = Watch(runtime, 1.0, lambda: "at work", lambda text: None)
    if patient:
        with watch.patience():
            time.sleep(3.0)
    runtime.barrier()
    watch.stop()
    time.sleep(2.0 if rank else 0.0)  # nobody is missed after the end
    runtime.barrier()
    os._exit(0)


def test_patience_and_the_end_are_not_taken_for_a_hang(family, tmp_path):
    ranks = [family.start(long_silence, rank, tmp_path, rank == 0) for rank in range(2)]
    assert family.codes(*ranks) == [0, 0]


def lose_a_peer(rank: int, folder: Path) -> None:
    runtime = join(rank, 3, folder / "meeting")
    watch = Watch(runtime, 600.0)  # the default: hours would pass before the watch alone said something
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    try:
        while True:
            torch.distributed.all_reduce(torch.zeros(1), group=runtime.control)
    except RuntimeError:
        (folder / f"{rank}.missing").write_text(watch.missing() or "nobody")
    os._exit(0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_died_is_named_after_the_collective_has_failed(family, tmp_path, victim):
    ranks = [family.start(lose_a_peer, rank, tmp_path) for rank in range(3)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    ranks[victim].kill()
    codes = family.codes(*ranks)
    assert codes[victim] == -9
    speaker = 1 if victim == 0 else 0
    assert SAYS.findall((tmp_path / f"{speaker}.missing").read_text()) == [(str(victim), str(ranks[victim].pid))]
