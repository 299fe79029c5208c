"""What a daemon tells its own hospital: health and metrics. Nothing here derives from a patient."""

import logging
import time
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge

from client.channel import LinkFault
from shared.telemetry import Health

_LOG = logging.getLogger(__name__)


class Status:
    """The daemon's state as its operator sees it; safe to use from several threads."""

    def __init__(self, site: str) -> None:
        self.registry = CollectorRegistry()
        self._site = site
        self._lock = Lock()
        self._connected = False
        self._ever = False
        self._fault: LinkFault | None = None
        self._last_contact: float | None = None
        self._round: int | None = None
        registry = self.registry
        self._connected_gauge = Gauge("fedward_site_connected", "1 while the server answers", registry=registry)
        self._contact_gauge = Gauge(
            "fedward_site_last_contact_timestamp_seconds", "When the server last answered", registry=registry
        )
        self._round_gauge = Gauge("fedward_site_round", "Last round answered", registry=registry)
        self._reconnects = Counter("fedward_site_reconnects", "Connections found again", registry=registry)
        self._messages = Counter("fedward_site_messages", "Messages answered", ["kind", "outcome"], registry=registry)

    def contact(self) -> None:
        """Note that the server answered."""
        with self._lock:
            fresh, self._connected, self._fault = not self._connected, True, None
            again, self._ever = fresh and self._ever, True
            self._last_contact = time.time()
            self._contact_gauge.set(self._last_contact)
            self._connected_gauge.set(1)
        if again:
            self._reconnects.inc()
        if fresh:
            _LOG.info("connected", extra={"site": self._site})

    def fault(self, fault: LinkFault, attempt: int, delay_s: float) -> None:
        """Note that the server could not be worked with."""
        with self._lock:
            self._connected, self._fault = False, fault
            self._connected_gauge.set(0)
        extra = {"code": fault.value, "attempt": attempt, "delay_s": round(delay_s, 1)}
        _LOG.warning("not connected", extra=extra)

    def answered(self, kind: str, outcome: str, number: int | None) -> None:
        """Note that a message of a known kind was answered with an error code or ``answered``."""
        self._messages.labels(kind, outcome).inc()
        if number is not None:
            self._round = number
            self._round_gauge.set(number)
        _LOG.info("message", extra={"kind": kind, "code": outcome, "round": number})

    def health(self) -> Health:
        """Return whether the server answers, and the public facts."""
        with self._lock:
            facts: dict[str, str | int | float | bool | None] = {
                "site": self._site,
                "connected": self._connected,
                "last_contact": self._last_contact and round(self._last_contact, 1),
                "fault": self._fault and self._fault.value,
                "round": self._round,
            }
            return Health(self._connected, facts)
