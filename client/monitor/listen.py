"""Readings by HTTP POST, on this machine's loopback only.

    POST /   lines as the other sources take them; answered once their outcome is on the disk:
             200 {"read": 3, "bad-row": 1}

A sender that gets no 200 sends again: what was read before is then a duplicate. A post that ends before its length is
left out as a whole, for its last number may be cut short, and counted. Whoever may open a connection to loopback may
post, so the port is for machines on which only the hospital's own people work. Pages in a browser are kept out: a
request with an Origin, or for another host than loopback, is refused.
"""

import json
import queue
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Final

from client.monitor.stream import POLL_S, Lines, split_lines
from shared.errors import StorageError
from shared.telemetry import LOOPBACK

MOST_BYTES: Final = 1 << 20
_WAITING: Final = 64
_ANSWER_S: Final = 60.0
_IDLE_S: Final = 10.0
_DRAINED_CHUNKS: Final = 1024
"""Reads of a refused body, so that nobody keeps a thread busy for ever."""
_HOSTS: Final = (LOOPBACK, "localhost", "[::1]")


class _Poster(BaseHTTPRequestHandler):
    timeout = _IDLE_S
    server: "_Listener"

    def do_POST(self) -> None:
        """Hand the lines on and answer when they are dealt with."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        length = self.headers.get("Content-Length", "")
        if host not in _HOSTS or "Origin" in self.headers:
            self._refuse(403, "loopback only")
        elif not length.isdecimal():
            self._refuse(411, "no length")
        elif int(length) > MOST_BYTES:
            self._refuse(413, f"at most {MOST_BYTES} bytes")
        else:
            content = self._read(int(length))
            if len(content) == int(length):
                self._hand_on(content)
            else:
                self._leave_out()

    def _read(self, length: int) -> bytes:
        """Return what comes of a body; less of it if the sender hangs up or falls silent."""
        try:
            return self.rfile.read(length)
        except OSError:
            return b""

    def _leave_out(self) -> None:
        self.close_connection = True
        with suppress(queue.Full):
            self.server.posts.put_nowait(Lines([], cut_off=1))
        self._answer(400, {"error": "cut off; send again"})

    def _hand_on(self, content: bytes) -> None:
        answer: queue.Queue[dict[str, int]] = queue.Queue()
        try:
            self.server.posts.put_nowait(Lines(split_lines(content), done=answer.put))
            self._answer(200, answer.get(timeout=_ANSWER_S))
        except (queue.Full, queue.Empty):
            self._answer(503, {"error": "busy; send again"})

    def _refuse(self, status: int, why: str) -> None:
        """Answer, and let the sender finish: closed while it writes, it would see a broken pipe and not the answer."""
        self._answer(status, {"error": why})
        self.connection.shutdown(socket.SHUT_WR)
        for _ in range(_DRAINED_CHUNKS):
            if not self.rfile.read1(MOST_BYTES):
                break

    def _answer(self, status: int, facts: dict[str, Any]) -> None:
        content = json.dumps(facts).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing: requests hold patients."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.posts: queue.Queue[Lines] = queue.Queue(_WAITING)
        super().__init__((LOOPBACK, port), _Poster)

    def handle_error(self, *_arguments: Any) -> None:
        """Say nothing: a sender that hangs up is no event, and a traceback could hold a patient."""


@contextmanager
def listening(port: int) -> Iterator[tuple[int, Iterator[Lines]]]:
    """Listen until the block ends; yield the port, chosen freely if 0, and the posts, for ever.

    Raises:
        StorageError: If the port is taken.
    """
    try:
        server = _Listener(port)
    except OSError as error:
        raise StorageError(f"Port {port} on {LOOPBACK} is taken; choose another.") from error
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server.server_port, _posts(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _posts(server: _Listener) -> Iterator[Lines]:
    while True:
        try:
            yield server.posts.get(timeout=POLL_S)
        except queue.Empty:
            yield Lines([])
