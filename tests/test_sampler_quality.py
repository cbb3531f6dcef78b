"""benchmarks.sampler_quality: every sampler of a run judged by the same classifier."""

from __future__ import annotations

import json

import pytest
from conftest import train

from benchmarks.sampler_quality import main


@pytest.fixture(scope="module")
def run(tmp_path_factory, digit_shards):
    folder = tmp_path_factory.mktemp("run") / "run"
    done = train(folder, "train.images=24", shards=digit_shards)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_sampler_gets_a_row_and_its_scores(run, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main([str(run), "--samplers", "ddpm:3,heun:2", "--num", "40", "--json", str(report)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["ddpm:3", "3"], ["heun:2", "3"]]
    assert table[3].startswith("real images")
    found = json.loads(report.read_text())["found"]
    assert [each["sampler"] for each in found] == ["ddpm:3", "heun:2"]
    # An untrained network's noise is no digit, and the real ones are recognised.
    assert all(each["scores"]["recognized"] < 0.5 < each["scores"]["held_out_accuracy"] for each in found)
    assert found[0]["scores"]["frechet"] != found[1]["scores"]["frechet"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--samplers", "ddim:21"], "steps must lie in 1..20"),
        (["--samplers", "euler"], "unknown sampler 'euler'"),
        (["--num", "5"], "at least 20 images"),
        (["--json", "/nowhere/report.json"], "its folder does not exist"),
        (["--shards", "/nowhere", "--samplers", "ddpm:3"], "/nowhere"),
    ],
)
def test_bad_input(run, words, says, capsys):
    assert main([str(run), *words]) == 2
    assert says in capsys.readouterr().err
