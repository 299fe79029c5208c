"""What a plan's author may set, in ``plan.toml`` or as ``--set KEY=VALUE``; both know the same keys, checked here.

Kept apart from drafting, which needs every task's model: a mistyped key is said at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

from shared.errors import PlanError
from shared.plan import RunPlan
from shared.suggest import suggestion

_DERIVED = {"noise-multiplier": "epsilon sets it", "init": "give the checkpoint with --init"}
_KINDS = {"epsilon": float, **{field.name.replace("_", "-"): field.type for field in fields(RunPlan)}}
_NAMES: dict[Any, str] = {int: "a whole number", float: "a number"}
PLAN_KEYS = frozenset(_KINDS) - set(_DERIVED)
"""In kebab-case."""


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
