"""The forecaster and its task: ordered quantiles, public scales, nobody mixed, hospitals named."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, nn

from shared.errors import StorageError
from shared.models.recurrent import GlucoseForecaster
from shared.records import RecordStore
from shared.tasks.cgm_windows import HORIZON, JUDGED
from shared.tasks.glucose_forecast import HISTORY, TASK, evaluate, forecast, judge_windows, readings_at, usable_windows

Maker = Callable[..., RecordStore]
CELLS = pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])


def some_readings(count: int = 5) -> torch.Tensor:
    generator = Generator().manual_seed(0)
    readings = torch.rand(count, HISTORY, 4, generator=generator)
    return readings * torch.tensor([200.0, 5.0, 60.0, 1439.0]) + torch.tensor([50.0, 0.0, 0.0, 0.0])


def shaken(model: nn.Module) -> nn.Module:
    """Give every weight a value, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@CELLS
def test_quantiles_are_ordered_whatever_the_weights(cell: type[nn.RNNBase]) -> None:
    quantiles = shaken(GlucoseForecaster(cell))(some_readings())
    assert quantiles.shape == (5, HORIZON, 3)
    assert (quantiles.diff(dim=-1) >= 0).all()


@CELLS
def test_fresh_weights_forecast_the_last_reading(cell: type[nn.RNNBase]) -> None:
    readings = some_readings()
    middle = GlucoseForecaster(cell)(readings)[..., 1]
    torch.testing.assert_close(middle, readings[:, -1:, 0].expand(-1, HORIZON))


def test_covariates_begin_without_a_say_and_get_one() -> None:
    model, readings = GlucoseForecaster(), some_readings()
    bare = readings * torch.tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(model(readings), model(bare))
    assert not torch.allclose(shaken(model)(readings), model(bare))


def test_the_time_of_day_counts_only_where_the_model_has_a_clock() -> None:
    early, late = some_readings(), some_readings()
    late[..., 3] = (late[..., 3] + 600) % 1440
    without, within = shaken(GlucoseForecaster()), shaken(GlucoseForecaster(clock=True))
    torch.testing.assert_close(without(early), without(late))
    assert not torch.allclose(within(early), within(late))


def test_a_batch_holds_windows_of_the_chosen_patients_only(make_cgm_store: Maker, tmp_path: Path) -> None:
    store = make_cgm_store(tmp_path / "store", patients=3)
    own = {n: set(np.asarray(store.arrays["glucose"][store.offsets[n] : store.offsets[n + 1]])) for n in range(3)}
    batch = TASK.load(store).draw(torch.tensor([2, 0]), 6, Generator().manual_seed(0))
    assert batch["readings"].shape == (2, 6, HISTORY, 4)
    assert batch["path"].shape == (2, 6, HORIZON)
    for row, patient in enumerate([2, 0]):
        assert set(batch["readings"][row, ..., 0].ravel().numpy()) <= own[patient]
        assert set(batch["path"][row].ravel().numpy()) <= own[patient]


def test_a_path_follows_its_readings(make_cgm_store: Maker, tmp_path: Path) -> None:
    store = make_cgm_store(tmp_path / "store", patients=1, segments=(400,), noise=0.0)
    glucose = np.asarray(store.arrays["glucose"]).tolist()
    batch = TASK.load(store).draw(torch.tensor([0]), 5, Generator().manual_seed(0))
    for readings, path in zip(batch["readings"][0], batch["path"][0], strict=True):
        at = glucose.index(readings[0, 0].item())
        assert glucose[at : at + HISTORY + HORIZON] == [*readings[:, 0].tolist(), *path.tolist()]


def test_patients_without_a_window_are_nobody(make_cgm_store: Maker, tmp_path: Path) -> None:
    assert len(TASK.load(make_cgm_store(tmp_path / "short", segments=(HISTORY + HORIZON - 1,)))) == 0


def with_sites(store: RecordStore) -> RecordStore:
    site = (store.patient_of_record % 2).astype(np.int16)
    attributes = {**store.attributes, "sites": ["north", "south"]}
    return replace(store, attributes=attributes, arrays={**store.arrays, "site": site})


