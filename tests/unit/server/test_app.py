"""What a run's configuration makes the ServerApp do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from server.app import job_from
from server.config import SETTINGS, make_server
from server.runs import submit
from shared.plan import RunPlan
from shared.records import RecordStore

PLAN = RunPlan(
    task="nodule-classification", rounds=2, local_steps=1, sample_rate=0.5, records_per_patient=1, max_grad_norm=1.0,
    noise_multiplier=1.0, delta=1e-3, learning_rate=0.1,
)  # fmt: skip


@pytest.mark.parametrize(("common", "own", "wanted"), [(0.0, None, None), (0.8, None, 0.8), (0.8, 0.9, 0.9)])
def test_a_runs_own_sensitivity_goes_before_that_of_the_settings(
    tmp_path: Path, make_nodule_store: Callable[..., RecordStore], common: float, own: float | None, wanted: float
) -> None:
    make_nodule_store(tmp_path / "heldout")
    config = make_server(tmp_path / "srv", ["localhost"], 9092, tmp_path / "heldout")
    (tmp_path / "srv" / SETTINGS).write_text(replace(config, sensitivity=common).to_toml())
    submit(tmp_path / "srv", PLAN, "pilot", None, sensitivity=own)
    assert job_from({"server": str(tmp_path / "srv"), "run": "pilot"}).sensitivity == wanted


def test_a_simulations_job_has_the_sensitivity_that_was_asked_for(tmp_path: Path) -> None:
    config = {"run": "r", "plan": PLAN.to_json(), "folder": str(tmp_path)}
    assert job_from(config).sensitivity is None
    assert job_from({**config, "sensitivity": "0.9"}).sensitivity == 0.9
    assert json.loads(PLAN.to_json()).get("sensitivity") is None
