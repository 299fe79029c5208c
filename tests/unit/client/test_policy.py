"""Each rule of a hospital alone: what it permits to the last value, what it refuses, and what it then says."""

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from torch import nn

from client.config import SitePolicy
from client.policy import check_engine, check_hours, check_plan, check_weights
from shared.dp.step import ENGINES
from shared.errors import ErrorCode, PlanError, PolicyError, ProtocolError
from shared.plan import RunPlan
from shared.tasks.base import Task
from shared.tasks.registry import find_task
from shared.weights import pack

TASK = find_task("nodule-classification")
PLAN = RunPlan(
    task=TASK.name,
    rounds=1,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=2.0,
    noise_multiplier=1.0,
    delta=1e-3,
    learning_rate=0.5,
)
AT_THE_LIMIT = SitePolicy(
    name="h1",
    declared_patients=100,
    tasks=(TASK.name,),
    max_epsilon=8.0,
    max_delta=PLAN.delta,
    min_noise_multiplier=PLAN.noise_multiplier,
    max_grad_norm=PLAN.max_grad_norm,
    max_sample_rate=PLAN.sample_rate,
)


def test_a_plan_at_every_limit_is_accepted() -> None:
    check_plan(PLAN, AT_THE_LIMIT)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"tasks": ("glucose-forecast",)}, "the task nodule-classification is not permitted here"),
        ({"max_delta": 9e-4}, "its delta is above max-delta 0.0009"),
        ({"min_noise_multiplier": 1.1}, "its noise-multiplier is below min-noise-multiplier 1.1"),
        ({"max_grad_norm": 1.9}, "its max-grad-norm is above 1.9"),
        ({"max_sample_rate": 0.4}, "its sample-rate is above max-sample-rate 0.4"),
    ],
)
def test_each_rule_refuses_a_plan_alone_and_names_itself(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(PolicyError) as refused:
        check_plan(PLAN, replace(AT_THE_LIMIT, **changes))
    assert str(refused.value) == f"The plan is refused: {rule}. Change the plan or site.toml."
    assert refused.value.code is ErrorCode.POLICY_REFUSED


def test_all_broken_rules_are_named() -> None:
    with pytest.raises(PolicyError, match=r"is above 1\.9; its sample-rate is above max-sample-rate 0.4"):
        check_plan(PLAN, replace(AT_THE_LIMIT, max_grad_norm=1.9, max_sample_rate=0.4))


def test_a_task_that_does_not_exist_here_is_refused_even_where_the_rules_name_it() -> None:
    with pytest.raises(PlanError):
        check_plan(replace(PLAN, task="nothing"), replace(AT_THE_LIMIT, tasks=("nothing",)))


class Partial:
    """A task of two layers, of which only the first trains in private."""

    name = "partial"

    def __init__(self, trains: nn.Module, fixed: nn.Module) -> None:
        self.model = nn.Sequential(trains, fixed)

    def build(self) -> nn.Module:
        return self.model

    def private(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        return model[0]


class Unknown(nn.Module):
    """A layer of no engine's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.Linear(1, 1).weight.detach().clone())


def partial(trains: nn.Module, fixed: nn.Module) -> Task:
    return cast("Task", Partial(trains, fixed))


def test_a_layer_that_the_engine_cannot_clip_is_refused_by_name() -> None:
    with pytest.raises(
        PolicyError, match=r"^The plan is refused: engine 'bookkeeping' cannot train partial\. .*Unknown"
    ):
        check_engine(PLAN, partial(Unknown(), nn.Linear(2, 1)))


def test_what_does_not_train_in_private_need_not_be_clipped() -> None:
    check_engine(PLAN, partial(nn.Linear(2, 2), Unknown()))


def test_a_plan_without_privacy_needs_no_engine() -> None:
    check_engine(replace(PLAN, noise_multiplier=0.0), partial(Unknown(), nn.Linear(2, 1)))


@pytest.mark.parametrize("engine", list(ENGINES))
def test_the_plans_own_engine_is_tried_and_closed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[object] = []

    def tried(model: nn.Module) -> SimpleNamespace:
        happened.append(model)
        return SimpleNamespace(close=lambda: happened.append("closed"))

    monkeypatch.setitem(cast("dict[str, Any]", ENGINES), engine, tried)
    task = partial(nn.Linear(2, 2), nn.Linear(2, 1))
    check_engine(replace(PLAN, engine=engine), task)
    assert happened == [task.build(), "closed"]


def weights_of_norm(norm: float) -> np.ndarray:
    weights = np.zeros_like(pack(TASK.build()))
    weights[0] = norm
    return weights


def test_weights_up_to_the_norm_are_accepted_and_beyond_it_refused() -> None:
    policy = replace(AT_THE_LIMIT, max_weights_norm=1024.0)
    check_weights(weights_of_norm(1024.0), TASK, policy)
    with pytest.raises(PolicyError) as refused:
        check_weights(weights_of_norm(1025.0), TASK, policy)
    assert str(refused.value) == "The weights' norm 1.02e+03 is above max-weights-norm 1024."


def test_a_norm_that_single_precision_cannot_hold_is_still_measured() -> None:
    """The largest weights' squares overflow float32; the refusal names their norm."""
    with pytest.raises(PolicyError, match=r"norm 3e\+38 "):
        check_weights(weights_of_norm(3e38), TASK, AT_THE_LIMIT)


def test_weights_up_to_the_size_of_a_message_are_accepted_and_beyond_it_refused() -> None:
    task = partial(nn.Linear(2**9, 2**9, bias=False), nn.Identity())  # 1 MiB of weights
    whole = np.zeros(2**18, np.float32)
    policy = replace(AT_THE_LIMIT, max_message_mib=1)
    check_weights(whole, task, policy)
    with pytest.raises(PolicyError, match=r"^The weights have 1048580 bytes, above max-message-mib 1\.$"):
        check_weights(np.zeros(2**18 + 1, np.float32), task, policy)


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ProtocolError):
        check_weights(np.zeros(3, np.float32), TASK, AT_THE_LIMIT)


@pytest.mark.parametrize(("hour", "permitted"), [(23, True), (12, False)])
def test_a_round_begins_only_in_the_hours_of_the_site(hour: int, permitted: bool) -> None:
    policy = replace(AT_THE_LIMIT, hours="22:00-06:00 +00:00", days=("mon", "tue"))
    moment = datetime(2024, 1, 1, hour, tzinfo=UTC)  # a Monday
    if permitted:
        check_hours(moment, policy)
        return
    with pytest.raises(PolicyError) as refused:
        check_hours(moment, policy)
    assert refused.value.code is ErrorCode.OUTSIDE_HOURS
    assert str(refused.value) == "New rounds train here only at 22:00-06:00 +00:00 (mon, tue)."
