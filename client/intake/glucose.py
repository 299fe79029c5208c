"""Intake of glucose records: CSV exports become a prepared store of 5-minute segments.

    find files → read rows → patients → clean → segments → grid → store

``client.intake.glucose_formats`` says which exports are known, ``client.intake.glucose_grid`` states the rules.
One bad row, or file of a folder, is counted under its code and never stops the rest; the result does not depend on
the order of rows or files, nor on their names where the rows name the patient. An export that does not is one
patient's: all such files in one folder below the source belong to the same patient. Of the other files, each name
without its suffix (``.csv``, ``.csv.gz``) is a patient.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from client.intake.exports import csv_stem, is_csv_name
from client.intake.files import list_files
from client.intake.glucose_csv import read_export
from client.intake.glucose_events import Events
from client.intake.glucose_formats import CsvMapping
from client.intake.glucose_grid import STUCK_MIN, to_grid
from client.intake.glucose_text import FileRejected
from client.intake.identities import Identities
from client.intake.pseudonyms import PatientIdentity
from client.intake.rejects import GlucoseCode
from shared.errors import IntakeError
from shared.records import PatientItem, write_store
from shared.tasks.cgm import COVARIATES, MAX_GAP_MIN, MIN_SEGMENT, RANGE_MG_DL, STEP_MIN, STORE_KIND

Progress = Callable[[str, int, int], None]
"""Called with a stage (``files`` or ``patients``), how many are done, and of how many."""

ADVICE: Final[Mapping[GlucoseCode, str]] = {
    GlucoseCode.UNREADABLE: "The export cannot be read to its end; export or copy it again.",
    GlucoseCode.EMPTY: "The export is empty; export it again.",
    GlucoseCode.COLUMNS_MISSING: (
        "The export has no header row with the columns of a known format; name its columns in site.toml [glucose]."
    ),
    GlucoseCode.UNKNOWN_TIMES: (
        "The form of the export's times is not known, or day and month cannot be told apart, or their zone is missing; "
        "set time-format and time-zone in site.toml [glucose]."
    ),
    GlucoseCode.DATE_SERIALS: (
        "The export's times are a spreadsheet's date serials, which may be rounded; export them as text, or accept "
        'them with time-format = "serial" in site.toml [glucose].'
    ),
    GlucoseCode.TOO_LARGE: "The export unfolds to far more than an export can hold; export it again, unpacked.",
    GlucoseCode.WRONG_UNIT: (
        "The glucose does not look like the unit of its heading, which is mg/dL where it names none: values of 2 to 30 "
        'are mmol/L. Set unit = "mmol/L" (or "mg/dL") in site.toml [glucose].'
    ),
    GlucoseCode.MIXED_UNITS: (
        "The export seems to hold mmol/L and mg/dL under one heading; set unit in site.toml [glucose] or export "
        "each unit to a file of its own."
    ),
}
"""What to do about a file, or a patient's rows, left out."""


@dataclass(frozen=True)
class GlucoseReport:
    """What intake made of an export: counts only. They are sensitive and stay in the hospital.

    Attributes:
        patients: Patients in the store.
        segments: Continuous segments in the store.
        records: Instants in the store.
        interpolated: Those of them that no reading is near.
        files: Files examined.
        rows: Rows in the files that could be read.
        counts_by_code: How often each code was given; see ``GlucoseCode`` for what it counts.
    """

    patients: int
    segments: int
    records: int
    interpolated: int
    files: int
    rows: int
    counts_by_code: Mapping[GlucoseCode, int]

    def counts(self) -> dict[str, Any]:
        """Return the report as plain JSON, the codes in their own order."""
        numbers = {n: getattr(self, n) for n in ("patients", "segments", "records", "interpolated", "files", "rows")}
        found = self.counts_by_code
        return numbers | {"codes": {code.value: found[code] for code in GlucoseCode if code in found}}


