"""The contract of a simulated ``ct-synthesis`` run, from prepared hospitals to summary, picture and report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from client.synthesise import synthesise
from server.checkpoints import save_checkpoint
from shared.errors import PlanError, StorageError
from shared.provenance.ancestry import Ancestry, PastRun, Share
from shared.provenance.keys import ensure_signing_key
from shared.records import RecordStore
from shared.tasks.registry import find_task
from simulations.display import Display
from simulations.run import Simulation, resume, start

DISPLAY = Display(Console(quiet=True))


@pytest.fixture(autouse=True)
def _quick_classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up nodules are easy: a fifth of the steps is enough to tell them apart."""
    monkeypatch.setattr("shared.synthesis.STEPS", 50)


@pytest.fixture
def data(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> tuple[str, ...]:
    for number in (1, 2):
        make_nodule_store(tmp_path / f"hospital-{number}", patients=20, seed=number)
    return tuple(str(tmp_path / f"hospital-{number}") for number in (1, 2))


def simulation(data: tuple[str, ...], **changes: Any) -> Simulation:
    plan = {"rounds": 2, "local_steps": 1, "generator_steps": 1}
    return Simulation(**{"task": "ct-synthesis", "epsilon": 10.0, "data": data, "seed": 3, "plan": plan, **changes})


def test_a_run_leaves_what_others_script_against(data: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = start(simulation(data), out, DISPLAY)
    assert {"tstr_auroc", "real_auroc", "frechet_distance", "membership_auc"} <= set(summary["metrics"])
    assert summary["metrics"]["real_auroc"]["value"] > 0.8
    assert all(site["epsilon"] <= 10.0 for site in summary["sites"])
    assert "ct-synthesis.safetensors" in summary["start"]
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "report.html").read_text().count("<img ") == 2  # round 0 and the last; round 1 was not judged
    written = synthesise(Path(summary["checkpoint"]["path"]), 2, "benign", tmp_path / "images")
    assert len(list(written.dicom.iterdir())) == 2


def test_a_start_without_public_weights_and_an_end_that_is_taken_up_again(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    out, asked = tmp_path / "out", simulation(data, init="random")
    summary = start(asked, out, DISPLAY)
    assert summary["start"] == "random weights"
    again = resume(asked, out, DISPLAY)
    assert again["metrics"] == summary["metrics"]
    assert again["checkpoint"] == summary["checkpoint"]


def test_a_generator_augments_every_hospital_of_a_run(data: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "gan").mkdir()
    named: dict[str, Any] = {"run": "gan", "task": "ct-synthesis", "plan_digest": "", "epsilon": 9.9, "delta": 1e-3}
    signer = ensure_signing_key(tmp_path / "gan")  # as a run's own folder has it
    generator = find_task("ct-synthesis").build()
    share = Share("site-1", 20)
    run = PastRun(run="gan", plan_digest="", sample_rate=0.5, noise_multiplier=2.0, delta=1e-3, sites=(share,))
    named["ancestry"] = Ancestry(runs=(run,))
    private = save_checkpoint(tmp_path / "gan" / "checkpoints", generator, number=2, signer=signer, **named).path
    asked = simulation(data[:1], task="nodule-classification", plan={"rounds": 1}, epsilon=float("inf"))
    plain = start(asked, tmp_path / "plain", DISPLAY)
    augmented = start(replace(asked, augment_with=str(private)), tmp_path / "augmented", DISPLAY)
    assert augmented["checkpoint"]["sha256"] != plain["checkpoint"]["sha256"]
    assert augmented["sites"] == plain["sites"]
    assert "synthetic patients drawn from round-00002.safetensors" in augmented["data"]
    resumed = resume(Simulation.load(tmp_path / "augmented"), tmp_path / "augmented", DISPLAY)
    assert resumed["checkpoint"] == augmented["checkpoint"]


def test_a_checkpoint_that_may_not_augment_stops_the_run_before_it_begins(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="cannot be augmented"):
        simulation(data, augment_with="some.safetensors")
    asked = simulation(
        data,
        task="nodule-classification",
        plan={"rounds": 1},
        epsilon=float("inf"),
        augment_with=str(tmp_path / "no.safetensors"),
    )
    with pytest.raises(StorageError, match="no"):
        start(asked, tmp_path / "out", DISPLAY)


def test_baselines_that_would_mean_nothing_are_refused(data: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match="real_auroc"):
        simulation(data, baselines=True)
