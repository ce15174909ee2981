"""Examples: (user, target, as_of) rows with everything a model reads, labelled for training or for scoring.

``build_features`` is the one path to histories, aggregates and targets; training adds label, split and
auxiliary negatives, scoring takes every user of the master. A row is a function of its own key and of what
was known before its ``as_of``, so any set of days may be built in any order.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from couponflow.config import Config
from couponflow.dates import MAX_DAYS, DateRange, day_start
from couponflow.errors import ConfigError, DataError
from couponflow.lake import python_tasks, tables
from couponflow.sections import ExamplesConfig
from couponflow.sequences import (
    aggregates,
    conversions,
    datasets,
    events,
    histories,
    identity,
    labels,
    merging,
    packing,
    vocabulary,
)
from couponflow.sequences.labels import as_of_time

if TYPE_CHECKING:
    import pyarrow as pa

#: Cells (pairs x refreshes, 8 bytes each) of the popularity table that driver and workers may hold.
MAX_POPULARITY_CELLS = 40_000_000
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
    orders: DataFrame
    catalogue: DataFrame
    vocabulary: DataFrame
    vocabulary_version: str
    history_method: str = "window"
    history_state: merging.State | None = None


@dataclass(frozen=True)
class Training:
    """Rows for ``training_examples`` and what was counted on the way."""

    frame: DataFrame
    splits: dict[str, int]
    left_out: dict[str, int]
    max_rows_per_file: int
    complete_until: datetime
    settings: ExamplesConfig

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
            "seed": self.settings.seed,
            "negative_share": self.settings.negative_share,
        }


def prepare_events(raw: DataFrame, terms: DataFrame, time_zone: str) -> DataFrame:
    """Encode events, add ``known_date`` and partition by user, once for all that follows. Not cached.

    An event is known from the start of its ingest date at the earliest: the sender's ``ingest_time`` may be
    of an earlier day, at whose end nobody could have read it yet. ``seen_date`` is when anybody's was: what a
    visitor did before his user was found was part of the popularity of its item all along.
    """
    delivered = F.greatest("ingest_time", as_of_time("ingest_date", time_zone))
    encoded = vocabulary.encode(raw.withColumn("ingest_time", delivered), terms)
    encoded = encoded.withColumn("known_date", aggregates.known_date(time_zone))
    if "seen_date" not in encoded.columns:
        encoded = encoded.withColumn("seen_date", F.col("known_date"))
    kept = ["user_id", "event_id", "event_time", "ingest_time", "event_date", "known_date", "seen_date"]
    kept += ["event_type", "order_id", "item_id", "category_id", "shop_id", "price", "is_automated"]
    kept += ["discount_amount", "coupon_amount", "coupon_match_amount"]
    return encoded.select(*kept, *[f"{name}_index" for name in vocabulary.COLUMNS]).repartition("user_id")


def read_inputs(spark: SparkSession, config: Config, last: date) -> Inputs:
    """Read what may be known by the start of business day ``last``, under the vocabulary that config names.

    Campaigns, sends and redemptions that were delivered again count once, as they came first.

    Raises:
        DataError: a table is missing, no vocabulary was published or the named one does not exist.
    """
    root_uri = config.lake.root_uri
    version = vocabulary.resolve(root_uri, config.examples.vocabulary_version)
    terms = vocabulary.load(spark, root_uri, version)
    raw = events.read_events(spark, root_uri, DateRange(last - timedelta(days=MAX_DAYS), last))
    raw = raw.withColumn("seen_date", aggregates.known_date(config.lake.time_zone))
    raw = identity.resolve(raw, identity.links(spark, root_uri))

    def read_first(table: str, key: str) -> DataFrame:
        return conversions.first_deliveries(tables.read(spark, root_uri, table), key)

    return Inputs(
        events=prepare_events(raw, terms, config.lake.time_zone),
        campaigns=read_first("campaigns", "campaign_id"),
        sends=read_first("sends", "send_id"),
        redemptions=read_first("redemptions", "redemption_id"),
        users=tables.read(spark, root_uri, "users"),
        orders=tables.read(spark, root_uri, "orders"),  # all deliveries: a later one tells of a return
        catalogue=tables.read(spark, root_uri, "catalogue"),
        vocabulary=terms,
        vocabulary_version=version,
        history_method=config.examples.history_method,
    )


def check_vocabulary(inputs: Inputs, config: Config) -> dict[str, Any]:
    """Facts of the run: the vocabulary and the share of values, per field, that it does not know.

    Raises:
        DataError: a share is above ``vocabulary.max_oov_share``.
    """
    shares = vocabulary.encoded_oov_shares(inputs.events)
    vocabulary.check_oov_shares(shares, config.vocabulary.max_oov_share, inputs.vocabulary_version)
    return {"vocabulary_version": inputs.vocabulary_version, "oov_share": shares}


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
    return python_tasks.map_in_arrow(
        listed.select("campaign_id", filled),
        packing.with_targets,
        "campaign_id string, target_size int, target binary",
    )


def build_features(inputs: Inputs, population: DataFrame, length: int, time_zone: str) -> DataFrame:
    """Build what a model reads of each (user, campaign, as_of); training and scoring both call this.

    Grain: one row per row of ``population`` (user_id, campaign_id, as_of, as_of_date), its key. Adds
        length, history, wide, target, target_size and vocabulary_version.
    Rule: nothing at or after ``as_of``, or delivered after it, has any influence.
    """
    rows = population.select("user_id", "campaign_id", "as_of", "as_of_date")
    history, targets = build_parts(inputs, rows, length, time_zone)
    return targets.join(history.drop("as_of_date"), ["user_id", "as_of"]).withColumn(
        "vocabulary_version", F.lit(inputs.vocabulary_version)
    )


def build_parts(inputs: Inputs, rows: DataFrame, length: int, time_zone: str) -> tuple[DataFrame, DataFrame]:
    """The two sides of ``build_features``: histories by (user, as_of); wide and target by row."""
    history = histories.build(inputs.events, rows, length, inputs.history_method, inputs.history_state)
    wide = aggregates.build(
        inputs.events,
        rows,
        inputs.campaigns,
        inputs.sends,
        inputs.redemptions,
        inputs.users,
        inputs.orders,
        inputs.catalogue,
        time_zone,
    )
    targets = build_targets(inputs.campaigns, inputs.vocabulary)
    return history, wide.join(F.broadcast(targets), "campaign_id")


def build_popularity(
    encoded: DataFrame, config: ExamplesConfig, last: date, time_zone: str
) -> packing.Popularity:
    """Count (item, category) pairs known before each refresh up to business day ``last``.

    Refreshes lie ``negative_refresh_days`` apart, counted from 1970-01-01, so that they do not move with
    the range that is built. The table is one row per pair and one column per refresh, on the driver and in
    every Python worker: at most ``MAX_POPULARITY_CELLS`` of 8 bytes.

    Raises:
        ConfigError: the table would be larger.
    """
    every = config.negative_refresh_days
    number = F.floor(F.datediff("seen_date", F.lit(_EPOCH)) / every) + 1  # first refresh after the day
    last_number = (last - _EPOCH).days // every
    with cached(
        encoded.where(F.col("item_id").isNotNull() & F.col("category_id").isNotNull())
        .groupBy(number.cast("int").alias("refresh"), "item_index", "category_index")
        .agg(F.count(F.lit(1)).alias("num_events"))
        .where(F.col("refresh") <= last_number)
    ) as grouped:
        size = grouped.agg(
            F.count_distinct("item_index", "category_index").alias("pairs"), F.min("refresh").alias("first")
        ).collect()[0]
        first = size["first"] if size["pairs"] else 0
        cells = size["pairs"] * (last_number - first + 1)
        if cells > MAX_POPULARITY_CELLS:
            raise ConfigError(
                f"item popularity: {size['pairs']} (item, category) pairs at {last_number - first + 1} "
                f"refreshes are {cells} cells, expected at most {MAX_POPULARITY_CELLS}; raise "
                "examples.negative_refresh_days or vocabulary.min_count"
            )
        counts = grouped.toPandas()
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
    return python_tasks.map_in_arrow(rows, draw, schema).withColumnRenamed("row_key", "row_hash")


def build_training(inputs: Inputs, labelled: DataFrame, config: Config, complete_until: datetime) -> Training:
    """Build the rows of ``training_examples`` from labelled sends.

    Rows come in hash order, one split and at most ``max_rows_per_file`` rows per partition, so that each
    file is one row group and any share of the files is a random sample of its split.

    Raises:
        DataError: rows were asked for and no label is final.
    """
    splits, left_out = labels.count_splits(labelled, complete_until)
    kept = labelled.where(F.col("split").isin(*labels.SPLITS))
    placed, num_files, max_rows = datasets.place_in_files(kept, splits, config.training.num_ranks)
    last = kept.agg(F.max("as_of_date")).collect()[0][0]
    time_zone = config.lake.time_zone
    features = build_features(inputs, kept, config.examples.history_length, time_zone)
    rows = placed.join(features.drop("as_of"), _ROW)
    popularity = build_popularity(inputs.events, config.examples, last or _EPOCH, time_zone)
    complete = with_negatives(rows, popularity, config.examples.seed).withColumnRenamed(
        "campaign_id", "target_id"
    )
    frame = complete.repartition(num_files, "file_key").sortWithinPartitions("row_hash", "example_id")
    return Training(frame, splits, left_out, max_rows, complete_until, config.examples)


@contextmanager
def cached(frame: DataFrame) -> Iterator[DataFrame]:
    """Lend a frame that is computed once and forgotten afterwards."""
    kept = frame.persist()
    try:
        yield kept
    finally:
        kept.unpersist()


@contextmanager
def cached_inputs(
    spark: SparkSession, config: Config, dates: DateRange, run_id: str = ""
) -> Iterator[Inputs]:
    """Lend the inputs of ``read_inputs`` with their events cached; keep the state of histories by merge."""
    past = merging.Past.of(spark, config, dates)
    inputs = read_inputs(spark, config, dates.last)
    with cached(inputs.events):
        state = past.load(inputs.vocabulary_version)
        yield replace(inputs, history_state=state)
        past.publish(inputs.events, state, inputs.vocabulary_version, run_id)


def parse_campaigns(text: str) -> tuple[str, ...]:
    """The campaigns of ``--campaign A,B``, sorted, each once.

    Raises:
        ConfigError: an id is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"--campaign {text!r}: expected ids such as 18 or 18,19; remove the empty one")
    return tuple(sorted(set(names)))


