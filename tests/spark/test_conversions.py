"""Attribution windows at both edges, in the business time zone."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from builders import make_frame, make_row
from pyspark.sql import SparkSession

from couponflow.dates import DateRange
from couponflow.errors import DataError
from couponflow.lake import tables
from couponflow.sections import ConversionsConfig
from couponflow.sequences import conversions

ZONE = "America/New_York"
DELIVERED = datetime(2017, 3, 1, 15, tzinfo=UTC)
MICRO = timedelta(microseconds=1)


def campaign(**over: Any) -> dict[str, Any]:
    base = {"campaign_id": "7", "start_date": date(2017, 3, 1), "end_date": date(2017, 3, 12), "coupons": []}
    return make_row("campaigns", **(base | over))


def send(user_id: str, **over: Any) -> dict[str, Any]:
    base = {"send_id": f"s-{user_id}", "campaign_id": "7", "user_id": user_id, "delivered_time": DELIVERED}
    return make_row("sends", **(base | {"send_date": date(2017, 3, 1)} | over))


def redemption(user_id: str, time: datetime, **over: Any) -> dict[str, Any]:
    base = {"redemption_id": f"{user_id}{time}", "campaign_id": "7", "user_id": user_id}
    return make_row("redemptions", **(base | {"redemption_time": time} | over))


def test_the_campaign_window_is_half_open_between_local_midnights(spark: SparkSession) -> None:
    start = datetime(2017, 3, 1, 5, tzinfo=UTC)  # 00:00 EST
    end = datetime(2017, 3, 13, 4, tzinfo=UTC)  # 00:00 EDT: the clocks changed on the last day
    times = {"first": start, "before": start - MICRO, "last": end - MICRO, "after": end}
    rows = [redemption(user, time) for user, time in times.items()]
    rows += [redemption("first", start + timedelta(days=1)), redemption("first", start)]  # one copy, one more
    rows += [redemption("elsewhere", start, campaign_id="8")]
    sends = [send(user) for user in (*times, "elsewhere", "silent")]
    corrected = campaign(ingest_date=date(2024, 1, 9), end_date=date(2017, 3, 30))  # older, replaced
    found = conversions.attribute(
        make_frame(spark, "sends", sends),
        make_frame(spark, "redemptions", rows),
        make_frame(spark, "campaigns", [campaign(), corrected]),
        ConversionsConfig(source="redemptions", window="campaign"),
        ZONE,
    ).collect()
    shown = {r["send_id"]: (r["converted_time"].astimezone(UTC), r["num_conversions"]) for r in found}
    assert shown == {"s-first": (start, 2), "s-last": (end - MICRO, 1)}


def test_what_came_before_the_day_of_a_later_send_is_no_answer_to_it(spark: SparkSession) -> None:
    sent = DELIVERED + timedelta(days=3, hours=2)
    day = datetime(2017, 3, 4, 5, tzinfo=UTC)  # 00:00 EST of the send
    times = {"before": day - MICRO, "first": day, "last": datetime(2017, 3, 13, 4, tzinfo=UTC) - MICRO}
    sends = [send(user, delivered_time=sent, send_date=date(2017, 3, 4)) for user in times]
    early = {"delivered_time": DELIVERED - timedelta(days=9), "send_date": date(2017, 2, 20)}
    sends += [send("invited", **early), send("too soon", **early)]
    start = datetime(2017, 3, 1, 5, tzinfo=UTC)
    times |= {"invited": start, "too soon": start - MICRO}
    found = conversions.attribute(
        make_frame(spark, "sends", sends),
        make_frame(spark, "redemptions", [redemption(user, time) for user, time in times.items()]),
        make_frame(spark, "campaigns", [campaign()]),
        ConversionsConfig(source="redemptions", window="campaign"),
        ZONE,
    )
    assert {row["user_id"] for row in found.collect()} == {"first", "last", "invited"}


def test_the_first_delivery_of_a_send_counts_whatever_range_is_read(
    spark: SparkSession, root_uri: str
) -> None:
    days = DateRange.parse("2017-03-01:2017-03-03")
    again = {"ingest_date": date(2017, 3, 3)}
    sends = [
        send("u", ingest_date=date(2017, 3, 2)),
        send("u", **again) | {"user_id": "other"},
        send("moved", ingest_date=date(2017, 3, 1)),
        send("moved", **again, send_date=date(2017, 3, 3)),
        send("late", **again),
    ]
    tables.overwrite(make_frame(spark, "sends", sends), root_uri, "sends", days)
    whole, *by_day = (
        sorted((r["send_id"], r["user_id"], r["send_date"].day) for r in frame.collect())
        for frame in (
            conversions.read_sends(spark, root_uri, dates)
            for dates in (days, *map(DateRange.day, days.days()))
        )
    )
    assert whole == [("s-late", "late", 1), ("s-moved", "moved", 1), ("s-u", "u", 1)]
    assert sorted(row for rows in by_day for row in rows) == whole


def test_the_window_of_days_starts_at_the_send_and_takes_any_order(spark: SparkSession) -> None:
    end = DELIVERED + timedelta(days=14)
    times = {"first": DELIVERED, "before": DELIVERED - MICRO, "last": end - MICRO, "after": end}
    rows = [make_row("orders", order_id=user, user_id=user, order_time=time) for user, time in times.items()]
    found = conversions.attribute(
        make_frame(spark, "sends", [send(user) for user in times]),
        make_frame(spark, "orders", rows),
        make_frame(spark, "campaigns", []),
        ConversionsConfig(source="orders", window="days", label_days=14),
        ZONE,
    )
    assert {row["user_id"] for row in found.collect()} == {"first", "last"}


def test_sends_of_an_unknown_campaign_are_refused(spark: SparkSession) -> None:
    sends = make_frame(spark, "sends", [send("u", campaign_id="99")])
    with pytest.raises(DataError, match=r"campaign 99 .* clean_feeds"):
        conversions.check_campaigns(sends, make_frame(spark, "campaigns", [campaign()]))
