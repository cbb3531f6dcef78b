"""Version 2 of the index: the same samples as version 1 wherever the shards lie, checked in parts, and damage is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import shard_folders

from ddpm_dist.data import large_index, shards
from ddpm_dist.data.large_index import write_large_index
from ddpm_dist.data.shards import Index, Shard, file_sha256
from ddpm_dist.errors import UserError

packed = shard_folders.packed  # fixture


@pytest.fixture
def large(packed, tmp_path, monkeypatch):
    """An index of version 2 in blocks of 4 records, of shards that lie elsewhere."""
    monkeypatch.setattr(large_index, "BLOCK", 4)
    return written(packed, tmp_path / "index")


def written(packed, folder, **changes):
    index = Index.load(packed)
    folder.mkdir()
    values = {"shards": index.shards, "samples": index.samples, "classes": index.classes, "root": str(packed)} | changes
    write_large_index(folder, values["shards"], values["samples"], values["classes"], 3, "jpg", values["root"])
    return folder


def edit(folder, seal=True, **changes):
    head = json.loads((folder / "index.json").read_text()) | changes
    if seal:
        head["fingerprint"] = large_index.fingerprint(head)
    (folder / "index.json").write_text(json.dumps(head))


def test_it_is_the_same_data(packed, large):
    first, second = Index.load(packed), Index.load(large)
    assert len(second) == len(first) == 25 and list(second.shards) == list(first.shards)
    assert second.ranges == first.ranges == {"label": [0, 9], "height": [16, 16], "width": [16, 16]}
    assert second.classes == first.classes and second.num_classes == 10
    ids = np.array([24, 0, 9, 10, 3, 3])
    assert np.array_equal(second.rows(ids), first.rows(ids)) and np.array_equal(second.samples, first.samples)
    assert list(second.read_many(ids)) == list(first.read_many(ids))
    assert second.describe(10) == first.describe(10)
    second.check_files()
    second.verify()
    assert pickle.loads(pickle.dumps(second)).read(7) == first.read(7)


def test_the_fingerprint_is_that_of_the_data_not_of_the_place(packed, large, tmp_path):
    found = Index.load(large).fingerprint
    assert Index.load(written(packed, tmp_path / "other", root="/somewhere/else")).fingerprint == found
    fewer = np.array(Index.load(packed).samples)
    fewer["label"][3] += 1
    assert Index.load(written(packed, tmp_path / "label", samples=fewer)).fingerprint != found
    names = [Shard("x" + each.name, each.samples, each.bytes, each.sha256) for each in Index.load(packed).shards]
    assert Index.load(written(packed, tmp_path / "names", shards=names)).fingerprint != found


def test_names_may_be_complete(packed, tmp_path, monkeypatch):
    moved = [Shard(f"{packed}/{s.name}", s.samples, s.bytes, s.sha256) for s in Index.load(packed).shards]
    index = Index.load(written(packed, tmp_path / "complete", shards=moved, root=""))
    assert index.location(1) == moved[1].name and index.read(12) == Index.load(packed).read(12)
    remote = Index.load(written(packed, tmp_path / "remote", root="https://host/set/"))
    assert remote.location(2) == f"https://host/set/{remote.shards[2].name}"
    remote.check_files()  # nothing to ask on this machine


def test_a_very_large_table_is_checked_where_it_is_used(large, monkeypatch):
    monkeypatch.setattr(shards, "CHECKED_AT_ONCE", 10)
    data = bytearray((large / "index.npy").read_bytes())
    data[-28 * 25 + 28 * 9 + 3] ^= 1  # record 9, in the block of 8 to 11
    (large / "index.npy").write_bytes(data)
    index = Index.load(large)
    assert index.rows(np.array([0, 7, 12, 24])).shape == (4,)
    with pytest.raises(UserError, match="records 8 to 11 are damaged"):
        index.rows(np.array([0, 11]))
    with pytest.raises(UserError, match="records 8 to 11 are damaged"):
        _ = index.samples
    monkeypatch.setattr(shards, "CHECKED_AT_ONCE", 100)
    with pytest.raises(UserError, match="records 8 to 11 are damaged"):
        Index.load(large)


@pytest.mark.parametrize(
    ("field", "place", "value", "said"),
    [
        ("offset", 5, 513, "tar block"),
        ("offset", 10, 0, "tar block"),  # the first of a shard, with its header before the file
        ("size", 24, 1 << 30, "inside its shard"),
        ("size", 4, 0, "is empty"),
        ("width", 8, 0, "is empty"),
        ("offset", 4, 512, "tar block"),  # the first of a block of records, before the end of the sample in front of it
    ],
)
def test_records_that_cannot_be(packed, tmp_path, monkeypatch, field, place, value, said):
    monkeypatch.setattr(large_index, "BLOCK", 4)
    samples = np.array(Index.load(packed).samples)
    samples[field][place] = value
    with pytest.raises(UserError, match=f"sample {place} .*{said}"):
        Index.load(written(packed, tmp_path / "bad", samples=samples))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 24}, "do not fit together"),
        ({"shards": 2}, "records of"),
        ({"block": 5}, "records of"),
        ({"block": 0}, "block is not a positive count"),
        ({"channels": 2}, "channels is not 1 or 3"),
        ({"image_format": "gif"}, "image_format is not one of"),
        ({"classes": ["a"]}, "labels 0 to 9 for 1 classes"),
        ({"classes": None}, "have labels"),
        ({"ranges": {"label": [0, 9]}}, "ranges is not"),
        ({"ranges": {"label": [0, 8], "height": [16, 16], "width": [16, 16]}}, "a label outside 0..8"),
        ({"root": 3}, "root is not"),
        ({"sha256": {}}, "sha256 is not"),
    ],
)
def test_heads_that_are_refused(large, changes, said):
    if "ranges" in changes or "samples" in changes or "block" in changes:
        edit(large, **changes)
    else:
        edit(large, seal="sha256" not in changes and "root" not in changes, **changes)
    with pytest.raises(UserError, match=said):
        Index.load(large)


def test_a_changed_head_or_table_is_noticed(large):
    for name in ("shards.npy", "names.txt", "blocks.npy"):
        whole = (large / name).read_bytes()
        for bad in (whole[:-1], whole[:-2] + b"x" + whole[-1:], b""):
            (large / name).write_bytes(bad)
            with pytest.raises(UserError, match=rf"{name}: "):
                Index.load(large)
        (large / name).unlink()
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            Index.load(large)
        (large / name).write_bytes(whole)
    Index.load(large)
    edit(large, seal=False, classes=[str(i) for i in range(11)])
    with pytest.raises(UserError, match="fingerprint does not fit"):
        Index.load(large)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/a.tar", "a//b.tar", "b/../../a.tar", "a\\b.tar", "./a.tar"])
def test_names_cannot_leave_their_place(packed, tmp_path, name):
    index = Index.load(packed)
    names = [
        Shard(name, index.shards[0].samples, index.shards[0].bytes, index.shards[0].sha256),
        *list(index.shards)[1:],
    ]
    with pytest.raises(UserError, match="leads out of the place"):
        Index.load(written(packed, tmp_path / "bad", shards=names))


def test_names_that_do_not_fit(large):
    names = (large / "names.txt").read_bytes()
    for bad in (names.replace(b"\n", b"\0", 1), names.replace(b"000001", b"000000", 1), b"\xff" + names[1:]):
        (large / "names.txt").write_bytes(bad)
        head = json.loads((large / "index.json").read_text())
        edit(large, sha256=head["sha256"] | {"names.txt": file_sha256(large / "names.txt")})
        with pytest.raises(UserError, match=r"names\.txt: "):
            Index.load(large)


def test_a_shard_that_was_replaced_is_noticed_when_it_is_opened(packed, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed.glob("*.tar"):
        (copy / file.name).write_bytes(file.read_bytes())
    index = Index.load(written(packed, tmp_path / "index", root=str(copy)))
    assert index.read(0) == Index.load(packed).read(0)
    with open(copy / index.shards[1].name, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"the index says .* cut short or was replaced; copy it again, or run"):
        index.read(12)
