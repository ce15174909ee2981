"""One user with 50,000 events through every stage that looks at users: no quadratic expression.

Seconds are a guard against a hang only; what is checked is the plan. Two traps were met: a field extracted
from a collected array and indexed inside a lambda (the array is extracted anew for each element), and lists
of structs per user that grow without bound.
"""

import re
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from builders import D0, T0, make_event, make_frame, make_row
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from test_histories import encoded

from couponflow.sections import EventsConfig
from couponflow.sequences import aggregates, histories, robots, sessions

NUM_EVENTS, SECONDS = 50_000, 120.0
#: A user's event times of one day, 8 bytes each, are all that may be collected per user.
BOUNDED = {"user_days"}
_INDEXED = re.compile(r"\w\[\(?lambda")


def indexed_fields(plan: str) -> list[str]:
    """Arrays that a lambda indexes by its variable: quadratic once the optimizer inlines the field."""
    return _INDEXED.findall(plan)


def whale(spark: SparkSession) -> DataFrame:
    """200 users with one event, and one with 50,000 over a day."""
    ids = {"item_id": "7", "category_id": "8", "shop_id": "9"}  # numbers stand for themselves when encoded
    few = [make_event(f"u{n}", n, **ids) for n in range(200)]
    one = make_frame(spark, "events", [make_event("whale", 0, **ids)])
    many = (
        one.crossJoin(spark.range(NUM_EVENTS))
        .withColumn("event_time", F.timestamp_micros(F.unix_micros("event_time") + F.col("id") * 1_700_000))
        .withColumn("ingest_time", F.col("event_time"))
        .withColumn("event_id", F.concat(F.lit("w"), F.col("id").cast("string")))
        .withColumn("order_id", F.concat(F.lit("o"), F.col("id").cast("string")))
        .withColumn("event_type", F.when(F.col("id") % 2 == 0, "view").otherwise("purchase"))
        .drop("id")
    )
    return many.unionByName(make_frame(spark, "events", few))


def wide(spark: SparkSession, frame: DataFrame, asked: DataFrame) -> DataFrame:
    """The aggregates of every user, for one campaign."""
    coupons = [{"coupon_id": "k", "category_id": "8", "item_ids": ["7"]}]
    dates = {"start_date": D0, "end_date": D0 + timedelta(days=9)}
    campaign = make_row("campaigns", campaign_id="c", coupons=coupons, ingest_date=D0, **dates)
    others = ("sends", "redemptions", "users", "orders", "catalogue")
    nothing = [make_frame(spark, name, []) for name in others]
    prepared = frame.withColumn("known_date", aggregates.known_date("UTC"))
    campaigns = make_frame(spark, "campaigns", [campaign])
    rows = asked.withColumn("campaign_id", F.lit("c"))
    return aggregates.build(prepared, rows, campaigns, *nothing, "UTC")


Stage = Callable[[SparkSession, DataFrame, DataFrame], DataFrame]
STAGES: dict[str, Stage] = {
    "segments": lambda spark, frame, asked: sessions.build_segments(frame, 30),
    "user_days": lambda spark, frame, asked: robots.build_user_days(frame, "UTC", EventsConfig()),
    "aggregates": wide,
    **{
        f"histories {method}": lambda spark, frame, asked, method=method: histories.build(
            encoded(frame), asked, 100, method
        )
        for method in histories.METHODS
    },
}


@pytest.mark.parametrize("name", STAGES)
def test_one_user_with_50_000_events_passes_every_stage(spark: SparkSession, name: str) -> None:
    frame = whale(spark)
    as_of = F.lit(T0 + timedelta(days=2)).alias("as_of")
    as_of_date = F.lit(D0 + timedelta(days=2)).alias("as_of_date")
    asked = frame.select("user_id").distinct().select("user_id", as_of, as_of_date)
    built = STAGES[name](spark, frame, asked)
    plan = built._jdf.queryExecution().optimizedPlan().toString()
    assert not indexed_fields(plan)
    lists = re.findall(r"collect_(?:list|set)\((?:\w+\()?", plan)
    assert not lists or name in BOUNDED, lists
    start = time.monotonic()
    rows = built.where("user_id = 'whale'").collect()
    assert time.monotonic() - start < SECONDS, "one user must not take minutes"
    assert len(rows) >= 1
    if name.startswith("histories"):
        assert rows[0]["length"] == 100
    if name == "segments":
        assert sum(row["num_events"] for row in rows) == NUM_EVENTS


def test_the_trap_is_seen_in_a_plan(spark: SparkSession) -> None:
    times = F.collect_list(F.struct("event_time", "event_id"))
    grouped = make_frame(spark, "events", [make_event()]).groupBy("user_id").agg(times.alias("r"))
    indexed = grouped.withColumn("t", F.col("r.event_time")).select(
        F.transform(F.sequence(F.lit(1), F.size("t")), lambda i: F.col("t")[i - 1])
    )
    assert indexed_fields(indexed._jdf.queryExecution().optimizedPlan().toString())
