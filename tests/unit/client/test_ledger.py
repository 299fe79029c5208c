"""The ledger: no order of crash, replay and restart lets what was released exceed what it holds."""

import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from client.budget import Admission, Rule, Spending
from client.chain import Head
from client.ledger import Ledger, Release, ReleaseRequest, Reservation
from shared.accounting import Mechanism
from shared.errors import BudgetExceeded, ErrorCode, FederationError, ProtocolError, StorageError

MECHANISM = Mechanism(0.5, 2.0, 3)
DELTA = 1e-3
CAP_RELEASES = 4


def request(round_number: int = 1, weights: str = "w", run: str = "r", plan: str = "p") -> ReleaseRequest:
    return ReleaseRequest(run, round_number, "task", "store", plan, f"{run}/{round_number}/{weights}", MECHANISM, DELTA)


def allow(_spending: Spending) -> Admission:
    """A budget without limit."""
    return Admission("r", Rule.FILTER, MECHANISM, 4)


def cap(spending: Spending) -> Admission:
    if len(spending.releases) >= CAP_RELEASES:
        raise BudgetExceeded("spent")
    return allow(spending)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger.sqlite")


def test_a_reservation_is_spent_before_anything_runs(ledger: Ledger) -> None:
    ledger.reserve(request(), b"key", allow)
    assert ledger.mechanisms() == (MECHANISM,)


def test_a_reservation_survives_a_restart_with_its_key(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(request(), b"first", allow)
    again = Ledger(tmp_path / "ledger.sqlite").reserve(request(), b"second", allow)
    assert again.key == b"first"
    assert len(ledger.mechanisms()) == 1


def test_a_committed_release_is_replayed_and_its_key_is_gone(ledger: Ledger, tmp_path: Path) -> None:
    key = b"very-secret-key-of-this-release!"
    ledger.commit(ledger.reserve(request(), key, allow), b"reply")
    assert ledger.reserve(request(), b"other", allow) == Reservation(1, None, b"reply")
    assert key not in (tmp_path / "ledger.sqlite").read_bytes()
    assert len(ledger.mechanisms()) == 1


def test_no_byte_of_an_old_key_or_reply_stays_in_the_file(ledger: Ledger, tmp_path: Path) -> None:
    """SQLite leaves what is deleted in its free pages, unless it is told to overwrite them (``secure_delete``)."""
    keys = [bytes([number]) * 16 + b"a secret of one." for number in range(1, 7)]
    replies = [bytes([65 + number]) * 40_000 for number in range(1, 7)]
    for number, (key, reply) in enumerate(zip(keys, replies, strict=True), start=1):
        ledger.commit(ledger.reserve(request(number), key, allow), reply)
    content = (tmp_path / "ledger.sqlite").read_bytes()
    assert replies[-1][:1000] in content
    assert [key for key in keys if key in content] == []
    assert [reply[:100] for reply in replies[:-1] if reply[:100] in content] == []


@pytest.mark.parametrize("committed", [True, False])
def test_other_weights_under_the_same_round_are_refused(ledger: Ledger, committed: bool) -> None:
    reservation = ledger.reserve(request(weights="w"), b"key", allow)
    if committed:
        ledger.commit(reservation, b"reply")
    with pytest.raises(ProtocolError) as caught:
        ledger.reserve(request(weights="changed"), b"key", allow)
    assert caught.value.code is ErrorCode.REPLAY_MISMATCH


def test_a_plan_changed_in_mid_run_is_refused(ledger: Ledger) -> None:
    ledger.reserve(request(1, plan="p"), b"key", allow)
    with pytest.raises(ProtocolError) as caught:
        ledger.reserve(request(2, plan="q"), b"key", allow)
    assert caught.value.code is ErrorCode.PLAN_CHANGED


def test_only_the_latest_reply_is_kept_and_an_older_round_never_trains_again(ledger: Ledger) -> None:
    for number in (1, 2):
        ledger.commit(ledger.reserve(request(number), b"key", allow), b"reply")
    with pytest.raises(ProtocolError) as caught:
        ledger.reserve(request(1), b"key", allow)
    assert caught.value.code is ErrorCode.REPLAY_MISMATCH


def test_a_refused_budget_leaves_no_trace(ledger: Ledger) -> None:
    def refuse(_spending: Spending) -> Admission:
        raise BudgetExceeded("no")

    with pytest.raises(BudgetExceeded):
        ledger.reserve(request(), b"key", refuse)
    assert ledger.mechanisms() == ()


def test_a_release_is_committed_once(ledger: Ledger) -> None:
    reservation = ledger.reserve(request(), b"key", allow)
    ledger.commit(reservation, b"reply")
    with pytest.raises(ProtocolError):
        ledger.commit(reservation, b"another")


def test_all_runs_and_tasks_compose(ledger: Ledger) -> None:
    for run in ("a", "b"):
        ledger.reserve(request(run=run), b"key", allow)
    assert ledger.mechanisms() == (MECHANISM, MECHANISM)
    assert ledger.spending().counted(without="a") == [MECHANISM]


def test_a_missing_or_emptied_ledger_fails_closed(ledger: Ledger, tmp_path: Path) -> None:
    """An unmounted volume must not look like a hospital that never released anything."""
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"")
    for use in (lambda: Ledger(path), ledger.mechanisms):
        with pytest.raises(StorageError):
            use()
    path.unlink()
    with pytest.raises(StorageError, match="missing"):
        Ledger(path)


