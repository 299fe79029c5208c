"""Fit the global model to one patient's own history, for that patient only.

There is no privacy in it and none is needed as long as the weights stay where the patient is treated: the file is
readable by its owner only and carries a mark by which no run starts from it (``shared.personal``).

Time divides what is learnt from what is judged: of the patient's last segment the last ``JUDGED`` readings are the
test, as many before them decide how long to train (not at all, if it does not help), everything earlier is learnt from.
"""

import copy
import hashlib
import json
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Generator, nn
from torch.optim import Adam

from client.intake.glucose import prepare_glucose
from client.intake.glucose_formats import CsvMapping
from client.intake.pseudonyms import SECRET_BYTES, PatientIdentity, pseudonym
from client.trained import Trained
from shared.errors import IntakeError, StorageError
from shared.files import storage_errors, write_atomic
from shared.forecast_metrics import pinball
from shared.personal import save_personal
from shared.records import RecordStore
from shared.tasks.base import Batch
from shared.tasks.cgm import STEP_MIN
from shared.tasks.cgm_windows import HORIZON, JUDGED, Rows, segment_edges
from shared.tasks.glucose_forecast import HISTORY, TASK, forecast, readings_at

MOST_CHECKS: Final = 10
STEPS_A_CHECK: Final = 20
_WINDOWS: Final = 64
_RATE: Final = 1e-3
_SEED: Final = 0
_AT_30: Final = 30 // STEP_MIN - 1


@dataclass(frozen=True)
class Gain:
    """What personalising brings, on the last readings of the patient's last segment.

    Attributes:
        rmse_30: At 30 minutes, mg/dL, of the global and of the personal model.
        pinball: Mean pinball loss of the whole path, mg/dL, of both.
        windows: How many forecasts were judged.
        steps: Optimizer steps; 0 if no length of training helped before the test, so that both models are one.
    """

    rmse_30: tuple[float, float]
    pinball: tuple[float, float]
    windows: int
    steps: int


def read_patient(export: Path, patient: str, mapping: CsvMapping | None = None) -> RecordStore:
    """Return one patient's prepared record.

    Raises:
        IntakeError: If the export cannot be read or has no such patient with a long enough segment.
        StorageError: If nothing can be written for a while.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    with tempfile.TemporaryDirectory(prefix="fedward-") as folder, storage_errors(Path(folder)):
        prepare_glucose(export, Path(folder) / "store", secret, mapping=mapping)
        store = RecordStore.open(Path(folder) / "store")
        names = [pseudonym(secret, PatientIdentity(issuer, patient)) for issuer in ("", "file")]
        rows = [row for row in range(len(store)) if store.keys[row].tobytes() in names]
        if len(rows) != 1:
            raise IntakeError("The export has no such patient, or none with a long enough segment. Check --patient.")
        return store.subset(np.array(rows))


def personalise(model: nn.Module, record: RecordStore) -> tuple[nn.Module, Gain]:
    """Return the patient's own model and what it gains; ``model`` is left as it is.

    Args:
        model: The global model.
        record: Store of one patient.

    Raises:
        IntakeError: If the last segment is too short, or there is too little to learn from.
    """
    first, end = (edges[-1] for edges in segment_edges(record))
    split = int(end) - 2 * JUDGED
    learn = _rows(record, split)
    if split - int(first) < HISTORY or len(learn) < _WINDOWS:
        raise IntakeError(
            "The patient's record is too short to learn from and to judge by; give more days of readings."
        )
    decide = np.arange(split, end - JUDGED - HORIZON + 1)
    test = np.arange(end - JUDGED, end - HORIZON + 1)
    tuned, best, steps = copy.deepcopy(model), copy.deepcopy(model), 0
    least = _judge(model, record, decide)[1]
    optimizer, generator = Adam(tuned.parameters(), lr=_RATE), Generator().manual_seed(_SEED)
    for check in range(1, MOST_CHECKS + 1):
        _train(tuned, optimizer, record, learn, generator)
        if (loss := _judge(tuned, record, decide)[1]) < least:
            least, best, steps = loss, copy.deepcopy(tuned), check * STEPS_A_CHECK
    before, after = _judge(model, record, test), _judge(best, record, test)
    return best.eval(), Gain((before[0], after[0]), (before[1], after[1]), len(test), steps)


def write_personal(out: Path, model: nn.Module, patient: str, base: Trained) -> None:
    """Write the patient's model and the JSON beside it, for the owner's eyes only.

    Raises:
        StorageError: If a file of the name exists or cannot be written.
    """
    sidecar = out.with_suffix(".json")
    if out.suffix != ".safetensors" or out.exists() or sidecar.exists():
        raise StorageError(f"{out.name} must be a new file called *.safetensors. Name another.")
    content, salt = save_personal(model.state_dict()), secrets.token_bytes(SECRET_BYTES)
    described = {
        "task": TASK.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "personal": True,
        "base": base.sha256,
        "salt": salt.hex(),
        "patient": pseudonym(salt, PatientIdentity("", patient)).hex(),
    }
    for path, text in ((out, content), (sidecar, json.dumps(described, indent=1).encode())):
        write_atomic(path, text, private=True)


def _rows(record: RecordStore, split: int) -> Rows:
    """Return the records at which a path to learn begins: all of it and its history before ``split``."""
    edges = zip(*segment_edges(record), strict=True)
    parts = [np.arange(first + HISTORY, min(int(end), split) - HORIZON + 1) for first, end in edges]
    return np.concatenate(parts)


def _train(model: nn.Module, optimizer: Adam, record: RecordStore, rows: Rows, generator: Generator) -> None:
    """Take ``STEPS_A_CHECK`` steps on windows drawn from ``rows``."""
    glucose = np.asarray(record.arrays["glucose"], np.float32)
    for _ in range(STEPS_A_CHECK):
        drawn = rows[torch.randint(len(rows), (_WINDOWS,), generator=generator).numpy()]
        path = torch.from_numpy(glucose[drawn[:, None] + np.arange(HORIZON)])
        optimizer.zero_grad()
        TASK.loss(model, Batch({"readings": readings_at(record, drawn)[None], "path": path[None]})).sum().backward()
        optimizer.step()


def _judge(model: nn.Module, record: RecordStore, rows: Rows) -> tuple[float, float]:
    """Return RMSE at 30 minutes and pinball loss of the forecasts that begin at ``rows``."""
    quantiles = forecast(model, readings_at(record, rows))
    truth = np.asarray(record.arrays["glucose"], np.float64)[rows[:, None] + np.arange(HORIZON)]
    error = quantiles[:, _AT_30, 1] - truth[:, _AT_30]
    return float(np.sqrt((error**2).mean())), pinball(quantiles, truth)
