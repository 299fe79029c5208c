import json
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter

from shared.errors import StorageError
from shared.telemetry import Health, serve


def _get(port, path):
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def test_health_and_metrics_are_served():
    registry = CollectorRegistry()
    Counter("rounds", "Rounds.", registry=registry).inc()
    with serve(registry, lambda: Health(True, {"round": 3}), 0) as port:
        assert json.loads(_get(port, "/healthz")) == {"ok": True, "round": 3}
        assert "rounds_total 1.0" in _get(port, "/metrics")
        with pytest.raises(HTTPError, match="404") as missing:
            _get(port, "/etc/passwd")
        missing.value.close()


def test_a_sick_service_answers_503():
    with serve(CollectorRegistry(), lambda: Health(False), 0) as port:
        with pytest.raises(HTTPError, match="503") as sick:
            _get(port, "/healthz")
        sick.value.close()


def test_a_taken_port_is_one_clear_sentence():
    with serve(CollectorRegistry(), lambda: Health(True), 0) as port:
        second = serve(CollectorRegistry(), lambda: Health(True), port)
        with pytest.raises(StorageError, match=f"Port {port}"):
            second.__enter__()
