"""Sampling into a folder by several tasks: together they make what one makes, whatever happens to them.

Tasks are forked from a warm process (a start of Python with torch takes seconds); torchrun has a test of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_module, train
from forked import Family

NUM = 23


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "run"
    result = train(folder, "train.images=240", "optim.lr=1e-2", "checkpoint.every=120")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in folder.glob("checkpoints/step*")} == {"step_00000010", "step_00000020"}
    return folder


@pytest.fixture(scope="module")
def alone(run):
    """What one task makes."""
    folder, family = run.parent / "alone", Family()
    assert finish(family, start(family, run, folder)) == [0], (folder.parent / "alone.log").read_text()
    family.close()
    assert sorted(images(folder)) == [f"{i:06d}_{i % 10}.png" for i in range(NUM)]
    return contents(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def images(folder):
    """Name and identity of every image: one that is made again has another."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(folder).glob("*.png")}


def start(family, source, folder, *words, num=NUM, log=None, strike=None, **environment):
    """A task in a process of its own; what it says goes to FOLDER.log."""
    argv = [str(source), "-n", str(num), "--out-dir", str(folder), *map(str, words)]
    return family.start(task, argv, str(log or folder) + ".log", strike, environment)


def finish(family, *children):
    return family.codes(*children, seconds=120)


def task(argv, log, strike, environment):
    """Runs in the child. strike (number, k): send this process that signal when it has written k images."""
    from ddpm_dist import sample, sample_folder

    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if strike:
        number, left = strike[0], [strike[1]]
        write = sample_folder.write

        def count(*arguments):
            write(*arguments)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

        sample_folder.write = count
    code = sample.main(argv)
    sys.stdout.flush()
    os._exit(code)


def refused(family, source, folder, *words, num=NUM):
    """What a task says that ends with exit code 2 and changes nothing."""
    before = images(folder) if Path(folder).is_dir() else None
    log = Path(folder).parent / "refused.log"
    log.unlink(missing_ok=True)
    codes = finish(family, start(family, source, folder, *words, num=num, log=log.with_suffix("")))
    text = log.read_text()
    assert codes == [2] and "Traceback" not in text, text
    assert (images(folder) if Path(folder).is_dir() else None) == before
    return text


# ---- the same images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 30])
def test_tasks_started_at_once_make_what_one_makes(run, alone, family, tmp_path, count):
    """The files are equal byte for byte; with more tasks than images some have nothing to do."""
    out = tmp_path / "out"
    numbers = range(count) if count < 30 else (0, 1, 7, 14, 29)  # of thirty, five are enough to see it
    batches = [("--batch", 2 + number % 3) for number in numbers]
    children = [
        start(family, run, out, "--part", f"{number}/{count}", *batch)
        for number, batch in zip(numbers, batches, strict=True)
    ]
    assert finish(family, *children) == [0] * len(children), out.with_suffix(".log").read_text()
    made = contents(out)
    assert {name: alone[name] for name in made} == made, "other bytes, or files that do not belong there"
    if count < 30:
        assert made == alone
    else:
        assert sorted(images(out)) == ["000000_0.png", "000005_5.png", "000010_0.png", "000022_2.png"]


