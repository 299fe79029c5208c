"""What the steward's commands share: arguments, and how they speak."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from shared.errors import StorageError
from shared.terminal import print_table

if TYPE_CHECKING:
    from client.folder import Folder
    from client.trained import Trust

CONSOLE, ERRORS = Console(soft_wrap=True), Console(stderr=True)
SiteFolder = Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder.")]
TrustingSite = Annotated[
    Path | None, typer.Option("--site", help="Verify the model by the keys that this site trusts.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def open_site(folder: Path) -> "Folder":
    """Open a site's folder. Raises StorageError if it is none."""
    from client.folder import POLICY, Folder

    if not (folder / POLICY).exists():
        raise StorageError(f"There is no site at {folder}. Make one with fedward-site init.")
    return Folder(folder)


def trust_of(site: Path | None) -> "Trust":
    """Return what a site asks of a model: a signature of a key it trusts, and a norm within its rules.

    Raises:
        StorageError: If there is no such site, or its signing.pub is damaged.
        PolicyError: If its site.toml is wrong.
    """
    from client.trained import NO_SITE, Trust

    if site is None:
        return NO_SITE
    opened = open_site(site)
    return Trust(opened.trusted, opened.policy.max_weights_norm)


def doubt(text: str | None) -> None:
    """Tell the steward plainly where nobody answers for a model."""
    if text:
        warn(text)


def say(text: str, style: str | None = None) -> None:
    """Tell the steward."""
    CONSOLE.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def show(parts: Iterable[RenderableType]) -> None:
    """Show the steward sentences and tables, one below another."""
    for part in parts:
        if isinstance(part, Table):
            print_table(CONSOLE, part)
        else:
            CONSOLE.print(part, highlight=False, markup=False)


def warn(text: str) -> None:
    """Tell the steward what is not as it should be."""
    ERRORS.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def print_json(values: object) -> None:
    """Print for scripts."""
    typer.echo(json.dumps(values, indent=1))
