"""The form of the audit log: JSON lines, each naming the SHA-256 of the line before. Pure.

    {"sequence":2,"time":"2026-01-31T22:00:01+00:00","previous":"<SHA-256 of line 1>","event":"asked",...}

A power cut can leave a torn end behind the last whole line. The next writer never removes it: it ends the line and
appends a ``recovered`` line that names how many bytes were torn, and their SHA-256. Whatever else stands where a
whole line should stand was put there by somebody.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

GENESIS: Final = "0" * 64
RECOVERED: Final = "recovered"
MAX_LINE_BYTES: Final = 4096
MAX_TORN_BYTES: Final = 4 * MAX_LINE_BYTES
_TORN_KEYS: Final = ("torn_bytes", "torn_sha256")


@dataclass(frozen=True)
class Head:
    """The end of a chain.

    Attributes:
        sequence: Number of its last line, from 1; 0 before the first.
        sha256: Of that line, without its line feed.
        size: Bytes of the file up to and with that line.
    """

    sequence: int = 0
    sha256: str = GENESIS
    size: int = 0


@dataclass(frozen=True)
class Entry:
    """One line, read back.

    Attributes:
        sequence: Its number.
        previous: SHA-256 of the line before.
        time: When it was written, UTC.
        event: What it records.
        fields: What it says of the event.
        start: Its first byte in the file.
        head: The chain's end after it.
    """

    sequence: int
    previous: str
    time: str
    event: str
    fields: Mapping[str, Any]
    start: int
    head: Head

    def follows(self, end: Head) -> bool:
        """Whether this line names ``end`` as the line before it."""
        return (self.sequence, self.previous) == (end.sequence + 1, end.sha256)


@dataclass(frozen=True)
class Chain:
    """What was read of a log.

    Attributes:
        entries: Every line that can be read, in order.
        faults: What is wrong, one sentence each.
        torn: The bytes behind the last line that can be read.
    """

    entries: tuple[Entry, ...]
    faults: tuple[str, ...]
    torn: bytes


def encode(end: Head, time: str, event: str, fields: Mapping[str, Any]) -> bytes:
    """Return the line that follows ``end``, with its line feed."""
    line = {"sequence": end.sequence + 1, "time": time, "previous": end.sha256, "event": event, **fields}
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def torn_fields(torn: bytes) -> dict[str, Any]:
    """Return how a ``recovered`` line names the torn bytes before it."""
    return dict(zip(_TORN_KEYS, (len(torn), hashlib.sha256(torn).hexdigest()), strict=True)) if torn else {}


def read_chain(data: bytes, start: Head | None = None) -> Chain:
    """Read the lines that follow ``start`` (by default a whole log) and find what is wrong with them."""
    end = start or Head()
    offset = end.size
    lines = _lines(data, offset)
    entries: list[Entry] = []
    faults: list[str] = []
    number = 0
    while number < len(lines):
        following = _continuation(data, offset, lines, number, end)
        if following is None:
            following = next((n for n in range(number, len(lines)) if lines[n][1]), None)
            if following is None:  # nothing that can be read is left
                break
            faults.append(_fault(lines, number, following, end))
        entry = lines[following][1]
        if entry is not None:
            entries.append(entry)
            end, number = entry.head, following + 1
    torn = data[lines[number][0] - offset :] if number < len(lines) else b""
    return Chain(tuple(entries), tuple(faults), torn)


_Line = tuple[int, Entry | None]


def _lines(data: bytes, offset: int) -> list[_Line]:
    """Return each line's first byte, and the line if it can be read; one without its line feed cannot."""
    lines: list[_Line] = []
    position = 0
    while position < len(data):
        stop = data.find(b"\n", position) + 1 or len(data) + 1
        lines.append((offset + position, _decode(data[position : stop - 1], offset + position, offset + stop)))
        position = stop
    if lines and not data.endswith(b"\n"):
        lines[-1] = (lines[-1][0], None)
    return lines


def _decode(line: bytes, start: int, stop: int) -> Entry | None:
    try:
        values = json.loads(line)
        sequence, previous, time, event = (values.pop(key) for key in ("sequence", "previous", "time", "event"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    if type(sequence) is not int or any(type(text) is not str for text in (previous, time, event)):
        return None
    head = Head(sequence, hashlib.sha256(line).hexdigest(), stop)
    return Entry(sequence, previous, time, event, values, start, head)


def _continuation(data: bytes, offset: int, lines: list[_Line], number: int, end: Head) -> int | None:
    """Return which line continues the chain: the next one, or one that accounts for torn bytes before it."""
    first = lines[number][0]
    for candidate in takewhile(lambda n: lines[n][0] <= first + MAX_TORN_BYTES, range(number, len(lines))):
        start, entry = lines[candidate]
        if entry is not None and entry.follows(end):
            named = {key: entry.fields[key] for key in _TORN_KEYS if key in entry.fields}
            if named == torn_fields(data[first - offset : start - offset]) and (entry.event == RECOVERED or not named):
                return candidate
    return None


def _fault(lines: list[_Line], number: int, following: int, end: Head) -> str:
    entry = lines[following][1]
    reached = entry.sequence if entry else end.sequence
    expected = end.sequence + 1
    if reached == expected and following == number:
        return f"Line {end.sequence} was changed after it was written." if end.sequence else "Line 1 was changed."
    if following > number:
        return f"Line {expected} was changed after it was written: it can no longer be read."
    if reached > expected:
        return f"Missing: {lines_between(expected, reached - 1)}."
    return f"Line {reached} stands again behind line {end.sequence}."


def lines_between(first: int, last: int) -> str:
    """Return "line 3" or "lines 3 to 5"."""
    return f"line {first}" if first == last else f"lines {first} to {last}"
