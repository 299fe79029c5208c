"""Error grids at their boundaries, and the metrics of a forecast against sums done by hand."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.forecast_metrics import ZONES, by_part, clarke_zones, judge, parkes_zones, pinball

# 1189 points: on the lines of the three grids, half a mg/dL to every side of them, and spread over the plane. The zones
# are those that two published implementations give: for Clarke where methcomp 1.0 (Python, MIT licence) and ega 1.0 (R,
# CRAN) agree, for Parkes ega's off the lines and both's on them. An empty cell is a point that they put into different
# zones: on Clarke's horizontal line at 70 and for a reference of 58.3 to 70 (ega changed its rule later), on Parkes'
# lines, where ega takes the worse zone at vertical ones, and on the last line of type 1, which methcomp draws
# elsewhere.
GOLDEN = Path(__file__).parents[2] / "golden" / "error_grids.csv"
# Boundary points with the zones that the rules of the R package ega 2.0 and of the Python package methcomp give.
CLARKE = [
    (100, 100, "A"), (100, 120, "A"), (100, 120.1, "B"), (100, 80, "A"), (100, 79.9, "B"),
    (69.9, 69.9, "A"), (69.9, 40, "A"), (70, 56, "A"), (70, 55.9, "B"), (58.3, 69.9, "A"),
    (50, 70, "D"), (69.9, 179.9, "D"), (69.9, 180, "E"), (70, 180, "E"), (50, 400, "E"),
    (70.1, 181, "C"), (70.1, 180, "B"), (100, 210, "B"), (100, 210.1, "C"), (290, 400.1, "C"),
    (130, 0, "B"), (150, 28, "B"), (150, 27.9, "C"), (180, 70, "E"), (180, 69.9, "C"), (180.1, 70, "E"),
    (240, 179, "B"), (240.1, 179, "D"), (240.1, 180, "B"), (240.1, 69.9, "E"), (240.1, 70, "D"), (300, 240, "A"),
]  # fmt: skip
# Vertices and points just beyond of Pfützner's coordinates; on a line a point is in the better zone.
PARKES_1 = [
    (100, 100, "A"), (20, 50, "A"), (20, 50.1, "B"), (30, 50, "A"), (30, 50.1, "B"), (140, 170, "A"), (140, 170.1, "B"),
    (280, 380, "A"), (280, 380.1, "B"), (430, 550, "A"), (50, 30, "A"), (51, 30, "B"), (50, 10, "A"), (170, 145, "A"),
    (170, 144.9, "B"), (385, 300, "A"), (385, 299.9, "B"), (550, 450, "A"), (550, 449.9, "B"),
    (20, 60, "B"), (20, 60.1, "C"), (50, 80, "B"), (50, 80.1, "C"), (70, 110, "B"), (70, 110.1, "C"), (120, 30, "B"),
    (121, 30, "C"), (120, 10, "B"), (260, 130, "B"), (260, 129.9, "C"), (550, 250, "B"), (550, 249.9, "C"),
    (20, 100, "C"), (20, 100.1, "D"), (50, 125, "C"), (50, 125.1, "D"), (80, 215, "C"), (80, 215.1, "D"),
    (250, 40, "C"), (251, 40, "D"), (550, 150, "C"), (550, 149.9, "D"),
    (35, 155, "D"), (35, 155.1, "E"), (50, 550, "D"), (50, 550.1, "E"), (10, 500, "E"),
]  # fmt: skip
PARKES_2 = [
    (230, 330, "A"), (230, 330.1, "B"), (90, 80, "A"), (90, 79.9, "B"), (330, 230, "A"), (330, 229.9, "B"),
    (280, 550, "B"), (280, 550.1, "C"), (90, 0, "B"), (260, 130, "B"), (260, 129.9, "C"), (25, 80, "C"),
    (25, 80.1, "D"), (35, 90, "C"), (35, 90.1, "D"), (410, 110, "C"), (410, 109.9, "D"), (550, 160, "C"),
    (550, 159.9, "D"), (35, 200, "D"), (35, 200.1, "E"), (50, 550, "D"), (50, 550.1, "E"), (10, 200.1, "E"),
]  # fmt: skip


def letters(zones: np.ndarray) -> str:
    return "".join(ZONES[zone] for zone in zones)


def columns(table: list[tuple[float, float, str]]) -> tuple[np.ndarray, np.ndarray, str]:
    reference, predicted, zones = zip(*table, strict=True)
    return np.array(reference, float), np.array(predicted, float), "".join(zones)


def test_clarke_zones_at_their_boundaries() -> None:
    reference, predicted, zones = columns(CLARKE)
    assert letters(clarke_zones(reference, predicted)) == zones


@pytest.mark.parametrize(("table", "diabetes_type"), [(PARKES_1, 1), (PARKES_2, 2)])
def test_parkes_zones_at_their_boundaries(table: list[tuple[float, float, str]], diabetes_type: int) -> None:
    reference, predicted, zones = columns(table)
    assert letters(parkes_zones(reference, predicted, diabetes_type)) == zones


@pytest.mark.parametrize(
    ("column", "zones_of"),
    [
        ("clarke", clarke_zones),
        ("parkes_1", parkes_zones),
        ("parkes_2", lambda reference, predicted: parkes_zones(reference, predicted, 2)),
    ],
)
def test_zones_are_those_of_the_published_implementations(column: str, zones_of: Callable[..., np.ndarray]) -> None:
    with GOLDEN.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row[column]]
    reference, predicted = (np.array([float(row[name]) for row in rows]) for name in ("reference", "predicted"))
    given = zip(rows, letters(zones_of(reference, predicted)), strict=True)
    assert [row for row, zone in given if zone != row[column]] == []
    assert len(rows) > 1100
    assert {row[column] for row in rows} == set(ZONES)


@given(st.floats(20, 600), st.floats(0, 300), st.floats(0, 100))
def test_a_parkes_zone_never_gets_better_further_off(reference: float, error: float, more: float) -> None:
    for sign in (-1.0, 1.0):
        nearer, further = (
            parkes_zones(np.array([reference]), np.array([max(reference + sign * e, 0.0)]))[0]
            for e in (error, error + more)
        )
        assert further >= nearer


def flat(values: list[list[float]], width: float) -> np.ndarray:
    """Return forecasts (W, 12, 3) with the given level of each window."""
    middle = np.repeat(np.array(values, float), 12, axis=1)
    return np.stack([middle - width, middle, middle + width], axis=-1)


def test_the_metrics_of_two_windows_by_hand() -> None:
    truth = np.stack([np.full(12, 100.0), np.full(12, 200.0)])
    metrics = judge(flat([[104.0], [190.0]], 5.0), truth, np.array([108.0, 200.0]), stride=6)
    assert metrics["rmse_30"] == pytest.approx(math.sqrt((16 + 100) / 2))
    assert metrics["mae_60"] == 7.0
    assert metrics["path_mse_median"] == 58.0
    assert metrics["path_mae_median"] == 7.0
    assert metrics["coverage_90"] == 0.5
    assert metrics["skill_30"] == pytest.approx(1 - math.sqrt(58) / math.sqrt(32))
    # Window 1: below all but the lowest: 1 inside (0.05·1), 0.5·4, 0.05·9; window 2: 0.05·15, 0.5·10, 0.95·5.
    assert metrics["pinball"] == pytest.approx((0.05 * 1 + 0.5 * 4 + 0.05 * 9 + 0.05 * 15 + 0.5 * 10 + 0.95 * 5) / 6)
    assert metrics["windows"] == 2


def test_warnings_count_crossings_hits_and_false_alarms() -> None:
    # Falls and is foreseen; falls unforeseen; stays low; a false alarm; quiet.
    truth = np.repeat(np.array([[60.0], [60.0], [60.0], [90.0], [90.0]]), 12, axis=1)
    last = np.array([90.0, 90.0, 65.0, 90.0, 90.0])
    metrics = judge(flat([[65.0], [80.0], [62.0], [69.0], [90.0]], 1.0), truth, last, stride=6)
    assert metrics["hypo_sensitivity"] == pytest.approx(2 / 3)
    assert metrics["hypo_onset_sensitivity"] == 0.5
    assert metrics["hypo_false_alarms_per_day"] == pytest.approx(1 / (5 * 30 / 1440))
    assert math.isnan(metrics["hyper_sensitivity"])
    assert metrics["hyper_false_alarms_per_day"] == 0.0


@given(st.floats(-50, 50))
def test_pinball_is_least_at_the_quantiles_of_what_comes(shift: float) -> None:
    truth = np.random.default_rng(0).normal(100, 10, (4000, 1))
    best = np.quantile(truth, [0.05, 0.5, 0.95]) * np.ones((4000, 1, 1))
    assert pinball(best, truth) <= pinball(best + shift, truth) + 1e-9


def test_parts_are_judged_apart_and_empty_ones_left_out() -> None:
    truth = np.stack([np.full(12, 100.0), np.full(12, 200.0)])
    parts = by_part(flat([[104.0], [190.0]], 5.0), truth, np.array([108.0, 200.0]), 6, np.array([0, 2]), "abc")
    assert set(parts) == {"a", "c"}
    assert parts["a"]["mae_30"] == 4.0
    assert parts["c"]["mae_30"] == 10.0
