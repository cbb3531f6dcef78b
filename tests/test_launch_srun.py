"""srun, sbatch and salloc on a real SLURM: which ranks they make, what those train, and what happens when they end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import launched
import pytest
from conftest import ROOT, environment, lines
from launched import ENDLESS, STEPS, alive, command, said, wait_for_steps

import slurm
from ddpm_dist import processes, rendezvous
from slurm import until

expected, probe = launched.expected, launched.probe  # fixtures


@pytest.fixture(scope="module")
def running():
    slurm.needed()
    with slurm.cluster() as started:
        yield started


@pytest.fixture
def cluster(running):
    """Two idle nodes."""
    yield running
    running.clear()


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


PYTHON = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "DDPM_DIST_TIMEOUT_MINUTES": "2"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_srun_alone_trains_the_run_that_torchrun_trains(tmp_path, cluster, expected, engine):
    """The nodes are called n1 and n2, names that only SLURM knows."""
    run = tmp_path / "run"
    done = cluster.run(
        "srun", "-N2", "-n2", *python(*command(run, *STEPS, f"engine.name={engine}")), timeout=300, **PYTHON
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(run / "audit.jsonl") == expected(engine)
    assert said(run)["code"] == 0


def test_bad_input_under_srun_is_told_once(tmp_path, cluster):
    code = tmp_path / "exit.json"
    start = ["srun", "-N2", "-n2", *python(*command(tmp_path / "run", "optim.lr=fast"))]
    done = cluster.run(*start, **PYTHON, DDPM_DIST_EXIT_JSON=str(code))
    assert done.returncode == 2 and done.stderr.count("\nerror: ") + done.stderr.startswith("error: ") == 1, done.stderr
    assert "optim.lr" in done.stderr and json.loads(code.read_text())["code"] == 2


@pytest.mark.slow
def test_a_batch_job_runs_torchrun_on_two_nodes_and_single_processes(tmp_path, cluster, expected, probe):
    """In the batch script itself SLURM_PROCID and SLURM_NTASKS are set, but nobody else is there."""
    run, script = tmp_path / "run", tmp_path / "job.sh"
    script.write_text(
        textwrap.dedent(f"""\
            #!/bin/bash
            #SBATCH --nodes=2 --ntasks=2 --ntasks-per-node=1
            #SBATCH --output={tmp_path}/out.txt
            set -euo pipefail
            env | grep ^SLURM_PROCID=0
            {probe}
            srun --kill-on-bad-exit=1 {sys.executable} -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d \\
                --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$({sys.executable} -m ddpm_dist.rendezvous)" \\
                -m {shlex.join(command(run, *STEPS))}
            """)
    )
    job = cluster.wait(cluster.submit(script, **PYTHON))
    output = (tmp_path / "out.txt").read_text()
    assert job["JobState"] == "COMPLETED" and job["NumNodes"] == "2", output
    assert output.splitlines()[:2] == ["SLURM_PROCID=0", " ".join(["None"] * 6)]
    assert lines(run / "audit.jsonl") == expected("ddp")


@pytest.mark.slow
def test_a_cancelled_job_saves_and_leaves_nothing(tmp_path, cluster):
    run = tmp_path / "run"
    step = cluster.popen("srun", "-N2", "-n2", "--job-name=stopme", *python(*command(run, *ENDLESS)), **PYTHON)
    wait_for_steps(run, step)
    ranks = trainers(cluster)
    assert len(ranks) == 2
    number = cluster.run("squeue", "--noheader", "--name=stopme", "--format=%i").stdout.strip()
    assert cluster.run("scancel", number).returncode == 0
    output = step.communicate(timeout=60)
    assert step.returncode == 75, output  # srun hands on the code of its tasks
    assert said(run)["code"] == 75 and said(run)["reason"] == "SIGTERM"
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{said(run)['step']:08d}"]
    assert not alive(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["srun", "slurmstepd"])
def test_no_rank_outlives_what_srun_started_it_with(tmp_path, cluster, victim):
    run = tmp_path / "run"
    step = cluster.popen("srun", "-N2", "-n2", *python(*command(run, *ENDLESS)), **PYTHON)
    wait_for_steps(run, step)
    ranks = trainers(cluster)
    assert len(ranks) == 2
    for pid in [step.pid] if victim == "srun" else {processes.parent(rank) for rank in ranks}:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(ranks), 10)
    step.kill()
    step.communicate()
    assert not (run / "exit.json").exists()


def trainers(cluster: slurm.Cluster) -> list[int]:
    return [pid for pid in cluster.processes() if "ddpm_dist.train" in slurm.command_of(pid)]


def test_a_taken_port_is_named(tmp_path, cluster):
    errors = tmp_path / "errors"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        start = ["srun", "-N2", "-n2", f"--error={errors}", *python(*command(tmp_path / "run", *STEPS))]
        step = cluster.popen(*start, **PYTHON, MASTER_PORT=port)
        until(lambda: errors.exists() and "is taken by another program" in errors.read_text(), 60)
        assert f"error: {socket.gethostname()}: port {port}, where the ranks meet" in errors.read_text()
        assert "Traceback" not in errors.read_text()
        until(lambda: len(trainers(cluster)) == 1, 10)  # rank 0 has left
        cluster.clear()
        assert "task 0: Exited with exit code 2" in step.communicate()[1]


def test_what_srun_says_of_a_rank(cluster, probe):
    """With a shell between slurmstepd and the rank, on nodes that do not get the same number of tasks."""
    script = f"{probe}; true"
    done = cluster.run("srun", "-N2", "-n3", "bash", "-c", script, **PYTHON)
    ranks = sorted(line.split() for line in done.stdout.splitlines())
    port = ranks[0][5]
    assert 20_000 <= int(port) < 32_768
    assert ranks == [
        ["0", "3", "0", "2", "127.0.0.1", port, "slurmstepd"],
        ["1", "3", "1", "2", "127.0.0.1", port, "slurmstepd"],
        ["2", "3", "0", "1", "127.0.0.1", port, "slurmstepd"],
    ], done
    given = cluster.run(
        "srun", "-N2", "-n2", "bash", "-c", script, **PYTHON, MASTER_ADDR="localhost", MASTER_PORT="4711"
    )
    assert [line.split()[4:6] for line in given.stdout.splitlines()] == [["localhost", "4711"]] * 2
    second = cluster.run("srun", "-N2", "-n2", "bash", "-c", script, **PYTHON)
    assert second.stdout.split()[5] != port


@pytest.mark.parametrize("shell", ["srun -n1", "salloc -n2", "salloc -n2 srun --interactive -n1"])
def test_a_process_that_srun_did_not_multiply_is_alone(cluster, probe, shell):
    done = cluster.run(*shell.split(), "bash", "-c", f"{probe}; true", **PYTHON)
    assert done.stdout.split() == ["None"] * 6, done


def test_a_job_submitted_by_a_step_is_not_that_step(tmp_path, cluster, probe):
    """sbatch and salloc hand on every variable of the step they are called in."""
    script, out = tmp_path / "job.sh", tmp_path / "out.txt"
    script.write_text(f"#!/bin/bash\nenv | grep ^SLURM_STEP_NUM_TASKS\n{probe}\n")
    inside = f"((SLURM_PROCID)) || {{ sbatch --wait --ntasks=2 --output={out} {script}; salloc --ntasks=2 bash -c '{probe}; true'; }}"
    done = cluster.run("srun", "-N2", "-n2", "bash", "-c", inside, **PYTHON)
    assert out.read_text().split() == ["SLURM_STEP_NUM_TASKS=2", *["None"] * 6], done
    assert done.stdout.splitlines()[-1].split() == ["None"] * 6, done


def test_node_lists_are_read_as_slurm_reads_them(cluster):
    for nodes in ("n[1-2]", "gpu[003-007,9],login", "rack[2,4]node[07-09],x", "a-[1,3],b"):
        hosts = cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()
        assert len(hosts) > 1 and rendezvous.first_host(nodes) == hosts[0]


def test_the_test_cluster_ends_with_whoever_started_it(tmp_path):
    """Killed without a chance to clean up: no daemon, no job and no folder are left."""
    slurm.needed()
    script = tmp_path / "start.py"
    script.write_text(
        "import slurm, time\n"
        "with slurm.cluster() as cluster:\n"
        "    job = cluster.popen('srun', '-N2', '-n2', 'bash', '-c', 'setsid sleep 1000 & sleep 1000')\n"
        "    slurm.until(lambda: sum(slurm.command_of(pid)[:1] == ['sleep'] for pid in cluster.processes()) == 4, 30, cluster.logs)\n"
        "    print(cluster.folder, *cluster.processes(), job.pid, *slurm.descendants(job.pid), flush=True)\n"
        "    time.sleep(1000)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(PYTHONPATH=str(ROOT / "tests")),
        stdout=subprocess.PIPE,
        text=True,
    )
    folder, *pids = owner.stdout.readline().split()
    assert len(pids) >= 12  # munged, slurmctld, 2 slurmd, 2 slurmstepd, 4 sleeps, 2 srun
    owner.kill()
    owner.wait()
    until(lambda: not alive([int(pid) for pid in pids]) and not Path(folder).exists(), 8)
