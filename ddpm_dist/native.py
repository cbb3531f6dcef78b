"""C++ of ours, compiled where it runs: once for a user, kept in the user's cache folder, or not at all, with the reason."""

from __future__ import annotations

import contextlib
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
HASH = 32  # bytes of a sha256


class NotBuilt(Exception):
    """Why there is no such program here; what it would have done is done in another way."""


def instructions() -> frozenset[str]:
    """What this processor can, in the words of Linux ("avx2", ...); nothing where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def load(source: Path, flags: list[str]) -> ctypes.CDLL:
    """The shared library compiled from ``source``; flags: of the compiler, beside those for a library.

    It is compiled only when the cache folder has none of the same source and flags. Several processes may do so at the same time.

    Raises:
        NotBuilt: there is no compiler, or it fails, or the system does not load what it made.
    """
    try:
        name = f"{source.stem}-{hashlib.sha256(repr((source.read_bytes(), flags)).encode()).hexdigest()[:16]}.so"
        folder = cache_folder()
        if folder is not None and _is_whole(folder / name):
            with contextlib.suppress(OSError):  # a home that several systems share: it was compiled for another one
                return ctypes.CDLL(str(folder / name))
        with tempfile.TemporaryDirectory(prefix="ddpm_dist-") as own:
            made = Path(own) / name
            _compile(source, made, flags)
            kept = _keep(made, folder / name) if folder is not None else None
            for place in filter(None, (kept, made)):
                try:
                    return ctypes.CDLL(str(place))
                except OSError as error:
                    problem = error
    except OSError as error:
        raise NotBuilt(f"no C++ can be compiled here: {error}") from None
    raise NotBuilt(
        f"what the C++ compiler made cannot be loaded: {problem} (where programs may not be run from {own}, set {VARIABLE} to a folder "
        "of yours from which they may, or TMPDIR)"
    )


def cache_folder() -> Path | None:
    """Where compiled programs are kept, made if it is not there. None: nowhere that is the user's alone, and what lies there is run."""
    named = os.environ.get(VARIABLE)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(named) if named else base / "ddpm_dist"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_ours_alone(folder) else None
    except (OSError, RuntimeError):  # no home, or not writable
        return None


def _is_ours_alone(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _compile(source: Path, target: Path, flags: list[str]) -> None:
    compiler = os.environ.get("CXX", "").strip() or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise NotBuilt(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    try:
        words = shlex.split(compiler)
        done = subprocess.run(
            [*words, "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", *flags, "-o", str(target), str(source)],
            capture_output=True, text=True, errors="replace", timeout=SECONDS,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(
            f"the C++ compiler {compiler} cannot be run: {error} (spaces in CXX have to be quoted)"
        ) from None
    if done.returncode or not target.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {done.returncode}")
        raise NotBuilt(f"the C++ compiler {compiler} does not compile {source.name}: {said[:300]}")


def _keep(made: Path, place: Path) -> Path | None:
    """The program at its place, whole or not at all; that it cannot be kept costs another start some seconds."""
    content, part = made.read_bytes(), None
    try:
        handle, part = tempfile.mkstemp(
            prefix=f".{place.name}-", dir=place.parent
        )  # readable and writable by the user alone
        with os.fdopen(handle, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, place)
        return place
    except OSError:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)
        return None


def _is_whole(place: Path) -> bool:
    """A program ends with the hash of what stands before (loaders do not look there): of one that is cut short the system would only
    notice when it runs into the missing part, and kill the process."""
    try:
        content = place.read_bytes() if _is_ours_alone(place) else b""
    except OSError:
        return False
    return len(content) > HASH and hashlib.sha256(content[:-HASH]).digest() == content[-HASH:]
