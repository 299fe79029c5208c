"""``fedward-site``: the hospital's command. What is heavy is imported by the command that needs it."""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from client.books_cli import add_commands as add_books
from client.console import (
    CONSOLE,
    ERRORS,
    AsJson,
    SiteFolder,
    TrustingSite,
    doubt,
    open_site,
    print_json,
    say,
    trust_of,
    warn,
)
from client.monitor.cli import add_commands as add_monitor
from shared.errors import FederationError, StorageError
from shared.terminal import print_table

if TYPE_CHECKING:
    from client.intake.glucose import GlucoseReport
    from client.intake.nodules import IntakeReport
    from client.intake.rejects import GlucoseCode, RejectCode

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

  fedward-site intake H1 /export/glucose.csv --same-patient links.csv
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, epilog=_EXAMPLES)

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
    signing_key: Annotated[
        Path | None, typer.Option(help="The server's signing.pub, by which its models are verified.")
    ] = None,
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
    init_site(site, policy, ca, signing_key)
    say(f"Made {site}. Read and sign off {site / 'site.toml'}; send {site / 'site.pub'} to the server's operator.")


@app.command(epilog="Example:  fedward-site declare H1 300")
def declare(
    site: SiteFolder, patients: Annotated[int, typer.Argument(min=1, max=10**9 - 1, help="Public, coarse number.")]
) -> None:
    """Change the declared number of patients in site.toml and site.pub; the server's operator enrols that anew."""
    from client.changes import declare as change

    policy = change(open_site(site).folder, patients)
    say(f"{policy.name} declares {patients} patients, with max-delta {policy.max_delta:g}. Send {site / 'site.pub'}")
    say("to the server's operator, who enrols it while no run goes on; then restart the daemon.")


@app.command(epilog="Example:  fedward-site new-key H1")
def new_key(site: SiteFolder) -> None:
    """Give the site a new key, for instance because the old one was shown to somebody; ledger and data stay."""
    from client.changes import renew_key

    renew_key(open_site(site).folder)
    say("Made a new key. The server's operator revokes the site and then enrols it anew, by its new")
    say(f"{site / 'site.pub'}. Then restart the daemon.")


@app.command(epilog="Example:  fedward-site trust H1 signing.pub")
def trust(
    site: SiteFolder,
    key: Annotated[Path, typer.Argument(metavar="SIGNING.PUB", help="From the server's operator.")],
) -> None:
    """Trust a server's key to sign models; a model that another key signed is then refused."""
    from client.changes import trust as add

    say(f"Trusted: {add(open_site(site).folder, key)}")
    say("Compare these digits with the server's operator, over another line than the file came by.")


