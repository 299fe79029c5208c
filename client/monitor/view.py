"""The screen: the most urgent patient as a chart with the forecast's band, the others as a line each."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from client.monitor.alarm import Rule, Stage
from client.monitor.watch import Sight
from shared.tasks.cgm import MAX_GAP_MIN, STEP_MIN
from shared.tasks.cgm_windows import HORIZON

BARS: Final = "▁▂▃▄▅▆▇█"
_HISTORY: Final = 36
_ROWS: Final = 12
_SPAN: Final = (40.0, 250.0)
_LABEL: Final = 5
_CHROME: Final = 12
_STYLES: Final = {Stage.SAFE: "green", Stage.PREDICTED: "yellow", Stage.PRESENT: "bold red"}
_SAID: Final = {Stage.PREDICTED: "expected", Stage.PRESENT: "now"}
_AT_30: Final = 30 // STEP_MIN - 1
_MOST_BEHIND_S: Final = 12 * 3600
"""How far a local clock of an unknown zone can be behind UTC."""


def sparkline(values: list[float | None], low: float = _SPAN[0], high: float = _SPAN[1]) -> str:
    """Return one character a value, a blank for None."""
    cells = []
    for value in values:
        if value is None:
            cells.append(" ")
            continue
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        cells.append(BARS[min(int(share * len(BARS)), len(BARS) - 1)])
    return "".join(cells)


def on_steps(sight: Sight, steps: int = _HISTORY) -> list[float | None]:
    """Return the last readings, one a step of 5 minutes up to the latest; None where there was none."""
    values: list[float | None] = [None] * steps
    for time_s, glucose in sight.history:
        back = round((sight.time_s - time_s) / (60 * STEP_MIN))
        if 0 <= back < steps:
            values[-1 - back] = glucose
    return values


def chart(sight: Sight, rules: Mapping[str, Rule], rows: int = _ROWS) -> Text:
    """Return a chart: readings ``●`` of three hours, an hour's median ``◦`` in its band ``░``, thresholds ``┄``."""
    past = on_steps(sight)
    ahead = [] if sight.forecast is None else [tuple(map(float, step)) for step in sight.forecast]
    levels = [value for value in past if value is not None] + [value for step in ahead for value in step]
    top = max(*levels, *(rule.threshold_mg_dl for rule in rules.values())) + 10.0
    bottom = min(*levels, *(rule.threshold_mg_dl for rule in rules.values())) - 10.0
    height = (top - bottom) / rows
    text = Text()
    for row in range(rows):
        floor, ceiling = top - (row + 1) * height, top - row * height
        marks = [rule for rule in rules.values() if floor <= rule.threshold_mg_dl < ceiling]
        label = f"{marks[0].threshold_mg_dl:.0f}" if marks else f"{(floor + ceiling) / 2:.0f}"
        text.append(f"{label:>{_LABEL - 1}} ", style="bold" if marks else "dim")
        blank = "┄" if marks else " "
        for value in past:
            here = value is not None and floor <= value < ceiling
            text.append("●" if here else blank, style=_reading_style(value, rules) if here else "dim")
        for low, middle, high in ahead:
            if floor <= middle < ceiling:
                text.append("◦", style=_reading_style(middle, rules))
            else:
                text.append("░" if low < ceiling and high >= floor else blank, style="dim")
        text.append("\n")
    text.append(f"{'':{_LABEL}}{'-3 h':<{_HISTORY - 3}}now{'':<{HORIZON - 5}}+1 h", style="dim")
    return text


def render(sights: Mapping[str, Sight], rules: Mapping[str, Rule], counts: str, height: int, now_s: float) -> Group:
    """Return the whole screen for ``height`` lines; whoever was not seen for long comes last, whatever was so then."""
    ordered = sorted(
        sights.values(),
        key=lambda sight: (_old(sight, now_s), -max(sight.stages.values()), -sight.time_s, sight.patient_id),
    )
    if not ordered:
        return Group(Text("Waiting for readings …", style="dim"))
    first, room = ordered[0], max(height - _ROWS - _CHROME, 3)
    title = Text.assemble((first.patient_id, "bold"), "  ", _now(first), "  ", _state(first, now_s))
    parts = [Panel(chart(first, rules), title=title, title_align="left", width=_LABEL + _HISTORY + HORIZON + 4)]
    table = Table("patient", "at", "mg/dL", "3 h", "in 30 min", "state", box=None, padding=(0, 1))
    for sight in ordered[:room]:
        state = _state(sight, now_s)
        table.add_row(sight.patient_id, _at(sight, now_s), _now(sight), _spark(sight), _ahead(sight), state)
    if len(ordered) > room:
        table.caption = f"and {len(ordered) - room} more"
    return Group(*parts, table, Text(f"{counts}  Model output; not reviewed by a clinician.", style="dim"))


class Screen:
    """Draws the patients as they change; used as a context."""

    def __init__(self, console: Console, rules: tuple[Rule, ...], now: Callable[[], float] = time.time) -> None:
        self._console, self._now = console, now
        self._rules: dict[str, Rule] = {rule.kind: rule for rule in rules}
        self._live = Live(console=console, auto_refresh=False, screen=False, transient=False)

    def __enter__(self) -> "Screen":
        self._live.start()
        return self

    def __exit__(self, *_reason: object) -> None:
        self._live.stop()

    def show(self, sights: Mapping[str, Sight], counts: str) -> None:
        """Draw them."""
        self._live.update(render(sights, self._rules, counts, self._console.height, self._now()), refresh=True)


def _reading_style(value: float | None, rules: Mapping[str, Rule]) -> str:
    beyond = value is not None and any(rule.excess(value) > 0.0 for rule in rules.values())
    return "bold red" if beyond else "cyan"


def _old(sight: Sight, now_s: float) -> bool:
    """Whether a patient's readings have been missing for so long that nothing is known of the present."""
    behind = _MOST_BEHIND_S if sight.offset_s is None else 0
    return now_s - sight.time_s > 60 * MAX_GAP_MIN + behind


def _at(sight: Sight, now_s: float) -> Text:
    """Return the time of the last reading; marked where readings are missing."""
    local = datetime.fromtimestamp(sight.time_s + (sight.offset_s or 0), UTC)
    return Text(f"{local:%H:%M}", style="dim" if _old(sight, now_s) else "")


def _now(sight: Sight) -> str:
    return f"{sight.history[-1][1]:.0f}" if sight.history else "-"


def _spark(sight: Sight) -> Text:
    text = Text(sparkline(on_steps(sight)), style="cyan")
    if sight.forecast is not None:
        text.append(sparkline([float(step[1]) for step in sight.forecast]), style="magenta")
    return text


def _ahead(sight: Sight) -> str:
    if sight.forecast is None:
        return "no forecast"
    low, middle, high = sight.forecast[_AT_30]
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def _state(sight: Sight, now_s: float) -> Text:
    worst = max(sight.stages.values())
    kind = next(kind for kind, stage in sight.stages.items() if stage is worst)
    said = "in range" if worst is Stage.SAFE else f"{kind} {_SAID[worst]}"
    if _old(sight, now_s):
        return Text(f"last seen {said.removesuffix(' now')}", style="dim")
    return Text(said, style=_STYLES[worst])
