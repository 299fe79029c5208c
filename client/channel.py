"""A gRPC channel to the server, the pauses between attempts on it, and what a failed call means."""

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import grpc  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.asymmetric import ec

from shared.objects import MAX_MESSAGE_BYTES

MAX_ANSWER_BYTES = MAX_MESSAGE_BYTES + 2**20


class LinkFault(StrEnum):
    """Why the server cannot be worked with; the words of the operator's log."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    TLS = "tls-failed"
    CLOCK = "clock-wrong"
    KEY = "key-refused"
    ADMISSION = "not-admitted"
    VERSION = "version-refused"
    RUN_OVER = "run-over"
    TOO_LARGE = "too-large"
    SERVER = "server-error"


PASSING = frozenset({LinkFault.UNREACHABLE, LinkFault.TIMEOUT, LinkFault.TLS, LinkFault.CLOCK})
_INCOMPATIBLE = '"code": 1001'  # Flower's ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE
_MEANING = {
    grpc.StatusCode.UNAVAILABLE: LinkFault.UNREACHABLE,
    grpc.StatusCode.CANCELLED: LinkFault.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: LinkFault.TIMEOUT,
    grpc.StatusCode.UNAUTHENTICATED: LinkFault.KEY,
    grpc.StatusCode.FAILED_PRECONDITION: LinkFault.ADMISSION,
    grpc.StatusCode.PERMISSION_DENIED: LinkFault.RUN_OVER,
}
_CLOSER_MEANING = {  # what a status says more precisely when its text holds these words
    (grpc.StatusCode.UNAVAILABLE, "handshake"): LinkFault.TLS,
    (grpc.StatusCode.UNAVAILABLE, "certificate"): LinkFault.TLS,
    (grpc.StatusCode.UNAUTHENTICATED, "timestamp"): LinkFault.CLOCK,
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"): LinkFault.TOO_LARGE,
    (grpc.StatusCode.FAILED_PRECONDITION, _INCOMPATIBLE): LinkFault.VERSION,
}


class Watch(Protocol):
    """What wants to know how the connection fares; called from two threads."""

    def contact(self) -> None:
        """Tell that the server answered."""

    def fault(self, fault: LinkFault, attempt: int, delay_s: float) -> None:
        """Tell that attempt number ``attempt`` failed and that the next comes after ``delay_s`` seconds."""


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts: doubling from ``first_s`` to ``cap_s``, the upper half of each drawn at random."""

    first_s: float = 1.0
    cap_s: float = 60.0

    def delay_s(self, attempt: int) -> float:
        """Return the pause after failed attempt number ``attempt``, which counts from 1."""
        whole = min(self.cap_s, self.first_s * 2.0 ** min(attempt - 1, 30))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - spreads sites in time, protects nothing


@dataclass(frozen=True)
class Endpoint:
    """Where the server is and how this site shows who it is.

    Attributes:
        server: ``host:port`` of the Fleet API.
        authority: PEM of the CA certificate, the only one trusted.
        key: The site's EC private key.
        keep_alive_s: Seconds of silence after which gRPC asks whether the other side is still there.
        proxy: ``http://host:port`` of an HTTP CONNECT proxy; empty leaves it to the environment.
    """

    server: str
    authority: bytes
    key: ec.EllipticCurvePrivateKey
    keep_alive_s: float = 60.0
    proxy: str = ""

    def channel(self) -> grpc.Channel:
        """Open a channel: TLS, dead connections noticed, no answer larger than the limit."""
        options = [
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.max_send_message_length", -1),
            # A cut line shows only by silence. With keep-alive, unacknowledged data ends the connection too.
            ("grpc.keepalive_time_ms", int(self.keep_alive_s * 1000)),
            ("grpc.keepalive_timeout_ms", 20_000),
            # Our own pauses decide when to try again, so gRPC's stay short and each channel's are its own.
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.use_local_subchannel_pool", 1),
            *([("grpc.http_proxy", self.proxy)] if self.proxy else []),
        ]
        return grpc.secure_channel(self.server, grpc.ssl_channel_credentials(self.authority), options)


def fault_of(error: grpc.RpcError) -> LinkFault:
    """Return what a failed call means; its text goes no further."""
    code, details = error.code(), (error.details() or "").lower()
    closer = [fault for (status, words), fault in _CLOSER_MEANING.items() if status is code and words in details]
    return closer[0] if closer else _MEANING.get(code, LinkFault.SERVER)
