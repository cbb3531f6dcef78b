"""Images that lie in parquet files, as Hugging Face writes them: a column {bytes, path} and a label. Needs pyarrow.

A worker holds the images of one row group at a time.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from ddpm_dist.data.encode import BadImage, Item, channels_of, open_image
from ddpm_dist.data.huggingface_source import LABEL, number_labels
from ddpm_dist.data.sources import printable
from ddpm_dist.errors import UserError


class Parquet:
    """The rows of some parquet files in order, a ``ddpm_dist.data.sources.Source``."""

    name, image_format = "parquet", "jpg"

    def __init__(
        self, groups: list[tuple[Path, int, int]], column: str, labels: list[int] | None, classes: list[str] | None
    ) -> None:
        """groups: path, row group and its number of rows."""
        self.classes, self.notes = classes, []
        self._groups, self._column, self._labels = groups, column, labels
        self._begins = [0, *accumulate(rows for _, _, rows in groups)]

    def __len__(self) -> int:
        return self._begins[-1]

    def item(self, position: int) -> Item:
        number = bisect_right(self._begins, position) - 1
        path, group, _ = self._groups[number]
        row = position - self._begins[number]
        label = -1 if self._labels is None else self._labels[position]
        load = functools.partial(_load, str(path), group, self._column, row)
        return Item(f"{printable(path)}:{group}:{row}", label, load)

    def channels(self) -> int:
        first = None
        for position in range(len(self)):
            item = self.item(position)
            try:
                return channels_of(open_image(item.load()))
            except (OSError, BadImage) as error:
                first = first or f"{item.name} ({error})"
        raise UserError(f"none of the {len(self)} images can be read; the first: {first}")


def open_parquet(paths: list[Path], label_key: str | None, others: list[Path]) -> Parquet:
    """Open parquet files; ``others``: those of other splits, whose labels are classes too. Raises UserError: pyarrow is missing, a file is damaged, or has no column of images or labels."""
    try:
        import pyarrow
        import pyarrow.compute
        from pyarrow import parquet, types
    except ImportError as error:
        raise UserError(
            f"parquet files are read by pyarrow, which cannot be imported ({error}): pip install pyarrow"
        ) from None
    key, groups, labels, names, column = label_key or LABEL, [], [], None, None
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                images = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
                if not images or (column is not None and column not in images):
                    raise UserError(
                        f"{printable(path)} has no column of images {{bytes, path}}, only {', '.join(schema.names)}"
                    )
                column = column or images[0]
                names = names or _class_names(schema, key)
                if key in schema.names:
                    labels += file.read(columns=[key])[key].to_pylist()
                elif label_key is not None:
                    raise UserError(f"{printable(path)} has no column {label_key}, only {', '.join(schema.names)}")
                else:
                    labels += [None] * file.metadata.num_rows
                groups += [(path, k, file.metadata.row_group(k).num_rows) for k in range(file.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{printable(path)} cannot be read: {error}") from None
    unused = []
    for path in others:
        try:
            with parquet.ParquetFile(path) as file:
                if key in file.schema_arrow.names:
                    unused += pyarrow.compute.unique(file.read(columns=[key])[key]).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{printable(path)} cannot be read: {error}") from None
    numbers, classes = number_labels(str(paths[0]), labels, unused)
    if classes is not None and names is not None:
        if len(names) < len(classes):
            raise UserError(
                f"{printable(paths[0])} and others: a label is {len(classes) - 1}, but there are {len(names)} class names"
            )
        classes = names
    return Parquet(groups, column, numbers, classes)


def _class_names(schema: Any, key: str) -> list[str] | None:
    """Of a ClassLabel, which the ``datasets`` library notes in the schema."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][key]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    good = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return names if good else None


@functools.lru_cache(maxsize=1)
def _group(path: str, group: int, column: str) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column])[column].combine_chunks()


def _load(path: str, group: int, column: str, row: int) -> bytes:
    import pyarrow

    try:
        image = _group(path, group, column)[row].as_py()
    except pyarrow.ArrowException as error:
        raise BadImage(f"the parquet file is damaged: {error}") from None
    if not image or not image["bytes"]:
        raise BadImage("no image bytes in this row")
    return image["bytes"]
