"""Finds tasks: every module in this package that defines ``TASK``."""

import importlib
import pkgutil
from functools import cache

import shared.tasks
from shared.errors import ErrorCode, PlanError
from shared.tasks.base import Task


@cache
def all_tasks() -> dict[str, Task]:
    """Return every task by name."""
    modules = (
        importlib.import_module(f"{shared.tasks.__name__}.{info.name}")
        for info in pkgutil.iter_modules(shared.tasks.__path__)
    )
    found = [module.TASK for module in modules if hasattr(module, "TASK")]
    return {task.name: task for task in sorted(found, key=lambda task: task.name)}


def find_task(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        PlanError: If there is none, with the names there are.
    """
    try:
        return all_tasks()[name]
    except KeyError as error:
        known = ", ".join(all_tasks())
        raise PlanError(f"There is no task {name!r}; the tasks are: {known}.", ErrorCode.UNKNOWN_TASK) from error
