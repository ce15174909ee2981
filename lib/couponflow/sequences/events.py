"""Raw events -> events; and the read door that every later stage uses for events.

``clean`` is a pure function of one ingest date's delivery. What concerns several ingest dates (a second
delivery of an event, excluded users) is settled by ``read_events``, so that a later delivery never changes
what an earlier ``as_of`` saw.
"""

from collections import Counter

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.errors import ConfigError
from couponflow.lake import contracts, layouts, schemas, tables
from couponflow.sections import EventsConfig, QuarantineRule
from couponflow.sequences import feeds, robots
from couponflow.sequences.records import VISITOR

FUTURE_MINUTES = 60  # devices run up to an hour ahead
ITEM_TYPES = ("view", "favourite", "cart", "purchase")
DISCOUNTS = ("discount_amount", "coupon_amount", "coupon_match_amount")
#: Excluded user-days that every task may hold; above, the read door leaves the join to Spark.
MAX_BROADCAST_ROWS = 300_000


def clean(raw: DataFrame, config: EventsConfig, time_zone: str, lateness_days: int) -> feeds.Cleaned:
    """Validate, cap and de-duplicate delivered events.

    Grain: one raw record, see ``feeds.Cleaned``. Key of the result: (``event_id``, ``ingest_date``).
    Adds: ``event_date``, the business day of ``event_time``; ``is_automated``; ``is_anonymous``, and then
        ``user_id`` is ``visitor:<visitor_id>``.
    Reasons: those of ``contracts``, with the config's rules, in their order, after ``malformed_record``. A
        discount or coupon that is no finite number is malformed.
    Quantity: above ``max_quantity`` (if not 0) it is no unit count and becomes 1.
    Duplicates: of valid rows with one (``ingest_date``, ``event_id``) the latest (``ingest_time``,
        ``source_file``, ``row_number``) stays.
    Cost: one shuffle by ingest date and event id, one sort.

    Raises:
        ConfigError: a rule of the config is no condition over the raw columns.
    """
    local = F.from_utc_timestamp("event_time", time_zone)
    dated = feeds.spread(raw, ("event_id",)).withColumn("event_date", F.to_date(local))
    rules = [(rule.reason, _condition(raw, rule)) for rule in config.quarantine_rules]
    frame = feeds.with_refusal(dated, "events", _conditions(lateness_days), rules)
    frame = (
        frame.withColumn("visitor_id", F.when(~_is_empty("visitor_id"), F.col("visitor_id")))
        .withColumn("is_anonymous", _is_empty("user_id"))
        .withColumn(
            "user_id",
            F.when(_is_empty("user_id"), F.concat(F.lit(VISITOR), F.col("visitor_id"))).otherwise(
                F.col("user_id")
            ),
        )
        .withColumn("is_automated", robots.is_automated(config))
    )
    marked = feeds.with_duplicates(frame, "events", ("event_id",), ("ingest_time",))
    if config.max_quantity:
        too_many = F.col("quantity") > config.max_quantity
        marked = marked.withColumn(
            "quantity", F.when(too_many, F.lit(1).cast("bigint")).otherwise(F.col("quantity"))
        )
    return feeds.Cleaned("events", "events", marked)


def _condition(raw: DataFrame, rule: QuarantineRule) -> Column:
    try:
        condition = F.expr(rule.where)
        raw.where(condition)  # analysis only; nothing is read
    except AnalysisException as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"events.quarantine_rules: rule {rule.reason}: {rule.where!r} is no condition over the raw event "
            f"columns ({first_line}); correct it"
        ) from error
    return condition


