"""Bad input ends with the right exit code and a message that names where it is and the next step.

Whatever is refused, the published tables stay as they were.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from couponflow import pipeline
from couponflow.lake import runs

CONFIG = """
[lake]
root_uri = "{root}"
closed_days = ["2024-01-03"]
[events]
pseudonymise = false
"""
DAYS = ("2024-01-01", "2024-01-02")


def event(number: int, day: str, **over: Any) -> dict[str, Any]:
    base = {
        "event_id": f"e{day}{number}",
        "user_id": f"u{number}",
        "visitor_id": None,
        "event_type": "view",
        "event_time": f"{day}T10:00:{number:02d}Z",
        "ingest_time": f"{day}T10:00:{number:02d}Z",
        "item_id": "i1",
        "category_id": "c1",
        "shop_id": "s1",
        "order_id": None,
        "price": 1.5,
        "quantity": 1,
        "discount_amount": 0.0,
        "coupon_amount": 0.0,
        "coupon_match_amount": 0.0,
        "device": "web",
        "channel": "site",
        "user_agent": None,
    }
    return base | over


class Lake:
    """A small lake with two cleaned days, and the means to spoil a delivery."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "lake"
        self.config = folder / "config.toml"
        self.config.write_text(CONFIG.format(root=self.root))
        for day in DAYS:
            self.deliver("events", day, [event(n, day) for n in range(5)])
            order = {
                "order_id": f"o{day}",
                "user_id": "u1",
                "order_time": f"{day}T10:00:00Z",
                "total_amount": 3.0,
            }
            self.deliver(
                "orders", day, [order | {"shop_id": "s1", "order_status": None, "status_time": None}]
            )
        assert self.run("clean_events", "2024-01-01:2024-01-02").exit_code == 0

    def path(self, feed: str, day: str) -> Path:
        return self.root / "raw" / feed / f"ingest_date={day}" / "part-0000.jsonl"

    def deliver(self, feed: str, day: str, rows: list[dict[str, Any]]) -> None:
        path = self.path(feed, day)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, job: str, dates: str, *more: str) -> Any:
        module: Any = importlib.import_module(f"jobs.{job}")
        return CliRunner().invoke(module.app, ["--config", str(self.config), "--dates", dates, *more])

    def versions(self) -> dict[str, int]:
        return pipeline.versions(str(self.root), ("events", "quarantine", "user_days", "orders"))


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return Lake(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def refused(lake: Lake) -> Any:
    """Call a job that has to fail; its day's delivery is put back afterwards."""
    kept = {path: path.read_bytes() for path in (lake.root / "raw").rglob("*.jsonl")}
    before = lake.versions()

    def call(job: str, dates: str, code: int, *words: str, options: tuple[str, ...] = ()) -> None:
        done = lake.run(job, dates, *options)
        assert done.exit_code == code, done.output
        for word in words:
            assert word in done.output.replace("\n", " "), (word, done.output)
        assert lake.versions() == before

    yield call
    for path, content in kept.items():
        path.write_bytes(content)


def test_a_missing_unlisted_day_stops(refused: Any) -> None:
    refused("clean_events", "2024-01-04", 3, "events", "2024-01-04")
    refused("clean_events", "2024-01-01:2024-01-05", 3, "2024-01-04")  # per date, also in a range


def test_a_missing_feed_stops(refused: Any, lake: Lake) -> None:
    lake.path("orders", DAYS[1]).unlink()
    refused("clean_feeds", DAYS[1], 3, "orders", DAYS[1])


def test_a_missing_column_stops(refused: Any, lake: Lake) -> None:
    rows = [{k: v for k, v in event(n, DAYS[1]).items() if k != "item_id"} for n in range(5)]
    lake.deliver("events", DAYS[1], rows)
    refused("clean_events", "2024-01-01:2024-01-02", 3, "item_id", "part-0000.jsonl")


def test_a_retyped_column_stops(refused: Any, lake: Lake) -> None:
    lake.deliver("events", DAYS[1], [event(n, DAYS[1], price="cheap") for n in range(5)])
    refused("clean_events", DAYS[1], 3, "price", "part-0000.jsonl")


def test_a_corrupt_file_stops(refused: Any, lake: Lake) -> None:
    lake.path("events", DAYS[1]).write_bytes(os.urandom(2_000))
    refused("clean_events", DAYS[1], 3, "part-0000.jsonl")


def test_unknown_config_names_and_bad_dates_end_with_2(refused: Any) -> None:
    refused("clean_events", DAYS[0], 2, "did you mean", options=("--set", "lake.lateness_day=2"))
    refused("clean_events", "2024-02-30", 2, "2024-02-30")
    refused("clean_events", "2024-01-02:2024-01-01", 2, "2024-01-02")


def test_dates_outside_the_data_stop(refused: Any) -> None:
    refused("clean_events", "2031-01-01", 3, "2031-01-01")


def test_a_new_column_is_accepted_and_reported(lake: Lake) -> None:
    lake.deliver("events", DAYS[1], [event(n, DAYS[1], colour="red") for n in range(5)])
    assert lake.run("clean_events", DAYS[1]).exit_code == 0
    record = runs.load_all(str(lake.root), "clean_events")[-1]
    assert record.facts["new_columns"] == ["colour"]
    assert record.rows["events"] == 5


def test_a_closed_day_gives_no_rows(lake: Lake) -> None:
    assert lake.run("clean_events", "2024-01-03").exit_code == 0
    assert runs.load_all(str(lake.root), "clean_events")[-1].rows["events"] == 0


def test_failures_are_on_record(lake: Lake) -> None:
    failed = [record for record in runs.load_all(str(lake.root)) if record.status == "failed"]
    assert failed
    assert all(record.error for record in failed)
