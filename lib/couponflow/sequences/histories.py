"""Histories: the last L events of a user that were known before a cut-off, packed into one binary column.

Training and scoring call the same ``build``. Spark sorts, numpy packs whole users as they stream by, so no
list per user is built in the JVM and memory is one Arrow batch plus the largest user.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.lake import layouts
from couponflow.sequences import packing

if TYPE_CHECKING:
    import pyarrow as pa

_OUTPUT = "user_id string, as_of timestamp, as_of_date date, length int, history binary"
_INDICES = tuple(f"{name}_index" for name in layouts.HISTORY_FIELDS[:-1])


def build(events: DataFrame, population: DataFrame, length: int) -> DataFrame:
    """Pack the history of each user at each cut-off.

    Grain: one row per distinct (user_id, as_of) of ``population``; users without events stay, with length
        0 and an empty history. Adds ``length`` and ``history`` (``layouts.HISTORY_FIELDS``, oldest first).
    Input: ``events`` encoded by ``vocabulary.encode``; ``population`` with user_id, as_of, as_of_date.
    Rule: event_time < as_of and ingest_time < as_of, both strict; the ``length`` most recent are kept.
    Order: (event_time, event_id). ``event_id`` is a hash: inside an equal time the order means nothing.
    Look-back: everything in ``events``; the caller bounds it.
    Cost: one sort by user; a shuffle unless ``events`` is partitioned by user_id already.

    One user, length 2, times in minutes, C arrives at 25::

        event  A@10  B@20  C@20        as_of 20: [A]      as_of 21: [A B]      as_of 30: [B C]
    """
    cutoffs = population.select("user_id", "as_of", "as_of_date").distinct()
    wanted = events.join(cutoffs.select("user_id").distinct(), "user_id", "left_semi")
    as_rows = cutoffs.select(
        "user_id",
        F.lit(False).alias("is_event"),
        F.unix_micros("as_of").alias("at"),
        F.lit(0).cast("bigint").alias("known_at"),
        F.lit("").alias("event_id"),
        "as_of_date",
        *[F.lit(0).alias(name) for name in _INDICES],
    )
    event_rows = wanted.select(
        "user_id",
        F.lit(True).alias("is_event"),
        F.unix_micros("event_time").alias("at"),
        F.unix_micros("ingest_time").alias("known_at"),
        "event_id",
        F.lit(None).cast("date").alias("as_of_date"),
        *_INDICES,
    )
    ordered = (
        event_rows.unionByName(as_rows)
        .repartition("user_id")
        .sortWithinPartitions("user_id", "is_event", "at", "event_id")
        .drop("event_id")
    )

    def pack_partition(batches: "Iterable[pa.RecordBatch]") -> "Iterable[pa.RecordBatch]":
        for users in packing.whole_users(batches):
            yield packing.pack_histories(users, length)

    return ordered.mapInArrow(pack_partition, _OUTPUT)


def readable(frame: DataFrame, columns: tuple[str, ...] = layouts.HISTORY_FIELDS) -> DataFrame:
    """Replace the packed ``history`` by one list column per field, for analysts.

    Grain: as given. Adds ``history_<field>`` array<int> for each of ``layouts.HISTORY_FIELDS``.
    """
    unpacked = "array<array<int>>"

    @F.udf(unpacked)
    def fields_of(history: bytes) -> list[list[int]]:
        matrix = np.frombuffer(history, dtype="<i4").reshape(-1, len(columns))
        return [[int(value) for value in column] for column in matrix.T]

    listed = frame.withColumn("_fields", fields_of("history"))
    for number, name in enumerate(columns):
        listed = listed.withColumn(f"history_{name}", F.col("_fields")[number])
    return listed.drop("_fields", "history")
