"""clean_events: every reason, conservation, duplicates, reruns; the read door for events."""

import json
import random
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import make_event, make_frame, test_config
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import Run, record_run
from couponflow.errors import ConfigError, DataError
from couponflow.lake import contracts, tables
from couponflow.sections import EventsConfig, QuarantineRule
from couponflow.sequences import events, feeds, robots
from jobs import clean_events

DAY = date(2024, 1, 10)
RULE = QuarantineRule(reason="till_line", where="shop_id = 'TILL' OR (quantity <= 0 AND price <= 0)")


def record(event_id: str, **over: Any) -> dict[str, Any]:
    base = {"event_id": event_id, "user_id": "u1", "event_type": "purchase", "item_id": "i1"}
    base |= {"event_time": "2024-01-10T10:00:00Z", "ingest_time": "2024-01-10T10:00:00Z"}
    return base | {"category_id": "c1", "shop_id": "s1", "price": 2.0, "quantity": 1} | over


def land(root_uri: str, rows: list[Any], day: date = DAY, name: str = "a.jsonl") -> None:
    """Deliver rows; declared columns that a record leaves out are null."""
    unknown = {column.name: None for column in contracts.FEEDS["events"].columns}
    rows = [unknown | row if isinstance(row, dict) else row for row in rows]
    folder = Path(root_uri) / "raw" / "events" / f"ingest_date={day}"
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text)


def clean(spark: SparkSession, config: Config, dates: DateRange) -> Run:
    with record_run("clean_events", config, dates) as job:
        clean_events.run(spark, job)
    return job


REFUSED: list[tuple[str, Any]] = [
    ("malformed_record", '{"event_id": "cut'),
    ("malformed_record", record("r1", price="dear")),
    ("till_line", record("r2", shop_id="TILL", user_id=None, note="a new column")),
    ("till_line", record("r3", quantity=0, price=0.0)),
    ("missing_user", record("r4", user_id=None)),
    ("missing_user", record("r5", user_id="")),
    ("missing_event_id", record("", price=1.0)),
    ("unknown_event_type", record("r6", event_type="teleport")),
    ("unknown_event_type", record("r7", event_type=None)),
    ("bad_time", record("r8", event_time="soon")),
    ("bad_time", record("r9", ingest_time=None)),
    ("clock_skew", record("r10", event_time="1970-01-01T00:00:00Z")),
    ("clock_skew", record("r11", event_time="2099-01-01T00:00:00Z")),
    ("future_event", record("r12", event_time="2024-01-10T11:00:00.000001Z")),
    ("future_event", record("r13", event_time="2024-01-12T00:00:00Z", ingest_time="2024-01-12T00:00:00Z")),
    ("too_late", record("r14", event_time="2024-01-06T23:59:59Z")),
    ("missing_item", record("r15", event_type="view", item_id=None)),
    ("missing_item", record("r16", event_type="cart", category_id="")),
    ("negative_price", record("r17", price=-0.01)),
    ("negative_price", record("r18", price=float("nan"))),
    ("negative_price", record("r20", price=float("inf"))),
    ("malformed_record", record("r21", coupon_amount=float("-inf"))),
    ("malformed_record", record("r22", discount_amount=float("nan"), price=None)),
    ("negative_quantity", record("r19", quantity=-1)),
]
KEPT = [
    record("k1"),
    record("k2", event_time="2024-01-10T11:00:00Z"),  # exactly an hour ahead
    record("k3", event_time="2024-01-07T00:00:00Z"),  # exactly at the horizon
    record("k4", event_type="search", item_id=None, category_id=None, price=None, quantity=None),
    record("k5", quantity=100),
    record("k6", quantity=101),
    record("k7", event_time="2024-01-11T00:30:00Z", ingest_time="2024-01-10T23:59:00Z"),
    record("k8", device="phone", price=None, discount_amount=1.0),
]
COPIES = [
    KEPT[0],
    record("d1", price=1.0, ingest_time="2024-01-10T12:00:00Z"),
    record("d1", price=3.0, ingest_time="2024-01-10T12:00:01Z"),  # the latest delivery stays
    record("d1", price=2.0, ingest_time="2024-01-10T11:59:00Z"),
    record("d1", price=-1.0, ingest_time="2024-01-10T15:00:00Z"),  # refused: hides no valid copy
]


