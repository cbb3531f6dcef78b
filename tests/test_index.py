"""ddpm_dist.index on shards that were not packed here: formats, labels, places, and that training reads them right."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import run_module, train
from foreign_shards import encoded, findings, index, picture, samples, write_shards, write_tar
from PIL import Image

from ddpm_dist.config import Data
from ddpm_dist.data.order import BatchPlan
from ddpm_dist.data.pipeline import shard_batches
from ddpm_dist.data.shards import Index, file_sha256
from ddpm_dist.runtime import Runtime


def load(folder):
    found = Index.load(folder)
    found.check_files()
    found.verify()
    return found


def test_training_reads_the_right_pixels_and_labels(tmp_path, capsys):
    """Nothing is packed: webdataset writes JPEG, PNG and WebP, grey and RGB; every batch holds what was written."""
    write_shards(tmp_path / "foreign", 24, 10, ("jpg", "png", "webp", "jpeg"))
    code, _, _ = index(capsys, tmp_path / "foreign", "--out", tmp_path / "index")
    assert code == 0
    found = load(tmp_path / "index")
    assert (len(found), found.num_classes, found.channels, found.image_format) == (24, 4, 3, "mixed")
    settings = Data(shards=str(tmp_path / "index"), image_size=16, channels=3, num_classes=4, flip=False, crop="none")
    plan = BatchPlan(global_batch=6, micro_batch=6, world_size=1)
    runtime = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None)
    seen = {}
    for batch in shard_batches(found, settings, plan, runtime, 0, range(4), "cpu"):
        for sample, pixels, label in zip(batch.ids, batch.pixels.numpy(), batch.labels.tolist(), strict=True):
            seen[int(sample)] = (pixels, label)
    assert sorted(seen) == list(range(24))
    for n, (pixels, label) in seen.items():
        true = np.asarray(picture(n)).transpose(2, 0, 1).astype(int)
        assert label == n % 4
        assert np.abs(pixels - true).mean() < (8 if n % 4 in (0, 3) else 0.01)  # JPEG; the others are exact
        assert found.key_of(n) == f"{n:05d}"
    assert found.shards[0].sha256 == file_sha256(tmp_path / "foreign" / "train-0000.tar")


def test_the_train_command_runs_on_foreign_shards(tmp_path):
    write_shards(tmp_path / "foreign", 24, 10)
    run = run_module("ddpm_dist.index", tmp_path / "foreign", "--out", tmp_path / "index")
    assert run.returncode == 0, run.stderr
    assert "24 samples in 3 shards" in run.stdout and f"data.shards={tmp_path / 'index'}" in run.stdout
    done = train(
        tmp_path / "run", "data.channels=3", "data.num_classes=4", "train.images=24", shards=tmp_path / "index"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("label", "options", "classes", "labels"),
    [
        (lambda n: {"cls": b"%d" % (n % 3)}, [], ["0", "1", "2"], [0, 1, 2, 0, 1, 2]),
        (lambda n: {"cls": b"%d\n" % (n % 3)}, ["--num-classes", 5], list("01234"), [0, 1, 2, 0, 1, 2]),
        (lambda n: {"txt": [b"frog", b"bird", b" cat\n"][n % 3]}, [], ["bird", "cat", "frog"], [2, 0, 1, 2, 0, 1]),
        (lambda n: {"txt": b"007" if n else b"1"}, [], [str(n) for n in range(8)], [1, 7, 7, 7, 7, 7]),
        (lambda n: {"json": b'{"a": {"b": %d}}' % n}, ["--label-key", "a.b"], list("012345"), list(range(6))),
        (lambda n: {"json": json.dumps({"n": ["x", "yz"[n % 2]]}).encode()}, ["--label-key", "n.1"], ["y", "z"], [0, 1] * 3),
        (lambda n: {"meta.json": b'{"c": "q"}'}, ["--label", "meta.json", "--label-key", "c"], ["q"], [0] * 6),
        (lambda n: {"cls": b"1", "txt": b"a long caption"}, ["--unlabelled"], None, [-1] * 6),
        (lambda n: {"cls": b"1", "txt": b"z" if n else b"a"}, ["--label", ".TXT"], ["a", "z"], [0, 1, 1, 1, 1, 1]),
        (lambda n: {}, ["--unlabelled"], None, [-1] * 6),
    ],
)  # fmt: skip
def test_labels_from_cls_txt_and_json(tmp_path, capsys, label, options, classes, labels):
    write_shards(tmp_path / "foreign", 6, 4, label=label)
    code, lines, err = index(capsys, tmp_path / "foreign", "--out", tmp_path / "index", *options)
    assert code == 0, (lines, err)
    found = load(tmp_path / "index")
    assert found.classes == classes and found.samples["label"].tolist() == labels


def test_classes_from_a_file_take_names_and_numbers(tmp_path, capsys):
    (tmp_path / "names").write_text("frog\nbird\nice cream\n")
    write_shards(tmp_path / "foreign", 4, 4, label=lambda n: {"txt": [b"bird", b"ice cream", b"0", b"frog"][n]})
    assert index(capsys, tmp_path / "foreign", "--out", tmp_path / "i", "--classes", tmp_path / "names")[0] == 0
    found = load(tmp_path / "i")
    assert found.classes == ["frog", "bird", "ice cream"] and found.samples["label"].tolist() == [1, 2, 0, 0]


def test_a_byte_order_mark_belongs_to_no_name(tmp_path, capsys):
    """Editors on Windows put one before the text."""
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbffrog\r\nbird\r\n")
    write_shards(tmp_path / "f", 4, 4, label=lambda n: {"txt": [b"bird", b"frog"][n % 2]})
    assert index(capsys, tmp_path / "f", "--out", tmp_path / "i", "--classes", tmp_path / "names")[0] == 0
    assert (
        load(tmp_path / "i").classes == ["frog", "bird"]
        and load(tmp_path / "i").samples["label"].tolist() == [1, 0] * 2
    )
    write_shards(tmp_path / "j", 4, 4, label=lambda n: {"json": b'\xef\xbb\xbf{"a": "%s"}' % [b"bird", b"frog"][n % 2]})
    assert index(capsys, tmp_path / "j", "--out", tmp_path / "k", "--label-key", "a")[0] == 0
    assert load(tmp_path / "k").classes == ["bird", "frog"]
    write_tar(tmp_path / "bom.tar", samples(0, 1, 2, s1_cls=b"\xef\xbb\xbf3"))
    code, lines, _ = index(capsys, tmp_path / "bom.tar", "--check")
    assert code == 1 and findings(lines) == {("bom", "s1"): "bad label"}


def test_one_of_several_images_is_chosen(tmp_path, capsys):
    write_shards(tmp_path / "f", 4, 4, label=lambda n: {"cls": b"0", "Left.PNG": encoded(n + 9, "png", (8, 8))})
    assert index(capsys, tmp_path / "f", "--out", tmp_path / "i", "--image-key", "left.png")[0] == 0
    found = load(tmp_path / "i")
    assert found.ranges["width"] == [8, 8] and found.image_format == "png"
    assert found.read(3) == encoded(12, "png", (8, 8))
    write_tar(tmp_path / "two.tar", [("a.png", encoded(0, "png")), ("a.jpg", encoded(0)), ("a.cls", b"0")])
    code, lines, _ = index(capsys, tmp_path / "two.tar", "--out", tmp_path / "j")
    assert code == 1 and findings(lines) == {("two", "a"): "several images"}


def test_grey_images_alone_are_grey_and_among_colours_rgb(tmp_path, capsys):
    grey = [("a.png", encoded(1, "png", mode="L")), ("a.cls", b"0"), ("b.jpg", encoded(2, mode="L")), ("b.cls", b"1")]
    write_tar(tmp_path / "grey.tar", grey)
    write_tar(tmp_path / "rgb.tar", samples(1, 2))
    assert index(capsys, tmp_path / "grey.tar", "--out", tmp_path / "g")[0] == 0
    assert load(tmp_path / "g").channels == 1
    assert index(capsys, tmp_path / "grey.tar", tmp_path / "rgb.tar", "--out", tmp_path / "m")[0] == 0
    assert load(tmp_path / "m").channels == 3


def test_patterns_folders_and_roots(tmp_path, capsys):
    paths = write_shards(tmp_path / "a" / "deep", 6, 2)
    (tmp_path / "b").mkdir()
    shutil.copy(paths[0], tmp_path / "b" / "other.tar")
    pattern = str(tmp_path / "a" / "deep" / "train-{0000..0001}.tar")
    assert index(capsys, pattern, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "i")[0] == 0
    found = load(tmp_path / "i")
    assert found.root == str(tmp_path)
    assert [s.name for s in found.shards] == [*(f"a/deep/{p.name}" for p in paths), "b/other.tar"]


def test_speed_counts_histograms_and_sheet_are_shown(tmp_path, capsys):
    write_shards(tmp_path / "f", 60, 20, label=lambda n: {"txt": b"class%02d" % (n % 30 if n % 7 else 0)})
    write_tar(tmp_path / "f" / "z.tar", [("big.jpg", encoded(1, size=(40, 20))), ("big.txt", b"class00")])
    for name in ("one.png", "two.png"):
        code, lines, err = index(
            capsys, tmp_path / "f", "--out", tmp_path / "i", "--sheet", tmp_path / name, "--seed", 5
        )
        assert code == 0, err
    text = "\n".join(lines)
    assert "61 samples in 4 shards (4 unchanged, not read again)" in text and "MB/s" in text
    assert "30 classes" in text and "0 class00" in text and "..." in text
    assert "16 x 16  60" in text and "40 x 20   1" in text
    with Image.open(tmp_path / "one.png") as sheet:
        assert sheet.width > 8 * 64 and sheet.height > 24 * 64
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_several_processes_make_the_same_index(tmp_path, capsys):
    write_shards(tmp_path / "f", 40, 5)
    assert index(capsys, tmp_path / "f", "--out", tmp_path / "one")[0] == 0
    run = run_module("ddpm_dist.index", tmp_path / "f", "--out", tmp_path / "three", "--workers", 3)
    assert run.returncode == 0, run.stderr
    for name in ("index.json", "index.npy", "names.txt", "scanned.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_it_starts_without_torch():
    assert run_module("ddpm_dist.index", "--help").returncode == 0
    import subprocess

    code = "import sys, ddpm_dist.index; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
