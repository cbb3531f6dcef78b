"""Shards wherever they lie: names and patterns to locations, and a stream of the bytes of one.

A location is a path or a URL. Local files are read as they are, http and https by Python itself, s3 through fsspec where it is installed for
it, and whatever else webdataset's ``gopen`` knows by that. Nothing is executed from a ``pipe:`` location unless it was allowed.

What is raised here names no URL, and repeats no text of a server, a library or a command: such may hold credentials. Messages call a shard by
its ``remote_source.public_name``.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_dist.data import web
from ddpm_dist.data.remote_source import AUTHORITY, in_words, public_name
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


class NoParts(OSError):
    """This kind of location, or its server, can only be read from its beginning."""


class Refused(OSError):
    """The server has answered, and would answer the same again: there is no such file, or it is not for us."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL (or a pipe). The scheme may be in capitals; :func:`expand` writes it small."""
    return re.match(r"[a-z][a-z0-9+.-]*://|pipe:", location, re.IGNORECASE) is not None


def shown_names(locations: Iterable[str]) -> dict[str, str]:
    """What messages call each of these shards: its ``public_name``, with its number (from 0) where several have the same."""
    locations = list(locations)
    names = [public_name(place) for place in locations]
    often = Counter(names)
    numbered = (f"{name} (shard {n})" if often[name] > 1 else name for n, name in enumerate(names))
    return dict(zip(locations, numbered, strict=True))


