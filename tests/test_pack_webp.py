"""Lossless WebP shards: the pixels that training sees are those of the source, in fewer bytes than PNG."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_dist.config import Data
from ddpm_dist.data import shapes
from ddpm_dist.data.encode import Item, Recipe, encode
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import shard_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import main, pack
from ddpm_dist.pack_summary import PNG_NOTE
from ddpm_dist.runtime import Runtime


def trained_on(index, size, channels):
    """What the loader delivers, by sample: (C, H, W) uint8."""
    settings = Data(shards=str(index.folder), image_size=size, channels=channels, num_classes=10)
    runtime = Runtime(0, 1, 0, torch.device("cpu"), None)
    found = {}
    for batch in shard_batches(index, settings, plan_batches(10, None, 1), runtime, 3, range(3), "cpu"):
        found |= dict(zip(batch.ids.tolist(), batch.pixels.numpy(), strict=True))
    return found


def test_colour_images_reach_training_bit_by_bit_and_are_smaller_than_png(tmp_path):
    options = {"num": 30, "size": 40, "samples_per_shard": 20, "workers": 1}
    index = pack("shapes", tmp_path / "webp", image_format="webp", **options).index
    index.verify()
    assert (index.image_format, index.channels, len(index.shards)) == ("webp", 3, 2)
    found = trained_on(index, 40, 3)
    assert len(found) == 30
    for k, pixels in found.items():
        assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(shapes.render(0, k, 40)))
    png = pack("shapes", tmp_path / "png", image_format="png", **options).index
    assert index.samples["size"].sum() < 0.98 * png.samples["size"].sum()


def test_grey_images_reach_training_bit_by_bit(tmp_path):
    root = tmp_path / "root"
    values = np.random.default_rng(0).integers(0, 256, (10, 16, 16), np.uint8)
    for k, image in enumerate(values):
        (root / f"{k}").mkdir(parents=True)
        Image.fromarray(image).save(root / f"{k}" / "a.png")
    index = pack("folder", tmp_path / "out", root=root, image_format="webp", workers=1).index
    assert index.channels == 1
    found = trained_on(Index.load(tmp_path / "out"), 16, 1)
    assert sorted(found) == list(range(10)) and all(np.array_equal(found[k][0], values[k]) for k in found)


def test_webp_files_are_kept_as_they_are_unless_they_move():
    def file_of(*images, **options):
        buffer = io.BytesIO()
        images[0].save(buffer, "WEBP", append_images=images[1:], save_all=len(images) > 1, **options)
        return buffer.getvalue()

    still, moving = (
        file_of(shapes.render(0, 1, 24)),
        file_of(shapes.render(0, 1, 24), shapes.render(0, 2, 24), lossless=True),
    )
    assert encode(0, Item("x", -1, lambda: still), Recipe("webp", 3)).data == still
    stored = encode(0, Item("x", -1, lambda: moving), Recipe("webp", 3)).data
    image = Image.open(io.BytesIO(stored))
    assert not image.is_animated and np.array_equal(np.asarray(image), np.asarray(shapes.render(0, 1, 24)))


def test_png_says_that_webp_is_there_and_wrong_options_are_refused(tmp_path, capsys):
    words = ["shapes", "--num", "5", "--size", "16", "--workers", "1"]
    for kind in ("png", "webp"):
        assert main([*words, "--format", kind, "--out", str(tmp_path / kind)]) == 0
        assert (PNG_NOTE in capsys.readouterr().out.splitlines()) == (kind == "png")
    for options, message in [
        ({"image_format": "webp", "size": 16384}, "at most 16383 pixels a side"),
        ({"image_format": "webp", "quality": 90}, "--quality is for --format jpg"),
        ({"image_format": "gif"}, "--format must be one of jpg, png, webp, raw"),
    ]:
        with pytest.raises(UserError, match=message):
            pack("shapes", tmp_path / "no", num=5, **options)
    assert not (tmp_path / "no").exists()
