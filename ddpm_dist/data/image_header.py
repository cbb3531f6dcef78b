"""What an image file says of itself in its first bytes: format, channels and size, without decoding anything.

Sources: JPEG, ITU-T T.81 annex B; PNG, W3C Portable Network Graphics section 11; WebP, RFC 9649 sections 2.5 to 2.7; PPM and PGM,
the manual pages ppm(5) and pgm(5) of Netpbm.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

MAX_SIDE = 65535  # of the index
MAX_PIXELS = 1 << 26  # 67 million: 200 MB decoded
MAX_SEGMENTS = 10_000  # of a JPEG; chunks of a PNG or a WebP before its pixels
SEGMENT, FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_MODES = {(0, 8): ("L", 1), (2, 8): ("RGB", 3)}
PNG_NAMES = {0: "grey", 2: "RGB", 3: "P (palette)", 4: "LA (with transparency)", 6: "RGBA (with transparency)"}
VP8L_ALPHA = 1 << 28  # behind width and height, 14 bits each
# Magic number, width, height and largest value, with white space or comments between them.
PNM = re.compile(rb"P([56])" + 3 * rb"(?:[ \t\r\n]|#[^\r\n]*[\r\n])+(\d{1,9})" + rb"[ \t\r\n]")
MAX_PNM_HEADER = 4096
UNSUPPORTED = "unsupported image"
GARBAGE = "not an image"
ABSURD = "absurd image size"


class Header(NamedTuple):
    """format: "jpg", "png", "webp" or "raw" (PPM, PGM); channels: 1 (grey) or 3; width and height in pixels, before any EXIF rotation."""

    format: str
    channels: int
    width: int
    height: int


class BadImage(Exception):
    """``reason``: in two or three words; the message says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Raises BadImage: not an image of a known format, one that training cannot read, or one that claims to be too large."""
    if data[:2] == b"\xff\xd8":
        header = _jpeg(data)
    elif data[:8] == PNG_SIGNATURE:
        header = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _webp(data)
    elif data[:2] in (b"P5", b"P6"):
        header = _pnm(data)
    else:
        raise BadImage(GARBAGE, "not a JPEG, PNG, WebP, PPM or PGM image")
    _, _, width, height = header
    if not width or not height:
        raise BadImage(ABSURD, f"{width} x {height} pixels")
    if width > MAX_SIDE or height > MAX_SIDE:
        raise BadImage(ABSURD, f"{width} x {height} pixels; at most {MAX_SIDE} a side are possible")
    if width * height > max_pixels:
        raise BadImage(ABSURD, f"{width} x {height} pixels; at most {max_pixels:,} are taken")
    if header.format == "raw":
        _refuse_length(data, header)
    return header


def _jpeg(data: bytes) -> Header:
    position, segment = 2, SEGMENT.unpack_from
    try:
        for _ in range(MAX_SEGMENTS):
            prefix, marker, length = segment(data, position)
            if prefix != 0xFF or marker in (0x00, 0xD8, 0xD9, 0xDA):
                break
            if (
                marker >= 0xDB and marker != 0xFF or marker in (0xC4, 0xC8, 0xCC)
            ):  # tables, comments, what applications add
                position += 2 + max(2, length)
            elif marker >= 0xC0 and marker <= 0xCF:
                depth, height, width, components = FRAME.unpack_from(data, position + 4)
                if marker > 0xC2 or depth != 8:
                    raise BadImage(UNSUPPORTED, f"a JPEG of a rare kind (marker {marker:#x}, {depth} bit)")
                if components not in (1, 3):
                    raise BadImage(
                        UNSUPPORTED, f"image mode with {components} components (CMYK?): neither grey nor RGB"
                    )
                return Header("jpg", components, width, height)
            else:
                position += 1 if marker == 0xFF else 2  # filling; marks without content
    except struct.error:
        raise BadImage("truncated image", "the JPEG header is cut short") from None
    raise BadImage(GARBAGE, "not a JPEG or PNG image: the JPEG header is damaged")


def _png(data: bytes) -> Header:
    if len(data) < 33:
        raise BadImage("truncated image", "the PNG header is cut short")
    length, kind, width, height, depth, color = struct.unpack_from(">I4sIIBB", data, 8)
    if kind != b"IHDR" or length != 13:
        raise BadImage(GARBAGE, "not a JPEG or PNG image: the PNG header is damaged")
    if (color, depth) not in PNG_MODES:
        raise BadImage(
            UNSUPPORTED,
            f"image mode {PNG_NAMES.get(color, f'PNG {color}')}, {depth} bit, is neither 8 bit grey nor 8 bit RGB",
        )
    _refuse_chunks(data)
    return Header("png", PNG_MODES[color, depth][1], width, height)


def _refuse_chunks(data: bytes) -> None:
    """Of a PNG whose pixels are grey or RGB, the chunks before them may still make one colour transparent, or add more pictures."""
    position = 33
    for _ in range(MAX_SEGMENTS):
        kind = data[position + 4 : position + 8]
        if kind == b"IDAT" or len(kind) < 4:  # cut short: found when it is decoded
            return
        if kind == b"tRNS":
            raise BadImage(UNSUPPORTED, "a PNG with a transparent colour (tRNS)")
        if kind == b"acTL":
            raise BadImage(UNSUPPORTED, "an animated PNG (acTL)")
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise BadImage(GARBAGE, f"more than {MAX_SEGMENTS:,} chunks before the pixels of a PNG")


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if len(data) < 30 and not (kind == b"VP8L" and len(data) >= 25):
        raise BadImage("truncated image", "the WebP header is cut short")
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a" and not data[20] & 1:
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", 3, width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        if bits & VP8L_ALPHA:
            raise BadImage(UNSUPPORTED, "a WebP with transparency")
        return Header("webp", 3, (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        if data[20] & 0x02:
            raise BadImage(UNSUPPORTED, "an animated WebP")
        if data[20] & 0x10 or _has_alpha(data):
            raise BadImage(UNSUPPORTED, "a WebP with transparency")
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return Header("webp", 3, width, height)
    raise BadImage(GARBAGE, "not an image: the WebP header is damaged")


def _has_alpha(data: bytes) -> bool:
    """Whether a WebP of the extended format holds transparency though its flags do not say so: then decoders differ in what they show."""
    position = 30
    for _ in range(MAX_SEGMENTS):
        kind, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        if kind == b"VP8L":
            return bool(int.from_bytes(data[position + 9 : position + 13], "little") & VP8L_ALPHA)
        if kind in (b"ALPH", b"VP8 ") or len(kind) < 4:
            return kind == b"ALPH"
        position += 8 + size + size % 2
    return False


def _pnm(data: bytes) -> Header:
    found = PNM.match(data[:MAX_PNM_HEADER])
    if found is None:
        raise BadImage(GARBAGE, "not an image: the PPM or PGM header is damaged")
    kind, width, height, largest = map(int, found.groups())
    if largest != 255:
        raise BadImage(UNSUPPORTED, f"a PPM or PGM whose largest value is {largest}, not 255")
    return Header("raw", {5: 1, 6: 3}[kind], width, height)


def _refuse_length(data: bytes, header: Header) -> None:
    """A PPM or PGM ends with its pixels. Some hold several images; no decoder here would show the second."""
    wanted = PNM.match(data[:MAX_PNM_HEADER]).end() + header.height * header.width * header.channels
    if len(data) < wanted:
        raise BadImage("truncated image", f"{len(data)} bytes where {wanted} are needed")
    if len(data) > wanted:
        raise BadImage("damaged image", f"{len(data)} bytes where {wanted} are needed")
