"""``/healthz`` and ``/metrics`` on loopback, for the operator's own monitoring.

What is served here stays on the machine: the socket is bound to 127.0.0.1, whoever asks from elsewhere needs the
operator's own proxy.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from shared.errors import StorageError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Health:
    """Whether a service does its work, and a few public facts about it."""

    ok: bool
    facts: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


def health_of(port: int, timeout_s: float = 2.0) -> dict[str, Any]:
    """Ask a service on this machine how it fares; ``{"ok": False, "answers": False}`` if nobody answers."""
    direct = build_opener(ProxyHandler({}))  # a proxy in the environment would be asked otherwise
    try:
        with direct.open(f"http://{LOOPBACK}:{port}/healthz", timeout=timeout_s) as answer:
            return {"answers": True, **dict(json.load(answer))}
    except HTTPError as error:  # 503: it is there and says that it is not well
        with error:
            return {"answers": True, **_facts(error.read())}
    except (OSError, ValueError):
        return {"ok": False, "answers": False}


def _facts(text: bytes) -> dict[str, Any]:
    try:
        return {"ok": False, **dict(json.loads(text))}
    except (ValueError, TypeError):
        return {"ok": False}


class _Threads(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, *_arguments: Any) -> None:
        """Say nothing: a poll every few seconds is no event."""


@contextmanager
def serve(registry: CollectorRegistry, health: Callable[[], Health], port: int) -> Iterator[int]:
    """Serve until the block ends; yield the port, which is chosen freely if ``port`` is 0.

    ``/healthz`` answers 200 or 503 with the facts as JSON, ``/metrics`` the registry in Prometheus's text form.

    Raises:
        StorageError: If the port is taken.
    """
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start_response)
        if environ["PATH_INFO"] != "/healthz":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"There is /healthz and /metrics.\n"]
        state = health()
        start_response("200 OK" if state.ok else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps({"ok": state.ok, **state.facts}).encode() + b"\n"]

    try:
        server = make_server(LOOPBACK, port, application, server_class=_Threads, handler_class=_Silent)
    except OSError as error:
        raise StorageError(f"Port {port} on {LOOPBACK} is taken; choose another health port.") from error
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
