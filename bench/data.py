"""Seeded events for the benchmarks, written once into ``var/bench`` and reused while this file is unchanged.

Zipf users and items, sessions of mean 8, 1 % exact copies, 0.5 % late deliveries, one bot of 50,000 events.
Ids are hexadecimal text of the length that pseudonyms and event ids have in a lake.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from couponflow.sequences.packing import splitmix64

FOLDER = Path(__file__).parents[1] / "var" / "bench"
START, DAYS = datetime(2024, 1, 1, tzinfo=UTC), 90
#: Just after the last event, so that every event is usable unless it is late.
END = datetime(2024, 3, 31, tzinfo=UTC)
EVENTS_PER_USER, EVENTS_PER_SESSION, BOT_EVENTS = 41, 8, 50_000
NUM_ITEMS, NUM_CATEGORIES, NUM_SHOPS, NUM_TYPES = 50_000, 300, 40, 7
COPIED, LATE, TIED = 0.01, 0.005, 0.05
_PART_ROWS = 1_000_000
_DAY = 86_400_000_000
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How many events; ``whale`` adds one user with that many more."""

    num_events: int
    whale: int = 0
    seed: int = 0

    @property
    def num_users(self) -> int:
        """Users without bot and whale."""
        return max(1, self.num_events // EVENTS_PER_USER)


def events(size: Size) -> Path:
    """The folder of Parquet files of a size; made at the first call.

    Columns: user_id, event_id, event_time, ingest_time (UTC, microseconds) and the four vocabulary indices.
    """
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    folder = FOLDER / f"events-{size.num_events}-{size.whale}-{size.seed}-{code}"
    if (folder / "_SUCCESS").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, size.num_events, _PART_ROWS)):
        rows = min(_PART_ROWS, size.num_events - first)
        table = _part(size, number, rows)
        pq.write_table(table, folder / f"part-{number:04}.parquet", compression="snappy")
    if size.whale:
        whale = _rows(size, 10_000, np.full(size.whale, size.num_users + 1), _steady(size.whale, 7_000_000))
        pq.write_table(whale, folder / "part-whale.parquet", compression="snappy")
    (folder / "_SUCCESS").touch()
    return folder


def _part(size: Size, number: int, rows: int) -> pa.Table:
    generator = np.random.default_rng([size.seed, number])
    users, times = _sessions(generator, size.num_users, rows)
    if number == 0 and rows > BOT_EVENTS:
        users[:BOT_EVENTS], times[:BOT_EVENTS] = size.num_users, _steady(BOT_EVENTS, 1_000_000)
    table = _rows(size, number, users, times)
    copies = generator.integers(rows, size=int(rows * COPIED))
    place = np.sort(np.concatenate([np.arange(rows - len(copies)), copies]))
    return table.take(pa.array(place))


def _sessions(generator: np.random.Generator, num_users: int, rows: int) -> tuple[Int64, Int64]:
    """Users and times of ``rows`` events, session by session."""
    lengths = generator.geometric(1 / EVENTS_PER_SESSION, size=rows)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), rows) + 1]
    of_session = np.repeat(np.arange(len(lengths)), lengths)[:rows]
    users = _zipf(generator, num_users, 0.6, len(lengths))
    starts = generator.integers(DAYS * _DAY, size=len(lengths))
    gaps = (generator.exponential(90.0, size=rows) * 1_000).astype(np.int64) * 1_000  # milliseconds
    gaps[generator.random(rows) < TIED] = 0
    walked = np.cumsum(gaps)
    first = np.flatnonzero(np.diff(of_session, prepend=-1))
    times = starts[of_session] + walked - np.repeat(walked[first], np.diff(np.append(first, rows)))
    return users[of_session], np.minimum(times // 1_000 * 1_000, DAYS * _DAY - 1)


def _rows(size: Size, number: int, users: Int64, times: Int64) -> pa.Table:
    """The table of one part, in order of delivery."""
    generator = np.random.default_rng([size.seed, number, 1])
    rows = len(users)
    start = int(START.timestamp()) * 1_000_000
    delay = np.full(rows, 5_000_000)
    late = generator.random(rows) < LATE
    delay[late] = generator.integers(3_600_000_000, 3 * _DAY, size=int(late.sum()))
    items = _zipf(generator, NUM_ITEMS, 0.9, rows)
    ids = splitmix64(np.arange(rows, dtype=np.uint64) + np.uint64(number * 2**32 + size.seed * 2**48))
    people = splitmix64(users.astype(np.uint64) + np.uint64(2**60))
    order = np.argsort(times + delay, kind="stable")
    known = pa.timestamp("us", tz="UTC")
    return pa.table(
        {
            "user_id": _hexadecimal(people, splitmix64(people)).take(pa.array(order)),
            "event_id": _hexadecimal(ids).take(pa.array(order)),
            "event_time": pa.array(start + times[order]).cast(known),
            "ingest_time": pa.array(start + (times + delay)[order]).cast(known),
            "item_index": pa.array((items + 2).astype(np.int32)[order]),
            "category_index": pa.array((items % NUM_CATEGORIES + 2).astype(np.int32)[order]),
            "shop_index": pa.array((items % NUM_SHOPS + 2).astype(np.int32)[order]),
            "event_type_index": pa.array(generator.integers(2, NUM_TYPES + 2, rows).astype(np.int32)),
        }
    )


def _zipf(generator: np.random.Generator, size: int, exponent: float, draws: int) -> Int64:
    weights = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    places = np.cumsum(weights) / weights.sum()
    drawn = np.searchsorted(places, generator.random(draws))
    return np.minimum(drawn, size - 1).astype(np.int64)


def _steady(rows: int, gap: int) -> Int64:
    return (np.arange(rows, dtype=np.int64) * gap) % (DAYS * _DAY)


def _hexadecimal(*numbers: NDArray[np.uint64]) -> pa.Array:
    """Each row's numbers as 16 hexadecimal digits each."""
    pairs = np.frombuffer("".join(f"{n:02x}" for n in range(256)).encode(), dtype="u1").reshape(256, 2)
    text = np.concatenate([pairs[n.astype(">u8").view("u1").reshape(-1, 8)] for n in numbers], axis=1)
    width = 16 * len(numbers)
    offsets = np.arange(len(numbers[0]) + 1, dtype=np.int32) * width
    return pa.StringArray.from_buffers(len(numbers[0]), pa.py_buffer(offsets), pa.py_buffer(text.tobytes()))
