"""Task ``nodule-classification``: is a lung nodule in CT benign or malignant?

Labels are the LIDC-IDRI readers' median malignancy, above 3 against below 3. A patient brings one or many
nodules, each as a few axial patches; the patient's loss is the mean over the K patches drawn from them.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared.evaluation import Evaluation
from shared.metrics import (
    Decisions,
    Labels,
    Scores,
    binary_metrics,
    bootstrap_auroc,
    calibration_metrics,
    classification_curves,
)
from shared.models.cnn import LungCTNet
from shared.operating_point import choose, cross_fitted
from shared.records import RecordStore
from shared.tasks.base import Batch, Task
from shared.tasks.ct_nodules import MARGIN_PX, PATCH_PX, STORE_KIND, VENDORS, StoredPatients, is_upright
from shared.tasks.sampling import draw_records

_BRIGHTNESS_SD = 0.05
_CONTRAST_SD = 0.1
_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class NodulePatients(StoredPatients):
    """Patients of a ``ct-nodules`` store, with augmentation."""

    def draw(self, patients: Tensor, records_per_patient: int, generator: Generator) -> Batch:
        """Draw patches ``(B, K, 1, 28, 28)`` and labels ``(B, K)``, each patch augmented by itself."""
        rows = draw_records(self.store.offsets, patients, records_per_patient, generator)
        stored = torch.from_numpy(np.asarray(self.store.arrays["image"][rows.ravel()], np.float32))
        labels = torch.from_numpy(np.asarray(self.store.arrays["malignant"][rows], np.int64))
        images = augment(stored, generator, turned=not is_upright(self.store))
        return Batch({"image": images.view(*rows.shape, 1, PATCH_PX, PATCH_PX), "malignant": labels})


def augment(stored: Tensor, generator: Generator, *, turned: bool) -> Tensor:
    """Return patches ``(N, 28, 28)`` cut from ``(N, 36, 36)``, each turned, shifted and re-windowed at random.

    Quarter turns and a flip (the eight symmetries of the square) if ``turned``, shifts of up to ``MARGIN_PX`` pixels,
    and a small change of contrast and brightness. Every record is handled by itself, so nothing mixes patients.
    """
    count = len(stored)
    shifts = torch.randint(0, 2 * MARGIN_PX + 1, (count, 2), generator=generator)
    steps = torch.arange(PATCH_PX)
    rows, columns = shifts[:, :1] + steps, shifts[:, 1:] + steps
    patches = stored[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    for turn in (_transpose, _mirror_rows, _mirror_columns) if turned else ():
        chosen = torch.rand(count, 1, 1, generator=generator) < 0.5
        patches = torch.where(chosen, turn(patches), patches)
    contrast = 1.0 + _CONTRAST_SD * torch.randn(count, 1, 1, generator=generator)
    brightness = _BRIGHTNESS_SD * torch.randn(count, 1, 1, generator=generator)
    return (patches * contrast + brightness).clamp(0.0, 1.0)


def _transpose(patches: Tensor) -> Tensor:
    return patches.transpose(-1, -2)


def _mirror_rows(patches: Tensor) -> Tensor:
    return patches.flip(-2)


def _mirror_columns(patches: Tensor) -> Tensor:
    return patches.flip(-1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return each patient's mean cross-entropy ``(B,)``."""
    images, labels = batch["image"], batch["malignant"]
    logits = model(images.flatten(0, 1))
    return F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape).mean(dim=1)


def random_patients(patients: int, records: int, generator: Generator) -> Batch:
    """Return noise in place of patches, with random labels; see :class:`shared.tasks.base.Task`."""
    images = torch.rand(patients, records, 1, PATCH_PX, PATCH_PX, generator=generator)
    return Batch({"image": images, "malignant": torch.randint(0, 2, (patients, records), generator=generator)})


def evaluate(model: nn.Module, store: RecordStore) -> Evaluation:
    """Judge by nodule: the mean malignancy probability over a nodule's patches, centred and unaugmented.

    The decisions are those of the best balanced accuracy; see :func:`decide_nodules`.
    """
    return decide_nodules(store, score_records(model, store))


