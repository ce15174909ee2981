"""Backfills on a synthetic shop: killed, out of order, repeated and raced, they end with the same content.

The oracle is one clean pass in a lake of its own, compared by content hash of every table. ``make soak`` runs
the long form: 30 days in an order drawn from a seed, the process group killed twice at random moments.
"""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from backfill_lake import TABLES, Lake, build_scoring, clean_pass, group, kill, succeed, tell
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from couponflow import pipeline
from couponflow.cli import app
from couponflow.dates import DateRange
from couponflow.lake import leases, runs, tables


@pytest.fixture(scope="module")
def oracle(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Fourteen days, one clean pass."""
    lake = Lake(tmp_path_factory.mktemp("oracle") / "a", num_days=14, num_users=30)
    lake.land()
    clean_pass(lake)
    return lake


@pytest.fixture
def lake(oracle: Lake, tmp_path: Path) -> Lake:
    """The same deliveries and vocabulary, nothing done yet."""
    made = Lake(tmp_path / "b", num_days=14, num_users=30)
    made.take(oracle, "raw", "vocabularies", "tables/vocabularies")
    return made


def test_a_clean_pass_fills_every_table_and_a_second_call_does_nothing(
    spark: SparkSession, oracle: Lake
) -> None:
    hashes = oracle.hashes(spark)
    assert set(hashes) >= TABLES
    rows = {table: number for table, _, number, _ in pipeline.content(oracle.root, spark)}
    assert {name for name, number in rows.items() if number == 0} <= {"costs", "identity_links"}
    before = oracle.num_records()
    assert "0 days of stages in 0 runs" in succeed(oracle.backfill("all"))
    assert oracle.num_records() == before
    done = CliRunner().invoke(app, ["status", "--content", "--json", "--config", str(oracle.config)])
    assert {row["table"]: row["content hash"] for row in json.loads(done.output)} == hashes


def test_newest_week_first_equals_in_order(spark: SparkSession, oracle: Lake, lake: Lake) -> None:
    """An older backfill after a newer run; backwards, several runs at once, one week at a time."""
    succeed(lake.backfill("all", first="2024-01-09"))
    argv = ("--run-backwards", "--chunk-days", "4", "--max-active-runs", "2")
    succeed(lake.backfill("all", *argv, last="2024-01-08"))
    build_scoring(lake)
    assert lake.hashes(spark) == oracle.hashes(spark)
    assert len(lake.ranges("clean_events")) == 1 + 2


@pytest.mark.nightly
def test_a_range_twice_changes_no_content(spark: SparkSession, oracle: Lake, lake: Lake) -> None:
    succeed(lake.backfill("all"))
    build_scoring(lake)
    argv = ("--reprocess-behavior", "completed", "--chunk-days", "3", "--order-seed", "5")
    succeed(lake.backfill("all", *argv, first="2024-01-03", last="2024-01-11"))
    assert lake.hashes(spark) == oracle.hashes(spark)


@pytest.mark.parametrize(
    "fault",
    [
        "events@2024-01-03:during_write:kill",
        pytest.param("user_days@2023-12-31:after_commit:kill", marks=pytest.mark.nightly),
        pytest.param("events@2024-01-03:before_write:kill", marks=pytest.mark.nightly),
        pytest.param("events@2024-01-03:after_commit:kill", marks=pytest.mark.nightly),
        pytest.param("clean_events@2024-01-03:before_run:kill", marks=pytest.mark.nightly),
        pytest.param("clean_events@2024-01-03:before_record:kill", marks=pytest.mark.nightly),
        pytest.param("clean_events@2024-01-03:after_record:kill", marks=pytest.mark.nightly),
    ],
)
def test_killed_at_day_three_of_five(spark: SparkSession, oracle: Lake, lake: Lake, fault: str) -> None:
    """Days 1 and 2 stay as they are, the rerun does the rest, a third call does nothing."""
    with group(lake.child("clean_events", "--chunk-days", "1", fault=fault)) as child:
        output, _ = child.communicate(timeout=240)
    assert child.returncode == -signal.SIGKILL, output
    done = [f"2024-01-0{day}:2024-01-0{day}" for day in range(1, 4)]
    number = 3 if "after_record" in fault else 2
    assert lake.ranges("clean_events") == done[:number]
    written = events_of(spark, lake, "2024-01-01:2024-01-02")
    assert written == events_of(spark, oracle, "2024-01-01:2024-01-02")
    files = sorted(
        path.name for path in Path(lake.root, "tables/events").rglob("ingest_date=2024-01-0[12]/*")
    )

    succeed(lake.backfill("clean_events", "--chunk-days", "1", last="2024-01-05"))
    rest = [f"2024-01-0{day}:2024-01-0{day}" for day in range(number + 1, 6)]
    assert lake.ranges("clean_events") == [*done[:number], *rest]
    again = sorted(
        path.name for path in Path(lake.root, "tables/events").rglob("ingest_date=2024-01-0[12]/*")
    )
    assert again == files
    expected = events_of(spark, oracle, "2024-01-01:2024-01-05")
    assert events_of(spark, lake, "2024-01-01:2024-01-05") == expected
    assert [r.status for r in runs.load_all(lake.root, "clean_events")].count("killed") == (number == 2)
    assert leases.claims(lake.root) == []
    before = lake.num_records()
    succeed(lake.backfill("clean_events", "--chunk-days", "1", last="2024-01-05"))
    assert lake.num_records() == before


def events_of(spark: SparkSession, lake: Lake, dates: str) -> str:
    return tables.content_hash(tables.read(spark, lake.root, "events", DateRange.parse(dates)))


def soak(lake: Lake, seed: int, num_kills: int, *more: str) -> Iterator[str]:
    """Call the same backfill until it ends well, killing the first calls at moments drawn from the seed."""
    rng = random.Random(seed)
    for number in range(num_kills + 1):
        records = lake.num_records() + rng.randint(1, 4)
        pause = rng.uniform(0.0, 3.0)
        with group(lake.child("all", "--order-seed", str(seed), *more)) as child:
            while number < num_kills and lake.num_records() < records:
                assert child.poll() is None, child.communicate()[0]
                time.sleep(0.05)
            if number < num_kills:
                time.sleep(pause)
                assert child.poll() is None, "the backfill ended before it was to be killed"
                kill(child)
                yield f"killed {pause:.1f} s after run {records}"
            else:
                output, _ = child.communicate(timeout=1200)
                assert child.returncode == 0, output


@pytest.mark.nightly  # minutes; the killed day above and `make soak` cover it
def test_killed_twice_in_a_random_order_equals_one_clean_pass(
    spark: SparkSession, oracle: Lake, lake: Lake
) -> None:
    assert len(list(soak(lake, 11, 2, "--chunk-days", "5"))) == 2
    build_scoring(lake)
    assert lake.hashes(spark) == oracle.hashes(spark)
    assert "killed" in {record.status for record in runs.load_all(lake.root)}


@pytest.mark.nightly
def test_soak(spark: SparkSession, tmp_path: Path) -> None:
    """Thirty days; set COUPONFLOW_SOAK_SEED for another order and other moments."""
    seed = int(os.environ.get("COUPONFLOW_SOAK_SEED", "0"))
    one, other = Lake(tmp_path / "a", 30, 300), Lake(tmp_path / "b", 30, 300)
    started = time.monotonic()
    one.land()
    clean_pass(one)
    tell(f"clean pass of 30 days: {time.monotonic() - started:.0f} s")
    other.take(one, "raw", "vocabularies", "tables/vocabularies")
    started = time.monotonic()
    for event in soak(other, seed, 2, "--chunk-days", "3"):
        tell(event)
    build_scoring(other)
    tell(f"backfill in random order, seed {seed}, killed twice: {time.monotonic() - started:.0f} s")
    expected, found = one.hashes(spark), other.hashes(spark)
    for table in sorted(expected):
        tell(f"{table:20} {expected[table]}  {found.get(table)}")
    assert found == expected
    assert set(found) >= TABLES
