"""A real SLURM on this machine: munged, slurmctld and some slurmd in a folder of their own, as the user who runs the tests.

    with slurm.cluster() as cluster:
        done = cluster.run("srun", "-N2", "hostname")

Everything the cluster starts, jobs included, lives below one supervisor process (this file, run as a script), which becomes the
parent of whatever is orphaned there. It ends them all, and the clients (srun ...), when its standard input closes: when the ``with`` block
ends, when pytest is interrupted, and when pytest is killed. Other people's munge or SLURM on the machine are not touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BINARIES = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
FOREIGN = ("SLURM", "SRUN_", "SBATCH_", "SALLOC_", "SQUEUE_", "SCANCEL_", "PMI")  # another cluster's variables

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
ReturnToService=2
MinJobAge=600
FirstJobId={first_job}
"""


class Cluster:
    """The handle of a running cluster. ``nodes``: names n1, n2, ...; all of them are this machine."""

    def __init__(self, folder: Path, supervisor: subprocess.Popen, nodes: list[str]) -> None:
        self.folder, self.nodes, self._supervisor = folder, nodes, supervisor

    def environment(self, **extra: str) -> dict[str, str]:
        """What clients need, on top of this process's environment without anything another SLURM left in it."""
        values = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        return {**values, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), **extra}

    def popen(self, *command: str, cwd: Path | str = "/", **extra: str) -> subprocess.Popen:
        """Start a client (srun, sbatch ...); output is captured as text. ``extra``: environment variables of the job."""
        return subprocess.Popen(
            [*map(str, command)], cwd=cwd, env=self.environment(**extra), text=True, preexec_fn=_end_with_parent,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *command: str, cwd: Path | str = "/", timeout: float = 120, **extra: str):
        """Run a client to its end; gives the completed process. A client that takes longer is killed: TimeoutExpired."""
        process = self.popen(*command, cwd=cwd, **extra)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def submit(self, script: Path, *options: str, cwd: Path | str = "/", **extra: str) -> int:
        """sbatch; gives the job's number."""
        done = self.run("sbatch", "--parsable", *options, str(script), cwd=cwd, **extra)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.strip().split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, ExitCode ("75:0"), Restarts, Reason, NodeList ..."""
        done = self.run("scontrol", "--oneliner", "show", "job", str(number))
        assert done.returncode == 0, done.stderr
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def wait(self, number: int, *states: str, timeout: float = 120) -> dict[str, str]:
        """Wait until the job is in one of ``states`` (default: over); gives its description."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")

        def over() -> dict[str, str] | None:
            job = self.job(number)
            return job if job["JobState"] in wanted else None

        return until(over, timeout, lambda: str(self.job(number)), every=0.2)

    def clear(self) -> None:
        """Cancel every job and kill what it runs, so that the next test finds idle nodes."""
        while jobs := self.run("squeue", "--noheader", "--format=%i").stdout.split():
            self.run("scancel", *jobs)
            stepds = [pid for pid in self.processes() if command_of(pid)[:1] and "slurmstepd" in command_of(pid)[0]]
            for pid in {pid for stepd in stepds for pid in descendants(stepd)}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node (again, after it was killed)."""
        self._start(["slurmd", "-D", "-N", name, "-L", str(self.folder / f"{name}.log")])

    def node_pid(self, name: str) -> int:
        """The process id of a node's slurmd."""
        return int((self.folder / f"{name}.pid").read_text())

    def processes(self) -> list[int]:
        """Every process below the supervisor: daemons, slurmstepds, jobs."""
        return descendants(self._supervisor.pid)

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-30:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, command: list[str]) -> None:
        self._supervisor.stdin.write(json.dumps(command) + "\n")
        self._supervisor.stdin.flush()

    def _boot(self, limit: float = 60) -> None:
        def nodes_are_idle() -> bool:
            said = self.run("sinfo", "--noheader", "--Node", "--format=%T", timeout=20).stdout.split()
            # One line per node and partition. "idle*": has not answered yet
            return set(said) == {"idle"} and len(said) >= len(self.nodes)

        munged = ["munged", "--foreground", "--force", "--num-threads=2", f"--socket={self.folder}/munge.socket"]
        munged += [f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munged.pid"]
        self._start([*munged, f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munge.log"])
        until((self.folder / "munge.socket").exists, limit, self.logs)
        self._start(["slurmctld", "-D", "-L", str(self.folder / "slurmctld.log")])
        for name in self.nodes:
            self.start_node(name)
        until(nodes_are_idle, limit, self.logs)


@contextlib.contextmanager
def cluster(nodes: int = 2, cpus: int = 8, gpus: int = 0, settings: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """Start a cluster and end it with everything that runs on it.

    nodes, cpus, gpus: how many nodes, and what each claims to have, whatever this machine has (a GPU is a link to /dev/null;
    steps that ask for some get CUDA_VISIBLE_DEVICES). settings: further lines of slurm.conf, for example "KillWait=2".
    """
    names = [f"n{i + 1}" for i in range(nodes)]
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets have names of at most 107 characters
    try:
        _configure(folder, names, cpus, gpus, settings)
        command = [sys.executable, str(Path(__file__).resolve()), str(folder)]
        environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        supervisor = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        handle = Cluster(folder, supervisor, names)
        handle._boot()
        yield handle
    finally:
        with contextlib.suppress(OSError):
            supervisor.stdin.close()
        supervisor.wait(timeout=60)


def needed() -> None:
    """Skip the calling test where SLURM is not installed; with DDPM_DIST_REQUIRE_SLURM (continuous integration) let it fail."""
    import pytest

    if missing := [name for name in BINARIES if shutil.which(name, path=PATH) is None]:
        reason = f"SLURM is not installed here ({', '.join(missing)} not found): apt-get install slurm-wlm munge"
        pytest.fail(reason) if os.environ.get("DDPM_DIST_REQUIRE_SLURM") else pytest.skip(reason)


def _configure(folder: Path, names: list[str], cpus: int, gpus: int, settings: tuple[str, ...]) -> None:
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    port, *ports = _free_ports(1 + len(names))
    # Ports of a job follow from its number: two clusters on one machine must not count the same jobs.
    lines = CONF.format(
        host=host, port=port, user=getpass.getuser(), folder=folder, first_job=secrets.randbelow(1_000_000) + 1
    ).splitlines()
    gres = ""
    if gpus:
        devices = [folder / f"gpu{i}" for i in range(gpus)]
        for device in devices:
            device.symlink_to("/dev/null")  # it has to be a device
        lines.append("GresTypes=gpu")
        gres = f" Gres=gpu:{gpus}"
        files = f"{folder}/gpu[0-{gpus - 1}]" if gpus > 1 else str(devices[0])
        (folder / "gres.conf").write_text(f"NodeName={','.join(names)} Name=gpu File={files}\n")
    for name, node_port in zip(names, ports, strict=True):
        where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port}"
        lines.append(f"NodeName={name} {where} CPUs={cpus} RealMemory=16000{gres} State=UNKNOWN")
    lines.append(f"PartitionName=main Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text("\n".join([*lines, *settings]) + "\n")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def until(condition, seconds: float, explain=lambda: "", every: float = 0.05):
    """Wait until ``condition()`` is true and give its value; AssertionError with ``explain()`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s: {explain()}"
        time.sleep(every)
    return value


def descendants(pid: int) -> list[int]:
    """The process ids of all children of ``pid``, their children and so on; what has ended meanwhile is left out."""
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in map(int, (thread / "children").read_text().split()):
                    found += [child, *descendants(child)]
    return found


def command_of(pid: int) -> list[str]:
    """The words of a process's command line; [] when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def supervise(folder: Path) -> None:
    """Start each command (a JSON list per line of standard input); when the input ends, end them all and remove the folder."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what loses its parent below us becomes our child
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end comes through the pipe
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    for line in sys.stdin:
        command = json.loads(line)
        with open(folder / f"{command[0]}.out.log", "ab") as log:
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, preexec_fn=_end_with_parent
            )
    while left := [*descendants(os.getpid()), *_clients(folder)]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        _reap()
    shutil.rmtree(folder, ignore_errors=True)


def _clients(folder: Path) -> list[int]:
    """Processes started with this cluster's configuration: srun keeps a second one that outlives the first."""
    mark, found = f"SLURM_CONF={folder}/slurm.conf".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))
