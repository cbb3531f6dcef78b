"""Bad data is found before training, each piece named shard:key:reason, and left out on request (promise 16)."""

import io
import tarfile

import numpy as np
import pytest
from foreign_shards import encoded, findings, flipped, index, jpeg_claiming, png_bomb, quarantined, samples, write_tar
from PIL import Image

from ddpm_dist.data.shards import Index

JPG, PNG = encoded(1), encoded(1, "png")

# The files of a shard, and what is found in it: {key: reason}. Only decoding finds the last ones.
STRUCTURE = {
    "garbage": (samples(1, 2, s2_jpg=b"garbage" * 99), {"s2": "not an image"}),
    "empty-jpeg": (samples(1, 2, s2_jpg=b""), {"s2": "empty image"}),
    "stub": (samples(1, 2, s2_jpg=JPG[:40]), {"s2": "truncated image"}),
    "missing-label": (samples(1, 2, s2_cls=None), {"s2": "missing label"}),
    "out-of-range": (samples(1, 2, s2_cls=b"4"), {"s2": "label out of range"}),
    "negative": (samples(1, 2, s2_cls=b"-1"), {"s2": "bad label"}),
    "word": (samples(1, 2, s2_cls=b"cat"), {"s2": "bad label"}),
    "empty-label": (samples(1, 2, s2_cls=b""), {"s2": "bad label"}),
    "binary-label": (samples(1, 2, s2_cls=b"\xff\xfe"), {"s2": "bad label"}),
    "long-label": (samples(1, 2, s2_cls=b"1" * 9999), {"s2": "bad label"}),
    "no-image": (samples(1, 2, s2_jpg=None), {"s2": "no image"}),
    "duplicate": (samples(1, 2) + samples(1), {"s1": "duplicate key"}),
    "twice-in-one": (samples(1, 2) + samples(2), {"s2": "duplicate key"}),
    "interleaved": ([(f"{k}.{e}", d) for e, d in (("jpg", JPG), ("cls", b"1")) for k in "ab"] + samples(1),
                    {"a": "interleaved keys", "b": "interleaved keys"}),
    "labels-first": ([("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", JPG), ("b.jpg", JPG)] + samples(1),
                     {"a": "interleaved keys", "b": "interleaved keys"}),
    "absurd-png": (samples(1, 2, s2_jpg=None, s2_png=png_bomb(60_000, 60_000)), {"s2": "absurd image size"}),
    "absurd-jpeg": (samples(1, 2, s2_jpg=jpeg_claiming(65_000, 65_000)), {"s2": "absurd image size"}),
    "no-pixels": (samples(1, 2, s2_jpg=jpeg_claiming(0, 16)), {"s2": "absurd image size"}),
    "too-wide": (samples(1, 2, s2_jpg=None, s2_png=png_bomb(70_000, 1)), {"s2": "absurd image size"}),
    "rgba": (samples(1, 2, s2_jpg=None, s2_png=encoded(1, "png", mode="RGBA")), {"s2": "unsupported image"}),
    "cmyk": (samples(1, 2, s2_jpg=encoded(1, mode="CMYK")), {"s2": "unsupported image"}),
}  # fmt: skip
PIXELS = {
    "truncated-jpeg": (samples(1, 2, s2_jpg=JPG[: len(JPG) // 2]), {"s2": "truncated image"}),
    "truncated-png": (samples(1, 2, s2_jpg=None, s2_png=PNG[:-20]), {"s2": "truncated image"}),
    "flipped-png": (samples(1, 2, s2_jpg=None, s2_png=flipped(PNG, len(PNG) // 2)), {"s2": "damaged image"}),
    "checksum-of-png": (samples(1, 2, s2_jpg=None, s2_png=flipped(PNG, len(PNG) - 14)), {"s2": "damaged image"}),
    "truncated-webp": (samples(1, 2, s2_jpg=None, s2_webp=encoded(1, "webp")[:-30]), {"s2": "truncated image"}),
    "garbage-in-jpeg": (samples(1, 2, s2_jpg=JPG[: JPG.index(b"\xff\xda") + 4] + b"\xff\xd9"), {"s2": "truncated image"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    folder.mkdir()
    expected = {}
    for name, (files, found) in {**STRUCTURE, **PIXELS}.items():
        write_tar(folder / f"{name}.tar", files)
        expected |= {(name, key): reason for key, reason in found.items()}
    write_tar(folder / "good.tar", samples(*range(4)))
    whole = (folder / "good.tar").read_bytes()
    (folder / "zero.tar").write_bytes(b"")
    (folder / "cut.tar").write_bytes(whole[: whole.index(b"s2.jpg") + 600])
    (folder / "header.tar").write_bytes(flipped(whole, whole.index(b"s2.jpg") + 3))
    (folder / "joined.tar").write_bytes(whole + whole)
    write_tar(folder / "nothing.tar", [])
    write_tar(folder / "readme.tar", [("README", b"no sample")])
    with tarfile.open(folder / "packed.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO(b""))
    reasons = {"zero": "zero-byte tar", "cut": "truncated tar", "header": "damaged tar", "joined": "damaged tar",
               "nothing": "empty shard", "readme": "empty shard", "packed": "compressed tar"}  # fmt: skip
    return folder, expected | {(name, ""): reason for name, reason in reasons.items()}


def test_everything_in_the_corpus_is_found_and_nothing_else(corpus, tmp_path, capsys):
    folder, expected = corpus
    code, lines, _ = index(capsys, folder, "--check", "--num-classes", 4, "--out", tmp_path / "index")
    wrong = {
        where: (reason, expected.get(where))
        for where, reason in findings(lines).items()
        if reason != expected.get(where)
    }
    assert not wrong and findings(lines) == expected
    assert code == 1 and not (tmp_path / "index").exists()
    assert any(line.split() == ["6", "bad", "label"] or line.split()[1:] == ["bad", "label"] for line in lines)
    assert f"{len(expected)} findings:" in lines


def test_without_check_all_that_needs_no_decoding_is_found(corpus, tmp_path, capsys):
    folder, expected = corpus
    code, lines, _ = index(capsys, folder, "--num-classes", 4, "--out", tmp_path / "index")
    assert code == 1 and not (tmp_path / "index").exists()
    assert findings(lines) == {where: reason for where, reason in expected.items() if where[0] not in PIXELS}


def test_quarantine_leaves_out_exactly_what_was_found(corpus, tmp_path, capsys):
    folder, expected = corpus
    out = tmp_path / "index"
    code, lines, _ = index(capsys, folder, "--check", "--quarantine", "--num-classes", 4, "--out", out)
    assert code == 0 and quarantined(out) == expected == findings(lines)
    found = Index.load(out)
    found.check_files()
    found.verify()
    kept = {}
    for n in range(len(found)):
        shard = found.shards[int(found.shard_of(np.asarray(n)))].name
        kept.setdefault(shard.removesuffix(".tar"), []).append(found.key_of(n))
        Image.open(io.BytesIO(found.read(n))).load()
    assert kept.pop("good") == ["s0", "s1", "s2", "s3"]
    # Of a shard that breaks off the last key is in doubt: more files of it may have followed.
    assert kept.pop("cut") == ["s0", "s1"] and kept.pop("header") == ["s0"]
    assert kept.pop("joined") == ["s0", "s1", "s2"]
    assert kept.pop("duplicate") == ["s2"] and kept.pop("interleaved") == kept.pop("labels-first") == ["s1"]
    assert all(keys == ["s1"] for keys in kept.values())
    assert set(kept) == {*STRUCTURE, *PIXELS} - {"duplicate", "interleaved", "labels-first"}


def test_a_clean_set_is_clean(tmp_path, capsys):
    write_tar(tmp_path / "good.tar", samples(*range(4)))
    code, lines, _ = index(capsys, tmp_path / "good.tar", "--check")
    assert code == 0 and not findings(lines) and "4 samples in 1 shards" in "\n".join(lines)


def test_names_among_numbers_and_numbers_among_names_are_found(tmp_path, capsys):
    """What most labels are is what they should be."""
    for name, odd in (("numbers", b"cat"), ("names", b"17")):
        usual = (b"1", b"2", b"3") if name == "numbers" else (b"ant", b"bee", b"cow")
        files = [(f"k{n}.{e}", d) for n, text in enumerate([*usual, odd]) for e, d in (("jpg", JPG), ("txt", text))]
        write_tar(tmp_path / f"{name}.tar", files)
        code, lines, _ = index(capsys, tmp_path / f"{name}.tar", "--out", tmp_path / name)
        assert code == 1 and findings(lines) == {(name, "k3"): "bad label"}
        assert index(capsys, tmp_path / f"{name}.tar", "--out", tmp_path / name, "--quarantine")[0] == 0
        assert Index.load(tmp_path / name).classes == (
            ["0", "1", "2", "3"] if name == "numbers" else ["ant", "bee", "cow"]
        )


def test_one_damaged_label_does_not_make_a_billion_classes(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", samples(0, 1, 2, s2_cls=b"2000000000"))
    code, lines, _ = index(capsys, tmp_path / "a.tar", "--out", tmp_path / "i")
    assert code == 1 and findings(lines) == {("a", "s2"): "label out of range"}


def test_one_stray_label_that_makes_many_classes_is_pointed_at(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", samples(*range(8)))
    write_tar(tmp_path / "b.tar", samples(0, 1, 2, s1_cls=b"1048575"))
    hint = lambda *words: [line for line in index(capsys, tmp_path, *words)[1] if "the largest label" in line]  # noqa: E731
    assert hint("--check") == [
        f"  the largest label is 1,048,575 (in {tmp_path}/b.tar), but only 5 classes have samples: if it is wrong, "
        "--num-classes 4 makes it a finding"
    ]
    assert hint("--check", "--num-classes", 4) == []
    assert findings(index(capsys, tmp_path, "--check", "--num-classes", 4)[1]) == {("b", "s1"): "label out of range"}
    for stray in (b"9", b"38"):  # few classes without samples are nothing strange
        write_tar(tmp_path / "b.tar", samples(0, 1, 2, s1_cls=stray))
        assert hint("--check") == []
    (tmp_path / "names").write_text("\n".join(f"class {n}" for n in range(1000)))
    write_tar(tmp_path / "b.tar", samples(0, 1, 2, s1_cls=b"999"))
    assert len(hint("--check")) == 1 and hint("--check", "--classes", tmp_path / "names") == []
    for k in range(10, 999, 97):  # numbers that are spread evenly
        write_tar(tmp_path / f"c{k}.tar", samples(1, s1_cls=b"%d" % k))
    assert hint("--check") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b'{"a": {"c": 1}}', "missing label"), (b'{"a": 3}', "missing label"), (b"{", "bad label"), (b'{"a": {"b": true}}', "bad label"),
     (b'{"a": {"b": 1.5}}', "bad label"), (b'{"a": {"b": null}}', "bad label"), (b'{"a": {"b": -1}}', "bad label"),
     (b'{"a": {"b": ""}}', "bad label"), (b"[" * 100_000, "bad label"), (b'{"a": {"b": ' + b"1" * 5000 + b"}}", "bad label"),
     (b"\xff\xff", "bad label"), (b'{"a": {"b": "x\\u0000"}}', "bad label"), (None, "missing label")],
)  # fmt: skip
def test_bad_json_labels_are_found(tmp_path, capsys, content, reason):
    good = [("a.jpg", JPG), ("a.json", b'{"a": {"b": 2}}')]
    write_tar(tmp_path / "a.tar", good + [("b.jpg", JPG)] + ([("b.json", content)] if content is not None else []))
    code, lines, _ = index(capsys, tmp_path / "a.tar", "--out", tmp_path / "i", "--label-key", "a.b")
    assert code == 1 and findings(lines) == {("a", "b"): reason}


def test_flipped_bits_in_jpegs_are_found_by_what_libjpeg_warns_of(tmp_path, capsys):
    pytest.importorskip("simplejpeg")
    random, whole = np.random.default_rng(0), encoded(3, size=(96, 96))
    start = whole.index(b"\xff\xda") + 20
    files = []
    for n in range(60):
        files += [(f"k{n}.jpg", flipped(whole, int(random.integers(start, len(whole) - 2)))), (f"k{n}.cls", b"0")]
    write_tar(tmp_path / "a.tar", files)
    code, lines, _ = index(capsys, tmp_path / "a.tar", "--check")
    assert code == 1 and len(findings(lines)) > 5  # Pillow alone sees one in fifty
    write_tar(tmp_path / "b.tar", samples(1, 2, s2_jpg=whole[: len(whole) // 2] + b"\xff\xd9"))
    assert findings(index(capsys, tmp_path / "b.tar", "--check")[1]) == {("b", "s2"): "truncated image"}


def test_an_index_finds_every_flipped_bit(tmp_path, capsys):
    """--check of an index folder: bytes are compared, so nothing depends on what decoders notice."""
    write_tar(tmp_path / "a.tar", samples(*range(6)))
    write_tar(tmp_path / "b.tar", samples(*range(6)))
    assert index(capsys, tmp_path / "a.tar", tmp_path / "b.tar", "--out", tmp_path / "i")[0] == 0
    assert index(capsys, "--check", tmp_path / "i")[0] == 0
    whole, places = (tmp_path / "a.tar").read_bytes(), {}
    for position in range(0, len(whole), 97):
        (tmp_path / "a.tar").write_bytes(flipped(whole, position))
        code, lines, _ = index(capsys, "--check", tmp_path / "i")
        assert code == 1 and {shard for shard, _ in findings(lines)} == {"a"}
        for where, reason in findings(lines).items():
            places.setdefault(reason, set()).add(where)
    assert {key for _, key in places["changed image"]} == {f"s{n}" for n in range(6)}
    (tmp_path / "a.tar").write_bytes(whole[:-512])
    assert findings(index(capsys, "--check", tmp_path / "i")[1]) == {("a", ""): "stale index"}
    (tmp_path / "a.tar").unlink()
    assert findings(index(capsys, "--check", tmp_path / "i")[1]) == {("a", ""): "unreadable shard"}
    write_tar(tmp_path / "a.tar", samples(3, 2, 1))
    code, lines, _ = index(capsys, "--check", tmp_path / "i")
    assert code == 1 and findings(lines)["a", ""] == "stale index"
