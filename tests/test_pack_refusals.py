"""What pack refuses, and that nothing of anybody's is touched then: unreadable images, bad options, folders in the way."""

import os

import numpy as np
import packing
import pytest
from packing import contents, picture, run

from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import main, pack

shapes = packing.shapes  # fixture


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
