"""Temperature and threshold: against oracles, out of a patient's own sight, and within bounds whatever the scores."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from shared.errors import PlanError
from shared.operating_point import (
    BALANCED,
    MOST_TEMPERATURE,
    OperatingPoint,
    check_sensitivity,
    choose,
    cross_fitted,
    fit_temperature,
)
from shared.records import RecordStore
from shared.tasks.nodule_classification import decide_nodules, judge_nodules

Arrays = tuple[np.ndarray, np.ndarray]


def overconfident(cases: int = 4000, times: float = 3.0, seed: int = 0) -> Arrays:
    """Labels that follow a logit, and scores that multiply it."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, cases)
    labels = (generator.random(cases) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return labels, 1 / (1 + np.exp(-times * logits))


def test_the_temperature_undoes_what_multiplied_the_logits() -> None:
    assert fit_temperature(*overconfident(times=3.0)) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(*overconfident(times=0.5)) == pytest.approx(0.5, rel=0.05)


def test_the_temperature_is_where_another_optimiser_finds_it() -> None:
    labels, scores = overconfident(60, times=1.5)
    logits = np.log(scores) - np.log1p(-scores)
    positives = labels.sum()
    targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))

    def log_loss(inverse: float) -> float:
        return float(np.mean(np.logaddexp(0, inverse * logits) - targets * inverse * logits))

    found = minimize_scalar(log_loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(labels, scores) == pytest.approx(1 / found.x, rel=1e-4)


def test_scores_that_separate_the_patients_do_not_call_for_boundless_confidence() -> None:
    labels, scores = np.array([0, 0, 0, 1, 1, 1]), np.array([0.4, 0.45, 0.42, 0.55, 0.6, 0.58])
    point = choose(labels, scores)
    assert point is not None
    assert point.temperature > 1 / MOST_TEMPERATURE * 1.5
    assert point.probability(scores).min() > 0.02
    assert point.positive(scores).tolist() == [False] * 3 + [True] * 3


@given(
    st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=2, max_size=40),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
)
def test_whatever_the_scores_the_point_is_one_that_a_checkpoint_holds(
    pairs: list[tuple[int, float]], sensitivity: float | None
) -> None:
    labels, scores = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    point = choose(labels, scores, sensitivity)
    if len(set(labels.tolist())) < 2:
        assert point is None
        return
    assert point is not None
    written = {"threshold": point.threshold, "temperature": point.temperature, "rule": point.rule}
    assert OperatingPoint.parse(written) == point
    if sensitivity is not None:
        assert point.positive(scores)[labels == 1].mean() >= sensitivity - 1e-9
    probabilities, positive = cross_fitted(labels, scores, np.arange(len(labels)), sensitivity)
    assert np.isfinite(probabilities).all()
    assert positive.dtype == bool


def test_no_other_threshold_has_a_better_balanced_accuracy() -> None:
    labels, scores = overconfident(150, seed=3)
    point = choose(labels, scores)
    assert point is not None
    assert point.rule == BALANCED
    probabilities = point.probability(scores)

    def balanced(threshold: float) -> float:
        called = probabilities >= threshold
        return float(called[labels == 1].mean() + (~called)[labels == 0].mean()) / 2

    best = max(balanced(threshold) for threshold in np.linspace(0, 1, 5001))
    assert balanced(point.threshold) == pytest.approx(best)


def test_the_threshold_of_a_sensitivity_is_the_highest_that_reaches_it() -> None:
    labels, scores = overconfident(500, seed=4)
    point = choose(labels, scores, 0.9)
    assert point is not None
    assert point.rule == "sensitivity 0.90"
    probabilities = point.probability(scores)[labels == 1]
    assert (probabilities >= point.threshold).mean() >= 0.9
    higher = np.sort(probabilities[probabilities >= point.threshold])[1]
    assert (probabilities >= higher).mean() < 0.9


