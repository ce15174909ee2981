"""Histories against a plain-Python oracle: cut-off, late arrivals, ties, the last L, huge users."""

import random
import re
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
from builders import D0, T0, make_event, make_frame, minutes
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.errors import ConfigError
from couponflow.lake import literals, tables
from couponflow.lake.layouts import HISTORY_FIELDS
from couponflow.sequences import histories

Key = tuple[str, datetime]


def encoded(events: DataFrame) -> DataFrame:
    """Ids that are numbers already stand for themselves."""
    ids = {"item": "item_id", "category": "category_id", "shop": "shop_id", "event_type": "quantity"}
    return events.select("*", *[F.col(c).cast("int").alias(f"{name}_index") for name, c in ids.items()])


def event(user: str, at: float, known: float | None = None, **over: Any) -> dict[str, Any]:
    late = minutes(at if known is None else known)
    base: dict[str, Any] = {"item_id": "9", "category_id": "8", "shop_id": "7", "quantity": 6}
    return make_event(user, at, **(base | {"ingest_time": late, "ingest_date": late.date()} | over))


def unpacked(frame: DataFrame) -> dict[Key, list[tuple[int, ...]]]:
    found = {}
    for row in frame.collect():
        matrix = np.frombuffer(row["history"], dtype="<i4").reshape(-1, len(HISTORY_FIELDS))
        assert len(matrix) == row["length"]
        found[row["user_id"], row["as_of"]] = [tuple(int(v) for v in line) for line in matrix]
    return found


def oracle(events: list[dict[str, Any]], as_of: datetime, length: int) -> list[tuple[int, ...]]:
    known = [e for e in events if e["event_time"] < as_of and e["ingest_time"] < as_of]
    known.sort(key=lambda e: (e["event_time"], e["event_id"]))
    return [
        (
            int(e["item_id"]),
            int(e["category_id"]),
            int(e["shop_id"]),
            e["quantity"],
            int((as_of - e["event_time"]) / timedelta(minutes=1)),
        )
        for e in known[-length:]
    ]


def population(spark: SparkSession, keys: list[Key]) -> DataFrame:
    rows = [(user, as_of, D0) for user, as_of in keys]
    return literals.frame(spark, rows, "user_id string, as_of timestamp, as_of_date date")


def random_case(rng: random.Random, user: str) -> tuple[list[dict[str, Any]], list[datetime]]:
    events = []
    for number in range(rng.choice([0, 1, 2, 8])):
        at = rng.choice([0, 1, 1, 2.5, 30, 59.999, 60, 61])
        known = at + rng.choice([0, 0, 0, 0.5, 30, 100])
        ids = {
            "item_id": str(number + 2),
            "category_id": str(rng.randint(1, 5)),
            "quantity": rng.randint(2, 8),
        }
        events.append(event(user, at, known, event_id=f"{rng.random()}", **ids))
    cutoffs = rng.sample([0, 1, 1.0001, 2.5, 60, 60.0001, 200], rng.randint(1, 4))
    return events, [minutes(cutoff) for cutoff in cutoffs]


@pytest.mark.parametrize("method", histories.METHODS)
def test_histories_equal_the_oracle(spark: SparkSession, method: str) -> None:
    cases = {f"{n}/u": random_case(random.Random(n), f"{n}/u") for n in range(200)}
    rows = [e for events, _ in cases.values() for e in events]
    copies = rows[::9]
    random.Random(0).shuffle(rows)
    strangers = [event("not in the population", 1)]
    keys = [(user, as_of) for user, (_, cutoffs) in cases.items() for as_of in cutoffs]
    frame = encoded(make_frame(spark, "events", rows + copies + strangers)).repartition(3)
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "7")  # cuts users across batches
    try:
        found = unpacked(histories.build(frame, population(spark, keys + keys[:5]), 3, method))
    finally:
        spark.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")
    expected = {
        (user, as_of): oracle(cases[user][0], as_of.replace(tzinfo=T0.tzinfo), 3) for user, as_of in keys
    }
    assert {
        (user, as_of.replace(tzinfo=T0.tzinfo)): steps for (user, as_of), steps in found.items()
    } == expected
    assert any(not steps for steps in expected.values())
    late = [e for events, _ in cases.values() for e in events if e["ingest_time"] > e["event_time"]]
    assert len(late) > 100


