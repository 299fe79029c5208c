"""Fit the global model to one patient's own history, for that patient only, or to all of a hospital, for its own.

There is no privacy in it and none is needed as long as the weights stay where the patients are treated: the file is
readable by its owner only and carries a mark by which no run starts from it (``shared.personal``).

Time divides what is learnt from what is judged: of each patient's last segment the last ``JUDGED`` readings are the
test, as many before them decide how long to train (not at all, if it does not help), everything earlier is learnt from.
"""

import copy
import hashlib
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Generator, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR

from client.intake.glucose import prepare_glucose
from client.intake.glucose_formats import CsvMapping
from client.intake.pseudonyms import SECRET_BYTES, PatientIdentity, pseudonym
from client.trained import EVERYBODY, Trained
from shared.errors import IntakeError, StorageError
from shared.files import storage_errors, write_atomic
from shared.forecast_metrics import pinball
from shared.personal import save_personal
from shared.provenance.sidecar import Sidecar, write_sidecar
from shared.records import RecordStore
from shared.tasks.base import Batch
from shared.tasks.cgm import STEP_MIN
from shared.tasks.cgm_windows import HORIZON, JUDGED, Rows, segment_edges
from shared.tasks.glucose_forecast import HISTORY, TASK, forecast, readings_at

_CHECKS: Final = 10
_SEED: Final = 0
_AT_30: Final = 30 // STEP_MIN - 1


@dataclass(frozen=True)
class _Fitting:
    """How to fit.

    Attributes:
        steps: Optimizer steps between two looks at whether it helps.
        windows: Forecasts learnt from in a step.
        rate: Adam's, at first.
        end: The share of it that is left at last.
    """

    steps: int
    windows: int
    rate: float
    end: float


_ONE, _ALL = _Fitting(20, 64, 1e-3, 1.0), _Fitting(100, 256, 3e-3, 0.0)


@dataclass(frozen=True)
class Gain:
    """What the own model brings, on the last readings of each patient's last segment.

    Attributes:
        rmse_30: At 30 minutes, mg/dL, of the global and of the own model.
        pinball: Mean pinball loss of the whole path, mg/dL, of both.
        windows: How many forecasts were judged.
        steps: Optimizer steps; 0 if no length of training helped before the test, so that both models are one.
    """

    rmse_30: tuple[float, float]
    pinball: tuple[float, float]
    windows: int
    steps: int


def read_patients(export: Path, patient: str | None = None, mapping: CsvMapping | None = None) -> RecordStore:
    """Return one patient's prepared record, or everybody's.

    Raises:
        IntakeError: If the export cannot be read or has no such patient with a long enough segment.
        StorageError: If nothing can be written for a while.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    with tempfile.TemporaryDirectory(prefix="fedward-") as folder, storage_errors(Path(folder)):
        prepare_glucose(export, Path(folder) / "store", secret, mapping=mapping)
        store = RecordStore.open(Path(folder) / "store")
        if patient is None:
            return store.subset(np.arange(len(store)))
        names = [pseudonym(secret, PatientIdentity(issuer, patient)) for issuer in ("", "file")]
        rows = [row for row in range(len(store)) if store.keys[row].tobytes() in names]
        if len(rows) != 1:
            raise IntakeError("The export has no such patient, or none with a long enough segment. Check --patient.")
        return store.subset(np.array(rows))


def personalise(model: nn.Module, records: RecordStore) -> tuple[nn.Module, Gain]:
    """Return the own model and what it gains; ``model`` is left as it is.

    Args:
        model: The global model.
        records: Store of one patient, or of a hospital.

    Raises:
        IntakeError: If the last segments are too short, or there is too little to learn from.
    """
    learn, decide, test = _parts(records)
    how = _ONE if len(records) == 1 else _ALL
    if not len(test) or len(learn) < how.windows:
        raise IntakeError("The record is too short to learn from and to judge by; give more days of readings.")
    tuned, best, steps = copy.deepcopy(model), copy.deepcopy(model), 0
    least = _judge(model, records, decide)[1]
    optimizer, generator = Adam(tuned.parameters(), lr=how.rate), Generator().manual_seed(_SEED)
    falling = LinearLR(optimizer, 1.0, how.end, _CHECKS * how.steps)
    for check in range(1, _CHECKS + 1):
        for _ in range(how.steps):
            _step(
                tuned, optimizer, records, learn[torch.randint(len(learn), (how.windows,), generator=generator).numpy()]
            )
            falling.step()
        if (loss := _judge(tuned, records, decide)[1]) < least:
            least, best, steps = loss, copy.deepcopy(tuned), check * how.steps
    before, after = _judge(model, records, test), _judge(best, records, test)
    return best.eval(), Gain((before[0], after[0]), (before[1], after[1]), len(test), steps)


def write_personal(out: Path, model: nn.Module, patient: str | None, base: Trained) -> None:
    """Write the model of a patient, or of all in the hospital, and the JSON beside it, for the owner's eyes only.

    Raises:
        StorageError: If a file of the name exists or cannot be written.
    """
    sidecar = out.with_suffix(".json")
    if out.suffix != ".safetensors" or out.exists() or sidecar.exists():
        raise StorageError(f"{out.name} must be a new file called *.safetensors. Name another.")
    content, salt = save_personal(model.state_dict()), secrets.token_bytes(SECRET_BYTES)
    described = Sidecar(
        task=TASK.name,
        sha256=hashlib.sha256(content).hexdigest(),
        personal=True,
        base=base.sha256,
        salt=salt.hex(),
        patient=EVERYBODY if patient is None else pseudonym(salt, PatientIdentity("", patient)).hex(),
    )
    write_atomic(out, content, private=True)
    write_sidecar(sidecar, described, private=True)


def _parts(records: RecordStore) -> tuple[Rows, Rows, Rows]:
    """Return the records at which a path begins that is learnt from, that decides, and that is judged.

    A patient whose last segment is too short for all three is learnt from only.
    """
    first, end = segment_edges(records)
    patient = records.patient_of_record[first]
    last = np.append(patient[1:] != patient[:-1], True) & (end - first >= HISTORY + 2 * JUDGED)
    split = end - np.where(last, 2 * JUDGED, 0)
    learn = [np.arange(begin, stop) for begin, stop in zip(first + HISTORY, split - HORIZON + 1, strict=True)]
    decide = [np.arange(begin, begin + JUDGED - HORIZON + 1) for begin in split[last]]
    test = [np.arange(begin, begin + JUDGED - HORIZON + 1) for begin in split[last] + JUDGED]
    return tuple(np.concatenate([np.arange(0), *part]) for part in (learn, decide, test))  # type: ignore[return-value]


def _step(model: nn.Module, optimizer: Adam, records: RecordStore, rows: Rows) -> None:
    """Take a step on the windows whose paths begin at ``rows``."""
    path = torch.from_numpy(np.asarray(records.arrays["glucose"], np.float32)[rows[:, None] + np.arange(HORIZON)])
    optimizer.zero_grad()
    TASK.loss(model, Batch({"readings": readings_at(records, rows)[None], "path": path[None]})).sum().backward()
    optimizer.step()


def _judge(model: nn.Module, record: RecordStore, rows: Rows) -> tuple[float, float]:
    """Return RMSE at 30 minutes and pinball loss of the forecasts that begin at ``rows``."""
    quantiles = forecast(model, readings_at(record, rows))
    truth = np.asarray(record.arrays["glucose"], np.float64)[rows[:, None] + np.arange(HORIZON)]
    error = quantiles[:, _AT_30, 1] - truth[:, _AT_30]
    return float(np.sqrt((error**2).mean())), pinball(quantiles, truth)
