"""What a glucose forecaster is compared with: no change, a straight line, an autoregression, ARIMA.

Each is judged on the very windows of the network (ARIMA on a sample of them, for it is fitted anew to each), with the
metrics of :func:`shared.tasks.glucose_forecast.judge_windows`. Where a method has no width of its own, its 0.05 and
0.95 quantiles are those of its errors on the hospital's training windows, step by step. All without privacy.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shared.errors import IntakeError
from shared.evaluation import Evaluation
from shared.forecast_metrics import QUANTILES
from shared.records import RecordStore
from shared.tasks.cgm_windows import HORIZON, Windows, window_starts
from shared.tasks.glucose_forecast import judge_windows, usable_windows

LAGS: Final = 24
"""Readings of the autoregression: two hours; more changes little (docs/glucose.md)."""
ARIMA_ORDER: Final = (2, 1, 1)
ARIMA_WINDOWS: Final = 100
"""Windows of each hospital that ARIMA is judged on, evenly spaced among all."""
_ARIMA_ITERATIONS: Final = 50
_RIDGE: Final = 1.0
_LEVEL_MG_DL: Final = 120.0
_LINE_READINGS: Final = 4
_TRAINING_WINDOWS: Final = 40_000
Matrix = npt.NDArray[np.float64]
Method = Callable[[Matrix], Matrix]
"""Forecasts paths ``(W, HORIZON)`` from histories ``(W, H)`` without gaps."""


def simple_forecasts(training: Mapping[str, RecordStore], judged: RecordStore) -> dict[str, Any]:
    """Return the baselines that fit nothing: no change, and a straight line; see :func:`forecast_baselines`."""
    samples, windows = _samples(training, judged)
    everybody = _everybody(samples)
    methods: dict[str, Callable[[str], Method]] = {
        "last_value": lambda _: last_value,
        "linear_extrapolation": lambda _: straight_line,
    }
    return {name: describe(_judged(choose, samples, everybody, windows)) for name, choose in methods.items()}


def forecast_baselines(training: Mapping[str, RecordStore], judged: RecordStore) -> dict[str, Any]:
    """Return the baselines as the registry keeps them: metrics, and under ``by_site`` each hospital's.

    Args:
        training: Each hospital's training part; the names are those of the judged store.
        judged: The readings to judge on, of all hospitals.

    Raises:
        IntakeError: If the judged store does not say which hospital a record comes from.
    """
    samples, windows = _samples(training, judged)
    everybody = _everybody(samples)
    pooled = autoregression(everybody)
    methods: dict[str, Callable[[str], Method]] = {
        "linear_ar": lambda name: autoregression(samples[name] if len(samples[name]) else everybody),
        "linear_ar_pooled": lambda _: pooled,
    }
    results = {name: describe(_judged(choose, samples, everybody, windows)) for name, choose in methods.items()}
    return {**simple_forecasts(training, judged), **results, "arima": describe(judge_arima(windows, ARIMA_WINDOWS))}


def _samples(training: Mapping[str, RecordStore], judged: RecordStore) -> tuple[dict[str, Matrix], Windows]:
    """Return each hospital's training windows, and the windows to judge on."""
    windows = usable_windows(judged)
    if set(windows.sites) != set(training):
        raise IntakeError("The judged readings are not of the hospitals that train; give no --heldout for this task.")
    return {name: training_windows(store, LAGS) for name, store in training.items()}, windows


def _everybody(samples: Mapping[str, Matrix]) -> Matrix:
    return np.concatenate([sample for sample in samples.values() if len(sample)])


