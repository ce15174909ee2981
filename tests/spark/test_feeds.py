"""clean_feeds: every feed into its table, duplicates, reasons, conservation."""

import json
from datetime import date
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import Run, record_run
from couponflow.errors import DataError
from couponflow.lake import contracts, erased, literals, tables
from couponflow.sections import EventsConfig
from couponflow.sequences import events, feeds, records
from jobs import clean_feeds

DAYS = DateRange.parse("2024-01-10:2024-01-11")
NOON = "2024-01-10T12:00:00Z"
SEND = {"send_id": "s1", "campaign_id": "1", "user_id": "u1", "delivered_time": NOON, "propensity": None}
CONSENT = {"user_id": "u1", "channel": "mail", "purpose": "marketing", "state": "granted"}
CONSENT |= {"updated_time": NOON, "source": "crm"}
ORDER = {"order_id": "o1", "user_id": "u1", "order_time": NOON, "total_amount": 4.0}
CAMPAIGN = {"campaign_id": "1", "campaign_type": "A", "start_date": "2024-01-10", "end_date": "2024-01-20"}
CAMPAIGN |= {"coupons": [{"coupon_id": "k", "category_id": "c1", "item_ids": ["i1"]}]}  # type: ignore[dict-item]  # JSON


def land(root_uri: str, feed: str, rows: list[Any], day: str = "2024-01-10", name: str = "a.jsonl") -> None:
    """Deliver rows; declared columns that a record leaves out are null."""
    unknown = {column.name: None for column in contracts.FEEDS[feed].columns}
    rows = [unknown | row if isinstance(row, dict) else row for row in rows]
    folder = Path(root_uri) / "raw" / feed / f"ingest_date={day}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def clean(spark: SparkSession, config: Config) -> Run:
    with record_run("clean_feeds", config, DAYS) as job:
        clean_feeds.run(spark, job)
    return job


def test_feeds_land_in_their_tables_with_reasons_and_counts(spark: SparkSession, config: Config) -> None:
    root = config.lake.root_uri
    local = config.model_copy(
        update={"lake": config.lake.model_copy(update={"time_zone": "America/New_York"})}
    )
    old = SEND | {"send_id": "s2", "delivered_time": "2023-11-05T04:30:00Z"}
    old |= {"campaign_id": "another team's", "mail_type": "transactional"}
    land(root, "sends", [SEND, SEND, old, SEND | {"send_id": None}, SEND | {"delivered_time": "noon"}])
    land(root, "sends", [SEND | {"coupon_id": "later file"}], name="b.jsonl")
    land(root, "sends", [SEND], day="2024-01-11")
    land(root, "orders", [ORDER, ORDER | {"order_id": "o2", "total_amount": None}])
    land(root, "orders", [], day="2024-01-11")
    land(root, "campaigns", [CAMPAIGN, CAMPAIGN | {"campaign_id": "2", "end_date": "2024-01-09"}])
    land(root, "consents", [CONSENT, CONSENT | {"user_id": "u2", "state": "perhaps"}])
    left = CONSENT | {"state": "denied", "reason": "bounce"}
    land(root, "consents", [left, CONSENT | {"updated_time": "2024-01-09T12:00:00Z"}], day="2024-01-11")
    land(root, "users", [{"user_id": "u1", "has_attributes": True, "attributes": {"age": "45"}, "extra": 1}])

    job = clean(spark, local)
    sends = {(r["send_id"], r["ingest_date"].day): r for r in tables.read(spark, root, "sends").collect()}
    assert (sends["s2", 10].campaign_id, sends["s2", 10].mail_type) == ("another team's", "transactional")
    assert sends["s1", 10].mail_type is None
    assert set(sends) == {("s1", 10), ("s1", 11), ("s2", 10)}
    assert sends["s1", 10]["coupon_id"] == "later file"
    assert sends["s2", 10]["send_date"] == date(2023, 11, 5)  # 00:30 EDT
    assert (job.rows["sends_raw_rows"], job.rows["sends"], job.rows["sends_duplicates"]) == (7, 3, 2)
    landed = {"sends": 7, "orders": 2, "campaigns": 2, "consents": 4, "users": 1}
    for feed in set(contracts.FEEDS) - {"events"}:
        raw, *parts = (job.rows[f"{feed}{part}"] for part in ("_raw_rows", "", "_duplicates", "_quarantine"))
        assert raw == sum(parts) == landed.get(feed, 0), feed
    refused = tables.read(spark, root, "quarantine").collect()
    assert {(r["feed"], r["row_number"], r["reason"]) for r in refused} == {
        ("sends", 3, "missing_send_id"),
        ("sends", 4, "bad_time"),
        ("orders", 1, "missing_total_amount"),
        ("campaigns", 1, "bad_time"),
        ("consents", 1, "unknown_state"),
    }
    consents = tables.read(spark, root, "consents").collect()
    found = {r["snapshot_date"].day: (r["state"], r["reason"]) for r in consents}
    assert found == {10: ("granted", None), 11: ("denied", "bounce")}  # the older grant comes second
    campaign = tables.read(spark, root, "campaigns").collect()
    assert [(r["campaign_id"], r["coupons"][0]["item_ids"]) for r in campaign] == [("1", ["i1"])]
    assert tables.read(spark, root, "users").collect()[0]["attributes"] == {"age": "45"}
    assert job.facts["users"]["new_columns"] == ["extra"]
    assert job.rows["catalogue"] == 0

    land(root, "sends", [SEND])  # the sender repaired the file: stale refusals must go, other feeds' stay
    clean(spark, local)
    left = tables.read(spark, root, "quarantine").where("feed in ('sends', 'orders')").collect()
    assert [(r["feed"], r["reason"]) for r in left] == [("orders", "missing_total_amount")]


