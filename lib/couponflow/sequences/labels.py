"""Labels: which sends become training rows, with which label, in which split.

The population is fixed by sends and days before any label is read; only ``examples.negative_share`` looks at
labels afterwards, of training rows alone, and writes down with which probability a row stayed.
"""

from datetime import date, datetime, timedelta

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.dates import DateRange, day_start
from couponflow.errors import DataError
from couponflow.lake import tables
from couponflow.sections import ExamplesConfig
from couponflow.sequences import conversions

#: Splits that are written, and the reasons for which a row is left out.
SPLITS = ("train", "train_late", "valid", "embargo", "test")
LEFT_OUT = ("no_history", "censored", "no_window", "sampled_out")
_UNIFORM_BITS = 53


def as_of_time(day: str, time_zone: str) -> Column:
    """The cut-off instant of a business day: its local midnight, UTC."""
    return F.to_utc_timestamp(F.col(day).cast("timestamp"), time_zone)


def watermark(spark: SparkSession, root_uri: str, time_zone: str) -> datetime:
    """The instant up to which events are complete: the end of the newest ingest date.

    Raises:
        DataError: table ``events`` is empty.
    """
    newest = tables.read(spark, root_uri, "events").agg(F.max("ingest_date")).collect()[0][0]
    if newest is None:
        raise DataError("table events is empty, so no label is mature; run clean_events first")
    return day_start(newest + timedelta(days=1), time_zone)


def split_of(config: ExamplesConfig, time_zone: str, complete_until: datetime) -> Column:
    """The split of a row with ``as_of_date`` and ``mature_time``, or the reason why it is left out.

    Rule: purged by what was known, never by row: the label of a training row is final by the start of
        validation, that of a validation row by the start of test. A label that is not final (as_of + gap +
        window + returns > watermark) is no negative: ``censored``.
    """
    as_of_date, mature = F.col("as_of_date"), F.col("mature_time")
    valid_start, test_start = (day_start(day, time_zone) for day in (config.valid_start, config.test_start))
    return (
        F.when(as_of_date < F.lit(config.train_start), "no_history")
        .when(mature > F.lit(complete_until), "censored")
        .when(
            as_of_date < F.lit(config.valid_start),
            F.when(mature <= F.lit(valid_start), "train").otherwise("train_late"),
        )
        .when(
            as_of_date < F.lit(config.test_start),
            F.when(mature <= F.lit(test_start), "valid").otherwise("embargo"),
        )
        .otherwise("test")
    )


def label_sends(
    sends: DataFrame, campaigns: DataFrame, converted: DataFrame, config: Config, complete_until: datetime
) -> DataFrame:
    """Label each (campaign, user, day) that was sent to.

    Grain: one row per (campaign_id, user_id, send_date) of ``sends``; several sends of one day are one row,
        a conversion if any of them converted, mature when all of them are.
    Adds: as_of, as_of_date, label, label_end, mature_time, split (or the reason to leave it out),
        sampling_rate, example_id, row_hash.
    """
    time_zone = config.lake.time_zone
    windows = conversions.with_label_window(sends, campaigns, config.conversions, time_zone)
    hits = converted.select("send_id", F.lit(1).alias("label")).dropDuplicates(["send_id"])
    rows = (
        windows.join(hits, "send_id", "left")
        .groupBy("user_id", "campaign_id", F.col("send_date").alias("as_of_date"))
        .agg(
            F.coalesce(F.max("label"), F.lit(0)).alias("label"),
            F.max("label_end").alias("label_end"),
            F.max("mature_time").alias("mature_time"),
            F.max(F.col("label_end") > F.col("label_start")).alias("has_window"),
        )
        .withColumn("as_of", as_of_time("as_of_date", time_zone))
        .withColumn("split", split_of(config.examples, time_zone, complete_until))
        .withColumn(
            "split",
            F.when(F.col("has_window") | (F.col("split") == "no_history"), F.col("split")).otherwise(
                "no_window"
            ),
        )
        .withColumn(
            "example_id", F.concat_ws(":", "campaign_id", "user_id", F.col("as_of_date").cast("string"))
        )
        .withColumn("row_hash", F.xxhash64("example_id"))
        .drop("has_window")
    )
    return sample_negatives(rows, config.examples)


