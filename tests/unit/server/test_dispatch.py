"""A run whose files cannot be read is named, and does not hold up the others."""

import sqlite3
from pathlib import Path

import pytest

from server.control import LinkError, LinkRun
from server.dispatch import Dispatcher
from server.operations import UNREADABLE, overview
from server.registry import FAILED
from server.runs import find_run, running_runs, submit
from shared.errors import StorageError
from shared.plan import RunPlan

PLAN = RunPlan(
    task="nodule-classification", rounds=2, local_steps=1, sample_rate=0.5, records_per_patient=1, max_grad_norm=1.0,
    noise_multiplier=1.0, delta=1e-3, learning_rate=0.1,
)  # fmt: skip


class Flower:
    """Stands in for Flower's Control API: no run of its own is alive."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.answers = True

    def unfinished_runs(self) -> list[LinkRun]:
        if not self.answers:
            raise LinkError("down")
        return []

    def start_run(self, run: str) -> int:
        self.started.append(run)
        return len(self.started)


def of_another_version(server: Path, name: str) -> None:
    with sqlite3.connect(server / "runs" / name / "registry.sqlite") as database:
        database.execute("UPDATE runs SET plan = json_set(plan, '$.surprise', 1)")


def test_a_run_of_another_version_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    for name in ("old", "new"):
        submit(tmp_path, PLAN, name, None)
    of_another_version(tmp_path, "old")
    flower = Flower()
    dispatcher = Dispatcher(tmp_path, flower)  # type: ignore[arg-type]
    dispatcher.follow(1)
    assert flower.started == ["new"]
    assert dispatcher.troubles == {"old": "storage-failed"}
    find_run(tmp_path, "old").registry().end("old", FAILED)
    dispatcher.follow(1)
    assert dispatcher.troubles == {}, "of a run that has ended nobody needs the plan"


def test_that_flower_is_down_is_no_runs_trouble(tmp_path: Path) -> None:
    submit(tmp_path, PLAN, "run-1", None)
    flower = Flower()
    flower.answers = False
    dispatcher = Dispatcher(tmp_path, flower)  # type: ignore[arg-type]
    with pytest.raises(LinkError):
        dispatcher.follow(1)
    assert dispatcher.troubles == {}


def test_an_unreadable_run_is_shown_with_the_reason(tmp_path: Path) -> None:
    submit(tmp_path, PLAN, "old", None)
    of_another_version(tmp_path, "old")
    shown = overview(find_run(tmp_path, "old"))
    assert (shown["run"], shown["status"]) == ("old", UNREADABLE)
    assert "old was made by another version" in shown["failure"]
    assert "surprise" in shown["failure"]
    with pytest.raises(StorageError, match="old was made by another version"):
        find_run(tmp_path, "old").record()
    assert running_runs(tmp_path) == ["old"]
    submit(tmp_path, PLAN, "new", None)
    readable = overview(find_run(tmp_path, "new"))
    assert list(shown) == list(readable), "scripts find the same keys"
    told = {"run", "status", "failure"}
    assert {name for name, value in shown.items() if value is not None} == told
    assert {name for name, value in readable.items() if value is None} == {"failure", "value"}
