"""Export of averages: those that were tracked, and widths put together from snapshots after the run."""

from __future__ import annotations

import json
import re
import shutil

import export_runs
import pytest
import torch
from conftest import lines, train
from export_runs import OPTIONS, damage, refused
from safetensors.torch import load_file

from ddpm_dist import export
from ddpm_dist.checkpoint import open_checkpoint

made, shards, run = export_runs.made, export_runs.shards, export_runs.run  # fixtures


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    square = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return (square / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5


def test_a_reconstructed_average_is_the_one_tracked_directly(run, shards, tmp_path, capsys):
    """A second run that tracks sigma_rel 0.08; averages do not influence training, so everything else is equal."""
    direct = ("ema.half_lives=[]", "ema.sigma_rels=[0.08]", "train.audit=true", "train.audit_params_every=40")
    result = train(tmp_path / "direct", *OPTIONS, *direct, shards=shards, ranks=2)
    assert result.returncode == 0, result.stderr
    assert lines(run / "audit.jsonl")[-1]["params"] == lines(tmp_path / "direct/audit.jsonl")[-1]["params"]
    for step in (30, 40):
        out = tmp_path / f"{step}.safetensors"
        assert export.main([str(run), "--ema-sigma-rel", "0.08", "--step", str(step), "--out", str(out)]) == 0
        assert re.search(r"relative residual of the profile [1-9]\.\de-03", capsys.readouterr().out)
        reader = open_checkpoint(tmp_path / f"direct/checkpoints/step_{step:08d}")
        wanted = {name.removeprefix("ema.0/"): reader.tensor(name) for name in reader.names("ema.0/")}
        made = load_file(out)
        found = difference(made, wanted)
        assert found < 1e-3
        tracked = open_checkpoint(run / f"checkpoints/step_{step:08d}")
        nearest = min(difference({name: tracked.tensor(f"ema.{k}/{name}") for name in made}, wanted) for k in (2, 3))
        assert found < nearest / 500, "not much better than the averages that were tracked"
    average = json.loads((tmp_path / "40.json").read_text())["origin"]["average"]
    assert average["sigma_rel"] == 0.08 and average["reconstructed_from_steps"] == list(range(2, 41, 2))
    assert 1e-3 < average["profile_residual"] < 1e-2


def test_a_snapshot_of_another_run_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert (
        train(tmp_path / "other", "train.images=48", "ema.snapshot_every=24", "ema.sigma_rels=[0.05]").returncode == 0
    )
    shutil.rmtree(tmp_path / "run/snapshots/step_00000004")
    shutil.copytree(tmp_path / "other/snapshots/step_00000004", tmp_path / "run/snapshots/step_00000004")
    assert (
        export.main([str(tmp_path / "run"), "--ema-sigma-rel", "0.08", "--out", str(tmp_path / "m.safetensors")]) == 2
    )
    refused(capsys, "step_00000004", "not of this run")


def test_a_tracked_width_is_taken_as_it_is(run, tmp_path):
    for arguments in (("--ema-sigma-rel", "0.1"), ("--ema", "3")):
        assert export.main([str(run), *arguments, "--out", str(tmp_path / f"{arguments[1]}.safetensors")]) == 0
    assert (tmp_path / "0.1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_a_damaged_snapshot_is_named_and_left_out(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run/snapshots/step_00000010/rank_00001.safetensors")
    out = tmp_path / "m.safetensors"
    assert export.main([str(tmp_path / "run"), "--ema-sigma-rel", "0.08", "--out", str(out)]) == 0
    refused(capsys, "step_00000010", "rank_00001.safetensors", "left out")
    assert 10 not in json.loads(out.with_suffix(".json").read_text())["origin"]["average"]["reconstructed_from_steps"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ema-sigma-rel", "0.27"), ["20 snapshot(s) of 0.05, 0.1", "residual", "at most 0.01"]),
        (("--ema-sigma-rel", "0.08", "--step", "2"), ["1 snapshot(s)", "ema.snapshot_every"]),
        (("--ema-sigma-rel", "0.5"), ["0.5", "0.001 .. 0.2887"]),
        (("--ema-sigma-rel", "nan"), ["nan", "0.001 .. 0.2887"]),
        (("--ema", "4"), ["--ema 4", "0 (half-life 100 images)", "3 (sigma_rel 0.1)", "none (the plain weights)"]),
        (("--ema", "-1"), ["--ema -1"]),
        (("--ema", "none", "--step", "6"), ["snapshots/step_00000006", "0 (half-life"]),
        (("--step", "7"), ["nothing at step 7", "checkpoints: 20, 30, 40", "snapshots of the averages: 2, 4"]),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_with_what_is(run, tmp_path, capsys, arguments, words):
    assert export.main([str(run), *arguments, "--out", str(tmp_path / "m.safetensors")]) == 2
    refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_run_without_power_function_averages_says_how_to_get_them(tmp_path, capsys):
    assert train(tmp_path / "run", "train.images=24", "ema.snapshot_every=12").returncode == 0
    capsys.readouterr()
    assert (
        export.main([str(tmp_path / "run"), "--ema-sigma-rel", "0.08", "--out", str(tmp_path / "m.safetensors")]) == 2
    )
    refused(capsys, "ema.sigma_rels=[0.05,0.10]", "ema.snapshot_every")
