"""The ways a job starts, each for real: torchrun, the deepspeed launcher with a hostfile, srun, and torchrun inside sbatch."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment, lines, train

import slurm
from ddpm_dist import processes, rendezvous
from ddpm_dist.errors import UserError
from slurm import until

STEPS = ("data.source=synthetic", "train.images=72", "train.audit=true", "train.audit_params_every=3")
ENDLESS = ("data.source=synthetic", "train.images=100_000_000")
DEEPSPEED = Path(sys.executable).with_name("deepspeed")


def command(folder: Path, *overrides: str) -> list[str]:
    """The trainer as a module with its arguments, to be put behind a launcher."""
    empty = folder.parent / "empty.yaml"
    empty.write_text("{}\n")
    return ["ddpm_dist.train", "--config", str(empty), f"run.dir={folder}", *TINY, *overrides]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """engine -> the audit of a run that torchrun started on 2 ranks."""
    known = {}

    def audit(engine: str) -> list[dict]:
        if engine not in known:
            run = tmp_path_factory.mktemp("torchrun") / "run"
            done = train(run, *STEPS, f"engine.name={engine}", ranks=2)
            assert done.returncode == 0, done.stderr
            known[engine] = lines(run / "audit.jsonl")
            assert len(known[engine]) == 6 and "params" in known[engine][-1]
        return known[engine]

    return audit


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def said(run: Path) -> dict:
    """What exit.json says."""
    return json.loads((run / "exit.json").read_text())


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if processes.born(pid)]


def wait_for_steps(run: Path, process: subprocess.Popen, count: int = 3) -> None:
    def stepped() -> bool:
        assert process.poll() is None, process.communicate()
        return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= count

    until(stepped, 120)


# --- the deepspeed launcher


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> str:
    """PYTHONPATH where mlflow is missing: the launcher's processes import all of it for a feature that is not used here."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['mlflow'] = None\n")
    return f"{folder}{os.pathsep}{environment()['PYTHONPATH']}"


@pytest.fixture
def deepspeed(tmp_path, quick):
    """Starts the ``deepspeed`` command as one of several nodes without ssh. What is left of it is killed at the end."""
    started = []
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")

    def start(*arguments: str, node: int = 0, port: int = 0, hosts: Path = hosts) -> subprocess.Popen:
        options = ["--hostfile", hosts, "--no_ssh", "--node_rank", node, "--master_addr", "127.0.0.1"]
        launcher = [DEEPSPEED, *options, "--master_port", port or free_port(), "--module", *arguments]
        # Background jobs of a shell script ignore SIGINT and pass that on, and with it DeepSpeed's launcher would never hear Ctrl-C.
        launcher = ["env", "--default-signal=INT", *launcher]
        process = subprocess.Popen(
            list(map(str, launcher)), env=environment(PYTHONPATH=quick), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_the_run_that_torchrun_trains(tmp_path, deepspeed, expected):
    run, port = tmp_path / "run", free_port()
    launcher = deepspeed(*command(run, *STEPS, "engine.name=deepspeed"), port=port)
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, output
    assert lines(run / "audit.jsonl") == expected("deepspeed")
    assert said(run)["code"] == 0
    assert not list(Path("/dev/shm").glob(f"deepspeed*_{port}_*"))


@pytest.mark.slow
def test_two_nodes_of_a_hostfile_are_one_run(tmp_path, deepspeed, expected):
    """A launcher per node, both on this machine: rank 1 is the first rank of its node."""
    run, hosts, port = tmp_path / "run", tmp_path / "two_hosts", free_port()
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    nodes = [deepspeed(*command(run, *STEPS), node=node, port=port, hosts=hosts) for node in (1, 0)]
    for launcher in nodes:
        output, _ = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, output
    assert lines(run / "audit.jsonl") == expected("ddp")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["upper", "lower"])
def test_a_killed_deepspeed_launcher_leaves_no_workers(tmp_path, deepspeed, victim):
    """Two processes make up the launcher: the command, and below it the parent of the workers."""
    run = tmp_path / "run"
    upper = deepspeed(*command(run, *ENDLESS))
    wait_for_steps(run, upper)
    (lower,) = children(upper.pid)
    workers = children(lower)
    assert len(alive(workers)) == 2
    os.kill(upper.pid if victim == "upper" else lower, signal.SIGKILL)
    until(lambda: not alive(workers), 10)
    until(lambda: not alive([lower]), 40)
    if victim == "upper":  # there was time to save
        assert upper.wait(timeout=60) == -signal.SIGKILL
        assert said(run)["code"] == 75 and list((run / "checkpoints").glob("step_*"))
    else:
        assert upper.wait(timeout=60) == 0  # the deepspeed command hides that the process below it was killed
        assert not (run / "exit.json").exists()


