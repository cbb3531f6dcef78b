"""Indexing again: unchanged shards are not read, the old index stays until the new one is there; shards behind HTTP."""

import contextlib
import functools
import http.server
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from foreign_shards import encoded, findings, flipped, index, quarantined, samples, write_shards, write_tar

from ddpm_dist.data.shards import Index


def head(lines):
    return next(line for line in lines if " samples in " in line)


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_new_and_changed_shards_are_read(tmp_path, capsys):
    names = lambda n: {"txt": f"name{n // 10}".encode()}  # noqa: E731
    shards = write_shards(tmp_path / "f", 40, 10, label=names)
    kept = shards.pop()
    kept.rename(tmp_path / "later.tar")
    assert "(0 unchanged" in head(index(capsys, tmp_path / "f", "--out", tmp_path / "i")[1])
    (tmp_path / "later.tar").rename(kept)
    write_tar(shards[1], [("x.jpg", encoded(99)), ("x.txt", b"a new name")])  # comes first in the order of names
    _, lines, _ = index(capsys, tmp_path / "f", "--out", tmp_path / "i")
    assert "31 samples in 4 shards (2 unchanged" in head(lines)
    assert index(capsys, tmp_path / "f", "--out", tmp_path / "fresh")[0] == 0
    assert everything(tmp_path / "i") == everything(tmp_path / "fresh")
    assert Index.load(tmp_path / "i").classes == ["a new name", "name0", "name2", "name3"]
    assert f" {sum(os.path.getsize(p) for p in (shards[1], kept)):,} read at" in head(lines)


def test_other_options_and_a_damaged_index_are_read_again(tmp_path, capsys):
    write_shards(tmp_path / "f", 20, 10)
    again = functools.partial(index, capsys, tmp_path / "f", "--out", tmp_path / "i")
    assert again()[0] == 0
    assert "(2 unchanged" in head(again()[1])
    assert "(0 unchanged" in head(again("--num-classes", 7)[1])
    assert "(0 unchanged" in head(again()[1])
    for name in ("scanned.jsonl", "index.npy", "index.json"):
        path = tmp_path / "i" / name
        path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2))
        code, lines, err = again()
        assert code == 0, err
        assert "(0 unchanged" in head(lines) or name == "scanned.jsonl"
        assert len(Index.load(tmp_path / "i")) == 20
    (tmp_path / "i" / "scanned.jsonl").unlink()
    assert "(0 unchanged" in head(again()[1])


def test_a_bit_that_the_storage_lost_is_found_though_size_and_time_are_the_same(tmp_path, capsys):
    write_shards(tmp_path / "f", 20, 10)
    assert index(capsys, tmp_path / "f", "--out", tmp_path / "i")[0] == 0
    path = tmp_path / "f" / "train-0001.tar"
    index_of, data, state = Index.load(tmp_path / "i"), path.read_bytes(), path.stat()
    path.write_bytes(flipped(data, int(index_of.samples["offset"][13]) + 300))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    code, lines, _ = index(capsys, tmp_path / "f", "--out", tmp_path / "i", "--check")
    assert code == 1
    assert findings(lines) == {("train-0001", ""): "stale index", ("train-0001", "00013"): "changed image"}
    assert index(capsys, tmp_path / "f", "--out", tmp_path / "i", "--check", "--quarantine")[0] == 0
    assert len(Index.load(tmp_path / "i")) == 19
    path.write_bytes(data)  # now it is another file, and whole
    assert index(capsys, tmp_path / "f", "--out", tmp_path / "i", "--check")[0] == 0
    assert len(Index.load(tmp_path / "i")) == 20


