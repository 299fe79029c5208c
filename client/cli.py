"""``fedward-site``: the hospital's command. What is heavy is imported by the command that needs it."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from client.monitor.cli import add_commands
from shared.errors import FederationError, StorageError
from shared.terminal import print_table

if TYPE_CHECKING:
    from client.intake.glucose import GlucoseReport
    from client.intake.nodules import IntakeReport
    from client.intake.rejects import GlucoseCode, RejectCode
    from client.site import Site

_CONSOLE, _ERRORS = Console(soft_wrap=True), Console(stderr=True)
_EXAMPLES = """
Examples, in the order of a hospital's first day:

  fedward-site init H1 --name st-elsewhere --server fedward.example.org:9092 --ca ca.crt --declared-patients 200

  fedward-site intake H1 /export/dicom --annotations annotations.csv

  fedward-site intake H1 /export/glucose.csv

  fedward-site start H1

  fedward-site ledger H1

  fedward-site audit verify H1
"""
_INTAKE_EXAMPLES = """
Examples:

  fedward-site intake H1 /export/dicom --annotations annotations.csv

  fedward-site intake H1 /export/glucose.csv
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, epilog=_EXAMPLES)
audit = typer.Typer(add_completion=False, no_args_is_help=True, help="Check and read the audit log.")
app.add_typer(audit, name="audit")

SiteFolder = Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Annotations = Annotated[Path, typer.Option(help="CSV of nodules; also looked for inside the DICOM folder.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes that read. Default: the cores.")]


@app.callback()
def _root() -> None:
    """Take part in a federation: this hospital's keys, data, rules, ledger and daemon."""


@app.command(epilog="Example:  fedward-site init H1 --name h1 --server localhost:9092 --ca SRV/ca.crt")
def init(
    site: SiteFolder,
    name: Annotated[str, typer.Option(help="Public name, as the server's operator enrols it.")],
    server: Annotated[str, typer.Option(help="host:port of the server.")],
    ca: Annotated[Path, typer.Option(help="The server's ca.crt, from its operator.")],
    declared_patients: Annotated[int, typer.Option(min=1, help="Public, coarse number of patients.")] = 200,
) -> None:
    """Make a site's folder: key, rules (site.toml), secret for pseudonyms, ledger, audit log."""
    from client.config import SitePolicy
    from client.setup import init_site
    from shared.errors import PolicyError
    from shared.tasks.registry import all_tasks

    if not server:
        raise PolicyError('Say with --server where the server listens, as "host:port".')
    policy = SitePolicy(
        name=name, declared_patients=declared_patients, tasks=tuple(all_tasks()), max_epsilon=8.0, server=server
    )
    init_site(site, policy, ca)
    _say(f"Made {site}. Read and sign off {site / 'site.toml'}; send {site / 'site.pub'} to the server's operator.")


@app.command(epilog="Example:  fedward-site declare H1 300")
def declare(
    site: SiteFolder, patients: Annotated[int, typer.Argument(min=1, max=10**9 - 1, help="Public, coarse number.")]
) -> None:
    """Change the declared number of patients in site.toml and site.pub; the server's operator enrols that anew."""
    from client.changes import declare as change

    policy = change(_open(site).folder, patients)
    _say(f"{policy.name} declares {patients} patients, with max-delta {policy.max_delta:g}. Send {site / 'site.pub'}")
    _say("to the server's operator, who enrols it while no run goes on; then restart the daemon.")


@app.command(epilog="Example:  fedward-site new-key H1")
def new_key(site: SiteFolder) -> None:
    """Give the site a new key, for instance because the old one was shown to somebody; ledger and data stay."""
    from client.changes import renew_key

    renew_key(_open(site).folder)
    _say("Made a new key. The server's operator revokes the site and then enrols it anew, by its new")
    _say(f"{site / 'site.pub'}. Then restart the daemon.")


