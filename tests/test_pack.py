"""python -m ddpm_dist.pack from end to end: the files, who can read them, and what happens when things go wrong."""

import fcntl
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_dist.data.publish import folder_in_one_piece
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import main, pack


def run(*words, **options):
    command = [sys.executable, "-m", "ddpm_dist.pack", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def picture(path, colour="red", size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Three classes of four images; cat/2.png is cut short."""
    root = tmp_path / "photos"
    for number, name in enumerate(("ape", "bee", "cat")):
        for k in range(4):
            picture(root / name / f"{k}.png", (number * 80, k * 60, 99))
    bad = root / "cat" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("pack") / "shapes"
    pack("shapes", out, num=50, size=24, samples_per_shard=20, workers=1)
    return out


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_the_command_packs_and_says_what_to_do_next(tmp_path):
    out = tmp_path / "new" / "my digits"
    result = run("digits", "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    index = Index.load(out)
    index.verify()
    assert (len(index), index.num_classes, index.channels, index.image_format) == (1797, 10, 1, "png")
    assert set(index.samples["height"]) == set(index.samples["width"]) == {16}
    lines = result.stdout.splitlines()
    size = index.shards[0].bytes
    assert lines[0] == f"{out}: 1,797 samples, 10 classes, 16 x 16, grey png, 1 shards, {size:,} bytes"
    assert lines[1] == f"fingerprint {index.fingerprint}"
    next_words = ["python", "-m", "ddpm_dist.train", "--config", "configs/digits.yaml", f"data.shards={out}"]
    assert shlex.split(lines[-1].removeprefix("next: ")) == next_words
    assert sorted(contents(out)) == ["digits-000000.tar", "index.json", "index.npy"]
    assert os.listdir(out.parent) == ["my digits"]


def test_webdataset_reads_the_shards(shapes):
    import webdataset

    index = Index.load(shapes)
    paths = [str(shapes / shard.name) for shard in index.shards]
    raw = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in raw] == [index.key_of(k) for k in range(50)]
    assert [sample["jpg"] for sample in raw] == [index.read(k) for k in range(50)]
    decoded = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"))
    assert [label for _, label in decoded] == index.samples["label"].tolist() == [k % 10 for k in range(50)]
    for k, (pixels, _) in enumerate(decoded):
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(index.read(k)))))


def test_dali_reads_the_shards(shapes):
    from nvidia.dali import fn, pipeline_def

    index = Index.load(shapes)

    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def reader():
        files = [str(shapes / shard.name) for shard in index.shards]
        images, labels = fn.readers.webdataset(paths=files, ext=["jpg", "cls"], name="reader")
        return images, labels, fn.decoders.image(images, device="cpu")

    pipeline = reader()
    pipeline.build()
    assert pipeline.epoch_size("reader") == len(index) == 50
    sample = 0
    for _ in range(5):
        images, labels, pixels = pipeline.run()
        for k in range(10):
            assert bytes(np.array(images[k])) == index.read(sample)
            assert int(bytes(np.array(labels[k]))) == index.samples["label"][sample]
            assert np.array(pixels[k]).shape == (24, 24, 3)
            sample += 1
    assert sample == 50


def test_tars_hold_nothing_that_depends_on_time_or_user(shapes):
    for shard in Index.load(shapes).shards:
        with tarfile.open(shapes / shard.name) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.mode == 0o644 and member.isfile()


@pytest.mark.slow
def test_bytes_are_the_same_for_any_number_of_workers(tmp_path):
    """From separate processes with another hash seed, time zone and umask."""
    made = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        command = ["shapes", "--num", 150, "--size", 16, "--out", out, "--samples-per-shard", 40, "--workers", workers]
        environment = {**os.environ, "PYTHONHASHSEED": str(workers), "TZ": f"UTC{workers}"}
        result = run(*command, env=environment, umask=0o022 if workers == 1 else 0o077)
        assert result.returncode == 0, result.stderr
        made.append(contents(out))
    assert sorted(made[0]) == ["index.json", "index.npy", *(f"shapes-{k:06d}.tar" for k in range(4))]
    assert made[0] == made[1]
    pngs = [pack("digits", tmp_path / f"png{workers}", workers=workers).index.folder for workers in (1, 2)]
    assert contents(pngs[0]) == contents(pngs[1])


def test_other_options_give_other_bytes(tmp_path, shapes):
    fingerprints = {Index.load(shapes).fingerprint}
    for k, options in enumerate([{"seed": 1}, {"quality": 50}, {"image_format": "png"}, {"samples_per_shard": 25}]):
        options = {"num": 50, "size": 24, "samples_per_shard": 20, "workers": 1, **options}
        fingerprints.add(pack("shapes", tmp_path / str(k), **options).index.fingerprint)
    assert len(fingerprints) == 5


def test_unlabelled_images_have_no_cls_and_keep_their_bytes_and_sizes(tmp_path):
    root = tmp_path / "flat"
    for k in range(5):
        picture(root / f"{k}.jpg", size=(20 + k, 30))
    packed = pack("folder", tmp_path / "out", root=root, workers=1)
    index = packed.index
    assert index.classes is None and packed.size is None
    assert index.samples["label"].tolist() == [-1] * 5
    assert index.samples["width"].tolist() == [20, 21, 22, 23, 24]
    assert [index.read(k) for k in range(5)] == [(root / f"{k}.jpg").read_bytes() for k in range(5)]
    with tarfile.open(index.folder / index.shards[0].name) as tar:
        assert tar.getnames() == [f"{k:08d}.jpg" for k in range(5)]


def test_folder_classes_sizes_and_colours(tmp_path):
    root = tmp_path / "root"
    picture(root / "grey" / "a.png", 77, (40, 30), "L")
    picture(root / "colour" / "b.png", (10, 200, 30), (30, 50))
    packed = pack("folder", tmp_path / "out", root=root, size=16, image_format="png", workers=1)
    index = packed.index
    assert (index.classes, index.channels, packed.size) == (["colour", "grey"], 3, 16)
    pixels = [np.asarray(Image.open(io.BytesIO(index.read(k)))) for k in range(2)]
    assert pixels[0].shape == pixels[1].shape == (16, 16, 3)
    assert (pixels[0] == [10, 200, 30]).all() and (pixels[1] == 77).all()
    assert packed.notes == ["converted 1 images to RGB (--channels chooses)"]
    grey = pack("folder", tmp_path / "grey", root=root, channels=1, workers=1).index
    assert grey.channels == 1
    assert Image.open(io.BytesIO(grey.read(0))).mode == "L"


def test_next_command_names_what_differs_from_the_flagship(tmp_path, capsys):
    picture(tmp_path / "root" / "a.png", 5, (28, 28), "L")
    assert main(["folder", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    for word in ("data.image_size=32", "data.channels=1", "data.num_classes=null", f"data.shards={tmp_path / 'out'}"):
        assert word in shlex.split(last)


# ---- images that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_image_is_named_and_nothing_is_left_behind(tmp_path, photos, workers):
    for k in range(40):  # enough for two workers to have something to do
        picture(photos / "ape" / f"more{k}.png")
    result = run("folder", "--root", photos, "--out", tmp_path / "out", "--workers", workers)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {photos}/cat/2.png: cannot be read as an image (")
    assert "--skip-bad" in result.stderr and "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["photos"]


def test_skip_bad_leaves_them_out_and_counts_them(tmp_path, photos):
    (photos / "bee" / "gone.png").symlink_to(tmp_path / "nowhere")
    (photos / "bee" / "empty.jpg").write_bytes(b"")
    result = run("folder", "--root", photos, "--out", tmp_path / "out", "--skip-bad")
    assert result.returncode == 0, result.stderr
    index = Index.load(tmp_path / "out")
    assert len(index) == 11 and np.bincount(index.samples["label"]).tolist() == [4, 4, 3]
    line = next(line for line in result.stdout.splitlines() if line.startswith("left out"))
    assert line.startswith("left out 3 unreadable images: ")
    for name, reason in (("cat/2.png", ""), ("bee/gone.png", "No such file"), ("bee/empty.jpg", "the file is empty")):
        assert f"{photos}/{name} ({reason}" in line
    # Keys are positions in the source, so they lead back to the file: those of the missing ones are missing.
    keys = [index.key_of(k) for k in range(11)]
    assert keys == [f"{k:08d}" for k in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 13)]


def test_only_the_first_few_bad_names_are_shown_and_emptied_classes_are_mentioned(tmp_path, photos):
    for path in (photos / "ape").iterdir():
        path.write_bytes(b"bad")
    for path in (photos / "bee").iterdir():
        path.write_bytes(b"bad")
    packed = pack("folder", tmp_path / "out", root=photos, skip_bad=True, workers=1)
    assert packed.skipped == 9 and len(packed.skipped_names) == 5
    assert "classes without any image: ape, bee" in packed.notes
    assert packed.index.classes == ["ape", "bee", "cat"] and len(packed.index) == 3


def test_folder_without_one_readable_image_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    for k in range(3):
        (tmp_path / "root" / f"{k}.png").write_bytes(b"bad")
    for options in ({"channels": 3}, {}):
        with pytest.raises(UserError, match=r"none of the 3 images can be read; the first: .*0\.png"):
            pack("folder", tmp_path / "out", root=tmp_path / "root", skip_bad=True, workers=1, **options)
        assert os.listdir(tmp_path) == ["root"]


# ---- bad usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shapes", "--size", "0"], "--size must be in 1..16384"),
        (["shapes", "--quality", "101"], "--quality must be in 1..100"),
        (["shapes", "--samples-per-shard", "0"], "--samples-per-shard must be at least 1"),
        (["shapes", "--workers", "0"], "--workers must be at least 1"),
        (["shapes", "--format", "png", "--quality", "90"], "--quality is for --format jpg"),
        (["shapes", "--split", "test"], "--split means nothing for the source shapes"),
        (["folder"], "--root is missing"),
        (["folder", "--root", "/nonexistent"], "/nonexistent cannot be read"),
        (["mnist", "--root", "/nonexistent"], "no usable mnist below /nonexistent"),
    ],
)
def test_bad_options_are_exit_code_2_and_leave_nothing(tmp_path, capsys, words, message):
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_unknown_source_is_exit_code_2(tmp_path):
    result = run("imagenet", "--out", tmp_path / "out")
    assert result.returncode == 2 and "digits" in result.stderr and "folder" in result.stderr


def test_folder_that_holds_something_is_never_touched(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert main(["shapes", "--num", "10", "--out", str(out)]) == 2
    assert f"{out} is not empty" in capsys.readouterr().err
    assert contents(out) == {"thesis.tex": b"years of work"} and os.listdir(tmp_path) == ["out"]
    (tmp_path / "file").write_text("x")
    assert main(["shapes", "--num", "10", "--out", str(tmp_path / "file")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["shapes", "--num", "10", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_second_pack_into_the_same_folder_is_refused(shapes):
    before = contents(shapes)
    with pytest.raises(UserError, match="is not empty"):
        pack("shapes", shapes, num=10)
    assert contents(shapes) == before


def test_empty_folder_and_link_to_one_are_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    pack("shapes", tmp_path / "link", num=10, size=8, workers=1)
    assert len(Index.load(tmp_path / "real")) == 10 and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_output_inside_the_source_folder_is_refused(tmp_path, photos):
    for out in (photos, photos / "packed", photos / "ape" / "packed"):
        with pytest.raises(UserError, match="lies inside --root"):
            pack("folder", out, root=photos)


def test_something_else_in_the_way_of_the_unfinished_folder_is_never_removed(tmp_path):
    aside = tmp_path / "out.incomplete"
    aside.mkdir()
    (aside / "shapes-000000.tar").write_bytes(b"x")
    (aside / "precious.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds something that pack did not write \(precious.txt\)"):
        pack("shapes", tmp_path / "out", num=10)
    assert len(contents(aside)) == 2
    (aside / "precious.txt").unlink()
    (aside / "index.json").mkdir()
    with pytest.raises(UserError, match="did not write"):
        pack("shapes", tmp_path / "out", num=10)
    (aside / "index.json").rmdir()
    pack("shapes", tmp_path / "out", num=10, size=8, workers=1)
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "new.incomplete").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="is in the way"):
        pack("shapes", tmp_path / "new", num=10)
    assert len(Index.load(tmp_path / "out")) == 10


# ---- crashes --------------------------------------------------------------------------------------------------------


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
    assert process.returncode == 2 and "a worker process of pack died" in errors
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


def test_progress_bar_only_on_a_terminal(tmp_path):
    import pty
    import termios

    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    words = ["shapes", "--num", "40", "--size", "8", "--workers", "1", "--out", str(tmp_path / "a")]
    with subprocess.Popen(
        [sys.executable, "-m", "ddpm_dist.pack", *words], stderr=slave, stdout=subprocess.DEVNULL
    ) as p:
        os.close(slave)
        shown = b""
        try:
            while data := os.read(master, 4096):
                shown += data
        except OSError:  # the other end was closed
            pass
    os.close(master)
    assert p.returncode == 0 and b"packing shapes" in shown and b"40/40" in shown
    assert run(*words[:-1], tmp_path / "b").stderr == ""


def test_importing_pack_loads_nothing_heavy():
    """Worker processes import it, one per CPU."""
    code = "import sys, ddpm_dist.pack; print(sorted({'torch', 'sklearn', 'nvidia', 'mlflow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_index_json_is_plain_and_small(shapes):
    head = json.loads((shapes / "index.json").read_text("ascii"))
    assert head["format"] == "ddpm_dist-index" and head["version"] == 1
    assert [entry["name"] for entry in head["shards"]] == [f"shapes-{k:06d}.tar" for k in range(3)]
    assert str(shapes) not in (shapes / "index.json").read_text()
