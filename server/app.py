"""The aggregator's Flower ``ServerApp``: reads its job from the run's configuration and carries it out."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.rounds import Job, run_federation
from shared.plan import RunPlan
from shared.records import RecordStore

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that ``run``, ``plan``, ``folder``, ``heldout`` and ``start`` describe."""
    config = {key: str(value) for key, value in context.run_config.items()}
    run_federation(
        grid,
        Job(
            run=config["run"],
            plan=RunPlan.from_json(config["plan"]),
            folder=Path(config["folder"]),
            heldout=RecordStore.open(Path(config["heldout"])) if "heldout" in config else None,
            start=Path(config["start"]) if "start" in config else None,
        ),
    )
