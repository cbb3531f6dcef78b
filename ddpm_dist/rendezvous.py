"""Who started this process, and how its ranks find each other: torchrun, the deepspeed launcher, srun, or nobody.

    python -m ddpm_dist.rendezvous        # inside a SLURM job: HOST:PORT for torchrun --rdzv_endpoint

torchrun and the deepspeed launcher describe a rank in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under plain srun
``join`` derives the same variables from what SLURM says, so that everything behind it knows one description only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

from ddpm_dist import processes
from ddpm_dist.errors import UserError, exit_codes

# Ports below what Linux hands out by itself (from 32768). A prime count, so that neighbouring jobs and steps differ.
FIRST_PORT, PORTS = 20_000, 12_763
STEPS = 97  # as many steps of one job get ports of their own before the next job's begin

LAUNCHER_SCRIPTS = ("torchrun", "deepspeed", "deepspeed.exe")
LAUNCHER_MODULES = (
    "torch.distributed.run", "torch.distributed.launch", "deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch",
)  # fmt: skip

_followed: list[tuple[int, str]] = []


def join() -> None:
    """Call it first in every entry point that may be a rank, before anything looks at RANK. A second call does nothing.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment where srun started several
    tasks, and ties this process to its launcher: a launcher that is killed leaves no ranks behind. Raises UserError where
    the other ranks' address cannot be found out.
    """
    if "RANK" not in os.environ and is_step(os.environ):
        os.environ.update(rank_variables(os.environ))
    # What the deepspeed launcher calls it. Where DeepSpeed finds its own name on a CPU, it makes shared memory for its
    # inference (66 MB per rank, named after the port) and never removes it.
    if local_size := os.environ.pop("LOCAL_SIZE", None):
        os.environ.setdefault("LOCAL_WORLD_SIZE", local_size)
    follow_launcher()
    if "RANK" in os.environ and "MASTER_ADDR" not in os.environ and is_step(os.environ):
        os.environ["MASTER_ADDR"] = address_of_first(os.environ)


def is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks.

    A shell inside an allocation (sbatch, salloc) has SLURM_NTASKS too, and a batch script SLURM_PROCID=0. A job that was submitted
    from inside a step even has that step's variables; so what they say must be the step that this process really runs in.
    """
    if "SLURM_PROCID" not in environ or int(environ.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return False
    return step_above() in (None, f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}")


def step_above() -> str | None:
    """JOB.STEP of the slurmstepd that this process runs under, from its title; None where that cannot be seen (containers)."""
    pid = os.getppid()
    while pid > 1 and not _is_slurmstepd(pid):
        pid = processes.parent(pid)
    title = re.search(r"\[(\d+\.\w+)\]", processes.read(pid, "cmdline")) if pid > 1 else None
    return title.group(1) if title else None


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """A step's task in torchrun's words, without MASTER_ADDR: finding that may fail, and then the ranks have to be known."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    per_node = expand_counts(tasks)
    node = int(environ.get("SLURM_NODEID", 0))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(per_node[node] if node < len(per_node) else 1),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port(environ)),
    }


def slurm_job(environ: Mapping[str, str]) -> dict[str, str]:
    """What identifies a start inside a SLURM job: its number, how often it was restarted, its nodes. {} outside of one.

    restart: requeues of this job so far (SLURM_RESTART_COUNT), whether by a script, an administrator or a lost node.
    """
    if "SLURM_JOB_ID" not in environ:
        return {}
    job = environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    restart, nodes = environ.get("SLURM_RESTART_COUNT", "0"), environ.get("SLURM_JOB_NODELIST", "")
    return {"slurm.job_id": job, "slurm.restart_count": restart, "slurm.nodes": nodes}


def expand_counts(text: str) -> list[int]:
    """SLURM's tasks per node, "2(x3),1": [2, 2, 2, 1]."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def port(environ: Mapping[str, str]) -> int:
    """A port that follows from job and step, so that all ranks know it and two jobs on one node do not meet."""
    job = int(environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID") or 0)
    step = int(environ["SLURM_STEP_ID"]) % (STEPS - 1) + 1 if "SLURM_STEP_ID" in environ else 0
    return FIRST_PORT + (job * STEPS + step) % PORTS


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list such as "gpu[003-007,9],login": rank 0's node."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def address_of_first(environ: Mapping[str, str]) -> str:
    """An address of the first node of this step, or of the job where there is no step. UserError if it has none."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST", "")
    count = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES", "")
    if count == "1":
        return "127.0.0.1"
    name = first_host(nodes)
    for address in (lambda: name, lambda: _node_address(name)):
        if resolves(found := address()):
            return found
    raise UserError(
        f"{socket.gethostname()}: the node {name!r} of rank 0 (first of {nodes!r}) has no address: "
        "neither its name nor the NodeAddr of 'scontrol show node' resolves; set MASTER_ADDR to an address of that node"
    )


def endpoint(environ: Mapping[str, str]) -> str:
    """HOST:PORT on the first node of this job for torchrun: MASTER_ADDR and MASTER_PORT where they are set.

    Called on the first node itself (a batch script is) it looks whether the port is free, and takes another one of the job's own
    ports if it is not. UserError: MASTER_ADDR does not resolve, MASTER_PORT is no port or taken, no port is free.
    """
    address, wanted = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if address and not resolves(address):
        raise UserError(
            f"{socket.gethostname()}: MASTER_ADDR={address} does not resolve to an address: unset it, so that the first node of "
            "the job is taken, or correct it"
        )
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST", "")
    here = environ.get("SLURMD_NODENAME") == first_host(nodes)
    if address and here and not is_mine(address):
        print(
            f"warning: {socket.gethostname()}: MASTER_ADDR={address} is no address of this node, where rank 0 will be. Unless it is "
            "forwarded here the ranks will wait for each other in vain: unset it, or give an address of this node",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    if wanted and not (wanted.isdecimal() and 0 < int(wanted) < 65_536):
        raise UserError(f"MASTER_PORT={wanted} is not a port: unset it or give a number in 1..65535")
    first = port(environ)
    # The ports of the steps that the job is least likely to start come next.
    others = (FIRST_PORT + (first + step - FIRST_PORT) % PORTS for step in range(STEPS - 1, 0, -1))
    mine = [int(wanted)] if wanted else [first, *others]
    free = next((one for one in mine if not here or is_free(one)), None)
    if free is None:
        which = f"port {wanted} (MASTER_PORT)" if wanted else f"every port from {first} on"
        raise UserError(
            f"{socket.gethostname()}: {which}, where the ranks meet, is taken by another program; unset MASTER_PORT, so that a "
            "free one is taken, or set it to a free one"
        )
    return f"{address or address_of_first(environ)}:{free}"


def is_free(number: int) -> bool:
    """Whether a server can listen there; as torch's does, on all addresses."""
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
            probe.listen(1)
        except OSError:
            return False
    return True


def resolves(name: str) -> bool:
    try:
        return bool(name) and bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def is_mine(address: str) -> bool:
    """Whether this machine has ``address`` (a name or a number), so that a server here can be reached by it."""
    for family, kind, _, _, where in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
        with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
            probe.bind(where)
            return True
    return False


def _node_address(name: str) -> str:
    """What SLURM itself talks to, where the node's name is none that the network knows; "" if SLURM cannot be asked."""
    if not name:
        return ""
    command = ["scontrol", "--oneliner", "show", "node", name]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\bNodeAddr=(\S+)", said)
    return found.group(1) if found else ""


def follow_launcher() -> None:
    """Find the launchers that this process is a rank of, and die at once (SIGKILL) with the one that is its parent.

    torchrun, the deepspeed launcher (two processes, one above the other) and srun's slurmstepd are recognised; a shell never
    is, so that a run started with nohup outlives its shell. Linux only, elsewhere the launcher's own clean-up has to do.
    """
    if "RANK" not in os.environ or _followed:
        return
    parent, launchers = os.getppid(), launchers_above()
    if "TORCHELASTIC_RUN_ID" in os.environ or parent in launchers:
        _die_with_parent(parent)
    _followed.extend((pid, processes.born(pid)) for pid in launchers)


def watch_launchers(stopping: Callable[[], bool]) -> None:
    """From now on stop (SIGTERM to this process, SIGKILL 8 seconds later) when a launcher above this process is gone.

    The kernel looks after a parent only (``follow_launcher``); this is for the launchers further up. stopping: whether a stop
    was requested already. Then nothing is done: of two deepspeed processes the upper one leaves at the first Ctrl-C, and the
    lower one gives the ranks the time that they need.
    """
    if _followed:
        threading.Thread(target=_watch, args=(stopping,), name="launcher watch", daemon=True).start()


def launchers_above() -> list[int]:
    """Process ids of the launchers this rank belongs to, nearest first.

    Between the rank and the nearest one there may be wrappers (a shell script, numactl) that carry the same rank in their
    environment; above it only launchers that started each other count.
    """
    marks = {f"{name}={os.environ[name]}" for name in ("RANK", "SLURM_PROCID") if name in os.environ}
    pid, found = os.getppid(), []
    while pid > 1:
        if _is_launcher(pid):
            found.append(pid)
        elif found or not marks & set(processes.strings(pid, "environ")):
            break
        pid = processes.parent(pid)
    return found


def _is_launcher(pid: int) -> bool:
    if _is_slurmstepd(pid):
        return True
    words = iter(processes.strings(pid, "cmdline")[1:])
    for word in words:
        if word == "-m":
            return next(words, "") in LAUNCHER_MODULES
        if word in ("-X", "-W"):
            next(words, None)
        elif not word.startswith("-"):
            return os.path.basename(word) in LAUNCHER_SCRIPTS
    return False


def _is_slurmstepd(pid: int) -> bool:
    return processes.read(pid, "comm").strip() == "slurmstepd"


def _die_with_parent(parent: int) -> None:
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(stopping: Callable[[], bool]) -> None:
    # Looking again and again, because pidfd_open is too new for the kernels of many clusters.
    while all(born and processes.born(pid) == born for pid, born in _followed):
        time.sleep(0.5)
    for _ in range(10):  # a signal that has arrived already may not have been heard by the main thread yet
        if stopping():
            return
        time.sleep(0.1)
    if not stopping():
        print("the launcher is gone, stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(7)
        os.kill(os.getpid(), signal.SIGKILL)


@exit_codes
def main() -> int:
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("this is no SLURM job (SLURM_JOB_ID is not set): run it in a batch script or inside salloc")
    print(endpoint(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
