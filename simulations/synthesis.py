"""What a simulation can find out about a generator because it holds every hospital's patients."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator

from shared.files import storage_errors, write_atomic
from shared.models.gan import ConditionalGan
from shared.provenance.tensors import load_into, read_weights
from shared.records import RecordStore
from shared.synthesis import (
    generated_patches,
    halves,
    malignancy,
    real_patches,
    samples_sheet,
    train_classifier,
)
from shared.tasks.ct_nodules import is_upright
from shared.tasks.ct_synthesis import SIDE_PX, build
from shared.tasks.nodule_classification import judge_nodules
from simulations.attacks import copying, membership

SAMPLES = "samples.png"
FEW_PATCHES = 40
_SEED = 20


def examine(checkpoint: Path, training: RecordStore, judged: RecordStore, out: Path) -> Mapping[str, Any]:
    """Attack the final model, train the same classifier on real patches, and write ``samples.png`` into ``out``.

    The classifier is trained on all real patches, on ``FEW_PATCHES`` of them, and on these beside as many generated
    ones in every batch.

    Args:
        checkpoint: Weights of the final model.
        training: All hospitals' training patients.
        judged: Patients that nobody trained on.
        out: The simulation's folder.

    Returns:
        Metrics by name, for :data:`server.findings.EXAMINATION`.

    Raises:
        StorageError: If a file cannot be read or written.
    """
    torch.set_num_threads(1)
    model = _model(checkpoint)
    real, trained_on, upright = real_patches(judged, SIDE_PX), real_patches(training, SIDE_PX), is_upright(training)
    others = real.at(torch.from_numpy(np.flatnonzero(halves(judged)[1])))
    drawn = generated_patches(model, others.labels, _SEED)
    with storage_errors(out):
        write_atomic(out / SAMPLES, samples_sheet(others, drawn))
    few = trained_on.at(torch.randperm(len(trained_on), generator=Generator().manual_seed(_SEED))[:FEW_PATCHES])
    as_many = few.at(torch.arange(len(drawn)) % len(few))
    teachers = {"real": trained_on, "few_real": few, "few_real_and_synthetic": as_many + drawn}
    students = {name: train_classifier(patches, _SEED, upright=upright) for name, patches in teachers.items()}
    judged_by = {name: judge_nodules(judged, malignancy(student, real)).metrics for name, student in students.items()}
    return {
        **{f"{name}_auroc": metrics["auroc"] for name, metrics in judged_by.items()},
        "real_balanced_accuracy": judged_by["real"]["balanced_accuracy"],
        **membership(model, training, judged),
        "neighbour_ratio": copying(model, students["real"], training, judged),
    }


def _model(checkpoint: Path) -> ConditionalGan:
    model = build()
    load_into(model, read_weights(checkpoint))
    model.requires_grad_(False)
    return model.eval()