def test_ranks_of_torchrun_share_a_part(run, alone, tmp_path):
    out, said = tmp_path / "out", tmp_path / "exit.json"
    arguments = (run, "-n", NUM, "--part", "1/2", "--out-dir", out, "--batch", 3)
    result = run_module("ddpm_dist.sample", *arguments, ranks=2, DDPM_DIST_EXIT_JSON=str(said))
    assert result.returncode == 0, result.stderr
    assert "12 images from run step 20" in result.stdout
    made = contents(out)
    assert {name: alone[name] for name in made} == made and len(made) == 13
    assert json.loads(said.read_text()) == {
        "code": 0, "reason": "all images are there", "step": 12, "start_step": 0, "run": str(out)
    }  # fmt: skip


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_task_that_is_killed_goes_on_and_makes_no_image_twice(run, alone, family, tmp_path):
    out = tmp_path / "out"
    killed = start(family, run, out, "--part", "0/2", "--batch", 4, strike=(signal.SIGKILL, 6))
    assert finish(family, killed) == [-signal.SIGKILL]
    before = images(out)
    assert len(before) == 6
    # What else a lost node may leave: a file without its content, and one that was being written.
    (out / "000003_3.png").write_bytes(b"")
    (out / "000004_4.png").write_bytes(alone["000004_4.png"][:-20])
    (out / "000007_7.png.0123abcd.incomplete").write_bytes(b"half")
    said = tmp_path / "exit.json"
    again = start(family, run, out, "--part", "0/2", DDPM_DIST_EXIT_JSON=str(said))
    assert finish(family, again) == [0]
    made, after = contents(out), images(out)
    assert {name: alone[name] for name in made} == made and len(after) == 11
    for i in (0, 1, 2, 5):
        assert after[f"{i:06d}_{i}.png"] == before[f"{i:06d}_{i}.png"]
    assert json.loads(said.read_text())["start_step"] == 4 and "(4 were there)" in out.with_suffix(".log").read_text()
    # A larger number, another division, and all of it in one file.
    arrays = tmp_path / "all.npz"
    whole = start(family, run, out, "--out", arrays)
    assert finish(family, whole) == [0]
    assert contents(out) == alone
    assert {name: images(out)[name] for name in after} == after
    from PIL import Image

    with np.load(arrays) as found:
        assert found["labels"].tolist() == [i % 10 for i in range(NUM)]
        for i in range(NUM):
            assert np.array_equal(found["images"][i, 0], np.asarray(Image.open(out / f"{i:06d}_{i % 10}.png")))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_it_after_the_batch_with_code_75(run, alone, family, tmp_path, name):
    out, said = tmp_path / "out", tmp_path / "exit.json"
    strike = (getattr(signal, name), 5)  # in the middle of the second batch
    stopped = start(family, run, out, "--batch", 4, strike=strike, DDPM_DIST_EXIT_JSON=str(said))
    assert finish(family, stopped) == [75], out.with_suffix(".log").read_text()
    assert len(images(out)) == 8
    assert json.loads(said.read_text()) == {
        "code": 75, "reason": f"stopped on {name}", "step": 8, "start_step": 0, "run": str(out)
    }  # fmt: skip
    assert "8 images from run step 20" in (text := out.with_suffix(".log").read_text())
    assert f"stopped on {name}, start again" in text
    assert finish(family, start(family, run, out, "--batch", 4)) == [0]
    assert contents(out) == alone


def test_a_signal_to_one_rank_ends_all_after_the_same_batch(run, alone, family, tmp_path):
    out = tmp_path / "out"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        start(family, run, out, "--batch", 3, strike=(signal.SIGUSR1, 2) if rank else None, RANK=str(rank), **shared)
        for rank in range(2)
    ]
    assert finish(family, *ranks) == [75, 75], out.with_suffix(".log").read_text()
    assert len(images(out)) == 6
    assert finish(family, start(family, run, out)) == [0]
    assert contents(out) == alone


# ---- one folder, one kind of images ----------------------------------------------------------------------------------


def test_a_folder_made_otherwise_is_refused(run, family, tmp_path):
    out = tmp_path / "out"
    assert finish(family, start(family, run, out, num=2)) == [0]
    record = (out / "sample.json").read_bytes()
    for words, told in (
        (("--seed", 1), "seed: 1 now, 0 there"),
        (("--classes", "3,4"), "classes: [3, 4] now, [0, 1"),
        (("--guidance", 1), "guidance: 1.0 now, 2.0 there"),
        (("--steps", 5, "--part", "1/2"), "steps: 5 now, 20 there"),
        (("--ema", "none"), "ema: none now, 0 there"),
    ):
        text = refused(family, run, out, *words)
        assert told in text and "choose another --out-dir" in text
    text = refused(family, run / "checkpoints" / "step_00000010", out)
    assert "checkpoint: step_00000010 now, step_00000020 there" in text
    # What is meant is the content: the same checkpoint elsewhere, and what a run would choose by itself anyway.
    shutil.copytree(run / "checkpoints" / "step_00000020", tmp_path / "step_00000020")
    words = ("--guidance", 2, "--steps", 20, "--classes", ",".join(map(str, range(10))))
    assert finish(family, start(family, tmp_path / "step_00000020", out, *words, num=3)) == [0]
    assert (out / "sample.json").read_bytes() == record
    for damage, told in (("{", "is damaged"), ('{"format": "x", "version": 1}', "of a version")):
        (out / "sample.json").write_text(damage)
        assert told in refused(family, run, out)
    (out / "sample.json").unlink()
    assert "holds images, but no sample.json" in refused(family, run, out)


