"""The public start: made of made-up records only, and worth having."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from client.monitor.what_if import what_if
from server.checkpoints import load_weights
from shared.records import RecordStore
from shared.tasks.cgm_windows import judged_windows
from shared.tasks.glucose_forecast import TASK
from shared.tasks.registry import find_task
from simulations.sources import find_source
from simulations.warm_start import cohort_store, random_walks, train_start, walk_store, write_start


@pytest.fixture(scope="module")
def walks() -> RecordStore:
    return walk_store(150, np.random.default_rng(99))


def skill(model: nn.Module, store: RecordStore) -> float:
    return TASK.evaluate(model.eval(), store).value("skill_30")


@pytest.mark.parametrize("name", ["glucose-forecast", "glucose-forecast-lstm"])
def test_the_start_that_is_kept_foresees_unseen_processes_and_patients(walks: RecordStore, name: str) -> None:
    path = find_source(name).start
    assert path is not None
    model = find_task(name).build()
    load_weights(path, model)
    cohort = cohort_store(12, np.random.default_rng(98))
    for store, least in ((walks, 0.1), (cohort, 0.2)):
        evaluation = TASK.evaluate(model.eval(), store)
        assert evaluation.value("skill_30") > least
        assert 0.85 < evaluation.value("coverage_90") < 0.95


@pytest.mark.parametrize("name", ["glucose-forecast", "glucose-forecast-lstm"])
def test_what_if_answers_with_the_start_for_everybody_and_as_physiology_demands(name: str) -> None:
    path = find_source(name).start
    assert path is not None
    model = find_task(name).build().eval()
    load_weights(path, model)
    cohort = cohort_store(30, np.random.default_rng(97))
    insulin, food = [], []
    for patient in range(len(cohort)):
        record = cohort.subset(np.array([patient]))
        more_insulin, more_food = what_if(model, record, 2.0, 0.0), what_if(model, record, 0.0, 30.0)
        insulin.append(more_insulin.changed[-1, 1] - more_insulin.as_recorded[-1, 1])
        food.append(more_food.changed[-1, 1] - more_food.as_recorded[-1, 1])
    # Two units lower glucose by some 6 mg/dL within the hour, and 30 g raise it by 28 to 60 (glucose_model).
    assert -12.0 < np.mean(insulin) < -2.0
    assert 20.0 < np.mean(food) < 70.0


def test_training_it_is_repeatable_and_helps(walks: RecordStore) -> None:
    first, second = (train_start(TASK, steps=40, walks=100, cohort=6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert skill(first, walks) > skill(TASK.build(), walks) + 0.02


def test_what_is_written_can_be_started_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train_start(TASK, steps=2, walks=10, cohort=6)
    monkeypatch.setattr("simulations.warm_start.train_start", lambda task, steps: trained)
    digest = write_start(tmp_path / "start.safetensors", TASK.name)
    model = TASK.build()
    assert load_weights(tmp_path / "start.safetensors", model) == digest
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


def test_walks_look_like_glucose() -> None:
    walks = random_walks(400, 288, np.random.default_rng(0))
    assert np.isfinite(walks).all()
    assert 80 < np.median(walks) < 180
    changes = np.abs(np.diff(walks, axis=1))
    assert np.median(changes) < 3.0
    assert len(judged_windows(walk_store(3, np.random.default_rng(0)))) == 3 * 11
