"""The report on the run: what privacy it cost each hospital, and how the rounds went."""

from collections import Counter

from server.findings import Findings, humanise
from server.markup import (
    UNKNOWN,
    Markup,
    box,
    count,
    epsilon_text,
    number,
    paragraph,
    section,
    table,
    tag,
)
from server.plots import epsilon_by_round, figure, seconds_by_round
from server.registry import OK, RoundRow

_MOST_ROUNDS_SHOWN = 30


def privacy(findings: Findings) -> Markup:
    """Return what each hospital spent, by round and in all."""
    plan, record = findings.record.plan, findings.record
    top: list[Markup] = []
    if not findings.guaranteed:
        sentence = "The plan adds too little noise, or none, for any finite epsilon."
        top.append(box("No privacy guarantee", sentence, kind="warning"))
    else:
        curve = _epsilon(findings) if findings.accepted and record.rounds_completed else Markup()
        top += [curve, _reading()]
    rows = [
        (
            row.site,
            count(row.declared_patients),
            count(record.rounds_of(row.site)),
            UNKNOWN if row.refused else epsilon_text(findings.spent[row.site]),
            f"{plan.delta:g}",
            tag("code", row.refused) if row.refused else "took part",
        )
        for row in sorted(record.sites, key=lambda row: row.refused is not None)
    ]
    header = ("Hospital", "Declared patients", "Rounds spent", "Epsilon", "Delta", "Answer to the plan")
    sites = table(header, rows, left=(0, 5), caption="What each hospital spent, as the server must assume")
    return section("What privacy it cost", tag("div", *top, class_="figures"), sites)


def _epsilon(findings: Findings) -> Markup:
    record = findings.record
    curves = {", ".join(sites): values for sites, values in findings.spending().items()}
    plot = epsilon_by_round(findings.drawn_rounds, curves, record.plan.epsilon())
    caption = "Hospitals with the same curve share one line." if len(curves) < len(findings.accepted) else ""
    return figure("Epsilon by hospital and round", plot, caption)


def _reading() -> Markup:
    facts = (
        "The unit is the patient, with all of that patient's records in every round. A smaller epsilon is more "
        "private; 0 would mean "
        "that nothing can be learnt of any one patient.",
        "Noise is added inside each hospital, so the promise holds against the aggregator too, and for every "
        "model that the hospital sent, not only for the last one.",
        "A round whose reply came late counts as spent. Each hospital's own ledger has the last word: it also "
        "holds what earlier runs spent on the same patients.",
        "The declared number of patients is a coarse figure that the hospital publishes, never the true count.",
    )
    return tag("div", tag("h3", "How to read this"), *(paragraph(fact) for fact in facts), class_="prose")


def course(findings: Findings) -> Markup:
    """Return the rounds: how long, how good, who replied."""
    trained = [row for row in findings.record.rounds if row.round >= 1]
    if not trained:
        return section("What happened on the way", paragraph("No round was completed."))
    incomplete = {row.round: row.seconds for row in trained if _troubles(row)}
    plot = seconds_by_round([row.round for row in trained], [row.seconds for row in trained], incomplete)
    caption = "From sending the weights to the judged new model."
    rows = table(
        ("Round", humanise(findings.metric) or "Metric", "Seconds", "Replies in time", "Missing"),
        [_round(findings, row) for row in findings.record.rounds],
        left=(0, 4),
    )
    attributes = {"open": "open"} if len(trained) <= _MOST_ROUNDS_SHOWN else {}
    details = tag("details", tag("summary", f"All {len(trained)} rounds"), rows, **attributes)
    drawn = figure("Seconds by round", plot, caption)
    return section("What happened on the way", tag("div", drawn, _attendance(findings), class_="figures"), details)


def _attendance(findings: Findings) -> Markup:
    """Return how many rounds each hospital answered, and what came instead."""
    rows = []
    for site in findings.accepted:
        outcomes = Counter(row.replies[site.site] for row in findings.record.rounds if site.site in row.replies)
        others = ", ".join(f"{number} × {outcome}" for outcome, number in sorted(outcomes.items()) if outcome != OK)
        rows.append((site.site, f"{outcomes[OK]} of {outcomes.total()}", others or "none"))
    content = table(("Hospital", "In time", "Otherwise"), rows, left=(0, 2), caption="Replies by hospital")
    return tag("div", tag("h3", "Who replied"), content)


def _round(findings: Findings, row: RoundRow) -> tuple[str, ...]:
    value = findings.history.get(row.round)
    return (
        str(row.round) if row.round else "0 (start)",
        number(value.value if value else None),
        number(row.seconds, 1),
        f"{sum(outcome == OK for outcome in row.replies.values())} of {len(row.replies)}" if row.replies else UNKNOWN,
        ", ".join(f"{site}: {outcome}" for site, outcome in _troubles(row).items()),
    )


def _troubles(row: RoundRow) -> dict[str, str]:
    return {site: outcome for site, outcome in row.replies.items() if outcome != OK}