def test_a_run_that_goes_on_training_does_not_change_the_checkpoint(run, family, tmp_path):
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, copy)
    newer, older = (copy / "checkpoints" / name for name in ("step_00000020", "step_00000010"))
    newer.rename(tmp_path / newer.name)
    first = start(family, copy, out, "--part", "0/3")
    assert finish(family, first) == [0]
    (tmp_path / newer.name).rename(newer)
    assert finish(family, start(family, copy, out, "--part", "1/3")) == [0]
    # One that had looked before the first one wrote sample.json, and has already opened the newer checkpoint.
    late = family.start(look_too_early, [str(copy), "-n", str(NUM), "--out-dir", str(out), "--part", "2/3"])
    assert finish(family, late) == [0]
    expected = tmp_path / "expected"
    assert finish(family, start(family, older, expected)) == [0]
    assert contents(out) == contents(expected)
    assert b"step_00000010" in (out / "sample.json").read_bytes()
    shutil.rmtree(older)
    text = refused(family, copy, out, num=NUM + 1)
    assert "made with step_00000010, which" in text and "does not hold" in text


def look_too_early(argv):
    from ddpm_dist import sample, sample_folder

    recorded, looks = sample_folder.recorded, []

    def first_look_finds_nothing(folder):
        looks.append(folder)
        return None if len(looks) == 1 else recorded(folder)

    sample_folder.recorded = first_look_finds_nothing
    os._exit(sample.main(argv))


def test_the_first_to_write_the_settings_decides(tmp_path):
    from ddpm_dist.sample_folder import record, recorded

    assert recorded(tmp_path / "none") is None and recorded(tmp_path) is None
    assert record(tmp_path, {"seed": 1}) == {"seed": 1}
    assert record(tmp_path, {"seed": 2}) == {"seed": 1} == recorded(tmp_path)
    assert os.listdir(tmp_path) == ["sample.json"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--part", "2/2"), "must be I/N"),
        (("--part", "0/2", "--out", "x.npz"), "neither --out nor --gif"),
        (("--part", "0/2", "--out", "x.png"), "without --part and with --out collects them"),
        (("--part", "0/2", "--gif", "x.gif"), "neither --out nor --gif"),
    ],
)
def test_bad_usage_makes_nothing(run, family, tmp_path, words, told):
    assert told in refused(family, run, tmp_path / "out", *words)
    assert os.listdir(tmp_path) == ["refused.log"]


def test_part_needs_a_folder(run, tmp_path, capsys):
    from ddpm_dist.sample import main

    assert main([str(run), "--part", "0/2"]) == 2
    assert "needs --out-dir" in capsys.readouterr().err


def test_a_full_disk_keeps_what_is_there(run, family, tmp_path):
    """A limit on the file size stands for the full disk."""
    out = tmp_path / "out"
    child = family.start(write_too_much, [str(run), "-n", "4", "--out-dir", str(out)], str(tmp_path / "log"))
    assert finish(family, child) == [2]
    text = (tmp_path / "log").read_text()
    assert f"cannot write into {out}: File too large" in text and "Traceback" not in text
    assert os.listdir(out) == ["sample.json"]
    assert finish(family, start(family, run, out, num=4)) == [0] and len(images(out)) == 4


def write_too_much(argv, log):
    import resource

    from ddpm_dist import sample, sample_folder

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    write = sample_folder.write

    def write_on_a_full_disk(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    sample_folder.write = write_on_a_full_disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os._exit(sample.main(argv))
