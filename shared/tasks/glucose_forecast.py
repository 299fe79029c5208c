"""Task ``glucose-forecast``: where will a patient's glucose be over the next hour?

A record of training is a window: ``HISTORY`` readings and the ``HORIZON`` that followed. The loss is the pinball loss
of three quantiles, so that a forecast has a width; its middle is a median, which occasional sensor faults move little.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor, nn

from shared.errors import StorageError
from shared.evaluation import Evaluation
from shared.forecast_metrics import QUANTILES, by_part, judge
from shared.models.recurrent import GLUCOSE_SCALE, GlucoseForecaster
from shared.records import RecordStore
from shared.tasks.base import Batch, Task
from shared.tasks.cgm import STEP_MIN, STORE_KIND
from shared.tasks.cgm_windows import HORIZON, STRIDE, Rows, Windows, judged_windows, window_starts
from shared.tasks.sampling import draw_records

HISTORY: Final = 36
"""Readings a forecast looks back on: three hours."""
INPUTS: Final = ("glucose", "insulin", "carbohydrate", "minute_of_day")
_EVALUATION_BATCH = 2048
_PATIENT_PERCENTILES: Final = (5, 25, 50, 75, 95)
_FEWEST_PATIENTS: Final = 5
"""Of fewer, a percentile is hardly more than one person's own figure."""


@dataclass(frozen=True)
class GlucosePatients:
    """Patients of a ``cgm-5min`` store; a patient's records are the windows that fit into that patient's segments."""

    store: RecordStore

    @cached_property
    def _starts(self) -> tuple[Rows, Rows]:
        """First records of all windows, and which are whose, among the patients who have any."""
        starts, offsets = window_starts(self.store, HISTORY + HORIZON)
        owned = np.diff(offsets)
        return starts, np.concatenate([[0], np.cumsum(owned[owned > 0])]).astype(np.int64)

    def __len__(self) -> int:
        """Return the number of patients who have a window."""
        return len(self._starts[1]) - 1

    @cached_property
    def keys(self) -> npt.NDArray[np.uint8]:
        """The pseudonyms ``(N, 16)`` of the patients who have a window."""
        starts, offsets = self._starts
        return self.store.keys[self.store.patient_of_record[starts[offsets[:-1]]]]

    def draw(self, patients: Tensor, records_per_patient: int, generator: Generator) -> Batch:
        """Draw ``readings`` ``(B, K, HISTORY, 4)`` and the ``path`` ``(B, K, HORIZON)`` that followed each."""
        starts, offsets = self._starts
        first = starts[draw_records(offsets, patients, records_per_patient, generator)]
        path = np.asarray(self.store.arrays["glucose"], np.float32)[first[..., None] + HISTORY + np.arange(HORIZON)]
        return Batch({"readings": readings_at(self.store, first + HISTORY), "path": torch.from_numpy(path)})


def readings_at(store: RecordStore, rows: Rows, history: int = HISTORY) -> Tensor:
    """Return the readings ``(..., history, 4)`` before each row ``(...)``, as the model takes them."""
    back = rows[..., None] + np.arange(-history, 0)
    return torch.from_numpy(np.stack([np.asarray(store.arrays[name][back], np.float32) for name in INPUTS], axis=-1))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return each patient's mean pinball loss ``(B,)``, in units of ``GLUCOSE_SCALE``."""
    path = batch["path"]
    each = pinball_loss(model(batch["readings"].flatten(0, 1)), path.flatten(0, 1))
    return each.view(path.shape[:2]).mean(dim=1)


def pinball_loss(quantiles: Tensor, path: Tensor) -> Tensor:
    """Return each window's pinball loss ``(W,)`` of quantiles ``(W, HORIZON, 3)``, in units of ``GLUCOSE_SCALE``."""
    levels = quantiles.new_tensor(QUANTILES)
    above = (path[..., None] - quantiles) / GLUCOSE_SCALE
    return torch.maximum(levels * above, (levels - 1.0) * above).mean(dim=(1, 2))


@torch.no_grad()
def forecast(model: nn.Module, readings: Tensor) -> npt.NDArray[np.float64]:
    """Return quantiles ``(W, HORIZON, 3)`` in mg/dL of readings ``(W, T, 4)``."""
    device = next(model.parameters()).device
    parts = [model(part.to(device)).cpu() for part in readings.split(_EVALUATION_BATCH)]
    return torch.cat(parts).double().numpy()


