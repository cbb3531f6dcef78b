"""Files that claim or unfold to gigabytes are found in a few hundred megabytes of memory (promise 24)."""

import resource
import subprocess
import sys
import tarfile

from conftest import environment
from foreign_shards import encoded, findings, jpeg_claiming, png_bomb, png_chunk, samples, write_tar

LIMIT = 400 << 20  # bytes of address space, of which Python, NumPy and Pillow take half


def limited(*arguments):
    """The command in a process that gets no more memory than ``LIMIT``."""
    command = [sys.executable, "-m", "ddpm_dist.index", *map(str, arguments), "--workers", "1"]
    run = subprocess.run(
        command, env=environment(OPENBLAS_NUM_THREADS="1"), capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )  # fmt: skip
    assert "Traceback" not in run.stderr and "MemoryError" not in run.stderr, run.stderr
    return run


def append_hollow(path, name, size):
    """A tar whose last member has so many zero bytes, as a sparse file."""
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512)
    info = tarfile.TarInfo(name)
    info.size = size
    with open(path, "wb") as file:
        file.write(data + info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(len(data) + 512 + -(-size // 512) * 512 + 1024)


def test_bombs_are_found_in_bounded_memory(tmp_path):
    profile = png_chunk(b"iCCP", b"p\0\0" + png_bomb(16, 16, 1 << 28)[60:])
    small = encoded(1, "png")
    files = samples(
        0, 1, 2, 3, 4, 5, 6,
        s1_jpg=None, s1_png=png_bomb(60_000, 60_000),
        s2_jpg=jpeg_claiming(60_000, 60_000),
        s3_jpg=None, s3_png=png_bomb(16, 16, 1 << 28),  # a quarter of a GB of zeros as a comment
        s4_jpg=None, s4_png=small[:33] + profile + small[33:],
        s5_jpg=None, s5_png=png_bomb(8000, 8000)[:-200],
        s6_cls=b"1" * (1 << 20),
    )  # fmt: skip
    write_tar(tmp_path / "a.tar", files)
    run = limited(tmp_path / "a.tar", "--check", "--label", "cls")
    found = findings(run.stdout.splitlines())
    assert run.returncode == 1, run.stderr
    assert found["a", "s1"] == found["a", "s2"] == "absurd image size" and found["a", "s6"] == "bad label"
    assert ("a", "s0") not in found and set(found) >= {("a", f"s{n}") for n in (1, 2, 3, 5, 6)}


def test_files_larger_than_the_memory_are_not_read_into_memory(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.jpg", encoded(1)), ("x.json", b'{"a": 1}'), ("h.jpg", encoded(2))])
    append_hollow(tmp_path / "a.tar", "h.json", 600 << 20)
    write_tar(tmp_path / "b.tar", [("h.json", b'{"a": 1}')])
    append_hollow(tmp_path / "b.tar", "h.jpg", 300 << 20)
    run = limited(tmp_path / "a.tar", tmp_path / "b.tar", "--out", tmp_path / "i", "--label-key", "a")
    assert run.returncode == 1, run.stderr
    assert findings(run.stdout.splitlines()) == {("a", "h"): "bad label", ("b", "h"): "absurd image size"}
