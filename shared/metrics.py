"""Metrics over scikit-learn and NumPy; pure functions.

scikit-learn is imported where it is used: a hospital's daemon knows every task but judges none.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 1000
_CURVE_POINTS = 200
_CALIBRATION_BINS = 8
_NORMAL_95 = 1.959964
_NEWTON_STEPS, _CONVERGED = 50, 1e-8
_FLAT, _SINGULAR = 1e-9, 1e12
Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def auroc(labels: Labels, scores: Scores) -> float:
    """Return the area under the ROC curve; NaN where only one class is present."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(roc_auc_score(labels, scores))


def bootstrap_auroc(labels: Labels, scores: Scores, patients: npt.NDArray[np.int64], seed: int = 0) -> Estimate:
    """Return the AUROC with a percentile interval from resampling whole patients, not nodules.

    Nodules of one patient are not independent; resampling them singly would give too narrow an interval
    (Rutter, "Bootstrap estimation of diagnostic accuracy with patient-clustered data", 2000).
    """
    owners, index = np.unique(patients, return_inverse=True)
    members = [np.flatnonzero(index == owner) for owner in range(len(owners))]
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(_RESAMPLES):
        chosen = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        values.append(_rank_auroc(labels[chosen], scores[chosen]))
    usable = np.array(values)[~np.isnan(values)]
    low, high = np.percentile(usable, [2.5, 97.5]) if len(usable) else (float("nan"), float("nan"))
    return Estimate(auroc(labels, scores), float(low), float(high))


