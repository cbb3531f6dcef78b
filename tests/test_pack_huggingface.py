"""Hugging Face image data sets on disk: folders with splits, metadata files, parquet."""

import csv
import json
import sys

import pytest
from source_images import image_of, save

from ddpm_dist.data.shards import Index
from ddpm_dist.data.sources import open_source
from ddpm_dist.errors import UserError
from ddpm_dist.pack import main


def opened(root, **options):
    return open_source("huggingface", root=root, **options)


def labels_of(source):
    return [source.item(k).label for k in range(len(source))]


def write_rows(folder, rows, kind="jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    for k, row in enumerate(rows):
        save(folder / row["file_name"], colour=(k, 5, 5))
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def test_split_folders_with_classes(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "test/cat/c.png"):
        save(tmp_path / name)
    assert opened(tmp_path).classes == ["cat", "dog"] and len(opened(tmp_path)) == 2
    save(tmp_path / "test" / "dog" / "z.png")
    save(tmp_path / "valid" / "dog" / "z.png")
    test, valid = opened(tmp_path, split="test"), opened(tmp_path, split="valid")
    assert (len(test), labels_of(valid), valid.classes) == (2, [1], ["cat", "dog"]), (
        "numbered among the classes of all splits"
    )
    with pytest.raises(UserError, match="no split 'other'"):
        opened(tmp_path, split="other")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_names_and_numbers(tmp_path, kind):
    """Class numbers are the same in all splits, though test has one class only."""
    write_rows(
        tmp_path / "train", [{"file_name": "b.png", "label": "dog"}, {"file_name": "sub/a.png", "label": "ant"}], kind
    )
    write_rows(tmp_path / "test", [{"file_name": "x.png", "label": "dog"}], kind)
    train, test = opened(tmp_path), opened(tmp_path, split="test")
    assert train.classes == test.classes == ["ant", "dog"]
    assert (labels_of(train), labels_of(test)) == ([1, 0], [1])
    assert image_of(train, 0).getpixel((0, 0)) == (0, 5, 5)
    write_rows(
        tmp_path / "n",
        [{"file_name": "a.png", "kind": 2, "text": "x"}, {"file_name": "b.png", "kind": 0, "text": "y"}],
        kind,
    )
    numbers = opened(tmp_path / "n", label_key="kind")
    assert (numbers.classes, labels_of(numbers)) == (["0", "1", "2"], [2, 0])
    assert opened(tmp_path / "n").classes is None, "no column of labels: unlabelled"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "../a.png", "label": 1}', "row 1 leads outside"),
        ('{"file_name": "/etc/passwd", "label": 1}', "row 1 leads outside"),
        ('{"label": 1}', "row 1 has no file_name"),
        ("[1]", "row 1 has no file_name"),
        ("{", "is damaged"),
        ("", "names no images"),
        ('{"file_name": "a.png", "label": 1}\n{"file_name": "a.png", "label": 1}', "a.png twice"),
        ('{"file_name": "a.png", "label": 1}\n{"file_name": "b.png"}', "a label is None.*label all images or none"),
        ('{"file_name": "a.png", "label": -3}', "labels must be in 0"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, text, message):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def write_parquet(path, images, labels, names=None, group=2):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": [{"bytes": data, "path": None} for data in images], "label": labels})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path, row_group_size=group)


def test_parquet_is_packed_and_keeps_the_bytes(tmp_path):
    images = [save(tmp_path / f"{k}.jpg", colour=(k * 20, 9, 9)).read_bytes() for k in range(7)]
    names = ["ant", "bee", "cow"]
    root = tmp_path / "set"
    write_parquet(root / "data" / "train-00000-of-00002.parquet", images[:5], [0, 1, 0, 1, 0], names)
    write_parquet(root / "data" / "train-00001-of-00002.parquet", images[5:6], [1], names)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", images[6:], [1], names)
    words = ["huggingface", "--root", str(root), "--workers", "1"]
    assert main([*words, "--out", str(tmp_path / "train")]) == 0
    assert main([*words, "--out", str(tmp_path / "test"), "--split", "test"]) == 0
    train, test = Index.load(tmp_path / "train"), Index.load(tmp_path / "test")
    assert [train.read(k) for k in range(len(train))] == images[:6] and test.read(0) == images[6]
    assert train.samples["label"].tolist() == [0, 1, 0, 1, 0, 1]
    assert train.classes == test.classes == names


def test_parquet_labels_that_are_names_are_numbered_among_all_splits(tmp_path):
    data = save(tmp_path / "a.jpg").read_bytes()
    write_parquet(tmp_path / "set" / "train.parquet", [data, data], ["dog", "cat"])
    write_parquet(tmp_path / "set" / "test.parquet", [data], ["dog"])
    test = opened(tmp_path / "set", split="test")
    assert (test.classes, labels_of(test)) == (["cat", "dog"], [1])


def test_parquet_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    write_parquet(path, [b"no image", None], [0, 1])
    with pytest.raises(UserError, match=r"none of the 2 images .*train.parquet:0:0 \(not an image"):
        opened(tmp_path).channels()
    with pytest.raises(UserError, match="has no column kind, only image, label"):
        opened(tmp_path, label_key="kind")
    with pytest.raises(UserError, match="no parquet file of the split 'test'"):
        opened(tmp_path, split="test")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="train.parquet cannot be read"):
        opened(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        opened(tmp_path)
