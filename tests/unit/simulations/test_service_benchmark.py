"""What the service's benchmarks make of their measurements."""

import pytest

from shared.records import RecordStore
from shared.tasks.registry import find_task
from simulations import service_benchmark, service_scale
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


def test_growth_is_told_by_process_and_a_lost_reply_is_seen() -> None:
    memory = {5: {"superlink": 200.0, "serverapp": 400.0}, 20: {"superlink": 220.0, "serverapp": 400.0}}
    scale = Scale(100, (2.0, 3.0), (100, 100), memory)
    assert scale.growth(5, 20) == pytest.approx({"superlink": 1.1, "serverapp": 1.0, "all": 620 / 600})
    assert scale.nothing_lost
    assert "nothing lost" in service_scale.as_markdown(scale, 5, 20)
    lost = Scale(100, (2.0, 3.0), (100, 99), memory)
    assert not lost.nothing_lost
    assert "REPLIES lost" in service_scale.as_markdown(lost, 5, 20)


def test_a_tiny_store_can_be_trained_on(tmp_path) -> None:
    write_tiny_store(tmp_path / "store")
    task = find_task("nodule-classification")
    assert len(task.load(RecordStore.open(tmp_path / "store"))) == 4
