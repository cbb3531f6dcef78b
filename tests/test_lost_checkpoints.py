"""What is left of a run whose checkpoints are gone is not thrown away, and no older or foreign weights stand in for them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, lines, train

from ddpm_dist import export, sample
from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model
from ddpm_dist.models.weights import initialise_from, save_weights

GOLDEN = ROOT / "tests/golden/version_1/run"
TRAINED = ("train.images=72", "checkpoint.every=24", "ema.sigma_rels=[0.05, 0.1]", "ema.snapshot_every=12")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train(run, *TRAINED).returncode == 0
    shutil.rmtree(run / "checkpoints")
    return run


@pytest.mark.parametrize(
    "how, options",
    [("removed", TRAINED), ("elsewhere", TRAINED), ("killed", ("train.images=12", "model.width=8"))],
)
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(trained, tmp_path, how, options):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    if how == "elsewhere":
        (run / "checkpoints").symlink_to(tmp_path / "not_mounted")
    if how == "killed":  # no last words: the records alone speak
        (run / "exit.json").unlink()
    before = files_of(run)
    again = train(run, *options)
    assert again.returncode == 2 and "holds no checkpoint" in again.stderr, again.stdout + again.stderr
    assert ("not_mounted" in again.stderr) == (how == "elsewhere")
    assert files_of(run) == before, "everything that is left is still there"


def test_a_run_that_never_saved_starts_over(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "exit.json").unlink()
    records = lines(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in records[:4])
    )  # the second save begins
    assert train(run, *TRAINED).returncode == 0
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def reseal(folder: Path, **changes) -> None:
    body = {**json.loads((folder / "manifest.json").read_bytes())["manifest"], **changes}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"manifest": body, "sha256": seal}))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with two checkpoints."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").glob("step_*"))
    older = newest.with_name("step_00000001")
    if not older.exists():
        shutil.copytree(newest, older)
        reseal(older, step=1)
    return tmp_path / "run"


def read_with(program: str, run: Path, out: Path) -> int:
    if program == "export":
        return export.main([str(run), "--out", str(out / "model.safetensors")])
    return sample.main([str(run), "-n", "1", "--steps", "1", "--out", str(out / "one.png")])


@pytest.mark.parametrize("program", ["export", "sample"])
def test_an_older_checkpoint_does_not_stand_in_for_one_of_a_newer_version(run, tmp_path, capsys, program):
    reseal(max((run / "checkpoints").glob("step_*")), version=99)
    assert read_with(program, run, tmp_path) == 2
    said = capsys.readouterr().err
    assert "format version 99" in said and "use a newer ddpm_dist" in said and "trying" not in said
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.png"))


def test_checkpoints_that_were_set_aside_are_named(run, tmp_path, capsys):
    for folder in list((run / "checkpoints").glob("step_*")):
        folder.rename(folder.with_name(folder.name + ".corrupt"))
    assert read_with("export", run, tmp_path) == 2
    assert "step_00000001.corrupt" in capsys.readouterr().err
    assert read_with("export", run / "checkpoints", tmp_path) == 2


SMALL = {"in_channels": 1, "num_classes": 10, "width": 8, "channel_mults": [1, 2], "attention_levels": [1], "embedding_dim": 16,
         "image_size": 16}  # fmt: skip


@pytest.fixture
def weights(tmp_path) -> Path:
    network = build_model("unet_conditional", heads=2, **SMALL)
    path = tmp_path / "weights.safetensors"
    save_weights(path, network.state_dict(), "unet_conditional", {"heads": 2, **SMALL}, {"timesteps": 20})
    return path


def test_weights_of_another_network_with_the_same_shapes_are_refused(weights):
    network = build_model("unet_conditional", heads=4, **SMALL)
    with pytest.raises(UserError, match="model.heads is 2 in the file, 4 in the configuration"):
        initialise_from(weights, network, "unet_conditional", {"heads": 4, **SMALL})
    initialise_from(weights, network, "unet_conditional", {"heads": 2, **SMALL, "image_size": 32})


def test_weights_that_are_not_finite_are_refused(weights, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = torch.nan
    with safe_open(weights, "pt") as file:
        save_file(tensors, tmp_path / "nan.safetensors", file.metadata())
    network = build_model("unet_conditional", heads=2, **SMALL)
    with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
        initialise_from(tmp_path / "nan.safetensors", network, "unet_conditional", {"heads": 2, **SMALL})
    with pytest.raises(UserError, match="is a folder.*ddpm_dist.export"):
        initialise_from(tmp_path, network, "unet_conditional", {"heads": 2, **SMALL})
