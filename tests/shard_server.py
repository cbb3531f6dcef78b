"""An HTTP server on loopback that serves shards well or badly."""

from __future__ import annotations

import base64
import hashlib
import http.server
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PIECE = 16384


@dataclass
class Served:
    """One file and how it is served. Lists hold a value for each request to come; the last one holds for all further requests.

    status: 200 means that the file is sent. cut: bytes after which the connection is cut (None: never). flip: a byte to send wrong
    (None: none). ranges: obey, ignore, other (another range than the one asked for, and named as such), or lie (the right range is named, the
    bytes are others). length: header | none | chunked. A status of 0 is an answer that is no HTTP.
    reason: what is said beside a status that is not 200 (None: the usual words). login: "user:password" without which the answer is 401.
    """

    data: bytes
    speed: float | None = None  # bytes/s
    status: list[int] = field(default_factory=lambda: [200])
    cut: list[int | None] = field(default_factory=lambda: [None])
    flip: list[int | None] = field(default_factory=lambda: [None])
    ranges: str = "obey"
    length: str = "header"
    redirect: str | None = None
    hold: threading.Event | None = None  # the body is not sent before this
    reason: str | None = None
    login: str | None = None
    etag: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class ShardServer(http.server.ThreadingHTTPServer):
    """Serves ``files``: path -> Served. ``requests``: (path with query, headers) of every request; ``sent``: body bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, data: bytes, **how) -> tuple[str, int, str]:
        """Serve ``data`` as ``name``; returns what ShardCache.open takes."""
        self.files[f"/{name}"] = served = Served(data, **how)
        return f"http://{self.host}/{name}", len(data), served.sha256

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_) -> None:
        pass  # the other side went away


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ShardServer

    def do_GET(self) -> None:
        served = self.server.files.get(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers)))
            turn = {name: self._turn(getattr(served, name)) for name in ("status", "cut", "flip") if served}
        if served is None:
            return self.send_error(404)
        if served.login is not None and self.headers.get("Authorization") != basic(served.login):
            return self.send_error(401)
        if served.redirect is not None:
            self.send_response(302)
            self.send_header("Location", served.redirect)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if turn["status"] == 0:
            self.wfile.write(b"nothing that is HTTP\r\n\r\n")
            return None
        if turn["status"] != 200:
            return self.send_error(turn["status"], served.reason)
        self._send(served, turn["cut"], turn["flip"])

    do_HEAD = do_GET

    @staticmethod
    def _turn(values: list):
        return values.pop(0) if len(values) > 1 else values[0]

    def _send(self, served: Served, cut: int | None, flip: int | None) -> None:
        begin, size, end = 0, len(served.data), None
        asked = self.headers.get("Range")
        if asked and served.ranges != "ignore":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = 0 if served.ranges == "other" else int(first), min(int(last) + 1, size) if last else None
            if begin >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{(end or size) - 1}/{size}")
        else:
            self.send_response(200)
        body = bytearray(served.data)
        if flip is not None:
            body[flip] ^= 1
        body = body[: size - begin] if served.ranges == "lie" else body[begin:end]
        if served.length == "header":
            self.send_header("Content-Length", str(len(body)))
        elif served.length == "chunked":
            self.protocol_version = "HTTP/1.1"
            self.send_header("Transfer-Encoding", "chunked")
        if served.etag is not None:
            self.send_header("ETag", served.etag)
        self.end_headers()
        if self.command == "HEAD":
            return
        if served.hold is not None:
            served.hold.wait(30)
        self._body(bytes(body if cut is None else body[:cut]), served, whole=cut is None)

    def _body(self, body: bytes, served: Served, whole: bool) -> None:
        for place in range(0, len(body), PIECE):
            piece = body[place : place + PIECE]
            with self.server.lock:
                self.server.sent += len(piece)
            if served.length == "chunked":
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            else:
                self.wfile.write(piece)
            if served.speed:
                time.sleep(len(piece) / served.speed)
        if served.length == "chunked" and whole:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_) -> None:
        pass


def basic(login: str) -> str:
    """The header for "user:password"."""
    return f"Basic {base64.b64encode(login.encode()).decode('ascii')}"
