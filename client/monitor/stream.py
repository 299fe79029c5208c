"""Where readings come from: a file that grows, standard input, or HTTP on loopback; and what a line says.

A line is CSV, ``patient_id,timestamp,glucose_mg_dl[,insulin_units[,carbohydrate_g]]``, or a JSON object with these
names. Times are ISO 8601; one without an offset is on the clock of the zone that the monitor was told. Cells may be
empty but for the first two: a row without glucose says what was injected or eaten.

A line counts once its end is there, for a number cut short is another number. What follows the last end waits for it in
a file; where the input ends it is left out and counted.
"""

import csv
import hmac
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final
from zoneinfo import ZoneInfo

from client.intake.glucose_csv import MAX_CARBOHYDRATE_G, MAX_INSULIN_UNITS, SENSOR_LIMITS
from client.monitor.forecaster import Fate
from shared.files import storage_errors
from shared.tasks.cgm import RANGE_MG_DL

COLUMNS: Final = ("patient_id", "timestamp", "glucose_mg_dl", "insulin_units", "carbohydrate_g")
POLL_S: Final = 0.5
_NEEDED: Final = 3
_MOST_LINE: Final = 4096
_CHUNK: Final = 1 << 16
_BEGINNING: Final = 4096
_MOST_AHEAD_S: Final = 900
_ANY_ZONE_S: Final = 14 * 3600


@dataclass(frozen=True, repr=False)
class Reading:
    """What one line says.

    Attributes:
        patient_id: The hospital's own name for the patient: for alerts and the screen only.
        time_s: Seconds since 1970, in UTC if the offset is known.
        offset_s: What the local clock is ahead of that; None if neither the stamp nor a zone says it.
        glucose: mg/dL, or None.
        insulin: Units.
        carbohydrate: Grams.
    """

    patient_id: str
    time_s: int
    offset_s: int | None
    glucose: float | None
    insulin: float
    carbohydrate: float


@dataclass(frozen=True, repr=False)
class Lines:
    """Some lines of a stream, in their order.

    Attributes:
        texts: The lines; none if nothing came for a while.
        position: Where the source stands after them; empty where it cannot go back.
        done: Told what became of the lines once it is on the disk.
        cut_off: How many lines or posts ended too early and are left out: a number cut short is another number.
    """

    texts: list[str]
    position: str = ""
    done: Callable[[dict[str, int]], None] = lambda _fates: None
    cut_off: int = 0


class _Refused(Exception):  # noqa: N818 - an outcome that is counted
    def __init__(self, fate: Fate) -> None:
        super().__init__(fate.value)
        self.fate = fate


def parse_line(line: str, zone: ZoneInfo | None, now_s: float) -> Reading | Fate:
    """Return what a line says, or why it says nothing. No message quotes it.

    Args:
        line: Without its end.
        zone: Of times that come without an offset; None if it is not known.
        now_s: Seconds since 1970: a reading of later is one of a wrong clock, and would make all others late. A clock
            of which nobody says the zone is believed to be in the one farthest ahead.
    """
    try:
        cells = _cells(line)
        if [str(cell).strip().lower() for cell in cells[:2]] == list(COLUMNS[:2]):
            return Fate.HEADER
        time_s, offset_s = _time(cells[1], zone)
        if time_s > now_s + _MOST_AHEAD_S + (_ANY_ZONE_S if offset_s is None else 0):
            return Fate.AHEAD
        glucose = _glucose(cells[2])
        units, grams = _amount(cells[3], MAX_INSULIN_UNITS), _amount(cells[4], MAX_CARBOHYDRATE_G)
        patient = str(cells[0]).strip()
        if not patient or not patient.isprintable() or (glucose is None and units == grams == 0.0):
            return Fate.BAD_ROW
        return Reading(patient, time_s, offset_s, glucose, units, grams)
    except _Refused as outcome:
        return outcome.fate
    except (ValueError, TypeError, OverflowError, RecursionError, csv.Error):
        return Fate.BAD_ROW


def _cells(line: str) -> list[Any]:
    if len(line) > _MOST_LINE or "\0" in line:
        raise ValueError
    if line.lstrip().startswith("{"):
        row = json.loads(line)
        cells = [row.get(name) for name in COLUMNS]
        if isinstance(cells[0], bool | float | list | dict) or any(isinstance(cell, bool) for cell in cells):
            raise ValueError
        return ["" if cell is None else cell for cell in cells]
    found = next(csv.reader([line]), [])
    if len(found) < _NEEDED:
        raise ValueError
    return [*found, "", ""][: len(COLUMNS)]


