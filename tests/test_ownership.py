"""One writer per run directory: who may take it, and that an owner that was paused and wakes up changes nothing any more."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import train
from forked import (
    Family,
    contents,
    own,
    resume,
    save,
    wait_until,
)

from ddpm_dist.checkpoint import Ownership, files, ownership
from ddpm_dist.checkpoint.retention import Retention
from ddpm_dist.errors import UserError
from ddpm_dist.tracking import Tracker

NEVER = 100.0  # a patience that no test waits for


@pytest.fixture
def taken(tmp_path, alone, monkeypatch):
    """An owner with three checkpoints whose directory another has just taken, as a requeued SLURM job may at once."""
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run = tmp_path / "run"
    place, store = own(run, alone, keep_last=5)
    for step in (1, 2, 3):
        assert save(store, alone, step) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    successor = Ownership(run, NEVER)
    yield run, place, store, successor
    successor.release()
    store.owner.release()


def hold(run: Path) -> None:
    """Own the directory until killed."""
    Ownership(run, NEVER)
    (run / "held").touch()
    signal.pause()


def start_holding(family: Family, run: Path):
    child = family.start(hold, run)
    wait_until((run / "held").exists)
    return child


# -- who may take it ---------------------------------------------------------------------------------------------------


def test_a_run_directory_has_one_owner(tmp_path):
    """Said within a heartbeat or so: the patience of this test would not end."""
    run = tmp_path / "run"
    owner = Ownership(run)
    with pytest.raises(UserError, match=rf"in use by another process \(host .*, pid {os.getpid()}\)"):
        Ownership(run, NEVER)
    before = contents(run)
    other = train(run, "train.images=12", DDPM_DIST_TAKEOVER_SECONDS=str(NEVER))
    assert other.returncode == 2 and "in use by another process" in other.stderr and str(os.getpid()) in other.stderr
    assert contents(run) == before
    owner.release()
    Ownership(run, NEVER).release()


def test_a_dead_owner_is_followed_at_once(tmp_path, family):
    child = start_holding(family, tmp_path / "run")
    child.kill()
    assert family.codes(child) == [-signal.SIGKILL]
    with open(tmp_path / "run/checkpoints/generation_00000001/owner.json") as another:
        fcntl.flock(another, fcntl.LOCK_SH)  # who looks at the same moment does not make it look alive
        Ownership(tmp_path / "run", NEVER).release()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["generation_00000002"]


def test_a_silent_owner_is_followed_after_the_timeout(tmp_path, family, capsys):
    child = start_holding(family, tmp_path / "run")
    os.kill(child.pid, signal.SIGSTOP)
    begin = time.monotonic()
    Ownership(tmp_path / "run", patience=0.5).release()
    assert time.monotonic() - begin >= 0.5
    said = capsys.readouterr().err
    assert "taking over" in said and f"pid {child.pid}" in said and "no sign of life" in said


def test_an_owner_that_wakes_up_in_time_keeps_its_directory(tmp_path, family):
    child = start_holding(family, tmp_path / "run")
    os.kill(child.pid, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(Ownership, tmp_path / "run", NEVER)
        time.sleep(0.5)
        assert not waiting.done()
        resume(child)
        with pytest.raises(UserError, match="in use"):
            waiting.result(timeout=60)


def take(run: Path, number: int) -> None:
    """One of five who all find the directory free, and then all at once make the rename that decides."""
    ownership.HEARTBEAT_SECONDS = 0.1

    def meet(operation: str, path: Path) -> None:
        if operation == "rename":
            (run / f"at_the_rename_{number}").touch()
            wait_until(lambda: len(list(run.glob("at_the_rename_*"))) == 5)

    files.before_operation = meet
    try:
        Ownership(run, patience=1.0)
    except UserError as error:
        os._exit(2 if "in use by another process" in str(error) else 1)
    (run / f"winner_{number}").touch()
    signal.pause()


@pytest.mark.parametrize("owner", ["silent", "dead", "released", "none"])
def test_of_several_takers_one_succeeds(tmp_path, family, owner):
    run = tmp_path / "run"
    run.mkdir()
    if owner == "released":
        Ownership(run).release()
    elif owner != "none":
        child = start_holding(family, run)
        os.kill(child.pid, signal.SIGSTOP if owner == "silent" else signal.SIGKILL)
    takers = [family.start(take, run, number) for number in range(5)]
    wait_until(lambda: sum(taker.exitcode is not None for taker in takers) == 4)
    winners = [number for number, taker in enumerate(takers) if taker.exitcode is None]
    assert [taker.exitcode for number, taker in enumerate(takers) if number not in winners] == [2] * 4
    wait_until((run / f"winner_{winners[0]}").exists)
    assert len(list(run.glob("winner_*"))) == 1 and len(list(run.glob("checkpoints/generation*"))) == 1


@pytest.mark.parametrize(
    ("job", "cluster", "restarts", "at_once"),
    [("17", "a", "2", True), ("17", "a", "1", False), ("18", "a", "2", False), ("17", "b", "2", False)],
)
def test_the_same_slurm_job_started_again_takes_over_at_once(tmp_path, monkeypatch, job, cluster, restarts, at_once):
    for name, value in (("JOB_ID", "17"), ("CLUSTER_NAME", "a"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    owner = Ownership(tmp_path)
    for name, value in (("JOB_ID", job), ("CLUSTER_NAME", cluster), ("RESTART_COUNT", restarts)):
        monkeypatch.setenv(f"SLURM_{name}", value)
    if at_once:
        Ownership(tmp_path, NEVER).release()
        assert owner.workplace.taken_over()
    else:
        with pytest.raises(UserError, match="in use .*SLURM job 17"):
            Ownership(tmp_path, NEVER)
    owner.release()


def test_without_locks_in_the_file_system_only_the_heartbeat_counts(tmp_path, family, monkeypatch, capsys):
    def unlockable(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", unlockable)
    abandoned = Ownership(tmp_path)
    abandoned._ended.set()  # as if its host had gone
    os.close(abandoned._handle)
    Ownership(tmp_path, patience=0.3).release()
    assert "no sign of life" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b'{"generation": 1, "released": "', b'{"generation": 9, "released": true}', b"\xff" * 20, None],
)
def test_an_owner_that_cannot_be_read_gets_the_timeout(tmp_path, text, capsys):
    Ownership(tmp_path).release()
    path = tmp_path / "checkpoints/generation_00000001/owner.json"
    path.unlink() if text is None else path.write_bytes(text)
    Ownership(tmp_path, patience=0.3).release()
    assert "no sign of life" in capsys.readouterr().err


def test_the_timeout_comes_from_the_environment(tmp_path, monkeypatch):
    assert ownership.takeover_seconds() == 60
    for text, seconds in (("90.5", 90.5), ("0", 6)):  # never so short that a live owner looks silent
        monkeypatch.setenv("DDPM_DIST_TAKEOVER_SECONDS", text)
        assert ownership.takeover_seconds() == seconds
    for text in ("soon", "-1", "nan", "inf", ""):
        monkeypatch.setenv("DDPM_DIST_TAKEOVER_SECONDS", text)
        with pytest.raises(UserError, match=f"DDPM_DIST_TAKEOVER_SECONDS={text} is not"):
            Ownership(tmp_path)


def test_a_directory_that_was_removed_is_not_made_again(tmp_path, alone):
    place, store = own(tmp_path / "run", alone)
    assert save(store, alone, 1) is None
    shutil.rmtree(tmp_path / "run")
    assert "was moved or removed" in place.taken_over()
    assert save(store, alone, 2) is not None
    store.owner.release()
    assert not (tmp_path / "run").exists()


def test_a_directory_that_was_removed_and_made_anew_belongs_to_who_made_it(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.05)
    run = tmp_path / "run"
    place, store = own(run, alone)
    shutil.rmtree(run)
    successor = Ownership(run, NEVER)
    assert successor.workplace.generation == place.generation
    wait_until(lambda: store.owner.lost)
    assert "another process" in place.taken_over() and successor.workplace.taken_over() is None
    before = contents(run)
    assert save(store, alone, 1) is not None
    store.owner.release()
    assert contents(run) == before
    successor.release()


# -- what is left to a former owner ------------------------------------------------------------------------------------


def test_a_former_owner_can_neither_publish_nor_remove_nor_set_aside(taken, alone):
    run, place, store, successor = taken
    os.truncate(run / "checkpoints/step_00000001/state.json", 3)  # something that newest() would set aside
    before = contents(run)
    wait_until(lambda: store.owner.lost)
    assert save(store, alone, 4) is not None
    with pytest.raises(OSError):
        store._set_aside(run / "checkpoints/step_00000001", "damaged")
    store._retention = Retention(1, None, 1)
    assert store._retention.surplus(store.root, saved=3) == [run / "checkpoints/step_00000002"]
    store._prune(saved=3)
    store.tidy()
    store.owner.release()
    assert contents(run) == before
    assert re.search(
        rf"another process \(host .*, pid {os.getpid()}, SLURM job 17\) has taken over", place.taken_over()
    )
    assert not successor.lost and successor.workplace.taken_over() is None


def test_a_former_owner_cannot_replace_or_remove_the_records(taken):
    run, place, _, successor = taken
    (run / "exit.json").write_text("the successor's")
    before = contents(run)
    for name in ("exit.json", "config.yaml"):
        with pytest.raises(OSError):
            place.write_text(run / name, "the former owner's")
    place.remove(run / "exit.json")
    with pytest.raises(OSError):
        place.renew(run / "exit.json")
    assert contents(run) == before
    successor.workplace.write_text(run / "exit.json", "new")
    assert (run / "exit.json").read_text() == "new"
    successor.workplace.remove(run / "exit.json")
    assert not (run / "exit.json").exists()


def test_what_a_former_owner_has_open_is_another_file(taken):
    run, _, _, successor = taken
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with open(run / "metrics.jsonl", "a") as former:
        successor.workplace.renew(run / "metrics.jsonl")
        former.write('{"step": 2}\n')
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_former_owner_says_no_more_to_mlflow(taken, alone):
    """The run in MLflow is the successor's now: it must not be called failed, and tracking.json is not touched."""
    from types import SimpleNamespace

    from mlflow import MlflowClient

    run, place, _, successor = taken
    uri = f"sqlite:///{run.parent / 'mlflow.db'}"
    settings = SimpleNamespace(mlflow=True, uri=uri, experiment="e")
    new = Tracker(run, settings, "run", {}, 0, workplace=successor.workplace)
    new.log({"step": 1, "loss": 1.0})
    wait_until(
        lambda: (run / "tracking.json").exists() and '"delivered_step": 1' in (run / "tracking.json").read_text()
    )
    old = Tracker.__new__(Tracker)  # a former owner whose queue still holds a step
    old.__dict__.update(new.__dict__)
    from ddpm_dist.tracking.mlflow_queue import Worker

    job = SimpleNamespace(**{**vars(new._worker.job), "workplace": place})
    old._worker = Worker(job)
    old._worker.start()
    old._worker.put_record({"step": 2, "loss": 2.0})
    wait_until(lambda: old._worker._memory.delivered == 2)
    before = contents(run)
    assert '"delivered_step": 1' in (run / "tracking.json").read_text()
    old._worker.abandon()
    old._worker.join(20)
    assert not old._worker.is_alive()
    assert MlflowClient(uri).get_run(new.run_id).info.status == "RUNNING"
    assert contents(run) == before
    new.close("FINISHED")
    assert MlflowClient(uri).get_run(new.run_id).info.status == "FINISHED"
