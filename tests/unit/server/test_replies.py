"""The bound on an honest site's update: none passes it, and poison does."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.training import Randomness, train_round
from server.average import LARGEST_WEIGHT
from server.replies import FAULTY, Dropped, _fault, check_offer, check_reply, largest_update
from shared.errors import ErrorCode
from shared.messages import SiteOffer, TrainReply, TrainRequest, error_reply
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
REQUEST = TrainRequest("r", 3, PLAN, np.zeros(4, np.float32))
HONEST = TrainReply(3, PLAN.digest, np.full(4, 0.25, np.float32))


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


def test_an_offer_is_taken_only_for_the_servers_own_plan() -> None:
    offer = SiteOffer("h1", 100, PLAN.digest)
    assert check_offer(answered(offer.to_content()), PLAN) == offer
    assert check_offer(answered(replace(offer, plan_digest="d" * 64).to_content()), PLAN) is ErrorCode.PLAN_CHANGED
    assert check_offer(answered(HONEST.to_content()), PLAN) is ErrorCode.BAD_MESSAGE


def test_a_sites_own_code_is_passed_on() -> None:
    refusal = error_reply(ErrorCode.BUDGET_EXCEEDED, Message(REQUEST.to_content(), 1, "train"))
    assert check_offer(refusal, PLAN) is ErrorCode.BUDGET_EXCEEDED
    assert check_reply(refusal, REQUEST, PATIENTS) is ErrorCode.BUDGET_EXCEEDED


@pytest.mark.parametrize(
    ("changes", "dropped"),
    [
        ({"plan_digest": "d" * 64}, Dropped.FOREIGN_PLAN),
        ({"round": 2}, Dropped.STALE_ROUND),
        ({"weights": np.zeros(5, np.float32)}, Dropped.WRONG_SIZE),
        ({"weights": np.zeros(1, np.float32)}, Dropped.WRONG_SIZE),
    ],
)
def test_a_reply_to_another_question_is_dropped(changes: dict[str, Any], dropped: Dropped) -> None:
    assert check_reply(answered(replace(HONEST, **changes).to_content()), REQUEST, PATIENTS) is dropped


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_one_number_that_is_not_finite_drops_the_reply(poison: float) -> None:
    """The message refuses it already; what comes to the server by another way is refused again."""
    weights = HONEST.weights.copy()
    weights[2] = poison
    assert _fault(replace(HONEST, weights=weights), REQUEST, PATIENTS, None) is Dropped.NOT_FINITE


def test_what_is_no_reply_is_malformed() -> None:
    assert check_reply(answered(SiteOffer("h1", 100, PLAN.digest).to_content()), REQUEST, PATIENTS) is Dropped.MALFORMED


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_that_would_overflow_the_average_is_dropped_whatever_the_bound(sign: int) -> None:
    """One such weight suffices; the largest below it passes where the bound is infinite."""
    unbounded = replace(PLAN, noise_multiplier=0.0)
    request = replace(REQUEST, plan=unbounded)

    def with_weight(value: float) -> TrainReply:
        return TrainReply(3, unbounded.digest, np.array([0.0, sign * value, 0.0, 0.0], np.float32))

    for cap in (None, 1e300):
        assert check_reply(answered(with_weight(LARGEST_WEIGHT).to_content()), request, PATIENTS, cap) is (
            Dropped.UPDATE_TOO_LARGE
        )
        below = with_weight(float(np.nextafter(np.float32(LARGEST_WEIGHT), np.float32(0))))
        assert np.array_equal(check_reply(answered(below.to_content()), request, PATIENTS, cap), below.weights)


def test_an_update_of_exactly_the_bound_passes() -> None:
    assert _fault(replace(HONEST, weights=np.full(4, 0.5, np.float32)), REQUEST, PATIENTS, 1.0) is None


def test_an_update_of_exactly_the_plans_bound_is_over_the_cap_alone() -> None:
    plan = replace(PLAN, local_steps=1, learning_rate=1.0, max_grad_norm=0.5, noise_multiplier=8.0)
    assert largest_update(plan, 4, PATIENTS) == 11.0
    reply = TrainReply(3, plan.digest, np.array([11, 0, 0, 0], np.float32))
    assert _fault(reply, replace(REQUEST, plan=plan), PATIENTS, 1.0) is Dropped.UPDATE_OVER_CAP


def test_a_reply_without_weights_to_a_model_without_any_is_no_fault() -> None:
    nothing = np.zeros(0, np.float32)
    assert _fault(replace(HONEST, weights=nothing), replace(REQUEST, weights=nothing), PATIENTS, None) is None


def test_the_update_is_the_difference_in_double_precision() -> None:
    """In single precision 60,000 + 2⁻¹⁰ is 60,000, and the update would keep to the cap."""
    request = replace(REQUEST, plan=replace(PLAN, noise_multiplier=0.0), weights=np.full(1, -(2.0**-10), np.float32))
    reply = TrainReply(3, request.plan.digest, np.full(1, 60_000.0, np.float32))
    assert _fault(reply, request, PATIENTS, 60_000 + 2.0**-10) is None
    assert _fault(reply, request, PATIENTS, 60_000 + 2.0**-11) is Dropped.UPDATE_OVER_CAP


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        # 3 steps · 0.5 · 0.7 · (10 + 1 · (√100 + 10) / 8)
        ({}, 3 * 0.5 * 0.7 * (10 + 20 / 8)),
        ({"momentum": 0.75}, 4 * 3 * 0.5 * 0.7 * (10 + 20 / 8)),
        ({"noise_multiplier": 2.0}, 3 * 0.5 * 0.7 * (10 + 2 * 20 / 8)),
        # With a quarter of a patient expected, one who joins is worth four.
        ({"sample_rate": 1 / 64}, 3 * 0.5 * 0.7 * (10 * 4 + 20 * 4)),
        ({"optimizer": "adam", "learning_rate": 0.01}, 3 * 0.01 * 7.3 * 10),
        ({"optimizer": "adam", "learning_rate": 0.01, "noise_multiplier": 0.0}, 3 * 0.01 * 7.3 * 10),
        ({"generator_steps": 5, "generator_learning_rate": 0.02}, 5 * 0.02 * 73 + 3 * 0.5 * 0.7 * (10 + 20 / 8)),
        (
            {"optimizer": "adam", "learning_rate": 0.01, "generator_steps": 5, "generator_learning_rate": 0.02},
            5 * 0.02 * 73 + 3 * 0.01 * 73,
        ),
    ],
)
def test_the_bound_is_the_formula_worked_by_hand(changes: dict[str, Any], bound: float) -> None:
    assert largest_update(replace(PLAN, **changes), 100, PATIENTS) == pytest.approx(bound, rel=1e-12)


def answered(content: RecordDict) -> Message:
    """Return a reply as the server receives it."""
    return Message(content, reply_to=Message(REQUEST.to_content(), 1, "train"))
