"""One CSV file of a glucose export: text, header, rows, and every patient's readings and doses.

What people call a CSV file is read: with or without gzip, UTF-8, UTF-16 or Windows-1252, separated by comma,
semicolon, tab or bar, with a decimal comma, with lines before the header, rows in any order. A row is one line, so
that no patient's row can swallow another's. Nothing of a row leaves this module but parsed numbers: a problem is a
code, and no message quotes a cell.
"""

import csv
import math
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Final

import numpy as np

from client.intake.files import cells_of
from client.intake.glucose_events import Events, Index, Reading
from client.intake.glucose_formats import PRESETS, CsvMapping, Rows
from client.intake.glucose_text import FileRejected, find_header, open_lines
from client.intake.pseudonyms import PatientIdentity
from client.intake.rejects import GlucoseCode
from shared.tasks.cgm import MG_DL_PER_MMOL_L

SENSOR_LIMITS: Final = {"low": 40.0, "lo": 40.0, "high": 400.0, "hi": 400.0}
"""Words that a sensor writes beyond its limits, and the limits of Dexcom and Libre in mg/dL."""
MAX_INSULIN_UNITS: Final = 300.0
MAX_CARBOHYDRATE_G: Final = 1000.0
_HEADER_LINES: Final = 40


@dataclass(frozen=True, repr=False)
class Export:
    """What one file holds.

    Attributes:
        patients: Identity to events; None stands for the one patient of a file that names nobody.
        counts: Rows that are left out or changed, by code.
        rows: All rows below the header.
        covariates: Which of insulin and carbohydrates the file has a column for.
    """

    patients: dict[PatientIdentity | None, Events]
    counts: Counter[GlucoseCode]
    rows: int
    covariates: frozenset[str]


def read_export(path: Path, mapping: CsvMapping) -> Export:
    """Read one file.

    Raises:
        FileRejected: If it cannot be used as a whole.
        IntakeError: If the mapping names a zone that does not exist.
    """
    code = None
    try:
        with open_lines(path) as lines:
            table = _Table(lines, mapping)
            table.read()
        return table.export()
    except FileRejected as outcome:
        code = outcome.code
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeError):
        code = GlucoseCode.UNREADABLE
    # Raised outside the handlers: a cause could quote the file.
    raise FileRejected(code)


@dataclass(repr=False)
class _Columns:
    """The rows that count, column by column."""

    patient: "array[int]" = field(default_factory=lambda: array("q"))
    time: list[str] = field(default_factory=list)
    glucose: "array[float]" = field(default_factory=lambda: array("d"))
    insulin: "array[float]" = field(default_factory=lambda: array("d"))
    carbohydrate: "array[float]" = field(default_factory=lambda: array("d"))


