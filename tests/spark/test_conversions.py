"""Attribution windows at both edges, in the business time zone."""

import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from builders import make_frame, make_row
from pyspark.sql import SparkSession

from couponflow.dates import DateRange, local_day
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
    base: dict[str, Any] = {"redemption_id": f"{user_id}{time}", "campaign_id": "7", "user_id": user_id}
    base["ingest_date"] = local_day(time, ZONE)
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
        send("receipt", **again, mail_type="transactional"),  # nobody chose whom to send it to
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
    rows = [order(user, time, local_day(time, ZONE)) for user, time in times.items()]
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


def order(user_id: str, time: datetime, known: date, **over: Any) -> dict[str, Any]:
    base = {"order_id": f"o-{user_id}", "user_id": user_id, "order_time": time, "ingest_date": known}
    return make_row("orders", **(base | over))


def proven(spark: SparkSession, orders: list[dict[str, Any]], **settings: Any) -> set[str]:
    users = sorted({row["user_id"] for row in orders})
    found = conversions.attribute(
        make_frame(spark, "sends", [send(user) for user in users]),
        make_frame(spark, "orders", orders),
        make_frame(spark, "campaigns", []),
        ConversionsConfig(source="orders", window="days", **settings),
        ZONE,
    )
    return {row["user_id"] for row in found.collect()}


def test_the_gap_moves_the_window(spark: SparkSession) -> None:
    start, end = DELIVERED + timedelta(days=3), DELIVERED + timedelta(days=10)
    times = {"first": start, "before": start - MICRO, "last": end - MICRO, "after": end}
    orders = [order(user, time, local_day(time, ZONE)) for user, time in times.items()]
    assert proven(spark, orders, gap_days=3, label_days=7) == {"first", "last"}
    windowed = conversions.with_label_window(
        make_frame(spark, "sends", [send("u"), send("late", delivered_time=DELIVERED + timedelta(days=9))]),
        make_frame(spark, "campaigns", [campaign()]),
        ConversionsConfig(window="campaign", gap_days=3, return_days=2),
        ZONE,
    )
    row = next(r for r in windowed.collect() if r["user_id"] == "u")
    assert [row[name].astimezone(UTC) for name in ("label_start", "label_end", "mature_time")] == [
        datetime(2017, 3, 4, 5, tzinfo=UTC),
        datetime(2017, 3, 13, 4, tzinfo=UTC),
        datetime(2017, 3, 15, 4, tzinfo=UTC),
    ]


def test_an_order_undone_before_its_return_window_is_over_proves_nothing(spark: SparkSession) -> None:
    """Seven days of window, five to return: each case is one user with one order on day 2."""
    placed = DELIVERED + timedelta(days=2)
    over = placed + timedelta(days=5)
    day = date(2017, 3, 3)
    said: dict[str, tuple[str | None, datetime | None, date]] = {
        "kept": (None, None, day),
        "placed": ("placed", placed, day),
        "cancelled at once": ("cancelled", placed, day),
        "cancelled, no time": ("cancelled", None, day),
        "returned in time": ("returned", over - MICRO, date(2017, 3, 8)),
        "returned too late": ("returned", over, date(2017, 3, 8)),
        "told on the last day": ("returned", over - MICRO, date(2017, 3, 13)),
        "told after it": ("returned", over - MICRO, date(2017, 3, 14)),
    }
    orders = []
    for user, (status, when, known) in said.items():
        first = {} if known > day else {"order_status": status, "status_time": when}
        orders.append(order(user, placed, day, **first))
        if known > day:  # told by a later delivery of the same order
            orders.append(order(user, placed, known, order_status=status, status_time=when))
    kept = {"kept", "placed", "returned too late", "told after it"}
    assert proven(spark, orders, label_days=7, return_days=5) == kept
    assert proven(spark, orders, label_days=7) == set(said), "return_days = 0 counts every order"


def test_later_deliveries_never_change_a_mature_label(spark: SparkSession) -> None:
    """What arrives after the day a send matures on leaves its label as it was."""
    rng = random.Random(11)
    label_days, return_days = 7, 3
    mature = DELIVERED + timedelta(days=label_days + return_days)
    last_day = date(2017, 3, 11)  # local day on which the last label is final
    orders = []
    for number in range(300):
        placed = DELIVERED + timedelta(hours=rng.randint(-30, 24 * 9))
        for delivery in range(rng.randint(1, 3)):
            known = placed.date() + timedelta(days=rng.choice([0, 0, 1, 2, 9, 12]) + delivery)
            status = rng.choice([None, "placed", "cancelled", "returned"])
            when = placed + timedelta(hours=rng.randint(0, 24 * 6)) if status else None
            moved = placed + timedelta(hours=rng.choice([0, 0, -100, 100]) if delivery else 0)
            orders.append(order(f"u{number}", moved, known, order_status=status, status_time=when))
    orders = list({(row["order_id"], row["ingest_date"]): row for row in orders}.values())
    known_then = [row for row in orders if row["ingest_date"] <= last_day]
    settings = {"label_days": label_days, "return_days": return_days}
    whole, then = (proven(spark, rows, **settings) for rows in (orders, known_then))
    assert whole == then

    def is_proof(user: str) -> bool:
        mine = sorted((row for row in known_then if row["user_id"] == user), key=lambda r: r["ingest_date"])
        if not mine or not DELIVERED <= mine[0]["order_time"] < mature - timedelta(days=return_days):
            return False
        end = mine[0]["order_time"] + timedelta(days=return_days)
        undone = [r for r in mine if r["order_status"] in ("cancelled", "returned")]
        return not any(r["status_time"] < end for r in undone)

    assert whole == {user for user in {row["user_id"] for row in orders} if is_proof(user)}
    assert 30 < len(whole) < 200


def test_proofs_are_read_with_their_later_deliveries(spark: SparkSession, root_uri: str) -> None:
    placed = DELIVERED + timedelta(days=13)
    rows = [
        order("u", placed, date(2017, 3, 14)),
        order("u", placed, date(2017, 3, 24), order_status="returned", status_time=placed),
        order("early", DELIVERED, date(2017, 2, 26)),
        order("u", placed, date(2017, 3, 28)),
    ]
    tables.overwrite(
        make_frame(spark, "orders", rows), root_uri, "orders", DateRange.parse("2017-02-01:2017-03-31")
    )
    settings = ConversionsConfig(source="orders", label_days=14, return_days=10)
    sends, campaigns = make_frame(spark, "sends", [send("u")]), make_frame(spark, "campaigns", [])
    read = conversions.read_proofs(spark, root_uri, sends, campaigns, settings, ZONE).collect()
    assert sorted(row["ingest_date"].day for row in read) == [14, 24]
    none = conversions.read_proofs(spark, root_uri, sends.where("false"), campaigns, settings, ZONE)
    assert none.count() == 0
