"""The columns of glucose exports: what is known by its header, and what a hospital names in ``site.toml``.

    [glucose]
    patient = "MRN"                    # absent: one patient a file, or a folder
    time = "Messzeit"
    glucose = "Gewebezucker"
    insulin = "Bolus"                  # optional, fast-acting units
    carbohydrate = "KH"                # optional, grams
    time-format = "%d.%m.%Y %H:%M"     # absent: recognised; "serial" for a spreadsheet's date serials
    time-zone = "Europe/Vienna"        # absent: the clock's changes are not known
    unit = "mmol/L"                    # absent: what the heading says, else mg/dL

Columns are matched without regard to case, spaces and underscores. Known exports need no table:

- the plain form ``patient_id,timestamp,glucose_mg_dl[,insulin_units,carbohydrate_g]``;
- Dexcom Clarity: rows of type EGV; fast-acting insulin; carbohydrates;
- Abbott LibreView: the sensor's own readings (record type 0), rapid-acting insulin, carbohydrates; scans and strips
  are left out, for they are other measurements at other times;
- Tidepool: ``cbg``, ``bolus`` (normal part) and ``wizard`` rows, named as in Tidepool's data model;
- MIMIC-III ``CHARTEVENTS.csv`` and ``LABEVENTS.csv``: the items in ``MIMIC_CHART`` and ``MIMIC_LAB``, which are
  those of the MIMIC Code Repository's concept ``glucose`` (Johnson et al., JAMIA 2018, 25(1):32-39). They are
  hours apart, so that hardly a segment survives; intake counts what is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from client.intake.tables import read_table
from shared.errors import IntakeError
from shared.suggest import suggestion

MIMIC_LAB: Final = frozenset({"50809", "50931"})
"""Glucose in whole blood (blood gas), glucose in serum."""
MIMIC_CHART: Final = frozenset({"807", "811", "1529", "3744", "3745", "220621", "225664", "226537"})
"""Finger stick, Glucose (70-105), Glucose, Blood Glucose, BloodGlucose, serum, finger stick, whole blood."""
UNITS: Final = ("mg/dL", "mmol/L")
SERIAL: Final = "serial"

Rows = tuple[str, frozenset[str]]
"""A column and the values, in lower case, that select a row."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where an export keeps what intake needs; of several names for a column the first present counts.

    Attributes:
        time: Columns of the time.
        glucose: Columns of the glucose.
        patient: Columns of the patient's number; none means one patient a file.
        insulin: Columns of fast-acting insulin, in units.
        carbohydrate: Columns of carbohydrates, in grams.
        unit: Column that states each row's unit.
        glucose_rows: Rows whose glucose counts.
        insulin_rows: Rows whose insulin counts.
        excluded_rows: Rows that do not count at all.
        check_units: Whether a file that seems to mix units is refused.
    """

    time: tuple[str, ...]
    glucose: tuple[str, ...]
    patient: tuple[str, ...] = ()
    insulin: tuple[str, ...] = ()
    carbohydrate: tuple[str, ...] = ()
    unit: str | None = None
    glucose_rows: Rows | None = None
    insulin_rows: Rows | None = None
    excluded_rows: Rows | None = None
    check_units: bool = True


def _mimic(items: frozenset[str], excluded: Rows | None) -> Layout:
    return Layout(
        patient=("SUBJECT_ID",),
        time=("CHARTTIME",),
        glucose=("VALUENUM",),
        unit="VALUEUOM",
        glucose_rows=("ITEMID", items),
        excluded_rows=excluded,
        check_units=False,  # single very low values are real in intensive care
    )


PRESETS: Final[Mapping[str, Layout]] = {
    "plain": Layout(
        patient=("patient_id",),
        time=("timestamp",),
        glucose=("glucose_mg_dl", "glucose_mmol_l"),
        insulin=("insulin_units",),
        carbohydrate=("carbohydrate_g",),
    ),
    "dexcom-clarity": Layout(
        time=("Timestamp (YYYY-MM-DDThh:mm:ss)",),
        glucose=("Glucose Value (mg/dL)", "Glucose Value (mmol/L)"),
        insulin=("Insulin Value (u)",),
        carbohydrate=("Carb Value (grams)",),
        glucose_rows=("Event Type", frozenset({"egv"})),
        insulin_rows=("Event Subtype", frozenset({"fast-acting"})),
    ),
    "libreview": Layout(
        time=("Device Timestamp",),
        glucose=("Historic Glucose mg/dL", "Historic Glucose mmol/L"),
        insulin=("Rapid-Acting Insulin (units)",),
        carbohydrate=("Carbohydrates (grams)",),
        glucose_rows=("Record Type", frozenset({"0"})),
    ),
    "tidepool": Layout(
        time=("localTime", "deviceTime", "time"),
        glucose=("value",),
        insulin=("normal",),
        carbohydrate=("carbInput",),
        unit="units",
        glucose_rows=("type", frozenset({"cbg"})),
        insulin_rows=("type", frozenset({"bolus"})),
    ),
    # The chart has the columns of the laboratory and a mark of errors, so it must be asked first.
    "mimic-chartevents": _mimic(MIMIC_CHART, ("ERROR", frozenset({"1"}))),
    "mimic-labevents": _mimic(MIMIC_LAB, None),
}


@dataclass(frozen=True, kw_only=True)
class CsvMapping:
    """How a hospital's exports are read; everything may be left to their headers.

    Attributes:
        layout: The columns, or None to recognise a known export.
        time_format: As for ``strptime``, ``serial``, or None to recognise it.
        time_zone: IANA name of the zone of local times, or None.
        unit: One of ``UNITS``, or None for what the heading or the unit's column says.
    """

    layout: Layout | None = None
    time_format: str | None = None
    time_zone: str | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        if self.unit is not None and self.unit not in UNITS:
            meant = suggestion(self.unit, UNITS)
            raise IntakeError(f"The unit in site.toml [glucose] must be one of {', '.join(UNITS)}.{meant}")
        _ = self.zone

    @property
    def zone(self) -> ZoneInfo | None:
        """The zone of local times.

        Raises:
            IntakeError: If there is no zone of that name.
        """
        if self.time_zone is None:
            return None
        try:
            return ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            text = "There is no such time-zone as site.toml [glucose] names; write it like 'Europe/Vienna'."
        raise IntakeError(text)


_COLUMNS: Final = ("patient", "time", "glucose", "insulin", "carbohydrate")
_OPTIONS: Final = tuple(field.name.replace("_", "-") for field in fields(CsvMapping) if field.name != "layout")


def parse_mapping(table: Mapping[str, Any]) -> CsvMapping:
    """Return the mapping that a table ``[glucose]`` of ``site.toml`` describes.

    Raises:
        IntakeError: If a key is unknown or not a text, or the columns are incomplete.
    """
    if unknown := sorted(set(table) - {"preset", *_COLUMNS, *_OPTIONS}):
        raise IntakeError(f"site.toml [glucose] has unknown keys: {', '.join(unknown)}.")
    if wrong := sorted(key for key, value in table.items() if not isinstance(value, str) or not value):
        raise IntakeError(f"site.toml [glucose] needs a text for: {', '.join(wrong)}.")
    options = {key.replace("-", "_"): table[key] for key in _OPTIONS if key in table}
    return replace(CsvMapping(), layout=_layout(table), **options)


def read_mapping(path: Path) -> CsvMapping:
    """Return the mapping in the ``site.toml`` at ``path``; without a table ``[glucose]``, known exports only.

    Raises:
        StorageError: If the file cannot be read.
        IntakeError: If it is not TOML or the table is wrong.
    """
    return parse_mapping(read_table(path, "glucose"))


def _layout(table: Mapping[str, Any]) -> Layout | None:
    columns: dict[str, Any] = {name: (table[name],) for name in _COLUMNS if name in table}
    if "preset" in table:
        if table["preset"] not in PRESETS:
            meant = suggestion(str(table["preset"]), PRESETS)
            raise IntakeError(f"The preset in site.toml [glucose] must be one of: {', '.join(PRESETS)}.{meant}")
        return replace(PRESETS[table["preset"]], **columns)
    if columns and not {"time", "glucose"} <= set(columns):
        raise IntakeError("site.toml [glucose] must name at least the columns time and glucose.")
    return Layout(**columns) if columns else None
