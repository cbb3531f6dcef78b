"""python -m ddpm_dist.doctor on this machine as it is, on one without packages, and its judgement of machines that are not here."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
import venv

import pytest
from conftest import environment, run_module

from ddpm_dist import doctor_files, doctor_machine, doctor_software
from ddpm_dist.doctor_report import Finding, call, limited


@pytest.mark.slow
def test_this_machine(tmp_path):
    report = tmp_path / "report.json"
    (tmp_path / "runs").mkdir()
    shards = tmp_path / "shards"
    (shards / "digits").mkdir(parents=True)
    (shards / "digits/000000.tar").write_bytes(os.urandom(3_000_000))
    done = run_module("ddpm_dist.doctor", "--run-dir", tmp_path / "runs", "--shards", shards, "--json", report)
    said = json.loads(report.read_text())
    found = {finding["about"]: finding for finding in said["findings"]}
    assert done.returncode == (1 if said["count"]["problem"] else 0), done.stdout + done.stderr
    assert {
        "python",
        "torch",
        "DALI",
        "DeepSpeed",
        "MLflow",
        "webdataset",
        "memory",
        "open files",
        "/dev/shm",
        "SLURM",
    } <= found.keys()
    for about in ("python", "torch", "DALI", "two ranks", "ports"):
        assert found[about]["state"] == "ok", done.stdout
    files = found["run dir"]["values"]
    assert (
        files["write_mb_per_s"] > 0
        and files["flock"]
        and files["lockf"]
        and found["shards"]["values"]["read_mb_per_s"] > 0
    )
    assert found["two ranks"]["values"]["mb_per_s"] > 0
    assert len(done.stdout.splitlines()) <= 45 and done.stderr == ""  # one screen
    for finding in said["findings"]:
        assert finding["state"] == "ok" or finding["remedy"] or finding["about"] == "GPUs", finding
    assert not list((tmp_path / "runs").iterdir()) and [path.name for path in shards.iterdir()] == ["digits"]


def test_a_python_without_any_package(tmp_path):
    """It says what is missing and goes on; the rest is still looked at."""
    venv.create(tmp_path / "bare", with_pip=False)
    command = [
        tmp_path / "bare/bin/python",
        "-m",
        "ddpm_dist.doctor",
        "--run-dir",
        tmp_path,
        "--shards",
        "/proc/shards",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and done.stderr == "", done.stderr
    for about in ("torch", "DALI", "DeepSpeed", "MLflow", "webdataset"):
        assert f"problem  {about:11} not installed" in done.stdout
    assert "prepare_environment" in done.stdout and "note     two ranks   not tried" in done.stdout
    text = " ".join(done.stdout.split())  # a long folder name wraps the line anywhere
    assert "note shards /proc/shards, so far /proc (proc, " in text and "MB/s written" in text


def test_bad_usage(tmp_path):
    done = run_module("ddpm_dist.doctor", "--json", tmp_path / "no/report.json")
    assert done.returncode == 2 and "give a file in a folder that exists" in done.stderr
    assert run_module("ddpm_dist.doctor", "--fast").returncode == 2


def test_what_hangs_or_fails_is_a_problem():
    def hangs():
        yield Finding("ok", "first", "said before")
        time.sleep(600)

    def fails():
        raise ZeroDivisionError("oh")
        yield

    began = time.monotonic()
    first, second = limited("files", hangs, 0.3)
    assert first.text == "said before" and second.state == "problem" and "within 0.3 s" in second.text
    (broken,) = limited("files", fails, 5)
    assert broken.state == "problem" and "ZeroDivisionError: oh" in broken.text
    assert call(["sleep", "600"], 0.3)[0] is None
    assert call(["/no/such/program"], 5)[0] == 127
    assert time.monotonic() - began < 30


GPU = {"name": "H200", "gb": 140.0, "capability": "9.0", "works": True, "free_gb": 139.0}
TORCH = {"version": "2.15.0", "cuda": "13.2", "available": True, "devices": [GPU], "nccl": "2.30"}
BLIND = {**TORCH, "available": False, "devices": []}


@pytest.mark.parametrize(
    ("driver", "torch", "dali", "states", "words"),
    [
        ("580.65.06", TORCH, 13, ["ok", "ok"], "H200, 140 GB"),
        ("550.54.15", {**TORCH, "cuda": "12.8"}, 12, ["ok", "ok"], "H200"),
        ("550.54.15", BLIND, 12, ["ok", "problem"], "built for CUDA 13.2, the driver 550.54.15 is too old"),
        ("550.54.15", {**TORCH, "cuda": "12.8"}, 13, ["ok", "ok", "problem"], "pip install -e '.[cuda12]'"),
        ("580.65.06", BLIND, 13, ["ok", "problem"], "CUDA_VISIBLE_DEVICES"),
        ("580.65.06", {**BLIND, "cuda": None}, 13, ["ok", "problem"], "built for CPUs only"),
        ("580.65.06", {**TORCH, "devices": [{**GPU, "works": False, "error": "no kernel image"}]}, 13, ["ok", "problem"], "no kernel image"),
        ("580.65.06", {**TORCH, "devices": [{**GPU, "free_gb": 9.0}]}, 13, ["ok", "note"], "only 9 GB free"),
        ("580.65.06", {}, None, ["ok"], "580"),
        ("", TORCH, 13, ["problem"], "nvidia-smi is there"),
        (None, BLIND, 13, ["note"], "on the CPU"),
    ],
)  # fmt: skip
def test_driver_torch_and_dali_fit_together(driver, torch, dali, states, words):
    findings = list(doctor_software.fit(driver, torch, dali))
    assert [finding.state for finding in findings] == states
    assert words in str([(finding.text, finding.remedy) for finding in findings])


def test_the_driver_is_asked(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for script, driver in (("echo 550.54.15; echo 550.54.15", "550.54.15"), ("echo No devices were found; exit 6", "")):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert doctor_software.asked_driver() == driver


FILES = {
    "folder": "runs", "kind": "nfs4", "free_gb": 900.0, "error": None, "write_mb_per_s": 400.0, "publish_ms": 5.0,
    "read_mb_per_s": None, "flock": True, "lockf": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("about", "change", "state", "words"),
    [
        ("run dir", {}, "ok", "400 MB/s"),
        ("run dir", {"free_gb": 0.5}, "problem", "almost full"),
        ("run dir", {"error": "cannot be written: Permission denied"}, "problem", "another run.dir"),
        ("shards", {"error": "cannot be written: Permission denied"}, "note", "Permission denied"),
        ("run dir", {"flock": False}, "note", "no locks (flock)"),
        ("run dir", {"publish_ms": 900.0}, "note", "checkpoint.every"),
        ("shards", {"write_mb_per_s": 3.0}, "note", "local disk"),
    ],
)
def test_file_systems_are_judged(about, change, state, words):
    (finding,) = doctor_machine.judge_files(about, FILES | change)
    assert finding.state == state and words in finding.text + finding.remedy


def test_a_file_in_place_of_a_folder_is_noticed(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        assert doctor_files.measure(folder)["error"] == f"cannot be made: {tmp_path / 'file'} is a file"
    assert doctor_files.measure(tmp_path / "new/folder")["error"] is None


def test_a_lock_that_does_not_hold_is_noticed(tmp_path):
    (tmp_path / "small0").touch()
    for name in ("flock", "lockf"):
        assert doctor_files.locks(tmp_path, name)
    with open(tmp_path / "small0") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not doctor_files.locks(tmp_path, "flock")
    assert doctor_files.measure(tmp_path / "not/there")["folder"].endswith(f"so far {tmp_path}")


def test_slurm_variables_are_compared_with_what_is_here():
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_PARTITION": "gpu", "SLURM_MPI_TYPE": "pmix"}
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "100000"}
    findings = list(doctor_machine.slurm(BLIND, job | step | {"SLURM_GPUS_ON_NODE": "8", "MASTER_ADDR": "no.invalid"}))
    assert [finding.state for finding in findings] == ["problem", "ok", "note", "problem"]
    for words in ("no.invalid", "partition gpu, step 0 task 1 of 2, PMI pmix", "100000 CPUs", "torch sees none"):
        assert any(words in finding.text for finding in findings), findings
    (batch,) = doctor_machine.slurm(TORCH, job)
    assert batch.state == "ok" and "batch script or shell" in batch.text
