"""Raw shards (PPM and PGM files): the pixels of the source bit by bit, whichever way they go, and refused where they are not whole."""

import io

import numpy as np
import pytest
import torch
from foreign_shards import write_tar
from PIL import Image

from ddpm_dist.config import Data
from ddpm_dist.data import raw, shapes
from ddpm_dist.data.decoder import Decoder, resolve_decoder
from ddpm_dist.data.encode import Item, Recipe, encode
from ddpm_dist.data.image_header import BadImage, Header, read_header
from ddpm_dist.data.mixed_index import MixedIndex
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import shard_batches
from ddpm_dist.data.raw import RawImages, open_decoder
from ddpm_dist.data.shards import Index
from ddpm_dist.index import main as index_main
from ddpm_dist.pack import main, pack
from ddpm_dist.runtime import Runtime

SIDE, COUNT = 24, 30


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, Index]:
    folder = tmp_path_factory.mktemp("raw")
    options = {"num": COUNT, "size": SIDE, "samples_per_shard": 12, "workers": 1}
    return {kind: pack("shapes", folder / kind, image_format=kind, **options).index for kind in ("raw", "png")}


def delivered(index, **settings) -> list[tuple]:
    """What the loader makes of two epochs, batch by batch."""
    data = Data(**{"image_size": SIDE, "channels": index.channels, "num_classes": index.num_classes, **settings})
    alone = Runtime(0, 1, 0, torch.device("cpu"), None)
    batches = shard_batches(
        index, data, plan_batches(10, None, 1), alone, 3, range(6), "cpu", settings.get("cache", "none")
    )
    return [(each.ids.tolist(), each.labels.tolist(), each.pixels.numpy()) for each in batches]


def same(a: list[tuple], b: list[tuple]) -> bool:
    return len(a) == len(b) > 0 and all(
        (x[:2] == y[:2]) and x[2].dtype == y[2].dtype and np.array_equal(x[2], y[2]) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"flip": True},
        {"flip": True, "cache": "host"},
        {"image_size": 16, "crop": "center"},
        {"crop": "random_resized", "flip": True},
        {"crop": "random_resized", "cache": "host"},
        {"color_jitter": [0.2, 0.2, 0.2, 0.1]},
    ],
)
def test_training_sees_the_same_as_from_png(packed, settings):
    assert packed["raw"].image_format == "raw"
    assert same(delivered(packed["raw"], **settings), delivered(packed["png"], **settings))


def test_colours_become_grey_with_the_usual_weights(packed):
    """ITU-R BT.601, rounded. (The PNG decoder is off by up to 1 there, so it cannot be the measure.)"""
    seen = delivered(packed["raw"], channels=1)
    assert len(seen) == 6
    for ids, _, images in seen:
        for sample, image in zip(ids, images, strict=True):
            exact = np.asarray(shapes.render(0, sample, SIDE)).astype(float) @ [0.299, 0.587, 0.114]
            assert image.shape == (1, SIDE, SIDE) and np.abs(image[0] - exact).max() < 0.51


def test_what_has_the_right_size_is_joined_without_dali_and_anything_else_is_not(packed, tmp_path, monkeypatch):
    def kind(**settings) -> type:
        data = Data(**{"image_size": SIDE, "channels": 3, "num_classes": 10, **settings})
        return type(open_decoder(packed["raw"], data, 4, torch.device("cpu"), "cpu"))

    assert kind() is kind(flip=True) is RawImages
    others = ({"image_size": 16}, {"crop": "random_resized"}, {"color_jitter": [0.1, 0, 0, 0]}, {"channels": 1})
    assert all(kind(**settings) is Decoder for settings in others)
    joined = delivered(packed["raw"], flip=True)
    monkeypatch.setattr(raw, "RawImages", lambda settings, device: Decoder(packed["raw"], settings, 10, device, "cpu"))
    assert same(joined, delivered(packed["raw"], flip=True))  # DALI decodes the same files to the same pixels
    pixels = {
        sample: image for ids, _, images in delivered(packed["raw"]) for sample, image in zip(ids, images, strict=True)
    }
    assert len(pixels) == COUNT
    assert all(np.array_equal(pixels[k].transpose(1, 2, 0), np.asarray(shapes.render(0, k, SIDE))) for k in pixels)


def test_a_mix_of_raw_and_compressed_sets(packed):
    both = MixedIndex([packed["raw"], packed["png"]])
    assert both.image_format == "mixed"
    data = Data(image_size=SIDE, num_classes=10)
    decode = open_decoder(both, data, COUNT, torch.device("cpu"), "cpu")
    ids = np.arange(COUNT // 2, 3 * COUNT // 2)
    files = [np.frombuffer(file, dtype=np.uint8) for file in both.read_many(ids)]
    nothing = np.zeros((COUNT, 4), np.int32)
    pixels, _, _ = decode(ids, files, nothing, np.zeros(COUNT, bool), np.zeros(COUNT, np.int64))
    for sample, image in zip(ids % COUNT, pixels.numpy(), strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), np.asarray(shapes.render(0, int(sample), SIDE)))


