"""Where images come from: digits, shapes and folders. (torchvision's data sets: test_torchvision_sources.py)"""

import os

import numpy as np
import pytest
from PIL import Image
from source_images import image_of, save

from ddpm_dist.data.shapes import OUTLINES, SHAPES, render
from ddpm_dist.data.sources import open_source
from ddpm_dist.errors import UserError

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
    with pytest.raises(UserError, match="file is neither a folder nor a zip or tar archive"):
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
