"""The predictions of a campaign and run date as one file, for the table of a warehouse. Ids only.

Rows are written in the order of user and target, so that equal predictions give equal bytes.
"""

import csv
import hashlib
import io
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, BinaryIO, Protocol

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.errors import DataError
from couponflow.lake import runs

COLUMNS = (
    "campaign_id",
    "run_date",
    "user_id",
    "target_id",
    "model_version",
    "score",
    "conversion_probability",
    "is_cold_start",
)


class Warehouse(Protocol):
    """Where the rows go; ``cloud.bigquery`` is one."""

    def load_predictions(self, file: BinaryIO, manifest: Mapping[str, Any]) -> None:
        """Replace the rows of a run date, unless that is done already."""


@dataclass(frozen=True)
class Destination:
    """The table for the predictions of a campaign, an empty name means none; and the day of the run."""

    table: str
    location: str
    expiration_days: int
    today: date

    def is_expired(self, run_date: date) -> bool:
        """Whether the rows of a day would be gone as soon as they are there."""
        return run_date + timedelta(self.expiration_days) <= self.today


def export_predictions(
    root_uri: str,
    predictions: DataFrame,
    campaign_id: str,
    run_date: date,
    destination: Destination,
    warehouse: Warehouse,
) -> dict[str, Any]:
    """Load the predictions of a day, unless that is done already or they have expired; returns the facts.

    ``predictions`` is the whole table, read lazily; its rows are streamed to a temporary file.

    Raises:
        DataError: nothing was scored, or an id looks like a mail address.
    """
    if not destination.table:
        return {}
    if destination.is_expired(run_date):
        reason = f"{run_date} is older than the {destination.expiration_days} days kept"
        return {"bigquery_predictions_skipped": reason}
    scored_by = _scored_by(root_uri, campaign_id, run_date)
    of_day = (F.col("campaign_id") == campaign_id) & (F.col("run_date") == F.lit(run_date))
    rows = predictions.where(of_day).select(*COLUMNS).orderBy("user_id", "target_id", "model_version")
    with tempfile.TemporaryFile() as file:
        digest, num_rows = write_rows(rows.toLocalIterator(), file)
        manifest = {
            "table": destination.table,
            "location": destination.location,
            "expiration_days": destination.expiration_days,
            "campaign_id": campaign_id,
            "run_date": run_date,
            "scored_by": scored_by,
            "sha256": digest,
            "num_rows": num_rows,
        }
        warehouse.load_predictions(file, manifest)
    return {
        "bigquery_predictions": destination.table,
        "bigquery_predictions_rows": num_rows,
        "bigquery_predictions_sha256": digest,
    }


def write_rows(rows: Iterable[Sequence[Any]], file: BinaryIO) -> tuple[str, int]:
    """Write the CSV of rows in the order of ``COLUMNS``; returns its SHA-256 and their number.

    Raises:
        DataError: there is no row, or an id looks like a mail address.
    """
    digest, num_rows = hashlib.sha256(), 0
    user, cold = COLUMNS.index("user_id"), COLUMNS.index("is_cold_start")
    _write(COLUMNS, file, digest)
    for row in rows:
        if "@" in row[user]:
            raise DataError(
                "predictions: an id holds '@'; mail addresses must not enter, nothing was exported"
            )
        _write((*row[:cold], "true" if row[cold] else "false", *row[cold + 1 :]), file, digest)
        num_rows += 1
    if not num_rows:
        raise DataError("predictions: the table holds no row of this campaign and day; run score first")
    return digest.hexdigest(), num_rows


def still_loaded(root_uri: str, days: int, today: date) -> list[tuple[str, str, str]]:
    """Table, campaign and run date of what was exported and has not expired, from the run records."""
    found = set()
    for record in runs.load_all(root_uri, "export_audience"):
        table, day = record.facts.get("bigquery_predictions"), record.dates.partition(":")[0]
        if table and date.fromisoformat(day) + timedelta(days) > today:
            found.add((str(table), str(record.arguments.get("campaign", "")), day))
    return sorted(found)


def _write(row: Sequence[Any], file: BinaryIO, digest: Any) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    content = text.getvalue().encode()
    digest.update(content)
    file.write(content)


def _scored_by(root_uri: str, campaign_id: str, run_date: date) -> str:
    """The newest successful run that has scored the campaign for this day."""
    found = [
        record.run_id
        for record in runs.load_all(root_uri, "score")
        if record.status == "ok"
        and record.arguments.get("campaign") == campaign_id
        and record.dates.partition(":")[0] == run_date.isoformat()
    ]
    if not found:
        raise DataError(f"campaign {campaign_id}, {run_date}: nothing scored; run score first")
    return found[-1]
