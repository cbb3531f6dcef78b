"""Packing in parts: the merged folder is what one process makes, whatever happens to the tasks and to the merge."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ddpm_dist.data import writer
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import main, pack, pack_part
from ddpm_dist.pack_merge import merge
from ddpm_dist.parts import Part, parse_part

SHAPES = {"num": 95, "size": 8, "samples_per_shard": 10, "workers": 1}  # ten shards, the last one half full


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def samples_of(folder):
    """Key, label and bytes of every sample in order."""
    index = Index.load(folder)
    index.verify()
    return [(index.key_of(k), int(index.samples["label"][k]), index.read(k)) for k in range(len(index))]


def pack_all(out, count, source="shapes", order=None, **options):
    options = options or SHAPES
    return [pack_part(source, out, Part(number, count), **options)[0] for number in order or range(count)]


def command(*words):
    return [sys.executable, "-m", "ddpm_dist.pack", *map(str, words)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    pack("shapes", out, **SHAPES)
    return contents(out)


def test_shares_are_neighbours_and_cover_everything():
    for total in (0, 1, 7, 10):
        for count in (1, 2, 3, 12):
            shares = [Part(number, count).share(total) for number in range(count)]
            assert [k for share in shares for k in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert parse_part("3/16") == Part(3, 16)
    for wrong in ("16/16", "3", "-1/4", "a/b", "0/0", "1/2/3", ""):
        with pytest.raises(UserError, match="must be I/N with I from 0 to N-1"):
            parse_part(wrong)


@pytest.mark.parametrize("count", [1, 3, 10, 13])
def test_merged_parts_are_what_one_process_makes(tmp_path, alone, count):
    """In any order; where there are more parts than shards some are empty."""
    out = tmp_path / "out"
    recorded = pack_all(out, count, order=list(reversed(range(count))))
    assert sum(part.samples for part in recorded) == 95
    assert sum(part.samples == 0 for part in recorded) == max(0, count - 10)
    inodes = {path.name: path.stat().st_ino for path in out.with_name("out.parts").rglob("*.tar")}
    merged = merge(out)
    assert contents(out) == alone and os.listdir(tmp_path) == ["out"]
    assert {path.name: path.stat().st_ino for path in out.glob("*.tar")} == inodes, "the tars are moved, not copied"
    assert merged.index.fingerprint == json.loads(alone["index.json"])["fingerprint"]


def test_tasks_of_one_array_started_at_once(tmp_path, alone):
    """Through the command; one number is there twice, as after a requeue of a task that was not dead."""
    out = tmp_path / "out"
    words = ["shapes", "--num", 95, "--size", 8, "--samples-per-shard", 10, "--workers", 1, "--out", out]
    tasks = [
        subprocess.Popen(
            command(*words, "--part", f"{i}/3"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in (0, 1, 1, 2)
    ]
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, said
    assert sorted(os.listdir(tmp_path / "out.parts")) == [f"0000{i}-of-00003" for i in range(3)]
    assert f"part 0/3 of {out}: 30 samples" in said[0] and f"--merge --out {out}" in said[0]
    done = subprocess.run(command(*words, "--merge"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(out) == alone
    assert f"{out}: 95 samples, 10 classes, 8 x 8" in done.stdout and "next: python -m ddpm_dist.train" in done.stdout
    again = subprocess.run(command("--merge", "--out", out), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and f"{out}: 95 samples" in again.stdout and "nothing was changed" in again.stdout


def test_a_whole_part_is_kept_and_a_damaged_one_is_made_again(tmp_path, alone):
    out, place = tmp_path / "out", tmp_path / "out.parts" / "00001-of-00002"
    pack_all(out, 2)
    before = place.stat().st_ino
    assert pack_part("shapes", out, Part(1, 2), **SHAPES)[1] is True
    assert place.stat().st_ino == before
    (place / "shapes-000007.tar").write_bytes(b"short")
    with pytest.raises(
        UserError, match=r"shapes-000007.tar is missing or damaged: .*run its task again \(--part 1/2\)"
    ):
        merge(out)
    assert not out.exists()
    assert pack_part("shapes", out, Part(1, 2), **SHAPES)[1] is False
    (place / "part.json").write_text("{")
    with pytest.raises(UserError, match=r"part.json is damaged or missing: run its task again \(--part 1/2\)"):
        merge(out)
    assert pack_part("shapes", out, Part(1, 2), **SHAPES)[1] is False
    assert len(os.listdir(place.parent)) == 2
    merge(out)
    assert contents(out) == alone


@pytest.mark.slow
def test_a_task_that_is_killed_leaves_no_part_and_the_next_one_removes_what_it_left(tmp_path):
    out = tmp_path / "out"
    words = ["shapes", "--num", 40_000, "--size", 16, "--samples-per-shard", 10, "--workers", 1, "--out", out]
    parts = tmp_path / "out.parts"

    def start():
        """A task that has finished two tars, and those."""
        known = set(parts.glob("*"))
        task = subprocess.Popen(command(*words, "--part", "1/2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while len(made := [tar for new in set(parts.glob("*")) - known for tar in new.glob("*.tar")]) < 2:
            assert task.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        return task, made

    first, tars = start()
    second, others = start()  # while the first one lives
    try:
        assert len(os.listdir(parts)) == 2, "each has a folder of its own"
        assert all(tar.exists() for tar in tars)
        first.kill()
        assert first.wait() == -signal.SIGKILL and len(os.listdir(parts)) == 2
        with pytest.raises(UserError, match="holds no whole part yet"):
            merge(out)
        third, _ = start()
        third.terminate()
        third.wait()
        assert len(os.listdir(parts)) == 2 and not any(tar.exists() for tar in tars), "the dead one's is gone"
        assert second.poll() is None and all(tar.exists() for tar in others), "the live one's is not"
    finally:
        for task in (first, second):
            task.kill()
            task.wait()
    pack_part("shapes", out, Part(1, 2), **SHAPES)
    assert os.listdir(parts) == ["00001-of-00002"] and not out.exists()


# ---- what does not go together ---------------------------------------------------------------------------------------


def test_merge_says_which_tasks_are_missing(tmp_path):
    out = tmp_path / "out"
    for number in (0, 2, 5):
        pack_part("shapes", out, Part(number, 6), **SHAPES)
    with pytest.raises(
        UserError, match=r"lacks 3 of 6 parts: run their tasks again \(--part 1/6, --part 3/6, --part 4/6\)"
    ):
        merge(out)
    assert not out.exists() and len(os.listdir(tmp_path / "out.parts")) == 3


def test_parts_of_another_recipe_are_refused_by_the_task_and_by_the_merge(tmp_path, alone):
    out = tmp_path / "out"
    pack_all(out, 3, order=[0, 2])
    for change, words in (
        ({"num": 96}, "num: 96 here, 95 there"),
        ({"size": 9}, "size: 9 here, 8 there"),
        ({"quality": 50}, "quality: 50 here, None there"),
        ({"samples_per_shard": 11}, "samples_per_shard: 11 here, 10 there"),
        ({"skip_bad": True}, "skip_bad: True here, False there"),
    ):
        with pytest.raises(UserError, match=words):
            pack_part("shapes", out, Part(1, 3), **{**SHAPES, **change})
    with pytest.raises(UserError, match="holds parts of a division into 3, not 4"):
        pack_part("shapes", out, Part(1, 4), **SHAPES)
    # Tasks that start at the same time do not see each other: the merge does.
    pack_part("shapes", tmp_path / "b", Part(1, 3), **{**SHAPES, "seed": 1})
    (tmp_path / "b.parts/00001-of-00003").rename(tmp_path / "out.parts/00001-of-00003")
    with pytest.raises(
        UserError, match=r"00001-of-00003 was made otherwise .*seed: 1 here, None there.*\(--part 1/3\)"
    ):
        merge(out)
    pack_part("shapes", out, Part(1, 3), **SHAPES)  # replaces it
    pack_part("shapes", tmp_path / "c", Part(0, 1), **SHAPES)
    (tmp_path / "c.parts/00000-of-00001").rename(tmp_path / "out.parts/00000-of-00001")
    with pytest.raises(UserError, match=r"divisions into 1 and 3.*rm -r .*-of-00001"):
        merge(out)
    shutil.rmtree(tmp_path / "out.parts/00000-of-00001")
    with pytest.raises(UserError, match="num: 7 here, 95 there"):
        merge(out, {"num": 7})
    merge(out, {"num": 95})
    assert contents(out) == alone


def test_a_source_that_changed_between_the_tasks_is_noticed(tmp_path):
    root, out = tmp_path / "photos", tmp_path / "out"
    for k in range(8):
        (root / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, 0, 0)).save(root / "ab"[k % 2] / f"{k}.png")
    options = {"root": root, "samples_per_shard": 2, "workers": 1}
    pack_part("folder", out, Part(0, 2), **options)
    (root / "a" / "0.png").rename(root / "a" / "9.png")
    with pytest.raises(UserError, match="00000-of-00002 was made otherwise .names_and_labels"):
        pack_part("folder", out, Part(1, 2), **options)
    assert len(os.listdir(tmp_path / "out.parts")) == 1
    assert pack_part("folder", out, Part(0, 2), **options)[1] is False, "its own part is made again"
    pack_part("folder", out, Part(1, 2), **options)
    merge(out)
    pack("folder", tmp_path / "one", **options)
    assert contents(out) == contents(tmp_path / "one")


def test_bad_usage_is_exit_code_2_and_changes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    for words, message in (
        (["shapes", "--part", "4/4"], "must be I/N"),
        (["shapes", "--part", "0/2", "--merge"], "leave --part away"),
        (["cifar10", "--part", "0/2", "--download"], "every task would download"),
        (["shapes", "--size", "0", "--part", "0/2"], "--size must be"),
        (["--merge"], "no parts of"),
    ):
        assert main([*words, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err and os.listdir(tmp_path) == []
    with pytest.raises(SystemExit) as left:
        main(["--out", str(out)])
    assert left.value.code == 2 and "SOURCE" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_never_touched(tmp_path):
    out = tmp_path / "out"
    pack_all(out, 2)
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for act in (lambda: merge(out), lambda: pack_part("shapes", out, Part(0, 2), **SHAPES)):
        with pytest.raises(UserError, match="is not empty"):
            act()
    pack("shapes", tmp_path / "other", **{**SHAPES, "num": 5})
    shutil.copy(tmp_path / "other" / "index.json", out)
    shutil.copy(tmp_path / "other" / "index.npy", out)
    with pytest.raises(UserError, match="is not empty"):
        merge(out)
    assert len(contents(out)) == 3 and len(os.listdir(tmp_path / "out.parts")) == 2
    shutil.rmtree(out)
    (tmp_path / "out.parts" / "precious.txt").write_text("x")
    for act in (lambda: merge(out), lambda: pack_part("shapes", out, Part(0, 2), **SHAPES)):
        with pytest.raises(UserError, match=r"did not write \(precious.txt\)"):
            act()


# ---- where shards end elsewhere --------------------------------------------------------------------------------------


def test_images_left_out_move_the_ends_of_shards_and_nothing_else(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for k in range(30):
        Image.new("RGB", (8, 8), (k, 99, 0)).save(root / f"{k:02d}.jpg")
    options = {"root": root, "samples_per_shard": 4, "skip_bad": True, "workers": 1, "channels": 3}
    pack("folder", tmp_path / "good", **options)
    pack_all(tmp_path / "good_parts", 3, "folder", **options)
    merge(tmp_path / "good_parts")
    assert contents(tmp_path / "good_parts") == contents(tmp_path / "good"), "where all can be read all is the same"
    for k in (2, *range(8, 16), 29):  # of part 1 of 4 nothing is left
        (root / f"{k:02d}.jpg").write_bytes(b"bad")
    one = pack("folder", tmp_path / "one", **options)
    assert [part.samples for part in pack_all(tmp_path / "parts", 4, "folder", **options)] == [7, 0, 8, 5]
    merged = merge(tmp_path / "parts")
    assert samples_of(tmp_path / "parts") == samples_of(tmp_path / "one") and len(merged.index) == 20
    assert (merged.tally.skipped, merged.tally.names) == (one.skipped, one.skipped_names) == (10, one.skipped_names)
    assert [shard.name for shard in merged.index.shards] == [f"folder-{k:06d}.tar" for k in range(6)]
    assert [shard.samples for shard in merged.index.shards] == [4, 3, 4, 4, 4, 1]
    for path in root.iterdir():
        path.write_bytes(b"bad")
    pack_all(tmp_path / "none", 2, "folder", **options)
    with pytest.raises(UserError, match=r"none of the 30 images can be read; the first: .*00.jpg"):
        merge(tmp_path / "none")


def test_shards_that_get_too_large_are_numbered_through(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 2_500)  # instead of 2 GB
    pack("shapes", tmp_path / "one", **SHAPES)
    pack_all(tmp_path / "parts", 4)
    merged = merge(tmp_path / "parts")
    assert len(merged.index.shards) > 10
    assert [shard.name for shard in merged.index.shards] == [
        f"shapes-{k:06d}.tar" for k in range(len(merged.index.shards))
    ]
    assert samples_of(tmp_path / "parts") == samples_of(tmp_path / "one")


# ---- a merge that is interrupted -------------------------------------------------------------------------------------


def kill_merges(folder: str) -> None:
    """Kill a merge before its k-th change on the disk, for every k; then merge again. Runs in a process without threads."""
    folder = Path(folder)
    saved, out, parts = folder / "saved", folder / "out", folder / "out.parts"
    expected, states = contents(folder / "one"), []
    for k in range(1000):
        shutil.copytree(saved, parts)
        child = os.fork()
        if not child:
            left = [k]

            def strike(event: str, arguments: tuple, left: list[int] = left) -> None:
                writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(strike)
            merge(out)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        states.append((out.exists(), parts.exists()))
        assert not out.exists() or contents(out) == expected, f"incomplete after {k} changes"
        if parts.exists():  # a requeued task is harmless in the middle of it
            assert out.exists() or pack_part("shapes", out, Part(1, 3), **SHAPES)[1]
        merge(out)
        assert contents(out) == expected and sorted(os.listdir(folder)) == ["one", "out", "saved"], k
        shutil.rmtree(out)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert set(states) == {(False, True), (True, True), (True, False)}, states
    print("changes:", k)


def test_a_merge_killed_anywhere_is_finished_by_the_next(tmp_path):
    pack_all(tmp_path / "out", 3)
    os.rename(tmp_path / "out.parts", tmp_path / "saved")
    pack("shapes", tmp_path / "one", **SHAPES)
    code = f"import test_pack_parts; test_pack_parts.kill_merges({str(tmp_path)!r})"
    where = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": where},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 20


def test_what_an_interrupted_merge_has_moved_is_read_again(tmp_path):
    out, parts = tmp_path / "out", tmp_path / "out.parts"
    pack_all(out, 3)
    merged = parts / "merged"
    merged.mkdir()
    moved = merged / "shapes-000000.tar"
    os.rename(parts / "00000-of-00003" / moved.name, moved)
    moved.write_bytes(moved.read_bytes().replace(b"JFIF", b"JFIG", 1))
    with pytest.raises(UserError, match=r"remove .*00000-of-00003, run its task again \(--part 0/3\), then merge"):
        merge(out)
    shutil.rmtree(parts / "00000-of-00003")
    pack_part("shapes", out, Part(0, 3), **SHAPES)
    merge(out)
    Index.load(out).verify()


def test_two_merges_at_once_do_not_mix(tmp_path):
    out, parts = tmp_path / "out", tmp_path / "out.parts"
    pack_all(out, 2)
    descriptor = os.open(parts, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another pack is writing"):
        merge(out)
    os.close(descriptor)
    merge(out)


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from ddpm_dist.pack import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [
        "shapes",
        "--num",
        "300",
        "--size",
        "32",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--part",
        "0/1",
    ]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: cannot write {tmp_path / 'out'}: File too large; free some space")
    assert os.listdir(tmp_path / "out.parts") == []
