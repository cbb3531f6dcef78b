"""What the tests of launchers share: the command that is launched, and what is looked at afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, lines, train
from made_once import made_once

from ddpm_dist import processes
from slurm import until

STEPS = ("data.source=synthetic", "train.images=72", "train.audit=true", "train.audit_params_every=3")
ENDLESS = ("data.source=synthetic", "train.images=100_000_000")


def command(folder: Path, *overrides: str) -> list[str]:
    """The trainer as a module with its arguments, to be put behind a launcher."""
    empty = folder.parent / "empty.yaml"
    empty.write_text("{}\n")
    return ["ddpm_dist.train", "--config", str(empty), f"run.dir={folder}", *TINY, *overrides]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """engine -> the audit of a run that torchrun started on 2 ranks."""

    def audit(engine: str) -> list[dict]:
        def make(folder: Path) -> None:
            done = train(folder / "run", *STEPS, f"engine.name={engine}", ranks=2)
            assert done.returncode == 0, done.stderr

        known = lines(made_once(tmp_path_factory, f"torchrun_{engine}", make) / "run/audit.jsonl")
        assert len(known) == 6 and "params" in known[-1]
        return known

    return audit


@pytest.fixture
def probe(tmp_path):
    """A script that prints rank, world size, local rank, local world size, meeting point and the launchers that it follows."""
    path = tmp_path / "probe.py"
    path.write_text(
        "import os\n"
        "from ddpm_dist import rendezvous as r\n"
        "r.join()\n"
        "names = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'\n"
        "print(*[os.environ.get(name) for name in names], *[r.processes.read(pid, 'comm').strip() for pid, _ in r._followed])\n"
    )
    return f"{sys.executable} {path}"


def said(run: Path) -> dict:
    """What exit.json says."""
    return json.loads((run / "exit.json").read_text())


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if processes.born(pid)]


def wait_for_steps(run: Path, process: subprocess.Popen, count: int = 3) -> None:
    def stepped() -> bool:
        assert process.poll() is None, process.communicate()
        return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= count

    until(stepped, 120)