def test_temperature_changes_no_order() -> None:
    _, scores = overconfident(100)
    point = OperatingPoint(0.5, 7.0, BALANCED)
    assert np.argsort(point.probability(scores)).tolist() == np.argsort(scores).tolist()


def test_no_patient_is_judged_by_a_point_that_it_helped_to_choose() -> None:
    """A patient's own labels, exchanged between its cases, change nothing of what is decided on it."""
    labels, scores = overconfident(60, seed=5)
    patients = np.arange(60) // 2
    before = cross_fitted(labels, scores, patients)
    tried = 0
    for patient in range(30):
        mine = patients == patient
        if len(set(labels[mine].tolist())) < 2:
            continue
        tried += 1
        after = cross_fitted(np.where(mine, 1 - labels, labels), scores, patients)
        np.testing.assert_array_equal(after[0][mine], before[0][mine])
        np.testing.assert_array_equal(after[1][mine], before[1][mine])
    assert tried >= 5


def test_decisions_of_noise_do_not_flatter_themselves() -> None:
    """On scores that know nothing, a threshold is better than chance for the patients who chose it, and no others."""
    own, fitted = [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        labels, scores = generator.permutation(np.arange(40) % 2), generator.random(40)
        point = choose(labels, scores)
        assert point is not None
        for called, into in ((point.positive(scores), own), (cross_fitted(labels, scores, np.arange(40))[1], fitted)):
            into.append((called[labels == 1].mean() + (~called)[labels == 0].mean()) / 2)
    assert np.mean(own) > 0.56
    assert np.mean(fitted) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "value",
    [
        {"threshold": 0.5, "temperature": 1.0},
        {"threshold": 1.5, "temperature": 1.0, "rule": "x"},
        {"threshold": math.nan, "temperature": 1.0, "rule": "x"},
        {"threshold": 0.5, "temperature": 0.0, "rule": "x"},
        {"threshold": 0.5, "temperature": math.inf, "rule": "x"},
        {"threshold": True, "temperature": 1.0, "rule": "x"},
        {"threshold": "0.5", "temperature": 1.0, "rule": "x"},
        {"threshold": 0.5, "temperature": 10**4000, "rule": "x"},
        {"threshold": 0.5, "temperature": 1.0, "rule": "\x1b[31m"},
        {"threshold": 0.5, "temperature": 1.0, "rule": "x" * 1000},
        {"threshold": 0.5, "temperature": 1.0, "rule": "x", "more": 1},
        [0.5, 1.0],
    ],
)
def test_a_damaged_point_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="operating point"):
        OperatingPoint.parse(value)


def test_no_point_is_no_error() -> None:
    assert OperatingPoint.parse(None) is None


@pytest.mark.parametrize("sensitivity", [0.0, -0.1, 1.1, math.nan])
def test_an_impossible_sensitivity_is_refused(sensitivity: float) -> None:
    with pytest.raises(PlanError, match="sensitivity must be above 0 and at most 1"):
        check_sensitivity(sensitivity)


def test_a_model_whose_every_score_lies_below_one_half_still_finds_the_malignant(
    tmp_path: Path, make_nodule_store: Callable[..., RecordStore]
) -> None:
    """Privacy noise leaves scores that rank well and lie on one side of one half: at one half nothing is found."""
    store = make_nodule_store(tmp_path / "store", patients=40)
    noise = np.random.default_rng(0).uniform(0, 0.05, len(store.arrays["malignant"]))
    scores = 0.2 + 0.15 * store.arrays["malignant"] + noise
    at_half, decided = judge_nodules(store, scores), decide_nodules(store, scores)
    assert at_half.value("recall") == 0.0
    assert decided.value("recall") == decided.value("specificity") == 1.0
    assert decided.value("auroc") == at_half.value("auroc") == 1.0
    assert decided.operating_point is not None
    assert 0.0 < decided.operating_point.threshold < 1.0
