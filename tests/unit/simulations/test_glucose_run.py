"""The contract of a glucose run: CSV files in, a summary with hospitals and simple methods out."""

import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared.errors import IntakeError
from simulations.display import Display
from simulations.run import Simulation, read_plan, start

KEYS = {
    "rmse_30", "rmse_60", "mae_30", "mae_60", "path_mse_median", "path_mae_median", "path_mse_mean", "coverage_90",
    "pinball", "skill_30",
}  # fmt: skip


@pytest.fixture
def exports(tmp_path: Path) -> tuple[str, ...]:
    """Return two hospitals' CSV files, five patients of waves each."""
    generator, files = np.random.default_rng(0), []
    begin = np.datetime64("2020-01-01T00:00")
    for hospital in ("north", "south"):
        rows = ["patient_id,timestamp,glucose_mg_dl"]
        for patient in range(5):
            at = np.arange(230)
            glucose = 130 + 40 * np.sin(at / generator.uniform(5, 9)) + generator.normal(0, 2, len(at))
            times = begin + 5 * at.astype("timedelta64[m]")
            rows += [f"{hospital}-{patient},{t},{g:.1f}" for t, g in zip(times, glucose, strict=True)]
        path = tmp_path / f"{hospital}.csv.gz"
        path.write_bytes(gzip.compress("\n".join(rows).encode()))
        files.append(str(path))
    return tuple(files)


def run(
    exports: tuple[str, ...], out: Path, epsilon: float = 8.0, init: str | None = None, **more: Any
) -> dict[str, Any]:
    plan = {"rounds": 1, "local_steps": 1, "records_per_patient": 1}
    simulation = Simulation(
        task="glucose-forecast", data=exports, sites=2, epsilon=epsilon, seed=7, init=init, plan=plan, **more
    )
    start(simulation, out, Display(Console(file=io.StringIO())))
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def test_the_summary_keeps_the_contract(exports: tuple[str, ...], tmp_path: Path) -> None:
    found = run(exports, tmp_path / "out")
    assert found["status"] == "completed"
    metrics, baselines = found["metrics"], found["baselines"]
    assert set(baselines) == {"last_value", "linear_extrapolation"}
    for judged in (metrics, *baselines.values()):
        assert set(judged) >= KEYS | {"by_site"}
        assert set(judged["by_site"]) == {"site-1", "site-2"}
        assert set(judged["by_site"]["site-1"]) >= KEYS
    assert found["by_site"] == metrics["by_site"]
    assert found["worst_site"] in found["by_site"]
    assert found["sites"][0]["epsilon"] <= 8.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By hospital" in page
    assert "The error at 30 minutes, by patient" in page
    spread = found["rmse_30_of_patients_by_site"]
    assert set(spread) == {"site-1", "site-2"}
    for percentiles in (*spread.values(), found["rmse_30_of_patients"]):
        assert sorted(percentiles.values()) == list(percentiles.values())
    assert found["worst_site"] in page


def test_what_takes_minutes_is_fitted_only_if_asked_for(
    exports: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.forecast_baselines.ARIMA_WINDOWS", 2)
    monkeypatch.setattr("simulations.baselines.LEAST_STEPS", 1)
    monkeypatch.setattr("simulations.baselines.PASSES", 1)
    asked = run(exports, tmp_path / "asked", baselines=True)
    assert set(asked["baselines"]) >= {"last_value", "linear_ar", "linear_ar_pooled", "arima", "pooled", "local"}


def test_heldout_patients_may_be_a_raw_export(exports: tuple[str, ...], tmp_path: Path) -> None:
    found = run(exports[:1], tmp_path / "out", heldout=exports[1])
    assert found["status"] == "completed"
    assert math.isfinite(found["metrics"]["skill_30"])
    with pytest.raises(IntakeError, match="among the training patients of site-1"):
        run(exports[:1], tmp_path / "same", heldout=exports[0])


def test_it_starts_from_the_public_weights_unless_told_otherwise(exports: tuple[str, ...], tmp_path: Path) -> None:
    warm = run(exports, tmp_path / "warm", epsilon=float("inf"))
    assert "public checkpoint" in str(warm["start"])
    assert read_plan(tmp_path / "warm" / "plan.json").init in str(warm["start"])
    cold = run(exports, tmp_path / "cold", epsilon=float("inf"), init="random")
    assert cold["start"] == "random weights"
    assert read_plan(tmp_path / "cold" / "plan.json").init == "random"
    assert warm["metrics"]["rmse_30"] < cold["metrics"]["rmse_30"]
