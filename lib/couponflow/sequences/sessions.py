"""Events -> session_segments -> sessions.

A segment is a function of one event date. Sessions join neighbouring segments over midnight; a join looks
at three days only, so that any range can be rebuilt from a few days around it, in any order.
"""

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.lake import schemas, tables

_DAY_COUNTS = ("num_events", "num_views", "num_carts", "num_purchases")


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

    ``device`` is that of the first event by (``event_time``, ``event_id``). A pure function of each event
    date's rows. Cost: one shuffle; the sum reuses the window's partitioning.
    """
    narrow = events.select("user_id", "event_date", "event_time", "event_id", "event_type", "device")
    kind = F.col("event_type")
    return (
        assign_segments(narrow, gap_minutes)
        .groupBy("user_id", "event_date", "segment_start")
        .agg(
            F.max("event_time").alias("segment_end"),
            F.count(F.lit(1)).alias("num_events"),
            F.count_if(kind == "view").alias("num_views"),
            F.count_if(kind == "cart").alias("num_carts"),
            F.count_if(kind == "purchase").alias("num_purchases"),
            F.min_by("device", F.struct("event_time", "event_id")).alias("device"),
        )
        .select(*schemas.TABLES["session_segments"].column_names)
    )


def stitch(segments: DataFrame, gap_minutes: int) -> DataFrame:
    """Join segments over midnight into ``sessions``: one row per session, of all dates given.

    Rule: the first segment of a day joins the last one of the day before iff the silence between them is
        at most ``gap_minutes``, unless that earlier segment is itself the first of its day and within
        the gap of its own day before. So a session has at most two segments and is shorter than 48 h.
    Reach: a session of date S is settled by the segments of [S - 2, S + 1]; dates nearer than that to the
        edge of the input are provisional.
    Id: hash of ``user_id`` and ``session_start``. Device: that of the first event.
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
            *[F.sum(name).alias(name) for name in _DAY_COUNTS],
            F.min_by("device", "segment_start").alias("device"),
        )
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
