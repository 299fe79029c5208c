"""``fedward-server``: the operator's command. What is heavy is imported by the command that needs it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from server.console import CONSOLE, AsJson, Server, print_json, say, warn
from server.run_cli import add_commands
from shared.errors import FederationError
from shared.terminal import print_table

_EXAMPLES = """
Examples:

  fedward-server init srv --name fedward.example.org --fleet-port 9092

  fedward-server enrol srv st-elsewhere.pub --name st-elsewhere

  fedward-server start srv

  fedward-server run srv plan.toml --wait

  fedward-server report srv run-1 --out report
"""
_ENROL_EXAMPLES = """
Examples:

  fedward-server enrol srv st-elsewhere.pub --name st-elsewhere

A hospital that declares another number of patients sends its site.pub again:

  fedward-server enrol srv st-elsewhere.pub
"""
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run the aggregator of a federation of hospitals.",
    epilog=_EXAMPLES,
)


@app.command(
    epilog="Example:  fedward-server init srv --name fedward.example.org --fleet-port 9092 --heldout reference"
)
def init(
    server: Server,
    name: Annotated[list[str], typer.Option(help="DNS name or address hospitals connect to; repeat for each.")],
    fleet_port: Annotated[int, typer.Option(min=1, max=65535, help="Port hospitals connect to.")] = 9092,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Reference patients, prepared by 'fedward-site intake': a store or the site's folder."),
    ] = None,
) -> None:
    """Make a new aggregator: certificate authority, server certificate, settings."""
    from server.config import SETTINGS, make_server

    config = make_server(server, name, fleet_port, heldout)
    address = f"{name[0]}:{config.fleet_port}"
    say(f"Made {server}. Give each hospital {server / 'ca.crt'}, {server / 'signing.pub'} and the address {address}.")
    say(f"Settings are in {server / SETTINGS}. Back up the whole folder; it holds private keys.")


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
    say(f"{server / 'server.crt'} is valid until {renew_certificate(server, name or ()):%Y-%m-%d}.")
    say("A running service takes it up when it is restarted; rounds that are under way go on.")


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
        say(f"{before.name} declares {now} patients from now on; before, {before.declared_patients}.")
        return
    member = members.enrol(key, name, declared_patients)
    say(f"Enrolled {member.name}, declared patients {member.declared_patients}.")


@app.command(epilog="Example:  fedward-server revoke srv st-elsewhere")
def revoke(server: Server, name: Annotated[str, typer.Argument(metavar="SITE", help="The site's name.")]) -> None:
    """Shut a hospital out; a running service does so at once, and its key never comes back."""
    from server.config import ServerConfig
    from server.members import Members

    ServerConfig.read(server)
    Members(server).revoke(name)
    say(f"Revoked {name}.")


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
        print_json(rows)
        return
    table = Table("site", "declared patients", "enrolled", "connected")
    for row in rows:
        shown = {True: "yes", False: "no", None: "service is down"}[row["connected"]]
        table.add_row(row["name"], str(row["declared_patients"]), "revoked" if row["revoked"] else "yes", shown)
    print_table(CONSOLE, table)


@app.command(epilog="Example:  fedward-server start srv")
def start(server: Server) -> None:
    """Run the service in the foreground until SIGTERM or Ctrl-C; its log is JSON lines on standard error."""
    import logging

    from server.config import ServerConfig
    from server.supervisor import serve_forever
    from shared.logs import configure_logs
    from shared.provenance.keys import ensure_signing_key

    config = ServerConfig.read(server)
    ensure_signing_key(server)  # a folder of an earlier version has none
    configure_logs()
    if not config.heldout:
        logging.getLogger("server.cli").warning("heldout in server.toml is empty: no run's model will be validated")
    serve_forever(server)
    sys.stderr.flush()
    os._exit(0)  # all has ended; to unload torch and gRPC would take seconds and save nothing


add_commands(app)


def main() -> None:
    """Run the command; errors become one sentence and exit code 1."""
    try:
        app()
    except FederationError as error:
        warn(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        warn("Interrupted. A submitted run goes on: fedward-server status shows it.")
        sys.exit(130)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        warn(f"{reason}{where}. Check the path, its permissions and the disk.")
        sys.exit(1)


if __name__ == "__main__":
    main()
