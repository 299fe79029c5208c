"""``fedward-server``: the operator's command. What is heavy is imported by the command that needs it."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shared.errors import FederationError
from shared.terminal import print_table

_CONSOLE = Console()
_EXAMPLES = """
Examples:

  fedward-server init srv --name fedward.example.org --fleet-port 9092

  fedward-server enrol srv st-elsewhere.pub --name st-elsewhere

  fedward-server start srv

  fedward-server run srv plan.toml --wait

  fedward-server report srv run-1 --out report
"""
_RUN_EXAMPLES = """
Examples:

  fedward-server run srv plan.toml --wait

  fedward-server run srv plan.toml --name pilot --init public.safetensors

A plan.toml needs no more than: task = "nodule-classification", rounds = 12, epsilon = 8.0
"""
_ENROL_EXAMPLES = """
Examples:

  fedward-server enrol srv st-elsewhere.pub --name st-elsewhere

A hospital that declares another number of patients sends its site.pub again:

  fedward-server enrol srv st-elsewhere.pub
"""
_STATUS_EXAMPLES = """
Examples:

  fedward-server status srv

  fedward-server status srv run-1 --json

  fedward-server status srv --healthy
"""
Server = Annotated[Path, typer.Argument(metavar="SRV", help="The aggregator's folder.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run the aggregator of a federation of hospitals.",
    epilog=_EXAMPLES,
)


@app.command(
    epilog="Example:  fedward-server init srv --name fedward.example.org --fleet-port 9092 --heldout reference/store"
)
def init(
    server: Server,
    name: Annotated[list[str], typer.Option(help="DNS name or address hospitals connect to; repeat for each.")],
    fleet_port: Annotated[int, typer.Option(min=1, max=65535, help="Port hospitals connect to.")] = 9092,
    heldout: Annotated[Path | None, typer.Option(help="Reference patients, prepared by 'fedward-site intake'.")] = None,
) -> None:
    """Make a new aggregator: certificate authority, server certificate, settings."""
    from server.config import SETTINGS, make_server

    config = make_server(server, name, fleet_port, heldout)
    _say(f"Made {server}. Give each hospital {server / 'ca.crt'} and the address {name[0]}:{config.fleet_port}.")
    _say(f"Settings are in {server / SETTINGS}. Back up the whole folder; it holds private keys.")


@app.command(epilog="Examples:\n\n  fedward-server renew srv\n\n  fedward-server renew srv --name fedward.example.org")
def renew(
    server: Server,
    name: Annotated[
        list[str] | None, typer.Option(help="DNS name or address; repeat for each. Default: the present ones.")
    ] = None,
) -> None:
    """Renew the aggregator's certificate, or change its names; no hospital has to do anything."""
    from server.certificates import renew_certificate
    from server.config import ServerConfig

    ServerConfig.read(server)
    _say(f"{server / 'server.crt'} is valid until {renew_certificate(server, name or ()):%Y-%m-%d}.")
    _say("A running service takes it up when it is restarted; rounds that are under way go on.")


@app.command(epilog=_ENROL_EXAMPLES)
def enrol(
    server: Server,
    site_pub: Annotated[Path, typer.Argument(metavar="SITE.PUB", help="The hospital's public key.")],
    name: Annotated[str | None, typer.Option(help="The site's name. Default: the one in the key.")] = None,
    declared_patients: Annotated[
        int | None, typer.Option(min=1, help="Its declared number. Default: the one in the key.")
    ] = None,
) -> None:
    """Enrol a hospital by its site.pub; a running service lets it in at once.

    An enrolled hospital's key with another declared number changes that number, while no run goes on.
    """
    from server.config import ServerConfig
    from server.members import Members, read_site_key
    from server.runs import running_runs

    ServerConfig.read(server)
    members, key = Members(server), read_site_key(site_pub)
    if before := members.redeclare(key, name, declared_patients, running_runs(server)):
        now = declared_patients or key.declared_patients
        _say(f"{before.name} declares {now} patients from now on; before, {before.declared_patients}.")
        return
    member = members.enrol(key, name, declared_patients)
    _say(f"Enrolled {member.name}, declared patients {member.declared_patients}.")


@app.command(epilog="Example:  fedward-server revoke srv st-elsewhere")
def revoke(server: Server, name: Annotated[str, typer.Argument(metavar="SITE", help="The site's name.")]) -> None:
    """Shut a hospital out; a running service does so at once, and its key never comes back."""
    from server.config import ServerConfig
    from server.members import Members

    ServerConfig.read(server)
    Members(server).revoke(name)
    _say(f"Revoked {name}.")


@app.command(epilog="Example:  fedward-server sites srv --json")
def sites(server: Server, as_json: AsJson = False) -> None:
    """Show who is enrolled, and who is connected."""
    from dataclasses import asdict

    from server.config import ServerConfig
    from server.members import Members
    from server.operations import connected_sites

    connected = connected_sites(ServerConfig.read(server))
    rows = [
        {**asdict(member), "connected": None if connected is None else not member.revoked and member.name in connected}
        for member in Members(server).all()
    ]
    if as_json:
        _json(rows)
        return
    table = Table("site", "declared patients", "enrolled", "connected")
    for row in rows:
        shown = {True: "yes", False: "no", None: "service is down"}[row["connected"]]
        table.add_row(row["name"], str(row["declared_patients"]), "revoked" if row["revoked"] else "yes", shown)
    print_table(_CONSOLE, table)


