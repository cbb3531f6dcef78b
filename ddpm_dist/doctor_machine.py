"""The doctor's checks of the machine: file systems, memory, limits, shared memory, names and ports, SLURM."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpm_dist import rendezvous
from ddpm_dist.doctor_report import Finding, call, last_line

SLOW_MB_PER_S = 30.0
SLOW_PUBLISH_MS = 300.0  # a small file written, flushed and renamed


def files(about: str, folder: Path) -> Iterator[Finding]:
    """Speed and locks where ``folder`` is. Another process looks, because a dead file server holds whoever asks."""
    code, output, errors = call([sys.executable, "-m", "ddpm_dist.doctor_files", str(folder), about], 90)
    if code is None:
        yield Finding("problem", about, f"{folder}: {errors}", "its file server does not answer, or is far too slow")
    elif code != 0:
        yield Finding("problem", about, f"{folder}: {last_line(errors)}")
    else:
        yield from judge_files(about, json.loads(last_line(output)))


def judge_files(about: str, said: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings from the numbers of doctor_files: free_gb, write_mb_per_s, publish_ms, read_mb_per_s, flock, lockf, error, ..."""
    where = f"{said['folder']} ({said['kind']}, {said['free_gb']:,.0f} GB free)"
    values = dict(said)
    if said["error"]:
        if about == "shards":  # they are only read
            yield Finding("note", about, f"{where}: {said['error']}", "packing has to write elsewhere", values)
        else:
            yield Finding(
                "problem",
                about,
                f"{where}: {said['error']}",
                "give another run.dir, on a file system that all nodes can write",
                values,
            )
        return
    read = f", shards read at {said['read_mb_per_s']:,.0f} MB/s" if said["read_mb_per_s"] else ""
    speed = f"{where}: {said['write_mb_per_s']:,.0f} MB/s written and flushed{read}, {said['publish_ms']:.1f} ms for a small file"
    slow = said["write_mb_per_s"] < SLOW_MB_PER_S or said["publish_ms"] > SLOW_PUBLISH_MS
    locks = [name for name in ("flock", "lockf") if not said[name]]
    if said["free_gb"] < 2:
        yield Finding("problem", about, speed, "almost full: remove something, or take another folder", values)
    elif locks:
        remedy = "MLflow's sqlite needs them (set tracking.uri), a run's dead owner is noticed after 60 s only; Lustre: mount with -o flock"
        yield Finding("note", about, f"{speed}; no locks ({', '.join(locks)})", remedy, values)
    elif slow:
        remedy = (
            "slow: larger checkpoint.every and checkpoint.keep_last=1"
            if about == "run dir"
            else "slow: data.cache, or copy the shards to a local disk"
        )
        yield Finding("note", about, f"{speed}; locks work", remedy, values)
    else:
        yield Finding("ok", about, f"{speed}; locks work", values=values)


def memory() -> Iterator[Finding]:
    info = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if ":" in line
    }
    total, free = info["MemTotal"] / 1e9, info["MemAvailable"] / 1e9
    text, limit = f"{free:.0f} of {total:.0f} GB available", cgroup_limit()
    if limit is not None and limit / 1e9 < total:
        total = limit / 1e9
        free, text = min(free, total), f"{text}, limited to {total:.0f} GB (container or job)"
    values = {"total_gb": total, "available_gb": free}
    if free < 2:
        yield Finding(
            "problem",
            "memory",
            text,
            "a rank takes 1 to 2 GB before its first step: end something, or ask for more (--mem)",
            values,
        )
    elif free < 8:
        yield Finding("note", "memory", text, "one or two ranks fit; --mem for more in a job", values)
    else:
        yield Finding("ok", "memory", text, values=values)


def cgroup_limit() -> int | None:
    """Bytes that this process and its neighbours in the group may have, or None."""
    limits = []
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in own:
        _, controllers, path = line.split(":", 2)
        base, name = (
            (Path("/sys/fs/cgroup"), "memory.max")
            if not controllers
            else (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")
        )
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = base / path.lstrip("/")
        for one in (folder, *folder.parents):
            if one == base.parent:
                break
            try:
                limits.append(int((one / name).read_text()))
            except (OSError, ValueError):  # "max", or a container's view
                continue
    return min(limits, default=None)


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft:,} (hard limit {'none' if hard == resource.RLIM_INFINITY else f'{hard:,}'})"
    if soft < 1024:
        yield Finding(
            "problem",
            "open files",
            text,
            "ulimit -n 4096 before the start, or in /etc/security/limits.conf",
            {"soft": soft},
        )
    else:
        yield Finding("ok", "open files", text, values={"soft": soft})


