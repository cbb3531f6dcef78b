"""From shards that anybody wrote to an index of version 2: scan, decide what the labels are, write. Used by ``ddpm_dist.index``."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist.data.full_decode import DAMAGED, TRUNCATED, decode
from ddpm_dist.data.index_file import NO_LABEL, Shard
from ddpm_dist.data.known import QUARANTINE, SCANNED, Known, write_quarantine, write_scanned
from ddpm_dist.data.labels import MAX_CLASSES, LabelRule
from ddpm_dist.data.large_index import TABLES, safe_name, write_large_index
from ddpm_dist.data.queries import QUERIES, parted, write_queries
from ddpm_dist.data.replace import folder_replaced
from ddpm_dist.data.scan import Scanned, scan_all
from ddpm_dist.data.shard_source import is_remote, state
from ddpm_dist.data.spool import Entry, Spool, Texts
from ddpm_dist.data.tars import Finding, Wanted
from ddpm_dist.errors import UserError

OURS = frozenset({"index.json", "index.npy", *TABLES, SCANNED, QUARANTINE, QUERIES})
MAX_NAMES = 1 << 16  # so many different class names are captions


@dataclass
class Result:
    """What was found in all shards.

    Attributes:
        shards: those that have samples, in order.
        samples: of all shards; labels are numbers of ``classes``.
        findings: everything that is wrong; unreadable: shards that could not be read at all.
        seconds: that scanning took; read: bytes that were read.
    """

    shards: list[Entry]
    samples: Spool
    classes: list[str] | None
    findings: list[Finding]
    unreadable: list[Finding]
    seconds: float
    read: int

    def location(self, place: int) -> str:
        """Where the shard of a sample lies."""
        return self.shards[self.samples.segment_of(place)].scanned.found.name

    @property
    def channels(self) -> int:
        """3 as soon as one image has colours: the decoder gives grey ones three equal channels."""
        return max((max(entry.scanned.found.channels) for entry in self.shards), default=3)

    @property
    def image_format(self) -> str:
        """ "mixed" where several occur."""
        formats = frozenset().union(*(entry.scanned.found.formats for entry in self.shards))
        return next(iter(formats)) if len(formats) == 1 else "mixed"


def scan_shards(
    locations: list[str],
    wanted: Wanted,
    *,
    classes: list[str] | None,
    workers: int,
    check: bool,
    known: Known | None,
    progress: bool,
    spool_folder: Path | None = None,
) -> Result:
    """Scan shards and settle what their labels are.

    Args:
        classes: names by number, where they are given.
        check: decode every image, and read shards that are known as well.
        known: what an earlier index holds; its unchanged shards are not read again.
        spool_folder: where 28 bytes per sample are kept until the index is written; None: where temporary files go.

    Raises:
        UserError: too many class names, a process died.
    """
    began, spool, texts = time.monotonic(), Spool(spool_folder), Texts()
    if check:
        wanted = dataclasses.replace(wanted, decode=decode)
    entries = [texts.add(scanned, spool) for scanned in _scanned(locations, wanted, workers, check, known, progress)]
    read = sum(entry.scanned.found.bytes for entry in entries if not entry.scanned.reused)
    rule, classes = settle(wanted.label, texts.counts(), classes)
    again = _otherwise(entries, texts, spool, rule)
    if again:
        known_bad = [f for n in again if entries[n].scanned.reused for f in entries[n].scanned.found.findings]
        stricter = dataclasses.replace(wanted, label=rule)
        # What an earlier --check has found stays found.
        if any(finding.reason in (DAMAGED, TRUNCATED) for finding in known_bad):
            stricter = dataclasses.replace(stricter, decode=decode)
        fresh = scan_all([locations[number] for number in again], stricter, workers)
        for (number, refused), scanned in zip(again.items(), fresh, strict=True):
            entries[number] = texts.add(scanned, spool)
            scanned.refused = refused
    kept = [entry for entry in entries if entry.count]
    spool.arrange([(entry.first, entry.count) for entry in kept], _translation(texts, classes))
    unreadable = [
        Finding(e.scanned.found.name, "", "unreadable shard", e.scanned.error) for e in entries if e.scanned.error
    ]
    findings = [finding for entry in entries for finding in entry.scanned.found.findings]
    return Result(kept, spool, classes, findings, unreadable, time.monotonic() - began, read)


def _scanned(
    locations: list[str], wanted: Wanted, workers: int, check: bool, known: Known | None, progress: bool
) -> Iterator[Scanned]:
    """Every shard in order, read or, where it is known and unchanged, as it was."""
    kept: set[str] = set()
    if known is not None:
        there = [place for place in locations if place in known]
        with ThreadPoolExecutor(32) as threads:  # a question each, to the file system or a server
            kept = {
                place
                for place, same in zip(there, threads.map(functools.partial(_same, known), there), strict=True)
                if same
            }
    fresh = scan_all((place for place in locations if check or place not in kept), wanted, workers)
    if progress:
        from tqdm import tqdm

        total = len(locations) - (0 if check else len(kept))
        fresh = iter(tqdm(fresh, total=total, desc="indexing", unit="shard", disable=None, dynamic_ncols=True))
    for place in locations:
        if not check and place in kept:
            yield known.scanned(place)
            continue
        scanned = next(fresh)
        if place in kept and scanned.error is None and scanned.found.sha256 != known.sha256(place):
            # Neither size nor time of change differ, so nobody replaced it: the storage lost some bits.
            expected = dataclasses.replace(wanted, expected=known.checksums(place))
            scanned = next(scan_all([place], expected, 1))
            what = (
                "its bytes are not those that were indexed, though size and time of change are: damaged on the storage"
            )
            scanned.found.findings.insert(0, Finding(place, "", "stale index", what))
        yield scanned


def _same(known: Known, place: str) -> bool:
    try:
        return known.unchanged(place, state(place))
    except OSError:
        return False


def settle(rule: LabelRule, counts: dict[str, int], classes: list[str] | None) -> tuple[LabelRule, list[str] | None]:
    """Numbers or names, by what most labels are, and the names of the classes. Raises UserError: names that look like captions."""
    if rule.extension is None:
        return rule, None
    if classes is not None:
        return rule, classes
    numbers = {text: count for text, count in counts.items() if is_number(text)}
    meaning = rule.meaning
    if meaning == "either":
        meaning = "number" if 2 * sum(numbers.values()) >= sum(counts.values()) else "name"
    if meaning == "number":
        most = rule.limit or min(MAX_CLASSES, max((int(text) for text in numbers), default=0) + 1)
        return dataclasses.replace(rule, meaning=meaning, limit=most), [str(number) for number in range(most)]
    names = sorted(text for text in counts if text not in numbers)
    limit = rule.limit or MAX_NAMES
    if len(names) > limit:
        hint = "--num-classes allows" if rule.limit else "can be; they look like captions"
        raise UserError(
            f"the labels in .{rule.extension} are {len(names):,} different names such as {names[0]!r}, more than {limit:,}, which {hint}: "
            "choose another --label, or --unlabelled"
        )
    return dataclasses.replace(rule, meaning=meaning), names


def _otherwise(entries: list[Entry], texts: Texts, spool: Spool, rule: LabelRule) -> dict[int, dict[str, int]]:
    """The shards that have to be read once more, since the keys are not known any more: number -> labels refused there, and how many.

    They have labels that do not fit, or, known from an earlier index, some that did not fit then and do now.
    """
    misfits = {number: text for text, number in texts.ids.items() if not _fits(rule, text)}
    spool.arrange([(entry.first, entry.count) for entry in entries], np.arange(-1, len(texts.ids), dtype=np.int32)[1:])
    found = {}
    for number, entry in enumerate(entries):
        before = entry.scanned.refused
        if not misfits and not before:
            continue
        kept, counts = np.unique(spool.segment(number)["label"], return_counts=True)
        new = {misfits[k]: n for k, n in zip(kept.tolist(), counts.tolist(), strict=True) if k in misfits}
        if new or any(_fits(rule, text) for text in before):
            found[number] = {text: count for text, count in sorted((before | new).items()) if not _fits(rule, text)}
    return found


def is_number(text: str) -> bool:
    """Whether a label is a number in ASCII digits; other scripts' digits are letters of a name."""
    return text.isascii() and text.isdigit()


