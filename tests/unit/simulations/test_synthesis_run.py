"""The contract of a simulated ``ct-synthesis`` run, from prepared hospitals to summary, picture and report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client.synthesise import synthesise
from shared.errors import PlanError
from shared.records import RecordStore
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


def test_baselines_that_would_mean_nothing_are_refused(data: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match="real_auroc"):
        simulation(data, baselines=True)