@app.command(epilog=_INTAKE_EXAMPLES)
def intake(
    site: SiteFolder,
    export: Annotated[Path, typer.Argument(help="Folder of DICOM files; or CSV file, or folder of them, of glucose.")],
    annotations: Annotated[
        Path | None, typer.Option(help="CSV of nodules, for DICOM; also looked for inside the export.")
    ] = None,
    workers: Workers = None,
) -> None:
    """Read an export into the site's store, de-identified; count what is left out by its code.

    With --annotations the export is DICOM with nodules, without it glucose readings as CSV, whose columns the table
    [glucose] of site.toml may name. The server's reference patients are prepared by the same command.
    """
    from client.setup import fill_store

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=_ERRORS) as progress:
        stages: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
            progress.update(stages[stage], completed=done)

        report, replaced = fill_store(_open(site), export, annotations, workers=_workers(workers), on_progress=tell)
    _show_intake(report)
    if replaced:
        _warn("The store was replaced. The ledger goes on composing: patients of the old store may be in the new one.")


@app.command(epilog="Example:  fedward-site start H1")
def start(site: SiteFolder) -> None:
    """Serve the server's requests until SIGTERM or Ctrl-C."""
    from client.daemon import Connection, run_daemon
    from shared.logs import configure_logs

    opened = _open(site)
    policy = opened.policy
    if not policy.server:
        raise StorageError(f'{site / "site.toml"} names no server; give it one: server = "host:port".')
    opened.check_augmentation()
    configure_logs()
    opened.audit.note("started", policy=policy.digest)
    connection = Connection(
        server=policy.server, keep_alive_s=policy.keep_alive_s, proxy=policy.proxy, health_port=policy.health_port
    )
    run_daemon(site, connection, site=policy.name)
    logging.shutdown()
    os._exit(0)  # all is on disk; to take torch and gRPC apart in order would take seconds


@app.command(epilog="Example:  fedward-site status H1 --json")
def status(
    site: SiteFolder,
    as_json: AsJson = False,
    healthy: Annotated[bool, typer.Option("--healthy", help="Only an exit status: 0 if the daemon is well.")] = False,
) -> None:
    """Show rules, store, budget, audit log and whether the daemon answers."""
    from client.overview import daemon_health, status_of

    if healthy:
        raise typer.Exit(0 if daemon_health(site, _open(site).policy.health_port)["ok"] else 1)
    state = status_of(_open(site))
    if as_json:
        _print_json(state)
        return
    table = Table(show_header=False, box=None)
    for part, facts in state.items():
        for key, value in facts.items():
            table.add_row(part, key, _text(value))
    print_table(_CONSOLE, table)


@app.command(epilog="Example:  fedward-site ledger H1 --json")
def ledger(site: SiteFolder, as_json: AsJson = False) -> None:
    """Show every release this hospital ever made, and what is left of its privacy budget."""
    from client.overview import ledger_of

    books = ledger_of(_open(site))
    if as_json:
        _print_json(books)
        return
    table = Table(*("run", "round", "task", "sample rate", "noise", "steps", "delta", "reserved", "left the hospital"))
    for row in books["releases"]:
        keys = ("run", "round", "task", "sample_rate", "noise_multiplier", "steps", "delta", "reserved_at")
        table.add_row(*(_text(row[key]) for key in keys), row["committed_at"] or "not (yet)")
    print_table(_CONSOLE, table)
    for point in books["epsilon_at_delta"]:
        _say(f"epsilon {_bound(point['epsilon'])} at delta {point['delta']:g}")
    left, most = _bound(books["remaining"]), _bound(books["max_epsilon"])
    _say(f"{left} of max-epsilon {most} left, at max-delta {books['max_delta']:g}")


@app.command(
    epilog="Example:  fedward-site synthesise round-00040.safetensors --count 200 --label malignant --out synthetic"
)
def synthesise(
    checkpoint: Annotated[Path, typer.Argument(help="Weights of a ct-synthesis run, with the JSON beside them.")],
    out: Annotated[Path, typer.Option(help="New folder for PNG sheet, NumPy archive and DICOM files.")],
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 96,
    label: Annotated[str, typer.Option(help="'benign' or 'malignant'.")] = "malignant",
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Same seed, same images.")] = 0,
) -> None:
    """Draw synthetic nodules from a trained generator; every file says that it shows no patient."""
    from client.synthesise import synthesise as draw

    written = draw(checkpoint, count, label, out, seed)
    for path in (written.sheet, written.arrays, written.dicom):
        _say(str(path))


