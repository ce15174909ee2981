"""sends x orders or redemptions -> conversions; and the label window that labels and examples share.

A window is half-open: ``label_start <= time < label_end``.
"""

from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.errors import DataError
from couponflow.lake import schemas, tables
from couponflow.sections import ConversionsConfig

#: Per source: the table's key, and the time that must lie in the window.
PROOFS = {"orders": ("order_id", "order_time"), "redemptions": ("redemption_id", "redemption_time")}


def _midnight(day: Column, time_zone: str) -> Column:
    """Local midnight of a date column as a UTC instant; the session time zone is UTC."""
    return F.to_utc_timestamp(day.cast("timestamp"), time_zone)


def latest_campaigns(campaigns: DataFrame) -> DataFrame:
    """One row per ``campaign_id``: the newest delivery, as a corrected campaign replaces the older one."""
    newest = Window.partitionBy("campaign_id").orderBy(F.col("ingest_date").desc())
    return (
        campaigns.withColumn("age_rank", F.row_number().over(newest)).where("age_rank = 1").drop("age_rank")
    )


def first_deliveries(rows: DataFrame, key: str) -> DataFrame:
    """Keep each ``key`` once: its first delivery wins, so that a later copy changes nothing known before.

    Needs: ``ingest_date``; (``key``, ``ingest_date``) is unique. Cost: one shuffle of two columns, one join.
    """
    first = rows.groupBy(key).agg(F.min("ingest_date").alias("first_date"))
    is_first = F.col("ingest_date") == F.col("first_date")
    return rows.join(first, key).where(is_first).select(*rows.columns)


def with_label_window(
    sends: DataFrame, campaigns: DataFrame, config: ConversionsConfig, time_zone: str
) -> DataFrame:
    """Add ``label_start`` and ``label_end`` (UTC, half-open) to each send.

    Grain: one row per send, as given. Needs: ``campaign_id``, ``send_date`` and ``delivered_time``.
    Rule: window 'campaign' = [local midnight of start_date, local midnight after end_date), for a send after
        the start from local midnight of its own day: what came before the mail is no answer to it;
        'days' = [delivered_time, delivered_time + label_days of 24 h).
    Nulls: a send of an unknown campaign has a null window under 'campaign'; ``check_campaigns`` refuses it.
    """
    if config.window == "days":
        micros = F.unix_micros("delivered_time") + config.label_days * 86_400_000_000
        return sends.withColumn("label_start", F.col("delivered_time")).withColumn(
            "label_end", F.timestamp_micros(micros)
        )
    periods = latest_campaigns(campaigns).select(
        "campaign_id", "start_date", _midnight(F.date_add("end_date", 1), time_zone).alias("label_end")
    )
    first_day = F.when(F.col("start_date").isNotNull(), F.greatest("start_date", "send_date"))
    return sends.join(F.broadcast(periods), "campaign_id", "left").select(
        *sends.columns, _midnight(first_day, time_zone).alias("label_start"), "label_end"
    )


def check_campaigns(sends: DataFrame, campaigns: DataFrame) -> None:
    """Refuse sends of campaigns that were never delivered: their window is unknown.

    Raises:
        DataError: naming the first such campaign.
    """
    unknown = sends.join(campaigns, "campaign_id", "left_anti").select("campaign_id").distinct()
    names = sorted(row["campaign_id"] for row in unknown.take(100))
    if names:
        raise DataError(
            f"table sends names campaign {names[0]} ({len(names)} unknown campaigns), which table campaigns "
            "lacks; land the campaigns feed of the days before and run clean_feeds for them"
        )


def attribute(
    sends: DataFrame, proofs: DataFrame, campaigns: DataFrame, config: ConversionsConfig, time_zone: str
) -> DataFrame:
    """Find the sends that converted, as rows of ``conversions``.

    Grain: one row per converted send; a send without proof in its window gives none.
    Rule: a redemption proves a send of the same user and campaign, an order one of the same user; its
        time lies in the send's window. A proof delivered twice counts once (if its time changed, with
        any of them); one order may prove the sends of several campaigns.
    Cost: one join by user, one shuffle by send.
    """
    key, time = PROOFS[config.source]
    found = proofs.select(
        F.col("user_id"),
        F.col(time).alias("proof_time"),
        F.col(key).alias("proof_id"),
        *([F.col("campaign_id")] if config.source == "redemptions" else []),
    )
    on = ["user_id", "campaign_id"] if config.source == "redemptions" else ["user_id"]
    inside = (F.col("proof_time") >= F.col("label_start")) & (F.col("proof_time") < F.col("label_end"))
    return (
        with_label_window(sends, campaigns, config, time_zone)
        .join(found, on, "inner")
        .where(inside)
        .groupBy("send_id", "campaign_id", "user_id", "send_date")
        .agg(
            F.min("proof_time").alias("converted_time"),
            F.count_distinct("proof_id").alias("num_conversions"),
        )
        .select(*schemas.TABLES["conversions"].column_names)
        .repartition("send_date")
    )


def read_sends(spark: SparkSession, root_uri: str, send_dates: DateRange) -> DataFrame:
    """Sends of a range of send dates, each ``send_id`` once: its first delivery, of any send date.

    Raises:
        DataError: the table does not exist.
    """
    first = first_deliveries(tables.read(spark, root_uri, "sends"), "send_id")
    return first.where(tables.in_range("send_date", send_dates))


def read_proofs(
    spark: SparkSession,
    root_uri: str,
    sends: DataFrame,
    campaigns: DataFrame,
    config: ConversionsConfig,
    time_zone: str,
) -> DataFrame:
    """Orders or redemptions that can lie in a window of these sends, late deliveries included.

    Cost: one small job finds the earliest and latest window.
    """
    edges: Any = (
        with_label_window(sends, campaigns, config, time_zone)
        .agg(F.min("label_start").alias("first"), F.max("label_end").alias("last"))
        .collect()[0]
    )
    time = F.col(PROOFS[config.source][1])
    rows = tables.read(spark, root_uri, config.source)
    if edges["first"] is None:
        return rows.where(F.lit(False))
    # Nothing is delivered before it happens, but for clocks and time zones: a day either way.
    delivered = F.col("ingest_date") >= F.date_sub(F.to_date(F.lit(edges["first"])), 2)
    return rows.where(delivered & (time >= F.lit(edges["first"])) & (time < F.lit(edges["last"])))
