"""The report on a generator: its images beside real ones, round by round, and what went wrong on the way."""

from typing import Final

from server.findings import Findings
from server.markup import Markup, box, number, paragraph, section, tag
from server.registry import RoundRow

_PREFIX: Final = "data:image/png;base64,"
_FAULTS: Final = {
    "not-finite": "the generator's images held values that are no numbers",
    "mode-collapse": "the generator made nearly the same image again and again (mode collapse)",
    "vanishing-discriminator": "the discriminator gave every image the same mark, so the generator learnt nothing",
}


def samples(findings: Findings) -> Markup:
    """Return one sheet of images for every round that was judged, the last one first."""
    sheets = [tag("figure", *_sheet(row, findings.metric)) for row in reversed(_judged(findings)) if _picture(row)]
    if not sheets:
        return Markup()
    note = "For each class a row of real patches of held-out patients, and below it a row of generated ones."
    return section("What the generator makes", paragraph(note), *sheets)


def remarks(findings: Findings) -> list[Markup]:
    """Return a box for every fault that was seen, with the rounds in which it was."""
    rounds: dict[str, list[int]] = {}
    for row in _judged(findings):
        for code in row.evaluation.details.get("warnings", ()) if row.evaluation else ():
            rounds.setdefault(str(code), []).append(row.round)
    return [
        box("Trouble in training", f"In round {_listed(numbers)} {_FAULTS[code]}.", kind="warning")
        for code, numbers in rounds.items()
        if code in _FAULTS
    ]


def _judged(findings: Findings) -> list[RoundRow]:
    return [row for row in findings.record.rounds if row.evaluation]


def _picture(row: RoundRow) -> str:
    """Return the sheet as a data URL, or nothing: only a PNG inside the page itself is ever shown."""
    url = row.evaluation.details.get("samples") if row.evaluation else None
    return url if isinstance(url, str) and url.startswith(_PREFIX) else ""


def _sheet(row: RoundRow, metric: str) -> list[Markup]:
    value = row.evaluation.value(metric) if row.evaluation and metric in row.evaluation.metrics else None
    what = f"Real and generated patches after round {row.round}"
    image = tag("img", src=_picture(row), alt=what, style="width: 100%; image-rendering: pixelated")
    return [tag("h3", f"Round {row.round}"), image, tag("figcaption", f"{metric.replace('_', ' ')} {number(value)}")]


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
