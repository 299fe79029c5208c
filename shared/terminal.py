"""What commands print for people."""

from rich.console import Console
from rich.table import Table

_UNBOUNDED = 100_000


def print_table(console: Console, table: Table) -> None:
    """Print a table: fitted to a terminal, and whole where a file or another program reads it."""
    if console.is_terminal:
        console.print(table)
    else:
        Console(file=console.file, width=_UNBOUNDED).print(table)
