"""How good warnings are: what a monitor said of a recorded stream, held against what came.

An *event* of a rule begins with a reading beyond the threshold and ends with ``CALM_MIN`` on the safe side; it counts
if it lasts ``LEAST_MIN``, shorter returns included (Battelino et al., "Clinical Targets for Continuous Glucose
Monitoring Data Interpretation", Diabetes Care 2019, 42(8):1593-1603, take 15 minutes for both). It is *warned of* if an
alert was raised in the hour before it began, *late* if the first alert came in it, up to its last reading beyond the
threshold. An alert is *false* if no event of its kind begins within the hour after or is under way, and an event is
under way until it has ended: for ``CALM_MIN`` after that reading.

    python -m simulations.warnings CHECKPOINT EXPORT.csv[.gz] … [--quantiles 0.05,0.1,0.25,0.5] [--horizons 30,60]

prints a table over whole recordings; interpolated gaps are not part of the stream, as at a bedside.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

import torch

from client.intake.glucose_csv import read_export
from client.intake.glucose_formats import CsvMapping
from client.intake.glucose_text import FileRejected
from client.monitor.alarm import DEFAULT_RULES, Alert, Rule
from client.monitor.memory import Memory
from client.monitor.stream import Lines
from client.monitor.watch import Watch
from client.trained import load_trained
from shared.errors import IntakeError
from shared.tasks.cgm import MAX_GAP_MIN
from simulations.scripts import run_script

CALM_MIN: Final = 15
LEAST_MIN: Final = 15
AHEAD_MIN: Final = 60
Record = Sequence[tuple[int, float]]
"""One patient's ``(time_s, mg/dL)`` in the order of time."""


@dataclass(frozen=True)
class Event:
    """Something to be warned of: it begins and ends at readings beyond the threshold."""

    start_s: int
    end_s: int


@dataclass(frozen=True)
class Warnings:
    """How one rule fared.

    Attributes:
        events: How many came.
        lead_min: Of each event that was warned of, how long before it began.
        late: Events whose first alert came after they began.
        alerts: How many were raised.
        false_alerts: How many of them no event explains.
        days: Patients' days that were watched.
    """

    events: int
    lead_min: tuple[float, ...]
    late: int
    alerts: int
    false_alerts: int
    days: float

    def __add__(self, other: "Warnings") -> "Warnings":
        return Warnings(
            self.events + other.events,
            self.lead_min + other.lead_min,
            self.late + other.late,
            self.alerts + other.alerts,
            self.false_alerts + other.false_alerts,
            self.days + other.days,
        )

    def line(self) -> str:
        """Return it in words."""
        lead = f"{median(self.lead_min):.0f} min" if self.lead_min else "-"
        share = f"{len(self.lead_min) / self.events:.0%}" if self.events else "-"
        rate = f"{self.false_alerts / self.days:.2f}" if self.days else "-"
        return (
            f"{self.events} events, {len(self.lead_min)} warned of ({share}), {self.late} late; median lead {lead}; "
            f"{self.alerts} alerts, {self.false_alerts} false ({rate} a day)"
        )


def events_of(record: Record, rule: Rule) -> list[Event]:
    """Return the events in a record; more than ``CALM_MIN`` without a reading end one, too."""
    found: list[Event] = []
    start = last_beyond = None
    for time_s, glucose in [*record, (sys.maxsize, 0.0)]:
        if start is not None and last_beyond is not None and time_s - last_beyond > 60 * CALM_MIN:
            if last_beyond - start >= 60 * (LEAST_MIN - 5):  # three readings, 5 minutes apart
                found.append(Event(start, last_beyond))
            start = None
        if time_s != sys.maxsize and rule.excess(glucose) > 0.0:
            start = time_s if start is None else start
            last_beyond = time_s
    return found


