"""``fedward-server start``: keeps Flower's two processes alive, its nodes equal to ``sites.json``, and runs going.

Every tick compares what is wanted (the folder) with what is (Flower) and does what is missing. Nothing is remembered
that a crash could lose: a new supervisor starts from the same folder.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from server.certificates import expires
from server.children import Child
from server.config import ServerConfig, port_taken
from server.control import SUPEREXEC, Control, LinkError, commands, environment
from server.dispatch import Dispatcher
from server.members import Members, active
from server.metrics import ServiceMetrics
from server.runs import pid_file, service_pid, take_lock
from shared.errors import FederationError, StorageError
from shared.files import storage_errors
from shared.telemetry import LOOPBACK, Health, serve

_LOG = logging.getLogger(__name__)
_TICK_S = 0.5
_END_S = 1.0
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _End(BaseException):
    """The operator wants the service to end."""


def serve_forever(server: Path) -> None:
    """Run the service of the aggregator in ``server`` until SIGTERM or SIGINT.

    Raises:
        StorageError: If it runs already, or a port is taken.
        PlanError: If the settings are wrong.
    """
    config = ServerConfig.read(server)
    os.environ.update(environment(server))
    with _only_one(server):
        _check_ports(config)
        Supervisor(server.resolve(), config).run()


class Supervisor:
    """The running service of one aggregator."""

    def __init__(self, server: Path, config: ServerConfig) -> None:
        self._config = config
        self._members = Members(server)
        self._control = Control(server, config)
        self._dispatcher = Dispatcher(server, self._control)
        settings = environment(server)
        self._children = {
            name: Child(name, command, settings, server / "run" / f"{name}.log")
            for name, command in commands(server, config).items()
        }
        self._metrics = ServiceMetrics(self._children, expires(server / "server.crt"))
        self._answered = False
        self._failure: str | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            StorageError: If the health port is taken.
        """
        for number in _END_SIGNALS:
            signal.signal(number, _end)
        try:
            with serve(self._metrics.registry, self.health, self._config.health_port) as port:
                _LOG.info("service started", extra={"port": port})
                while True:
                    self._tick()
                    time.sleep(_TICK_S)
        except _End:
            return
        finally:
            self._end_children()
            self._control.close()
            _LOG.info("service ended")

    def health(self) -> Health:
        """Return whether both children live, the SuperLink answered, and the last tick did all that it had to.

        ``trouble`` names what it could not do: runs with their error code, or the code alone of what stops everything.
        """
        pids = {name: child.pid for name, child in self._children.items()}
        facts = {f"{name}_pid": pid for name, pid in pids.items()}
        connected = ",".join(sorted(self._metrics.connected))
        troubles = [self._failure] if self._failure else []
        troubles += [f"{run}: {code}" for run, code in sorted(self._dispatcher.troubles.items())]
        well = self._answered and None not in pids.values() and not troubles
        return Health(well, {**facts, "connected": connected, "trouble": ", ".join(troubles)})

    def _tick(self) -> None:
        for child in self._children.values():
            if child.tend():
                self._metrics.count_restart(child.name)
                self._answered = False  # before the next child has a pid: nobody has asked it yet
        try:
            self._follow_members()
            self._dispatcher.follow(self._children[SUPEREXEC].generation)
            self._answered, self._failure = True, None
        except LinkError:
            self._answered = False  # it is starting or has just died: the next tick sees
        except FederationError as error:
            if self._failure is None:
                _LOG.error("tick failed", extra={"code": error.code.value})
            self._failure = error.code.value
        self._metrics.show_runs(self._dispatcher.runs)

    def _end_children(self) -> None:
        """End both within moments; what they hold on disk survives a kill, and ServerApps end with their executor."""
        deadline = time.monotonic() + _END_S
        for child in self._children.values():
            child.ask_to_end()
        for child in self._children.values():
            child.end(deadline)

    def _follow_members(self) -> None:
        """Register who is enrolled and shut out everyone else."""
        allowed = {member.public_key: member for member in active(self._members.all())}
        nodes = {node.public_key: node for node in self._control.nodes()}
        for key in nodes.keys() - allowed.keys():
            self._control.unregister(nodes[key].node_id)
            _LOG.info("site shut out", extra={"node": nodes[key].node_id})
        known = {key: node.node_id for key, node in nodes.items()}
        for key in allowed.keys() - nodes.keys():
            known[key] = self._control.register(key, allowed[key].name)
            _LOG.info("site registered", extra={"site": allowed[key].name, "node": known[key]})
        if any(member.node_id != known[key] for key, member in allowed.items()):
            self._members.note_nodes({key: known[key] for key in allowed})
        online = {allowed[key].name for key, node in nodes.items() if key in allowed and node.online}
        self._metrics.show_sites({member.name for member in allowed.values()}, online)


def _end(_signal: int, _frame: FrameType | None) -> None:
    """Break off whatever the service waits for: every step of it survives that."""
    for number in _END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise _End


@contextmanager
def _only_one(server: Path) -> Iterator[None]:
    path = pid_file(server)
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
        with path.open("a+") as handle:
            take_lock(handle, f"The service of {server} runs already, as process {service_pid(server)}.")
            yield


def _check_ports(config: ServerConfig) -> None:
    places = {
        "fleet-port": (config.fleet_address, config.fleet_port),
        "control-port": (LOOPBACK, config.control_port),
        "health-port": (LOOPBACK, config.health_port),
    }
    for key, (address, port) in places.items():
        if port_taken(address, port):
            raise StorageError(f"{key} {port} on {address} cannot be used: it is taken. Change it in server.toml.")