def test_a_dirty_day_is_kept_counted_and_quarantined_row_by_row(
    spark: SparkSession, config: Config, tmp_path: Path
) -> None:
    rules = EventsConfig(pseudonymise=False, max_quantity=100, quarantine_rules=(RULE,))
    config = config.model_copy(update={"events": rules})
    rows = [row for _, row in REFUSED] + KEPT + COPIES
    land(config.lake.root_uri, rows)
    job = clean(spark, config, DateRange.day(DAY))
    assert job.rows["raw_rows"] == len(rows)
    assert job.rows["events"] == len(KEPT) + 1
    assert job.rows["duplicates"] == 3
    assert job.rows["quarantine"] == len(REFUSED) + 1
    assert job.rows["quarantine_negative_price"] == 4
    assert job.facts["new_columns"] == ["note"]
    refused = tables.read(spark, config.lake.root_uri, "quarantine")
    found = {row["row_number"]: row["reason"] for row in refused.collect()}
    wanted = {n: reason for n, (reason, _) in enumerate(REFUSED)}
    assert found == wanted | {len(rows) - 1: "negative_price"}
    assert not refused.where(F.col("redacted").contains("u1")).take(1)
    stored = tables.read(spark, config.lake.root_uri, "events")
    kept = {row["event_id"]: row for row in stored.collect()}
    assert set(kept) == {row["event_id"] for row in KEPT} | {"d1"}
    assert kept["d1"]["price"] == 3.0
    assert (kept["k5"]["quantity"], kept["k6"]["quantity"]) == (100, 1)
    assert kept["k7"]["event_date"] == date(2024, 1, 11)
    days = {
        (r["event_date"], r["num_events"])
        for r in tables.read(spark, config.lake.root_uri, "user_days").collect()
    }
    assert days == {(DAY, 7), (date(2024, 1, 7), 1), (date(2024, 1, 11), 1)}

    before = tables.content_hash(stored)
    clean(spark, config, DateRange.day(DAY))
    assert tables.content_hash(tables.read(spark, config.lake.root_uri, "events")) == before

    shuffled = test_config(tmp_path / "shuffled")
    random.Random(3).shuffle(rows)
    land(shuffled.lake.root_uri, rows[:9], name="z.jsonl")
    land(shuffled.lake.root_uri, rows[9:], name="b.jsonl")
    delivery = feeds.find_delivery(shuffled.lake.root_uri, "events", DateRange.day(DAY), ())
    again = events.clean(feeds.read_raw(spark, delivery), rules, "UTC", 3).rows
    assert tables.content_hash(again) == before

    (Path(config.lake.root_uri) / "raw/events/ingest_date=2024-01-10/a.jsonl").write_text("")
    assert clean(spark, config, DateRange.day(DAY)).rows["events"] == 0
    for table in ("events", "quarantine", "user_days"):
        assert tables.read(spark, config.lake.root_uri, table).count() == 0, table


def test_the_business_day_is_local_and_pseudonyms_replace_ids(spark: SparkSession, root_uri: str) -> None:
    rows = [record("a", event_time="2024-01-10T04:59:59Z"), record("b", event_time="2024-01-10T05:00:00Z")]
    land(root_uri, [*rows, record("c", user_id=None)])
    delivery = feeds.find_delivery(root_uri, "events", DateRange.day(DAY), ())
    key = feeds.PseudonymKey("v1", b"0123456789abcdef")
    cleaned = events.clean(feeds.read_raw(spark, delivery, key), EventsConfig(), "America/New_York", 3)
    found = {row["event_id"]: (row["event_date"], len(row["user_id"])) for row in cleaned.rows.collect()}
    assert found == {"a": (date(2024, 1, 9), 64), "b": (DAY, 64)}
    assert [row["reason"] for row in cleaned.quarantine.collect()] == ["missing_user"]


def test_a_rule_that_is_no_condition_and_a_missing_day_stop_before_any_write(
    spark: SparkSession, config: Config
) -> None:
    land(config.lake.root_uri, [record("a")])
    wrong = EventsConfig(
        pseudonymise=False, quarantine_rules=(QuarantineRule(reason="x", where="no_such > 1"),)
    )
    with pytest.raises(ConfigError, match=r"rule x: 'no_such > 1' is no condition"):
        clean(spark, config.model_copy(update={"events": wrong}), DateRange.day(DAY))
    with pytest.raises(DataError, match="no delivery for 2024-01-11"):
        clean(spark, config, DateRange.parse("2024-01-10:2024-01-11"))
    assert tables.version(spark, config.lake.root_uri, "events") is None


