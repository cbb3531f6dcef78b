"""From a source image to stored bytes: colours, sizes, formats, and images that cannot be read."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from ddpm_dist.data.encode import BadImage, Item, Recipe, encode, open_image, to_channels


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
