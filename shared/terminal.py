"""What commands print for people."""

from datetime import datetime

from rich.console import Console
from rich.table import Table

_UNBOUNDED = 100_000
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_LONG_AGO_S = 30 * 86_400


def print_table(console: Console, table: Table) -> None:
    """Print a table: fitted to a terminal, and whole where a file or another program reads it."""
    if console.is_terminal:
        console.print(table)
    else:
        Console(file=console.file, width=_UNBOUNDED).print(table)


def plain_table(*headings: str) -> Table:
    """Return an empty table with these columns and no lines between them, for narrow terminals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold", min_width=len(heading))
    return table


def ago(moment: datetime, now: datetime) -> str:
    """Return how long ago a moment was, ``3 min ago``; of one more than 30 days ago its date.

    Both times know their zones. A moment that lies ahead, by another clock, is ``now``.
    """
    seconds = (now - moment).total_seconds()
    if seconds >= _LONG_AGO_S:
        return f"{moment:%Y-%m-%d}"
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return "now"
