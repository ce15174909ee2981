"""Events -> session_segments -> sessions.

A segment is a function of one event date. Sessions join neighbouring segments over midnight; a join looks
at three days only, so that any range can be rebuilt from a few days around it, in any order.

All columns add up over the two segments of a session. A ``visitor:`` id is a user of its own: what was done
before a login stays a session of the visitor, and no later identity link moves it. Sessions tell what
happened, not what was known at an ``as_of``: features are built from events.
"""

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.lake import schemas, tables

#: Count of a segment and of a session -> the event types that it counts.
COUNTS = {
    "num_views": ("view",),
    "num_searches": ("search",),
    "num_favourites": ("favourite",),
    "num_carts": ("cart",),
    "num_purchases": ("purchase",),
    "num_mail_events": ("mail_open", "mail_click"),
}
#: Columns of a session that are those of its first event, and where they come from.
_ENTRY = {"device": "device", "channel": "channel", "first_event_type": "event_type"}


def assign_segments(events: DataFrame, gap_minutes: int) -> DataFrame:
    """Add the segment of each event: a run of one user inside one ``event_date``.

    Grain: one row per event, as given. Adds: ``segment_start``, the ``event_time`` of the segment's first
        event; (``user_id``, ``segment_start``) names a segment.
    Rule: an event starts a segment iff it is the first of its user and date, or comes strictly more than
        ``gap_minutes`` after the event before it; a gap of exactly that stays inside.
    Order: (``event_time``, ``event_id``); equal times share a segment.
    Nulls: none in the columns used. Look-back: none; midnight always cuts, ``stitch`` joins.
    Cost: one shuffle, one sort. No list per user is built, so a huge user is safe.

    One user, one date, gap 30::

        minute          0   20   50   81   81  111  142
        segment_start   0    0    0   81   81   81  142    20 -> 50 is 30: same; 50 -> 81 is 31: new
    """
    by_user = Window.partitionBy("user_id", "event_date").orderBy("event_time", "event_id")
    micros = F.unix_micros("event_time")
    silence = micros - F.lag(micros).over(by_user)
    is_start = silence.isNull() | (silence > gap_minutes * 60_000_000)
    so_far = by_user.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    # Times only grow inside the window, so the latest start is the largest one.
    return (
        events.withColumn("is_start", is_start)
        .withColumn("segment_start", F.max(F.when(F.col("is_start"), F.col("event_time"))).over(so_far))
        .drop("is_start")
    )


def build_segments(events: DataFrame, gap_minutes: int) -> DataFrame:
    """Sum events up to ``session_segments``: one row per (``user_id``, ``segment_start``).

    ``device``, ``channel`` and ``first_event_type`` are those of the first event by (``event_time``,
    ``event_id``), ``last_event_type`` is that of the last. ``spend_amount`` is the money of its purchases, in
    whole micro-units; a missing price is 0. A pure function of each event date's rows. Cost: one shuffle;
    the sum reuses the window's partitioning.
    """
    columns = ("user_id", "event_date", "event_time", "event_id", "event_type", "price", "device", "channel")
    kind, place = F.col("event_type"), F.struct("event_time", "event_id")
    return (
        assign_segments(events.select(*columns), gap_minutes)
        .groupBy("user_id", "event_date", "segment_start")
        .agg(
            F.max("event_time").alias("segment_end"),
            F.count(F.lit(1)).alias("num_events"),
            *[F.count_if(kind.isin(*types)).alias(name) for name, types in COUNTS.items()],
            _money(F.when(kind == "purchase", F.col("price"))).alias("spend_amount"),
            *[F.min_by(column, place).alias(name) for name, column in _ENTRY.items()],
            F.max_by("event_type", place).alias("last_event_type"),
        )
        .select(*schemas.TABLES["session_segments"].column_names)
    )


def _money(amount: Column) -> Column:
    """Sum of amounts in whole micro-units, so that it does not depend on the order of rows."""
    return F.sum(F.round(F.coalesce(amount, F.lit(0.0)) * 1e6).cast("bigint")) / 1e6


def stitch(segments: DataFrame, gap_minutes: int) -> DataFrame:
    """Join segments over midnight into ``sessions``: one row per session, of all dates given.

    Rule: the first segment of a day joins the last one of the day before iff the silence between them is
        at most ``gap_minutes``, unless that earlier segment is itself the first of its day and within
        the gap of its own day before. So a session has at most two segments and is shorter than 48 h.
    Reach: a session of date S is settled by the segments of [S - 2, S + 1]; dates nearer than that to the
        edge of the input are provisional.
    Id: hash of ``user_id`` and ``session_start``. ``is_converted``: it holds a purchase.
    Cost: one shuffle, two sorts over segments.

    Gap 30, one segment each around three midnights::

        day 1 23:50-23:59    day 2 00:05-23:55    day 3 00:10-00:20
        near(2), near(3); 2 joins 1; 3 stays apart, because 2 is first of its day and near day 1
    """
    by_user = Window.partitionBy("user_id").orderBy("segment_start")
    silence = F.unix_micros("segment_start") - F.unix_micros(F.lag("segment_end").over(by_user))
    follows = F.datediff("event_date", F.lag("event_date").over(by_user)) == 1
    near = F.coalesce(follows & (silence <= gap_minutes * 60_000_000), F.lit(False))
    joins = F.col("is_near") & ~F.lag("is_near", 1, False).over(by_user)
    before_start, before_date = F.lag("segment_start").over(by_user), F.lag("event_date").over(by_user)
    placed = segments.withColumn("is_near", near).select(
        "*",
        F.when(joins, before_start).otherwise(F.col("segment_start")).alias("session_start"),
        F.when(joins, before_date).otherwise(F.col("event_date")).alias("session_date"),
    )
    start, end = F.col("session_start"), F.col("session_end")
    return (
        placed.groupBy("user_id", "session_start", "session_date")
        .agg(
            F.max("segment_end").alias("session_end"),
            F.count(F.lit(1)).alias("num_segments"),
            *[F.sum(name).alias(name) for name in ("num_events", *COUNTS)],
            _money(F.col("spend_amount")).alias("spend_amount"),
            *[F.min_by(name, "segment_start").alias(name) for name in _ENTRY],
            F.max_by("last_event_type", "segment_start").alias("last_event_type"),
        )
        .withColumn("is_converted", F.col("num_purchases") > 0)
        .withColumn("duration_seconds", F.floor((F.unix_micros(end) - F.unix_micros(start)) / 1_000_000))
        .withColumn(
            "session_id",
            F.substring(F.sha2(F.concat_ws("|", "user_id", F.unix_micros(start).cast("string")), 256), 1, 32),
        )
        .select(*schemas.TABLES["sessions"].column_names)
    )


def affected_dates(event_dates: DateRange) -> DateRange:
    """Session dates that the segments of [A, B] can change: [A - 1, B + 2].

    A - 1 because its last session may run on into A. B + 2 because the first segment of B + 1 may join B,
    and whether that of B + 2 may join B + 1 depends on it: a later day that was built first is put right.
    """
    return event_dates.widen(before=1, after=2)


def build_sessions(spark: SparkSession, root_uri: str, event_dates: DateRange, gap_minutes: int) -> DataFrame:
    """Sessions of ``affected_dates`` from the stored segments of [A - 3, B + 3]."""
    affected = affected_dates(event_dates)
    reach = affected.widen(before=2, after=1)
    segments = tables.read(spark, root_uri, "session_segments", reach)
    kept = stitch(segments, gap_minutes).where(tables.in_range("session_date", affected))
    return kept.repartition("session_date")
