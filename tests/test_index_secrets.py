"""ddpm_dist.index on shards whose addresses hold secrets, that ask for a password, or whose server answers rubbish."""

import json
import subprocess
import sys

import pytest
from foreign_shards import encoded, findings, index, samples, write_tar
from shard_server import ShardServer, basic

from ddpm_dist import index_sheet
from ddpm_dist.data.remote import open_source
from ddpm_dist.data.remote_source import Lasting
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.tracking.captions import captioned

SECRET = "s3cr3t"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("ddpm_dist.data.scan.time.sleep", lambda _: None)
    monkeypatch.delenv("NETRC", raising=False)
    server = ShardServer()
    yield server
    server.close()


@pytest.fixture
def tars(tmp_path):
    """Bytes of a good shard, and of one with a damaged image."""
    good = write_tar(tmp_path / "good.tar", samples(0, 1, 2, 3)).read_bytes()
    return good, write_tar(tmp_path / "bad.tar", samples(4, 5, 6, s5_jpg=b"garbage")).read_bytes()


def shown(folder, code_lines_err):
    """All that a run shows: what it printed, and the files that are meant to be shown."""
    _, lines, err = code_lines_err
    files = [p.read_text() for p in folder.glob("*.json")] if folder.is_dir() else []
    return "\n".join([*lines, err, *files])


def test_findings_quarantine_and_sheet_name_shards_without_their_query(server, tars, tmp_path, capsys):
    for name, data in zip(("a.tar", "b.tar"), tars, strict=True):
        server.add(name, data, etag=f'"{name}"')
    server.add("gone.tar", b"", status=[503], reason=f"no {SECRET}")
    urls = [f"http://{server.host}/{name}?sig={SECRET}" for name in ("a.tar", "b.tar")]
    out = tmp_path / "i"
    done = index(capsys, *urls, "--out", out, "--sheet", tmp_path / "s.png")
    assert done[0] == 1 and findings(done[1]) == {("b", "s5"): "not an image"}
    assert SECRET not in shown(out, done)
    done = index(capsys, *urls, "--out", out, "--sheet", tmp_path / "s.png", "--quarantine")
    assert done[0] == 0 and SECRET not in shown(out, done)
    (row,) = json.loads((out / "quarantine.json").read_text())
    assert (row["shard"], row["key"], row["number"]) == (f"http://{server.host}/b.tar", "s5", 1)
    server.requests.clear()
    done = index(capsys, *urls, "--out", out, "--label", "cls", "--quarantine")  # known from the quarantine
    assert done[0] == 0 and findings(done[1]) == {("b", "s5"): "not an image"} and SECRET not in shown(out, done)
    assert json.loads((out / "quarantine.json").read_text()) == [row]
    assert any("(2 unchanged" in line for line in done[1])
    assert [Index.load(out).location(n) for n in range(2)] == urls
    server.files["/a.tar"].data = tars[1]
    done = index(capsys, "--check", out)
    assert done[0] == 1 and SECRET not in shown(out, done)
    done = index(capsys, f"http://{server.host}/gone.tar?sig={SECRET}", "--out", tmp_path / "j", "--label", "cls")
    assert done[0] == 2 and SECRET not in shown(out, done)
    assert any("the server answers 503 (Service Unavailable)" in line for line in done[1])


