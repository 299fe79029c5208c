"""The simple methods on series where the answer is known, and the protocol against published numbers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.intake.glucose import prepare_glucose
from shared.errors import IntakeError
from shared.records import RecordStore
from shared.tasks.cgm_windows import HORIZON, split_in_time
from shared.tasks.glucose_forecast import usable_windows
from simulations.forecast_baselines import (
    LAGS,
    arima,
    autoregression,
    forecast_baselines,
    judge_arima,
    last_value,
    straight_line,
    training_windows,
)

Maker = Callable[..., RecordStore]


def test_a_straight_line_goes_on() -> None:
    line = 100.0 + 2.0 * np.arange(30)[None] * np.array([[1.0], [-1.0]])
    ahead = np.arange(1, HORIZON + 1)
    np.testing.assert_allclose(straight_line(line), [158.0 + 2.0 * ahead, 42.0 - 2.0 * ahead])
    np.testing.assert_allclose(last_value(line), [[158.0] * HORIZON, [42.0] * HORIZON])


def autoregressive(steps: int, seed: int = 0) -> np.ndarray:
    """Return a series of which each value is 100 plus 1.6 and -0.65 times the last two deviations, and noise."""
    noise = np.random.default_rng(seed).normal(0, 2, steps)
    series = np.zeros(steps)
    for t in range(2, steps):
        series[t] = 1.6 * series[t - 1] - 0.65 * series[t - 2] + noise[t]
    return 100.0 + series


def expected_path(series: np.ndarray) -> np.ndarray:
    path = list(series[-2:] - 100.0)
    for _ in range(HORIZON):
        path.append(1.6 * path[-1] - 0.65 * path[-2])
    return 100.0 + np.array(path[2:])


def test_the_autoregression_finds_the_process_that_made_the_data() -> None:
    windows = np.lib.stride_tricks.sliding_window_view(autoregressive(40_000), LAGS + HORIZON)
    fresh = autoregressive(400, seed=1)
    forecast = autoregression(windows)(fresh[None])
    np.testing.assert_allclose(forecast[0], expected_path(fresh), atol=0.6)


def test_arima_finds_it_from_one_history_and_has_a_width() -> None:
    fresh = autoregressive(600, seed=2)
    quantiles = arima(fresh)
    assert quantiles.shape == (HORIZON, 3)
    assert abs(quantiles[0, 1] - expected_path(fresh)[0]) < 1.0
    assert (np.diff(quantiles, axis=1) > 0).all()
    assert (np.diff(quantiles[:, 2] - quantiles[:, 0]) > 0).all()


def test_arima_says_no_change_where_it_cannot_be_fitted() -> None:
    assert np.isfinite(arima(np.full(144, 110.0))).all()


def federation(make: Maker, folder: Path) -> tuple[dict[str, RecordStore], RecordStore]:
    store = make(folder / "store", segments=(400, 300))
    training, judged = split_in_time(store)
    site = (judged.patient_of_record % 2).astype(np.int16)
    attributes = {**judged.attributes, "sites": ["north", "south"]}
    judged = replace(judged, attributes=attributes, arrays={**judged.arrays, "site": site})
    parts = {name: training.subset(np.arange(n, len(training), 2)) for n, name in enumerate(["north", "south"])}
    return parts, judged


def test_every_method_has_the_same_keys_overall_and_by_hospital(
    make_cgm_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.forecast_baselines.ARIMA_WINDOWS", 2)
    found = forecast_baselines(*federation(make_cgm_store, tmp_path))
    assert list(found) == ["last_value", "linear_extrapolation", "linear_ar", "linear_ar_pooled", "arima"]
    keys = set(found["last_value"])
    for metrics in found.values():
        assert set(metrics) == keys
        assert set(metrics["by_site"]) == {"north", "south"}
        assert set(metrics["by_site"]["north"]) == keys - {"by_site"}
    assert found["last_value"]["skill_30"] == pytest.approx(0.0)
    assert found["linear_ar"]["rmse_30"] < 0.2 * found["linear_extrapolation"]["rmse_30"]
    assert 0.8 < found["linear_ar"]["coverage_90"] < 0.97


def test_arima_is_judged_on_so_many_windows_of_each_hospital(make_cgm_store: Maker, tmp_path: Path) -> None:
    _, judged = federation(make_cgm_store, tmp_path)
    evaluation = judge_arima(usable_windows(judged), each=3)
    assert evaluation.metrics["windows"] == 6
    assert {part["windows"] for part in evaluation.details["by_site"].values()} == {3.0}


def test_judged_readings_of_other_hospitals_are_refused(make_cgm_store: Maker, tmp_path: Path) -> None:
    training, judged = federation(make_cgm_store, tmp_path)
    with pytest.raises(IntakeError, match="hospitals that train"):
        forecast_baselines({"north": training["north"]}, judged)


@pytest.mark.parametrize(
    ("study", "lags", "root_mse", "mae"), [("hall2018", 84, 7.38, 6.33), ("colas2019", 12, 5.26, 4.35)]
)
def test_the_protocol_gives_the_published_linear_numbers(
    real_data: Path, tmp_path: Path, study: str, lags: int, root_mse: float, mae: float
) -> None:
    """GlucoBench's linear regression with its own lags: medians over windows of √MSE and MAE, within 5%."""
    prepare_glucose(real_data / "glucose" / f"{study}.csv.gz", tmp_path / "store", b"secret" * 6)
    training, judged = split_in_time(RecordStore.open(tmp_path / "store"))
    windows = usable_windows(judged)
    fitted = autoregression(training_windows(training, lags))
    error = fitted(windows.history.astype(np.float64)) - windows.path
    assert math.sqrt(np.median((error**2).mean(1))) == pytest.approx(root_mse, rel=0.05)
    assert np.median(np.abs(error).mean(1)) == pytest.approx(mae, rel=0.05)
