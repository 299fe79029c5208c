"""What is learnt from a glucose record and what is judged: windows of readings and the path that follows.

The protocol is GlucoBench's (Sergazinov et al., "GlucoBench: Curated List of Continuous Glucose Monitoring Datasets
with Prediction Benchmarks", ICLR 2024): of each segment the last ``JUDGED`` readings are the test and as many
before them the validation; everything earlier is for training. A judged window is a path of ``HORIZON`` steps inside
the test, one every ``STRIDE`` steps, with at most ``MOST_HISTORY`` readings before it, which may lie in the
validation part. Interpolated readings count as readings, as there.

Every patient is so on both sides of the split, training earlier in time than what is judged: this measures a
forecast for patients whose past the hospital knows. It is no test on unseen patients.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shared.records import RecordStore
from shared.tasks.cgm import check_kind

HORIZON: Final = 12
"""Steps of a forecast: an hour."""
JUDGED: Final = 72
MOST_HISTORY: Final = 144
STRIDE: Final = 6
SITE: Final = "site"
"""Field of a judged store that says which of the attribute ``sites`` a record comes from."""
Rows = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Windows:
    """``W`` judged windows.

    Attributes:
        rows: int64 ``(W,)`` record of the store at which each path begins.
        history: float32 ``(W, MOST_HISTORY)`` mg/dL before it, NaN on the left where the segment is shorter.
        path: float32 ``(W, HORIZON)`` mg/dL that came.
        patient: int64 ``(W,)`` index of the patient in the store.
        site: int64 ``(W,)`` position in ``sites``; zeros where the store does not tell.
        sites: Names; empty where the store does not tell.
    """

    rows: Rows
    history: Values
    path: Values
    patient: Rows
    site: Rows
    sites: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.rows)

    def subset(self, chosen: npt.NDArray[Any]) -> "Windows":
        """Return some of the windows, by index or mask."""
        return replace(
            self,
            rows=self.rows[chosen],
            history=self.history[chosen],
            path=self.path[chosen],
            patient=self.patient[chosen],
            site=self.site[chosen],
        )


def segment_edges(store: RecordStore) -> tuple[Rows, Rows]:
    """Return first record and end of every segment of the store, in order: two arrays ``(S,)``.

    Raises:
        StorageError: If the store holds no glucose.
    """
    check_kind(store)
    records = int(store.offsets[-1])
    segment, patient = np.asarray(store.arrays["segment"]), store.patient_of_record
    breaks = np.flatnonzero((np.diff(segment) != 0) | (np.diff(patient) != 0)) + 1
    edges = np.concatenate([[0], breaks, [records]]).astype(np.int64)
    return edges[:-1], edges[1:]


def window_starts(store: RecordStore, readings: int) -> tuple[Rows, Rows]:
    """Return where a window of ``readings`` records fits into one segment, and how these divide among the patients.

    Returns:
        ``(N,)`` first records, in order, and ``(P + 1,)`` offsets: patient p has the starts offsets[p] to
        offsets[p + 1].
    """
    first, end = segment_edges(store)
    room = np.maximum(end - first - readings + 1, 0)
    starts = np.repeat(first - np.concatenate([[0], np.cumsum(room)[:-1]]), room) + np.arange(room.sum())
    owners = np.bincount(store.patient_of_record[starts], minlength=len(store))
    return starts, np.concatenate([[0], np.cumsum(owners)]).astype(np.int64)


def judged_windows(store: RecordStore) -> Windows:
    """Return the windows of a store of which each segment's last ``JUDGED`` readings are to be judged."""
    first, end = segment_edges(store)
    steps = np.arange(0, JUDGED - HORIZON + 1, STRIDE)
    rows = ((end - JUDGED)[:, None] + steps).ravel()
    begin = np.repeat(first, len(steps))
    rows, begin = rows[rows > begin], begin[rows > begin]  # a path needs at least one reading before it
    glucose = np.asarray(store.arrays["glucose"], np.float32)
    back = rows[:, None] + np.arange(-MOST_HISTORY, 0)
    history = np.where(back >= begin[:, None], glucose[np.maximum(back, 0)], np.float32(np.nan))
    site = np.asarray(store.arrays[SITE], np.int64)[rows] if SITE in store.arrays else np.zeros(len(rows), np.int64)
    return Windows(
        rows=rows,
        history=history,
        path=glucose[rows[:, None] + np.arange(HORIZON)],
        patient=store.patient_of_record[rows],
        site=site,
        sites=tuple(store.attributes.get("sites", ())),
    )


def split_in_time(store: RecordStore) -> tuple[RecordStore, RecordStore]:
    """Return each patient's earlier readings, to train on, and later ones, to be judged with :func:`judged_windows`.

    The later part of a segment is its test and the history that a forecast in the test may look back on.
    """
    first, end = segment_edges(store)
    position = np.arange(int(store.offsets[-1]))
    last = np.repeat(end, end - first)
    train = position < last - 2 * JUDGED
    return _rows_of(store, train), _rows_of(store, position >= last - JUDGED - MOST_HISTORY)


def _rows_of(store: RecordStore, chosen: npt.NDArray[np.bool_]) -> RecordStore:
    """Return an in-memory store of the chosen records ``(R,)`` and of the patients who have any."""
    counts = np.bincount(store.patient_of_record[chosen], minlength=len(store))
    kept = counts > 0
    return RecordStore(
        kind=store.kind,
        attributes=store.attributes,
        offsets=np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64),
        keys=store.keys[kept],
        arrays={name: np.asarray(array[chosen]) for name, array in store.arrays.items()},
        digest=hashlib.sha256(store.digest.encode() + np.packbits(chosen).tobytes()).hexdigest(),
    )
