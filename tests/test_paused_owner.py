"""An owner of a run directory that is paused anywhere, followed by another and woken up: it changes nothing and leaves."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import TINY, environment, lines, train
from forked import (
    Family,
    contents,
    is_paused,
    join,
    own,
    resume,
    save,
    strike_at,
    train_and_pause,
    train_tiny,
    wait_until,
)

from ddpm_dist.checkpoint import Ownership, workplace


def save_and_pause(run: Path, meeting: Path, k: int | None) -> None:
    """An owner that pauses before its k-th file operation; ends with 0 if it got everything published."""
    runtime = join(0, 1, meeting)
    _, store = own(run, runtime)
    assert save(store, runtime, 1) is None
    if k is not None:
        strike_at(k, signal.SIGSTOP)
    failure = save(store, runtime, 2) or save(store, runtime, 3)
    store.owner.release()
    os._exit(0 if failure is None else 3)


def test_an_owner_paused_at_any_file_operation_of_its_saves_publishes_nothing_when_it_wakes_up(tmp_path, family, alone):
    children, k = [], 0
    while True:
        children.append(family.start(save_and_pause, tmp_path / str(k), tmp_path / f"meeting{k}", k))
        wait_until(lambda child=children[-1]: child.exitcode is not None or is_paused(child))
        if children[-1].exitcode is not None:
            assert children.pop().exitcode == 0  # it saw fewer operations than k
            break
        k += 1
    assert k > 25
    for k, child in enumerate(children):
        run = tmp_path / str(k)
        _, store = own(run, alone, patience=0.0)
        reader = store.newest()
        assert reader.tensor("model/w").tolist() == [float(reader.step)] * 6
        assert save(store, alone, 10) is None and save(store, alone, 11) is None
        before = contents(run)
        resume(child)
        assert family.codes(child) in ([3], [0] if reader.step == 3 else [3])
        assert contents(run) == before, f"woke up at operation {k} and changed something"
        store.owner.release()


OPTIONS = (
    "train.images=48", "optim.decay_images=48", "train.audit=true", "checkpoint.every=24", "checkpoint.keep_last=1",
    "sampling.every=24", "sampling.num=1", "diffusion.timesteps=4", "ema.snapshot_every=24",
)  # fmt: skip


@pytest.fixture(scope="module")
def beginnings(tmp_path_factory):
    """Run directories to start from: a new one, and one whose newest checkpoint is damaged and whose owner was killed."""
    base, family = tmp_path_factory.mktemp("beginnings"), Family()
    (base / "empty.yaml").write_text("{}\n")
    options = [*OPTIONS, "train.images=36", "checkpoint.keep_last=5"]
    assert family.codes(family.start(train_tiny, base / "crashed", base / "log", *options)) == [0]
    os.truncate(base / "crashed/checkpoints/step_00000003/rank_00000.safetensors", 100)
    (base / "new").mkdir()
    assert family.codes(family.start(train_tiny, base / "reference", base / "log", *OPTIONS)) == [0]
    yield base
    family.close()


def wake_up(base: Path, beginning: str, k: int) -> int | None:
    """Pause a training at its k-th operation, let another do the work, wake it up: its exit code, None when k is too high."""
    folder, family = base / f"{beginning}_{k}", Family()
    shutil.copytree(base / beginning, folder / "run")
    (folder / "empty.yaml").write_text("{}\n")
    try:
        former = family.start(train_and_pause, folder / "run", folder / "former.log", k, *OPTIONS)
        wait_until(lambda: former.exitcode is not None or is_paused(former))
        if former.exitcode is not None:
            assert former.exitcode == 0
            return None
        successor = family.start(train_tiny, folder / "run", folder / "successor.log", *OPTIONS)
        assert family.codes(successor) == [0], (folder / "successor.log").read_text()
        before = contents(folder / "run")
        resume(former)
        (code,) = family.codes(former)
        said = (folder / "former.log").read_text()
        after = contents(folder / "run")
        changed = [name for name in before.keys() | after.keys() if before.get(name, 0) != after.get(name, 0)]
        assert not changed, f"it changed {changed} (code {code})\n{said}"
        if code == 0:  # it had published its last checkpoint: its work was done
            assert "done, 48 images" in (folder / "successor.log").read_text()
        else:
            assert "has taken over run directory" in said
        assert lines(folder / "run/audit.jsonl") == lines(base / "reference/audit.jsonl")
        assert [line["step"] for line in lines(folder / "run/metrics.jsonl")] == [1, 2, 3, 4]
        return code
    finally:
        family.close()


def wake_up_at(base: Path, beginning: str, points: range) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda k: wake_up(base, beginning, k), points))
    codes = [code for code in outcomes if code is not None]
    assert set(codes) <= {0, 1} and codes.count(1) > 0.6 * len(points), codes


@pytest.mark.parametrize("beginning", ["new", "crashed"])
def test_a_training_that_was_paused_anywhere_changes_nothing_when_it_wakes_up(beginnings, beginning):
    wake_up_at(beginnings, beginning, range(0, 72, 6))


@pytest.mark.slow
@pytest.mark.parametrize("beginning", ["new", "crashed"])
@pytest.mark.parametrize("remainder", range(1, 6))
def test_the_other_places_where_it_may_be_paused(beginnings, beginning, remainder):
    wake_up_at(beginnings, beginning, range(remainder, 72, 6))


def workers_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def read_so_far(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("paused", ["rank 0", pytest.param("all", marks=pytest.mark.slow)])
def test_all_ranks_of_a_job_that_was_taken_over_leave_and_change_nothing(tmp_path, paused):
    """Two ranks under torchrun are stopped, a third process takes over and trains on, and the two are woken up."""
    run = tmp_path / "run"
    (tmp_path / "empty.yaml").write_text("{}\n")
    arguments = ["--config", str(tmp_path / "empty.yaml"), f"run.dir={run}", *TINY, "data.source=synthetic"]
    arguments += ["train.audit=true", "checkpoint.every=120", "optim.decay_images=1000", "train.images=1_000_000"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    said = tmp_path / "exit.json"
    with open(tmp_path / "former.log", "wb") as log:
        former = subprocess.Popen(
            [*torchrun, "-m", "ddpm_dist.train", *arguments],
            env=environment(DDPM_DIST_EXIT_JSON=str(said)), stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(lambda: read_so_far(run / "audit.jsonl") > 30)
        ranks = workers_of(former.pid)
        assert len(ranks) == 2
        owner = json.loads(next(run.glob("checkpoints/generation_*/owner.json")).read_text())["pid"]
        for rank in ranks if paused == "all" else [owner]:
            os.kill(rank, signal.SIGSTOP)
        step = read_so_far(run / "audit.jsonl")
        options = (
            "train.audit=true",
            "checkpoint.every=120",
            f"train.images={(step + 20) * 12}",
            "optim.decay_images=1000",
        )
        successor = train(run, *options, DDPM_DIST_TAKEOVER_SECONDS="0")
        assert successor.returncode == 0, successor.stderr
        assert f"taking over run directory {run} from host" in successor.stderr and f"pid {owner}" in successor.stderr
        before = contents(run)
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        assert former.wait(60) == 1
    finally:
        if former.poll() is None:
            for pid in [*workers_of(former.pid), former.pid]:
                os.kill(pid, signal.SIGKILL)
    assert contents(run) == before
    words = (tmp_path / "former.log").read_text()
    assert words.count("has taken over run directory") == 1 and "trainer.py" not in words, words
    assert json.loads(said.read_text())["code"] == 1  # of the job, not of the run: the launch script gets to know
    assert [line["step"] for line in lines(run / "audit.jsonl")] == list(range(1, step + 21))


def test_checkpoints_on_another_file_system_than_the_run_directory(tmp_path, monkeypatch):
    """checkpoints/ is a link: nothing can be renamed from there into the run directory, and yet a run goes on."""
    other = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        if other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is the same file system")
        run = tmp_path / "run"
        run.mkdir()
        (run / "checkpoints").symlink_to(other)
        options = ("checkpoint.every=24", "train.audit=true", "sampling.every=24", "sampling.num=1")
        for images in (24, 48):
            done = train(run, f"train.images={images}", *options, "optim.decay_images=48")
            assert done.returncode == 0, done.stderr
            with open(run / "metrics.jsonl", "a") as metrics:
                metrics.write('{"step": 3, "of": "another time"}\n' if images == 24 else "")
        assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
        assert json.loads((run / "exit.json").read_text())["step"] == 4
        names = {"audit.jsonl", "checkpoints", "config.yaml", "exit.json", "metrics.jsonl", "samples"}
        assert {path.name for path in run.iterdir()} == names
        assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]
        owner, plain_copy = Ownership(run), shutil.copyfile

        def copy_and_be_taken_over(source: Path, target: Path) -> None:
            plain_copy(source, target)
            os.rename(other / "generation_00000003", other / "generation_00000004")

        monkeypatch.setattr(workplace.shutil, "copyfile", copy_and_be_taken_over)
        with pytest.raises(FileNotFoundError):
            owner.workplace.write_text(run / "exit.json", "the former owner's")
        owner.workplace.remove(run / "exit.json")
        owner.release()
        assert json.loads((run / "exit.json").read_text())["step"] == 4
    finally:
        shutil.rmtree(other)
