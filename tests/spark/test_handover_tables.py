"""What a hand-over takes from the tables: seed accounts that nobody else is, a day's predictions."""

from collections.abc import Mapping
from datetime import date
from typing import Any, BinaryIO

import pytest
from builders import D0, make_row
from pyspark.sql import SparkSession

from couponflow.campaign import export, predictions
from couponflow.errors import DataError
from couponflow.lake import literals, runs

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
    shelf, wanted = Shelf(), predictions.Destination("p.d.predictions_18", "EU", 30)

    def export_day(destination: predictions.Destination, campaign: str = "18") -> dict[str, Any]:
        return predictions.export_predictions(root_uri, frame, campaign, D0, destination, shelf)

    assert export_day(predictions.Destination("", "EU", 30)) == {}
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
