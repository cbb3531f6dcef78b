"""Shard folders that are refused: unfinished, damaged, contradicting themselves, or made to harm."""

import json

import numpy as np
import pytest
import shard_folders
from shard_folders import edit_table

from ddpm_dist.data.index_file import MAX_JSON_BYTES
from ddpm_dist.data.shards import SAMPLE_DTYPE, Index, file_sha256
from ddpm_dist.errors import UserError

packed, copy = shard_folders.packed, shard_folders.copy  # fixtures


def edit_head(folder, **changes):
    head = json.loads((folder / "index.json").read_text())
    head.update(changes)
    (folder / "index.json").write_text(json.dumps(head))


def test_missing_empty_and_unfinished_folders_are_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no shard folder .*nowhere.*ddpm_dist\.pack"):
        Index.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        Index.load(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no index\.json"):
        Index.load(tmp_path / "other")
    (tmp_path / "killed.incomplete").mkdir()
    with pytest.raises(UserError, match="did not finish"):
        Index.load(tmp_path / "killed")


def test_truncated_or_changed_table_is_refused(copy):
    data = (copy / "index.npy").read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], b"", data[:-1] + bytes([data[-1] ^ 1]), data + b"x"):
        (copy / "index.npy").write_bytes(damaged)
        with pytest.raises(UserError, match=r"index\.npy: damaged"):
            Index.load(copy)
    (copy / "index.npy").unlink()
    with pytest.raises(UserError, match=r"index\.npy: cannot be read"):
        Index.load(copy)


def test_table_of_objects_is_not_unpickled(copy, tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    np.save(copy / "index.npy", np.array([Payload()] * 25, dtype=object), allow_pickle=True)
    edit_head(copy, index_sha256=file_sha256(copy / "index.npy"))
    with pytest.raises(UserError, match="not a NumPy table"):
        Index.load(copy)
    assert not (tmp_path / "ran").exists()


def test_table_of_another_type_or_length_is_refused(copy):
    for table in (np.zeros(25), np.zeros(24, SAMPLE_DTYPE), np.zeros((25, 1), SAMPLE_DTYPE)):
        np.save(copy / "index.npy", table)
        edit_head(copy, index_sha256=file_sha256(copy / "index.npy"))
        with pytest.raises(UserError, match="25 samples are expected"):
            Index.load(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[]", "not an index of ddpm_dist"),
        ("{}", "not an index of ddpm_dist"),
        ('{"format": "something"}', "not an index of ddpm_dist"),
        ('{"format": "ddpm_dist-index", "version": 3}', "version 3 is not one"),
        ('{"format": "ddpm_dist-index", "version": "1"}', "version '1' is not one"),
        ('{"format": "ddpm_dist-index", "version": 1}', "samples is not"),
    ],
)
def test_index_json_that_is_none_is_refused(copy, text, message):
    (copy / "index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        Index.load(copy)


def test_huge_index_json_is_refused_unread(copy):
    with open(copy / "index.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no space
    with pytest.raises(UserError, match="MiB"):
        Index.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 26}, "the shards hold 25 samples, but samples is 26"),
        ({"samples": True}, "samples is not a count"),
        ({"samples": -1}, "samples is not a count"),
        ({"channels": 2}, "channels is not 1 or 3"),
        ({"channels": 3.0}, "channels is not 1 or 3"),
        ({"image_format": "gif"}, "image_format is not"),
        ({"image_format": []}, "image_format is not"),
        ({"classes": []}, "classes is not"),
        ({"classes": ["a", "a"]}, "classes is not"),
        ({"classes": [1]}, "classes is not"),
        ({"classes": "abc"}, "classes is not"),
        ({"classes": None}, "has a label, but there are no classes"),
        ({"classes": list("abcdefghi")}, r"sample 9 \(shard shapes-000000.tar\) has a label outside 0..8"),
        ({"classes": list("abcdefghij")}, "fingerprint does not fit"),
        ({"fingerprint": "0" * 64}, "fingerprint does not fit"),
        ({"fingerprint": "x"}, "fingerprint is not a sha256"),
        ({"index_sha256": "0" * 64}, "sha256 differs"),
        ({"shards": []}, "shards is not"),
        ({"shards": {}}, "shards is not"),
        ({"shards": [1]}, r"shards\[0\] does not have"),
    ],
)
def test_index_json_that_contradicts_itself_is_refused(copy, change, message):
    edit_head(copy, **change)
    with pytest.raises(UserError, match=message):
        Index.load(copy)


