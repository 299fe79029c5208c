"""A run that starts from another's model: what both cost is on the card, end to end."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from shared.errors import PlanError
from shared.provenance.ancestry import OPERATOR
from shared.provenance.keys import SIGNING_PUB, read_trusted
from shared.provenance.sidecar import read_sidecar
from shared.provenance.signing import is_signed_by
from simulations.display import Display
from simulations.run import Simulation, start

DISPLAY = Display(Console(file=io.StringIO()))


@pytest.fixture
def asked(tmp_path: Path) -> Simulation:
    generator, files = np.random.default_rng(0), []
    for hospital in ("north", "south"):
        rows = ["patient_id,timestamp,glucose_mg_dl"]
        for patient in range(5):
            at = np.arange(230)
            glucose = 130 + 40 * np.sin(at / generator.uniform(5, 9)) + generator.normal(0, 2, len(at))
            times = np.datetime64("2020-01-01T00:00") + 5 * at.astype("timedelta64[m]")
            rows += [f"{hospital}-{patient},{t},{g:.1f}" for t, g in zip(times, glucose, strict=True)]
        path = tmp_path / f"{hospital}.csv"
        path.write_text("\n".join(rows))
        files.append(str(path))
    plan = {"rounds": 1, "local_steps": 1, "records_per_patient": 1}
    return Simulation(task="glucose-forecast", data=tuple(files), sites=2, epsilon=8.0, seed=7, plan=plan)


@pytest.fixture(autouse=True)
def _few_arima_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.forecast_baselines.ARIMA_WINDOWS", 1)


def test_a_second_run_on_a_firsts_model_composes_both(asked: Simulation, tmp_path: Path) -> None:
    first = start(asked, tmp_path / "first", DISPLAY)
    path = Path(first["checkpoint"]["path"])
    sidecar = read_sidecar(path.with_suffix(".json"))
    assert is_signed_by(sidecar, read_trusted(tmp_path / "first" / "server" / SIGNING_PUB))
    assert first["card"]["origin"] == "public"
    assert first["card"]["epsilon"] == pytest.approx(first["sites"][0]["epsilon"])
    assert sidecar.epsilon == first["card"]["epsilon"]

    second = start(replace(asked, init=str(path), seed=8), tmp_path / "second", DISPLAY)
    card = second["card"]
    assert card["composed"] == ["site-1", "site-2"]
    assert len(card["runs"]) == 2
    assert card["epsilon"] > max(first["card"]["epsilon"], second["sites"][0]["epsilon"])
    assert "The model comes from earlier training" in (tmp_path / "second" / "report.html").read_text()
    inherited = read_sidecar(Path(second["checkpoint"]["path"]).with_suffix(".json"))
    assert inherited.epsilon == card["epsilon"]

    noiseless = start(replace(asked, epsilon=float("inf")), tmp_path / "noiseless", DISPLAY)
    third = start(replace(asked, init=noiseless["checkpoint"]["path"]), tmp_path / "third", DISPLAY)
    assert third["card"]["private"] is False
    assert "added no noise" in third["card"]["says"]
    assert third["sites"][0]["epsilon"] <= 8.0  # this run's own


def test_a_start_of_unknown_origin_is_refused_before_any_data_are_made(asked: Simulation, tmp_path: Path) -> None:
    shipped = Path(str(asked.start))
    other = tmp_path / "other.safetensors"
    content = bytearray(shipped.read_bytes())
    content[-1] ^= 1  # another sign of one weight: no more the weights that came with Fedward
    other.write_bytes(content)
    with pytest.raises(PlanError, match="--init-is-public"):
        start(replace(asked, init=str(other)), tmp_path / "out", DISPLAY)
    assert not (tmp_path / "out" / "sites").exists()
    said = start(replace(asked, init=str(other), init_is_public=True), tmp_path / "said", DISPLAY)
    assert said["card"]["said_by"] == OPERATOR
    assert OPERATOR in said["start"]
    assert json.loads((tmp_path / "said" / "server" / "start.json").read_text())["said_by"] == OPERATOR
