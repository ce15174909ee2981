"""Wide aggregates against a plain-Python oracle on random small worlds, in one Spark job."""

import math
import random
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from builders import make_event, make_frame, make_row
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow.dates import day_start
from couponflow.lake import literals
from couponflow.lake.layouts import WIDE_FEATURES, WINDOWS
from couponflow.sequences import aggregates

ZONE = "America/New_York"
FIRST = date(2024, 1, 1)
AS_OFS = (0, 1, 29, 57, 60, 92, 100, 115)
TYPES = ("purchase", "purchase", "view", "view", "search", "favourite", "cart", "mail_open", "mail_click")
MAIL = ("mail_open", "mail_click")
TABLES = ("events", "campaigns", "sends", "redemptions", "users", "orders", "catalogue")
Row = dict[str, Any]


def local(instant: datetime) -> date:
    return instant.astimezone(ZoneInfo(ZONE)).date()


def instant(rng: random.Random, day: int) -> datetime:
    start = day_start(FIRST + timedelta(days=day), ZONE)
    return start + timedelta(seconds=rng.choice([0, 1, 40_000, 70_000, 86_399]))


def some_day(rng: random.Random) -> int:
    """Any day, or one that lies exactly at, or one day beyond, the edge of a window."""
    edge = rng.choice(AS_OFS) - rng.choice([0, *WINDOWS]) - rng.choice([0, 1])
    return rng.choice([rng.randint(0, 110), edge, edge])


def random_world(rng: random.Random, case: str) -> dict[str, list[Row]]:
    world: dict[str, list[Row]] = {name: [] for name in TABLES}
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
        told = start + timedelta(days=rng.choice([0, 0, 30]))
        over = {"start_date": start, "end_date": end, "campaign_type": kind, "coupons": coupons}
        over["ingest_date"] = told
        world["campaigns"].append(make_row("campaigns", campaign_id=campaign, **over))
    user = f"{case}u"
    for number in range(rng.choice([0, 1, 4, 15, 40])):
        when = instant(rng, some_day(rng))
        arrived = when + timedelta(days=rng.choice([0, 0, 0, 1, 30]))
        over = {
            "event_id": f"{case}{number}",
            "event_type": rng.choice(TYPES),
            "event_time": when,
            "ingest_time": arrived,
            "event_date": local(when),
            "ingest_date": local(arrived),
            "order_id": rng.choice(["o1", "o2", "o3", None]),
            "item_id": rng.choice(["1", "2", "3", "4", "5", "6", None]),
            "category_id": rng.choice(["c1", "c2", "c3", None]),
            "shop_id": rng.choice(["s1", "s2", "s3", None]),
            "is_automated": rng.choice([False, False, True, None]),
            "price": rng.choice([0.1, 0.2, 3.335, 7.0, -4.0, None]),
            "coupon_amount": rng.choice([0.0, 0.55, None]),
            "coupon_match_amount": rng.choice([0.0, 0.25, None]),
            "discount_amount": rng.choice([0.0, 1.1, None]),
        }
        world["events"].append(make_event(user, 0, **over))
    for number, campaign in enumerate(rng.choices(campaigns, k=rng.choice([0, 1, 4, 9]))):
        when = instant(rng, some_day(rng))
        known = local(when) + timedelta(days=rng.choice([0, 0, 3]))
        over = {"user_id": user, "campaign_id": campaign, "ingest_date": known}
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
    for number in range(rng.choice([0, 1, 5])):
        when = instant(rng, some_day(rng))
        for delivery in range(rng.choice([1, 2])):  # placed, then told again with another status
            status_time = rng.choice([None, when + timedelta(days=delivery)])
            over = {"user_id": user, "order_time": when, "total_amount": rng.choice([1.1, 20.0])}
            over |= {"order_status": rng.choice([None, "placed", "cancelled", "returned"])}
            over |= {"status_time": status_time, "ingest_date": local(when) + timedelta(days=3 * delivery)}
            world["orders"].append(make_row("orders", order_id=f"{case}{number}", **over))
    return world


