"""python -m ddpm_dist.pack from end to end: the files, and who can read them."""

import io
import json
import os
import shlex
import subprocess
import sys
import tarfile

import numpy as np
import packing
import pytest
from packing import contents, picture, run
from PIL import Image

from ddpm_dist.data.shards import Index
from ddpm_dist.pack import main, pack

shapes = packing.shapes  # fixture


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
