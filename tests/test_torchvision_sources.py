"""torchvision's data sets in their real file formats: MNIST, CIFAR-10 and CelebA, whole, damaged and missing."""

import gzip
import hashlib
import io
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from source_images import image_of, save

from ddpm_dist.data.encode import Recipe, encode
from ddpm_dist.data.sources import open_source
from ddpm_dist.errors import UserError


def idx(array):
    """An array as an MNIST file: two zeros, type 8 (uint8), number of dimensions, the dimensions, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_mnist(root, kind="MNIST", count=30, labels=None):
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (count, 28, 28), np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10 if labels is None else labels
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    for part, cut in (("train", slice(None)), ("t10k", slice(7))):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images[cut]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[cut]))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b""))
    return images, labels


@pytest.mark.parametrize(
    ("name", "kind", "first"), [("mnist", "MNIST", "0"), ("fashion-mnist", "FashionMNIST", "T-shirt/top")]
)
def test_mnist_files_are_read(tmp_path, name, kind, first):
    images, labels = make_mnist(tmp_path, kind)
    source = open_source(name, root=tmp_path)
    assert len(source) == 30 and source.channels() == 1
    assert source.classes[0] == first and len(source.classes) == 10
    for position in (0, 29):
        assert np.array_equal(np.asarray(image_of(source, position)), images[position])
        assert source.item(position).label == labels[position]
    assert len(open_source(name, root=tmp_path, split="test")) == 7


def test_mnist_labels_outside_the_classes_are_named(tmp_path):
    make_mnist(tmp_path, labels=np.array([0, 1, 11] * 10, np.uint8))
    with pytest.raises(UserError, match=r"mnist\[2\] .* has label 11, outside 0\.\.9"):
        open_source("mnist", root=tmp_path)


def make_cifar(root, monkeypatch, per_batch=4):
    """CIFAR-10's python batches; torchvision knows the real files by their MD5, so ours go into its table."""
    from torchvision.datasets import CIFAR10

    random, images, labels = np.random.default_rng(2), [], []
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    train = []
    for k in range(1, 6):
        batch = random.integers(0, 256, (per_batch, 3, 32, 32), np.uint8)
        classes = random.integers(0, 10, per_batch).tolist()
        images.append(batch)
        labels += classes
        name = f"data_batch_{k}"
        train.append([name, write(name, {"data": batch.reshape(per_batch, -1), "labels": classes})])
    test = [
        ["test_batch", write("test_batch", {"data": images[0].reshape(per_batch, -1), "labels": labels[:per_batch]})]
    ]
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    meta = {**CIFAR10.meta, "md5": write("batches.meta", {"label_names": names})}
    for attribute, value in (("train_list", train), ("test_list", test), ("meta", meta)):
        monkeypatch.setattr(CIFAR10, attribute, value)
    return np.concatenate(images).transpose(0, 2, 3, 1), labels


def test_cifar_batches_are_read(tmp_path, monkeypatch):
    images, labels = make_cifar(tmp_path, monkeypatch)
    source = open_source("cifar10", root=tmp_path)
    assert len(source) == 20 and source.channels() == 3 and source.classes[6] == "frog"
    for position in (0, 19):
        assert np.array_equal(np.asarray(image_of(source, position)), images[position])
        assert source.item(position).label == labels[position]
    assert len(open_source("cifar10", root=tmp_path, split="test")) == 4


def test_damaged_cifar_is_refused_before_anything_is_unpickled(tmp_path, monkeypatch):
    make_cifar(tmp_path, monkeypatch)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes() + b"x")
    with pytest.raises(UserError, match="no usable cifar10 below .*--download .*corrupted"):
        open_source("cifar10", root=tmp_path)


def make_celeba(root, monkeypatch, count=6):
    from torchvision.datasets import CelebA

    base = root / "celeba"
    names = [f"{k + 1:06d}.jpg" for k in range(count)]
    for k, name in enumerate(names):
        save(base / "img_align_celeba" / name, size=(178, 218), colour=(k * 30, 100, 200))
    tables = {
        "list_eval_partition.txt": [f"{name} {k % 3}" for k, name in enumerate(names)],
        "identity_CelebA.txt": [f"{name} {k}" for k, name in enumerate(names)],
        "list_bbox_celeba.txt": [str(count), "image_id x_1 y_1 width height", *(f"{name} 1 2 3 4" for name in names)],
        "list_landmarks_align_celeba.txt": [str(count), "lefteye_x lefteye_y", *(f"{name} 5 6" for name in names)],
        "list_attr_celeba.txt": [str(count), "Bald Smiling", *(f"{name} -1 1" for name in names)],
    }
    sums = {}
    for name, lines in tables.items():
        (base / name).write_text("\n".join(lines) + "\n")
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    listed = [(key, sums.get(name, md5), name) for key, md5, name in CelebA.file_list]
    monkeypatch.setattr(CelebA, "file_list", listed)
    return names


def test_celeba_is_read_unlabelled_and_by_split(tmp_path, monkeypatch):
    names = make_celeba(tmp_path, monkeypatch)
    source = open_source("celeba", root=tmp_path, split="all")
    assert [os.path.basename(source.item(k).name) for k in range(len(source))] == names
    assert source.classes is None and source.channels() == 3 and source.item(0).label == -1
    train = open_source("celeba", root=tmp_path)
    assert [os.path.basename(train.item(k).name) for k in range(len(train))] == [names[0], names[3]]
    assert image_of(train, 1).size == (178, 218)
    result = encode(0, train.item(1), Recipe("jpg", 3, size=64))
    assert Image.open(io.BytesIO(result.data)).size == (64, 64)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion-mnist", "celeba"])
def test_missing_data_sets_name_the_root_and_the_download_option(tmp_path, name):
    with pytest.raises(
        UserError, match=f"no usable {name} below {tmp_path}.*--download.*torchvision: Dataset not found"
    ):
        open_source(name, root=tmp_path)
    with pytest.raises(UserError, match=f"{name} has no split 'dev': choose one of train, .*test"):
        open_source(name, root=tmp_path, split="dev")
    assert list(tmp_path.iterdir()) == []


def test_truncated_mnist_is_a_clear_error(tmp_path):
    make_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="no usable mnist below"):
        open_source("mnist", root=tmp_path)
