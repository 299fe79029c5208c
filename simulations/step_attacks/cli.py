"""``fedward-sim attack``: attacks on the private step that must fail."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Attack this machine's private step as a hostile server would."
)

TaskName = Annotated[str, typer.Option("--task", help="Whose step to attack.")]
Threads = Annotated[int, typer.Option(min=1, max=1024, help="Of torch.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command(epilog="Example:  fedward-sim attack position --task nodule-classification --threads 4 --json")
def position(
    task: TaskName,
    threads: Threads = 1,
    rung: Annotated[
        str | None, typer.Option(help="Force 'fast', 'one-thread' or 'one-by-one'. Default: what the self-test takes.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Insert one patient anywhere; say how far the clipped sum moves, in units of the clipping norm: at most 1."""
    from simulations.step_attacks.position import attack_position

    _show(asdict(attack_position(task, threads=threads, rung=rung)), as_json=as_json)


@app.command("time", epilog="Example:  fedward-sim attack time --task glucose-forecast --replies 200 --json")
def time_of_reply(
    task: TaskName,
    replies: Annotated[int, typer.Option(min=2, help="Replies with the patient, and as many without.")] = 200,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Guess from the processor time of a reply whether one patient is there; say the AUC: 0.5 is a guess."""
    from simulations.step_attacks.timing import attack_time

    result = attack_time(task, replies=replies, threads=threads)
    _show({"task": task, "threads": threads, **asdict(result)}, as_json=as_json)


def _show(facts: dict[str, Any], *, as_json: bool) -> None:
    text = json.dumps(facts) if as_json else "\n".join(f"{name}: {_shown(value)}" for name, value in facts.items())
    typer.echo(text)


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
