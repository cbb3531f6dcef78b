"""What a webdataset shard holds: where every image lies, what its label is, and everything that is wrong with it.

A shard is read once, from its beginning to its end (``tar_stream.py``); of an image only the header is looked at, unless it is to be
decoded. Nothing stops at the first problem: each is a ``Finding``, and no sample of a key that has one is among the samples.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ddpm_dist.data.image_header import MAX_PIXELS, BadImage, Header, read_header
from ddpm_dist.data.index_file import NO_LABEL, SAMPLE_DTYPE, Shard, checksum
from ddpm_dist.data.labels import MISSING, BadLabel, LabelRule
from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.tar_stream import BrokenTar, Member, Tape, members, split_name, ustar_name
from ddpm_dist.errors import UserError

__all__ = ["Finding", "Found", "Member", "Scan", "Wanted", "scan_shard", "scan_stream", "split_name", "ustar_name"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm")
MAX_IMAGE_BYTES = 1 << 28
RECORD = struct.Struct("<QQIiHH")
DUPLICATE, INTERLEAVED, NO_IMAGE_FOUND = "duplicate key", "interleaved keys", "no image"
NO_SAMPLE, NO_IMAGE = -1, -2


class Finding(NamedTuple):
    """Something wrong: where, in two or three words, and in a sentence. ``key`` is empty where it is the shard as a whole.

    ``shard`` is a location, which may hold credentials; as text a finding shows none.
    """

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return self.called(public_name(self.shard))

    def called(self, name: str) -> str:
        """The same text with this name for the shard."""
        return f"{name}:{self.key}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Wanted:
    """What is looked for in a shard.

    Attributes:
        image: the extension of the image; None: the one of ``IMAGE_EXTENSIONS`` that is there.
        label: how labels are read.
        max_pixels: images that claim more are a finding.
        decode: raises BadImage for an image that cannot be decoded; None: only headers are read.
        expected: checksum of the image at an offset, as found earlier; None: nothing is known.
    """

    label: LabelRule
    image: str | None = None
    max_pixels: int = MAX_PIXELS
    decode: Callable[[bytes, Header], None] | None = None
    expected: dict[int, int] | None = None


@dataclass
class Found:
    """What a shard holds.

    Attributes:
        samples: (N,) array of ``SAMPLE_DTYPE``; ``label`` is a position in ``labels``, or -1.
        labels: the different labels, as texts.
        formats, channels: image formats and numbers of channels that occur.
        bytes, sha256: of the whole shard; 0 and "" where it has no samples.
    """

    name: str
    bytes: int = 0
    sha256: str = ""
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, SAMPLE_DTYPE))
    labels: list[str] = field(default_factory=list)
    formats: frozenset[str] = frozenset()
    channels: frozenset[int] = frozenset()
    findings: list[Finding] = field(default_factory=list)


class _Sample:
    """The files of one key that stand together."""

    __slots__ = ("key", "extensions", "images", "record", "header", "code", "problem")

    def __init__(self, key: str) -> None:
        self.key = key
        self.extensions: set[str] = set()
        self.images: list[str] = []
        self.record: tuple[int, int, int] | None = None  # offset, checksum, size
        self.header: Header | None = None
        self.code = NO_LABEL
        self.problem: tuple[str, str] | None = None


class _Scanner:
    """One pass over a shard."""

    def __init__(self, tape: Tape, name: str, wanted: Wanted) -> None:
        self.tape, self.name, self.wanted = tape, name, wanted
        self.findings: list[Finding] = []
        self.codes: dict[str, int] = {}  # label texts
        self.formats: set[str] = set()
        self.channels: set[int] = set()
        self._raw: dict[bytes, int] = {}  # label files seen before
        self._rows = bytearray()
        self._row_of: dict[
            str, int
        ] = {}  # by key; where there is a finding: NO_SAMPLE, or NO_IMAGE if it has no image either
        self._again: dict[str, str] = {}  # keys that come back after others, and what that is called

    def run(self) -> np.ndarray:
        """The samples without finding: array of ``SAMPLE_DTYPE``."""
        sample: _Sample | None = None
        try:
            for member in members(self.tape):
                key, extension = split_name(member.name)
                if not key:
                    continue
                if sample is None or key != sample.key:
                    if sample is not None:
                        self._finish(sample)
                    sample = _Sample(key)
                self._look(sample, extension, member)
        except BrokenTar as error:
            # Files of the last key may lie behind the damage, so it is not used.
            lost = f"; nothing is used from key {sample.key} on" if sample else ""
            self.findings.append(Finding(self.name, "", error.reason, f"{error}{lost}"))
        else:
            if sample is not None:
                self._finish(sample)
            if not self._row_of:
                self.findings.append(Finding(self.name, "", "empty shard", "holds no samples"))
        samples = np.frombuffer(bytes(self._rows), dtype=SAMPLE_DTYPE)
        if not self._again:
            return samples
        consequences = (MISSING, NO_IMAGE_FOUND)
        self.findings = [f for f in self.findings if f.key not in self._again or f.reason not in consequences]
        for key, reason in self._again.items():
            self.findings.append(
                Finding(self.name, key, reason, "the key occurs twice, or its files do not stand together")
            )
        rows = [self._row_of[key] for key in self._again]
        return np.delete(samples, [row for row in rows if row >= 0])

    def _look(self, sample: _Sample, extension: str, member: Member) -> None:
        if extension in sample.extensions:
            sample.problem = sample.problem or (DUPLICATE, f".{extension} occurs twice")
            return
        sample.extensions.add(extension)
        wanted = self.wanted
        if extension == wanted.image or (wanted.image is None and extension in IMAGE_EXTENSIONS):
            sample.images.append(member.name)
            if len(sample.images) == 1:
                try:
                    self._image(sample, member)
                except BadImage as error:
                    sample.problem = sample.problem or (error.reason, str(error))
        elif extension == wanted.label.extension:
            try:
                self._label(sample, member)
            except BadLabel as error:
                sample.problem = sample.problem or (error.reason, str(error))

    def _image(self, sample: _Sample, member: Member) -> None:
        if member.size == 0:
            raise BadImage("empty image", "the image is empty")
        if member.size > MAX_IMAGE_BYTES:
            raise BadImage(
                "absurd image size", f"the image file has {member.size} bytes, at most {MAX_IMAGE_BYTES} are taken"
            )
        content = self.tape.take(member.offset, member.size)
        if len(content) < member.size:
            return  # the archive ends here, which is found when the next member is asked for
        sample.record = (member.offset, checksum(content), member.size)
        expected = self.wanted.expected
        if expected is not None and expected.get(member.offset, sample.record[1]) != sample.record[1]:
            raise BadImage("changed image", "its bytes are not those that were indexed: damaged, or replaced")
        sample.header = read_header(content, self.wanted.max_pixels)
        if self.wanted.decode is not None:
            self.wanted.decode(content, sample.header)

    def _label(self, sample: _Sample, member: Member) -> None:
        rule = self.wanted.label
        if member.size > rule.max_bytes:
            raise BadLabel(
                "bad label",
                f"the label in .{rule.extension} has {member.size} bytes; at most {rule.max_bytes} are read",
            )
        content = self.tape.take(member.offset, member.size)
        code = self._raw.get(content)
        if code is None:
            if len(content) < member.size:
                return
            code = self.codes.setdefault(rule.read(content), len(self.codes))
            if not rule.key:
                self._raw[content] = code
        sample.code = code

    def _finish(self, sample: _Sample) -> None:
        key, rule, problem = sample.key, self.wanted.label, sample.problem
        if key in self._row_of:
            twice = sample.images and self._row_of[key] != NO_IMAGE
            self._again[key] = DUPLICATE if twice else self._again.get(key, INTERLEAVED)
            return
        if problem is None and len(sample.images) != 1:
            names = ", ".join(sample.images[:5]) or "none"
            kinds = f".{self.wanted.image}" if self.wanted.image else f".{', .'.join(IMAGE_EXTENSIONS)}"
            reason = "several images" if sample.images else NO_IMAGE_FOUND
            problem = (reason, f"needs exactly one image ({kinds}), found {names}")
        if problem is None and sample.code == NO_LABEL and rule.extension is not None and not rule.optional:
            problem = (MISSING, f"has no .{rule.extension} file")
        if problem is not None:
            self._row_of[key] = NO_SAMPLE if sample.images else NO_IMAGE
            self.findings.append(Finding(self.name, key, *problem))
            return
        header = sample.header
        self._row_of[key] = len(self._rows) // RECORD.size
        self._rows += RECORD.pack(*sample.record, sample.code, header.height, header.width)
        self.formats.add(header.format)
        self.channels.add(header.channels)


def scan_stream(read: Callable[[int], bytes], name: str, wanted: Wanted) -> Found:
    """Read a whole shard and say what it holds, and what is wrong with it.

    Args:
        read: returns the next bytes of the shard, at most as many as asked for; empty at the end.
        name: what findings call it.

    Raises:
        OSError: what ``read`` raises.
    """
    tape = Tape(read)
    scanner = _Scanner(tape, name, wanted)
    samples = scanner.run()
    size, sha256 = tape.finish() if len(samples) else (0, "")  # what is not used need not be read to its end
    return Found(
        name, size, sha256, samples, list(scanner.codes), frozenset(scanner.formats), frozenset(scanner.channels), scanner.findings
    )  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """What a shard of ours holds: the shard's entry, its samples, and the image formats and channel counts that occur."""

    shard: Shard
    samples: np.ndarray
    formats: frozenset[str]
    channels: frozenset[int]


