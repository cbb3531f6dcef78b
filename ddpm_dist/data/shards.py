"""A folder of webdataset shards and its index: which bytes of which tar file are sample i, and what its label is.

A packed folder holds ordinary webdataset tars (``key.jpg`` + ``key.cls``) and two files of ours:

- ``index.json``: format and version, the shards (name, samples, bytes, sha256), classes, channels, image format,
  the sha256 of ``index.npy`` and the fingerprint of the whole data set;
- ``index.npy``: one record of ``SAMPLE_DTYPE`` per sample, shard after shard, in file order.

``Index.load`` checks all of it; nothing later has to doubt an offset or a label.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from ddpm_dist.data.index_file import (
    IMAGE_FORMATS,
    NO_LABEL,
    SAMPLE_DTYPE,
    Shard,
    check_table,
    checksum,
    file_sha256,
    fingerprint,
    read_head,
    read_table,
    write_index,
)
from ddpm_dist.data.tars import split_name, ustar_name
from ddpm_dist.errors import UserError

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


class Index:
    """The index of one shard folder. Make one with ``Index.load``; instances are read-only, thread-safe and picklable.

    Attributes:
        folder: the folder that holds the shards and the index.
        shards: list of ``Shard``, in order.
        samples: (N,) read-only array of ``SAMPLE_DTYPE``, memory-mapped; sample ids are positions in it.
        classes: class names, or None for unlabelled data (then every label is -1).
        channels: 1 (grey) or 3 (RGB).
        image_format: "jpg" or "png".
        fingerprint: sha256 over everything that defines the data; the same for a copy elsewhere.
    """

    def __init__(self, folder: Path, head: dict, samples: np.ndarray) -> None:
        self.folder = folder
        self.shards: list[Shard] = head["shards"]
        self.classes: list[str] | None = head["classes"]
        self.channels: int = head["channels"]
        self.image_format: str = head["image_format"]
        self.fingerprint: str = head["fingerprint"]
        self.samples = samples
        self._ends = np.cumsum([shard.samples for shard in self.shards])
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Index.load, (self.folder,)

    def __len__(self) -> int:
        return len(self.samples)

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
        samples = read_table(folder, head)
        check_table(folder, head, samples)
        return cls(folder, head, samples)

    def check_files(self) -> None:
        """Check that every shard is there with the recorded size (a stat each, nothing is read).

        Raises:
            UserError: naming the shard that is missing or has another size.
        """
        for shard in self.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(
                    f"shard {path} is listed in index.json but cannot be read ({error.strerror}): "
                    "copy the whole folder again, or pack it again"
                ) from None
            if size != shard.bytes:
                raise UserError(
                    f"shard {path} has {size} bytes, the index says {shard.bytes}: it is cut short or was replaced; "
                    "copy the whole folder again, or pack it again"
                )

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the index. Raises UserError naming the first that differs."""
        self.check_files()
        for shard in self.shards:
            if file_sha256(self.folder / shard.name) != shard.sha256:
                raise UserError(
                    f"shard {self.folder / shard.name} is damaged: its sha256 is not the one in index.json; "
                    "copy it again, or pack again"
                )

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        """Shard number of every sample id: int64 array of the shape of ``ids``. Ids must lie in [0, N)."""
        return np.searchsorted(self._ends, ids, side="right")

    def key_of(self, sample_id: int) -> str:
        """The webdataset key of a sample, read from the tar header that stands before its image bytes."""
        number = int(self.shard_of(np.asarray(sample_id)))
        offset = int(self.samples["offset"][sample_id])
        header = self._pread(number, 512, offset - 512)
        return split_name(ustar_name(header))[0] or f"sample {sample_id}"

    def describe(self, sample_id: int) -> str:
        """``FOLDER/SHARD:KEY`` of a sample, for messages; works on damaged shards as well."""
        path = self.folder / self.shards[int(self.shard_of(np.asarray(sample_id)))].name
        try:
            return f"{path}:{self.key_of(sample_id)}"
        except UserError:
            return f"{path}:sample {sample_id}"

    def read(self, sample_id: int) -> bytes:
        """The image bytes of a sample, checked against the index.

        Raises:
            UserError: "shard:key: ..." when the bytes are not those that were indexed, or the shard cannot be read.
        """
        return self.read_many(np.asarray([sample_id]))[0]

    def read_many(self, ids: np.ndarray) -> list[bytes]:
        """The image bytes of several samples, as :meth:`read`; ids: int64 (B,)."""
        rows, numbers = self.samples[ids], self.shard_of(ids).tolist()
        found = []
        # Lists of Python numbers: taking fields out of single records costs more than reading them from the page cache.
        columns = (rows[name].tolist() for name in ("size", "offset", "checksum"))
        for place, (number, size, offset, wanted) in enumerate(zip(numbers, *columns, strict=True)):
            data = self._pread(number, size, offset)
            if checksum(data) != wanted:
                raise UserError(
                    f"{self.describe(int(ids[place]))}: the image bytes do not match the index (the shard is damaged or was "
                    "replaced): copy it again, or pack again"
                )
            found.append(data)
        return found

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file(number).descriptor, size, offset)
        except OSError as error:
            path = self.folder / self.shards[number].name
            raise UserError(f"shard {path} cannot be read: {error.strerror}") from None

    def _file(self, number: int) -> _OpenFile:
        with self._lock:
            file = self._files.pop(number, None) or _OpenFile(self.folder / self.shards[number].name)
            self._files[number] = file
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)  # closed once no other thread is reading from it
            return file


class _OpenFile:
    """A descriptor that closes when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
