"""Examples: (user, target, as_of) rows with everything a model reads, labelled for training or for scoring.

``build_features`` is the one path to histories, aggregates and targets; training adds label, split and
auxiliary negatives, scoring takes every user of the master. A row is a function of its own key and of what
was known before its ``as_of``, so any set of days may be built in any order.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from couponflow.config import Config
from couponflow.dates import MAX_DAYS, DateRange, day_start
from couponflow.errors import ConfigError, DataError
from couponflow.lake import layouts, tables
from couponflow.sections import ExamplesConfig
from couponflow.sequences import aggregates, conversions, events, histories, identity, packing, vocabulary

if TYPE_CHECKING:
    import pyarrow as pa

#: Splits that are written, and the reasons for which a row is left out.
SPLITS = ("train", "train_late", "valid", "embargo", "test")
LEFT_OUT = ("no_history", "censored")
MAX_ROW_GROUP = 20_000
_ROW = ["user_id", "campaign_id", "as_of_date"]
_EPOCH = date(1970, 1, 1)


@dataclass(frozen=True)
class Inputs:
    """Frames that features are built from; ``events`` is encoded, with ``known_date``, by user."""

    events: DataFrame
    campaigns: DataFrame
    sends: DataFrame
    redemptions: DataFrame
    users: DataFrame
    vocabulary: DataFrame
    vocabulary_version: str


@dataclass(frozen=True)
class Training:
    """Rows for ``training_examples`` and what was counted on the way."""

    frame: DataFrame
    splits: dict[str, int]
    left_out: dict[str, int]
    max_rows_per_file: int
    complete_until: datetime
    seed: int

    @property
    def population(self) -> int:
        """Rows asked for: kept and left out."""
        return sum(self.splits.values()) + sum(self.left_out.values())

    def checked(self, written: int) -> int:
        """Rows written, which must be those of the splits.

        Raises:
            DataError: the table took other rows.
        """
        if written != sum(self.splits.values()):
            raise DataError(
                f"table training_examples: {written} rows written, {sum(self.splits.values())} built; "
                "run build_examples again"
            )
        return written

    @property
    def facts(self) -> dict[str, Any]:
        """What the run record shows."""
        return {
            "splits": self.splits,
            "left_out": self.left_out,
            "watermark": self.complete_until.isoformat(),
            "seed": self.seed,
        }


def as_of_time(day: str, time_zone: str) -> Column:
    """The cut-off instant of a business day: its local midnight, UTC."""
    return F.to_utc_timestamp(F.col(day).cast("timestamp"), time_zone)


def prepare_events(raw: DataFrame, terms: DataFrame, time_zone: str) -> DataFrame:
    """Encode events, add ``known_date`` and partition by user, once for all that follows. Not cached.

    An event is known from the start of its ingest date at the earliest: the sender's ``ingest_time`` may be
    of an earlier day, at whose end nobody could have read it yet.
    """
    delivered = F.greatest("ingest_time", as_of_time("ingest_date", time_zone))
    encoded = vocabulary.encode(raw.withColumn("ingest_time", delivered), terms)
    encoded = encoded.withColumn("known_date", aggregates.known_date(time_zone))
    kept = ["user_id", "event_id", "event_time", "ingest_time", "event_date", "known_date", "event_type"]
    kept += ["order_id", "item_id", "category_id", "price"]
    kept += ["discount_amount", "coupon_amount", "coupon_match_amount"]
    return encoded.select(*kept, *[f"{name}_index" for name in vocabulary.COLUMNS]).repartition("user_id")


def read_inputs(spark: SparkSession, config: Config, last: date) -> Inputs:
    """Read what may be known by the start of business day ``last``, under the current vocabulary.

    Campaigns, sends and redemptions that were delivered again count once, as they came first.

    Raises:
        DataError: a table is missing, or no vocabulary was published.
    """
    root_uri = config.lake.root_uri
    version = vocabulary.current(root_uri).version
    terms = vocabulary.load(spark, root_uri, version)
    raw = events.read_events(spark, root_uri, DateRange(last - timedelta(days=MAX_DAYS), last))
    raw = identity.resolve(raw, identity.links(spark, root_uri))

    def read_first(table: str, key: str) -> DataFrame:
        return conversions.first_deliveries(tables.read(spark, root_uri, table), key)

    return Inputs(
        events=prepare_events(raw, terms, config.lake.time_zone),
        campaigns=read_first("campaigns", "campaign_id"),
        sends=read_first("sends", "send_id"),
        redemptions=read_first("redemptions", "redemption_id"),
        users=tables.read(spark, root_uri, "users"),
        vocabulary=terms,
        vocabulary_version=version,
    )


def watermark(spark: SparkSession, root_uri: str, time_zone: str) -> datetime:
    """The instant up to which events are complete: the end of the newest ingest date.

    Raises:
        DataError: table ``events`` is empty.
    """
    newest = tables.read(spark, root_uri, "events").agg(F.max("ingest_date")).collect()[0][0]
    if newest is None:
        raise DataError("table events is empty, so no label is mature; run clean_events first")
    return day_start(newest + timedelta(days=1), time_zone)


def build_targets(campaigns: DataFrame, terms: DataFrame) -> DataFrame:
    """Pack each campaign's target: one member (0, category, 0) per coupon that has a category.

    Grain: one row per campaign. Adds ``target`` and ``target_size``; members ascend by category index and
        equal ones stay (a multiset); a category outside the vocabulary is OOV.
    """
    coupons = campaigns.select("campaign_id", F.explode("coupons").alias("coupon")).select(
        "campaign_id", F.col("coupon.category_id").alias("category_id")
    )
    known = vocabulary.encode(coupons.where(F.col("category_id").isNotNull()), terms, ("category",))
    members = known.groupBy("campaign_id").agg(
        F.sort_array(F.collect_list("category_index")).alias("members")
    )
    listed = campaigns.select("campaign_id").join(members, "campaign_id", "left")
    filled = F.coalesce("members", F.array().cast("array<int>")).alias("members")
    return listed.select("campaign_id", filled).mapInArrow(
        packing.with_targets, "campaign_id string, target_size int, target binary"
    )


def build_features(inputs: Inputs, population: DataFrame, length: int, time_zone: str) -> DataFrame:
    """Build what a model reads of each (user, campaign, as_of); training and scoring both call this.

    Grain: one row per row of ``population`` (user_id, campaign_id, as_of, as_of_date), its key. Adds
        length, history, wide, target, target_size and vocabulary_version.
    Rule: nothing at or after ``as_of``, or delivered after it, has any influence.
    """
    rows = population.select("user_id", "campaign_id", "as_of", "as_of_date")
    history = histories.build(inputs.events, rows, length).drop("as_of_date")
    wide = aggregates.build(
        inputs.events, rows, inputs.campaigns, inputs.sends, inputs.redemptions, inputs.users, time_zone
    )
    targets = build_targets(inputs.campaigns, inputs.vocabulary)
    return (
        wide.join(history, ["user_id", "as_of"])
        .join(F.broadcast(targets), "campaign_id")
        .withColumn("vocabulary_version", F.lit(inputs.vocabulary_version))
    )


def split_of(config: ExamplesConfig, time_zone: str, complete_until: datetime) -> Column:
    """The split of a row with ``as_of_date`` and ``label_end``, or the reason why it is left out.

    Rule: purged by label window, never by row: a training row's window ends by the start of validation,
        a validation row's by the start of test. A window that is not over is no negative: ``censored``.
    """
    as_of_date, label_end = F.col("as_of_date"), F.col("label_end")
    valid_start, test_start = (day_start(day, time_zone) for day in (config.valid_start, config.test_start))
    return (
        F.when(as_of_date < F.lit(config.train_start), "no_history")
        .when(label_end > F.lit(complete_until), "censored")
        .when(
            as_of_date < F.lit(config.valid_start),
            F.when(label_end <= F.lit(valid_start), "train").otherwise("train_late"),
        )
        .when(
            as_of_date < F.lit(config.test_start),
            F.when(label_end <= F.lit(test_start), "valid").otherwise("embargo"),
        )
        .otherwise("test")
    )


def label_sends(
    sends: DataFrame, campaigns: DataFrame, converted: DataFrame, config: Config, complete_until: datetime
) -> DataFrame:
    """Label each (campaign, user, day) that was sent to.

    Grain: one row per (campaign_id, user_id, send_date) of ``sends``; several sends of one day are one row,
        a conversion if any of them converted, mature when all of them are.
    Adds: as_of, as_of_date, label, label_end, split (or the reason to leave it out), example_id, row_hash.
    """
    time_zone = config.lake.time_zone
    windows = conversions.with_label_window(sends, campaigns, config.conversions, time_zone)
    hits = converted.select("send_id", F.lit(1).alias("label")).dropDuplicates(["send_id"])
    return (
        windows.join(hits, "send_id", "left")
        .groupBy("user_id", "campaign_id", F.col("send_date").alias("as_of_date"))
        .agg(F.coalesce(F.max("label"), F.lit(0)).alias("label"), F.max("label_end").alias("label_end"))
        .withColumn("as_of", as_of_time("as_of_date", time_zone))
        .withColumn("split", split_of(config.examples, time_zone, complete_until))
        .withColumn(
            "example_id", F.concat_ws(":", "campaign_id", "user_id", F.col("as_of_date").cast("string"))
        )
        .withColumn("row_hash", F.xxhash64("example_id"))
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


def oov_shares(encoded: DataFrame) -> dict[str, float]:
    """Share of the events read whose value has no index, per vocabulary field; 0 without events."""
    is_oov = [
        F.avg((F.col(f"{name}_index") == layouts.OOV).cast("double")).alias(name)
        for name in vocabulary.COLUMNS
    ]
    row = encoded.agg(*is_oov).collect()[0]
    return {name: float(row[name] or 0.0) for name in vocabulary.COLUMNS}


def build_popularity(
    encoded: DataFrame, config: ExamplesConfig, last: date, time_zone: str
) -> packing.Popularity:
    """Count (item, category) pairs known before each refresh up to business day ``last``.

    Refreshes lie ``negative_refresh_days`` apart, counted from 1970-01-01, so that they do not move with
    the range that is built. The table is one row per pair and one column per refresh, on the driver.
    """
    every = config.negative_refresh_days
    number = F.floor(F.datediff("known_date", F.lit(_EPOCH)) / every) + 1  # first refresh after the day
    counts = (
        encoded.where(F.col("item_id").isNotNull() & F.col("category_id").isNotNull())
        .groupBy(number.cast("int").alias("refresh"), "item_index", "category_index")
        .agg(F.count(F.lit(1)).alias("num_events"))
        .toPandas()
    )
    first = int(counts["refresh"].min()) if len(counts) else 0
    last_number = (last - _EPOCH).days // every
    counts = counts[counts["refresh"] <= last_number]
    starts = [
        int(day_start(_EPOCH + timedelta(days=every * n), time_zone).timestamp()) // 60
        for n in range(first, last_number + 1)
    ]
    return packing.Popularity.from_counts(
        counts["refresh"].to_numpy(dtype=np.int64) - first,
        counts[["item_index", "category_index"]].to_numpy(dtype=np.int32),
        counts["num_events"].to_numpy(dtype=np.int64),
        np.array(starts, dtype=np.int64),
        config.negative_power,
    )


def with_negatives(frame: DataFrame, popularity: packing.Popularity, seed: int) -> DataFrame:
    """Add ``negatives``, aligned with ``history``, to rows with as_of, history, target and row_hash.

    Rule: drawn by popularity before the step's day; never the step's item, never a category of the target.
        A function of (seed, example_id, position) alone.
    """
    broadcast = frame.sparkSession.sparkContext.broadcast(popularity)
    rows = frame.withColumnRenamed("row_hash", "row_key")

    def draw(batches: "Iterable[pa.RecordBatch]") -> "Iterable[pa.RecordBatch]":
        return packing.with_negatives(batches, lambda: broadcast.value, seed)

    schema = T.StructType([*rows.schema.fields, T.StructField("negatives", T.BinaryType())])
    return rows.mapInArrow(draw, schema).withColumnRenamed("row_key", "row_hash")


def build_training(inputs: Inputs, labelled: DataFrame, config: Config, complete_until: datetime) -> Training:
    """Build the rows of ``training_examples`` from labelled sends.

    Rows come in hash order, one split and at most ``max_rows_per_file`` rows per partition, so that each
    file is one row group and any share of the files is a random sample of its split.

    Raises:
        DataError: rows were asked for and no label window is over.
    """
    sizes = {row["split"]: row["count"] for row in labelled.groupBy("split").count().collect()}
    splits = {name: sizes.get(name, 0) for name in SPLITS}
    left_out = {reason: sizes.get(reason, 0) for reason in LEFT_OUT}
    if left_out["censored"] and left_out["censored"] == sum(sizes.values()):
        first = labelled.orderBy("as_of_date", "label_end").select("as_of_date", "label_end").first()
        assert first is not None
        raise DataError(
            f"training_examples: no label is mature; as_of {first['as_of_date']} has label_end "
            f"{first['label_end']:%Y-%m-%d %H:%M} UTC, later than the watermark "
            f"{complete_until:%Y-%m-%d %H:%M} UTC; "
            "run again when events are complete up to label_end, or give earlier --dates"
        )
    kept = labelled.where(F.col("split").isin(*SPLITS))
    placed, num_files, max_rows = _with_file(kept, splits, config.training.num_ranks)
    last = kept.agg(F.max("as_of_date")).collect()[0][0]
    time_zone = config.lake.time_zone
    features = build_features(inputs, kept, config.examples.history_length, time_zone)
    rows = placed.join(features.drop("as_of"), _ROW)
    popularity = build_popularity(inputs.events, config.examples, last or _EPOCH, time_zone)
    complete = with_negatives(rows, popularity, config.examples.seed).withColumnRenamed(
        "campaign_id", "target_id"
    )
    frame = complete.repartition(num_files, "file_key").sortWithinPartitions("row_hash", "example_id")
    return Training(frame, splits, left_out, max_rows, complete_until, config.examples.seed)


def files_by_split(spark: SparkSession, root_uri: str) -> tuple[int, dict[str, dict[str, int]]]:
    """The newest version of ``training_examples`` and, per split, its files with their rows."""
    version = tables.version(spark, root_uri, "training_examples")
    snapshot = tables.read(spark, root_uri, "training_examples", version=version)
    files = {split: tables.snapshot_files(snapshot.where(F.col("split") == split)) for split in SPLITS}
    return version or 0, {split: found for split, found in files.items() if found}


@contextmanager
def cached(frame: DataFrame) -> Iterator[DataFrame]:
    """Lend a frame that is computed once and forgotten afterwards."""
    kept = frame.persist()
    try:
        yield kept
    finally:
        kept.unpersist()


@contextmanager
def cached_inputs(spark: SparkSession, config: Config, last: date) -> Iterator[Inputs]:
    """Lend the inputs of ``read_inputs`` with their events cached."""
    inputs = read_inputs(spark, config, last)
    with cached(inputs.events):
        yield inputs


def _with_file(rows: DataFrame, splits: dict[str, int], num_ranks: int) -> tuple[DataFrame, int, int]:
    """Deal the rows of each split, in hash order, to files of nearly equal size.

    Adds ``file_key``, a number that Spark's hash partitioning sends to the partition of that file.
    """
    basis = splits["train"] or sum(splits.values())
    rows_per_file = max(1, min(MAX_ROW_GROUP, basis // (4 * num_ranks)))
    files = {name: max(1, size // rows_per_file) for name, size in splits.items() if size}
    num_files = max(1, sum(files.values()))
    max_rows = max([-(-splits[name] // count) for name, count in files.items()], default=1)
    dealt = [
        (name, splits[name], count, sum(list(files.values())[:place]))
        for place, (name, count) in enumerate(files.items())
    ]
    spark = rows.sparkSession
    plan = spark.createDataFrame(dealt, "split string, split_rows int, split_files int, first_file int")
    keys = _partition_keys(spark, num_files)
    position = F.row_number().over(Window.partitionBy("split").orderBy("row_hash", "example_id")) - 1
    file = F.col("first_file") + F.expr("position * split_files div split_rows")
    placed = (
        rows.withColumn("position", position)
        .join(F.broadcast(plan), "split")
        .withColumn("file", file.cast("int"))
        .join(F.broadcast(keys), "file")
        .drop("file", "position", "split_rows", "split_files", "first_file")
    )
    return placed, num_files, max_rows


def _partition_keys(spark: SparkSession, num_partitions: int) -> DataFrame:
    """One number per partition that hash partitioning sends exactly there: no two files share a task."""
    place = F.pmod(F.hash(F.col("file_key")), F.lit(num_partitions))
    return (
        spark.range(40 * num_partitions + 200)  # leaves a partition without a key with odds below e^-40
        .select(F.col("id").cast("int").alias("file_key"))
        .groupBy(place.alias("file"))
        .agg(F.min("file_key").alias("file_key"))
    )


def build_scoring(inputs: Inputs, campaign_id: str, day: date, config: Config) -> DataFrame:
    """Build the rows of ``scoring_examples``: every user of the newest user master, for one campaign.

    Grain: one row per user of the newest snapshot up to ``day``, those without history included.

    Raises:
        ConfigError: the campaign is unknown.
        DataError: no user master up to that day.
    """
    if inputs.campaigns.where(F.col("campaign_id") == campaign_id).isEmpty():
        raise ConfigError(
            f"campaign {campaign_id!r} is not in table campaigns; check --campaign, or run clean_feeds"
        )
    snapshots = inputs.users.where(F.col("snapshot_date") <= F.lit(day))
    newest = snapshots.agg(F.max("snapshot_date")).collect()[0][0]
    if newest is None:
        raise DataError(
            f"table users has no snapshot up to {day}; run clean_feeds for an earlier ingest date"
        )
    population = (
        snapshots.where(F.col("snapshot_date") == F.lit(newest))
        .select("user_id", F.lit(campaign_id).alias("campaign_id"), F.lit(day).alias("as_of_date"))
        .withColumn("as_of", as_of_time("as_of_date", config.lake.time_zone))
    )
    features = build_features(inputs, population, config.examples.history_length, config.lake.time_zone)
    return features.select(
        "user_id",
        "as_of",
        "as_of_date",
        "length",
        "history",
        F.array("campaign_id").alias("target_ids"),
        F.array("target_size").alias("target_sizes"),
        F.col("target").alias("targets"),
        "wide",
        "vocabulary_version",
    )
