"""The real service on loopback, driven as an operator does: Flower 1.39's processes, its node list, their deaths."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.config import ServerConfig, free_ports
from server.control import Control
from server.members import Member
from server.planning import PlanRequest, agree_plan
from server.runs import submit
from shared.telemetry import health_of

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "server.cli", *map(str, arguments)]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.1)


class Service:
    """A started service of the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, ServerConfig.read(path)
        self.log = path.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(command("start", path), cwd=ROOT, stderr=self.log)
        until(lambda: self.health().get("ok"), "healthy")

    def health(self) -> dict[str, object]:
        try:
            return dict(json.loads(self.get("healthz")))
        except OSError:
            return {}

    def get(self, page: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.config.health_port}/{page}", timeout=5) as answer:
            return str(answer.read().decode())

    def node_keys(self) -> set[str]:
        control = Control(self.path, self.config)
        try:
            return {node.public_key for node in control.nodes()}
        finally:
            control.close()

    def end(self, number: int) -> int:
        """Signal the service, wait until nothing of it is left, and return its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self.log.close()
        until(lambda: not leftovers(self.path), "no process left over")
        return code


def leftovers(path: Path) -> list[str]:
    """Return the command lines of processes, other than zombies, that work for this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{path}/" in line:
            found.append(line)
    return found


def make(path: Path) -> Path:
    made = call("init", path, "--name", "localhost", "--fleet-port", free_ports(1, set())[0])
    assert made.returncode == 0, made.stderr
    return path


def enrol(path: Path, name: str) -> str:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    key = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    path.with_name(f"{name}.pub").write_text(f"{key} {name} declared-patients=200\n")
    enrolled = call("enrol", path, path.with_name(f"{name}.pub"), "--name", name)
    assert enrolled.returncode == 0, enrolled.stderr
    return key


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    started = Service(make(tmp_path_factory.mktemp("service") / "srv"))
    yield started
    if started.process.poll() is None:
        started.end(signal.SIGTERM)


def test_who_is_enrolled_is_who_may_connect(service: Service) -> None:
    first, second = enrol(service.path, "h1"), enrol(service.path, "h2")
    until(lambda: {first, second} <= service.node_keys(), "both registered")
    revoked = call("revoke", service.path, "h2")
    assert revoked.returncode == 0, revoked.stderr
    until(lambda: service.node_keys() == {first}, "h2 shut out")
    (row, gone) = json.loads(call("sites", service.path, "--json").stdout)
    assert (row["name"], row["connected"], row["revoked"]) == ("h1", False, False)
    assert isinstance(row["node_id"], int)
    assert gone["revoked"]
    assert 'fedward_site_connected{site="h1"} 0.0' in service.get("metrics")


def test_a_second_start_is_refused(service: Service) -> None:
    second = call("start", service.path)
    assert second.returncode == 1
    assert f"runs already, as process {service.process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    assert service.health()["ok"]


@pytest.mark.parametrize("child", ["superlink", "superexec"])
def test_a_killed_child_is_back_and_nothing_is_forgotten(service: Service, child: str) -> None:
    keys, old = service.node_keys(), service.health()[f"{child}_pid"]
    assert isinstance(old, int)
    os.kill(old, signal.SIGKILL)

    def back() -> bool:
        health = service.health()  # of one moment: while the child is away its number is, too
        return bool(health.get("ok")) and health.get(f"{child}_pid") not in (old, None)

    until(back, f"{child} back")
    until(lambda: f'restarts_total{{child="{child}"}} 1.0' in service.get("metrics"), "counted")
    assert service.node_keys() == keys


def test_a_run_without_sites_fails_and_says_so(service: Service) -> None:
    plan = service.path.with_name("plan.toml")
    plan.write_text('task = "nodule-classification"\nrounds = 2\nepsilon = 8.0\nmin-sites = 1\ndeadline-s = 2\n')
    run = call("run", service.path, plan, "--wait")
    assert run.returncode == 1
    assert run.stdout == "run-1\n"
    assert "run-1 failed after 0 of 2 rounds (quorum-lost): " in run.stderr
    assert "Traceback" not in run.stderr
    assert '"code": "quorum-lost"' in call("logs", service.path, "run-1").stdout


def test_health_names_a_run_that_cannot_be_followed(service: Service, tmp_path: Path) -> None:
    plan = agree_plan(PlanRequest("nodule-classification", 8.0, 1e-3, {}), [Member("h1", "k", 200)], None)
    made = submit(tmp_path, plan, "skewed", None).path
    with sqlite3.connect(made / "registry.sqlite") as database:
        database.execute("UPDATE runs SET plan = json_set(plan, '$.surprise', 1)")
    made.rename(service.path / "runs" / "skewed")  # so that the service never sees it whole
    until(lambda: health_of(service.config.health_port).get("trouble") == "skewed: storage-failed", "named")
    assert health_of(service.config.health_port)["ok"] is False
    assert call("status", service.path, "--healthy").returncode == 1
    shown = call("status", service.path)
    assert shown.returncode == 0
    assert "skewed was made by another version" in shown.stdout
    (service.path / "runs" / "skewed").rename(tmp_path / "aside")
    until(lambda: service.health().get("ok"), "well again")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_however_the_service_ends_nothing_is_left_and_it_starts_again(service: Service, number: int) -> None:
    keys = service.node_keys()
    assert len(leftovers(service.path)) == 2
    assert service.end(number) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    service.__init__(service.path)  # type: ignore[misc] # the same folder, a new process
    assert service.node_keys() == keys