def test_orders_and_costs_keep_the_newest_state_and_refuse_what_is_no_amount(
    spark: SparkSession, config: Config
) -> None:
    root = config.lake.root_uri
    nan, inf = float("nan"), float("inf")
    ended = {"order_status": "returned", "status_time": "2024-01-12T00:00:00Z"}
    land(
        root,
        "orders",
        [
            ORDER | {"order_status": "cancelled", "status_time": "2024-01-11T00:00:00Z"},
            ORDER | ended,
            ORDER,  # placed: comes last in the file, and is no newer
            ORDER | {"order_id": "o2", "order_status": "lost"},
            ORDER | {"order_id": "o3", "order_status": "cancelled"},
            ORDER | {"order_id": "o4", "total_amount": nan},
            ORDER | {"order_id": "o5", "order_time": "1970-01-01T00:00:05Z"},
            ORDER | {"order_id": "o6"} | ended | {"status_time": "2099-06-01T00:00:00Z"},
            ORDER | {"order_id": "o7"},
        ],
    )
    land(root, "orders", [ORDER], day="2024-01-11")
    costs = [(5.0, "mail"), (0.0, "other"), (-0.01, "mail"), (inf, "mail"), (nan, "mail"), (None, "mail")]
    land(
        root,
        "costs",
        [
            {"campaign_id": f"c{n}", "cost_date": "2024-01-09", "cost_type": kind, "cost_amount": amount}
            for n, (amount, kind) in enumerate([*costs, (1.0, "lunch"), (2.0, None)])
        ],
    )
    job = clean(spark, config)
    orders = tables.read(spark, root, "orders").collect()
    assert {(r["order_id"], r["ingest_date"].day): r["order_status"] for r in orders} == {
        ("o1", 10): "returned",
        ("o1", 11): None,
        ("o7", 10): None,
    }
    assert (job.rows["orders_duplicates_exact"], job.rows["orders_duplicates_conflicting"]) == (0, 2)
    refused = tables.read(spark, root, "quarantine").collect()
    assert {(r["feed"], r["row_number"]): r["reason"] for r in refused} == {
        ("orders", 3): "unknown_state",
        ("orders", 4): "bad_time",
        ("orders", 5): "malformed_record",
        ("orders", 6): "clock_skew",
        ("orders", 7): "clock_skew",
        ("costs", 2): "negative_cost",
        ("costs", 3): "negative_cost",
        ("costs", 4): "negative_cost",
        ("costs", 5): "missing_cost_amount",
        ("costs", 6): "unknown_type",
        ("costs", 7): "missing_cost_type",
    }
    assert {r["cost_amount"] for r in tables.read(spark, root, "costs").collect()} == {5.0, 0.0}


def test_maps_of_copies_are_compared_and_erased_people_are_counted(
    spark: SparkSession, config: Config
) -> None:
    root = config.lake.root_uri
    for day in ("2024-01-10", "2024-01-11"):
        land(root, "orders", [], day=day)
    user = {"user_id": "u1", "has_attributes": True, "attributes": {"age": "45", "size": "3"}}
    swapped = user | {"attributes": {"size": "3", "age": "45"}}
    land(root, "users", [user, swapped, user | {"attributes": {"age": "46"}}, user | {"user_id": "gone"}])
    erased.add(root, ["gone"])
    job = clean(spark, config)
    names = ("users_raw_rows", "users", "users_duplicates_exact", "users_duplicates_conflicting")
    assert [job.rows[name] for name in (*names, "users_erased")] == [4, 1, 0, 2, 1]
    assert tables.read(spark, root, "users").collect()[0]["attributes"] == {"age": "46"}
    land(root, "users", [user, swapped])
    job = clean(spark, config)
    assert (job.rows["users_duplicates_exact"], job.rows["users_duplicates_conflicting"]) == (1, 0)


def test_the_example_of_each_feed_is_a_valid_row(spark: SparkSession, root_uri: str) -> None:
    found = []
    for name, feed in contracts.FEEDS.items():
        land(root_uri, name, [feed.example])
        raw = feeds.read_raw(spark, feeds.find_delivery(root_uri, name, DateRange.day(DAYS.start), ()))
        cleaned = (
            events.clean(raw, EventsConfig(), "UTC", 3)
            if name == "events"
            else feeds.clean_feed(raw, name, "UTC")
        )
        found.append(cleaned.classified.select(F.lit(name).alias("feed"), feeds.REFUSAL, "is_duplicate"))
    rows = reduce(DataFrame.union, found).collect()
    assert [tuple(row) for row in rows] == [(name, None, False) for name in contracts.FEEDS]


def test_cleaning_can_give_no_reason_outside_the_contract(spark: SparkSession) -> None:
    columns = (*contracts.FEEDS["costs"].columns, *records.ORIGIN)
    raw = literals.frame(spark, [], tables.struct_type(columns))
    given = dict.fromkeys(contracts.FEEDS["costs"].reasons, F.lit(False))
    assert feeds.REFUSAL in feeds.with_refusal(raw, "costs", given).columns
    for wrong in (given | {"new_reason": F.lit(True)}, dict(list(given.items())[1:])):
        with pytest.raises(ValueError, match="on one side only"):
            feeds.with_refusal(raw, "costs", wrong)


def test_drift_in_one_feed_stops_before_any_table_is_written(spark: SparkSession, config: Config) -> None:
    root = config.lake.root_uri
    for day in ("2024-01-10", "2024-01-11"):
        land(root, "orders", [ORDER], day=day)
    land(root, "users", [{"user_id": "u1", "has_attributes": "yes"}])
    with pytest.raises(DataError, match=r"feed users.*has_attributes: expected boolean, found string"):
        clean(spark, config)
    assert tables.version(spark, root, "orders") is None
