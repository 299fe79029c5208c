"""The steward's commands that look into the books: ``status``, ``ledger``, ``audit``."""

import json
from datetime import UTC, datetime
from typing import Annotated

import typer

from client.console import AsJson, SiteFolder, open_site, print_json, say, show, warn


def status(
    site: SiteFolder,
    as_json: AsJson = False,
    healthy: Annotated[bool, typer.Option("--healthy", help="Only an exit status: 0 if the daemon is well.")] = False,
) -> None:
    """Show the budget, whether the daemon answers, stores, audit log and rules."""
    from client.books_view import status_view
    from client.overview import daemon_health, status_of

    if healthy:
        raise typer.Exit(0 if daemon_health(site, open_site(site).policy.health_port)["ok"] else 1)
    state = status_of(open_site(site))
    if as_json:
        print_json(state)
        return
    show(status_view(state, datetime.now(UTC)))


def ledger(
    site: SiteFolder,
    as_json: AsJson = False,
    rounds: Annotated[bool, typer.Option("--rounds", help="Every release, a row for each round.")] = False,
) -> None:
    """Show what is spent and left of the privacy budget, and every run that this hospital ever took part in."""
    from client.books_view import ledger_view, rounds_view
    from client.overview import ledger_of

    books = ledger_of(open_site(site))
    if as_json:
        print_json(books)
    else:
        show(rounds_view(books) if rounds else ledger_view(books, datetime.now(UTC)))


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
    app.command(epilog="Examples:\n\n  fedward-site ledger H1\n\n  fedward-site ledger H1 --rounds")(ledger)
    audit = typer.Typer(add_completion=False, no_args_is_help=True, help="Check and read the audit log.")
    audit.command(name="verify", epilog="Example:  fedward-site audit verify H1")(audit_verify)
    audit.command(name="show", epilog="Example:  fedward-site audit show H1 --last 20")(audit_show)
    app.add_typer(audit, name="audit")