def test_the_first_delivery_wins_and_excluded_users_keep_their_purchases(
    spark: SparkSession, root_uri: str
) -> None:
    def views(user: str, count: int, seconds: float, **over: Any) -> list[dict[str, Any]]:
        return [
            make_event(user, n * seconds / 60, event_type="view", item_id=f"i{n % 40}", **over)
            for n in range(count)
        ]

    late = {"ingest_date": DAY + timedelta(days=1), "ingest_time": datetime(2024, 1, 11, tzinfo=UTC)}
    rows = [
        *views("bot", 150, 1.0),
        make_event("bot", 600, event_id="bought"),
        *views("quick", 90, 1.0),
        *views("slow", 150, 40.0),
        *views("tireless", 2_100, 30.0),
        *[make_event("receipt", 5, event_id=f"line{n}") for n in range(200)],
        make_event("late", 1, event_id="twice", price=1.0),
        make_event("late", 1, event_id="twice", price=9.0, **late),
        make_event("late", 2, event_id="once", **late),
    ]
    dates = DateRange.parse("2024-01-10:2024-01-11")
    tables.overwrite(make_frame(spark, "events", rows), root_uri, "events", dates)
    days = robots.build_user_days(events.read_first_deliveries(spark, root_uri, dates), "UTC", EventsConfig())
    tables.overwrite(days, root_uri, "user_days", dates)
    shown = {row["user_id"]: row for row in tables.read(spark, root_uri, "user_days").collect()}
    assert {user for user, row in shown.items() if row["exclusion_reason"] == "bot"} == {"bot", "tireless"}
    assert (shown["late"]["num_events"], shown["receipt"]["num_purchases"]) == (2, 200)
    found = events.read_events(spark, root_uri, DateRange.day(DAY))
    assert found.columns == tables.read(spark, root_uri, "events").columns
    counts = {row["user_id"]: row["count"] for row in found.groupBy("user_id").count().collect()}
    assert counts == {"bot": 1, "quick": 90, "slow": 150, "receipt": 200, "late": 2}
    assert {(r["event_id"], r["price"]) for r in found.where("user_id = 'late'").collect()} == {
        ("twice", 1.0),
        ("once", 1.0),
    }


def test_a_late_delivery_flips_no_flag_of_a_day_that_is_over(spark: SparkSession) -> None:
    zone = "America/New_York"
    midnight = datetime(2024, 1, 11, 5, tzinfo=UTC)  # of New York, when DAY is over
    tomorrow = {"ingest_date": DAY + timedelta(days=1), "ingest_time": midnight}

    def views(user: str, start: int, count: int, minutes: float, **over: Any) -> list[dict[str, Any]]:
        at = {"event_type": "view", "event_date": DAY} | over
        return [make_event(user, 600 + n * minutes, **at) for n in range(start, start + count)]

    in_time = [
        *views("becomes a bot", 0, 90, 1 / 60),
        *views("folder", 0, 90, 1 / 60),
        *views("is a bot", 0, 150, 1 / 60),
        *views("buys late", 0, 2_100, 0.2),
        *views("last second", 0, 90, 1 / 60),
        *views("last second", 90, 60, 1 / 60, ingest_time=midnight - timedelta(seconds=1)),
    ]
    late = [
        *views("becomes a bot", 90, 60, 1 / 60, **tomorrow),
        *views("folder", 90, 60, 1 / 60, ingest_time=midnight),  # filed under DAY, delivered after it
        *views("is a bot", 150, 300, 0.05, **tomorrow),
        make_event("buys late", 700, event_date=DAY, **tomorrow),
    ]
    seen, all_ = (
        {
            row["user_id"]: (row["exclusion_reason"], row["num_events"])
            for row in robots.build_user_days(
                make_frame(spark, "events", rows), zone, EventsConfig()
            ).collect()
        }
        for rows in (in_time, in_time + late)
    )
    assert {user for user, (reason, _) in seen.items() if reason} == {"is a bot", "buys late", "last second"}
    assert {user: reason for user, (reason, _) in all_.items()} == {
        u: reason for u, (reason, _) in seen.items()
    }
    assert sum(number for _, number in all_.values()) == len(in_time + late)
