"""What the operator's commands show of sites and runs."""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from server.checkpoints import latest_checkpoint
from server.config import ServerConfig
from server.findings import Findings
from server.registry import ASKED, COMPLETED, FAILED, OK, RUNNING, RoundRow, RunRecord, finite
from server.report import write_report
from server.runs import FAILURE_NOTE, RunFolder, worker
from server.summary import write_summary
from server.warnings import warnings_of
from shared.errors import FederationError, StorageError
from shared.files import storage_errors
from shared.tasks.registry import find_task
from shared.telemetry import health_of
from shared.terminal import plain_table

_POLL_S = 0.5
_SHOWN_ROUNDS = 15
_UNREADABLE_FOR_S = 60.0
UNREADABLE = "unreadable"
_MEANT = {ASKED: "no reply yet"}


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A run's state, as ``status --json`` shows it; of a run that cannot be read only name, status and failure."""

    run: str
    task: str | None = None
    status: str
    failure: str | None = None
    rounds_completed: int | None = None
    rounds: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    metric: str | None = None
    value: float | None = None
    plan_digest: str | None = None


def connected_sites(config: ServerConfig) -> frozenset[str] | None:
    """Return the names of the sites connected to the running service; ``None`` if it does not answer or is not well."""
    state = health_of(config.health_port)
    if not state.get("ok"):
        return None
    return frozenset(filter(None, state.get("connected", "").split(",")))


def follow(folder: RunFolder, console: Console) -> str | None:
    """Follow a run to its end, through restarts of everything; return why it did not complete, or ``None``.

    On a terminal a table of rounds grows; elsewhere each round is a line.
    """
    shown = -1
    with Live(console=console, refresh_per_second=4) if console.is_terminal else nullcontext() as live:
        while True:
            record = _patiently(folder)
            if isinstance(live, Live):
                live.update(rounds_table(record))
            else:
                for row in record.rounds:
                    if row.round > shown and row.aggregated:
                        console.print(_line(row, record), highlight=False, markup=False, soft_wrap=True)
                        shown = row.round
            if record.status != RUNNING and worker(folder.path) is None:
                # Its ServerApp has left: what it had to say of a failure is written.
                break
            time.sleep(_POLL_S)
    why = explanation(_patiently(folder))
    for sentence in warnings_about(folder) if why is None else ():
        console.print(f"warning: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return why


def warnings_about(folder: RunFolder) -> list[str]:
    """Return what a reader must know of a run before its figures, the gravest first."""
    record, checkpoint = _patiently(folder), latest_checkpoint(folder.path / "checkpoints")
    return [warning.text for warning in warnings_of(Findings(record, checkpoint))]


def explanation(record: RunRecord) -> str | None:
    """Say why a run that has ended did not complete; ``None`` if it did."""
    if record.status == COMPLETED:
        return None
    done = f"after {record.rounds_completed} of {record.plan.rounds} rounds"
    if record.status == FAILED:
        why = record.notes.get(FAILURE_NOTE) or "The log says more: fedward-server logs"
        return f"{record.run} failed {done} ({record.failure}): {why}"
    return f"{record.run} was {record.status} {done}. Go on with: fedward-server resume"


def overview(folder: RunFolder) -> dict[str, Any]:
    """Return a run's state as plain JSON values; of one that cannot be read, why."""
    try:
        record = folder.record()
        metric = find_task(record.plan.task).metric
    except FederationError as error:
        return asdict(Overview(run=folder.name, status=UNREADABLE, failure=str(error)))
    rounds = record.rounds_completed
    evaluations = [row.evaluation for row in record.rounds if row.evaluation and row.aggregated]
    state = Overview(
        run=record.run,
        task=record.plan.task,
        status=record.status,
        failure=explanation(record) if record.status == FAILED else None,
        rounds_completed=rounds,
        rounds=record.plan.rounds,
        epsilon=record.plan.stated_epsilon(rounds),
        delta=record.plan.delta,
        metric=metric,
        value=evaluations[-1].value(metric) if evaluations else None,
        plan_digest=record.plan.digest,
    )
    return {name: finite(value) for name, value in asdict(state).items()}


def runs_table(rows: list[dict[str, Any]]) -> Table:
    """Return the runs as a table."""
    table = plain_table("run", "task", "status", "rounds", "epsilon so far", "held-out")
    for row in rows:
        if row["status"] == UNREADABLE:
            table.add_row(row["run"], "-", UNREADABLE, "-", "-", "-")
            continue
        value = "-" if row["value"] is None else f"{row['metric']} {row['value']:.3f}"
        epsilon = "none" if row["epsilon"] is None else f"{row['epsilon']:.2f}"
        done = f"{row['rounds_completed']}/{row['rounds']}"
        table.add_row(row["run"], row["task"], row["status"], done, epsilon, value)
    return table


def rounds_table(record: RunRecord) -> Table:
    """Return a run's latest rounds as a table. A round that is open reads as one, and not as one that failed."""
    table = plain_table("round", "replies", "held-out", "time", "remarks")
    table.title = f"{record.run}: {record.status}"
    for row in record.rounds[-_SHOWN_ROUNDS:]:
        number = f"{row.round}/{record.plan.rounds}"
        if _is_open(row, record):
            table.add_row(number, "-", "-", "-", f"open: waiting for {', '.join(row.replies)}")
        else:
            table.add_row(number, _replies(row), _value(row, record), f"{row.seconds:.1f} s", _remarks(row))
    return table


def _is_open(row: RoundRow, record: RunRecord) -> bool:
    """Whether a round has begun and has not ended: what its sites answered is registered when it ends."""
    return record.status == RUNNING and not row.aggregated and ASKED in row.replies.values()


def _remarks(row: RoundRow) -> str:
    missing = [f"{site} ({_MEANT.get(word, word)})" for site, word in row.replies.items() if word != OK]
    few = [] if row.aggregated else ["interrupted" if ASKED in row.replies.values() else "too few replies"]
    return "; ".join([*few, *([f"without {', '.join(missing)}"] if missing else [])])


def write_results(folder: RunFolder, out: Path) -> None:
    """Write ``summary.json`` and ``report.html`` into ``out``.

    Raises:
        StorageError: If they cannot be written.
    """
    record, checkpoint = folder.record(), latest_checkpoint(folder.path / "checkpoints")
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_summary(out / "summary.json", record, checkpoint)
    write_report(out / "report.html", record, checkpoint)


def _patiently(folder: RunFolder) -> RunRecord:
    """Read the registry, through a disk that is full for a while."""
    end = time.monotonic() + _UNREADABLE_FOR_S
    while True:
        try:
            return folder.record()
        except StorageError:
            if time.monotonic() > end:
                raise
            time.sleep(_POLL_S)


def _line(row: RoundRow, record: RunRecord) -> str:
    return (
        f"round {row.round}/{record.plan.rounds}  replies {_replies(row)}  {_value(row, record)}  {row.seconds:.1f} s"
    )


def _replies(row: RoundRow) -> str:
    return f"{sum(word == OK for word in row.replies.values())}/{len(row.replies)}" if row.replies else "start"


def _value(row: RoundRow, record: RunRecord) -> str:
    metric = find_task(record.plan.task).metric
    return f"{metric} {row.evaluation.value(metric):.3f}" if row.evaluation else "not validated"
