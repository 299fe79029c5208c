"""The operator's settings, ``server.toml``, and the layout of the aggregator's folder (docs/adr/0008)."""

import math
import random
import secrets
import socket
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from server.certificates import LOOPBACK_NAMES, make_certificates
from shared.errors import PlanError, StorageError
from shared.files import storage_errors, write_atomic, write_secret
from shared.provenance.keys import ensure_signing_key
from shared.records import RecordStore, stores_in
from shared.suggest import suggestion

SETTINGS = "server.toml"
_PRIVATE_PORTS = range(20_000, 32_000)
"""Where init looks for loopback ports: below what systems hand out by themselves."""
_TEMPLATE = """\
# Settings of this aggregator; read when the service starts.

# DNS names and addresses under which hospitals reach it; server.crt was made for them.
names = {names}

# Where hospitals connect (gRPC, TLS): the only port to open in the firewall. 0.0.0.0 listens on every interface.
fleet-address = {fleet-address}
fleet-port = {fleet-port}

# On loopback only, for this machine's own processes and monitoring. Never forward them.
control-port = {control-port}
health-port = {health-port}

# Folder of the reference patients that judge the model, made by `fedward-site intake`.
# Empty: runs go on, and say that nothing was validated.
heldout = {heldout}

# Largest share of the average that one site's weight may have, above 0 and at most 1.
max-share = {max-share}

# Largest L2 norm of one site's change to the model; a reply beyond it is dropped. 0: what the plan implies.
max-update-norm = {max-update-norm}

# Share of positive cases that the model's threshold must find among the reference patients, at most 1.
# 0: the threshold of the best balanced accuracy.
sensitivity = {sensitivity}
"""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the operator sets.

    Attributes:
        names: DNS names and addresses in the certificate.
        fleet_address: Interface on which hospitals are awaited.
        fleet_port: Their port.
        control_port: Flower's Control and Runtime APIs, on loopback.
        health_port: ``/healthz`` and ``/metrics``, on loopback.
        heldout: The reference patients' store; empty if there is none.
        max_share: Largest share of the average that one site's weight may have.
        max_update_norm: Largest L2 norm of one site's change to the model; 0 for what the plan implies.
        sensitivity: Share of positive cases that the model's threshold must find; 0 for the best balanced accuracy.
    """

    names: tuple[str, ...]
    fleet_address: str
    fleet_port: int
    control_port: int
    health_port: int
    heldout: str = ""
    max_share: float = 1.0
    max_update_norm: float = 0.0
    sensitivity: float = 0.0

    def __post_init__(self) -> None:
        ports = (self.fleet_port, self.control_port, self.health_port)
        rules = {
            "names must hold at least one name": bool(self.names),
            "fleet-address must not be empty": bool(self.fleet_address),
            "every port must lie between 1 and 65535": all(0 < port < 65_536 for port in ports),
            "the three ports must differ": len(set(ports)) == len(ports),
            "max-share must lie in (0, 1]": 0.0 < self.max_share <= 1.0,
            "max-update-norm must be finite and not negative": 0.0 <= self.max_update_norm < math.inf,
            "sensitivity must lie in [0, 1]": 0.0 <= self.sensitivity <= 1.0,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:  # NaN holds nowhere
            raise PlanError(f"{SETTINGS} is wrong: {'; '.join(broken)}.")

    @classmethod
    def read(cls, server: Path) -> "ServerConfig":
        """Read ``server.toml`` of the aggregator in ``server``.

        Raises:
            StorageError: If there is none.
            PlanError: If a key is missing, unknown, of the wrong type or out of range.
        """
        path = server / SETTINGS
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{server} holds no aggregator. Make one with: fedward-server init {server}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} is not valid TOML: {error}.") from error
        known = {field.name.replace("_", "-"): field for field in fields(cls)}
        if unknown := sorted(set(raw) - set(known)):
            meant = suggestion(unknown[0], known) or f" The keys are: {', '.join(known)}."
            raise PlanError(f"{path} has unknown keys: {', '.join(unknown)}.{meant}")
        if missing := sorted(key for key, field in known.items() if field.default is MISSING and key not in raw):
            raise PlanError(f"{path} lacks {', '.join(missing)}. Write it as 'fedward-server init' does.")
        values = {known[key].name: _typed(key, value, known[key].type) for key, value in raw.items()}
        return cls(**values)

    def to_toml(self) -> str:
        """Return the settings as the text of ``server.toml``, every key with a comment."""
        values = {field.name.replace("_", "-"): _toml(getattr(self, field.name)) for field in fields(self)}
        text = _TEMPLATE
        for key, value in values.items():
            text = text.replace("{" + key + "}", value)
        return text


def make_server(server: Path, names: Sequence[str], fleet_port: int, heldout: Path | None) -> ServerConfig:
    """Make a new aggregator's folder: settings, certificates, signing key, secret of its own processes.

    Raises:
        StorageError: If ``server`` is one already or is not empty, or ``heldout`` is no prepared store.
        PlanError: If a name or the port is impossible.
    """
    if (server / SETTINGS).exists():
        raise StorageError(f"{server} holds an aggregator already; its keys are never overwritten.")
    heldout = None if heldout is None else find_heldout(heldout)
    control_port, health_port = free_ports(2, taken={fleet_port})
    config = ServerConfig(
        names=tuple(dict.fromkeys(names)),
        # An aggregator that only this machine can name waits on loopback only.
        fleet_address="127.0.0.1" if set(names) <= set(LOOPBACK_NAMES) else "0.0.0.0",  # noqa: S104
        fleet_port=fleet_port,
        control_port=control_port,
        health_port=health_port,
        heldout=str(heldout.resolve()) if heldout else "",
    )
    with storage_errors(server):
        server.mkdir(parents=True, exist_ok=True)
        if any(server.iterdir()):
            raise StorageError(f"{server} is not empty. Give a new folder.")
        server.chmod(0o700)
        for name in ("runs", "run"):
            (server / name).mkdir()
    make_certificates(server, config.names)
    ensure_signing_key(server)
    write_secret(server / "executor.key", secrets.token_bytes(32))
    write_atomic(server / SETTINGS, config.to_toml().encode())  # last: with it the folder is an aggregator
    return config


def find_heldout(heldout: Path) -> Path:
    """Return ``heldout`` if it is a prepared store, or the folder of a site that has some: one of each kind.

    The aggregator has no code that reads a hospital's files, so a raw export is prepared where such code is.

    Raises:
        StorageError: If there is no prepared store, with how to make one.
    """
    stores = [heldout] if (heldout / "store.json").exists() else list(stores_in(heldout).values())
    if heldout.exists() and not stores:
        raise StorageError(
            f"{heldout} is not prepared, and the aggregator reads no hospital's files. Prepare it with "
            f"'fedward-site init reference …' and 'fedward-site intake reference {heldout}', then give reference."
        )
    for store in stores or [heldout]:
        RecordStore.open(store)
    return heldout


def free_ports(count: int, taken: set[int]) -> list[int]:
    """Return loopback ports that nobody listens on now.

    Raises:
        StorageError: If there are not enough.
    """
    found: list[int] = []
    for port in random.sample(_PRIVATE_PORTS, 500):
        if len(found) < count and port not in taken and not port_taken("127.0.0.1", port):
            found.append(port)
    if len(found) < count:
        raise StorageError("There is no free loopback port between 20000 and 32000.")
    return found


def port_taken(address: str, port: int) -> bool:
    """Whether a socket cannot listen at ``address`` and ``port``."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections of an earlier service that still linger are no hindrance; a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError:
            return True
    return False


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Return the value as its field's type; true is no number and a word is no list of names."""
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    if kind not in (int, str, float) and type(value) is list and all(type(item) is str for item in value):
        return tuple(value)
    raise PlanError(f"{SETTINGS} is wrong: {key} has the wrong type.")


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)
