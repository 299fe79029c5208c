"""Flower's SuperLink and its Control API; what it uses unpublished is here and in ``superlink.py`` and ``grid.py``.

The Control and Runtime APIs are one HTTPS port on loopback. Nothing but a thin bundle is ever submitted: it names
``server.app:app``, and what runs is what the operator installed.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import Status
from flwr.common.serde import user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from server.config import ServerConfig
from shared.errors import FederationError
from shared.telemetry import LOOPBACK

RUN_KEY, SERVER_KEY = "run", "server"
SUPERLINK, SUPEREXEC = "superlink", "superexec"
superlink_program: tuple[str, ...] = (sys.executable, "-m", "server.superlink")
_EXECUTOR_POLL_S = 1.0
_TIMEOUT_S = 10.0
_SUPEREXEC = (
    "import sys; sys.argv[0] = 'flower-superexec'; from flwr.supercore.cli import flower_superexec as run; run()"
)
_RUNS_LOOKED_AT = 200
"""Flower lists every attempt ever made, latest first; unfinished ones are among the latest."""
_BUNDLE = f"""\
[project]
name = "fedward"
version = "1.0.0"
description = "Names the installed aggregator; carries no code."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedward"
fab-include = ["/README.md"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{RUN_KEY} = ""
{SERVER_KEY} = ""
"""


class LinkError(FederationError):
    """Flower's SuperLink does not answer, or refuses."""


@dataclass(frozen=True)
class Node:
    """A site's key as Flower knows it; ``public_key`` is in OpenSSH form without a comment."""

    node_id: int
    public_key: str
    online: bool


@dataclass(frozen=True)
class LinkRun:
    """A run of Flower's: one attempt at a run of ours.

    Attributes:
        run_id: Flower's number.
        run: Our name.
        pending: Whether no ServerApp has been started for it yet.
    """

    run_id: int
    run: str
    pending: bool


class Control:
    """A connection to the Control API of the SuperLink that serves the folder ``server``."""

    def __init__(self, server: Path, config: ServerConfig) -> None:
        self._server = server
        self._client = ControlHttpClient.from_server_address(
            f"{LOOPBACK}:{config.control_port}",
            insecure=False,
            root_certificates=(server / "ca.crt").read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        # On loopback an answer that takes longer will not come; the service must not wait for it.
        self._client._client.timeout = httpx.Timeout(_TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def nodes(self) -> list[Node]:
        """Return the registered nodes.

        Raises:
            LinkError: If the SuperLink does not answer.
        """
        with _link_errors("list nodes"):
            answer = self._client.ListNodes(ListNodesRequest())
        return [
            Node(info.node_id, _as_ssh(info.public_key), info.status == NodeStatus.ONLINE)
            for info in answer.nodes_info
            if info.status != NodeStatus.UNREGISTERED
        ]

    def register(self, public_key: str, name: str) -> int:
        """Let the holder of a key connect; return its node id.

        Raises:
            LinkError: If the SuperLink does not answer or refuses.
        """
        with _link_errors("register a node"):
            node_id: int = self._client.RegisterNode(
                RegisterNodeRequest(public_key=_as_pem(public_key), name=name)
            ).node_id
        return node_id

    def unregister(self, node_id: int) -> None:
        """Shut a node out.

        Raises:
            LinkError: If the SuperLink does not answer or refuses.
        """
        with _link_errors("unregister a node"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def unfinished_runs(self) -> list[LinkRun]:
        """Return the runs that Flower takes to be waiting or at work.

        Raises:
            LinkError: If the SuperLink does not answer.
        """
        with _link_errors("list runs"):
            answer = self._client.ListRuns(ListRunsRequest(limit=_RUNS_LOOKED_AT))
        return [
            LinkRun(
                run.run_id,
                str(user_config_from_proto(run.override_config).get(RUN_KEY, "")),
                run.status.status == Status.PENDING,
            )
            for run in answer.run_dict.values()
            if run.status.status != Status.FINISHED
        ]

    def start_run(self, run: str) -> int:
        """Have a ServerApp started that takes up ``run``; return Flower's number.

        Raises:
            LinkError: If the SuperLink does not answer or refuses.
        """
        config = user_config_to_proto({RUN_KEY: run, SERVER_KEY: str(self._server)})
        with _link_errors("start a run"):
            answer = self._client.StartRun(StartRunRequest(fab=_bundle(), override_config=config))
        if not answer.HasField("run_id"):
            raise LinkError("Flower refused to start a run.")
        return int(answer.run_id)

    def stop_run(self, run_id: int) -> None:
        """Make Flower forget a run.

        Raises:
            LinkError: If the SuperLink does not answer or refuses.
        """
        with _link_errors("stop a run"):
            self._client.StopRun(StopRunRequest(run_id=run_id))


def commands(server: Path, config: ServerConfig) -> Mapping[str, list[str]]:
    """Return the command lines of Flower's two processes.

    The executor starts each ServerApp as a process of its own, which outlives a restart of the SuperLink. The secret
    keeps other users of this machine from taking a ServerApp's place.
    """
    secret = ["--superexec-auth-secret-file", str(server / "executor.key")]
    superlink = [
        *("--ssl-ca-certfile", str(server / "ca.crt")),
        *("--ssl-certfile", str(server / "server.crt")),
        *("--ssl-keyfile", str(server / "server.key")),
        *("--fleet-api-address", f"{_bracketed(config.fleet_address)}:{config.fleet_port}"),
        *("--host", LOOPBACK, "--port", str(config.control_port)),
        *("--database", str(server / "state.db")),
        *("--isolation", "process"),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *secret,
    ]
    superexec = [
        *("--runtime-api-address", f"{LOOPBACK}:{config.control_port}"),
        *("--root-certificates", str(server / "ca.crt")),
        *secret,
    ]
    return {
        SUPERLINK: [*superlink_program, *superlink],
        SUPEREXEC: [sys.executable, "-c", _SUPEREXEC, *superexec],
    }


def environment(server: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: they call nobody, and write into the aggregator's folder only."""
    installed = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(server / "run" / "flower"),
        "FLWR_LOG_LEVEL": "WARNING",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(_EXECUTOR_POLL_S),
        "PATH": os.pathsep.join((installed, os.environ.get("PATH", os.defpath))),  # where flwr-serverapp is
        # Loopback never goes through the operator's proxy.
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), LOOPBACK, "localhost"))),
        "no_proxy": ",".join(filter(None, (os.environ.get("no_proxy"), LOOPBACK, "localhost"))),
    }


@cache
def _bundle() -> Fab:
    readme = b"This bundle carries no code: the aggregator runs what its operator installed.\n"
    content, _ = build_fab_from_files({"pyproject.toml": _BUNDLE.encode(), "README.md": readme})
    return Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _as_pem(public_key: str) -> bytes:
    key = load_ssh_public_key(public_key.encode())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _as_ssh(pem: bytes) -> str:
    key: Any = load_pem_public_key(pem)
    return str(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


@contextmanager
def _link_errors(act: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise LinkError(f"Flower's SuperLink refused to {act} (HTTP {error.response.status_code}).") from error
    except (httpx.HTTPError, ValueError, OSError) as error:
        raise LinkError(f"Flower's SuperLink does not answer a request to {act} ({type(error).__name__}).") from error
