"""The index of a shard folder, and the strict tar reader under it."""

import io
import json
import os
import pickle
import tarfile
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_dist.data.index_file import MAX_JSON_BYTES
from ddpm_dist.data.shards import SAMPLE_DTYPE, Index, Shard, checksum, file_sha256, write_index
from ddpm_dist.data.tars import members, scan_shard, split_name
from ddpm_dist.errors import UserError
from ddpm_dist.pack import pack


def png(value=0, size=8, mode="L"):
    buffer = io.BytesIO()
    Image.new(mode, (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def make_tar(path, files, tar_format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "shapes"
    pack("shapes", out, num=25, size=16, samples_per_shard=10, workers=1)
    return out


@pytest.fixture
def copy(packed, tmp_path):
    """A copy of the packed folder that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in packed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_head(folder, **changes):
    head = json.loads((folder / "index.json").read_text())
    head.update(changes)
    (folder / "index.json").write_text(json.dumps(head))


def edit_table(folder, change):
    """Change records of index.npy and make index.json fit, so that only the check under test can object."""
    samples = np.load(folder / "index.npy")
    head = json.loads((folder / "index.json").read_text())
    change(samples)
    for name in ("index.npy", "index.json"):
        (folder / name).unlink()
    shards = [Shard(**entry) for entry in head["shards"]]
    write_index(folder, shards, samples, head["classes"], head["channels"], head["image_format"])


# ---- a good index ---------------------------------------------------------------------------------------------------


def test_index_lists_every_sample_with_the_bytes_and_labels_that_the_tars_hold(packed):
    index = Index.load(packed)
    index.check_files()
    index.verify()
    assert (len(index), index.channels, index.image_format, index.num_classes) == (25, 3, "jpg", 10)
    assert [shard.samples for shard in index.shards] == [10, 10, 5]
    sample = 0
    for number, shard in enumerate(index.shards):
        with tarfile.open(packed / shard.name) as tar:
            files = {member.name: member for member in tar}
        for key in sorted({name.split(".")[0] for name in files}):
            record, image = index.samples[sample], files[f"{key}.jpg"]
            with open(packed / shard.name, "rb") as file:
                file.seek(image.offset_data)
                data = file.read(image.size)
            assert (record["offset"], record["size"], record["checksum"]) == (
                image.offset_data,
                image.size,
                checksum(data),
            )
            assert index.read(sample) == data
            assert index.key_of(sample) == key
            assert index.describe(sample) == f"{packed / shard.name}:{key}"
            assert index.shard_of(np.array([sample]))[0] == number
            assert record["label"] == sample % 10
            assert (record["height"], record["width"]) == (16, 16)
            sample += 1
    assert sample == 25


def test_record_is_28_bytes_and_the_checksum_is_the_documented_one():
    assert SAMPLE_DTYPE.itemsize == 28
    # python -c "import hashlib; print(hashlib.blake2b(b'abc', digest_size=8).hexdigest())" gives d8bb14d833d59559
    assert checksum(b"abc") == int.from_bytes(bytes.fromhex("d8bb14d833d59559"), "little")


def test_fingerprint_is_the_same_for_a_copy_and_differs_for_other_data(packed, copy, tmp_path):
    assert Index.load(copy).fingerprint == Index.load(packed).fingerprint
    other = pack("shapes", tmp_path / "other", num=25, size=16, samples_per_shard=10, workers=1, seed=1).index
    assert other.fingerprint != Index.load(packed).fingerprint
    edit_table(copy, lambda samples: samples["label"].__setitem__(3, 4))
    assert Index.load(copy).fingerprint != Index.load(packed).fingerprint


def test_index_travels_to_other_processes_and_is_read_by_many_threads(packed):
    index = pickle.loads(pickle.dumps(Index.load(packed)))
    expected = [index.read(k) for k in range(25)]
    wrong = []

    def read():
        wrong.extend(k for k in list(range(25)) * 20 if index.read(k) != expected[k])

    threads = [threading.Thread(target=read) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


def test_more_shards_than_open_files_allowed_are_read(packed, monkeypatch):
    monkeypatch.setattr("ddpm_dist.data.shards.MAX_OPEN_FILES", 1)
    index = Index.load(packed)
    before = len(os.listdir("/proc/self/fd"))
    for sample in [0, 10, 20] * 10:
        assert checksum(index.read(sample)) == index.samples["checksum"][sample]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_one_million_samples_take_40_mb_and_load_in_a_second(tmp_path):
    count, per_shard = 1_000_000, 10_000
    samples = np.zeros(count, SAMPLE_DTYPE)
    samples["offset"] = np.tile(np.arange(per_shard) * 2048 + 1536, count // per_shard)
    samples["checksum"] = np.random.default_rng(0).integers(0, 1 << 63, count)
    samples["size"], samples["height"], samples["width"] = 300, 64, 64
    samples["label"] = np.arange(count) % 10
    shards = [Shard(f"s-{k:06d}.tar", per_shard, per_shard * 2048 + 1024, "0" * 64) for k in range(count // per_shard)]
    write_index(tmp_path, shards, samples, [str(k) for k in range(10)], 3, "jpg")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 40e6
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process, so that a busy machine does not count
        index = Index.load(tmp_path)
        times.append(time.process_time() - start)
    assert len(index) == count
    assert min(times) < 1.0


# ---- a bad one ------------------------------------------------------------------------------------------------------


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
        ('{"format": "ddpm_dist-index", "version": 2}', "version 2 is not one"),
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


# ---- the tar reader -------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60).map(
    lambda name: "x" if name in (".", "..") else name
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=4).map("/".join), st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_finds(files, tar_format):
    buffer = io.BytesIO()
    make_into(buffer, files, tar_format)
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [tuple(member) for member in members(data, "x.tar")] == expected


def make_into(buffer, files, tar_format):
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@settings(max_examples=200, deadline=None)
@given(st.text("ab./-_ A", min_size=1, max_size=12))
def test_keys_are_split_as_webdataset_does(name):
    from webdataset.tariterators import base_plus_ext

    if name.rpartition("/")[2].startswith("."):  # webdataset makes samples of hidden files in folders, we do not
        assert split_name(name) == ("", "")
        return
    prefix, suffix = base_plus_ext(name)
    assert split_name(name) == ((prefix, suffix.lower()) if prefix and suffix else ("", ""))


def test_foreign_shards_are_read(tmp_path):
    """Long names, capital extensions, folders, other files beside the image, label first or last, white space."""
    long = "f" * 120 + "/" + "k" * 130
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{tar_format}.tar"
        with tarfile.open(path, "w", format=tar_format) as tar:
            folder = tarfile.TarInfo("f")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            files = [(f"{long}.PNG", png()), (f"{long}.cls", b" 3\n"), (f"{long}.txt", b"a caption")]
            for name, data in [*files, ("f/b.cls", b"12"), ("f/b.seg.png", b"mask"), ("f/b.png", png(size=9))]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        scan = scan_shard(path)
        assert scan.samples["label"].tolist() == [3, 12]
        assert scan.samples["width"].tolist() == [8, 9]
        assert (scan.formats, scan.channels) == ({"png"}, {1})
        assert scan.shard.sha256 == file_sha256(path) and scan.shard.bytes == path.stat().st_size


GOOD = [("a.png", png(1)), ("a.cls", b"0"), ("b.png", png(2)), ("b.cls", b"1")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*GOOD, ("a.png", png())], ":a: the key occurs twice"),
        ([("a.png", png()), ("b.png", png()), ("a.cls", b"0"), ("b.cls", b"0")], ":a: the key occurs twice"),
        ([("a.png", png()), ("a.png", png())], r":a: \.png occurs twice"),
        ([("a.png", png()), ("a.jpg", png())], ":a: needs exactly one image"),
        ([("a.cls", b"0")], ":a: needs exactly one image .* found none"),
        ([("a.png", png()), ("a.cls", b"0"), ("b.png", png())], "1 of 2 samples have no .cls"),
        ([("a.png", b"")], ":a: the image is empty"),
        ([("a.png", b"garbage")], ":a: not a JPEG or PNG image"),
        ([("a.png", png(mode="RGBA"))], ":a: image mode RGBA"),
        ([("a.png", png()), ("a.cls", b"cat")], ":a: the label in .cls"),
        ([("a.png", png()), ("a.cls", b"-1")], ":a: the label in .cls"),
        ([("a.png", png()), ("a.cls", b"")], ":a: the label in .cls"),
        ([("a.png", png()), ("a.cls", b"1" * 1000)], ":a: the label in .cls"),
        ([("a.png", png()), ("a.cls", b"2147483648")], ":a: the label in .cls"),
        ([], "holds no samples"),
        ([("readme", b"x")], "holds no samples"),
    ],
)
def test_bad_samples_are_named_by_shard_and_key(tmp_path, files, message):
    path = make_tar(tmp_path / "bad.tar", files)
    with pytest.raises(UserError, match="bad.tar" + (message if message[0] == ":" else ".*" + message)):
        scan_shard(path)


def test_every_truncation_of_a_tar_is_noticed(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", GOOD).read_bytes()
    payload = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # behind this only the end mark and padding follow
    path = tmp_path / "cut.tar"
    for length in [*range(0, payload, 128), payload - 1, payload]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.tar: (cut short|the file is empty)"):
            scan_shard(path)
    path.write_bytes(whole[: payload + 512])
    assert len(scan_shard(path).samples) == 2


def test_every_damaged_header_byte_is_noticed(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", GOOD).read_bytes()
    path = tmp_path / "flipped.tar"
    for position in [0, 1, 99, 124, 135, 148, 150, 156, 257, 345, 500]:
        data = bytearray(whole)
        data[position] ^= 0x15
        path.write_bytes(data)
        with pytest.raises(UserError, match="no valid header at byte 0"):
            scan_shard(path)


def rewrite_header(path, position, start, field):
    """Change a header field and make the check sum right again."""
    data = bytearray(path.read_bytes())
    data[position + start : position + start + len(field)] = field
    header = data[position : position + 512]
    header[148:156] = b" " * 8
    data[position + 148 : position + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\x80" + b"\0" * 6 + b"\x7f" * 5])
def test_absurd_sizes_are_refused_without_reading(tmp_path, size):
    path = make_tar(tmp_path / "bomb.tar", GOOD)
    rewrite_header(path, 0, 124, size)
    with pytest.raises(UserError, match="announces .* bytes"):
        scan_shard(path)


@pytest.mark.parametrize("size", [b"\xff" * 12, b"-0000000001\0", b"0x000000001\0", b"1_000000000\0", b"\0" * 12])
def test_sizes_that_are_no_numbers_are_refused(tmp_path, size):
    path = make_tar(tmp_path / "odd.tar", GOOD)
    rewrite_header(path, 0, 124, size)
    with pytest.raises(UserError, match="no valid header"):
        scan_shard(path)


def test_long_name_bombs_are_refused(tmp_path):
    path = tmp_path / "long.tar"
    with open(path, "wb") as file:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2 << 30)  # sparse
    with pytest.raises(UserError, match="extended header at byte 0 claims 1073741824"):
        scan_shard(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "link.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="'a.png' at byte 0 is not a regular file"):
        scan_shard(path)


def test_two_tars_joined_by_cat_are_refused(tmp_path):
    one = make_tar(tmp_path / "one.tar", GOOD).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    with pytest.raises(UserError, match="data follows the end-of-archive mark"):
        scan_shard(tmp_path / "two.tar")


def test_compressed_tar_and_missing_file_are_refused(tmp_path):
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match="not a tar archive|cut short"):
        scan_shard(tmp_path / "z.tar")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        scan_shard(tmp_path / "none.tar")
