"""slurm/*.sh on a real SLURM: two nodes, every way to be interrupted, and what never comes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, lines, train

import slurm
from slurm import until

TINY_NODE = ("--gpus-per-node=0", "--cpus-per-task=2")
FLAGSHIP, ANY = ROOT / "slurm/train_cifar64.sh", ROOT / "slurm/train.sh"
AUDIT = ("train.audit=true", "train.audit_params_every=1", "data.source=synthetic")
ENDLESS = (*AUDIT, "train.images=100_000_000", "optim.decay_images=1000")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes that claim 8 GPUs each; jobs of the partition "high" preempt those of "low"."""
    slurm.needed()
    settings = (
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "KillWait=12",
        "PartitionName=low Nodes=n[1-2] PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE",
        "PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF",
    )
    with slurm.cluster(cpus=40, gpus=8, settings=settings) as cluster:
        yield cluster


@pytest.fixture
def place(tmp_path, cluster):
    """Where the jobs are submitted; whatever still runs at the end is cancelled."""
    (tmp_path / "empty.yaml").write_text("{}\n")
    yield tmp_path
    cluster.clear()


class Run:
    """A submitted training job."""

    def __init__(
        self, cluster: slurm.Cluster, place: Path, script: Path, *options: str, config: str, overrides=(), **variables
    ):
        self.cluster, self.place = cluster, place
        arguments = [config] if script == ANY else []
        environment = {
            "OMP_NUM_THREADS": "1", "PROCESSES_PER_NODE": "1", "CONFIG": config, "DDPM_DIST_TIMEOUT_MINUTES": "1",
            "VIRTUAL_ENV": str(Path(sys.executable).parent.parent), **variables,
        }  # fmt: skip
        submitted = cluster.run(
            "sbatch", "--parsable", *options, str(script), *arguments, "run.dir=run", *TINY, *overrides,
            cwd=place, **environment,
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        self.number = int(submitted.stdout)
        self.logs = place / "slurm-logs" / str(self.number)

    def log(self) -> str:
        files = [self.place / f"slurm-{self.number}.out", *self.logs.glob("*.log"), self.logs / "history.json"]
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in files if path.exists())

    def job(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def attempts(self) -> list[dict]:
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.logs / "history.json").read_text())["attempts"]
        return []

    def said(self) -> dict:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.logs / "exit.json").read_text())
        return {}

    def trains(self, restart: int) -> None:
        """Wait until the attempt with this number has done two steps."""

        def stepped() -> bool:
            said = self.said()
            if len(self.attempts()) != restart + 1 or said.get("reason") != "training":
                return False
            audit = self.place / "run/audit.jsonl"
            return audit.exists() and audit.read_text().count("\n") >= said["start_step"] + 2

        until(stepped, 180, self.log, every=0.1)

    def returns(self, restarts: int, code: int | None, *reasons: str) -> int:
        """Wait until the job is queued again, exactly once, and start it at once; gives the last step of the attempt that ended."""
        self.again(restarts)
        said = self.said()
        assert said["code"] == code and said["reason"] in reasons, self.log()
        assert len(self.attempts()) == restarts, self.log()
        self.start_now()
        return said["step"]

    def again(self, restarts: int) -> None:
        def queued() -> bool:
            job = self.job()
            return (job["JobState"], job["Restarts"]) == ("PENDING", str(restarts))

        until(queued, 180, lambda: f"{self.job()}\n{self.log()}", every=0.2)

    def start_now(self) -> None:
        """A requeued job is held for two minutes; this skips all but the second in which its nodes would refuse it."""
        time.sleep(1.5)
        updated = self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        assert updated.returncode == 0, updated.stderr
        self.cluster.wait(self.number, "RUNNING", timeout=60)

    def over(self, timeout: float = 180) -> dict[str, str]:
        """Wait until it has ended, and see that it does not come back."""
        done = self.cluster.wait(self.number, timeout=timeout)
        time.sleep(0.5)
        assert self.job() == done, self.log()
        return done


