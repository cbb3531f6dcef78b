"""What an index folder remembers of the shards it was made from, so that unchanged ones are not read again; and what was left out.

``scanned.jsonl``: a line on how shards were read and which index it belongs to, then one line per shard: location (without its query, see
``queries.py``), size, time of change or entity tag, image formats and channels, and the labels that did not go with those of the other
shards (with others they may). ``quarantine.json``: every sample and shard that was left out, and why; it is meant to be shown, so it calls
shards by their public names (of which several may be the same) and by their numbers in the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist.data.index_file import NO_LABEL, durable
from ddpm_dist.data.queries import bare
from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.scan import Scanned
from ddpm_dist.data.shard_source import shown_names
from ddpm_dist.data.shards import Index
from ddpm_dist.data.tars import Finding, Found
from ddpm_dist.errors import UserError

SCANNED, QUARANTINE = "scanned.jsonl", "quarantine.json"
VERSION = 2  # 1: transparent images were no findings, and refused labels were not kept


def write_scanned(
    folder: Path, fingerprint: str, options: dict[str, Any], shards: Iterable[Scanned], names: list[str]
) -> None:
    """shards: those of the index, in its order; names: their locations, without queries where those do not count."""

    def lines(file: Any) -> None:
        head = {"format": "ddpm_dist-scanned", "version": VERSION, "fingerprint": fingerprint, "options": options}
        file.write(json.dumps(head).encode("ascii") + b"\n")
        for shard, name in zip(shards, names, strict=True):
            found = shard.found
            row = [name, found.bytes, shard.mtime, shard.etag, sorted(found.formats), sorted(found.channels)]
            row.append(shard.refused)
            file.write(json.dumps(row).encode("ascii") + b"\n")

    durable(folder / SCANNED, lines)


def write_quarantine(folder: Path, findings: list[Finding], shards: list[str]) -> None:
    """Nothing is written where there are no findings. shards: locations of those of the index, in its order."""
    if findings:
        names, numbers = shown_names(shards), {place: number for number, place in enumerate(shards)}
        rows = [
            f._asdict() | {"shard": names.get(f.shard) or public_name(f.shard), "number": numbers.get(f.shard)}
            for f in findings
        ]
        durable(folder / QUARANTINE, lambda file: file.write((json.dumps(rows, indent=0) + "\n").encode("ascii")))


class Known:
    """The shards that an index folder knows, by location. Empty where there is none that can be used."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        """options: how shards are read now; what was read otherwise is not used."""
        self._rows: dict[str, tuple[int, list[Any]]] = {}
        self._findings: dict[int, list[Finding]] = {}  # by the shard's number
        try:
            self.index = Index.load(folder)
            with open(folder / SCANNED, encoding="ascii") as file:
                head = json.loads(file.readline())
                if (
                    head["version"] != VERSION
                    or head["fingerprint"] != self.index.fingerprint
                    or head["options"] != options
                ):
                    return
                rows = [json.loads(line) for line in file]
            self._ends = np.cumsum([0, *(shard.samples for shard in self.index.shards)]).tolist()
            if [row[1] for row in rows] != [shard.bytes for shard in self.index.shards]:
                return
            for row in json.loads((folder / QUARANTINE).read_text("ascii")) if (folder / QUARANTINE).exists() else []:
                number = row.pop("number")  # null: nothing of that shard is in the index
                if number is not None:
                    self._findings.setdefault(number, []).append(Finding(**row))
            self._rows = {row[0]: (number, row) for number, row in enumerate(rows)}
        except (UserError, OSError, ValueError, KeyError, TypeError, IndexError):
            self._rows = {}  # damaged, or none there: everything is read again

    def __contains__(self, location: str) -> bool:
        return location in self._rows or bare(location) in self._rows

    def _row(self, location: str) -> tuple[int, list[Any]]:
        return self._rows[location if location in self._rows else bare(location)]

    def unchanged(self, location: str, now: tuple[int | None, int | None, str | None]) -> bool:
        """Whether a shard is what it was; now: size, time of change and entity tag, of which one has to be known beside the size."""
        size, mtime, etag = self._row(location)[1][1:4]
        return now == (size, mtime, etag) and size is not None and (mtime is not None or etag is not None)

    def sha256(self, location: str) -> str:
        """What the shard's sha256 was."""
        return self.index.shards[self._row(location)[0]].sha256

    def checksums(self, location: str) -> dict[int, int]:
        """Checksum of every image of a shard by its offset."""
        rows = self._records(location)
        return dict(zip(rows["offset"].tolist(), rows["checksum"].tolist(), strict=True))

    def scanned(self, location: str) -> Scanned:
        """What was found when it was read."""
        number, (_, size, mtime, etag, formats, channels, refused) = self._row(location)
        samples, labels = self._records(location).copy(), []
        if self.index.classes is not None:
            used, codes = np.unique(samples["label"], return_inverse=True)
            samples["label"], labels = codes, [self.index.classes[label] for label in used.tolist()]
        else:
            samples["label"] = NO_LABEL
        found = Found(
            location, size, self.index.shards[number].sha256, samples, labels, frozenset(formats), frozenset(channels),
            [finding._replace(shard=location) for finding in self._findings.get(number, [])],
        )  # fmt: skip
        return Scanned(found, mtime, etag, reused=True, refused=refused)

    def _records(self, location: str) -> np.ndarray:
        number = self._row(location)[0]
        return self.index.rows(np.arange(*self._ends[number : number + 2]))
