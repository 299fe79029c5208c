"""What a reader must know before any praise of a run: warnings, derived from the registry's record alone. Pure.

A rule compares figures that the registry holds, with the interval beside them where there is one; it never hides a
figure. Patients that judge the model are the same in every row, so two figures may differ by less than their intervals
are wide and yet truly differ: the texts say what was seen and leave the verdict to the reader.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from server.findings import LOCAL, POOLED, Baseline, Findings, as_estimate, humanise, in_sentence
from server.markup import number
from server.registry import COMPLETED, FAILED
from shared.metrics import Estimate

FEWEST_PATIENTS: Final = 50
"""A hospital that declares fewer is warned about: each patient is then more than 2% of what it teaches."""
FEWEST_CASES: Final = 10
"""With fewer cases of a kind among the reference patients, one of them moves recall or specificity by over 10%."""
_CHANCE: Final = {"auroc": 0.5, "tstr_auroc": 0.5}


@dataclass(frozen=True)
class Caution:
    """One thing that a reader must know.

    Attributes:
        code: For programs; a closed list, which only grows.
        title: A few words.
        details: One or two sentences with the figures.
        grave: Whether the model is of no use, as far as the figures show: it then takes the figure's place in the
            headline.
    """

    code: str
    title: str
    details: str
    grave: bool = False

    @property
    def text(self) -> str:
        """All of it, as a summary and a terminal show it."""
        return f"{self.title}. {self.details}"


def warnings_of(findings: Findings) -> tuple[Caution, ...]:
    """Return a run's warnings, the gravest first."""
    rules = (_state, _decisions, _use, _comparisons, _privacy, _calibration, _numbers, _replies)
    found = [warning for rule in rules for warning in rule(findings)]
    return tuple(sorted(found, key=lambda warning: not warning.grave))


def _state(findings: Findings) -> Iterator[Caution]:
    record = findings.record
    if record.status == FAILED:
        rounds = f"{record.rounds_completed} round{'' if record.rounds_completed == 1 else 's'}"
        text = f"The run failed after {rounds} with the code {record.failure}. The figures are of the last saved model."
        yield Caution("failed", "The run failed", text)
    elif record.status != COMPLETED:
        yield Caution("unfinished", "The run has not ended", "It can be resumed; these are the figures so far.")
    if findings.evaluation is None:
        yield Caution("not-validated", "Nothing was validated", "No held-out patients judged this model.")


def _decisions(findings: Findings) -> Iterator[Caution]:
    """Warn of a model whose every decision is the same."""
    matrix = findings.evaluation.details.get("confusion") if findings.evaluation else None
    if matrix is None or len(matrix) != 2:
        return
    (negatives, false_alarms), (misses, hits) = matrix
    threshold = findings.evaluation.operating_point if findings.evaluation else None
    at = f"at a probability of {threshold.threshold if threshold else 0.5:.2f}"
    if misses and not hits:
        text = f"Of {misses} positive cases it calls none positive {at}. Its recall (sensitivity) is 0."
        yield Caution("recall-zero", f"The model finds 0 of {misses} positive cases", text, grave=True)
    if false_alarms and not negatives:
        text = f"Of {false_alarms} negative cases it calls none negative {at}. Its specificity is 0."
        yield Caution("specificity-zero", f"The model clears 0 of {false_alarms} negative cases", text, grave=True)


def _use(findings: Findings) -> Iterator[Caution]:
    """Warn of a model that is not shown to be better than chance, or than it was before training."""
    ours, name, level = findings.ours, humanise(findings.metric), _CHANCE.get(findings.metric)
    if ours is None:
        return
    if level is not None and ours.value and _least(ours) <= level:
        text = f"{_with_interval(name, ours)}; chance reaches {level:g}."
        yield Caution("chance", "The model is not shown to be better than chance", text, grave=True)
    start = findings.history.get(0)
    if start is not None and findings.record.rounds_completed and _least(ours) <= start.value:
        rounds, none = findings.record.rounds_completed, ours.value <= start.value
        title = "There is no gain over the start" if none else "The gain over the start may be chance"
        text = f"{_with_interval(name, ours)} after round {rounds}; at round 0, before training, {number(start.value)}."
        yield Caution("no-gain", title, text, grave=none)


def _comparisons(findings: Findings) -> Iterator[Caution]:
    """Warn of what would have done better: a simple method, or one hospital by itself."""
    ours, rows = findings.ours, findings.baselines
    if ours is None:
        return
    simple = [row for row in rows if not row.member and row.name not in (POOLED, LOCAL)]
    alone = [row for row in rows if row.member and row.name == LOCAL]
    for code, who, group, ending in (
        ("worse-than-simple", "A simple method", simple, ""),
        ("worse-than-alone", "A hospital alone", alone, ", without privacy"),
    ):
        if better := _better(group, findings.metric, ours):
            grave = max(better.values()) > _most(ours)
            title = f"{who} does better" if grave else f"{who} does as well or better"
            text = f"{_with_interval(humanise(findings.metric), ours)}; {_listed(better)}{ending}."
            yield Caution(code, title, text, grave=grave)


