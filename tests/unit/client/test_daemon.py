import datetime
import fcntl
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from hypothesis import given
from hypothesis import strategies as st

from client.app import SERVER_FINGERPRINT, SITE_FOLDER
from client.app import app as hospital_app
from client.channel import Backoff, LinkFault
from client.daemon import (
    Connection,
    _Daemon,
    answer,
    grid_pause_s,
    node_config,
    poll_pause_s,
    reply_grid_s,
    run_daemon,
)
from client.folder import AUDIT, open_books
from client.keys import make_key
from client.link import object_pause_s
from client.status import Status
from shared.errors import StorageError
from shared.messages import TrainRequest
from shared.plan import RunPlan


@pytest.fixture
def folder(tmp_path):
    make_key(tmp_path, "h1", 10)
    key, name = ec.generate_private_key(ec.SECP384R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    (tmp_path / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return tmp_path


def message(kind="train", identifier="m1") -> Message:
    metadata = Metadata(5, identifier, 1, 9, "", "", 0.0, 3600.0, kind, 1, None)
    return make_message(metadata, RecordDict({"config": ConfigRecord({})}))


def context(folder) -> Context:
    return Context(run_id=5, node_id=9, node_config={SITE_FOLDER: str(folder)}, state=RecordDict(), run_config={})


def failing(error):
    def app(_message, _context):
        raise error

    return app


@pytest.mark.parametrize("error", [RuntimeError("Doe^Jane"), MemoryError(), SystemExit(3), RecursionError()])
def test_a_failure_leaves_as_a_bare_code(tmp_path, error):
    reply = answer(failing(error), message(), context(tmp_path))
    assert (reply.error.code, reply.error.reason) == (1000, "internal")


def test_an_error_of_the_apps_own_loses_its_text(tmp_path):
    def app(request, _context):
        return Message(Error(0, "Doe^Jane"), reply_to=request)

    assert answer(app, message(), context(tmp_path)).error.reason == "internal"


def test_an_answer_to_another_message_does_not_leave(tmp_path):
    def app(_request, _context):
        return Message(RecordDict(), reply_to=message(identifier="m2"))

    assert answer(app, message(), context(tmp_path)).error.reason == "internal"


@pytest.mark.parametrize("kind", ["train", "query", "evaluate", "train.more", "system", "reconnect"])
def test_the_hospitals_own_app_answers_nonsense_with_a_code_and_a_line_in_the_audit_log(tmp_path, kind):
    open_books(tmp_path)
    before = (tmp_path / AUDIT).read_text().count("\n")
    assert answer(hospital_app, message(kind), context(tmp_path)).error.reason == "bad-message"
    assert (tmp_path / AUDIT).read_text().count("\n") == before + 1


def test_a_node_is_told_its_folder_and_server_whatever_the_environment_holds(folder, monkeypatch):
    before = node_config(folder)
    assert set(before) == {SITE_FOLDER, SERVER_FINGERPRINT}
    for name in ("FEDWARD_TEST_SEED", "FEDWARD_SEED", "SIMULATION_SEED", "PYTEST_CURRENT_TEST"):
        monkeypatch.setenv(name, "7")
    assert node_config(folder) == before


def test_two_daemons_do_not_share_a_folder(folder):
    with (folder / "daemon.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="Another daemon"):
            run_daemon(folder, Connection(server="127.0.0.1:1"))


def test_a_daemon_without_a_certificate_does_not_start(folder):
    (folder / "ca.crt").unlink()
    with pytest.raises(StorageError, match=r"ca\.crt"):
        run_daemon(folder, Connection(server="127.0.0.1:1"))


@given(st.integers(1, 10_000))
def test_pauses_double_up_to_the_cap_and_are_spread(attempt):
    whole = min(60.0, 2.0 ** min(attempt - 1, 30))
    delays = {Backoff().delay_s(attempt) for _ in range(5)}
    assert all(whole / 2 <= delay <= whole for delay in delays)
    assert len(delays) > 1


@given(st.floats(0, 1e6), st.floats(0, 1e3))
def test_polling_slows_with_idleness_and_with_a_slow_server(idle_s, call_s):
    pause_s = poll_pause_s(idle_s, call_s)
    assert 0.05 <= pause_s <= 2.0
    assert pause_s >= min(2.0, 10 * call_s)
    assert pause_s <= max(0.05, idle_s / 20, 10 * call_s)


@given(st.floats(0.02, 0.25), st.floats(0, 1e5))
def test_waiting_for_an_object_slows_with_a_slow_server_and_not_after_an_outage(least_s, call_s):
    pause_s = object_pause_s(least_s, call_s)
    assert least_s <= pause_s <= 5.0
    assert pause_s >= min(5.0, 3 * call_s)


@given(st.floats(0, 1e6), st.floats(0.1, 86_400))
def test_a_reply_leaves_at_a_whole_multiple_of_the_grid_and_not_at_once(taken_s, grid_s):
    leaves_s = taken_s + grid_pause_s(taken_s, grid_s)
    assert leaves_s >= grid_s * (1 - 1e-9)
    assert leaves_s / grid_s == pytest.approx(round(leaves_s / grid_s), rel=1e-9)
    assert grid_pause_s(taken_s, grid_s) <= grid_s * (1 + 1e-9)
    assert grid_pause_s(taken_s, 0.0) == 0.0


def question(plan) -> Message:
    metadata = Metadata(5, "m1", 1, 9, "", "", 0.0, 3600.0, "train", 1, None)
    return make_message(metadata, TrainRequest("run", 1, plan, np.zeros(3, np.float32)).to_content())


GRID = RunPlan(
    task="t", rounds=1, local_steps=1, sample_rate=0.5, records_per_patient=1, max_grad_norm=1.0, noise_multiplier=1.0,
    delta=1e-3, learning_rate=0.1, reply_grid_s=30.0,
)  # fmt: skip


def test_the_grid_is_the_messages_own():
    assert reply_grid_s(question(GRID)) == 30.0
    assert reply_grid_s(question(replace(GRID, reply_grid_s=0.0))) == 0.0
    assert reply_grid_s(message("train")) == reply_grid_s(message("query")) == 0.0


class Waits(Event):
    """Remembers how long the daemon waits, and does not; set once it has seen ``limit`` waits."""

    def __init__(self, limit):
        super().__init__()
        self.pauses, self.limit = [], limit

    def wait(self, timeout=None):
        self.pauses.append(timeout)
        if len(self.pauses) == self.limit:
            self.set()
        return self.is_set()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_reply_waits_for_the_grid_and_a_stop_ends_the_wait(tmp_path, fails, stopped):
    """The answer and the error alike leave after the wait; a daemon that is stopped meanwhile sends nothing."""
    sent, stop = [], Waits(1 if stopped else 2)

    class OneQuestion:
        node_id = 9

        def receive(self):
            return question(GRID)

        def reply(self, reply):
            sent.append((reply.has_error(), len(stop.pauses)))

    app = failing(RuntimeError()) if fails else lambda asked, _: Message(RecordDict(), reply_to=asked)
    daemon = _Daemon(tmp_path, None, {}, app, Status("h1"), Backoff(), stop)
    daemon._serve(OneQuestion())
    assert 1.0 < stop.pauses[0] <= 30.0
    assert sent == ([] if stopped else [(fails, 1)])


def test_health_follows_the_connection():
    status = Status("h1")
    assert not status.health().ok
    status.contact()
    assert status.health().ok
    status.fault(LinkFault.CLOCK, 1, 1.0)
    assert not status.health().ok
    assert status.health().facts["fault"] == "clock-wrong"
    status.contact()
    status.contact()
    assert status.health().facts["fault"] is None
    assert status.registry.get_sample_value("fedward_site_reconnects_total") == 1.0


def test_metrics_count_kinds_and_outcomes_and_nothing_else():
    status = Status("h1")
    status.answered("train", "answered", 3)
    status.answered("other", "bad-message", None)
    count = "fedward_site_messages_total"
    assert status.registry.get_sample_value(count, {"kind": "train", "outcome": "answered"}) == 1.0
    assert status.registry.get_sample_value(count, {"kind": "other", "outcome": "bad-message"}) == 1.0
    assert status.registry.get_sample_value("fedward_site_round") == 3.0
    names = {metric.name.removeprefix("fedward_site_") for metric in status.registry.collect()}
    assert names == {"connected", "last_contact_timestamp_seconds", "messages", "reconnects", "round"}
