"""What personalising gains, over the patients of an export."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from client.monitor.personal import _ONE, Gain
from server.checkpoints import save_checkpoint
from shared.evaluation import Evaluation
from shared.tasks.cgm_windows import HORIZON, JUDGED
from shared.tasks.glucose_forecast import TASK
from simulations import personal_gains
from simulations.personal_gains import gains_of, own_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    saved = save_checkpoint(
        tmp_path, TASK.build(), run="r", number=1, task=TASK.name, plan_digest="0", epsilon=1.0, delta=1e-3
    )
    return saved.path


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Three patients of waves, the second with too few readings to learn from."""
    start, rows = np.datetime64("2024-01-01T00:00"), ["patient_id,timestamp,glucose_mg_dl"]
    for patient, readings in (("a", 500), ("b", 200), ("c", 500)):
        times = start + 5 * np.arange(readings) * np.timedelta64(1, "m")
        rows += [f"{patient},{time},{130 + 50 * np.sin(k / 7):.0f}" for k, time in enumerate(times)]
    path = tmp_path / "study.csv"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.monitor.personal._CHECKS", 2)
    monkeypatch.setattr("client.monitor.personal._ALL", _ONE)


def test_whose_record_is_too_short_is_left_out_and_counts_for_nobody(checkpoint: Path, export: Path) -> None:
    gains = gains_of(checkpoint, export, most=10)
    assert len(gains) == 2
    for gain in gains:
        assert gain.windows == JUDGED - HORIZON + 1
        assert gain.steps > 0
        assert gain.rmse_30[1] < gain.rmse_30[0]
    assert len(gains_of(checkpoint, export, most=1)) == 1


def test_the_hospitals_own_model_is_judged_as_the_global_one_is(checkpoint: Path, export: Path) -> None:
    before, after = own_model(checkpoint, export)
    assert after.value("rmse_30") < before.value("rmse_30")
    assert before.details["rmse_30_of_patients"] == after.details["rmse_30_of_patients"] == {}, "of three: too few"


def test_a_line_for_each_export_counts_who_gains_and_who_loses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    better, same = Gain((20.0, 18.0), (5.0, 4.0), 9, 20), Gain((10.0, 10.0), (4.0, 4.0), 9, 0)
    worse = Gain((10.0, 11.0), (4.0, 5.0), 9, 20)
    known = {"one.csv": [better, same, worse], "none.csv": []}
    monkeypatch.setattr(personal_gains, "gains_of", lambda _checkpoint, export, _most: known[export.name])
    judged = Evaluation({"rmse_30": 20.0, "skill_30": 0.25, "path_mse_median": 49.0, "path_mae_median": 6.0})
    monkeypatch.setattr(personal_gains, "own_model", lambda *_: (judged, judged))
    monkeypatch.setattr(sys, "argv", ["personal_gains", "m.safetensors", "one.csv", "none.csv"])
    personal_gains.main()
    hospital, first, _hospital, second = capsys.readouterr().out.splitlines()
    assert hospital.startswith("one.csv: global RMSE at 30 min 20.00 (25% below last value), path 7.00 / 6.00; own")
    assert first.startswith("one.csv: 3 patients, median gain RMSE at 30 min 0.0%, pinball 0.0%; 1 keep")
    assert first.endswith("1 are worse off")
    assert second == "none.csv: nobody's record is long enough"