def test_the_evaluation_tells_hospitals_apart_and_names_the_worst(make_cgm_store: Maker, tmp_path: Path) -> None:
    store = with_sites(make_cgm_store(tmp_path / "store"))
    windows = usable_windows(store)
    truth = np.repeat(windows.path[..., None].astype(float), 3, axis=-1)
    truth[windows.site == 1] += 30.0
    evaluation = judge_windows(truth, windows)
    by_site = evaluation.details["by_site"]
    assert by_site["north"]["rmse_30"] == 0.0
    assert by_site["south"]["rmse_30"] == pytest.approx(30.0)
    assert evaluation.details["worst_site"] == "south"
    assert evaluation.value("rmse_60") == pytest.approx(30.0 / math.sqrt(2))
    assert set(by_site["north"]) == set(evaluation.metrics)


def test_the_error_by_patient_is_a_spread_that_names_nobody(make_cgm_store: Maker, tmp_path: Path) -> None:
    windows = usable_windows(make_cgm_store(tmp_path / "store", patients=5))
    forecasts = windows.path[..., None].astype(float) + 10.0 * windows.patient[:, None, None] + np.zeros(3)
    spread = judge_windows(forecasts, windows).details["rmse_30_of_patients"]
    assert spread["50"] == pytest.approx(20.0)
    assert spread["5"] == pytest.approx(2.0)
    assert list(spread) == ["5", "25", "50", "75", "95"]


def test_the_spread_over_patients_is_told_by_hospital_but_not_of_a_few_people(
    make_cgm_store: Maker, tmp_path: Path
) -> None:
    windows = usable_windows(with_sites(make_cgm_store(tmp_path / "store", patients=9)))
    forecasts = windows.path[..., None].astype(float) + 10.0 * windows.patient[:, None, None] + np.zeros(3)
    by_site = judge_windows(forecasts, windows).details["rmse_30_of_patients_by_site"]
    assert by_site["north"]["50"] == pytest.approx(40.0)  # of patients 0, 2, 4, 6, 8
    assert by_site["north"]["95"] == pytest.approx(76.0)
    assert by_site["south"] == {}
    alone = windows.subset(windows.patient == 3)
    assert judge_windows(forecasts[windows.patient == 3], alone).details["rmse_30_of_patients"] == {}


def test_examples_are_readings_of_people() -> None:
    readings = TASK.example(200)
    assert readings.shape == (200, HISTORY, 4)
    glucose, insulin, carbohydrate, minute = readings.unbind(-1)
    assert ((glucose >= 60) & (glucose <= 300)).all()
    for doses, most in ((insulin, 8), (carbohydrate, 80)):
        assert 0 < (doses > 0).float().mean() < 0.1
        assert doses.max() <= most
    assert ((minute >= 0) & (minute < 1440)).all()


def test_only_the_last_readings_of_a_segment_are_judged(make_cgm_store: Maker, tmp_path: Path) -> None:
    store = make_cgm_store(tmp_path / "store", patients=1, segments=(300,))
    model = shaken(TASK.build()).eval()
    before = evaluate(model, store).metrics
    glucose = np.array(store.arrays["glucose"])
    glucose[: 300 - JUDGED - HISTORY] += 50.0
    unchanged = evaluate(model, replace(store, arrays={**store.arrays, "glucose": glucose})).metrics
    assert unchanged == pytest.approx(before, nan_ok=True)
    glucose[-1] += 50.0
    changed = evaluate(model, replace(store, arrays={**store.arrays, "glucose": glucose})).metrics
    assert changed["rmse_60"] != pytest.approx(before["rmse_60"])


def test_a_forecast_does_not_depend_on_the_others_in_its_batch(make_cgm_store: Maker, tmp_path: Path) -> None:
    store = make_cgm_store(tmp_path / "store")
    readings, model = readings_at(store, usable_windows(store).rows), shaken(TASK.build()).eval()
    np.testing.assert_allclose(forecast(model, readings)[3:4], forecast(model, readings[3:4]), rtol=1e-5)


def test_a_store_with_too_short_segments_cannot_be_judged(make_cgm_store: Maker, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="long enough"):
        evaluate(TASK.build(), make_cgm_store(tmp_path / "store", segments=(40,)))
