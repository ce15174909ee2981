"""The NumPy side of histories against a slow obvious version. No JVM."""

import random
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from couponflow.lake.layouts import HISTORY_FIELDS
from couponflow.sequences import last_events
from couponflow.sequences.last_events import CUTOFF
from couponflow.sequences.packing import MICROS_PER_MINUTE

SCHEMA = pa.schema(
    [(name, pa.string() if name in ("user_id", "event_id") else pa.int64()) for name in last_events.COLUMNS]
)
Row = dict[str, Any]


def event(user: str, at: int, known_at: int, event_id: str, number: int, key: int = 0) -> Row:
    ids = {"ids_1": number << 32 | number + 1, "ids_2": number + 2 << 32 | number + 3}
    return {"key": key, "user_id": user, "at": at, "known_at": known_at, "event_id": event_id, **ids}


def cutoff(user: str, as_of: int, key: int = 0) -> Row:
    row = event(user, as_of, CUTOFF, "", 0, key)
    return row | {"ids_2": as_of // (1440 * MICROS_PER_MINUTE)}


def oracle(rows: list[Row], user: str, as_of: int, length: int) -> list[list[int]]:
    known: dict[tuple[int, str], Row] = {}
    for row in rows:
        if row["user_id"] == user and row["known_at"] != CUTOFF and max(row["at"], row["known_at"]) < as_of:
            name = (row["at"], row["event_id"])
            known[name] = min(known.get(name, row), row, key=lambda r: (r["known_at"], r["ids_1"]))
    kept = [known[name] for name in sorted(known)][-length:]
    return [
        [
            row["ids_1"] >> 32,
            row["ids_1"] % 2**32,
            row["ids_2"] >> 32,
            row["ids_2"] % 2**32,
            (as_of - row["at"]) // MICROS_PER_MINUTE,
        ]
        for row in kept
    ]


def unpacked(batches: list[pa.RecordBatch]) -> dict[tuple[str, int], list[list[int]]]:
    found = {}
    for batch in batches:
        for row in batch.to_pylist():
            matrix = np.frombuffer(row["history"], dtype="<i4").reshape(-1, len(HISTORY_FIELDS))
            assert len(matrix) == row["length"]
            as_of = round(row["as_of"].timestamp() * 1_000_000)
            assert row["as_of_date"] == date.fromordinal(719_163 + as_of // (1440 * MICROS_PER_MINUTE))
            assert (row["user_id"], as_of) not in found
            found[row["user_id"], as_of] = matrix.tolist()
    return found


def random_rows(rng: random.Random, scale: int) -> list[Row]:
    users = [f"u{n}" for n in range(rng.randint(1, 5))]
    groups = {user: rng.randint(0, 2) for user in users}  # users of one hash are told apart
    rows = []
    for number in range(rng.choice([0, 1, 3, 40, 120])):
        user, at = rng.choice(users), rng.randint(0, 12) * scale
        known_at = at + rng.choice([0, 0, -1, 1, 5, 1000]) * scale
        name = rng.choice(
            ["", "a", "ab", "ab\0", "ab\0\0\0\0\0\0", "event 12", "event 123", "é", f"{number}"]
        )
        rows.append(event(user, at, known_at, name, number, groups[user] << 32 | at // scale))
        if rng.random() < 0.2:  # a copy, delivered at another time
            rows.append(rows[-1] | {"known_at": known_at + rng.choice([0, 3 * scale])})
    for _ in range(rng.randint(0, 9)):
        user, at = rng.choice([*users, "nobody"]), rng.randint(-1, 14) * scale
        rows.append(cutoff(user, at, groups.get(user, 7) << 32 | max(at // scale, 0)))
    rng.shuffle(rows)
    return rows


def as_batches(rng: random.Random, rows: list[Row]) -> list[pa.RecordBatch]:
    cuts = sorted(rng.choices(range(len(rows) + 1), k=rng.randint(0, 6)))
    parts = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    return [pa.RecordBatch.from_pylist(part, schema=SCHEMA) for part in parts]


@pytest.mark.parametrize("way", ["stream", "at_once"])
@pytest.mark.parametrize("largest_key", [2**62, 10], ids=["time in the key", "rank of the time in the key"])
def test_random_rows_equal_the_oracle(way: str, largest_key: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_events, "_LEAST_ROWS", 10)
    monkeypatch.setattr(last_events, "_CHOSEN_AT_ONCE", 12)
    monkeypatch.setattr(last_events, "_LARGEST_KEY", largest_key)
    num_copies = num_late = 0
    for seed in range(300):
        rng = random.Random(seed)
        rows, length = random_rows(rng, MICROS_PER_MINUTE), rng.choice([1, 2, 3, 50])
        fed = sorted(rows, key=lambda row: row["key"]) if way == "stream" else rows
        found = unpacked(list(getattr(last_events, way)(as_batches(rng, fed), length)))
        asked = {(row["user_id"], row["at"]) for row in rows if row["known_at"] == CUTOFF}
        assert found == {key: oracle(rows, *key, length) for key in asked}, f"seed {seed}"
        num_copies += len(rows) - len({(r["user_id"], r["at"], r["event_id"]) for r in rows})
        num_late += sum(row["known_at"] > row["at"] for row in rows)
    assert num_copies > 100
    assert num_late > 1000


def test_whole_groups_never_cuts_a_user_whatever_the_batches() -> None:
    keys = [n << 32 | place for n, size in enumerate([5, 1, 4, 3]) for place in range(size)]
    for seed in range(200):
        rng = random.Random(seed)
        batches = as_batches(rng, [event("u", 0, 0, "", 0, key) for key in keys])
        groups = [t.column("key").to_pylist() for t in last_events.whole_groups(batches, 1)]
        assert [key for group in groups for key in group] == keys
        assert sum(len({key >> 32 for key in group}) for group in groups) == 4, "a group was cut"
        assert len(list(last_events.whole_groups(batches, 1000))) == 1


def test_first_bytes_order_as_the_texts_do() -> None:
    texts = ["", "a", "b", "ab", "abcdefgh", "abcdefghi", "é", "~", "abcdefg"]
    for array in (pa.array(texts), pa.array(["x", *texts, "y"]).slice(1, len(texts))):
        numbers = last_events.first_bytes(array)
        assert [int(n) for n in numbers] == [
            int.from_bytes(t.encode()[:8].ljust(8, b"\0"), "big") for t in texts
        ]


def test_a_user_whose_events_all_come_late_is_looked_through_in_bounded_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(last_events, "_CHOSEN_AT_ONCE", 100)
    known = np.where(np.arange(1000) < 7, 0, 10**6)
    stops = np.arange(0, 1001, 50)
    places, sizes = last_events.choose(known, np.zeros_like(stops), stops, np.full_like(stops, 10), 5)
    assert sizes.tolist() == [0] + [5] * 20
    assert places.tolist() == [2, 3, 4, 5, 6] * 20
