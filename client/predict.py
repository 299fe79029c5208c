"""Score a hospital's own scans with a trained model. The result stays in the hospital."""

import csv
import io
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from client.intake.annotations import COLUMNS, Annotation, annotation_rows
from client.intake.identities import Identities
from client.intake.nodules import IntakeReport, prepare_nodules
from client.intake.pseudonyms import SECRET_BYTES, PatientIdentity
from client.trained import NO_SITE, Trained, Trust, load_trained
from shared.errors import IntakeError
from shared.files import storage_errors, write_atomic
from shared.operating_point import OperatingPoint
from shared.records import RecordStore
from shared.tasks.nodule_classification import TASK, score_records

NAMED = ("patient", "seriesuid", "coordX", "coordY", "coordZ")
"""Columns by which a hospital finds a nodule again: its own patient number, and LUNA16's names in mm."""
PSEUDONYMOUS = ("patient", "nodule")
READ = ("diameter_mm", "probability", "decision", "threshold")
_UNUSED_MALIGNANCY = "1"
_WITHOUT_REFERENCE = OperatingPoint(0.5, 1.0, "one half: no reference patients chose a threshold")


@dataclass(frozen=True)
class Scored:
    """What a prediction came to.

    Attributes:
        intake: What was read and left out: counts only.
        point: Where the model decides.
    """

    intake: IntakeReport
    point: OperatingPoint


def predict(
    checkpoint: Path,
    dicom_dir: Path,
    annotations: Path,
    out: Path,
    *,
    secret: bytes | None = None,
    identities: Identities | None = None,
    pseudonymous: bool = False,
    workers: int = 1,
    trust: Trust = NO_SITE,
    on_doubt: Callable[[str], object] | None = None,
) -> Scored:
    """Write the probability of malignancy of every annotated nodule to ``out``, which is its owner's alone.

    The patient number, the series and the position are joined to the scores here, in memory; the prepared store that
    the model reads stays de-identified. Probabilities and decisions are those of the checkpoint's operating point.

    Args:
        checkpoint: Weights as safetensors, with the JSON beside them that names the task and their SHA-256.
        dicom_dir: The scans.
        annotations: Where the nodules are, as for intake; the column ``malignancy`` may be absent and is not read.
        out: CSV with one line a nodule: ``NAMED`` and ``READ``, or ``PSEUDONYMOUS`` and ``READ``.
        secret: Of the site, so that a patient has the same pseudonym as in its store; by default a fresh one.
        identities: Of the site, so that identifiers of one person have one pseudonym; by default no links.
        pseudonymous: Whether ``out`` shall hold pseudonyms and neither patient number, series nor position.
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
    point = (trained.sidecar and trained.sidecar.operating_point) or _WITHOUT_REFERENCE
    places: dict[tuple[bytes, int], tuple[str, ...]] = {}

    def note(key: bytes, nodule: int, patient: PatientIdentity, marked: Annotation) -> None:
        position = (repr(coordinate) for coordinate in marked.centre_mm)
        places[key, nodule] = (patient.patient_id, marked.series_uid, *position)

    with storage_errors(out), tempfile.TemporaryDirectory(prefix=".predict-", dir=out.resolve().parent) as folder:
        marked = Path(folder) / "annotations.csv"
        _write_positions(annotations, marked)
        store = Path(folder) / "store"
        report = prepare_nodules(
            dicom_dir,
            marked,
            store,
            secret or secrets.token_bytes(SECRET_BYTES),
            identities=identities,
            on_nodule=None if pseudonymous else note,
            workers=workers,
        )
        rows = _rows(trained.model, RecordStore.open(store), point)
        write_atomic(out, _pseudonymous(rows) if pseudonymous else _named(rows, places), private=True)
    return Scored(report, point)


def load_model(checkpoint: Path) -> nn.Module:
    """Return the model of a checkpoint, ready to score; no signature is asked for. Raises StorageError or PlanError."""
    return _opened(checkpoint, NO_SITE).model


def _opened(checkpoint: Path, trust: Trust) -> Trained:
    return load_trained(checkpoint, TASK.name, "score nodules", trust)


def _write_positions(annotations: Path, target: Path) -> None:
    """Copy the nodules' positions; the readers' own judgement, if any, plays no part in a prediction."""
    wanted = COLUMNS[:-1]
    rows = list(annotation_rows(annotations, wanted))
    if not rows:
        raise IntakeError(f"{annotations.name} has no row below its header; it must say where the nodules are.")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([COLUMNS, *([*(row.get(column, "") for column in wanted), _UNUSED_MALIGNANCY] for row in rows)])
    target.write_text(text.getvalue(), encoding="utf-8")


@dataclass(frozen=True)
class _Row:
    """One nodule's line, without who it is of."""

    key: bytes
    nodule: int
    diameter_mm: float
    read: tuple[str, str, str]


def _rows(model: nn.Module, store: RecordStore, point: OperatingPoint) -> Iterator[_Row]:
    scores = score_records(model, store)
    for p in range(len(store)):
        records = slice(store.offsets[p], store.offsets[p + 1])
        numbers = np.asarray(store.arrays["nodule"][records])
        diameters = np.asarray(store.arrays["diameter_mm"][records])
        for nodule in np.unique(numbers):
            mine = numbers == nodule
            probability = float(point.probability(scores[records][mine].mean(keepdims=True, dtype=np.float64))[0])
            decision = "malignant" if probability >= point.threshold else "benign"
            read = (f"{probability:.6f}", decision, f"{point.threshold:.6f}")
            yield _Row(store.keys[p].tobytes(), int(nodule), float(diameters[mine][0]), read)


def _named(rows: Iterable[_Row], places: Mapping[tuple[bytes, int], tuple[str, ...]]) -> bytes:
    lines = ((*places[row.key, row.nodule], f"{row.diameter_mm:.1f}", *row.read) for row in rows)
    return _csv((*NAMED, *READ), sorted(lines))


def _pseudonymous(rows: Iterable[_Row]) -> bytes:
    lines = ((row.key.hex(), row.nodule, f"{row.diameter_mm:.1f}", *row.read) for row in rows)
    return _csv((*PSEUDONYMOUS, *READ), lines)


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *lines])
    return text.getvalue().encode("utf-8", "backslashreplace")
