"""Slow, obvious versions of sessions in plain Python; no code shared with the package."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta


@dataclass
class Segment:
    user: str
    day: date
    start: datetime
    end: datetime
    size: int


def segments(rows: Iterable[tuple[str, date, datetime]], gap_minutes: int) -> list[Segment]:
    """Cut each user's day where the silence is longer than the gap; rows are (user, day, time)."""
    found: list[Segment] = []
    for user, day, time in sorted(rows):
        last = found[-1] if found else None
        if (
            last
            and (last.user, last.day) == (user, day)
            and time - last.end <= timedelta(minutes=gap_minutes)
        ):
            last.end, last.size = time, last.size + 1
        else:
            found.append(Segment(user, day, time, time, 1))
    return found


def sessions(rows: Iterable[tuple[str, date, datetime]], gap_minutes: int) -> set[tuple[object, ...]]:
    """(user, session date, start, end, events, segments), by the midnight rule read word for word."""
    by_day: dict[tuple[str, date], list[Segment]] = defaultdict(list)
    for segment in segments(rows, gap_minutes):
        by_day[segment.user, segment.day].append(segment)
    one, gap = timedelta(days=1), timedelta(minutes=gap_minutes)

    def is_near(user: str, day: date) -> bool:
        today, before = by_day.get((user, day)), by_day.get((user, day - one))
        return bool(today and before and today[0].start - before[-1].end <= gap)

    def joins(user: str, day: date) -> bool:
        earlier_is_first = len(by_day.get((user, day - one), [])) == 1
        return is_near(user, day) and not (earlier_is_first and is_near(user, day - one))

    found: set[tuple[object, ...]] = set()
    for (user, day), own in list(by_day.items()):
        for n, segment in enumerate(own):
            if n == 0 and joins(user, day):
                continue
            end, size, parts = segment.end, segment.size, 1
            if n == len(own) - 1 and joins(user, day + one):
                tail = by_day[user, day + one][0]
                end, size, parts = tail.end, size + tail.size, 2
            found.add((user, day, segment.start, end, size, parts))
    return found
