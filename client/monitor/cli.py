"""The commands that use a forecaster on a hospital's own patients: ``monitor``, ``personalise``, ``what-if``."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer

from client.console import CONSOLE, ERRORS, TrustingSite, doubt, say, trust_of
from shared.errors import IntakeError, PlanError

if TYPE_CHECKING:
    from client.intake.glucose_formats import CsvMapping
    from client.monitor.alarm import Alert, Rule
    from client.monitor.memory import Memory
    from client.monitor.stream import Lines
    from client.monitor.watch import Watch, Write

_HTTP = "http://"
_LOOPBACKS = ("127.0.0.1", "localhost")
_LAST_PORT = 65_535
_NO_ZONE = (
    "--time-zone is not given: times without an offset are taken as they are, and up to 14 hours ahead of the clock."
)
_MONITOR_EXAMPLES = """
Examples:

  fedward-site monitor --demo

  fedward-site monitor round-00030.safetensors --from readings.csv --alerts alerts.jsonl

  gateway | fedward-site monitor round-00030.safetensors --from - --alerts alerts.jsonl --fhir outbox --time-zone
  Europe/Vienna

  fedward-site monitor round-00030.safetensors --from http://127.0.0.1:8700 --alerts alerts.jsonl --low-quantile 0.1
"""
_PERSONALISE_EXAMPLE = """
Examples:

  fedward-site personalise round-00030.safetensors glucose.csv --out ours.safetensors

  fedward-site personalise ours.safetensors glucose.csv --patient 17 --out patient-17.safetensors
