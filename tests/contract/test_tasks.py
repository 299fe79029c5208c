"""What every task must keep; a new task joins by being found."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from shared.dp.passes import Passes
from shared.dp.selftest import Shape, climb
from shared.drafting import draft_plan
from shared.records import RecordStore
from shared.tasks.base import Task
from shared.tasks.registry import all_tasks
from shared.weights import pack, unpack

Maker = Callable[..., RecordStore]
TASKS = list(all_tasks().values())


@pytest.fixture(params=TASKS, ids=lambda task: task.name)
def task(request: pytest.FixtureRequest) -> Task:
    found: Task = request.param
    return found


@pytest.fixture
def store(
    task: Task,
    tmp_path: Path,
    make_nodule_store: Callable[..., RecordStore],
    make_cgm_store: Callable[..., RecordStore],
) -> RecordStore:
    makers = {"ct-nodules": make_nodule_store, "cgm-5min": make_cgm_store}
    return makers[task.store_kind](tmp_path / "store", patients=10)


def draw(task: Task, store: RecordStore, patients: list[int], records: int = 2, seed: int = 0):  # type: ignore[no-untyped-def]
    return task.load(store).draw(torch.tensor(patients, dtype=torch.long), records, Generator().manual_seed(seed))


def test_no_layer_mixes_patients(task: Task) -> None:
    assert not [module for module in task.build().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_a_store_loads_as_patients(task: Task, store: RecordStore) -> None:
    assert len(task.load(store)) == len(store)


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("patients", [0, 1, 4])
def test_the_loss_is_one_value_a_patient(task: Task, store: RecordStore, patients: int, records: int) -> None:
    batch = draw(task, store, list(range(patients)), records)
    assert len(batch) == patients
    loss = task.loss(task.build(), batch)
    assert loss.shape == (patients,)
    assert loss.isfinite().all()


def test_padding_has_a_finite_loss(task: Task, store: RecordStore) -> None:
    assert task.loss(task.build(), draw(task, store, [0]).padded(3)).isfinite().all()


def test_a_patients_loss_depends_on_no_other_patient(task: Task, store: RecordStore) -> None:
    torch.manual_seed(0)
    model, batch = task.build().eval(), draw(task, store, [0, 1, 2])
    changed = type(batch)({name: tensor.clone() for name, tensor in batch.fields.items()})
    for tensor in changed.fields.values():
        tensor[1] = tensor[2]
    before, after = task.loss(model, batch), task.loss(model, changed)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-5, atol=1e-6)


def test_random_patients_have_the_form_of_the_stores(task: Task, store: RecordStore) -> None:
    real, made_up = draw(task, store, [0, 1, 2]), task.random_patients(3, 2, Generator().manual_seed(0))
    forms = [{name: (tensor.shape, tensor.dtype) for name, tensor in batch.fields.items()} for batch in (real, made_up)]
    assert forms[0] == forms[1]


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_some_rung_keeps_patients_apart_to_the_last_bit(task: Task, threads: int) -> None:
    last = climb(task, Shape("bookkeeping", Passes(7, 1), 2), threads)[-1]
    assert last.safe
    assert last.flushed


def test_the_same_generator_draws_the_same_batch(task: Task, store: RecordStore) -> None:
    first, second, other = (draw(task, store, [0, 3], seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first.fields)
    assert any(not torch.equal(first[name], other[name]) for name in first.fields)


def test_weights_survive_the_wire(task: Task) -> None:
    first, second = task.build(), task.build()
    unpack(pack(first), second)
    assert pack(first).tobytes() == pack(second).tobytes()


def test_the_defaults_make_a_plan(task: Task) -> None:
    plan = draft_plan(task.name, epsilon=8.0, delta=1e-3, overrides={})
    assert plan.private
    assert plan.epsilon() <= 8.0


def test_the_evaluation_has_the_primary_metric(task: Task, store: RecordStore) -> None:
    assert math.isfinite(task.evaluate(task.build().eval(), store).value(task.metric))


def test_ten_patients_can_be_learnt_by_heart(task: Task, store: RecordStore) -> None:
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = task.loss(model, draw(task, store, list(range(10)), 2, seed=step)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
