"""The split in time: nothing that is judged, and nothing that overlaps it, is trained on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import StorageError
from shared.records import RecordStore
from shared.tasks.cgm_windows import (
    HORIZON,
    JUDGED,
    MOST_HISTORY,
    judged_windows,
    split_in_time,
    window_starts,
)

Maker = Callable[..., RecordStore]


def numbered(lengths: list[list[int]]) -> RecordStore:
    """Return a store whose glucose counts up, so that a value says where it comes from."""
    total = sum(map(sum, lengths))
    segment = [np.repeat(np.arange(len(own)), own) for own in lengths]
    return RecordStore(
        kind="cgm-5min",
        attributes={},
        offsets=np.concatenate([[0], np.cumsum([sum(own) for own in lengths])]).astype(np.int64),
        keys=np.arange(len(lengths) * 16, dtype=np.uint8).reshape(-1, 16),
        arrays={
            "glucose": np.arange(total, dtype=np.float32),
            "insulin": np.zeros(total, np.float32),
            "carbohydrate": np.zeros(total, np.float32),
            "minute_of_day": np.zeros(total, np.int16),
            "segment": np.concatenate(segment).astype(np.int32),
            "measured": np.ones(total, bool),
        },
        digest="",
    )


LENGTHS = st.lists(st.lists(st.integers(192, 260), min_size=1, max_size=3), min_size=1, max_size=3)


@given(LENGTHS)
def test_training_ends_before_what_is_judged_and_its_validation(lengths: list[list[int]]) -> None:
    store = numbered(lengths)
    training, judged = split_in_time(store)
    ends = np.cumsum([length for own in lengths for length in own])
    trained = training.arrays["glucose"]
    assert len(trained) == sum(length - 2 * JUDGED for own in lengths for length in own)
    windows = judged_windows(judged)
    for end in ends:
        assert not ((trained >= end - 2 * JUDGED) & (trained < end)).any()
    assert set(windows.path.ravel()) <= set(np.concatenate([np.arange(end - JUDGED, end) for end in ends]))
    np.testing.assert_array_equal(training.keys, store.keys)
    np.testing.assert_array_equal(judged.keys, store.keys)


@given(LENGTHS)
def test_judged_windows_stay_in_their_segment(lengths: list[list[int]]) -> None:
    windows = judged_windows(numbered(lengths))
    assert len(windows) == 11 * sum(map(len, lengths))
    first = np.concatenate([[0], np.cumsum([length for own in lengths for length in own])])
    home = np.searchsorted(first, windows.path[:, 0], side="right") - 1
    assert (windows.path[:, -1] < first[home + 1]).all()
    assert (np.nan_to_num(windows.history[:, 0], nan=np.inf) >= first[home]).all()
    np.testing.assert_array_equal(windows.history[:, -1], windows.path[:, 0] - 1)
    known = np.isfinite(windows.history).sum(1)
    np.testing.assert_array_equal(known, np.minimum(windows.path[:, 0] - first[home], MOST_HISTORY))


@given(LENGTHS, st.integers(2, 250))
def test_windows_to_learn_from_stay_with_their_patient_and_segment(lengths: list[list[int]], readings: int) -> None:
    store = numbered(lengths)
    starts, offsets = window_starts(store, readings)
    expected, at = [], 0
    for own in lengths:
        for length in own:
            expected += list(range(at, at + max(0, length - readings + 1)))
            at += length
    assert starts.tolist() == expected
    for patient in range(len(lengths)):
        mine = starts[offsets[patient] : offsets[patient + 1]]
        assert (store.patient_of_record[mine] == patient).all()
        assert (store.patient_of_record[mine + readings - 1] == patient).all()


def test_a_patient_without_a_training_part_is_left_out_of_it() -> None:
    training, judged = split_in_time(numbered([[100], [300]]))
    assert len(training) == 1
    assert len(judged) == 2


def test_a_judged_window_needs_a_reading_before_it() -> None:
    assert len(judged_windows(numbered([[JUDGED]]))) == 10


def test_the_site_of_a_record_is_known_where_the_store_tells(make_cgm_store: Maker, tmp_path: Path) -> None:
    store = make_cgm_store(tmp_path / "store", patients=2)
    assert judged_windows(store).sites == ()
    assert (judged_windows(store).path.shape[1], len(judged_windows(store))) == (HORIZON, 2 * 2 * 11)


def test_another_kind_of_store_is_refused(make_nodule_store: Maker, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ct-nodules"):
        judged_windows(make_nodule_store(tmp_path / "store"))
