"""The prepared form of continuous glucose records: what intake writes and the glucose tasks read.

One record is one instant of a patient's 5-minute grid. A patient's segments follow one another in time;
inside a segment there is no gap. Fields of the store (kind ``cgm-5min``):

    glucose        float32 (R,): mg/dL
    insulin        float32 (R,): fast-acting units given in the 5 minutes that end at the instant
    carbohydrate   float32 (R,): grams eaten in those 5 minutes
    minute_of_day  int16 (R,): 0 to 1439, local time
    segment        int32 (R,): number of the segment within its patient, 0, 1, …
    measured       bool (R,): a reading lies within half a step; elsewhere a gap was interpolated, which looks
                   ahead: a forecast that starts there knows a little of the future

An instant of the grid is ``STEP_MIN`` after the one before; a segment's first is its first reading. Where an
export has no insulin or carbohydrates, the attribute ``covariates`` lists fewer names and the field is zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.errors import StorageError
from shared.records import RecordStore

STORE_KIND: Final = "cgm-5min"
STEP_MIN: Final = 5
MAX_GAP_MIN: Final = 45
"""Readings at most this far apart are joined by a straight line; a longer gap ends the segment."""
MIN_SEGMENT: Final = 192
"""Readings a segment must have (16 hours): two held-out parts of 72 and something to learn from."""
RANGE_MG_DL: Final = (20.0, 600.0)
MG_DL_PER_MMOL_L: Final = 18.016
"""Molar mass of glucose, 180.16 g/mol, over ten."""
COVARIATES: Final = ("insulin", "carbohydrate")
FIELDS: Final = ("glucose", "insulin", "carbohydrate", "minute_of_day", "segment", "measured")


@dataclass(frozen=True)
class CgmSegment:
    """One continuous stretch of a patient's record; every array is a read-only view of the store.

    Attributes:
        values: float32 ``(T,)`` mg/dL, one every ``STEP_MIN`` minutes.
        insulin: float32 ``(T,)`` units in the step that ends at the reading.
        carbohydrate: float32 ``(T,)`` grams in that step.
        minute_of_day: int16 ``(T,)`` local time.
        measured: bool ``(T,)`` False where the value was interpolated over a gap.
    """

    values: npt.NDArray[np.float32]
    insulin: npt.NDArray[np.float32]
    carbohydrate: npt.NDArray[np.float32]
    minute_of_day: npt.NDArray[np.int16]
    measured: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of readings."""
        return len(self.values)


def segment_bounds(store: RecordStore, patient: int) -> npt.NDArray[np.int64]:
    """Return the first record of each segment of a patient and, last, the end: ``(segments + 1,)`` rows of the store.

    Raises:
        StorageError: If the store is of another kind.
    """
    check_kind(store)
    start, stop = int(store.offsets[patient]), int(store.offsets[patient + 1])
    breaks = np.flatnonzero(np.diff(store.arrays["segment"][start:stop])) + 1
    return np.concatenate([[start], start + breaks, [stop]]).astype(np.int64)


def segments_of(store: RecordStore, patient: int) -> list[CgmSegment]:
    """Return a patient's segments in the order of time.

    Raises:
        StorageError: If the store is of another kind.
    """
    bounds = segment_bounds(store, patient)
    return [_segment(store, slice(int(a), int(b))) for a, b in pairwise(bounds)]


def check_kind(store: RecordStore) -> None:
    """Refuse a store that holds no continuous glucose records.

    Raises:
        StorageError: If the store is of another kind or lacks a field.
    """
    if store.kind != STORE_KIND or not set(FIELDS) <= set(store.arrays):
        raise StorageError(f"The store holds {store.kind!r}, this task reads {STORE_KIND!r}. Run its intake.")


def all_segments(store: RecordStore) -> Iterable[tuple[int, CgmSegment]]:
    """Yield ``(patient, segment)`` over the whole store."""
    for patient in range(len(store)):
        for segment in segments_of(store, patient):
            yield patient, segment


def _segment(store: RecordStore, rows: slice) -> CgmSegment:
    fields = store.arrays
    return CgmSegment(
        fields["glucose"][rows],
        fields["insulin"][rows],
        fields["carbohydrate"][rows],
        fields["minute_of_day"][rows],
        fields["measured"][rows],
    )
