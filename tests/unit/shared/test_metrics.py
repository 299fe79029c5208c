import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.metrics import auroc, binary_metrics, bootstrap_auroc, classification_curves

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