def rank_process(cluster: slurm.Cluster, rank: int) -> int:
    for pid in cluster.processes():
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_every_interruption_of_a_two_node_job_is_followed_by_the_same_run(tmp_path, cluster, place):
    """The script as it is, but for the nodes' size: one job, seven attempts, and at last the audit of a run without any."""
    config = place / "config.yaml"
    config.write_text("train: {images: 100_000_000}\n")
    run = Run(
        cluster, place, FLAGSHIP, "--nodes=2", "--partition=low", config=str(config),
        overrides=(*AUDIT, "optim.decay_images=1000"),
    )  # fmt: skip
    number = str(run.number)

    saved = [0]
    run.trains(0)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    saved.append(run.returns(1, 75, "SIGUSR1"))

    run.trains(1)
    cluster.run("scancel", "--signal=USR1", number)  # the steps, not the batch shell
    saved.append(run.returns(2, 75, "SIGUSR1"))

    run.trains(2)
    os.kill(rank_process(cluster, 1), signal.SIGUSR1)
    saved.append(run.returns(3, 75, "SIGUSR1"))

    run.trains(3)
    cluster.run("scontrol", "requeue", number)
    saved.append(run.returns(4, 75, "SIGTERM", "SIGUSR1"))  # from SLURM, and from the batch shell

    run.trains(4)
    urgent = cluster.run(
        "sbatch", "--parsable", "-phigh", "-N2", "--exclusive", "-o/dev/null", "--wrap=true", cwd=place
    )
    saved.append(run.returns(5, 75, "SIGTERM"))  # SLURM gave it a minute, and need not requeue it any more
    cluster.wait(int(urgent.stdout), "COMPLETED")

    run.trains(5)
    lost = rank_process(cluster, 1)
    os.kill(lost, signal.SIGSTOP)  # a machine that is gone does not even close its connections
    os.kill(cluster.node_pid("n2"), signal.SIGKILL)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    until(lambda: run.job()["Restarts"] == "6", 30, run.log)
    with contextlib.suppress(ProcessLookupError):
        os.kill(lost, signal.SIGKILL)
    cluster.start_node("n2")
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    steps = saved[-1] + 3
    config.write_text(f"train: {{images: {12 * steps}}}\n")
    run.again(6)
    assert run.said()["code"] in (None, 1), run.log()  # killed, or told by its connection that the other rank is gone
    run.start_now()

    done = run.over()
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("COMPLETED", "0:0", "6"), run.log()
    attempts = run.attempts()
    assert [attempt["restart"] for attempt in attempts] == list(range(7))
    # Each began where the one before it had saved; the lost node's attempt saved nothing.
    assert [attempt["start_step"] for attempt in attempts] == [*saved, saved[-1]]
    ends = [attempt["then"] for attempt in attempts]
    assert ends == [*["requeued"] * 3, "ended by SLURM", "requeued", "ended by SLURM", "done"]
    output = (place / f"slurm-{number}.out").read_text()
    assert all(f"job {number}, restart {restart}, node 0: n1" in output for restart in range(7))
    assert f"step {steps}  " in output and "node 1" not in output
    other = (run.logs / "node1-n2.log").read_text()
    assert all(f"job {number}, restart {restart}, node 1: n2" in other for restart in range(7))

    whole = train(tmp_path / "whole", *AUDIT, f"train.images={12 * steps}", "optim.decay_images=1000", ranks=2)
    assert whole.returncode == 0, whole.stderr
    assert lines(place / "run/audit.jsonl") == lines(tmp_path / "whole/audit.jsonl")


