"""A hospital's patients are opened before a round, not within it: the time it takes would tell how many records."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, Metadata, RecordDict

import client.patients
from client.app import SITE_FOLDER, SiteApp
from client.config import SitePolicy
from client.folder import open_books
from client.patients import Patients
from shared.messages import TrainRequest
from shared.plan import RunPlan
from shared.records import RecordStore, store_path
from shared.tasks.base import PatientDataset
from shared.tasks.registry import find_task
from shared.weights import pack

TASK = find_task("nodule-classification")
PLAN = RunPlan(
    task=TASK.name,
    rounds=3,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.5,
)


@pytest.fixture
def folder(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> Path:
    make_nodule_store(store_path(tmp_path, TASK.store_kind), patients=12)
    policy = SitePolicy(name="h1", declared_patients=10, tasks=(TASK.name,), max_epsilon=50.0, max_delta=0.01)
    policy.write(tmp_path / "site.toml")
    open_books(tmp_path)
    return tmp_path


def train(app: SiteApp, folder: Path, number: int) -> Message:
    envelope = Message(content=RecordDict(), metadata=Metadata(1, f"m{number}", 1, 5, "", "g", 0.0, 3600.0, "train"))  # type: ignore[call-overload]
    weights = np.zeros_like(pack(TASK.build()))
    message = Message(TrainRequest("run", number, PLAN, weights).to_content(), reply_to=envelope)
    message.metadata.__dict__["_message_type"] = "train"
    return app(message, Context(1, 5, {SITE_FOLDER: str(folder)}, RecordDict(), {}))


def test_a_prepared_daemon_opens_and_indexes_nothing_within_a_round(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, opened = SiteApp(), []
    real = client.patients.open_store

    def opening(*arguments: Any) -> RecordStore:
        opened.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(client.patients, "open_store", opening)
    app.prepare(folder)
    assert len(opened) == 1
    for number in (1, 2):
        assert not train(app, folder, number).has_error()
    assert len(opened) == 1


def test_what_a_task_draws_from_is_kept_until_the_store_is_replaced(
    folder: Path, make_nodule_store: Callable[..., RecordStore]
) -> None:
    patients = Patients()
    first: PatientDataset = patients.of_task(folder, TASK)
    assert patients.of_task(folder, TASK) is first
    path = store_path(folder, TASK.store_kind)
    shutil.rmtree(path)
    make_nodule_store(path, patients=5)
    second = patients.of_task(folder, TASK)
    assert (len(first), len(second)) == (12, 5)
    assert patients.of_task(folder, TASK) is second
