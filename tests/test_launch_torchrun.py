"""torchrun: it starts the ranks again after one of them has died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment
from launched import command, said

import slurm
from slurm import until


def test_torchrun_starts_the_ranks_again_after_one_has_died(tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = subprocess.Popen(
        [*torchrun, "-m", *command(run, "data.source=synthetic", "train.images=1800", "checkpoint.every=120")],
        env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until(lambda: list((run / "checkpoints").glob("step_*[0-9]")), 120)
        (victim,) = [pid for pid in slurm.descendants(process.pid) if "RANK=1" in environ_of(pid)]
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert f"failed: rank 1 (process {victim} on " in output, output
    assert "continuing at step" in output and said(run)["code"] == 0


def environ_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []
