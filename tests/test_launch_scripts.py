"""launch/: one training on several hosts over a remote shell, under torchrun and deepspeed, and on this machine alone.

The hosts are this machine under other names: a remote shell of a few lines gives each an empty environment, as ssh does; and real ssh to
a real sshd where that is installed.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment

from ddpm_dist import processes
from slurm import until

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


class Start:
    """A script of launch/ that trains in ``folder``; everything that belongs to it carries a mark in its environment."""

    def __init__(self, folder: Path, script: str, *words: str, **variables: str) -> None:
        self.run, self.mark = folder / "run", f"DDPM_DIST_MARK={folder}"
        (folder / "empty.yaml").write_text("{}\n")
        values = environment(VIRTUAL_ENV=sys.prefix, DDPM_DIST_MARK=str(folder), **variables)
        words = [word.replace("TRAIN", "--config empty.yaml run.dir=run data.source=synthetic") for word in words]
        command = [
            "bash",
            str(ROOT / "launch" / script),
            *" ".join(words).split(),
            *(TINY if "empty.yaml" in " ".join(words) else []),
        ]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=values,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def ends(self, seconds: float = 120) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def wait_for_steps(self, count: int = 2) -> None:
        metrics = self.run / "metrics.jsonl"
        until(
            lambda: self.process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= count),
            120,
        )
        assert self.process.poll() is None, self.process.communicate()

    def left(self) -> list[int]:
        """Its processes that are there, whoever their parent is."""
        here = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in here if self.mark in processes.strings(pid, "environ") and processes.born(pid)]

    def ranks(self) -> list[int]:
        """In the order of the ranks."""
        found = {}
        for pid in self.left():
            values = dict(word.partition("=")[::2] for word in processes.strings(pid, "environ"))
            if "RANK" in values and "ddpm_dist.train" in processes.strings(pid, "cmdline"):
                found[int(values["RANK"])] = pid
        return [found[rank] for rank in sorted(found)]

    def said(self) -> dict:
        return json.loads((self.run / "exit.json").read_text())

    def saved_once(self) -> bool:
        return [path.name for path in (self.run / "checkpoints").glob("step_*")] == [f"step_{self.said()['step']:08d}"]


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(script: str, *words: str, **variables: str) -> Start:
        started.append(Start(tmp_path, script, *words, **variables))
        return started[-1]

    yield begin
    for one in started:
        for pid in {one.process.pid, *one.left()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.communicate()


@pytest.fixture
def hosts(tmp_path) -> dict[str, str]:
    """Variables with which nodeA and nodeB are hosts; nodeX does not answer, nodeY has no Python of ours, nodeH hangs."""
    shell = tmp_path / "remote_shell"
    shell.write_text(
        "#!/bin/bash\n"
        "host=$1; shift\n"
        "[[ $host != nodeX ]] || exit 255\n"
        f"[[ $host != nodeH ]] || DDPM_DIST_MARK={tmp_path} exec sleep 1000\n"
        "[[ $host != nodeY ]] || exit 127\n"
        "cd /\n"
        f'exec env -i HOME="$HOME" PATH=/usr/bin:/bin DDPM_DIST_MARK={tmp_path} bash -c "$*"\n'
    )
    shell.chmod(0o755)
    return {"DDPM_DIST_RSH": str(shell), "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def ssh(tmp_path) -> dict[str, str]:
    """The same with real ssh: an sshd of this test's own, on a port of its own, with keys of its own."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("sshd is not installed here: apt-get install openssh-server")
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    shutil.copy(tmp_path / "key.pub", tmp_path / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {tmp_path}/host_key\nAuthorizedKeysFile {tmp_path}/authorized\n"
        "PasswordAuthentication no\nStrictModes no\nPidFile none\nUsePAM no\nPermitRootLogin yes\n"
    )
    (tmp_path / "ssh_config").write_text(
        f"Host node*\nHostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nIdentityFile {tmp_path}/key\n"
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\nBatchMode yes\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # it wants this folder
    log = open(tmp_path / "sshd.log", "w")
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=log, start_new_session=True)
    client = f"ssh -F {tmp_path}/ssh_config"
    try:
        until(lambda: subprocess.run([*client.split(), "nodeA", "true"], capture_output=True).returncode == 0, 20)
        yield {"DDPM_DIST_RSH": client, "MASTER_ADDR": "127.0.0.1"}
    finally:
        server.kill()
        server.wait()
        log.close()


