"""Columns and keys that all aggregates share: windows, money, shares, snapshots before a cut-off."""

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

#: Grain of what is known of a user, and of a user with a campaign, at a cut-off.
PAIR = ["user_id", "as_of_date"]
ROW = ["user_id", "campaign_id", "as_of_date"]
#: Events that are answers to a mail, and no visit.
MAIL = ("mail_open", "mail_click")


def micros(column: str) -> Column:
    """Money in whole micro-units; none is 0."""
    return F.round(F.coalesce(F.col(column), F.lit(0.0)) * 1e6).cast("bigint")


def is_purchase() -> Column:
    """Whether an event is a purchased line."""
    return F.col("event_type") == "purchase"


def total(condition: Column, value: Column | int = 1) -> Column:
    """Sum of a value, or number of rows, where a condition holds; null is no."""
    return F.sum(F.when(condition, value).otherwise(0))


def within(days: int) -> Column:
    """Whether a row with ``age`` in days lies in the window of that many days."""
    return F.col("age") <= days


def ratio(part: Column, whole: Column) -> Column:
    """Share or rate in 0..1; of nothing it is 0."""
    # ``least`` passes over nulls, so that a missing part would count as the whole.
    return F.when(whole > 0, F.least(F.coalesce(part, F.lit(0)) / whole, F.lit(1.0))).otherwise(0.0)


def newest_snapshots(master: DataFrame, cutoffs: DataFrame) -> DataFrame:
    """Find the newest snapshot before each cut-off's day; that day's own is delivered after its start."""
    return (
        master.select("snapshot_date")
        .distinct()
        .join(cutoffs.select("as_of_date").distinct(), F.col("snapshot_date") < F.col("as_of_date"))
        .groupBy("as_of_date")
        .agg(F.max("snapshot_date").alias("snapshot_date"))
    )
