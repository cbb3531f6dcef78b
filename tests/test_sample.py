"""Sampling through its command: the same images for every number of processes and every batch, in every form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import run_module, train
from PIL import Image
from sampling import run_sample

from ddpm_dist.previews import class_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory, digit_shards):
    folder = tmp_path_factory.mktemp("sample") / "run"
    result = train(folder, "train.images=240", "optim.lr=1e-2", "checkpoint.every=120", shards=digit_shards)
    assert result.returncode == 0, result.stderr
    return folder


def images(source, tmp_path, *arguments, ranks=0, name="x"):
    out = tmp_path / f"{name}.npz"
    if ranks:  # "--", else torchrun of Python 3.11 reads --num as its --numa-binding
        result = run_module("ddpm_dist.sample", "--", source, "--out", out, *arguments, ranks=ranks)
    else:
        result = run_sample(source, "--out", out, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    with np.load(out) as arrays:
        return arrays["images"], arrays["labels"], result


def test_ranks_and_batches_do_not_change_the_images(run, tmp_path):
    whole, labels, result = images(run, tmp_path, "--num", "23")
    assert whole.shape == (23, 1, 16, 16) and whole.dtype == np.uint8 and whole.std() > 5
    assert labels.tolist() == [i % 10 for i in range(23)]
    assert "images/sec" in result.stdout
    cut, _, _ = images(run, tmp_path, "--num", "23", "--batch", "5", ranks=2)
    assert np.array_equal(whole, cut)
    fewer, _, _ = images(run, tmp_path, "--num", "7", "--batch", "4")
    assert np.array_equal(whole[:7], fewer)
    other, _, _ = images(run, tmp_path, "--num", "7", "--seed", "1")
    assert not np.array_equal(fewer, other)


def test_classes_guidance_average_and_checkpoint_matter(run, tmp_path):
    base, labels, _ = images(run, tmp_path, "--num", "6", "--classes", "6,3")
    assert labels.tolist() == [6, 3, 6, 3, 6, 3]
    for change in (
        ("--guidance", "1"),
        ("--guidance", "0"),
        ("--thresholding", "clip"),
        ("--variance", "posterior"),
        ("--ema", "1"),
        ("--ema", "none"),
        ("--steps", "5"),
        ("--sampler", "ddim", "--eta", "0.5"),
        ("--sampler", "unipc", "--steps", "5"),
        ("--guidance-interval", "5", "9"),
        ("--guidance-rescale", "0.7"),
    ):
        changed, _, _ = images(run, tmp_path, "--num", "6", "--classes", "6,3", *change)
        assert not np.array_equal(base, changed), change
    for same in (
        ("--guidance", "2"),
        ("--guidance-weight", "1"),
        ("--variance", "1"),
        ("--guidance-interval", "0", "19"),
    ):
        own, _, _ = images(run, tmp_path, "--num", "6", "--classes", "6,3", *same)
        assert np.array_equal(base, own), f"what the run does by itself: {same}"
    older, _, _ = images(run / "checkpoints/step_00000010", tmp_path, "--num", "6", "--classes", "6,3")
    assert not np.array_equal(base, older)
    unguided, _, _ = images(run, tmp_path, "--num", "6", "--classes", "6,3", "--guidance", "0")
    others, _, _ = images(run, tmp_path, "--num", "6", "--classes", "1", "--guidance", "0")
    assert np.array_equal(unguided, others), "guidance 0 is unconditional"


def test_every_form_shows_the_same_images(run, tmp_path):
    whole, labels, _ = images(run, tmp_path, "--num", "20")
    result = run_module(
        "ddpm_dist.sample", run, "-n", "20", "--out", tmp_path / "grid.png", "--gif", tmp_path / "reverse.gif",
        "--out-dir", tmp_path / "folder", ranks=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == [*(f"{i:06d}_{i % 10}.png" for i in range(20)), "sample.json"]
    for i, name in enumerate(names[:-1]):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / name)), whole[i, 0])
    with Image.open(tmp_path / "reverse.gif") as gif:
        assert 15 <= gif.n_frames <= 48
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 5


def test_rows_of_a_grid_are_classes():
    pictures = np.arange(25, dtype=np.uint8).reshape(25, 1, 1, 1)
    grid, columns = class_rows(pictures, np.arange(25) % 10)
    assert columns == 3 and grid.shape[0] == 30
    assert grid[:, 0, 0, 0].reshape(10, 3)[4].tolist() == [4, 14, 24]
    assert grid[:, 0, 0, 0].reshape(10, 3)[9].tolist() == [9, 19, 255]
    assert class_rows(pictures, np.full(25, 6))[1] == 5
    assert class_rows(np.zeros((60, 1, 1, 1), np.uint8), np.arange(60) % 2)[1] == 15  # two even rows each


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--classes", "12"), ["unknown class '12'", "0, 1, 2"]),
        (("--classes", "frog"), ["unknown class 'frog'"]),
        (("--num", "0"), ["--num 0"]),
        (("--guidance", "-1"), ["--guidance"]),
        (("--ema", "7"), ["--ema 7", "2 averages"]),
        (("--ema", "x"), ["--ema x"]),
        (("--steps", "21"), ["--steps 21", "1..20"]),
        (("--out", "x.jpeg"), ["x.jpeg", ".png"]),
        (("--gif", "x.png"), [".gif"]),
    ],
)
def test_bad_arguments(run, tmp_path, arguments, words):
    result = run_sample(run, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_targets_are_checked_before_the_work(run, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    for arguments in (("--out", "folder.png"), ("--out", "file/x.png"), ("--out-dir", "file"), ("--gif", "file/x.gif")):
        result = run_sample(run, "--num", "2", arguments[0], tmp_path / arguments[1])
        assert result.returncode == 2 and "file" in result.stderr + "folder" and "Traceback" not in result.stderr
        assert "images/sec" not in result.stdout


def test_names_of_classes_go_before_numbers():
    from types import SimpleNamespace

    from ddpm_dist.sample_source import choose_labels

    source = SimpleNamespace(num_classes=4, classes=["0", "1", "10", "2"], title="run")
    assert choose_labels("2,10,3", 3, source).tolist() == [3, 2, 3]


@pytest.mark.parametrize(
    "wrong",
    [{"timesteps": 0}, {"timesteps": "a"}, {"t_min": 2000}, {"schedule": "warp"}, {"range": [1]}, {"beta_start": -1.0},
     {"prediction": "score"}, {"schedule": "mixing", "prediction": "v"}, {"noise": "uniform"}],
)  # fmt: skip
def test_a_weights_file_with_a_hostile_description_is_refused(tmp_path, wrong):
    from ddpm_dist.errors import UserError
    from ddpm_dist.sample_source import schedule_of

    with pytest.raises(UserError, match="cannot be sampled"):
        schedule_of({"timesteps": 10, **wrong})


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"nonsense")
    for source, word in (
        ("nowhere", "does not exist"),
        ("empty", "no checkpoint yet"),
        ("file.safetensors", "file.safetensors"),
    ):
        result = run_module("ddpm_dist.sample", tmp_path / source)
        assert result.returncode == 2 and word in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_a_converted_file_loads_in_three_lines_and_samples(tmp_path):
    import ddpm_dist
    from ddpm_dist.diffusion import sample
    from ddpm_dist.models import build_model, save_weights

    keywords = {
        "in_channels": 1,
        "num_classes": 3,
        "width": 4,
        "channel_mults": [1, 2],
        "image_size": 8,
        "embedding_dim": 8,
    }
    network = build_model("unet_conditional", **keywords)
    diffusion = {"timesteps": 12, "t_min": 1, "schedule": "linear", "range": [0.0, 1.0]}
    save_weights(tmp_path / "w.safetensors", network.state_dict(), "unet_conditional", keywords, diffusion)
    loaded = ddpm_dist.load(str(tmp_path / "w.safetensors"))
    x = sample(loaded, torch.tensor([0, 1, 2]), seed=3)
    assert x.shape == (3, 1, 8, 8) and loaded.schedule.timesteps == 12 and loaded.schedule.t_min == 1
    via_command, labels, _ = images(
        tmp_path / "w.safetensors", tmp_path, "--num", "3", "--seed", "3", "--guidance", "3"
    )
    from ddpm_dist.diffusion import to_uint8

    assert labels.tolist() == [0, 1, 2]
    assert np.abs(to_uint8(x, [0.0, 1.0]).numpy().astype(int) - via_command).max() <= 1
