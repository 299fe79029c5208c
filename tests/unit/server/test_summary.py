"""``summary.json``: the contract's keys, the registry's numbers, strict JSON."""

import json
import math
from pathlib import Path

import pytest

from server.checkpoints import Checkpoint
from server.findings import final_round
from server.registry import COMPLETED, LATE, OK, Registry, RoundRow, RunRecord, SiteRow
from server.summary import summarise, write_summary
from shared.evaluation import Evaluation
from shared.metrics import Estimate
from shared.plan import RunPlan

PLAN = RunPlan(
    task="nodule-classification",
    rounds=3,
    local_steps=2,
    sample_rate=0.1,
    records_per_patient=2,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.1,
    seed=7,
)
KEYS = {
    "warnings",
    "task", "run", "status", "rounds_completed", "seed", "plan_digest", "sites", "metrics", "by_group",
    "by_site", "worst_site", "rmse_30_of_patients", "rmse_30_of_patients_by_site", "baselines", "timings",
    "peak_rss_mib", "start", "card", "data", "checkpoint",
}  # fmt: skip


def evaluation(value: float) -> Evaluation:
    return Evaluation(
        {"auroc": Estimate(value, value - 0.1, value + 0.1), "accuracy": 0.75}, {"GE": {"auroc": math.nan}}
    )


def registry(folder: Path) -> Registry:
    store = Registry(folder / "registry.sqlite")
    store.begin("r", PLAN)
    store.add_site("r", SiteRow("a", 100, None))
    store.add_site("r", SiteRow("b", 50, None))
    store.add_site("r", SiteRow("node-3", None, "budget-exceeded"))
    store.add_round("r", RoundRow(0, 0.5, evaluation(0.5), {}))
    store.add_round("r", RoundRow(1, 1.0, evaluation(0.7), {"a": OK, "b": "bad-plan"}))
    store.add_round("r", RoundRow(2, 2.0, evaluation(0.8), {"a": OK, "b": LATE}))
    store.end("r", COMPLETED)
    return store


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return registry(tmp_path).read("r")


def checkpoint(turn: int) -> Checkpoint:
    return Checkpoint("r", turn, PLAN.task, PLAN.digest, "ab" * 32, Path("out/round.safetensors"))


def test_it_holds_the_contract(record: RunRecord) -> None:
    summary = summarise(record, checkpoint(2))
    assert set(summary) == KEYS
    assert (summary["task"], summary["run"], summary["status"]) == (PLAN.task, "r", "completed")
    assert (summary["rounds_completed"], summary["seed"]) == (2, 7)
    assert summary["plan_digest"] == PLAN.digest
    assert summary["metrics"]["auroc"] == pytest.approx({"value": 0.8, "low": 0.7, "high": 0.9})
    assert summary["metrics"]["accuracy"] == 0.75
    assert (summary["by_site"], summary["worst_site"]) == ({}, None)
    assert summary["by_group"] == {"GE": {"auroc": None}}
    assert summary["baselines"] == {}
    assert summary["timings"] == {"total_s": 3.5, "setup_s": 0.5, "round_s": [1.0, 2.0]}
    assert summary["start"] == "random weights"
    assert summary["checkpoint"] == {"path": "out/round.safetensors", "sha256": "ab" * 32}


def test_hospitals_are_told_apart_where_the_task_does(tmp_path: Path) -> None:
    store = registry(tmp_path)
    by_site = {"a": {"rmse_30": 12.0}, "b": {"rmse_30": math.nan}}
    spread = {"a": {"5": 8.0, "95": 20.0}, "b": {}}
    details = {"by_site": by_site, "worst_site": "b", "rmse_30_of_patients_by_site": spread}
    judged = Evaluation({"rmse_30": 15.0}, details=details)
    store.add_round("r", RoundRow(3, 2.0, judged, {"a": OK}))
    summary = summarise(store.read("r"), checkpoint(3))
    assert summary["by_site"] == {"a": {"rmse_30": 12.0}, "b": {"rmse_30": None}}
    assert summary["metrics"] == {"rmse_30": 15.0, "by_site": summary["by_site"]}
    assert summary["worst_site"] == "b"
    assert summary["rmse_30_of_patients_by_site"] == spread


def test_a_run_states_the_epsilon_of_its_whole_plan_however_it_ends(record: RunRecord) -> None:
    sites = {site["name"]: site for site in summarise(record, None)["sites"]}
    assert sites["a"] == {
        "name": "a",
        "declared_patients": 100,
        "epsilon": PLAN.epsilon(),
        "delta": 1e-3,
        "rounds": 2,
        "refused": None,
    }
    assert (sites["b"]["rounds"], sites["b"]["epsilon"]) == (1, PLAN.epsilon())
    assert (sites["node-3"]["epsilon"], sites["node-3"]["refused"]) == (0.0, "budget-exceeded")


def test_notes_are_taken_over(tmp_path: Path) -> None:
    store = registry(tmp_path)
    for name, value in {
        "baselines": {"pooled": {"auroc": {"value": 0.9, "low": math.nan, "high": 1.0}}},
        "timings": {"total_s": 9.0, "setup_s": 4.0},
        "peak_rss_mib": 512.0,
        "start": "model.safetensors",
        "data": "simulated texture",
    }.items():
        store.add_note("r", name, value)
    summary = summarise(store.read("r"), None)
    assert summary["baselines"]["pooled"]["auroc"] == {"value": 0.9, "low": None, "high": 1.0}
    assert summary["timings"] == {"total_s": 9.0, "setup_s": 4.0, "round_s": [1.0, 2.0]}
    assert summary["peak_rss_mib"] == 512.0
    assert (summary["start"], summary["data"]) == ("model.safetensors", "simulated texture")


def test_the_metrics_are_those_of_the_saved_model(record: RunRecord) -> None:
    """A crash after registering round 2 and before saving it leaves the model of round 1."""
    assert summarise(record, checkpoint(1))["metrics"]["auroc"]["value"] == 0.7
    row = final_round(record, checkpoint(1))
    assert row is not None
    assert row.round == 1


def test_an_infinite_epsilon_is_null_in_strict_json(tmp_path: Path) -> None:
    plan = RunPlan.from_mapping({**json.loads(PLAN.to_json()), "noise_multiplier": 0.0, "init": "cd" * 32})
    store = Registry(tmp_path / "registry.sqlite")
    store.begin("r", plan)
    store.add_site("r", SiteRow("a", 100, None))
    store.add_round("r", RoundRow(1, 1.0, Evaluation({"auroc": math.nan}), {"a": OK}))
    write_summary(tmp_path / "summary.json", store.read("r"), None)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["sites"][0]["epsilon"] is None
    assert summary["metrics"] == {"auroc": None}
    assert summary["start"] == f"public checkpoint {'cd' * 32}"
    assert summary["checkpoint"] is None


def test_a_run_that_failed_at_once_has_a_summary(tmp_path: Path) -> None:
    store = Registry(tmp_path / "registry.sqlite")
    store.begin("r", PLAN)
    store.end("r", "failed", "quorum-lost")
    summary = summarise(store.read("r"), None)
    assert set(summary) == KEYS
    assert (summary["status"], summary["rounds_completed"], summary["sites"]) == ("failed", 0, [])
    assert summary["timings"] == {"total_s": 0, "setup_s": 0, "round_s": []}
