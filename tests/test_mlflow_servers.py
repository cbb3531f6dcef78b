"""MLflow servers on loopback that are absent, hang, fail, die or come back: training never waits, and nothing is lost."""

import os
import signal
import socket
import subprocess
import sys
import time

import mlflow_runs
import pytest
from mlflow_runs import client_of, log, process, start, steps, wait_until
from mlflow_server import Store

from ddpm_dist.tracking.metrics import read_lines
from ddpm_dist.tracking.mlflow_queue import MAX_PICTURES, MAX_RECORDS

pytest.importorskip("mlflow")

no_outside_settings = mlflow_runs.no_outside_settings  # fixture


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
    assert 1 < time.monotonic() - begin < 15  # all of them would take 20
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
    assert time.monotonic() - begin < 10
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
