"""A daily state of histories: the last L events per user, merged with what came after it.

An event may be used from ``max(event_time, ingest_time)`` on, so the last L events of any later cut-off are
among the last L that could be used at the start of the state's day and those that came since, late ones
included. A state therefore never changes, unless the past itself was corrected. ``fingerprint`` covers all
of that past; a state with another one is not used, and everything is read and sorted again.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.dates import MAX_DAYS, DateRange, day_start
from couponflow.lake import layouts, runs, tables

log = logging.getLogger("couponflow")

TABLE = "history_states"
_INDICES = tuple(f"{name}_index" for name in layouts.VOCABULARY_FIELDS)
_KEPT = ("user_id", "event_id", "event_time", "ingest_time", "event_date", *_INDICES)
#: Events of nobody's yet: a later link gives them to a user, so no state holds them.
_VISITOR = "visitor:"


@dataclass(frozen=True)
class State:
    """The last ``length`` events per user that could be used before ``instant``, the start of ``day``."""

    day: date
    instant: datetime
    frame: DataFrame


def last_known(events: DataFrame, instant: datetime, length: int) -> DataFrame:
    """The events among which the last ``length`` of each user before ``instant`` are.

    Grain: one row per event, all copies of a kept one; columns ``_KEPT``. Users without events and visitors
        without user have no row.
    Rule: event_time < instant and ingest_time < instant; order (event_time, event_id).
    Cost: one shuffle by user unless it is there, one sort; no list is built.
    """
    newest_first = Window.partitionBy("user_id").orderBy(F.desc("event_time"), F.desc("event_id"))
    is_known = (F.col("event_time") < F.lit(instant)) & (F.col("ingest_time") < F.lit(instant))
    known = events.where(is_known & ~F.col("user_id").startswith(_VISITOR)).select(*_KEPT)
    # Copies of an event share its rank.
    return (
        known.withColumn("rank", F.dense_rank().over(newest_first))
        .where(F.col("rank") <= length)
        .drop("rank")
    )


def merged(state: State, events: DataFrame) -> DataFrame:
    """The state's events and those of ``events`` that could be used only since.

    Grain: one row per event; columns ``_KEPT``. Gives the same histories as ``events`` at every cut-off from
        ``state.instant`` on, and is wrong before it. Look-back: the state's events older than the first
        event_date of ``events`` are the caller's to drop (``load`` does).
    """
    is_new = (F.col("event_time") >= F.lit(state.instant)) | (F.col("ingest_time") >= F.lit(state.instant))
    since = events.where(is_new | F.col("user_id").startswith(_VISITOR)).select(*_KEPT)
    return state.frame.select(*_KEPT).unionByName(since)


@dataclass(frozen=True)
class Past:
    """What a state of the last day of ``dates`` is a function of, as it was before anything was read.

    A change of the tables while histories are built is so noticed by the next run. Without a fingerprint
    (another method) there is no state and none is kept.
    """

    spark: SparkSession
    config: Config
    dates: DateRange
    fingerprint: str

    @classmethod
    def of(cls, spark: SparkSession, config: Config, dates: DateRange) -> "Past":
        """The past of a range of cut-offs; call it before anything is read.

        Raises:
            DataError: ``events`` or ``user_days`` does not exist.
        """
        is_kept = config.examples.history_method == "merge"
        return cls(spark, config, dates, fingerprint(spark, config, dates.last) if is_kept else "")

    def load(self, vocabulary_version: str) -> State | None:
        """The newest state up to the first cut-off that is valid: its own past is what it was made from.

        None without one: then everything is sorted again.
        """
        root_uri = self.config.lake.root_uri
        if not self.fingerprint or not tables.exists(self.spark, root_uri, TABLE):
            return None
        is_earlier = F.col("state_date") <= F.lit(self.dates.start)
        is_encoded_alike = F.col("vocabulary_version") == vocabulary_version
        stored = tables.read(self.spark, root_uri, TABLE).where(is_earlier & is_encoded_alike)
        found = stored.select("state_date", "fingerprint").distinct().collect()
        for day, made_from in sorted(((row[0], row[1]) for row in found), reverse=True):
            if fingerprint(self.spark, self.config, day) == made_from:
                first = self.dates.last - timedelta(days=MAX_DAYS)  # older events are not read any more
                is_of_day = (F.col("state_date") == F.lit(day)) & (F.col("event_date") >= F.lit(first))
                return State(day, day_start(day, self.config.lake.time_zone), stored.where(is_of_day))
            log.info("history state of %s: what it was made from has changed; it is not used", day)
        return None

    def publish(self, events: DataFrame, state: State | None, vocabulary_version: str, run_id: str) -> int:
        """Store the state of the last day in place of all older ones; returns its rows.

        ``events`` and ``state`` are what the histories were built from.
        """
        if not self.fingerprint:
            return 0
        day, length = self.dates.last, self.config.examples.history_length
        known = events if state is None else merged(state, events)
        rows = last_known(known, day_start(day, self.config.lake.time_zone), length).select(
            F.lit(day).alias("state_date"),
            *_KEPT,
            F.lit(vocabulary_version).alias("vocabulary_version"),
            F.lit(self.fingerprint).alias("fingerprint"),
        )
        replaced = DateRange(day - timedelta(days=MAX_DAYS - 1), day + timedelta(days=1))
        return tables.overwrite(rows, self.config.lake.root_uri, TABLE, replaced, run_id)


def fingerprint(spark: SparkSession, config: Config, day: date) -> str:
    """Hash of all that a state of ``day`` is a function of, besides the vocabulary version.

    Covers the files of every ingest date before ``day`` of ``events`` and ``identity_links`` (a late or
    corrected delivery, an erasure and a compaction leave other files), the excluded user days before ``day``,
    the config that events are read with, the length and the code.

    Raises:
        DataError: ``events`` or ``user_days`` does not exist.
    """
    root_uri = config.lake.root_uri
    before = DateRange(day - timedelta(days=MAX_DAYS), day)
    excluded = tables.read(spark, root_uri, "user_days", before).where(F.col("exclusion_reason").isNotNull())
    parts = {
        "events": _files(spark, root_uri, "events", before),
        "identity_links": _files(spark, root_uri, "identity_links", before),
        "excluded": tables.content_hash(excluded.select("user_id", "event_date")),
        "config": config.fingerprint("lake", "events", "examples.history_length"),
        "code": runs.code_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _files(spark: SparkSession, root_uri: str, table: str, ingest_dates: DateRange) -> str:
    """Hash of the names of a table's files in a range of ingest dates; no file is opened."""
    if not tables.exists(spark, root_uri, table):
        return "none"
    names = tables.read(spark, root_uri, table, ingest_dates).inputFiles()
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
