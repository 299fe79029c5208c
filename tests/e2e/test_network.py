"""A line that goes dead for a minute in mid-run: nothing is refused or reset, nothing gets through."""

import json
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from client.ledger import Ledger
from server.registry import OK
from server.runs import find_run
from shared.errors import StorageError
from simulations.deployment import Deployment, deployment, wait_for
from simulations.service_benchmark import write_tiny_store

pytestmark = pytest.mark.timeout(600)
CUT_S, ROUNDS, RUN = 60.0, 5, "cut"
DIRECT, CUT_OFF = ("site-1", "site-2"), "site-3"


class Line:
    """A TCP proxy towards ``target`` that may go dead: connections are still accepted, and nobody hears anything."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._alive, self._ended = threading.Event(), threading.Event()
        self._alive.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def dead(self) -> Iterator[None]:
        self._alive.clear()
        try:
            yield
        finally:
            self._alive.set()

    def close(self) -> None:
        self._ended.set()
        self._alive.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            self._alive.wait()  # as a handshake that gets no answer
            with socket.create_connection(("127.0.0.1", self._target)) as far, selectors.DefaultSelector() as ready:
                ready.register(near, selectors.EVENT_READ, far)
                ready.register(far, selectors.EVENT_READ, near)
                while not self._ended.is_set():
                    for key, _ in ready.select(0.2):
                        data = key.fileobj.recv(65_536)
                        self._alive.wait()  # what was on its way arrives after the cut, as a retransmission does
                        if not data:
                            return
                        key.data.sendall(data)


@pytest.fixture
def line() -> Iterator[Line]:
    with deployment_port() as port:
        line = Line(port)
    yield line
    line.close()


@contextmanager
def deployment_port() -> Iterator[int]:
    """Yield a port that is free a moment later."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        yield int(probe.getsockname()[1])


@pytest.fixture
def consortium(tmp_path, line) -> Iterator[Deployment]:
    """Two sites on a good line and one behind ``line``, all connected."""
    with deployment(tmp_path, line._target) as whole:
        whole.found()
        for name in (*DIRECT, CUT_OFF):
            folder = whole.admit(name, 200, line.port if name == CUT_OFF else None)
            write_tiny_store(folder / "store")
        policy = whole.site(CUT_OFF) / "site.toml"
        text = policy.read_text()
        assert "keep-alive-s = 60.0" in text
        policy.write_text(text.replace("keep-alive-s = 60.0", "keep-alive-s = 10.0"))
        for name in ("server", *DIRECT, CUT_OFF):
            whole.start(name)
        whole.wait_connected(*DIRECT, CUT_OFF)
        yield whole


def rounds_done(whole: Deployment) -> int:
    try:
        return find_run(whole.server, RUN).record().rounds_completed
    except StorageError:  # the run is being submitted
        return 0


def test_a_line_that_is_dead_for_a_minute_costs_time_and_nothing_else(consortium, line):
    plan = consortium.folder / "plan.toml"
    lines = ['task = "nodule-classification"', f"rounds = {ROUNDS}", "epsilon = 8.0", "local-steps = 1"]
    plan.write_text("\n".join(lines))
    command = [sys.executable, "-m", "server.cli", "run", str(consortium.server), str(plan), "--wait", "--name", RUN]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    consortium.end_with_others("run", run)
    wait_for("a round", lambda: rounds_done(consortium))

    with line.dead():
        ends = time.monotonic() + CUT_S
        wait_for("the cut to be noticed", lambda: CUT_OFF not in consortium.health()["connected"].split(","), CUT_S)
        threading.Event().wait(ends - time.monotonic())
        assert run.poll() is None, "the run waits for a site that has just gone"
    _, err = run.communicate(timeout=400)
    assert run.returncode == 0, err
    said = [json.loads(text) for text in (consortium.folder / f"{CUT_OFF}.log").read_text().splitlines()]
    states = [entry["event"] for entry in said if entry["event"] in ("connected", "not connected")]
    cut = [entry for entry in said if entry["event"] == "not connected" and entry["code"] == "timeout"]
    assert len(cut) > 1, "the daemon notices that nobody answers, and tries again"
    assert "connected" in states[states.index("not connected") :], "and is back"

    record = find_run(consortium.server, RUN).record()
    assert record.rounds_completed == ROUNDS
    assert [row.round for row in record.rounds if row.aggregated] == list(range(ROUNDS + 1))
    assert record.rounds[-1].replies[CUT_OFF] == OK, "it is back"
    for name in (*DIRECT, CUT_OFF):
        answered = [row.round for row in record.rounds if row.replies.get(name) == OK]
        releases = Ledger(consortium.site(name) / "ledger.sqlite").releases()
        released = [release.round for release in releases]
        assert released == sorted(set(released)), "no round is released twice"
        assert set(answered) <= set(released), "nothing unrecorded was received"
        assert name == CUT_OFF or answered == list(range(1, ROUNDS + 1))
        assert all(release.committed_at for release in releases)
        spent = json.loads(consortium.must("site", "ledger", consortium.site(name), "--json"))["epsilon"]
        assert spent == pytest.approx(record.plan.stated_epsilon(len(released)), abs=1e-6), "the whole plan"
        consortium.must("site", "audit", "verify", consortium.site(name))
