"""The bound on what can be foreseen finds what there is to be foreseen, and no more."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.records import RecordStore
from shared.tasks.cgm_windows import HORIZON, JUDGED, split_in_time
from simulations.forecast_bound import bound, every_row, gain

Maker = Callable[..., RecordStore]


def test_a_gain_is_the_share_below_the_naive_error() -> None:
    assert gain(np.array([3.0, -3.0]), np.array([4.0, 4.0])) == pytest.approx(0.25)


def test_waves_are_foreseen_by_trees_and_ridge_under_every_definition(make_cgm_store: Maker, tmp_path: Path) -> None:
    found = bound(*split_in_time(make_cgm_store(tmp_path / "store", patients=4, segments=(600,))))
    assert len(found) == 6
    assert all(0.5 < share < 1.0 for share in found.values()), found


def test_what_is_noise_is_not_foreseen(make_cgm_store: Maker, tmp_path: Path) -> None:
    store = make_cgm_store(tmp_path / "store", patients=4, segments=(600,))
    training, judged = split_in_time(store)
    for seed, part in enumerate((training, judged)):
        walk = np.cumsum(np.random.default_rng(seed).normal(0.0, 3.0, len(part.arrays["glucose"])))
        part.arrays["glucose"][:] = 120.0 + walk
    assert all(share < 0.05 for share in bound(training, judged).values())


def test_every_row_has_room_for_a_path(make_cgm_store: Maker, tmp_path: Path) -> None:
    judged = split_in_time(make_cgm_store(tmp_path / "store", patients=1, segments=(400,)))[1]
    rows = every_row(judged)
    assert len(rows) == JUDGED - HORIZON + 1
    assert rows.max() + HORIZON == len(judged.arrays["glucose"])