NUMBERS = Wanted(LabelRule("cls", meaning="number", optional=True))


def scan_shard(path: str | os.PathLike) -> Scan:
    """Read a shard in which nothing may be wrong, and say what it holds.

    Every sample needs exactly one image (one of ``IMAGE_EXTENSIONS``; grey or RGB); a label is an ASCII integer in ``key.cls``.
    Either all samples of a shard have a label or none. Files of other types are passed over. Only the header of an
    image is parsed.

    Raises:
        UserError: "shard:key: reason", of the first finding.
    """
    path = Path(path)
    with open_local(path) as file:
        found = scan_stream(file.read, str(path), NUMBERS)
    if found.findings:
        shard, key, _, detail = found.findings[0]
        raise UserError(f"{shard}:{key}: {detail}" if key else f"{shard}: {detail}")
    labels = np.array([int(text) for text in found.labels] + [NO_LABEL], dtype=np.int32)
    samples = found.samples.copy()
    samples["label"] = labels[samples["label"]]
    missing = int((samples["label"] == NO_LABEL).sum())
    if 0 < missing < len(samples):
        raise UserError(f"{path}: {missing} of {len(samples)} samples have no .cls file: label all or none")
    return Scan(Shard(path.name, len(samples), found.bytes, found.sha256), samples, found.formats, found.channels)


@contextlib.contextmanager
def open_local(path: Path) -> Iterator[BinaryIO]:
    """Unbuffered: it is read in large pieces. Raises UserError."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