@pytest.mark.slow
def test_the_time_limit_requeues_and_the_user_s_scancel_does_not(cluster, place):
    MlflowClient = pytest.importorskip("mlflow.tracking").MlflowClient  # noqa: N806
    run = Run(
        cluster, place, ANY, *TINY_NODE, "--time=1", "--signal=B:USR1@50", config="empty.yaml",
        overrides=(*ENDLESS, "tracking.mlflow=true"),
    )  # SLURM looks at time limits every half minute: the signal comes after 10 to 40 seconds  # fmt: skip
    saved = run.returns(1, 75, "SIGUSR1")
    cluster.run("scontrol", "update", f"JobId={run.number}", "TimeLimit=10")
    run.trains(1)
    cluster.run("scancel", str(run.number))
    done = run.over()
    assert (done["JobState"], done["Restarts"]) == ("CANCELLED", "1"), run.log()
    assert run.said()["start_step"] == saved
    assert run.said()["code"] == 75, run.log()  # it saved, and leaves for good
    assert run.attempts()[-1]["then"] in ("ended by SLURM", None), run.log()
    # One MLflow run over both starts, which says whose job it was.
    (recorded,) = MlflowClient(f"sqlite:///{place / 'mlflow.db'}").search_runs(["1"])
    assert (recorded.data.tags["slurm.job_id"], recorded.data.tags["slurm.restart_count"]) == (str(run.number), "1")


@pytest.mark.slow
def test_a_signal_to_steps_whose_ranks_cannot_hear_it_yet_is_handed_on(cluster, place):
    run = Run(cluster, place, ANY, *TINY_NODE, config="empty.yaml", overrides=ENDLESS)
    until(lambda: "node 0: " in run.log(), 60, run.log, every=0.05)
    cluster.run("scancel", "--signal=USR1", str(run.number))  # torchrun is about to start
    run.again(1)
    assert (run.said()["code"], run.said()["reason"]) == (75, "SIGUSR1"), run.log()
    assert len(run.attempts()) == 1


@pytest.mark.slow
def test_a_crash_is_requeued_and_a_crash_loop_stops(cluster, place):
    """The first and the last of four attempts are real; the two between them are copied into the history to save time."""
    broken = (*ENDLESS, "optim.lr=1e30", "optim.warmup=0", "train.max_skipped_steps=1", "train.grad_clip=null")
    run = Run(cluster, place, ANY, *TINY_NODE, config="empty.yaml", overrides=broken)
    run.again(1)
    (record,) = run.attempts()
    (run.logs / "history.json").write_text(json.dumps({"attempts": [record] * 3}))
    run.start_now()
    done = run.over()
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("FAILED", "1:0", "1"), run.log()
    assert "no progress over 3 restarts" in run.log()
    assert [(attempt["code"], attempt["start_step"]) for attempt in run.attempts()] == [(1, 0)] * 4
    assert [attempt["then"] for attempt in run.attempts()] == [*["requeued"] * 3, "stopped"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "variables", "words"),
    [
        ("optim.lr=fast", {}, "optim.lr"),
        ("train.images=12", {"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR=nowhere.invalid does not resolve"),
        ("train.images=12", {"VIRTUAL_ENV": "/nowhere"}, "ddpm_dist is not installed for /nowhere/bin/python"),
    ],
)
def test_bad_input_is_said_and_not_requeued(cluster, place, wrong, variables, words):
    run = Run(cluster, place, ANY, *TINY_NODE, config="empty.yaml", overrides=(*AUDIT, wrong), **variables)
    done = run.over()
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("FAILED", "2:0", "0"), run.log()
    assert run.log().count("\nerror: ") == 1 and words in run.log(), run.log()


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_the_job_comes_back(cluster, place):
    run = Run(
        cluster, place, FLAGSHIP, "--nodes=2", "--partition=low", config="empty.yaml",
        overrides=(*ENDLESS, "train.hang_seconds=5"),
    )  # fmt: skip
    run.trains(0)
    stopped = rank_process(cluster, 1)
    os.kill(stopped, signal.SIGSTOP)
    run.again(1)  # also node 2's part is ended, whose torchrun does not notice
    assert f"rank 1 (process {stopped} on " in run.said()["reason"], run.log()
    assert run.said()["code"] == 1 and run.log().count("failed: rank 1 ") == 1
