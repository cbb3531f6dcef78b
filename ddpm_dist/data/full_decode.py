"""Decoding an image only to see whether that is possible, more strictly than training does.

libjpeg fills what is missing or damaged with grey and only warns; DALI and Pillow do not pass the warning on, simplejpeg does. A
flipped bit after which a JPEG decodes without any warning cannot be found by decoding: that takes a checksum from before. PNG has
check sums of its own, which decoders pass over; here they are compared.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable

from ddpm_dist.data.image_header import BadImage, Header

MAX_SCANS = 500  # of a progressive JPEG, each of which costs a pass over all pixels; usual are ten
DAMAGED, TRUNCATED = "damaged image", "truncated image"


def decode(data: bytes, header: Header) -> None:
    """Decode all pixels of an image whose header is known to be acceptable. Raises BadImage with the reason."""
    if header.format == "raw":
        return  # its length was compared with its header
    if header.format == "jpg":
        _check_jpeg(data)
        strict = strict_jpeg()
        if strict is not None:
            try:
                strict(data)
                return
            except ValueError as error:
                if "subsampling" not in str(error):  # a rare one, which is beyond simplejpeg but not beyond others
                    raise BadImage(_kind(str(error)), str(error)) from None
    elif header.format == "png":
        _check_png(data)
    elif int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise BadImage(
            TRUNCATED, f"the WebP has {len(data)} bytes, its header says {int.from_bytes(data[4:8], 'little') + 8}"
        )
    _decode_by_pillow(data, header)


@functools.cache
def strict_jpeg() -> Callable[[bytes], object] | None:
    """A decoder that refuses what libjpeg warns of; None where simplejpeg is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    # All of the compressed data is read whatever comes out. Small and grey spares the arithmetic behind it, which cannot fail.
    return lambda data: simplejpeg.decode_jpeg(data, "GRAY", True, True, 1, 1, 1 / 8, strict=True)


def _decode_by_pillow(data: bytes, header: Header) -> None:
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the header was compared with our own bound
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            size = image.size
            image.load()
    except MemoryError:
        raise BadImage(DAMAGED, f"does not fit into memory ({header.width} x {header.height} pixels)") from None
    except Exception as error:  # Pillow raises many types on damaged files
        text = str(error) or type(error).__name__
        raise BadImage(_kind(text), text) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if size != (header.width, header.height):
        raise BadImage(
            DAMAGED, f"decodes to {size[0]} x {size[1]} pixels, its header says {header.width} x {header.height}"
        )


def _kind(text: str) -> str:
    return TRUNCATED if "truncat" in text.lower() or "premature end" in text.lower() else DAMAGED


def _check_jpeg(data: bytes) -> None:
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise BadImage(DAMAGED, f"a JPEG of more than {MAX_SCANS} scans")
    if data.rfind(b"\xff\xd9") < 0:
        raise BadImage(TRUNCATED, "the JPEG has no end mark")


def _check_png(data: bytes) -> None:
    """Every chunk whole and with the check sum it states, up to the end chunk."""
    position, view = 8, memoryview(data)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BadImage(
                DAMAGED, f"the check sum of the PNG chunk {kind.decode('latin-1')} at byte {position} is wrong"
            )
        if kind == b"IEND":
            return
        position = end + 4
    raise BadImage(TRUNCATED, "the PNG has no end chunk")