def test_what_was_quarantined_is_still_known_when_its_shard_is_not_read_again(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", samples(0, 1, 2, s1_jpg=b"garbage"))
    write_tar(tmp_path / "b.tar", samples(0, 1))
    places = (tmp_path / "a.tar", tmp_path / "b.tar", "--out", tmp_path / "i")
    assert index(capsys, *places, "--quarantine")[0] == 0
    code, lines, _ = index(capsys, *places)
    assert code == 1 and findings(lines) == {("a", "s1"): "not an image"}
    code, lines, _ = index(capsys, *places, "--quarantine")
    assert code == 0 and "(2 unchanged" in head(lines)
    assert quarantined(tmp_path / "i") == {("a", "s1"): "not an image"}


def test_the_old_index_stays_until_the_new_one_is_complete(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path / "f", 20, 10)
    out = tmp_path / "i"
    assert index(capsys, tmp_path / "f", "--out", out)[0] == 0
    before = everything(out)
    (tmp_path / "f" / "train-0000.tar").write_bytes(b"")
    assert index(capsys, tmp_path / "f", "--out", out)[0] == 1
    assert everything(out) == before and not (tmp_path / "i.incomplete").exists()
    (tmp_path / "f" / "train-0000.tar").unlink()
    monkeypatch.setattr(
        "ddpm_dist.index_build.write_scanned", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    code, _, err = index(capsys, tmp_path / "f", "--out", out)
    assert code == 2 and "free some space" in err
    assert everything(out) == before and not (tmp_path / "i.incomplete").exists()
    monkeypatch.undo()
    (tmp_path / "i.incomplete").mkdir()
    (tmp_path / "i.incomplete" / "index.json").write_text("of a process that was killed")
    assert index(capsys, tmp_path / "f", "--out", out)[0] == 0
    assert len(Index.load(out)) == 10 and not (tmp_path / "i.incomplete").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER"], "say where the index goes"),
        (["FOLDER", "--quarantine", "--check"], "--quarantine writes an index"),
        (["none.tar", "--out", "OUT"], "there is no shard none.tar"),
        (["FOLDER/t-{0..9.tar", "--out", "OUT"], "there is no shard|braces"),
        (["EMPTY", "--out", "OUT"], "without any .tar"),
        (["FOLDER", "--out", "FOLDER"], "holds train-0000.tar, which is no part of an index"),
        (["FOLDER", "--out", "OUT", "--workers", "0"], "--workers must be at least 1"),
        (["FOLDER", "--out", "OUT", "--label", "xyz", "--unlabelled"], "--unlabelled goes with none"),
        (["FOLDER", "--out", "OUT", "--label", "json"], "--label-key"),
        (["FOLDER", "--out", "OUT", "--classes", "none.txt"], "cannot be read: No such file"),
        (["pipe:touch TOUCHED", "--out", "OUT"], "would run a command: give --allow-pipe"),
        (["http://me:secret@host/a.tar", "--out", "OUT"], "http URL with a user or password"),
        (["file:///etc/passwd", "--out", "OUT"], "without file://"),
        (["gopher://host/a.tar", "--out", "OUT"], "gopher:// is not known"),
        (["http://host/a b.tar", "--out", "OUT"], "%20"),
        (["a\0b", "--out", "OUT"], "not a file name"),
        (["CAPTIONS", "--out", "OUT"], "the first sample has no .cls and no .txt .*--unlabelled"),
    ],
)
def test_bad_usage(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "FOLDER", 4, 4)
    write_shards(tmp_path / "CAPTIONS", 4, 4, label=lambda n: {"caption": b"x"})
    (tmp_path / "EMPTY").mkdir()
    code, _, err = index(capsys, *arguments)
    assert code == 2 and "Traceback" not in err
    assert re.search(message, err), err
    assert "secret" not in err and not (tmp_path / "OUT").exists() and not (tmp_path / "TOUCHED").exists()


