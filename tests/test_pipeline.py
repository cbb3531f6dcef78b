"""Index -> bytes -> DALI -> pixels: the right pixels, the same for every split, and bad samples named."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_dist import runtime as runtimes
from ddpm_dist.config import Data
from ddpm_dist.data import augment
from ddpm_dist.data.decoder import resolve_decoder
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import Loader, open_index, shard_batches, synthetic_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import pack
from ddpm_dist.runtime import Runtime


def rank(number=0, world=1) -> Runtime:
    return Runtime(number, world, number, torch.device("cpu"), None)


def batches(index, settings, plan, number=0, world=1, seed=3, steps=range(4)):
    return list(shard_batches(index, settings, plan, rank(number, world), seed, steps, "cpu"))


def original(index: Index, sample: int) -> np.ndarray:
    array = np.asarray(Image.open(io.BytesIO(index.read(sample))))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Index:
    """64 procedural shapes of 40x40 as PNG."""
    folder = tmp_path_factory.mktemp("colour") / "shapes"
    pack("shapes", folder, size=40, num=64, image_format="png", samples_per_shard=20)
    return Index.load(folder)


def test_without_augmentation_the_pixels_are_those_of_the_file(digit_shards):
    index = Index.load(digit_shards)
    settings = Data(shards=str(digit_shards), image_size=16, channels=1, num_classes=10)
    for batch in batches(index, settings, plan_batches(10, None, 1)):
        assert batch.pixels.shape == (10, 1, 16, 16) and batch.pixels.dtype == torch.uint8
        for sample, pixels, label in zip(batch.ids, batch.pixels.numpy(), batch.labels, strict=True):
            assert np.array_equal(pixels, original(index, int(sample)))
            assert int(label) == index.samples["label"][sample]


def test_flips_are_those_of_the_draws(colour):
    settings = Data(image_size=40, channels=3, num_classes=10, flip=True)
    mirrored = 0
    for batch in batches(colour, settings, plan_batches(16, None, 1), steps=range(8)):
        epoch = (batch.step * 16 + batch.slots) // 64
        flips = augment.draws(3, epoch, batch.ids, augment.DRAWS)[:, -1] < 0.5
        for sample, pixels, flip in zip(batch.ids, batch.pixels.numpy(), flips, strict=True):
            expected = original(colour, int(sample))
            assert np.array_equal(pixels, expected[:, :, ::-1] if flip else expected)
            mirrored += int(flip)
    assert 32 < mirrored < 96


@pytest.mark.parametrize("crop", ["none", "center", "random_resized"])
def test_windows_are_cut_and_resized_as_pil_does(colour, crop):
    settings = Data(image_size=24, channels=3, num_classes=10, crop=crop)
    (batch,) = batches(colour, settings, plan_batches(32, None, 1), steps=range(1))
    rows = colour.samples[batch.ids]
    uniform = augment.draws(3, np.zeros(32, np.int64), batch.ids, augment.DRAWS)
    windows = augment.windows(crop, settings.crop_scale, rows["height"], rows["width"], uniform)
    for sample, pixels, (top, left, h, w) in zip(batch.ids, batch.pixels.numpy(), windows.tolist(), strict=True):
        image = Image.fromarray(original(colour, int(sample)).transpose(1, 2, 0)).crop((left, top, left + w, top + h))
        expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(pixels.astype(int) - expected).mean() < 1.5, "another window or another filter"


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, None), (3, 4), (4, 3)])
def test_pixels_do_not_depend_on_ranks_or_micro_batches(colour, world, micro):
    settings = Data(image_size=24, channels=3, num_classes=10, crop="random_resized", flip=True)
    reference = {}
    for batch in batches(colour, settings, plan_batches(12, None, 1), steps=range(7)):  # into the second epoch
        for slot, pixels in zip(batch.slots, batch.pixels, strict=True):
            reference[batch.step, int(slot)] = pixels
    for number in range(world):
        for batch in batches(colour, settings, plan_batches(12, micro, world), number, world, steps=range(7)):
            for slot, pixels in zip(batch.slots, batch.pixels, strict=True):
                assert torch.equal(pixels, reference.pop((batch.step, int(slot))))
    assert not reference


def test_starting_in_the_middle_is_the_same_as_going_there(colour):
    settings = Data(image_size=24, channels=3, num_classes=10, crop="random_resized")
    plan = plan_batches(12, None, 1)
    late = batches(colour, settings, plan, steps=range(5, 7))
    whole = batches(colour, settings, plan, steps=range(7))[5:]
    for a, b in zip(late, whole, strict=True):
        assert a.step == b.step and np.array_equal(a.ids, b.ids) and torch.equal(a.pixels, b.pixels)


def copy_of(index: Index, tmp_path):
    import shutil

    shutil.copytree(index.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_changed_byte_is_named_by_shard_and_key(colour, tmp_path):
    folder = copy_of(colour, tmp_path)
    victim = 25  # in the second shard
    shard = folder / colour.shards[1].name
    data = bytearray(shard.read_bytes())
    data[int(colour.samples["offset"][victim]) + 40] ^= 1
    shard.write_bytes(data)
    index = Index.load(folder)
    index.check_files()  # the size is right
    settings = Data(image_size=40, channels=3, num_classes=10)
    with pytest.raises(UserError) as error:
        batches(index, settings, plan_batches(16, None, 1))
    assert f"{shard.name}:{index.key_of(victim)}" in str(error.value)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, colour):
    """The bytes are those of the index but they are no image: what a set that was indexed carelessly looks like."""
    from ddpm_dist.data.index_file import checksum, write_index

    folder = copy_of(colour, tmp_path)
    table = np.array(colour.samples)
    victim = 7
    shard = folder / colour.shards[0].name
    data = bytearray(shard.read_bytes())
    start, size = int(table["offset"][victim]), int(table["size"][victim])
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    shard.write_bytes(data)
    table["checksum"][victim] = checksum(bytes(data[start : start + size]))
    for name in ("index.json", "index.npy"):
        (folder / name).unlink()
    write_index(folder, colour.shards, table, colour.classes, colour.channels, colour.image_format)
    index = Index.load(folder)
    with pytest.raises(UserError) as error:
        batches(index, Data(image_size=40, channels=3, num_classes=10), plan_batches(16, None, 1))
    assert index.key_of(victim) in str(error.value) and "cannot be decoded" in str(error.value)


def test_grey_and_colour_are_converted_as_configured(colour, digit_shards):
    grey = batches(colour, Data(image_size=40, channels=1, num_classes=10), plan_batches(4, None, 1), steps=range(1))[0]
    assert grey.pixels.shape == (4, 1, 40, 40)
    index = Index.load(digit_shards)
    rgb = batches(index, Data(image_size=16, channels=3, num_classes=10), plan_batches(4, None, 1), steps=range(1))[0]
    assert torch.equal(rgb.pixels[:, 0], rgb.pixels[:, 2])


def test_unlabelled_training_gives_no_labels(colour):
    (batch,) = batches(colour, Data(image_size=40, channels=3), plan_batches(4, None, 1), steps=range(1))
    assert batch.labels.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shards": None}, ["data.shards is not set", "ddpm_dist.pack"]),
        ({"shards": "/nowhere/at/all"}, ["/nowhere/at/all", "does not exist", "ddpm_dist.pack"]),
        ({"num_classes": 5}, ["label", "outside 0..4", "data.num_classes=10"]),
    ],
)
def test_data_that_does_not_fit_the_configuration(digit_shards, settings, words):
    given = Data(**{"shards": str(digit_shards), "image_size": 16, "channels": 1, "num_classes": 10, **settings})
    with pytest.raises(UserError) as error:
        open_index(given, "python -m ddpm_dist.pack digits --out there")
    for word in words:
        assert word in str(error.value)


def test_mixed_decoding_needs_a_gpu():
    assert resolve_decoder("auto", torch.device("cpu")) == "cpu"
    with pytest.raises(UserError, match="decoder=mixed"):
        resolve_decoder("mixed", torch.device("cpu"))


def test_the_synthetic_source_is_the_same_for_every_split():
    settings = Data(source="synthetic", image_size=8, channels=3, num_classes=10)
    whole = list(synthetic_batches(settings, plan_batches(6, None, 1), rank(), 0, range(3)))
    for number in (0, 1):
        part = list(synthetic_batches(settings, plan_batches(6, None, 2), rank(number, 2), 0, range(3)))
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a.pixels[number * 3 : number * 3 + 3], b.pixels)
    assert len(torch.unique(torch.stack([batch.pixels for batch in whole]))) > 200


def test_the_loader_hands_over_errors_and_ends():
    def broken():
        yield from synthetic_batches(
            Data(source="synthetic", image_size=8), plan_batches(2, None, 1), rank(), 0, range(2)
        )
        raise UserError("the disk is gone")

    loader = Loader(broken(), torch.device("cpu"))
    assert loader.next().step == 0 and loader.next().step == 1
    with pytest.raises(UserError, match="the disk is gone"):
        loader.next()
    loader.close()

    endless = synthetic_batches(
        Data(source="synthetic", image_size=8), plan_batches(2, None, 1), rank(), 0, range(10**6)
    )
    loader = Loader(endless, torch.device("cpu"))
    loader.next()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    runtimes.start()
    yield
    runtimes.finish()
