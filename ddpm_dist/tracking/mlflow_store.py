"""How a run of ours looks in MLflow: experiment, run, parameters, metrics. Called by the worker thread only.

MLflow is imported inside the functions: the import takes seconds and the package is optional.
"""

from __future__ import annotations

import getpass
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_dist.tracking.metrics import Workplace
from ddpm_dist.tracking.progress import warn

# Limits of MLflow's REST API and stores (mlflow.utils.validation; older servers allow 500 characters per parameter).
METRICS_PER_BATCH = 900
PARAMS_PER_BATCH = 100
PARAM_CHARACTERS = 500
TAG_CHARACTERS = 5_000
REASONS = {
    r"Connection refused": "connection refused",
    r"timed out|Timeout": "no answer in time",
    r"Failed to resolve|Name or service not known": "the host name is unknown",
    r"too many 5\d\d error responses": "the server answers with an internal error",
    r"database is locked": "the database is locked",
}


@dataclass
class Job:
    """What has to be known about the run; everything is plain data."""

    run_dir: Path
    uri: str
    database: Path | None  # the file of a sqlite store
    artifacts: Path | None  # folder for the artifacts of a database store; None: the server decides
    experiment: str
    run_name: str
    params: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    run_id: str | None = None
    workplace: Workplace | None = None  # where a new tracking.json is made


class Memory:
    """``tracking.json``: the MLflow run and the last step it has confirmed.

    A damaged or unwritable file costs repeated or missing points in MLflow, never an error.
    """

    def __init__(self, path: Path, workplace: Workplace | None = None) -> None:
        self.path, self._workplace = path, workplace
        self.run_id: str | None = None
        self.delivered = 0
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(path.read_text())
            if isinstance(known["mlflow_run_id"], str) and type(known["delivered_step"]) is int:
                self.run_id, self.delivered = known["mlflow_run_id"], known["delivered_step"]

    def keep(self, run_id: str, delivered: int) -> None:
        self.run_id, self.delivered = run_id, delivered
        place = self._workplace
        aside = self.path.with_name(self.path.name + ".incomplete") if place is None else place.aside(self.path)
        with suppress(OSError):
            aside.write_text(json.dumps({"mlflow_run_id": run_id, "delivered_step": delivered}) + "\n")
            if place is None:
                os.replace(aside, self.path)
            else:
                place.place(self.path)


def open_run(job: Job, memory: Memory):
    """A client and the id of the run that records ``job``: the known one, set to RUNNING again, or a new one.

    Returns (mlflow.MlflowClient, run id); ``memory`` then belongs to that run. Raises what MLflow raises.
    """
    from mlflow.tracking import MlflowClient

    if job.database is not None:
        make_database(job.database)
    client = MlflowClient(tracking_uri=job.uri, registry_uri=job.uri)
    run = _known_run(client, job, memory)
    if run is None:
        run = _new_run(client, job)
        memory.keep(run.info.run_id, 0)
    else:
        client.update_run(run.info.run_id, status="RUNNING")
        for key, value in job.tags.items():  # of this start, over those of the one before
            client.set_tag(run.info.run_id, key, str(value)[:TAG_CHARACTERS])
        if run.info.run_id != memory.run_id:
            memory.keep(run.info.run_id, 0)  # unknown what it has; a store keeps exact repetitions once
    _log_params(client, job, run)
    return client, run.info.run_id


def make_database(path: Path) -> None:
    """Make an MLflow sqlite file that is not there yet: aside, and linked into place when its tables are complete.

    A process killed while MLflow makes the tables would otherwise leave a file that MLflow refuses for ever, and two
    processes making one file would disturb each other. Here the first to finish wins.
    """
    from mlflow.tracking import MlflowClient

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.incomplete")
    aside.unlink(missing_ok=True)
    try:
        store = MlflowClient(tracking_uri=f"sqlite:///{aside}")._tracking_client.store
        with suppress(AttributeError):  # close the file
            store.engine.dispose()
        try:
            os.link(aside, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                os.rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _known_run(client, job: Job, memory: Memory):
    """The run that this one continues, or None. tracking.json is newer than the checkpoint's id."""
    from mlflow.exceptions import MlflowException

    wanted = [run_id for run_id in (memory.run_id, job.run_id) if run_id]
    for run_id in wanted:
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            continue
        if run.info.lifecycle_stage == "active":
            return run
    if wanted:
        warn(f"MLflow at {shown(job.uri)} does not have run {wanted[0]}; the record goes on in a new run")
    return None


def _new_run(client, job: Job):
    tags = {"mlflow.source.name": "ddpm_dist.train", **job.tags}
    with suppress(Exception):  # a container may have no name for the user id
        tags.setdefault("mlflow.user", getpass.getuser())
    tags = {key: str(value)[:TAG_CHARACTERS] for key, value in tags.items()}
    return client.create_run(_experiment(client, job), run_name=job.run_name, tags=tags)


def _experiment(client, job: Job) -> str:
    """The experiment's id; made if needed, also while another process makes the same one."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(job.experiment)
    if found is None:
        where = None if job.artifacts is None else job.artifacts.as_uri()
        try:
            return client.create_experiment(job.experiment, artifact_location=where)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(job.experiment)
    return found.experiment_id


def _log_params(client, job: Job, run) -> None:
    """Log what is new. MLflow's parameters cannot change, so a key that a resumed run changed becomes a tag."""
    from mlflow.entities import Param, RunTag

    logged = run.data.params
    wanted = {allowed(key): value[:PARAM_CHARACTERS] for key, value in job.params.items()}
    new = [Param(key, value) for key, value in wanted.items() if key not in logged]
    for batch in batches(new, PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=batch)
    changed = [RunTag(f"changed.{key}", value) for key, value in wanted.items() if logged.get(key, value) != value]
    for batch in batches(changed, PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, tags=batch)


def send_metrics(client, run_id: str, records: list[dict]) -> None:
    """Log the finite numbers of records, each at its record's step and time. Raises what MLflow raises."""
    for batch in batches(itertools.chain.from_iterable(map(_metrics, records)), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)


def _metrics(record: dict) -> Iterator:
    from mlflow.entities import Metric

    moment = record.get("time")
    milliseconds = int(1000 * (moment if isinstance(moment, int | float) else time.time()))
    for key, value in record.items():
        if hasattr(value, "item"):
            value = value.item()
        if key in ("step", "time") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if abs(value) < float("inf"):  # false for NaN too
            yield Metric(allowed(key), float(value), milliseconds, record["step"])


def allowed(key: str) -> str:
    """A key with only the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:250]


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of at most ``size`` items."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def reason(error: Exception) -> str:
    """An exception of MLflow in a few words; its own text nests three libraries' messages."""
    text = shown(" ".join(f"{type(error).__name__}: {error}".split()))
    for pattern, words in REASONS.items():
        if re.search(pattern, text):
            return words
    return text[:300]


def shown(text: str) -> str:
    """Text without the user names and passwords of the URLs in it."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)
