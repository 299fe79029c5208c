"""A whole simulation on small prepared stores: repeatable, resumable, honest."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import client.site
from client.ledger import Ledger
from shared.accounting import epsilon_of
from shared.errors import FederationError, StorageError
from shared.records import RecordStore, open_store, write_store
from simulations.display import Display
from simulations.run import Simulation, resume, start
from simulations.sites import coarse, merge_stores

DISPLAY = Display(Console(quiet=True))


@pytest.fixture
def data(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> tuple[str, ...]:
    for number in (1, 2):
        make_nodule_store(tmp_path / f"hospital-{number}", patients=30, seed=number)
    return tuple(str(tmp_path / f"hospital-{number}") for number in (1, 2))


def simulation(data: tuple[str, ...], **changes: Any) -> Simulation:
    plan = {"rounds": 3, "records_per_patient": 1, "local_steps": 2, "sample_rate": 0.5, **changes.pop("plan", {})}
    return Simulation(**{"task": "nodule-classification", "data": data, "seed": 7, "plan": plan, **changes})


def sha(summary: dict[str, Any]) -> str:
    return str(summary["checkpoint"]["sha256"])


def test_the_same_seed_gives_the_same_weights_on_one_worker_or_two(data: tuple[str, ...], tmp_path: Path) -> None:
    one = start(simulation(data), tmp_path / "one", DISPLAY)
    two = start(simulation(data, workers=2), tmp_path / "two", DISPLAY)
    other = start(simulation(data, seed=8), tmp_path / "other", DISPLAY)
    assert sha(one) == sha(two) != sha(other)


def test_the_ledgers_hold_what_the_summary_says(data: tuple[str, ...], tmp_path: Path) -> None:
    summary = start(simulation(data), tmp_path / "out", DISPLAY)
    for site in summary["sites"]:
        ledger = Ledger(tmp_path / "out" / "sites" / site["name"] / "ledger.sqlite")
        assert epsilon_of(ledger.mechanisms(), site["delta"]) == site["epsilon"] <= 8.0
        assert len(ledger.releases()) == site["rounds"] == 3
        assert site["delta"] < 1 / site["declared_patients"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("call", [0, 1, 3, 5])
def test_an_interrupted_run_ends_in_the_very_same_weights(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Interrupted in the given local training, after its reservation and before its commit."""
    whole = start(simulation(data), tmp_path / "whole", DISPLAY)
    real, calls = client.site.train_round, []

    def interrupted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return real(*args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(client.site, "train_round", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(simulation(data), tmp_path / "cut", DISPLAY)
    resumed = resume(Simulation.load(tmp_path / "cut"), tmp_path / "cut", DISPLAY)
    assert sha(resumed) == sha(whole)
    assert [site["epsilon"] for site in resumed["sites"]] == [site["epsilon"] for site in whole["sites"]]
    for site in resumed["sites"]:
        assert len(Ledger(tmp_path / "cut" / "sites" / site["name"] / "ledger.sqlite").releases()) == 3


def test_a_finished_run_resumes_to_itself(data: tuple[str, ...], tmp_path: Path) -> None:
    first = start(simulation(data), tmp_path / "out", DISPLAY)
    assert sha(resume(Simulation.load(tmp_path / "out"), tmp_path / "out", DISPLAY)) == sha(first)


def test_without_privacy_epsilon_is_null_and_said(data: tuple[str, ...], tmp_path: Path) -> None:
    summary = start(simulation(data, epsilon=math.inf), tmp_path / "out", DISPLAY)
    assert {site["epsilon"] for site in summary["sites"]} == {None}
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["noise_multiplier"] == 0.0


def test_a_site_whose_cap_is_lower_refuses_and_the_run_says_so(data: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="budget-exceeded"):
        start(simulation(data, max_epsilon=1.0), tmp_path / "out", DISPLAY)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["status"], summary["rounds_completed"]) == ("failed", 0)
    assert [site["refused"] for site in summary["sites"]] == ["budget-exceeded"] * 2
    assert all(not Ledger(p / "ledger.sqlite").releases() for p in (tmp_path / "out" / "sites").iterdir())


def test_baselines_stand_beside_the_model(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.baselines.LEAST_STEPS", 3)
    monkeypatch.setattr("simulations.baselines.PASSES", 1)
    summary = start(simulation(data, baselines=True), tmp_path / "out", DISPLAY)
    assert set(summary["baselines"]) == {"pooled", "local", "size_only"}
    assert set(summary["baselines"]["local"]["by_site"]) == {"site-1", "site-2"}
    assert summary["baselines"]["size_only"]["auroc"]["value"] > 0.9  # the fixture's nodules differ by size


def test_only_what_takes_no_training_is_compared_with_unasked(data: tuple[str, ...], tmp_path: Path) -> None:
    summary = start(simulation(data), tmp_path / "out", DISPLAY)
    assert set(summary["baselines"]) == {"size_only"}


def test_heldout_patients_are_nobodys_training_patients(data: tuple[str, ...], tmp_path: Path) -> None:
    start(simulation(data), tmp_path / "out", DISPLAY)
    stores = [open_store(path, "ct-nodules") for path in sorted((tmp_path / "out" / "sites").iterdir())]
    heldout = RecordStore.open(tmp_path / "out" / "heldout")
    training = {key.tobytes() for store in stores for key in store.keys}
    reserved = {key.tobytes() for key in heldout.keys}
    assert not training & reserved
    assert len(training) + len(reserved) == 60
    assert len(reserved) == 12


def test_merged_stores_keep_every_patient_whole(data: tuple[str, ...]) -> None:
    stores = [RecordStore.open(Path(folder)) for folder in data]
    merged = merge_stores(stores)
    items = [item for store in stores for item in store.items()]
    assert len(merged) == 60
    for before, after in zip(items, merged.items(), strict=True):
        assert before.key == after.key
        np.testing.assert_array_equal(before.arrays["image"], after.arrays["image"])


def test_a_folder_in_use_is_not_overwritten(data: tuple[str, ...], tmp_path: Path) -> None:
    start(simulation(data), tmp_path / "out", DISPLAY)
    with pytest.raises(StorageError, match="--resume"):
        start(simulation(data), tmp_path / "out", DISPLAY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match="not empty"):
        start(simulation(data), tmp_path / "mine", DISPLAY)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_failed_start_can_be_started_again(data: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(FederationError):
        start(simulation((*data, str(tmp_path / "nowhere"))), tmp_path / "out", DISPLAY)
    assert start(simulation(data), tmp_path / "out", DISPLAY)["rounds_completed"] == 3


@pytest.mark.parametrize(("patients", "published"), [(1, 10), (14, 10), (16, 20), (485, 480)])
def test_published_numbers_are_coarse(patients: int, published: int) -> None:
    assert coarse(patients) == published


def test_input_inside_the_output_is_never_removed(data: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="inside"):
        start(simulation(data), tmp_path, DISPLAY)
    with pytest.raises(StorageError, match="inside"):
        start(simulation(data[:1], heldout=data[1]), Path(data[1]), DISPLAY)
    assert all(len(RecordStore.open(Path(folder))) == 30 for folder in data)


def test_a_lost_registry_is_noticed(data: tuple[str, ...], tmp_path: Path) -> None:
    """Otherwise a report would say that nothing was spent."""
    start(simulation(data), tmp_path / "out", DISPLAY)
    (tmp_path / "out" / "server" / "registry.sqlite").unlink()
    with pytest.raises(StorageError, match="lost or replaced"):
        resume(Simulation.load(tmp_path / "out"), tmp_path / "out", DISPLAY)


def test_a_lost_ledger_or_a_changed_policy_is_not_made_good_silently(data: tuple[str, ...], tmp_path: Path) -> None:
    start(simulation(data), tmp_path / "out", DISPLAY)
    site = tmp_path / "out" / "sites" / "site-1"
    (site / "ledger.sqlite").unlink()
    (site / "site.toml").write_text("= =")
    resume(Simulation.load(tmp_path / "out"), tmp_path / "out", DISPLAY)
    assert not (site / "ledger.sqlite").exists()
    assert (site / "site.toml").read_text() == "= ="


@pytest.mark.parametrize("name", ["simulation.json", "plan.json", "federation.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", "[1]", '{"seed": "seven"}'])
def test_a_damaged_file_is_one_sentence(data: tuple[str, ...], tmp_path: Path, name: str, content: str) -> None:
    start(simulation(data, plan={"rounds": 1}), tmp_path / "out", DISPLAY)
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(FederationError, match=r"damaged|changed"):
        resume(Simulation.load(tmp_path / "out"), tmp_path / "out", DISPLAY)


def test_the_same_hospital_twice_and_judged_by_its_own_patients_are_refused(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(FederationError, match="twice"):
        simulation((data[0], data[0]))
    with pytest.raises(FederationError, match="among the training patients"):
        start(simulation(data, heldout=data[0]), tmp_path / "out", DISPLAY)


def test_stores_of_another_kind_or_preparation_are_refused(data: tuple[str, ...], tmp_path: Path) -> None:
    store = RecordStore.open(Path(data[0]))
    write_store(tmp_path / "ecg", kind="ecg", patients=store.items(), attributes=store.attributes)
    write_store(tmp_path / "px", kind=store.kind, patients=store.items(), attributes={"diameter_unit": "pixel"})
    with pytest.raises(FederationError, match="holds ecg"):
        start(simulation((str(tmp_path / "ecg"),)), tmp_path / "a", DISPLAY)
    with pytest.raises(FederationError, match="holds ecg"):
        start(simulation(data, heldout=str(tmp_path / "ecg")), tmp_path / "b", DISPLAY)
    with pytest.raises(FederationError, match="prepared in another way"):
        start(simulation((data[1], str(tmp_path / "px"))), tmp_path / "c", DISPLAY)


def test_a_refusal_tells_the_researcher_why(data: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="max-grad-norm is above"):
        start(simulation(data, plan={"max_grad_norm": 50.0}), tmp_path / "out", DISPLAY)


def test_a_delta_of_zero_is_refused_not_replaced(data: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="delta must lie"):
        start(simulation(data, delta=0.0), tmp_path / "out", DISPLAY)


def test_the_report_says_that_a_simulation_protects_nobody(data: tuple[str, ...], tmp_path: Path) -> None:
    start(simulation(data, plan={"rounds": 1}), tmp_path / "out", DISPLAY)
    assert "A simulation protects nobody" in (tmp_path / "out" / "report.html").read_text()
