"""The hours in which a hospital lends its machine. Pure."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from shared.errors import PolicyError

ANY = "any"
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FORM = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d) ([+-])(\d\d):(\d\d)")
_DAY = 24 * 60


@dataclass(frozen=True)
class Hours:
    """A daily window at a fixed offset from UTC: no time zone whose rules change twice a year and with politics.

    Attributes:
        opens: Minutes after midnight.
        minutes: How long it stays open, up to a day; a window past midnight belongs to the day it opens.
        offset: From UTC.
        days: Weekdays on which it opens, 0 is Monday.
    """

    opens: int
    minutes: int
    offset: timedelta
    days: frozenset[int]

    @classmethod
    def parse(cls, text: str, days: tuple[str, ...] = DAYS) -> "Hours":
        """Read ``any`` or ``22:00-06:00 +01:00``.

        Raises:
            PolicyError: If it is neither, or a weekday is not of ``DAYS``.
        """
        if not days or not set(days) <= set(DAYS):
            raise PolicyError(f"site.toml is wrong: days must be some of {', '.join(DAYS)}.")
        chosen = frozenset(DAYS.index(day) for day in days)
        if text == ANY:
            return cls(0, _DAY, timedelta(), chosen)
        form = _FORM.fullmatch(text)
        numbers = [int(form[n]) for n in (1, 2, 3, 4, 6, 7)] if form else []
        if form is None or any(hour > 23 for hour in numbers[::2]) or any(minute > 59 for minute in numbers[1::2]):
            raise PolicyError('site.toml is wrong: hours must be "any" or like "22:00-06:00 +01:00".')
        opens, closes, offset = (60 * hour + minute for hour, minute in zip(numbers[::2], numbers[1::2], strict=True))
        return cls(opens, (closes - opens) % _DAY or _DAY, timedelta(minutes=int(form[5] + str(offset))), chosen)

    def permit(self, moment: datetime) -> bool:
        """Whether the window is open at a moment that knows its time zone."""
        local = moment.astimezone(timezone(self.offset))
        since = (60 * local.hour + local.minute - self.opens) % _DAY
        opened = local - timedelta(minutes=since)
        return since < self.minutes and opened.weekday() in self.days
