"""One patient's rows of one file: units and times are made out from this patient's rows alone.

Whether values are mmol/L and in which order day and month stand is often visible only in many rows. Only the
patient's own are asked: else one patient more could decide how the others are read.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from client.intake.clock import DateSerialsError, UnknownTimesError, parse_times
from client.intake.glucose_formats import CsvMapping
from client.intake.rejects import GlucoseCode

BELOW_ANY: Final = 25.0
"""No sensor writes less in mg/dL; in mmol/L nearly every reading is less."""
ABOVE_ANY: Final = 600.0
"""In mg/dL: no sensor writes more; a reading in mg/dL that is taken for mmol/L is more."""
FOREIGN: Final = (12, 0.01)
"""Readings, and share of readings, in the other unit from which a patient counts as mixed."""
WHOLLY: Final = 0.9
"""Share of readings in the other unit from which it is the unit of all of them."""

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


@dataclass(frozen=True)
class Reading:
    """How a file's rows are read.

    Attributes:
        mapping: The hospital's own columns, times and unit.
        mmol: Whether the file's unit is mmol/L.
        check_units: Whether a patient whose values look like the other unit is left out.
    """

    mapping: CsvMapping
    mmol: bool
    check_units: bool

    def events(
        self, times: list[str], glucose: Column, insulin: Column, carbohydrate: Column, *, counts: Counter[GlucoseCode]
    ) -> Events | None:
        """Return one patient's usable rows, or None if there are none; ``counts`` is added to.

        Args:
            times: Text of each row's time.
            glucose, insulin, carbohydrate: As in ``Events``.
            counts: Rows that are left out, by code.
        """
        if self.check_units and (code := _foreign_unit(glucose, mmol=self.mmol)):
            counts[code] += len(times)
            return None
        try:
            parsed = parse_times(times, self.mapping.time_format, self.mapping.zone)
        except UnknownTimesError:
            counts[GlucoseCode.UNKNOWN_TIMES] += len(times)
            return None
        except DateSerialsError:
            counts[GlucoseCode.DATE_SERIALS] += len(times)
            return None
        counts[GlucoseCode.BAD_ROW] += int((~parsed.valid).sum())
        counts[GlucoseCode.CLOCK_CHANGE] += int((parsed.valid & ~parsed.certain).sum())
        rows = np.flatnonzero(parsed.valid & parsed.certain)
        if not len(rows):
            return None
        return Events(parsed.elapsed_s[rows], parsed.local_s[rows], glucose[rows], insulin[rows], carbohydrate[rows])


def _foreign_unit(glucose: Column, *, mmol: bool) -> GlucoseCode | None:
    """Say whether all, or too many, of a patient's values can only be explained by the other unit."""
    foreign = int((glucose > ABOVE_ANY).sum() if mmol else (glucose < BELOW_ANY).sum())
    measured = int(np.isfinite(glucose).sum())
    least, share = FOREIGN
    if foreign < least or foreign < share * measured:
        return None
    return GlucoseCode.WRONG_UNIT if foreign >= WHOLLY * measured else GlucoseCode.MIXED_UNITS