def _fits(rule: LabelRule, text: str) -> bool:
    if rule.classes is not None:
        return True  # compared while scanning
    return is_number(text) and int(text) < rule.limit if rule.meaning == "number" else not is_number(text)


def _translation(texts: Texts, classes: list[str] | None) -> np.ndarray | None:
    """The class number of every text; of those that no sample has any more it does not matter."""
    if classes is None:
        return None
    numbers = {text: number for number, text in enumerate(classes)}
    found = [numbers[text] if text in numbers else int(text) if is_number(text) else NO_LABEL for text in texts.ids]
    return np.array([*found, NO_LABEL], dtype=np.int32)


def write(result: Result, out: Path, options: dict[str, Any]) -> str:
    """Write the index of what was found into ``out``, in the place of an older one; returns the fingerprint. Raises UserError."""
    if not len(result.samples):
        raise UserError("no sample is left to be indexed")
    scanned = [entry.scanned for entry in result.shards]
    places, queries = parted([each.found.name for each in scanned])
    root, names = common_root(places)
    shards = (
        Shard(name, entry.count, entry.scanned.found.bytes, entry.scanned.found.sha256)
        for name, entry in zip(names, result.shards, strict=True)
    )
    with folder_replaced(out, OURS) as folder:
        fingerprint = write_large_index(
            folder, shards, result.samples, result.classes, result.channels, result.image_format, root
        )
        write_scanned(folder, fingerprint, options, scanned, places)
        write_queries(folder, queries)
        write_quarantine(folder, result.findings, [each.found.name for each in scanned])
    return fingerprint


def common_root(locations: list[str]) -> tuple[str, list[str]]:
    """What shards' names are relative to (the deepest folder or the longest beginning of a URL; "": nothing), and the names."""
    remote = [place for place in locations if is_remote(place)]
    if remote and len(remote) < len(locations) or any(place.startswith("pipe:") for place in remote):
        return "", locations
    if remote:
        parts = [place.split("/") for place in locations]
        depth = len(os.path.commonprefix([split[:-1] for split in parts]))
        root = "/".join(parts[0][:depth])
        names = ["/".join(split[depth:]) for split in parts]
        good = depth >= 3 and all(safe_name(name, root) for name in names)
        return (root, names) if good else ("", locations)
    root = os.path.commonpath([os.path.dirname(place) for place in locations])
    return root, [os.path.relpath(place, root) for place in locations]
