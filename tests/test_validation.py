"""The validation loss: the same for every number of ranks and after a resume, what a user computes from the exported weights, comparable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import lines, train

from ddpm_dist import philox
from ddpm_dist.data.shards import Index
from ddpm_dist.diffusion import Schedule
from ddpm_dist.pack import pack
from ddpm_dist.real_images import RealImages
from ddpm_dist.validation import timesteps

SHAPES = ("data.channels=3", "data.image_size=16")
VALIDATED = (
    "train.images=144",
    "validation.every=36",
    "validation.images=40",
    "train.log_every=2",
)  # 6 log steps of 24 images


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(training, validation) shards: shapes of other numbers, so that no image is in both."""
    folder = tmp_path_factory.mktemp("sets")
    for name, seed in (("train", 0), ("held_out", 1)):
        pack("shapes", folder / name, size=16, num=60, samples_per_shard=25, workers=1, seed=seed)
    return folder / "train", folder / "held_out"


def run(folder, sets, *words, ranks=0, shards=None):
    done = train(
        folder, *SHAPES, *VALIDATED, f"validation.shards={sets[1]}", *words, shards=shards or sets[0], ranks=ranks
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["step"]: line.get("validation_loss") for line in lines(folder / "metrics.jsonl")}
    return {step: loss for step, loss in found.items() if loss is not None}, done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sets):
    folder = tmp_path_factory.mktemp("whole") / "run"
    losses, said = run(folder, sets)
    assert "trained on, too" not in said
    return folder, losses


def test_it_is_computed_where_it_is_due(whole):
    _, losses = whole
    # Marks at 36, 72, 108 and 144 images; log steps at 24, 48, 72, 96, 120 and 144.
    assert list(losses) == [4, 6, 10, 12]


def test_ranks_and_a_resume_change_nothing(tmp_path, whole, sets):
    _, losses = whole
    first, _ = run(tmp_path / "run", sets, "train.images=72", "optim.decay_images=144", ranks=2)
    assert first == pytest.approx({step: losses[step] for step in (4, 6)}, rel=1e-6)
    again, _ = run(tmp_path / "run", sets, "optim.decay_images=144")
    assert again == pytest.approx(losses, rel=1e-6)


def test_it_is_what_the_averaged_weights_give(whole, sets, tmp_path):
    import ddpm_dist
    from ddpm_dist.export import main as export

    folder, losses = whole
    assert export([str(folder), "--ema", "0", "--out", str(tmp_path / "model.safetensors")]) == 0
    network = ddpm_dist.load(tmp_path / "model.safetensors").eval()
    from ddpm_dist.config import load_config

    config = load_config(str(folder / "config.yaml"), [])
    real = RealImages.open(config.data.model_copy(update={"shards": str(sets[1])}), None, None, "the run")
    ids = np.linspace(0, 59, 40).round().astype(np.int64)
    x0 = torch.from_numpy(real.read(ids)).float() / 127.5 - 1.0
    t = torch.from_numpy(timesteps(40, 0, 20))
    noise = philox.normal(0, philox.VALIDATION_NOISE, 0, torch.arange(40), (3, 16, 16))
    schedule = Schedule.from_mapping(config.diffusion.model_dump())
    x_t = schedule.add_noise(x0, noise, t)
    labels = torch.from_numpy(Index.load(sets[1]).samples["label"][ids].astype(np.int64))
    with torch.no_grad():
        wanted = (network(x_t, t, labels) - noise).square().mean()
    assert losses[12] == pytest.approx(float(wanted), rel=1e-5)


def test_timesteps_are_spread_evenly_for_any_number_of_images():
    for count in (1, 7, 100, 2048):
        found = timesteps(count, 1, 1001)
        assert found.min() >= 1 and found.max() <= 1000 and found.dtype == np.int64
        held = np.histogram(found, 10, (1, 1001))[0]
        assert held.max() - held.min() <= max(2, 0.02 * count)
    assert timesteps(1, 0, 1000)[0] == 500
    assert np.array_equal(timesteps(100, 0, 1000)[:50], timesteps(50, 0, 1000))


def test_images_that_are_trained_on_are_noticed(tmp_path, sets):
    _, said = run(tmp_path / "run", sets, "train.images=24", shards=sets[1])
    assert "60 of 60 validation images are trained on, too" in said and "held_out" in said


def test_shards_that_do_not_go_with_the_run(tmp_path, sets):
    done = train(tmp_path / "run", *SHAPES, "validation.shards=/nowhere/at/all", shards=sets[0])
    assert done.returncode == 2 and "/nowhere/at/all" in done.stderr + done.stdout
    assert not (tmp_path / "run" / "checkpoints").exists() or not list(
        (tmp_path / "run" / "checkpoints").glob("step_*")
    )
