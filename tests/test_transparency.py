"""Transparent and moving pictures: findings of index, told by their headers alone; pack lays them on white and keeps the first picture."""

import io

import numpy as np
import pytest
from foreign_shards import encoded, findings, index, picture, png_chunk, samples, write_tar
from PIL import Image

from ddpm_dist.data.encode import Item, Recipe, encode
from ddpm_dist.data.image_header import MAX_SEGMENTS, BadImage, read_header


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def clear():
    """Half of it is transparent."""
    image = picture(3).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda value: 255 * (value > 127)))
    return image


def spliced(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks behind its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def without_flag(webp: bytes) -> bytes:
    """An extended WebP whose header says nothing of the transparency that its pixels have."""
    assert webp[12:16] == b"VP8X" and webp[20] & 0x10
    return webp[:20] + bytes([webp[20] & ~0x10]) + webp[21:]


RGB, GREY, ICC = picture(1), picture(1, mode="L"), {"icc_profile": b"p" * 101}
TRANSPARENT = {
    "png-colour": ("png", saved(RGB, "PNG", transparency=RGB.getpixel((0, 0)))),
    "png-shade": ("png", saved(GREY, "PNG", transparency=GREY.getpixel((0, 0)))),
    "png-late": ("png", spliced(saved(RGB, "PNG", transparency=RGB.getpixel((0, 0))), png_chunk(b"tEXt", b"a\0" + b"b" * 9999))),
    "webp-lossless": ("webp", saved(clear(), "WEBP", lossless=True)),
    "webp-lossy": ("webp", saved(clear(), "WEBP")),
    "webp-extended": ("webp", saved(clear(), "WEBP", lossless=True, **ICC)),
    "webp-no-flag": ("webp", without_flag(saved(clear(), "WEBP", lossless=True, **ICC))),
    "webp-no-flag-lossy": ("webp", without_flag(saved(clear(), "WEBP", **ICC))),
}  # fmt: skip
MOVING = {
    "png-moving": ("png", saved(RGB, "PNG", save_all=True, append_images=[picture(2)])),
    "png-of-one": ("png", spliced(saved(RGB, "PNG"), png_chunk(b"acTL", bytes([0, 0, 0, 1, 0, 0, 0, 0])))),
    "webp-moving": ("webp", saved(RGB, "WEBP", save_all=True, append_images=[picture(2)], lossless=True)),
}


@pytest.mark.parametrize("options", [[], ["--check"]], ids=str)
def test_they_are_findings(tmp_path, capsys, options):
    cases = {**TRANSPARENT, **MOVING}
    for name, (extension, data) in cases.items():
        write_tar(tmp_path / f"{name}.tar", samples(1, 2, s2_jpg=None, **{f"s2_{extension}": data}))
    code, lines, _ = index(capsys, tmp_path, "--out", tmp_path / "i", *options)
    assert code == 1 and findings(lines) == {(name, "s2"): "unsupported image" for name in cases}


def test_what_has_none_is_taken():
    """Whatever writes it: lossless WebP has room for transparency and says whether it is used."""
    found = []
    for image in (RGB, GREY, RGB.convert("RGBA"), Image.new("RGB", (5, 7), "white")):
        for options in (
            {},
            {"lossless": True},
            {"lossless": True, "exact": True, "method": 6},
            {"lossless": True, **ICC},
            ICC,
        ):
            found.append(read_header(saved(image, "WEBP", **options)))
    for recipe in (Recipe("webp", 3), Recipe("webp", 1), Recipe("png", 1), Recipe("png", 3)):
        found.append(read_header(encode(0, Item("x", -1, lambda: saved(clear(), "PNG")), recipe).data))
    found += [read_header(encoded(1, kind, mode=mode)) for kind in ("webp", "png") for mode in ("L", "RGB")]
    found.append(read_header(spliced(saved(RGB, "PNG"), png_chunk(b"tEXt", b"a\0tRNS"), png_chunk(b"gAMA", bytes(4)))))
    assert {header.format for header in found} == {"webp", "png"}


def test_a_header_without_end_is_read_no_further():
    endless = spliced(saved(RGB, "PNG"), png_chunk(b"tEXt", b"") * (MAX_SEGMENTS + 1))
    with pytest.raises(BadImage, match="chunks before the pixels"):
        read_header(endless)
    whole = saved(clear(), "WEBP", lossless=True, **ICC), saved(RGB, "PNG", transparency=(1, 2, 3))
    for data in whole:  # cut anywhere: an answer, or a finding
        for length in range(12, len(data)):
            try:
                read_header(data[:length])
            except BadImage:
                pass


@pytest.mark.parametrize("name", list(TRANSPARENT))
def test_pack_lays_them_on_white(name):
    extension, data = TRANSPARENT[name]
    for channels in (1, 3):
        stored = encode(0, Item("x", -1, lambda: data), Recipe(extension, channels)).data
        assert stored != data and read_header(stored).format == extension
        source = Image.open(io.BytesIO(data)).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source).convert(
            "L" if channels == 1 else "RGB"
        )
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored)).convert(white.mode)), np.asarray(white))
        assert (
            np.asarray(white).max() == 255 or name == "webp-no-flag-lossy"
        )  # Pillow does not show that it is transparent


@pytest.mark.parametrize("name", list(MOVING))
def test_pack_keeps_the_first_picture(name):
    extension, data = MOVING[name]
    stored = encode(0, Item("x", -1, lambda: data), Recipe(extension, 3)).data
    assert stored != data and read_header(stored).format == extension
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), np.asarray(RGB))
