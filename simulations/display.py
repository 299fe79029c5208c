"""What a person sees while a simulation runs: phases with bars, then a table that grows by round."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from server.registry import OK, Registry, RoundRow, RunRecord
from shared.plan import RunPlan
from shared.tasks.registry import find_task

_SHOWN_ROUNDS = 12


class Display:
    """Progress on a console; on one that is no terminal, a line per phase and round."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def phase(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar while the block runs; it yields ``report(done, total)``."""
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            bar = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(bar, completed=done, total=total)

    @contextmanager
    def watch(self, registry: Registry, run: str, plan: RunPlan) -> Iterator[None]:
        """Show the run's rounds while the block runs, as the registry gets to know them."""
        view = _RoundsView(registry, run, plan)
        if not self._console.is_terminal:
            yield
            self._console.print(view())
            return
        with Live(get_renderable=view, console=self._console, refresh_per_second=4) as live:
            yield
            live.refresh()


def outcome(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines that end a run, each with its style: the warnings first, then what came of it.

    Args:
        summary: See :func:`server.summary.summarise`.
    """
    for warning in summary["warnings"]:
        yield f"warning: {warning['text']}", "yellow"
    metrics, rounds, name = summary["metrics"], summary["rounds_completed"], find_task(summary["task"]).metric
    parts = [f"{rounds} round{'' if rounds == 1 else 's'}", f"held-out {name} {_metric(metrics.get(name))}"]
    if (threshold := metrics.get("threshold")) is not None:
        decided = f"recall {metrics['recall']:.3f}, specificity {metrics['specificity']:.3f}"
        parts.append(f"{decided} at a probability of {threshold:.3f}")
    spent = [site["epsilon"] for site in summary["sites"] if site["refused"] is None]
    spent += [card["epsilon"]] if (card := summary["card"]) else []  # of what the model comes from, too
    parts.append("no privacy" if None in spent else f"epsilon {max(spent, default=0.0):.2f}")
    yield ", ".join(parts), ""


def _metric(value: Any) -> str:
    number, low = (value["value"], value["low"]) if isinstance(value, Mapping) else (value, None)
    if number is None:
        return "undefined (too few held-out patients of one kind)"
    return f"{number:.3f}" if low is None else f"{number:.3f} (95% interval {low:.3f} to {value['high']:.3f})"


class _RoundsView:
    def __init__(self, registry: Registry, run: str, plan: RunPlan) -> None:
        self._registry, self._run, self._plan = registry, run, plan
        self._began = time.monotonic()

    def __call__(self) -> RenderableType:
        record = self._registry.read(self._run)
        return Group(_rounds_table(record), self._footer(record))

    def _footer(self, record: RunRecord) -> str:
        seconds = [row.seconds for row in record.rounds if row.round]
        left = (self._plan.rounds - record.rounds_completed) * (sum(seconds) / len(seconds)) if seconds else None
        remaining = f", about {left:.0f} s left" if left else ""
        return f"{time.monotonic() - self._began:.0f} s{remaining}"


def _rounds_table(record: RunRecord) -> Table:
    metric = find_task(record.plan.task).metric
    table = Table("round", "cohort", f"held-out {metric}", "epsilon", "seconds", title=f"{record.plan.task}")
    for row in record.rounds[-_SHOWN_ROUNDS:]:
        table.add_row(*_cells(row, record.plan, metric))
    return table


def _cells(row: RoundRow, plan: RunPlan, metric: str) -> tuple[str, ...]:
    replied = sum(outcome == OK for outcome in row.replies.values())
    return (
        f"{row.round}/{plan.rounds}",
        f"{replied}/{len(row.replies)}" if row.replies else "start",
        f"{row.evaluation.value(metric):.3f}" if row.evaluation else "-",
        f"{plan.epsilon(row.round):.2f}",
        f"{row.seconds:.1f}",
    )