@app.command(epilog="Example:  fedward-server start srv")
def start(server: Server) -> None:
    """Run the service in the foreground until SIGTERM or Ctrl-C; its log is JSON lines on standard error."""
    import logging

    from server.config import ServerConfig
    from server.supervisor import serve_forever
    from shared.logs import configure_logs

    config = ServerConfig.read(server)
    configure_logs()
    if not config.heldout:
        logging.getLogger("server.cli").warning("heldout in server.toml is empty: no run's model will be validated")
    serve_forever(server)
    sys.stderr.flush()
    os._exit(0)  # all has ended; to unload torch and gRPC would take seconds and save nothing


@app.command(epilog=_RUN_EXAMPLES)
def run(
    server: Server,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.TOML", help="At least task, rounds and epsilon.")],
    name: Annotated[str | None, typer.Option(help="The run's name. Default: run-1, run-2 …")] = None,
    init_: Annotated[Path | None, typer.Option("--init", help="Start from a public checkpoint.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run; exit 0 only if it completes.")] = False,
) -> None:
    """Submit a run and print its name."""
    from server.config import ServerConfig
    from server.members import require_members
    from server.operations import follow
    from server.planning import agree_plan, open_heldout, read_plan_request
    from server.runs import submit
    from server.supervisor import service_pid

    config = ServerConfig.read(server)
    request = read_plan_request(plan)
    agreed = agree_plan(request, require_members(server), init_)
    if open_heldout(config, agreed.task) is None:
        _warn("There are no held-out patients (heldout in server.toml): nothing will be validated.")
    if not agreed.private:
        _warn("epsilon is inf: this run promises no privacy, and no hospital takes part whose site.toml demands noise.")
    folder = submit(server, agreed, name, init_)
    _CONSOLE.print(folder.name, highlight=False, markup=False)
    if service_pid(server) is None:
        _warn(f"The service is not running; the run begins when it is: fedward-server start {server}")
    if wait:
        _exit_with(follow(folder, Console(stderr=True)))


@app.command(epilog=_STATUS_EXAMPLES)
def status(
    server: Server,
    run_name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run, in detail.")] = None,
    as_json: AsJson = False,
    healthy: Annotated[bool, typer.Option("--healthy", help="Only an exit status: 0 if the service is well.")] = False,
) -> None:
    """Show the runs, or one run's rounds."""
    from server.config import ServerConfig
    from server.operations import overview, rounds_table, runs_table
    from server.runs import all_runs, find_run
    from server.supervisor import service_pid
    from shared.telemetry import health_of

    config = ServerConfig.read(server)
    if healthy:
        raise typer.Exit(0 if health_of(config.health_port)["ok"] else 1)
    folders = [find_run(server, run_name)] if run_name else all_runs(server)
    rows = [overview(folder) for folder in folders]
    if as_json:
        _json(rows[0] if run_name else rows)
        return
    _say("The service is running." if service_pid(server) else f"The service is down: fedward-server start {server}")
    print_table(_CONSOLE, runs_table(rows))
    for failure in filter(None, (row["failure"] for row in rows)):
        _say(failure)
    if run_name:
        print_table(_CONSOLE, rounds_table(folders[0].record()))


@app.command(epilog="Example:  fedward-server logs srv run-1")
def logs(server: Server, run_name: Run) -> None:
    """Print the log of a run's ServerApp: JSON lines."""
    from server.runs import find_run
    from shared.files import storage_errors

    path = find_run(server, run_name).log
    if not path.exists():
        _warn(f"{run_name} has no log yet: no ServerApp has taken it up.")
        return
    with storage_errors(path):
        sys.stdout.write(path.read_text())


@app.command(epilog="Example:  fedward-server stop srv run-1")
def stop(server: Server, run_name: Run) -> None:
    """Stop a run where it stands; 'resume' goes on from there."""
    from server.runs import find_run

    find_run(server, run_name).stop()
    _say(f"{run_name} is being stopped. Go on with: fedward-server resume {server} {run_name}")


@app.command(epilog="Example:  fedward-server resume srv run-1 --wait")
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
    _say(f"{run_name} goes on.")
    if wait:
        _exit_with(follow(folder, Console(stderr=True)))


@app.command(epilog="Example:  fedward-server report srv run-1 --out report")
def report(
    server: Server, run_name: Run, out: Annotated[Path, typer.Option(help="Folder for report.html and summary.json.")]
) -> None:
    """Write report.html and summary.json of a run, finished or not."""
    from server.operations import write_results
    from server.runs import find_run

    write_results(find_run(server, run_name), out)
    _say(f"report: {out / 'report.html'}")


@app.command(epilog="Example:  fedward-server export srv run-1 --out model")
def export(
    server: Server, run_name: Run, out: Annotated[Path, typer.Option(help="Folder for the model's files.")]
) -> None:
    """Write a run's model as safetensors and ONNX, checked against one another."""
    from server.export import export_model
    from server.runs import find_run

    folder = find_run(server, run_name)
    checkpoint = export_model(folder.record(), folder.path, out)
    _say(f"Exported the model of round {checkpoint.round} to {out}.")


def _say(sentence: str) -> None:
    _CONSOLE.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _warn(sentence: str) -> None:
    Console(stderr=True).print(f"fedward-server: {sentence}", highlight=False, markup=False, soft_wrap=True)


def _json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _exit_with(failure: str | None) -> None:
    if failure is not None:
        _warn(failure)
        sys.exit(1)


def main() -> None:
    """Run the command; errors become one sentence and exit code 1."""
    try:
        app()
    except FederationError as error:
        _warn(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        _warn("Interrupted. A submitted run goes on: fedward-server status shows it.")
        sys.exit(130)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        _warn(f"{reason}{where}. Check the path, its permissions and the disk.")
        sys.exit(1)


if __name__ == "__main__":
    main()
