"""A process that dies, or a disk that is full, at any file operation: real ranks, real signals, and always a good resume."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import join, own, save, strike_at, wait_until

from ddpm_dist.checkpoint import Ownership, files, published
from ddpm_dist.errors import UserError

FAILED = 3


def steps(run: Path) -> list[int]:
    return [step for step, _ in published(run / "checkpoints")]


def resume_and_save(run: Path, alone, step: int, patience: float = 1000) -> int:
    """What the next start does: returns the step it continues from, after saving ``step``."""
    _, store = own(run, alone, patience=patience)
    reader = store.newest()
    assert reader.tensor("model/w").tolist() == [float(reader.step)] * 6
    assert save(store, alone, step) is None, "the next save works"
    assert steps(run) == [step]
    store.owner.release()
    names = {path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("generation_")}
    assert all(name == f"step_{step:08d}" or ".corrupt" in name for name in names), names
    return reader.step


def save_twice(rank: int, world: int, run: Path, meeting: Path, victim: int, k: int | None) -> None:
    runtime = join(rank, world, meeting)
    _, store = own(run, runtime)
    assert save(store, runtime, 1) is None
    seen = []
    if k is None:
        files.before_operation = lambda operation, path: seen.append(operation)
    elif rank == victim:
        strike_at(k, signal.SIGKILL)
    try:
        failure = save(store, runtime, 2)
    except RuntimeError as error:  # the killed rank had not even begun to write: the agreement to begin fails
        failure = str(error)
    if k is None:
        meeting.with_name(f"operations_{rank}").write_text(" ".join(seen))
    os._exit(0 if failure is None else FAILED)


@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_sigkill_of_a_rank_at_any_file_operation_of_a_save(tmp_path, family, alone, world, victim):
    def start(name: str, k: int | None) -> list[int]:
        arguments = (tmp_path / name, tmp_path / f"meeting_{name}", victim, k)
        children = [family.start(save_twice, rank, world, *arguments) for rank in range(world)]
        return family.codes(*children)

    assert start("count", None) == [0] * world
    operations = (tmp_path / f"operations_{victim}").read_text().split()
    assert set(operations) >= {"open", "write", "fsync"} and (victim == 1 or "rename" in operations)
    publish = operations.index("rename") if victim == 0 else len(operations)
    resumed = []
    for k in range(len(operations)):
        codes = start(str(k), k)
        assert codes[victim] == -signal.SIGKILL, f"not killed at operation {k} ({operations[k]})"
        if k <= publish:  # not durable on every rank, or not renamed: it must not be seen
            assert steps(tmp_path / str(k)) == [1]
        else:
            assert 2 in steps(tmp_path / str(k))
        assert all(code == FAILED for rank, code in enumerate(codes) if rank != victim and k <= publish)
        resumed.append(resume_and_save(tmp_path / str(k), alone, 3))
    assert resumed == [1 if k <= publish else 2 for k in range(len(operations))]


def start_again(run: Path, meeting: Path, k: int | None) -> None:
    seen = []
    if k is None:
        files.before_operation = lambda operation, path: seen.append(operation)
    else:
        strike_at(k, signal.SIGKILL)
    runtime = join(0, 1, meeting)
    _, store = own(run, runtime)
    assert store.newest().step == 2
    assert save(store, runtime, 3) is None
    meeting.with_name("operations").write_text(" ".join(seen))
    os._exit(0)


def test_sigkill_at_any_file_operation_of_a_start_after_a_crash(tmp_path, family, alone):
    """Taking over from a dead owner, tidying up, setting a damaged checkpoint aside, and a first save."""
    old = tmp_path / "old"
    _, store = own(old, alone, keep_last=3)
    for step in (1, 2, 3):
        assert save(store, alone, step) is None
    os.truncate(old / "checkpoints/step_00000003/rank_00000.safetensors", 20)
    (store.owner.workplace.work / "step_00000004.incomplete").mkdir()

    def start(name: str, k: int | None) -> int:
        shutil.copytree(old, tmp_path / name)
        return family.codes(family.start(start_again, tmp_path / name, tmp_path / f"meeting_{name}", k))[0]

    assert start("count", None) == 0
    operations = (tmp_path / "operations").read_text().split()
    assert operations.count("rename") >= 6  # claim and name, twice for what is set aside, publish, remove two
    for k in range(len(operations)):
        run = tmp_path / str(k)
        assert start(run.name, k) == -signal.SIGKILL
        found = {path.name for path in run.rglob("step_00000003*") if "manifest.json" in os.listdir(path)}
        assert found, "what was damaged is kept for whoever wants to look at it"
        # Between the claim and the new owner's name nobody can say who it was: then only patience helps.
        assert resume_and_save(run, alone, 4, patience=0.3) in (2, 3)
        (aside,) = (run / "checkpoints").glob("step_00000003.corrupt*")
        assert (aside / "manifest.json").exists()
    store.owner.release()


def hold_rank_1(rank: int, run: Path, meeting: Path, k: int) -> None:
    runtime = join(rank, 2, meeting)
    _, store = own(run, runtime)
    assert save(store, runtime, 1) is None
    seen = []

    def hold(operation: str, path: Path) -> None:
        seen.append(operation)
        if len(seen) == k + 1:
            meeting.with_name("held").write_text(operation)
            wait_until(meeting.with_name("go").exists)

    if rank == 1:
        files.before_operation = hold
    os._exit(0 if save(store, runtime, 2) is None else FAILED)


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("killed", [False, True], ids=["let_go", "killed"])
def test_a_save_becomes_visible_only_when_every_rank_is_durable(tmp_path, family, k, killed):
    """Rank 1 is held before it opens, writes (twice) or flushes its file, while rank 0 has long written its own."""
    run = tmp_path / "run"
    children = [family.start(hold_rank_1, rank, run, tmp_path / "meeting", k) for rank in range(2)]
    wait_until((tmp_path / "held").exists)
    wait_until(lambda: any(run.glob("checkpoints/generation_*/work_*/step_00000002.incomplete/rank_00000.safetensors")))
    for _ in range(20):
        time.sleep(0.01)
        assert steps(run) == [1], "published before every rank had flushed"
    assert (tmp_path / "held").read_text() == ["open", "write", "write", "fsync"][k]
    if killed:
        children[1].kill()
        assert family.codes(*children) == [FAILED, -signal.SIGKILL]
        assert steps(run) == [1]
    else:
        (tmp_path / "go").touch()
        assert family.codes(*children) == [0, 0]
        assert steps(run) == [2]


def fill_the_disk_of_rank_1(rank: int, run: Path, meeting: Path) -> None:
    runtime = join(rank, 2, meeting)
    _, store = own(run, runtime)
    assert save(store, runtime, 1) is None
    for k in range(5):
        seen = []

        def fail(operation: str, path: Path, seen: list = seen, k: int = k) -> None:
            seen.append(operation)
            if len(seen) == k + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        files.before_operation = fail if rank == 1 else None
        failure = save(store, runtime, 2 + k)
        files.before_operation = None
        if k == 4:  # rank 1 has only four operations in a save
            assert failure is None and len(seen) == (4 if rank == 1 else 0)
            continue
        assert failure.startswith("rank 1: No space left on device"), failure
        runtime.barrier()
        assert steps(run) == [1]
        assert store.newest().tensor("model/w").tolist() == [1.0] * 6
    assert save(store, runtime, 7) is None
    runtime.barrier()
    os._exit(0)


def test_a_full_disk_on_one_rank_is_named_and_harms_nothing(tmp_path, family):
    children = [family.start(fill_the_disk_of_rank_1, rank, tmp_path / "run", tmp_path / "meeting") for rank in (0, 1)]
    assert family.codes(*children) == [0, 0]
    assert steps(tmp_path / "run") == [7]


def test_a_full_disk_at_any_file_operation_of_a_start_and_a_save(tmp_path, alone):
    def start(run: Path, k: int) -> tuple[list[str], str | None]:
        seen, failure, store = [], None, None

        def fail(operation: str, path: Path) -> None:
            seen.append(operation)
            if len(seen) == k + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        files.before_operation = fail
        try:
            _, store = own(run, alone)
            failure = save(store, alone, 2)
        except UserError as error:
            failure = str(error)
        finally:
            files.before_operation = None
            if store is not None:
                store.owner.release()
        return seen, failure

    total, k = 100, 0
    while k < total:
        run = tmp_path / str(k)
        _, store = own(run, alone)
        assert save(store, alone, 1) is None
        store.owner.release()
        seen, failure = start(run, k)
        if len(seen) <= k:
            break
        if failure is not None:
            assert "No space left on device" in failure
        before = steps(run)
        assert before and before[0] in (1, 2)
        assert (failure is None) == (before[0] == 2) or seen[k] == "fsync_folder"
        assert resume_and_save(run, alone, 3, patience=0.3) == before[0]
        k += 1
    assert k > 20, "the sweep saw too few operations"


def test_a_state_that_is_not_finite_on_one_rank_is_refused_by_all(tmp_path, family):
    children = [family.start(poison_rank_1, rank, tmp_path / "run", tmp_path / "meeting") for rank in (0, 1)]
    assert family.codes(*children) == [0, 0]
    assert steps(tmp_path / "run") == [1]


def poison_rank_1(rank: int, run: Path, meeting: Path) -> None:
    from ddpm_dist.checkpoint import Piece

    runtime = join(rank, 2, meeting)
    _, store = own(run, runtime)
    assert save(store, runtime, 1) is None
    data = torch.tensor([1.0, float("nan") if rank == 1 else 1.0])
    store.save(2, [Piece("ema.0/w", (4,), 2 * rank, data)], {"step": 2})
    failure = store.wait()
    assert failure.startswith("rank 1: ema.0/w is not finite"), failure
    runtime.barrier()
    assert not list(run.rglob("*.incomplete"))
    os._exit(0)


def test_the_words_of_a_damaged_start_are_not_lost(tmp_path):
    """A folder that cannot be taken ends the start with a message, not with an endless loop."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/generation_00000004").write_text("a file")
    with pytest.raises(UserError, match="cannot be taken over"):
        Ownership(tmp_path, patience=0.0)
