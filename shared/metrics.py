"""Metrics over scikit-learn and NumPy; pure functions.

scikit-learn is imported where it is used: a hospital's daemon knows every task but judges none.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

_RESAMPLES = 1000
_CURVE_POINTS = 200
_CALIBRATION_BINS = 8
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
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - see the module

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
    rank_sum = rankdata(scores)[labels == 1].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def binary_metrics(labels: Labels, scores: Scores, threshold: float = 0.5) -> dict[str, float]:
    """Return the usual metrics of malignancy probabilities ``(N,)`` against labels 0/1 ``(N,)``.

    A ratio without cases (precision where nothing was called positive) is 0.
    """
    from sklearn.metrics import brier_score_loss, confusion_matrix  # noqa: PLC0415 - see the module

    predicted = (scores >= threshold).astype(np.int64)
    true_negative, false_positive, false_negative, true_positive = (
        int(count) for count in confusion_matrix(labels, predicted, labels=[0, 1]).ravel()
    )
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
        "brier": float(brier_score_loss(labels, scores.clip(0.0, 1.0), pos_label=1)),
    }


def classification_curves(labels: Labels, scores: Scores, threshold: float = 0.5) -> dict[str, Any]:
    """Return what a report draws: ROC, calibration and confusion matrix, as plain lists."""
    from sklearn.calibration import calibration_curve  # noqa: PLC0415 - see the module
    from sklearn.metrics import confusion_matrix, roc_curve  # noqa: PLC0415

    observed, predicted = calibration_curve(
        labels, scores.clip(0.0, 1.0), n_bins=_CALIBRATION_BINS, strategy="quantile"
    )
    curves = {
        "calibration": {"predicted": predicted.tolist(), "observed": observed.tolist()},
        "confusion": confusion_matrix(labels, (scores >= threshold).astype(int), labels=[0, 1]).tolist(),
        "cases": len(labels),
        "positives": int(labels.sum()),
    }
    if len(np.unique(labels)) == 2:  # with one class there is no ROC curve
        false_positive, true_positive, _ = roc_curve(labels, scores)
        keep = np.unique(np.linspace(0, len(false_positive) - 1, _CURVE_POINTS).round().astype(int))
        curves["roc"] = {"fpr": false_positive[keep].tolist(), "tpr": true_positive[keep].tolist()}
    return curves


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
