"""What the shard cache opens, what it refuses to open, and what it never says."""

import hashlib
import http.server
import os
import random
import ssl
import stat
import subprocess
import sys
import threading
import time
import traceback

import pytest
import webdataset.gopen  # noqa: F401 - importing it takes longer than the patience of these tests
from shard_server import ShardServer

from ddpm_dist.data import fetching
from ddpm_dist.data.remote_source import public_name
from ddpm_dist.data.shard_cache import ShardCache
from ddpm_dist.errors import UserError

SIZE = 100_000
DATA = random.Random(0).randbytes(SIZE)


@pytest.fixture
def server():
    server = ShardServer()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.01)
    with ShardCache(tmp_path / "cache", 10 * SIZE, allow_pipe=True, patience=0.2) as cache:
        yield cache


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "data" / "a b.tar"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path, SIZE, hashlib.sha256(DATA).hexdigest()


def read(cache: ShardCache, url: str, size: int, sha256: str) -> bytes:
    handle = cache.open(url, size, sha256)
    data = os.pread(handle, size + 1, 0)
    os.close(handle)
    return data


def command(folder, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_files(cache, shard):
    path, size, sha256 = shard
    assert read(cache, str(path), size, sha256) == DATA
    cached = cache._folder.folder / f"{sha256}.tar"
    cached.unlink()
    assert read(cache, f"file://{str(path).replace(' ', '%20')}", size, sha256) == DATA
    cached.unlink()
    # Goes on in the middle.
    (cache._folder.folder / f"{sha256}.{size}.part").write_bytes(DATA[:1000])
    before = cache.bytes_fetched
    assert read(cache, str(path), size, sha256) == DATA and cache.bytes_fetched == before + size - 1000


@pytest.mark.parametrize("what", ["missing", "folder", "fifo"])
def test_what_is_no_file_is_said_at_once(cache, tmp_path, what):
    path = tmp_path / "it.tar"
    if what == "folder":
        path.mkdir()
    if what == "fifo":
        os.mkfifo(path)
    reason = "No such file or directory" if what == "missing" else "it is not a file"
    with pytest.raises(UserError, match=f"shard {path} cannot be fetched: {reason}"):
        cache.open(str(path), SIZE, "0" * 64)


def test_commands(cache, shard, tmp_path):
    path, size, sha256 = shard
    assert read(cache, f"pipe:cat '{path}' | cat", size, sha256) == DATA
    (cache._folder.folder / f"{sha256}.tar").unlink()
    with pytest.raises(UserError, match=r"shard pipe:head \.\.\. \(sha256 .*\) is not the one .* has 10 bytes"):
        cache.open(f"pipe:head -c 10 '{path}'", size, sha256)
    with pytest.raises(UserError, match="has more bytes than"):
        cache.open(f"pipe:cat '{path}' '{path}'", size, sha256)
    with pytest.raises(UserError, match=r"stays away: the command failed \(exit status 3\)"):
        cache.open(f"pipe:head -c 10 '{path}'; exit 3", size, sha256)
    # One that fails at first.
    flag = tmp_path / "flag"
    assert read(cache, f"pipe:test -e {flag} || {{ touch {flag}; exit 1; }}; cat '{path}'", size, sha256) == DATA


@pytest.mark.parametrize("scheme", ["pipe", "gs"])
def test_a_command_that_hangs_is_ended_with_all_its_programs(cache, tmp_path, monkeypatch, scheme):
    pids = tmp_path / "pids"
    script = f"sh -c 'echo $$ >> {pids}; exec sleep 100' | cat"
    if scheme == "gs":
        command(tmp_path, "gsutil", f"import os\nos.system({script!r})\n")
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    url = f"pipe:{script}" if scheme == "pipe" else "gs://bucket/a.tar"
    with pytest.raises(UserError, match="stays away: the command printed nothing for 1 seconds"):
        cache.open(url, SIZE, "0" * 64)
    found = pids.read_text().split()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in found):
        assert time.monotonic() < deadline, "a program of the command is still running"
        time.sleep(0.01)
    assert found