def test_the_heading_of_the_sheet_is_without_secrets(server, tars, tmp_path, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(index_sheet, "captioned", lambda *a, **k: said.append(k["heading"]) or captioned(*a, **k))
    url, *_ = server.add("a.tar", tars[0])
    assert index(capsys, f"{url}?sig={SECRET}", "--sheet", tmp_path / "s.png")[0] == 0
    assert said == [f"4 samples of {url}"]


def test_shards_that_only_their_query_tells_apart_have_a_number(server, tars, tmp_path, capsys):
    server.add("get.tar", tars[1])
    urls = [f"http://{server.host}/get.tar?{SECRET}={n}" for n in range(2)]
    code, lines, _ = index(capsys, *urls, "--out", tmp_path / "i", "--quarantine")
    assert code == 0 and SECRET not in "\n".join(lines)
    assert [line.split(":s5")[0] for line in lines if "not an image" in line and ":s5" in line] == [
        f"http://{server.host}/get.tar (shard {n})" for n in range(2)
    ]
    rows = json.loads((tmp_path / "i" / "quarantine.json").read_text())
    assert [row["number"] for row in rows] == [0, 1]
    assert [Index.load(tmp_path / "i").location(n) for n in range(2)] == urls


def test_a_renewed_signature_is_not_another_data_set(server, tars, tmp_path, capsys):
    for name in ("a.tar", "b.tar"):
        server.add(name, tars["ab".index(name[0])], etag=f'"{name}"')
    out, plain = tmp_path / "i", [f"http://{server.host}/{name}" for name in ("a.tar", "b.tar")]
    made = {}
    for sign in ("", "?sig=1", "?sig=2/3", "#4"):
        server.requests.clear()
        code, lines, _ = index(
            capsys, *(f"{url}{sign}" for url in plain), "--out", out, "--label", "cls", "--quarantine"
        )
        assert code == 0 and findings(lines) == {("b", "s5"): "not an image"}
        assert any(f"({2 if made else 0} unchanged" in line for line in lines)
        found = Index.load(out)
        assert [found.location(n) for n in range(2)] == [f"{url}{sign}" for url in plain]
        made[found.fingerprint] = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "queries.txt"}
        assert (out / "queries.txt").read_text() == f"{sign}\n" if sign else not (out / "queries.txt").exists()
    assert len(made) == 1 and index(capsys, "--check", out)[0] == 0
    signed = [f"{url}?{n}" for n, url in enumerate(plain)]  # one of each
    assert index(capsys, *signed, "--out", out, "--label", "cls", "--quarantine")[0] == 0
    assert [Index.load(out).location(n) for n in range(2)] == signed and Index.load(out).fingerprint in made
    for text in ("?a\n?b\n?c\n", "?a b\n", "@elsewhere/\n", "?a\x1b\n", ""):
        (out / "queries.txt").write_text(text)
        with pytest.raises(UserError, match="queries.txt"):
            Index.load(out)


@pytest.mark.parametrize(
    "place",
    [
        "http://HOST/a b.tar?sig=s3cr3t",
        "http://HOST/a.tar\n?sig=s3cr3t",
        "HTTP://me:s3cr3t@HOST/a.tar",
        "HttpS://me:s3cr3t@HOST/a.tar?s3cr3t",
        "http://me:s3cr3t@HOST/a.tar",
        "http://s3cr3t@HOST/a.tar",
        "http://me:s3cr3t/more@HOST/a.tar",
        "http://me:s3cr3t?more@HOST/a.tar",
        " http://me:s3cr3t@HOST/a.tar?s3cr3t",
        "http:/me:s3cr3t@HOST/a.tar?s3cr3t",
        "http:me:s3cr3t@HOST/a.tar",
        "//me:s3cr3t@HOST/a.tar",
        "gopher://HOST/a.tar?s3cr3t",
        "file://HOST/a.tar?s3cr3t",
        "gs://me:s3cr3t@bucket/a.tar",
        "http://HOST/{a.tar?sig=s3cr3t",
        "http://HOST/a\\.tar?sig=s3cr3t",
        "http://HOST/missing.tar?sig=s3cr3t",
        "http://HOST/reason.tar?sig=s3cr3t",
        "http://HOST/redirect.tar?sig=s3cr3t",
        "http://HOST/loop.tar?sig=s3cr3t",
        "http://HOST:1x/a.tar?sig=s3cr3t",
        "http://HOST/captions.tar?sig=s3cr3t",
        "pipe:curl -H 'Authorization: s3cr3t' http://HOST/a.tar",
        "PIPE:TOKEN=s3cr3t false",
        " pipe:TOKEN=s3cr3t false",
    ],
)
def test_no_refusal_shows_a_secret(server, tmp_path, capsys, place):
    server.add("reason.tar", b"", status=[404], reason=f"no {SECRET}")
    server.add("redirect.tar", b"", redirect=f"file:///{SECRET}")
    server.add("loop.tar", b"", redirect=f"/loop.tar?sig={SECRET}")
    server.add("captions.tar", write_tar(tmp_path / "c.tar", [("a.jpg", encoded(1)), ("a.cap", b"x")]).read_bytes())
    done = index(capsys, place.replace("HOST", server.host), "--out", tmp_path / "i")
    assert done[0] == 2 and not (tmp_path / "i").exists()
    assert SECRET not in shown(tmp_path, done) and "Traceback" not in done[2], done


