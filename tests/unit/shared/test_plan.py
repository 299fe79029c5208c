import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.drafting import draft_plan
from shared.errors import ErrorCode, PlanError
from shared.plan import STRATEGIES, RunPlan

PLAN = RunPlan(
    task="nodule-classification",
    rounds=20,
    local_steps=2,
    sample_rate=0.5,
    records_per_patient=4,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.5,
)
GOLDEN_DIGEST = "75e036235335033f"


def test_digest_is_stable_across_versions() -> None:
    """A changed digest means that sites of two versions cannot agree: change it only on purpose."""
    assert PLAN.digest[:16] == GOLDEN_DIGEST


def test_text_round_trip() -> None:
    assert RunPlan.from_json(PLAN.to_json()) == PLAN
    on_a_grid = replace(PLAN, reply_grid_s=30.0)
    assert RunPlan.from_json(on_a_grid.to_json()) == on_a_grid


def test_a_plan_from_before_there_were_reply_grids_still_parses() -> None:
    assert "reply_grid_s" not in json.loads(PLAN.to_json())
    assert RunPlan.from_json(PLAN.to_json()).reply_grid_s == 0.0


def test_every_field_enters_the_digest() -> None:
    changed = {
        "task": "other", "rounds": 21, "local_steps": 3, "sample_rate": 0.4, "records_per_patient": 5,
        "max_grad_norm": 2.0, "noise_multiplier": 2.5, "delta": 1e-4, "optimizer": "adam",
        "learning_rate": 0.1, "schedule": "linear", "momentum": 0.9, "patience": 3, "min_sites": 2,
        "deadline_s": 60.0, "reply_grid_s": 5.0, "engine": "opacus", "seed": 1, "init": "abc",
        "strategy": "median", "proximal_mu": 0.5, "server_learning_rate": 0.2, "tau": 0.1, "byzantine_sites": 2,
        "generator_steps": 5, "generator_learning_rate": 1e-4, "generator_pause": 0.3,
    }  # fmt: skip
    assert set(changed) == set(asdict(PLAN))
    digests = {replace(PLAN, **{name: value}).digest for name, value in changed.items()}
    assert len(digests | {PLAN.digest}) == len(changed) + 1


def test_the_linear_schedule_falls_by_equal_parts() -> None:
    rates = [replace(PLAN, rounds=4, schedule="linear").learning_rate_in(number) for number in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert PLAN.learning_rate_in(20) == 0.5


def test_epsilon_grows_with_rounds() -> None:
    spent = [PLAN.epsilon(rounds) for rounds in (0, 1, 10, 20)]
    assert spent[0] == 0.0
    assert spent == sorted(spent)
    assert PLAN.epsilon() == spent[-1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0), ("rounds", "20"), ("rounds", True), ("rounds", 2.0), ("sample_rate", 0.0),
        ("sample_rate", 1.5), ("max_grad_norm", 0.0), ("learning_rate", float("inf")), ("delta", 0.0),
        ("optimizer", "lbfgs"), ("engine", "magic"), ("records_per_patient", 10**6), ("local_steps", 10**9),
        ("max_grad_norm", 1e-40), ("noise_multiplier", 0.01), ("noise_multiplier", 1e9), ("sample_rate", 1e-9),
        ("schedule", "cosine"),        ("momentum", 1.0), ("noise_multiplier", -1.0), ("patience", -1), ("task", 5),
        ("min_sites", 0), ("noise_multiplier", float("nan")),
        ("strategy", "fedsgd"), ("proximal_mu", 0.0), ("server_learning_rate", float("inf")), ("tau", 0.0),
        ("byzantine_sites", 0),
        ("reply_grid_s", 0.01), ("reply_grid_s", -1.0), ("reply_grid_s", 1e5), ("reply_grid_s", 3600.0),
        ("reply_grid_s", float("nan")),
    ],
)  # fmt: skip
def test_impossible_fields_are_refused(field: str, value: Any) -> None:
    with pytest.raises(PlanError):
        RunPlan.from_mapping({**asdict(PLAN), field: value})


def test_the_quorum_is_what_the_strategy_needs_to_withstand_hostile_sites() -> None:
    quorums = {name: replace(PLAN, strategy=name, byzantine_sites=2, min_sites=3).quorum for name in STRATEGIES}
    assert quorums == {
        "fedavg": 3, "fedprox": 3, "fedadam": 3, "fedyogi": 3, "median": 5, "trimmed-mean": 5, "krum": 7,
        "multi-krum": 7,
    }  # fmt: skip
    assert replace(PLAN, strategy="krum", min_sites=9).quorum == 9


@pytest.mark.parametrize(("strategy", "more"), [("median", 1), ("trimmed-mean", 1), ("krum", 3), ("multi-krum", 3)])
def test_what_was_dropped_as_faulty_no_longer_hides_among_the_rest(strategy: str, more: int) -> None:
    plan = replace(PLAN, strategy=strategy, byzantine_sites=2, min_sites=2)
    assert [plan.quorum_beside(faulty) for faulty in range(4)] == [4 + more, max(2 + more, 2), max(more, 2), 4 + more]
    assert replace(plan, min_sites=6).quorum_beside(2) == 6
    assert replace(plan, strategy="fedavg").quorum_beside(1) == 2


def test_a_proximal_pull_that_overshoots_is_refused() -> None:
    with pytest.raises(PlanError, match="overshoots"):
        replace(PLAN, strategy="fedprox", learning_rate=0.5, proximal_mu=3.0)
    assert replace(PLAN, strategy="fedavg", learning_rate=0.5, proximal_mu=3.0).proximal_mu == 3.0


@pytest.mark.parametrize("name", [field.name for field in fields(RunPlan) if "_" in field.name])
def test_sentences_name_fields_as_files_do(name: str) -> None:
    wrong: tuple[object, ...] = ("text", -1.0, -1)
    for value in wrong:
        with pytest.raises(PlanError) as caught:
            RunPlan.from_mapping({**asdict(PLAN), name: value})
        assert name.replace("_", "-") in str(caught.value)
        assert name not in str(caught.value)


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(PlanError, match="unknown fields: surprise"):
        RunPlan.from_mapping({**asdict(PLAN), "surprise": 1})
    with pytest.raises(PlanError, match="lacks rounds"):
        RunPlan.from_mapping({"task": "x"})


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_rubbish_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(PlanError):
        RunPlan.from_json(text)


def test_a_drafted_plan_keeps_its_promise() -> None:
    plan = draft_plan("nodule-classification", epsilon=3.0, delta=1e-3, overrides={"rounds": 5})
    assert plan.rounds == 5
    assert 2.9 < plan.epsilon() <= 3.0


def test_infinite_epsilon_drafts_a_plan_without_privacy() -> None:
    plan = draft_plan("nodule-classification", epsilon=float("inf"), delta=1e-3, overrides={})
    assert not plan.private
    assert plan.epsilon() == float("inf")


def test_an_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match="nodule-classification") as caught:
        draft_plan("no-such", epsilon=3.0, delta=1e-3, overrides={})
    assert caught.value.code is ErrorCode.UNKNOWN_TASK
