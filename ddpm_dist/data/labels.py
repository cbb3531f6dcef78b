"""Where a sample's label is, and what it may be: a number or a class name in ``key.cls``, ``key.txt`` or somewhere in ``key.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LABEL_BYTES = 1024
MAX_JSON_BYTES = 4 << 20
MAX_NAME = 200  # characters
MAX_NUMBER = (1 << 31) - 1
MAX_CLASSES = 1 << 20  # numbers above that are damage; so many different names are captions

MISSING, BAD, OUTSIDE = "missing label", "bad label", "label out of range"


class BadLabel(Exception):
    """``reason``: in two or three words; the message says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class LabelRule:
    """How labels are read.

    Attributes:
        extension: of the file beside the image, such as "cls"; None: the samples have no labels.
        key: for JSON the keys that lead to the label, such as ("meta", "class"); empty: the file is the label.
        meaning: "number", "name", or "either" as long as it is not known which of them the labels are.
        classes: number of every class name, where the names are known; then a label is a name or a number.
        limit: labels are below it, where that is known.
        optional: a sample may be without a label.
    """

    extension: str | None
    key: tuple[str, ...] = ()
    meaning: str = "either"
    classes: Mapping[str, int] | None = None
    limit: int | None = None
    optional: bool = False

    @property
    def max_bytes(self) -> int:
        """The most that a label file may hold."""
        return MAX_JSON_BYTES if self.key else MAX_LABEL_BYTES

    def read(self, content: bytes) -> str:
        """The label as text: a number without leading zeros, or a class name. Raises BadLabel."""
        text = self._in_json(content) if self.key else _plain(content, self.extension)
        if self.classes is not None and text in self.classes:
            return text
        is_number = text.isascii() and text.isdigit() and len(text) <= 20
        if not is_number:
            if self.meaning == "number":
                raise BadLabel(
                    BAD,
                    f"the label in .{self.extension} must be a whole number from 0 to {MAX_NUMBER}, found {text[:40]!r}",
                )
            if self.classes is not None:
                raise BadLabel(OUTSIDE, f"{text[:40]!r} is none of the {len(self.classes)} class names")
            return text
        if self.meaning == "name":
            raise BadLabel(BAD, f"the label in .{self.extension} is the number {text} where most are names")
        number, limit = int(text), self.limit
        if number > MAX_NUMBER:
            raise BadLabel(
                BAD, f"the label in .{self.extension} must be a whole number from 0 to {MAX_NUMBER}, found {text}"
            )
        if limit is not None and number >= limit:
            raise BadLabel(OUTSIDE, f"label {number} is not in 0..{limit - 1}")
        return str(number)

    def _in_json(self, content: bytes) -> str:
        path = ".".join(self.key)
        try:
            value: Any = json.loads(content)
        except (ValueError, RecursionError):
            raise BadLabel(BAD, f".{self.extension} is not valid JSON") from None
        for key in self.key:
            if isinstance(value, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise BadLabel(MISSING, f".{self.extension} has no {path}")
        if isinstance(value, str):
            return _name(value, self.extension)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
            raise BadLabel(
                BAD, f"{path} in .{self.extension} is neither a whole number from 0 nor a name: {value!r:.40}"
            )
        return str(value)


def _plain(content: bytes, extension: str | None) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise BadLabel(BAD, f"the label in .{extension} is not text") from None
    return _name(text, extension)


def _name(text: str, extension: str | None) -> str:
    text = text.strip()
    if not text or len(text) > MAX_NAME or not text.isprintable():
        what = "is empty" if not text else f"is no number and no name: {text[:40]!r}"
        raise BadLabel(BAD, f"the label in .{extension} {what}")
    return text
