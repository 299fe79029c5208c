"""What the documents name exists: tests, files, the commands of the programs and their options; figures agree."""

import importlib
import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import click
import pytest
from typer.main import get_command

from client.cli import app as site_app
from server.cli import app as server_app
from simulations.cli import app as sim_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
APPS = {"fedward-site": site_app, "fedward-server": server_app, "fedward-sim": sim_app}
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
LINE = re.compile(r"\b(?P<program>fedward-(?:site|server|sim)|python -m simulations\.\w+) (?P<rest>.*)")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert [name for name in sorted(tests) if f"def {name}(" not in TESTS] == []
    files = set(re.findall(r"`((?:client|server|shared|simulations|tests|docker|docs)/[\w./-]+\.\w+)`", text))
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    assert [link for link in sorted(links) if not (page.parent / link).exists()] == []
    used = set(re.findall(r"\b(fedward-(?:site|server|sim)) ([a-z][a-z-]*)", text))
    known = {(name, command) for name, app in APPS.items() for command in getattr(get_command(app), "commands", {})}
    assert sorted(used - known) == []


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_options_of_a_documented_command_are_that_commands(page: Path) -> None:
    unknown = [
        f"{program} {rest}: {option}"
        for program, rest in command_lines(page.read_text())
        for option in re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", rest)
        if option not in options_of(program, rest.split())
    ]
    assert unknown == []


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("Try `fedward-site audit verify --surprise`.", "--surprise"),
        ("    fedward-sim run --epsilon 4 \\\n        --surprise 2\n", "--surprise"),
        ("    .venv/bin/fedward-server init srv --wait   # --surprise\n", "--wait"),
        ("```\nx\n```\n`a` and `fedward-site start --surprise`", "--surprise"),
        ("```\nfedward-site start site [--surprise]\n```\n", "--surprise"),
        ("    python -m simulations.step_cost STORE --task x --surprise\n", "--surprise"),
    ],
)
def test_an_option_that_a_command_lacks_is_found(tmp_path: Path, text: str, unknown: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=rf": {unknown}'"):
        test_the_options_of_a_documented_command_are_that_commands(page)


def command_lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield program and arguments of every command in a block or between backticks, without what a shell ignores."""
    whole = re.sub(r"\\\n\s*", " ", text)
    prose, blocks = re.sub(r"^```.*?^```", "", whole, flags=re.DOTALL | re.MULTILINE), r"^```.*?\n(.*?)^```"
    fenced = "".join(re.findall(blocks, whole, re.DOTALL | re.MULTILINE)).splitlines()
    indented = re.findall(r"^ {4,}(\S.*)$", prose, re.MULTILINE)
    pieces = [*re.findall(r"`([^`]+)`", prose), *indented, *fenced]
    for piece in pieces:
        for found in LINE.finditer(" ".join(piece.split())):
            yield found["program"], re.split(r" #| \| | && ", found["rest"])[0]


def options_of(program: str, words: list[str]) -> set[str]:
    """Return the options of the command that the words after the program's name lead to."""
    if program.startswith("python"):
        return options_of_script(program.removeprefix("python -m "))
    command: click.Command = get_command(APPS[program])
    while words and words[0] in (inner := getattr(command, "commands", {})):
        command = inner[words.pop(0)]
    return {"--help"}.union(*(parameter.opts + parameter.secondary_opts for parameter in command.params))


def options_of_script(module: str) -> set[str]:
    main = importlib.import_module(module).main
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(io.StringIO()) as said:
        patched.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit):
            main()
    return set(re.findall(r"--[a-z][a-z-]*", said.getvalue()))


def test_the_pages_hold_many_commands_with_options() -> None:
    """Otherwise the tests above look past them."""
    lines = [line for page in PAGES for line in command_lines(page.read_text())]
    assert sum("--" in rest for _, rest in lines) >= 30
    assert {program for program, _ in lines} > set(APPS)


def test_what_the_first_page_says_of_the_price_of_privacy_is_what_was_measured() -> None:
    rows = re.findall(
        r"^\| [\w-]+ \| \d+ \| bookkeeping \|[^|]+\| ([\d.]+) \|",
        (ROOT / "docs/performance.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) >= 10
    assert f"{min(rows, key=float)} to {max(rows, key=float)} times the step" in (ROOT / "README.md").read_text()
