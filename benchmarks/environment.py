"""What a number was measured on: hardware, versions, commit and command, for the JSON reports."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddpm_dist.config import Config, flatten

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "deepspeed",
    "diffusers",
    "triton",
)

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def _processor_ticks() -> tuple[int, int] | None:
    """(stolen, all) since the machine was started, see proc_stat(5); stolen: what a hypervisor gave to other machines meanwhile."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        return int(words[7]), sum(map(int, words))
    except (OSError, ValueError, IndexError):
        return None


_AT_START = _processor_ticks()


def stolen_share() -> float | None:
    """Share of this machine's processor time that its host gave to others since this module was imported; None: it does not say."""
    now = _processor_ticks()
    if _AT_START is None or now is None or now[1] == _AT_START[1]:
        return None
    return (now[0] - _AT_START[0]) / (now[1] - _AT_START[1])


def environment() -> dict[str, Any]:
    """JSON-serialisable description of machine, software and command."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "cpu_bf16": cpu_has_bf16(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "gpus": gpus,
            **({"driver": driver} if gpus and (driver := gpu_driver()) else {}),
            "load_average": os.getloadavg()[0],
            "stolen_share": stolen_share(),
        },
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **(_libraries() if gpus else {}),
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": _command(),
    }


def _command() -> str:
    """The command as one would type it in the checkout: no folders of this machine, not where the reports go."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if not (word in ("--json", "--markdown") and next(words, None))]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *map(without_folders, kept)])


def without_folders(word: str) -> str:
    """ "data.shards=.../cifar64" for "data.shards=/home/me/shards/cifar64"."""
    key, equals, value = word.partition("=") if "=" in word else ("", "", word)
    return f"{key}{equals}.../{Path(value).name}" if os.path.isabs(value) else word


def settings_of(config: Config) -> dict[str, Any]:
    """The configuration of a report, "section.key": value, without folders of this machine."""
    values = {key: value for key, value in flatten(config.to_dict()).items() if key not in ("run.dir", "tracking.uri")}
    return {key: without_folders(value) if isinstance(value, str) else value for key, value in values.items()}


def gpu_driver() -> str | None:
    """The version of the GPU's kernel driver, such as "570.124.06"; None where the system does not say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        if lines := done.stdout.split():
            return lines[0]
    except (OSError, subprocess.SubprocessError):
        pass
    return driver_in(DRIVER_FILE.read_text()) if DRIVER_FILE.exists() else None


def driver_in(text: str) -> str | None:
    """The version in what the driver says of itself in /proc."""
    found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", text, re.MULTILINE)
    return found.group(1) if found else None


def _libraries() -> dict[str, str]:
    """Versions of cuDNN and NCCL as torch loads them; those that it has."""
    found = {}
    if (number := torch.backends.cudnn.version()) is not None:
        found["cudnn"] = cudnn_words(number)
    if torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def cudnn_words(number: int) -> str:
    """ "9.10.2" of 91002; before version 9 "8.9.7" of 8907."""
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def cpu_name() -> str:
    """The processor as the system names it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where not, bfloat16 is slower than float32."""
    flags = next((line for line in _cpuinfo() if line.startswith(("flags", "Features"))), "").split()
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, with "+changes" where files differ from it."""

    def git(*words: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
