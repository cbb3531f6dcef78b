"""Scanning many shards in parallel: each by one process, from its beginning to its end, results in the order of the shards."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ddpm_dist.data.process_pool import in_order
from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.shard_source import Refused, is_remote, opened, state
from ddpm_dist.data.tars import Found, Wanted, scan_stream

ATTEMPTS = 4  # at a remote shard


@dataclass
class Scanned:
    """A shard as it was found, what tells whether it is still the same, and why it could not be read (then the rest is void).

    ``refused``: labels that are findings because of what most labels of all shards are, and how often they occur.
    """

    found: Found
    mtime: int | None = None
    etag: str | None = None
    error: str | None = None
    reused: bool = False
    refused: dict[str, int] = field(default_factory=dict)


def scan_location(location: str, wanted: Wanted) -> Scanned:
    """Scan the shard at a location (see ``shard_source``). A remote one that breaks off is tried again from its beginning."""
    attempts = ATTEMPTS if is_remote(location) else 1
    for attempt in range(attempts):
        try:
            with opened(location) as source:
                found = scan_stream(source.read, location, wanted)
            if source.mtime is not None and state(location)[:2] != (source.bytes, source.mtime):
                return Scanned(found, error="it was changed while it was read")
            return Scanned(found, source.mtime, source.etag)
        except Refused as error:
            return Scanned(Found(location), error=str(error))
        except OSError as error:
            problem = error.strerror or str(error)
        if attempt + 1 < attempts:
            time.sleep(0.5 * 4**attempt)
    return Scanned(Found(location), error=problem)


def scan_all(locations: Iterable[str], wanted: Wanted, workers: int) -> Iterator[Scanned]:
    """:func:`scan_location` of each, in their order, by so many processes. Raises UserError where a process died."""
    return in_order(functools.partial(scan_location, wanted=wanted), locations, workers, public_name)
