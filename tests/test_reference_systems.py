"""The small configuration of every reference system for real: pack, train on two ranks, resume, sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import lines, run_module

from ddpm_dist.config import load_config
from ddpm_dist.data.shapes import render

pytestmark = pytest.mark.slow

# Of the loss at the start, what is left at the end; far from the best that the network can do.
SYSTEMS = {
    "cifar64_small": ("shapes16", 0.5),
    "celeba96_small": ("digits", 0.5),
    "landscape64_small": ("folder16", 0.5),
    "mnist_context_small": ("digits28", 0.3),
    "mnist_x0_mix_small": ("digits28", 0.5),
    "mnist_unet2d_small": ("digits28", 0.6),
}
FULL_SIZE = {name: name.removesuffix("_small") for name in SYSTEMS}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """What the heads of the configurations tell to pack."""
    folder = tmp_path_factory.mktemp("shards")
    pictures = folder / "photos"
    pictures.mkdir()
    for number in range(400):
        render(0, number, 48).save(pictures / f"{number:04d}.png")
    for name, arguments in {
        "digits": ["digits"],
        "digits28": ["digits", "--size", "28"],
        "shapes16": ["shapes", "--num", "4000", "--size", "16"],
        "folder16": ["folder", "--root", str(pictures), "--size", "16"],
    }.items():
        done = run_module("ddpm_dist.pack", *arguments, "--out", str(folder / name))
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_small_reference_system_runs_from_shards_to_samples(name, shards, tmp_path):
    pytest.importorskip("diffusers") if "unet2d" in name else None
    data, learned = SYSTEMS[name]
    config, run = load_config(name), tmp_path / "run"
    settings = [
        "--config", name, f"run.dir={run}", f"data.shards={shards / data}", "tracking.mlflow=false",
        f"optim.decay_images={config.train.images}", "checkpoint.every=1_000_000_000", "train.log_every=10",
    ]  # fmt: skip
    # A third of what the configuration says is enough to see that it learns.
    batch = config.train.global_batch
    half, whole = (config.train.images // parts // batch * batch for parts in (6, 3))
    first = run_module("ddpm_dist.train", *settings, f"train.images={half}", ranks=2)
    assert first.returncode == 0, first.stderr
    second = run_module("ddpm_dist.train", *settings, f"train.images={whole}", ranks=2)
    assert second.returncode == 0, second.stderr
    assert f"continuing at step {half // batch:,}" in second.stdout
    records = lines(run / "metrics.jsonl")
    assert records[-1]["images_seen"] == whole
    assert records[-1]["loss"] < learned * records[0]["loss"], [round(r["loss"], 4) for r in records]
    out = tmp_path / "images.npz"
    done = run_module(
        "ddpm_dist.sample", str(run), "-n", "10", "--out", str(out), "--gif", str(tmp_path / "reverse.gif")
    )
    assert done.returncode == 0, done.stderr
    images = np.load(out)["images"]
    assert images.shape == (10, config.data.channels, config.data.image_size, config.data.image_size)
    pixels = images.astype(float)
    assert pixels.std(axis=0).mean() > 5  # not all the same
    if name != "celeba96_small":  # film_unet learns slowly: its images take more than this
        # Not noise: neighbours resemble each other, as in the data.
        assert np.abs(np.diff(pixels, axis=-1)).mean() < 0.8 * np.abs(pixels - pixels.mean()).mean()


@pytest.mark.parametrize("name", FULL_SIZE.values())
def test_the_full_configurations_are_those_of_the_references(name):
    config = load_config(name)
    from ddpm_dist.models import build_model

    network = build_model(config.model.name, **config.network_keywords())
    parameters = sum(p.numel() for p in network.parameters())
    expected = {
        "cifar64": 23_335_299, "landscape64": 23_332_739, "celeba96": 18_430_115, "mnist_context": 6_585_601,
        "mnist_x0_mix": 309_057, "mnist_unet2d": 1_707_009,
    }  # fmt: skip
    assert parameters == expected[name]
    assert json.dumps(config.to_dict())
