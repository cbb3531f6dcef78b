"""The strict tar reader under the index: what it finds in good archives, and which it refuses."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_dist.data.shards import file_sha256
from ddpm_dist.data.tar_stream import Tape, members, split_name
from ddpm_dist.data.tars import scan_shard
from ddpm_dist.errors import UserError


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
    assert [tuple(member) for member in members(Tape(io.BytesIO(data).read))] == expected


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
        ([("a.png", b"garbage")], ":a: not a JPEG, PNG, WebP, PPM or PGM image"),
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
