"""Read files that somebody else wrote: bounded size, depth, numbers and text, or one sentence.

Python's own JSON reader recurses with the nesting, builds integers of any length, takes NaN and keeps the last of two
equal keys. Each of these is a way to end a program or to show one reader another value than the next. What passes
here is a tree of plain values that holds none of it.
"""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

from shared.errors import StorageError
from shared.files import storage_errors

MOST_JSON_BYTES: Final = 4 * 2**20
MOST_DEPTH: Final = 16
MOST_TEXT: Final = 1024
MOST_NAME: Final = 128
_MOST_DIGITS: Final = 18
"""Digits of a whole number: within 64 bits, so that no conversion overflows."""
_BRACKETS: Final = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return a regular file's content. A pipe or a device would block, so it is refused unread.

    Raises:
        StorageError: If it is missing, no regular file, unreadable or larger than ``most_bytes``.
    """
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as handle:
            state = os.fstat(handle.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise StorageError(f"{path.name} is no regular file. Give a file.")
            content = handle.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise StorageError(f"{path.name} is larger than {most_bytes} bytes, which no file of its kind is.")
    return content


def parse_json(content: bytes | str, what: str, *, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Return a JSON object whose every part is within the limits of this module.

    Args:
        content: UTF-8.
        what: What it is, for the sentence that refuses it.
        most_bytes: Its largest size.

    Raises:
        StorageError: If it is no JSON object, or a part of it is out of bounds.
    """
    try:
        if len(content) > most_bytes:
            raise ValueError("it is too large")
        text = content.decode() if isinstance(content, bytes) else content
        _check_depth(text)
        values = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique,
        )
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        _check_texts(values)
    except json.JSONDecodeError as error:
        raise StorageError(f"{what} is damaged: it is not JSON.") from error
    except UnicodeDecodeError as error:
        raise StorageError(f"{what} is damaged: it is not UTF-8.") from error
    except ValueError as error:
        raise StorageError(f"{what} is damaged: {error}.") from error
    return values


def is_name(text: str) -> bool:
    """Whether a site or a run may be called so: it stands in files, logs and tables."""
    plain = all(character.isalnum() or character in "._-" for character in text)
    return 0 < len(text) <= MOST_NAME and text.isascii() and text.strip("._-") != "" and plain


def is_bare(text: str) -> bool:
    """Whether a file's name stays in its folder: a name of ours, without separators, and no hidden file."""
    return is_name(text) and not text.startswith(".")


def _check_depth(text: str) -> None:
    depth = 0
    for found in _BRACKETS.finditer(text):
        if found[0] in "[{":
            depth += 1
            if depth > MOST_DEPTH:
                raise ValueError("it is nested too deeply")
        elif found[0] in "]}":
            depth -= 1


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > _MOST_DIGITS:
        raise ValueError("it holds a number that is too large")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits) if len(digits) <= MOST_TEXT else math.inf
    if not math.isfinite(value):
        raise ValueError("it holds a number that is not finite")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it names a field twice")
    return values


def _check_texts(value: Any) -> None:
    """Refuse text with control characters, terminal escapes or changes of direction; the depth is bounded by now."""
    if isinstance(value, str):
        if len(value) > MOST_TEXT or not value.isprintable():
            raise ValueError("it holds text that is too long or cannot be printed")
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_texts(key)
            _check_texts(part)
    elif isinstance(value, list):
        for part in value:
            _check_texts(part)