def test_golden_histories_and_a_user_with_50_000_events(spark: SparkSession) -> None:
    g11 = [event("g11", n, item_id=str(n), event_id=f"{n:05}") for n in range(1, 151)]
    letters = {"A": 10, "B": 20, "C": 20, "D": 30}
    g12 = [event("g12", at, item_id=str(ord(name)), event_id=name) for name, at in letters.items()]
    whale = (
        make_frame(spark, "events", [event("whale", 0)])
        .crossJoin(spark.range(50_000))
        .withColumn("event_time", F.timestamp_micros(F.unix_micros("event_time") + F.col("id") * 1_000_000))
        .withColumn("ingest_time", F.col("event_time"))
        .withColumn("item_id", F.col("id").cast("string"))
        .drop("id")
    )
    keys = [("g11", minutes(1000)), ("g12", minutes(20)), ("g12", minutes(30)), ("nobody", minutes(30))]
    keys += [("whale", T0 + timedelta(seconds=2_500 * n)) for n in range(1, 21)]
    frame = encoded(make_frame(spark, "events", g11 + g12).unionByName(whale))
    built = histories.build(frame, population(spark, keys), 100)
    assert tables.content_hash(built) == tables.content_hash(
        histories.build(frame, population(spark, keys), 100, "numpy")
    )
    found = unpacked(built)
    items = {(user, as_of.timestamp()): [step[0] for step in steps] for (user, as_of), steps in found.items()}
    by_key = {(user, as_of.timestamp()): (user, as_of) for user, as_of in keys}
    assert set(items) == set(by_key)

    def items_of(user: str, minute: float) -> list[int]:
        return items[user, minutes(minute).timestamp()]

    assert items_of("g11", 1000) == list(range(51, 151))  # G11: the last 100, oldest first
    assert items_of("g12", 20) == [ord("A")]  # G12: an equal time is not before
    assert items_of("g12", 30) == [ord(letter) for letter in "ABC"]
    assert items_of("nobody", 30) == []
    for number in range(1, 21):
        last = 2_500 * number
        assert items["whale", (T0 + timedelta(seconds=last)).timestamp()] == list(range(last - 100, last))
    plan = built._jdf.queryExecution().optimizedPlan().toString()
    assert not {"collect_list", "lambda"} & set(re.findall(r"\w+", plan)), "a list per user is quadratic"


def test_an_unknown_method_is_refused(spark: SparkSession) -> None:
    frame = encoded(make_frame(spark, "events", []))
    with pytest.raises(ConfigError, match=r"history_method 'fast': expected one of window, numpy, merge"):
        histories.build(frame, population(spark, []), 3, "fast")


def test_no_events_and_no_population(spark: SparkSession) -> None:
    nothing = encoded(make_frame(spark, "events", []))
    some = encoded(make_frame(spark, "events", [event("u", 1)]))
    for method in histories.METHODS:
        assert unpacked(histories.build(nothing, population(spark, []), 3, method)) == {}
        assert unpacked(histories.build(some, population(spark, []), 3, method)) == {}
        assert list(
            unpacked(histories.build(nothing, population(spark, [("u", T0)]), 3, method)).values()
        ) == [[]]


@pytest.mark.parametrize("longer", [2, 5])
def test_a_shorter_history_is_a_suffix_of_a_longer_one(spark: SparkSession, longer: int) -> None:
    rng = random.Random(9)
    events, _ = random_case(rng, "u")
    events += [event("u", n, n + 3 * (n % 2), item_id=str(50 + n)) for n in range(10)]
    frame = encoded(make_frame(spark, "events", events))
    keys = [("u", minutes(m)) for m in (4, 9, 70)]
    short, long = (unpacked(histories.build(frame, population(spark, keys), n)) for n in (2, longer))
    assert all(long[key][-2:] == short[key] for key in short)


def test_readable_unpacks_to_lists(spark: SparkSession) -> None:
    events = [event("u", 1, item_id="3"), event("u", 2, item_id="4")]
    keys = [("nobody", minutes(5)), ("u", minutes(5))]
    built = histories.build(encoded(make_frame(spark, "events", events)), population(spark, keys), 9)
    rows = histories.readable(built).orderBy("user_id").collect()
    assert [row["history_item"] for row in rows] == [[], [3, 4]]
    assert [row["history_age_minutes"] for row in rows] == [[], [4, 3]]