def _rank_auroc(labels: Labels, scores: Scores) -> float:
    """The Mann-Whitney form: the same value as :func:`auroc`, an order of magnitude faster."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    from scipy.stats import rankdata

    rank_sum = rankdata(scores)[labels == 1].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


@dataclass(frozen=True)
class Decisions:
    """What was made of the scores.

    Attributes:
        probabilities: ``(N,)``, calibrated.
        positive: ``(N,)`` of booleans: who was called positive.
    """

    probabilities: Scores
    positive: npt.NDArray[np.bool_]

    @classmethod
    def at_half(cls, scores: Scores) -> "Decisions":
        """Take the scores as probabilities and one half as the threshold."""
        return cls(scores.clip(0.0, 1.0), scores >= 0.5)

    def of(self, chosen: npt.NDArray[np.bool_]) -> "Decisions":
        """Return those of the chosen cases."""
        return Decisions(self.probabilities[chosen], self.positive[chosen])


def binary_metrics(labels: Labels, scores: Scores, decisions: Decisions | None = None) -> dict[str, float]:
    """Return the usual metrics of scores ``(N,)`` against labels 0/1 ``(N,)``.

    The AUROC is of the scores, the Brier score of the probabilities, the rest of the decisions, by default those at
    one half. A ratio without cases (precision where nothing was called positive) is 0.
    """
    from sklearn.metrics import brier_score_loss

    decisions = decisions or Decisions.at_half(scores)
    (true_negative, false_positive), (false_negative, true_positive) = _confusion(labels, decisions)
    recall = _ratio(true_positive, true_positive + false_negative)
    specificity = _ratio(true_negative, true_negative + false_positive)
    precision = _ratio(true_positive, true_positive + false_positive)
    return {
        "auroc": auroc(labels, scores),
        "accuracy": _ratio(true_positive + true_negative, len(labels)),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": precision,
        "recall": recall,
        "specificity": specificity,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "brier": float(brier_score_loss(labels, decisions.probabilities, pos_label=1)),
    }


def calibration_metrics(
    labels: Labels, probabilities: Scores, patients: npt.NDArray[np.int64]
) -> dict[str, float | Estimate]:
    """Return how far probabilities ``(N,)`` are from what happened, with intervals over patients.

    ``calibration_error`` is the expected calibration error over bins of equally many cases; chance alone makes it
    positive, so it has no interval. ``calibration_bias`` is the mean probability minus the share of positives; 0 is
    right. ``calibration_slope`` is the slope of a logistic regression of the label on the probability's logit (Cox,
    1958); 1 is right, less means too sure, more too unsure; NaN where the classes can be told apart without error. The
    intervals take a patient's cases as one (the sandwich estimator of Liang and Zeger, 1986).
    """
    inside = probabilities.clip(1e-6, 1.0 - 1e-6)
    off = np.asarray(probabilities - labels, np.float64)
    bias, spread = float(off.mean()), _clustered(off[:, None], patients)
    half = _NORMAL_95 * math.sqrt(float(spread[0, 0])) / len(labels)
    return {
        "calibration_error": _expected_calibration_error(labels, probabilities),
        "calibration_bias": Estimate(bias, bias - half, bias + half),
        "calibration_slope": _slope(labels, np.log(inside) - np.log1p(-inside), patients),
    }


def _expected_calibration_error(labels: Labels, probabilities: Scores) -> float:
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, _CALIBRATION_BINS) if len(part)]
    gaps = [abs(probabilities[part].mean() - labels[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(labels))


def _slope(labels: Labels, logits: Scores, patients: npt.NDArray[np.int64]) -> Estimate:
    """Return Cox's calibration slope by Newton's method, with its interval."""
    unknown = Estimate(math.nan, math.nan, math.nan)
    if len(np.unique(labels)) < 2 or np.ptp(logits) < _FLAT:
        return unknown
    inputs, weights = np.stack([np.ones_like(logits), logits], axis=1), np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        fitted = np.exp(-np.logaddexp(0.0, -(inputs @ weights)))
        scores = np.asarray(inputs * (labels - fitted)[:, None], np.float64)
        bread = inputs.T @ (inputs * (fitted * (1.0 - fitted))[:, None])
        if np.linalg.cond(bread) > _SINGULAR:  # separable: no finite slope
            return unknown
        step = np.linalg.solve(bread, scores.sum(axis=0))
        weights = weights + step
        if np.abs(step).max() < _CONVERGED:
            inverse = np.linalg.inv(bread)
            half = _NORMAL_95 * math.sqrt(float((inverse @ _clustered(scores, patients) @ inverse)[1, 1]))
            return Estimate(float(weights[1]), float(weights[1]) - half, float(weights[1]) + half)
    return unknown


def _clustered(scores: Scores, patients: npt.NDArray[np.int64]) -> Scores:
    """Return the covariance ``(D, D)`` of the sum of scores ``(N, D)``, a patient's cases taken together."""
    _, index = np.unique(patients, return_inverse=True)
    sums = np.zeros((index.max() + 1, scores.shape[1]))
    np.add.at(sums, index, scores)
    centred = sums - sums.mean(axis=0)
    covariance: Scores = centred.T @ centred * len(sums) / max(len(sums) - 1, 1)
    return covariance


def classification_curves(labels: Labels, scores: Scores, decisions: Decisions | None = None) -> dict[str, Any]:
    """Return what a report draws: ROC, calibration and confusion matrix, as plain lists."""
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import roc_curve

    decisions = decisions or Decisions.at_half(scores)
    observed, predicted = calibration_curve(
        labels, decisions.probabilities, n_bins=_CALIBRATION_BINS, strategy="quantile"
    )
    curves = {
        "calibration": {"predicted": predicted.tolist(), "observed": observed.tolist()},
        "confusion": _confusion(labels, decisions),
        "cases": len(labels),
        "positives": int(labels.sum()),
    }
    if len(np.unique(labels)) == 2:  # with one class there is no ROC curve
        false_positive, true_positive, _ = roc_curve(labels, scores)
        keep = np.unique(np.linspace(0, len(false_positive) - 1, _CURVE_POINTS).round().astype(int))
        curves["roc"] = {"fpr": false_positive[keep].tolist(), "tpr": true_positive[keep].tolist()}
    return curves


def _confusion(labels: Labels, decisions: Decisions) -> list[list[int]]:
    from sklearn.metrics import confusion_matrix

    matrix: list[list[int]] = confusion_matrix(labels, decisions.positive.astype(np.int64), labels=[0, 1]).tolist()
    return matrix


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
