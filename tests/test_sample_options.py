"""Options of sampling: which go together, what holds where they are not given, and what a folder remembers of them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from sampling import run_sample, weights_file

from ddpm_dist.sample_options import parse, resolve, settings_of
from ddpm_dist.sample_source import open_source


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights files: labelled, unlabelled, and of a mixing schedule."""
    folder = tmp_path_factory.mktemp("weights")
    mixing = {"schedule": "mixing", "noise": "uniform", "prediction": "x0", "range": [0.0, 1.0]}
    return {
        "labelled": weights_file(folder / "labelled.safetensors"),
        "unlabelled": weights_file(folder / "unlabelled.safetensors", num_classes=None),
        "mixing": weights_file(folder / "mixing.safetensors", mixing),
    }


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        ("labelled", "--sampler magic", "invalid choice"),
        ("labelled", "--sampler mixing", "does not go with schedule 'linear'"),
        ("mixing", "--sampler ddim", "does not go with schedule 'mixing'"),
        ("labelled", "--steps 13", "--steps 13: labelled.safetensors was trained on 12 timesteps, choose 1..12"),
        ("labelled", "--sampler unipc --steps 0", "--steps 0"),
        ("labelled", "--spacing wide", "invalid choice"),
        ("labelled", "--classes 3", "unknown class '3'"),
        ("labelled", "--guidance 1,x", "--guidance 1,x: must be numbers of at least 0"),
        ("labelled", "--guidance 1,nan", "--guidance 1,nan"),
        ("labelled", "--guidance 1,1.0", "the same number twice"),
        ("labelled", "--guidance-weight=-2", "must be numbers of at least -1"),
        ("labelled", "--guidance-weight -2,0", "must be numbers of at least -1"),
        ("labelled", "--guidance 1 --guidance-weight 0", "not allowed with argument"),
        ("labelled", "--guidance 1,2 --out-dir FOLDER/x", "one guidance scale, not 1, 2"),
        ("labelled", "--guidance-interval 5 2", "the lower one first"),
        ("labelled", "--guidance-interval 5 12", "timesteps of labelled.safetensors are 0..11"),
        ("labelled", "--guidance-interval 5", "expected 2 arguments"),
        ("labelled", "--guidance-rescale 1.5", "--guidance-rescale 1.5"),
        ("unlabelled", "--guidance 3", "--guidance 3: unlabelled.safetensors was trained without labels"),
        ("unlabelled", "--guidance-weight 0,2", "trained without labels; leave --guidance-weight out"),
        (
            "unlabelled",
            "--guidance-interval 0 3",
            "--guidance-interval 0 3: unlabelled.safetensors was trained without",
        ),
        ("unlabelled", "--guidance-rescale 0.5", "trained without labels"),
        ("labelled", "--eta 0.5", "--eta is for --sampler ddim only, not for ddpm"),
        ("labelled", "--sampler ddim --eta 2", "--eta 2"),
        ("labelled", "--sampler ddim --variance 0.5", "--variance is for --sampler ddpm only"),
        ("labelled", "--variance 2", "variance 2.0"),
        ("labelled", "--variance large", "neither beta nor posterior nor a number"),
        ("labelled", "--percentile 0.9", "--thresholding dynamic only"),
        ("labelled", "--thresholding dynamic --percentile 0", "--percentile 0"),
        ("labelled", "--with-real --out FOLDER/x.npz", "name it with --out NAME.png"),
        ("labelled", "--shards FOLDER", "needs --with-real or --forward-process"),
        ("labelled", "--steps-picture FOLDER/x.gif", "must end in .png"),
        ("labelled", "--forward-process FOLDER/x.jpeg", "must end in .png"),
        ("labelled", "--part 0/2 --out-dir FOLDER/x --steps-picture FOLDER/x.png", "nor another picture"),
        ("labelled", "--with-real --out FOLDER/x.png", "does not say which shards it was trained on"),
        ("labelled", "--with-real --shards FOLDER/none --out FOLDER/x.png", "does not exist"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(files, tmp_path, kind, words, told):
    chosen = words.replace("FOLDER", str(tmp_path)).split()
    if "--out" not in words and "--out-dir" not in words:
        chosen += ["--out", str(tmp_path / "grid.png")]
    result = run_sample(files[kind], "-n", "4", *chosen)
    assert result.returncode == 2, result.stdout + result.stderr
    assert told in " ".join(result.stderr.split()) and "Traceback" not in result.stderr, result.stderr
    assert os.listdir(tmp_path) == []


def test_a_configuration_has_no_weights(tmp_path):
    (tmp_path / "own.yaml").write_text("{}\n")
    result = run_sample(tmp_path / "own.yaml", "--out", tmp_path / "x.png")
    assert result.returncode == 2 and "only --forward-process works with one" in result.stderr


def how(path, *words):
    a = parse([str(path), *words], None)
    a.num = 4
    source = open_source(path, None)
    plan = resolve(a, source)
    return plan, settings_of(a, source, plan)


def test_what_is_not_said_comes_from_the_file(files, tmp_path):
    plan, _ = how(files["labelled"])
    assert plan.scales == [3.0] and plan.options["sampler"] == "ddpm" and plan.timesteps == [*range(11, -1, -1)]
    assert how(files["labelled"], "--guidance-weight", "-0.5,0")[0].scales == [0.5, 1.0]
    plan, _ = how(files["labelled"], "--guidance-weight", "0,0.5,2", "--sampler", "heun", "--steps", "4")
    assert plan.scales == [1.0, 1.5, 3.0] and len(plan.timesteps) == 7 and not plan.every_timestep
    assert how(files["unlabelled"])[0].scales == [0.0]
    assert how(files["mixing"], "--steps", "5")[0].options["sampler"] == "mixing"

    from dataclasses import replace

    from ddpm_dist.models.weights import Description

    source = open_source(files["labelled"], None)
    says = {"sampler": "ddim", "steps": 6, "spacing": "trailing", "eta": 0.25, "guidance": 1.5, "guidance_rescale": 0.5,
            "guidance_interval": [2, 9], "thresholding": "dynamic", "percentile": 0.9}  # fmt: skip
    assert Description("x", {}, {}, None, says).sampling == says  # as an exported file carries it
    a = parse([str(files["labelled"]), "--eta", "0"], None)
    plan = resolve(a, replace(source, sampling=says))
    assert {key: plan.options[key] for key in says if key != "guidance"} == {
        key: value for key, value in {**says, "eta": 0.0}.items() if key != "guidance"
    }
    assert plan.scales == [1.5] and plan.timesteps == [11, 9, 7, 5, 3, 1]


def test_a_folder_remembers_what_has_an_effect_and_nothing_else(files, tmp_path):
    path = files["labelled"]
    plain = how(path)[1]
    assert plain["sampler"] == "ddpm" and plain["variance"] == "beta" and plain["steps"] == 12
    assert not {"eta", "spacing", "percentile", "guidance_interval", "guidance_rescale"} & set(plain)
    assert how(path, "--spacing", "trailing")[1] == plain, "every timestep is visited whatever the spacing"
    for words, key, value in (
        (("--steps", "4"), "spacing", "linspace"),
        (("--sampler", "ddim"), "eta", 0.0),
        (("--thresholding", "dynamic"), "percentile", 0.995),
        (("--guidance-interval", "2", "5"), "guidance_interval", [2, 5]),
        (("--guidance-rescale", "0.7"), "guidance_rescale", 0.7),
    ):
        assert how(path, *words)[1][key] == value
    assert "variance" not in how(path, "--sampler", "ddim")[1]
    assert "guidance_rescale" not in how(path, "--guidance", "1", "--guidance-rescale", "0.7")[1]
    json.dumps(how(path, "--guidance-interval", "2", "5")[1])


def test_several_scales_in_one_file_of_arrays(files, tmp_path):
    result = run_sample(files["labelled"], "-n", "5", "--guidance", "1,3", "--out", tmp_path / "both.npz")
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "both.npz") as arrays:
        both = dict(arrays)
    assert both["images"].shape == (10, 1, 8, 8) and both["labels"].tolist() == [0, 1, 2, 0, 1] * 2
    assert both["guidance"].tolist() == [1.0] * 5 + [3.0] * 5
    for scale in (1, 3):
        run_sample(files["labelled"], "-n", "5", "--guidance", scale, "--out", tmp_path / "one.npz")
        with np.load(tmp_path / "one.npz") as one:
            assert np.array_equal(one["images"], both["images"][both["guidance"] == scale])
            assert "guidance" not in one


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun"])
def test_batches_of_every_sampler_make_the_same_images(files, tmp_path, sampler):
    found = []
    for batch in (7, 3):
        out = tmp_path / f"{batch}.npz"
        words = ("-n", "7", "--sampler", sampler, "--steps", "4", "--batch", batch, "--out", out)
        assert run_sample(files["labelled"], *words).returncode == 0
        with np.load(out) as arrays:
            found.append(arrays["images"])
    # Libraries may round otherwise in another batch; a pixel is then one level off.
    assert np.abs(found[0].astype(int) - found[1]).max() <= 1 and found[0].std() > 1


def test_an_answer_that_is_not_finite_is_named(files, tmp_path, monkeypatch):
    from ddpm_dist.models.unet_conditional import UnetConditional

    forward = UnetConditional.forward
    monkeypatch.setattr(
        UnetConditional, "forward", lambda self, x, t, y=None: forward(self, x, t, y) / (t != 7).view(-1, 1, 1, 1)
    )
    result = run_sample(files["labelled"], "-n", "4", "--out", tmp_path / "x.png")
    assert result.returncode == 2 and "timestep 7 (evaluation 5 of 12)" in result.stderr, result.stderr
    assert os.listdir(tmp_path) == []
