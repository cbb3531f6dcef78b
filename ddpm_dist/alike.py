"""Whether all nodes of a job run the same thing: the same code, packages, configuration and data."""

from __future__ import annotations

import hashlib
import platform
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ddpm_dist
from ddpm_dist.config import Config, flatten
from ddpm_dist.errors import UserError
from ddpm_dist.runtime import Runtime

PACKAGES = ("torch", "numpy", "safetensors", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
ABSENT = "(absent)"
OF_A_NODE = ("data.shards", "data.cache_dir")  # may be local disks; what the shards hold is compared by the fingerprint


def check_alike(runtime: Runtime, config: Config, data_fingerprint: str | None) -> None:
    """Compare every node with rank 0's. Collective; raises the same UserError on every rank, which names nodes and differences.

    A run on nodes that differ would either stop somewhere in the middle or go on with wrong numbers.
    """
    facts = None
    if runtime.local_rank == 0:  # one rank speaks for its node
        facts = {**_software(), "data": data_fingerprint or ABSENT, **_configuration(config)}
    said: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(said, (socket.gethostname(), facts), group=runtime.control)
    (host, here), lines = said[0], []
    for rank, (other_host, there) in enumerate(said):
        differences = [
            f"{key}: {there.get(key, ABSENT)}, there {here.get(key, ABSENT)}"
            for key in sorted((here or {}).keys() | (there or {}).keys())
            if here is not None and there is not None and there.get(key, ABSENT) != here.get(key, ABSENT)
        ]
        if differences:
            lines.append(f"rank {rank} on {other_host}: {'; '.join(differences)}")
    if lines:
        raise UserError(
            f"the nodes of this job differ from that of rank 0 ({host}):\n  " + "\n  ".join(lines) + "\n"
            "give all nodes the same environment, checkout, configuration and shards (a shared folder, or the same copy)"
        )


def _software() -> dict[str, str]:
    found = {"ddpm_dist": _digest_of_sources(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ABSENT
    found["torch"] = torch.__version__  # with the build, such as +cu130
    return found


def _digest_of_sources() -> str:
    """The version, and a digest of the code itself: a checkout on node-local disks may be forgotten on one of them."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return f"{ddpm_dist.__version__} ({digest.hexdigest()[:8]})"


def _configuration(config: Config) -> dict[str, str]:
    return {key: str(value) for key, value in flatten(config.to_dict()).items() if key not in OF_A_NODE}
