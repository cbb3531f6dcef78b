"""From a source image to the bytes that a shard stores. Runs in the worker processes of pack, so it imports little."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ddpm_dist.data import image_header

# What source files may be. Pillow would also try formats that start other programs (EPS).
READABLE = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "raw": "PPM"}
PACK_FORMATS = tuple(PILLOW_NAMES)
MODES = {1: "L", 3: "RGB"}
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
DEFAULT_QUALITY = 95
MAX_SIDE = {"jpg": 65500, "png": 65535, "webp": 16383, "raw": 65535}  # limits of libjpeg, the index and WebP
ORIENTATION_TAG = 0x0112
WEBP_METHOD, WEBP_EFFORT = 2, 40  # more (4, 75) saves 3 %, takes four times as long to write and is not decoded faster


class BadImage(Exception):
    """A source image that cannot be read; the message is the reason."""


@dataclass(frozen=True)
class Item:
    """One source image, cheap to make and to send to a worker process.

    Attributes:
        name: what messages call it (a path, or "cifar10[12]").
        label: class number, -1 = none.
        load: returns the bytes of an image file, or a Pillow image; called in the worker.
    """

    name: str
    label: int
    load: Callable[[], bytes | Image.Image]


@dataclass(frozen=True)
class Recipe:
    """How every image is stored.

    Attributes:
        image_format: "jpg", "png", "webp" or "raw". WebP is written without loss and knows no grey: grey images get three equal
            channels, which are one again when training decodes them. raw: pixels without compression, in a PPM or PGM file.
        channels: 1 (grey) or 3 (RGB).
        size: side in pixels after resizing and centre crop, None = as it is.
        quality: JPEG quality 1..100; None = 95, and source files that are right already are stored byte for byte.
    """

    image_format: str
    channels: int
    size: int | None = None
    quality: int | None = None

    @property
    def extension(self) -> str:
        """Of the file in the shard."""
        return {1: "pgm", 3: "ppm"}[self.channels] if self.image_format == "raw" else self.image_format


@dataclass(frozen=True)
class Encoded:
    """An encoded image, or the reason why there is none (``data`` is None).

    ``recoloured``: the source had another number of channels.
    """

    position: int
    name: str
    label: int
    data: bytes | None
    reason: str = ""
    recoloured: bool = False


def encode_chunk(chunk: list[tuple[int, Item]], recipe: Recipe) -> list[Encoded]:
    """Encode some (position, item) pairs. A source image that cannot be read becomes an ``Encoded`` without data."""
    return [encode(position, item, recipe) for position, item in chunk]


def encode(position: int, item: Item, recipe: Recipe) -> Encoded:
    """Load, convert, resize and encode one image."""
    try:
        source = _load(item)
        image = source if isinstance(source, Image.Image) else open_image(source)
        recoloured = channels_of(image) != recipe.channels
        if isinstance(source, bytes) and _is_right_already(image, recipe) and _is_accepted(source):
            data = source
        else:
            image = fit(to_channels(upright(image), recipe.channels), recipe.size)
            _check_side(image, recipe)
            data = to_bytes(image, recipe)
    except BadImage as error:
        return Encoded(position, item.name, item.label, None, str(error))
    return Encoded(position, item.name, item.label, data, recoloured=recoloured)


def open_image(data: bytes) -> Image.Image:
    """Decode an image file completely. Raises BadImage with the reason."""
    if not data:
        raise BadImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
        image.load()
    except Image.UnidentifiedImageError:
        raise BadImage("not an image in a known format") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise BadImage(str(error) or type(error).__name__) from None
    return image


def channels_of(image: Image.Image) -> int:
    """1 for grey images of any depth, else 3."""
    return 1 if image.mode in GREY_MODES else 3


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, as viewers do."""
    return image if _is_upright(image) else ImageOps.exif_transpose(image)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """8 bit grey or RGB. Transparent pixels are laid on white; 16 bit grey is scaled, not clipped. Raises BadImage."""
    mode = MODES[channels]
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise BadImage("32 bit grey values outside 0..65535")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise BadImage("floating point pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def fit(image: Image.Image, size: int | None) -> Image.Image:
    """Scale the shorter side to ``size`` (Lanczos) and cut the centre square; None leaves the image as it is."""
    if size is None or image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_bytes(image: Image.Image, recipe: Recipe) -> bytes:
    """The image as a JPEG, PNG, lossless WebP or PPM (grey: PGM) file, free of metadata, so that equal pixels give equal bytes."""
    clean = Image.fromarray(np.asarray(image))
    buffer = io.BytesIO()
    if recipe.image_format == "jpg":
        # Full colour resolution (4:4:4): halving it costs small training images much, and saves little.
        clean.save(buffer, "JPEG", quality=recipe.quality or DEFAULT_QUALITY, subsampling=0)
    elif recipe.image_format == "webp":
        clean.save(buffer, "WEBP", lossless=True, quality=WEBP_EFFORT, method=WEBP_METHOD)
    else:
        clean.save(buffer, PILLOW_NAMES[recipe.image_format])
    return buffer.getvalue()


def _load(item: Item) -> bytes | Image.Image:
    try:
        return item.load()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None


def _is_right_already(image: Image.Image, recipe: Recipe) -> bool:
    """Whether the source file can be stored byte for byte."""
    _check_side(image, recipe)
    return (
        image.format == PILLOW_NAMES[recipe.image_format]
        and image.format != "PPM"  # there are many ways to write one, and writing ours costs nothing
        and image.mode == MODES[recipe.channels]
        and "transparency" not in image.info
        and recipe.size is None
        and recipe.quality is None
        and not getattr(image, "is_animated", False)
        and _is_upright(image)
    )


def _is_accepted(source: bytes) -> bool:
    """Whether an index would take the file. Pillow says nothing of some kinds that training cannot read (an APNG of one picture)."""
    try:
        image_header.read_header(source)
    except image_header.BadImage:
        return False
    return True


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1) not in range(2, 9)
    except Exception:  # damaged EXIF data; the pixels are fine
        return True


def _check_side(image: Image.Image, recipe: Recipe) -> None:
    if recipe.size is None and max(image.size) > MAX_SIDE[recipe.image_format]:
        width, height = image.size
        limit = MAX_SIDE[recipe.image_format]
        raise BadImage(f"{width} x {height} pixels; {recipe.image_format} takes at most {limit} a side, use --size")
