"""The deepspeed launcher with a hostfile, for real: what it trains, and what happens to its ranks when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import launched
import pytest
from conftest import environment, lines
from launched import ENDLESS, STEPS, alive, command, said, wait_for_steps

from slurm import until

DEEPSPEED = Path(sys.executable).with_name("deepspeed")

expected = launched.expected  # fixture


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


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
