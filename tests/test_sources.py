"""Where images come from: digits, shapes, folders and torchvision's data sets in their real file formats."""

import gzip
import hashlib
import io
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from ddpm_dist.data.encode import BadImage, Item, Recipe, encode, open_image, to_channels
from ddpm_dist.data.shapes import OUTLINES, SHAPES, render
from ddpm_dist.data.sources import open_source
from ddpm_dist.errors import UserError


def image_of(source, position):
    loaded = source.item(position).load()
    return loaded if isinstance(loaded, Image.Image) else open_image(loaded)


def save(path, mode="RGB", size=(8, 8), colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 0 if colour is None else colour).save(path, **options)
    return path


# ---- digits ---------------------------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_enlarged():
    from sklearn.datasets import load_digits

    real, source = load_digits(), open_source("digits")
    assert len(source) == 1797 and source.classes == list("0123456789") and source.channels() == 1
    for position in (0, 5, 1796):
        image = image_of(source, position)
        assert (image.size, image.mode) == ((16, 16), "L")
        assert source.item(position).label == real.target[position]
        back = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
        assert np.abs(back - real.images[position] * 255 / 16).max() < 45  # the same picture, not the same pixels
    exact = np.asarray(image_of(open_source("digits", size=8), 3))
    assert np.array_equal(exact, np.round(real.images[3] * 255 / 16))


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_shapes_are_a_pure_function_of_seed_and_index():
    first = [np.asarray(render(3, k, 32)) for k in range(12)]
    again = [np.asarray(render(3, k, 32)) for k in reversed(range(12))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], np.asarray(render(4, 0, 32)))
    assert len({image.tobytes() for image in first}) == 12
    source = open_source("shapes", num=12, seed=3, size=32)
    assert [source.item(k).label for k in range(12)] == [*range(10), 0, 1]
    assert all(np.array_equal(np.asarray(image_of(source, k)), first[k]) for k in range(12))


@pytest.mark.parametrize("size", [8, 16, 64, 100, 256])
def test_shapes_have_any_size_and_look_the_same_at_each(size):
    for index in range(10):
        image = render(0, index, size)
        assert (image.size, image.mode) == ((size, size), "RGB")
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
        reference = np.asarray(render(0, index, 512).resize((8, 8), Image.Resampling.BOX)).astype(float)
        assert np.abs(small - reference).mean() < (16 if size < 16 else 8)


def test_shape_classes_can_be_told_apart_by_their_outlines_alone():
    """No two of the ten outlines share both their area and their roundness (4 pi area / length^2)."""
    numbers = []
    for name in SHAPES:
        points = np.array(OUTLINES[name])
        x, y = points.T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        length = np.linalg.norm(points - np.roll(points, -1, axis=0), axis=1).sum()
        assert np.linalg.norm(points, axis=1).max() < 1.2, name  # stays inside the picture wherever it is placed
        numbers.append((area, 4 * np.pi * area / length**2, name))
    for i, (area, roundness, name) in enumerate(numbers):
        for other_area, other, other_name in numbers[:i]:
            if {name, other_name} != {"circle", "ring"}:  # those differ by the hole
                assert max(abs(roundness - other), abs(area - other_area)) > 0.05, (name, other_name)


def test_shapes_stand_out_from_their_background_and_vary():
    means = []
    for index in range(200):
        pixels = np.asarray(render(0, index, 32)).astype(float)
        assert pixels.std(axis=(0, 1)).max() > 8, index
        means.append(pixels.mean(axis=(0, 1)))
    assert np.std(means, axis=0).min() > 25


