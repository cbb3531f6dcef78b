"""What a shard is read from, what may go wrong with it, and what messages call it.

Nothing here carries a credential: reasons never quote a URL, a command or what a library said about them, and ``public_name`` is what
messages call a shard.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import ssl
import threading
from typing import Any

from ddpm_dist.errors import UserError

AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]@\s]*)(:\d*)?")


class Lasting(Exception):
    """Trying again will not help. The text says why, without the URL."""


class Passing(Exception):
    """Trying again may help. The text says why, without the URL; ``after``: seconds for which the server asks."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


def public_name(url: str) -> str:
    """What messages and logs call a shard: its URL without user, password, query and fragment; of a command its first word."""
    if command := re.match(r"\s*pipe:", url, re.IGNORECASE):
        words = url[command.end() :].split()
        name = f"pipe:{words[0]} ..." if words and re.fullmatch(r"[\w./-]+", words[0]) else "pipe:..."
    elif "://" in url:
        scheme, rest = url.split("://", 1)
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
        authority, slash, path = rest.partition("/")
        host = authority.rpartition("@")[2]
        if AUTHORITY.fullmatch(host) and not (":" in host and "@" in path):
            name = f"{scheme}://{host}{slash}{path}"
        else:  # a password with a slash or a question mark in it
            name = f"{scheme}://...{path.rpartition('@')[2] if '@' in path else ''}"
    elif mistyped := re.match(r"\s*(https?|s3|gs|ftp):|\s*//[^/]*@", url, re.IGNORECASE):  # a slash is missing
        name = f"{mistyped[1] or ''}:..."
    else:
        name = url
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def refuse_command(url: str, allow_pipe: bool) -> None:
    """Raises UserError for a ``pipe:`` URL unless such are allowed."""
    if url.startswith("pipe:") and not allow_pipe:
        raise UserError(
            f"shard {public_name(url)} is a command that would be run on this machine: set data.allow_pipe=true if you trust "
            "the index that names it"
        )


class Source:
    """The bytes of a shard from ``begin`` on. ``total``: the size of the whole shard, None where that is not known.

    ``begin`` is what was asked for, or 0 where the other side cannot start in the middle. ``tells_end``: bytes that end without an
    error are all there are (a connection may just be cut). One thread reads; another may ``stop`` it.
    """

    tells_end = True

    def __init__(self, begin: int, total: int | None, file: Any = None) -> None:
        self.begin, self.total = begin, total
        self._file, self._lock = file, threading.Lock()

    def read(self, size: int) -> bytes:
        """1 to ``size`` bytes, b"" at the end. Raises Passing."""
        try:
            return self._file.read(size)
        except Exception as error:  # whatever fsspec's file systems raise
            raise Passing(in_words(error)) from None

    def ended(self) -> None:
        """Called at the end of the bytes. Raises Passing where they ended because something failed."""

    def stop(self) -> None:
        """Make a read that waits fail soon, where that can be done."""

    def close(self) -> None:
        """Let go of the other side."""
        with self._lock, contextlib.suppress(Exception):
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_words(error: object) -> str:
    """What happened, never with the text of an exception: that may quote the address."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or 'failed'}"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    if isinstance(error, socket.gaierror):
        return "the name of the server cannot be resolved"
    if isinstance(error, http.client.HTTPException):
        return f"the connection was cut or garbled ({type(error).__name__})"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return type(error).__name__ if isinstance(error, BaseException) else "it cannot be reached"
