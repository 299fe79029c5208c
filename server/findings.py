"""What the report has to say about a run, in numbers: everything is derived from the registry's record."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from server.checkpoints import Checkpoint
from server.lineage import ancestry_in
from server.registry import RoundRow, RunRecord, SiteRow
from shared.errors import PlanError
from shared.evaluation import Evaluation
from shared.metrics import Estimate
from shared.provenance.ancestry import UNKNOWN
from shared.provenance.card import Card, card_of
from shared.tasks.registry import find_task

EXAMINATION = "examination"
"""Name of the note that holds metrics of the final model which the server alone could not measure."""
POOLED, LOCAL, SIZE_ONLY = "pooled", "local", "size_only"
_BASELINE_LABELS = {
    POOLED: "All data pooled, no privacy",
    LOCAL: "Each hospital alone, no privacy (mean)",
    SIZE_ONLY: "Nodule diameter alone, no network",
    "last_value": "The last reading, no change",
    "linear_extrapolation": "A straight line through the last readings",
    "linear_ar": "Linear autoregression, each hospital's own, no privacy",
    "linear_ar_pooled": "Linear autoregression, all data pooled, no privacy",
    "arima": "ARIMA, fitted to each window (a sample)",
}
_ACRONYMS = {
    "tstr_auroc": "AUROC trained on synthetic, tested on real",
    "real_auroc": "AUROC trained on real, tested on real",
    "few_real_auroc": "AUROC trained on 40 real patches",
    "few_real_and_synthetic_auroc": "AUROC trained on these 40 and as many synthetic a batch",
    "auroc": "AUROC",
    "brier": "Brier score",
    "f1": "F1",
    "froc": "FROC",
    "mae": "MAE",
    "mse": "MSE",
    "rmse": "RMSE",
}
_DRAWN_STEPS = 20


@dataclass(frozen=True)
class Baseline:
    """Another model's metrics beside this run's.

    Attributes:
        label: What people call it.
        metrics: By name.
        member: Whether it is of the group that the row above sums up.
        name: As it, or a member's group, was noted.
    """

    label: str
    metrics: Mapping[str, Any]
    member: bool = False
    name: str = ""

    def estimate(self, metric: str) -> Estimate | None:
        """Return one of its metrics, if known."""
        return as_estimate(self.metrics.get(metric))


@dataclass(frozen=True)
class Findings:
    """A run's record with what follows from it."""

    record: RunRecord
    checkpoint: Checkpoint | None

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The held-out evaluation of the saved model."""
        return final_evaluation(self.record, self.checkpoint)

    @cached_property
    def metric(self) -> str:
        """The task's primary metric, or the first there is if this version does not know the task."""
        measured = self.evaluation.metrics if self.evaluation else {}
        try:
            primary = find_task(self.record.plan.task).metric
        except PlanError:
            return next(iter(measured), "")
        return primary if primary in measured or not measured else next(iter(measured))

    @cached_property
    def ours(self) -> Estimate | None:
        """The saved model's primary metric; ``None`` where nothing was validated or it is undefined."""
        return as_estimate(self.evaluation.metrics.get(self.metric)) if self.evaluation else None

    @cached_property
    def history(self) -> dict[int, Estimate]:
        """The primary metric by round, where there is one."""
        judged = {
            row.round: as_estimate(row.evaluation.metrics.get(self.metric))
            for row in self.record.rounds
            if row.evaluation
        }
        return {number: value for number, value in judged.items() if value}

    @cached_property
    def baselines(self) -> tuple[Baseline, ...]:
        """The models to compare with, in the order in which they were noted."""
        noted = self.record.notes.get("baselines")
        found = []
        for name, metrics in noted.items() if isinstance(noted, Mapping) else ():
            if not isinstance(metrics, Mapping):
                continue
            found.append(Baseline(_BASELINE_LABELS.get(name, humanise(name)), metrics, name=name))
            by_site = metrics.get("by_site")
            members = by_site.items() if isinstance(by_site, Mapping) else ()
            alone = " alone" if name == LOCAL else ""
            found += [
                Baseline(f"{site}{alone}", part, True, name) for site, part in members if isinstance(part, Mapping)
            ]
        return tuple(found)

    @cached_property
    def accepted(self) -> tuple[SiteRow, ...]:
        """The sites that took part."""
        return tuple(row for row in self.record.sites if row.refused is None)

    @cached_property
    def spent(self) -> dict[str, float]:
        """Epsilon by site, of those that took part."""
        return {row.site: self.record.plan.stated_epsilon(self.record.rounds_of(row.site)) for row in self.accepted}

    @cached_property
    def inherited(self) -> Card | None:
        """What the model promises over all runs that it comes from; None if it comes from this run alone."""
        ancestry = ancestry_in(self.record, self.checkpoint) if self.checkpoint else None
        alone = ancestry is None or (len(ancestry.runs) < 2 and ancestry.origin != UNKNOWN)
        return None if ancestry is None or alone else card_of(ancestry)

    @property
    def most_spent(self) -> float:
        """The largest epsilon of any hospital, over all runs that the model comes from."""
        return max([*self.spent.values(), *([self.inherited.epsilon] if self.inherited else [])], default=0.0)

    @property
    def delta(self) -> float:
        """The delta at which :attr:`most_spent` holds."""
        own = self.record.plan.delta
        return own if self.inherited is None or self.inherited.delta is None else self.inherited.delta

    @cached_property
    def guaranteed(self) -> bool:
        """Whether the plan's noise is enough for any finite epsilon."""
        return math.isfinite(self.record.plan.epsilon(1))

    @cached_property
    def drawn_rounds(self) -> list[int]:
        """The rounds at which epsilon is drawn: all of a short run, evenly spaced ones of a long one."""
        last = self.record.rounds_completed
        return sorted({round(last * step / _DRAWN_STEPS) for step in range(_DRAWN_STEPS + 1)})

    def spending(self) -> dict[tuple[str, ...], list[float]]:
        """Return epsilon after each of ``drawn_rounds``, for each group of sites that spent the same."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for row in self.accepted:
            counts = tuple(self.record.rounds_of(row.site, number) for number in self.drawn_rounds)
            groups.setdefault(counts, []).append(row.site)
        return {tuple(sites): [self.record.plan.epsilon(count) for count in counts] for counts, sites in groups.items()}


def final_round(record: RunRecord, checkpoint: Checkpoint | None) -> RoundRow | None:
    """Return the round whose model the checkpoint holds.

    A crash can leave one more round registered than saved; its metrics belong to no model that exists.
    """
    rows = [row for row in record.rounds if checkpoint is None or row.round <= checkpoint.round]
    return rows[-1] if rows else None


def final_evaluation(record: RunRecord, checkpoint: Checkpoint | None) -> Evaluation | None:
    """Return the evaluation of the saved model, with what was found out about it after the run, if anything was."""
    final = final_round(record, checkpoint)
    found = record.notes.get(EXAMINATION)
    if final is None or final.evaluation is None or not isinstance(found, Mapping):
        return final.evaluation if final else None
    return replace(final.evaluation, metrics={**final.evaluation.metrics, **found})


def as_estimate(value: object) -> Estimate | None:
    """Return a metric in any of its forms as an estimate; ``None`` if there is no number in it."""
    if isinstance(value, Mapping):
        low, high = (_float(value.get(name)) for name in ("low", "high"))
        value = Estimate(_float(value.get("value")), low, high)
    elif not isinstance(value, Estimate):
        value = Estimate(_float(value), math.nan, math.nan)
    return None if math.isnan(value.value) else value


def humanise(name: str) -> str:
    """Return an identifier as people write it."""
    first, *rest = name.replace("-", "_").split("_")
    return " ".join([_ACRONYMS.get(first, first.capitalize()), *rest])


def in_sentence(label: str) -> str:
    """Return a label as it stands within a sentence: small, unless it begins with an acronym."""
    acronym = label[:2].isupper() and label[:2].isalpha()
    return label if acronym else label[:1].lower() + label[1:]


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