def test_a_small_network_learns_the_shapes():
    """The labels say what the pictures show: a classifier beats chance (10 %) by far on images it has not seen."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    x = torch.tensor(np.stack([np.asarray(render(0, k, 24).convert("L")) for k in range(2400)]))[:, None] / 127.5 - 1
    y = torch.arange(2400) % 10
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for step in range(150):
        rows = torch.arange(step * 100, step * 100 + 100) % 2000
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        right = (network(x[2000:]).argmax(1) == y[2000:]).float().mean().item()
    assert right > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "--num must be at least 1"),
        ({"seed": -1}, "--seed must be in"),
        ({"seed": 1 << 64}, "--seed must be in"),
        ({"size": 4}, "--size must be at least 8"),
        ({"root": "x"}, "--root means nothing for the source shapes"),
        ({"split": "train"}, "--split means nothing"),
        ({"download": True}, "--download means nothing"),
    ],
)
def test_options_of_shapes_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        open_source("shapes", **options)


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown source 'imagenet'.*digits, shapes, cifar10.*folder"):
        open_source("imagenet")


# ---- folder ---------------------------------------------------------------------------------------------------------


def test_folder_with_classes_sorts_names_and_files(tmp_path):
    for name in ("dog/2.png", "dog/10.png", "cat/b.jpg", "cat/a.PNG", "Zebra/x.webp", "cat/.hidden.png", ".git/x.png"):
        save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    source = open_source("folder", root=tmp_path)
    assert source.classes == ["Zebra", "cat", "dog"]
    items = [source.item(k) for k in range(len(source))]
    assert [(os.path.relpath(item.name, tmp_path), item.label) for item in items] == [
        ("Zebra/x.webp", 0),
        ("cat/a.PNG", 1),
        ("cat/b.jpg", 1),
        ("dog/10.png", 2),
        ("dog/2.png", 2),
    ]
    assert source.notes == ["passed over 2 files that are no images (such as README.md)"]


def test_flat_folder_is_unlabelled(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a.jpg", "L")
    source = open_source("folder", root=tmp_path)
    assert source.classes is None
    assert [source.item(k).label for k in range(2)] == [-1, -1]
    assert source.item(0).name.endswith("a.jpg")
    assert source.channels() == 1  # as the first


def test_links_are_followed(tmp_path):
    save(tmp_path / "store" / "x.png")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "linked.png").symlink_to(tmp_path / "store" / "x.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "store")
    source = open_source("folder", root=tmp_path / "root")
    assert source.classes == ["a", "b"] and len(source) == 2
    assert image_of(source, 0).size == image_of(source, 1).size == (8, 8)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images in .*expected one folder per class"),
        (["notes.txt"], "no images in"),
        (["a.png", "cat/b.png"], r"holds images \(a\.png\) beside folders \(cat\)"),
        (["train/cat/a.png"], r"train holds a folder \(cat\).*was --root .*train meant"),
        (["cat/a.png", "dog/x.txt"], "class folder .*dog holds no images"),
    ],
)
def test_folders_that_are_no_data_set_are_refused(tmp_path, files, message):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        open_source("folder", root=tmp_path)


def test_missing_root_is_named(tmp_path):
    with pytest.raises(UserError, match="--root is missing"):
        open_source("folder")
    with pytest.raises(UserError, match="the folder .*nowhere cannot be read: No such file"):
        open_source("folder", root=tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        open_source("folder", root=tmp_path / "file")


def test_names_that_no_terminal_can_print_are_escaped(tmp_path):
    name = os.fsencode(str(tmp_path)) + b"/\xff\x1b[31m.png"
    with open(name, "wb"):
        pass
    item = open_source("folder", root=tmp_path).item(0)
    assert item.name.isprintable() and r"\udcff\x1b[31m.png" in item.name
    os.unlink(name)
    os.mkdir(os.fsencode(str(tmp_path)) + b"/cl\xff")
    with pytest.raises(UserError, match="unprintable characters"):
        open_source("folder", root=tmp_path)


# ---- from a source image to stored bytes ----------------------------------------------------------------------------


def stored(data, **recipe):
    result = encode(0, Item("x", -1, lambda: data), Recipe(**{"image_format": "png", "channels": 3, **recipe}))
    assert result.data is not None, result.reason
    return result, Image.open(io.BytesIO(result.data))


def file_bytes(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size=(20, 20), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def test_files_that_are_right_already_are_stored_byte_for_byte():
    jpeg, png = file_bytes(noise(), "JPEG", quality=80), file_bytes(noise(), "PNG")
    assert stored(jpeg, image_format="jpg")[0].data == jpeg
    assert stored(png)[0].data == png
    assert stored(jpeg, image_format="jpg", quality=95)[0].data != jpeg  # asked for explicitly
    assert stored(jpeg, image_format="jpg", size=20)[0].data != jpeg
    result, image = stored(jpeg, image_format="jpg", channels=1)
    assert result.recoloured and image.mode == "L"


def test_rotated_photographs_are_stored_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    data = file_bytes(noise((20, 10)), "JPEG", exif=exif)
    result, image = stored(data, image_format="jpg")
    assert image.size == (10, 20) and not image.getexif()


def test_resizing_scales_the_shorter_side_and_cuts_the_centre():
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    for size in (10, 20, 40):
        _, image = stored(wide, size=size)
        assert image.size == (size, size)
        assert np.array_equal(np.asarray(image)[size // 2, size // 2], [0, 0, 255])
        assert (np.asarray(image)[..., 2] > 100).all()
    assert stored(wide)[1].size == (60, 20)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(stored(file_bytes(clear, "PNG"))[1]).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert np.asarray(stored(file_bytes(palette, "PNG", transparency=0))[1]).min() == 255
    assert np.asarray(stored(file_bytes(palette, "PNG"))[1])[0, 0].tolist() == [10, 20, 30]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    _, image = stored(file_bytes(deep, "PNG"), channels=1)
    assert np.array_equal(np.asarray(image).ravel(), np.arange(256))
    with pytest.raises(BadImage, match="32 bit"):
        to_channels(Image.fromarray(np.full((2, 2), 1 << 20, np.int32)), 1)
    with pytest.raises(BadImage, match="floating point"):
        to_channels(Image.fromarray(np.zeros((2, 2), np.float32)), 1)


def test_stored_jpeg_keeps_full_colour_resolution_and_no_metadata():
    source = noise()
    source.info["comment"] = b"secret"
    _, image = stored(source, image_format="jpg")
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    assert "comment" not in image.info and "exif" not in image.info
    small, large = (len(stored(noise(), image_format="jpg", quality=q)[0].data) for q in (50, 100))
    assert small < large


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image in a known format"),
        (file_bytes(noise(), "JPEG")[:-200], "truncated"),
        (file_bytes(noise(), "PNG")[:-200], "truncated|broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image in a known format"),
    ],
)
def test_images_that_cannot_be_read_give_a_reason(data, reason):
    result = encode(3, Item("pic", 1, lambda: data), Recipe("jpg", 3))
    assert result.data is None and (result.position, result.name) == (3, "pic")
    with pytest.raises(BadImage, match=reason):
        open_image(data)


def test_pixel_bombs_are_refused():
    header = bytearray(file_bytes(Image.new("L", (8, 8)), "PNG"))
    header[16:24] = struct.pack(">II", 60_000, 60_000)
    import zlib

    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    with pytest.raises(BadImage, match="exceeds limit"):
        open_image(bytes(header))


# ---- torchvision ----------------------------------------------------------------------------------------------------


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
