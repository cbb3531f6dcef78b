"""The queries of shards' URLs, such as ``?X-Amz-Signature=...``, which are kept beside an index and are no part of it.

A signature is renewed every few hours; were it part of the shard's name, the same data would be another data set. ``queries.txt`` holds
a line per shard, or a single one for all. What a query leads to is compared with the checksums of the index, like everything else.
"""

from __future__ import annotations

import re
from pathlib import Path

from ddpm_dist.data.index_file import damaged, durable

QUERIES = "queries.txt"


def bare(location: str) -> str:
    """A location without its query; only URLs of http and https have one."""
    return re.split(r"[?#]", location, maxsplit=1)[0] if location.startswith(("http://", "https://")) else location


def parted(locations: list[str]) -> tuple[list[str], list[str]]:
    """The locations without queries, and the queries; all as they are where only the queries tell some of them apart (``?id=3``)."""
    names = [bare(place) for place in locations]
    if len(set(names)) < len(names):
        return locations, [""] * len(locations)
    return names, [place[len(name) :] for place, name in zip(locations, names, strict=True)]


def write_queries(folder: Path, queries: list[str]) -> None:
    """queries: of the shards of the index, in its order. Nothing is written where there are none."""
    if any(queries):
        lines = queries if len(set(queries)) > 1 else queries[:1]
        durable(folder / QUERIES, lambda file: file.write("".join(f"{line}\n" for line in lines).encode("utf-8")))


def read_queries(folder: Path, count: int) -> list[str]:
    """The queries of ``count`` shards, a single one for all, or none. Raises UserError where the file is damaged."""
    path = folder / QUERIES
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        raise damaged(path, "cannot be read") from None
    if len(lines) not in (1, count) or not all(
        re.fullmatch(r"([?#]\S*)?", line) and line.isprintable() for line in lines
    ):
        raise damaged(path, "the queries do not fit the shards")
    return lines