@audit.command(name="verify", epilog="Example:  fedward-site audit verify H1")
def audit_verify(site: SiteFolder, as_json: AsJson = False) -> None:
    """Check the audit log: edits, gaps, a cut end, and its agreement with the ledger. Exit code 1 if it is broken."""
    from client.audit_check import verify

    result = verify(_open(site).audit)
    facts = {"problems": list(result.problems), "remarks": list(result.remarks)}
    if as_json:
        _print_json(
            {"ok": not result.problems, **facts, "lines": result.head.sequence, "head": result.head.sha256},
        )
    else:
        for remark in result.remarks:
            _say(remark)
        for problem in result.problems:
            _warn(problem)
        if not result.problems:
            _say(f"Whole: {result.head.sequence} lines, and they agree with the ledger. Head {result.head.sha256}")
    if result.problems:
        raise typer.Exit(1)


@audit.command(name="show", epilog="Example:  fedward-site audit show H1 --last 20")
def audit_show(
    site: SiteFolder, last: Annotated[int | None, typer.Option(min=1, help="Only so many lines from the end.")] = None
) -> None:
    """Print the audit log as JSON lines, without its hashes."""
    chain, _, _ = _open(site).audit.read()
    for entry in chain.entries[-last if last else 0 :]:
        line = {"sequence": entry.sequence, "time": entry.time, "event": entry.event, **entry.fields}
        typer.echo(json.dumps(line))


@app.command(epilog="Example:  fedward-site predict round-00012.safetensors /export/dicom --out predictions.csv")
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="Weights (safetensors), with their JSON beside them.")],
    dicom_dir: Annotated[Path, typer.Argument(help="Folder with the scans.")],
    out: Annotated[Path, typer.Option(help="CSV to write. It stays in this hospital.")],
    annotations: Annotations = Path("annotations.csv"),
    site: Annotated[Path | None, typer.Option(help="Use this site's pseudonyms. Default: fresh ones.")] = None,
    workers: Workers = None,
) -> None:
    """Score this hospital's own scans with a trained model."""
    from client.intake.pseudonyms import load_or_create_secret
    from client.predict import predict as score
    from client.setup import PSEUDONYMS, find_annotations

    secret = load_or_create_secret(_open(site).folder / PSEUDONYMS) if site else None
    marked = find_annotations(annotations, dicom_dir)
    _show_intake(score(checkpoint, dicom_dir, marked, out, secret=secret, workers=_workers(workers)))
    _say(f"predictions: {out}")


add_commands(app)


def _open(folder: Path) -> "Site":
    from client.site import POLICY, Site

    if not (folder / POLICY).exists():
        raise StorageError(f"There is no site at {folder}. Make one with fedward-site init.")
    return Site(folder)


def _show_intake(report: "IntakeReport | GlucoseReport") -> None:
    from client.intake.nodules import IntakeReport

    if isinstance(report, IntakeReport):
        kept = f"{report.patients} patients, {report.nodules} nodules, {report.records} records"
        counts: list[tuple[RejectCode | GlucoseCode, int]] = [*report.rejected.items()]
    else:
        kept = f"{report.patients} patients, {report.segments} segments, {report.records} records"
        kept += f" ({report.interpolated} interpolated)"
        counts = [*report.counts_by_code.items()]
    _say(f"{kept} from {report.files} files")
    if counts:
        table = Table("counted", "how many", "of", "because")
        for code, count in counts:
            table.add_row(code.value, str(count), code.unit, code.meaning)
        print_table(_CONSOLE, table)


def _workers(wanted: int | None) -> int:
    cores = os.cpu_count() or 1
    return min(wanted or cores, cores)


def _bound(value: float | None) -> str:
    """Return an epsilon as text; JSON has no infinity, so it comes as ``None``."""
    return "unbounded" if value is None else _text(value)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(text: str) -> None:
    _CONSOLE.print(text, highlight=False, markup=False, soft_wrap=True)


def _warn(text: str) -> None:
    _ERRORS.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _print_json(values: object) -> None:
    typer.echo(json.dumps(values, indent=1))


def main() -> None:
    """Run the command; errors become one sentence and exit code 1."""
    try:
        app()
    except FederationError as error:
        message = str(error)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror or type(error).__name__}{where}. Check the path, its permissions and the disk."
    else:
        return
    _ERRORS.print(f"fedward-site: {message}", style="red", highlight=False, soft_wrap=True, markup=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
