"""From a three-line ``plan.toml`` to a plan."""

from pathlib import Path
from typing import Any

import pytest

from server.checkpoints import save_checkpoint
from server.members import Member
from server.planning import agree_plan, parse_plan_request, read_plan_request
from shared.errors import PlanError, StorageError
from shared.tasks.registry import find_task

LEAST: dict[str, Any] = {"task": "nodule-classification", "rounds": 12, "epsilon": 8.0}
MEMBERS = [Member("h1", "k1", 200), Member("h2", "k2", 500), Member("h3", "k3", 100)]


def test_three_lines_are_enough(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('task = "nodule-classification"\nrounds = 12\nepsilon = 8.0\n')
    plan = agree_plan(read_plan_request(tmp_path / "plan.toml"), MEMBERS, None)
    assert (plan.task, plan.rounds, plan.delta, plan.min_sites) == ("nodule-classification", 12, 0.1 / 500, 2)
    assert 7.5 < plan.epsilon() <= 8.0


def test_any_other_field_may_be_set_in_kebab_case() -> None:
    request = parse_plan_request({**LEAST, "local-steps": 3, "min-sites": 3, "delta": 1e-5, "deadline-s": 60})
    plan = agree_plan(request, MEMBERS, None)
    assert (plan.local_steps, plan.min_sites, plan.delta, plan.deadline_s) == (3, 3, 1e-5, 60.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "no-such-task"}, "no-such-task"),
        ({"task": 5}, "task must be a text"),
        ({"epsilon": 0}, "epsilon must be positive"),
        ({"epsilon": "8"}, "epsilon must be a number"),
        ({"epsilon": True}, "epsilon must be a number"),
        ({"epsilon": 1e-4, "delta": 1e-6}, "Ask for a larger epsilon"),
        ({"delta": 2.0}, "delta must lie"),
        ({"rounds": 0}, "rounds must lie"),
        ({"rounds": 1.5}, "rounds has the wrong type"),
        ({"local_steps": 3}, "unknown keys: local_steps"),
        ({"colour": "red"}, "unknown keys: colour"),
        ({"noise-multiplier": 1.0}, "epsilon sets it"),
        ({"init": "x"}, "--init"),
        ({"min-sites": 4}, "asks for 4 sites; 3 are enrolled"),
        ({"strategy": "krum"}, "byzantine-sites = 1, krum needs 5 sites; 3 are enrolled"),
        ({"strategy": "multi-krum", "byzantine-sites": 2}, "multi-krum needs 7 sites"),
        ({"strategy": "trimmed-mean", "byzantine-sites": 2}, "trimmed-mean needs 5 sites"),
        ({"strategy": "median", "byzantine-sites": 2}, "median needs 5 sites"),
        ({"deadline-s": 0}, "deadline-s must lie"),
        ({"deadline-s": "soon"}, "deadline-s has the wrong type"),
    ],
)
def test_a_bad_plan_is_one_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        agree_plan(parse_plan_request({**LEAST, **change}), MEMBERS, None)


def test_a_robust_strategy_is_taken_with_as_many_sites_as_it_needs() -> None:
    for strategy, sites in (("median", 3), ("trimmed-mean", 3), ("krum", 5), ("multi-krum", 5)):
        members = [Member(f"h{n}", f"k{n}", 100) for n in range(sites)]
        assert agree_plan(parse_plan_request({**LEAST, "strategy": strategy}), members, None).quorum == sites
        with pytest.raises(PlanError, match=f"{strategy} needs {sites} sites; {sites - 1} are enrolled"):
            agree_plan(parse_plan_request({**LEAST, "strategy": strategy}), members[1:], None)


@pytest.mark.parametrize("missing", ["task", "epsilon"])
def test_what_must_be_said_is_asked_for(missing: str) -> None:
    with pytest.raises(PlanError, match=f"lacks {missing}"):
        parse_plan_request({key: value for key, value in LEAST.items() if key != missing})


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"plan\.toml"):
        read_plan_request(tmp_path / "plan.toml")
    (tmp_path / "plan.toml").write_bytes(b"\xff = 1")
    with pytest.raises(PlanError, match="not valid TOML"):
        read_plan_request(tmp_path / "plan.toml")


def test_a_public_checkpoint_is_named_by_its_digest(tmp_path: Path) -> None:
    task = find_task("nodule-classification")
    saved = save_checkpoint(tmp_path, task.build(), run="r", number=1, task=task.name, plan_digest="d")
    assert agree_plan(parse_plan_request(LEAST), MEMBERS, saved.path).init == saved.sha256
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(StorageError, match="not a checkpoint"):
        agree_plan(parse_plan_request(LEAST), MEMBERS, tmp_path / "bad.safetensors")