def shared_memory() -> Iterator[Finding]:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        yield Finding(
            "problem", "/dev/shm", f"not there ({error.strerror})", "mount a tmpfs there: NCCL and DALI need it"
        )
        return
    text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    if usage.free < 256e6:
        yield Finding(
            "problem",
            "/dev/shm",
            text,
            "NCCL needs some MB per rank: --shm-size=16g or --ipc=host for Docker; remove what dead programs left there",
        )
    else:
        yield Finding("ok", "/dev/shm", text, values={"free_gb": usage.free / 1e9})


def host_name() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        yield Finding(
            "problem",
            "host name",
            f"{name} has no address ({error.strerror})",
            f"a line for {name} in /etc/hosts; until then GLOO_SOCKET_IFNAME=INTERFACE",
        )
        return
    if all(one.startswith("127.") or one == "::1" for one in found):
        yield Finding(
            "note", "host name", f"{name} is {', '.join(found)}, which other hosts cannot reach; one host is fine",
            "with several: GLOO_SOCKET_IFNAME=INTERFACE (see: ip -br addr), or the real address in /etc/hosts",
        )  # fmt: skip
    else:
        yield Finding("ok", "host name", f"{name} is {', '.join(found)}")


def ports() -> Iterator[Finding]:
    """A server on any port, and a connection to it, as the ranks' meeting is."""
    wanted = os.environ.get("MASTER_PORT", "")
    if wanted and not (wanted.isdecimal() and rendezvous.is_free(int(wanted))):
        yield Finding("problem", "ports", f"MASTER_PORT={wanted} is taken or no port", "unset it, or choose a free one")
        return
    with socket.create_server(("", 0)) as server:
        number = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", number), timeout=5):
            pass
    yield Finding(
        "ok",
        "ports",
        f"a server on port {number} can be reached" + (f"; MASTER_PORT={wanted} is free" if wanted else ""),
    )


def slurm(probed: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """What the job's variables say and whether it is what this process has; outside of a job the partitions."""
    address = environ.get("MASTER_ADDR")
    if address and not rendezvous.resolves(address):
        yield Finding("problem", "SLURM", f"MASTER_ADDR={address} does not resolve", "unset it, or correct it")
    if "SLURM_JOB_ID" not in environ:
        if shutil.which("sinfo") is None:
            yield Finding("ok", "SLURM", "not installed here; launch/multinode.sh starts several hosts over ssh")
            return
        code, output, errors = call(["sinfo", "--noheader", "--format=%P %a %D nodes, %l, %G"], 20)
        if code == 0:
            partitions = "; ".join(output.splitlines()[:6])
            yield Finding("ok", "SLURM", f"no job; partitions: {partitions}")
        else:
            yield Finding(
                "note",
                "SLURM",
                f"no job; sinfo fails: {last_line(errors)}",
                "no slurmctld here? Jobs cannot be submitted from this machine",
            )
        return
    job = " ".join(f"{key.partition('.')[2]}={value}" for key, value in rendezvous.slurm_job(environ).items())
    step = environ.get("SLURM_STEP_ID")
    where = (
        f"step {step} task {environ.get('SLURM_PROCID')} of {environ.get('SLURM_STEP_NUM_TASKS')}"
        if step
        else "batch script or shell"
    )
    pmi = environ.get("SLURM_MPI_TYPE") or ("pmi2" if "PMI_RANK" in environ else "not set")
    text = f"{job}, partition {environ.get('SLURM_JOB_PARTITION')}, {where}, PMI {pmi} (not used)"
    yield Finding("ok", "SLURM", text)
    cores, wanted = len(os.sched_getaffinity(0)), environ.get("SLURM_CPUS_PER_TASK")
    if wanted and wanted.isdecimal() and cores < int(wanted):
        yield Finding(
            "note", "SLURM", f"{wanted} CPUs per task were asked for, this process may use {cores}",
            "srun --cpus-per-task=N, or export SRUN_CPUS_PER_TASK (since SLURM 22.05 srun does not take it over)",
        )  # fmt: skip
    gpus = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_JOB_GPUS")
    if gpus and gpus != "0" and probed and not probed["devices"]:
        yield Finding(
            "problem",
            "SLURM",
            f"the job has GPUs ({gpus}) and torch sees none",
            "nvidia-smi in the job; CUDA_VISIBLE_DEVICES; the driver of this node",
        )