def _conditions(lateness_days: int) -> dict[str, Column]:
    ahead = F.unix_micros("event_time") - F.unix_micros("ingest_time")
    days_late = F.datediff("ingest_date", "event_date")
    lacks_item = _is_empty("item_id") | _is_empty("category_id")
    return {
        contracts.MALFORMED: F.col("_corrupt") | feeds.is_endless(*DISCOUNTS),
        "missing_user": _is_empty("user_id") & _is_empty("visitor_id"),
        "missing_event_id": _is_empty("event_id"),
        "unknown_event_type": ~F.coalesce(F.col("event_type").isin(*layouts.EVENT_TYPES), F.lit(False)),
        "bad_time": F.col("event_time").isNull() | F.col("ingest_time").isNull(),
        "clock_skew": feeds.is_skewed("event_time", "ingest_time"),
        "future_event": (ahead > FUTURE_MINUTES * 60_000_000) | (days_late < -1),
        "too_late": days_late > lateness_days,
        "missing_item": F.col("event_type").isin(*ITEM_TYPES) & lacks_item,
        "negative_price": (F.col("price") < 0) | feeds.is_endless("price"),
        "negative_quantity": F.col("quantity") < 0,
    }


def _is_empty(name: str) -> Column:
    return F.col(name).isNull() | (F.col(name) == "")


def touched_dates(ingest_dates: DateRange, lateness_days: int) -> DateRange:
    """Event dates that a delivery may hold: from the lateness horizon to the day after (fast clocks)."""
    return ingest_dates.widen(before=lateness_days, after=1)


def read_first_deliveries(spark: SparkSession, root_uri: str, event_dates: DateRange) -> DataFrame:
    """Events of a range, each (``event_date``, ``event_id``) once: the first ingest date wins.

    A copy that names another business day is another event here, so that every event date stays a pure
    function of its own rows; ``event_id`` is the sender's promise.
    Cost: one small job over two partition columns. Dates with a single ingest date pass untouched;
    for the others ids are grouped, and the repeated ones are joined back: no broadcast is asked for,
    because a day that was delivered again in full repeats every id.
    """
    rows = tables.read(spark, root_uri, "events").where(tables.in_range("event_date", event_dates))
    deliveries = rows.select("event_date", "ingest_date").distinct().collect()
    num_deliveries = Counter(delivery["event_date"] for delivery in deliveries)
    crowded = sorted(day for day, number in num_deliveries.items() if number > 1)
    if not crowded:
        return rows
    first = F.min("ingest_date").alias("first_date")
    repeated = (
        rows.where(F.col("event_date").isin(crowded))
        .groupBy("event_date", "event_id")
        .agg(first, F.count(F.lit(1)).alias("num_deliveries"))
        .where("num_deliveries > 1")
        .drop("num_deliveries")
    )
    joined = rows.join(repeated, ["event_date", "event_id"], "left")
    is_first = F.col("first_date").isNull() | (F.col("ingest_date") == F.col("first_date"))
    return joined.where(is_first).select(*schemas.TABLES["events"].column_names)


def read_events(spark: SparkSession, root_uri: str, event_dates: DateRange) -> DataFrame:
    """Read the events of a range as later stages must see them; the only door to ``events``.

    Grain: one row per event; columns of the ``events`` table. First deliveries only, and without what
    ``user_days`` excludes on that date (see ``robots``); purchases always stay (they are labels). An
    exclusion is known when its date is over, so it may serve every later ``as_of``.
    Cost: one small job over ``user_days``; excluded rows leave before any shuffle while there are at most
    ``MAX_BROADCAST_ROWS`` excluded user-days.

    Raises:
        DataError: ``events`` or ``user_days`` does not exist.
    """
    rows = read_first_deliveries(spark, root_uri, event_dates)
    excluded = (
        tables.read(spark, root_uri, "user_days", event_dates)
        .where(F.col("exclusion_reason").isNotNull())
        .select("user_id", "event_date", "exclusion_reason")
    )
    num_excluded = excluded.limit(MAX_BROADCAST_ROWS + 1).count()
    if num_excluded == 0:
        return rows
    small = F.broadcast(excluded) if num_excluded <= MAX_BROADCAST_ROWS else excluded
    joined = rows.join(small, ["user_id", "event_date"], "left")
    left_out = robots.is_left_out(F.col("exclusion_reason"), F.col("event_type"))
    return joined.where(~left_out).select(*schemas.TABLES["events"].column_names)
