"""The aggregator's Flower ``ServerApp``: reads its job from the run's configuration and carries it out.

Two configurations exist. A simulation gives the job itself: ``run``, ``plan``, ``folder``, ``heldout``, ``start``,
``sensitivity``.
The service gives ``run`` and ``server``, the aggregator's folder, in which everything else stands.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import HttpGrid

from server.children import die_with_parent
from server.cohort import Member as Enrolled
from server.config import ServerConfig
from server.grid import ServiceGrid
from server.members import Members, active, key_digest
from server.planning import open_heldout
from server.registry import RUNNING
from server.rounds import Job, run_federation
from server.runs import RunFolder
from shared.errors import FederationError
from shared.logs import configure_logs
from shared.plan import RunPlan
from shared.provenance.keys import ensure_signing_key
from shared.records import RecordStore

_LOG = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's configuration describes."""
    config = {key: str(value) for key, value in context.run_config.items()}
    if "server" not in config:
        run_federation(grid, job_from(config))
        return
    die_with_parent()
    folder = RunFolder(Path(config["server"]), config["run"])
    with folder.working(), _explained(folder):
        if folder.wanted == RUNNING:  # not if it was stopped while this process was starting
            run_federation(ServiceGrid(cast(HttpGrid, grid)), job_from(config))


def job_from(config: Mapping[str, str]) -> Job:
    """Return the job that a run's configuration describes.

    Raises:
        FederationError: If a file that it names cannot be used.
    """
    if "server" in config:
        return _service_job(Path(config["server"]), config["run"])
    return Job(
        run=config["run"],
        plan=RunPlan.from_json(config["plan"]),
        folder=Path(config["folder"]),
        heldout=RecordStore.open(Path(config["heldout"])) if "heldout" in config else None,
        start=Path(config["start"]) if "start" in config else None,
        sensitivity=float(config["sensitivity"]) if "sensitivity" in config else None,
        signer=ensure_signing_key(Path(config["folder"])),
    )


def _service_job(server: Path, run: str) -> Job:
    config, folder = ServerConfig.read(server), RunFolder(server, run)
    plan = folder.plan
    return Job(
        run=run,
        plan=plan,
        folder=folder.path,
        heldout=open_heldout(config, plan.task),
        start=folder.start if folder.start.exists() else None,
        members={
            member.node_id: Enrolled(member.name, member.declared_patients)
            for member in active(Members(server).all())
            if member.node_id is not None
        },
        max_share=config.max_share,
        max_update_norm=config.max_update_norm or None,
        sensitivity=folder.sensitivity or config.sensitivity or None,
        signer=ensure_signing_key(server),
        keys={member.name: key_digest(member) for member in Members(server).all()},
    )


@contextmanager
def _explained(folder: RunFolder) -> Iterator[None]:
    """Log into the run's folder, and tell the operator there why it failed."""
    with folder.log.open("a") as stream:
        configure_logs(stream)
        _LOG.info("run taken up", extra={"run": folder.name})
        try:
            yield
        except FederationError as error:
            folder.fail(error)
            _LOG.error("run failed", extra={"run": folder.name, "code": error.code.value})
            raise
        except Exception:
            _LOG.exception("run broke off", extra={"run": folder.name})
            raise
        finally:
            _LOG.info("run left", extra={"run": folder.name})
            logging.getLogger().handlers.clear()