def alive(pid: str) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_commands_run_only_when_they_are_allowed(tmp_path):
    with ShardCache(tmp_path / "cache", SIZE) as cache:
        url = f"pipe:touch {tmp_path / 'ran'}"
        cache.want([(url, SIZE, "0" * 64)])
        with pytest.raises(UserError, match=r"shard pipe:touch \.\.\. is a command .*data\.allow_pipe=true"):
            cache.open(url, SIZE, "0" * 64)
        time.sleep(0.2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("scheme, name", [("s3", "aws"), ("gs", "gsutil")])
def test_object_stores_through_their_tools(cache, shard, tmp_path, monkeypatch, scheme, name):
    path, size, sha256 = shard
    tools = tmp_path / "tools"
    tools.mkdir()
    script = f"import shutil, sys\nopen({str(tmp_path / 'told')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
    command(tools, name, script + f"shutil.copyfileobj(open({str(path)!r}, 'rb'), sys.stdout.buffer)\n")
    monkeypatch.setenv("PATH", str(tools))
    assert read(cache, f"{scheme}://bucket/a.tar", size, sha256) == DATA
    assert f"{scheme}://bucket/a.tar" in (tmp_path / "told").read_text()


def test_a_tool_or_a_package_that_is_missing_is_named(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match="cannot be fetched: the command gsutil, which fetches gs:// .* is not installed"
    ):
        cache.open("gs://bucket/a.tar", SIZE, "0" * 64)
    with pytest.raises(UserError, match="nothing:// addresses need the Python package fsspec"):
        cache.open("nothing://bucket/a.tar", SIZE, "0" * 64)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match="s3:// addresses need aws or the Python package s3fs"):
        cache.open("s3://bucket/a.tar", SIZE, "0" * 64)


def test_fsspec(cache, shard):
    fsspec = pytest.importorskip("fsspec")
    path, size, sha256 = shard
    with fsspec.open("memory://there/a.tar", "wb") as file:
        file.write(DATA)
    (cache._folder.folder / f"{sha256}.{size}.part").write_bytes(DATA[:1000])
    assert read(cache, "memory://there/a.tar", size, sha256) == DATA and cache.bytes_fetched == size - 1000
    with pytest.raises(UserError, match="memory://there/b.tar cannot be fetched: "):
        cache.open("memory://there/b.tar", size, "0" * 64)
    with pytest.raises(UserError, match="is not the one that was indexed.*has 100000 bytes, the index says 5"):
        cache.open("memory://there/a.tar", 5, "0" * 64)
    with pytest.raises(UserError, match="put together with :: are not opened"):
        cache.open("simplecache::memory://there/a.tar", size, "0" * 64)


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        "http://me:s3cr3t@HOST/a.tar",
        "http://s3cr3t@HOST/a.tar?X-Amz-Signature=s3cr3t#s3cr3t",
        "http://me:s3cr3t/more@HOST/a.tar",
        "http://me:12/s3cr3t@HOST/a.tar",
        "http://me:s3cr3t?more@HOST/a.tar",
        "http://me:s3cr3t@HOST:port/a.tar",
        "http://me:s3cr3t@[::1/a.tar",
        "http://me:s3cr3t@/a.tar",
        "http://HOST/a.tar?sig=s3cr3t\r\nX: s3cr3t",
        "http://HOST/redirect.tar?s3cr3t",
        "https://me:s3cr3t@HOST/a.tar?s3cr3t",
        "gs://me:s3cr3t@bucket/a.tar",
        "nothing://me:s3cr3t@bucket/a.tar?s3cr3t",
        "memory://me:s3cr3t@bucket/a.tar?s3cr3t",
        "pipe:curl -H 'Authorization: Bearer s3cr3t' http://HOST/a.tar; false",
        "pipe:TOKEN=s3cr3t false",
        "pipe:'s3cr3t",
    ],
)
def test_credentials_are_never_said(cache, server, url, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # the tools of object stores would ask the net
    server.add("a.tar", b"", status=[403])
    server.add("redirect.tar", b"", redirect="file:///s3cr3t")
    url = url.replace("HOST", server.host)
    with pytest.raises(UserError) as error:
        cache.open(url, SIZE, "0" * 64)
    assert SECRET not in "".join(traceback.format_exception(error.value))
    out, err = capfd.readouterr()
    if not url.startswith("pipe:"):  # what a user's own command prints is its own affair
        assert SECRET not in out + err
    assert not any(SECRET in name for name in os.listdir(cache._folder.folder))


def test_certificates(cache, server, tmp_path, monkeypatch):
    pem = tmp_path / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=a",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", pem, "-out", tmp_path / "cert.pem"], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url, size, sha256 = server.add("a.tar", DATA)
    url = url.replace("http://", "https://")
    with pytest.raises(
        UserError, match=r"https://.*a\.tar cannot be fetched: the server's certificate cannot be verified"
    ):
        cache.open(url, size, sha256)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert read(cache, url, size, sha256) == DATA


