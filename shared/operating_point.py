"""The operating point: where a classifier's score becomes a decision, and how its score becomes a probability.

Both are chosen on the server's reference patients, from a model that was released before. That is post-processing of
a private model with public data: it costs no privacy (Dwork and Roth, 2014, Proposition 2.1).

Temperature. The probability is ``sigmoid(logit(score) / T)``: one parameter, which changes no order of the scores
(Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017). T minimises the log loss, which is
convex in 1/T, within fixed bounds. The targets are Platt's ("Probabilistic outputs for support vector machines",
1999): (P + 1) / (P + 2) and 1 / (N + 2) in place of 1 and 0, so that scores which separate the few reference patients
do not call for boundless confidence.

Threshold. Either the one of the best balanced accuracy, or the highest one that finds the asked share of positives.

To judge a decision on the patients who chose its threshold flatters it. :func:`cross_fitted` therefore decides on each
patient by the point that the other patients choose (Stone, "Cross-validatory choice and assessment of statistical
predictions", 1974); the point that is stored is chosen by all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shared.errors import PlanError

Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
BALANCED: Final = "balanced-accuracy"
FOLDS: Final = 5
MOST_TEMPERATURE: Final = 20.0
_LEAST_TEMPERATURE: Final = 1.0 / MOST_TEMPERATURE
_EDGE: Final = 1e-6
_LONGEST_RULE: Final = 64
_STEPS: Final = 60
_GOLDEN: Final = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class OperatingPoint:
    """How a model's score is read.

    Attributes:
        threshold: A case is called positive at this probability, after temperature, or a higher one; in [0, 1].
        temperature: What the score's logit is divided by.
        rule: How the threshold was chosen: ``balanced-accuracy`` or ``sensitivity 0.90``.
    """

    threshold: float
    temperature: float
    rule: str

    def probability(self, scores: Scores) -> Scores:
        """Return the calibrated probabilities ``(N,)`` of a model's scores ``(N,)`` in [0, 1]."""
        return _sigmoid(_logit(scores) / self.temperature)

    def positive(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return which scores ``(N,)`` are called positive."""
        called: npt.NDArray[np.bool_] = self.probability(scores) >= self.threshold
        return called

    @classmethod
    def parse(cls, value: object) -> "OperatingPoint | None":
        """Return the point that a checkpoint's description holds; ``None`` if it holds none.

        Raises:
            ValueError: If it is malformed or out of range.
        """
        if value is None:
            return None
        if isinstance(value, Mapping) and set(value) == {"threshold", "temperature", "rule"}:
            threshold, temperature, rule = value["threshold"], value["temperature"], value["rule"]
            known = _number_within(threshold, 0.0, 1.0) and _number_within(
                temperature, _LEAST_TEMPERATURE, MOST_TEMPERATURE
            )
            if known and isinstance(rule, str) and len(rule) <= _LONGEST_RULE and rule.isprintable():
                return cls(float(threshold), float(temperature), rule)
        raise ValueError("The operating point is malformed or out of range.")


def check_sensitivity(sensitivity: float | None) -> None:
    """Refuse a sensitivity that no threshold can be asked for.

    Raises:
        PlanError: If it does not lie in (0, 1].
    """
    if sensitivity is not None and not 0.0 < sensitivity <= 1.0:
        raise PlanError(f"sensitivity must be above 0 and at most 1, not {sensitivity:g}.")


def choose(labels: Labels, scores: Scores, sensitivity: float | None = None) -> OperatingPoint | None:
    """Return the operating point that cases choose; ``None`` where only one class is present.

    Args:
        labels: ``(N,)`` of 0 and 1.
        scores: ``(N,)`` in [0, 1].
        sensitivity: The share of positives that must be found; by default balanced accuracy is made as large as it
            can be.
    """
    if len(np.unique(labels)) < 2:
        return None
    temperature = fit_temperature(labels, scores)
    point = OperatingPoint(0.5, temperature, BALANCED if sensitivity is None else f"sensitivity {sensitivity:.2f}")
    probabilities = point.probability(scores)
    threshold = (
        _best_balanced(labels, probabilities) if sensitivity is None else _reaching(labels, probabilities, sensitivity)
    )
    return OperatingPoint(threshold, temperature, point.rule)


def cross_fitted(
    labels: Labels, scores: Scores, patients: npt.NDArray[np.int64], sensitivity: float | None = None
) -> tuple[Scores, npt.NDArray[np.bool_]]:
    """Return each case's probability and decision ``(N,)`` by a point that its own patient did not help to choose.

    Patients are dealt to ``FOLDS`` parts in their order, those with a positive case and the others each in turn, so
    that every part has both. Where the other parts hold one class only, the score stands and the threshold is 0.5.

    Args:
        labels: ``(N,)`` of 0 and 1.
        scores: ``(N,)`` in [0, 1].
        patients: ``(N,)`` whose each case is.
        sensitivity: See :func:`choose`.
    """
    probabilities, positive = scores.clip(0.0, 1.0).astype(np.float64), scores >= 0.5
    part = _parts(labels, patients)
    for number in range(FOLDS):
        mine = part == number
        point = choose(labels[~mine], scores[~mine], sensitivity) if mine.any() else None
        if point is not None:
            probabilities[mine], positive[mine] = point.probability(scores[mine]), point.positive(scores[mine])
    return probabilities, positive


def fit_temperature(labels: Labels, scores: Scores) -> float:
    """Return the temperature of the least log loss, between 1 / ``MOST_TEMPERATURE`` and ``MOST_TEMPERATURE``."""
    logits, positives = _logit(scores), int(labels.sum())
    targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2))

    def log_loss(log_inverse: float) -> float:
        scaled = logits * math.exp(log_inverse)
        return float(np.mean(np.logaddexp(0.0, scaled) - targets * scaled))

    # Convex in 1/T, hence with one valley in its logarithm too: golden section finds it.
    low, high = -math.log(MOST_TEMPERATURE), math.log(MOST_TEMPERATURE)
    for _ in range(_STEPS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if log_loss(left) <= log_loss(right) else (left, high)
    return min(max(math.exp(-(low + high) / 2), _LEAST_TEMPERATURE), MOST_TEMPERATURE)


def _best_balanced(labels: Labels, probabilities: Scores) -> float:
    """Return the threshold of the best balanced accuracy, in the middle of its gap; the least of several."""
    levels = np.unique(probabilities)
    sensitivity = _share_at_least(probabilities[labels == 1], levels)
    false_alarms = _share_at_least(probabilities[labels == 0], levels)
    return _below(levels, int(np.argmax(sensitivity - false_alarms)))


def _reaching(labels: Labels, probabilities: Scores, sensitivity: float) -> float:
    """Return the highest threshold, in the middle of its gap, that finds the share of positives."""
    levels = np.unique(probabilities)
    enough = _share_at_least(probabilities[labels == 1], levels) >= sensitivity - 1e-9
    return _below(levels, int(np.flatnonzero(enough)[-1]))


def _share_at_least(values: Scores, levels: Scores) -> Scores:
    share: Scores = 1.0 - np.searchsorted(np.sort(values), levels) / len(values)
    return share


def _below(levels: Scores, index: int) -> float:
    """Return a threshold that the level reaches and the next lower one does not."""
    return float((levels[index - 1] + levels[index]) / 2) if index else float(levels[0])


def _parts(labels: Labels, patients: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the part ``(N,)`` of each case; all cases of a patient are in the same."""
    owners, index = np.unique(patients, return_inverse=True)
    has_positive = np.bincount(index, weights=labels) > 0
    part = np.empty(len(owners), np.int64)
    for group in (has_positive, ~has_positive):
        part[group] = np.arange(int(group.sum())) % FOLDS
    return part[index]


def _logit(scores: Scores) -> Scores:
    inside = np.asarray(scores, np.float64).clip(_EDGE, 1.0 - _EDGE)
    return np.asarray(np.log(inside) - np.log1p(-inside), np.float64)


def _sigmoid(logits: Scores) -> Scores:
    return np.asarray(np.exp(-np.logaddexp(0.0, -logits)), np.float64)


def _number_within(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high
