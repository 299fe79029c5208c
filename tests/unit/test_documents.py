"""What the documents name exists: tests, files, and the commands of the programs."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from client.cli import app as site_app
from server.cli import app as server_app
from simulations.cli import app as sim_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
APPS = {"fedward-site": site_app, "fedward-server": server_app, "fedward-sim": sim_app}
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert [name for name in sorted(tests) if f"def {name}(" not in TESTS] == []
    files = set(re.findall(r"`((?:client|server|shared|simulations|tests|docker|docs)/[\w./-]+\.\w+)`", text))
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    used = set(re.findall(r"\b(fedward-(?:site|server|sim)) ([a-z][a-z-]*)", text))
    known = {(name, command) for name, app in APPS.items() for command in getattr(get_command(app), "commands", {})}
    assert sorted(used - known) == []