def build_scoring(inputs: Inputs, campaign_ids: tuple[str, ...], day: date, config: Config) -> DataFrame:
    """Build the rows of ``scoring_examples``: every user of the newest user master, for these campaigns.

    Grain: one row per user of the newest snapshot up to ``day``, those without history included. Targets
        and their aggregates lie in the order of ``campaign_ids``, ascending; the history is there once.

    Raises:
        ConfigError: a campaign is unknown.
        DataError: no user master up to that day.
    """
    named = inputs.campaigns.where(F.col("campaign_id").isin(*campaign_ids)).select("campaign_id")
    known = {row["campaign_id"] for row in named.collect()}
    if unknown := sorted(set(campaign_ids) - known):
        raise ConfigError(
            f"campaign {unknown[0]!r} is not in table campaigns; check --campaign, or run clean_feeds"
        )
    snapshots = inputs.users.where(F.col("snapshot_date") <= F.lit(day))
    newest = snapshots.agg(F.max("snapshot_date")).collect()[0][0]
    if newest is None:
        raise DataError(
            f"table users has no snapshot up to {day}; run clean_feeds for an earlier ingest date"
        )
    population = (
        snapshots.where(F.col("snapshot_date") == F.lit(newest))
        .select(
            "user_id",
            F.explode(F.array(*[F.lit(name) for name in campaign_ids])).alias("campaign_id"),
            F.lit(day).alias("as_of_date"),
        )
        .withColumn("as_of", as_of_time("as_of_date", config.lake.time_zone))
    )
    history, targets = build_parts(inputs, population, config.examples.history_length, config.lake.time_zone)
    packed = F.sort_array(F.collect_list(F.struct("campaign_id", "target_size", "target", "wide")))

    def joined(name: str) -> Column:
        return F.aggregate("packed", F.lit(b""), lambda bytes_before, one: F.concat(bytes_before, one[name]))

    per_user = targets.groupBy("user_id", "as_of").agg(packed.alias("packed"))
    return history.join(per_user, ["user_id", "as_of"]).select(
        "user_id",
        "as_of",
        "as_of_date",
        "length",
        "history",
        F.col("packed.campaign_id").alias("target_ids"),
        F.col("packed.target_size").alias("target_sizes"),
        joined("target").alias("targets"),
        joined("wide").alias("wide"),
        F.lit(inputs.vocabulary_version).alias("vocabulary_version"),
    )
