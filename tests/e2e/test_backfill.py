"""Backfills on a synthetic shop: killed, out of order, repeated and raced, they end with the same content.

The oracle is one clean pass in a lake of its own, compared by content hash of every table. ``make soak`` runs
the long form: 30 days in an order drawn from a seed, the process group killed twice at random moments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from couponflow import pipeline
from couponflow.cli import app
from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.lake import faults, leases, runs, schemas, tables

CONFIG = """
[lake]
root_uri = "{root}"
time_zone = "America/New_York"
[source]
name = "synthetic"
num_users = {num_users}
[events]
pseudonymise = false
[conversions]
source = "redemptions"
window = "campaign"
[examples]
history_length = 20
train_start = "2024-01-02"
valid_start = "{middle}"
test_start = "{last}"
[vocabulary]
min_count = 2
[run]
first_date = "2024-01-01"
last_date = "{last}"
first_as_of = "2024-01-01"
campaign_id = "1"
run_date = "2024-01-12"
"""
#: What a backfill fills; links need a visitor who logs in, states the history method ``merge``.
TABLES = set(schemas.TABLES) - {
    "identity_links",
    "history_states",
    "predictions",
    "assignments",
    "audience",
    "verdicts",
}


class Lake:
    """A lake in a folder of its own, worked on by the real command."""

    def __init__(self, folder: Path, num_days: int, num_users: int) -> None:
        days = list(DateRange.parse("2024-01-01:2024-03-01").days())[:num_days]
        self.folder, self.first, self.last = folder, str(days[0]), str(days[-1])
        folder.mkdir(parents=True)
        self.root = str(folder / "lake")
        self.config = folder / "config.toml"
        middle = str(days[num_days // 2])
        self.config.write_text(
            CONFIG.format(root=self.root, num_users=num_users, middle=middle, last=self.last)
        )

    def argv(self, name: str, *more: str, first: str = "", last: str = "") -> list[str]:
        dates = ["--from-date", first or self.first, "--to-date", last or self.last]
        return ["backfill", name, "--config", str(self.config), *dates, *more]

    def backfill(self, name: str, *more: str, first: str = "", last: str = "") -> Any:
        """Backfill in this process."""
        return CliRunner().invoke(app, self.argv(name, *more, first=first, last=last))

    def child(self, name: str, *more: str, fault: str = "") -> "subprocess.Popen[str]":
        """Backfill in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "couponflow.cli", *self.argv(name, *more)],
            env=os.environ | ({faults.VARIABLE: fault} if fault else {}),
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def land(self) -> None:
        pipeline.land(load_config(self.config), lambda what, done, total: None)

    def take(self, other: "Lake", *names: str) -> None:
        """The same raw feeds, or other folders, as another lake."""
        for name in names:
            shutil.copytree(Path(other.root, name), Path(self.root, name))

    def hashes(self, spark: SparkSession) -> dict[str, str]:
        return {table: found for table, _, _, found in pipeline.content(self.root, spark)}

    def ranges(self, job: str) -> list[str]:
        """Dates of the finished runs of a job, oldest run first."""
        return [record.dates for record in runs.load_all(self.root, job) if record.status == "ok"]

    def num_records(self) -> int:
        return len(list(Path(self.root, "runs").rglob("*.json")))


def succeed(done: Any) -> str:
    assert done.exit_code == 0, done.output
    return str(done.output)


def build_scoring(lake: Lake) -> None:
    """A scoring day is a run of its own; a backfill builds again what exists."""
    argv = ["job", "build_examples", "--config", str(lake.config), "--campaign", "1", "--dates", "2024-01-12"]
    succeed(CliRunner().invoke(app, argv))


def clean_pass(lake: Lake) -> None:
    """One backfill of everything in one chunk per stage, its vocabulary built on the way."""
    done = lake.backfill("all", "--chunk-days", "60")
    assert done.exit_code == 3
    assert "blocked, no vocabulary; run `couponflow job build_vocabulary" in done.output
    dates = f"{lake.first}:{lake.last}"
    argv = ["job", "build_vocabulary", "--config", str(lake.config), "--dates", dates]
    succeed(CliRunner().invoke(app, argv))
    succeed(lake.backfill("all", "--chunk-days", "60"))
    build_scoring(lake)


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


class group:  # noqa: N801 - reads as a statement
    """Ends a process group whatever the test does, and shows that nobody of it is left."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self.child = child

    def __enter__(self) -> "subprocess.Popen[str]":
        return self.child

    def __exit__(self, *error: object) -> None:
        kill(self.child)


def kill(child: "subprocess.Popen[str]") -> None:
    """SIGKILL to Python, its JVM and the workers; returns when all are gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if child.poll() is not None:
            time.sleep(0.05)
    raise AssertionError(f"process group {child.pid} is still alive")


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


def tell(line: str) -> None:
    sys.stdout.write(f"\n{line}")


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