ENDLESS = "train.images=100_000_000"


@pytest.mark.slow
def test_two_hosts_train_one_run_and_ctrl_c_is_one_stop_request(start, hosts):
    """Then one machine goes on with it to the end."""
    run = start("multinode.sh", "nodeA,nodeB TRAIN", ENDLESS, **hosts, DDPM_DIST_PASS="COLOUR", COLOUR="light blue")
    run.wait_for_steps()
    ranks = run.ranks()
    assert len(ranks) == 2
    for pid in ranks:  # what ssh would not have brought along
        assert {"COLOUR=light blue", "OMP_NUM_THREADS=1", "WORLD_SIZE=2"} <= set(processes.strings(pid, "environ"))
        assert "DDPM_DIST_RSH" not in processes.read(pid, "environ")
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    os.killpg(run.process.pid, signal.SIGINT)
    code, output = run.ends()
    assert code == 75 and run.said()["code"] == 75, output
    assert run.saved_once() and not run.left()
    assert output.count("SIGINT: the ranks save and leave") == 1 and "SIGUSR1) received" not in output
    assert "[nodeA] ddpm: starting with" in output and "on 2 cpu rank(s)" in output

    rest = start("torchrun_local.sh", "TRAIN", f"train.images={12 * (run.said()['step'] + 2)}", PROCESSES_PER_NODE="1")
    code, output = rest.ends()
    assert code == 0 and "continuing at step" in output, output
    assert rest.said()["step"] == int(output.split("continuing at step ")[1].split()[0].replace(",", "")) + 2


@pytest.mark.slow
def test_over_real_ssh_a_lost_connection_makes_all_ranks_save_and_leave(start, ssh):
    run = start("multinode.sh", "nodeA,nodeB TRAIN", ENDLESS, **ssh)
    run.wait_for_steps()
    assert len(run.ranks()) == 2
    clients = [pid for pid in run.left() if "nodeB" in processes.strings(pid, "cmdline")]
    assert len(clients) == 1
    os.kill(clients[0], signal.SIGKILL)
    code, output = run.ends()
    assert code == 75 and run.saved_once(), output
    until(lambda: not run.left(), 20)


@pytest.mark.slow
def test_when_one_host_fails_the_others_are_ended(start, hosts):
    """Even one that hangs: rank 0 is stopped when the torchrun of the other host is killed."""
    run = start("multinode.sh", "nodeA,nodeB TRAIN", ENDLESS, **hosts, DDPM_DIST_LEAVE_SECONDS="2")
    run.wait_for_steps()
    first, second = run.ranks()
    os.kill(first, signal.SIGSTOP)
    os.kill(processes.parent(second), signal.SIGKILL)
    code, output = run.ends(60)
    assert code == 1 and not run.left(), output
    assert "nodeB ended with code 1; ending nodeA" in output


@pytest.mark.slow
def test_when_the_script_is_killed_the_hosts_save_and_leave(start, hosts):
    run = start("multinode.sh", "nodeA,nodeB TRAIN", ENDLESS, **hosts)
    run.wait_for_steps()
    run.process.kill()
    until(lambda: not run.left(), 30)
    assert run.said()["code"] == 75 and run.saved_once()


@pytest.mark.slow
def test_the_deepspeed_launcher_on_a_hostfile(start, hosts, tmp_path):
    (tmp_path / "hosts").write_text("# two\nlocalhost slots=1\n\nnodeB slots=1\n")
    quick = tmp_path / "quick"  # without mlflow, which the launcher's processes import for nothing
    quick.mkdir()
    (quick / "sitecustomize.py").write_text("import sys\nsys.modules['mlflow'] = None\n")
    path = f"{quick}{os.pathsep}{environment()['PYTHONPATH']}"
    run = start("deepspeed.sh", "hosts TRAIN engine.name=deepspeed", ENDLESS, **hosts, PYTHONPATH=path)
    run.wait_for_steps()
    assert len(run.ranks()) == 2
    run.process.send_signal(signal.SIGTERM)
    code, output = run.ends()
    assert code == 75 and run.saved_once() and not run.left(), output


