"""The audit log: what was asked of this hospital, what it decided, what it released, at which epsilon.

Every line is on the disk *before* the act it announces, and an act whose line cannot be written does not happen.
The chain of hashes (``client.chain``) shows an edit and a gap; the head of the chain, which the ledger keeps and
moves in the transaction of each act, shows a cut at the end and a ledger put back to an older copy.

One train request, the lines ``asked`` and ``reserved``, then ``released``; whatever dies in between is harmless:

| died after                         | log and ledger             | next time the log is opened               |
| ---------------------------------- | -------------------------- | ----------------------------------------- |
| part of a line                     | a torn end                 | ``recovered`` accounts for the torn bytes |
| ``asked``                          | log one line ahead         | ``recovered``: nothing was done           |
| ``reserved``, before the ledger's  | log at most two ahead      | ``recovered``: nothing was reserved       |
| the ledger's reservation           | they agree                 | the repeated request is ``resumed``       |
| ``released``, before the ledger's  | log one line ahead         | ``recovered``: nothing left; ``resumed``  |
| the ledger's commit                | they agree                 | the repeated request is ``replayed``      |

A line ``reserved`` names the mechanism and, as ``noise``, where its noise comes from. As ``rung`` and ``threads`` it
says on which kernels its private passes run (:mod:`shared.dp.rungs`).

So a log is at most one ``asked`` and one more line ahead of its ledger. Further ahead, the ledger is an old copy.

What this does not show: somebody who rewrites both files together, or restores both from one back-up. Note the head
that ``fedward-site audit verify`` prints outside this machine, and compare.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.chain import MAX_LINE_BYTES, MAX_TORN_BYTES, RECOVERED, Chain, Entry, Head, encode, read_chain, torn_fields
from client.ledger import Ledger, Release
from shared.errors import ErrorCode, FederationError, StorageError
from shared.files import storage_errors, sync_directory

ASKED = "asked"
CHACHA20, SEEDED, NOISELESS = "chacha20", "seeded", "none"
"""What a line ``reserved`` says of the release's noise: from a secret key, from a simulation's seed, or none."""


class AuditSession:
    """The log, held by one writer: from what is asked to what is decided."""

    def __init__(self, descriptor: int, confirmed: Head, ledger: Ledger) -> None:
        self._descriptor, self._ledger = descriptor, ledger
        self._end = self._confirmed = confirmed
        self._announced = False

    @property
    def announced(self) -> bool:
        """Whether the last line announces an act, which the ledger confirms or not."""
        return self._announced

    def note(self, event: str, **fields: Any) -> Head:
        """Append a line durably.

        Raises:
            StorageError: If the disk refuses.
        """
        self._end = _append(self._descriptor, self._end, event, fields)
        return self._end

    def announce(self, act: str, **fields: Any) -> Head:
        """Append the line of an act whose transaction the ledger is about to commit, with the head returned here."""
        self._announced = True
        return self.note(act, **fields)

    def close(self) -> None:
        """Have the ledger remember the lines that announce no act of its own."""
        if not self._announced and self._end != self._confirmed:
            self._ledger.anchor(self._end)


class AuditLog:
    """The log in one file, and its head in the ledger. Processes may share it: one writes at a time."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._path, self._ledger = path, ledger

    @classmethod
    def create(cls, path: Path, ledger: Ledger) -> "AuditLog":
        """Begin a log; one that is there is left as it is.

        Raises:
            StorageError: If the folder cannot be written, or the ledger knows of a log that is gone.
        """
        log = cls(path, ledger)
        if path.exists():
            return log
        if ledger.audit_head():
            raise StorageError(f"The audit log {path.name} is missing; its ledger knows it. Restore it.")
        with storage_errors(path):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            sync_directory(path.parent)
        log.note("created")
        return log

    @contextmanager
    def session(self) -> Iterator[AuditSession]:
        """Hold the log and append to it. What was noted stands, however the block ends.

        Raises:
            StorageError: If the log is missing, does not agree with its ledger, or cannot be written.
        """
        with self._held(fcntl.LOCK_EX) as descriptor:
            session = AuditSession(descriptor, self._recover(descriptor), self._ledger)
            try:
                yield session
            except Exception:
                session.close()
                raise
            session.close()

    @contextmanager
    def decision(self, **asked: Any) -> Iterator[AuditSession]:
        """Hold the log from what is asked to what is decided; an error is noted as the refusal it becomes."""
        with self.session() as session:
            session.note(ASKED, **asked)
            try:
                yield session
            except Exception as error:
                if not session.announced:
                    session.note("refused", **asked, code=_code(error))
                raise

    @contextmanager
    def failures(self, event: str, **asked: Any) -> Iterator[None]:
        """Note an error that leaves the block as ``event`` with its code, never its text."""
        try:
            yield
        except Exception as error:
            self.note(event, **asked, code=_code(error))
            raise

    def note(self, event: str, **fields: Any) -> None:
        """Append one line that announces no act of the ledger's. Raises StorageError."""
        with self.session() as session:
            session.note(event, **fields)

    def read(self) -> tuple[Chain, Head, tuple[Release, ...]]:
        """Return the whole log as it is, and the head and the releases that the ledger holds. Raises StorageError."""
        with self._held(fcntl.LOCK_SH) as descriptor, storage_errors(self._path):
            data = _read(descriptor, 0, os.fstat(descriptor).st_size)
            return read_chain(data), self._ledger.audit_head() or Head(), self._ledger.releases()

    def _recover(self, descriptor: int) -> Head:
        """Return the chain's end after checking the log against its ledger and settling what a crash left."""
        head = self._ledger.audit_head() or Head()
        with storage_errors(self._path):
            size = os.fstat(descriptor).st_size
            before = _read(descriptor, max(0, head.size - MAX_LINE_BYTES), head.size)
            tail = _read(descriptor, head.size, min(size, head.size + 2 * MAX_TORN_BYTES))
        line = before[:-1].rpartition(b"\n")[2]
        if size < head.size or (head.size and hashlib.sha256(line).hexdigest() != head.sha256):
            raise StorageError(f"The audit log {self._path.name} was cut off or changed. {_WHAT_NOW}")
        chain = read_chain(tail, head)
        if chain.faults or len(chain.torn) > MAX_TORN_BYTES or not may_be_unconfirmed(chain.entries):
            raise StorageError(f"The privacy ledger is older than the audit log {self._path.name}. {_WHAT_NOW}")
        if not tail:
            return head
        end = chain.entries[-1].head if chain.entries else head
        if chain.torn or chain.entries[-1].event != RECOVERED:
            end = self._account_for(descriptor, end, chain)
        self._ledger.anchor(end)
        return end

    def _account_for(self, descriptor: int, end: Head, chain: Chain) -> Head:
        """Append the line that says what a crash left: lines without their act, and torn bytes."""
        unconfirmed = sum(entry.event != RECOVERED for entry in chain.entries)
        closing = b"\n" if chain.torn and not chain.torn.endswith(b"\n") else b""
        torn = chain.torn + closing
        start = Head(end.sequence, end.sha256, end.size + len(torn))
        return _append(descriptor, start, RECOVERED, {"unconfirmed": unconfirmed, **torn_fields(torn)}, closing)

    @contextmanager
    def _held(self, how: int) -> Iterator[int]:
        access = os.O_RDONLY if how == fcntl.LOCK_SH else os.O_RDWR | os.O_APPEND
        try:
            descriptor = os.open(self._path, access | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StorageError(
                f"The audit log {self._path.name} cannot be opened: {error.strerror}. Without it nothing is released."
            ) from error
        try:
            fcntl.flock(descriptor, how)
            yield descriptor
        finally:
            os.close(descriptor)


_WHAT_NOW = (
    "Nothing is released until it is settled: see 'fedward-site audit verify', find out who touched the files, and "
    "restore both together."
)


def may_be_unconfirmed(entries: tuple[Entry, ...]) -> bool:
    """Whether a crash can have left just these lines ahead of the ledger."""
    events = [entry.event for entry in entries if entry.event != RECOVERED]
    return len(events) <= 1 or (len(events) == 2 and events[0] == ASKED)


def _append(descriptor: int, end: Head, event: str, fields: dict[str, Any], closing: bytes = b"") -> Head:
    line = encode(end, datetime.now(UTC).isoformat(timespec="milliseconds"), event, fields)
    if len(line) > MAX_LINE_BYTES:
        raise StorageError(f"A line of the audit log would have {len(line)} bytes.")
    rest = closing + line
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        raise StorageError(f"The audit log cannot be written: {error.strerror}. Nothing is released.") from error
    return Head(end.sequence + 1, hashlib.sha256(line[:-1]).hexdigest(), end.size + len(line))


def _read(descriptor: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop and (part := os.pread(descriptor, stop - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _code(error: Exception) -> str:
    return (error.code if isinstance(error, FederationError) else ErrorCode.INTERNAL).value
