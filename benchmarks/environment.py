"""What a number was measured on: hardware, versions, commit and command, for the JSON reports."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

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


def environment() -> dict[str, Any]:
    """JSON-serialisable description of machine, software and command."""
    return {
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "cpu_bf16": cpu_has_bf16(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "load_average": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
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
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *kept])


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
