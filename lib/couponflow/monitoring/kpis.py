"""Is every table fresh, and does it hold the rows that its job says it wrote? A verdict per table and check.

Spark only counts rows per day; the verdicts are a pure function of these counts, the closed days and the run
records. A bad verdict is an alert for a person and never fails the job.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.lake import literals, runs, schemas, tables

DAILY, PER_RUN, ON_CHANGE = "daily", "per run", "on change"

#: Table -> how often it gets rows. Daily: each open day; per run: on the run date; on change: ever.
#: Not here: quarantine, which may well be empty; vocabularies, which have no day; verdicts themselves.
CADENCES: dict[str, str] = {
    "events": DAILY,
    "user_days": DAILY,
    "orders": DAILY,
    "session_segments": DAILY,
    "sessions": DAILY,
    "consents": DAILY,
    "histories": PER_RUN,
    "scoring_examples": PER_RUN,
    "predictions": PER_RUN,
    "assignments": PER_RUN,
    "audience": PER_RUN,
    "users": ON_CHANGE,
    "catalogue": ON_CHANGE,
    "costs": ON_CHANGE,
    "campaigns": ON_CHANGE,
    "sends": ON_CHANGE,
    "redemptions": ON_CHANGE,
    "conversions": ON_CHANGE,
    "training_examples": ON_CHANGE,
}
#: Job -> tables whose rows of a run date its run records count.
COUNTED: dict[str, tuple[str, ...]] = {
    "score": ("predictions",),
    "select_audience": ("assignments", "audience"),
}

#: Rows per day; None = the table does not exist.
Counts = Mapping[str, Mapping[date, int] | None]


@dataclass(frozen=True)
class Verdict:
    """One row of ``verdicts``."""

    run_date: date
    table_name: str
    check_name: str
    verdict: str
    observed: str
    expected: str


def count_rows(spark: SparkSession, root_uri: str, dates: DateRange) -> Counts:
    """Rows per day of each monitored table, up to the last run date; one Spark job.

    The days are those of the table's date column; an audience has the run date of its ledger.
    """
    exists = {table: tables.exists(spark, root_uri, table) for table in CADENCES}
    frames = [
        _days(spark, root_uri, table)
        .where(F.col("day") < F.lit(dates.end))
        .groupBy("day")
        .agg(F.count(F.lit(1)).alias("num_rows"))
        .select(F.lit(table).alias("table_name"), "day", "num_rows")
        for table in CADENCES
        if exists[table]
    ]
    rows = reduce(DataFrame.unionByName, frames).collect() if frames else []
    return {
        table: {row["day"]: int(row["num_rows"]) for row in rows if row["table_name"] == table}
        if exists[table]
        else None
        for table in CADENCES
    }


def recorded_rows(records: Iterable[runs.RunRecord]) -> dict[tuple[str, date], int]:
    """What the jobs say they wrote: (table, run date) -> rows, over all campaigns.

    Of one job, day, campaign and version only the newest successful record counts: reruns replace.
    """
    newest: dict[tuple[str, str, str, str], runs.RunRecord] = {}
    for record in records:
        if record.status == "ok" and record.job in COUNTED:
            version = str(record.facts.get("version", ""))
            newest[record.job, record.dates, record.arguments.get("campaign", ""), version] = record
    total: dict[tuple[str, date], int] = {}
    for (job, dates, _, _), record in newest.items():
        for table in COUNTED[job]:
            key = (table, DateRange.parse(dates).start)
            total[key] = total.get(key, 0) + record.rows.get(table, 0)
    return total


def check_tables(
    counts: Counts,
    recorded: Mapping[tuple[str, date], int],
    dates: DateRange,
    closed_days: Collection[date],
    max_age_days: int,
) -> list[Verdict]:
    """Freshness and row count of each table on each run date."""
    verdicts = []
    for day in dates.days():
        for table, by_day in counts.items():
            verdicts.append(check_freshness(table, by_day, day, closed_days, max_age_days))
            verdicts.append(check_row_count(table, by_day, day, recorded.get((table, day))))
    return verdicts


def check_freshness(
    table: str,
    by_day: Mapping[date, int] | None,
    run_date: date,
    closed_days: Collection[date],
    max_age_days: int,
) -> Verdict:
    """Compare a table's newest day with the one that it should have reached.

    Rule: a daily table may lag ``max_age_days`` behind the run date, days that are closed not counted; a
    table per run has rows on the run date; one that changes rarely has rows at all.
    Verdicts: missing (no table), empty (no rows up to the run date), stale (too old), ok.
    """

    def verdict(name: str, observed: str, expected: str) -> Verdict:
        return Verdict(run_date, table, "freshness", name, observed, expected)

    match CADENCES[table]:
        case "daily":
            wanted = run_date
            for _ in range(max_age_days):
                wanted = _last_open(wanted - timedelta(days=1), closed_days)
            wanted = _last_open(wanted, closed_days)
            expected = f"rows on {wanted} or later"
        case "per run":
            wanted, expected = run_date, f"rows on {run_date}"
        case _:
            wanted, expected = date.min, f"rows up to {run_date}"
    if by_day is None:
        return verdict("missing", "no table", expected)
    newest = max((day for day, rows in by_day.items() if day <= run_date and rows), default=None)
    if newest is None:
        return verdict("empty", f"no rows up to {run_date}", expected)
    return verdict("ok" if newest >= wanted else "stale", f"newest rows on {newest}", expected)


def check_row_count(
    table: str, by_day: Mapping[date, int] | None, run_date: date, recorded: int | None
) -> Verdict:
    """Compare a table's rows with what its job has recorded for the run date, or with none at all.

    Verdicts: missing (no table, or fewer rows than recorded), empty (no rows), stale (more rows than
    recorded: someone else has written since), ok. A job that recorded 0 rows makes 0 rows ok.
    """

    def verdict(name: str, rows: int, expected: str) -> Verdict:
        return Verdict(run_date, table, "row_count", name, f"{rows} rows", expected)

    if recorded is not None:
        found = (by_day or {}).get(run_date, 0)
        expected = f"{recorded} rows, as recorded for {run_date}"
        if by_day is None or found < recorded:
            return verdict("missing", found, expected)
        return verdict("stale" if found > recorded else "ok", found, expected)
    if by_day is None:
        return Verdict(run_date, table, "row_count", "missing", "no table", "at least 1 row")
    newest = max((day for day, rows in by_day.items() if day <= run_date and rows), default=None)
    if newest is None:
        return verdict("empty", 0, "at least 1 row")
    return Verdict(run_date, table, "row_count", "ok", f"{by_day[newest]} rows on {newest}", "at least 1 row")


def facts(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """``verdicts`` as JSON-able rows, worst first, and ``num_alerts``."""
    ordered = sorted(verdicts, key=lambda v: (v.verdict == "ok", v.run_date, v.table_name, v.check_name))
    rows = [asdict(verdict) | {"run_date": verdict.run_date.isoformat()} for verdict in ordered]
    return {"verdicts": rows, "num_alerts": sum(verdict.verdict != "ok" for verdict in ordered)}


def verdict_rows(spark: SparkSession, verdicts: Iterable[Verdict]) -> DataFrame:
    """Rows of table ``verdicts``."""
    declared = schemas.TABLES["verdicts"]
    rows = [tuple(getattr(verdict, name) for name in declared.column_names) for verdict in verdicts]
    return literals.frame(spark, rows, tables.struct_type(declared.columns))


def _last_open(day: date, closed_days: Collection[date]) -> date:
    """The day itself, or the last one before it that is not closed."""
    while day in closed_days:
        day -= timedelta(days=1)
    return day


def _days(spark: SparkSession, root_uri: str, table: str) -> DataFrame:
    """The day of each row, as column ``day``."""
    frame = tables.read(spark, root_uri, table)
    if table == "audience":
        ledger = tables.read_or_empty(spark, root_uri, "assignments")
        versions = ledger.select("campaign_id", "version", "run_date").distinct()
        return frame.join(F.broadcast(versions), ["campaign_id", "version"]).select(
            F.col("run_date").alias("day")
        )
    column = schemas.TABLES[table].date_column or "run_date"
    return frame.select(F.col(column).alias("day"))
