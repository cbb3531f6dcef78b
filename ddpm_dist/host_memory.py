"""How much memory of the machine this process may still use."""

from __future__ import annotations

from pathlib import Path


def free_host_memory() -> int | None:
    """Bytes that this process may still use: what the system has, or what is left of its cgroup's limit. None: unknown."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            whole = int((Path("/sys/fs/cgroup") / limit).read_text())
            limits.append(whole - int((Path("/sys/fs/cgroup") / used).read_text()))
        except (OSError, ValueError):  # no cgroup, or no limit ("max")
            continue
    return min(limits) if limits else None