@pytest.mark.parametrize("name", ["../a.tar", "a/b.tar", "/a.tar", "..", "", "a.txt", "a\0.tar", "..\\a.tar", 7, None])
def test_shard_names_cannot_leave_the_folder(copy, name):
    head = json.loads((copy / "index.json").read_text())
    head["shards"][1]["name"] = name
    edit_head(copy, shards=head["shards"])
    with pytest.raises(UserError, match=r"shards\[1\]\.name"):
        Index.load(copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("samples", 0, "must be positive"),
        ("samples", "10", "must be positive"),
        ("bytes", -5, "must be positive"),
        ("bytes", 3000, "does not lie inside its shard"),
        ("sha256", "abc", "sha256"),
        ("name", "shapes-000000.tar", "listed twice"),
    ],
)
def test_shard_entries_are_checked(copy, key, value, message):
    head = json.loads((copy / "index.json").read_text())
    head["shards"][1][key] = value
    edit_head(copy, shards=head["shards"])
    with pytest.raises(UserError, match=message):
        Index.load(copy)


@pytest.mark.parametrize(
    ("field", "row", "value", "message"),
    [
        ("offset", 12, 1000, "sample 12 .shard shapes-000001.tar. is not on a tar block"),
        ("offset", 12, 512, "is not on a tar block behind"),
        ("offset", 10, 0, "sample 10 .* is not on a tar block"),
        ("offset", 24, 1 << 40, "does not lie inside"),
        ("offset", 24, (1 << 64) - 512, "does not lie inside"),
        ("size", 24, 1 << 30, "does not lie inside"),
        ("size", 3, 0, "is empty"),
        ("height", 3, 0, "is empty"),
        ("width", 3, 0, "is empty"),
        ("label", 4, 10, "sample 4 .* outside 0..9"),
        ("label", 4, -1, "sample 4 .* outside 0..9"),
    ],
)
def test_records_are_checked_even_when_all_hashes_fit(copy, field, row, value, message):
    edit_table(copy, lambda samples: samples[field].__setitem__(row, value))
    with pytest.raises(UserError, match=message):
        Index.load(copy)


def test_missing_and_shortened_shards_are_named(copy):
    index = Index.load(copy)
    shard = copy / index.shards[1].name
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"shapes-000001\.tar has \d+ bytes, the index says"):
        index.check_files()
    shard.unlink()
    with pytest.raises(UserError, match=r"shapes-000001\.tar .*cannot be read"):
        index.check_files()
    with pytest.raises(UserError, match=r"shapes-000001\.tar cannot be read"):
        index.read(12)
    assert index.describe(12).endswith("shapes-000001.tar:sample 12")


def test_flipped_bit_in_an_image_is_found_when_it_is_read_and_named(copy):
    index = Index.load(copy)
    shard = copy / index.shards[0].name
    data = bytearray(shard.read_bytes())
    record = index.samples[7]
    data[int(record["offset"]) + int(record["size"]) // 2] ^= 4
    shard.write_bytes(data)
    index.check_files()  # the size is right
    assert index.read(6)
    with pytest.raises(UserError, match=r"shapes-000000\.tar:00000007: the image bytes do not match"):
        index.read(7)
    with pytest.raises(UserError, match=r"shapes-000000\.tar is damaged"):
        index.verify()
