"""MLflow as the record of a run: real sqlite stores, and servers on loopback that are absent, hang, fail or die."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpm_dist.tracking import Tracker, artifact_folder, flatten
from ddpm_dist.tracking.metrics import read_lines
from ddpm_dist.tracking.mlflow_queue import MAX_PICTURES, MAX_RECORDS
from ddpm_dist.tracking.mlflow_store import make_database, shown

pytest.importorskip("mlflow")

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = {"train": {"images": 1000, "range": [-1, 1]}, "run": {"name": "digits", "dir": None}, "extra": {}}


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """An empty MLflow store, as the first run in a folder makes it; making one takes seconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    make_database(path)
    return path


@pytest.fixture
def runs(tmp_path, template) -> Path:
    """A folder of runs with an empty store in it."""
    shutil.copy(template, tmp_path / "mlflow.db")
    return tmp_path


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


def store(folder: Path):
    return client_of(f"sqlite:///{folder / 'mlflow.db'}")


def steps(client, run_id: str, key: str = "loss") -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run_id, key))


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# --- a sqlite store


def test_parameters_metrics_pictures_and_status_arrive_in_a_sqlite_file_beside_the_run(tmp_path):
    runs = tmp_path / "my runs"  # a blank in the path
    picture = runs / "first" / "samples" / "step_00000002.png"
    tracker = start(runs / "first", tags={"world_size": "2"})
    log(tracker, 1, 3)
    tracker.log({"step": 4, "loss": float("nan"), "lr": 0.5, "note": "text", "flag": True, "odd (name)": 1})
    picture.parent.mkdir()
    picture.write_bytes(b"a picture")
    tracker.picture(picture, 2)
    tracker.close("FINISHED")

    client = store(runs)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert client.get_experiment(run.info.experiment_id).name == "trial"
    assert run.data.params == {
        "train.images": "1000",
        "train.range": "[-1, 1]",
        "run.name": "digits",
        "run.dir": "None",
        "extra": "{}",
    }
    assert run.data.tags["world_size"] == "2"
    history = client.get_metric_history(tracker.run_id, "loss")
    assert [(point.step, point.value, point.timestamp) for point in history] == [
        (step, 1 / step, int(1000 * (1.8e9 + step))) for step in (1, 2, 3)
    ]
    assert set(run.data.metrics) == {"images_seen", "loss", "lr", "odd _name_"}
    assert (runs / "mlartifacts" / tracker.run_id / "artifacts" / "samples" / picture.name).read_bytes() == b"a picture"
    assert json.loads((runs / "first" / "tracking.json").read_text()) == {
        "mlflow_run_id": tracker.run_id,
        "delivered_step": 4,
    }


def test_a_resumed_run_continues_its_mlflow_run_and_changed_settings_become_tags(runs):
    tracker = start(runs / "run")
    log(tracker, 1, 10)
    tracker.close("KILLED")
    first = tracker.run_id
    assert store(runs).get_run(first).info.status == "KILLED"

    changed = {**CONFIG, "train": {"images": 2000, "range": [-1, 1], "new": 1}}
    tracker = start(runs / "run", step=6, config=changed)
    wait_until(lambda: tracker.run_id is not None)
    run = store(runs).get_run(first)
    assert run.info.status == "RUNNING"
    log(tracker, 7, 12)
    tracker.close("FINISHED")
    assert tracker.run_id == first
    run = store(runs).get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.images"] == "1000" and run.data.tags["changed.train.images"] == "2000"
    assert run.data.params["train.new"] == "1"
    assert steps(store(runs), first) == [*range(1, 13)]  # nothing twice, nothing missing


def test_the_run_id_of_a_checkpoint_is_used_when_the_run_directory_has_none(runs):
    tracker = start(runs / "run")
    log(tracker, 1, 4)
    tracker.close("KILLED")
    (runs / "run" / "tracking.json").unlink()
    again = start(runs / "run", step=4, run_id=tracker.run_id)
    log(again, 5, 6)
    again.close("FINISHED")
    assert again.run_id == tracker.run_id
    assert steps(store(runs), tracker.run_id) == [1, 2, 3, 4, 5, 6]  # sent again, stored once