def prepare_glucose(
    source: Path,
    store: Path,
    secret: bytes,
    *,
    mapping: CsvMapping | None = None,
    identities: Identities | None = None,
    on_progress: Progress | None = None,
) -> GlucoseReport:
    """Prepare a hospital's glucose records for the forecasting task.

    Args:
        source: A CSV file, or a folder searched with all its folders; links are not followed.
        store: Where the prepared store goes; an older one there is replaced.
        secret: The site's own, see ``client.intake.pseudonyms``.
        mapping: How the files are read; by default known exports only, see ``client.intake.glucose_formats``.
        identities: Who is one patient; by default each identifier, and no links.
        on_progress: Told how far the work is.

    Raises:
        IntakeError: If the source or the only file cannot be used, or nothing usable is left.
        StorageError: If the store cannot be written.
    """
    tell = on_progress or (lambda _stage, _done, _total: None)
    counts: Counter[GlucoseCode] = Counter()
    paths = _find_files(source, store, counts)
    key = partial((identities or Identities()).key, secret)
    patients, rows, covariates = _read(source, paths, mapping or CsvMapping(), key, counts, tell)
    items = []
    for done, (name, parts) in enumerate(patients.items(), start=1):
        fields = to_grid(_joined(parts), counts)
        if fields is not None:
            items.append(PatientItem(name, fields))
        tell("patients", done, len(patients))
    if not items:
        raise IntakeError(_nothing_left(len(paths), counts))
    attributes = {
        "step_min": STEP_MIN,
        "max_gap_min": MAX_GAP_MIN,
        "min_segment": MIN_SEGMENT,
        "range_mg_dl": list(RANGE_MG_DL),
        "stuck_min": STUCK_MIN,
        "covariates": [name for name in COVARIATES if name in covariates],
    }
    written = write_store(store, kind=STORE_KIND, patients=items, attributes=attributes)
    return GlucoseReport(
        patients=len(written),
        segments=sum(int(item.arrays["segment"][-1]) + 1 for item in items),
        records=int(written.offsets[-1]),
        interpolated=int((~written.arrays["measured"]).sum()),
        files=len(paths),
        rows=rows,
        counts_by_code=dict(+counts),
    )


def _nothing_left(files: int, counts: Counter[GlucoseCode]) -> str:
    reasons = ", ".join(f"{code} {counts[code]}" for code in GlucoseCode if counts[code]) or "it is empty"
    advice = next((f" {text}" for code, text in ADVICE.items() if counts[code] and code.unit == "row"), "")
    return f"Nothing usable is left of the export ({files} files: {reasons}).{advice}"


def _find_files(source: Path, store: Path, counts: Counter[GlucoseCode]) -> list[Path]:
    if source.is_file():
        return [source]
    if source.exists() and not source.is_dir():
        raise IntakeError("The export is a pipe, socket or device. Copy it to a file, and name that.")
    if not source.is_dir():
        raise IntakeError("There is no such file or folder of glucose exports. Name the CSV file or its folder.")
    found = list_files(source, frozenset({store.resolve()}))
    named = [path for path in found.files if is_csv_name(path.name)]
    counts[GlucoseCode.SYMLINK] += found.links
    counts[GlucoseCode.NOT_A_FILE] += found.special
    counts[GlucoseCode.UNREADABLE] += found.unreadable
    counts[GlucoseCode.NOT_CSV] += len(found.files) - len(named)
    return named


Patients = dict[bytes, list[Events]]


def _read(
    source: Path,
    paths: list[Path],
    mapping: CsvMapping,
    key: Callable[[PatientIdentity], bytes],
    counts: Counter[GlucoseCode],
    tell: Progress,
) -> tuple[Patients, int, set[str]]:
    """Read every file; return events by pseudonym, the number of rows, and the covariates that some file has."""
    patients: Patients = defaultdict(list)
    rows, covariates, problem = 0, set[str](), None
    for done, path in enumerate(paths, start=1):
        try:
            export = read_export(path, mapping)
        except FileRejected as outcome:
            problem = outcome.code
            counts[problem] += 1
        else:
            counts.update(export.counts)
            rows += export.rows
            covariates |= export.covariates
            for identity, events in export.patients.items():
                patients[key(identity or _owner(source, path))].append(events)
        tell("files", done, len(paths))
    if problem and len(paths) == 1:
        raise IntakeError(ADVICE[problem])
    return patients, rows, covariates


def _owner(source: Path, path: Path) -> PatientIdentity:
    """Return the patient of a file that names none: its folder below the source, else the file itself."""
    below = path.relative_to(source.resolve()).parts if source.is_dir() else (path.name,)
    return PatientIdentity("file", below[0] if len(below) > 1 else csv_stem(path.name))


def _joined(parts: list[Events]) -> Events:
    return Events(*(np.concatenate([getattr(part, name) for part in parts]) for name in Events.__dataclass_fields__))
