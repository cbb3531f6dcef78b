"""data.cache: the decoded set in memory gives the pixels of the streaming path, and is refused where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import lines
from engine_runs import several
from PIL import Image

from ddpm_dist.config import Data
from ddpm_dist.data import cache
from ddpm_dist.data.cache import Cache, bytes_of, choose_place
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import Loader, shard_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import pack
from ddpm_dist.runtime import Runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Index:
    """70 squares of 24 pixels, as JPEG."""
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    pack("shapes", folder, size=24, num=70, samples_per_shard=30)
    return Index.load(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Index:
    """30 images of many sizes, in two classes."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(30):
        (root / "in" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        image = draw.integers(0, 256, (int(draw.integers(20, 60)), int(draw.integers(20, 60)), 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "in" / f"class{number % 2}" / f"{number}.jpg")
    pack("folder", root / "out", root=root / "in", samples_per_shard=20)
    return Index.load(root / "out")


def batches(index: Index, settings: Data, place: str, number: int = 0, world: int = 1, micro: int | None = None):
    rank = Runtime(number, world, number, CPU, None)
    plan = plan_batches(12, micro, world)
    return list(shard_batches(index, settings, plan, rank, 3, range(14), "cpu", place))


@pytest.mark.parametrize("which", ["shapes", "photos"])
@pytest.mark.parametrize("crop", ["none", "center", "random_resized"])
@pytest.mark.parametrize("options", [{}, {"flip": True}, {"flip": True, "channels": 1, "num_classes": None}])
def test_pixels_are_those_of_streaming_to_the_bit(request, which, crop, options):
    index = request.getfixturevalue(which)
    settings = Data(image_size=24, crop=crop, **{"num_classes": 10, **options})
    plain, kept = batches(index, settings, "none"), batches(index, settings, "host")  # into later epochs
    assert len(plain) == len(kept) == 14
    for a, b in zip(plain, kept, strict=True):
        assert (a.step, a.ids.tolist(), a.slots.tolist()) == (b.step, b.ids.tolist(), b.slots.tolist())
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)
        assert (a.pixels.shape, a.pixels.stride(), a.pixels.dtype) == (
            b.pixels.shape,
            b.pixels.stride(),
            b.pixels.dtype,
        )
    split = [batches(index, settings, "host", number, 2, 3) for number in (0, 1)]
    shown = torch.cat([torch.cat([batch.pixels for batch in part[:2]]) for part in split])
    assert torch.equal(shown, plain[0].pixels)


def test_every_image_is_decoded_once(shapes, monkeypatch):
    read = []
    monkeypatch.setattr(
        Index, "read_many", lambda self, ids, real=Index.read_many: (read.extend(ids.tolist()), real(self, ids))[1]
    )
    monkeypatch.setattr(cache, "FILL", 16)
    batches(shapes, Data(image_size=24, num_classes=10), "host")
    assert sorted(set(read)) == list(range(70)) and len(read) == 80  # the last of five groups is filled up


def test_a_bad_image_is_named_before_the_first_step(shapes, tmp_path):
    import shutil

    shutil.copytree(shapes.folder, tmp_path / "copy")
    shard = tmp_path / "copy" / shapes.shards[1].name
    data = bytearray(shard.read_bytes())
    data[int(shapes.samples["offset"][37]) + 60] ^= 1
    shard.write_bytes(data)
    index = Index.load(tmp_path / "copy")
    rank = Runtime(0, 1, 0, CPU, None)
    loader = Loader(
        shard_batches(index, Data(image_size=24, num_classes=10), plan_batches(2, None, 1), rank, 3, range(1), "cpu", "host"), CPU
    )  # fmt: skip
    try:
        with pytest.raises(UserError, match=index.key_of(37)):
            loader.next()
    finally:
        loader.close()


@pytest.fixture
def gpu_memory(monkeypatch):
    """What a GPU machine says of its memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700_000, 1_000_000))
    monkeypatch.setattr(cache, "free_host_memory", lambda: 4_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


@pytest.mark.parametrize(
    ("size", "options", "decoder", "left", "place"),
    [
        (16, {}, "mixed", 10**6, "gpu"),  # 70 images of 768 bytes: below a tenth of the GPU
        (16, {}, "mixed", 2 * 70, "gpu"),
        (16, {}, "mixed", 2 * 70 - 1, "none"),  # it would decode more than it has to read
        (
            24,
            {},
            "mixed",
            10**6,
            "host",
        ),  # 121 kB: too much for the GPU's share, not for a quarter of a half of the host's
        (24, {"cache_gb": 2e-4}, "mixed", 10**6, "gpu"),
        (24, {"cache_gb": 1e-4}, "mixed", 10**6, "none"),
        (24, {"cache": "gpu"}, "mixed", 0, "gpu"),
        (24, {"cache": "host"}, "mixed", 0, "host"),
        (64, {}, "mixed", 10**6, "none"),
        (16, {"crop": "random_resized"}, "cpu", 10**6, "host"),
        (16, {"crop": "random_resized", "cache_gb": 2e-4}, "mixed", 10**6, "gpu"),
        (16, {"cache": "none"}, "mixed", 10**6, "none"),
    ],
)
def test_where_it_is_kept_on_a_gpu_machine(shapes, gpu_memory, size, options, decoder, left, place):
    assert choose_place(shapes, Data(image_size=size, **options), GPU, decoder, left, 2) == place


@pytest.mark.parametrize(
    ("device", "options", "words"),
    [
        (CPU, {"cache": "gpu"}, "there is no GPU"),
        (GPU, {"cache": "gpu", "crop": "random_resized"}, "made on the CPU"),
        (GPU, {"cache": "gpu", "image_size": 64}, "needs 0.00 GB"),
        (GPU, {"cache": "host", "cache_gb": 1e-6}, "are allowed or free"),
    ],
)
def test_what_cannot_be_is_refused(shapes, gpu_memory, device, options, words):
    with pytest.raises(UserError, match=words) as error:
        choose_place(shapes, Data(**{"image_size": 24, **options}), device, "cpu", 10**6, 2)
    assert "set data.cache=auto or none" in str(error.value)


def test_a_cpu_run_streams_unless_told_otherwise(shapes):
    settings = Data(image_size=24)
    assert choose_place(shapes, settings, CPU, "cpu", 10**9, 1) == "none"
    assert (
        bytes_of(shapes, settings)
        == bytes_of(shapes, settings.model_copy(update={"crop": "random_resized"}))
        == 70 * 24 * 24 * 3
    )


def test_the_order_of_dimensions_of_whole_images(photos):
    rank_files = lambda ids: [np.frombuffer(photos.read(int(i)), dtype=np.uint8) for i in ids]  # noqa: E731
    kept = Cache(photos, Data(image_size=8, crop="random_resized"), 4, CPU, "cpu", "host", rank_files)
    for sample in (0, 7, 29):
        row = photos.samples[sample]
        assert tuple(kept._image(sample).shape) == (row["height"], row["width"], 3)


@pytest.mark.slow
def test_a_run_is_the_same_with_it_and_may_take_it_up_later(tmp_path, shapes):
    common = [
        f"data.shards={shapes.folder}", "data.source=shards", "data.channels=3", "data.crop=random_resized", "data.flip=true",
        "train.audit=true", "train.audit_params_every=1",
    ]  # fmt: skip

    def run(name: str, images: int, place: str) -> list[str]:
        return [f"run.dir={tmp_path / name}", *common, f"train.images={images}", f"data.cache={place}"]

    several(
        tmp_path,
        (2, [run("streamed", 180, "none"), run("kept", 180, "host"), run("later", 96, "none")]),
        (1, [run("later", 180, "host")]),
    )
    streamed = lines(tmp_path / "streamed/audit.jsonl")
    assert lines(tmp_path / "kept/audit.jsonl") == streamed and len(streamed) == 15
    later = lines(tmp_path / "later/audit.jsonl")
    assert [line["slots"] for line in later] == [line["slots"] for line in streamed]