@pytest.mark.parametrize("gone", ["unknown", "deleted"])
def test_a_run_that_the_store_does_not_have_is_recorded_anew_from_its_first_step(runs, capsys, gone):
    tracker = start(runs / "run")
    log(tracker, 1, 5)
    tracker.close("KILLED")
    if gone == "deleted":
        store(runs).delete_run(tracker.run_id)
    else:
        (runs / "run" / "tracking.json").write_text(json.dumps({"mlflow_run_id": "f" * 32, "delivered_step": 5}))
    again = start(runs / "run", step=5)
    log(again, 6, 7)
    again.close("FINISHED")
    assert again.run_id not in (None, tracker.run_id)
    assert "does not have run" in capsys.readouterr().err
    assert steps(store(runs), again.run_id) == [1, 2, 3, 4, 5, 6, 7]


def test_a_damaged_tracking_json_costs_nothing_but_the_old_run(runs):
    (runs / "run").mkdir()
    (runs / "run" / "tracking.json").write_text('{"mlflow_run_id": 7')
    tracker = start(runs / "run")
    log(tracker, 1, 2)
    tracker.close("FINISHED")
    assert steps(store(runs), tracker.run_id) == [1, 2]


def test_more_than_one_batch_of_parameters_and_very_long_values_are_taken(runs):
    config = {"many": {f"key{n}": n for n in range(250)}, "long": "x" * 20_000, "ädd": 1}
    tracker = start(runs / "run", config=config)
    tracker.close("FINISHED")
    params = store(runs).get_run(tracker.run_id).data.params
    assert len(params) == 252
    assert params["many.key249"] == "249" and params["long"] == "x" * 500 and params["_dd"] == "1"


def test_records_that_overflow_the_queue_are_read_from_the_file_instead(runs):
    tracker = start(runs / "run")
    many = MAX_RECORDS + 500
    log(tracker, 1, many)  # faster than the store is even opened
    tracker.close("FINISHED", timeout=60)
    assert steps(store(runs), tracker.run_id) == [*range(1, many + 1)]


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


def test_what_a_killed_process_did_not_deliver_arrives_when_the_run_is_continued(runs):
    killed = process(runs / "run", "", 1, 1500, "kill")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    known = json.loads((runs / "run" / "tracking.json").read_text())
    assert known["delivered_step"] < 1500  # killed before all was delivered

    tracker = start(runs / "run", step=1000)  # the newest checkpoint
    log(tracker, 1001, 1510)
    tracker.close("FINISHED")
    assert tracker.run_id == known["mlflow_run_id"]
    # Killed between a delivery and its confirmation: then these steps are there twice, from both starts, and none is missing.
    assert sorted(set(steps(store(runs), tracker.run_id))) == [*range(1, 1511)]


def test_a_process_killed_while_it_makes_the_store_does_not_spoil_it_for_others(tmp_path):
    killed = process(tmp_path / "run", "", 1, 10, "FINISHED")
    wait_until(lambda: any(entry.stat().st_size > 0 for entry in tmp_path.glob("mlflow.db*.incomplete")))
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "mlflow.db").exists()
    tracker = start(tmp_path / "run", step=10)
    tracker.close("FINISHED")
    assert steps(store(tmp_path), tracker.run_id) == [*range(1, 11)]


def test_several_runs_write_into_the_same_new_sqlite_file_at_once(tmp_path):
    # Three processes that import MLflow on two cores take their time.
    started = [process(tmp_path / f"run{n}", "", 1, 200, "FINISHED", CLOSE_SECONDS="60") for n in range(3)]
    ids = set()
    for one in started:
        out, err = one.communicate(timeout=240)
        assert one.returncode == 0 and "Traceback" not in err, err
        run_id = out.strip()
        assert store(tmp_path).get_run(run_id).info.status == "FINISHED", err
        assert steps(store(tmp_path), run_id) == [*range(1, 201)]
        ids.add(run_id)
    assert len(ids) == 3


