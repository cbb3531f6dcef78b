"""MLflow as the record of a run: what arrives in real sqlite stores, also of runs that were killed and continued."""

import json
import shutil
import signal
import time
from pathlib import Path

import mlflow_runs
import pytest
from mlflow_runs import CONFIG, client_of, log, process, start, steps, wait_until

from ddpm_dist.tracking import artifact_folder, flatten
from ddpm_dist.tracking.mlflow_queue import MAX_RECORDS
from ddpm_dist.tracking.mlflow_store import make_database, shown

pytest.importorskip("mlflow")

no_outside_settings = mlflow_runs.no_outside_settings  # fixture


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


def store(folder: Path):
    return client_of(f"sqlite:///{folder / 'mlflow.db'}")


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
    assert time.monotonic() - begin < 4  # waiting for the lock would take 5
    time.sleep(6)  # longer than sqlite waits by itself
    lock.rollback()
    lock.close()
    tracker.close("FINISHED", timeout=30)
    assert steps(store(runs), tracker.run_id) == [*range(1, 201)]


def test_the_environment_names_the_store_when_the_configuration_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    tracker = start(tmp_path / "runs" / "run")
    log(tracker, 1, 1)
    tracker.close("FINISHED")
    assert steps(client_of(f"sqlite:///{tmp_path / 'other.db'}"), tracker.run_id) == [1]
    assert not (tmp_path / "runs" / "mlflow.db").exists()


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