"""
_WHAT_IF_EXAMPLE = (
    "Example:  fedward-site what-if round-00030.safetensors glucose.csv --patient 17 --insulin +2 --carbs -20"
)

Checkpoint = Annotated[Path, typer.Argument(help="Weights (safetensors), with their JSON beside them.")]
Export = Annotated[Path, typer.Argument(help="CSV file of glucose readings, or a folder of them.")]
PatientId = Annotated[str, typer.Option("--patient", help="The patient's number, as in the export.")]
SiteToml = Annotated[
    Path | None, typer.Option("--site", help="Site whose site.toml [glucose] names the columns, and whose keys count.")
]


def monitor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Weights (safetensors), with their JSON beside them.", show_default=False)
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="A file that grows, - for standard input, or http://127.0.0.1:PORT to listen."),
    ] = None,
    alerts: Annotated[
        Path | None, typer.Option(help="Append alerts here, a JSON object a line. Names patients.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="What is remembered. Default: the alerts' file + .state")] = None,
    fhir: Annotated[Path | None, typer.Option(help="Folder for alerts as FHIR R4 resources. Names patients.")] = None,
    time_zone: Annotated[str | None, typer.Option(help="Of times without an offset, e.g. Europe/Vienna.")] = None,
    low: Annotated[float, typer.Option(help="Warn below, mg/dL.")] = 70.0,
    high: Annotated[float, typer.Option(help="Warn above, mg/dL.")] = 180.0,
    low_quantile: Annotated[float | None, typer.Option(help="Of the forecast, watched for lows.")] = None,
    high_quantile: Annotated[float | None, typer.Option(help="Of the forecast, watched for highs.")] = None,
    horizon: Annotated[int, typer.Option(help="Minutes to look ahead, at most 60.")] = 30,
    hysteresis: Annotated[float, typer.Option(help="mg/dL back in range before an episode ends.")] = 10.0,
    refractory: Annotated[int, typer.Option(help="Least minutes between two alerts of a kind.")] = 30,
    once: Annotated[bool, typer.Option("--once", help="End at the end of the file.")] = False,
    view: Annotated[bool | None, typer.Option(help="Live view. Default: if this is a terminal.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Watch a simulated patient's day. Writes nothing.")] = False,
    site: TrustingSite = None,
) -> None:
    """Forecast at every reading of a stream, and warn of lows and highs before they come.

    Lines are patient_id,timestamp,glucose_mg_dl[,insulin_units[,carbohydrate_g]] or JSON objects with these names.
    Without --alerts, alerts go to standard output. No medical device: a model's forecast, not reviewed by a clinician.
    """
    if demo and (checkpoint or source or alerts or state or fhir or time_zone or once or site):
        raise PlanError("--demo has its own model and patient, and writes nothing. Give it thresholds and --view only.")
    if not demo and (checkpoint is None or source is None):
        raise PlanError("Give a checkpoint and --from SOURCE; or give --demo, to see a simulated patient's day.")
    import torch

    torch.set_num_threads(1)  # a cycle of a ward takes milliseconds; more threads only wait for one another
    rules = _rules((low, high), (low_quantile, high_quantile), horizon, hysteresis, refractory)
    shown = CONSOLE.is_terminal if view is None else view
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if checkpoint is None or source is None:
        _demo(rules, shown)
        return
    from client.monitor.memory import Memory
    from client.monitor.watch import Watch
    from client.trained import load_trained

    zone = _zone(time_zone)
    if fhir and zone is None:
        raise PlanError("FHIR demands times with an offset. Give the readings' zone with --time-zone.")
    trained = load_trained(checkpoint, "glucose-forecast", "forecast glucose", trust_of(site), fitted=True)
    doubt(trained.doubt)
    remembered = state or (alerts.with_name(alerts.name + ".state") if alerts else None)
    with ExitStack() as stack:
        memory = stack.enter_context(Memory(remembered))
        watch = Watch(trained, rules, memory, writers=_writers(alerts, fhir, quiet=shown), zone=zone)
        if zone is None:
            ERRORS.print(_NO_ZONE, highlight=False, soft_wrap=True)
        with suppress(KeyboardInterrupt):  # how a monitor ends
            _follow(watch, _source(source, memory, once, stack), rules, shown)
        ERRORS.print(_counted(watch), highlight=False, soft_wrap=True)


def _demo(rules: "tuple[Rule, ...]", shown: bool) -> None:
    from client.monitor.demo import SIMULATED, demo_day, demo_watch, last_time

    say(SIMULATED)
    watch = demo_watch(rules, say)
    with suppress(KeyboardInterrupt):
        _follow(watch, demo_day(watch, say, shown=shown), rules, shown, lambda: last_time(watch))
    say(_counted(watch))


def _follow(
    watch: "Watch",
    source: "Iterator[Lines]",
    rules: "tuple[Rule, ...]",
    shown: bool,
    now: Callable[[], float] = time.time,
) -> None:
    if not shown:
        for lines in source:
            watch.take(lines)
        return
    from client.monitor.view import Screen

    with Screen(CONSOLE, rules, now) as screen:
        for lines in source:
            watch.take(lines)
            screen.show(watch.sights, _counted(watch))


def _source(source: str, memory: "Memory", once: bool, stack: ExitStack) -> "Iterator[Lines]":
    from client.monitor.listen import listening
    from client.monitor.stream import growing_file, standard_input

    if source == "-":
        return standard_input()
    if not source.startswith(_HTTP):
        return growing_file(Path(source), memory.position, key=memory.secret, follow=not once)
    host, _, port = source.removeprefix(_HTTP).rstrip("/").rpartition(":")
    if host not in _LOOPBACKS or not port.isdecimal() or int(port) > _LAST_PORT:
        raise PlanError("The monitor listens on this machine only: --from http://127.0.0.1:PORT.")
    number, posts = stack.enter_context(listening(int(port)))
    ERRORS.print(f"listening on {_HTTP}127.0.0.1:{number}", highlight=False, soft_wrap=True)
    return posts


def _writers(alerts: Path | None, fhir: Path | None, *, quiet: bool) -> "list[Write]":
    from client.monitor.fhir import make_folder, write_fhir
    from client.monitor.memory import AlertFile

    writers: list[Write] = []
    if fhir:
        make_folder(fhir)
        writers.append(lambda fresh: write_fhir(fhir, fresh))
    if alerts:
        writers.append(AlertFile(alerts).append)
    elif not quiet:
        writers.append(_print_alerts)
    return writers


def _print_alerts(alerts: "Sequence[Alert]") -> None:
    for alert in alerts:
        typer.echo(json.dumps(alert.to_json()))


def _rules(
    thresholds: tuple[float, float],
    quantiles: tuple[float | None, float | None],
    horizon: int,
    hysteresis: float,
    refractory: int,
) -> "tuple[Rule, ...]":
    from client.monitor.alarm import DEFAULT_RULES

    if thresholds[0] >= thresholds[1]:
        raise PlanError("--low must be less than --high.")
    return tuple(
        replace(
            rule,
            threshold_mg_dl=threshold,
            quantile=rule.quantile if quantile is None else quantile,
            horizon_min=horizon,
            hysteresis_mg_dl=hysteresis,
            refractory_min=refractory,
        )
        for rule, threshold, quantile in zip(DEFAULT_RULES, thresholds, quantiles, strict=True)
    )


def _zone(name: str | None) -> ZoneInfo | None:
    try:
        return ZoneInfo(name) if name else None
    except (ZoneInfoNotFoundError, ValueError, OSError):
        text = "There is no such --time-zone; write it like Europe/Vienna."
    raise IntakeError(text)


def _counted(watch: "Watch") -> str:
    """Return how many lines had which fate, and how many alerts were of which kind: nothing of a patient."""
    lines = Counter({fate.value: number for fate, number in watch.fates.items()})
    return f"{_numbers(lines) or 'no lines yet'}; alerts: {_numbers(watch.alerts) or 'none'}"


def _numbers(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def personalise(
    checkpoint: Checkpoint,
    export: Export,
    out: Annotated[Path, typer.Option(help="New file *.safetensors. It stays in this hospital.")],
    patient: Annotated[
        str | None, typer.Option(help="The patient's number, as in the export. Default: everybody in it.")
    ] = None,
    site: SiteToml = None,
) -> None:
    """Fit the global model to the hospital's own patients, or to one, for forecasts in this hospital only.

    The file is marked: no run starts from it. 'monitor' uses one patient's model for that patient alone.
    """
    from client.monitor.personal import personalise as fit
    from client.monitor.personal import read_patients, write_personal
    from client.trained import load_trained

    trained = load_trained(checkpoint, "glucose-forecast", "forecast glucose", trust_of(site), fitted=True)
    doubt(trained.doubt)
    if trained.owner and not (patient and trained.fits(patient)):
        raise PlanError(
            "This model was fitted to another patient. Start from the global model, or from the hospital's."
        )
    model, gain = fit(trained.model, read_patients(export, patient, _mapping(site)))
    say(f"Judged on {gain.windows} forecasts within the last six hours of each record, global → own model:")
    say(f"  RMSE at 30 minutes {gain.rmse_30[0]:.1f} → {gain.rmse_30[1]:.1f} mg/dL")
    say(f"  pinball loss {gain.pinball[0]:.2f} → {gain.pinball[1]:.2f} mg/dL")
    if not gain.steps:
        say("No training helped on the six hours before: the global model stays the better one. Nothing is written.")
        return
    write_personal(out, model, patient, trained)
    say(f"own model: {out}")


def what_if(
    checkpoint: Checkpoint,
    export: Export,
    patient: PatientId,
    insulin: Annotated[float, typer.Option(help="Units more, or with a minus less.")] = 0.0,
    carbs: Annotated[float, typer.Option(help="Grams more, or with a minus less.")] = 0.0,
    site: SiteToml = None,
) -> None:
    """NOT FOR CLINICAL USE: the forecast under another dose or meal, after a patient's last reading."""
    from client.monitor.personal import read_patients
    from client.monitor.what_if import WARNING
    from client.monitor.what_if import what_if as ask
    from client.trained import load_trained

    trained = load_trained(checkpoint, "glucose-forecast", "forecast glucose", trust_of(site), fitted=True)
    doubt(trained.doubt)
    if not trained.fits(patient):
        raise PlanError("This model was fitted to another patient. Use that patient's, or the global one.")
    answer = ask(trained.model, read_patients(export, patient, _mapping(site)), insulin, carbs)
    say(WARNING, style="bold red")
    say(f"last reading {answer.last_mg_dl:.0f} mg/dL; insulin {insulin:+g} units, carbohydrate {carbs:+g} g")
    for step in (2, 5, 8, 11):
        (low, middle, high), (low_2, middle_2, high_2) = answer.as_recorded[step], answer.changed[step]
        say(
            f"  in {5 * (step + 1)} min: {middle:.0f} ({low:.0f} to {high:.0f}) mg/dL as recorded, "
            f"{middle_2:.0f} ({low_2:.0f} to {high_2:.0f}) changed"
        )


def _mapping(site: Path | None) -> "CsvMapping | None":
    from client.intake.glucose_formats import read_mapping

    return read_mapping(site / "site.toml") if site else None


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the hospital's own."""
    app.command(epilog=_MONITOR_EXAMPLES)(monitor)
    app.command(epilog=_PERSONALISE_EXAMPLE)(personalise)
    app.command(epilog=_WHAT_IF_EXAMPLE)(what_if)
