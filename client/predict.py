"""Score a hospital's own scans with a trained model. The result stays in the hospital."""

import csv
import io
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from client.intake.annotations import COLUMNS
from client.intake.nodules import IntakeReport, prepare_nodules
from client.intake.pseudonyms import SECRET_BYTES
from client.trained import NO_SITE, Trained, Trust, load_trained
from shared.errors import IntakeError
from shared.files import storage_errors, write_atomic
from shared.records import RecordStore
from shared.tasks.nodule_classification import score_records

HEADER = ("patient", "nodule", "diameter_mm", "probability")
_UNUSED_MALIGNANCY = "1"


def predict(
    checkpoint: Path,
    dicom_dir: Path,
    annotations: Path,
    out: Path,
    *,
    secret: bytes | None = None,
    workers: int = 1,
    trust: Trust = NO_SITE,
    on_doubt: Callable[[str], object] | None = None,
) -> IntakeReport:
    """Write the probability of malignancy of every annotated nodule to ``out``, and return what intake counted.

    Args:
        checkpoint: Weights as safetensors, with the JSON beside them that names the task and their SHA-256.
        dicom_dir: The scans.
        annotations: Where the nodules are, as for intake; the column ``malignancy`` may be absent and is not read.
        out: CSV with one line a nodule.
        secret: Of the site, so that a patient has the same pseudonym as in its store; by default a fresh one.
        workers: Processes that read and decode.
        trust: What is asked of the checkpoint.
        on_doubt: Told, before anything is read, why nobody answers for the checkpoint.

    Raises:
        StorageError: If the checkpoint is damaged or not signed as it must be, or ``out`` cannot be written.
        IntakeError: If no scan is usable.
        PlanError: If the task has no scans to score.
    """
    trained = _opened(checkpoint, trust)
    if trained.doubt and on_doubt:
        on_doubt(trained.doubt)
    model = trained.model
    with storage_errors(out), tempfile.TemporaryDirectory(prefix=".predict-", dir=out.resolve().parent) as folder:
        marked = Path(folder) / "annotations.csv"
        _write_positions(annotations, marked)
        store = Path(folder) / "store"
        report = prepare_nodules(dicom_dir, marked, store, secret or secrets.token_bytes(SECRET_BYTES), workers=workers)
        write_atomic(out, _table(model, RecordStore.open(store)))
    return report


def load_model(checkpoint: Path) -> nn.Module:
    """Return the model of a checkpoint, ready to score; no signature is asked for. Raises StorageError or PlanError."""
    return _opened(checkpoint, NO_SITE).model


def _opened(checkpoint: Path, trust: Trust) -> Trained:
    return load_trained(checkpoint, "nodule-classification", "score nodules", trust)


def _write_positions(annotations: Path, target: Path) -> None:
    """Copy the nodules' positions; the readers' own judgement, if any, plays no part in a prediction."""
    wanted = COLUMNS[:-1]
    try:
        with annotations.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
            rows = list(csv.DictReader(handle, skipinitialspace=True))
    except (OSError, csv.Error):
        rows = []
    if not rows or not set(wanted) <= set(rows[0]):
        raise IntakeError(f"{annotations.name} must be a CSV file with the columns {', '.join(wanted)} and some rows.")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([COLUMNS, *([*(row[column] or "" for column in wanted), _UNUSED_MALIGNANCY] for row in rows)])
    target.write_text(text.getvalue(), encoding="utf-8")


def _table(model: nn.Module, store: RecordStore) -> bytes:
    scores = score_records(model, store)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for p in range(len(store)):
        records = slice(store.offsets[p], store.offsets[p + 1])
        numbers = np.asarray(store.arrays["nodule"][records])
        diameters = np.asarray(store.arrays["diameter_mm"][records])
        for nodule in np.unique(numbers):
            mine = numbers == nodule
            probability = float(scores[records][mine].mean())
            writer.writerow([store.keys[p].tobytes().hex(), nodule, f"{diameters[mine][0]:.1f}", f"{probability:.6f}"])
    return text.getvalue().encode()