class _Table:
    """A file on its way from rows to patients."""

    def __init__(self, below: Iterator[str | None], mapping: CsvMapping) -> None:
        lines = list(islice(below, _HEADER_LINES))
        layouts = [mapping.layout] if mapping.layout else list(PRESETS.values())
        number, self.header = find_header([line or "" for line in lines], layouts)
        self.mapping = mapping
        self.source = chain(lines[number + 1 :], below)
        self.layout = self.header.layout
        self.columns = _Columns()
        self.counts: Counter[GlucoseCode] = Counter()
        self.people: dict[str, int] = {}
        self.about: dict[str, str] = {}
        self.rows = 0
        self.unit_at = self.header.at(self.layout.unit) if self.layout.unit else -1
        self.mmol = self._declared() == "mmol/L"

    def _declared(self) -> str:
        if self.mapping.unit:
            return self.mapping.unit
        heading = next(n for n, at in self.header.names.items() if at == self.header.at(*self.layout.glucose))
        return "mmol/L" if "mmol" in heading else "mg/dL"

    def read(self) -> None:
        """Take in every row."""
        layout, at = self.layout, self.header.at
        where = {name: at(*getattr(layout, name)) for name in ("patient", "time", "insulin", "carbohydrate")}
        glucose_at = at(*layout.glucose)
        takes_glucose, takes_insulin = self._selector(layout.glucose_rows), self._selector(layout.insulin_rows)
        excluded = self._selector(layout.excluded_rows) if layout.excluded_rows else None
        width = max(self.header.names.values()) + 1
        for row in self._cells():
            self.rows += 1
            if len(row) < width:
                row += [""] * (width - len(row))  # noqa: PLW2901 - a spreadsheet drops empty cells at the end
            glucose = row[glucose_at].strip() if takes_glucose(row) else ""
            insulin = row[where["insulin"]].strip() if where["insulin"] >= 0 and takes_insulin(row) else ""
            carbohydrate = row[where["carbohydrate"]].strip() if where["carbohydrate"] >= 0 else ""
            if not (glucose or insulin or carbohydrate) or (excluded and excluded(row)):
                self.counts[GlucoseCode.OTHER_ROW] += 1
                self._note(row)
                continue
            patient = row[where["patient"]].strip() if where["patient"] >= 0 else ""
            time = row[where["time"]].strip()
            self._take(row, patient, time, glucose, insulin, carbohydrate)

    def _cells(self) -> Iterator[list[str]]:
        """Yield the rows that have a cell; a line that is no row counts as bad."""
        for line in self.source:
            try:
                row = cells_of(line, self.header.delimiter) if line is not None else None
            except csv.Error:
                row = None
            if row is None:
                self.rows += 1
                self.counts[GlucoseCode.BAD_ROW] += 1
            elif any(row):
                yield row

    def _selector(self, rows: Rows | None) -> Callable[[list[str]], bool]:
        if rows is None:
            return lambda _row: True
        at, values = self.header.at(rows[0]), rows[1]
        return lambda row: row[at].strip().lower() in values

    def _note(self, row: list[str]) -> None:
        """Remember what Clarity's first rows say of the patient."""
        kind, info = self.header.at("Event Type"), self.header.at("Patient Info")
        if kind >= 0 and info >= 0 and row[info].strip():
            self.about.setdefault(row[kind].strip().casefold(), row[info].strip())

    def _take(self, row: list[str], patient: str, time: str, glucose: str, insulin: str, carbohydrate: str) -> None:
        try:
            value = self._glucose(row, glucose)
            units = _amount(insulin, MAX_INSULIN_UNITS)
            grams = _amount(carbohydrate, MAX_CARBOHYDRATE_G)
            if not time or "\0" in patient or (self.layout.patient and not patient):
                raise ValueError
        except ValueError:
            self.counts[GlucoseCode.BAD_ROW] += 1
            return
        columns = self.columns
        columns.patient.append(self.people.setdefault(patient, len(self.people)))
        columns.time.append(time)
        columns.glucose.append(value)
        columns.insulin.append(units)
        columns.carbohydrate.append(grams)

    def _glucose(self, row: list[str], text: str) -> float:
        if not text:
            return math.nan
        if (limit := SENSOR_LIMITS.get(text.lower())) is not None:
            self.counts[GlucoseCode.LIMIT_WORD] += 1
            return limit
        mmol = self.mmol
        if self.unit_at >= 0 and (unit := row[self.unit_at].strip().lower()):
            mmol = unit.startswith("mmol")
        return _number(text) * (MG_DL_PER_MMOL_L if mmol else 1.0)

    def export(self) -> Export:
        """Return what was read. Every patient's rows are judged by themselves."""
        columns = self.columns
        times = np.array(columns.time, object)
        values = tuple(np.array(column) for column in (columns.glucose, columns.insulin, columns.carbohydrate))
        covariates = (n for n in ("insulin", "carbohydrate") if self.header.at(*getattr(self.layout, n)) >= 0)
        reading = Reading(self.mapping, mmol=self.mmol, check_units=self.unit_at < 0 and self.layout.check_units)
        patients: dict[PatientIdentity | None, Events] = {}
        whose = np.array(columns.patient, np.int64)
        for name, rows in zip(self.people, _rows_of(whose, len(self.people)), strict=True):
            events = reading.events(times[rows].tolist(), *(value[rows] for value in values), counts=self.counts)
            if events is not None:
                patients[self._identity(name)] = events
        return Export(patients, +self.counts, self.rows, frozenset(covariates))

    def _identity(self, name: str) -> PatientIdentity | None:
        """Return who ``name`` is; in a file of one patient, whom its first rows name, if anybody."""
        if name:
            return PatientIdentity("", name)
        if number := self.about.get("patientidentifier"):
            return PatientIdentity("", number)
        person = [self.about.get(part, "") for part in ("firstname", "lastname", "dateofbirth")]
        return PatientIdentity("name", "\n".join(person)) if all(person) else None


def _rows_of(patient: Index, people: int) -> list[Index]:
    """Return each patient's rows, in the order of the file."""
    order = np.argsort(patient, kind="stable")
    return np.split(order, np.searchsorted(patient[order], np.arange(1, people)))[:people]


def _amount(text: str, most: float) -> float:
    if not text:
        return math.nan
    value = _number(text)
    if not 0.0 <= value <= most:
        raise ValueError
    return value


def _number(text: str) -> float:
    value = float(text.replace(",", "."))
    if not math.isfinite(value):
        raise ValueError
    return value
