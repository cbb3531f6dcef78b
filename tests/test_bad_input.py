"""Whatever is wrong is said before anything is written: what, where, what to do; exit code 2."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_module, train


def refused(result, *words):
    assert result.returncode == 2, result.stdout + result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_the_flagship_without_shards_shows_the_pack_command(tmp_path):
    result = run_module("ddpm_dist.train", cwd=tmp_path)
    refused(result, "shards/cifar64", "python -m ddpm_dist.pack cifar10 --out shards/cifar64 --size 64", "--download")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("optim.lrr=1",), ["optim.lrr", "did you mean optim.lr?"]),
        (("model.widht=8",), ["widht", "width"]),
        (("model.name=unet_conditionall",), ["unet_conditionall", "unet_conditional"]),
        (("data.image_size=15",), ["15"]),
        (("train.micro_batch=5",), ["micro_batch=5", "1, 2, 3, 4, 6 or 12"]),
        (("data.shards=/nowhere", "data.source=shards"), ["/nowhere", "does not exist"]),
        (("train.init_from=/nowhere.safetensors",), ["/nowhere.safetensors"]),
    ],
)
def test_bad_configurations(tmp_path, overrides, words):
    refused(train(tmp_path / "run", "train.images=24", *overrides), *words)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_ranks_that_do_not_fit_the_batch_are_said_once_and_the_code_is_passed_on(tmp_path):
    said = tmp_path / "code.json"
    result = train(tmp_path / "run", "train.images=24", "train.global_batch=9", ranks=2, DDPM_DIST_EXIT_JSON=str(said))
    assert result.returncode != 0
    assert result.stderr.count("error: train.global_batch=9 is not divisible by 2 ranks: use 8 or 10") == 1
    assert json.loads(said.read_text())["code"] == 2


def test_the_code_of_an_earlier_start_is_not_passed_on(tmp_path):
    said = tmp_path / "code.json"
    said.write_text('{"code": 0, "reason": "done", "step": 5}')
    poison = ("train.max_skipped_steps=1", "optim.lr=1e30", "train.images=240")  # ends with code 1
    result = train(tmp_path / "run", *poison, DDPM_DIST_EXIT_JSON=str(said))
    assert result.returncode == 1 and "was not finite" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(said.read_text())["code"] == 1
    assert train(tmp_path / "run", options=("--print-config",), DDPM_DIST_EXIT_JSON=str(said)).returncode == 0
    assert json.loads(said.read_text())["code"] == 0


def damaged(digit_shards, tmp_path, change):
    folder = tmp_path / "shards"
    shutil.copytree(digit_shards, folder)
    change(folder)
    return train(tmp_path / "run", "train.images=24", shards=folder)


def first_shard(folder):
    return sorted(folder.glob("*.tar"))[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()], ["is empty", "data.shards"]),
        (lambda f: (f / "index.npy").unlink(), ["index.npy"]),
        (lambda f: first_shard(f).unlink(), [".tar"]),
        (lambda f: os.truncate(first_shard(f), 10_240), [".tar", "bytes"]),
        (lambda f: (f / "index.json").write_text("{"), ["index.json"]),
        (lambda f: os.truncate(f / "index.npy", 1000), ["index.npy"]),
    ],
)
def test_shards_that_do_not_match_their_index(digit_shards, tmp_path, change, words):
    refused(damaged(digit_shards, tmp_path, change), *words)


def test_a_changed_image_stops_the_run_by_name(digit_shards, tmp_path):
    def flip(folder):
        data = bytearray(first_shard(folder).read_bytes())
        for position in range(600, len(data), 1024):
            data[position] ^= 4
        first_shard(folder).write_bytes(data)

    result = damaged(digit_shards, tmp_path, flip)
    refused(result, first_shard(digit_shards).name + ":")


def test_a_changed_image_that_only_one_rank_meets_is_still_named_and_passed_on(digit_shards, tmp_path):
    from ddpm_dist.data.order import SampleOrder
    from ddpm_dist.data.shards import Index

    folder = tmp_path / "shards"
    shutil.copytree(digit_shards, folder)
    index = Index.load(folder)
    _, ids = SampleOrder(len(index), 0).locate(np.arange(24, 36))  # the third step
    victim = int(ids[-1])  # a slot of rank 1
    shard = folder / index.shards[int(index.shard_of(np.array(victim)))].name
    data = bytearray(shard.read_bytes())
    data[int(index.samples["offset"][victim]) + 20] ^= 1
    shard.write_bytes(data)
    said = tmp_path / "code.json"
    result = train(tmp_path / "run", "train.images=600", shards=folder, ranks=2, DDPM_DIST_EXIT_JSON=str(said))
    assert result.returncode != 0
    assert f"error (rank 1): {shard.parent / shard.name}:{index.key_of(victim)}" in result.stderr
    assert json.loads(said.read_text())["code"] == 2
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 2


def test_labels_outside_the_classes(digit_shards, tmp_path):
    result = train(tmp_path / "run", "train.images=24", "data.num_classes=7", shards=digit_shards)
    refused(result, "outside 0..6", "data.num_classes=10")


def test_a_data_set_that_changed_under_a_run_is_refused(digit_shards, tmp_path):
    from ddpm_dist.pack import pack

    run = tmp_path / "run"
    assert train(run, "train.images=24", shards=digit_shards).returncode == 0
    moved = tmp_path / "moved"
    shutil.copytree(digit_shards, moved)
    assert train(run, "train.images=36", shards=moved).returncode == 0  # the same data elsewhere is the same data
    pack("digits", tmp_path / "other", samples_per_shard=600)
    refused(train(run, "train.images=60", shards=tmp_path / "other"), "fingerprint", "run.name")


def test_print_config_shows_the_result_and_runs_nothing(tmp_path):
    result = run_module(
        "ddpm_dist.train", "train.images=7", "--config", "digits", "--print-config", "optim.lr=2e-4", cwd=tmp_path
    )
    assert result.returncode == 0 and "lr: 0.0002" in result.stdout and "width: 32" in result.stdout, result.stderr
    assert "{images: 7," in result.stdout
    assert list(tmp_path.iterdir()) == []
    refused(run_module("ddpm_dist.train", "--config", "digits", "--print-config", "model.widht=2"), "widht")


def test_every_entry_point_explains_itself():
    for module in ("train", "sample", "export", "pack", "convert", "evaluate"):
        result = run_module(f"ddpm_dist.{module}", "--help", cwd=ROOT)
        assert result.returncode == 0 and "usage:" in result.stdout
