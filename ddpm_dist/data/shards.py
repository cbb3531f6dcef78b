"""A folder of webdataset shards and its index: which bytes of which tar file are sample i, and what its label is.

A packed folder holds ordinary webdataset tars (``key.jpg`` + ``key.cls``) and two files of ours:

- ``index.json``: format and version, the shards (name, samples, bytes, sha256), classes, channels, image format,
  the sha256 of ``index.npy`` and the fingerprint of the whole data set;
- ``index.npy``: one record of ``SAMPLE_DTYPE`` per sample, shard after shard, in file order.

Shards that were not packed here have an index of version 2, which may lie elsewhere (``large_index.py``). ``Index.load`` checks
everything, or with a very large table each part before it is used; nothing later has to doubt an offset or a label.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_dist.data import checksums, large_index
from ddpm_dist.data.index_file import (
    IMAGE_FORMATS,
    LARGE_VERSION,
    NO_LABEL,
    SAMPLE_DTYPE,
    Shard,
    check_head,
    check_table,
    checksum,
    digest,
    file_sha256,
    fingerprint,
    ranges,
    read_head,
    read_table,
    write_index,
)
from ddpm_dist.data.large_index import LargeTable
from ddpm_dist.data.queries import read_queries
from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.sample_key import key_at
from ddpm_dist.data.shard_cache import ShardCache
from ddpm_dist.data.tar_stream import BLOCK
from ddpm_dist.errors import BadSample, UserError

__all__ = [
    "IMAGE_FORMATS",
    "NO_LABEL",
    "SAMPLE_DTYPE",
    "Index",
    "Shard",
    "checksum",
    "file_sha256",
    "fingerprint",
    "write_index",
]

MAX_OPEN_FILES = 128
MAX_CHECKED_FILES = 20_000  # shards whose sizes are asked for at the start
CHECKED_AT_ONCE = 20_000_000  # samples; larger tables are checked part by part, so that opening them takes no time


class Index:
    """The index of one shard folder. Make one with ``Index.load``; instances are read-only, thread-safe and picklable.

    Attributes:
        folder: the folder that holds the shards and the index.
        shards: list of ``Shard``, in order.
        root: what the shards' names are relative to: None: ``folder``; a folder or the beginning of a URL; "": names are complete.
        ranges: least and largest label, height and width of all samples, such as {"label": [0, 9], ...}.
        classes: class names, or None for unlabelled data (then every label is -1).
        channels: 1 (grey) or 3 (RGB).
        image_format: "jpg", "png", "webp", "raw" (PPM and PGM files), or "mixed".
        fingerprint: sha256 over everything that defines the data; the same for a copy elsewhere.
    """

    def __init__(
        self, folder: Path, head: dict, shards: Sequence[Shard], ends: np.ndarray, table: np.ndarray | LargeTable
    ) -> None:
        self.folder = folder
        self.root: str | None = head.get("root")
        self.shards = shards
        self.classes: list[str] | None = head["classes"]
        self.channels: int = head["channels"]
        self.image_format: str = head["image_format"]
        self.fingerprint: str = head["fingerprint"]
        self.ranges: dict[str, list[int]] = head["ranges"]
        self._table, self._ends = table, ends
        self._queries: list[str] = []
        self.cache: ShardCache | None = None  # where shards are fetched to; None: they are files of this machine
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Index.load, (self.folder,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def samples(self) -> np.ndarray:
        """(N,) read-only array of ``SAMPLE_DTYPE``, memory-mapped; sample ids are positions in it.

        All of it is checked at first use. In a very large set ask :meth:`rows` for some and ``ranges`` for what is true of all.
        """
        return self._table.all() if isinstance(self._table, LargeTable) else self._table

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The records of samples: array of ``SAMPLE_DTYPE`` of the shape of ``ids``. Raises UserError where the index is damaged."""
        return self._table.rows(ids) if isinstance(self._table, LargeTable) else self._table[ids]

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for unlabelled data."""
        return None if self.classes is None else len(self.classes)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Index:
        """Load and check the index of ``folder``.

        Raises:
            UserError: the folder or its index is missing, empty, damaged, of an unknown version or contradicts itself.
        """
        folder = Path(folder)
        head = read_head(folder)
        if head["version"] == LARGE_VERSION:
            large_index.check_head(folder / "index.json", head)
            shards = large_index.read_shards(folder, head)
            table = LargeTable(folder, head, shards)
            if len(table.records) <= CHECKED_AT_ONCE:
                table.all()
            index = cls(folder, head, shards, shards.ends, table)
            index._queries = read_queries(folder, len(shards))
            return index
        check_head(folder / "index.json", head)
        samples = read_table(folder, head)
        check_table(folder, head, samples)
        head["ranges"] = ranges(samples)
        return cls(folder, head, head["shards"], np.cumsum([shard.samples for shard in head["shards"]]), samples)

    def location(self, number: int) -> str:
        """Where shard ``number`` lies: a path, or a URL of the kinds that webdataset opens."""
        name = self.shards[number].name
        if self.root is None:
            return str(self.folder / name)
        query = self._queries[number if len(self._queries) > 1 else 0] if self._queries else ""
        return (name if self.root == "" else f"{self.root.rstrip('/')}/{name}") + query

    def is_remote(self) -> bool:
        """Whether a shard lies elsewhere than in the file system of this machine."""
        if self.root:
            return remote(self.root)
        return self.root == "" and any(remote(shard.name) for shard in self.shards)

    @property
    def shard_bytes(self) -> np.ndarray:
        """(S,) the size of every shard."""
        table = getattr(self.shards, "bytes", None)
        return np.array([shard.bytes for shard in self.shards]) if table is None else table

    def want(self, numbers: np.ndarray, urgent: np.ndarray | Sequence[int] = ()) -> None:
        """With a cache: the shards (numbers, soonest first) that will be read next. Returns at once.

        urgent: numbers of those that the first batch needs, see ``ShardCache.want``.
        """
        if self.cache is not None:
            coming = (number for number in numbers.tolist() if number not in self._files)
            wanted = ((self.location(n), self.shards[n].bytes, self.shards[n].sha256) for n in coming)
            self.cache.want(wanted, [self.shards[int(n)].sha256 for n in urgent])

    def close(self) -> None:
        """End the fetching of shards; whoever waits for one gets a RuntimeError."""
        if self.cache is not None:
            self.cache.close()

    def check_files(self) -> None:
        """Check that every shard is there with the recorded size (a stat each, nothing is read).

        Shards that are not files of this machine, and those of a very large set, are compared when they are opened.

        Raises:
            UserError: naming the shard that is missing or has another size.
        """
        if remote(self.root or "") or len(self.shards) > MAX_CHECKED_FILES:
            return
        for number, shard in enumerate(self.shards):
            if remote(self.location(number)):
                continue
            path = Path(self.location(number))
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(
                    f"shard {path} is listed in index.json but cannot be read ({error.strerror}): {self._remedy}"
                ) from None
            if size != shard.bytes:
                raise self._other_size(path, size, shard)

    def _other_size(self, path: Path, size: int, shard: Shard) -> UserError:
        return UserError(
            f"shard {path} has {size} bytes, the index says {shard.bytes}: it is cut short or was replaced; {self._remedy}"
        )

    @property
    def _remedy(self) -> str:
        if self.root is None:
            return "copy the whole folder again, or pack it again"
        return "copy it again, or run python -m ddpm_dist.index again"

    def verify(self) -> None:
        """Read every shard of this machine and compare its sha256 with the index. Raises UserError naming the first that differs."""
        self.check_files()
        for number, shard in enumerate(self.shards):
            if remote(self.location(number)):
                continue
            if file_sha256(Path(self.location(number))) != shard.sha256:
                raise UserError(
                    f"shard {self.location(number)} is damaged: its sha256 is not the one in index.json; {self._remedy}"
                )

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        """Shard number of every sample id: int64 array of the shape of ``ids``. Ids must lie in [0, N)."""
        return np.searchsorted(self._ends, ids, side="right")

    def key_of(self, sample_id: int) -> str:
        """The webdataset key of a sample, read from its shard; "sample N" where the shard is too damaged for that."""
        number = int(self.shard_of(np.asarray(sample_id)))
        # Where the sample before it ends a header begins; the first sample of a shard is looked for from the shard's beginning.
        rows = self.rows(np.arange(max(sample_id - 1, 0), sample_id + 1))
        start = 0
        if sample_id and int(self.shard_of(np.asarray(sample_id - 1))) == number:
            start = int(rows["offset"][0]) + -(-int(rows["size"][0]) // BLOCK) * BLOCK
        key = key_at(lambda size, position: self._pread(number, size, position), start, int(rows["offset"][-1]))
        return key or f"sample {sample_id}"

    def describe(self, sample_id: int) -> str:
        """``FOLDER/SHARD:KEY`` of a sample, for messages; works on damaged shards as well."""
        path = public_name(self.location(int(self.shard_of(np.asarray(sample_id)))))
        try:
            key = self.key_of(sample_id)
            if not key.isprintable():  # it may hold anything
                key = key.encode("unicode_escape").decode("ascii")
            return f"{path}:{key}"
        except UserError:
            return f"{path}:sample {sample_id}"

    def read(self, sample_id: int) -> bytes:
        """The image bytes of a sample, checked against the index.

        Raises:
            UserError: "shard:key: ..." when the bytes are not those that were indexed, or the shard cannot be read.
        """
        return self.read_many(np.asarray([sample_id]))[0]

    def read_many(self, ids: np.ndarray) -> Sequence[bytes]:
        """The image bytes of several samples, as :meth:`read`; ids: int64 (B,)."""
        rows, numbers = self.rows(ids), self.shard_of(ids).tolist()
        wanted = np.ascontiguousarray(rows["checksum"]).tobytes()  # little endian, as the digests are
        found, are = self._read_rows(numbers, rows) or self._read_each(numbers, rows)
        if are != wanted:
            for place in np.flatnonzero(np.frombuffer(are, "<u8") != np.frombuffer(wanted, "<u8")).tolist():
                right = wanted[8 * place : 8 * place + 8]
                size, offset = int(rows["size"][place]), int(rows["offset"][place])
                data = self._read_anew(numbers[place], size, offset) if self.cache is not None else b""
                if digest(data) != right:
                    raise BadSample(
                        f"{self.describe(int(ids[place]))}: the image bytes do not match the index (the shard is damaged or was "
                        f"replaced): {self._remedy}",
                        int(ids[place]),
                    )
                found = [data if k == place else file for k, file in enumerate(found)]
        return found

    def _read_rows(self, numbers: list[int], rows: np.ndarray) -> tuple[Sequence[bytes], bytes] | None:
        """Files and digests as :func:`checksums.read_rows`. None: :meth:`_read_each` has to, or says what is wrong."""
        shards = dict.fromkeys(numbers)
        if self.image_format not in ("jpg", "mixed") or len(numbers) < checksums.FEW or len(shards) > MAX_OPEN_FILES:
            return None
        held = {number: self._file(number) for number in shards}  # nobody closes them while they are held
        return checksums.read_rows([held[number].descriptor for number in numbers], rows["offset"], rows["size"])

    def _read_each(self, numbers: list[int], rows: np.ndarray) -> tuple[Sequence[bytes], bytes]:
        # Lists of Python numbers: taking fields out of single records costs more than reading them from the page cache.
        columns = (rows[name].tolist() for name in ("size", "offset"))
        files = [self._pread(*place) for place in zip(numbers, *columns, strict=True)]
        return files, checksums.digests(files)

    def _read_anew(self, number: int, size: int, offset: int) -> bytes:
        """After a wrong checksum: a copy that was damaged on this node's disk goes, and the shard is fetched once more.

        A sample is bad only if it is so everywhere: nodes would otherwise train different runs.
        """
        shard = self.shards[number]
        self.cache.give_up_if_damaged(self.location(number), shard.bytes, shard.sha256)
        file = self._open(number)  # what is in the list may be the old copy, opened by another thread meanwhile
        with self._lock:
            self._files[number] = file
        return self._pread_from(file, number, size, offset)

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        return self._pread_from(self._file(number), number, size, offset)

    def _pread_from(self, file: _OpenFile, number: int, size: int, offset: int) -> bytes:
        """``file`` is held while it is read: another thread may take it off the list, which closes it when nobody has it."""
        try:
            return os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise UserError(f"shard {public_name(self.location(number))} cannot be read: {error.strerror}") from None

    def _file(self, number: int) -> _OpenFile:
        with self._lock:
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
                return file
        opened = self._open(number)  # outside of the lock: it may wait for a shard to arrive
        with self._lock:
            file = self._files.setdefault(number, opened)  # another thread may have been quicker
            self._files.move_to_end(number)
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)  # closed once no other thread is reading from it
            return file

    def _open(self, number: int) -> _OpenFile:
        where, shard = self.location(number), self.shards[number]
        if self.cache is not None:
            return _OpenFile(self.cache.open(where, shard.bytes, shard.sha256))
        if remote(where):
            raise UserError(
                f"shard {public_name(where)} is not on this machine: set data.cache_dir to a folder on a local disk (and data.cache_dir_gb "
                "to what it may take), where shards are fetched to"
            )
        try:
            file = _OpenFile(os.open(where, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise UserError(f"shard {where} cannot be read: {error.strerror}") from None
        size = os.fstat(file.descriptor).st_size
        if size != shard.bytes:
            raise self._other_size(Path(where), size, shard)
        return file


def remote(where: str) -> bool:
    """Whether a location is a URL or a command rather than a path."""
    return "://" in where or where.startswith("pipe:")


class _OpenFile:
    """A descriptor that closes when the last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)
