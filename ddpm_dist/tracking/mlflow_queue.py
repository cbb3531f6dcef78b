"""The thread that feeds MLflow. Training puts things into a bounded queue and never waits for what happens here."""

from __future__ import annotations

import collections
import threading
import time
from contextlib import suppress
from pathlib import Path

from ddpm_dist.tracking.metrics import read_lines
from ddpm_dist.tracking.mlflow_store import Job, Memory, batches, open_run, reason, send_metrics, shown
from ddpm_dist.tracking.progress import warn

MAX_RECORDS = 2_000  # queued log records; the oldest leave first and are read from metrics.jsonl later
MAX_PICTURES = 64
RECORDS_PER_SEND = 50
FIRST_RETRY, LAST_RETRY = 1.0, 30.0  # seconds between attempts


class Worker(threading.Thread):
    """Delivers records, pictures and the final status of one run, in that order, again and again until it works."""

    def __init__(self, job: Job) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.job = job
        self.run_id: str | None = None
        self._memory = Memory(job.run_dir / "tracking.json", job.workplace)
        self._changed = threading.Condition()
        self._records: collections.deque[dict] = collections.deque()
        self._newest = self._memory.delivered
        # True: metrics.jsonl holds steps that the queue does not have (from before this process, or dropped).
        self._behind = True
        self._pictures: collections.deque[Path] = collections.deque()
        self._last_picture = 0
        self._lost_pictures = 0
        self._refused = 0
        self._status: str | None = None
        self._finished = False  # MLflow has the final status
        self._abandoned = False  # nobody waits for this thread any more
        self._starting = True  # importing MLflow or opening a file: slow on a busy machine, but nobody's fault
        self._client = None
        self._last_success = time.monotonic()
        self._last_error = ""
        self._warned = False

    # Called by training: these hold the lock for microseconds and wait for nothing else.

    def put_record(self, record: dict) -> None:
        """Queue a log record that metrics.jsonl already has."""
        with self._changed:
            self._newest = max(self._newest, record["step"])
            if len(self._records) >= MAX_RECORDS:
                self._records.popleft()
                self._behind = True
            self._records.append(record)
            self._changed.notify()

    def put_picture(self, path: Path, step: int) -> None:
        """Queue a picture file."""
        with self._changed:
            if len(self._pictures) >= MAX_PICTURES:
                self._pictures.popleft()
                self._lost_pictures += 1
            self._pictures.append(path)
            self._last_picture = step
            self._changed.notify()

    def finish(self, status: str, timeout: float) -> None:
        """Ask for the final status and wait: ``timeout`` seconds after the last success, three times that at most."""
        if self._status is not None:
            return
        begin = time.monotonic()
        with self._changed:
            self._status = status
            self._changed.notify()
        while self.is_alive():
            now = time.monotonic()
            quiet_since = max(begin, self._last_success) if not self._starting else now
            left = min(quiet_since + timeout, begin + 3 * timeout) - now
            if left <= 0:
                break
            self.join(min(left, 0.1))
        self._abandoned = True
        if not self._finished or self._lost_pictures or self._refused:
            warn(self._missing())

    def abandon(self) -> None:
        """Deliver nothing more, the final status included."""
        with self._changed:
            self._abandoned = True
            self._changed.notify()

    def _missing(self) -> str:
        with self._changed:
            pictures = len(self._pictures) + self._lost_pictures
            delivered = self._memory.delivered
        parts = []
        if self._newest > delivered:
            steps = f"steps {delivered + 1} to {self._newest}"
            parts.append(f"{steps} (metrics.jsonl has them; they are sent when the run is continued)")
        if self._refused:
            parts.append(f"{self._refused} record(s) that it refused")
        if pictures:
            parts.append(f"{pictures} picture(s) up to step {self._last_picture} (they are in the run directory)")
        if not self._finished:
            parts.append(f"the status {self._status}")
        why = f" ({self._last_error})" if self._last_error else ""
        return f"MLflow at {shown(self.job.uri)} did not get " + ", ".join(parts) + why

    # The thread.

    def run(self) -> None:
        """Work until the final status is delivered or nobody waits any more; errors are said once and tried again."""
        # A daemon thread may be in the middle of anything when the interpreter goes down; it has nothing to say then.
        with suppress(BaseException):
            delay = FIRST_RETRY
            while not self._abandoned and not self._finished:
                before = self._last_success
                try:
                    self._work()
                except Exception as error:
                    if self._last_success > before:
                        delay = FIRST_RETRY
                    self._explain(error)
                    if self._status is not None and delay > FIRST_RETRY:
                        return  # the last words were tried twice
                    self._pause(delay)
                    delay = min(2 * delay, LAST_RETRY)

    def _explain(self, error: Exception) -> None:
        self._last_error = reason(error)
        self._starting = False
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            # The server came back without the run: connect again and send everything.
            self._client, self._behind = None, True
        if not self._warned and not self._abandoned:
            self._warned = True
            warn(
                f"MLflow at {shown(self.job.uri)} does not take the record ({self._last_error}); training goes on, "
                "metrics.jsonl has everything, delivery is tried again"
            )

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; the request to finish cuts the wait short."""
        with self._changed:
            if self._status is None:
                self._changed.wait_for(lambda: self._status is not None, seconds)
        time.sleep(0.2)

    def _work(self) -> None:
        """Deliver what there is; wait for more; return when the final status is delivered."""
        if self._client is None:
            import mlflow.tracking  # noqa: F401

            if self._starting:
                self._last_success = time.monotonic()
                self._starting = self.job.database is not None
            self._client, self.run_id = open_run(self.job, self._memory)
            self._starting = False
            self._succeeded()
        while not self._abandoned:
            self._deliver_records()
            self._deliver_pictures()
            with self._changed:
                idle = not (self._records or self._pictures or self._behind)
                if idle and self._status is not None:
                    break
                if idle and not self._abandoned:
                    self._changed.wait()
        if not self._abandoned:
            self._client.set_terminated(self.run_id, status=self._status)
            self._finished = True

    def _succeeded(self) -> None:
        self._last_success = time.monotonic()
        if self._warned:
            self._warned = False
            self._last_error = ""
            warn(f"MLflow at {shown(self.job.uri)} takes the record again")

    def _deliver_records(self) -> None:
        with self._changed:
            behind, self._behind = self._behind, False
            queued = list(self._records)
        try:
            if behind:  # the file has the queued records too
                missed = read_lines(self.job.run_dir / "metrics.jsonl", self._memory.delivered)
                for part in batches(missed, RECORDS_PER_SEND):
                    self._send(part)
            for part in batches((r for r in queued if r["step"] > self._memory.delivered), RECORDS_PER_SEND):
                self._send(part)
        except BaseException:
            self._behind = self._behind or behind
            raise
        with self._changed:
            while self._records and self._records[0]["step"] <= self._memory.delivered:
                self._records.popleft()

    def _send(self, records: list[dict]) -> None:
        """Send records and remember the last step that MLflow has confirmed."""
        from mlflow.exceptions import MlflowException

        if self._abandoned:  # the next process may own tracking.json already
            raise InterruptedError("closed")
        try:
            send_metrics(self._client, self.run_id, records)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self._refused += len(records)  # would be refused for ever
            self._last_error = reason(error)
        if not self._abandoned:
            self._memory.keep(self.run_id, max(record["step"] for record in records))
            self._succeeded()

    def _deliver_pictures(self) -> None:
        while self._pictures and not self._abandoned:
            path = self._pictures[0]
            if path.is_file():
                self._client.log_artifact(self.run_id, str(path), "samples")
                self._succeeded()
            else:
                self._lost_pictures += 1
                self._last_error = f"{path} is gone"
            with self._changed:
                if self._pictures and self._pictures[0] is path:  # else a full queue dropped it meanwhile
                    self._pictures.popleft()