def evaluate_at(model: nn.Module, store: RecordStore, sensitivity: float) -> Evaluation:
    """Judge as :func:`evaluate` does, at the threshold that finds a share of the malignant nodules."""
    return decide_nodules(store, score_records(model, store), sensitivity)


@torch.no_grad()
def score_records(model: nn.Module, store: RecordStore) -> npt.NDArray[np.float32]:
    """Return the malignancy probability ``(R,)`` of every record, centred and unaugmented."""
    inner = slice(MARGIN_PX, MARGIN_PX + PATCH_PX)
    device = next(model.parameters()).device
    images = torch.from_numpy(np.asarray(store.arrays["image"][:, inner, inner], np.float32))[:, None]
    scores = torch.cat([model(part.to(device)).softmax(1)[:, 1].cpu() for part in images.split(_EVALUATION_BATCH)])
    return np.asarray(scores.numpy(), np.float32)


def decide_nodules(
    store: RecordStore, record_scores: npt.NDArray[np.floating[Any]], sensitivity: float | None = None
) -> Evaluation:
    """Return the evaluation of a classifier's scores ``(R,)``, with the operating point that the patients choose.

    Each nodule is decided on by the point that the other patients choose, so that nothing flatters itself; see
    :mod:`shared.operating_point`.
    """
    nodules = _by_nodule(store, record_scores)
    probabilities, positive = cross_fitted(nodules.labels, nodules.scores, nodules.patients, sensitivity)
    judged = _judged(nodules, Decisions(probabilities, positive))
    off = calibration_metrics(nodules.labels, probabilities, nodules.patients)
    point = choose(nodules.labels, nodules.scores, sensitivity)
    return replace(judged, metrics={**judged.metrics, **off}, operating_point=point)


def judge_nodules(store: RecordStore, record_scores: npt.NDArray[np.floating[Any]]) -> Evaluation:
    """Return the evaluation of any score ``(R,)`` of the store's records, decided at one half."""
    nodules = _by_nodule(store, record_scores)
    return _judged(nodules, Decisions.at_half(nodules.scores))


@dataclass(frozen=True)
class _Nodules:
    """A store's nodules ``(N,)``: the mean score of a nodule's records, and what is known of it."""

    labels: Labels
    scores: Scores
    patients: npt.NDArray[np.int64]
    vendors: npt.NDArray[np.uint8]


def _by_nodule(store: RecordStore, record_scores: npt.NDArray[np.floating[Any]]) -> _Nodules:
    nodules = np.stack([store.patient_of_record, np.asarray(store.arrays["nodule"])], axis=1)
    _, first, inverse = np.unique(nodules, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.ravel()
    return _Nodules(
        np.asarray(store.arrays["malignant"])[first].astype(np.int64),
        np.bincount(inverse, weights=record_scores) / np.bincount(inverse),
        store.patient_of_record[first],
        np.asarray(store.arrays["vendor"])[first],
    )


def _judged(nodules: _Nodules, decisions: Decisions) -> Evaluation:
    labels, scores, vendors = nodules.labels, nodules.scores, nodules.vendors
    by_vendor = {}
    for code in np.unique(vendors):
        mine = vendors == code
        figures = binary_metrics(labels[mine], scores[mine], decisions.of(mine))
        by_vendor[VENDORS[code]] = {"nodules": float(mine.sum()), **figures}
    return Evaluation(
        metrics={
            "auroc": bootstrap_auroc(labels, scores, nodules.patients),
            **{k: v for k, v in binary_metrics(labels, scores, decisions).items() if k != "auroc"},
        },
        by_group=by_vendor,
        details=classification_curves(labels, scores, decisions),
    )


TASK = Task(
    name="nodule-classification",
    store_kind=STORE_KIND,
    metric="auroc",
    build=LungCTNet,
    load=NodulePatients,
    loss=loss,
    random_patients=random_patients,
    evaluate=evaluate,
    evaluate_at=evaluate_at,
    augmented_by="ct-synthesis",
    example=lambda count: torch.rand(count, 1, PATCH_PX, PATCH_PX),
    defaults={
        "rounds": 20,
        "local_steps": 2,
        "sample_rate": 0.5,
        "records_per_patient": 2,
        "max_grad_norm": 1.0,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "schedule": "linear",
    },
)
