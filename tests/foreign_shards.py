"""Webdataset shards as others write them, good ones and bad ones, for the tests of ``ddpm_dist.index``."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import webdataset
from PIL import Image

from ddpm_dist.index import main


def picture(number: int, size=(16, 16), mode: str = "RGB") -> Image.Image:
    """Smooth, so that JPEG keeps it nearly as it is; the number decides what it shows."""
    random = np.random.default_rng(number)
    small = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(number: int, extension: str = "jpg", size=(16, 16), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    picture(number, size, mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_shards(folder, count=24, per_shard=10, extensions=("jpg",), label=lambda n: {"cls": str(n % 4).encode()}):
    """By webdataset's own writer, as everybody does: sample n has the image n and what ``label(n)`` says."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/train-%04d.tar", maxcount=per_shard, encoder=False, verbose=0) as writer:
        for n in range(count):
            extension = extensions[n % len(extensions)]
            writer.write({"__key__": f"{n:05d}", extension: encoded(n, extension), **label(n)})
    return sorted(folder.glob("*.tar"))


def write_tar(path, files):
    """Any (name, bytes), as they are."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(*numbers, **changed):
    """(name, bytes) of good samples s0, s1 ...; ``changed`` replaces files: s1_jpg=b"...", or leaves them out: s1_cls=None."""
    files = {}
    for n in numbers:
        files[f"s{n}.jpg"], files[f"s{n}.cls"] = encoded(n), str(n % 4).encode()
    for name, data in changed.items():
        files[name.replace("_", ".")] = data
    together = sorted(files.items(), key=lambda file: file[0].partition(".")[0])
    return [(name, data) for name, data in together if data is not None]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width: int, height: int, text: int = 0) -> bytes:
    """A PNG of a few kB that claims any size; with ``text`` bytes of compressed zeros as its comment."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    comment = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(text), 9)) if text else b""
    pixels = zlib.compress(bytes(min(height * (3 * width + 1), 1 << 24)), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + comment
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )


def jpeg_claiming(width: int, height: int) -> bytes:
    """A good JPEG with other numbers in its header."""
    data = bytearray(encoded(1))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def index(capsys, *arguments):
    """Run the command in this process: (exit code, lines of stdout, text of stderr)."""
    code = main(["--workers", "1", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def findings(lines):
    """{(shard's file name, key): reason} of the lines that are findings."""
    found = {}
    for line in lines:
        head, colon, rest = line.partition(".tar:")
        if colon:
            key, reason, _ = (part.strip() for part in rest.split(":", 2))
            found[head.rpartition("/")[2], key] = reason
    return found


def quarantined(folder):
    rows = json.loads((folder / "quarantine.json").read_text())
    return {(row["shard"].rpartition("/")[2].removesuffix(".tar"), row["key"]): row["reason"] for row in rows}
