"""The GAN baseline: it learns the classes, from our shards, the same every time; and is scored beside other images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import run_module
from PIL import Image

from benchmarks.gan import Discriminator, Generator, generate, halvings, train_gan
from benchmarks.gan_baseline import main, parse, settings, train
from ddpm_dist.config import load_config
from ddpm_dist.data.pipeline import MicroBatch, open_index
from ddpm_dist.errors import RunFailed, UserError
from ddpm_dist.evaluate import load_real

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_gan_learns_the_digits_and_is_scored_beside_other_images(tmp_path, digit_shards):
    # Real images stand for the diffusion model's: their scores are known.
    real, labels, _ = load_real(digit_shards, (16, 16))
    np.savez_compressed(tmp_path / "made.npz", images=real[:400], labels=labels[:400])
    words = [
        "--shards",
        digit_shards,
        "--epochs",
        "8",
        "--batch",
        "32",
        "--lr",
        "1e-3",
        "--width",
        "16",
        "--num",
        "300",
    ]
    done = run_module(
        "benchmarks.gan_baseline", *words, "--images", tmp_path / "made.npz", "--out-dir", tmp_path / "gan"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gan" / "report.json").read_text())
    gan, other = report["scores"]["GAN"], report["scores"]["DDPM"]
    assert other["recognized"] > 0.95 and other["frechet"] < 3 * other["frechet_real"]
    assert gan["recognized"] > 0.5  # by chance 0.1
    assert gan["frechet_images"] == other["frechet_images"] == gan["generated_images"] == 300
    assert gan["frechet_real"] == other["frechet_real"] > 0
    assert (report["epochs"], report["batch"], report["lr"]) == (8.0, 32, 1e-3)
    assert report["steps"] == -(-8 * 1797 // 32)
    with np.load(tmp_path / "gan" / "images.npz") as arrays:
        assert arrays["images"].shape == (300, 1, 16, 16) and arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [i % 10 for i in range(300)]
    picture, samples = (Image.open(tmp_path / "gan" / name) for name in ("side_by_side.png", "samples.png"))
    assert picture.width > 3 * 6 * 56 and picture.height > 10 * 56 and samples.width > 500
    assert "GAN" in done.stdout and "Frechet distance (n = 300)" in done.stdout and "real" in done.stdout


def test_the_same_seed_gives_the_same_gan(digit_shards):
    made = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)  # what the caller did before has no part in it
        args = parse(["--shards", str(digit_shards), "--batch", "16", "--seed", str(seed)])
        config = settings(args)
        generator, _ = train(config, open_index(config.data, ""), 100, 4, CPU)
        made.append(generate(generator, torch.arange(20) % 10, seed))
        assert not generator.training and made[-1].shape == (20, 1, 16, 16) and float(made[-1].abs().max()) <= 1
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_settings_come_from_the_run_and_the_command_line_wins(tmp_path, digit_shards):
    config = load_config(
        "digits",
        [f"data.shards={digit_shards}", "train.images=5000", "train.global_batch=48", "optim.lr=7e-4", "run.seed=9"],
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    found = settings(parse(["--run", str(tmp_path)]))
    assert (found.train.images, found.train.global_batch, found.optim.lr, found.run.seed) == (5000, 48, 7e-4, 9)
    assert found.data.shards == str(digit_shards) and found.data.image_size == 16
    found = settings(parse(["--run", str(tmp_path), "--batch", "8", "--lr", "1e-4", "--seed", "3", "--size", "32"]))
    assert (found.train.global_batch, found.optim.lr, found.run.seed, found.data.image_size) == (8, 1e-4, 3, 32)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (96, 3)])
def test_any_size_that_halves_and_both_networks_look_at_the_label(size, channels):
    torch.manual_seed(0)
    generator, judge = (kind(channels, size, 3, 4).eval() for kind in (Generator, Discriminator))
    z = torch.randn(1, 64).expand(2, 64)
    images = generator(z, torch.tensor([0, 1]))
    assert images.shape == (2, channels, size, size) and not torch.allclose(images[0], images[1])
    logits = judge(images[:1].expand(2, -1, -1, -1), torch.tensor([0, 1]))
    assert logits.shape == (2,) and logits[0] != logits[1]


@pytest.mark.parametrize(
    ("size", "found"), [(16, (4, 2)), (28, (7, 2)), (96, (6, 4)), (7, None), (18, None), (17, None)]
)
def test_halvings(size, found):
    if found is not None:
        assert halvings(size) == found
        return
    with pytest.raises(UserError, match=f"image size {size}"):
        halvings(size)


def test_losses_that_are_not_finite_end_it():
    class Noise:
        def next(self):
            pixels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
            return MicroBatch(0, np.arange(4), np.arange(4), pixels, torch.arange(4))

    with pytest.raises(RunFailed, match="lower the rate"):
        train_gan(Noise(), 20, 4, (1, 8, 8), 4, 1e30, 0, CPU, 4)


def test_bad_input(tmp_path, digit_shards, capsys):
    config = load_config("digits", [f"data.shards={digit_shards}"])
    for name, changes in (
        ("unlabelled", ["data.num_classes=null"]),
        ("synthetic", ["data.source=synthetic"]),
        ("untrained", []),
    ):
        (tmp_path / name).mkdir()
        other = load_config("digits", [f"data.shards={digit_shards}", *changes])
        (tmp_path / name / "config.yaml").write_text(other.to_yaml())
    assert config.data.num_classes == 10
    np.savez(tmp_path / "large.npz", images=np.zeros((30, 1, 8, 8), np.uint8), labels=np.zeros(30, np.int64))
    (tmp_path / "file").write_text("")
    real = ["--shards", str(digit_shards)]
    for words, says in (
        ([], "--shards FOLDER"),
        (["--run", tmp_path / "nothing"], "no run directory"),
        (["--run", tmp_path / "unlabelled"], "no labels"),
        (["--run", tmp_path / "synthetic"], "synthetic"),
        (["--run", tmp_path / "untrained"], "checkpoint"),
        (["--shards", tmp_path / "nothing"], "nothing"),
        ([*real, "--size", "17"], "image size 17"),
        ([*real, "--epochs", "0"], "--epochs"),
        ([*real, "--num", "5"], "--num"),
        ([*real, "--lr", "0"], "optim.lr"),
        ([*real, "--batch", "0"], "train.global_batch"),
        ([*real, "--images", tmp_path / "large.npz"], "(1, 8, 8)"),
        ([*real, "--out-dir", tmp_path / "file"], "this is a file"),
    ):
        assert main([str(word) for word in words]) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error, error
    assert not list(tmp_path.glob("*/gan"))
