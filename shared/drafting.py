"""Draft a run plan from the little that its author says: task, epsilon, and whatever is to differ.

An author says it in ``plan.toml`` or as ``--set KEY=VALUE``; both know the same keys, and check them here.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from shared.accounting import calibrate_noise
from shared.errors import PlanError
from shared.plan import RunPlan
from shared.suggest import suggestion
from shared.tasks.registry import find_task

_DERIVED = {"noise-multiplier": "epsilon sets it", "init": "give the checkpoint with --init"}
_KINDS = {"epsilon": float, **{field.name.replace("_", "-"): field.type for field in fields(RunPlan)}}
_NAMES: dict[Any, str] = {int: "a whole number", float: "a number"}
PLAN_KEYS = frozenset(_KINDS) - set(_DERIVED)
"""What a plan's author may set, in kebab-case."""

MOST_EPSILON = 100.0
DELTA_SHARE = 0.1
"""A plan's delta, as a share of one over the largest declared number of patients."""


def draft_plan(task: str, *, epsilon: float, delta: float, overrides: Mapping[str, Any]) -> RunPlan:
    """Return a plan whose epsilon over all its rounds is at most ``epsilon`` at ``delta``.

    Args:
        task: Name of a registered task; its defaults fill what ``overrides`` leaves open.
        epsilon: The promise; ``inf`` trains without privacy.
        delta: See :class:`shared.plan.RunPlan`.
        overrides: Fields of the plan that are to differ from the task's defaults.

    Raises:
        PlanError: If the task is unknown, a field is impossible, or no usable noise keeps the promise.
    """
    found = find_task(task)
    defaults = {**found.defaults, **(found.without_privacy if math.isinf(epsilon) else {})}
    values = {**defaults, **overrides, "task": task, "delta": delta}
    noiseless = RunPlan.from_mapping({**values, "noise_multiplier": 0.0})
    if math.isnan(epsilon) or epsilon <= 0:
        raise PlanError(f"epsilon must be positive, not {epsilon}; 'inf' trains without privacy.")
    if math.isinf(epsilon):
        return noiseless
    if epsilon > MOST_EPSILON:
        raise PlanError(
            f"epsilon must be at most {MOST_EPSILON:g}: above that there is no privacy; say 'inf' for none."
        )
    noise = calibrate_noise(
        epsilon=epsilon,
        delta=delta,
        sample_rate=noiseless.sample_rate,
        steps=noiseless.rounds * noiseless.local_steps,
    )
    return RunPlan.from_mapping({**values, "noise_multiplier": noise})


def check_keys(keys: Collection[str], where: str) -> None:
    """Refuse keys that no plan has, or that its author does not set.

    Args:
        keys: In kebab-case.
        where: Where they stand, for the sentence: ``plan.toml``.

    Raises:
        PlanError: With the key that may have been meant, or the keys that there are.
    """
    for key in sorted(_DERIVED.keys() & keys):
        raise PlanError(f"{where} must not set {key}: {_DERIVED[key]}.")
    if unknown := sorted(set(keys) - PLAN_KEYS):
        meant = suggestion(unknown[0], PLAN_KEYS)
        known = f" The keys are: {', '.join(sorted(PLAN_KEYS))}."
        raise PlanError(f"{where} has unknown keys: {', '.join(unknown)}.{meant or known}")


def read_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the fields that ``KEY=VALUE`` texts set, by their names in Python, each of its field's type.

    Keys may be written as in a file, ``min-sites``, or as in Python, ``min_sites``.

    Raises:
        PlanError: If a text is no assignment, a key is unknown or set twice, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise PlanError(f"--set needs KEY=VALUE, as in --set min-sites=3; {text!r} is not of that form.")
        key = key.replace("_", "-")
        check_keys([key], "--set")
        name = key.replace("-", "_")
        if name in values:
            raise PlanError(f"--set sets {key} twice. Set it once.")
        values[name] = _converted(key, value)
    return values


def _converted(key: str, text: str) -> Any:
    kind: Any = _KINDS[key]
    try:
        return kind(text)
    except ValueError as error:
        raise PlanError(f"--set {key}={text} is wrong: {key} must be {_NAMES[kind]}.") from error