def training_windows(store: RecordStore, history: int) -> Matrix:
    """Return windows ``(N, history + HORIZON)`` of a training part, evenly spaced if there are very many."""
    starts, _ = window_starts(store, history + HORIZON)
    chosen = starts[:: max(1, len(starts) // _TRAINING_WINDOWS)]
    windows: Matrix = store.arrays["glucose"][chosen[:, None] + np.arange(history + HORIZON)].astype(np.float64)
    return windows


def last_value(history: Matrix) -> Matrix:
    """Forecast that nothing changes."""
    return np.repeat(history[:, -1:], HORIZON, axis=1)


def straight_line(history: Matrix) -> Matrix:
    """Go on from the last reading with the slope of the least-squares line through the last readings."""
    x = np.arange(_LINE_READINGS) - (_LINE_READINGS - 1) / 2
    slope = history[:, -_LINE_READINGS:] @ x / (x @ x)
    return history[:, -1:] + slope[:, None] * np.arange(1, HORIZON + 1)


def autoregression(windows: Matrix, ridge: float = _RIDGE) -> Method:
    """Fit a ridge regression of the path's changes on the readings before it, and return its forecast.

    Args:
        windows: ``(N, L + HORIZON)``; L readings are looked at.
        ridge: Penalty on the squared coefficients.
    """
    lags = windows.shape[1] - HORIZON
    inputs, changes = _regressors(windows[:, :lags]), windows[:, lags:] - windows[:, lags - 1 : lags]
    weights = np.linalg.solve(inputs.T @ inputs + ridge * np.eye(lags + 1), inputs.T @ changes)
    return lambda history: history[:, -1:] + _regressors(history[:, -lags:]) @ weights


def _regressors(history: Matrix) -> Matrix:
    """Return differences from the last reading, the level, and one."""
    last = history[:, -1:]
    return np.concatenate([history[:, :-1] - last, last - _LEVEL_MG_DL, np.ones_like(last)], axis=1)


def judge_arima(windows: Windows, each: int) -> Evaluation:
    """Judge ARIMA, fitted to each window's history alone, on ``each`` windows of every hospital."""
    chosen = np.concatenate([_evenly(np.flatnonzero(windows.site == code), each) for code in np.unique(windows.site)])
    sample = windows.subset(chosen)
    quantiles = np.stack([arima(history[np.isfinite(history)]) for history in sample.history])
    return judge_windows(quantiles, sample)


def arima(history: npt.NDArray[np.floating[Any]]) -> Matrix:
    """Return quantiles ``(HORIZON, 3)`` of an ARIMA fitted to one history; no change where it cannot be fitted."""
    from statsmodels.tsa.arima.model import ARIMA  # noqa: PLC0415 - takes seconds to import

    readings = history.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of starting values and convergence, window by window
        try:
            coming = (
                ARIMA(readings, order=ARIMA_ORDER)
                .fit(method_kwargs={"maxiter": _ARIMA_ITERATIONS})
                .get_forecast(HORIZON)
            )
            low, high = coming.conf_int(alpha=0.1).T
        except (ValueError, np.linalg.LinAlgError):
            return np.full((HORIZON, len(QUANTILES)), readings[-1])
    return np.stack([low, coming.predicted_mean, high], axis=-1)


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as the registry keeps a baseline."""
    return {**evaluation.metrics, "by_site": evaluation.details.get("by_site", {})}


def _judged(
    choose: Callable[[str], Method], samples: Mapping[str, Matrix], everybody: Matrix, windows: Windows
) -> Evaluation:
    """Forecast every hospital's windows with its own method and the width that its training errors had."""
    quantiles = np.full((len(windows), HORIZON, len(QUANTILES)), np.nan)
    for code, name in enumerate(windows.sites):
        mine = windows.site == code
        method = choose(name)
        sample = samples[name] if len(samples[name]) else everybody
        errors = sample[:, LAGS:] - method(sample[:, :LAGS])
        low, _, high = np.quantile(errors, QUANTILES, axis=0)
        middle = method(windows.history[mine].astype(np.float64)[:, -LAGS:])
        quantiles[mine] = np.stack([middle + np.minimum(low, 0.0), middle, middle + np.maximum(high, 0.0)], axis=-1)
    return judge_windows(quantiles, windows)


def _evenly(indices: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    return indices[np.unique(np.linspace(0, len(indices) - 1, most).round().astype(int))] if len(indices) else indices
