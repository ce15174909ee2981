"""ledger, sends, orders -> the cells of a readout; nothing is read before every label window is final.

A user without mail has no send and so no label of his own. Every selected user, mailed or not, therefore gets
a stand-in send at the start of the day on which the first mail of the version was delivered, and the rule of
``conversions`` is applied to all of them alike: the same window, the same returns, the same late deliveries.
An order is what counts, also where a redemption proves a conversion: a user without a coupon can redeem none.
The real sends and their labels serve expected against actual, and show who was mailed.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.campaign.readouts.effects import BUCKETS_PER_E, EXPLORE, Cell
from couponflow.config import Config
from couponflow.dates import DateRange, day_start, local_day
from couponflow.errors import DataError
from couponflow.lake import tables
from couponflow.lake.erased import TOMBSTONE
from couponflow.sequences import conversions, labels

MICRO = 1_000_000
_NANO = 1_000_000_000
_MOMENT = timedelta(microseconds=1)
_LEAST_SHARE = 1e-9  # log-odds of 0 and 1 do not exist


@dataclass(frozen=True)
class Version:
    """A version in the ledger: when it was decided, until when sends are its own, who was erased since."""

    run_date: date
    next_run_date: date | None
    num_erased: int


@dataclass(frozen=True)
class Span:
    """When a version was mailed, and the window of its stand-in sends; ``mature_time`` is of all sends."""

    mail_date: date
    label_start: datetime
    label_end: datetime
    mature_time: datetime
    num_sends: int
    num_without_propensity: int
    campaign_type: str


def find_version(ledger: DataFrame, campaign_id: str, version: str) -> Version:
    """A version of a campaign in the ledger.

    Raises:
        DataError: the ledger does not hold it.
    """
    found = {
        str(row["version"]): row
        for row in ledger.where(F.col("campaign_id") == campaign_id)
        .groupBy("version")
        .agg(
            F.min("run_date").alias("run_date"),
            F.sum(F.col("user_id").startswith(TOMBSTONE).cast("int")).alias("num_erased"),
        )
        .collect()
    }
    if version not in found:
        known = f"; it has {', '.join(sorted(found))}" if found else ""
        raise DataError(f"table assignments, campaign {campaign_id}: no rows of version {version!r}{known}")
    run_date = found[version]["run_date"]
    later = [row["run_date"] for row in found.values() if row["run_date"] > run_date]
    return Version(run_date, min(later, default=None), int(found[version]["num_erased"]))


def sends_of(spark: SparkSession, root_uri: str, campaign_id: str, version: Version | None) -> DataFrame:
    """Sends of a campaign, each once: those of one version (until the next is decided), or all."""
    first = conversions.first_deliveries(tables.read(spark, root_uri, "sends"), "send_id")
    sends = first.where(F.col("campaign_id") == campaign_id)
    if version is not None:
        sends = sends.where(F.col("send_date") >= F.lit(version.run_date))
        if version.next_run_date is not None:
            sends = sends.where(F.col("send_date") < F.lit(version.next_run_date))
    return sends


def find_span(spark: SparkSession, config: Config, campaign_id: str, version: Version | None) -> Span:
    """When the mails went out, and from when on all that they may have caused is known.

    Raises:
        DataError: no mail was delivered, or the campaign is unknown.
    """
    root_uri, zone = config.lake.root_uri, config.lake.time_zone
    campaigns = tables.read(spark, root_uri, "campaigns")
    sends = sends_of(spark, root_uri, campaign_id, version)
    whole = conversions.with_label_window(sends, campaigns, config.conversions, zone).agg(
        F.min("send_date").alias("send_date"),
        F.max("mature_time").alias("last_mature_time"),
        F.count(F.lit(1)).alias("num_sends"),
        F.sum(F.col("propensity").isNull().cast("int")).alias("num_without_propensity"),
    )
    stand_in = whole.withColumn("campaign_id", F.lit(campaign_id)).withColumn(
        "delivered_time", labels.as_of_time("send_date", zone)
    )
    types = conversions.latest_campaigns(campaigns).select("campaign_id", "campaign_type")
    row: Any = (
        conversions.with_label_window(stand_in, campaigns, config.conversions, zone)
        .join(types, "campaign_id", "left")
        .collect()[0]
    )
    where = f"campaign {campaign_id}" + (f", decided for {version.run_date}" if version else "")
    if not row["num_sends"]:
        raise DataError(f"table sends, {where}: no mail is delivered; land and clean the sends of that day")
    if row["label_end"] is None or row["campaign_type"] is None:
        raise DataError(f"table campaigns lacks campaign {campaign_id}; land its feed and run clean_feeds")
    start, end, mature, last = (
        row[name].astimezone(UTC) for name in ("label_start", "label_end", "mature_time", "last_mature_time")
    )
    if start >= end:
        raise DataError(f"{where}: it ends inside conversions.gap_days, so it has no label window")
    return Span(
        row["send_date"],
        start,
        end,
        max(mature, last),
        int(row["num_sends"]),
        int(row["num_without_propensity"]),
        str(row["campaign_type"]),
    )


def complete_until(spark: SparkSession, root_uri: str, time_zone: str) -> datetime:
    """The instant up to which both events and orders are complete.

    Raises:
        DataError: one of the tables is empty or missing.
    """
    newest = tables.read(spark, root_uri, "orders").agg(F.max("ingest_date")).collect()[0][0]
    if newest is None:
        raise DataError("table orders is empty, so nothing can be compared; land it and run clean_feeds")
    return min(labels.watermark(spark, root_uri, time_zone), day_start(newest + timedelta(days=1), time_zone))


def check_mature(span: Span, known_until: datetime, time_zone: str, name: str) -> None:
    """Refuse a window that is not over, or that returns may still change.

    Raises:
        DataError: naming the day from which on it can be read.
    """
    if span.mature_time <= known_until:
        return
    day = last_day(span, time_zone)
    readable = day + timedelta(days=1)
    raise DataError(
        f"{name}: its label windows are final at {span.mature_time:%Y-%m-%d %H:%M} UTC, events and orders "
        f"are complete up to {known_until:%Y-%m-%d %H:%M} UTC; it can be read from {readable} on, "
        f"when the deliveries of {day} are cleaned"
    )


def last_day(span: Span, time_zone: str) -> date:
    """The last business day whose deliveries count."""
    return local_day(span.mature_time - _MOMENT, time_zone)


def ledger_cells(
    spark: SparkSession, config: Config, campaign_id: str, name: str, version: Version, span: Span
) -> list[Cell]:
    """The users of a version in cells of (arm, propensity, coupon, log-odds).

    Selected and explored users, and whoever was mailed without being either. An erased person is in no cell.
    ``num_before`` looks back from the start of the window over as long a time as the window.
    Cost: one job; orders of three window lengths and the ledger are joined by user.
    """
    root_uri, zone = config.lake.root_uri, config.lake.time_zone
    users = (
        tables.read(spark, root_uri, "assignments")
        .where((F.col("campaign_id") == campaign_id) & (F.col("version") == name))
        .where(~F.col("user_id").startswith(TOMBSTONE))
        .select("user_id", "arm", "would_select", "propensity", "coupon_id", "conversion_probability")
    )
    is_compared = F.col("would_select") | (F.col("arm") == EXPLORE)
    back = span.label_start - (span.label_end - span.label_start)
    seen = DateRange(
        local_day(back, zone) - timedelta(days=1), local_day(span.mature_time, zone) + timedelta(days=2)
    )
    orders = tables.read(spark, root_uri, "orders", seen)
    before = conversions.first_deliveries(orders, "order_id").where(
        (F.col("order_time") >= F.lit(back)) & (F.col("order_time") < F.lit(span.label_start))
    )
    flagged = (
        users.join(
            _spent(users.where(is_compared), orders, config, campaign_id, span, spark), "user_id", "left"
        )
        .join(before.select("user_id", F.lit(1).alias("was_before")).distinct(), "user_id", "left")
        .join(_mailed(spark, config, campaign_id, version), "user_id", "left")
        .where(is_compared | (F.col("is_converted").isNotNull() & (F.col("conversion_probability") > 0)))
    )
    return _cells(flagged, "arm", "would_select", "propensity")


def _spent(
    users: DataFrame, orders: DataFrame, config: Config, campaign_id: str, span: Span, spark: SparkSession
) -> DataFrame:
    """Per user with an order in the window: ``revenue_micro``, what he paid in it in millionths."""
    zone = config.lake.time_zone
    sends = users.select(
        F.col("user_id").alias("send_id"),
        F.lit(campaign_id).alias("campaign_id"),
        "user_id",
        F.lit(day_start(span.mail_date, zone)).alias("delivered_time"),
        F.lit(span.mail_date).alias("send_date"),
    )
    rule = config.conversions.model_copy(update={"source": "orders"})
    campaigns = tables.read(spark, config.lake.root_uri, "campaigns")
    proofs = conversions.proofs_in_window(sends, orders, campaigns, rule, zone, keep=("total_amount",))
    return proofs.groupBy("user_id").agg(_exact_sum(_micro("total_amount")).alias("revenue_micro"))


def _mailed(spark: SparkSession, config: Config, campaign_id: str, version: Version | None) -> DataFrame:
    """Per mailed user ``is_converted``, whether a send of his converted by its own label."""
    sends = _labelled(spark, config, campaign_id, version)
    return sends.groupBy("user_id").agg(F.max("is_converted").alias("is_converted"))


def _labelled(spark: SparkSession, config: Config, campaign_id: str, version: Version | None) -> DataFrame:
    root_uri = config.lake.root_uri
    hits = (
        tables.read(spark, root_uri, "conversions")
        .where(F.col("campaign_id") == campaign_id)
        .select("send_id", F.lit(1).alias("hit"))
        .dropDuplicates(["send_id"])
    )
    return (
        sends_of(spark, root_uri, campaign_id, version)
        .join(hits, "send_id", "left")
        .select("user_id", "send_date", F.coalesce("hit", F.lit(0)).alias("is_converted"))
    )


def delivered_cells(spark: SparkSession, config: Config, campaign_id: str) -> tuple[list[Cell], str]:
    """Mails without ledger that have a prediction of their day, and the one model that made them, else "".

    Grain of what is counted: (user, send date). Cost: one job.
    """
    predictions = (
        tables.read_or_empty(spark, config.lake.root_uri, "predictions")
        .where((F.col("campaign_id") == campaign_id) & (F.col("target_id") == campaign_id))
        .select("user_id", F.col("run_date").alias("send_date"), "conversion_probability", "model_version")
    )
    sends = _labelled(spark, config, campaign_id, None).groupBy("user_id", "send_date")
    found = (
        sends.agg(F.max("is_converted").alias("is_converted"))
        .join(predictions, ["user_id", "send_date"])
        .withColumn("revenue_micro", F.lit(None).cast("decimal(38,0)"))
        .withColumn("was_before", F.lit(None).cast("int"))
        .withColumn("is_selected", F.lit(False))
        .withColumn("share", F.lit(None).cast("double"))
        .withColumn("coupon_id", F.lit(None).cast("string"))
    )
    cells = _cells(found, "model_version", "is_selected", "share")
    models = {cell.arm for cell in cells}
    return cells, models.pop() if len(models) == 1 else ""


def _cells(users: DataFrame, arm: str, is_selected: str, propensity: str) -> list[Cell]:
    """Count users by arm, coupon and log-odds in whole numbers: the order of rows changes nothing."""
    is_mailed = F.col("is_converted").isNotNull()
    revenue = F.coalesce("revenue_micro", F.lit(0)).cast("decimal(18,0)")
    probability = F.floor(F.col("conversion_probability") * F.lit(float(_NANO)) + 0.5).cast("bigint")
    found = users.groupBy(
        F.col(arm).alias("arm"),
        F.col(is_selected).alias("is_selected"),
        F.col(propensity).alias("propensity"),
        "coupon_id",
        _bucket(F.col("conversion_probability")).alias("bucket"),
    ).agg(
        F.count(F.lit(1)).alias("num_users"),
        F.count("revenue_micro").alias("num_converted"),
        _exact_sum(revenue).alias("revenue"),
        _exact_sum(revenue * revenue).alias("squares"),
        F.count("was_before").alias("num_before"),
        F.count("is_converted").alias("num_mailed"),
        F.coalesce(F.sum(F.when(is_mailed, probability)), F.lit(0)).alias("probability"),
        F.coalesce(F.sum("is_converted"), F.lit(0)).alias("conversions"),
    )
    cells = [
        Cell(
            str(row["arm"]),
            int(row["bucket"]),
            int(row["num_users"]),
            bool(row["is_selected"]),
            float("nan") if row["propensity"] is None else float(row["propensity"]),
            int(row["num_converted"]),
            int(row["revenue"]) / MICRO,
            int(row["squares"]) / MICRO**2,
            int(row["num_before"]),
            int(row["num_mailed"]),
            int(row["probability"]) / _NANO,
            int(row["conversions"]),
            row["coupon_id"],
        )
        for row in found.collect()
    ]
    return sorted(
        cells,
        key=lambda cell: (cell.arm, cell.is_selected, cell.bucket, cell.propensity, str(cell.coupon_id)),
    )


def costs_of(
    spark: SparkSession, config: Config, campaign_id: str, run_date: date, span: Span
) -> dict[str, float]:
    """Delivered costs of a campaign by type, from the run date to the end of the window; empty without any.

    The newest delivery of a (day, type) counts, of those known when the labels became final.
    """
    zone = config.lake.time_zone
    rows = (
        tables.read_or_empty(spark, config.lake.root_uri, "costs")
        .where(F.col("campaign_id") == campaign_id)
        .where(F.col("ingest_date") <= F.lit(last_day(span, zone)))
        .where(F.col("cost_date") >= F.lit(run_date))
        .where(F.col("cost_date") <= F.lit(local_day(span.label_end - _MOMENT, zone)))
        .groupBy("cost_date", "cost_type")
        .agg(F.max_by("cost_amount", "ingest_date").alias("cost_amount"))
        .groupBy("cost_type")
        .agg(_exact_sum(_micro("cost_amount")).alias("cost"))
    )
    return {str(row["cost_type"]): int(row["cost"]) / MICRO for row in rows.collect()}


def _micro(name: str) -> Column:
    """An amount in whole millionths, halves up."""
    return F.floor(F.col(name) * F.lit(float(MICRO)) + 0.5)


def _exact_sum(column: Column) -> Column:
    return F.sum(column.cast("decimal(38,0)"))


def _bucket(probability: Column) -> Column:
    """Log-odds in steps of 1 / ``BUCKETS_PER_E``."""
    inside = F.greatest(F.lit(_LEAST_SHARE), F.least(F.lit(1.0 - _LEAST_SHARE), probability))
    odds = F.log(inside) - F.log(F.lit(1.0) - inside)
    return F.floor(odds * BUCKETS_PER_E).cast("int")
