"""What the operator's commands share: arguments, and how they speak."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

CONSOLE, ERRORS = Console(), Console(stderr=True)
Server = Annotated[Path, typer.Argument(metavar="SRV", help="The aggregator's folder.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]


def say(sentence: str) -> None:
    """Tell the operator."""
    CONSOLE.print(sentence, highlight=False, markup=False, soft_wrap=True)


def warn(sentence: str) -> None:
    """Tell the operator what went wrong."""
    ERRORS.print(f"fedward-server: {sentence}", highlight=False, markup=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Print for scripts."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def exit_with(failure: str | None) -> None:
    """End with a sentence and exit code 1 if there is something to say."""
    if failure is not None:
        warn(failure)
        sys.exit(1)
