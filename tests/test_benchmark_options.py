"""What a benchmark sets itself is not taken from the command line, and what cannot be is refused before anything is measured."""

from __future__ import annotations

import importlib

import pytest

SMALL = ["model.width=8", "data.image_size=16"]


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("train_throughput", ["train.global_batch=64"], "choose the images of a step with --batch"),
        ("train_throughput", ["data.source=shards"], "choose with --source"),
        ("train_throughput", ["run.dir=/somewhere"], "a folder of its own"),
        ("train_throughput", ["--reference-workers", "-1"], "--reference-workers must be at least 0"),
        ("startup", ["run.dir=/somewhere"], "a folder of its own"),
        ("startup", ["model.bogus=3"], "bogus"),
        ("ladder", ["--memory-gb", "-3"], "--memory-gb must be at least 0.5, not -3.0"),
        ("kernels", ["--memory-gb", "nan"], "--memory-gb must be at least 0.5, not nan"),
        ("activations", ["--memory-gb", "0.001"], "--memory-gb must be at least 0.5"),
        ("sampling", ["--turn-seconds", "-1"], "--turn-seconds must not be negative"),
        ("ladder", ["--markdown", "/nowhere/at/all.md"], "--markdown /nowhere/at/all.md: its folder does not exist"),
    ],
)
def test_refused(name, words, said, capsys, tmp_path):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.main([*words, *SMALL]) == 2
    assert said in capsys.readouterr().err


def test_a_report_cannot_be_a_folder(tmp_path, capsys):
    from benchmarks import kernels

    assert kernels.main(["--json", str(tmp_path), *SMALL]) == 2
    assert f"--json {tmp_path}: that is a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoint", "engines", "scaling"])
def test_a_run_of_the_user_is_never_the_scratch_folder(name, tmp_path, capsys, alone):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.main([f"run.dir={tmp_path / 'mine'}", *SMALL]) in (1, 2)
    assert "a folder of its own" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
