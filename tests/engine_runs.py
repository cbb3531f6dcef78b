"""Starts many small runs on all engines (``several_runs.py``) for the tests that compare them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conftest import TINY, environment

HERE = Path(__file__).parent
ENGINES = {
    "ddp": (),
    **{f"zero{stage}": ("engine.name=deepspeed", f"engine.zero_stage={stage}") for stage in range(4)},
}


def several(
    folder: Path,
    *jobs: tuple[int, list[list[str]]],
    common: Sequence[str] = TINY,
    script: str | Path = "several_runs.py",
) -> None:
    """Train jobs one after the other, each (ranks, runs) with runs as lists of overrides, which come after the ``common`` ones.

    script: a file of this folder, or anywhere.
    """
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([{"ranks": ranks, "runs": [[*common, *run] for run in runs]} for ranks, runs in jobs]))
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(listed)],
        env=environment(SEVERAL_RUNS=str(HERE / "several_runs.py")),
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert f"finished {sum(len(runs) for _, runs in jobs)} runs" in done.stdout
