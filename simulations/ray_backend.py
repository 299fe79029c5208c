"""The same apps on Flower's simulation engine, which runs nodes as Ray actors on one machine or a cluster."""

import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import ConfigRecordValues, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

import server.app
from shared.errors import FederationError

_REACH_S = 5.0
BackendInit = dict[str, ConfigRecordValues]


def _reach(address: str) -> None:
    """Make sure that something answers at HOST:PORT: Ray itself would wait for minutes.

    Raises:
        FederationError: If nothing answers there.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()
    except (OSError, ValueError) as error:
        raise FederationError(f"No Ray cluster answers at {address}. Check --ray-address, HOST:PORT.") from error


class _SiteApp(ClientApp):
    """The real ``ClientApp``, told by the partition number which site's folder it serves."""

    def __init__(self, folders: Sequence[str], seed: int) -> None:
        super().__init__()
        self._folders, self._seed = folders, seed

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message inside a Ray actor."""
        import torch  # noqa: PLC0415 - inside the actor

        from client.app import SITE_FOLDER, SiteApp  # noqa: PLC0415 - inside the actor

        torch.set_num_threads(1)
        context.node_config[SITE_FOLDER] = self._folders[int(context.node_config["partition-id"])]
        return SiteApp(self._seed)(message, context)


def run_on_ray(
    folders: Sequence[Path], config: Mapping[str, str], *, seed: int, workers: int, address: str | None
) -> None:
    """Run the job that ``config`` describes with one Ray actor per CPU.

    Args:
        folders: The sites' folders; on a cluster, on a file system that all machines share.
        config: The ServerApp's run configuration.
        seed: Makes the sites' noise repeatable.
        seed: Makes the sites' noise repeatable.
        workers: CPUs to give a Ray started here.
        address: A Ray cluster that is already there.
    """
    app = ServerApp()
    failures: list[Exception] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config.update(config)
        try:
            server.app.app(grid, context)
        except Exception as error:
            failures.append(error)

    init: BackendInit = {"address": address} if address else {"num_cpus": workers}
    if address:
        _reach(address)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as neutral:
        # Ray's workers import from the current folder first, where another `client` may lie.
        os.chdir(neutral)
        try:
            run_simulation(
                server_app=app,
                client_app=_SiteApp([str(folder) for folder in folders], seed),
                num_supernodes=len(folders),
                backend_config={"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
            )
        finally:
            os.chdir(here)
    if failures:
        raise failures[0]
