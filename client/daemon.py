"""The hospital's daemon: one process that receives messages, lets ``client.app`` answer, and sends the reply.

It runs until SIGTERM or SIGINT and survives whatever the network and the server do. Messages are answered on a
worker thread, so that signals are heard, and heartbeats sent, while a round trains.
"""

import fcntl
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import ConfigRecord, Context, Message, RecordDict

from client.channel import Backoff, Endpoint
from client.folder import HEALTH_PORT_FILE
from client.keys import read_authority, read_key, server_fingerprint
from client.link import Link, LinkRefused, Stopped, UnacceptableMessage
from client.status import Status
from shared.dp.memory import share_arenas
from shared.errors import ErrorCode, FederationError, StorageError
from shared.files import storage_errors, write_atomic
from shared.messages import CONFIG, TrainRequest, error_code, error_reply
from shared.telemetry import serve

App = Callable[[Message, Context], Message]
NODE_FILE, LOCK_FILE = "node-id", "daemon.lock"
_KINDS = ("query", "train", "evaluate")
_LEAST_POLL_S, _MOST_POLL_S = 0.05, 2.0
_GRACE_S = 0.5
_ENDING = (signal.SIGTERM, signal.SIGINT)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a site reaches its server, and where it tells how it fares.

    Attributes:
        server: ``host:port`` of the server's Fleet API.
        keep_alive_s: Seconds of silence after which the connection is probed.
        proxy: ``http://host:port`` of an HTTP proxy; empty leaves it to the environment.
        health_port: Loopback port of ``/healthz`` and ``/metrics``; 0 chooses one, -1 serves none.
    """

    server: str
    keep_alive_s: float = 60.0
    proxy: str = ""
    health_port: int = 0


def run_daemon(
    folder: Path, connection: Connection, *, site: str = "", app: App | None = None, backoff: Backoff | None = None
) -> None:
    """Serve the site in ``folder`` until SIGTERM or SIGINT. Call it on the main thread, once a process.

    It returns within seconds of the signal when no message is being answered. When one is, the process ends at once
    (status 0): the ledger makes any death safe, and the interrupted round is repeated from the same key when the
    server asks again.

    Args:
        folder: The site's folder with ``site.key`` and ``ca.crt``.
        connection: How to reach the server.
        site: The site's name, for logs and health.
        app: Answers the messages; the hospital's own :data:`client.app.app` unless a test brings another.
        backoff: Pauses between attempts to reach the server.

    Raises:
        StorageError: If the key or certificate cannot be read, another daemon serves the folder, or a port is taken.
    """
    share_arenas()
    with ExitStack() as stack:
        stack.enter_context(_only_daemon(folder))
        endpoint = Endpoint(
            connection.server, read_authority(folder), read_key(folder), connection.keep_alive_s, connection.proxy
        )
        config, status, stop = node_config(folder), Status(site), Event()
        daemon = _Daemon(folder, endpoint, config, app or _hospital_app(), status, backoff or Backoff(), stop)
        signals = stack.enter_context(_signals())
        if connection.health_port >= 0:
            port = stack.enter_context(serve(status.registry, status.health, connection.health_port))
            write_atomic(folder / HEALTH_PORT_FILE, str(port).encode())
            _LOG.info("health", extra={"port": port})
        _LOG.info("started", extra={"pid": os.getpid(), "server": connection.server, "site": site})
        worker = Thread(target=daemon.run, name="worker", daemon=True)
        worker.start()
        while signals.recv(1)[0] not in _ENDING:
            continue
        stop.set()
        _LOG.info("stopping", extra={"pid": os.getpid()})
        worker.join(_GRACE_S)
        if worker.is_alive():
            daemon.abandon()
            logging.shutdown()
            # Returning would tear the interpreter down around a thread that is deep inside torch. Nothing is lost
            # by not waiting for it: what is durable is durable already.
            os._exit(0)


def node_config(folder: Path) -> dict[str, str | int | float | bool]:
    """Return what the ``ClientApp`` is told about its node; the server's configuration is never part of it.

    Raises:
        StorageError: If the server's certificate cannot be read.
    """
    return {"site-folder": str(folder), "server-fingerprint": server_fingerprint(folder)}


def answer(app: App, message: Message, context: Context) -> Message:
    """Let ``app`` answer; whatever goes wrong becomes a bare error code, and nothing else ever leaves."""
    try:
        reply = app(message, context)
        if reply.metadata.reply_to_message_id != message.metadata.message_id:
            return error_reply(ErrorCode.INTERNAL, message)
        return error_reply(error_code(reply), message) if reply.has_error() else reply
    except (Exception, SystemExit) as error:
        _LOG.error("failed", extra={"code": ErrorCode.INTERNAL.value, "kind": type(error).__name__})
        return error_reply(ErrorCode.INTERNAL, message)


def poll_pause_s(idle_s: float, call_s: float) -> float:
    """Return how long to wait before asking for messages again.

    At most a twentieth of the time since the last message, so that a round is hardly longer for it, and at least
    ten times what the server took to answer, so that a hundred sites do not keep it from its work.
    """
    return min(_MOST_POLL_S, max(_LEAST_POLL_S, idle_s / 20, 10 * call_s))


def reply_grid_s(message: Message) -> float:
    """Return the grid on which the reply to ``message`` may leave, in seconds; 0 for none.

    It is the plan's, for whatever is asked under a plan: the message alone decides, and nothing of this site.
    """
    if message.metadata.message_type != "train":
        return 0.0
    try:
        return TrainRequest.from_content(message.content).plan.reply_grid_s
    except FederationError:
        return 0.0


def grid_pause_s(taken_s: float, grid_s: float) -> float:
    """Return how long to wait until the first whole multiple of ``grid_s`` (at least one) since the question came."""
    return max(1, math.ceil(taken_s / grid_s)) * grid_s - taken_s if grid_s else 0.0


class _Daemon:
    """The worker's loop and the connection it holds."""

    def __init__(
        self,
        folder: Path,
        endpoint: Endpoint,
        config: dict[str, str | int | float | bool],
        app: App,
        status: Status,
        backoff: Backoff,
        stop: Event,
    ) -> None:
        self._folder, self._endpoint, self._config, self._app = folder, endpoint, config, app
        self._status, self._backoff, self._stop = status, backoff, stop
        self._link: Link | None = None

    def run(self) -> None:
        """Connect and serve, for ever and whatever happens, until told to stop."""
        attempt = 0
        while not self._stop.is_set():
            try:
                with Link(self._endpoint, self._stop, self._status, self._backoff, self._previous_node()) as link:
                    self._link, attempt = link, 0
                    write_atomic(self._folder / NODE_FILE, str(link.node_id).encode())
                    self._serve(link)
            except Stopped:
                break
            except LinkRefused as refusal:
                attempt += 1
                delay_s = self._backoff.delay_s(attempt)
                self._status.fault(refusal.fault, attempt, delay_s)
                self._stop.wait(delay_s)
            except Exception as error:
                attempt += 1
                delay_s = self._backoff.delay_s(attempt)
                extra = {"kind": type(error).__name__, "attempt": attempt, "delay_s": round(delay_s, 1)}
                _LOG.error("connection lost", extra=extra)
                self._stop.wait(delay_s)

    def abandon(self) -> None:
        """Take the node offline from another thread, so that the next start is admitted at once."""
        if self._link is not None:
            self._link.abandon()

    def _serve(self, link: Link) -> None:
        last_message = time.monotonic()
        while not self._stop.is_set():
            asked = time.monotonic()
            grid_s = 0.0
            try:
                message = link.receive()
            except UnacceptableMessage as bad:
                message, reply = bad.envelope, error_reply(ErrorCode.BAD_MESSAGE, bad.envelope)
            else:
                if message is None:
                    now = time.monotonic()
                    self._stop.wait(poll_pause_s(now - last_message, now - asked))
                    continue
                asked, grid_s = time.monotonic(), reply_grid_s(message)
                reply = answer(self._app, message, self._context(link, message))
            self._note(message, reply)
            if self._stop.wait(grid_pause_s(time.monotonic() - asked, grid_s)):
                return
            link.reply(reply)
            last_message = time.monotonic()
            self._stop.wait(_LEAST_POLL_S)  # no server asks again at once

    def _context(self, link: Link, message: Message) -> Context:
        """Return a fresh context: what the site keeps is in its ledger, and what the server configures is not asked."""
        return Context(
            run_id=message.metadata.run_id,
            node_id=link.node_id,
            node_config=dict(self._config),
            state=RecordDict(),
            run_config={},
        )

    def _note(self, message: Message, reply: Message) -> None:
        kind = message.metadata.message_type if message.metadata.message_type in _KINDS else "other"
        if reply.has_error():
            self._status.answered(kind, error_code(reply).value, None)
            return
        config = reply.content.get(CONFIG)
        number = config.get("round") if isinstance(config, ConfigRecord) else None
        self._status.answered(kind, "answered", number if isinstance(number, int) else None)

    def _previous_node(self) -> int | None:
        """Return the node id of this folder's last connection."""
        try:
            return int((self._folder / NODE_FILE).read_text())
        except (OSError, ValueError):
            return None


@contextmanager
def _only_daemon(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the operating system lets go of however the process ends."""
    path = folder / LOCK_FILE
    with storage_errors(path), path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"Another daemon serves {folder}; stop it first.") from error
        yield


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """Yield a socket from which each signal is read as a byte.

    A handler that sets an ``Event`` on which the same thread waits can find the event's lock held by that very
    thread; a signal that comes just before the wait does not end it. A byte on a socket is neither lost nor locked.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in _ENDING:
            signal.signal(number, lambda *_: None)
        yield reader
        signal.set_wakeup_fd(-1)


def _hospital_app() -> App:
    from client.app import app  # noqa: PLC0415 - torch takes seconds, and a test may bring its own app

    return app
