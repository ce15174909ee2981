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
from couponflow.cli import app
from couponflow.lake import erased, runs, tables

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


def last(lake: Lake) -> runs.RunRecord:
    return runs.load_all(str(lake.root), "clean_events")[-1]


def test_a_file_delivered_twice_adds_nothing(lake: Lake, spark: SparkSession) -> None:
    lake.deliver("events", DAYS[1], [event(n, DAYS[1]) for n in range(5)])
    assert lake.run("clean_events", DAYS[1]).exit_code == 0
    before = tables.content_hash(tables.read(spark, str(lake.root), "events"))
    copy = lake.path("events", DAYS[1]).with_name("part-0001.jsonl")
    copy.write_bytes(lake.path("events", DAYS[1]).read_bytes())
    assert lake.run("clean_events", DAYS[1]).exit_code == 0
    copy.unlink()
    assert (last(lake).rows["duplicates_exact"], last(lake).rows["duplicates_conflicting"]) == (5, 0)
    assert tables.content_hash(tables.read(spark, str(lake.root), "events")) == before


@pytest.mark.parametrize(("delivered", "declared"), [(1_000, "s"), (1, "ms")], ids=["ms as s", "s as ms"])
def test_a_wrong_unit_of_time_is_clock_skew_and_the_right_one_is_not(
    lake: Lake, delivered: int, declared: str
) -> None:
    second = 1_704_189_600  # 2024-01-02 10:00 UTC
    times = {name: second * delivered for name in ("event_time", "ingest_time")}
    lake.deliver("events", DAYS[1], [event(n, DAYS[1], **times) for n in range(5)])
    for unit, kept in ((declared, 0), ({1: "s", 1_000: "ms"}[delivered], 5)):
        done = lake.run("clean_events", DAYS[1], "--set", f"feeds.events.time_unit={unit}")
        assert done.exit_code == 0, done.output
        assert (last(lake).rows["events"], last(lake).rows.get("quarantine_clock_skew", 0)) == (
            kept,
            5 - kept,
        )


def test_poison_rows_are_named_and_touch_nobody_else(lake: Lake, spark: SparkSession) -> None:
    """Null user, 10 MB text, NaN price, bad UTF-8, deep nesting, a hot key of half the rows, a hot user."""
    day = DAYS[1]
    good = [event(n, day) for n in range(50)]

    def stored() -> str:
        rows = tables.read(spark, str(lake.root), "events").where(f"ingest_date = DATE '{day}'")
        return tables.content_hash(rows.where("user_id not in ('hot', 'huge')"))

    lake.deliver("events", day, good)
    assert lake.run("clean_events", day).exit_code == 0
    wanted = stored()
    poison = [
        event(1, day, event_id="p0", user_id=None),
        event(1, day, event_id="p1", item_id="x" * 10_000_000),
        event(1, day, event_id="p2", price=float("nan")),
        event(1, day, event_id="p3", user_id={"id": None}),
    ]
    hot = [event(1, day, event_id="same", user_id="hot") for _ in range(3_000)]
    huge = [event(n % 60, day, event_id=f"h{n}", user_id="huge", item_id=f"i{n}") for n in range(3_000)]
    lake.deliver("events", day, [*good[:25], *poison, *hot, *huge, *good[25:]])
    with lake.path("events", day).open("ab") as file:
        file.write(b'{"event_id": "\xff\xfe"}\n' + b"[" * 100_000 + b"\n")
    assert lake.run("clean_events", day).exit_code == 0
    rows = last(lake).rows
    assert (rows["quarantine_missing_user"], rows["quarantine_negative_price"]) == (1, 1)
    assert rows["quarantine_malformed_record"] == 4
    assert (rows["duplicates_exact"], rows["events"]) == (2_999, 50 + 1 + 3_000)
    assert stored() == wanted
    exclusions = last(lake).facts["exclusions"]
    assert (exclusions["bot"]["user_days"], exclusions["bot"]["events"]) == (1, 3_000)


def test_an_erased_user_is_not_brought_back(lake: Lake, spark: SparkSession) -> None:
    lake.deliver("events", DAYS[1], [event(n, DAYS[1]) for n in range(5)])
    erased.add(str(lake.root), ["u3"])
    assert lake.run("clean_events", "2024-01-01:2024-01-02").exit_code == 0
    assert (last(lake).rows["erased"], last(lake).rows["events"], last(lake).rows["raw_rows"]) == (2, 8, 10)
    for table in ("events", "user_days"):
        assert tables.read(spark, str(lake.root), table).where("user_id = 'u3'").count() == 0


def test_a_sender_keeps_his_column_names(lake: Lake) -> None:
    rows = [event(n, DAYS[0]) for n in range(5)]
    lake.deliver("events", DAYS[0], [{"customer_no": row.pop("user_id"), **row} for row in rows])
    assert lake.run("clean_events", DAYS[0]).exit_code == 3
    done = lake.run("clean_events", DAYS[0], "--set", "feeds.events.columns={user_id='customer_no'}")
    assert (done.exit_code, last(lake).facts["new_columns"]) == (0, []), done.output


def test_failures_are_on_record(lake: Lake) -> None:
    failed = [record for record in runs.load_all(str(lake.root)) if record.status == "failed"]
    assert failed
    assert all(record.error for record in failed)


@pytest.mark.usefixtures("refused")  # puts the delivery back, whatever happens
def test_a_backfill_names_what_its_failed_dates_need(lake: Lake, caplog: pytest.LogCaptureFixture) -> None:
    """Dates that failed are passed over until the option asks for them."""
    path, day = lake.path("events", DAYS[1]), DAYS[1]
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 2_000)
    call = ["backfill", "clean_events", "--config", str(lake.config), "--from-date", day, "--to-date", day]
    call += ["--reprocess-behavior", "completed"]
    assert CliRunner().invoke(app, call).exit_code == 3
    assert f"clean_events {day}:{day} failed" in caplog.text
    assert "repeat this command with --reprocess-behavior failed" in caplog.text
    path.write_bytes(content)
    assert "0 days" in CliRunner().invoke(app, call[:-2]).output
    done = CliRunner().invoke(app, [*call[:-1], "failed"])
    assert (done.exit_code, "1 days" in done.output) == (0, True), done.output
