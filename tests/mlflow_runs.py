"""What the tests of MLflow share: starting runs, here and in processes of their own, and reading what has arrived."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpm_dist.tracking import Tracker

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = {"train": {"images": 1000, "range": [-1, 1]}, "run": {"name": "digits", "dir": None}, "extra": {}}


@pytest.fixture(autouse=True)
def no_outside_settings(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)


def start(run_dir: Path, uri: str | None = None, step: int = 0, config: dict = CONFIG, **options) -> Tracker:
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = SimpleNamespace(mlflow=True, uri=uri, experiment="trial")
    return Tracker(run_dir, settings, run_dir.name, config, step, **options)


def log(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log({"step": step, "images_seen": 8 * step, "loss": 1 / step, "time": 1.8e9 + step})


def client_of(uri: str):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def steps(client, run_id: str, key: str = "loss") -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run_id, key))


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


RUN = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from ddpm_dist.tracking import Tracker
folder, uri, first, last, end = Path(sys.argv[1]), sys.argv[2] or None, int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
folder.mkdir(parents=True, exist_ok=True)
tracker = Tracker(folder, SimpleNamespace(mlflow=True, uri=uri, experiment="trial"), folder.name, {"a": 1}, first - 1)
for step in range(first, last + 1):
    tracker.log({"step": step, "loss": 1 / step})
    time.sleep(0.001)
if end == "kill":
    while tracker.run_id is None:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if end != "leave":
    tracker.close(end, timeout=float(os.environ.get("CLOSE_SECONDS", 10)))
    print(tracker.run_id)
"""


def process(folder: Path, uri: str, first: int, last: int, end: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), uri, str(first), str(last), end],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
