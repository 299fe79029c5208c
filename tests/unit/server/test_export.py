"""A published model computes what the trained one does."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from server import export
from server.checkpoints import load_weights, save_checkpoint
from server.registry import RoundRow, RunRecord, SiteRow
from shared.errors import FederationError, PlanError, StorageError
from shared.operating_point import OperatingPoint
from shared.plan import RunPlan
from shared.provenance.ancestry import UNKNOWN
from shared.provenance.sidecar import read_sidecar
from shared.provenance.signing import signed
from shared.tasks import registry
from shared.tasks.cgm_windows import HORIZON
from shared.tasks.glucose_forecast import HISTORY
from shared.tasks.registry import find_task

PLAN = RunPlan(
    task="nodule-classification", rounds=2, local_steps=1, sample_rate=0.5, records_per_patient=1, max_grad_norm=1.0,
    noise_multiplier=1.0, delta=1e-3, learning_rate=0.1,
)  # fmt: skip
SITES = (SiteRow("h1", 200, None), SiteRow("h2", None, "policy-refused"))
RECORD = RunRecord("r", PLAN, "completed", None, SITES, (RoundRow(2, 1.0, None, {"h1": "ok"}),), {})


POINT = OperatingPoint(0.37, 1.25, "balanced-accuracy")


def save(folder: Path, task: str = PLAN.task) -> nn.Module:
    model = find_task(task).build().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights may leave parts of a model without a say
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_checkpoint(
        folder / "checkpoints", model, run="r", number=2, task=task, plan_digest=PLAN.digest, operating_point=POINT
    )
    return model


def test_both_files_compute_the_trained_model(tmp_path: Path) -> None:
    model = save(tmp_path)
    export.export_model(RECORD, tmp_path, tmp_path / "out")
    images = torch.rand(5, 1, 28, 28)
    expected = model(images).detach().numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    given = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    np.testing.assert_allclose(given, expected, atol=1e-4)
    again = find_task(PLAN.task).build().eval()
    digest = load_weights(tmp_path / "out" / "model.safetensors", again)
    assert torch.equal(again(images), model(images))
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    onnx = hashlib.sha256((tmp_path / "out" / "model.onnx").read_bytes()).hexdigest()
    assert (card["sha256"], card["onnx_sha256"]) == (digest, onnx)
    assert (card["task"], card["rounds"], card["sites"], card["delta"]) == (PLAN.task, 2, 1, 1e-3)
    assert card["epsilon"] == pytest.approx(PLAN.epsilon(2))
    assert OperatingPoint.parse(card["operating_point"]) == POINT
    assert card["warnings"] == ["Nothing was validated. No held-out patients judged this model."]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.json", "model.onnx", "model.safetensors",
    ]  # fmt: skip


def test_an_export_of_a_run_whose_start_is_unknown_states_no_epsilon(tmp_path: Path) -> None:
    """Its checkpoint is of an earlier version and names no ancestry: signed, its own epsilon would be believed."""
    save(tmp_path)
    started = replace(RECORD, plan=replace(PLAN, init="a" * 64))
    export.export_model(started, tmp_path, tmp_path / "out", Ed25519PrivateKey.generate())
    card = read_sidecar(tmp_path / "out" / "model.json")
    assert card.signature is not None
    assert card.epsilon is None
    assert card.ancestry is not None
    assert card.ancestry.origin == UNKNOWN
    with pytest.raises(StorageError, match="epsilon without an ancestry"):
        signed(replace(card, epsilon=4.0, delta=1e-3, ancestry=None), Ed25519PrivateKey.generate())


@pytest.mark.parametrize("task", ["glucose-forecast", "glucose-forecast-lstm"])
def test_a_forecaster_is_exported_for_any_number_of_patients(tmp_path: Path, task: str) -> None:
    model = save(tmp_path, task)
    export.export_model(replace(RECORD, plan=replace(PLAN, task=task)), tmp_path, tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    assert given.shape[1:] == [HISTORY, 4]
    example = find_task(task).example
    assert example is not None
    for count in (1, 2, 33):
        readings = example(count)
        quantiles = session.run(None, {given.name: readings.numpy()})[0]
        assert quantiles.shape == (count, HORIZON, 3)
        np.testing.assert_allclose(quantiles, model(readings).detach().numpy(), rtol=1e-4, atol=1e-3)
    # A reading that is missing makes its own patient's forecast no number, there as here, and nobody else's.
    readings[0, 5, 0] = float("nan")
    quantiles = session.run(None, {given.name: readings.numpy()})[0]
    assert np.isnan(quantiles[0]).all()
    np.testing.assert_allclose(quantiles[1:], model(readings[1:]).detach().numpy(), rtol=1e-4, atol=1e-3)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["task"] == task


class Moody(nn.Module):
    """Adds what the exporter cannot know of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.mood = 0.0

    def forward(self, values: Tensor) -> Tensor:
        return values * self.weight + self.mood


def test_a_model_that_onnx_computes_otherwise_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Moody()
    export.write_onnx(model, lambda count: torch.rand(count, 3), tmp_path / "model.onnx")
    assert export.check_onnx(model, lambda count: torch.rand(count, 3), tmp_path / "model.onnx") < 1e-6
    model.mood = 0.01
    with pytest.raises(FederationError, match="does not agree"):
        export.check_onnx(model, lambda count: torch.rand(count, 3), tmp_path / "model.onnx")


def test_without_checkpoint_or_example_there_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no checkpoint yet"):
        export.export_model(RECORD, tmp_path, tmp_path / "out")
    save(tmp_path)
    task = replace(find_task(PLAN.task), example=None)
    monkeypatch.setattr(registry, "_load", lambda _name: task)
    with pytest.raises(PlanError, match="no example input"):
        export.export_model(RECORD, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
