"""A folder of generated images, INDEX_CLASS.png, that several tasks fill at the same time and that a later one continues.

``sample.json`` in it says how its images are made, so that images made otherwise never come between them. Whoever is first writes
it; everybody else follows it. An image appears complete (written aside, renamed), and one that is there is not made again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_dist.errors import UserError

RECORD = "sample.json"
FORMAT, VERSION = "ddpm_dist-sample", 1
_IMAGE = re.compile(r"(\d{6,})(_\d+)?\.png")
_ASIDE = re.compile(_IMAGE.pattern + r"\.[0-9a-f]{8}\.incomplete")


def name_of(index: int, label: int | None) -> str:
    """The file name of an image."""
    return f"{index:06d}.png" if label is None else f"{index:06d}_{label}.png"


# ---- how the images of a folder are made -----------------------------------------------------------------------------


def recorded(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder, None where nobody has begun. Raises UserError if they cannot be read, or if images are without."""
    path = folder / RECORD
    for _ in range(2):
        try:
            says = json.loads(path.read_text("utf-8"))
            if says["format"] != FORMAT or says["version"] != VERSION:
                raise UserError(f"{path} is of a version that this program does not know: choose another --out-dir")
            return dict(says["settings"])
        except FileNotFoundError:
            if not folder.is_dir() or not any(_IMAGE.fullmatch(name) for name in os.listdir(folder)):
                return None  # images may have come since the first look: then look once more
        except NotADirectoryError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} is damaged: choose another --out-dir, or remove {folder}") from None
    raise UserError(f"{folder} holds images, but no {RECORD} that says how they were made: choose another --out-dir")


def record(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the settings of a new folder, unless another process was first; returns those that count. UserError as ``recorded``."""
    text = json.dumps({"format": FORMAT, "version": VERSION, "settings": settings}, indent=1) + "\n"
    aside = folder / f"{RECORD}.{secrets.token_hex(4)}.incomplete"
    with open(aside, "x", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, folder / RECORD)  # unlike a rename it leaves alone what is there
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not (folder / RECORD).exists():
            os.replace(aside, folder / RECORD)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)
    says = recorded(folder)
    return settings if says is None else says


def check(folder: Path, settings: dict[str, Any], says: dict[str, Any]) -> None:
    """Raises UserError that lists what differs."""
    different = [key for key in {**says, **settings} if says.get(key) != settings.get(key)]
    if different:
        shown = ", ".join(f"{key}: {settings.get(key)} now, {says.get(key)} there" for key in different)
        raise UserError(
            f"the images in {folder} are made otherwise ({shown}): give the same options, or choose another --out-dir"
        )


# ---- images ----------------------------------------------------------------------------------------------------------


def existing(folder: Path, wanted: Iterable[tuple[int, int | None]]) -> set[int]:
    """Which of the wanted (index, label) are there and whole; what killed writers of these have left is removed.

    Every file is read: after a power loss a file may have its name and not its content.
    """
    left: dict[int, list[Path]] = {}
    there = set(os.listdir(folder))
    for name in there:
        if found := _ASIDE.fullmatch(name):
            left.setdefault(int(found[1]), []).append(folder / name)
    whole = set()
    for index, label in wanted:
        for path in left.get(index, []):
            with contextlib.suppress(OSError):
                path.unlink()
        name = name_of(index, label)
        if name in there and _is_whole(folder / name):
            whole.add(index)
    return whole


def _is_whole(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()  # the check sums of all its parts
    except Exception:  # Pillow raises many types on damaged files
        return False
    return True


def write(folder: Path, index: int, label: int | None, pixels: np.ndarray) -> None:
    """Write an image, (C, H, W) uint8. Raises OSError."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)).save(buffer, format="PNG")
    path = folder / name_of(index, label)
    while True:
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.incomplete")
        try:
            aside.write_bytes(buffer.getvalue())
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
        with contextlib.suppress(FileNotFoundError):  # a task that makes the same image took it for a leftover
            os.replace(aside, path)
            return


def read(folder: Path, index: int, label: int | None) -> np.ndarray:
    """The image as (C, H, W) uint8. Raises OSError."""
    from PIL import Image

    with Image.open(folder / name_of(index, label), formats=("PNG",)) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
