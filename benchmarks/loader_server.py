"""An HTTP server on loopback that serves the shards of a folder, at a limited rate where that is wanted, and knows when each was sent."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

PIECE = 1 << 14  # bytes that are sent at a time
Pace = Callable[[str, int, float], None]


def unlimited(name: str, sent: int, began: float) -> None:
    """As fast as it goes."""


def each_connection(rate: float) -> Pace:
    """Every connection has ``rate`` bytes/s, as object stores give them: several at once bring more than one."""

    def pace(name: str, sent: int, began: float) -> None:
        time.sleep(max(0.0, began + sent / rate - time.monotonic()))

    return pace


def all_together(rate: float) -> Pace:
    """All connections share ``rate`` bytes/s, as on a slow line: several at once bring no more than one."""
    lock, free = threading.Lock(), 0.0

    def pace(name: str, sent: int, began: float) -> None:
        nonlocal free
        with lock:
            now = time.monotonic()
            start = max(now, free)
            free = start + PIECE / rate
        time.sleep(start - now)

    return pace


class ShardServer(http.server.ThreadingHTTPServer):
    """Serves the tars of ``folder`` to GET requests, with ranges to the end of a file. Use as a context manager.

    Attributes:
        pace: called before each piece with the name of the shard, the bytes of the answer that are sent already, and when it began
            (``time.monotonic``); it returns when the piece may be sent.
        finished: name -> when the last byte of the shard was handed to the system, which is before the other side has it.
        requests, sent: answers that were begun, and bytes of shards in them.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.pace, self.lock = folder, unlimited, threading.Lock()
        self.forget()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def forget(self) -> None:
        """Count from here on."""
        self.finished: dict[str, float] = {}
        self.requests = self.sent = 0

    def url(self, name: str) -> str:
        """Of a shard."""
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def sent_by(self, moment: float) -> int:
        """How many shards were completely sent by then (``time.monotonic``, which all processes of a machine share)."""
        with self.lock:
            return sum(when <= moment for when in self.finished.values())

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """The other side went away: it is being closed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ShardServer

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        path = self.server.folder / name
        if "/" in name or not name.endswith(".tar") or not path.is_file():
            return self.send_error(404)
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        if begin >= size:
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - begin))
        self.end_headers()
        with self.server.lock:
            self.server.requests += 1
        self._send(path, begin)

    def _send(self, path: Path, begin: int) -> None:
        server, pace, began, sent = self.server, self.server.pace, time.monotonic(), 0
        with open(path, "rb") as file:
            file.seek(begin)
            while piece := file.read(PIECE):
                pace(path.name, sent, began)
                self.wfile.write(piece)
                sent += len(piece)
                with server.lock:
                    server.sent += len(piece)
        with server.lock:
            server.finished[path.name] = time.monotonic()

    def log_message(self, *_: object) -> None:
        """Nothing: standard error is for the benchmark's progress."""