def random_patients(patients: int, records: int, generator: Generator) -> Batch:
    """Return random walks in place of glucose, with random doses; see :class:`shared.tasks.base.Task`."""
    shape = (patients, records, HISTORY + HORIZON)
    glucose = (140.0 + 6.0 * torch.randn(shape, generator=generator).cumsum(-1)).clamp(40.0, 400.0)
    doses = 3.0 * torch.rand(patients, records, HISTORY, 2, generator=generator)
    start = torch.randint(0, 1440, (patients, records, 1), generator=generator)
    minute = (start + STEP_MIN * torch.arange(HISTORY)) % 1440
    readings = torch.cat([glucose[..., :HISTORY, None], doses, minute[..., None].float()], dim=-1)
    return Batch({"readings": readings, "path": glucose[..., HISTORY:].contiguous()})


def evaluate(model: nn.Module, store: RecordStore) -> Evaluation:
    """Judge the forecasts inside the last readings of every segment; see :mod:`shared.tasks.cgm_windows`."""
    windows = usable_windows(store)
    return judge_windows(forecast(model, readings_at(store, windows.rows)), windows)


def usable_windows(store: RecordStore) -> Windows:
    """Return the judged windows that have as much history as the model looks at.

    Raises:
        StorageError: If there is none.
    """
    windows = judged_windows(store)
    windows = windows.subset(np.isfinite(windows.history[:, -HISTORY]))
    if not len(windows):
        raise StorageError("No segment is long enough to judge a forecast in; give more days of readings.")
    return windows


def judge_windows(quantiles: npt.NDArray[Any], windows: Windows) -> Evaluation:
    """Return the evaluation of any forecast ``(W, HORIZON, 3)``: overall, by patient and, where known, by hospital."""
    truth, last = windows.path.astype(np.float64), windows.history[:, -1].astype(np.float64)
    at = 30 // STEP_MIN - 1
    squared = (quantiles[:, at, 1] - truth[:, at]) ** 2
    details: dict[str, Any] = {"rmse_30_of_patients": _spread(squared, windows.patient)}
    if windows.sites:
        by_site = by_part(quantiles, truth, last, STRIDE, windows.site, windows.sites)
        details["by_site"] = by_site
        details["worst_site"] = min(by_site, key=lambda site: by_site[site]["skill_30"])
        mine = {name: windows.site == code for code, name in enumerate(windows.sites) if name in by_site}
        details["rmse_30_of_patients_by_site"] = {
            name: _spread(squared[chosen], windows.patient[chosen]) for name, chosen in mine.items()
        }
    return Evaluation(metrics=judge(quantiles, truth, last, STRIDE), details=details)


def _spread(squared: npt.NDArray[np.float64], patient: Rows) -> dict[str, float]:
    """Return percentiles, over the patients, of each patient's root mean square; nothing of too few patients.

    Nobody is named: only how the error is spread.

    Args:
        squared: ``(W,)`` squared errors.
        patient: ``(W,)`` whose they are.
    """
    counts = np.bincount(patient)
    theirs = np.bincount(patient, weights=squared)[counts > 0] / counts[counts > 0]
    if len(theirs) < _FEWEST_PATIENTS:
        return {}
    errors = np.percentile(np.sqrt(theirs), _PATIENT_PERCENTILES)
    return dict(zip(map(str, _PATIENT_PERCENTILES), errors.tolist(), strict=True))


def example(count: int) -> Tensor:
    """Return ``count`` made-up readings ``(count, HISTORY, 4)`` in the units of the model's inputs."""
    readings = torch.rand(count, HISTORY, len(INPUTS))
    readings[..., 0] = 60.0 + 240.0 * readings[..., 0]
    # Most instants have no dose and no meal.
    readings[..., 1:3] *= torch.tensor([8.0, 80.0]) * (torch.rand(count, HISTORY, 2) < 0.05)
    readings[..., 3] = torch.floor(1440.0 * readings[..., 3])
    return readings


TASK = Task(
    name="glucose-forecast",
    store_kind=STORE_KIND,
    metric="skill_30",
    build=GlucoseForecaster,
    load=GlucosePatients,
    loss=loss,
    random_patients=random_patients,
    evaluate=evaluate,
    example=example,
    records_at_once=256,
    defaults={
        "rounds": 30,
        "local_steps": 8,
        "sample_rate": 1.0,
        "records_per_patient": 4,
        "max_grad_norm": 0.02,
        "optimizer": "sgd",
        "learning_rate": 5.0,
        "schedule": "linear",
    },
)
