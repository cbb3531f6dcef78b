"""Labels of which most are numbers or most are names, in a set that grows: the index is the one that a fresh run makes."""

import functools
import itertools

import pytest
from foreign_shards import encoded, findings, index, quarantined, write_tar

from ddpm_dist.data.shards import Index


def shard(path, *labels, bad=(), undecodable=()):
    """Samples k0, k1 ... with these labels; ``bad``: numbers of those whose image is none; ``undecodable``: that break off."""
    files = []
    for n, label in enumerate(labels):
        image = b"garbage" if n in bad else encoded(n)
        files += [(f"k{n}.jpg", image[:-200] if n in undecodable else image), (f"k{n}.txt", label.encode())]
    return write_tar(path, files)


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unchanged(lines):
    line = next(line for line in lines if " samples in " in line)
    return int(line.partition("(")[2].split()[0])


@pytest.fixture
def build(capsys):
    return functools.partial(index, capsys, "--label", "txt", "--quarantine", "--out")


def test_labels_that_were_refused_come_back_when_the_majority_changes(tmp_path, build):
    a = shard(tmp_path / "a.tar", "5", "5", "cat", "cat", "cat", "dog")
    b = shard(tmp_path / "b.tar", *["3"] * 30)
    assert build(tmp_path / "i", a)[0] == 0
    assert quarantined(tmp_path / "i") == {("a", "k0"): "bad label", ("a", "k1"): "bad label"}
    lines = build(tmp_path / "i", a, b)[1]
    assert findings(lines) == {("a", f"k{n}"): "bad label" for n in range(2, 6)}
    assert build(tmp_path / "fresh", a, b)[0] == 0
    assert everything(tmp_path / "i") == everything(tmp_path / "fresh")
    assert Index.load(tmp_path / "i").classes == [str(n) for n in range(6)] and len(Index.load(tmp_path / "i")) == 32
    assert unchanged(build(tmp_path / "i", a, b)[1]) == 2, "nothing is read where nothing has changed"
    assert everything(tmp_path / "i") == everything(tmp_path / "fresh")
    assert build(tmp_path / "i", a)[0] == 0 and build(tmp_path / "back", a)[0] == 0
    assert everything(tmp_path / "i") == everything(tmp_path / "back") and Index.load(tmp_path / "i").classes == [
        "cat",
        "dog",
    ]


@pytest.mark.parametrize("order", list(itertools.permutations("abcd"))[::5], ids="".join)
def test_any_order_of_growth_ends_at_the_fresh_index(tmp_path, build, order):
    shards = {
        "a": shard(tmp_path / "a.tar", "5", "5", "cat", "cat", "cat", "9", bad=[5]),
        "b": shard(tmp_path / "b.tar", "3", "3", "ant", "3", "zebra", bad=[4]),
        "c": shard(tmp_path / "c.tar", "bee", "1", "bee", "bee"),
        "d": shard(tmp_path / "d.tar", "2", "9999999", "2", "2", "2000000", "bee"),
    }
    for count in range(1, 5):
        now = sorted(shards[name] for name in order[:count])
        assert build(tmp_path / "i", *now)[0] == 0
        assert build(tmp_path / f"fresh{count}", *now)[0] == 0
        assert everything(tmp_path / "i") == everything(tmp_path / f"fresh{count}")


def test_labels_of_samples_that_are_left_out_make_no_classes(tmp_path, build):
    a = shard(tmp_path / "a.tar", "0", "1", "700", bad=[2])
    assert build(tmp_path / "i", a)[0] == 0 and Index.load(tmp_path / "i").classes == ["0", "1"]
    first = everything(tmp_path / "i")
    assert unchanged(build(tmp_path / "i", a)[1]) == 1 and everything(tmp_path / "i") == first


def test_what_a_check_found_stays_found_when_a_shard_is_read_again_for_its_labels(tmp_path, build):
    a = shard(tmp_path / "a.tar", "5", "5", "cat", "cat", "cat", undecodable=[1])
    b = shard(tmp_path / "b.tar", *["3"] * 30)
    assert build(tmp_path / "i", a, "--check")[0] == 0
    assert quarantined(tmp_path / "i") == {("a", "k0"): "bad label", ("a", "k1"): "truncated image"}
    assert findings(build(tmp_path / "i", a, b)[1]) == {
        ("a", "k1"): "truncated image", **{("a", f"k{n}"): "bad label" for n in (2, 3, 4)}
    }  # fmt: skip


def test_digits_of_other_scripts_are_letters_of_a_name(tmp_path, capsys):
    """Arabic three, superscript two: Python calls both digits."""
    for name, labels in (("a", ["ant", "bee", "cat", "dog", "elk", "\u0663"]), ("b", ["ant", "bee", "\u00b2"])):
        files = []
        for number, label in enumerate(labels):
            files += [(f"{number}.jpg", encoded(number)), (f"{number}.txt", label.encode())]
        write_tar(tmp_path / f"{name}.tar", files)
        code, _, _ = index(capsys, tmp_path / f"{name}.tar", "--label", "txt", "--out", tmp_path / name)
        found = Index.load(tmp_path / name)
        assert code == 0 and found.classes == sorted(labels)
        assert [found.classes[label] for label in found.samples["label"]] == labels
