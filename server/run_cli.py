"""The operator's commands that are about runs: submit, look, stop, report."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from server.console import CONSOLE, ERRORS, AsJson, Run, Server, exit_with, print_json, say, warn
from shared.terminal import print_table

_RUN_EXAMPLES = """
Examples:

  fedward-server run srv plan.toml --wait

  fedward-server run srv plan.toml --name pilot --init public.safetensors --init-is-public

A plan.toml needs no more than: task = "nodule-classification", rounds = 12, epsilon = 8.0
"""
_STATUS_EXAMPLES = """
Examples:

  fedward-server status srv

  fedward-server status srv run-1 --json

  fedward-server status srv --healthy
"""


def run(
    server: Server,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.TOML", help="At least task, rounds and epsilon.")],
    name: Annotated[str | None, typer.Option(help="The run's name. Default: run-1, run-2 …")] = None,
    init_: Annotated[Path | None, typer.Option("--init", help="Start from a checkpoint, public or of a run.")] = None,
    init_is_public: Annotated[
        bool, typer.Option("--init-is-public", help="Say that no patient of these hospitals was in its training.")
    ] = False,
    init_key: Annotated[
        Path | None, typer.Option(help="The signing.pub of another aggregator that signed the checkpoint.")
    ] = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(help="Share of positives that the threshold must find. Default: that of server.toml."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run; exit 0 only if it completes.")] = False,
) -> None:
    """Submit a run and print its name."""
    from server.config import ServerConfig
    from server.lineage import ancestry_of
    from server.members import require_members
    from server.operations import follow
    from server.planning import agree_plan, open_heldout, read_plan_request
    from server.runs import service_pid, submit
    from shared.provenance.card import card_of
    from shared.provenance.keys import ensure_signing_key, read_trusted
    from shared.tasks.registry import check_task, find_task

    config = ServerConfig.read(server)
    request = read_plan_request(plan)
    check_task(request.task)
    members = require_members(server)  # what is cheap to check is checked before torch is imported
    find_task(request.task).check_sensitivity(sensitivity)
    agreed = agree_plan(request, members, init_)
    if open_heldout(config, agreed.task) is None:
        warn("There are no held-out patients (heldout in server.toml): nothing will be validated.")
    if not agreed.private:
        warn("epsilon is inf: this run promises no privacy, and no hospital takes part whose site.toml demands noise.")
    ancestry = None
    if init_ is not None:
        trusted = (ensure_signing_key(server).public_key(), *(read_trusted(init_key) if init_key else ()))
        ancestry = ancestry_of(init_, agreed.task, trusted, is_public=init_is_public)
        if not (card := card_of(ancestry)).private:
            warn(f"{init_.name}: {card.sentence()} Whatever noise this run adds, its model's card will say the same.")
    folder = submit(server, agreed, name, init_, ancestry, sensitivity=sensitivity)
    CONSOLE.print(folder.name, highlight=False, markup=False)
    if service_pid(server) is None:
        warn(f"The service is not running; the run begins when it is: fedward-server start {server}")
    if wait:
        exit_with(follow(folder, ERRORS))


def status(
    server: Server,
    run_name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run, in detail.")] = None,
    as_json: AsJson = False,
    healthy: Annotated[bool, typer.Option("--healthy", help="Only an exit status: 0 if the service is well.")] = False,
) -> None:
    """Show the runs, or one run's rounds."""
    from server.config import ServerConfig
    from server.operations import overview, rounds_table, runs_table
    from server.runs import all_runs, find_run, service_pid
    from shared.telemetry import health_of

    config = ServerConfig.read(server)
    if healthy:
        raise typer.Exit(0 if health_of(config.health_port)["ok"] else 1)
    folders = [find_run(server, run_name)] if run_name else all_runs(server)
    rows = [overview(folder) for folder in folders]
    if as_json:
        print_json(rows[0] if run_name else rows)
        return
    say("The service is running." if service_pid(server) else f"The service is down: fedward-server start {server}")
    print_table(CONSOLE, runs_table(rows))
    for failure in filter(None, (row["failure"] for row in rows)):
        say(failure)
    if run_name:
        print_table(CONSOLE, rounds_table(folders[0].record()))


def logs(server: Server, run_name: Run) -> None:
    """Print the log of a run's ServerApp: JSON lines."""
    from server.runs import find_run
    from shared.files import storage_errors

    path = find_run(server, run_name).log
    if not path.exists():
        warn(f"{run_name} has no log yet: no ServerApp has taken it up.")
        return
    with storage_errors(path):
        sys.stdout.write(path.read_text())


def stop(server: Server, run_name: Run) -> None:
    """Stop a run where it stands; 'resume' goes on from there."""
    from server.runs import find_run

    find_run(server, run_name).stop()
    say(f"{run_name} is being stopped. Go on with: fedward-server resume {server} {run_name}")


def wait_for(server: Server, run_name: Run) -> None:
    """Follow a run to its end, as 'run --wait' does; exit 0 only if it completes."""
    from server.operations import follow
    from server.runs import find_run

    exit_with(follow(find_run(server, run_name), ERRORS))


def resume(
    server: Server,
    run_name: Run,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run; exit 0 only if it completes.")] = False,
) -> None:
    """Let a stopped or failed run go on from its last checkpoint, under the same name."""
    from server.operations import follow
    from server.runs import find_run

    folder = find_run(server, run_name)
    folder.resume()
    say(f"{run_name} goes on.")
    if wait:
        exit_with(follow(folder, ERRORS))


def report(
    server: Server, run_name: Run, out: Annotated[Path, typer.Option(help="Folder for report.html and summary.json.")]
) -> None:
    """Write report.html and summary.json of a run, finished or not."""
    from server.operations import warnings_about, write_results
    from server.runs import find_run

    folder = find_run(server, run_name)
    write_results(folder, out)
    for sentence in warnings_about(folder):
        warn(f"warning: {sentence}")
    say(f"report: {out / 'report.html'}")


def export(
    server: Server, run_name: Run, out: Annotated[Path, typer.Option(help="Folder for the model's files.")]
) -> None:
    """Write a run's model as safetensors and ONNX, checked against one another."""
    from server.export import export_model
    from server.runs import find_run
    from shared.provenance.keys import ensure_signing_key

    folder = find_run(server, run_name)
    checkpoint = export_model(folder.record(), folder.path, out, ensure_signing_key(server))
    say(f"Exported the model of round {checkpoint.round} to {out}.")


def add_commands(app: typer.Typer) -> None:
    """Add the commands that are about runs to the operator's."""
    app.command(epilog=_RUN_EXAMPLES)(run)
    app.command(epilog=_STATUS_EXAMPLES)(status)
    app.command(epilog="Example:  fedward-server logs srv run-1")(logs)
    app.command(epilog="Example:  fedward-server stop srv run-1")(stop)
    app.command("wait", epilog="Example:  fedward-server wait srv run-1")(wait_for)
    app.command(epilog="Example:  fedward-server resume srv run-1 --wait")(resume)
    app.command(epilog="Example:  fedward-server report srv run-1 --out report")(report)
    app.command(epilog="Example:  fedward-server export srv run-1 --out model")(export)
