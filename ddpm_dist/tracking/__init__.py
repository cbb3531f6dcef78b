"""What a run leaves behind while it runs: metrics.jsonl, MLflow, a progress display and pictures."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from pathlib import Path
from typing import Protocol

from ddpm_dist.tracking.metrics import JsonLines, Workplace, cut_back
from ddpm_dist.tracking.progress import Progress, warn

__all__ = ["Progress", "Settings", "Tracker", "cut_back"]

CLOSE_SECONDS = 10.0

# MLflow's own retries block for minutes; the worker thread has its own, which close() can interrupt. MLflow's usage
# statistics need the internet, which compute nodes do not have. What the user has set in the environment stays.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Settings(Protocol):
    """The configuration's tracking section."""

    mlflow: bool
    uri: str | None
    experiment: str


class Tracker:
    """Rank 0's record of a run: metrics.jsonl first, then MLflow through a bounded queue that training never waits for.

    The MLflow store is ``settings.uri``, else the environment's ``MLFLOW_TRACKING_URI``, else a sqlite file
    ``mlflow.db`` in the run directory's parent with the artifacts in ``mlartifacts`` beside it.

    Everything that touches MLflow, its import included, happens in one daemon thread. ``run_dir/tracking.json`` keeps
    the MLflow run id and the last step that MLflow has confirmed. What was not delivered (server away, queue overflown,
    process killed) is read again from metrics.jsonl when the server answers again or the run is continued; steps that
    MLflow has already are not sent twice. Pictures are not sent again: those still queued when the process ends stay
    in the run directory and are counted in the warning of ``close``.

    Args:
        run_dir: the run directory; must exist.
        settings: the configuration's tracking section.
        run_name: name shown by MLflow.
        config: resolved configuration; becomes MLflow parameters with dotted keys.
        step: the completed step the run continues from (0 = new). metrics.jsonl is cut back to it.
        run_id: the MLflow run that a checkpoint remembers; ``tracking.json``, being newer, goes before it.
        tags: MLflow tags; a run that is continued gets them, too.
        workplace: where new versions of metrics.jsonl and tracking.json are made; None: beside them.

    Raises:
        UserError: metrics.jsonl cannot be cut back.
        OSError: metrics.jsonl cannot be opened.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Settings,
        run_name: str,
        config: dict,
        step: int,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        workplace: Workplace | None = None,
    ) -> None:
        run_dir = Path(run_dir).absolute()
        metrics = run_dir / "metrics.jsonl"
        cut_back(metrics, step, workplace)
        self._lines = JsonLines(metrics)
        self._worker = None
        if not settings.mlflow:
            return
        if importlib.util.find_spec("mlflow") is None:
            warn(
                "MLflow is not installed, so the run is recorded in metrics.jsonl only; "
                "'pip install \"mlflow>=3.11\"' adds it, tracking.mlflow=false silences this"
            )
            return
        for name, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from ddpm_dist.tracking.mlflow_queue import Worker
        from ddpm_dist.tracking.mlflow_store import Job

        uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.parent / 'mlflow.db'}"
        job = Job(
            run_dir=run_dir,
            uri=uri,
            database=sqlite_file(uri),
            artifacts=artifact_folder(uri, run_dir.parent),
            experiment=settings.experiment,
            run_name=run_name,
            params=flatten(config),
            tags=tags or {},
            run_id=run_id,
            workplace=workplace,
        )
        self._worker = Worker(job)
        self._worker.start()

    def log(self, record: dict) -> None:
        """Append one JSON line and queue it for MLflow. Returns in microseconds whatever the server does.

        Args:
            record: needs an int ``step``; ``time`` (seconds since 1970) is added if missing. Non-finite floats become
                ``null``, and MLflow does not get them. A full disk warns once and training goes on.
        """
        if type(record.get("step")) is not int:
            raise ValueError(f"a log record needs an integer step, got {record.get('step')!r}")
        if "time" not in record:
            record = {**record, "time": time.time()}
        self._lines.append(record)
        if self._worker is not None:
            self._worker.put_record(record)

    def picture(self, path: Path, step: int) -> None:
        """Queue a picture file as artifact ``samples/<file name>``; the file must stay where it is until ``close``."""
        if self._worker is not None:
            self._worker.put_picture(Path(path).absolute(), step)

    def close(self, status: str, timeout: float = CLOSE_SECONDS) -> None:
        """End the record: "FINISHED", "FAILED" or "KILLED" (stopped, to be continued). May be called twice.

        Waits at most ``timeout`` seconds for a server that does not answer; up to three times as long while deliveries
        succeed, and while MLflow is imported or a sqlite file opened. What was not delivered is said on stderr.
        """
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status must be FINISHED, FAILED or KILLED, not {status!r}")
        self._lines.close()
        if self._worker is not None:
            self._worker.finish(status, timeout)

    def abandon(self) -> None:
        """Stop without a word to MLflow or the run directory: another process records this run now."""
        self._lines.close()
        if self._worker is not None:
            self._worker.abandon()

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, None before it exists (and without MLflow)."""
        return None if self._worker is None else self._worker.run_id


def flatten(config: dict, prefix: str = "") -> dict[str, str]:
    """A nested configuration as {dotted key: text}; empty sections and lists are kept as ``{}`` and ``[]``."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = str(value)
    return flat


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store, None for any other."""
    match = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", uri)
    return Path(match.group(1)).absolute() if match else None


def artifact_folder(uri: str, default_parent: Path) -> Path | None:
    """Where the artifacts of a database store go: beside a sqlite file, else under ``default_parent``.

    None for a server (``http``, ``https``, ``databricks``), which decides by itself.
    """
    if re.match(r"(https?|databricks(-uc)?|uc)(:|$)", uri):
        return None
    database = sqlite_file(uri)
    return (database.parent if database else default_parent) / "mlartifacts"
