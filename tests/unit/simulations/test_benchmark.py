"""The benchmark measures what it says; it asserts no time."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.errors import PlanError, StorageError
from simulations import benchmark, cli
from simulations.benchmark import ENGINES, _step, as_markdown, document, measure
from simulations.benchmark_cases import CASES


def test_a_row_per_engine_with_every_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_peak_mib", lambda *_: 1.0)
    rows = measure(["gru"], 4, 4)
    assert [row.engine for row in rows] == list(ENGINES)
    assert rows[0].ratio_to_nonprivate == 1.0
    assert all(row.ms > 0 for row in rows)
    assert [row.speedup_over_opacus is not None for row in rows] == [False, False, False, True]
    assert as_markdown(rows).count("\n") == 5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", CASES)
def test_every_engine_takes_a_step_that_moves_every_weight(
    model: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, made = CASES[model], []

    def remember(build: object) -> object:
        def call() -> torch.nn.Module:
            made.append(build())  # type: ignore[operator]
            return made[-1]

        return call

    watched = replace(case, build=remember(case.build), opacus=remember(case.opacus or case.build))
    monkeypatch.setitem(CASES, model, watched)
    step = _step(engine, model, 3)
    before = [parameter.detach().clone() for parameter in made[-1].parameters()]
    step()
    assert all(not torch.equal(old, new) for old, new in zip(before, made[-1].parameters(), strict=True))


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(PlanError, match="no benchmark of resnet"):
        measure(["resnet"], 4, 4)


def test_the_command_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bench.json"
    monkeypatch.setattr(benchmark, "_peak_mib", lambda *_: 1.0)
    monkeypatch.setattr(
        sys, "argv",
        ["fedward-sim", "bench", "--models", "gru", "--batch", "4", "--repeats", "4", "--json", str(target)],
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert set(json.loads(target.read_text())[0]) >= {
        "model", "batch", "engine", "ms", "ratio_to_nonprivate", "speedup_over_opacus", "peak_mib",
    }  # fmt: skip


def test_a_document_keeps_what_stands_around_the_table(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text("before\n\n<!-- bench -->\nold\n<!-- end of bench -->\n\nafter\n")
    for table in ("| first |", "| second |"):
        document(path, table)
    text = path.read_text()
    assert text.startswith("before\n\n<!-- bench -->\n\nMeasured on: ")
    assert text.endswith("| second |\n\n<!-- end of bench -->\n\nafter\n")
    assert "first" not in text
    assert "old" not in text
    path.write_text("no marks")
    with pytest.raises(StorageError, match="no line"):
        document(path, "table")
