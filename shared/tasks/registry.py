"""Finds tasks: every module in this package that defines ``TASK``.

A task's name is its module's file name with dashes. So names are known without importing any module, and with it torch.
"""

import importlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import shared.tasks
from shared.errors import ErrorCode, PlanError
from shared.suggest import suggestion

if TYPE_CHECKING:
    from shared.tasks.base import Task

_DEFINES_TASK = re.compile(r"^TASK\b", re.MULTILINE)


@cache
def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, sorted; nothing is imported."""
    modules = (path for folder in shared.tasks.__path__ for path in Path(folder).glob("*.py"))
    return tuple(sorted(path.stem.replace("_", "-") for path in modules if _DEFINES_TASK.search(path.read_text())))


def all_tasks() -> dict[str, "Task"]:
    """Return every task by name."""
    return {name: find_task(name) for name in task_names()}


def find_task(name: str) -> "Task":
    """Return the task called ``name``.

    Raises:
        PlanError: If there is none, with the names there are.
    """
    check_task(name)
    return _load(name)


def check_task(name: str) -> None:
    """Check that there is a task called ``name``; nothing is imported.

    Raises:
        PlanError: If there is none, with the names there are.
    """
    if name not in task_names():
        known = ", ".join(task_names())
        raise PlanError(
            f"There is no task {name!r}; the tasks are: {known}.{suggestion(name, task_names())}",
            ErrorCode.UNKNOWN_TASK,
        )


@cache
def _load(name: str) -> "Task":
    task: Task = importlib.import_module(f"{shared.tasks.__name__}.{name.replace('-', '_')}").TASK
    return task
