"""Each warning: a record that calls for it, and one that does not; and where a reader meets them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from server.findings import Findings
from server.registry import OK, RoundRow, RunRecord, SiteRow
from server.report import render
from server.summary import summarise
from server.warnings import FEWEST_CASES, FEWEST_PATIENTS, Caution, warnings_of
from shared.evaluation import Evaluation
from shared.metrics import Estimate
from shared.operating_point import BALANCED, OperatingPoint
from shared.plan import RunPlan

PLAN = RunPlan(
    task="nodule-classification", rounds=2, local_steps=2, sample_rate=0.1, records_per_patient=2,
    max_grad_norm=1.0, noise_multiplier=2.0, delta=1e-3, learning_rate=0.1,
)  # fmt: skip
GOOD = {
    "auroc": Estimate(0.877, 0.82, 0.92),
    "recall": 0.8,
    "specificity": 0.8,
    "calibration_error": 0.03,
    "calibration_bias": Estimate(0.01, -0.04, 0.06),
    "calibration_slope": Estimate(1.1, 0.8, 1.4),
}


@dataclass(frozen=True)
class Made:
    """A run of two rounds without anything to warn of; a test changes one thing."""

    metrics: Mapping[str, Any] = field(default_factory=lambda: GOOD)
    confusion: list[list[int]] = field(default_factory=lambda: [[50, 10], [8, 33]])
    start: float = 0.6
    baselines: Mapping[str, Any] = field(default_factory=dict)
    patients: int = 200
    status: str = "completed"
    outcome: str = OK
    plan: RunPlan = PLAN
    validated: bool = True

    @property
    def record(self) -> RunRecord:
        (a, b), (c, d) = self.confusion
        details = {"confusion": self.confusion, "cases": a + b + c + d, "positives": c + d}
        final = Evaluation(self.metrics, {}, details, OperatingPoint(0.37, 1.4, BALANCED))
        first = Evaluation({**self.metrics, "auroc": Estimate(self.start, self.start - 0.1, self.start + 0.1)})
        return RunRecord(
            run="r",
            plan=self.plan,
            status=self.status,
            failure="quorum-lost" if self.status == "failed" else None,
            sites=(SiteRow("a", 200, None), SiteRow("b", self.patients, None)),
            rounds=(
                RoundRow(0, 1.0, first if self.validated else None, {}),
                RoundRow(1, 1.0, first if self.validated else None, {"a": OK, "b": self.outcome}),
                RoundRow(2, 1.0, final if self.validated else None, {"a": OK, "b": OK}),
            ),
            notes={"baselines": dict(self.baselines)},
        )

    @property
    def warnings(self) -> tuple[Caution, ...]:
        return warnings_of(Findings(self.record, None))


def judged(**changes: Any) -> Made:
    return Made(metrics={**GOOD, **changes})


def baseline(name: str, value: float) -> Made:
    return Made(baselines={name: {"auroc": {"value": value, "low": value - 0.05, "high": value + 0.05}}})


def alone(value: float) -> Made:
    members = {"a": {"auroc": {"value": value}}, "b": {"auroc": {"value": 0.5}}}
    return Made(baselines={"local": {"auroc": {"value": 0.7}, "by_site": members}})


CASES = [
    ("recall-zero", Made(confusion=[[60, 0], [41, 0]]), Made(confusion=[[60, 0], [40, 1]]), "finds 0 of 41"),
    ("specificity-zero", Made(confusion=[[0, 60], [0, 41]]), Made(confusion=[[1, 59], [0, 41]]), "clears 0 of 60"),
    ("chance", judged(auroc=Estimate(0.6, 0.49, 0.7)), judged(auroc=Estimate(0.6, 0.51, 0.7)), "0.490 to 0.700"),
    ("no-gain", Made(start=0.9), Made(start=0.8), "at round 0, before training, 0.900"),
    ("no-gain", Made(start=0.83), Made(start=0.81), "0.820 to 0.920"),
    ("worse-than-simple", baseline("size_only", 0.93), baseline("size_only", 0.87), "no network” reaches 0.930"),
    ("worse-than-simple", baseline("last_value", 0.88), baseline("last_value", 0.87), "reaches 0.880"),
    ("worse-than-alone", alone(0.95), alone(0.87), "“a alone” reaches 0.950"),
    ("few-patients", Made(patients=FEWEST_PATIENTS - 1), Made(patients=FEWEST_PATIENTS), "b (49)"),
    (
        "few-reference-cases",
        Made(confusion=[[50, 10], [1, FEWEST_CASES - 2]]),
        Made(confusion=[[50, 10], [1, FEWEST_CASES - 1]]),
        "9 positive and 60 negative",
    ),
    (
        "calibration-off",
        judged(calibration_bias=Estimate(-0.2, -0.3, -0.1)),
        judged(calibration_bias=Estimate(-0.2, -0.4, 0.01)),
        "0.200 below the share of positives (95% interval -0.300 to -0.100)",
    ),
    (
        "calibration-off",
        judged(calibration_slope=Estimate(0.4, 0.2, 0.6)),
        judged(calibration_slope=Estimate(0.4, -0.3, 1.1)),
        "calibration slope is 0.400",
    ),
    ("not-private", Made(plan=replace(PLAN, noise_multiplier=0.0)), Made(), "may reveal their patients"),
    ("not-validated", Made(validated=False), Made(), "No held-out patients"),
    ("failed", Made(status="failed"), Made(), "quorum-lost"),
    ("unfinished", Made(status="running"), Made(), "can be resumed"),
    ("faulty-replies", Made(outcome="not-finite"), Made(outcome="late"), "b (not-finite, 1 times)"),
]


@pytest.mark.parametrize(("code", "bad", "good", "said"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)])
def test_a_warning_is_given_where_it_is_due_and_only_there(code: str, bad: Made, good: Made, said: str) -> None:
    [warning] = [warning for warning in bad.warnings if warning.code == code]
    assert said in warning.text
    assert code not in {warning.code for warning in good.warnings}


def test_a_run_without_fault_has_no_warning_and_its_figure_in_the_headline() -> None:
    assert Made().warnings == ()
    page = render(Made().record, None)
    assert "<h1>Nodule classification: AUROC 0.877 on held-out patients after 2 rounds</h1>" in page
    assert 'class="box warning"' not in page


def test_a_report_that_finds_none_of_the_positives_does_not_praise_its_auroc() -> None:
    page = render(Made(confusion=[[60, 0], [41, 0]], patients=10).record, None)
    opening = page[page.index("<h1>") :]
    assert opening.startswith(
        "<h1>Nodule classification: the model finds 0 of 41 positive cases, after 2 rounds</h1>"
        '<aside class="box warning"><strong>2 warnings</strong>'
    )
    assert opening.index("calls none positive") < opening.index("0.877")


def test_the_headline_keeps_its_figure_beside_a_warning_that_is_not_grave() -> None:
    assert "AUROC 0.877 on held-out patients" in render(Made(patients=10).record, None)


@pytest.mark.parametrize("made", [Made(start=0.9), baseline("size_only", 0.93), alone(0.95)])
def test_what_is_beyond_the_interval_takes_the_headline(made: Made) -> None:
    assert made.warnings[0].grave
    assert "AUROC 0.877 on held-out" not in render(made.record, None)


@pytest.mark.parametrize("made", [Made(start=0.83), baseline("size_only", 0.9), alone(0.9)])
def test_what_chance_may_explain_does_not(made: Made) -> None:
    assert made.warnings
    assert not made.warnings[0].grave


def test_undefined_figures_call_for_no_comparison() -> None:
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    made = replace(judged(auroc=nothing, calibration_slope=nothing), baselines=baseline("size_only", 0.9).baselines)
    assert made.warnings == ()


def test_warnings_open_the_summary_as_codes_and_sentences() -> None:
    summary = summarise(Made(confusion=[[60, 0], [41, 0]]).record, None)
    assert next(iter(summary)) == "warnings"
    assert [warning["code"] for warning in summary["warnings"]] == ["recall-zero"]
    assert set(summary["warnings"][0]) == {"code", "text"}
    assert summary["warnings"][0]["text"].startswith("The model finds 0 of 41 positive cases. Of 41 positive")
    assert (summary["metrics"]["threshold"], summary["metrics"]["temperature"]) == (0.37, 1.4)


def test_the_report_says_where_the_model_decides_and_who_chose_it(tmp_path: Path) -> None:
    page = render(Made().record, None)
    assert "calls positive from a probability of 0.370 on, after temperature 1.400" in page
    assert "that the other patients chose" in page