def sample_negatives(rows: DataFrame, config: ExamplesConfig) -> DataFrame:
    """Keep ``negative_share`` of the training rows without conversion; the others become ``sampled_out``.

    Adds ``sampling_rate``: the share for negatives of ``train``, 1 elsewhere.
    Rule: a row stays iff a uniform number from a salted hash of (seed, example_id) lies below the share: the
        choice depends on nothing else, and a larger share keeps all that a smaller one keeps.
    """
    if config.negative_share == 1.0:
        return rows.withColumn("sampling_rate", F.lit(1.0))
    drawn = F.xxhash64(F.lit(f"negative_share {config.seed}"), "example_id")
    uniform = F.shiftrightunsigned(drawn, 64 - _UNIFORM_BITS) / F.lit(float(2**_UNIFORM_BITS))
    is_candidate = (F.col("split") == "train") & (F.col("label") == 0)
    share = F.lit(config.negative_share)
    return rows.withColumn("sampling_rate", F.when(is_candidate, share).otherwise(1.0)).withColumn(
        "split", F.when(is_candidate & (uniform >= share), "sampled_out").otherwise(F.col("split"))
    )


def read_labelled(
    spark: SparkSession, config: Config, dates: DateRange, complete_until: datetime
) -> DataFrame:
    """Label the sends of a range of days.

    Raises:
        DataError: a table is missing, or a send names an unknown campaign.
    """
    root_uri = config.lake.root_uri
    sends = conversions.read_sends(spark, root_uri, dates)
    corrected = tables.read(spark, root_uri, "campaigns")  # windows follow corrections, features never do
    conversions.check_campaigns(sends, corrected)
    return label_sends(
        sends, corrected, tables.read(spark, root_uri, "conversions", dates), config, complete_until
    )


def count_splits(labelled: DataFrame, complete_until: datetime) -> tuple[dict[str, int], dict[str, int]]:
    """Rows of each split, and rows left out by reason; together all that were asked for.

    Raises:
        DataError: rows were asked for and no label is final.
    """
    sizes = {row["split"]: row["count"] for row in labelled.groupBy("split").count().collect()}
    splits = {name: sizes.get(name, 0) for name in SPLITS}
    left_out = {reason: sizes.get(reason, 0) for reason in LEFT_OUT}
    if left_out["censored"] and left_out["censored"] == sum(sizes.values()):
        first = labelled.orderBy("as_of_date", "mature_time").select("as_of_date", "label_end", "mature_time")
        row = first.first()
        assert row is not None
        raise DataError(
            f"training_examples: no label is mature; as_of {row['as_of_date']} has label_end "
            f"{row['label_end']:%Y-%m-%d %H:%M} UTC and is final at {row['mature_time']:%Y-%m-%d %H:%M} "
            f"UTC, later than the watermark {complete_until:%Y-%m-%d %H:%M} UTC; "
            "run again when events are complete up to then, or give earlier --dates"
        )
    return splits, left_out


def fold_conditions(
    cutoffs: tuple[date, ...], time_zone: str
) -> list[tuple[date, datetime, datetime | None]]:
    """Each cut-off of the back-test: its day, its instant, and the instant of the next one (None = no end).

    Rule: a row trains a fold iff its label was final by the cut-off (``mature_time`` <= it), and tests it iff
        its as_of lies in [cut-off, next): the two can never meet, since as_of < mature_time.
    """
    starts = [day_start(day, time_zone) for day in cutoffs]
    return list(zip(cutoffs, starts, [*starts[1:], None], strict=True)) if starts else []
