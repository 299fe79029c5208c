"""A hospital's nodule annotations: a CSV in LUNA16's columns plus a malignancy.

    seriesuid, coordX, coordY, coordZ (mm, DICOM's patient coordinates, LPS), diameter_mm, malignancy (1 to 5)

Columns are separated by comma, semicolon, tab or bar; beside another separator than the comma, a decimal comma is
read. Other columns are ignored, so a list may carry remarks; they are never looked at. A row is one line.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.intake.files import cells_of, delimiter_of, lines_of, open_table
from client.intake.rejects import RejectCode, Rejected
from shared.errors import IntakeError
from shared.tasks.ct_nodules import UNDECIDED_MALIGNANCY

COLUMNS: Final = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm", "malignancy")
MAX_DIAMETER_MM: Final = 200.0
MAX_COORDINATE_MM: Final = 1e5

Point = tuple[float, float, float]


@dataclass(frozen=True, order=True, repr=False)
class Annotation:
    """One nodule as the readers marked it.

    Attributes:
        series_uid: The series in which it was marked.
        centre_mm: Its centre, LPS.
        diameter_mm: Its diameter.
        malignancy: Median of the readers, 1 to 5, never ``UNDECIDED_MALIGNANCY``.
    """

    series_uid: str
    centre_mm: Point
    diameter_mm: float
    malignancy: float

    @property
    def malignant(self) -> bool:
        """Whether the readers' median is above the undecided value."""
        return self.malignancy > UNDECIDED_MALIGNANCY


def read_annotations(path: Path) -> tuple[list[Annotation], Counter[RejectCode]]:
    """Read the usable rows, sorted (the order of the rows leaves no trace), and count the others.

    Raises:
        IntakeError: If there is no such file or it has not the required columns.
    """
    rejected: Counter[RejectCode] = Counter()
    copies: dict[tuple[str, Point], list[Annotation]] = {}
    for row in annotation_rows(path):
        try:
            annotation = _parse(row)
        except Rejected as outcome:
            rejected[outcome.code] += 1
            continue
        copies.setdefault((annotation.series_uid, annotation.centre_mm), []).append(annotation)
    usable = []
    for group in copies.values():
        agreed = len(set(group)) == 1
        usable += group[:agreed]
        rejected[RejectCode.DUPLICATE_ANNOTATION] += len(group) - agreed
    return sorted(usable), +rejected


def annotation_rows(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[Mapping[str, str]]:
    """Yield each row by column name; an empty mapping for a line that is no row.

    Raises:
        IntakeError: If there is no such file or it has not ``columns``.
    """
    problem = ""
    try:
        with open_table(path) as handle:
            lines = lines_of(handle)
            first = next(lines, "") or ""
            delimiter = delimiter_of(first)
            header = _cells(first, delimiter)
            if not set(columns) <= set(header):
                problem = f"The annotations need a first row with the columns {', '.join(columns)}."
            else:
                for line in lines:
                    if line is None or line.strip():
                        yield dict(zip(header, _cells(line, delimiter), strict=False))
                return
    except OSError as error:
        problem = f"Cannot read the annotations {path}: {error.strerror or type(error).__name__}."
    # Raised outside the handlers: the cause can quote the row.
    raise IntakeError(problem)


def _cells(line: str | None, delimiter: str) -> list[str]:
    """Return a line's cells, their decimal commas as points; none of a line that is no row."""
    with suppress(csv.Error):
        cells = [cell.strip() for cell in cells_of(line or "", delimiter)]
        return cells if delimiter == "," else [cell.replace(",", ".") for cell in cells]
    return []


def _parse(row: Mapping[str, str]) -> Annotation:
    series_uid = row.get("seriesuid", "")
    try:
        x, y, z, diameter_mm, malignancy = (float(row[name]) for name in COLUMNS[1:])
    except (KeyError, ValueError):
        raise Rejected(RejectCode.BAD_ROW) from None
    finite = all(math.isfinite(value) for value in (x, y, z, diameter_mm, malignancy))
    if not series_uid or not finite or max(abs(x), abs(y), abs(z)) > MAX_COORDINATE_MM:
        raise Rejected(RejectCode.BAD_ROW)
    if not 0 < diameter_mm <= MAX_DIAMETER_MM:
        raise Rejected(RejectCode.BAD_DIAMETER)
    if not 1 <= malignancy <= 5:
        raise Rejected(RejectCode.BAD_MALIGNANCY)
    if malignancy == UNDECIDED_MALIGNANCY:
        raise Rejected(RejectCode.UNDECIDED)
    return Annotation(series_uid, (x, y, z), diameter_mm, malignancy)
