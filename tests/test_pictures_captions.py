"""Words around grids: they stand where they belong, fit, and leave the images as they are."""

import numpy as np
import pytest
from PIL import Image

from ddpm_dist.tracking.captions import below, beside, captioned, save_picture
from ddpm_dist.tracking.pictures import grid


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 100, (6, 3, 16, 16), np.uint8)


def ink(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L")) < 128


def test_words_stand_around_the_grid_and_leave_it_alone(images):
    plain = np.asarray(grid(images, 3))
    picture = captioned(images, 3, "a heading", ["first", "the second"], ["a", "b", "c"])
    top, left = picture.height - plain.shape[0], picture.width - plain.shape[1]
    assert top == 42 and left > 50 and np.array_equal(np.asarray(picture)[top:, left:], plain)
    marks = ink(picture)
    assert marks[:21, left:].any() and marks[21:42, left:].any()
    for row in range(2):  # a word in the middle of each row, and none that touches the edge
        own = marks[top + 2 + row * 66 : top + 66 + row * 66, :left]
        assert own[20:44].any() and not own[:16].any() and not own[48:].any()
    assert not marks[:, 0].any() and not marks[0].any()
    for column in range(3):
        own = np.flatnonzero(marks[21:42, left + 2 + column * 66 : left + 66 + column * 66].any(0))
        assert 24 < own.mean() < 40
    assert captioned(images[:, :1], 3, "x").mode == "L" and captioned(images, 3).size == grid(images, 3).size


def test_long_names_are_written_smaller_then_cut_and_never_run_into_each_other(images):
    names = ["automobile", "a name that is far too long for it", "i"]
    marks = ink(captioned(images[:3], 3, column_labels=names))[:21]
    for column in range(3):
        assert marks[:, 2 + column * 66 : 66 + column * 66].any()
        assert not marks[:, 66 + column * 66 : 68 + column * 66].any(), "the gap between two columns is free"


def test_a_heading_that_is_wider_than_the_images_is_not_cut(images):
    heading = "a heading that is much wider than one image"
    picture = captioned(images[:1], 1, heading)
    assert picture.width > 200 and not ink(picture)[:, -3:].any()
    assert ink(captioned(images[:1], 1, heading + " x"))[:21].sum() > ink(picture)[:21].sum()


def test_pictures_below_and_beside_each_other(images, tmp_path):
    one, two = grid(images[:3], 3), grid(images[:2], 1)
    down, across = below([one, two], gap=5), beside([one, two], gap=7)
    assert down.size == (one.width, one.height + 5 + two.height)
    assert across.size == (one.width + 7 + two.width, two.height)
    assert np.array_equal(np.asarray(down)[one.height + 5 :, : two.width], np.asarray(two))
    assert (np.asarray(down)[one.height : one.height + 5] == 255).all()
    assert np.array_equal(np.asarray(across)[-one.height :, : one.width], np.asarray(one)), "lower edges in line"
    save_picture(across, tmp_path / "new" / "x.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "x.png")), np.asarray(across))


def test_wrong_numbers_of_words_are_refused(images):
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        captioned(images, 3, row_labels=["x"])
    with pytest.raises(ValueError, match="2 column labels for 3 columns"):
        captioned(images, 3, column_labels=["x", "y"])
    with pytest.raises(ValueError, match="must be uint8"):
        captioned(images.astype(float), 3)
