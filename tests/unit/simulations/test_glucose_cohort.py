import hashlib
from itertools import pairwise

import numpy as np
import pytest

from client.intake.glucose import prepare_glucose
from client.intake.rejects import GlucoseCode
from shared.errors import PlanError, StorageError
from shared.records import RecordStore
from shared.tasks.cgm import COVARIATES, all_segments
from simulations.generators.glucose import COLUMNS, SHARES, generate_glucose_hospitals
from simulations.generators.glucose_days import simulate_days
from simulations.generators.glucose_model import TYPES, Body, draw_physiology
from simulations.sources import find_source

EACH = 40


@pytest.fixture(scope="module")
def cohort():
    """Forty patients of each type for 14 days."""
    return simulate_days(np.repeat(np.arange(len(TYPES)), EACH), 14, np.random.default_rng(3))


def readings(cohort, kind):
    return cohort.readings[:, cohort.types == TYPES.index(kind)].astype(float)


# Bounds on the mean over patients. Sources:
# type 1: consensus target and reality around it: T1D Exchange, Foster et al., Diabetes Technol Ther 2019, 21:66-72
#   (A1c 7 to 8.5 %, mean 154 to 197 mg/dL); Beck et al., J Diabetes Sci Technol 2019, 13:614-626 (time in range 50 to
#   75 %); CV about 36 %: Monnier et al., Diabetes Care 2017, 40:832-838; below 70 mg/dL 2 to 8 %.
# type 2: Monnier 2017 (CV 20 to 31 %); Battelino et al., Diabetes Care 2019, 42:1593-1603 (rarely below 70).
# healthy: Shah et al., J Clin Endocrinol Metab 2019, 104:4356-4364: mean 98 to 99 mg/dL, CV 17 +- 3 %, 96 % within
#   70 to 140, 1.1 % below 70.
@pytest.mark.parametrize(
    ("kind", "mean", "cv", "in_range", "below_70", "above_250"),
    [
        ("type1", (150, 180), (0.30, 0.40), (0.50, 0.75), (0.015, 0.08), (0.02, 0.15)),
        ("type2", (135, 170), (0.20, 0.31), (0.65, 0.90), (0.0, 0.02), (0.0, 0.08)),
        ("healthy", (94, 106), (0.14, 0.20), (0.96, 1.0), (0.0, 0.02), (0.0, 0.002)),
    ],
)
def test_glucose_is_distributed_as_published(cohort, kind, mean, cv, in_range, below_70, above_250):
    values = readings(cohort, kind)
    counted = np.isfinite(values).sum(0)
    found = {
        "mean": np.nanmean(values, 0).mean(),
        "cv": (np.nanstd(values, 0) / np.nanmean(values, 0)).mean(),
        "in_range": (((values >= 70) & (values <= 180)).sum(0) / counted).mean(),
        "below_70": ((values < 70).sum(0) / counted).mean(),
        "above_250": ((values > 250).sum(0) / counted).mean(),
    }
    wanted = {"mean": mean, "cv": cv, "in_range": in_range, "below_70": below_70, "above_250": above_250}
    assert {n: v for n, v in found.items() if not wanted[n][0] <= v <= wanted[n][1]} == {}


def changes(values, lag):
    return np.sqrt(np.nanmean((values[lag:] - values[:-lag]) ** 2))


# Root mean square change over 5, 30 and 60 minutes, as measured on real records beside this checkout: type 1 (AZT1D,
# Bris-T1D) 6 to 7, 24 to 29, 38 to 46; without diabetes (Hall, Colas, BIG IDEAs) 2 to 4, 12 to 16, 17 to 22.
@pytest.mark.parametrize(
    ("kind", "five", "thirty", "sixty"),
    [("type1", (4, 7), (21, 31), (36, 50)), ("healthy", (2, 4), (11, 17), (16, 26))],
)
def test_glucose_changes_as_fast_as_in_real_records(cohort, kind, five, thirty, sixty):
    values = readings(cohort, kind)
    for lag, (low, high) in ((1, five), (6, thirty), (12, sixty)):
        assert low <= changes(values, lag) <= high
    spread = values - np.nanmean(values, 0)
    correlation = [np.nanmean(spread[k:] * spread[:-k]) / np.nanmean(spread**2) for k in range(1, 13)]
    assert all(before > after for before, after in pairwise(correlation))
    assert correlation[0] > 0.97
    assert correlation[11] < 0.75


def test_only_type_1_injects_and_eats_against_lows(cohort):
    units = cohort.insulin.sum(0) / 14
    assert (units[cohort.types > 0] == 0).all()
    assert 15 < units[cohort.types == 0].mean() < 60
    grams = cohort.carbohydrate.sum(0) / 14
    assert ((grams > 60) & (grams < 400)).all()


