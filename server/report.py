"""The report: one self-contained page, a pure function of the registry, in the order in which people ask.

How good is the model, is that better than what there would be without it, what privacy did it cost, what
happened on the way, and what exactly was run. The page needs no network and no script.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template

from server.checkpoints import Checkpoint
from server.conduct import course, privacy
from server.findings import Findings, humanise, in_sentence
from server.markup import (
    Markup,
    box,
    count,
    duration,
    epsilon_text,
    join,
    number,
    paragraph,
    section,
    table,
    tag,
)
from server.quality import comparison, quality
from server.registry import COMPLETED, FAILED, RunRecord
from server.samples import remarks, samples
from server.summary import start, timings
from server.warnings import Caution, warnings_of
from shared.files import write_atomic

_TEMPLATE = Path(__file__).with_name("report.html")
_STATUS = {COMPLETED: "Completed", FAILED: "Failed"}


def write_report(path: Path, record: RunRecord, checkpoint: Checkpoint | None) -> None:
    """Write the report of a run to ``path`` atomically.

    Args:
        path: The HTML file.
        record: The run as registered.
        checkpoint: The latest saved model, if there is one.

    Raises:
        StorageError: If the file cannot be written.
    """
    write_atomic(path, render(record, checkpoint).encode())


def render(record: RunRecord, checkpoint: Checkpoint | None) -> str:
    """Return the page; equal records give equal pages."""
    findings = Findings(record, checkpoint)
    parts = (
        quality(findings),
        samples(findings),
        comparison(findings),
        privacy(findings),
        course(findings),
        _agreement(findings),
    )
    body = join([tag("header", *_head(findings)), tag("main", *_remarks(findings), _tiles(findings), *parts), _foot()])
    title = join([f"{humanise(record.plan.task)} · {record.run} · Fedward"])
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(title=title, body=body)


def _head(findings: Findings) -> list[Markup]:
    record, warnings = findings.record, warnings_of(findings)
    status = _STATUS.get(record.status, "Unfinished")
    return [
        paragraph(
            f"Fedward · report of run {record.run} ",
            tag("span", status, class_=f"badge {record.status}"),
            class_="eyebrow",
        ),
        tag("h1", _headline(findings, warnings)),
        _opening(warnings),
        paragraph(_verdict(findings), class_="lead"),
        paragraph(_meaning(findings), class_="lead"),
    ]


def _headline(findings: Findings, warnings: Sequence[Caution]) -> str:
    """Return the result in a line; what makes the model of no proven use stands there in place of its metric."""
    task, rounds = humanise(findings.record.plan.task), _plural(findings.record.rounds_completed, "round")
    if findings.evaluation is None:
        return f"{task}: nothing was validated after {rounds}"
    if warnings and warnings[0].grave:
        return f"{task}: {in_sentence(warnings[0].title)}, after {rounds}"
    value = number(findings.ours.value if findings.ours else None)
    return f"{task}: {humanise(findings.metric)} {value} on held-out patients after {rounds}"


def _opening(warnings: Sequence[Caution]) -> Markup:
    """Return the warnings, which come before everything that could be taken for praise."""
    if not warnings:
        return Markup()
    title = "One warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    lines = [tag("li", tag("strong", f"{warning.title}. "), warning.details) for warning in warnings]
    return tag("aside", tag("strong", title), tag("ul", *lines), class_="box warning")


def _verdict(findings: Findings) -> str:
    """Return who trained, how sure the metric is, and how it compares."""
    hospitals = _plural(len(findings.accepted), "hospital")
    who = f"{hospitals} trained one model together; no patient record left any of them."
    ours = findings.ours
    if findings.evaluation is None:
        return f"{who} The server held no reference patients, so this report cannot say how good the model is."
    if ours is None:
        return f"{who} Its {humanise(findings.metric)} is undefined on the held-out set."
    judged = f"{humanise(findings.metric)} is {number(ours.value)}"
    if math.isfinite(ours.low) and math.isfinite(ours.high):
        judged += f" (95% interval {number(ours.low)} to {number(ours.high)})"
    others = [
        f"{number(abs(ours.value - other.value))} {'above' if ours.value >= other.value else 'below'} "
        f"“{in_sentence(row.label)}” ({number(other.value)})"
        for row in findings.baselines
        if not row.member and (other := row.estimate(findings.metric))
    ]
    return f"{who} {judged}{': ' + ', '.join(others) if others else ''}."


def _meaning(findings: Findings) -> str:
    """Return epsilon and, in one plain sentence, what it promises."""
    if not findings.guaranteed:
        return "This run gives no privacy guarantee: epsilon is infinite."
    spent, delta = findings.most_spent, findings.delta
    if not math.isfinite(spent):
        return "This model gives no privacy guarantee, whatever noise this run added: see where it comes from."
    if not findings.record.rounds_completed:
        return "No privacy was spent: no hospital sent weights."
    seen = "this run" if findings.inherited is None else "this model and the runs it comes from"
    return (
        f"No hospital spent more than epsilon {epsilon_text(spent)} at delta {delta:g}: whatever anyone sees of "
        f"{seen}, their odds on whether a given patient took part change by a factor of at most "
        f"{_factor(spent)}, save for a chance of about {delta:g} that the bound fails."
    )


def _remarks(findings: Findings) -> list[Markup]:
    record, found = findings.record, []
    if record.notes.get("simulated_noise"):
        sentence = (
            "The noise of this run comes from a seed, so that the run can be repeated; whoever knows the seed can "
            "subtract it. The figures say what the same plan costs in a deployment. Real patients are not protected."
        )
        found.append(box("A simulation protects nobody", sentence))
    if card := findings.inherited:
        kind = {} if card.private else {"kind": "warning"}
        found.append(box("The model comes from earlier training", f"{card.sentence()} It {_began(record)}.", **kind))
    found += remarks(findings)
    if data := record.notes.get("data"):
        found.append(box("What the data are", _prose(data)))
    return found


def _began(record: RunRecord) -> str:
    return f"started from {start(record).rstrip('.')}"


def _tiles(findings: Findings) -> Markup:
    record, ours = findings.record, findings.ours
    patients = [row.declared_patients for row in findings.accepted if row.declared_patients is not None]
    spent = findings.most_spent if findings.guaranteed else math.inf
    interval = f"{number(ours.low)} to {number(ours.high)}" if ours and math.isfinite(ours.low) else "no interval"
    tiles = [
        (f"Held-out {humanise(findings.metric)}", number(ours.value if ours else None), interval),
        ("Most epsilon spent", epsilon_text(spent), f"at delta {findings.delta:g}"),
        ("Hospitals", count(len(findings.accepted)), f"of {len(record.sites)} asked"),
        ("Declared patients", count(sum(patients)), "coarse public figure"),
        ("Rounds", count(record.rounds_completed), f"of at most {record.plan.rounds}"),
        ("Time", duration(timings(record)["total_s"]), _peak(record.notes.get("peak_rss_mib"))),
    ]
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", name),
                tag("dd", value),
                tag("dd", small, class_="small"),
                class_="tile warning" if value == "∞" else "tile",
            )
            for name, value, small in tiles
        ),
        class_="tiles",
    )


def _agreement(findings: Findings) -> Markup:
    """Return what exactly was run: start, checkpoint, plan and software."""
    record, checkpoint = findings.record, findings.checkpoint
    facts = [("Started from", start(record)), ("Plan digest (SHA-256)", tag("code", record.plan.digest))]
    if checkpoint:
        facts += [
            ("Checkpoint", tag("code", str(checkpoint.path))),
            ("Checkpoint SHA-256", tag("code", checkpoint.sha256)),
            ("Checkpoint of round", str(checkpoint.round)),
        ]
    else:
        facts.append(("Checkpoint", "none was saved"))
    software = record.notes.get("software")
    facts += [(name, str(version)) for name, version in software.items()] if isinstance(software, Mapping) else []
    plan = [(tag("code", name), tag("code", str(value))) for name, value in asdict(record.plan).items()]
    return section(
        "What exactly was run",
        table(("What", "Value"), facts, left=(0, 1), caption="Provenance"),
        table(("Field", "Value"), plan, left=(0, 1), caption="The whole plan, public and agreed by every hospital"),
    )


def _foot() -> Markup:
    return tag("footer", "Made by Fedward from the run's registry alone; the same registry gives the same page.")


def _prose(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{humanise(str(name))}: {_prose(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _factor(epsilon: float) -> str:
    """Return e to the epsilon, to a precision that people read."""
    factor = math.exp(min(epsilon, 700.0))
    return f"{factor:,.1f}" if factor < 10 else f"{factor:,.0f}" if factor < 1e6 else f"{factor:.0e}"


def _peak(mebibytes: float | None) -> str:
    return f"peak memory {mebibytes:,.0f} MiB" if mebibytes else "in all"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
