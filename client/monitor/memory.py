"""What a monitor knows across restarts, and the file of its alerts.

A batch of lines is made durable in this order: alerts are appended to their file and flushed, then the state of its
patients and the position in the stream are committed to SQLite in one transaction. A monitor that dies in between
reads the same lines again, comes to the same alerts, and finds their ids in the file: none is lost, none is there
twice. The state holds pseudonyms only; patients' own names are in the file of alerts, which those who treat read.
"""

import json
import os
import secrets
import sqlite3
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from client.intake.pseudonyms import SECRET_BYTES
from client.monitor.alarm import Alarm, Alert
from client.monitor.forecaster import History
from shared.errors import StorageError
from shared.files import storage_errors

_VERSION = 1
_BEGINNING = b'{"id": "'
_NEEDED = {"id", "patient_id", "kind", "stage", "time"}
_TABLES = (
    "CREATE TABLE patients (key BLOB PRIMARY KEY, state TEXT NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
)


@dataclass
class Patient:
    """One patient as the monitor remembers them.

    Attributes:
        history: The last hours.
        alarms: State by rule's kind.
    """

    history: History = field(default_factory=History)
    alarms: dict[str, Alarm] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as JSON."""
        alarms = {kind: asdict(alarm) for kind, alarm in self.alarms.items()}
        return json.dumps({"history": self.history.to_json(), "alarms": alarms}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Patient":
        """Return what :meth:`to_json` wrote."""
        values = json.loads(text)
        alarms = {kind: Alarm(**alarm) for kind, alarm in values["alarms"].items()}
        return cls(History.from_json(values["history"]), alarms)


class Memory:
    """The state of a monitor in one SQLite file, held by one process; without a path, forgotten at the end.

    Raises:
        StorageError: If the file cannot be used, is none of a monitor, or another monitor holds it.
    """

    def __init__(self, path: Path | None) -> None:
        self._name = path.name if path else "the monitor's state"
        if path:
            with storage_errors(path):
                if not path.exists():
                    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        with ExitStack() as opened:
            try:
                self._database = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=1.0)
                opened.callback(self._database.close)
                self._open()
            except sqlite3.OperationalError as error:
                raise StorageError(
                    f"{self._name} cannot be used, or another monitor is using it: {error}. "
                    "Name a file with --state that no other monitor uses."
                ) from error
            except (sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
                raise StorageError(f"{self._name} is no state of this monitor. Name another file.") from error
            opened.pop_all()

    def _open(self) -> None:
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._database.execute("PRAGMA synchronous = EXTRA")
        self._database.execute("BEGIN EXCLUSIVE")
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not self._database.execute("SELECT name FROM sqlite_master").fetchall():
            for table in _TABLES:
                self._database.execute(table)
            self._database.execute(f"PRAGMA user_version = {_VERSION}")
            self._set("secret", secrets.token_hex(SECRET_BYTES))
        elif version != _VERSION:
            raise ValueError
        self._database.execute("COMMIT")
        self.secret = bytes.fromhex(self._get("secret") or "")
        self.position = self._get("position") or ""
        rows = self._database.execute("SELECT key, state FROM patients")
        self.patients: dict[bytes, Patient] = {bytes(key): Patient.from_json(state) for key, state in rows}

    def save(self, changed: Iterable[bytes], position: str) -> None:
        """Make the state of some patients durable, together with the position in the stream.

        Raises:
            StorageError: If the disk refuses.
        """
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(
                "INSERT OR REPLACE INTO patients VALUES (?, ?)",
                [(key, self.patients[key].to_json()) for key in changed],
            )
            if position:
                self._set("position", position)
                self.position = position
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise StorageError(f"{self._name} cannot be written: {error}. Check the disk.") from error

    def _get(self, name: str) -> str | None:
        row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None

    def _set(self, name: str, value: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        self.close()


class AlertFile:
    """Alerts as JSON lines, each once. Made readable by its owner only: it names patients.

    Raises:
        StorageError: If the file cannot be read or written, or holds anything else; it is then left as it is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with storage_errors(path):
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
            with os.fdopen(descriptor, "r+b") as handle:
                *whole, rest = handle.read().split(b"\n")
                ids = [_id_of(line) for line in whole]
                if None in ids or rest[: len(_BEGINNING)] != _BEGINNING[: len(rest)]:
                    raise StorageError(
                        f"{path} is no file of a monitor's alerts and was left as it is. Name a new file with --alerts."
                    )
                if rest:  # a line that was cut off will be written again
                    handle.truncate(handle.tell() - len(rest))
        self._known = set(ids)

    def append(self, alerts: Iterable[Alert]) -> list[Alert]:
        """Write those that are not there yet, wait for the disk, and return them."""
        fresh = [alert for alert in alerts if alert.id not in self._known]
        if fresh:
            with storage_errors(self._path), self._path.open("ab") as handle:
                handle.write(b"".join(json.dumps(alert.to_json()).encode() + b"\n" for alert in fresh))
                handle.flush()
                os.fsync(handle.fileno())
            self._known |= {alert.id for alert in fresh}
        return fresh


def _id_of(line: bytes) -> str | None:
    """Return the id of an alert; None if the line is none."""
    try:
        found = json.loads(line)
        return str(found["id"]) if set(found) >= _NEEDED else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
