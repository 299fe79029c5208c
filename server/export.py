"""A run's model for other runtimes: safetensors and ONNX, published only if they agree, and a card that names them."""

import hashlib
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from server.checkpoints import Checkpoint, latest_checkpoint, load_weights
from server.findings import Findings, final_round
from server.lineage import ancestry_in
from server.registry import RunRecord, finite
from server.warnings import warnings_of
from shared.errors import FederationError, PlanError, StorageError
from shared.files import storage_errors, sync_directory
from shared.provenance.card import card_of
from shared.provenance.sidecar import Sidecar, write_sidecar
from shared.provenance.signing import signed
from shared.tasks.registry import find_task

TOLERANCE = 1e-4
"""Largest difference between torch and onnxruntime in any output, absolute plus relative."""
_OPSET = 20
_BATCHES = (1, 7)


class Careful(nn.Module):
    """A model whose answer to a row with anything that is no number is no number.

    Torch's own layers see to that, but runtimes may clip before an activation, and would answer a missing reading with
    a forecast that looks like any other.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the model's outputs ``(N, ...)`` of ``(N, ...)``."""
        outputs: Tensor = self.model(inputs)
        known = inputs.flatten(1).isfinite().all(dim=1)
        return torch.where(known.view(-1, *[1] * (outputs.dim() - 1)), outputs, torch.nan)


def export_model(record: RunRecord, folder: Path, out: Path, signer: Ed25519PrivateKey | None = None) -> Checkpoint:
    """Write ``model.safetensors``, ``model.onnx`` and ``model.json`` of the run's last model into ``out``.

    Args:
        record: The run.
        folder: The run's folder, with its checkpoints.
        out: Made if need be; older files of these names are replaced, all or none.
        signer: Signs ``model.json``, which hospitals then verify as a checkpoint's own.

    Raises:
        StorageError: If there is no checkpoint or a file cannot be used.
        PlanError: If the run's task cannot be exported.
        FederationError: If the ONNX model does not agree with torch.
    """
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise StorageError(f"{record.run} has no checkpoint yet; export it after its first round.")
    task = find_task(checkpoint.task)
    if task.example is None:
        raise PlanError(f"The task {task.name} gives no example input, so its model cannot be exported.")
    model = task.build()
    load_weights(checkpoint.path, model, checkpoint.sha256)
    model.eval()
    staging = out / ".export"
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    try:
        write_onnx(model, task.example, staging / "model.onnx")
        difference = check_onnx(model, task.example, staging / "model.onnx")
        with storage_errors(out):
            shutil.copyfile(checkpoint.path, staging / "model.safetensors")
            card = _card(record, checkpoint, staging, difference)
            write_sidecar(staging / "model.json", signed(card, signer) if signer else card)
            for name in ("model.safetensors", "model.onnx", "model.json"):
                (staging / name).replace(out / name)
            sync_directory(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return checkpoint


def write_onnx(model: nn.Module, example: Callable[[int], Tensor], path: Path) -> None:
    """Write the model, made careful, as ONNX with a free first dimension."""
    # The exporter tells its own developers much, in warnings and logs.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Careful(model).eval(),
                (example(2),),
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    if program is None:
        raise FederationError("The model could not be translated to ONNX.")
    with storage_errors(path):
        program.save(path)


@torch.no_grad()
def check_onnx(model: nn.Module, example: Callable[[int], Tensor], path: Path) -> float:
    """Compare torch and onnxruntime on random inputs; return the largest absolute difference.

    In the larger batch one row misses a value: its answer must be no number, and the others' as if it were not there.

    Raises:
        FederationError: If it is above :data:`TOLERANCE`.
    """
    import onnxruntime  # noqa: PLC0415 - an extra of the aggregator

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    worst, careful = 0.0, Careful(model)
    for count in _BATCHES:
        inputs = example(count)
        if count > 1:
            inputs[(0,) * inputs.dim()] = torch.nan
        expected = careful(inputs).numpy()
        given = np.asarray(session.run(None, {name: inputs.numpy()})[0])
        agrees = given.shape == expected.shape and np.allclose(
            given, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
        )
        if not agrees:
            raise FederationError("The ONNX model does not agree with torch, so nothing was exported.")
        worst = max(worst, float(np.nanmax(np.abs(given - expected))))
    return worst


def _card(record: RunRecord, checkpoint: Checkpoint, staging: Path, difference: float) -> Sidecar:
    """Return what a user of the model should know, in the form of a checkpoint's own description."""
    final = final_round(record, checkpoint)
    evaluation = final.evaluation if final else None
    ancestry = ancestry_in(record, checkpoint)
    promised = card_of(ancestry)
    return Sidecar(
        task=checkpoint.task,
        sha256=checkpoint.sha256,
        epsilon=promised.epsilon if promised.private else None,
        delta=promised.delta,
        ancestry=ancestry,
        run=record.run,
        round=checkpoint.round,
        plan_digest=checkpoint.plan_digest,
        path="model.safetensors",
        operating_point=checkpoint.operating_point,
        rounds=checkpoint.round,
        sites=sum(site.refused is None for site in record.sites),
        onnx_sha256=hashlib.sha256((staging / "model.onnx").read_bytes()).hexdigest(),
        onnx_differs_by=difference,
        metrics=finite(evaluation.metrics if evaluation else {}),
        warnings=tuple(warning.text for warning in warnings_of(Findings(record, checkpoint))),
    )
