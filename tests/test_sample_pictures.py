"""Pictures of sampling, read back: generated above real images, frames of the GIF, the steps, the forward process."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from conftest import run_module
from PIL import Image
from sampling import run_sample, weights_file

from ddpm_dist.data.shards import Index
from ddpm_dist.diffusion import Schedule, sample, to_uint8
from ddpm_dist.models.weights import load_described
from ddpm_dist.sample_frames import gif_frames, gif_images, step_images, step_rows
from ddpm_dist.sample_output import class_columns

SIZE, LARGE, GAP = 16, 4, 66  # pixels of an image, how much it is enlarged, from image to image


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of the size of the packed digits, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    return weights_file(path, {"timesteps": 8, "beta_end": 0.4}, num_classes=10, image_size=SIZE)


def image_at(picture: Image.Image, left: int, top: int, large: int = LARGE) -> np.ndarray:
    """An image of a grey picture, brought back to its own size; every enlarged pixel must be of one colour."""
    pixels = np.asarray(picture.convert("L"))[top : top + SIZE * large, left : left + SIZE * large]
    small = pixels[::large, ::large]
    assert np.array_equal(pixels, small.repeat(large, 0).repeat(large, 1)), "no image stands here"
    return small


def tops(rows: int, groups: int, first: int) -> list[int]:
    """Upper edges of the rows of groups below each other; ``first``: pixels of words above the first."""
    found, top = [], 0
    for group in range(groups):
        top += first if group == 0 else 21
        found += [top + 2 + row * GAP for row in range(rows)]
        top += rows * GAP + 2 + 8
    return found


def decoded(shards, label, count):
    """The first images of a class, decoded with PIL."""
    import io

    index = Index.load(shards)
    ids = np.flatnonzero(index.samples["label"] == label)[:count]
    return [np.asarray(Image.open(io.BytesIO(index.read(int(i)))).convert("L")) for i in ids]


def test_generated_rows_stand_above_real_rows_of_the_same_class(weights, digit_shards, tmp_path):
    words = (weights, "-n", "20", "--classes", "3,0,7,5,6", "--guidance-weight", "0,0.5,2")
    result = run_sample(
        *words, "--with-real", "--shards", digit_shards, "--out", tmp_path / "x.png", "--out", tmp_path / "x.npz"
    )
    assert result.returncode == 0, result.stderr
    assert "60 images from" in result.stdout
    with np.load(tmp_path / "x.npz") as arrays:
        images = arrays["images"].reshape(3, 20, SIZE, SIZE)
        assert sorted(set(arrays["guidance"].tolist())) == [1.0, 1.5, 3.0]
    picture = Image.open(tmp_path / "x.png")
    assert picture.size == (5 * GAP + 2, 4 * (4 * GAP + 2) + 42 + 3 * 21 + 3 * 8)
    edges = tops(rows=4, groups=4, first=42)
    for group in range(3):
        for row in range(4):
            for column in range(5):
                found = image_at(picture, 2 + column * GAP, edges[4 * group + row])
                assert np.array_equal(found, images[group, 5 * row + column]), (group, row, column)
    for column, label in enumerate((3, 0, 7, 5, 6)):
        for row, real in enumerate(decoded(digit_shards, label, 4)):
            found = image_at(picture, 2 + column * GAP, edges[12 + row]).astype(int)
            assert np.abs(found - real).max() <= 2, "DALI and PIL differ by rounding only"  # JPEG
    words_above = np.asarray(picture)[:42]
    assert (words_above[:21] < 100).any() and (words_above[21:] < 100).sum() > 50, "heading and names of classes"


def test_several_ranks_make_the_same_pictures(weights, digit_shards, tmp_path):
    names = ("x.png", "x.gif", "steps.png", "forward.png")
    for folder, ranks in (("one", 0), ("two", 2)):
        (tmp_path / folder).mkdir()
        out = [tmp_path / folder / name for name in names]
        words = (weights, "-n", "20", "--guidance", "1,3", "--with-real", "--shards", digit_shards, "--out", out[0],
                 "--gif", out[1], "--steps-picture", out[2], "--forward-process", out[3], "--batch", "3")  # fmt: skip
        result = run_module("ddpm_dist.sample", "--", *words, ranks=ranks) if ranks else run_sample(*words)
        assert result.returncode == 0, result.stderr
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_unlabelled_networks_get_real_images_from_all_over_the_set(digit_shards, tmp_path):
    path = weights_file(tmp_path / "w.safetensors", num_classes=None, image_size=SIZE)
    pictures = []
    for _ in range(2):
        result = run_sample(path, "-n", "9", "--with-real", "--shards", digit_shards, "--out", tmp_path / "x.png")
        assert result.returncode == 0, result.stderr
        pictures.append(Image.open(tmp_path / "x.png").copy())
    assert np.array_equal(*map(np.asarray, pictures)) and pictures[0].size == (3 * GAP + 2, 2 * (3 * GAP + 2 + 21) + 8)
    edges = tops(rows=3, groups=2, first=21)
    shown = {image_at(pictures[0], 2 + column * GAP, top).tobytes() for column in range(3) for top in edges[3:]}
    assert len(shown) == 9, "nine different ones"
    index = Index.load(digit_shards)
    whole = {image.tobytes() for label in range(10) for image in decoded(digit_shards, label, len(index))}
    assert len(shown & whole) >= 5, "they are images of the set (some may differ by rounding)"


def test_a_class_with_too_few_real_images_leaves_blanks(weights, tmp_path, digit_shards):
    from ddpm_dist.config import Data
    from ddpm_dist.errors import UserError
    from ddpm_dist.real_images import RealImages

    settings = Data(
        image_size=SIZE, channels=1, num_classes=10, shards=str(digit_shards), crop="random_resized", flip=True
    )
    real = RealImages.open(settings, None, None, "run")
    count = int((real.index.samples["label"] == 4).sum())
    ids = real.choose(np.full(count + 2, 4))
    assert (ids[-2:] == -1).all() and (np.diff(ids[:-2]) > 0).all()
    images = real.read(ids[-4:])
    assert (images[2:] == 255).all() and images[:2].min() == 0
    with pytest.raises(UserError, match="was trained on synthetic data"):
        RealImages.open(Data(source="synthetic"), None, None, "run")
    with pytest.raises(UserError, match="has the classes 0, 1, .*but run knows a, b"):
        RealImages.open(settings, None, ["a", "b"], "run")


def test_images_of_another_size_are_cut_and_resized_as_in_training(tmp_path):
    from ddpm_dist.config import Data
    from ddpm_dist.pack import pack
    from ddpm_dist.real_images import RealImages

    (tmp_path / "photos").mkdir()
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (200, 40, 90)  # the largest centred square
    Image.fromarray(wide).save(tmp_path / "photos" / "a.png")
    pack("folder", tmp_path / "shards", root=tmp_path / "photos")
    for crop, black in (("center", 0), ("random_resized", 0), ("none", 16 * 8)):
        settings = Data(image_size=16, channels=3, shards=str(tmp_path / "shards"), crop=crop)
        (image,) = RealImages.open(settings, None, None, "run").read(np.array([0]))
        assert abs(int((image.max(axis=0) < 100).sum()) - black) <= 32 * (black > 0), crop


@pytest.mark.parametrize(
    ("classes", "num", "columns", "rows", "grids"),
    [(10, 40, 10, 4, 1), (1, 64, 8, 8, 1), (2, 64, 8, 8, 1), (10, 4, 4, 1, 1), (30, 60, 20, 2, 2), (3, 200, 15, 14, 1)],
)
def test_columns_are_classes(classes, num, columns, rows, grids):
    labels = np.arange(num) % classes
    found = class_columns(labels)
    assert len(found) == grids and found[0][0].shape == (rows, columns)
    seen = []
    for places, names in found:
        for column, name in zip(places.T, np.maximum.accumulate(names), strict=True):
            own = column[column >= 0]
            assert (labels[own] == (name if name in labels[own] else labels[own][0])).all()
            seen += own.tolist()
    assert sorted(seen) == list(range(num))


# ---- while it runs ---------------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_reference():
    taken = [400 - k for k in gif_frames(400, True)]  # reference system 5 counts i = 400 .. 1
    assert taken == [i for i in range(400, 0, -1) if i % 20 == 0 or i == 400 or i < 8]
    assert gif_frames(20, True) == list(range(20)) and gif_frames(50, False) == list(range(50))
    assert len(gif_frames(1000, True)) == 57 and 25 <= len(gif_frames(120, False)) <= 35
    assert step_rows(5) == [0, 1, 2, 3, 4] and len(step_rows(1000)) == 10 and step_rows(1000)[-1] == 999
    assert (
        gif_images(500, (1, 16, 16)) == 64 and gif_images(500, (3, 64, 64)) == 48 and gif_images(7, (3, 512, 512)) == 1
    )
    assert step_images(40, (1, 28, 28)) == 8 and step_images(40, (3, 256, 256)) == 2 and step_images(3, (1, 8, 8)) == 3


@pytest.fixture(scope="module")
def steps(weights):
    """x and the prediction after every step of images 0..9, the noise they begin with, and the timesteps."""
    network, says = load_described(weights)
    seen, x0, visited = [], [], []

    def look(k, t, x, prediction):
        seen.append(to_uint8(x).numpy())
        x0.append(to_uint8(prediction).numpy())
        visited.append(t)

    schedule = Schedule.from_mapping(says.diffusion)
    sample(network, torch.arange(10), schedule=schedule, guidance=3.0, steps=5, sampler="ddim", on_step=look)
    from ddpm_dist import philox

    noise = philox.normal(0, philox.SAMPLE_NOISE, schedule.timesteps, torch.arange(10), (1, SIZE, SIZE))
    return [to_uint8(noise).numpy(), *seen], x0, visited


def test_the_gif_shows_every_step(weights, steps, tmp_path):
    result = run_sample(weights, "-n", "30", "--sampler", "ddim", "--steps", "5", "--gif", tmp_path / "x.gif")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (3 * 34 + 2, 10 * 34 + 2)
        for number in range(5):
            gif.seek(number)
            for label in range(10):  # of each class its first image
                found = image_at(gif.convert("L"), 2, 2 + label * 34, large=2).astype(int)
                assert np.abs(found - steps[0][number + 1][label, 0]).max() <= 10, "16 greys"


def test_the_steps_show_x_and_the_prediction_side_by_side(weights, steps, tmp_path):
    seen, x0, visited = steps
    words = (weights, "-n", "10", "--sampler", "ddim", "--steps", "5", "--batch", "4")
    result = run_sample(*words, "--steps-picture", tmp_path / "x.png")
    assert result.returncode == 0 and os.listdir(tmp_path) == ["x.png"], result.stderr
    picture = Image.open(tmp_path / "x.png")
    wide = 8 * GAP + 2
    margin = picture.width - 2 * wide - 16
    assert 60 < margin < 120 and picture.height == 5 * GAP + 2 + 21
    for k in range(5):
        for column in range(8):
            top = 21 + 2 + k * GAP
            for left, expected in ((margin + 2, seen), (margin + wide + 18, x0)):
                shown = image_at(picture, left + column * GAP, top).astype(int)
                # Four images at a time instead of ten: sums are rounded otherwise, which may be another grey.
                assert np.abs(shown - expected[k][column, 0]).max() <= 1
    assert visited == [7, 5, 4, 2, 0]
