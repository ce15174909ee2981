"""Wide aggregates against a plain-Python oracle on random small worlds, in one Spark job."""

import math
import random
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from builders import make_event, make_frame, make_row
from pyspark.sql import SparkSession

from couponflow.dates import day_start
from couponflow.lake.layouts import WIDE_FEATURES
from couponflow.sequences import aggregates

ZONE = "America/New_York"
FIRST = date(2024, 1, 1)
Row = dict[str, Any]


def local(instant: datetime) -> date:
    return instant.astimezone(ZoneInfo(ZONE)).date()


def instant(rng: random.Random, day: int) -> datetime:
    start = day_start(FIRST + timedelta(days=day), ZONE)
    return start + timedelta(seconds=rng.choice([0, 1, 40_000, 70_000, 86_399]))


def random_world(rng: random.Random, case: str) -> dict[str, list[Row]]:
    world: dict[str, list[Row]] = {"events": [], "sends": [], "redemptions": [], "users": [], "campaigns": []}
    campaigns = [f"{case}c{n}" for n in range(3)]
    for campaign in campaigns:
        start = FIRST + timedelta(days=rng.randint(0, 100))
        named = rng.random() < 0.7
        coupons = [
            (
                f"k{n}",
                rng.choice(["c1", "c2", None]),
                rng.choices("12345", k=2) if named else rng.choice([[], None]),
            )
            for n in range(rng.randint(0, 3))
        ]
        end = start + timedelta(days=rng.randint(0, 30))
        kind = rng.choice(["Type A", "Type B", "Type C", "other"])
        over = {"start_date": start, "end_date": end, "campaign_type": kind, "coupons": coupons}
        world["campaigns"].append(make_row("campaigns", campaign_id=campaign, **over))
    user = f"{case}u"
    for number in range(rng.choice([0, 1, 4, 15])):
        when = instant(rng, rng.randint(0, 110))
        arrived = when + timedelta(days=rng.choice([0, 0, 0, 1, 30]))
        over = {
            "event_id": f"{case}{number}",
            "event_type": rng.choice(["purchase", "purchase", "purchase", "view"]),
            "event_time": when,
            "ingest_time": arrived,
            "event_date": local(when),
            "ingest_date": local(arrived),
            "order_id": rng.choice(["o1", "o2", "o3", None]),
            "item_id": rng.choice(["1", "2", "3", "4", "5", "6", None]),
            "category_id": rng.choice(["c1", "c2", "c3", None]),
            "price": rng.choice([0.1, 0.2, 3.335, 7.0, -4.0, None]),
            "coupon_amount": rng.choice([0.0, 0.55, None]),
            "coupon_match_amount": rng.choice([0.0, 0.25, None]),
            "discount_amount": rng.choice([0.0, 1.1, None]),
        }
        world["events"].append(make_event(user, 0, **over))
    for number, campaign in enumerate(rng.choices(campaigns, k=rng.randint(0, 4))):
        when = instant(rng, rng.randint(0, 110))
        over = {"user_id": user, "campaign_id": campaign, "ingest_date": local(when)}
        sent = make_row(
            "sends", send_id=f"{case}{number}", delivered_time=when, send_date=local(when), **over
        )
        world["sends"].append(sent)
    for number, campaign in enumerate(rng.choices(campaigns, k=rng.randint(0, 3))):
        when = instant(rng, rng.randint(0, 110))
        known = local(when) + timedelta(days=rng.choice([0, 2]))
        over = {"user_id": user, "campaign_id": campaign, "ingest_date": known, "redemption_time": when}
        world["redemptions"].append(make_row("redemptions", redemption_id=f"{case}{number}", **over))
    for day in (0, 60):
        snapshot = FIRST + timedelta(days=day)
        over = {"user_id": user, "has_attributes": rng.random() < 0.5, "snapshot_date": snapshot}
        world["users"].append(make_row("users", **over))
    return world


