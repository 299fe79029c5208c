"""Tasks are known by their files' names, before any is imported."""

import importlib
import pkgutil

import pytest

import shared.tasks
from shared.errors import ErrorCode, PlanError
from shared.tasks.registry import all_tasks, check_task, find_task, task_names


def test_names_known_without_importing_are_those_of_the_tasks() -> None:
    modules = (
        importlib.import_module(f"shared.tasks.{info.name}") for info in pkgutil.iter_modules(shared.tasks.__path__)
    )
    names = sorted(module.TASK.name for module in modules if hasattr(module, "TASK"))
    assert names == list(task_names()) == list(all_tasks())
    assert all(find_task(name).name == name for name in names)


@pytest.mark.parametrize("ask", [find_task, check_task])
def test_a_mistyped_task_is_told_what_may_be_meant(ask: object) -> None:
    assert callable(ask)
    with pytest.raises(PlanError, match="Did you mean nodule-classification") as caught:
        ask("nodule-clasification")
    assert caught.value.code is ErrorCode.UNKNOWN_TASK
    with pytest.raises(PlanError, match=r"no task '\.\./etc/passwd'; the tasks are: ct-synthesis"):
        ask("../etc/passwd")