def test_allowed_pipes_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ddpm_dist.data.scan.time.sleep", lambda _: None)
    shards = write_shards(tmp_path / "f", 10, 10)
    code, _, err = index(capsys, f"pipe:cat {shards[0]}", "--out", tmp_path / "i", "--allow-pipe")
    assert code == 0, err
    found = Index.load(tmp_path / "i")
    assert len(found) == 10 and found.location(0) == f"pipe:cat {shards[0]}"
    code, _, err = index(capsys, f"pipe:cat {shards[0]}; exit 3", "--out", tmp_path / "j", "--allow-pipe")
    assert code == 2 and "cannot be read" in err


class Handler(http.server.SimpleHTTPRequestHandler):
    """A server with entity tags and ranges, that can be told to break off, to answer 503 or to be silent about sizes."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        path = Path(self.directory) / self.path.lstrip("/")
        self.server.asked.append((self.command, path.name))
        if not path.is_file():
            return self.send_error(404)
        if with_body and self.server.broken:
            return self.send_error(503) if self.server.broken.pop() == 503 else self.cut(path.read_bytes())
        data = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hash(path.read_bytes())}"')
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def cut(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "www"))
    server.asked, server.broken, server.folder = [], [], tmp_path / "www"
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_shards_behind_http(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ddpm_dist.data.scan.time.sleep", lambda _: None)
    write_shards(server.folder / "data", 30, 10)
    pattern = f"{server.url}/data/train-{{0000..0002}}.tar"
    server.broken += [503, "cut"]  # the first shard needs three attempts
    code, lines, err = index(capsys, pattern, "--out", tmp_path / "i", "--label", "cls", "--sheet", tmp_path / "s.png")
    assert code == 0 and not server.broken, (lines, err)
    assert (tmp_path / "s.png").exists()
    found = Index.load(tmp_path / "i")
    assert (found.root, [s.name for s in found.shards]) == (
        f"{server.url}/data",
        [f"train-000{n}.tar" for n in range(3)],
    )
    assert index(capsys, server.folder / "data", "--out", tmp_path / "local")[0] == 0
    local = Index.load(tmp_path / "local")
    assert np.array_equal(found.samples, local.samples) and found.fingerprint == local.fingerprint
    write_tar(server.folder / "data" / "train-0001.tar", samples(0, 1))
    server.asked.clear()
    _, lines, _ = index(capsys, pattern, "--out", tmp_path / "i", "--label", "cls")
    assert "(2 unchanged" in head(lines)
    assert [name for command, name in server.asked if command == "GET"] == ["train-0001.tar"]
    assert index(capsys, "--check", tmp_path / "i")[0] == 0


def test_a_server_that_stays_away_is_no_finding_that_could_be_quarantined(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ddpm_dist.data.scan.time.sleep", lambda _: None)
    write_shards(server.folder, 20, 10)
    server.broken += ["cut"] * 4
    pattern = f"{server.url}/train-{{0000..0002}}.tar"
    code, lines, err = index(capsys, pattern, "--out", tmp_path / "i", "--quarantine", "--label", "cls")
    assert code == 2 and "2 shards cannot be read" in err and not (tmp_path / "i").exists()
    assert findings(lines) == {("train-0000", ""): "unreadable shard", ("train-0002", ""): "unreadable shard"}
    assert any("404" in line for line in lines) and any("broke off" in line for line in lines)
    asked = [name for command, name in server.asked if command == "GET"]
    assert (asked.count("train-0000.tar"), asked.count("train-0002.tar")) == (4, 1)  # 404 will not become anything else


def test_a_shard_that_changes_while_it_is_read_is_not_indexed(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path / "f", 10, 10)
    path = tmp_path / "f" / "train-0000.tar"
    from ddpm_dist.data import scan

    def state(location):
        with contextlib.suppress(OSError):
            os.utime(path)
        return real(location)

    real = scan.state
    monkeypatch.setattr(scan, "state", state)
    code, lines, err = index(capsys, tmp_path / "f", "--out", tmp_path / "i")
    assert code == 2 and "changed while it was read" in "\n".join(lines)
