"""Date ranges and the instants around ``as_of``. Inclusive on the command line, half-open inside."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from couponflow.errors import ConfigError

_ISO_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
MAX_DAYS = 3_660
#: Days outside are typing errors; inside, adding days or a time zone never leaves the calendar.
FIRST_DAY, LAST_DAY = date(1900, 1, 1), date(2200, 12, 31)


def parse_day(text: str) -> date:
    """Read one ISO day such as ``2017-10-30``.

    Raises:
        ConfigError: the text is not a calendar day written YYYY-MM-DD, or is far from any data.
    """
    try:
        if not _ISO_DAY.fullmatch(text):
            raise ValueError(text)
        day = date.fromisoformat(text)
        if not FIRST_DAY <= day <= LAST_DAY:
            raise ValueError(text)
        return day
    except ValueError as error:
        raise ConfigError(
            f"date {text!r}: expected a calendar day such as 2017-10-30, from {FIRST_DAY} to {LAST_DAY}; "
            "correct the argument"
        ) from error


@dataclass(frozen=True, order=True)
class DateRange:
    """Days ``start <= day < end`` (half-open) in the business time zone."""

    start: date
    end: date

    def __post_init__(self) -> None:
        if not self.start < self.end:
            raise ConfigError(
                f"date range {self.start} to {self.end} is empty or reversed; give START:END in order"
            )
        if (self.end - self.start).days > MAX_DAYS:
            raise ConfigError(
                f"date range {self.start} to {self.end} is longer than {MAX_DAYS} days; split it"
            )

    @classmethod
    def parse(cls, text: str) -> "DateRange":
        """Read ``D`` or ``A:B``, both ends inclusive, as typed on a command line."""
        first, colon, last = text.partition(":")
        return cls(parse_day(first), parse_day(last if colon else first) + timedelta(days=1))

    @classmethod
    def day(cls, day: date) -> "DateRange":
        """The range of one day."""
        return cls(day, day + timedelta(days=1))

    @property
    def last(self) -> date:
        """The last day inside the range."""
        return self.end - timedelta(days=1)

    def __str__(self) -> str:
        return f"{self.start}:{self.last}"

    def __contains__(self, day: date) -> bool:
        return self.start <= day < self.end

    def __len__(self) -> int:
        return (self.end - self.start).days

    def overlaps(self, other: "DateRange") -> bool:
        """Whether the two have a day in common."""
        return self.start < other.end and other.start < self.end

    def days(self) -> Iterator[date]:
        """Every day, oldest first."""
        return (self.start + timedelta(days=n) for n in range(len(self)))

    def widen(self, before: int = 0, after: int = 0) -> "DateRange":
        """Add whole days on either side."""
        return DateRange(self.start - timedelta(days=before), self.end + timedelta(days=after))


def day_start(day: date, time_zone: str) -> datetime:
    """The UTC instant at which a business day begins (local midnight); this is ``as_of`` of that day."""
    return datetime.combine(day, time.min, tzinfo=ZoneInfo(time_zone)).astimezone(UTC)


def local_day(instant: datetime, time_zone: str) -> date:
    """The business day that holds a UTC instant."""
    return instant.astimezone(ZoneInfo(time_zone)).date()
