"""From one patient's readings to segments on a 5-minute grid. The rules, in the order they apply:

1. A value outside ``RANGE_MG_DL`` is removed.
2. Of rows with the same time and value one is kept; of rows with the same time and other values, none.
3. A sensor that writes one value for ``STUCK_MIN`` or longer is stuck and all of that is removed, but not at the
   limits of what sensors report, where a long excursion looks the same.
4. A step of more than ``MAX_GAP_MIN`` between readings ends a segment.
5. A segment's grid starts at its first reading, a step every ``STEP_MIN``; values between readings are interpolated
   linearly. So regular readings are kept as they are, and a sensor that stores every 15 minutes (Libre) gets two
   interpolated values between each two measured ones.
6. A segment of fewer than ``MIN_SEGMENT`` instants is dropped.

Insulin and carbohydrates belong to the first instant at or after them: what a forecast made there may know.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from client.intake.glucose_events import Column, Events, Index
from client.intake.rejects import GlucoseCode
from shared.tasks.cgm import MAX_GAP_MIN, MIN_SEGMENT, RANGE_MG_DL, STEP_MIN

STUCK_MIN: Final = 180
STUCK_READINGS: Final = 6
"""A run with fewer readings says little."""
REPORTED_MG_DL: Final = (41.0, 399.0)
"""Within these a value is no sensor's limit: 40 and 400, or 2.2 and 22.2 mmol/L."""

_STEP_S: Final = 60 * STEP_MIN
_GAP_S: Final = 60 * MAX_GAP_MIN
_DAY_MIN: Final = 1440
Arrays = dict[str, npt.NDArray[Any]]


def to_grid(events: Events, counts: Counter[GlucoseCode]) -> Arrays | None:
    """Return the fields of a patient's store item, or None if no segment is long enough.

    The result does not depend on the order of the rows. ``counts`` is added to.
    """
    time, local, value = _clean(events, counts)
    ends = np.flatnonzero(np.diff(time) > _GAP_S) + 1
    counts[GlucoseCode.LONG_GAP] += len(ends)
    kept: list[Arrays] = []
    for rows in np.split(np.arange(len(time)), ends):
        if len(rows) and 1 + (time[rows[-1]] - time[rows[0]]) // _STEP_S >= MIN_SEGMENT:
            counts[GlucoseCode.SHORT_GAP] += int((np.diff(time[rows]) > 1.5 * _STEP_S).sum())
            kept.append(_resample(time[rows], local[rows], value[rows]))
        elif len(rows):
            counts[GlucoseCode.SHORT_SEGMENT] += 1
            counts[GlucoseCode.SHORT_SEGMENT_READING] += len(rows)
    if not kept:
        counts[GlucoseCode.NO_SEGMENT] += 1
        return None
    grid = np.concatenate([segment.pop("time") for segment in kept])
    fields = {name: np.concatenate([segment[name] for segment in kept]) for name in kept[0]}
    fields["segment"] = np.repeat(np.arange(len(kept), dtype=np.int32), [len(s["glucose"]) for s in kept])
    doses = {"insulin": events.insulin, "carbohydrate": events.carbohydrate}
    return fields | _doses(grid, fields["segment"], events.elapsed_s, doses, counts)


def _clean(events: Events, counts: Counter[GlucoseCode]) -> tuple[Index, Index, Column]:
    """Apply rules 1 to 3; return time, local time and value, sorted by time."""
    measured = np.isfinite(events.glucose)
    inside = measured & (events.glucose >= RANGE_MG_DL[0]) & (events.glucose <= RANGE_MG_DL[1])
    counts[GlucoseCode.OUT_OF_RANGE] += int((measured & ~inside).sum())
    rows = np.flatnonzero(inside)
    rows = rows[np.lexsort((events.glucose[rows], events.elapsed_s[rows]))]
    rows = rows[_single(events.elapsed_s[rows], events.glucose[rows], counts)]
    time, local, value = events.elapsed_s[rows], events.local_s[rows], events.glucose[rows]
    stuck = _stuck(time, value)
    counts[GlucoseCode.STUCK_SENSOR] += int(stuck.sum())
    return time[~stuck], local[~stuck], value[~stuck]


def _single(time: Index, value: Column, counts: Counter[GlucoseCode]) -> npt.NDArray[np.bool_]:
    """Mark the rows to keep: the first of each time, if all others of that time say the same."""
    if not len(time):
        return np.zeros(0, bool)
    first = np.concatenate([[True], np.diff(time) > 0])
    group = np.cumsum(first) - 1
    starts = np.flatnonzero(first)
    agreed = np.maximum.reduceat(value, starts) == np.minimum.reduceat(value, starts)
    sizes = np.bincount(group)
    counts[GlucoseCode.DUPLICATE_READING] += int((sizes - 1)[agreed].sum())
    counts[GlucoseCode.CONFLICTING_READING] += int(sizes[~agreed].sum())
    keep: npt.NDArray[np.bool_] = first & agreed[group]
    return keep


def _stuck(time: Index, value: Column) -> npt.NDArray[np.bool_]:
    """Mark the readings of rule 3."""
    if not len(time):
        return np.zeros(0, bool)
    changes = np.concatenate([[True], (np.diff(value) != 0) | (np.diff(time) > _GAP_S)])
    starts = np.flatnonzero(changes)
    stops = np.append(starts[1:], len(time))
    long = (time[stops - 1] - time[starts] >= 60 * STUCK_MIN) & (stops - starts >= STUCK_READINGS)
    reported = (value[starts] > REPORTED_MG_DL[0]) & (value[starts] < REPORTED_MG_DL[1])
    return np.repeat(long & reported, stops - starts)


def _resample(time: Index, local: Index, value: Column) -> Arrays:
    """Put one segment on its grid."""
    grid = np.arange(time[0], time[-1] + 1, _STEP_S)
    before = np.searchsorted(time, grid, side="right") - 1
    after = np.minimum(before + 1, len(time) - 1)
    nearest = np.minimum(grid - time[before], np.abs(time[after] - grid))
    clock = grid + (local - time)[before]
    return {
        "time": grid,
        "glucose": np.interp(grid, time, value).astype(np.float32),
        "minute_of_day": (clock // 60 % _DAY_MIN).astype(np.int16),
        "measured": nearest <= _STEP_S // 2,
    }


def _doses(
    grid: Index, segment: npt.NDArray[np.int32], time: Index, doses: Mapping[str, Column], counts: Counter[GlucoseCode]
) -> Arrays:
    """Sum each kind of dose over the steps that end at the grid's instants; repeated rows count once."""
    fields: Arrays = {}
    lost = np.zeros(len(time), bool)
    first = np.concatenate([[True], np.diff(segment) > 0])
    for name, amount in doses.items():
        rows = np.flatnonzero(amount > 0)
        at = np.searchsorted(grid, time[rows], side="left")
        slot = np.minimum(at, len(grid) - 1)
        # Before a segment's first instant only the step that ends there belongs to it.
        belongs = (at < len(grid)) & (~first[slot] | (grid[slot] - time[rows] < _STEP_S))
        lost[rows[~belongs]] = True
        pairs = np.unique(np.column_stack([time[rows], amount[rows]])[belongs], axis=0)
        slots = np.searchsorted(grid, pairs[:, 0], side="left")
        fields[name] = np.bincount(slots, pairs[:, 1], minlength=len(grid)).astype(np.float32)
    counts[GlucoseCode.OUTSIDE_SEGMENTS] += int(lost.sum())
    return fields
