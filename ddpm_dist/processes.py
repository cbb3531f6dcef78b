"""What /proc says of processes. Linux only; elsewhere nothing is found."""

from __future__ import annotations

from pathlib import Path


def read(pid: int, name: str) -> str:
    """A file of /proc, "" where it does not exist or is somebody else's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def strings(pid: int, name: str) -> list[str]:
    return read(pid, name).split("\0")


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name (which may hold anything): state, parent, ..."""
    return read(pid, "stat").rpartition(")")[2].split()


def parent(pid: int) -> int:
    fields = stat(pid)
    return int(fields[1]) if fields else 0


def born(pid: int) -> str:
    """The start time: tells a process from a later one with the same number. "" once it has ended."""
    fields = stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""
