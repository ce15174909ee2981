"""Slow, obvious versions in plain Python; no code shared with the package."""

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


_P1, _P2, _P3 = 11400714785074694791, 14029467366897019727, 1609587929392839161
_P4, _P5, _MASK = 9650029242287828579, 2870177450012600261, 2**64 - 1


def _turned(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & _MASK


def _round(total: int, word: int) -> int:
    return _turned((total + word * _P2) & _MASK, 31) * _P1 & _MASK


def xxhash64(text: str, seed: int = 42) -> int:
    """XXH64 of the UTF-8 bytes as a signed number, step by step as its specification has it."""
    data = text.encode()
    place = 0
    if len(data) >= 32:
        lanes = [(seed + _P1 + _P2) & _MASK, (seed + _P2) & _MASK, seed & _MASK, (seed - _P1) & _MASK]
        while place + 32 <= len(data):
            for lane in range(4):
                word = int.from_bytes(data[place + 8 * lane : place + 8 * lane + 8], "little")
                lanes[lane] = _round(lanes[lane], word)
            place += 32
        total = sum(_turned(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            total = ((total ^ _round(0, lane)) * _P1 + _P4) & _MASK
    else:
        total = (seed + _P5) & _MASK
    total = (total + len(data)) & _MASK
    while place + 8 <= len(data):
        total ^= _round(0, int.from_bytes(data[place : place + 8], "little"))
        total = (_turned(total, 27) * _P1 + _P4) & _MASK
        place += 8
    if place + 4 <= len(data):
        total ^= int.from_bytes(data[place : place + 4], "little") * _P1 & _MASK
        total = (_turned(total, 23) * _P2 + _P3) & _MASK
        place += 4
    for byte in data[place:]:
        total ^= byte * _P5 & _MASK
        total = _turned(total, 11) * _P1 & _MASK
    total = (total ^ (total >> 33)) * _P2 & _MASK
    total = (total ^ (total >> 29)) * _P3 & _MASK
    total ^= total >> 32
    return total - 2**64 if total >= 2**63 else total