def test_a_locked_database_is_tried_again(runs):
    import sqlite3

    tracker = start(runs / "run")
    log(tracker, 1, 1)
    wait_until(lambda: steps(store(runs), tracker.run_id) == [1] if tracker.run_id else False)
    lock = sqlite3.connect(runs / "mlflow.db")
    lock.execute("BEGIN EXCLUSIVE")
    begin = time.monotonic()
    log(tracker, 2, 200)
    assert time.monotonic() - begin < 2
    time.sleep(6)  # longer than sqlite waits by itself
    lock.rollback()
    lock.close()
    tracker.close("FINISHED", timeout=30)
    assert steps(store(runs), tracker.run_id) == [*range(1, 201)]


# --- servers


class Store(http.server.ThreadingHTTPServer):
    """As much of MLflow's REST API as a run needs, in memory; can fail on request."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0, runs: dict | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.runs = {} if runs is None else runs
        self.failing = False
        self.delay = 0.0
        self.requests = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def die(self) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, call: str, body: dict) -> dict:
        if call == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "name": "trial", "lifecycle_stage": "active"}}
        if call == "runs/create":
            run_id = f"{len(self.runs) + 1:032x}"
            self.runs[run_id] = {"status": "RUNNING", "steps": [], "params": {}}
            return {"run": self.describe(run_id)}
        run = self.runs.get(body.get("run_id"))
        if run is None:
            raise LookupError
        if call == "runs/log-batch":
            run["steps"] += [metric["step"] for metric in body.get("metrics", []) if metric["key"] == "loss"]
            run["params"].update({param["key"]: param["value"] for param in body.get("params", [])})
        elif call == "runs/update":
            run["status"] = body["status"]
            return {"run_info": self.describe(body["run_id"])["info"]}
        return {"run": self.describe(body["run_id"])}

    def describe(self, run_id: str) -> dict:
        run = self.runs[run_id]
        info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": "1", "status": run["status"]}
        params = [{"key": key, "value": value} for key, value in run["params"].items()]
        return {"info": {**info, "lifecycle_stage": "active", "artifact_uri": "/"}, "data": {"params": params}}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Store

    def do_POST(self) -> None:
        from urllib.parse import parse_qsl, urlsplit

        self.server.requests += 1
        url = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw) if raw else dict(parse_qsl(url.query))
        time.sleep(self.server.delay)
        if self.server.failing:
            return self.reply(500, {"error_code": "INTERNAL_ERROR", "message": "broken"})
        try:
            self.reply(200, self.server.answer(url.path.split("/mlflow/")[1], body))
        except LookupError:
            self.reply(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"})

    do_GET = do_POST

    def reply(self, code: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def bad_server(request):
    """The URI of a server that is absent, hangs, or answers 500 to everything."""
    if request.param == "fails":
        server = Store()
        server.failing = True
        yield server.uri
        assert server.requests > 0
        return server.die()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            listener.listen(64)  # connections open, nobody ever answers
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("bad_server", ["absent", "hangs", "fails"], indirect=True)
def test_a_bad_server_never_slows_training_and_everything_is_in_the_file(tmp_path, bad_server, capsys):
    tracker = start(tmp_path / "run", bad_server)
    begin = time.monotonic()
    log(tracker, 1, 1000)
    tracker.picture(tmp_path / "picture.png", 1000)
    logged = time.monotonic() - begin
    time.sleep(1.5)  # the worker meets the server
    begin = time.monotonic()
    log(tracker, 1001, 2000)
    logged += time.monotonic() - begin
    begin = time.monotonic()
    tracker.close("FINISHED", timeout=3)
    closed = time.monotonic() - begin
    assert logged < 2 and closed < 10
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == [*range(1, 2001)]
    said = capsys.readouterr().err
    assert "did not get steps 1 to 2000" in said and "1 picture(s)" in said and "the status FINISHED" in said
    assert said.count("does not take the record") <= 1
    assert tracker.run_id is None


def test_after_close_nothing_is_sent_or_remembered_any_more(tmp_path):
    """The next process may own the run by then."""
    server = Store()
    server.delay = 0.5
    tracker = start(tmp_path / "run", server.uri)
    log(tracker, 1, 2000)  # 40 batches, all waiting before the first is sent
    wait_until(lambda: tracker.run_id is not None)
    begin = time.monotonic()
    tracker.close("KILLED", timeout=1)  # deliveries succeed, so it waits longer than this, but not for all of them
    assert 1 < time.monotonic() - begin < 5
    time.sleep(1)  # the batch that was on its way
    known, sent = (tmp_path / "run" / "tracking.json").read_text(), list(server.runs[tracker.run_id]["steps"])
    assert 0 < len(sent) < 2000
    time.sleep(2)
    assert (tmp_path / "run" / "tracking.json").read_text() == known
    assert server.runs[tracker.run_id]["steps"] == sent
    server.die()


def test_pictures_are_bounded_too(tmp_path, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        tracker = start(tmp_path / "run", f"http://127.0.0.1:{listener.getsockname()[1]}")
        for step in range(MAX_PICTURES + 10):
            tracker.picture(tmp_path / f"{step}.png", step)
        assert len(tracker._worker._pictures) == MAX_PICTURES
        tracker.close("KILLED", timeout=1)
    assert f"{MAX_PICTURES + 10} picture(s)" in capsys.readouterr().err


def test_a_server_that_dies_and_comes_back_gets_what_it_missed(tmp_path, capsys):
    server = Store()
    port, runs = server.server_address[1], server.runs
    tracker = start(tmp_path / "run", server.uri)
    log(tracker, 1, 50)
    wait_until(lambda: runs and next(iter(runs.values()))["steps"][-1:] == [50])
    server.die()
    begin = time.monotonic()
    log(tracker, 51, 50 + MAX_RECORDS + 200)  # more than the queue holds
    assert time.monotonic() - begin < 2
    wait_until(lambda: tracker._worker._warned)
    server = Store(port, runs)
    last = 60 + MAX_RECORDS + 200
    log(tracker, last - 9, last)
    run = runs[tracker.run_id]
    wait_until(lambda: run["steps"][-1] == last)
    tracker.close("FINISHED")
    assert sorted(run["steps"]) == [*range(1, last + 1)]
    assert run["status"] == "FINISHED" and len(runs) == 1
    said = capsys.readouterr().err
    assert "connection refused" in said and "takes the record again" in said and "did not get" not in said
    server.die()


def test_a_server_that_comes_back_without_the_run_gets_a_new_one_with_everything(tmp_path):
    server = Store()
    tracker = start(tmp_path / "run", server.uri)
    log(tracker, 1, 20)
    wait_until(lambda: server.runs and next(iter(server.runs.values()))["steps"][-1:] == [20])
    server.runs.clear()  # restarted on an empty store
    log(tracker, 21, 30)
    wait_until(lambda: server.runs and next(iter(server.runs.values()))["steps"][-1:] == [30])
    tracker.close("FINISHED")
    assert next(iter(server.runs.values()))["steps"] == [*range(1, 31)]
    server.die()


def test_what_a_dead_server_missed_is_sent_by_the_next_start(tmp_path, capsys):
    server = Store()
    port, runs = server.server_address[1], server.runs
    tracker = start(tmp_path / "run", server.uri)
    log(tracker, 1, 20)
    wait_until(lambda: runs and next(iter(runs.values()))["steps"][-1:] == [20])
    server.die()
    log(tracker, 21, 40)
    tracker.close("KILLED", timeout=2)
    assert "did not get steps 21 to 40" in capsys.readouterr().err
    server = Store(port, runs)
    again = start(tmp_path / "run", server.uri, step=40)
    log(again, 41, 45)
    again.close("FINISHED")
    assert again.run_id == tracker.run_id
    assert sorted(runs[tracker.run_id]["steps"]) == [*range(1, 46)]
    assert runs[tracker.run_id]["status"] == "FINISHED"
    server.die()


@pytest.mark.parametrize("bad_server", ["hangs", "absent"], indirect=True)
@pytest.mark.parametrize("end", ["leave", "FAILED"])
def test_the_interpreter_leaves_at_once_and_silently_whatever_the_worker_does(tmp_path, bad_server, end):
    begin = time.monotonic()
    one = process(tmp_path / "run", bad_server, 1, 3000, end)  # logs for more than 3 s: the worker is at work
    out, err = one.communicate(timeout=60)
    assert one.returncode == 0
    assert time.monotonic() - begin < 40
    assert "Traceback" not in err and "Exception" not in err
    assert all(line.startswith("warning: ") for line in err.splitlines()), err


def test_what_the_user_set_in_the_environment_stays(tmp_path, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "17")
        start(tmp_path / "run", f"http://127.0.0.1:{listener.getsockname()[1]}").close("FAILED", timeout=1)
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "17"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"  # the default's minutes of retries are ours


def test_the_environment_names_the_store_when_the_configuration_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    tracker = start(tmp_path / "runs" / "run")
    log(tracker, 1, 1)
    tracker.close("FINISHED")
    assert steps(client_of(f"sqlite:///{tmp_path / 'other.db'}"), tracker.run_id) == [1]
    assert not (tmp_path / "runs" / "mlflow.db").exists()


@pytest.mark.slow
def test_a_real_server_that_is_killed_and_started_again_has_the_whole_run(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/store",
    ]

    def serve() -> subprocess.Popen:
        with open(tmp_path / "server.log", "ab") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path, start_new_session=True)

        def answers() -> bool:
            with socket.socket() as one:
                return one.connect_ex(("127.0.0.1", port)) == 0

        wait_until(answers, 120)
        return server

    server = serve()
    try:
        tracker = start(tmp_path / "run", uri)
        picture = tmp_path / "run" / "step_00000001.png"
        picture.write_bytes(b"pixels")
        tracker.picture(picture, 1)
        log(tracker, 1, 100)
        wait_until(lambda: tracker._worker._memory.delivered == 100, 120)
        os.killpg(server.pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        log(tracker, 101, 200)
        wait_until(lambda: tracker._worker._warned)
        server = serve()
        wait_until(lambda: tracker._worker._memory.delivered == 200, 120)
        tracker.close("FINISHED", timeout=30)
        assert steps(client_of(uri), tracker.run_id) == [*range(1, 201)]
        assert client_of(uri).get_run(tracker.run_id).info.status == "FINISHED"
        assert [file.path for file in client_of(uri).list_artifacts(tracker.run_id, "samples")] == [
            "samples/step_00000001.png"
        ]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# --- small parts


def test_configurations_become_dotted_parameters():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": {}, "f": [1, 2]}) == {
        "a.b.c": "1",
        "a.d": "None",
        "e": "{}",
        "f": "[1, 2]",
    }


def test_artifacts_lie_beside_a_sqlite_file_and_a_server_decides_by_itself(tmp_path):
    assert artifact_folder(f"sqlite:///{tmp_path}/x/my.db", tmp_path) == tmp_path / "x" / "mlartifacts"
    assert artifact_folder("postgresql://host/db", tmp_path) == tmp_path / "mlartifacts"
    assert artifact_folder("https://host:5000", tmp_path) is None
    assert artifact_folder("databricks://profile", tmp_path) is None


def test_passwords_in_uris_are_not_shown():
    text = shown("cannot reach postgresql://me:secret@host/db or https://token@server/x")
    assert text == "cannot reach postgresql://***@host/db or https://***@server/x"
