"""Histories: the last L events of a user that were known before a cut-off, packed into one binary column.

Training and scoring call the same ``build``. All methods give the same bytes; ``METHODS`` says when to use
which. What they share is in ``last_events``: NumPy packs, and settles what the sort left open.
"""

from functools import partial

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.errors import ConfigError
from couponflow.lake import layouts, python_tasks
from couponflow.sequences import last_events, merging

_OUTPUT = "user_id string, as_of timestamp, as_of_date date, length int, history binary"

#: ``window``: one shuffle, one sort in Spark, users are packed as they stream by. Memory is some batches
#: plus the largest user, the sort spills to disk, and 5 M events pass in a heap of 1 GB: the default.
#: ``numpy``: one shuffle, NumPy sorts a whole partition. Faster, but a partition has to fit the Python
#: worker (about 200 bytes an event): raise ``spark.shuffle_partitions`` with the data.
#: ``merge``: ``window`` over a stored state and the events after it (``merging``); saves reading and sorting
#: the past when one more day is built. Without a valid state it is ``window`` over everything.
METHODS = ("window", "numpy", "merge")


def build(
    events: DataFrame,
    population: DataFrame,
    length: int,
    method: str = "window",
    state: merging.State | None = None,
) -> DataFrame:
    """Pack the history of each user at each cut-off.

    Grain: one row per distinct (user_id, as_of) of ``population``; users without events stay, with length
        0 and an empty history. Adds ``length`` and ``history`` (``layouts.HISTORY_FIELDS``, oldest first).
    Input: ``events`` encoded by ``vocabulary.encode``; ``population`` with user_id, as_of, as_of_date.
    Rule: event_time < as_of and ingest_time < as_of, both strict; the ``length`` most recent are kept.
    Order: (event_time, event_id). ``event_id`` is a hash: inside an equal time the order means nothing.
    Copies: an event_id that comes twice at one time counts once, known from its first delivery.
    Look-back: everything in ``events``; the caller bounds it.
    Cost: one shuffle of events and cut-offs, 8 bytes an index pair and time; see ``METHODS`` for the sort.
    ``state``: for ``merge``, valid for ``events`` (``merging.load``) and not after any cut-off.

    One user, length 2, times in minutes, C arrives at 25::

        event  A@10  B@20  C@20        as_of 20: [A]      as_of 21: [A B]      as_of 30: [B C]

    Raises:
        ConfigError: the method is unknown.
    """
    if method not in METHODS:
        raise ConfigError(f"examples.history_method {method!r}: expected one of {', '.join(METHODS)}")
    if method == "merge" and state is not None:
        events = merging.merged(state, events)
    shuffled = _event_rows(events).unionByName(_cutoff_rows(population)).repartition("user_id")
    if method == "numpy":
        return python_tasks.map_in_arrow(shuffled, partial(last_events.at_once, length=length), _OUTPUT)
    # One long that cannot be null: Spark sorts it by radix and never looks at a row.
    in_order = shuffled.sortWithinPartitions("key")
    return python_tasks.map_in_arrow(in_order, partial(last_events.stream, length=length), _OUTPUT)


def _event_rows(events: DataFrame) -> DataFrame:
    return events.select(
        _key(F.unix_micros("event_time")).alias("key"),
        "user_id",
        F.unix_micros("event_time").alias("at"),
        F.unix_micros("ingest_time").alias("known_at"),
        "event_id",
        _pair("item_index", "category_index").alias("ids_1"),
        _pair("shop_index", "event_type_index").alias("ids_2"),
    )


def _cutoff_rows(population: DataFrame) -> DataFrame:
    return population.select(
        _key(F.unix_micros("as_of")).alias("key"),
        "user_id",
        F.unix_micros("as_of").alias("at"),
        F.lit(last_events.CUTOFF).cast("bigint").alias("known_at"),
        F.lit("").alias("event_id"),
        F.lit(0).cast("bigint").alias("ids_1"),
        F.unix_date("as_of_date").cast("bigint").alias("ids_2"),
    )


def _key(micros: Column) -> Column:
    """31 bits of the user's hash, 32 bits of seconds: users with one hash are told apart when packed."""
    group = F.shiftrightunsigned(F.xxhash64("user_id"), 33)
    seconds = F.least(F.greatest(F.shiftright(micros, 20), F.lit(0)), F.lit(2**32 - 1))
    return F.shiftleft(group, 32) + F.coalesce(seconds, F.lit(0))


def _pair(high: str, low: str) -> Column:
    return F.shiftleft(F.col(high).cast("bigint"), 32) + F.col(low).cast("bigint")


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
