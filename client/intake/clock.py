"""Times of an export: text to seconds, and local clocks to elapsed time.

Two times matter: the elapsed one, for gaps and the grid, and the local one, for the time of day. Without a zone
they are the same and a change of clocks looks like a gap or like repeated rows; with one, a local time that the
change skips or repeats is left out (which of the two it was cannot be told), and all others are exact.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from client.intake.glucose_formats import SERIAL

_EPOCH: Final = datetime(1970, 1, 1)
_EPOCH_UTC: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SERIAL_EPOCH: Final = 25569
"""1970-01-01 as a spreadsheet's day number (1900 date system)."""
_SERIALS: Final = (20_000.0, 200_000.0)
"""Day numbers of the years 1954 to 2447."""
_BLOCK_S: Final = 900
"""Zones change their offset at quarters of an hour only."""
_DATES: Final = ("%d-%m-%Y", "%m-%d-%Y", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y/%m/%d", "%Y.%m.%d")
_TIMES: Final = ("%H:%M", "%H:%M:%S", "%I:%M %p", "%I:%M:%S %p")
_ENOUGH: Final = 0.5
"""Of the times that one form must fit, else the form is not known; the others are bad rows."""

Seconds = npt.NDArray[np.int64]


class UnknownTimesError(ValueError):
    """No form fits the times, or several do, or they have an offset and the zone is not known."""


class DateSerialsError(ValueError):
    """The times are a spreadsheet's date serials."""


@dataclass(frozen=True)
class Times:
    """Times of N rows.

    Attributes:
        elapsed_s: int64 ``(N,)`` since 1970; in UTC if the zone is known.
        local_s: int64 ``(N,)`` since 1970 on the local clock.
        valid: bool ``(N,)`` where the text was a time.
        certain: bool ``(N,)`` False where the change of clocks skips or repeats the local time.
    """

    elapsed_s: Seconds
    local_s: Seconds
    valid: npt.NDArray[np.bool_]
    certain: npt.NDArray[np.bool_]


def parse_times(texts: Sequence[str], time_format: str | None, zone: ZoneInfo | None) -> Times:
    """Parse the times of one file.

    Raises:
        UnknownTimesError: See there.
        DateSerialsError: If the times are date serials and ``time_format`` does not say so.
    """
    parse = _parser(texts, time_format)
    stamps = [parse(text) for text in texts]
    valid = np.array([stamp is not None for stamp in stamps], bool)
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < _ENOUGH * len(texts):
        raise UnknownTimesError
    aware = np.zeros(len(texts), bool)
    aware[valid] = [stamp.tzinfo is not None for stamp in known]
    if zone is None and aware.any():
        raise UnknownTimesError
    clock = np.zeros(len(texts), np.int64)
    clock[valid] = [_seconds(stamp) for stamp in known]
    certain = np.ones(len(texts), bool)
    if zone is None:
        return Times(clock, clock, valid, certain)
    to_utc, sure = _offsets(clock, zone, _offset_of_local)
    to_local, _ = _offsets(clock, zone, _offset_of_utc)
    local = np.where(aware, clock + to_local, clock)
    return Times(np.where(aware, clock, clock - to_utc), local, valid, sure | aware)


def _seconds(stamp: datetime) -> int:
    """Return whole seconds since 1970: of a local time on its own clock, of any other in UTC."""
    return round((stamp - (_EPOCH if stamp.tzinfo is None else _EPOCH_UTC)).total_seconds())


def _offsets(
    clock: Seconds, zone: ZoneInfo, offset: Callable[[int, ZoneInfo], tuple[int, bool]]
) -> tuple[Seconds, npt.NDArray[np.bool_]]:
    """Ask the zone once for every quarter of an hour that occurs."""
    blocks, index = np.unique(clock // _BLOCK_S, return_inverse=True)
    found = [offset(int(block) * _BLOCK_S, zone) for block in blocks]
    return (
        np.array([shift for shift, _ in found], np.int64)[index],
        np.array([certain for _, certain in found], bool)[index],
    )


def _offset_of_local(local_s: int, zone: ZoneInfo) -> tuple[int, bool]:
    stamp = (_EPOCH + timedelta(seconds=local_s)).replace(tzinfo=zone)
    first, second = (stamp.replace(fold=fold).utcoffset() or timedelta() for fold in (0, 1))
    return round(first.total_seconds()), first == second


def _offset_of_utc(utc_s: int, zone: ZoneInfo) -> tuple[int, bool]:
    shift = (_EPOCH_UTC + timedelta(seconds=utc_s)).astimezone(zone).utcoffset() or timedelta()
    return round(shift.total_seconds()), True


Parser = Callable[[str], datetime | None]


def _parser(texts: Sequence[str], time_format: str | None) -> Parser:
    if time_format == SERIAL:
        return _serial
    if time_format is not None:
        return _strptime(time_format)
    if sum(_iso(text) is not None for text in texts) >= _ENOUGH * len(texts):
        return _iso
    if sum(_serial(text) is not None for text in texts) >= _ENOUGH * len(texts):
        raise DateSerialsError
    return _recognised(texts)


def _iso(text: str) -> datetime | None:
    if ":" not in text:  # a date alone, or a number that could be one
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _serial(text: str) -> datetime | None:
    try:
        day = float(text.replace(",", "."))
    except ValueError:
        return None
    if not _SERIALS[0] <= day <= _SERIALS[1]:
        return None
    return _EPOCH + timedelta(seconds=round((day - _SERIAL_EPOCH) * 86400))


def _recognised(texts: Sequence[str]) -> Parser:
    """Find the one form of the date and the one of the time that fit most of the rows.

    Raises:
        UnknownTimesError: If none fits, or day and month cannot be told apart.
    """
    halves = [text.partition(" ") for text in texts]
    dates = _best({date for date, _, _ in halves}, _DATES)
    times = _best({time for _, _, time in halves}, _TIMES)
    if len(dates) != 1 or not times:
        raise UnknownTimesError
    return _strptime(f"{dates[0]} {times[0]}")


def _best(texts: set[str], formats: Sequence[str]) -> list[str]:
    """Return the formats that read the most of ``texts``."""
    score = {form: sum(_try(text, form) is not None for text in texts) for form in formats}
    most = max(score.values())
    return [form for form in formats if score[form] == most > 0]


def _try(text: str, form: str) -> datetime | None:
    try:
        return datetime.strptime(text, form)
    except ValueError:
        return None


def _strptime(time_format: str) -> Parser:
    """Return a parser that remembers dates and times of day, which repeat, where ``strptime`` is slow."""
    date_format, _, clock_format = time_format.partition(" ")
    dates, clocks = (set(re.findall("%(.)", form)) for form in (date_format, clock_format))
    if not {"Y", "d"} <= dates or not clocks or clocks - set("HIMSp"):
        return lambda text: _try(text, time_format)

    @lru_cache(maxsize=100_000)
    def half(text: str, form: str) -> datetime | None:
        return _try(text, form)

    def parse(text: str) -> datetime | None:
        date_text, _, clock_text = text.partition(" ")
        date, clock = half(date_text, date_format), half(clock_text, clock_format)
        return None if date is None or clock is None else datetime.combine(date, clock.time())

    return parse
