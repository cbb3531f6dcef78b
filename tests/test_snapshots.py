"""Snapshots of the averages: a function of the step, whatever happens to the run, and nothing that resumes or retention look at."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import run_module, train
from forked import own
from test_training import lines_so_far, start_training, wait_for_step

from ddpm_dist import runtime as runtimes
from ddpm_dist.checkpoint import Piece, files, open_checkpoint, published
from ddpm_dist.checkpoint.snapshots import Snapshots
from ddpm_dist.errors import UserError

OPTIONS = ("train.images=360", "checkpoint.every=60", "checkpoint.keep_last=2", "ema.snapshot_every=24",
           "ema.sigma_rels=[0.05, 0.10]", "data.source=synthetic", "train.audit=true")  # fmt: skip


def ok(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def steps(run: Path, kind: str = "snapshots") -> list[int]:
    return [step for step, _ in reversed(published(run / kind))]


def digests(run: Path) -> dict[str, str]:
    """sha256 of every file with tensors of the snapshots."""
    found = sorted((run / "snapshots").glob("*/*.safetensors"))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """30 steps on two ranks without an interruption."""
    run = tmp_path_factory.mktemp("straight") / "run"
    ok(train(run, *OPTIONS, ranks=2))
    return run


def test_they_hold_the_averages_of_their_step_and_nothing_else(straight):
    assert steps(straight) == list(range(2, 31, 2))
    assert steps(straight, "checkpoints") == [25, 30], "snapshots do not count for checkpoint.keep_last"
    snapshot, checkpoint = (open_checkpoint(straight / kind / "step_00000030") for kind in ("snapshots", "checkpoints"))
    averages = checkpoint.names("ema.")
    assert sorted(snapshot.names()) == sorted(averages) and len(averages) == 4 * len(checkpoint.names("model/"))
    assert all(torch.equal(snapshot.tensor(name), checkpoint.tensor(name)) for name in averages)
    earlier = open_checkpoint(straight / "snapshots/step_00000028")
    assert not all(torch.equal(snapshot.tensor(name), earlier.tensor(name)) for name in averages)
    assert snapshot.state["images_seen"] == 360 and snapshot.state["model"] == checkpoint.state["model"]
    assert {path.name for path in (straight / "snapshots").iterdir()} == {
        f"step_{step:08d}" for step in steps(straight)
    }


def test_a_snapshot_samples(straight, tmp_path):
    source, out = straight / "snapshots/step_00000010", tmp_path / "x.npz"
    ok(run_module("ddpm_dist.sample", source, "--ema", "2", "--num", "2", "--out", out))
    plain = run_module("ddpm_dist.sample", source, "--ema", "none", "--num", "2", "--out", out)
    assert plain.returncode == 2 and "4 averages" in plain.stderr


def test_a_killed_run_ends_with_the_same_set(straight, tmp_path):
    run = tmp_path / "run"
    process = start_training(run, *OPTIONS, ranks=2)
    wait_for_step(run / "audit.jsonl", 14, process)
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert len(lines_so_far(run / "audit.jsonl")) < 30, "it was over before the kill"
    result = ok(train(run, *OPTIONS, ranks=2))
    assert "continuing at step" in result.stdout and "could not be written" not in result.stderr
    assert digests(run) == digests(straight)


def test_a_resume_removes_newer_ones_and_makes_up_for_one_that_is_missing(straight, tmp_path):
    """As after a kill between a checkpoint and the snapshot of its step, and after a return to an older checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "snapshots/step_00000030")
    shutil.copytree(run / "snapshots/step_00000028", run / "snapshots/step_00000032")
    kept = (run / "snapshots/step_00000028/manifest.json").stat()
    assert "done" in ok(train(run, *OPTIONS, ranks=2)).stdout
    assert digests(run) == digests(straight)
    again = (run / "snapshots/step_00000028/manifest.json").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (again.st_ino, again.st_mtime_ns), (
        "a snapshot that is there is left alone"
    )
    # Another world size, and no snapshots any more: what is newer than the checkpoint goes all the same.
    shutil.rmtree(run / "checkpoints/step_00000030")
    ok(train(run, *OPTIONS, "ema.snapshot_every=null"))
    assert steps(run) == list(range(2, 25, 2)) and steps(run, "checkpoints") == [25, 30]


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    runtime = runtimes.start()
    yield runtime
    runtimes.finish()


