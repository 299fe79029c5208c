"""The report on the model: how good it is, and compared with what."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from server.findings import Baseline, Findings, as_estimate, humanise
from server.markup import (
    UNKNOWN,
    Markup,
    count,
    join,
    number,
    paragraph,
    section,
    table,
    tag,
)
from server.plots import calibration, convergence, figure, roc
from shared.evaluation import Evaluation
from shared.metrics import Estimate
from shared.operating_point import BALANCED, OperatingPoint
from shared.tasks.ct_nodules import VENDORS

_FORECAST_COLUMNS = (
    "skill_30", "rmse_30", "rmse_60", "path_mae_median", "coverage_90", "hypo_sensitivity", "hypo_false_alarms_per_day",
    "clarke_a", "parkes_a",
)  # fmt: skip


def quality(findings: Findings) -> Markup:
    """Return how good the saved model is on the held-out set."""
    evaluation = findings.evaluation
    if evaluation is None:
        return Markup()
    details = evaluation.details
    figures = []
    if findings.history:
        figures.append(_convergence(findings))
    if _drawable(details.get("roc"), "fpr", "tpr"):
        plot = roc(details["roc"], _operating_point(details.get("confusion")))
        figures.append(figure("ROC curve", plot, "All thresholds at once: the closer to the top left, the better."))
    if _drawable(details.get("calibration"), "predicted", "observed"):
        caption = "Where the line lies on the diagonal, a predicted 70% comes true in 70% of cases."
        figures.append(figure("Calibration", calibration(details["calibration"]), caption))
    matrix = _confusion(details["confusion"], evaluation.operating_point) if details.get("confusion") else Markup()
    figures.append(tag("div", matrix, _metrics(evaluation)))
    return section(
        "How good the model is",
        _cases(details),
        tag("div", *figures, class_="figures"),
        _groups(findings),
        _hospitals(details),
        _patients(details),
    )


def _metrics(evaluation: Evaluation) -> Markup:
    estimates = {name: as_estimate(value) for name, value in evaluation.metrics.items()}
    content = table(
        ("Metric", "Value", "95% interval"),
        [
            (humanise(name), number(estimate.value if estimate else None), _interval(estimate))
            for name, estimate in estimates.items()
        ],
        caption="The final model on the held-out set",
    )
    return tag("figure", tag("h3", "All metrics"), content)


def comparison(findings: Findings) -> Markup:
    """Return this run's model beside the baselines, with intervals on one scale."""
    title = "Compared with what there would be without it"
    if not findings.baselines or not findings.metric:
        return section(title, paragraph("No baselines were trained in this run, so there is nothing to compare with."))
    metric = findings.metric
    label = f"This model: federated, {'private' if findings.guaranteed else 'no privacy'}"
    ours = Baseline(label, findings.evaluation.metrics if findings.evaluation else {})
    everyone = (ours, *findings.baselines)
    low, high = _scale([estimate for row in everyone if (estimate := row.estimate(metric))])
    scale = tag("span", tag("span", f"{low:g}"), tag("span", f"{high:g}"), class_="scale")
    rows = []
    for row in everyone:
        estimate = row.estimate(metric)
        accuracy = as_estimate(row.metrics.get("accuracy"))
        rows.append(
            (
                tag("strong", row.label) if row is ours else f"\u2003{row.label}" if row.member else row.label,
                number(estimate.value if estimate else None),
                _interval(estimate),
                _strip(estimate, low, high, row is ours),
                number(accuracy.value if accuracy else None),
            )
        )
    return section(
        title,
        table(
            ("Model", humanise(metric), "95% interval", scale, "Accuracy"),
            rows,
            left=(0, 3),
            caption="Held-out set, the same for all. Dot: value; bar: 95% interval.",
        ),
    )


def _convergence(findings: Findings) -> Markup:
    levels = {
        row.label: estimate.value
        for row in findings.baselines
        if not row.member and (estimate := row.estimate(findings.metric))
    }
    history = findings.history
    plot = convergence(humanise(findings.metric), list(history), list(history.values()), levels)
    return figure("Round by round", plot, "Round 0 is the start. Level lines: the baselines.")


def _drawable(curve: Mapping[str, Sequence[float | None]] | None, *axes: str) -> bool:
    """Whether a curve has two points or more, none of them undefined."""
    return curve is not None and all(
        len(curve.get(axis, ())) > 1 and not any(as_estimate(value) is None for value in curve[axis]) for axis in axes
    )


def _operating_point(confusion: Sequence[Sequence[int]] | None) -> tuple[float, float] | None:
    if confusion is None or len(confusion) != 2 or not all(sum(row) for row in confusion):
        return None
    (negatives, false_alarms), (misses, hits) = confusion
    return false_alarms / (negatives + false_alarms), hits / (misses + hits)