def catalogue() -> list[Row]:
    """One catalogue for all worlds: items change their shop on day 60."""
    return [
        make_row("catalogue", item_id=item, shop_id=shop, snapshot_date=FIRST + timedelta(days=day))
        for day, shops in ((10, ["s1", "s1", None, "s9", "s2"]), (60, ["s2", "s3", "s3", None, "s9"]))
        for item, shop in zip("12345", shops, strict=True)
    ]


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
    sent = [s for s in world["sends"] if s["delivered_time"] < as_of and s["ingest_date"] < day]
    received = {s["campaign_id"] for s in sent}
    ends = {c["campaign_id"]: c["end_date"] for c in world["campaigns"] if c["ingest_date"] < day}
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
        "num_campaigns_finished": len([c for c in received if c in ends and ends[c] < day]),
        "num_campaign_coupons": len(campaign["coupons"]),
        "num_campaign_items": len(items),
        "campaign_days": (campaign["end_date"] - campaign["start_date"]).days + 1,
    }
    for days in WINDOWS:
        raw |= {
            f"num_orders_{days}_days": orders(since(bought, days)),
            f"num_lines_{days}_days": len(since(bought, days)),
            f"spend_amount_{days}_days": money(since(bought, days), "price"),
            f"num_views_{days}_days": len(of_types(since(known, days), "view")),
            f"num_carts_{days}_days": len(of_types(since(known, days), "cart")),
            f"num_interests_{days}_days": len(of_types(since(known, days), "search", "favourite")),
        }
    for days in (7, 28):
        active = {e["event_date"] for e in since(known, days) if e["event_type"] not in MAIL}
        raw[f"num_active_days_{days}_days"] = len(active)
    for days in (7, 28, 91):
        recent = [s for s in sent if s["send_date"] >= day - timedelta(days=days)]
        raw[f"num_sends_{days}_days"] = len(recent)
    answers = [e for e in known if e["event_type"] in MAIL and not e["is_automated"]]
    for days in (28, 91):
        raw[f"num_opens_{days}_days"] = len(of_types(since(answers, days), "mail_open"))
        raw[f"num_clicks_{days}_days"] = len(of_types(since(answers, days), "mail_click"))
    last_open = max((e["event_time"] for e in of_types(answers, "mail_open")), default=None)
    told = {}
    for row in world["orders"]:
        if row["order_status"] in ("cancelled", "returned"):
            moved = row["status_time"]
            since_day = max(row["ingest_date"], local(moved or row["order_time"]), local(row["order_time"]))
            entry = (since_day, row["ingest_date"], row["total_amount"])
            told[row["order_id"]] = min(told.get(row["order_id"], entry), entry)
    returned = [amount for since_day, _, amount in told.values() if since_day < day]
    raw |= {
        "view_recency_days": recency([e["event_date"] for e in of_types(known, "view")]),
        "cart_recency_days": recency([e["event_date"] for e in of_types(known, "cart")]),
        "send_recency_days": recency([s["send_date"] for s in sent]),
        "num_sends_since_open": len([s for s in sent if not last_open or s["delivered_time"] > last_open]),
        "num_returned_orders": len(returned),
        "returned_amount_all": sum(returned),
    }
    snapshots = [row for row in catalogue() if row["snapshot_date"] < day]
    newest = max((row["snapshot_date"] for row in snapshots), default=None)
    shops = {
        row["shop_id"] for row in snapshots if row["snapshot_date"] == newest and row["item_id"] in items
    }
    plain = {}
    for affinity, wanted in (("category", categories), ("shop", shops - {None})):
        for span, rows in (("28_days", since(known, 28)), ("all", known)):
            named = [e for e in rows if e[f"{affinity}_id"]]
            hits = [e for e in named if e[f"{affinity}_id"] in wanted]
            raw[f"num_target_{affinity}_events_{span}"] = len(hits)
            raw[f"num_target_{affinity}_lines_{span}"] = len(of_types(hits, "purchase"))
            plain[f"target_{affinity}_event_share_{span}"] = ratio(len(hits), len(named))
            lines = of_types(hits, "purchase"), of_types(named, "purchase")
            plain[f"target_{affinity}_line_share_{span}"] = ratio(len(lines[0]), len(lines[1]))
    plain["redemption_rate"] = ratio(raw["num_redeemed_campaigns"], raw["num_campaigns_received"])
    plain["open_rate_91_days"] = ratio(raw["num_opens_91_days"], raw["num_sends_91_days"])
    plain["click_rate_91_days"] = ratio(raw["num_clicks_91_days"], raw["num_sends_91_days"])
    flags = {f"is_type_{x}": float(campaign["campaign_type"] == f"Type {x.upper()}") for x in "abc"}
    flags["has_attributes"] = float(attributes[-1]) if attributes else 0.0
    logs = {name: math.log1p(max(value, 0.0)) for name, value in raw.items()}
    return [(logs | flags | plain)[name] for name in WIDE_FEATURES]


def of_types(rows: list[Row], *types: str) -> list[Row]:
    return [row for row in rows if row["event_type"] in types]


def ratio(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 0.0


def test_aggregates_equal_the_oracle_and_stand_alone(spark: SparkSession) -> None:
    """Random worlds in one job; then a few rows alone, as scoring builds them: the same bytes."""
    worlds = {f"{n}/": random_world(random.Random(n), f"{n}/") for n in range(250)}
    worlds["0/"]["catalogue"] = catalogue()
    frames = {
        table: make_frame(spark, table, [row for world in worlds.values() for row in world[table]])
        for table in TABLES
    }
    keys: list[tuple[str, str, date]] = []
    for case in worlds:
        rng = random.Random(f"keys {case}")
        offsets = rng.sample(AS_OFS, 3)
        keys += [(case, f"{case}c{rng.randint(0, 2)}", FIRST + timedelta(days=days)) for days in offsets]
        # Several campaigns on one day.
        keys += [(case, f"{case}c{n}", FIRST + timedelta(days=offsets[0])) for n in range(3)]
    keys = sorted(set(keys))
    rows = [(f"{case}u", campaign, day_start(day, ZONE), day) for case, campaign, day in keys]
    population = literals.frame(
        spark, rows, "user_id string, campaign_id string, as_of timestamp, as_of_date date"
    )
    events = frames["events"].withColumn("known_date", aggregates.known_date(ZONE))
    others = tuple(frames[name] for name in TABLES[1:])
    built = aggregates.build(events.repartition(3), population, *others, ZONE).collect()
    assert len(built) == len(keys)
    day = FIRST + timedelta(days=92)
    alone = population.where((F.col("as_of_date") == F.lit(day)) & F.col("campaign_id").endswith("c1"))
    rows_alone = aggregates.build(events.repartition(2), alone, *others, ZONE).collect()
    assert len(rows_alone) > 50
    together = {(row["user_id"], row["campaign_id"], row["as_of_date"]): row["wide"] for row in built}
    assert all(together[r["user_id"], r["campaign_id"], r["as_of_date"]] == r["wide"] for r in rows_alone)
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
