"""pack that is killed or interrupted, a worker that dies, a full disk, two at once: all of the folder is there, or none of it."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packing import contents

from ddpm_dist.data.publish import folder_in_one_piece
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import pack


def children_of(pid):
    """Process ids below ``pid``, from /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children_of(child)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def start_endless(out):
    command = [sys.executable, "-m", "ddpm_dist.pack", "shapes", "--num", "1000000", "--size", "16"]
    command += ["--samples-per-shard", "50", "--workers", "2", "--out", str(out)]
    # A shell that starts something in the background lets it ignore SIGINT, and children inherit that.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    aside = Path(f"{out}.incomplete")
    wait_until(lambda: (aside / "shapes-000003.tar").exists() or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    return process, aside


@pytest.mark.slow
def test_kill_9_in_the_middle_leaves_no_folder_and_no_processes_and_the_next_pack_works(tmp_path):
    out = tmp_path / "out"
    process, aside = start_endless(out)
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists() and (aside / "shapes-000003.tar").exists()
    wait_until(lambda: not any(map(alive, workers)), 10)
    with pytest.raises(UserError, match="that pack did not finish"):
        Index.load(out)
    pack("shapes", out, num=20, size=8, workers=1)
    index = Index.load(out)
    index.verify()
    assert len(index) == 20 and os.listdir(tmp_path) == ["out"]
    assert len(contents(out)) == 3


@pytest.mark.slow
def test_ctrl_c_cleans_up(tmp_path):
    process, _ = start_endless(tmp_path / "out")
    for pid in [process.pid, *children_of(process.pid)]:  # a terminal sends it to all of them
        os.kill(pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_that_says_so(tmp_path):
    process, _ = start_endless(tmp_path / "out")
    spawned = [pid for pid in children_of(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(spawned[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.search(
        r"^error: a process died \(killed .*\) at one of the images \S+ to \S+: try again with fewer", errors
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_two_packs_into_the_same_folder_do_not_mix(tmp_path):
    process, aside = start_endless(tmp_path / "out")
    try:
        with pytest.raises(UserError, match="another pack is writing"):
            pack("shapes", tmp_path / "out", num=10, size=8, workers=1)
        assert (aside / "shapes-000000.tar").exists() and process.poll() is None
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
    """A limit on the file size stands for the full disk: the write fails in the same place."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from ddpm_dist.pack import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["shapes", "--num", "300", "--size", "32", "--workers", "1", "--out", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: cannot write {tmp_path / 'out'}: File too large; free some space")
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_data_is_flushed_before_the_rename_that_publishes_it(tmp_path, monkeypatch):
    """Every file and the folder are fsynced while they still carry the unfinished name, the parent afterwards."""
    log, real_sync, real_rename = [], os.fsync, os.rename

    def sync(descriptor):
        log.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real_sync(descriptor)

    def rename(source, target):
        log.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    pack("shapes", tmp_path / "out", num=10, size=8, workers=1, samples_per_shard=5)
    files = [f"out.incomplete/{name}" for name in ("shapes-000000.tar", "shapes-000001.tar", "index.npy", "index.json")]
    assert log == [*files, "out.incomplete", "rename", "."]


def test_target_that_fills_up_meanwhile_is_kept_and_so_is_the_packed_data(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"the complete data is in .*out\.incomplete"):  # noqa: SIM117
        with folder_in_one_piece(out) as folder:
            (folder / "index.json").write_text("{}")
            out.mkdir()
            (out / "other").write_text("x")
    assert contents(out) == {"other": b"x"}
    assert contents(tmp_path / "out.incomplete") == {"index.json": b"{}"}


def test_lock_is_released_when_pack_is_done(tmp_path):
    pack("shapes", tmp_path / "out", num=10, size=8, workers=1)
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if somebody still holds it
    os.close(descriptor)
