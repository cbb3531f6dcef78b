"""The picture of the forward process, for runs, weights files and configurations."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from sampling import run_sample, weights_file

from ddpm_dist.diffusion import Schedule
from ddpm_dist.forward_process import noised, spread_timesteps


def test_images_disappear_as_the_schedule_says():
    images = np.full((6, 3, 32, 32), 255, np.uint8)
    images[3:] = 0
    for schedule in (Schedule(1000), Schedule(400, 1, beta_end=0.02), Schedule(50, schedule="cosine")):
        timesteps = spread_timesteps(schedule)
        assert timesteps[0] == 0 and timesteps[-1] == schedule.timesteps - 1 and len(timesteps) == 10
        shown = noised(images, schedule, [-1.0, 1.0], timesteps)
        assert shown.shape == (6, 10, 3, 32, 32)
        for column, t in enumerate(timesteps):
            signal, spread = float(schedule.signal[t]), float(schedule.spread[t])
            x = np.clip(signal + spread * np.random.default_rng(0).normal(size=100_000), -1, 1)
            assert abs(shown[:3, column].mean() / 127.5 - 1 - x.mean()) < 0.06, (schedule.schedule, t)
        assert (
            np.abs(shown[:3, -1].mean() - shown[3:, -1].mean()) < 30 < np.abs(shown[:3, 0].mean() - shown[3:, 0].mean())
        )


def test_mixing_with_uniform_noise_stays_in_the_range_unclipped():
    schedule = Schedule(10, schedule="mixing", noise="uniform", prediction="x0")
    images = np.full((2, 1, 64, 64), 255, np.uint8)
    shown = noised(images, schedule, [0.0, 1.0], spread_timesteps(schedule))
    for t in range(10):
        amount = (t + 0.5) / 10
        column = shown[:, t].astype(float) / 255
        assert abs(column.mean() - (1 - amount / 2)) < 0.02 and column.min() >= 1 - amount - 0.01
    assert abs(np.percentile(shown[:, 9], 50) / 255 - 0.525) < 0.03


def test_few_timesteps_are_shown_once_each():
    assert spread_timesteps(Schedule(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("source", ["configuration", "name", "run", "weights"])
def test_it_needs_no_weights(tmp_path, digit_shards, source):
    out, more = tmp_path / "out" / "forward.png", []
    if source == "configuration":
        path = tmp_path / "own.yaml"
        path.write_text(f"extends: digits.yaml\ndata: {{shards: {digit_shards}}}\ndiffusion: {{timesteps: 100}}\n")
    elif source == "name":
        path, more = "digits", ["--shards", digit_shards]
    elif source == "run":
        path = tmp_path / "run"
        path.mkdir()
        (path / "config.yaml").write_text(f"extends: digits.yaml\ndata: {{shards: {digit_shards}}}\n")
    else:
        path = weights_file(tmp_path / "w.safetensors", {"beta_end": 0.5}, num_classes=10, image_size=16)
        more = ["--shards", digit_shards]
    result = run_sample(path, "--forward-process", out, "--classes", "2,7", "-n", "4", *more)
    assert result.returncode == 0, result.stderr
    assert os.listdir(out.parent) == ["forward.png"] and str(out) in result.stdout
    picture = Image.open(out)
    assert picture.height == 2 * 21 + 4 * 66 + 2 and picture.width > 10 * 66
    left = picture.width - (10 * 66 + 2)
    first = np.asarray(picture)[44:108, left + 2 : left + 66]
    last = np.asarray(picture)[44:108, left + 2 + 9 * 66 : left + 66 + 9 * 66]
    assert 0.2 < (first < 10).mean() < 0.6 and first.max() > 240, "at t = 0 the digit is there"
    assert abs(np.corrcoef(first.flatten(), last.flatten())[0, 1]) < 0.3, "and at the end it is not"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere",), "nowhere does not exist"),
        (("digits", "--shards", "/nowhere"), "does not exist"),
        (("digits", "--shards", "SHARDS", "--classes", "11"), "unknown class '11'"),
        (("digits", "--shards", "SHARDS", "-n", "0"), "--num 0"),
        (("cifar64", "--shards", "SHARDS", "--classes", "1"), None),
        (("EMPTY",), "holds no config.yaml"),
    ],
)
def test_bad_input(tmp_path, digit_shards, words, told):
    (tmp_path / "empty").mkdir()
    words = [word.replace("SHARDS", str(digit_shards)).replace("EMPTY", str(tmp_path / "empty")) for word in words]
    result = run_sample(*words, "--forward-process", tmp_path / "f.png")
    if told is None:  # grey images for a coloured network: as in training they become coloured
        assert result.returncode == 0 and Image.open(tmp_path / "f.png").mode == "RGB", result.stderr
        return
    assert result.returncode == 2 and told in result.stderr and os.listdir(tmp_path) == ["empty"], result.stderr
