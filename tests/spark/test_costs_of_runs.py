"""A run record tells what its Spark tasks used, and a job over its budget stops before it shuffles."""

from pathlib import Path

import pytest
from builders import D0, make_event, make_frame
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import ConfigError
from couponflow.lake import metering, runs, tables
from jobs import sessionize

DAY = DateRange.day(D0)
HOME = Path(__file__).parents[2]


@pytest.fixture
def lake(spark: SparkSession, root_uri: str) -> str:
    """Events of 40 users on one day and of one on the next."""
    rows = [make_event(f"u{n % 40}", minute=7 * n) for n in range(200)]
    tables.overwrite(make_frame(spark, "events", rows), root_uri, "events", DAY)
    next_day = DateRange.parse("2024-01-11")
    tables.overwrite(make_frame(spark, "events", [make_event(minute=1500)]), root_uri, "events", next_day)
    tables.overwrite(make_frame(spark, "user_days", []), root_uri, "user_days", DAY)
    return root_uri


def deployed(config: Config, budget: float) -> Config:
    """The same lake with a price table and a budget of the dev environment."""
    dev = load_config(HOME / "deploy" / "env" / "dev.toml", (f"cloud.budget_per_run_amount={budget}",))
    return config.model_copy(update={"cloud": dev.cloud})


def size_of(root_uri: str, *tables_of: str) -> int:
    places = [Path(root_uri, "tables", name) for name in tables_of]
    return sum(path.stat().st_size for place in places for path in place.rglob("*.parquet"))


def test_a_record_tells_cores_bytes_and_price(spark: SparkSession, config: Config, lake: str) -> None:
    with record_run("sessionize", deployed(config, 25.0), DAY) as job:
        sessionize.run(spark, job)
    (record,) = runs.load_all(lake, "sessionize")
    used = record.usage
    assert 0 < used["core_seconds"] < 600
    assert used["gpu_seconds"] == 0
    assert used["bytes_read"] > 0
    assert used["bytes_written"] == size_of(lake, "session_segments", "sessions")
    assert used["amount"] == pytest.approx(used["core_seconds"] / 3600 * 0.075507, abs=1e-4)


def test_what_is_read_is_known_before_a_task_runs(spark: SparkSession, lake: str) -> None:
    """Files that a filter leaves out do not count; shuffles in between change nothing."""
    frame = tables.read(spark, lake, "events")
    first = tables.read(spark, lake, "events", DAY)
    whole, part = metering.input_bytes(frame), metering.input_bytes(first)
    assert whole == size_of(lake, "events")
    assert 0 < part < whole
    counted = first.groupBy("user_id").agg(F.count(F.lit(1)).alias("n")).join(frame, "user_id")
    assert metering.input_bytes(counted) == whole + part
    assert metering.input_bytes(make_frame(spark, "events", [make_event()])) < 100_000


def test_a_job_over_its_budget_stops_before_it_begins(spark: SparkSession, config: Config, lake: str) -> None:
    config = deployed(config, 1e-9)
    message = r"sessionize 2024-01-10.* would read 0.00 GiB, estimated at .*raise it with --set cloud.budget"
    with pytest.raises(ConfigError, match=message) as caught, record_run("sessionize", config, DAY) as job:
        sessionize.run(spark, job)
    assert caught.value.exit_code == 2
    assert not tables.exists(spark, lake, "session_segments")
    (record,) = runs.load_all(lake, "sessionize")
    assert record.status == "failed"
    assert record.usage["bytes_written"] == 0
