"""What holds for every command and every sentence of the three programs."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
import typer
from typer.main import get_command

from client.cli import app as site_app
from client.config import SitePolicy
from server.cli import app as server_app
from server.config import ServerConfig
from shared.plan import RunPlan
from simulations.cli import app as sim_app

ROOT = Path(__file__).resolve().parents[2]
APPS = {"fedward-site": site_app, "fedward-server": server_app, "fedward-sim": sim_app}
SETTINGS = {field.name for kind in (RunPlan, SitePolicy, ServerConfig) for field in fields(kind) if "_" in field.name}
SENTENCE = re.compile(rf"\b(?:{'|'.join(sorted(SETTINGS))})\b")


def commands(name: str, app: typer.Typer) -> Iterator[tuple[str, click.Command]]:
    def walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        children = getattr(command, "commands", {})
        if not children:
            yield path, command
        for child, inner in children.items():
            yield from walk(f"{path} {child}", inner)

    return walk(name, get_command(app))


EVERY = [pair for name, app in APPS.items() for pair in commands(name, app)]


@pytest.mark.parametrize(("path", "command"), EVERY, ids=[path for path, _ in EVERY])
def test_every_command_shows_an_example_of_itself(path: str, command: click.Command) -> None:
    assert f"{path} " in f"{command.epilog} "
    assert command.help


def test_every_program_was_looked_at() -> None:
    assert len(EVERY) >= 30
    assert {path.split()[0] for path, _ in EVERY} == set(APPS)


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the literal parts of what a module raises: what a person may read."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for inner in ast.walk(node.exc):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and " " in inner.value:
                    yield inner.lineno, inner.value


@pytest.mark.parametrize("package", ["client", "server", "shared", "simulations"])
def test_settings_are_called_in_sentences_as_they_are_in_files(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in sentences(path)
        if SENTENCE.search(text)
    ]
    assert found == []
