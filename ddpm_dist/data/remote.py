"""A shard wherever it lies, opened from a given byte on: over http, by a command, through fsspec, or as a file.

Credentials come from where the tools look for them: the environment, and for http and https ``.netrc`` (web.py).
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import urllib.error
from typing import Any
from urllib.parse import unquote, urlsplit

from ddpm_dist.data import web
from ddpm_dist.data.remote_source import Lasting, Passing, Source, in_words
from ddpm_dist.errors import UserError

RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
# These start other programs, so they need a process group that can be ended as a whole; webdataset gives them none.
COMMANDS = {"s3": ("aws", "s3", "cp", "--only-show-errors", "{}", "-"), "gs": ("gsutil", "-q", "cat", "{}")}


def open_source(url: str, begin: int, timeout: float) -> Source:
    """Open ``url`` at byte ``begin``. timeout: seconds to connect, and for which each read may wait. Raises Lasting, Passing."""
    scheme = "pipe" if url.startswith("pipe:") else url.split("://", 1)[0].lower() if "://" in url else ""
    try:
        if scheme in ("http", "https"):
            return _http(url, begin, timeout)
        if scheme in ("", "file"):
            return _local(unquote(urlsplit(url).path) if scheme else url, begin)
        command = _command(scheme, url)
        return _Command(command, timeout) if command is not None else _fsspec(scheme, url, begin)
    except (ValueError, UnicodeError):
        raise Lasting("this is no address that can be opened") from None


# -- http --------------------------------------------------------------------------------------------------------------


class _Web(Source):
    def __init__(self, begin: int, total: int | None, file: Any) -> None:
        super().__init__(begin, total, file)
        self.tells_end = bool(file.chunked)

    def read(self, size: int) -> bytes:
        try:
            return self._file.read1(size)
        except (OSError, http.client.HTTPException, AttributeError) as error:  # AttributeError: it was stopped
            raise Passing(in_words(error)) from None

    def stop(self) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError, AttributeError):
            with socket.socket(fileno=os.dup(self._file.fileno())) as same:
                same.shutdown(socket.SHUT_RDWR)


def _http(url: str, begin: int, timeout: float, total: int | None = None) -> Source:
    """total: the size, as far as an earlier answer told."""
    try:
        request = web.request(url, {"Range": f"bytes={begin}-"} if begin else None)
    except UserError as error:
        raise Lasting(str(error)) from None
    try:
        response = web.send(request, timeout)
    except urllib.error.HTTPError as error:
        error.close()
        headers = error.headers or {}
        if error.code == 416 and begin:
            end = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range", "").strip())
            return _http(url, 0, timeout, int(end[1]) if end else None)
        answer = web.answered(error.code)
        if error.code < 500 and error.code not in web.PASSING_CODES:
            raise Lasting(answer) from None
        after = headers.get("Retry-After", "")
        raise Passing(answer, float(after) if after.isdecimal() and len(after) < 6 else 0.0) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise Lasting("the server's certificate cannot be verified") from None
        raise Passing(in_words(error.reason)) from None
    except http.client.InvalidURL:
        raise Lasting("this is no address that can be opened") from None
    except (OSError, http.client.HTTPException) as error:
        raise Passing(in_words(error)) from None
    if response.status == 206:
        found = RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if begin and found and int(found[1]) == begin:
            return _Web(begin, None if found[3] == "*" else int(found[3]), response)
        response.close()
        if begin:
            return _http(url, 0, timeout)
        raise Passing("the server sends a part of the shard where the whole was asked for")
    length = response.headers.get("Content-Length", "")
    return _Web(0, int(length) if length.isdecimal() else total, response)


# -- commands ----------------------------------------------------------------------------------------------------------


class _Command(Source):
    """What a command prints. ``pipe``: webdataset's Pipe."""

    def __init__(self, pipe: Any, timeout: float) -> None:
        super().__init__(0, None, pipe)
        self._timeout, self._handle = timeout, pipe.stream.fileno()
        self._ready = select.poll()
        self._ready.register(self._handle, select.POLLIN | select.POLLHUP)

    def read(self, size: int) -> bytes:
        if not self._ready.poll(self._timeout * 1000):
            raise Passing(f"the command printed nothing for {self._timeout:.0f} seconds")
        return os.read(self._handle, size)

    def ended(self) -> None:
        try:
            status = self._file.proc.wait(self._timeout)
        except subprocess.TimeoutExpired:
            raise Passing("the command closed its output and did not end") from None
        if status != 0:
            raise Passing(f"the command failed (exit status {status})")

    def stop(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            process = self._file.proc if self._file is not None else None
            if process is not None and process.poll() is None:
                if os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)  # a pipeline's other programs too
                else:
                    process.kill()

    def close(self) -> None:
        self.stop()
        super().close()


def _command(scheme: str, url: str) -> Any:
    """The command that prints the shard, started; None where webdataset knows none for this kind of URL."""
    module = importlib.import_module("webdataset.gopen")
    try:
        if scheme == "pipe":
            if module.utils.enforce_security:
                raise Lasting("webdataset is told to run no commands (WDS_SECURE)")
            return module.Pipe(url[5:], mode="rb", shell=True, stdin=subprocess.DEVNULL, start_new_session=True)
        if scheme in COMMANDS and shutil.which(COMMANDS[scheme][0]):
            arguments = [word.format(url) for word in COMMANDS[scheme]]
            return module.Pipe(arguments, mode="rb", stdin=subprocess.DEVNULL, start_new_session=True)
        if scheme in module.gopen_schemes:
            return module.gopen(url, "rb")
    except FileNotFoundError as error:
        name = os.path.basename(str(error.filename))
        raise Lasting(f"the command {name}, which fetches {scheme}:// addresses, is not installed") from None
    except ImportError as error:
        raise Lasting(f"{scheme}:// addresses need the Python package {error.name}") from None
    except OSError as error:
        raise Passing(in_words(error)) from None
    return None


# -- files and fsspec --------------------------------------------------------------------------------------------------


def _local(path: str, begin: int) -> Source:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Lasting("it is not a file")
        file = open(path, "rb", buffering=0)
        total = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise Lasting(in_words(error)) from None
    except OSError as error:
        raise Passing(in_words(error)) from None
    begin = begin if begin <= total else 0
    file.seek(begin)
    return Source(begin, total, file)


def _fsspec(scheme: str, url: str, begin: int) -> Source:
    advice = "aws or the Python package s3fs" if scheme == "s3" else "the Python package fsspec and its part for them"
    if "::" in scheme:
        raise Lasting("addresses that are put together with :: are not opened")
    try:
        core = importlib.import_module("fsspec.core")
        system, path = core.url_to_fs(url)
        total = system.size(path)
        file = system.open(path, "rb")
        file.seek(begin)
    except (ImportError, ValueError):
        raise Lasting(f"{scheme}:// addresses need {advice}") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Lasting(in_words(error)) from None
    except Exception as error:  # whatever fsspec's file systems raise
        raise Passing(in_words(error)) from None
    return Source(begin, total, file)
