import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.metrics import (
    Decisions,
    Estimate,
    auroc,
    binary_metrics,
    bootstrap_auroc,
    calibration_metrics,
    classification_curves,
)

LABELS = np.array([0, 0, 1, 1, 1, 0])
SCORES = np.array([0.1, 0.4, 0.35, 0.8, 0.9, 0.6])


def test_auroc_by_hand() -> None:
    # Pairs (positive above negative): 0.35 beats 0.1; 0.8 and 0.9 beat all three: 7 of 9.
    assert auroc(LABELS, SCORES) == pytest.approx(7 / 9)


def test_metrics_by_hand() -> None:
    metrics = binary_metrics(LABELS, SCORES)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["recall"] == metrics["specificity"] == metrics["precision"] == pytest.approx(2 / 3)
    assert metrics["brier"] == pytest.approx(np.mean((SCORES - LABELS) ** 2))


def test_one_class_has_no_auroc_and_no_crash() -> None:
    labels = np.zeros(4, np.int64)
    assert math.isnan(auroc(labels, SCORES[:4]))
    estimate = bootstrap_auroc(labels, SCORES[:4], np.arange(4))
    assert math.isnan(estimate.value)
    assert math.isnan(estimate.low)
    assert binary_metrics(labels, SCORES[:4])["recall"] == 0.0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=4, max_size=40).filter(
        lambda pairs: len({label for label, _ in pairs}) == 2
    )
)
def test_the_interval_holds_the_value_where_patients_are_many(pairs: list[tuple[bool, int]]) -> None:
    labels = np.array([label for label, _ in pairs], np.int64)
    scores = np.array([score for _, score in pairs], float)
    estimate = bootstrap_auroc(labels, scores, np.arange(len(labels)))
    assert estimate.value == pytest.approx(auroc(labels, scores))
    assert estimate.low <= estimate.value + 1e-9
    assert estimate.high >= estimate.value - 1e-9


def test_whole_patients_are_resampled() -> None:
    """Ten copies of each case under one patient add no information; as patients of their own they would."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 30)
    scores = labels + generator.normal(0, 1, 30)
    copies, copied_labels, copied_scores = np.arange(30).repeat(10), labels.repeat(10), scores.repeat(10)
    clustered = bootstrap_auroc(copied_labels, copied_scores, copies)
    naive = bootstrap_auroc(copied_labels, copied_scores, np.arange(300))
    single = bootstrap_auroc(labels, scores, np.arange(30))
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.15)


def test_curves_are_plain_lists() -> None:
    curves = classification_curves(LABELS, SCORES)
    assert curves["confusion"] == [[2, 1], [1, 2]]
    assert (curves["roc"]["fpr"][0], curves["roc"]["tpr"][-1]) == (0.0, 1.0)
    assert (curves["cases"], curves["positives"]) == (6, 3)


def test_decisions_and_probabilities_may_be_given() -> None:
    decided = Decisions(np.full(6, 0.5), np.array([True] * 6))
    metrics = binary_metrics(LABELS, SCORES, decided)
    assert (metrics["recall"], metrics["specificity"], metrics["brier"]) == (1.0, 0.0, 0.25)
    assert metrics["auroc"] == pytest.approx(7 / 9)
    assert classification_curves(LABELS, SCORES, decided)["confusion"] == [[0, 3], [0, 3]]


def drawn(cases: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    probabilities = generator.beta(2, 2, cases)
    return (generator.random(cases) < probabilities).astype(np.int64), probabilities


def calibration(labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray) -> tuple[Estimate, Estimate]:
    found = calibration_metrics(labels, probabilities, patients)
    bias, slope = found["calibration_bias"], found["calibration_slope"]
    assert isinstance(bias, Estimate)
    assert isinstance(slope, Estimate)
    return bias, slope


def test_the_slope_is_that_of_an_ordinary_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    labels, probabilities = drawn(300, 1)
    logits = np.log(probabilities) - np.log1p(-probabilities)
    fitted = LogisticRegression(C=1e9, tol=1e-10).fit(logits[:, None], labels)
    assert calibration(labels, probabilities, np.arange(300))[1].value == pytest.approx(fitted.coef_[0, 0], rel=1e-4)


def test_the_calibration_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = np.zeros(2)
    for seed in range(200):
        labels, probabilities = drawn(200, seed)
        bias, slope = calibration(labels, probabilities, np.arange(200))
        held += (bias.low <= 0 <= bias.high, slope.low <= 1 <= slope.high)
    assert (held / 200 > 0.9).all()


def test_copies_of_a_patients_cases_do_not_narrow_the_calibration_intervals() -> None:
    labels, probabilities = drawn(200, 3)
    single = calibration(labels, probabilities, np.arange(200))
    copied = calibration(labels.repeat(9), probabilities.repeat(9), np.arange(200).repeat(9))
    for one, many in zip(single, copied, strict=True):
        assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.01)


def test_classes_told_apart_without_error_have_no_calibration_slope() -> None:
    labels, probabilities = np.array([0, 0, 1, 1]), np.array([0.2, 0.3, 0.7, 0.8])
    assert math.isnan(calibration(labels, probabilities, np.arange(4))[1].value)
    assert math.isnan(calibration(np.zeros(4, np.int64), probabilities, np.arange(4))[1].value)
    assert math.isnan(calibration(labels, np.full(4, 0.5), np.arange(4))[1].value)
