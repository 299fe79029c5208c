"""How far RMSE at 30 minutes can be brought below the last value's: ``python -m simulations.forecast_bound EXPORT…``.

For each export a strong ordinary learner, gradient-boosted trees, is fitted to squared errors on that hospital's own
training part: no privacy, no federation, nothing shared between hospitals, thousands of leaves. It sees three hours of
readings, what they say of level, spread and noise, and the time of day; and once more also each patient's usual mean,
spread and half-hourly change, which a federated model cannot know. What it does not reach is not in the readings.
Beside it the ridge autoregression under other definitions of the same number.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingRegressor

from client.intake.glucose import prepare_glucose
from shared.records import RecordStore
from shared.tasks.cgm import STEP_MIN
from shared.tasks.cgm_windows import HORIZON, JUDGED, Rows, segment_edges, split_in_time, window_starts
from shared.tasks.glucose_forecast import HISTORY, usable_windows
from simulations.forecast_baselines import LAGS, autoregression, training_windows
from simulations.scripts import run_script

_AHEAD: Final = 30 // STEP_MIN - 1
_MOST_WINDOWS: Final = 120_000
_DIFFERENCES: Final = 12
Matrix = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def gain(error: Matrix, naive: Matrix) -> float:
    """Return the share by which one root mean square error is below another, errors ``(W,)``."""
    return 1.0 - float(np.sqrt((error**2).mean() / (naive**2).mean()))


def inputs_at(store: RecordStore, rows: Rows) -> Matrix:
    """Return ``(W, F)`` what the trees see of the readings before each row ``(W,)``."""
    glucose = np.asarray(store.arrays["glucose"], np.float64)
    history = glucose[rows[:, None] + np.arange(-HISTORY, 0)]
    last, steps = history[:, -1:], np.diff(history, axis=1)
    noise = np.abs(np.diff(steps, axis=1)).mean(1, keepdims=True)
    spread = [history.std(1, keepdims=True), history.max(1, keepdims=True), history.min(1, keepdims=True)]
    clock = np.asarray(store.arrays["minute_of_day"], np.float64)[rows - 1][:, None]
    return np.hstack(
        [history - last, last, steps[:, -_DIFFERENCES:], *spread, np.abs(steps).mean(1)[:, None], noise, clock]
    )


def habits(store: RecordStore) -> dict[bytes, tuple[float, float, float]]:
    """Return each patient's mean, spread and root mean square half-hourly change in a training part."""
    found = {}
    for patient in range(len(store)):
        own = np.asarray(store.arrays["glucose"][store.offsets[patient] : store.offsets[patient + 1]], np.float64)
        change = own[_AHEAD + 1 :] - own[: -_AHEAD - 1]
        found[store.keys[patient].tobytes()] = (own.mean(), own.std(), float(np.sqrt((change**2).mean())))
    return found


def habits_at(store: RecordStore, rows: Rows, known: dict[bytes, tuple[float, float, float]]) -> Matrix:
    """Return ``(W, 3)`` the habits of whose row it is; those of the middle patient for somebody new."""
    middle = tuple(np.median(list(known.values()), axis=0))
    by_patient = np.array([known.get(key.tobytes(), middle) for key in store.keys])
    return by_patient[store.patient_of_record[rows]]


def changes_at(store: RecordStore, rows: Rows) -> Matrix:
    """Return ``(W,)`` how glucose changes in the 30 minutes after the reading before each row."""
    glucose = np.asarray(store.arrays["glucose"], np.float64)
    return glucose[rows + _AHEAD] - glucose[rows - 1]


def trees(inputs: Matrix, changes: Matrix) -> Any:
    """Fit the trees to squared errors, stopping early on a seventh of the windows."""
    model = HistGradientBoostingRegressor(
        max_iter=400, learning_rate=0.04, min_samples_leaf=100, l2_regularization=10.0, early_stopping=True,
        validation_fraction=0.15, random_state=0,
    )  # fmt: skip
    return model.fit(inputs, changes)


def every_row(store: RecordStore) -> Rows:
    """Return every row of the judged part at which a path and its history fit, not only one in six."""
    first, end = segment_edges(store)
    starts = [np.arange(max(e - JUDGED, f + HISTORY), e - HORIZON + 1) for f, e in zip(first, end, strict=True)]
    return np.concatenate(starts).astype(np.int64)


def bound(training: RecordStore, judged: RecordStore) -> dict[str, float]:
    """Return the shares below the last value of trees and ridge, by what they are and what they are judged on."""
    starts = window_starts(training, HISTORY + HORIZON)[0]
    rows = starts[:: max(1, len(starts) // _MOST_WINDOWS)] + HISTORY
    known, asked = habits(training), usable_windows(judged).rows
    inputs, changes, came = inputs_at(training, rows), changes_at(training, rows), changes_at(judged, asked)
    plain = trees(inputs, changes).predict(inputs_at(judged, asked))
    personal = trees(np.hstack([inputs, habits_at(training, rows, known)]), changes).predict(
        np.hstack([inputs_at(judged, asked), habits_at(judged, asked, known)])
    )
    found = {"trees": gain(plain - came, came), "trees, patients' habits": gain(personal - came, came)}
    return found | _ridge(training, judged, asked)


def _ridge(training: RecordStore, judged: RecordStore, asked: Rows) -> dict[str, float]:
    """Return the autoregression's shares under several definitions."""
    glucose, measured = np.asarray(judged.arrays["glucose"], np.float64), np.asarray(judged.arrays["measured"])
    forecast = autoregression(training_windows(training, LAGS))
    found = {}
    for name, rows in (("ridge", asked), ("ridge, every reading", every_row(judged))):
        history = glucose[rows[:, None] + np.arange(-LAGS, 0)]
        error, naive = glucose[rows + _AHEAD] - forecast(history)[:, _AHEAD], changes_at(judged, rows)
        found[name] = gain(error, naive)
        if name == "ridge":
            read = measured[rows + _AHEAD] & measured[rows - 1]
            found["ridge, measured readings"] = gain(error[read], naive[read])
            patient = judged.patient_of_record[rows]
            found["ridge, mean over patients"] = 1.0 - _mean_over(error, patient) / _mean_over(naive, patient)
    return found


def _mean_over(error: Matrix, patient: Rows) -> float:
    """Return the mean over the patients of their root mean square errors."""
    counts = np.bincount(patient)
    return float(np.sqrt(np.bincount(patient, weights=error**2)[counts > 0] / counts[counts > 0]).mean())


def main() -> None:
    """Print a line for each export."""
    parser = argparse.ArgumentParser(description="Measure what can be foreseen 30 minutes ahead.")
    parser.add_argument("exports", type=Path, nargs="+")
    for export in parser.parse_args().exports:
        with tempfile.TemporaryDirectory() as folder:
            prepare_glucose(export, Path(folder) / "store", bytes(32))
            found = bound(*split_in_time(RecordStore.open(Path(folder) / "store")))
        sys.stdout.write(f"{export.name}: " + ", ".join(f"{name} {share:.1%}" for name, share in found.items()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run_script(main)