def test_a_gpu_does_not_decode_what_is_not_encoded(tmp_path):
    for kind, found in (("raw", "cpu"), ("png", "mixed")):
        index = pack("shapes", tmp_path / kind, image_format=kind, num=4, size=256, workers=1).index
        assert resolve_decoder("auto", torch.device("cuda", 0), index) == found


def test_shards_of_others_grey_and_coloured(tmp_path):
    """Written by hand, with the liberties that the format allows; indexed, and checked image by image."""
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (8, 8), np.uint8), rng.integers(0, 256, (8, 8, 3), np.uint8)
    files = [
        ("a.pgm", b"P5 8 8 255\n" + grey.tobytes()), ("a.cls", b"0"),
        ("b.ppm", b"P6\n# by hand\n8\t8 # pixels\r\n255 " + colour.tobytes()), ("b.cls", b"1"),
    ]  # fmt: skip
    write_tar(tmp_path / "one.tar", files)
    words = [str(tmp_path / "one.tar"), "--out", str(tmp_path / "index"), "--check", "--sheet", str(tmp_path / "s.png")]
    assert index_main(words) == 0
    assert Image.open(tmp_path / "s.png").size[0] > 0
    index = Index.load(tmp_path / "index")
    assert (index.image_format, index.channels, index.classes) == ("raw", 3, ["0", "1"])
    for each in (delivered(index, image_size=8), delivered(index, image_size=8, color_jitter=[0, 0, 0, 1e-9])):
        seen = {sample: image for ids, _, images in each for sample, image in zip(ids, images, strict=True)}
        assert np.array_equal(seen[0], np.broadcast_to(grey, (3, 8, 8)))
        assert np.array_equal(seen[1], colour.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "data, reason, detail",
    [
        (b"P6 2 2 255\n" + b"x" * 11, "truncated image", "22 bytes where 23 are needed"),
        (b"P6 2 2 255\n" + b"x" * 13, "damaged image", "24 bytes where 23 are needed"),
        (b"P5 2 2 65535\n" + b"x" * 8, "unsupported image", "65535"),
        (b"P5 2 2 254\n" + b"x" * 4, "unsupported image", "254"),
        (b"P6 0 2 255\n", "absurd image size", "2 x 0|0 x 2"),
        (b"P6 99999 99999 255\n" + b"x" * 9, "absurd image size", "99999 x 99999"),
        (b"P6 999999999999 2 255\nxxxx", "not an image", "header is damaged"),
        (b"P5 2 2\n" + b"\0" * 9, "not an image", "header is damaged"),
        (b"P6 2 # " + b"c" * 5000 + b"\n2 255\n" + b"x" * 12, "not an image", "header is damaged"),
        (b"P3 1 1 255 1 2 3", "not an image", "not a JPEG, PNG, WebP, PPM or PGM image"),
    ],
)
def test_what_is_not_whole_or_cannot_be_read_is_found(data, reason, detail):
    with pytest.raises(BadImage, match=detail) as caught:
        read_header(data)
    assert caught.value.reason == reason


def test_a_header_is_read_as_pillow_reads_it():
    rng = np.random.default_rng(1)
    for _ in range(50):
        height, width = rng.integers(1, 40, 2).tolist()
        grey = bool(rng.integers(2))
        image = Image.fromarray(rng.integers(0, 256, (height, width) if grey else (height, width, 3), np.uint8))
        file = io.BytesIO()
        image.save(file, "PPM")
        assert read_header(file.getvalue()) == Header("raw", 1 if grey else 3, width, height)


def test_packing_writes_one_way_whatever_the_source_was(tmp_path, capsys):
    image = shapes.render(0, 1, SIDE)
    ours = encode(0, Item("x", -1, lambda: image), Recipe("raw", 3)).data
    assert ours.startswith(b"P6\n24 24\n255\n")
    theirs = b"P6 24 24 # hello\n255\n" + image.tobytes()
    assert encode(0, Item("x", -1, lambda: theirs), Recipe("raw", 3)).data == ours
    assert main(["digits", "--format", "raw", "--workers", "1", "--out", str(tmp_path / "digits")]) == 0
    assert "16 x 16, grey raw" in capsys.readouterr().out
    index = Index.load(tmp_path / "digits")
    assert index.channels == 1 and index.read(0).startswith(b"P5\n16 16\n255\n")
    assert len(index.read(0)) == 13 + 256
