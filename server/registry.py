"""The run registry: what was planned, who took part, what came of each round. The report reads only this."""

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import ErrorCode, PlanError, StorageError
from shared.metrics import Estimate
from shared.operating_point import OperatingPoint
from shared.plan import RunPlan
from shared.tasks.base import Evaluation

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, plan TEXT NOT NULL, status TEXT NOT NULL, failure TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS sites (
    run TEXT NOT NULL, site TEXT NOT NULL, declared_patients INTEGER, refused TEXT, PRIMARY KEY (run, site)
) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
    run TEXT NOT NULL, round INTEGER NOT NULL, seconds REAL NOT NULL, evaluation TEXT,
    aggregated INTEGER NOT NULL, PRIMARY KEY (run, round)
) STRICT;
CREATE TABLE IF NOT EXISTS replies (
    run TEXT NOT NULL, round INTEGER NOT NULL, site TEXT NOT NULL, outcome TEXT NOT NULL,
    PRIMARY KEY (run, round, site)
) STRICT;
CREATE TABLE IF NOT EXISTS notes (
    run TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (run, name)
) STRICT;
"""
OK, LATE, VANISHED, ASKED = "ok", "late", "vanished", "asked"
"""What came of a site in a round: a usable reply, none in time, none since its connection went, none yet."""
NOTHING_SPENT = frozenset(
    {ErrorCode.BAD_PLAN, ErrorCode.UNKNOWN_TASK, ErrorCode.POLICY_REFUSED, ErrorCode.BUDGET_EXCEEDED}
    | {ErrorCode.OUTSIDE_HOURS}
)
"""Refusals that a site makes before it reserves anything."""
RUNNING, COMPLETED, FAILED, STOPPED = "running", "completed", "failed", "stopped"


@dataclass(frozen=True)
class SiteRow:
    """A site as the server knows it; ``refused`` is the code of a refusal."""

    site: str
    declared_patients: int | None
    refused: str | None


@dataclass(frozen=True)
class RoundRow:
    """One attempt at an aggregation; round 0 is the start.

    Attributes:
        replies: What came of each site that was asked: ``ok``, ``late``, ``vanished``, ``asked`` while the round is
            open, an error code of the site's, or why its reply was dropped (:mod:`server.replies`).
        aggregated: Whether there was a quorum, and so a new global model.
    """

    round: int
    seconds: float
    evaluation: Evaluation | None
    replies: Mapping[str, str]
    aggregated: bool = True


@dataclass(frozen=True)
class RunRecord:
    """Everything about one run."""

    run: str
    plan: RunPlan
    status: str
    failure: str | None
    sites: tuple[SiteRow, ...]
    rounds: tuple[RoundRow, ...]
    notes: Mapping[str, Any]

    @property
    def rounds_completed(self) -> int:
        """The number of aggregations."""
        return max((row.round for row in self.rounds if row.aggregated), default=0)

    def rounds_of(self, site: str, up_to: int | None = None) -> int:
        """How many rounds the site must be taken to have spent: all but those it refused beforehand.

        A late or failed reply may come from a site that had reserved the release; its ledger keeps it as spent.
        """
        asked = (row.replies for row in self.rounds if up_to is None or row.round <= up_to)
        return sum(site in replies and replies[site] not in NOTHING_SPENT for replies in asked)


class Registry:
    """The registry in one SQLite file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._transaction() as database:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                database.execute(statement)

    def begin(self, run: str, plan: RunPlan) -> None:
        """Record that ``run`` starts or goes on."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO runs (run, plan, status) VALUES (?, ?, ?)"
                " ON CONFLICT (run) DO UPDATE SET status = excluded.status, failure = NULL",
                (run, plan.to_json(), RUNNING),
            )

    def end(self, run: str, status: str, failure: str | None = None) -> None:
        """Record how ``run`` ended."""
        with self._transaction() as database:
            database.execute("UPDATE runs SET status = ?, failure = ? WHERE run = ?", (status, failure, run))

    def status(self, run: str) -> str | None:
        """Return how ``run`` stands, even where the rest of what is registered is of another version."""
        with self._transaction() as database:
            row = database.execute("SELECT status FROM runs WHERE run = ?", (run,)).fetchone()
        return str(row[0]) if row else None

    def add_site(self, run: str, row: SiteRow) -> None:
        """Record a site's answer to the plan."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO sites (run, site, declared_patients, refused) VALUES (?, ?, ?, ?)",
                (run, row.site, row.declared_patients, row.refused),
            )

    def add_round(self, run: str, row: RoundRow) -> None:
        """Record a round; a round that is done again after a crash replaces its first record."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO rounds (run, round, seconds, evaluation, aggregated) VALUES (?, ?, ?, ?, ?)",
                (run, row.round, row.seconds, _dump(row.evaluation), row.aggregated),
            )
            database.execute("DELETE FROM replies WHERE run = ? AND round = ?", (run, row.round))
            database.executemany(
                "INSERT INTO replies (run, round, site, outcome) VALUES (?, ?, ?, ?)",
                [(run, row.round, site, outcome) for site, outcome in row.replies.items()],
            )

    def replies(self, run: str, number: int) -> dict[str, str]:
        """Return what is recorded so far of each site that was asked in a round."""
        with self._transaction() as database:
            return dict(
                database.execute(
                    "SELECT site, outcome FROM replies WHERE run = ? AND round = ?", (run, number)
                ).fetchall()
            )

    def rounds_by_site(self, run: str, up_to: int) -> dict[str, int]:
        """Return how many rounds up to one each site must be taken to have spent: ``RunRecord.rounds_of`` of all."""
        marks = ", ".join("?" * len(NOTHING_SPENT))
        with self._transaction() as database:
            return dict(
                database.execute(
                    "SELECT site, COUNT(*) FROM replies WHERE run = ? AND round <= ?"  # noqa: S608 - marks only
                    f" AND outcome NOT IN ({marks}) GROUP BY site",
                    (run, up_to, *sorted(NOTHING_SPENT)),
                ).fetchall()
            )

    def add_note(self, run: str, name: str, value: Any) -> None:
        """Attach a JSON value: baselines, timings, where the data came from."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO notes (run, name, value) VALUES (?, ?, ?)",
                (run, name, json.dumps(finite(value), allow_nan=False)),
            )

    def read(self, run: str) -> RunRecord:
        """Return all that is known of ``run``.

        Raises:
            StorageError: If there is no such run.
        """
        try:
            return self._read(run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"The run registry {self._path} is damaged.") from error
        except PlanError as error:
            raise StorageError(
                f"{run} was made by another version and cannot be read by this one ({error}) Go on with the version "
                f"that made it, or move {self._path.parent} away."
            ) from error

    def _read(self, run: str) -> RunRecord:
        with self._transaction() as database:
            head = database.execute("SELECT plan, status, failure FROM runs WHERE run = ?", (run,)).fetchone()
            if head is None:
                raise StorageError(f"The registry {self._path} holds no run called {run}.")
            sites = database.execute(
                "SELECT site, declared_patients, refused FROM sites WHERE run = ? ORDER BY site", (run,)
            ).fetchall()
            rounds = database.execute(
                "SELECT round, seconds, evaluation, aggregated FROM rounds WHERE run = ? ORDER BY round", (run,)
            ).fetchall()
            replies: dict[int, dict[str, str]] = {}
            for number, site, outcome in database.execute(
                "SELECT round, site, outcome FROM replies WHERE run = ? ORDER BY round, site", (run,)
            ):
                replies.setdefault(number, {})[site] = outcome
            notes = database.execute("SELECT name, value FROM notes WHERE run = ?", (run,)).fetchall()
        return RunRecord(
            run=run,
            plan=RunPlan.from_json(head[0]),
            status=head[1],
            failure=head[2],
            sites=tuple(SiteRow(*row) for row in sites),
            rounds=tuple(RoundRow(r[0], r[1], _parse(r[2]), replies.get(r[0], {}), bool(r[3])) for r in rounds),
            notes={name: json.loads(value) for name, value in notes},
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=30.0, isolation_level=None)) as database:
                database.execute("PRAGMA synchronous = EXTRA")
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                except BaseException:
                    if database.in_transaction:  # a full disk ends it by itself
                        database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise StorageError(f"The run registry {self._path} cannot be used: {error}.") from error


def finite(value: Any) -> Any:
    """Return ``value`` as plain JSON: dataclasses as objects, what is not finite as ``null``."""
    if isinstance(value, Estimate):
        return finite(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _dump(evaluation: Evaluation | None) -> str | None:
    if evaluation is None:
        return None
    parts: dict[str, Any] = {
        "metrics": evaluation.metrics,
        "by_group": evaluation.by_group,
        "details": evaluation.details,
    }
    if evaluation.operating_point is not None:
        parts["operating_point"] = asdict(evaluation.operating_point)
    return json.dumps(finite(parts), allow_nan=False)


def _parse(text: str | None) -> Evaluation | None:
    if text is None:
        return None
    parts = json.loads(text)
    metrics = {name: _metric(value) for name, value in parts["metrics"].items()}
    groups = {
        group: {name: math.nan if value is None else value for name, value in values.items()}
        for group, values in parts["by_group"].items()
    }
    return Evaluation(metrics, groups, parts["details"], OperatingPoint.parse(parts.get("operating_point")))


def _metric(value: Any) -> float | Estimate:
    if isinstance(value, dict):
        return Estimate(**{name: math.nan if part is None else part for name, part in value.items()})
    return math.nan if value is None else float(value)
