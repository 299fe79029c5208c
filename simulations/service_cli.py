"""``fedward-sim bench-service``: what the aggregator and the daemons cost, as processes on this machine's loopback."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared.errors import FederationError
from shared.files import write_atomic

_CONSOLE = Console()
_EARLY = 5
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all figures here.")]
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure the real service on loopback: seconds a round, memory, many sites.",
)


@app.command(epilog="Example:\n\n  fedward-sim bench-service overhead --rounds 20 --json overhead.json")
def overhead(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds with our daemons.")] = 20,
    stock_rounds: Annotated[int, typer.Option(min=2, help="Rounds with stock Flower SuperNodes.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Time rounds of next to no training with our daemons and with stock Flower SuperNodes."""
    from simulations.service_benchmark import as_json, as_markdown, machine, measure_overhead

    variants = measure_overhead(rounds, stock_rounds)
    _keep(json_file, as_json(variants))
    _CONSOLE.print(f"{machine()}\n\n{as_markdown(variants)}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example:\n\n  fedward-sim bench-service scale --sites 100 --json scale.json")
def scale(
    sites: Annotated[int, typer.Option(min=1, max=1000, help="Light sites, which train nothing.")] = 100,
    rounds: Annotated[int, typer.Option(min=_EARLY + 1, help="Rounds.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Run many light sites against one aggregator; exit 1 if a reply was lost."""
    from simulations.service_scale import as_json, as_markdown, measure_scale

    measured = measure_scale(sites, rounds)
    _keep(json_file, as_json(measured, _EARLY, rounds))
    _CONSOLE.print(as_markdown(measured, _EARLY, rounds), highlight=False, markup=False, soft_wrap=True)
    if not measured.nothing_lost:
        raise FederationError(f"Replies were lost: {measured.replies} of {sites} in the rounds.")


def _keep(path: Path | None, figures: object) -> None:
    """Write a measurement's figures, before anything is made of them: it may have taken half an hour."""
    if path:
        write_atomic(path, json.dumps(figures, indent=1).encode())
