"""How the steward's terminal shows the books: the answer first, then a line a run. Pure; 80 columns are enough."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from client.budget import Rule
from shared.terminal import ago, plain_table

_DIGITS = 12
_ADMITTED = {Rule.PLD: "whole", Rule.FILTER: "by round"}
_UNKNOWN = "unknown"


def budget_line(books: Mapping[str, Any]) -> str:
    """Return what is spent of the cap and what is left."""
    spent, left, most = (bound(books[key]) for key in ("epsilon", "remaining", "max_epsilon"))
    return f"epsilon {spent} is spent and {left} of max-epsilon {most} left, at max-delta {books['max_delta']:g}"


def ledger_view(books: Mapping[str, Any], now: datetime) -> Iterator[RenderableType]:
    """Yield the budget, what a run admitted whole means for it, and a table of the runs.

    Args:
        books: What :func:`client.overview.ledger_of` returns.
        now: With a time zone.
    """
    yield budget_line(books)
    if any(run["admitted"] == Rule.PLD for run in books["runs"]):
        yield "A run was admitted whole, as a fixed plan: all its rounds count as spent, also those that never run."
    runs = _by_run(books["releases"])
    if not runs:
        yield "Nothing was ever released."
        return
    admitted = {run["run"]: run for run in books["runs"]}
    servers = {name.rpartition("/")[0] for name in runs}
    table = plain_table("run", "task", "rounds", "steps", "epsilon", "admitted", "last round")
    for name, rows in runs.items():
        plan = admitted.get(name)
        steps = sum(row["steps"] for row in rows)
        table.add_row(
            _short(name) if len(servers) > 1 else name.rpartition("/")[2],
            rows[0]["task"],
            _rounds(rows),
            f"{steps}/{plan['planned_steps']}" if plan else str(steps),
            bound(plan["planned_epsilon"]) if plan else _UNKNOWN,
            _ADMITTED[Rule(plan["admitted"])] if plan else _UNKNOWN,
            ago(_time(rows[-1]["reserved_at"]), now),
        )
    yield table
    yield "Steps: done of planned. Epsilon: of the run's whole plan alone. Every round: --rounds."


def rounds_view(books: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the budget, and of each run what holds for all its rounds and a row for each."""
    yield budget_line(books)
    for name, rows in _by_run(books["releases"]).items():
        first = rows[0]
        table = plain_table("round", "steps", "reserved", "left the hospital")
        for row in rows:
            left = row["committed_at"] or "not (yet): counts as spent"
            table.add_row(str(row["round"]), str(row["steps"]), row["reserved_at"], left)
        yield f"\n{name}: {first['task']}"
        noise = f"noise-multiplier {first['noise_multiplier']:.4g}, sample-rate {first['sample_rate']:.4g}"
        yield f"{noise}, delta {first['delta']:.4g}"
        yield table


def status_view(state: Mapping[str, Any], now: datetime) -> Iterator[RenderableType]:
    """Yield the site at a glance: budget, daemon, stores, audit log, kernels, and last the rules.

    Args:
        state: What :func:`client.overview.status_of` returns.
        now: With a time zone.
    """
    budget, audit = state["budget"], state["audit"]
    rows = [("budget", budget_line(budget)), ("", f"{budget['releases']} releases; more: fedward-site ledger")]
    rows.append(("daemon", _daemon(state["daemon"], now)))
    rows += _headed("stores", [f"{kind}: {_store(store)}" for kind, store in state["stores"].items()] or ["none yet"])
    lines = f"whole, {audit['lines']} lines" if audit["ok"] else "BROKEN: run fedward-site audit verify"
    rows.append(("audit log", f"{lines}, head {audit['head'][:_DIGITS]}…"))
    kernels = [f"{task}: {verdict}" for task, verdict in state["selftest"].items()]
    rows += _headed("kernels", kernels or ["not tested yet: fedward-site selftest"])
    rows += _headed("rules", [f"{key} = {_text(value)}" for key, value in state["policy"].items()])
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    yield table


def bound(value: float | None) -> str:
    """Return an epsilon as text; JSON has no infinity, so it comes as ``None``."""
    return "unbounded" if value is None else f"{value:.4g}"


def _by_run(releases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for release in releases:
        runs.setdefault(release["run"], []).append(release)
    return runs


def _rounds(rows: list[dict[str, Any]]) -> str:
    waiting = sum(row["committed_at"] is None for row in rows)
    return f"{len(rows)}, {waiting} open" if waiting else str(len(rows))


def _short(run: str) -> str:
    """Return a run's name with four digits of its server, which tell two servers' runs of one name apart."""
    server, _, name = run.rpartition("/")
    return f"{name} @{server[:4]}" if server else name


def _time(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp)


def _daemon(health: Mapping[str, Any], now: datetime) -> str:
    if not health["answers"]:
        return "does not answer: start it with fedward-site start"
    contact, number = health.get("last_contact"), health.get("round")
    parts = ["connected" if health.get("connected") else f"not connected ({health.get('fault') or 'no fault known'})"]
    if contact:
        parts.append(f"the server answered {ago(datetime.fromtimestamp(contact, now.tzinfo), now)}")
    parts.append(f"last round {number}" if number is not None else "no round yet")
    return ", ".join(parts)


def _store(store: Mapping[str, Any]) -> str:
    if not store["usable"]:
        return "cannot be read; run intake again"
    return f"{store['patients']} patients, digest {store['digest'][:_DIGITS]}…"


def _headed(title: str, lines: list[str]) -> list[tuple[str, str]]:
    return [(title if number == 0 else "", line) for number, line in enumerate(lines)]


def _text(value: object) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value) if value not in ("", None) else "none"
