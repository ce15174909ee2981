"""The data plane over the synthetic shop with all its dirt: every count and id equals the truth."""

import importlib
import json
from collections import Counter
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow import pipeline
from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.lake import runs, tables
from couponflow.sequences import events
from couponflow.sources.synthetic_dirt import REASONS
from couponflow.sources.synthetic_feeds import NEW_COLUMN

CONFIG = """
[lake]
root_uri = "{root}"
time_zone = "America/New_York"
closed_days = ["2024-03-04"]
[source]
name = "synthetic"
num_users = 220
[world]
rate = 0.6
drift_day = 30
skew_share = 0.02
group_shards = 2
[[world.incidents]]
kind = "missing_day"
date = "2024-03-04"
[[world.incidents]]
kind = "double_load"
date = "2024-03-07"
[[world.incidents]]
kind = "stale_copy"
date = "2024-03-13"
[[world.incidents]]
kind = "outage"
date = "2024-03-16"
days = 2
[events]
pseudonymise = false
staff_user_ids = ["u000031"]
[run]
first_date = "2024-02-10"
last_date = "2024-03-25"
run_date = "2024-03-21"
"""
VALID = ("clean", "bot", "scanner", "skew_hour", "late_inside", "retry_next_day", "stale_copy")


class World:
    """A landed and cleaned shop, with its truth."""

    def __init__(self, folder: Path, spark: SparkSession) -> None:
        file = folder / "config.toml"
        file.write_text(CONFIG.format(root=folder / "lake"))
        self.spark, self.config = spark, load_config(file)
        self.root = self.config.lake.root_uri
        self.landed = pipeline.land(self.config, lambda what, done, total: None)
        self.dates = DateRange.parse(f"{self.config.run.first_date}:{self.config.run.last_date}")
        for name in ("clean_events", "clean_feeds", "sessionize"):
            job: Any = importlib.import_module(f"jobs.{name}")
            job.app(["--config", str(file), "--dates", str(self.dates)], standalone_mode=False)

    def truth(self, name: str) -> list[dict[str, Any]]:
        files = sorted((Path(self.root) / "truth" / name).glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def record(self, job: str) -> runs.RunRecord:
        return runs.load_all(self.root, job)[-1]

    def kind(self, *names: str) -> int:
        return sum(self.landed[f"dirt_{name}"] for name in names)

    def table(self, name: str) -> Any:
        return tables.read(self.spark, self.root, name)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        return self.truth("lines")


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("dirty"), spark)


def test_every_line_is_an_event_a_duplicate_or_refused(world: World) -> None:
    rows = world.record("clean_events").rows
    assert rows["raw_rows"] == world.landed["events"]
    assert rows["events"] == world.kind(*VALID)
    assert rows["duplicates_exact"] == world.kind("duplicate", "double_load") > 0
    assert rows["duplicates_conflicting"] == world.kind("retry_same_day") > 0
    assert rows["quarantine"] == world.kind(*REASONS)
    assert rows["raw_rows"] == rows["events"] + rows["duplicates"] + rows["quarantine"]
    assert all(world.kind(kind) for kind in (*VALID, *REASONS))  # nothing is tested on nothing


def test_each_refused_line_has_its_reason(world: World) -> None:
    expected = {
        (row["ingest_date"], row["source_file"], row["row_number"], REASONS[row["kind"]])
        for row in world.lines
        if row["kind"] in REASONS
    }
    found = world.table("quarantine").where("feed = 'events'").collect()
    assert {(str(r.ingest_date), r.source_file, r.row_number, r.reason) for r in found} == expected
    rows = world.record("clean_events").rows
    assert {name: n for name, n in rows.items() if name.startswith("quarantine_")} == {
        f"quarantine_{reason}": number for reason, number in Counter(row[3] for row in expected).items()
    }


def test_late_events_keep_their_day_and_their_delivery(world: World) -> None:
    late = world.table("events").where("ingest_date > event_date").select("event_id", "ingest_date")
    found = {(row.event_id, str(row.ingest_date)) for row in late.collect()}
    kinds = {
        (row["event_id"], row["ingest_date"]): row["kind"] for row in world.lines if row["kind"] in VALID
    }
    assert {key for key in found if kinds.get(key) == "late_inside"} == {
        key for key, kind in kinds.items() if kind == "late_inside"
    }
    assert {kinds[key] for key in found} == {"late_inside", "retry_next_day", "stale_copy"}


