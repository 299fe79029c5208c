"""What a simulation can find out about a generator because it holds every hospital's patients."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from shared.files import storage_errors, write_atomic
from shared.models.gan import ConditionalGan
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
_SEED = 20


def examine(checkpoint: Path, training: RecordStore, judged: RecordStore, out: Path) -> Mapping[str, Any]:
    """Attack the final model, train the same classifier on real patches, and write ``samples.png`` into ``out``.

    Args:
        checkpoint: Weights of the final model.
        training: All hospitals' training patients.
        judged: Patients that nobody trained on.
        out: The simulation's folder.

    Returns:
        Metrics by name, for :data:`server.summary.EXAMINATION`.

    Raises:
        StorageError: If a file cannot be read or written.
    """
    torch.set_num_threads(1)
    with storage_errors(checkpoint):
        model = _model(checkpoint.read_bytes())
    real = real_patches(judged, SIDE_PX)
    reference = train_classifier(real_patches(training, SIDE_PX), _SEED, upright=is_upright(training))
    others = real.at(torch.from_numpy(np.flatnonzero(halves(judged)[1])))
    with storage_errors(out):
        write_atomic(out / SAMPLES, samples_sheet(others, generated_patches(model, others.labels, _SEED)))
    students = judge_nodules(judged, malignancy(reference, real)).metrics
    return {
        "real_auroc": students["auroc"],
        "real_balanced_accuracy": students["balanced_accuracy"],
        **membership(model, training, judged),
        "neighbour_ratio": copying(model, reference, training, judged),
    }


def _model(content: bytes) -> ConditionalGan:
    model = build()
    model.load_state_dict(load(content))
    model.requires_grad_(False)
    return model.eval()
