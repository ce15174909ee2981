"""Verdicts are a pure function of counts; Spark only counts, and a bad verdict never fails the job."""

from datetime import date, timedelta
from typing import Any

import pytest
from builders import D0, make_frame, make_row
from pyspark.sql import SparkSession

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import runs, tables
from couponflow.monitoring import kpis
from jobs import monitor

DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("table", "by_day", "expected"),
    [
        ("events", None, "missing"),
        ("events", {}, "empty"),
        ("events", {D0 + DAY: 5}, "empty"),  # only the future
        ("events", {D0 - DAY: 5}, "ok"),
        ("events", {D0 - 2 * DAY: 5}, "stale"),
        ("events", {D0 - 2 * DAY: 5, D0: 1}, "ok"),
        ("events", {D0 - 3 * DAY: 5, D0 - DAY: 0}, "stale"),
        ("predictions", {D0 - DAY: 5}, "stale"),
        ("predictions", {D0: 5}, "ok"),
        ("users", {D0 - 300 * DAY: 5}, "ok"),
        ("users", {D0 + DAY: 5}, "empty"),
    ],
)
def test_freshness(table: str, by_day: dict[date, int] | None, expected: str) -> None:
    assert kpis.check_freshness(table, by_day, D0, (), 1).verdict == expected


def test_closed_days_do_not_make_a_table_stale() -> None:
    by_day = {D0 - 3 * DAY: 5}
    closed = (D0 - DAY, D0 - 2 * DAY)
    assert kpis.check_freshness("events", by_day, D0, closed, 1).verdict == "ok"
    assert kpis.check_freshness("events", by_day, D0, closed[:1], 1).verdict == "stale"
    # Two open days may pass: D0 - 1 is closed, so D0 - 3 is the second.
    assert kpis.check_freshness("events", by_day, D0, closed[:1], 2).verdict == "ok"
    assert kpis.check_freshness("events", {D0 - 4 * DAY: 5}, D0, closed[:1], 2).verdict == "stale"
    assert kpis.check_freshness("events", {D0 - DAY: 5}, D0, (D0,), 0).verdict == "ok"
    assert kpis.check_freshness("events", {D0 - DAY: 5}, D0, (), 0).verdict == "stale"


@pytest.mark.parametrize(
    ("by_day", "recorded", "expected"),
    [
        (None, None, "missing"),
        ({}, None, "empty"),
        ({D0: 3}, None, "ok"),
        (None, 3, "missing"),
        ({D0: 2}, 3, "missing"),
        ({D0: 3}, 3, "ok"),
        ({D0: 4}, 3, "stale"),
        ({D0 - DAY: 3}, 3, "missing"),
        ({}, 0, "ok"),
    ],
)
def test_row_counts(by_day: dict[date, int] | None, recorded: int | None, expected: str) -> None:
    assert kpis.check_row_count("predictions", by_day, D0, recorded).verdict == expected


def record(job: str, campaign: str, rows: dict[str, int], second: int, **over: Any) -> runs.RunRecord:
    made = runs.start(job, str(DateRange.day(D0)), {"campaign": campaign}, "f")
    made.started_time, made.status, made.rows = f"2024-01-10T00:00:0{second}+00:00", "ok", rows
    for name, value in over.items():
        setattr(made, name, value)
    return made


def test_the_newest_record_of_each_campaign_counts() -> None:
    records = [
        record("score", "18", {"predictions": 7}, 0),
        record("score", "18", {"predictions": 10}, 1),
        record("score", "19", {"predictions": 5}, 2),
        record("score", "19", {"predictions": 99}, 3, status="failed"),
        record("select_audience", "18", {"assignments": 10, "audience": 2}, 4, facts={"version": "a"}),
        record("select_audience", "18", {"assignments": 10, "audience": 3}, 5, facts={"version": "b"}),
        record("train", "", {"training_examples": 1}, 6),
    ]
    assert kpis.recorded_rows(records) == {
        ("predictions", D0): 15,
        ("assignments", D0): 20,
        ("audience", D0): 5,
    }


def test_the_job_reports_every_table(spark: SparkSession, config: Config, root_uri: str) -> None:
    key = {"campaign_id": "18", "version": "v1"}
    frames = {
        "predictions": [
            make_row("predictions", user_id=f"u{n}", run_date=day)
            for n, day in enumerate([D0, D0, D0 - DAY, D0 + DAY])
        ],
        "assignments": [make_row("assignments", user_id=f"u{n}", run_date=D0, **key) for n in range(2)],
        "audience": [make_row("audience", user_id="u0", **key)],
    }
    for table, rows in frames.items():
        dates = DateRange(D0 - DAY, D0 + 2 * DAY) if table == "predictions" else None
        equals = {} if dates else key
        tables.overwrite(make_frame(spark, table, rows), root_uri, table, dates, **equals)
    runs.finish(root_uri, record("score", "18", {"predictions": 3}, 0), "ok")
    with record_run("monitor", config, DateRange.day(D0)) as job:
        monitor.run(spark, job)
    found = {(v["table_name"], v["check_name"]): v["verdict"] for v in job.facts["verdicts"]}
    expected = {(table, check): "missing" for table in kpis.CADENCES for check in ("freshness", "row_count")}
    expected |= {(table, check): "ok" for table in frames for check in ("freshness", "row_count")}
    expected["predictions", "row_count"] = "missing"  # 2 rows, 3 recorded
    assert found == expected
    assert job.facts["num_alerts"] == sum(verdict != "ok" for verdict in expected.values())
    assert job.facts["verdicts"][-1]["verdict"] == "ok"  # worst first
    rows = tables.read(spark, root_uri, "verdicts", DateRange.day(D0)).collect()
    assert {(r.table_name, r.check_name): r.verdict for r in rows} == expected
    assert job.rows["verdicts"] == len(rows)
