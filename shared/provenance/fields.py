"""The types that a field of a sidecar may have: each check returns the value or raises ValueError."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from shared.provenance.bounded import is_name

_HEX_64: Final = re.compile(r"[0-9a-f]{64}")
_HEX: Final = re.compile(r"(?:[0-9a-f]{2}){1,128}")

Check = Callable[[Any], Any]


def checked(values: Any, checks: Mapping[str, Check], required: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return an object's values, each through its check; all fields are required unless some are named.

    Raises:
        ValueError: Naming the field that is missing or wrong.
    """
    if not isinstance(values, dict):
        raise ValueError("a part of it is no object")
    for name in checks if required is None else required:
        if name not in values:
            raise ValueError(f"it lacks {name}")
    found = {}
    for name, value in values.items():
        if name not in checks:
            raise ValueError("it has a field that this version does not know")
        try:
            found[name] = checks[name](value)
        except ValueError as error:
            raise ValueError(f"{name} is not as it must be") from error
    return found


def text_that(value: Any, holds: Callable[[str], object]) -> str:
    """Return a text of which ``holds`` is true."""
    if not isinstance(value, str) or not holds(value):
        raise ValueError
    return value


def a_name(value: Any) -> str:
    """Return the name of a task, run or site."""
    return text_that(value, is_name)


def a_digest(value: Any) -> str:
    """Return a SHA-256 in hex."""
    return text_that(value, _HEX_64.fullmatch)


def hex_digits(value: Any) -> str:
    """Return up to 128 bytes in hex."""
    return text_that(value, _HEX.fullmatch)


def words(value: Any) -> str:
    """Return a short text."""
    return text_that(value, lambda text: len(text) <= 200)


def a_count(value: Any) -> int:
    """Return a whole number from 0 to a thousand million."""
    if type(value) is not int or not 0 <= value <= 10**9:
        raise ValueError
    return value


def number_in(low: float, high: float) -> Check:
    """Return the check of a number from ``low`` to ``high``, both included."""

    def check(value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError
        return float(value)

    return check


def a_flag(value: Any) -> bool:
    """Return true or false."""
    if type(value) is not bool:
        raise ValueError
    return value


def list_of(value: Any, check: Check) -> tuple[Any, ...]:
    """Return a list's parts, each through its check."""
    if not isinstance(value, list):
        raise ValueError
    return tuple(check(part) for part in value)