@app.command(epilog=_INTAKE_EXAMPLES)
def intake(
    site: SiteFolder,
    export: Annotated[Path, typer.Argument(help="Folder of DICOM files; or CSV file, or folder of them, of glucose.")],
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="CSV of nodules, for DICOM; also looked for inside the export. Default: its annotations.csv."
        ),
    ] = None,
    same_patient: Annotated[
        Path | None,
        typer.Option(help="CSV of two identifiers a row that are one person; every later intake honours it too."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Read an export into the site's store of its kind, de-identified; count what is left out by its code.

    The export is DICOM with a CSV of its nodules, or glucose readings as CSV, whose columns the table [glucose] of
    site.toml may name. Each kind has a store of its own, under one ledger. The server's reference patients are
    prepared by the same command.
    """
    from client.setup import fill_store
    from shared.errors import PolicyError

    opened = open_site(site)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=ERRORS) as progress:
        stages: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total)
            progress.update(stages[stage], completed=done)

        report, replaced = fill_store(
            opened,
            export,
            annotations,
            same_patient=same_patient,
            workers=_workers(workers),
            on_progress=tell,
        )
    _show_intake(report)
    try:
        opened.check_patients()
    except PolicyError as error:
        warn(str(error))
    if replaced:
        warn("The store was replaced. The ledger goes on composing: patients of the old store may be in the new one.")


@app.command(epilog="Example:  fedward-site start H1")
def start(site: SiteFolder) -> None:
    """Serve the server's requests until SIGTERM or Ctrl-C."""
    from client.daemon import Connection, run_daemon
    from client.selftest import examine
    from shared.logs import configure_logs

    opened = open_site(site)
    policy = opened.policy
    if not policy.server:
        raise StorageError(f'{site / "site.toml"} names no server; give it one: server = "host:port".')
    opened.check_augmentation()
    opened.check_patients()
    configure_logs()
    opened.audit.note("started", policy=policy.digest)
    examine(site, policy)
    connection = Connection(
        server=policy.server, keep_alive_s=policy.keep_alive_s, proxy=policy.proxy, health_port=policy.health_port
    )
    run_daemon(site, connection, site=policy.name)
    logging.shutdown()
    os._exit(0)  # all is on disk; to take torch and gRPC apart in order would take seconds


@app.command(epilog="Example:  fedward-site selftest H1 --json")
def selftest(
    site: Annotated[Path | None, typer.Argument(help="The site's folder. Default: every installed task.")] = None,
    task: Annotated[str | None, typer.Option(help="This task only.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: site.toml's, or the cores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Test whether this machine's kernels keep patients apart to the last bit. Exit code 1 if some task is unsafe."""
    from client.selftest import DECLARED, use_threads, verdicts
    from shared.tasks.registry import all_tasks, find_task

    policy = open_site(site).policy if site else None
    names = [find_task(task).name] if task else list(policy.tasks if policy else all_tasks())
    use_threads(threads or (policy.threads if policy else 0))
    found = verdicts(names, policy.declared_patients if policy else DECLARED)
    if as_json:
        print_json({verdict.task: verdict.facts for verdict in found})
    else:
        table = Table("task", "rung", "threads", "largest difference")
        for verdict in found:
            table.add_row(verdict.task, verdict.rung or "unsafe", str(verdict.threads), f"{verdict.difference:.1e}")
        print_table(CONSOLE, table)
    if not all(verdict.safe for verdict in found):
        raise typer.Exit(1)


@app.command(
    epilog="Example:  fedward-site synthesise round-00040.safetensors --count 200 --label malignant --out synthetic"
)
def synthesise(
    checkpoint: Annotated[Path, typer.Argument(help="Weights of a ct-synthesis run, with the JSON beside them.")],
    out: Annotated[Path, typer.Option(help="New folder for PNG sheet, NumPy archive and DICOM files.")],
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 96,
    label: Annotated[str, typer.Option(help="'benign' or 'malignant'.")] = "malignant",
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Same seed, same images.")] = 0,
    site: TrustingSite = None,
) -> None:
    """Draw synthetic nodules from a trained generator; every file says that it shows no patient."""
    from client.synthesise import synthesise as draw

    written = draw(checkpoint, count, label, out, seed, trust=trust_of(site))
    doubt(written.doubt)
    for path in (written.sheet, written.arrays, written.dicom):
        say(str(path))


@app.command(epilog="Example:  fedward-site predict round-00012.safetensors /export/dicom --out predictions.csv")
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="Weights (safetensors), with their JSON beside them.")],
    dicom_dir: Annotated[Path, typer.Argument(help="Folder with the scans.")],
    out: Annotated[Path, typer.Option(help="CSV to write. It stays in this hospital.")],
    annotations: Annotations = Path("annotations.csv"),
    pseudonymous: Annotated[
        bool, typer.Option("--pseudonymous", help="Write pseudonyms, and neither patient number, series nor position.")
    ] = False,
    site: Annotated[
        Path | None, typer.Option(help="Use this site's pseudonyms, and the keys that it trusts. Default: fresh, none.")
    ] = None,
    workers: Workers = None,
) -> None:
    """Score this hospital's own scans with a trained model.

    The CSV names each nodule by the hospital's patient number, the series and the position in mm: it stays here.
    """
    from client.intake.pseudonyms import load_or_create_secret
    from client.predict import predict as score
    from client.setup import PSEUDONYMS, find_annotations, identities_of

    secret = load_or_create_secret(open_site(site).folder / PSEUDONYMS) if site else None
    who = identities_of(site) if site else None
    marked = find_annotations(annotations, dicom_dir)
    scored = score(
        checkpoint,
        dicom_dir,
        marked,
        out,
        secret=secret,
        identities=who,
        pseudonymous=pseudonymous,
        workers=_workers(workers),
        trust=trust_of(site),
        on_doubt=warn,
    )
    _show_intake(scored.intake)
    say(f"malignant from a probability of {scored.point.threshold:.3f} on ({scored.point.rule})")
    say(f"predictions: {out}")


add_books(app)
add_monitor(app)


def _show_intake(report: "IntakeReport | GlucoseReport") -> None:
    from client.intake.nodules import IntakeReport

    if isinstance(report, IntakeReport):
        kept = f"{report.patients} patients, {report.nodules} nodules, {report.records} records"
        counts: list[tuple[RejectCode | GlucoseCode, int]] = [*report.rejected.items()]
    else:
        kept = f"{report.patients} patients, {report.segments} segments, {report.records} records"
        kept += f" ({report.interpolated} interpolated)"
        counts = [*report.counts_by_code.items()]
    say(f"{kept} from {report.files} files")
    if counts:
        table = Table("counted", "how many", "of", "because")
        for code, count in counts:
            table.add_row(code.value, str(count), code.unit, code.meaning)
        print_table(CONSOLE, table)


def _workers(wanted: int | None) -> int:
    cores = os.cpu_count() or 1
    return min(wanted or cores, cores)


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
    ERRORS.print(f"fedward-site: {message}", style="red", highlight=False, soft_wrap=True, markup=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