def test_commands_that_fail_are_not_quoted(server, tars, tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(tars[1])
    commands = [f"pipe:cat {tmp_path}/a.tar; : {SECRET} {n}" for n in range(2)]
    done = index(capsys, *commands, "--out", tmp_path / "i", "--allow-pipe", "--quarantine")
    assert done[0] == 0 and SECRET not in shown(tmp_path / "i", done)
    assert sum("pipe:cat ... (shard 1):s5: " in line for line in done[1]) == 1
    done = index(capsys, f"pipe:cat {tmp_path}/a.tar; : {SECRET}; exit 3", "--out", tmp_path / "j", "--allow-pipe")
    assert done[0] == 2 and SECRET not in shown(tmp_path / "j", done)
    assert any("the command failed (exit status 3)" in line for line in done[1])


def test_a_scheme_in_capitals_is_a_scheme(server, tars, tmp_path, capsys):
    url, *_ = server.add("a.tar", tars[0])
    assert index(capsys, url.replace("http", "HTTP"), "--out", tmp_path / "i")[0] == 0
    assert Index.load(tmp_path / "i").location(0) == url


# -- passwords ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def netrc(tmp_path, monkeypatch):
    """Write one; by default the one that $NETRC names."""

    def write(text, home=False):
        path = tmp_path / "home" / ".netrc" if home else tmp_path / "the netrc"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("NETRC", raising=False) if home else monkeypatch.setenv("NETRC", str(path))
        return path

    return write


@pytest.mark.parametrize("home", [True, False])
def test_a_password_from_netrc(server, tars, tmp_path, capsys, netrc, home):
    url, size, _ = server.add("a.tar", tars[0], login=f"me:{SECRET}")
    netrc("machine elsewhere login other password wrong\n", home)
    done = index(capsys, url, "--out", tmp_path / "i", "--label", "cls")
    assert done[0] == 2 and any("the server answers 401 (Unauthorized)" in line for line in done[1])
    with pytest.raises(Lasting, match="401"):
        open_source(url, 0, 10)
    netrc(f"machine 127.0.0.1 login me password {SECRET}\n", home)
    done = index(capsys, url, "--out", tmp_path / "i", "--sheet", tmp_path / "s.png")
    assert done[0] == 0 and (tmp_path / "s.png").exists() and SECRET not in shown(tmp_path / "i", done)
    assert index(capsys, "--check", tmp_path / "i")[0] == 0
    with open_source(url, 512, 10) as source:
        assert source.begin == 512 and source.total == size and source.read(10) == tars[0][512:522]


def test_it_is_sent_to_the_very_host_only(server, tars, tmp_path, capsys, netrc):
    """Neither what is redirected to nor a host without an entry gets it; the same server does."""
    netrc(f"machine 127.0.0.1 login me password {SECRET}\ndefault login me password {SECRET}\n")
    other = ShardServer()
    try:
        other.add("a.tar", tars[0])
        server.add("a.tar", tars[0], login=f"me:{SECRET}")
        away, *_ = server.add("away.tar", b"", redirect=f"http://{other.host}/a.tar")
        within, *_ = server.add("within.tar", b"", redirect="/a.tar")
        assert index(capsys, away, within, "--out", tmp_path / "i")[0] == 0
        for url in (away, within):
            open_source(url, 0, 10).close()
        assert {path: headers.get("Authorization") for path, headers in server.requests} == dict.fromkeys(
            ("/away.tar", "/within.tar", "/a.tar"), basic(f"me:{SECRET}")
        )
        assert other.requests and all("Authorization" not in headers for _, headers in other.requests)
        other.requests.clear()
        open_source(f"http://localhost:{other.server_address[1]}/a.tar", 0, 10).close()  # not the default entry either
        assert other.requests and all("Authorization" not in headers for _, headers in other.requests)
    finally:
        other.close()


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (f"machine 127.0.0.1 login me passw {SECRET}\n", 0o600, r"netrc cannot be understood \(near line 1\)"),
        (f"\n{SECRET}\n", 0o600, r"netrc cannot be understood \(near line"),
        (f"machine 127.0.0.1 login me password {SECRET}\n", 0o644, "readable by nobody else"),
        (None, 0, "the file that \\$NETRC names does not exist"),
    ],
)
def test_a_netrc_that_cannot_be_used_is_an_error_without_its_contents(
    server, tars, tmp_path, capsys, netrc, monkeypatch, text, mode, message
):
    url, *_ = server.add("a.tar", tars[0])
    if text is None:
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    else:
        netrc(text, home=True).chmod(mode)
    code, lines, err = index(capsys, url, "--out", tmp_path / "i")
    assert code == 2 and SECRET not in err + "\n".join(lines)
    with pytest.raises(Lasting, match=message) as error:
        open_source(url, 0, 10)
    assert str(error.value) in err and SECRET not in str(error.value)
    assert server.requests == []


