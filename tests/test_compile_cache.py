"""What torch.compile makes stays beside the runs: a second start compiles nothing, and a folder of others is not used."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import environment

from ddpm_dist.compile_cache import NAME, VARIABLE, keep_beside


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.setenv(VARIABLE, "remembered")  # and given back at the end, whatever a test does
    monkeypatch.delenv(VARIABLE)


def test_the_folder_is_the_user_s_alone(tmp_path):
    assert keep_beside(tmp_path / "runs/one") is None
    folder = tmp_path / "runs" / NAME
    assert os.environ[VARIABLE] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    del os.environ[VARIABLE]
    folder.chmod(0o770)
    assert "chmod 700" in keep_beside(tmp_path / "runs/two") and VARIABLE not in os.environ


def test_what_the_environment_says_stays(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    assert keep_beside(tmp_path / "runs/one") is None
    assert os.environ[VARIABLE] == "/elsewhere" and not (tmp_path / "runs").exists()


def test_what_torch_itself_says_is_no_wish(tmp_path):
    code = (
        "import os, sys, torch._dynamo; from pathlib import Path; from ddpm_dist.compile_cache import VARIABLE, keep_beside\n"
        "keep_beside(Path(sys.argv[1])); print(os.environ[VARIABLE])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs" / "one")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == str(tmp_path / "runs" / NAME), done.stderr


def test_a_file_in_the_way_costs_nothing_but_the_cache(tmp_path):
    (tmp_path / NAME).touch()
    assert str(tmp_path / NAME) in keep_beside(tmp_path / "run") and VARIABLE not in os.environ


@pytest.mark.slow
def test_another_process_finds_what_the_first_has_compiled(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ddpm_dist.compile_cache import keep_beside\n"
        "assert keep_beside(Path(sys.argv[1])) is None\n"
        "import torch\n"
        "from torch._dynamo.utils import counters\n"
        "torch.compile(lambda x: (x * 2).relu().sum())(torch.rand(8, 8, requires_grad=True)).backward()\n"
        "print(counters['inductor']['fxgraph_cache_miss'], counters['inductor']['fxgraph_cache_hit'])\n"
    )
    said = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", code, str(tmp_path / "runs" / name)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        said.append([int(word) for word in done.stdout.split()])
    # Forward and backward, or both at once where torch keeps the pair (the autograd cache then answers for them).
    assert said[0][0] >= 1 and said[1][0] == 0, said
    assert list((tmp_path / "runs" / NAME).rglob("*.so"))
