"""The bound on an honest site's update: none passes it, and poison does."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from client.training import Randomness, train_round
from server.replies import FAULTY, Dropped, check_reply, largest_update
from shared.messages import TrainReply, TrainRequest
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks.registry import find_task
from shared.weights import pack

TASK = find_task("nodule-classification")
PLAN = RunPlan(
    task=TASK.name,
    rounds=4,
    local_steps=3,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=0.7,
    noise_multiplier=1.0,
    delta=1e-3,
    learning_rate=0.5,
)
PATIENTS = 16


@pytest.fixture(autouse=True)
def _server_identity() -> None:
    """Flower stamps a message with the identity of the process's task; these tests make messages outside of any."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.9},
        {"noise_multiplier": 0.6},
        {"optimizer": "adam", "learning_rate": 0.01},
        {"optimizer": "adam", "learning_rate": 0.01, "noise_multiplier": 0.0},
        {"strategy": "fedprox", "proximal_mu": 2.0},
        {"sample_rate": 0.01},
        {"sample_rate": 1.0, "declared": PATIENTS - 5},  # as many fewer declared as a site may have
    ],
)
def test_honest_training_keeps_below_and_a_thousandfold_does_not(
    tmp_path: Path, make_nodule_store: Callable[..., RecordStore], changes: dict[str, object]
) -> None:
    declared = int(str(changes.pop("declared", PATIENTS)))
    plan = replace(PLAN, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    start = pack(TASK.build())
    bound = largest_update(plan, len(start), declared)
    store = make_nodule_store(tmp_path / "store", patients=PATIENTS)
    for seed in range(3):
        weights = train_round(
            TASK,
            TASK.load(store),
            plan,
            1,
            start,
            declared_patients=declared,
            randomness=Randomness.simulated(bytes([seed]) * 32),
        )
        assert 0.0 <= np.linalg.norm(weights - start) < bound
        if plan.sample_rate == 0.5:  # with next to no patients expected, honest noise is of that size too
            assert np.linalg.norm(1000 * weights.astype(np.float64) - start) > bound


def test_without_privacy_sgd_has_no_bound() -> None:
    assert largest_update(replace(PLAN, noise_multiplier=0.0), 100, 40) == math.inf


@pytest.mark.parametrize(
    ("update", "cap", "said"),
    [
        (0.99, None, None),
        (1.01, None, Dropped.UPDATE_TOO_LARGE),
        (0.4, 0.5, None),
        (0.6, 0.5, Dropped.UPDATE_OVER_CAP),
        (0.99, 0.5, Dropped.UPDATE_OVER_CAP),
        (1.01, 0.5, Dropped.UPDATE_TOO_LARGE),
        (1.01, 2.0, None),  # the operator allows more than the plan implies
        (2.01, 2.0, Dropped.UPDATE_TOO_LARGE),
    ],
)
def test_only_what_passes_the_plans_own_bound_shows_a_faulty_site(
    update: float, cap: float | None, said: Dropped | None
) -> None:
    """``update`` and ``cap`` in units of the bound that the plan implies."""
    bound, start = largest_update(PLAN, 100, PATIENTS), np.zeros(100, np.float32)
    request = TrainRequest("r", 1, PLAN, start)
    weights = start + np.float32(update * bound / 10.0)
    message = Message(request.to_content(), 1, "train")
    reply = Message(TrainReply(1, PLAN.digest, weights).to_content(), reply_to=message)
    found = check_reply(reply, request, PATIENTS, None if cap is None else cap * bound)
    if said is None:
        assert np.array_equal(found, weights)
    else:
        assert found == said
        assert (said in FAULTY) == (said is Dropped.UPDATE_TOO_LARGE)
