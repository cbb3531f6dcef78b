"""Packing from zip and tar files: what the folder gives, without unpacking; what is damaged or leads outside is refused."""

import io
import os
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from source_images import save

from ddpm_dist.data.shards import Index
from ddpm_dist.data.sources import open_source
from ddpm_dist.errors import UserError
from ddpm_dist.pack import main, pack

NAMES = ("dog/2.png", "dog/10.png", "cat/b.png", "cat/a.PNG", "Zebra/x.webp")


@pytest.fixture
def photos(tmp_path):
    for k, name in enumerate(NAMES):
        save(tmp_path / "photos" / name, colour=(k, 2, 3))
    (tmp_path / "photos" / "cat" / "notes.md").write_text("x")
    return tmp_path / "photos"


def archive_of(folder, path, around=""):
    files = [file for file in sorted(folder.rglob("*"), reverse=True) if file.is_file()]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, around + str(file.relative_to(folder)))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, around + str(file.relative_to(folder)))
    return path


@pytest.mark.parametrize(
    ("name", "around"), [("a.zip", ""), ("a.tar", ""), ("a.zip", "x/photos/"), ("a.tar", "./photos/")]
)
def test_an_archive_gives_what_its_folder_gives(tmp_path, photos, name, around):
    path = archive_of(photos, tmp_path / name, around)
    before = sorted(tmp_path.iterdir())
    source, folder = open_source("folder", root=path), open_source("folder", root=photos)
    assert source.classes == folder.classes == ["Zebra", "cat", "dog"] and source.channels() == 3
    for k in range(len(folder)):
        ours, theirs = source.item(k), folder.item(k)
        assert (ours.label, ours.load()) == (theirs.label, theirs.load())
        assert ours.name.startswith(f"{path}:") and os.path.basename(ours.name) == os.path.basename(theirs.name)
    assert len(source) == 5 and source.notes[0].startswith("passed over 1 files that are no images")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_packing_parts_of_an_archive(tmp_path, photos, name):
    path = archive_of(photos, tmp_path / name)
    options = ["folder", "--root", str(path), "--format", "png", "--samples-per-shard", "2", "--workers", "1"]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    for number in range(2):
        assert main([*options, "--out", str(tmp_path / "parts"), "--part", f"{number}/2"]) == 0
    assert main(["--merge", "--out", str(tmp_path / "parts")]) == 0
    one, parts = (Index.load(tmp_path / folder) for folder in ("one", "parts"))
    one.verify()
    assert one.fingerprint == parts.fingerprint and len(one) == 5
    pixels = np.asarray(Image.open(io.BytesIO(one.read(4))))
    assert (pixels == [0, 2, 3]).all(), "dog/2.png"


def zip_with(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_archives_that_are_no_data_set_are_refused(tmp_path, photos):
    def refused(path, message):
        with pytest.raises(UserError, match=message):
            pack("folder", tmp_path / "out", root=path, workers=1)
        assert not (tmp_path / "out").exists()

    path = tmp_path / "x.zip"
    refused(zip_with(path, **{"../cat/a.png": b"x"}), "leads outside")
    refused(zip_with(path, **{"/cat/a.png": b"x"}), "leads outside")
    refused(zip_with(path, **{"cat/a.txt": b"x"}), "no images in")
    refused(zip_with(path, **{"cat/a.png": b"x", "b.png": b"x"}), "not laid out as one folder per class")
    refused(zip_with(path, **{"0.png": b"x", "0.cls": b"1"}), "python -m ddpm_dist.index")
    refused(zip_with(path, **{"cat/a.png": b"not an image"}), "not an image|none of the 1 images can be read")
    path.write_bytes(path.read_bytes()[:30])
    refused(path, "neither a folder nor a zip or tar archive")
    link = zipfile.ZipInfo("cat/a.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(path, r"holds a link \(cat/a.png\)")
    (photos / "cat" / "c.png").symlink_to("/etc/passwd")
    refused(archive_of(photos, tmp_path / "links.tar"), "not a regular file")
    (photos / "cat" / "c.png").unlink()
    whole = archive_of(photos, tmp_path / "whole.tar")
    with tarfile.open(tmp_path / "w.tar.gz", "w:gz") as archive:
        archive.add(photos / "cat", "cat")
    refused(tmp_path / "w.tar.gz", "compressed")
    whole.write_bytes(whole.read_bytes()[:2000])
    refused(whole, "cut short")


def test_a_damaged_or_lying_file_in_a_zip_is_one_bad_image(tmp_path, photos):
    path = archive_of(photos, tmp_path / "a.zip")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("cat/b.png")
        at = info.header_offset + 30 + len(info.filename) + 10
    data = bytearray(path.read_bytes())
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.zip:cat/b.png: cannot be read as an image \(damaged in the archive"):
        pack("folder", tmp_path / "out", root=path, workers=1)
    packed = pack("folder", tmp_path / "out", root=path, workers=1, skip_bad=True)
    assert (len(packed.index), packed.skipped) == (4, 1)
