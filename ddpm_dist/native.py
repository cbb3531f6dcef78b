"""C++ of ours, compiled where it runs: once for a user, kept in the user's cache folder, or not at all, with the reason."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

VARIABLE = "DDPM_DIST_CACHE"  # a folder in place of ~/.cache/ddpm_dist
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300  # a compiler that takes longer hangs


class NotBuilt(Exception):
    """Why there is no such program here; what it would have done is done in another way."""


def load(source: Path, flags: list[str]) -> ctypes.CDLL:
    """The shared library compiled from ``source``; flags: of the compiler, beside those for a library.

    It is compiled only when the cache folder has none of the same source and flags. Several processes may do so at the same time.

    Raises:
        NotBuilt: there is no compiler, or it fails, or the system does not load what it made.
    """
    text = source.read_bytes()
    name = f"{source.stem}-{hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:16]}.so"
    folder = cache_folder()
    if folder is not None and (folder / name).exists():
        try:
            return ctypes.CDLL(str(folder / name))
        except OSError:
            pass  # a home that several systems share: compiled for another one
    with tempfile.TemporaryDirectory(prefix="ddpm_dist-") as own:
        made = Path(own) / name
        _compile(source, made, flags)
        try:
            library = ctypes.CDLL(str(made))
        except OSError as error:
            raise NotBuilt(f"what the C++ compiler made cannot be loaded: {error}") from None
        if folder is not None:
            _keep(made, folder / name)
    return library


def cache_folder() -> Path | None:
    """Where compiled programs are kept, made if it is not there. None: nowhere that is the user's alone, and what lies there is run."""
    named = os.environ.get(VARIABLE)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(named) if named else base / "ddpm_dist"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        return folder if status.st_uid == os.getuid() and not status.st_mode & 0o022 else None
    except (OSError, RuntimeError):  # no home, or not writable
        return None


def _compile(source: Path, target: Path, flags: list[str]) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise NotBuilt(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    command = [*shlex.split(compiler), "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", *flags]
    try:
        done = subprocess.run(
            [*command, "-o", str(target), str(source)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"the C++ compiler {compiler} cannot be run: {error}") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise NotBuilt(f"the C++ compiler {compiler} does not compile {source.name}: {said}")


def _keep(made: Path, place: Path) -> None:
    """Whole or not at all; that it cannot be kept costs another start some seconds."""
    part = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        shutil.copyfile(made, part)
        part.replace(place)
    except OSError:
        part.unlink(missing_ok=True)
