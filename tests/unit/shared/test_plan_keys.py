"""What an author may set of a plan, in a file or as KEY=VALUE."""

from dataclasses import fields
from typing import Any

import pytest

from shared.drafting import draft_plan
from shared.errors import PlanError
from shared.plan import RunPlan
from shared.plan_keys import PLAN_KEYS, check_keys, read_assignments
from shared.suggest import suggestion


def test_every_field_of_a_plan_may_be_set_but_those_that_follow_from_others() -> None:
    names = {field.name.replace("_", "-") for field in fields(RunPlan)}
    assert names | {"epsilon"} == PLAN_KEYS | {"noise-multiplier", "init"}


def test_values_have_their_fields_types() -> None:
    texts = ["min-sites=3", "proximal_mu=0.1", "strategy = median", "deadline-s=60", "epsilon=inf", "byzantine-sites=2"]
    values = read_assignments(texts)
    assert values == {
        "min_sites": 3, "proximal_mu": 0.1, "strategy": "median", "deadline_s": 60.0, "epsilon": float("inf"),
        "byzantine_sites": 2,
    }  # fmt: skip
    assert [type(value) for value in values.values()] == [int, float, str, float, float, int]
    plan = draft_plan("nodule-classification", epsilon=values.pop("epsilon"), delta=1e-3, overrides=values)
    assert (plan.strategy, plan.quorum, plan.deadline_s) == ("median", 5, 60.0)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["rounds"], "needs KEY=VALUE"),
        (["=3"], "needs KEY=VALUE"),
        (["rounds=many"], "rounds must be a whole number"),
        (["rounds=1.5"], "rounds must be a whole number"),
        (["tau=small"], "tau must be a number"),
        (["min-site=3"], "unknown keys: min-site. Did you mean min-sites?"),
        (["colour=red"], "unknown keys: colour. The keys are: byzantine-sites"),
        (["noise_multiplier=1"], "must not set noise-multiplier: epsilon sets it"),
        (["init=x"], "must not set init"),
        (["min-sites=3", "min_sites=4"], "sets min-sites twice"),
    ],
)
def test_a_bad_assignment_is_one_sentence(texts: list[str], said: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_assignments(texts)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("epsilom", "epsilon"), ("Epsilon", "epsilon"), ("local_steps", "local-steps"), ("learningrate", "learning-rate")],
)
def test_a_mistyped_key_of_a_plan_is_recognised(written: str, meant: str) -> None:
    raw: dict[str, Any] = {"task": "x", written: 1}
    with pytest.raises(PlanError, match=rf"plan.toml has unknown keys: {written}. Did you mean {meant}\?"):
        check_keys(raw, "plan.toml")


def test_a_word_like_none_is_not_guessed_at() -> None:
    assert suggestion("colour", PLAN_KEYS) == ""
    assert suggestion("rouns", PLAN_KEYS) == " Did you mean rounds?"


@pytest.mark.parametrize(
    ("key", "typed", "meant"),
    [
        ("strategy", "fed-avg", "fedavg"),
        ("engine", "opacuss", "opacus"),
        ("optimizer", "adm", "adam"),
        ("schedule", "liner", "linear"),
    ],
)
def test_a_mistyped_word_is_told_what_may_be_meant(key: str, typed: str, meant: str) -> None:
    with pytest.raises(PlanError, match=rf"{key} must be one of .*\. Did you mean {meant}\?"):
        draft_plan("nodule-classification", epsilon=8.0, delta=1e-3, overrides={key: typed})
