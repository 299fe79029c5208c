"""The privacy ledger: every noisy release this hospital ever made, durable and composed together.

Protocol of one release, and why no crash can break it:

1. ``reserve`` writes what is about to run, with a fresh secret key, and waits for the disk. From here on the
   release counts as spent, whatever happens.
2. Training draws its patients and its noise from that key alone. A crash and a second attempt at the same
   request repeat the very same computation, so two attempts reveal no more than one.
3. ``commit`` stores the reply and erases the key, in one transaction. Only a committed reply may leave.
   (Erasure is the file system's best effort: a journal's freed blocks may keep the key for a while.)
4. The same request again gets the stored reply; a different request, or the same on other data, is refused under
   the same run and round: the same noise on other weights could be subtracted away.

All releases compose, whatever store, task or run they belong to: a patient may be in any of them. With a run's first
release the ledger also keeps how the run was admitted and its whole plan (:mod:`client.budget` says why).

The ledger also holds the audit log's head (``client.audit``), moved in the very transaction of the act that the
log's last line announces: a log cut off at its end and a ledger put back to an older copy both show.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.budget import Admission, Rule, Spending
from client.chain import Head
from shared.accounting import Mechanism
from shared.errors import ErrorCode, ProtocolError, StorageError

_RELEASES = """
CREATE TABLE releases (
    id INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    task TEXT NOT NULL,
    store_digest TEXT NOT NULL,
    plan_digest TEXT NOT NULL,
    request_digest TEXT NOT NULL,
    sample_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    steps INTEGER NOT NULL,
    delta REAL NOT NULL,
    reserved_at TEXT NOT NULL,
    committed_at TEXT,
    key BLOB,
    reply BLOB,
    UNIQUE (run, round)
) STRICT
"""
_ADMISSIONS = """
CREATE TABLE admissions (
    run TEXT PRIMARY KEY,
    rule TEXT NOT NULL,
    sample_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    steps INTEGER NOT NULL,
    renyi_order INTEGER NOT NULL
) STRICT
"""
_AUDIT_HEAD = """
CREATE TABLE audit_head (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    sequence INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL
) STRICT
"""
_BUSY_S = 30.0
_VERSION = 3
_MIGRATIONS = {2: _ADMISSIONS}
"""What makes a ledger of a version one of the next. Version 2 knows no admissions: its runs have none."""

Announce = Callable[[str], Head]
"""Told what is about to be done (``reserved``, ``resumed``, ``replayed``, ``released``), inside the transaction and
before it counts; records it durably in the audit log and returns the log's new head. Raises to prevent the act."""


@dataclass(frozen=True)
class ReleaseRequest:
    """What a hospital is about to release.

    Attributes:
        digest: Names everything the answer depends on, incoming weights included.
        delta: At which the plan states its epsilon.
    """

    run: str
    round: int
    task: str
    store_digest: str
    plan_digest: str
    digest: str
    mechanism: Mechanism
    delta: float


@dataclass(frozen=True)
class Reservation:
    """A durable permission for one release.

    Attributes:
        key: Secret from which sampling and noise derive; ``None`` once committed.
        reply: The committed reply, if the release was already made.
    """

    release_id: int
    key: bytes | None
    reply: bytes | None


@dataclass(frozen=True)
class Release:
    """One row of the ledger, as a steward reads it."""

    run: str
    round: int
    task: str
    plan_digest: str
    digest: str
    mechanism: Mechanism
    delta: float
    reserved_at: str
    committed_at: str | None