def _privacy(findings: Findings) -> Iterator[Caution]:
    if not findings.guaranteed:
        text = (
            "The plan adds too little noise, or none, for any finite epsilon. The models that hospitals sent may "
            "reveal their patients. Use them as you would the records."
        )
        yield Caution("not-private", "No privacy guarantee", text)


def _calibration(findings: Findings) -> Iterator[Caution]:
    """Warn of probabilities whose bias or slope is off by more than chance."""
    metrics = findings.evaluation.metrics if findings.evaluation else {}
    bias, slope, error = (as_estimate(metrics.get(f"calibration_{name}")) for name in ("bias", "slope", "error"))
    off = []
    if bias and not _holds(bias, 0.0):
        direction = "above" if bias.value > 0 else "below"
        off.append(f"its mean lies {number(abs(bias.value))} {direction} the share of positives ({_interval(bias)})")
    if slope and not _holds(slope, 1.0):
        off.append(f"its calibration slope is {number(slope.value)} ({_interval(slope)}) where 1 is right")
    if off:
        size = f" The expected calibration error is {number(error.value)}." if error else ""
        text = f"A probability does not mean what it says: {'; '.join(off)}.{size}"
        yield Caution("calibration-off", "The probabilities are off", text)


def _numbers(findings: Findings) -> Iterator[Caution]:
    """Warn of too few patients, to train on or to judge on."""
    few = {row.site: row.declared_patients for row in findings.accepted if row.declared_patients is not None}
    few = {site: patients for site, patients in few.items() if patients < FEWEST_PATIENTS}
    if few:
        who = ", ".join(f"{site} ({patients})" for site, patients in few.items())
        why = (
            "With so few, the noise that hides one patient hides most of what the others teach."
            if findings.guaranteed
            else "With so few, each patient is more than 2% of what the hospital teaches."
        )
        text = f"Below {FEWEST_PATIENTS} declared patients: {who}. {why}"
        yield Caution("few-patients", "A hospital has very few patients", text)
    details = findings.evaluation.details if findings.evaluation else {}
    cases, positives = details.get("cases"), details.get("positives")
    if isinstance(cases, int) and isinstance(positives, int) and min(positives, cases - positives) < FEWEST_CASES:
        text = (
            f"The reference patients have {positives} positive and {cases - positives} negative cases. With fewer than "
            f"{FEWEST_CASES} of a kind, the figures vary much by chance."
        )
        yield Caution("few-reference-cases", "Very few reference cases", text)


def _replies(findings: Findings) -> Iterator[Caution]:
    """Warn of sites that sent what no honest site of this version sends."""
    from server.replies import FAULTY  # noqa: PLC0415 - it needs flwr, which takes seconds to import

    faults = Counter(
        (site, outcome) for row in findings.record.rounds for site, outcome in row.replies.items() if outcome in FAULTY
    )
    if faults:
        who = ", ".join(f"{site} ({outcome}, {times} times)" for (site, outcome), times in sorted(faults.items()))
        yield Caution("faulty-replies", "Replies were dropped", f"No honest site of this version sends such: {who}.")


def _better(rows: list[Baseline], metric: str, ours: Estimate) -> dict[str, float]:
    """Return the labels and values of the rows that do better, the best first."""
    known = {row.label: estimate.value for row in rows if (estimate := row.estimate(metric))}
    return dict(sorted(((k, v) for k, v in known.items() if v > ours.value), key=lambda pair: -pair[1]))


def _listed(better: dict[str, float]) -> str:
    return ", ".join(f"“{in_sentence(label)}” reaches {number(value)}" for label, value in better.items())


def _least(estimate: Estimate) -> float:
    return estimate.value if math.isnan(estimate.low) else estimate.low


def _most(estimate: Estimate) -> float:
    return estimate.value if math.isnan(estimate.high) else estimate.high


def _holds(estimate: Estimate, value: float) -> bool:
    """Whether the interval holds a value; where there is no interval nothing is claimed."""
    return math.isnan(estimate.low) or math.isnan(estimate.high) or estimate.low <= value <= estimate.high


def _with_interval(name: str, estimate: Estimate) -> str:
    return f"{name} is {number(estimate.value)}" + ("" if math.isnan(estimate.low) else f" ({_interval(estimate)})")


def _interval(estimate: Estimate) -> str:
    return f"95% interval {number(estimate.low)} to {number(estimate.high)}"
