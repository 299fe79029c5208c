"""What the service's benchmarks make of their measurements."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.records import RecordStore
from shared.tasks.registry import find_task
from simulations import service_benchmark, service_cli, service_scale
from simulations.service_benchmark import Variant, write_tiny_store
from simulations.service_scale import Scale

OURS = Variant("fedward-site", (4.0, 1.0, 1.0, 2.0, 1.0), (480.0, 490.0))
STOCK = Variant("flower-supernode", (30.0, 10.0, 12.0), (160.0,))


def test_the_ratio_is_of_medians_so_that_a_slow_first_round_does_not_count() -> None:
    figures = service_benchmark.as_json((OURS, STOCK))
    assert figures["ratio"] == pytest.approx(12.0)
    assert [row["median_s"] for row in figures["variants"]] == [1.0, 12.0]
    ours, stock = service_benchmark.as_markdown((OURS, STOCK)).splitlines()[2:]
    assert ours == "| fedward-site | 5 | 1.00 | 1.00 to 2.00 | 1.0 | 490 |"
    assert stock.startswith("| flower-supernode | 3 | 12.00 |")


EARLY = {"superlink": 200.0, "superexec": 100.0, "serverapp": 400.0}
LATE = {"superlink": 220.0, "superexec": 100.0, "serverapp": 400.0}


def test_growth_is_told_by_process_and_a_lost_reply_is_seen() -> None:
    memory = {5: EARLY, 20: LATE}
    scale = Scale(100, (2.0, 3.0), (100, 100), memory)
    expected = {"superlink": 1.1, "superexec": 1.0, "serverapp": 1.0, "all": 720 / 700}
    assert scale.growth(5, 20) == pytest.approx(expected)
    assert scale.nothing_lost
    table = service_scale.as_markdown(scale, 5, 20)
    assert "nothing lost" in table
    assert table.splitlines()[-1] == "| serverapp | 400 | 400 | 1.00 |"
    lost = Scale(100, (2.0, 3.0), (100, 99), memory)
    assert not lost.nothing_lost
    assert "REPLIES lost" in service_scale.as_markdown(lost, 5, 20)


@pytest.mark.parametrize(
    ("memory", "ratios", "unseen"),
    [
        ({20: LATE}, set(), ["superlink in round 5", "superexec in round 5", "serverapp in round 5"]),
        ({5: EARLY, 20: {"superlink": 220.0, "superexec": 1.0}}, {"superlink", "superexec"}, ["serverapp in round 20"]),
    ],
)
def test_what_no_look_fell_upon_has_no_ratio_and_is_said(
    memory: dict[int, dict[str, float]], ratios: set[str], unseen: list[str]
) -> None:
    scale = Scale(100, (2.0,), (100,), memory)
    figures = json.loads(json.dumps(service_scale.as_json(scale, 5, 20)))
    assert set(figures["growth"]) == ratios
    assert figures["unseen"] == unseen
    table = service_scale.as_markdown(scale, 5, 20)
    assert "| serverapp | " in table
    assert "– |" in table
    assert ", ".join(unseen) in table


def test_a_process_without_a_pid_has_no_memory(tmp_path: Path) -> None:
    whole = SimpleNamespace(health=lambda: {"superlink_pid": os.getpid(), "superexec_pid": None}, server=tmp_path)
    assert set(service_scale._memory(whole)) == {"superlink"}  # type: ignore[arg-type]


def test_the_figures_are_kept_before_a_table_is_made_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, kept = Scale(2, (1.0,), (2,), {5: EARLY}), tmp_path / "scale.json"

    def breaks(*_arguments: object) -> str:
        assert json.loads(kept.read_text())["sites"] == 2
        raise KeyError(20)

    monkeypatch.setattr(service_scale, "measure_scale", lambda _sites, _rounds: measured)
    monkeypatch.setattr(service_scale, "as_markdown", breaks)
    with pytest.raises(KeyError):
        service_cli.scale(2, 20, kept)


def test_a_tiny_store_can_be_trained_on(tmp_path) -> None:
    write_tiny_store(tmp_path / "store")
    task = find_task("nodule-classification")
    assert len(task.load(RecordStore.open(tmp_path / "store"))) == 4
