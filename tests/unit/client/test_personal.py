"""One patient's own model, and forecasts under another dose: what they may do, and what they refuse."""

import hashlib
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import cli
from client.monitor.personal import _ONE, personalise, read_patients, write_personal
from client.monitor.what_if import changed, what_if
from client.trained import Trained, Trust, load_trained
from server.checkpoints import load_weights, save_checkpoint
from shared.errors import IntakeError, PlanError, StorageError
from shared.personal import save_personal
from shared.provenance.sidecar import Sidecar, write_sidecar
from shared.tasks.cgm_windows import HORIZON, JUDGED
from shared.tasks.glucose_forecast import HISTORY, TASK
from shared.tasks.registry import find_task

DOSES = "patient_id,timestamp,glucose_mg_dl,insulin_units,carbohydrate_g"


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """A hospital of a few patients needs no more steps than one patient."""
    monkeypatch.setattr("client.monitor.personal._ALL", _ONE)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return TASK.build().eval()


def export(path: Path, readings: int = 500, head: str = DOSES, patients: tuple[str, ...] = ("Doe-7",)) -> Path:
    """Write patients of waves with notes of insulin and food."""
    start, rows = np.datetime64("2024-01-01T00:00"), [head]
    for patient, k in product(patients, range(readings)):
        cells = [patient, str(start + np.timedelta64(5 * k, "m")), f"{130 + 50 * np.sin(k / 7):.0f}"]
        rows.append(
            ",".join([*cells, "2" if k % 60 == 10 else "", "40" if k % 60 == 12 else ""][: head.count(",") + 1])
        )
    path.write_text("\n".join(rows))
    return path