def expand(arguments: Iterable[str], allow_pipe: bool = False) -> list[str]:
    """Files, folders (every .tar below), brace patterns and URLs to locations, in order, each once.

    Raises:
        UserError: a folder without tars, a file that is not there, a kind of URL that is not known or not allowed.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        for place in _braces(argument):
            if is_remote(place):
                scheme, colon, rest = place.partition(":")
                found[_checked_url(scheme.lower() + colon + rest, allow_pipe)] = None
            else:
                found.update(dict.fromkeys(_local(place)))
            if len(found) > MAX_SHARDS:
                raise UserError(f"{public_name(argument)}: more than {MAX_SHARDS:,} shards")
    for place in found:
        if not _is_plain(place):
            raise UserError(
                f"{public_name(place)!r}: the name of a shard must be UTF-8, without line breaks and backslashes: rename it"
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
        raise UserError(f"{public_name(pattern)}: the braces do not fit together") from None


def _local(place: str) -> list[str]:
    if "\0" in place:
        raise UserError(f"{public_name(place)!r} is not a file name")
    path = Path(os.path.realpath(place))
    if path.is_dir():
        tars = sorted(str(each) for each in path.rglob("*.tar") if not each.is_dir())
        if not tars:
            raise UserError(f"{place} is a folder without any .tar file below it")
        return tars
    if not path.exists():
        raise UserError(
            f"there is no shard {public_name(place)}: check the name (patterns such as train-{{000..099}}.tar are numbers with zeros)"
        )
    if not path.is_file():
        raise UserError(f"{place} is not a file")
    return [str(path)]


def _checked_url(url: str, allow_pipe: bool) -> str:
    scheme = url.partition(":")[0]
    if scheme == "pipe":
        if not allow_pipe:
            raise UserError(f"{public_name(url)} would run a command: give --allow-pipe if you trust it")
        if "\n" in url or "\0" in url:
            raise UserError("a pipe: with a line break is not taken")
        return url
    if not url.isprintable() or " " in url:
        raise UserError(
            f"{public_name(url)}: spaces and control characters in URLs have to be written as %20 and so on"
        )
    host = re.split(r"[/?#]", url.split("://", 1)[1], maxsplit=1)[0]
    if "@" in host or not AUTHORITY.fullmatch(host):  # what looks like no host may be a password with a slash in it
        where = "~/.netrc" if scheme in ("http", "https") else "the environment"
        raise UserError(
            f"{scheme} URL with a user or password in it, or without a proper host: credentials belong into {where}, not into an index"
        )
    if scheme == "file":
        raise UserError(f"{public_name(url)}: name local files without file://")
    if scheme not in ("http", "https", "s3"):
        from webdataset.gopen import gopen_schemes

        if scheme not in gopen_schemes or scheme == "pipe":
            raise UserError(
                f"{public_name(url)}: {scheme}:// is not known; known are http, https, s3, {', '.join(sorted(gopen_schemes))[:120]}"
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
        with _http(location) as answer:
            size = _size(answer.headers)
            yield Opened(_whole(answer.read, size), size, None, _etag(answer.headers))
    elif location.startswith("s3://"):
        with _s3(location) as (file, state):
            yield Opened(_plainly(file.read), state[0], None, state[1])
    else:
        stream = _plainly(_gopen)(location)
        try:
            yield Opened(_plainly(stream.read))
        finally:
            _plainly(stream.close)()


def state(location: str) -> tuple[int | None, int | None, str | None]:
    """Size, time of change (ns) and entity tag, None where not known, without reading the shard. Raises OSError."""
    if not is_remote(location):
        found = os.stat(location)
        return found.st_size, found.st_mtime_ns, None
    if location.startswith(("http://", "https://")):
        with _http(location, method="HEAD") as answer:
            return _size(answer.headers), None, _etag(answer.headers)
    if location.startswith("s3://"):
        with _s3(location) as (_, found):
            return found[0], None, found[1]
    return None, None, None


def read_part(location: str, offset: int, size: int) -> bytes:
    """Some bytes of a shard. Raises OSError: NoParts where it can only be read from its beginning."""
    if not is_remote(location):
        with open(location, "rb") as file:
            return os.pread(file.fileno(), size, offset)
    if location.startswith(("http://", "https://")):
        with _http(location, {"Range": f"bytes={offset}-{offset + size - 1}"}) as answer:
            if answer.status != 206:
                raise NoParts("the server sends no parts of files")
            return _plainly(answer.read)(size)
    if location.startswith("s3://"):
        with _s3(location) as (file, _):
            file.seek(offset)
            return _plainly(file.read)(size)
    raise NoParts(f"{location.partition(':')[0]}: locations can only be read from their beginning")


def _gopen(location: str) -> Any:
    from webdataset import gopen

    return gopen(location)


def _plainly(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose errors are an OSError that quotes nothing of what servers, libraries and commands say."""

    def working(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except UserError:
            raise
        except Exception as error:  # the libraries below have errors of their own
            code = error.code if isinstance(error, urllib.error.HTTPError) else 500
            kind = Refused if 400 <= code < 500 and code not in web.PASSING_CODES else OSError
            raise kind(_reason(error)) from None

    return working


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return web.answered(error.code)
    if isinstance(error, urllib.error.URLError):
        return in_words(error.reason)
    if isinstance(error, (http.client.InvalidURL, UnicodeError)):
        return "this is no address that can be opened"
    if type(error) is OSError and (
        status := re.search(r": exit (-?\d+) \(", str(error))
    ):  # webdataset's, which quotes the command
        return f"the command failed (exit status {status[1]})"
    return in_words(error)


def _http(location: str, headers: dict[str, str] | None = None, method: str = "GET") -> contextlib.closing[Any]:
    return contextlib.closing(_plainly(lambda: web.send(web.request(location, headers, method), TIMEOUT))())


def _whole(read: Callable[[int], bytes], size: int | None) -> Callable[[int], bytes]:
    """The same, but a connection that ends before ``size`` bytes is an OSError: the shard itself may be whole."""
    read, left = _plainly(read), size

    def reading(count: int) -> bytes:
        nonlocal left
        piece = read(count)
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
    except (ImportError, ValueError):
        raise UserError(f"{public_name(location)}: s3 needs fsspec and s3fs: pip install s3fs") from None
    info = _plainly(system.info)(path)
    with _plainly(lambda: system.open(path, "rb", cache_type="readahead"))() as file:
        yield file, (info.get("size"), info.get("ETag"))
