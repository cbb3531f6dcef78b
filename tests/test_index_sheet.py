"""The contact sheet of ddpm_dist.index: captions that can be read, and small images made large."""

import io

import numpy as np
import pytest
from foreign_shards import encoded, index, write_shards, write_tar
from PIL import Image

from ddpm_dist import index_sheet
from ddpm_dist.tracking.captions import FONT, _font, captioned, drawable


@pytest.fixture
def said(monkeypatch):
    """What is drawn: (images, columns, options)."""
    calls = []
    monkeypatch.setattr(index_sheet, "captioned", lambda *a, **k: calls.append((*a, k)) or captioned(*a, **k))
    return calls


def sheet(tmp_path, capsys, *names):
    names = [name.encode() for name in names]
    write_shards(tmp_path / "f", 2 * len(names), 1000, label=lambda n: {"txt": names[n % len(names)]})
    code, lines, err = index(capsys, tmp_path / "f", "--sheet", tmp_path / "s.png", "--label", "txt")
    assert code == 0 and (tmp_path / "s.png").stat().st_size, (lines, err)


def test_captions(tmp_path, capsys, said):
    sheet(
        tmp_path,
        capsys,
        "café",
        "猫",
        "bird \N{FLAMINGO}",
        "قط",
        "日本語の長い名前です",
        "a very long name of a class that goes on and on",
    )
    ((_, _, options),) = said
    assert options["heading"] == f"12 samples of {tmp_path / 'f'}"
    assert set(options["row_labels"]) == {
        "café (2)", "\\u732b (2)", "bird \\U0001f9a9 (2)", "قط (2)", "class 4 (2)", "a very long name of a class th.. (2)",
    }  # fmt: skip


def test_what_the_font_lacks_is_escaped_and_nothing_else():
    assert drawable("Grüße, straße 100 % (ok)") == "Grüße, straße 100 % (ok)"
    assert drawable("a\n\u200b\u732b") == r"a\n\u200b\u732b"
    font = _font(FONT, "é")
    box = bytes(font.getmask("\U0010ffff"))
    kept = [letter for letter in map(chr, range(0x80, 0x3000)) if drawable(letter) == letter and not letter.isspace()]
    assert len(kept) > 2000 and not any(bytes(font.getmask(letter)) == box for letter in kept)


def test_it_says_when_not_all_classes_are_on_it(tmp_path, capsys, said):
    sheet(tmp_path, capsys, *(f"n{n:02}" for n in range(30)))
    ((images, columns, options),) = said
    assert len(options["row_labels"]) == 24 == len(images) // columns
    assert options["heading"].startswith("24 of 30 classes; 60 samples of ")


@pytest.mark.parametrize(
    ("size", "factor"), [((16, 16), 4), ((20, 9), 3), ((40, 40), 1), ((64, 64), 1), ((100, 50), 0.64)]
)
def test_small_images_are_enlarged_by_a_whole_factor(tmp_path, capsys, said, size, factor):
    data = encoded(7, "png", size)
    write_tar(tmp_path / "a.tar", [("a.png", data)])
    assert index(capsys, tmp_path / "a.tar", "--unlabelled", "--sheet", tmp_path / "s.png")[0] == 0
    image = said[0][0][0].transpose(1, 2, 0)
    assert image.shape == (64, 64, 3)
    inside = Image.fromarray(image).crop(box := centred(round(size[0] * factor), round(size[1] * factor)))
    outside = np.ones((64, 64), bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert (image[outside] == 255).all()
    if factor >= 1:
        true = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(np.asarray(inside), true.repeat(factor, 0).repeat(factor, 1))


def centred(width, height):
    left, top = (64 - width) // 2, (64 - height) // 2
    return left, top, left + width, top + height
