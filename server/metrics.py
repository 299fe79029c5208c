"""What the aggregator's ``/metrics`` shows: public names and counts only."""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from datetime import datetime

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as Total

from server.registry import COMPLETED, FAILED, RUNNING, STOPPED


class ServiceMetrics:
    """The metrics of one service.

    Args:
        children: Names of its processes.
        certificate_ends: When hospitals will no longer accept the aggregator's certificate.
    """

    def __init__(self, children: Iterable[str], certificate_ends: datetime) -> None:
        self.registry = CollectorRegistry()
        self.connected: frozenset[str] = frozenset()
        self._restarts = Total(
            "fedward_child_restarts", "Deaths of a process of the service.", ["child"], registry=self.registry
        )
        for child in children:
            self._restarts.labels(child)  # zero is a fact too
        Gauge("fedward_certificate_expiry_timestamp_seconds", "When server.crt ends.", registry=self.registry).set(
            certificate_ends.timestamp()
        )
        self._sites = Gauge(
            "fedward_site_connected", "Whether an enrolled site is connected.", ["site"], registry=self.registry
        )
        self._runs = Gauge("fedward_runs", "Runs by status.", ["status"], registry=self.registry)
        self._rounds = Gauge("fedward_run_rounds", "Completed rounds of a run.", ["run"], registry=self.registry)

    def count_restart(self, child: str) -> None:
        """Count a child's death."""
        self._restarts.labels(child).inc()

    def show_sites(self, enrolled: Set[str], connected: Set[str]) -> None:
        """Show who is connected of those enrolled."""
        self.connected = frozenset(connected)
        self._sites.clear()
        for site in enrolled:
            self._sites.labels(site).set(site in connected)

    def show_runs(self, runs: Mapping[str, tuple[str, int]]) -> None:
        """Show the runs, each as its status and completed rounds."""
        counts = Counter(status for status, _ in runs.values())
        for status in (RUNNING, COMPLETED, FAILED, STOPPED):
            self._runs.labels(status).set(counts[status])
        for run, (_, rounds) in runs.items():
            self._rounds.labels(run).set(rounds)