def compare(record: Record, alerts: Iterable[Alert], rule: Rule) -> Warnings:
    """Hold one patient's alerts against the patient's record."""
    times = sorted(seconds_of(alert.time) for alert in alerts if alert.kind == rule.kind)
    events = events_of(record, rule)
    lead, late = [], 0
    for event in events:
        before = [time_s for time_s in times if event.start_s - 60 * AHEAD_MIN <= time_s < event.start_s]
        if before:
            lead.append((event.start_s - before[0]) / 60.0)
        elif any(event.start_s <= time_s <= event.end_s for time_s in times):
            late += 1
    explained = [t for t in times if any(e.start_s - 60 * AHEAD_MIN <= t <= e.end_s + 60 * CALM_MIN for e in events)]
    days = sum(min(b[0] - a[0], 60 * MAX_GAP_MIN) for a, b in pairwise(record)) / 86_400
    return Warnings(len(events), tuple(lead), late, len(times), len(times) - len(explained), days)


def total(records: Mapping[str, Record], alerts: Sequence[Alert], rule: Rule) -> Warnings:
    """Hold everybody's alerts against their records."""
    whole = Warnings(0, (), 0, 0, 0, 0.0)
    for patient, record in records.items():
        whole += compare(record, [alert for alert in alerts if alert.patient_id == patient], rule)
    return whole


def read_records(export: Path) -> dict[str, Record]:
    """Return the glucose readings of an export in the plain form, by patient.

    Raises:
        FederationError: If it cannot be read.
    """
    try:
        patients = read_export(export, CsvMapping()).patients
    except FileRejected as rejected:
        raise IntakeError(f"{export} cannot be used: {rejected.code}. Check the path and the file.") from None
    records: dict[str, Record] = {}
    for identity, events in patients.items():
        pairs = zip(events.elapsed_s.tolist(), events.glucose.tolist(), strict=True)
        records[identity.patient_id if identity else "one"] = sorted(
            {t: g for t, g in pairs if math.isfinite(g)}.items()
        )
    return records


def replay(checkpoint: Path, records: Mapping[str, Record], rules: Sequence[Rule]) -> list[Alert]:
    """Return the alerts of a monitor that is given the records, everybody's next reading at a time."""
    watch = Watch(load_trained(checkpoint, "glucose-forecast", "forecast glucose"), rules, Memory(None))
    alerts: list[Alert] = []
    for turn in range(max(map(len, records.values()), default=0)):
        rows = ((name, *record[turn]) for name, record in records.items() if turn < len(record))
        alerts += watch.take(Lines([f"{n},{datetime.fromtimestamp(t, UTC):%Y-%m-%dT%H:%M:%S},{g}" for n, t, g in rows]))
    return alerts


def seconds_of(stamp: str) -> int:
    """Return an alert's time in seconds, as :func:`read_records` counts them."""
    time = datetime.fromisoformat(stamp)
    return round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers, such as 0.1,0.25") from error


def main() -> None:
    """Print the table of the module's docstring."""
    parser = argparse.ArgumentParser(description="Hold a monitor's warnings against recordings.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--quantiles", type=_numbers, default="0.05,0.1,0.25,0.5")
    parser.add_argument("--horizons", type=_numbers, default="30")
    parser.add_argument("--days", type=float, help="Only so many last days of each patient.")
    chosen = parser.parse_args()
    for export in chosen.exports:
        records = read_records(export)
        if chosen.days:
            records = {n: [row for row in r if row[0] > r[-1][0] - chosen.days * 86_400] for n, r in records.items()}
        for horizon in map(int, chosen.horizons):
            for quantile in chosen.quantiles:
                sides = (quantile, 1.0 - quantile)
                rules = [
                    replace(rule, quantile=side, horizon_min=horizon)
                    for rule, side in zip(DEFAULT_RULES, sides, strict=True)
                ]
                alerts = replay(chosen.checkpoint, records, rules)
                for rule in rules:
                    result = total(records, alerts, rule).line()
                    sys.stdout.write(f"{export.name} {horizon} min {rule.kind} {rule.quantile:g}: {result}\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(main)
