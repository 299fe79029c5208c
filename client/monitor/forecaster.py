"""A patient's last hours as the model takes them, and the forecasts of many patients at once.

The rules for gaps, repeats and stuck sensors are intake's (``client.intake.glucose_grid``), applied to what is known
so far: the grid ends at the last reading, and nothing is interpolated beyond it.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.intake.glucose_grid import REPORTED_MG_DL, STUCK_MIN, STUCK_READINGS
from shared.tasks.cgm import MAX_GAP_MIN, STEP_MIN
from shared.tasks.glucose_forecast import HISTORY, forecast

_STEP_S: Final = 60 * STEP_MIN
_GAP_S: Final = 60 * MAX_GAP_MIN
KEPT_S: Final = HISTORY * _STEP_S + _GAP_S
"""How much of a record a forecast can depend on."""
Window = npt.NDArray[np.float32]


class Fate(StrEnum):
    """What became of a line of the stream; only these words are counted, shown and logged."""

    READ = "read"
    LATE = "late"
    TOO_LATE = "too-late"
    DUPLICATE = "duplicate-reading"
    CONFLICT = "conflicting-reading"
    DOSE = "dose"
    HEADER = "header"
    BAD_ROW = "bad-row"
    OUT_OF_RANGE = "out-of-range"
    CLOCK_CHANGE = "clock-change"
    AHEAD = "ahead-of-time"
    OTHER_PATIENT = "other-patient"
    CUT_OFF = "cut-off"


@dataclass
class History:
    """What is kept of one patient's record.

    Attributes:
        readings: ``(time_s, mg/dL)`` in the order of time.
        doses: ``(time_s, units, grams)`` in the order of time.
        void: Times at which readings contradict one another; none of them counts.
        last_s: Time of the latest reading, of whatever fate; None before the first.
        offset_s: What the local clock is ahead of that time, at the last reading.
    """

    readings: list[tuple[int, float]] = field(default_factory=list)
    doses: list[tuple[int, float, float]] = field(default_factory=list)
    void: list[int] = field(default_factory=list)
    last_s: int | None = None
    offset_s: int = 0

    def add(self, time_s: int, glucose: float, offset_s: int = 0) -> Fate:
        """Take in a reading. ``READ`` means that it is the latest and a forecast is due."""
        if self.last_s is not None and time_s < self.last_s - KEPT_S:
            return Fate.TOO_LATE
        at = bisect_left(self.readings, (time_s,))
        if at < len(self.readings) and self.readings[at][0] == time_s:
            if self.readings[at][1] == glucose:
                return Fate.DUPLICATE
            del self.readings[at]
            insort(self.void, time_s)
            return Fate.CONFLICT
        if time_s in self.void:
            return Fate.CONFLICT
        self.readings.insert(at, (time_s, glucose))
        if self.last_s is not None and time_s <= self.last_s:
            return Fate.LATE
        self.last_s, self.offset_s = time_s, offset_s
        self._forget()
        return Fate.READ

    def dose(self, time_s: int, units: float, grams: float) -> Fate:
        """Take in insulin and carbohydrates; the same row again counts once."""
        if self.last_s is not None and time_s < self.last_s - KEPT_S:
            return Fate.TOO_LATE
        if (row := (time_s, units, grams)) in self.doses:
            return Fate.DUPLICATE
        insort(self.doses, row)
        return Fate.DOSE

    def after_gap(self) -> bool:
        """Whether the latest reading begins a new segment."""
        return len(self.readings) < 2 or self.readings[-1][0] - self.readings[-2][0] > _GAP_S

    def stuck(self) -> bool:
        """Whether the sensor has been writing one value for so long that intake would not believe it."""
        return bool(self.readings) and _stuck(*self._segment())

    def window(self) -> Window | None:
        """Return the last readings on the grid ``(HISTORY, 4)``; None where they are too few or the sensor is stuck."""
        if not self.readings:
            return None
        time, value = self._segment()
        grid = time[-1] - _STEP_S * np.arange(HISTORY - 1, -1, -1)
        if grid[0] < time[0] or _stuck(time, value):
            return None
        columns = np.zeros((HISTORY, 4), np.float32)
        columns[:, 0] = np.interp(grid, time, value)
        columns[:, 3] = (grid + self.offset_s) // 60 % 1440
        for time_s, units, grams in self.doses:
            at = int(np.searchsorted(grid, time_s))
            if at < HISTORY and grid[at] - time_s < _STEP_S:
                columns[at, 1] += units
                columns[at, 2] += grams
        return columns

    def _segment(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return times and values since the last gap."""
        time, value = (np.array(column) for column in zip(*self.readings, strict=True))
        breaks = np.flatnonzero(np.diff(time) > _GAP_S) + 1
        begin = int(breaks[-1]) if len(breaks) else 0
        return time[begin:], value[begin:]

    def _forget(self) -> None:
        least = (self.last_s or 0) - KEPT_S
        self.readings = [row for row in self.readings if row[0] >= least]
        self.doses = [row for row in self.doses if row[0] >= least]
        self.void = [time_s for time_s in self.void if time_s >= least]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "readings": self.readings, "doses": self.doses, "void": self.void, "last": self.last_s,
            "offset": self.offset_s,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "History":
        """Return what :meth:`to_json` made plain."""
        return cls(
            readings=[(int(time_s), float(glucose)) for time_s, glucose in values["readings"]],
            doses=[(int(time_s), float(units), float(grams)) for time_s, units, grams in values["doses"]],
            void=[int(time_s) for time_s in values["void"]],
            last_s=values["last"],
            offset_s=int(values["offset"]),
        )


def _stuck(time: npt.NDArray[Any], value: npt.NDArray[Any]) -> bool:
    """Whether the sensor has been writing one value for so long that intake would not believe it."""
    changes = np.flatnonzero(value != value[-1])
    since = int(changes[-1]) + 1 if len(changes) else 0
    long = time[-1] - time[since] >= 60 * STUCK_MIN and len(time) - since >= STUCK_READINGS
    return bool(long and REPORTED_MG_DL[0] < value[-1] < REPORTED_MG_DL[1])


def forecast_all(model: nn.Module, windows: Sequence[Window]) -> list[npt.NDArray[np.float64] | None]:
    """Return the quantiles ``(HORIZON, 3)`` of each window, in one pass of the model; None where one is no number."""
    found = forecast(model, torch.from_numpy(np.stack(windows)))
    return [quantiles if np.isfinite(quantiles).all() else None for quantiles in found]
