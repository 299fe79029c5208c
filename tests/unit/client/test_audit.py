"""The audit log: no crash looks like tampering, no tampering like a crash, and nothing is done that it cannot hold."""

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from client.audit import AuditLog, may_be_unconfirmed
from client.audit_check import verify
from client.budget import Admission, Rule, Spending
from client.chain import Entry, Head, encode, read_chain
from client.ledger import Ledger, ReleaseRequest
from shared.accounting import Mechanism
from shared.errors import BudgetExceeded, ErrorCode, ProtocolError, StorageError

MECHANISM, DELTA = Mechanism(0.5, 2.0, 3), 1e-3


class Crash(BaseException):
    """The process dies: nothing after this runs, unlike after an error."""


class Books:
    """A ledger and its log, and one release through both as ``Site.answer_train`` does it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_path, self.ledger_path = folder / "audit.jsonl", folder / "ledger.sqlite"
        AuditLog.create(self.log_path, Ledger.create(self.ledger_path))

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.ledger_path)  # every request may follow a restart

    @property
    def log(self) -> AuditLog:
        return AuditLog(self.log_path, self.ledger)

    def train(self, number: int = 1, crash: str = "never", cap: int = 99) -> bytes:
        """Return what leaves; die at ``crash``."""
        log, ledger = self.log, self.ledger
        asked = {"run": "r", "round": number, "request": f"digest-{number}"}
        details = {"sample_rate": 0.5, "noise_multiplier": 2.0, "steps": 3, "delta": DELTA}
        request = ReleaseRequest("r", number, "task", "store", "plan", f"digest-{number}", MECHANISM, DELTA)

        def check(spending: Spending) -> Admission:
            if len(spending.releases) >= cap:
                raise BudgetExceeded("spent")
            return Admission("r", Rule.FILTER, MECHANISM, 4)

        with log.decision(**asked) as session:
            died(crash == "asked")

            def announce(act: str) -> Head:
                head = session.announce(act, **asked, **details)
                died(crash == "reserve-announced")
                return head

            found = ledger.reserve(request, os.urandom(4), check, announce)
        died(crash == "reserved")
        if found.reply is not None:
            return found.reply
        assert found.key is not None
        with log.session() as session:

            def release(act: str) -> Head:
                head = session.announce(act, **asked)
                died(crash == "release-announced")
                return head

            ledger.commit(found, found.key, release)
        died(crash == "released")
        return found.key

    def events(self) -> list[str]:
        return [entry.event for entry in self.log.read()[0].entries]

    def edit(self, change: Callable[[list[bytes]], list[bytes]]) -> None:
        self.log_path.write_bytes(b"".join(change(self.log_path.read_bytes().splitlines(keepends=True))))


def died(here: bool) -> None:
    if here:
        raise Crash


CRASHES = ("asked", "reserve-announced", "reserved", "release-announced", "released")


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


def test_one_round_is_four_lines_that_agree_with_the_ledger(books: Books) -> None:
    books.train()
    assert books.events() == ["created", "asked", "reserved", "released"]
    result = verify(books.log)
    assert (result.problems, result.remarks) == ((), ())
    assert books.ledger.audit_head() == result.head


def test_lines_carry_number_time_and_the_hash_before(books: Books) -> None:
    books.train()
    lines = [json.loads(line) for line in books.log_path.read_text().splitlines()]
    assert [line["sequence"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["previous"] == "0" * 64
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_a_repeat_is_noted_as_such(books: Books) -> None:
    with pytest.raises(Crash):
        books.train(crash="reserved")
    first = books.train()
    assert books.train() == first
    assert books.events()[1:] == ["asked", "reserved", "asked", "resumed", "released", "asked", "replayed"]
    assert verify(books.log).problems == ()


def test_an_error_is_noted_with_its_code_and_not_its_text(books: Books) -> None:
    with pytest.raises(BudgetExceeded):
        books.train(cap=0)
    with pytest.raises(ValueError, match="CANARY"), books.log.failures("failed", kind="train"):
        raise ValueError("CANARY")
    last = [dict(entry.fields) for entry in books.log.read()[0].entries][-2:]
    assert [fields["code"] for fields in last] == [ErrorCode.BUDGET_EXCEEDED, ErrorCode.INTERNAL]
    assert "CANARY" not in books.log_path.read_text()
    assert verify(books.log).problems == ()


def test_a_session_says_whether_it_announced_an_act(books: Books) -> None:
    with books.log.session() as session:
        assert session.announced is False
        session.note("told")
        assert session.announced is False
        session.announce("reserved")
        assert session.announced is True


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_anywhere_is_settled_and_is_no_tampering(books: Books, crash: str) -> None:
    with pytest.raises(Crash):
        books.train(crash=crash)
    assert verify(books.log).problems == ()
    reply = books.train()
    assert books.train() == reply
    result = verify(books.log)
    assert (result.problems, result.remarks) == ((), ())
    assert len(books.ledger.releases()) == 1
    # The lines of an act that the ledger never did are marked; others are not.
    assert ("recovered" in books.events()) == (crash in ("asked", "reserve-announced", "release-announced"))


@pytest.mark.parametrize("kept", [0, 1, 50, 200])
@pytest.mark.parametrize("garbage", [b"", b"\0" * 40, b"{}\n", b'{"sequence"'])
def test_a_torn_line_is_accounted_for(books: Books, kept: int, garbage: bytes) -> None:
    """A power cut keeps any part of the last line, or blocks of zeros."""
    books.train()
    whole = books.log_path.stat().st_size
    with pytest.raises(Crash):
        books.train(2, crash="asked")
    os.truncate(books.log_path, whole + kept)
    with books.log_path.open("ab") as log:
        log.write(garbage)
    assert verify(books.log).problems == ()
    books.train(2)
    assert (verify(books.log).problems, verify(books.log).remarks) == ((), ())
    books.edit(lambda lines: [line for line in lines if line.endswith(b"}\n") and b'"event"' in line])
    assert bool(verify(books.log).problems) == bool(kept or garbage)  # the torn bytes themselves are evidence


def test_recovery_may_itself_be_cut_short_again_and_again(books: Books) -> None:
    with pytest.raises(Crash):
        books.train(crash="reserve-announced")
    for cut in (1, 30, 70):
        with suppress(StorageError), sealed(books.ledger_path):
            books.log.note("started")  # recovered is written, the ledger cannot remember it
        os.truncate(books.log_path, books.log_path.stat().st_size - cut)
    books.train()
    assert verify(books.log).problems == ()


@contextmanager
def sealed(path: Path) -> Iterator[None]:
    """The ledger refuses to remember a head, as on a full disk."""
    execute(path, "CREATE TRIGGER full BEFORE INSERT ON audit_head BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    try:
        yield
    finally:
        execute(path, "DROP TRIGGER full")


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)


def test_a_ledger_that_cannot_remember_releases_nothing_and_loses_nothing(books: Books) -> None:
    books.train(1)
    with sealed(books.ledger_path):
        for _ in range(3):
            with pytest.raises(StorageError):
                books.train(2)
        length = books.log_path.stat().st_size
        with pytest.raises(StorageError):
            books.train(2)
        assert books.log_path.stat().st_size == length  # the log does not grow with every vain attempt
    assert len(books.ledger.releases()) == 1
    books.train(2)
    assert verify(books.log).problems == ()


# What verify must find, each by the words of its sentence.
def _with(old: bytes, new: bytes, line: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [one.replace(old, new) if n == line else one for n, one in enumerate(lines, start=1)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_with(b'"round":1', b'"round":2', 3), "Line 3 was changed"),
        (_with(b'"round":2', b'"round":3', 7), "Line 7 is not the one that the ledger remembers"),
        (_with(b'"created"', b'"creaced"', 1), "Line 1 was changed"),
        (_with(b":", b": ", 4), "Line 4 was changed"),
        (_with(b"{", b"", 4), "Line 4 was changed"),
        (lambda lines: lines[:3] + lines[4:], "Missing: line 4."),
        (lambda lines: lines[:1] + lines[4:], "Missing: lines 2 to 4."),
        (lambda lines: lines[1:], "Missing: line 1."),
        (lambda lines: lines[:-1], "Missing at the end: line 7."),
        (lambda lines: lines[:2], "Missing at the end: lines 3 to 7."),
        (lambda lines: [], "Missing at the end: lines 1 to 7."),
        (lambda lines: [*lines[:3], lines[1], *lines[3:]], "Line 2 stands again behind line 3"),
        (lambda lines: [*lines[:3], b"inserted\n", *lines[3:]], "Line 4 was changed"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "Missing: line 1."),
    ],
)
def test_an_edit_a_deletion_and_a_truncation_are_found_and_stop_the_site(
    books: Books, change: Callable[[list[bytes]], list[bytes]], said: str
) -> None:
    books.train(1)
    books.train(2)
    assert len(books.log_path.read_bytes().splitlines()) == 7
    books.edit(change)
    problems = verify(books.log).problems
    assert any(said in problem for problem in problems), problems
    if "end" in said or "remembers" in said:
        with pytest.raises(StorageError, match="cut off or changed"):
            books.train(3)
        assert len(books.ledger.releases()) == 2


def test_a_log_rewritten_with_true_hashes_is_found_by_the_ledger(books: Books) -> None:
    books.train(1)
    end, lines = Head(), []
    for entry in books.log.read()[0].entries:
        fields = {**entry.fields, "round": 9} if "round" in entry.fields else entry.fields
        lines.append(encode(end, entry.time, entry.event, fields))
        end = read_chain(lines[-1], end).entries[0].head
    books.log_path.write_bytes(b"".join(lines))
    problems = verify(books.log).problems
    assert any("not the one that the ledger remembers" in problem for problem in problems)
    assert any("never reserved" in problem for problem in problems)
    assert any("does not hold it" in problem for problem in problems)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM releases WHERE round = 1", "Line 3 says that round 1 of run r was reserved"),
        ("UPDATE releases SET noise_multiplier = 9.0 WHERE round = 2", "under another mechanism"),
        ("UPDATE releases SET committed_at = NULL WHERE round = 2", "the ledger never released it"),
        ("UPDATE releases SET round = 7 WHERE round = 2", "which the audit log never reserved"),
        (
            "INSERT INTO releases SELECT 9, run, 9, task, store_digest, plan_digest, 'x', sample_rate,"
            " noise_multiplier, steps, delta, reserved_at, committed_at, key, reply FROM releases WHERE round = 2",
            "The ledger holds round 9 of run r, which the audit log never reserved",
        ),
        ("DELETE FROM audit_head", "The ledger is older"),
    ],
)
def test_a_ledger_that_was_edited_is_found(books: Books, statement: str, said: str) -> None:
    books.train(1)
    books.train(2)
    execute(books.ledger_path, statement)
    problems = verify(books.log).problems
    assert any(said in problem for problem in problems), problems


def test_a_release_without_its_line_is_found(books: Books) -> None:
    """Somebody who uses the ledger and not the log."""
    request = ReleaseRequest("r", 5, "task", "store", "plan", "d", MECHANISM, DELTA)
    books.ledger.commit(
        books.ledger.reserve(request, b"key", lambda _: Admission("r", Rule.FILTER, MECHANISM, 4)), b"reply"
    )
    assert any("never reserved" in problem for problem in verify(books.log).problems)


def test_an_older_copy_of_the_ledger_is_found_and_stops_the_site(books: Books, tmp_path: Path) -> None:
    books.train(1)
    shutil.copy(books.ledger_path, tmp_path / "copy")
    books.train(2)
    shutil.copy(tmp_path / "copy", books.ledger_path)
    assert any("older than the audit log" in problem for problem in verify(books.log).problems)
    with pytest.raises(StorageError, match="older than the audit log"):
        books.train(3)


@pytest.mark.parametrize(
    ("events", "possible"),
    [
        ([], True),
        (["asked"], True),
        (["released"], True),
        (["asked", "reserved"], True),
        (["recovered", "asked", "recovered", "reserved"], True),
        (["reserved", "released"], False),
        (["reserved", "asked"], False),
        (["asked", "reserved", "released"], False),
    ],
    ids=str,
)
def test_a_crash_leaves_one_line_or_a_question_and_its_answer(events: list[str], possible: bool) -> None:
    entries = tuple(Entry(n, "", "", event, {}, 0, Head()) for n, event in enumerate(events))
    assert may_be_unconfirmed(entries) is possible


def test_a_line_ahead_of_the_ledger_that_is_not_the_chains_next_stops_the_site(books: Books) -> None:
    """One line ahead is what a crash leaves, but not one that follows another line than the last."""
    books.train(1)
    head = books.ledger.audit_head()
    assert head is not None
    forged = encode(replace(head, sha256="0" * 64), "2026-11-28T00:00:00.000+00:00", "asked", {})
    with books.log_path.open("ab") as log:
        log.write(forged)
    with pytest.raises(StorageError, match="older than the audit log"):
        books.train(2)


def test_a_missing_log_and_a_new_ledger_stop_the_site(books: Books) -> None:
    books.train(1)
    books.ledger_path.unlink()
    Ledger.create(books.ledger_path)
    with pytest.raises(StorageError, match="older"):
        books.train(2)
    books.log_path.unlink()
    with pytest.raises(StorageError, match="cannot be opened"):
        books.train(2)


def test_a_lost_log_is_not_begun_again(books: Books) -> None:
    books.log_path.unlink()
    with pytest.raises(StorageError, match="missing"):
        AuditLog.create(books.log_path, books.ledger)
    books.log_path.symlink_to("/dev/full")
    with pytest.raises(StorageError):
        books.train(1)
    assert books.ledger.releases() == ()


@pytest.mark.parametrize("room", range(0, 620, 60))
def test_a_full_disk_releases_nothing_and_the_next_try_goes_on(
    books: Books, room: int, disk_full_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    books.train(1)
    with books.log.session() as session:  # past the ledger's own size, so that the log is what fills up
        for _ in range(60):
            session.note("filler", text="x" * 2000)
    before = books.ledger.releases()
    with disk_full_after(books.log_path.stat().st_size + room), pytest.raises(StorageError):
        books.train(2)
    assert verify(books.log).problems == ()
    after = books.ledger.releases()
    assert after[:1] == before
    assert all(release.committed_at is None for release in after[1:])
    books.train(2)
    assert (verify(books.log).problems, verify(books.log).remarks) == ((), ())


def test_the_file_is_the_owners_alone_and_flushed_before_the_act(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    assert books.log_path.stat().st_mode & 0o777 == 0o600
    flushed: list[int] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (flushed.append(os.fstat(descriptor).st_size), real(descriptor))
    )
    books.train(1)
    # asked, reserved, released: each flush saw its own line.
    sizes = [entry.head.size for entry in books.log.read()[0].entries]
    assert flushed == sizes[1:]


class SiteUnderCrashes(RuleBasedStateMachine):
    """Any order of rounds, repeats, crashes, torn writes and replays: never a false alarm, never a silent release."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.books = Books(Path(self.temporary.name))
        self.left: dict[int, bytes] = {}

    def teardown(self) -> None:
        self.temporary.cleanup()

    @rule(
        number=st.integers(1, 4),
        crash=st.sampled_from([*CRASHES, "never"]),
        torn=st.integers(0, 600),
        zeros=st.integers(0, 20),
    )
    def train(self, number: int, crash: str, torn: int, zeros: int) -> None:
        try:
            reply = self.books.train(number, crash, cap=3)
        except Crash:
            confirmed = (self.books.ledger.audit_head() or Head()).size
            size = self.books.log_path.stat().st_size
            os.truncate(self.books.log_path, max(confirmed, size - torn))
            with self.books.log_path.open("ab") as log:
                log.write(b"\0" * zeros)
        except (BudgetExceeded, ProtocolError):
            pass
        else:
            assert self.left.setdefault(number, reply) == reply

    @invariant()
    def no_false_alarm_and_everything_that_left_is_in_both(self) -> None:
        assert verify(self.books.log).problems == ()
        rows = {row.round for row in self.books.ledger.releases() if row.committed_at}
        said = {e.fields["round"] for e in self.books.log.read()[0].entries if e.event == "released"}
        assert set(self.left) <= rows <= said


SiteUnderCrashes.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None, derandomize=True)
TestSiteUnderCrashes: Callable[..., object] = SiteUnderCrashes.TestCase


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Books:
    books = Books(tmp_path_factory.mktemp("history"))
    for number, crash in enumerate(("never", "reserve-announced", "never"), start=1):
        with suppress(Crash):
            books.train(number, crash)
    return books


@settings(max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(history: Books, place: float, bit: int) -> None:
    data = bytearray(history.log_path.read_bytes())
    kept = bytes(data)
    data[int(place * len(data))] ^= 1 << bit
    history.log_path.write_bytes(bytes(data))
    try:
        assert verify(history.log).problems != ()
    finally:
        history.log_path.write_bytes(kept)


@given(cut=st.integers(1, 10_000))
def test_any_cut_at_the_end_is_found(history: Books, cut: int) -> None:
    kept = history.log_path.read_bytes()
    history.log_path.write_bytes(kept[:-cut])
    try:
        assert verify(history.log).problems != ()
    finally:
        history.log_path.write_bytes(kept)
