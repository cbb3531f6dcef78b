"""The key that a message names is the one that the tar gives, also where it does not fit into a plain header; whole or damaged."""

import io
import tarfile

import pytest
from foreign_shards import encoded, flipped, index

from ddpm_dist.data import sample_key
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError

KEYS = {
    "long": [f"folder/{'L' * 110}-{n:02d}" for n in range(6)],
    "unicode": [f"schlüssel/ключ-{n:02d}" for n in range(6)],
    "mixed": ["a", "ä" * 120, "b/" + "c" * 98, "d", "é", "e"],
    "control": [f"a\n\x1b[31m{n}" for n in range(6)],
}


def write(path, keys, kind):
    with tarfile.open(path, "w", format=kind) as tar:
        for n, key in enumerate(keys):
            for name, data in ((f"{key}.jpg", encoded(n)), (f"{key}.cls", b"1"), (f"{key}.txt", b"x" * 700)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(params=[(kind, keys) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT) for keys in KEYS], ids=str)
def made(request, tmp_path, capsys):
    """An index of two such shards, and their keys."""
    kind, name = request.param
    keys = KEYS[name]
    write(tmp_path / "0.tar", keys[:4], kind)
    write(tmp_path / "1.tar", keys[4:], kind)
    assert index(capsys, tmp_path / "0.tar", tmp_path / "1.tar", "--out", tmp_path / "i")[0] == 0
    return tmp_path / "i", keys


def test_every_sample_is_called_by_its_key(made):
    folder, keys = made
    found = Index.load(folder)
    assert [found.key_of(n) for n in range(6)] == keys
    for n, key in enumerate(keys):
        shown = key if key.isprintable() else key.encode("unicode_escape").decode("ascii")
        assert found.describe(n).endswith(f"/{n // 4}.tar:{shown}")


def test_a_damaged_image_is_named_and_a_damaged_header_before_it_does_no_harm(made):
    folder, keys = made
    path, found = folder.parent / "0.tar", Index.load(folder)
    whole, rows = path.read_bytes(), found.samples
    begin, end = (int(rows["offset"][n]) for n in (1, 2))
    path.write_bytes(flipped(whole, end + 40))
    with pytest.raises(UserError, match="do not match the index") as caught:
        Index.load(folder).read(2)
    assert str(caught.value).startswith(found.describe(2))
    after = begin + -(-int(rows["size"][1]) // 512) * 512
    for position in range(after, end, 97):  # labels, names, headers: whatever is lost, something is said
        path.write_bytes(flipped(whole, position))
        assert Index.load(folder).describe(2).startswith(f"{path}:")
    path.write_bytes(
        flipped(whole, after + 3)
    )  # the header of the label before: its sum is wrong, so nothing is read behind it
    named = Index.load(folder).key_of(2)
    assert named == keys[2] or len(keys[2]) > 95 or not keys[2].isascii()


def test_no_more_is_read_than_lies_between_two_samples(made, monkeypatch):
    folder, keys = made
    found, asked = Index.load(folder), []
    real = found._pread
    monkeypatch.setattr(found, "_pread", lambda n, size, at: asked.append((at, size)) or real(n, size, at))
    assert found.key_of(3) == keys[3]
    rows = found.samples
    assert sum(size for _, size in asked) <= int(rows["offset"][3]) - int(rows["offset"][2])
    monkeypatch.setattr(sample_key, "MAX_READ", 100)
    asked.clear()
    assert found.describe(3).startswith(str(folder.parent / "0.tar:")) and sum(size for _, size in asked) == 512