class Ledger:
    """The ledger in one SQLite file. Every method opens its own connection, so processes may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            raise StorageError(
                f"The privacy ledger {path} is missing. Without it nothing is released, and an old copy would forget "
                "what was spent: see 'Back-ups and keys' in docs/operations.md."
            )
        with self._transaction() as database:
            self._migrate(database)

    @classmethod
    def create(cls, path: Path) -> "Ledger":
        """Make an empty ledger; one that is there is left as it is.

        Raises:
            StorageError: If the folder cannot be written.
        """
        if not path.exists():
            try:
                with closing(sqlite3.connect(path, isolation_level=None)) as database:
                    database.execute("PRAGMA synchronous = EXTRA")
                    database.execute("BEGIN IMMEDIATE")
                    for table in (_RELEASES, _ADMISSIONS, _AUDIT_HEAD):
                        database.execute(table)
                    database.execute(f"PRAGMA user_version = {_VERSION}")
                    database.execute("COMMIT")
            except sqlite3.Error as error:
                raise StorageError(f"The privacy ledger {path} cannot be made: {error}.") from error
        return cls(path)

    def reserve(
        self,
        request: ReleaseRequest,
        key: bytes,
        check: Callable[[Spending], Admission],
        announce: Announce | None = None,
    ) -> Reservation:
        """Reserve a release durably, or find the one already made for the same request.

        Args:
            request: The release.
            key: Fresh secret to keep if this is a new release.
            check: Called with everything spent, inside the transaction; returns how the run is admitted, or raises to
                refuse.
            announce: Of the audit log.

        Raises:
            ProtocolError: ``replay-mismatch`` if the round was reserved for another request or its reply is
                no longer kept; ``plan-changed`` if the run began under another plan.
            StorageError: If the disk refuses.
        """
        with self._transaction() as database:
            row = database.execute(
                "SELECT id, request_digest || store_digest, key, reply FROM releases WHERE run = ? AND round = ?",
                (request.run, request.round),
            ).fetchone()
            if row:
                found = _existing(row, request)
                _announce(database, announce, "resumed" if found.reply is None else "replayed")
                return found
            self._refuse_changed_plan(database, request)
            _remember(database, check(_spending(database)))
            cursor = database.execute(
                "INSERT INTO releases (run, round, task, store_digest, plan_digest, request_digest, sample_rate,"
                " noise_multiplier, steps, delta, reserved_at, key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    request.run,
                    request.round,
                    request.task,
                    request.store_digest,
                    request.plan_digest,
                    request.digest,
                    request.mechanism.sample_rate,
                    request.mechanism.noise_multiplier,
                    request.mechanism.steps,
                    request.delta,
                    _now(),
                    key,
                ),
            )
            _announce(database, announce, "reserved")
            return Reservation(int(cursor.lastrowid or 0), key, None)

    def commit(self, reservation: Reservation, reply: bytes, announce: Announce | None = None) -> None:
        """Store the reply, erase the key and forget the replies of the run's earlier rounds, all or nothing.

        Raises:
            ProtocolError: If the reservation is not open.
        """
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE releases SET reply = ?, key = NULL, committed_at = ? WHERE id = ? AND committed_at IS NULL",
                (reply, _now(), reservation.release_id),
            ).rowcount
            if changed != 1:
                raise ProtocolError("This release was committed before.", ErrorCode.REPLAY_MISMATCH)
            database.execute(
                "UPDATE releases SET reply = NULL WHERE id != ?"
                " AND run = (SELECT run FROM releases WHERE id = ?) AND reply IS NOT NULL",
                (reservation.release_id, reservation.release_id),
            )
            _announce(database, announce, "released")

    def anchor(self, head: Head) -> None:
        """Remember the audit log's head.

        Raises:
            StorageError: If the disk refuses.
        """
        with self._transaction() as database:
            _anchor(database, head)

    def audit_head(self) -> Head | None:
        """Return the audit log's head at the last act; ``None`` if there never was a log."""
        with self._transaction() as database:
            row = database.execute("SELECT sequence, sha256, size FROM audit_head").fetchone()
        return Head(*row) if row else None

    def spending(self) -> Spending:
        """Return everything reserved or committed, and how its runs were admitted."""
        with self._transaction() as database:
            return _spending(database)

    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Return every reserved or committed mechanism."""
        return tuple(mechanism for _, mechanism in self.spending().releases)

    def plan_of(self, run: str) -> str | None:
        """Return the digest of the plan under which ``run`` began here."""
        with self._transaction() as database:
            row = database.execute("SELECT plan_digest FROM releases WHERE run = ? LIMIT 1", (run,)).fetchone()
            return row[0] if row else None

    def releases(self) -> tuple[Release, ...]:
        """Return all releases in the order in which they were reserved."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT run, round, task, plan_digest, request_digest, sample_rate, noise_multiplier, steps, delta,"
                " reserved_at, committed_at FROM releases ORDER BY id"
            ).fetchall()
        return tuple(
            Release(r[0], r[1], r[2], r[3], r[4], Mechanism(r[5], r[6], r[7]), r[8], r[9], r[10]) for r in rows
        )

    def _migrate(self, database: sqlite3.Connection) -> None:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise StorageError(
                f"{self._path.name} was written by a newer Fedward (ledger version {version}; this one knows "
                f"{_VERSION}). Install that version: this one might forget what was spent."
            )
        while version in _MIGRATIONS:
            database.execute(_MIGRATIONS[version])
            version += 1
            database.execute(f"PRAGMA user_version = {version}")
        if version != _VERSION:
            raise StorageError(f"{self._path.name} is not a privacy ledger, or was emptied. Restore it.")

    def _refuse_changed_plan(self, database: sqlite3.Connection, request: ReleaseRequest) -> None:
        row = database.execute(
            "SELECT 1 FROM releases WHERE run = ? AND plan_digest != ?", (request.run, request.plan_digest)
        ).fetchone()
        if row:
            raise ProtocolError("This run began here under another plan.", ErrorCode.PLAN_CHANGED)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One serialised, durable transaction: synchronous EXTRA makes COMMIT wait for the disk, folder included."""
        try:
            with closing(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)) as database:
                database.execute("PRAGMA synchronous = EXTRA")
                database.execute("PRAGMA secure_delete = ON")
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                except BaseException:
                    if database.in_transaction:  # a full disk ends it by itself
                        database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise StorageError(f"The privacy ledger {self._path.name} cannot be used: {error}.") from error


def _existing(row: tuple[int, str, bytes | None, bytes | None], request: ReleaseRequest) -> Reservation:
    release_id, digest, key, reply = row
    if digest != request.digest + request.store_digest:
        raise ProtocolError(
            "This round was reserved here for another request or other data.", ErrorCode.REPLAY_MISMATCH
        )
    if key is None and reply is None:
        raise ProtocolError("This round's reply is no longer kept.", ErrorCode.REPLAY_MISMATCH)
    return Reservation(release_id, key, reply)


def _announce(database: sqlite3.Connection, announce: Announce | None, act: str) -> None:
    if announce:
        _anchor(database, announce(act))


def _anchor(database: sqlite3.Connection, head: Head) -> None:
    database.execute(
        "INSERT OR REPLACE INTO audit_head (id, sequence, sha256, size) VALUES (1, ?, ?, ?)",
        (head.sequence, head.sha256, head.size),
    )


def _remember(database: sqlite3.Connection, admission: Admission) -> None:
    planned = admission.planned
    database.execute(
        "INSERT OR IGNORE INTO admissions (run, rule, sample_rate, noise_multiplier, steps, renyi_order)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            admission.run,
            admission.rule.value,
            planned.sample_rate,
            planned.noise_multiplier,
            planned.steps,
            admission.order,
        ),
    )


def _spending(database: sqlite3.Connection) -> Spending:
    releases = database.execute("SELECT run, sample_rate, noise_multiplier, steps FROM releases ORDER BY id")
    admissions = database.execute(
        "SELECT run, rule, sample_rate, noise_multiplier, steps, renyi_order FROM admissions ORDER BY rowid"
    )
    return Spending(
        tuple((row[0], Mechanism(*row[1:])) for row in releases),
        tuple(Admission(row[0], Rule(row[1]), Mechanism(*row[2:5]), row[5]) for row in admissions),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
