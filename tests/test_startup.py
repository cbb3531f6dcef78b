"""The start of a run is measured with real training commands, and its compile cache is really empty first and really used then."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
from conftest import ROOT

from benchmarks import startup
from benchmarks.report_schema import Startup
from ddpm_dist.errors import RunFailed, UserError

# One level without attention: the least that compiles.
LEAST = [
    "data.image_size=8", "data.channels=1", "data.num_classes=null", "model.width=4", "model.channel_mults=[1]", "model.attention_levels=[]",
    "model.embedding_dim=8", "model.heads=1", "diffusion.timesteps=20",
]  # fmt: skip


def arguments(tmp_path, *overrides: str, **values) -> argparse.Namespace:
    (tmp_path / "empty.yaml").write_text("{}\n")
    given = {
        "config": str(tmp_path / "empty.yaml"),
        "processes": 1,
        "batch": 2,
        "repeats": 1,
        "overrides": [*LEAST, *overrides],
    }
    return argparse.Namespace(**{**given, **values})


@pytest.mark.slow
def test_the_second_start_compiles_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    target, args = tmp_path / "report.json", arguments(tmp_path)
    assert (
        startup.main(
            ["--config", args.config, "--batch", "2", "--repeats", "1", "--json", str(target), *args.overrides]
        )
        == 0
    )
    report = json.loads(target.read_text())
    Startup.model_validate(report)
    first, second = (report["starts"][kind] for kind in ("first", "second"))
    assert first["files_compiled"] > 10 and second["files_compiled"] == 0
    assert second["first_step_s"] < first["first_step_s"] < first["until_first_step_s"] < first["total_s"]
    assert report["second_to_first_turns"] == [second["until_first_step_s"] / first["until_first_step_s"]]
    assert "the second start takes" in capsys.readouterr().out


def test_a_start_that_fails_is_said(tmp_path):
    with pytest.raises(RunFailed, match=r"ended with code 2(.|\n)*does not exist"):
        startup.start(arguments(tmp_path, config=str(tmp_path / "none.yaml")), [], tmp_path / "run")


def test_without_compiling_there_is_nothing_to_compare(tmp_path):
    with pytest.raises(UserError, match=r"train.compile=false"):
        startup.measure(arguments(tmp_path, "train.compile=false"))


def test_several_ranks_share_the_batch(tmp_path):
    words = startup.fitted(arguments(tmp_path, processes=3), on_gpu=True)
    assert "train.global_batch=6" in words and not any(word.startswith("train.precision") for word in words)


def test_what_was_compiled_elsewhere_is_no_first_start(tmp_path, monkeypatch):
    """A start that found compiled programs in another place would pass for a quick one."""
    monkeypatch.setattr(startup, "start", lambda *_: {"until_first_step_s": 1.0, "first_step_s": 0.5, "total_s": 2.0})
    monkeypatch.setattr(sys, "executable", "true")
    with pytest.raises(RunFailed, match="left nothing in .compile_cache"):
        startup.measure(arguments(tmp_path))