def _confusion(matrix: Sequence[Sequence[int]], point: OperatingPoint | None) -> Markup:
    names = ("negative", "positive") if len(matrix) == 2 else tuple(f"class {i}" for i in range(len(matrix)))
    rows = []
    for name, cases in zip(names, matrix, strict=True):
        whole = sum(cases)
        # At most 45% of blue, so that the text keeps its contrast in light and dark.
        shares = [case / whole if whole else 0.0 for case in cases]
        cells = [
            tag(
                "span",
                count(case),
                tag("small", f"{share:.0%}"),
                class_="shade",
                style=f"--share: {45 * share:.0f}%",
            )
            for case, share in zip(cases, shares, strict=True)
        ]
        rows.append((f"Truly {name}", *cells))
    content = table(("", *(f"Called {name}" for name in names)), rows, caption="Cases, and the share of their row")
    return tag("figure", tag("h3", "Confusion matrix"), content, *_chosen(point), class_="confusion")


def _chosen(point: OperatingPoint | None) -> list[Markup]:
    """Return where the model decides, and on whom it was judged."""
    if point is None:
        return []
    rule = "the best balanced accuracy" if point.rule == BALANCED else point.rule
    caption = (
        f"The model calls positive from a probability of {number(point.threshold)} on, after temperature "
        f"{number(point.temperature)}. The held-out patients chose both, for {rule}. Each case above was decided by a "
        "threshold and a temperature that the other patients chose."
    )
    return [tag("figcaption", caption)]


def _groups(findings: Findings) -> Markup:
    groups = findings.evaluation.by_group if findings.evaluation else {}
    if not groups or not findings.evaluation:
        return Markup()
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    vendors = set(groups) <= set(VENDORS)
    rows = [
        (group, *(number(values.get(name), 3 if name in findings.evaluation.metrics else 0) for name in names))
        for group, values in groups.items()
    ]
    header = ("Scanner vendor" if vendors else "Group", *(humanise(name) for name in names))
    caption = "By scanner vendor" if vendors else "By group"
    note = paragraph(f"“{UNKNOWN}”: undefined, as where only one class is present. Small groups vary by chance.")
    return join([table(header, rows, caption=caption), note])


def _hospitals(details: Mapping[str, Any]) -> Markup:
    """Return how a forecaster does in each hospital, the worst one named."""
    by_site = details.get("by_site")
    if not by_site:
        return Markup()
    rows = [
        (site, count(round(values["windows"])), *(number(values.get(name)) for name in _FORECAST_COLUMNS))
        for site, values in by_site.items()
    ]
    header = ("Hospital", "Windows", *(humanise(name) for name in _FORECAST_COLUMNS))
    note = paragraph(
        f"The least is gained in {details['worst_site']}. Errors in mg/dL at 30 and 60 minutes; skill is the share of "
        "the error at 30 minutes that the last reading would make and the model does not; warnings are of values "
        "below 70 mg/dL in 30 minutes, one forecast every half hour. Every patient is judged on readings later "
        "than those that were trained on."
    )
    return join([table(header, rows, caption="By hospital"), note])


def _patients(details: Mapping[str, Any]) -> Markup:
    """Return how a forecaster's error is spread over the patients of each hospital; nobody is named."""
    spreads = {"All": details.get("rmse_30_of_patients"), **details.get("rmse_30_of_patients_by_site", {})}
    known = {name: spread for name, spread in spreads.items() if spread}
    if not known:
        return Markup()
    percentiles = list(next(iter(known.values())))
    rows = [(name, *(number(spread.get(level), 1) for level in percentiles)) for name, spread in known.items()]
    header = ("Hospital", *(f"{level}%" for level in percentiles))
    note = paragraph(
        "Each patient has one error: the root mean square over the patient's forecasts of the reading in 30 minutes, "
        "in mg/dL. A column says below which error that share of the patients lies. Hospitals with few patients are "
        "left out, for there a percentile would be one person's."
    )
    return join([table(header, rows, caption="The error at 30 minutes, by patient"), note])


def _cases(details: Mapping[str, object]) -> Markup:
    cases, positives = details.get("cases"), details.get("positives")
    if not isinstance(cases, int):
        return Markup()
    of_them = f", {positives:,} of them positive" if isinstance(positives, int) else ""
    return paragraph(f"Judged on {cases:,} held-out cases{of_them}, of patients that no hospital trained on.")


def _interval(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.low) or math.isnan(estimate.high):
        return UNKNOWN
    return f"{number(estimate.low)} to {number(estimate.high)}"


def _scale(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return round ends that hold every value and interval."""
    values = [v for e in estimates for v in (e.value, e.low, e.high) if math.isfinite(v)]
    if not values:
        return 0.0, 1.0
    step = 10.0 ** math.floor(math.log10(max(max(values) - min(values), 1e-3)))
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    return low, max(high, low + step)


def _strip(estimate: Estimate | None, low: float, high: float, ours: bool) -> str:
    """Return a dot and its interval on the scale; the numbers beside it say the same to a screen reader."""
    if estimate is None or not math.isfinite(estimate.value):
        return UNKNOWN

    def percent(value: float) -> float:
        return 100 * (value - low) / (high - low)

    marks = [tag("i", class_="value", style=f"left: {percent(estimate.value):.1f}%")]
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        left, right = percent(estimate.low), percent(estimate.high)
        marks.insert(0, tag("i", class_="range", style=f"left: {left:.1f}%; width: {right - left:.1f}%"))
    return tag("span", *marks, class_="strip ours" if ours else "strip", aria_hidden="true")