def test_readings_are_what_a_sensor_writes(cohort):
    written = cohort.readings[np.isfinite(cohort.readings)]
    assert written.min() >= 40
    assert written.max() <= 400
    np.testing.assert_array_equal(written, np.round(written))
    assert 0.95 < len(written) / cohort.readings.size < 0.995


def quiet(kind, people=30):
    """Return bodies of one type without their random drift."""
    rng = np.random.default_rng(0)
    physiology = draw_physiology(np.full(people, TYPES.index(kind)), rng)
    for noise in (physiology.drift, physiology.sensitivity_change, physiology.dawn):
        noise[:] = 0.0
    return Body(physiology, rng)


def run(body, minutes):
    track = []
    for _ in range(minutes):
        body.step(720.0)
        track.append(body.glucose.copy())
    return np.array(track)


@pytest.mark.parametrize("kind", TYPES)
def test_at_rest_nothing_moves_but_what_the_kidneys_take(kind):
    body = quiet(kind)
    resting = body.p.basal_glucose < 162
    track = run(body, 600)
    np.testing.assert_allclose(track[:, resting], np.broadcast_to(body.p.basal_glucose[resting], (600, resting.sum())))


def test_a_unit_lowers_by_the_correction_factor_and_covers_the_carbohydrate_ratio():
    rest = run(quiet("type1"), 480)
    body = quiet("type1")
    body.inject(np.ones(30))
    drop = (rest - run(body, 480)).max(0)
    np.testing.assert_allclose(drop, body.p.correction_mg_dl_per_unit, rtol=0.4)
    body = quiet("type1")
    body.inject(np.full(30, 3.0))
    body.eat(3.0 * body.p.carbohydrate_g_per_unit, np.ones(30))
    assert np.abs(run(body, 480)[-1] - rest[-1]).max() < 30


def test_a_meal_raises_a_healthy_person_briefly_and_type_2_longer():
    peaks = {}
    for kind in ("healthy", "type2"):
        body = quiet(kind)
        body.eat(np.full(30, 60.0), np.ones(30))
        rise = run(body, 300) - body.p.basal_glucose
        peaks[kind] = np.median(rise.max(0)), np.median((rise > 20).sum(0))
    assert 20 < peaks["healthy"][0] < 80 < peaks["type2"][0] < 200
    assert peaks["healthy"][1] < 120 < peaks["type2"][1]


def digests(folders):
    return [hashlib.sha256((folder / "glucose.csv").read_bytes()).hexdigest() for folder in folders]


def make(out, **changed):
    return generate_glucose_hospitals(out, **({"sites": 2, "seed": 5, "patients_per_site": 6} | changed))


def test_the_seed_decides_every_byte_and_hospitals_differ(tmp_path):
    told = []
    first = digests(make(tmp_path / "a", on_progress=lambda done, total: told.append((done, total))))
    assert told == [(6, 12), (12, 12)]
    assert digests(make(tmp_path / "b", sites=3))[:2] == first
    assert len(set(first) | set(digests(make(tmp_path / "c", seed=6)))) == 4
    assert len(set(digests(make(tmp_path / "d", partition="dirichlet", alpha=0.3)))) == 2


def test_intake_reads_what_is_generated(tmp_path):
    source = find_source("glucose-forecast")
    folders = source.generate(
        tmp_path / "raw", sites=1, seed=1, patients_per_site=8, partition="vendors", alpha=1.0, workers=1
    )
    assert (folders[0] / "glucose.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    source.prepare(folders[0], tmp_path / "store", b"s" * 32, 1, lambda *_: None)
    store = RecordStore.open(tmp_path / "store")
    assert len(store) == 8
    assert store.attributes["covariates"] == list(COVARIATES)
    assert sum(len(segment) for _, segment in all_segments(store)) > 0.9 * 8 * 14 * 288
    assert sum(float(s.insulin.sum()) for _, s in all_segments(store)) > 0
    report = prepare_glucose(folders[0], tmp_path / "again", b"s" * 32)
    expected = {
        GlucoseCode.SHORT_GAP,
        GlucoseCode.LONG_GAP,
        GlucoseCode.SHORT_SEGMENT,
        GlucoseCode.SHORT_SEGMENT_READING,
        GlucoseCode.OUTSIDE_SEGMENTS,
    }
    assert set(report.counts_by_code) <= expected


def test_shares_are_kept_and_sum_to_one():
    np.testing.assert_allclose(np.sum(SHARES, axis=1), 1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"sites": 0}, {"patients_per_site": 0}, {"seed": -1}, {"partition": "x"}, {"partition": "dirichlet", "alpha": 0}],
)
def test_what_makes_no_sense_is_refused(tmp_path, wrong):
    with pytest.raises(PlanError):
        make(tmp_path / "a", **wrong)
    assert not (tmp_path / "a").exists()


def test_an_existing_hospital_is_not_overwritten(tmp_path):
    (tmp_path / "site-2").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site-2"]
