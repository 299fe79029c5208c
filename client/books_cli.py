"""The steward's commands that look into the books: ``status``, ``ledger``, ``audit``."""

import json
from typing import Annotated

import typer
from rich.table import Table

from client.console import CONSOLE, AsJson, SiteFolder, open_site, print_json, say, warn
from shared.terminal import print_table


def status(
    site: SiteFolder,
    as_json: AsJson = False,
    healthy: Annotated[bool, typer.Option("--healthy", help="Only an exit status: 0 if the daemon is well.")] = False,
) -> None:
    """Show rules, store, budget, audit log and whether the daemon answers."""
    from client.overview import daemon_health, status_of

    if healthy:
        raise typer.Exit(0 if daemon_health(site, open_site(site).policy.health_port)["ok"] else 1)
    state = status_of(open_site(site))
    if as_json:
        print_json(state)
        return
    table = Table(show_header=False, box=None)
    for part, facts in state.items():
        for key, value in facts.items():
            table.add_row(part, key, _text(value))
    print_table(CONSOLE, table)


def ledger(site: SiteFolder, as_json: AsJson = False) -> None:
    """Show every release this hospital ever made, and what is left of its privacy budget."""
    from client.overview import ledger_of

    books = ledger_of(open_site(site))
    if as_json:
        print_json(books)
        return
    table = Table(*("run", "round", "task", "sample rate", "noise", "steps", "delta", "reserved", "left the hospital"))
    for row in books["releases"]:
        keys = ("run", "round", "task", "sample_rate", "noise_multiplier", "steps", "delta", "reserved_at")
        table.add_row(*(_text(row[key]) for key in keys), row["committed_at"] or "not (yet)")
    print_table(CONSOLE, table)
    spent, left, most = (_bound(books[key]) for key in ("epsilon", "remaining", "max_epsilon"))
    say(f"epsilon {spent} is spent and {left} of max-epsilon {most} left, at max-delta {books['max_delta']:g}")


def audit_verify(site: SiteFolder, as_json: AsJson = False) -> None:
    """Check the audit log: edits, gaps, a cut end, and its agreement with the ledger. Exit code 1 if it is broken."""
    from client.audit_check import verify

    result = verify(open_site(site).audit)
    facts = {"problems": list(result.problems), "remarks": list(result.remarks)}
    if as_json:
        print_json(
            {"ok": not result.problems, **facts, "lines": result.head.sequence, "head": result.head.sha256},
        )
    else:
        for remark in result.remarks:
            say(remark)
        for problem in result.problems:
            warn(problem)
        if not result.problems:
            say(f"Whole: {result.head.sequence} lines, and they agree with the ledger. Head {result.head.sha256}")
    if result.problems:
        raise typer.Exit(1)


def audit_show(
    site: SiteFolder, last: Annotated[int | None, typer.Option(min=1, help="Only so many lines from the end.")] = None
) -> None:
    """Print the audit log as JSON lines, without its hashes."""
    chain, _, _ = open_site(site).audit.read()
    for entry in chain.entries[-last if last else 0 :]:
        line = {"sequence": entry.sequence, "time": entry.time, "event": entry.event, **entry.fields}
        typer.echo(json.dumps(line))


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to the steward's."""
    app.command(epilog="Example:  fedward-site status H1 --json")(status)
    app.command(epilog="Example:  fedward-site ledger H1 --json")(ledger)
    audit = typer.Typer(add_completion=False, no_args_is_help=True, help="Check and read the audit log.")
    audit.command(name="verify", epilog="Example:  fedward-site audit verify H1")(audit_verify)
    audit.command(name="show", epilog="Example:  fedward-site audit show H1 --last 20")(audit_show)
    app.add_typer(audit, name="audit")


def _bound(value: float | None) -> str:
    """Return an epsilon as text; JSON has no infinity, so it comes as ``None``."""
    return "unbounded" if value is None else _text(value)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
