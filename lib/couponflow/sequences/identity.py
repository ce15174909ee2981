"""Visitors who turn out to be users: links of one ingest date, and events that find their user later.

A visitor belongs to the user of its first link, by (``ingest_date``, ``linked_time``, ``user_id``), for good:
a later link never changes what an earlier ``as_of`` saw. An event from before the link becomes the user's on
the day on which the link was delivered, so every reader that asks for ``ingest_* < as_of`` is right.
"""

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.lake import tables
from couponflow.sequences import feeds
from couponflow.sequences.records import VISITOR


def new_links(cleaned: feeds.Cleaned) -> DataFrame:
    """The links that a delivery of events names.

    Grain: one row per (``visitor_id``, ``user_id``, ``ingest_date``) of its valid events that carry both ids.
        A pure function of one ingest date.
    """
    named = cleaned.kept.where(~F.col("is_anonymous") & F.col("visitor_id").isNotNull())
    return named.groupBy("visitor_id", "user_id", "ingest_date").agg(
        F.min("ingest_time").alias("linked_time")
    )


def links(spark: SparkSession, root_uri: str) -> DataFrame:
    """Read the first link of each visitor.

    Grain: one row per ``visitor_id``: its user, ``linked_time`` and ``linked_date`` (of the delivery).
    """
    first = F.min(F.struct("ingest_date", "linked_time", "user_id")).alias("first")
    return (
        tables.read_or_empty(spark, root_uri, "identity_links")
        .groupBy("visitor_id")
        .agg(first)
        .select(
            "visitor_id",
            F.col("first.user_id").alias("linked_user_id"),
            F.col("first.linked_time").alias("linked_time"),
            F.col("first.ingest_date").alias("linked_date"),
        )
    )


def resolve(events: DataFrame, links: DataFrame) -> DataFrame:
    """Give anonymous events to the user of their visitor, from the delivery of the link on.

    Grain, key and columns: those of ``events``. Rule: ``user_id`` becomes the link's, ``ingest_time`` and
        ``ingest_date`` the later of the event's and the link's; events of users and of visitors without a
        link stay as they are.
    Cost: nothing where there is no link; a broadcast of the links while Spark finds them small, else one
        shuffle, in which the events of known users spread by their event id and meet no link.
    """
    is_anonymous = F.col("user_id").startswith(VISITOR)
    key = F.when(is_anonymous, F.col("user_id")).otherwise(F.concat(F.lit("#"), F.col("event_id")))
    known = links.withColumn("visitor_key", F.concat(F.lit(VISITOR), F.col("visitor_id"))).drop("visitor_id")
    joined = events.withColumn("visitor_key", key).join(known, "visitor_key", "left")
    later = {
        "user_id": F.coalesce("linked_user_id", "user_id"),
        "ingest_time": F.greatest("ingest_time", "linked_time"),  # null is no rival
        "ingest_date": F.greatest("ingest_date", "linked_date"),
    }
    return joined.select(*[later.get(name, F.col(name)).alias(name) for name in events.columns])


def shared_visitors(spark: SparkSession, root_uri: str, dates: DateRange) -> int:
    """How many visitors linked in these ingest dates have had several users so far: shared devices."""
    known = tables.read_or_empty(spark, root_uri, "identity_links")
    recent = known.where(tables.in_range("ingest_date", dates)).select("visitor_id").distinct()
    users = known.join(recent, "visitor_id", "left_semi").groupBy("visitor_id")
    return users.agg(F.count_distinct("user_id").alias("n")).where("n > 1").count()
