"""A real aggregator and real daemons as processes on loopback: what tests and the service's benchmark drive.

Everything goes through the commands that operators and stewards type. Only processes started here are ended here.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from server.config import ServerConfig
from shared.errors import FederationError
from shared.telemetry import health_of

_POLL_S = 0.05
_END_S = 10.0
_T = TypeVar("_T")


def wait_for(what: str, check: Callable[[], _T | None], timeout_s: float = 120.0) -> _T:
    """Return the first truthy value of ``check``.

    Raises:
        FederationError: If there is none in time.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := check():
            return value
        time.sleep(_POLL_S)
    raise FederationError(f"Waited {timeout_s:g} s for {what}.")


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Deployment:
    """One consortium below ``folder``: ``server`` and one folder per site.

    Attributes:
        folder: Holds everything.
        port: The Fleet API's.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    _processes: dict[str, subprocess.Popen[Any]] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        """The aggregator's folder."""
        return self.folder / "server"

    def site(self, name: str) -> Path:
        """Return a site's folder."""
        return self.folder / name

    def run(self, role: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run ``fedward-server`` or ``fedward-site`` to its end."""
        return subprocess.run(  # noqa: S603 - our own command line
            [*_command(role), *map(str, arguments)], env=_environment({}), capture_output=True, text=True, check=False
        )

    def must(self, role: str, *arguments: str | Path) -> str:
        """Run a command that must succeed; return what it printed.

        Raises:
            FederationError: With what it said.
        """
        done = self.run(role, *arguments)
        if done.returncode:
            raise FederationError(f"fedward-{role} {arguments[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def found(self, heldout: Path | None = None) -> None:
        """Make the aggregator."""
        extra = ["--heldout", str(heldout)] if heldout else []
        self.must("server", "init", self.server, "--name", "localhost", "--fleet-port", str(self.port), *extra)

    def admit(self, name: str, declared_patients: int, port: int | None = None) -> Path:
        """Make and enrol a site, which reaches the server by ``port``; return its folder."""
        folder, where = self.site(name), f"localhost:{port or self.port}"
        arguments = ["--name", name, "--server", where, "--ca", str(self.server / "ca.crt")]
        self.must("site", "init", folder, *arguments, "--declared-patients", str(declared_patients))
        rules = folder / "site.toml"  # all of them share this machine, where each would take every core
        rules.write_text(rules.read_text().replace("threads = 0", "threads = 1"))
        self.must("server", "enrol", self.server, folder / "site.pub", "--name", name)
        return folder

    def start(self, name: str, environment: Mapping[str, str] | None = None, module: str = "") -> subprocess.Popen[Any]:
        """Start the aggregator (``server``) or a site's daemon, or ``module`` in its place; its log is ``NAME.log``."""
        command = [sys.executable, "-m", module] if module else _command("server" if name == "server" else "site")
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command line
                [*command, "start", str(self.folder / name)],
                env=_environment(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def end_with_others(self, name: str, process: subprocess.Popen[Any]) -> None:
        """Have a process that was started elsewhere killed at the end."""
        self._processes[name] = process

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        """Signal a process and wait for its end; return its exit status."""
        process = self._processes.pop(name)
        process.send_signal(number)
        return process.wait(timeout=_END_S)

    def health(self) -> dict[str, Any]:
        """Return what the service says of itself."""
        return health_of(ServerConfig.read(self.server).health_port)

    def wait_connected(self, *names: str) -> None:
        """Wait until the service counts these sites as connected."""
        wanted = set(names)
        wait_for("the sites to connect", lambda: wanted <= set(self.health().get("connected", "").split(",")))


@contextmanager
def deployment(folder: Path, port: int | None = None) -> Iterator[Deployment]:
    """Yield a deployment; what still runs at the end is killed."""
    whole = Deployment(folder, port or free_port())
    try:
        yield whole
    finally:
        for process in whole._processes.values():
            process.kill()
            process.communicate()


def _command(role: str) -> list[str]:
    module = "server.cli" if role == "server" else "client.cli"
    return [sys.executable, "-m", module]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **extra}