def take(value: float):
    return lambda: ([Piece("ema.0/w", (4,), 0, torch.full((4,), value))], {"step": int(value)})


def test_one_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path, alone, capsys, monkeypatch):
    place, store = own(tmp_path, alone)
    snapshots = Snapshots(tmp_path, alone, 2, 1, place.work)
    snapshots.begin(0, take(0))

    def full(operation, path):
        if operation == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "before_operation", full)
    snapshots.after_step(2, take(2))
    snapshots.wait()
    monkeypatch.setattr(files, "before_operation", None)
    said = capsys.readouterr().err
    assert (
        "the snapshot of the averages at step 2 could not be written: rank 0: No space left" in said
        and "goes on" in said
    )
    for step in (3, 4):
        snapshots.after_step(step, take(step))
    snapshots.wait()
    assert steps(tmp_path) == [4]
    assert open_checkpoint(tmp_path / "snapshots/step_00000004").tensor("ema.0/w").tolist() == [4.0] * 4
    assert capsys.readouterr().err == ""
    store.owner.release()


def test_a_former_owner_publishes_and_removes_none(tmp_path, alone, capsys):
    place, store = own(tmp_path, alone)
    snapshots = Snapshots(tmp_path, alone, 1, 1, place.work)
    snapshots.begin(0, take(0))
    snapshots.after_step(1, take(1))
    snapshots.wait()
    os.rename(place.generation, place.generation.with_name("generation_00000009"))  # what a takeover does
    snapshots.after_step(2, take(2))
    snapshots.wait()
    assert "step 2 could not be written" in capsys.readouterr().err
    with pytest.raises(UserError, match="snapshots"):
        Snapshots(tmp_path, alone, 1, 1, place.work).begin(0, take(0))
    assert steps(tmp_path) == [1]
    store.owner.release()


def test_a_folder_on_another_file_system_is_refused_with_the_remedy(tmp_path, alone):
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("one file system only")
    place, store = own(tmp_path, alone)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        (tmp_path / "snapshots").symlink_to(other)
        with pytest.raises(UserError, match="make .*snapshots a link"):
            Snapshots(tmp_path, alone, 1, 1, place.work).begin(0, take(0))
    store.owner.release()


def test_without_them_nothing_is_made(tmp_path, alone):
    place, store = own(tmp_path, alone)
    snapshots = Snapshots(tmp_path, alone, None, 1, place.work)
    snapshots.begin(3, take(3))
    snapshots.after_step(4, take(4))
    snapshots.wait()
    assert not (tmp_path / "snapshots").exists() and not (place.work / "snapshots").exists()
    store.owner.release()


def test_state_that_is_not_a_run_is_said(tmp_path, alone, capsys):
    """A checkpoint that another program wrote in this format has no configuration to describe."""
    from ddpm_dist import export

    place, store = own(tmp_path, alone)
    ema = {"half_lives": [1.0], "sigma_rels": ["wide"]}
    whole = {"ema": ema, "diffusion": {}, "sampling": {}, "data": {"range": [-1.0, 1.0]}}
    model = {"name": "unet", "keywords": {}}
    states = [{}, {"config": {"ema": []}, "model": {}}, {"config": whole, "model": model, "images_seen": 1}]
    for step, state in enumerate(states, start=1):
        store.save(step, [Piece("ema.0/w", (4,), 0, torch.zeros(4))], state)
        assert store.wait() is None
        assert export.main([str(tmp_path), "--out", str(tmp_path / "m.safetensors")]) == 2
        assert "was not written by this program" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
    assert json.loads((place.generation / "owner.json").read_text())
    store.owner.release()