def oracle(world: dict[str, list[Row]], campaign_id: str, day: date) -> list[float]:
    as_of = day_start(day, ZONE)
    known = [e for e in world["events"] if e["event_time"] < as_of and e["ingest_time"] < as_of]
    bought = [e for e in known if e["event_type"] == "purchase"]

    def since(rows: list[Row], days: int) -> list[Row]:
        return [e for e in rows if e["event_date"] >= day - timedelta(days=days)]

    def orders(rows: list[Row]) -> int:
        return len({e["order_id"] for e in rows} - {None})

    def money(rows: list[Row], name: str) -> float:
        return sum(e[name] or 0.0 for e in rows)

    def recency(days: list[date]) -> int:
        return min(((day - d).days for d in days), default=365)

    coupon = [e for e in bought if (e["coupon_amount"] or 0) > 0]
    campaign = next(c for c in world["campaigns"] if c["campaign_id"] == campaign_id)
    items = {i for _, _, ids in campaign["coupons"] for i in ids or []}
    categories = {c for _, c, _ in campaign["coupons"]} - {None}
    promoted = [e for e in bought if (e["item_id"] in items if items else e["category_id"] in categories)]
    redeemed = [r for r in world["redemptions"] if r["redemption_time"] < as_of and r["ingest_date"] < day]
    received = {s["campaign_id"] for s in world["sends"] if s["delivered_time"] < as_of}
    ends = {c["campaign_id"]: c["end_date"] for c in world["campaigns"]}
    attributes = [u["has_attributes"] for u in world["users"] if u["snapshot_date"] < day]
    raw = {
        "num_orders_all": orders(bought),
        "num_orders_28_days": orders(since(bought, 28)),
        "num_orders_7_days": orders(since(bought, 7)),
        "num_lines_all": len(bought),
        "num_lines_28_days": len(since(bought, 28)),
        "spend_amount_all": money(bought, "price"),
        "spend_amount_28_days": money(since(bought, 28), "price"),
        "spend_amount_56_days": money(since(bought, 56), "price"),
        "recency_days": recency([e["event_date"] for e in bought]),
        "tenure_days": max(((day - e["event_date"]).days for e in known), default=0),
        "num_categories": len({e["category_id"] for e in bought} - {None}),
        "num_coupon_lines_all": len(coupon),
        "num_coupon_lines_28_days": len(since(coupon, 28)),
        "num_coupon_lines_91_days": len(since(coupon, 91)),
        "coupon_amount_all": money(bought, "coupon_amount"),
        "coupon_recency_days": recency([e["event_date"] for e in coupon]),
        "num_coupon_match_lines": len([e for e in bought if (e["coupon_match_amount"] or 0) > 0]),
        "discount_amount_all": money(bought, "discount_amount"),
        "num_discount_lines": len([e for e in bought if (e["discount_amount"] or 0) > 0]),
        "num_promoted_lines_all": len(promoted),
        "num_promoted_lines_56_days": len(since(promoted, 56)),
        "promoted_amount_all": money(promoted, "price"),
        "num_promoted_items": len({e["item_id"] for e in promoted} - {None}),
        "num_redemptions": len(redeemed),
        "num_redeemed_campaigns": len({r["campaign_id"] for r in redeemed}),
        "redemption_recency_days": recency([local(r["redemption_time"]) for r in redeemed]),
        "num_campaigns_received": len(received),
        "num_campaigns_finished": len([c for c in received if ends[c] < day]),
        "num_campaign_coupons": len(campaign["coupons"]),
        "num_campaign_items": len(items),
        "campaign_days": (campaign["end_date"] - campaign["start_date"]).days + 1,
    }
    flags = {f"is_type_{x}": float(campaign["campaign_type"] == f"Type {x.upper()}") for x in "abc"}
    flags["has_attributes"] = float(attributes[-1]) if attributes else 0.0
    logs = {name: math.log1p(max(value, 0.0)) for name, value in raw.items()}
    return [(logs | flags)[name] for name in WIDE_FEATURES]


def test_aggregates_equal_the_oracle(spark: SparkSession) -> None:
    worlds = {f"{n}/": random_world(random.Random(n), f"{n}/") for n in range(150)}
    frames = {
        table: make_frame(spark, table, [row for world in worlds.values() for row in world[table]])
        for table in ("events", "campaigns", "sends", "redemptions", "users")
    }
    keys = []
    for case in worlds:
        rng = random.Random(f"keys {case}")
        offsets = rng.sample([0, 1, 29, 57, 60, 92, 100, 115], 3)
        keys += [(case, f"{case}c{rng.randint(0, 2)}", FIRST + timedelta(days=days)) for days in offsets]
    rows = [(f"{case}u", campaign, day_start(day, ZONE), day) for case, campaign, day in keys]
    population = spark.createDataFrame(
        rows, "user_id string, campaign_id string, as_of timestamp, as_of_date date"
    )
    events = frames["events"].withColumn("known_date", aggregates.known_date(ZONE))
    others = (frames[name] for name in ("campaigns", "sends", "redemptions", "users"))
    built = aggregates.build(events.repartition(3), population, *others, ZONE).collect()
    assert len(built) == len(keys)
    found = {
        (row["user_id"], row["campaign_id"], row["as_of_date"]): np.frombuffer(row["wide"], dtype="<f4")
        for row in built
    }
    seen = np.zeros(len(WIDE_FEATURES), dtype=bool)
    for case, campaign, day in keys:
        expected = oracle(worlds[case], campaign, day)
        got = found[f"{case}u", campaign, day]
        # One float32 rounding of log1p, and money summed in micro-units.
        wrong = [
            f"{name}: {b} for {a}"
            for name, a, b in zip(WIDE_FEATURES, expected, got, strict=True)
            if abs(a - b) > 1e-6 * max(1.0, abs(a))
        ]
        assert not wrong, f"{case} {campaign} {day}: {wrong}"
        seen |= np.array(expected) > 0
    assert seen.all(), f"never above zero: {[n for n, s in zip(WIDE_FEATURES, seen, strict=True) if not s]}"


def test_known_date_uses_the_business_day_of_the_delivery(spark: SparkSession) -> None:
    midnight = datetime(2024, 1, 11, 5, tzinfo=UTC)  # of New York
    rows = [
        make_event(
            "u", 0, event_id=str(n), event_date=date(2024, 1, 10), ingest_time=midnight + timedelta(seconds=s)
        )
        for n, s in enumerate((-1, 0, 86_400))
    ]
    frame = make_frame(spark, "events", rows).select("event_id", aggregates.known_date(ZONE).alias("known"))
    assert {row["event_id"]: row["known"].day for row in frame.collect()} == {"0": 10, "1": 11, "2": 12}