@pytest.mark.slow
def test_ctrl_c_saves_under_the_deepspeed_launcher(tmp_path, deepspeed):
    """The upper launcher leaves at once, the lower one waits; the ranks must not take the first for a crash."""
    run = tmp_path / "run"
    launcher = deepspeed(*command(run, *ENDLESS))
    wait_for_steps(run, launcher)
    workers = children(children(launcher.pid)[0])
    os.kill(workers[1], signal.SIGSTOP)  # a rank that takes long to come to the step boundary
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait(timeout=60)
    time.sleep(1.5)
    assert len(alive(workers)) == 2
    os.kill(workers[1], signal.SIGCONT)
    output, _ = launcher.communicate(timeout=60)  # until the last of them has closed it
    assert said(run)["code"] == 75 and said(run)["reason"] in ("SIGINT", "SIGTERM"), output
    assert "the launcher is gone" not in output
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{said(run)['step']:08d}"]
    assert not alive(workers)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- SLURM


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


@pytest.fixture
def probe(tmp_path):
    """A script that prints rank, world size, local rank, local world size, meeting point and the launchers that it follows."""
    path = tmp_path / "probe.py"
    path.write_text(
        "import os\n"
        "from ddpm_dist import rendezvous as r\n"
        "r.join()\n"
        "names = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'\n"
        "print(*[os.environ.get(name) for name in names], *[r.processes.read(pid, 'comm').strip() for pid, _ in r._followed])\n"
    )
    return f"{sys.executable} {path}"


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


def test_a_shell_is_no_launcher(probe):
    """Ranks that people describe by hand, with nohup or not, do not die with their shell."""
    described = environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    done = subprocess.run(["bash", "-c", f"{probe}; true"], env=described, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "0", "None", "127.0.0.1", "1"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("n[1-2]", "n1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("rack[2,4]node[07-09],x", "rack2node07"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert rendezvous.first_host(nodes) == first


def test_node_lists_are_read_as_slurm_reads_them(cluster):
    for nodes in ("n[1-2]", "gpu[003-007,9],login", "rack[2,4]node[07-09],x", "a-[1,3],b"):
        hosts = cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()
        assert len(hosts) > 1 and rendezvous.first_host(nodes) == hosts[0]


def test_jobs_and_steps_have_ports_of_their_own():
    ports = [
        rendezvous.port({"SLURM_JOB_ID": str(job), **({} if step is None else {"SLURM_STEP_ID": str(step)})})
        for job in range(9_999_950, 10_000_050)
        for step in (None, *range(96))
    ]
    assert len(set(ports)) == len(ports) and min(ports) >= 20_000 and max(ports) < 32_768


def test_a_batch_script_is_no_step_where_its_slurmstepd_cannot_be_seen():
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert not rendezvous.is_step(batch)
    assert rendezvous.is_step({**batch, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"})


def test_tasks_per_node():
    assert rendezvous.expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert rendezvous.expand_counts("16") == [16]


def test_a_first_node_without_an_address_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no scontrol either
    step = {"SLURM_STEP_NODELIST": "nowhere[1-2].invalid", "SLURM_STEP_NUM_NODES": "2"}
    with pytest.raises(UserError, match="'nowhere1.invalid' of rank 0.*set MASTER_ADDR"):
        rendezvous.address_of_first(step)
    assert rendezvous.address_of_first({**step, "SLURM_STEP_NUM_NODES": "1"}) == "127.0.0.1"


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    from ddpm_dist.runtime import device_index

    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="local rank 1 has no GPU: 1 visible"):
        device_index(1, 1)
    for name, value in (("STEP_ID", "0"), ("PROCID", "1"), ("STEP_NUM_TASKS", "4"), ("GPUS_ON_NODE", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert device_index(3, 1) == 0  # --gpus-per-task=1: this task sees its own only
    with pytest.raises(UserError, match="local rank 4 has no GPU"):
        device_index(4, 4)  # all see all, and there are too few
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="local rank 1 has no GPU"):
        device_index(1, 1)


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


def test_torchrun_starts_the_ranks_again_after_one_has_died(tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = subprocess.Popen(
        [*torchrun, "-m", *command(run, "data.source=synthetic", "train.images=1800", "checkpoint.every=120")],
        env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until(lambda: list((run / "checkpoints").glob("step_*[0-9]")), 120)
        (victim,) = [pid for pid in slurm.descendants(process.pid) if "RANK=1" in environ_of(pid)]
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert f"failed: rank 1 (process {victim} on " in output, output
    assert "continuing at step" in output and said(run)["code"] == 0


def environ_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []
