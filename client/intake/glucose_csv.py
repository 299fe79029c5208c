"""One CSV file of a glucose export: text, header, rows, and every patient's readings and doses.

What people call a CSV file is read: with or without gzip, UTF-8, UTF-16 or Windows-1252, separated by comma,
semicolon, tab or bar, with a decimal comma, with lines before the header, rows in any order. Nothing of a row
leaves this module but parsed numbers: a problem is a code, and no message quotes a cell.
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
from typing import Final, TextIO

import numpy as np
import numpy.typing as npt

from client.intake.clock import DateSerialsError, Times, UnknownTimesError, parse_times
from client.intake.glucose_formats import PRESETS, CsvMapping, Rows
from client.intake.glucose_text import FileRejected, find_header, open_text
from client.intake.pseudonyms import PatientIdentity
from client.intake.rejects import GlucoseCode
from shared.tasks.cgm import MG_DL_PER_MMOL_L

SENSOR_LIMITS: Final = {"low": 40.0, "lo": 40.0, "high": 400.0, "hi": 400.0}
"""Words that a sensor writes beyond its limits, and the limits of Dexcom and Libre in mg/dL."""
BELOW_ANY: Final = 25.0
"""No sensor writes less in mg/dL; in mmol/L nearly every reading is less."""
ABOVE_ANY: Final = 600.0
"""In mg/dL: no sensor writes more; a reading in mg/dL that is taken for mmol/L is more."""
FOREIGN: Final = (12, 0.01)
"""Readings, and share of readings, in the other unit from which a patient or file counts as mixed."""
MAX_INSULIN_UNITS: Final = 300.0
MAX_CARBOHYDRATE_G: Final = 1000.0
_HEADER_LINES: Final = 40
_MAX_FIELD: Final = 131_072

Column = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True, repr=False)
class Events:
    """One patient's rows in one file, in the order of the file. NaN where a row has no such value.

    Attributes:
        elapsed_s, local_s: int64 ``(N,)``, see ``Times``.
        glucose: ``(N,)`` mg/dL.
        insulin: ``(N,)`` units.
        carbohydrate: ``(N,)`` grams.
    """

    elapsed_s: Index
    local_s: Index
    glucose: Column
    insulin: Column
    carbohydrate: Column


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
        with open_text(path) as handle:
            table = _Table(handle, mapping)
            table.read()
        return table.export()
    except FileRejected as outcome:
        code = outcome.code
    except UnknownTimesError:
        code = GlucoseCode.UNKNOWN_TIMES
    except DateSerialsError:
        code = GlucoseCode.DATE_SERIALS
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

    def __init__(self, handle: TextIO, mapping: CsvMapping) -> None:
        lines = list(islice((line[:_MAX_FIELD] for line in handle), _HEADER_LINES))
        layouts = [mapping.layout] if mapping.layout else list(PRESETS.values())
        number, self.header = find_header(lines, layouts)
        self.mapping = mapping
        self.source = chain(lines[number + 1 :], handle)
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
        """Yield the rows that have a cell; a row that is no CSV counts as bad."""
        reader = csv.reader(self.source, delimiter=self.header.delimiter)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                self.rows += 1
                self.counts[GlucoseCode.BAD_ROW] += 1
                continue
            if any(row):
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
        """Return what was read.

        Raises:
            FileRejected: If units are mixed.
            UnknownTimesError: See there.
            DateSerialsError: See there.
        """
        columns = self.columns
        patient = np.array(columns.patient, np.int64)
        values = tuple(np.array(column) for column in (columns.glucose, columns.insulin, columns.carbohydrate))
        covariates = (n for n in ("insulin", "carbohydrate") if self.header.at(*getattr(self.layout, n)) >= 0)
        patients: dict[PatientIdentity | None, Events] = {}
        if len(patient):
            if self.unit_at < 0 and self.layout.check_units:
                _refuse_mixed_units(patient, values[0], mmol=self.mmol)
            times = parse_times(columns.time, self.mapping.time_format, self.mapping.zone)
            self.counts[GlucoseCode.BAD_ROW] += int((~times.valid).sum())
            self.counts[GlucoseCode.CLOCK_CHANGE] += int((times.valid & ~times.certain).sum())
            rows = _rows_of(patient, times, len(self.people))
            patients = {
                self._identity(name): Events(times.elapsed_s[r], times.local_s[r], *(v[r] for v in values))
                for name, r in zip(self.people, rows, strict=True)
                if len(r)
            }
        return Export(patients, +self.counts, self.rows, frozenset(covariates))

    def _identity(self, name: str) -> PatientIdentity | None:
        """Return who ``name`` is; in a file of one patient, whom its first rows name, if anybody."""
        if name:
            return PatientIdentity("", name)
        if number := self.about.get("patientidentifier"):
            return PatientIdentity("", number)
        person = [self.about.get(part, "") for part in ("firstname", "lastname", "dateofbirth")]
        return PatientIdentity("name", "\n".join(person)) if all(person) else None


def _rows_of(patient: Index, times: Times, people: int) -> list[Index]:
    """Return each patient's usable rows, in the order of the file."""
    usable = np.flatnonzero(times.valid & times.certain)
    order = usable[np.argsort(patient[usable], kind="stable")]
    return np.split(order, np.searchsorted(patient[order], np.arange(1, people)))


def _refuse_mixed_units(patient: Index, glucose: Column, *, mmol: bool) -> None:
    """Refuse a file in which a patient, or all together, have many values that only the other unit explains."""
    foreign = glucose > ABOVE_ANY if mmol else glucose < BELOW_ANY
    measured = np.isfinite(glucose)
    odd, every = (
        np.bincount(patient[foreign], minlength=patient.max() + 1),
        np.bincount(patient[measured], minlength=patient.max() + 1),
    )
    least, share = FOREIGN
    odd, every = np.append(odd, odd.sum()), np.append(every, every.sum())
    if ((odd >= least) & (odd >= share * every)).any():
        raise FileRejected(GlucoseCode.MIXED_UNITS)


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