def test_the_first_delivery_of_an_event_wins(world: World) -> None:
    """A retry of the next day and a stale copy are second deliveries, unless the first one never came."""
    first = events.read_first_deliveries(world.spark, world.root, world.dates)
    never_came = {("retry_next_day", "2024-03-05"), ("retry_next_day", "2024-03-14")}
    again = sum(
        row["kind"] in ("retry_next_day", "stale_copy")
        and (row["kind"], row["ingest_date"]) not in never_came
        for row in world.lines
    )
    assert first.count() == world.kind(*VALID) - again
    assert first.select("event_id").distinct().count() == first.count()
    stale = {row["event_id"] for row in world.lines if row["kind"] == "stale_copy"}
    assert (
        first.where(F.col("ingest_date") == date(2024, 3, 13)).where(F.col("event_id").isin(*stale)).count()
        == 0
    )


def test_bots_scanners_and_test_accounts_are_found_and_nobody_else(world: World) -> None:
    expected = {(row["user_id"], row["event_date"]): row["reason"] for row in world.truth("exclusions")}
    days = world.table("user_days").where("exclusion_reason IS NOT NULL").collect()
    assert {(row.user_id, str(row.event_date)): row.exclusion_reason for row in days} == expected
    assert set(expected.values()) == {"bot", "scanner", "staff"}
    told = world.record("clean_events").facts["exclusions"]
    assert {reason: told[reason]["user_days"] for reason in ("bot", "scanner", "staff")} == Counter(
        expected.values()
    )
    people = world.truth("users")
    heavy = {row["user_id"] for row in people if row["is_heavy"]}
    assert heavy
    busiest = world.table("user_days").where(F.col("user_id").isin(*heavy)).agg(F.max("num_events"))
    assert busiest.collect()[0][0] > 100
    assert not heavy & {user for user, _ in expected}


def test_clicks_of_scanners_are_no_clicks(world: World) -> None:
    seen = events.read_events(world.spark, world.root, world.dates)
    clicks = {row.event_id for row in seen.where("event_type = 'mail_click'").select("event_id").collect()}
    scanned = {row["event_id"] for row in world.lines if row["kind"] == "scanner"}
    assert scanned
    assert not scanned & clicks
    assert clicks == {
        row.event_id
        for row in world.table("events").where("event_type = 'mail_click'").select("event_id").collect()
        if row.event_id in {session["event_id"] for session in world.truth("sessions")}
    }


def test_sessions_are_those_of_the_truth(world: World) -> None:
    expected = Counter(row["session_id"] for row in world.truth("sessions"))
    found = {row.session_id: row.num_events for row in world.table("sessions").collect()}
    assert found == expected
    assert world.table("sessions").where("num_segments > 1").count() > 5


def test_visitors_belong_to_the_user_of_their_first_link(world: World) -> None:
    first = F.min(F.struct("ingest_date", "linked_time", "user_id")).alias("first")
    rows = world.table("identity_links").groupBy("visitor_id").agg(first).collect()
    found = {r.visitor_id: (r.first.user_id, str(r.first.ingest_date), r.first.linked_time) for r in rows}
    told = world.truth("links")
    assert {visitor: link[:2] for visitor, link in found.items()} == {
        row["visitor_id"]: (row["user_id"], row["ingest_date"]) for row in told
    }
    times = {row["visitor_id"]: row["linked_time"] for row in told}
    assert {v: f"{link[2]:%Y-%m-%dT%H:%M:%SZ}" for v, link in found.items()} == times
    users = world.table("identity_links").select("visitor_id", "user_id").distinct()
    assert users.count() > len(found)  # a browser that two people use


def test_a_new_column_is_accepted_and_named(world: World) -> None:
    assert world.record("clean_events").facts["new_columns"] == [NEW_COLUMN]


def test_orders_change_their_state_and_costs_are_landed(world: World) -> None:
    states = {row.order_status for row in world.table("orders").select("order_status").distinct().collect()}
    assert states == {None, "cancelled", "returned"}
    rows = world.record("clean_feeds").rows
    for feed in ("orders", "sends", "redemptions", "campaigns", "consents", "users", "catalogue", "costs"):
        assert rows[feed] == world.landed[feed], feed