def reacting(model: torch.nn.Module, insulin: float, carbohydrate: float) -> torch.nn.Module:
    """Let the forecast answer to insulin and food with the given signs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.insulin.weight.fill_(insulin)
        model.memory.weight_ih_l0[-16:, 3] = carbohydrate
        model.readout.weight[:HORIZON] = 0.1
    return model


def test_a_personal_model_is_better_where_there_is_something_to_learn_and_leaves_the_global_one(model, tmp_path):
    before = [parameter.clone() for parameter in model.parameters()]
    record = read_patients(export(tmp_path / "e.csv"), "Doe-7")
    mine, gain = personalise(model, record)
    assert gain.steps > 0
    assert gain.windows == JUDGED - HORIZON + 1
    assert gain.rmse_30[1] < 0.9 * gain.rmse_30[0]
    assert gain.pinball[1] < gain.pinball[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    again, same = personalise(model, record)
    assert same == gain
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), again.parameters(), strict=True))


def test_the_test_part_teaches_nothing(model, tmp_path):
    record = read_patients(export(tmp_path / "e.csv"), "Doe-7")
    mine, _ = personalise(model, record)
    record.arrays["glucose"][-JUDGED:] = 60.0
    other, _ = personalise(model, record)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))


def test_a_hospital_fits_its_own_model_to_everybody(model, tmp_path):
    records = read_patients(export(tmp_path / "e.csv", patients=("Doe-7", "Roe-1", "Poe-2")))
    assert len(records) == 3
    ours, gain = personalise(model, records)
    assert gain.windows == 3 * (JUDGED - HORIZON + 1)
    assert gain.rmse_30[1] < 0.9 * gain.rmse_30[0]
    ends = records.offsets[1:]
    for end in ends:  # nobody's last readings teach anything
        records.arrays["glucose"][end - JUDGED : end] = 60.0
    other, _ = personalise(model, records)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))


def test_a_hospitals_own_model_serves_everybody_there_and_starts_no_run(model, tmp_path):
    out = tmp_path / "ours.safetensors"
    write_personal(out, model, None, Trained(model, "b" * 64))
    opened = load_trained(out, TASK.name, "forecast glucose", fitted=True)
    assert opened.fits("Doe-7")
    assert opened.fits("Roe-1")
    with pytest.raises(StorageError, match="stay"):
        load_weights(out, TASK.build())


def test_what_is_written_is_the_owners_only_and_starts_no_run(model, tmp_path):
    out = tmp_path / "p.safetensors"
    write_personal(out, model, "Doe-7", Trained(model, "b" * 64))
    for path in (out, out.with_suffix(".json")):
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"Doe" not in path.read_bytes()
    assert json.loads(out.with_suffix(".json").read_text())["personal"] is True
    opened = load_trained(out, TASK.name, "forecast glucose", fitted=True)
    assert opened.fits("Doe-7")
    assert not opened.fits("Doe-8")
    with pytest.raises(StorageError, match="stay"):
        load_weights(out, TASK.build())
    with pytest.raises(StorageError, match="new file"):
        write_personal(out, model, "Doe-7", Trained(model, "b" * 64))


def test_a_patient_who_is_not_there_or_has_too_little_is_refused(model, tmp_path):
    with pytest.raises(IntakeError, match="no such patient"):
        read_patients(export(tmp_path / "e.csv"), "Doe-8")
    with pytest.raises(IntakeError, match="too short"):
        personalise(model, read_patients(export(tmp_path / "s.csv", readings=200), "Doe-7"))


def test_what_if_answers_only_where_the_model_reacts_as_physiology_demands(model, tmp_path):
    record = read_patients(export(tmp_path / "e.csv"), "Doe-7")
    answer = what_if(reacting(model, -1.0, 1.0), record, 2.0, 0.0)
    assert (answer.changed[-1, 1] < answer.as_recorded[-1, 1]).all()
    assert what_if(model, record, 0.0, 50.0).changed[-1, 1] > answer.as_recorded[-1, 1]
    for insulin, carbohydrate, said in ((0.0, 1.0, "without insulin"), (1.0, 1.0, "physiology"), (-1.0, -1.0, "carb")):
        with pytest.raises(PlanError, match=said):
            what_if(reacting(model, insulin, carbohydrate), record, 2.0, 0.0)
    bare = read_patients(export(tmp_path / "b.csv", head="patient_id,timestamp,glucose_mg_dl"), "Doe-7")
    with pytest.raises(PlanError, match="no insulin and no carbohydrate"):
        what_if(model, bare, 2.0, 0.0)


def test_no_more_is_taken_away_than_was_given():
    readings = torch.zeros(1, HISTORY, 4)
    readings[0, 5, 2], readings[0, 20, 2] = 30.0, 10.0
    less = changed(readings, "carbohydrate", -20.0)
    assert (less[0, 5, 2], less[0, 20, 2]) == (20.0, 0.0)
    assert changed(readings, "insulin", 2.0)[0, -1, 1] == 2.0
    with pytest.raises(PlanError, match="less carbohydrate"):
        changed(readings, "carbohydrate", -41.0)


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["fedward-site", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_commands(model, tmp_path, monkeypatch, capfd):
    path = save_checkpoint(tmp_path / "c", model, run="r", number=1, task=TASK.name, plan_digest="p").path
    data, out = export(tmp_path / "e.csv"), tmp_path / "p.safetensors"
    assert call(monkeypatch, "personalise", path, data, "--patient", "Doe-7", "--out", out) == 0
    assert "RMSE at 30 minutes" in capfd.readouterr().out
    assert out.exists()
    assert call(monkeypatch, "what-if", path, data, "--patient", "Doe-7", "--insulin", "+2", "--carbs", "-20") == 1
    assert "without insulin" in capfd.readouterr().err
    reacting(model, -1.0, 1.0)
    path = save_checkpoint(tmp_path / "d", model, run="r", number=1, task=TASK.name, plan_digest="p").path
    assert call(monkeypatch, "what-if", path, data, "--patient", "Doe-7", "--insulin", "+2", "--carbs", "-20") == 0
    said = capfd.readouterr().out
    assert "NOT FOR CLINICAL USE" in said
    assert "in 60 min" in said
    assert call(monkeypatch, "what-if", out, data, "--patient", "Doe-8") == 1
    assert "another patient" in capfd.readouterr().err


def test_one_patients_model_is_never_refitted_to_another_but_the_hospitals_may_be(
    model, tmp_path, monkeypatch, capfd
) -> None:
    path = save_checkpoint(tmp_path / "c", model, run="r", number=1, task=TASK.name, plan_digest="p").path
    data = export(tmp_path / "e.csv", patients=("Doe-7", "Roe-1"))
    hospital, first, second = (tmp_path / f"{name}.safetensors" for name in ("ours", "doe", "roe"))
    assert call(monkeypatch, "personalise", path, data, "--out", hospital) == 0
    assert call(monkeypatch, "personalise", path, data, "--patient", "Doe-7", "--out", first) == 0
    capfd.readouterr()
    for others in (["--patient", "Roe-1"], []):
        assert call(monkeypatch, "personalise", first, data, *others, "--out", second) == 1
        assert "another patient" in capfd.readouterr().err
        assert not second.exists()
    call(monkeypatch, "personalise", hospital, data, "--patient", "Roe-1", "--out", second)
    assert "own model" in capfd.readouterr().out


def test_a_mark_that_anybody_can_write_opens_nothing_that_a_signature_guards(tmp_path: Path) -> None:
    """A stranger's classifier, marked as a hospital's own, would otherwise pass under a site that trusts keys."""
    content = save_personal(find_task("nodule-classification").build().state_dict())
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    write_sidecar(path.with_suffix(".json"), Sidecar(task="nodule-classification", sha256=digest, patient="everybody"))
    with pytest.raises(StorageError, match="nobody signs such a model"):
        load_trained(
            path, "nodule-classification", "score nodules", Trust((Ed25519PrivateKey.generate().public_key(),))
        )
