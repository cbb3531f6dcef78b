"""Grids and GIFs, read back with PIL."""

import os

import numpy as np
import pytest
from PIL import Image

from ddpm_dist.tracking.loss_curve import read_curve, save_loss_curve
from ddpm_dist.tracking.pictures import save_gif, save_grid


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), np.uint8)


def cell(picture: Image.Image, row: int, column: int, height: int, width: int, left: int = 0) -> np.ndarray:
    """The pixels of one image of a grid with the documented padding of 2."""
    array = np.asarray(picture)
    top, begin = 2 + row * (height + 2), left + 2 + column * (width + 2)
    return array[top : top + height, begin : begin + width]


def test_a_grid_holds_every_pixel_of_every_image_in_row_order(images, tmp_path):
    save_grid(images, tmp_path / "new" / "grid.png", columns=3, scale=1)
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.mode == "RGB" and picture.size == (3 * 6 + 2, 3 * 7 + 2)
    for index, image in enumerate(images):
        assert np.array_equal(cell(picture, index // 3, index % 3, 5, 4), image.transpose(1, 2, 0))
    assert (cell(picture, 2, 1, 5, 4) == 255).all()  # the short last row
    assert os.listdir(tmp_path / "new") == ["grid.png"]


def test_enlarged_images_have_sharp_pixels_and_grey_stays_grey(images, tmp_path):
    save_grid(images[:, :1], tmp_path / "grid.png", columns=7, scale=3)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.mode == "L"
    assert np.array_equal(cell(picture, 0, 6, 15, 12), np.kron(images[6, 0], np.ones((3, 3), np.uint8)))


@pytest.mark.parametrize(("size", "shown"), [(8, 56), (16, 64), (28, 56), (32, 64), (64, 64), (256, 256)])
def test_small_images_are_enlarged_until_they_are_visible(tmp_path, size, shown):
    save_grid(np.zeros((1, 1, size, size), np.uint8), tmp_path / "grid.png", columns=1)
    assert Image.open(tmp_path / "grid.png").size == (shown + 4, shown + 4)


def test_row_labels_stand_left_of_their_rows(tmp_path):
    black = np.zeros((4, 1, 16, 16), np.uint8)
    save_grid(black, tmp_path / "plain.png", columns=2)
    save_grid(black, tmp_path / "labels.png", columns=2, row_labels=["", "a long name"])
    plain, labels = Image.open(tmp_path / "plain.png"), Image.open(tmp_path / "labels.png")
    margin = labels.width - plain.width
    assert margin > 40 and labels.height == plain.height
    assert np.array_equal(np.asarray(labels)[:, margin:], np.asarray(plain))
    column = np.asarray(labels)[:, :margin]
    assert (column[:66] == 255).all() and (column[66:] < 100).any()


def test_wrong_grids_are_refused_and_leave_no_file(images, tmp_path):
    path = tmp_path / "grid.png"
    for bad in (images.astype(np.float32), images[0], images[:, :2], images[:0]):
        with pytest.raises(ValueError, match="must be uint8"):
            save_grid(bad, path, 2)
    with pytest.raises(ValueError, match="at least 1"):
        save_grid(images, path, 0)
    with pytest.raises(ValueError, match="1 row labels for 4 rows"):
        save_grid(images, path, 2, row_labels=["x"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["png", "gif", "curve"])
def test_a_picture_that_cannot_be_written_leaves_the_old_one(images, tmp_path, kind):
    """A real limit on the size of files, in a child process."""
    import resource
    import signal

    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "images_seen": 1, "loss": 1.0}\n')
    curves = {"run": read_curve(metrics)}
    if kind == "curve":
        save_loss_curve(curves, tmp_path / "first.png")  # fills matplotlib's caches
        (tmp_path / "first.png").unlink()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            if kind == "png":
                save_grid(images, path, 2)
            elif kind == "gif":
                save_gif([images] * 2, path, 2)
            else:
                save_loss_curve(curves, path)
        except OSError:
            code = 7
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "old.png"]


def frames(channels: int, count: int = 6) -> list[np.ndarray]:
    """From noise to a picture."""
    random = np.random.default_rng(1)
    noise = random.integers(0, 256, (9, channels, 16, 16))
    last = np.zeros((9, channels, 16, 16))
    last[:, 0, 4:12, 4:12] = 250
    return [(noise + (last - noise) * k / (count - 1)).astype(np.uint8) for k in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_plays_all_frames_for_ever_and_holds_the_last(tmp_path, channels):
    path = tmp_path / "reverse.gif"
    made = frames(channels)
    save_gif(made, path, columns=3, milliseconds=50, hold_last=900, scale=2)
    with Image.open(path) as gif:
        assert gif.n_frames == len(made) and gif.info["loop"] == 0
        times, shown = [], []
        for number in range(gif.n_frames):
            gif.seek(number)
            times.append(gif.info["duration"])
            shown.append(np.asarray(gif.convert("RGB")).astype(int))
    assert times == [50] * 5 + [900]
    # The last frame is what matters: nearly the exact colours.
    for index, image in enumerate(made[-1]):
        expected = np.kron(image, np.ones((1, 2, 2), np.uint8)).transpose(1, 2, 0).astype(int)
        if channels == 1:
            expected = expected.repeat(3, axis=2)
        found = cell(Image.fromarray(shown[-1].astype(np.uint8)), index // 3, index % 3, 32, 32).astype(int)
        assert np.abs(found - expected).max() <= 9
    # The first frame still is noise, in few colours.
    first = cell(Image.fromarray(shown[0].astype(np.uint8)), 0, 0, 32, 32).astype(int)
    expected = np.kron(made[0][0], np.ones((1, 2, 2), np.uint8)).transpose(1, 2, 0).astype(int)
    assert np.abs(first - expected).mean() < (5 if channels == 1 else 60)


def test_a_gif_of_a_hundred_digits_is_small(tmp_path):
    random = np.random.default_rng(1)
    noise = random.normal(128, 80, (100, 1, 16, 16))
    made = [np.clip(noise * (1 - k / 19), 0, 255).astype(np.uint8) for k in range(20)]
    save_gif(made, tmp_path / "x.gif", columns=10, row_labels=[str(digit) for digit in range(10)])
    assert (tmp_path / "x.gif").stat().st_size < 1_000_000


def test_wrong_gifs_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        save_gif([], tmp_path / "x.gif", 2)
    with pytest.raises(ValueError, match="same shape"):
        save_gif([images, images[:3]], tmp_path / "x.gif", 2)
