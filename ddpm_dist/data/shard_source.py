"""Shards wherever they lie: names and patterns to locations, and a stream of the bytes of one.

A location is a path or a URL. Local files are read as they are, http and https by Python itself, s3 through fsspec where it is installed for
it, and whatever else webdataset's ``gopen`` knows by that. Nothing is executed from a ``pipe:`` location unless it was allowed.
"""

from __future__ import annotations

import contextlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_dist.errors import UserError

TIMEOUT = 60  # seconds without a byte
MAX_SHARDS = 2_000_000


@dataclass(frozen=True)
class Opened:
    """The bytes of a shard, and what tells whether it is still the same: size, time of change in ns, entity tag; None: not known."""

    read: Callable[[int], bytes]
    bytes: int | None = None
    mtime: int | None = None
    etag: str | None = None


def is_remote(location: str) -> bool:
    """Whether a location is a URL (or a pipe)."""
    return re.match(r"[a-z][a-z0-9+.-]*://|pipe:", location) is not None


def expand(arguments: Iterable[str], allow_pipe: bool = False) -> list[str]:
    """Files, folders (every .tar below), brace patterns and URLs to locations, in order, each once.

    Raises:
        UserError: a folder without tars, a file that is not there, a kind of URL that is not known or not allowed.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        for place in _braces(argument):
            if is_remote(place):
                found[_checked_url(place, allow_pipe)] = None
            else:
                found.update(dict.fromkeys(_local(place)))
            if len(found) > MAX_SHARDS:
                raise UserError(f"{argument}: more than {MAX_SHARDS:,} shards")
    for place in found:
        if not _is_plain(place):
            raise UserError(
                f"{place!r}: the name of a shard must be UTF-8, without line breaks and backslashes: rename it"
            )
    if not found:
        raise UserError("no shards are named: give files, folders, brace patterns or URLs")
    return list(found)


def _is_plain(place: str) -> bool:
    try:
        place.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\n" not in place and ("\\" not in place or place.startswith("pipe:"))


def _braces(pattern: str) -> Iterable[str]:
    if "{" not in pattern or pattern.startswith("pipe:") or os.path.lexists(pattern):
        return [pattern]
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return braceexpand(pattern)
    except UnbalancedBracesError:
        raise UserError(f"{pattern}: the braces do not fit together") from None


def _local(place: str) -> list[str]:
    if "\0" in place:
        raise UserError(f"{place!r} is not a file name")
    path = Path(os.path.realpath(place))
    if path.is_dir():
        tars = sorted(str(each) for each in path.rglob("*.tar") if not each.is_dir())
        if not tars:
            raise UserError(f"{place} is a folder without any .tar file below it")
        return tars
    if not path.exists():
        raise UserError(
            f"there is no shard {place}: check the name (patterns such as train-{{000..099}}.tar are numbers with zeros)"
        )
    if not path.is_file():
        raise UserError(f"{place} is not a file")
    return [str(path)]


def _checked_url(url: str, allow_pipe: bool) -> str:
    scheme = url.partition(":")[0]
    if scheme == "pipe":
        if not allow_pipe:
            raise UserError(f"{url[:80]} would run a command: give --allow-pipe if you trust it")
        if "\n" in url or "\0" in url:
            raise UserError("a pipe: with a line break is not taken")
        return url
    if not url.isprintable() or " " in url:
        raise UserError(f"{url!r}: spaces and control characters in URLs have to be written as %20 and so on")
    if "@" in url.split("://", 1)[1].split("/", 1)[0]:
        raise UserError(
            f"{scheme} URL with a user or password in it: credentials belong into the environment (or ~/.netrc), not into an index"
        )
    if scheme == "file":
        raise UserError(f"{url}: name local files without file://")
    if scheme not in ("http", "https", "s3"):
        from webdataset.gopen import gopen_schemes

        if scheme not in gopen_schemes or scheme == "pipe":
            raise UserError(
                f"{url}: {scheme}:// is not known; known are http, https, s3, {', '.join(sorted(gopen_schemes))[:120]}"
            )
    return url


@contextlib.contextmanager
def opened(location: str) -> Iterator[Opened]:
    """Open a location of :func:`expand` for reading once from its beginning. Raises OSError."""
    if not is_remote(location):
        with open(location, "rb", buffering=0) as file:
            state = os.fstat(file.fileno())
            yield Opened(file.read, state.st_size, state.st_mtime_ns)
    elif location.startswith(("http://", "https://")):
        with _http(urllib.request.Request(location)) as answer:
            size = _size(answer.headers)
            yield Opened(_whole(answer.read, size), size, None, _etag(answer.headers))
    elif location.startswith("s3://"):
        with _s3(location) as (file, state):
            yield Opened(file.read, state[0], None, state[1])
    else:
        from webdataset import gopen

        stream = gopen(location)  # its read raises IOError when the program fails
        try:
            yield Opened(stream.read)
        finally:
            stream.close()


def state(location: str) -> tuple[int | None, int | None, str | None]:
    """Size, time of change (ns) and entity tag, None where not known, without reading the shard. Raises OSError."""
    if not is_remote(location):
        found = os.stat(location)
        return found.st_size, found.st_mtime_ns, None
    if location.startswith(("http://", "https://")):
        with _http(urllib.request.Request(location, method="HEAD")) as answer:
            return _size(answer.headers), None, _etag(answer.headers)
    if location.startswith("s3://"):
        with _s3(location) as (_, found):
            return found[0], None, found[1]
    return None, None, None


def read_part(location: str, offset: int, size: int) -> bytes:
    """Some bytes of a shard. Raises OSError; also where this kind of location can only be read from its beginning."""
    if not is_remote(location):
        with open(location, "rb") as file:
            return os.pread(file.fileno(), size, offset)
    if location.startswith(("http://", "https://")):
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}"}
        with _http(urllib.request.Request(location, headers=wanted)) as answer:
            if answer.status != 206:
                raise OSError(f"{location}: the server sends no parts of files")
            return answer.read(size)
    if location.startswith("s3://"):
        with _s3(location) as (file, _):
            file.seek(offset)
            return file.read(size)
    raise OSError(f"{location} can only be read from its beginning")


@contextlib.contextmanager
def _http(request: urllib.request.Request) -> Iterator[Any]:
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        raise OSError(f"the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None
    except (TimeoutError, ConnectionError) as error:
        raise OSError(str(error) or type(error).__name__) from None


def _whole(read: Callable[[int], bytes], size: int | None) -> Callable[[int], bytes]:
    """The same, but a connection that ends before ``size`` bytes is an OSError: the shard itself may be whole."""
    import http.client

    left = size

    def reading(count: int) -> bytes:
        nonlocal left
        try:
            piece = read(count)
        except http.client.HTTPException as error:
            raise OSError(f"the connection broke off ({error})") from None
        if left is not None:
            left -= len(piece)
            if not piece and left > 0:
                raise OSError(f"the connection broke off {left} bytes before the end")
        return piece

    return reading


def _size(headers: Any) -> int | None:
    text = headers.get("Content-Length") or ""
    return int(text) if text.isascii() and text.isdigit() else None


def _etag(headers: Any) -> str | None:
    """A weak tag promises equal meaning, not equal bytes."""
    tag = headers.get("ETag")
    return tag[:200] if tag and not tag.startswith("W/") else None


@contextlib.contextmanager
def _s3(location: str) -> Iterator[tuple[Any, tuple[int | None, str | None]]]:
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        raise UserError(f"{location}: s3 needs fsspec and s3fs ({error}): pip install s3fs") from None
    try:
        info = system.info(path)
        with system.open(path, "rb", cache_type="readahead") as file:
            yield file, (info.get("size"), info.get("ETag"))
    except OSError:
        raise
    except Exception as error:  # the libraries below have errors of their own
        raise OSError(f"{type(error).__name__}: {error}") from None