# -- rubbish -----------------------------------------------------------------------------------------------------------


def test_one_garbled_answer_is_tried_again_and_many_are_an_unreadable_shard(server, tars, tmp_path, capsys):
    url, *_ = server.add("a.tar", tars[0], status=[0, 200, 200])
    assert index(capsys, url, "--out", tmp_path / "i", "--label", "cls")[0] == 0
    assert len(server.requests) == 2
    chunks, *_ = server.add("chunks.tar", tars[0], length="chunked", cut=[1000, None])  # breaks off in the middle
    assert index(capsys, chunks, "--out", tmp_path / "i", "--label", "cls")[0] == 0
    bad, *_ = server.add("bad.tar", tars[0], status=[0])
    code, lines, err = index(capsys, url, bad, "--out", tmp_path / "j", "--label", "cls")
    assert code == 2 and "1 shards cannot be read" in err and not (tmp_path / "j").exists()
    assert findings(lines) == {("bad", ""): "unreadable shard"}
    assert any("the connection was cut or garbled (BadStatusLine)" in line for line in lines)


# -- sheets that cannot be drawn ---------------------------------------------------------------------------------------


def test_a_sheet_that_cannot_be_drawn_does_not_cost_the_index(server, tars, tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(tars[0])
    url, *_ = server.add("whole.tar", tars[0], ranges="ignore")
    sheet = tmp_path / "s.png"
    for place, why in (
        (url, "the server sends no parts of files"),
        (f"pipe:cat {tmp_path}/a.tar", "only be read from"),
    ):
        out = tmp_path / f"i{place[:4]}"
        code, lines, err = index(capsys, place, "--out", out, "--sheet", sheet, "--allow-pipe")
        assert code == 0 and len(Index.load(out)) == 4 and not sheet.exists(), err
        assert any(line.startswith("note: no contact sheet") and why in line for line in lines)
        code, _, err = index(capsys, place, "--check", "--sheet", sheet, "--allow-pipe")  # nothing else was asked for
        assert code == 2 and why in err
    server.requests.clear()
    code, lines, _ = index(capsys, tmp_path / "a.tar", url, "--out", tmp_path / "both", "--sheet", sheet)
    assert code == 0 and sheet.exists()
    assert any("4 samples could not be shown: the server sends no parts" in line for line in lines)
    assert sum("Range" in headers for _, headers in server.requests) == 1  # asked once, not for every sample
    nowhere = tmp_path / "a.tar" / "s.png"
    code, lines, _ = index(capsys, tmp_path / "a.tar", "--out", tmp_path / "i", "--sheet", nowhere)
    assert code == 0 and any("note: no contact sheet" in line and "cannot be written" in line for line in lines)


def test_head_ends_it_quietly(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{n:05}.txt", b"x") for n in range(20000)])
    done = subprocess.run(
        f"{sys.executable} -m ddpm_dist.index {tmp_path}/a.tar --check --workers 1 | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.splitlines()[1:] == ["141"], done
