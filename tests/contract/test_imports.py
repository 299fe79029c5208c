"""Commands that neither train nor predict import nothing heavy: what they would import takes seconds of CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from client.config import SitePolicy
from client.folder import POLICY, open_books
from server.config import make_server

HEAVY = ("torch", "flwr", "opacus", "dp_accounting", "scipy", "matplotlib", "sklearn", "ray")
_CHILD = """
import importlib, json, sys
HEAVY, module, sys.argv = sys.argv[1].split(","), sys.argv[2], ["program", *sys.argv[3:]]
try:
    importlib.import_module(module).main()
    code = 0
except SystemExit as end:
    code = end.code or 0
heavy = [name for name in HEAVY if name in sys.modules]
print("\\n" + json.dumps([code, heavy]))
"""


def ran(module: str, *arguments: object) -> tuple[int, list[str], str]:
    """Return exit code, heavy packages that were imported, and standard error of one command."""
    command = [sys.executable, "-c", _CHILD, ",".join(HEAVY), module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, heavy, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    SitePolicy(name="h1", declared_patients=200, tasks=("ct-synthesis",), max_epsilon=8.0).write(folder / POLICY)
    open_books(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "srv"
    make_server(folder, ["localhost"], 9092, None)
    return folder


@pytest.mark.parametrize("command", ["ledger", "audit show", "audit verify", "declare"])
def test_a_sites_commands_import_nothing_heavy(site: Path, command: str) -> None:
    words = [*command.split(), site, *([300] if command == "declare" else [])]
    code, heavy, error = ran("client.cli", *words)
    assert heavy == []
    assert code == (1 if command == "declare" else 0), error  # without site.key there is nothing to declare


@pytest.mark.parametrize("command", ["status", "sites"])
def test_a_servers_commands_import_nothing_heavy(server: Path, command: str) -> None:
    assert ran("server.cli", command, server)[:2] == (0, [])


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ('task = "ct-synthesis"\nround = 3\nepsilon = 8.0\n', "Did you mean rounds?"),
        ('task = "ct-syntesis"\nrounds = 3\nepsilon = 8.0\n', "Did you mean ct-synthesis?"),
        ("\x00\x01", "not valid TOML"),
    ],
)
def test_a_wrong_plan_is_told_before_anything_heavy(server: Path, tmp_path: Path, plan: str, told: str) -> None:
    (tmp_path / "plan.toml").write_text(plan)
    code, heavy, error = ran("server.cli", "run", server, tmp_path / "plan.toml")
    assert (code, heavy) == (1, [])
    assert told in error


@pytest.mark.parametrize("command", ["start", "status", "ledger"])
def test_a_missing_site_is_told_before_anything_heavy(tmp_path: Path, command: str) -> None:
    code, heavy, error = ran("client.cli", command, tmp_path / "none")
    assert (code, heavy) == (1, [])
    assert "There is no site at" in error


def test_a_wrong_address_at_init_is_not_called_a_wrong_site_toml(tmp_path: Path) -> None:
    words = ("init", tmp_path / "h1", "--name", "h1", "--server", "nowhere", "--ca", "ca.crt")
    code, _, error = ran("client.cli", *words)
    assert code == 1
    assert '--server must be "host:port"' in error
    assert "site.toml" not in error