def test_making_a_ledger_never_empties_one(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(request(), b"key", allow)
    assert Ledger.create(tmp_path / "ledger.sqlite").mechanisms() == (MECHANISM,)


def test_other_data_under_the_same_reservation_is_refused(ledger: Ledger) -> None:
    """A second intake between crash and resume must not meet the first attempt's noise."""
    ledger.reserve(request(), b"key", allow)
    with pytest.raises(ProtocolError) as caught:
        ledger.reserve(replace(request(), store_digest="another"), b"key", allow)
    assert caught.value.code is ErrorCode.REPLAY_MISMATCH


def test_every_commit_waits_for_the_disk(ledger: Ledger) -> None:
    with ledger._transaction() as database:
        assert database.execute("PRAGMA synchronous").fetchone()[0] == 3  # EXTRA


@pytest.mark.parametrize("room", range(0, 60_000, 4096))
def test_a_full_disk_changes_nothing_and_the_next_try_succeeds(
    ledger: Ledger, tmp_path: Path, room: int, disk_full_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    path, reply = tmp_path / "ledger.sqlite", b"r" * 60_000
    with disk_full_after(room), suppress(StorageError):
        ledger.reserve(request(), b"first", allow)
    reserved = ledger.mechanisms()
    reservation = Ledger(path).reserve(request(), b"second", allow)
    assert reservation.key == (b"first" if reserved else b"second")
    with disk_full_after(room), pytest.raises(StorageError):
        ledger.commit(reservation, reply)
    again = Ledger(path).reserve(request(), b"third", allow)
    assert again == reservation, "open, with its key: nothing was released"
    ledger.commit(again, reply)
    assert Ledger(path).reserve(request(), b"fourth", allow).reply == reply
    assert ledger.mechanisms() == (MECHANISM,)


def test_a_damaged_ledger_fails_closed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError):
        Ledger(path)


def test_a_ledger_that_cannot_be_written_fails_closed(ledger: Ledger, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON releases BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    database.close()
    with pytest.raises(StorageError):
        ledger.reserve(request(), b"key", allow)


VERSION_2 = """
CREATE TABLE releases (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, task TEXT NOT NULL, store_digest TEXT NOT NULL,
    plan_digest TEXT NOT NULL, request_digest TEXT NOT NULL, sample_rate REAL NOT NULL, noise_multiplier REAL NOT NULL,
    steps INTEGER NOT NULL, delta REAL NOT NULL, reserved_at TEXT NOT NULL, committed_at TEXT, key BLOB, reply BLOB,
    UNIQUE (run, round)
) STRICT;
CREATE TABLE audit_head (
    id INTEGER PRIMARY KEY CHECK (id = 1), sequence INTEGER NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL
) STRICT;
INSERT INTO releases VALUES (1, 'old', 1, 'task', 'store', 'p', 'old/1/w', 0.5, 2.0, 3, 0.001, '2026-11-22', NULL,
    X'6B6579', NULL);
INSERT INTO audit_head VALUES (1, 2, 'ab', 300);
PRAGMA user_version = 2;
"""
"""What Fedward wrote until 28 November 2026: the tables as it made them, and one release on its way."""


def test_a_ledger_of_version_2_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(VERSION_2)
    database.close()
    ledger = Ledger(path)
    assert ledger.spending() == Spending((("old", MECHANISM),))
    assert ledger.audit_head() == Head(2, "ab", 300)
    assert ledger.reserve(request(1, run="old"), b"other", allow) == Reservation(1, b"key", None)
    ledger.reserve(request(2, run="old"), b"other", allow)
    assert Ledger(path).spending().admissions == (allow(Spending()),)


def test_a_ledger_of_a_newer_version_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute("PRAGMA user_version = 4")
    database.close()
    with pytest.raises(StorageError, match="newer Fedward"):
        Ledger(tmp_path / "ledger.sqlite")


def test_the_admission_is_kept_with_the_first_release_and_not_changed(ledger: Ledger) -> None:
    ledger.reserve(request(1), b"key", allow)
    ledger.reserve(request(2), b"key", lambda _spending: Admission("r", Rule.PLD, Mechanism(0.1, 9.0, 1), 9))
    assert ledger.spending().admissions == (allow(Spending()),)


def test_a_steward_reads_each_release_as_it_was_asked_for(ledger: Ledger) -> None:
    """Every field has a value of its own, so that no two can be swapped."""
    asked = ReleaseRequest("r", 7, "task", "store", "plan", "request", Mechanism(0.25, 1.5, 9), 1e-4)
    before = datetime.now(UTC).replace(microsecond=0)
    reservation = ledger.reserve(asked, b"key", allow)
    (open_one,) = ledger.releases()
    ledger.commit(reservation, b"reply")
    ledger.reserve(request(1, run="second"), b"key", allow)
    committed, second = ledger.releases()
    assert open_one == Release(
        "r", 7, "task", "plan", "request", Mechanism(0.25, 1.5, 9), 1e-4, open_one.reserved_at, None
    )
    assert committed == replace(open_one, committed_at=committed.committed_at)
    assert second.run == "second"
    for text in (committed.reserved_at, committed.committed_at):
        assert text is not None
        moment = datetime.fromisoformat(text)
        assert moment.utcoffset() == timedelta(0)
        assert before <= moment <= datetime.now(UTC)
        assert len(text) == len("2026-11-28T20:00:00+00:00")


def test_a_run_keeps_the_plan_under_which_it_began(ledger: Ledger) -> None:
    ledger.reserve(request(1, run="a", plan="p"), b"key", allow)
    ledger.reserve(request(1, run="b", plan="q"), b"key", allow)
    assert [ledger.plan_of(run) for run in ("a", "b", "c")] == ["p", "q", None]


def test_the_reservation_of_a_round_names_its_own_row(ledger: Ledger) -> None:
    first, second = (ledger.reserve(request(number), b"key", allow) for number in (1, 2))
    assert (first, second) == (Reservation(1, b"key", None), Reservation(2, b"key", None))


def test_a_commit_forgets_the_replies_of_its_own_run_alone(ledger: Ledger) -> None:
    for run, number in (("a", 1), ("b", 1), ("b", 2)):
        ledger.commit(ledger.reserve(request(number, run=run), b"key", allow), f"{run}{number}".encode())
    assert ledger.reserve(request(1, run="a"), b"key", allow).reply == b"a1"
    assert ledger.reserve(request(2, run="b"), b"key", allow).reply == b"b2"
    with pytest.raises(ProtocolError) as caught:
        ledger.reserve(request(1, run="b"), b"key", allow)
    assert (str(caught.value), caught.value.code) == (
        "This round's reply is no longer kept.",
        ErrorCode.REPLAY_MISMATCH,
    )


def test_each_act_is_announced_by_its_name_and_its_head_is_kept(ledger: Ledger) -> None:
    said: list[str] = []

    def announce(act: str) -> Head:
        said.append(act)
        return Head(len(said), f"hash-{len(said)}", 100 * len(said))

    assert ledger.audit_head() is None
    ledger.reserve(request(), b"key", allow, announce)
    assert ledger.audit_head() == Head(1, "hash-1", 100)
    reservation = ledger.reserve(request(), b"key", allow, announce)
    ledger.commit(reservation, b"reply", announce)
    ledger.reserve(request(), b"key", allow, announce)
    assert said == ["reserved", "resumed", "released", "replayed"]
    assert ledger.audit_head() == Head(4, "hash-4", 400)
    ledger.anchor(Head(9, "other", 7))
    assert ledger.audit_head() == Head(9, "other", 7)


def test_an_act_that_cannot_be_announced_does_not_happen(ledger: Ledger) -> None:
    def refuse(_act: str) -> Head:
        raise StorageError("the log is full")

    with pytest.raises(StorageError, match="the log is full"):
        ledger.reserve(request(), b"key", allow, refuse)
    assert ledger.spending() == Spending()
    reservation = ledger.reserve(request(), b"key", allow)
    with pytest.raises(StorageError, match="the log is full"):
        ledger.reserve(request(), b"key", allow, refuse)
    with pytest.raises(StorageError, match="the log is full"):
        ledger.commit(reservation, b"reply", refuse)
    assert ledger.reserve(request(), b"key", allow) == reservation


def test_the_whole_admission_is_kept(ledger: Ledger) -> None:
    """Every field has a value of its own, and the runs stand in the order in which they began."""
    admissions = (
        Admission("b", Rule.PLD, Mechanism(0.25, 1.5, 9), 17),
        Admission("a", Rule.FILTER, Mechanism(0.75, 3.5, 8), 16),
    )
    for admission in admissions:
        ledger.reserve(request(run=admission.run), b"key", lambda _spending, kept=admission: kept)  # type: ignore[misc]
    assert ledger.spending() == Spending((("b", MECHANISM), ("a", MECHANISM)), admissions)


def test_the_budget_sees_what_was_spent_before_this_release(ledger: Ledger) -> None:
    seen: list[Spending] = []

    def look(spending: Spending) -> Admission:
        seen.append(spending)
        return allow(spending)

    for number in (1, 2):
        ledger.reserve(request(number), b"key", look)
    assert [len(spending.releases) for spending in seen] == [0, 1]


def test_what_the_ledger_says_when_it_refuses(ledger: Ledger, tmp_path: Path) -> None:
    path, gone = tmp_path / "ledger.sqlite", tmp_path / "gone" / "ledger.sqlite"
    reservation = ledger.reserve(request(), b"key", allow)
    ledger.commit(reservation, b"reply")

    def said(use: Callable[[], object]) -> tuple[str, ErrorCode]:
        with pytest.raises(FederationError) as caught:
            use()
        return str(caught.value), caught.value.code

    assert said(lambda: Ledger(gone)) == (
        f"The privacy ledger {gone} is missing. Without it nothing is released, and an old copy would forget "
        "what was spent: see 'Back-ups and keys' in docs/operations.md.",
        ErrorCode.STORAGE_FAILED,
    )
    assert said(lambda: Ledger.create(gone))[0].startswith(f"The privacy ledger {gone} cannot be made: ")
    assert said(lambda: ledger.commit(reservation, b"again")) == (
        "This release was committed before.",
        ErrorCode.REPLAY_MISMATCH,
    )
    assert said(lambda: ledger.reserve(request(2, plan="q"), b"key", allow)) == (
        "This run began here under another plan.",
        ErrorCode.PLAN_CHANGED,
    )
    assert said(lambda: ledger.reserve(request(weights="x"), b"key", allow)) == (
        "This round was reserved here for another request or other data.",
        ErrorCode.REPLAY_MISMATCH,
    )
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 4")
    assert said(lambda: Ledger(path))[0] == (
        "ledger.sqlite was written by a newer Fedward (ledger version 4; this one knows 3). "
        "Install that version: this one might forget what was spent."
    )
    path.write_bytes(b"")
    assert said(lambda: Ledger(path))[0] == "ledger.sqlite is not a privacy ledger, or was emptied. Restore it."


@pytest.mark.parametrize("version", [0, 1])
def test_a_version_from_which_nothing_leads_here_is_refused(ledger: Ledger, tmp_path: Path, version: int) -> None:
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        database.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(StorageError, match="is not a privacy ledger"):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_migrated_ledger_has_the_new_version(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(VERSION_2)
    Ledger(path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)


def test_a_ledger_that_cannot_be_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its tables or none: a half-made one would be refused for ever."""
    monkeypatch.setattr("client.ledger._ADMISSIONS", "CREATE NONSENSE")
    with pytest.raises(StorageError, match="cannot be made"):
        Ledger.create(tmp_path / "ledger.sqlite")
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == []


class SiteUnderCrashes(RuleBasedStateMachine):
    """A site that crashes at any point, a server that repeats, reorders and changes requests.

    The model keeps every distinct output that ever left. A release is its (key, request): what a patient could
    be learnt from. The ledger must hold at least as many releases as distinct outputs left, under the cap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        Ledger.create(self.path)
        self.released: dict[tuple[int, bytes], bytes] = {}
        self.computed: dict[int, set[tuple[bytes, str]]] = {}
        self.keys = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(
        number=st.integers(1, 5),
        weights=st.sampled_from(["w", "v"]),
        crash=st.sampled_from(["never", "after-reserve", "after-training", "before-send"]),
    )
    def train(self, number: int, weights: str, crash: str) -> None:
        """One request, through the protocol of ``Site.answer_train``, cut off at ``crash``."""
        wanted = request(number, weights)
        self.keys += 1
        ledger = Ledger(self.path)  # every request may follow a restart
        try:
            reservation = ledger.reserve(wanted, self.keys.to_bytes(4, "big"), cap)
        except (ProtocolError, BudgetExceeded):
            return
        if crash == "after-reserve":
            return
        reply = reservation.reply
        if reply is None:
            assert reservation.key is not None
            self.computed.setdefault(reservation.release_id, set()).add((reservation.key, wanted.digest))
            reply = reservation.key + wanted.digest.encode()
            if crash == "after-training":
                return
            ledger.commit(reservation, reply)
        if crash != "before-send":
            self.released[reservation.release_id, reply] = reply

    @invariant()
    def released_is_within_the_ledger(self) -> None:
        rows = Ledger(self.path).releases()
        assert len({release for release, _ in self.released}) == len(self.released)  # one output a release
        assert len(self.released) <= len(rows) <= CAP_RELEASES

    @invariant()
    def attempts_at_one_release_are_one_computation(self) -> None:
        assert all(len(attempts) == 1 for attempts in self.computed.values())


SiteUnderCrashes.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)
TestSiteUnderCrashes: Callable[..., object] = SiteUnderCrashes.TestCase