def test_names():
    for url, name in {
        "http://example.org/data/a.tar": "http://example.org/data/a.tar",
        "http://me:secret@example.org/a.tar?sig=b": "http://example.org/a.tar",
        "https://example.org:8080/data@v1/a b.tar": "https://...v1/a b.tar",  # it might be a password with a slash
        "https://example.org/data@v1/a.tar": "https://example.org/data@v1/a.tar",
        "s3://bucket/key.tar?versionId=3": "s3://bucket/key.tar",
        "http://[::1]:80/a.tar": "http://[::1]:80/a.tar",
        "/data/a?b@c.tar": "/data/a?b@c.tar",
        "pipe:/usr/bin/zstd -dc a.tar.zst": "pipe:/usr/bin/zstd ...",
        "http://h/\x1b[31m\n.tar": "http://h/?[31m?.tar",
    }.items():
        assert public_name(url) == name


@pytest.mark.parametrize("name", ["../../../escaped.tar", "%2e%2e/escaped.tar", "a\\..\\b.tar", "x" * 5000, "a.tar\0b"])
def test_a_name_leads_nowhere_else(cache, server, tmp_path, name):
    url, size, sha256 = server.add("a.tar", DATA)
    server.files = dict.fromkeys([f"/{name}", "/escaped.tar"], server.files["/a.tar"])
    outside = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    try:
        assert read(cache, url.replace("a.tar", name), size, sha256) == DATA
    except UserError as error:
        assert "cannot" in str(error)
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == outside
    assert set(os.listdir(tmp_path / "cache")) <= {"lock", f"{sha256}.tar"}


@pytest.mark.parametrize("sha256", ["../../escaped", "", "0" * 63, "A" * 64, "0" * 64 + "\n"])
def test_a_sha256_that_is_none_is_refused(cache, tmp_path, sha256):
    with pytest.raises(UserError, match="cannot be right"):
        cache.open("http://localhost/a.tar", SIZE, sha256)
    with pytest.raises(UserError, match="cannot be right"):
        cache.open("http://localhost/a.tar", 0, "0" * 64)


def test_a_link_planted_in_the_folder_is_not_followed(cache, shard, tmp_path):
    path, size, sha256 = shard
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "cache" / f"{sha256}.tar").symlink_to(victim)
    assert read(cache, str(path), size, sha256) == DATA and victim.read_bytes() == b"precious"
    (tmp_path / "cache" / f"{sha256}.tar").unlink()
    (tmp_path / "cache" / f"{sha256}.{size}.part").symlink_to(victim)
    with pytest.raises(UserError, match="cannot be used as data.cache_dir"):
        cache.open(str(path), size, sha256)
    assert victim.read_bytes() == b"precious"


def test_a_server_that_answers_rubbish(cache):
    class Rubbish(http.server.BaseHTTPRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(b"\x00\xff rubbish\r\n" * 100)

    with http.server.HTTPServer(("127.0.0.1", 0), Rubbish) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        with pytest.raises(UserError, match="stays away: the connection was cut or garbled"):
            cache.open(f"http://127.0.0.1:{server.server_address[1]}/a.tar", SIZE, "0" * 64)
        server.shutdown()
        thread.join()
