"""sends x orders or redemptions -> conversions; and the label window that labels and examples share.

A window is half-open: ``label_start <= time < label_end``. Its label is final at ``mature_time``, when the
return window of the last possible order is over too: what is delivered on a later day changes it no more.
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
#: What an order must not become while it may be returned.
UNDONE = ("cancelled", "returned")
_DAY_MICROS = 86_400_000_000


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


def is_marketing() -> Column:
    """Whether a send is one: whatever the sender does not call transactional."""
    return F.coalesce(F.lower(F.trim("mail_type")), F.lit("")) != "transactional"


def with_label_window(
    sends: DataFrame, campaigns: DataFrame, config: ConversionsConfig, time_zone: str
) -> DataFrame:
    """Add ``label_start``, ``label_end`` (half-open) and ``mature_time`` to each send, all UTC.

    Grain: one row per send, as given. Needs: ``campaign_id``, ``send_date`` and ``delivered_time``.
    Rule: window 'campaign' = [local midnight of start_date, local midnight after end_date), for a send after
        the start from local midnight of its own day: what came before the mail is no answer to it;
        'days' = [delivered_time, delivered_time + label_days of 24 h). ``gap_days`` move the start of either
        and the end of 'days'; a campaign that ends inside the gap has an empty window, label_end =
        label_start. ``mature_time`` is ``return_days`` of 24 h after label_end.
    Nulls: a send of an unknown campaign has a null window under 'campaign'; ``check_campaigns`` refuses it.
    """
    if config.window == "days":
        start = _later(F.col("delivered_time"), config.gap_days)
        windows = sends.withColumn("label_start", start).withColumn(
            "label_end", _later(start, config.label_days)
        )
    else:
        periods = latest_campaigns(campaigns).select(
            "campaign_id", "start_date", _midnight(F.date_add("end_date", 1), time_zone).alias("period_end")
        )
        first_day = F.when(F.col("start_date").isNotNull(), F.greatest("start_date", "send_date"))
        start = _midnight(F.date_add(first_day, config.gap_days), time_zone)
        windows = sends.join(F.broadcast(periods), "campaign_id", "left").select(
            *sends.columns,
            start.alias("label_start"),
            F.when(first_day.isNotNull(), F.greatest("period_end", start)).alias("label_end"),
        )
    return windows.withColumn("mature_time", _later(F.col("label_end"), config.return_days))


def _later(time: Column, days: int) -> Column:
    """An instant plus whole days of 24 h."""
    return F.timestamp_micros(F.unix_micros(time) + F.lit(days * _DAY_MICROS))


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

    Grain: one row per converted send; a send without proof in its window gives none. Rules and input are
        those of ``proofs_in_window``.
    Cost: one join by user, one shuffle by send.
    """
    return (
        proofs_in_window(sends, proofs, campaigns, config, time_zone)
        .groupBy("send_id", "campaign_id", "user_id", "send_date")
        .agg(
            F.min("proof_time").alias("converted_time"),
            F.count_distinct("proof_id").alias("num_conversions"),
        )
        .select(*schemas.TABLES["conversions"].column_names)
        .repartition("send_date")
    )


def proofs_in_window(
    sends: DataFrame,
    proofs: DataFrame,
    campaigns: DataFrame,
    config: ConversionsConfig,
    time_zone: str,
    keep: tuple[str, ...] = (),
) -> DataFrame:
    """Find the proofs of each send's conversion.

    Grain: one row per (send, proof): the columns of ``with_label_window``, ``proof_id``, ``proof_time`` and
        the columns of the proof named by ``keep``.
    Input: ``proofs`` holds every delivery, as ``read_proofs`` gives them.
    Rule: a redemption proves a send of the same user and campaign, an order one of the same user; its
        time lies in the send's window. The first delivery of a proof counts, once; one order may prove the
        sends of several campaigns. With ``return_days`` an order proves nothing that any delivery calls
        cancelled or returned (``UNDONE``) less than so many days of 24 h after order_time; a status without
        time counts from the order on.
    Late: what is delivered after the business day on which the send matures is not looked at, so that a
        rerun never changes a mature label.
    Cost: one join by user.
    """
    key, time = PROOFS[config.source]
    on = ["user_id", "campaign_id"] if config.source == "redemptions" else ["user_id"]
    found = first_deliveries(proofs, key).select(
        *on,
        F.col(time).alias("proof_time"),
        F.col(key).alias("proof_id"),
        F.col("ingest_date").alias("known_date"),
        *keep,
    )
    inside = (F.col("proof_time") >= F.col("label_start")) & (F.col("proof_time") < F.col("label_end"))
    # The last business day that is over when the label is final.
    last_moment = F.timestamp_micros(F.unix_micros("mature_time") - 1)
    last_day = F.to_date(F.from_utc_timestamp(last_moment, time_zone))
    pairs = (
        with_label_window(sends, campaigns, config, time_zone)
        .withColumn("last_day", last_day)
        .join(found, on, "inner")
        .where(inside & (F.col("known_date") <= F.col("last_day")))
    )
    if config.source == "orders" and config.return_days:
        undone = proofs.where(F.col("order_status").isin(*UNDONE)).select(
            F.col(key).alias("undone_id"), "status_time", F.col("ingest_date").alias("told_date")
        )
        is_undone = (
            (F.col("proof_id") == F.col("undone_id"))
            & (F.col("told_date") <= F.col("last_day"))
            & (F.coalesce("status_time", "proof_time") < _later(F.col("proof_time"), config.return_days))
        )
        pairs = pairs.join(undone, is_undone, "left_anti")
    return pairs


def read_sends(spark: SparkSession, root_uri: str, send_dates: DateRange) -> DataFrame:
    """Marketing sends of a range of send dates, each ``send_id`` once: its first delivery, of any send date.

    Raises:
        DataError: the table does not exist.
    """
    first = first_deliveries(tables.read(spark, root_uri, "sends"), "send_id")
    return first.where(tables.in_range("send_date", send_dates) & is_marketing())


def read_proofs(
    spark: SparkSession,
    root_uri: str,
    sends: DataFrame,
    campaigns: DataFrame,
    config: ConversionsConfig,
    time_zone: str,
) -> DataFrame:
    """Deliveries of orders or redemptions that can lie in a window of these sends, later ones included.

    Cost: one small job finds the earliest window and the last day that counts.
    """
    edges: Any = (
        with_label_window(sends, campaigns, config, time_zone)
        .agg(F.min("label_start").alias("first"), F.max("mature_time").alias("last"))
        .collect()[0]
    )
    rows = tables.read(spark, root_uri, config.source)
    if edges["first"] is None:
        return rows.where(F.lit(False))
    # Nothing is delivered before it happens, but for clocks and time zones: a day either way.
    first, last = (F.to_date(F.lit(edges[name])) for name in ("first", "last"))
    return rows.where(
        (F.col("ingest_date") >= F.date_sub(first, 2)) & (F.col("ingest_date") <= F.date_add(last, 1))
    )