@pytest.mark.slow
def test_all_devices_of_this_machine(start):
    """Stopped (75), then with bad input (2), which torchrun makes 1 of."""
    run = start("torchrun_local.sh", "--nproc_per_node=2 -- TRAIN", ENDLESS)
    run.wait_for_steps()
    assert len(run.ranks()) == 2
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.ends()
    assert code == 75 and run.saved_once() and not run.left(), output
    bad = start("torchrun_local.sh", "TRAIN", "optim.lrr=1", PROCESSES_PER_NODE="1")
    code, output = bad.ends()
    assert code == 2 and output.count("did you mean optim.lr?") == 1, output


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("multinode.sh", "nodeA,nodeX TRAIN", "nodeX cannot be reached; 'ssh nodeX true' has to work"),
        ("multinode.sh", "nodeY,nodeA TRAIN", "nodeY ended with code 127"),
        ("multinode.sh", "nodeA,nodeB,nodeA TRAIN", "nodeA is there twice"),
        ("multinode.sh", "nodeA,-oProxyCommand=x TRAIN", "line 2 of the hosts"),
        ("multinode.sh", "--hostfile nothing TRAIN", "the hostfile nothing cannot be read"),
        ("multinode.sh", "--hostfile empty TRAIN", "no host is given"),
        ("multinode.sh", "", "give the hosts first"),
        ("deepspeed.sh", "slotless TRAIN", "nodeB: deepspeed has to know how many ranks"),
    ],
)
def test_wrong_hosts_are_named_and_nothing_starts(start, hosts, tmp_path, script, words, said):
    (tmp_path / "empty").write_text("# nobody\n")
    (tmp_path / "slotless").write_text("nodeA slots=2\nnodeB\n")
    refused = start(script, words, **hosts)
    code, output = refused.ends(60)
    assert code == 2 and output.count("error: ") == 1 and said in output, output
    assert not refused.run.exists() and not refused.left()


@pytest.mark.parametrize(
    ("script", "words", "wrong", "said"),
    [
        (
            "multinode.sh",
            "nodeA,nodeB TRAIN",
            {"PROCESSES_PER_NODE": "two"},
            "PROCESSES_PER_NODE=two is not a number of ranks",
        ),
        ("multinode.sh", "nodeA,nodeB TRAIN", {"DDPM_DIST_RSH": "ssh 'x"}, "DDPM_DIST_RSH=ssh 'x is not a command"),
        ("torchrun_local.sh", "--nproc_per_node=0 -- TRAIN", {}, "--nproc_per_node=0 is not a number of ranks"),
        ("torchrun_local.sh", "--nproc-per-node many -- TRAIN", {}, "--nproc-per-node=many is not a number of ranks"),
    ],
)
def test_wrong_settings_are_named_and_nothing_starts(start, hosts, script, words, wrong, said):
    refused = start(script, words, **hosts | wrong)
    code, output = refused.ends(60)
    assert code == 2 and output.count("error: ") == 1 and said in output, output
    assert not refused.run.exists() and not refused.left()


def test_a_host_that_hangs_is_left_without_a_trace(start, hosts):
    waiting = start("multinode.sh", "nodeA,nodeH TRAIN", **hosts)
    until(lambda: [pid for pid in waiting.left() if "sleep" in processes.strings(pid, "cmdline")], 60)
    os.killpg(waiting.process.pid, signal.SIGINT)
    code, output = waiting.ends(60)
    assert code == 75 and "stopped before anything was started" in output, output
    assert not waiting.run.exists() and not waiting.left()


def test_what_only_a_host_can_see_is_said_with_its_name(start, hosts):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, output = start("multinode.sh", "nodeA,nodeB TRAIN", **hosts, MASTER_PORT=port).ends(60)
    assert code == 2 and f"[nodeA] error: nodeA: port {port} is taken" in output, output
    code, output = start("multinode.sh", "nodeA,nodeB TRAIN", **hosts | {"MASTER_ADDR": "no.invalid"}).ends(60)
    assert code == 2 and "[nodeB] error: nodeB: no.invalid, where the ranks meet, is no name known here" in output, (
        output
    )


def test_the_container_recipes_take_what_is_there():
    """They cannot be built here; but what they copy exists and is what an installation needs."""
    docker = re.findall(r"^COPY (.+) \S+$", (ROOT / "launch/Dockerfile").read_text(), re.MULTILINE)
    apptainer = re.findall(r"^    (\S+) /opt/ddpm_dist/\S+$", (ROOT / "launch/apptainer.def").read_text(), re.MULTILINE)
    for names in (set(" ".join(docker).split()), set(apptainer)):
        assert names == {"pyproject.toml", "constraints.txt", "README.md", "ddpm_dist", "configs", "launch"}
        assert all((ROOT / name).exists() for name in names)
