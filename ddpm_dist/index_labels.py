"""Which file of a sample is its label, from the command line and from what the first sample has."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from ddpm_dist.data.labels import MAX_CLASSES, MAX_NAME, LabelRule
from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.shard_source import opened
from ddpm_dist.data.tar_stream import BrokenTar, Tape, members, split_name
from ddpm_dist.errors import UserError

LOOKED_AT = 10_000  # files of a shard, in search of a sample


def read_classes(path: str) -> list[str]:
    """Class names from a text file, one per line. Raises UserError."""
    try:
        if Path(path).stat().st_size > MAX_CLASSES * 4:
            raise UserError(f"--classes {path} is too large for a list of names")
        names = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"--classes {path} holds no names")
    for number, name in enumerate(names, 1):
        if not name or len(name) > MAX_NAME:
            raise UserError(f"--classes {path}, line {number}: empty, or longer than {MAX_NAME} characters")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--classes {path}: {twice!r} is there twice")
    return names


def find_rule(options: argparse.Namespace, locations: list[str], classes: list[str] | None) -> LabelRule:
    """How labels are read. Raises UserError."""
    if options.unlabelled:
        return LabelRule(None)
    if classes is not None and options.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {options.num_classes}, but --classes has {len(classes)} names")
    key = tuple(options.label_key.split(".")) if options.label_key else ()
    extension = (options.label or ("json" if key else "")).lstrip(".").lower() or _first_label(locations)
    if extension.rpartition(".")[2] == "json" and not key:
        raise UserError(f"--label {extension}: say with --label-key where in the JSON the label is")
    is_number = extension.rpartition(".")[2] == "cls" and not key and classes is None
    numbers = {name: number for number, name in enumerate(classes)} if classes is not None else None
    limit = len(classes) if classes is not None else options.num_classes
    return LabelRule(extension, key, "number" if is_number else "either", numbers, limit)


def _first_label(locations: list[str]) -> str:
    """cls or txt, whichever the first sample has."""
    for location in locations[:5]:
        extensions = _first_extensions(location)
        for extension in ("cls", "txt"):
            if extension in extensions:
                return extension
        if extensions:
            hint = ", or --label-key if it is in the .json" if "json" in extensions else ""
            found = ", ".join(f".{each}" for each in sorted(extensions))
            raise UserError(
                f"{public_name(location)}: the first sample has no .cls and no .txt for a label (it has {found}): say which file is the label "
                f"with --label{hint}, or --unlabelled"
            )
    return "cls"  # nothing can be read there, which is found soon enough


def _first_extensions(location: str) -> set[str]:
    found: set[str] = set()
    try:
        with opened(location) as source:
            first = None
            for member in itertools.islice(members(Tape(source.read)), LOOKED_AT):
                key, extension = split_name(member.name)
                if not key or (first is not None and key != first):
                    if first is not None and key:
                        break
                    continue
                first = key
                found.add(extension)
    except (BrokenTar, OSError):
        pass
    return found