def _time(cell: Any, zone: ZoneInfo | None) -> tuple[int, int | None]:
    """Return the seconds since 1970 and the offset: the zone's if there is one, else the stamp's own, else None."""
    text = str(cell).strip()
    if ":" not in text:
        raise ValueError
    stamp = datetime.fromisoformat(text)
    if stamp.tzinfo is None and zone is None:
        return round(stamp.replace(tzinfo=UTC).timestamp()), None
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=zone)
        if stamp.utcoffset() != stamp.replace(fold=1).utcoffset():
            raise _Refused(Fate.CLOCK_CHANGE)
    local = (stamp.astimezone(zone) if zone else stamp).utcoffset()
    return round(stamp.timestamp()), round(local.total_seconds()) if local else 0


def _glucose(cell: Any) -> float | None:
    text = str(cell).strip()
    if not text:
        return None
    value = SENSOR_LIMITS.get(text.lower())
    value = float(text) if value is None else value
    if not math.isfinite(value):
        raise ValueError
    if not RANGE_MG_DL[0] <= value <= RANGE_MG_DL[1]:
        raise _Refused(Fate.OUT_OF_RANGE)
    return value


def _amount(cell: Any, most: float) -> float:
    text = str(cell).strip()
    value = float(text) if text else 0.0
    if not 0.0 <= value <= most:
        raise ValueError
    return value


class _Splitter:
    """Cuts bytes into whole lines; a line too long to be one is dropped up to its end.

    Attributes:
        pending: How many bytes came after the last end of a line.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._rest = b""
        self._skipping = False

    def add(self, content: bytes) -> list[str]:
        *whole, self._rest = (self._rest + content).split(b"\n")
        self.pending = len(self._rest) if whole else self.pending + len(content)
        if whole and self._skipping:
            whole[0], self._skipping = b"\0", False  # counted as one bad row
        if len(self._rest) > _MOST_LINE:
            self._rest, self._skipping = b"", True
        return split_lines(b"\n".join(whole))

    def end(self) -> Lines:
        """Return that a line was left unfinished, if one was."""
        return Lines([], cut_off=int(self._skipping or bool(self._rest.strip())))


def split_lines(content: bytes) -> list[str]:
    """Return the lines that hold something; bytes that are no UTF-8 become replacement characters."""
    return [line for line in content.decode("utf-8", "replace").lstrip("\ufeff").split("\n") if line.strip()]


def standard_input(descriptor: int | None = None) -> Iterator[Lines]:
    """Yield lines as they come, until the end of the input; a last line without its end is not one."""
    source, splitter = sys.stdin.fileno() if descriptor is None else descriptor, _Splitter()
    while content := os.read(source, _CHUNK):
        yield Lines(splitter.add(content))
    yield splitter.end()


def growing_file(
    path: Path, position: str = "", *, key: bytes = b"", follow: bool = True, poll_s: float = POLL_S
) -> Iterator[Lines]:
    """Yield the lines of a file from ``position`` on, and, with ``follow``, those that are appended.

    A file that was replaced by another or cut short is read from its beginning: a new one can have the old one's inode,
    so that the position holds a hash of how the file begins, too. The position lies after the last whole line, so that
    an unfinished one is read when it is whole, by this monitor or the next.

    Args:
        path: The file.
        position: Of an earlier reading under the same key; empty for the beginning.
        key: Of the hash, for patients stand at the beginning of a file.
        follow: Whether to wait for more at its end.
        poll_s: How long to wait before looking again.

    Raises:
        StorageError: If it cannot be read.
    """
    while True:
        with storage_errors(path), path.open("rb") as handle:
            inode, splitter = os.fstat(handle.fileno()).st_ino, _Splitter()
            offset = _start(handle, position, key)
            handle.seek(offset)
            while True:
                replaced = _replaced(path, inode, offset)  # asked first: what came before that is read to its end
                content = handle.read(_CHUNK)
                if content:
                    offset += len(content)
                    texts = splitter.add(content)
                    yield Lines(texts, _position(handle, offset - splitter.pending, key))
                elif not follow:
                    yield splitter.end()
                    return
                elif replaced:
                    break
                else:
                    yield Lines([])
                    time.sleep(poll_s)
            position = ""


def _position(handle: BinaryIO, offset: int, key: bytes) -> str:
    """Return a name for a place in a file, from which nobody learns what the file says."""
    descriptor = handle.fileno()
    beginning = os.pread(descriptor, min(offset, _BEGINNING), 0)
    return f"{os.fstat(descriptor).st_ino}:{offset}:{hmac.digest(key, beginning, 'sha256').hex()}"


def _start(handle: BinaryIO, position: str, key: bytes) -> int:
    """Return where to go on: at the position if it is one of this very file, else at the beginning."""
    offset = int(position.split(":")[1]) if position else 0
    same = offset <= os.fstat(handle.fileno()).st_size and _position(handle, offset, key) == position
    return offset if same else 0


def _replaced(path: Path, inode: int, offset: int) -> bool:
    try:
        facts = path.stat()
    except FileNotFoundError:  # between the two halves of a rotation
        return False
    return facts.st_ino != inode or facts.st_size < offset
