"""What a hand-over takes from the tables: seed accounts that nobody else is, a day's predictions."""

import csv
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from bigquery_server import serving
from builders import D0, make_frame, make_row, test_config
from pyspark.sql import SparkSession

from couponflow.campaign import export, predictions
from couponflow.dates import DateRange
from couponflow.entry import Run, record_run, today
from couponflow.errors import DataError
from couponflow.lake import literals, runs, tables
from jobs import erase_user, export_audience, select_audience

CONSENT = "user_id string, consent_reason string"
SCHEMA = (
    "campaign_id string, run_date date, user_id string, target_id string, model_version string, "
    "score double, conversion_probability double, is_cold_start boolean"
)


def test_a_seed_is_nobody_that_the_ledger_knows(spark: SparkSession) -> None:
    arms = [("mailed", "treat"), ("withheld", "holdout"), ("compared", "control"), ("unchosen", "none")]
    ledger = literals.frame(spark, arms, "user_id string, arm string")
    consent = literals.frame(spark, [("refuses", "consent_denied"), ("agrees", None)], CONSENT)
    asked = ["stranger", "refuses", "agrees", "gone", *(user for user, _ in arms)]
    found = export.seeds_of(asked, ledger, consent, lambda user: user == "gone")
    assert found == ["agrees", "stranger"]
    assert export.seeds_of([], ledger, consent, lambda user: False) == []


class Shelf:
    """A warehouse that keeps what it is given."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, Mapping[str, Any]]] = []

    def load_predictions(self, file: BinaryIO, manifest: Mapping[str, Any]) -> None:
        file.seek(0)
        self.loads.append((file.read().decode(), manifest))


def scored(root_uri: str, campaign: str, status: str = "ok") -> str:
    record = runs.start("score", f"{D0}:{D0}", {"campaign": campaign}, "f")
    runs.finish(root_uri, record, status)
    return record.run_id


def test_the_predictions_of_one_day_and_campaign_go_out_in_order(spark: SparkSession, root_uri: str) -> None:
    rows = [
        make_row("predictions", campaign_id=campaign, run_date=day, user_id=user, target_id="t1")
        for campaign, day, user in (
            ("18", D0, "u2"),
            ("18", D0, "u1"),
            ("19", D0, "u3"),
            ("18", date(2020, 1, 1), "u4"),
        )
    ]
    frame = literals.frame(spark, [tuple(row[n] for n in predictions.COLUMNS) for row in rows], SCHEMA)
    shelf, wanted = Shelf(), predictions.Destination("p.d.predictions_18", "EU", 30, D0)

    def export_day(destination: predictions.Destination, campaign: str = "18") -> dict[str, Any]:
        return predictions.export_predictions(root_uri, frame, campaign, D0, destination, shelf)

    assert export_day(replace(wanted, table="")) == {}
    late = replace(wanted, today=D0 + timedelta(days=30))
    assert export_day(late) == {"bigquery_predictions_skipped": f"{D0} is older than the 30 days kept"}
    with pytest.raises(DataError, match="nothing scored; run score first"):
        export_day(wanted)
    run_id = scored(root_uri, "18")
    scored(root_uri, "18", status="failed")
    scored(root_uri, "20")
    facts = export_day(wanted)
    (text, manifest) = shelf.loads[0]
    assert [line.split(",")[2] for line in text.splitlines()] == ["user_id", "u1", "u2"]
    assert (manifest["scored_by"], manifest["num_rows"], manifest["location"]) == (run_id, 2, "EU")
    assert facts == {
        "bigquery_predictions": "p.d.predictions_18",
        "bigquery_predictions_rows": 2,
        "bigquery_predictions_sha256": manifest["sha256"],
    }
    assert export_day(wanted) == facts
    with pytest.raises(DataError, match="holds no row of this campaign and day"):
        export_day(wanted, "20")


def write_world(spark: SparkSession, root_uri: str, users: list[str]) -> None:
    campaign = {"campaign_id": "18", "target_id": "18", "run_date": D0, "model_version": "logistic-1"}
    permit = {"channel": "mail", "purpose": "marketing", "state": "granted", "source": "constructed"}
    by_table: dict[str, dict[str, Any]] = {
        "users": {"snapshot_date": D0},
        "consents": permit | {"snapshot_date": D0},
        "predictions": campaign | {"conversion_probability": 0.5},
        "sends": {"send_date": D0 - timedelta(days=400)},
    }
    for table, values in by_table.items():
        rows = [make_row(table, user_id=user, **values) for user in users]
        dates = DateRange(D0 - timedelta(days=400), D0 + timedelta(days=1))
        tables.overwrite(make_frame(spark, table, rows), root_uri, table, dates)
    scored(root_uri, "18")


def test_jobs_hand_over_to_bigquery_and_an_erasure_follows(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    users = [f"user-{number:02d}" for number in range(30)]
    config = test_config(
        tmp_path,
        "export.bigquery_dataset=shop-project.mails",
        "export.bigquery_predictions=true",
        "export.bigquery_predictions_days=36500",
        f"export.seed_user_ids=['seed-1', '{users[0]}']",
    )
    write_world(spark, config.lake.root_uri, users)

    def run_job(job: Any, name: str) -> Run:
        with record_run(name, config, DateRange.day(D0), campaign="18") as run:
            job.run(spark, run)
        return run

    with serving("shop-project.mails") as server:
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", server.url)
        run_job(select_audience, "select_audience")
        facts = run_job(export_audience, "export_audience").facts
        listed = list(csv.DictReader(Path(facts["file"]).read_text().splitlines()))
        assert [row["user_id"] for row in listed if row["is_seed"] == "true"] == ["seed-1"]
        (name,) = set(server.tables) - {"predictions_18"}
        assert [row[0] for row in server.tables[name].rows] == [row["user_id"] for row in listed]
        assert [row[2] for row in server.tables["predictions_18"].rows] == users

        again = run_job(export_audience, "export_audience").facts
        assert again == facts | {"already_exported": True}
        assert len(server.jobs) == 2

        gone = listed[0]["user_id"]
        with record_run("erase_user", config, today()) as run:
            erase_user.run(spark, run, gone)
        assert [row[0] for row in server.tables[name].rows] == [row["user_id"] for row in listed[1:]]
        assert run.facts["bigquery_predictions_left"] == [f"shop-project.mails.predictions_18 of {D0}"]
        assert f"run export_audience --campaign 18 --dates {D0} again" in caplog.text

        run_job(export_audience, "export_audience")  # as the erasure asks
        assert [row[2] for row in server.tables["predictions_18"].rows] == [u for u in users if u != gone]
