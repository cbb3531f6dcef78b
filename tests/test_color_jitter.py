"""data.color_jitter: off by default, a function of (seed, epoch, sample), the same with and without a cache, and it does what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpm_dist.config import Data, load_config
from ddpm_dist.data import augment
from ddpm_dist.data.decoder import resolve_decoder
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import shard_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import pack
from ddpm_dist.runtime import Runtime

STRONG = [0.4, 0.4, 0.4, 0.1]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("jitter") / "shapes"
    pack("shapes", folder, size=24, num=36, image_format="png", samples_per_shard=20, workers=1)
    return Index.load(folder)


def batches(index, number=0, world=1, steps=range(6), cache="none", **settings):
    data = Data(image_size=24, num_classes=10, flip=True, **settings)
    rank = Runtime(number, world, number, torch.device("cpu"), None)
    return list(shard_batches(index, data, plan_batches(12, None, world), rank, 3, steps, "cpu", cache))


def images(found) -> dict[tuple[int, int], np.ndarray]:
    """By (step, slot)."""
    return {
        (batch.step, slot): image
        for batch in found
        for slot, image in zip(batch.slots.tolist(), batch.pixels.numpy(), strict=True)
    }


def test_without_strength_nothing_changes(shapes):
    plain, weak = images(batches(shapes)), images(batches(shapes, color_jitter=[0.0, 0.0, 0.0, 0.0]))
    assert all(np.array_equal(plain[key], weak[key]) for key in plain)
    # Colours leave windows and mirror images as they were: the draws for those are the same.
    few = augment.draws(3, np.array([5]), np.array([9]), augment.DRAWS)
    assert np.array_equal(
        few, augment.draws(3, np.array([5]), np.array([9]), augment.DRAWS_WITH_COLOURS)[:, : augment.DRAWS]
    )


@pytest.mark.parametrize("crop", ["none", "random_resized"])
def test_it_is_the_same_for_every_split_start_and_cache(shapes, crop):
    whole = images(batches(shapes, color_jitter=STRONG, crop=crop))
    split = images(
        [*batches(shapes, 0, 2, color_jitter=STRONG, crop=crop), *batches(shapes, 1, 2, color_jitter=STRONG, crop=crop)]
    )
    late = images(batches(shapes, steps=range(3, 6), color_jitter=STRONG, crop=crop))
    kept = images(batches(shapes, cache="host", color_jitter=STRONG, crop=crop))
    for found in (split, late, kept):
        assert all(np.array_equal(whole[key], image) for key, image in found.items())
    assert len(split) == len(kept) == len(whole) == 72 and len(late) == 36
    first, again = (whole[key] for key in _twice(batches(shapes, color_jitter=STRONG, crop=crop)))
    assert not np.array_equal(first, again) and not np.array_equal(
        first, again[..., ::-1]
    )  # another epoch, other colours


def _twice(found):
    """(step, slot) of the two times at which the first image is shown."""
    wanted = found[0].ids[0]
    return [
        (batch.step, slot)
        for batch in found
        for slot, sample in zip(batch.slots, batch.ids, strict=True)
        if sample == wanted
    ]


def test_brightness_is_a_factor(shapes):
    """Only brightness: every image is the plain one times its factor."""
    plain, bright = batches(shapes), batches(shapes, color_jitter=[0.5, 0.0, 0.0, 0.0])
    factors = []
    for a, b in zip(plain, bright, strict=True):
        epochs = (a.step * 12 + a.slots) // 36
        uniform = augment.draws(3, epochs, a.ids, augment.DRAWS_WITH_COLOURS)
        for x, y, factor in zip(a.pixels.numpy(), b.pixels.numpy(), 0.5 + uniform[:, augment.DRAWS], strict=True):
            wanted = np.clip(x.astype(np.float64) * factor, 0, 255)
            assert np.abs(y - wanted).max() <= 1.0
            factors.append(factor)
    assert min(factors) < 0.7 and max(factors) > 1.3


def test_colours_of_augment():
    uniform = np.zeros((2, augment.DRAWS_WITH_COLOURS))
    uniform[1] = 1.0
    low, high = augment.colours([0.4, 2.0, 0.1, 0.25], uniform)
    assert low == pytest.approx([0.6, 0.0, 0.9, -90.0]) and high == pytest.approx([1.4, 3.0, 1.1, 90.0])


def test_grey_images(digit_shards):
    data = {"image_size": 16, "channels": 1, "num_classes": 10}
    rank = Runtime(0, 1, 0, torch.device("cpu"), None)
    found = [
        next(
            shard_batches(
                Index.load(digit_shards), Data(**data, **more), plan_batches(8, None, 1), rank, 3, range(1), "cpu"
            )
        )
        for more in ({}, {"color_jitter": [0.5, 0.5, 0.0, 0.0]})
    ]
    assert found[1].pixels.shape == (8, 1, 16, 16) and not np.array_equal(found[0].pixels, found[1].pixels)
    with pytest.raises(UserError, match="neither saturation nor hue"):
        load_config("cifar64", ["data.channels=1", "data.color_jitter=[0,0,0.1,0]"])
    with pytest.raises(UserError, match="hue from 0 to 0.5"):
        load_config("cifar64", ["data.color_jitter=[0,0,0,0.6]"])


def test_the_decoder_follows_the_size_of_the_images():
    class Large:
        image_format = "jpg"
        ranges = {"height": [200, 300], "width": [100, 200]}

    class Small:
        image_format = "jpg"
        ranges = {"height": [64, 64], "width": [64, 255]}

    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert resolve_decoder("auto", gpu, Large()) == "mixed" and resolve_decoder("auto", gpu, Small()) == "cpu"
    assert resolve_decoder("auto", cpu, Large()) == "cpu" and resolve_decoder("mixed", gpu, Small()) == "mixed"
