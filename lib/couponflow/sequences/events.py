"""Raw events -> events, user_days; and the read door that every later stage uses for events.

``clean`` is a pure function of one ingest date's delivery. What concerns several ingest dates (a second
delivery of an event, excluded users) is settled by ``read_events``, so that a later delivery never changes
what an earlier ``as_of`` saw.
"""

from collections import Counter
from functools import reduce
from operator import or_

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.errors import ConfigError
from couponflow.lake import layouts, schemas, tables
from couponflow.sections import EventsConfig, QuarantineRule
from couponflow.sequences import feeds

FIRST_YEAR, LAST_YEAR = 2000, 2098  # outside: 1970 and 2099 clocks, milliseconds read as seconds
FUTURE_MINUTES = 60  # devices run up to an hour ahead
ITEM_TYPES = ("view", "favourite", "cart", "purchase")
DISCOUNTS = ("discount_amount", "coupon_amount", "coupon_match_amount")
WRITE_PARTITIONS = 4

#: A user-day is a bot's if, of the events delivered on that day, more than this many are no purchases and
#: half of these follow their predecessor within ``BOT_GAP_MICROS``; or if more than ``BOT_MAX_EVENTS`` are
#: no purchases and none is one.
BOT_MIN_EVENTS = 100
BOT_GAP_MICROS = 1_000_000
BOT_MAX_EVENTS = 2_000


def clean(raw: DataFrame, config: EventsConfig, time_zone: str, lateness_days: int) -> feeds.Cleaned:
    """Validate, cap and de-duplicate delivered events.

    Grain: one raw record, see ``feeds.Cleaned``. Key of the result: (``event_id``, ``ingest_date``).
    Adds: ``event_date``, the business day of ``event_time``.
    Reasons, the first that holds: malformed_record; the config's rules in their order; missing_user,
        missing_event_id, unknown_event_type, bad_time (absent or unreadable), clock_skew (a year outside
        2000..2098), future_event (more than an hour after its ingest_time, or after the day that follows
        its ingest date), too_late (delivered more than ``lateness_days`` after its event date),
        missing_item (view, favourite, cart, purchase without item or category), negative_price (or no
        finite number), negative_quantity. A discount or coupon that is no finite number is a
        malformed_record.
    Quantity: above ``max_quantity`` (if not 0) it is no unit count and becomes 1.
    Duplicates: of valid rows with one (``ingest_date``, ``event_id``) the latest (``ingest_time``,
        ``source_file``, ``row_number``) stays; exact and conflicting copies count alike.
    Cost: one shuffle by ingest date, one sort.

    Raises:
        ConfigError: a rule of the config is no condition over the raw columns.
    """
    local = F.from_utc_timestamp("event_time", time_zone)
    dated = raw.repartition(WRITE_PARTITIONS, "ingest_date").withColumn("event_date", F.to_date(local))
    checks = [
        ("malformed_record", F.col("_corrupt") | _is_endless(*DISCOUNTS)),
        *[(rule.reason, _condition(raw, rule)) for rule in config.quarantine_rules],
        *_checks(lateness_days),
    ]
    frame = dated.withColumn(feeds.REFUSAL, feeds.first_reason(checks)).withColumn(
        "is_automated", F.lit(False)
    )
    if config.max_quantity:
        too_many = F.col("quantity") > config.max_quantity
        frame = frame.withColumn(
            "quantity", F.when(too_many, F.lit(1).cast("bigint")).otherwise(F.col("quantity"))
        )
    return feeds.Cleaned("events", "events", feeds.with_duplicates(frame, ("event_id",), ("ingest_time",)))


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


def _checks(lateness_days: int) -> list[tuple[str, Column]]:
    year = F.year("event_time")
    ahead = F.unix_micros("event_time") - F.unix_micros("ingest_time")
    days_late = F.datediff("ingest_date", "event_date")
    lacks_item = _is_empty("item_id") | _is_empty("category_id")
    return [
        ("missing_user", _is_empty("user_id")),
        ("missing_event_id", _is_empty("event_id")),
        ("unknown_event_type", ~F.coalesce(F.col("event_type").isin(*layouts.EVENT_TYPES), F.lit(False))),
        ("bad_time", F.col("event_time").isNull() | F.col("ingest_time").isNull()),
        ("clock_skew", ~year.between(FIRST_YEAR, LAST_YEAR)),
        ("future_event", (ahead > FUTURE_MINUTES * 60_000_000) | (days_late < -1)),
        ("too_late", days_late > lateness_days),
        ("missing_item", F.col("event_type").isin(*ITEM_TYPES) & lacks_item),
        ("negative_price", (F.col("price") < 0) | _is_endless("price")),
        ("negative_quantity", F.col("quantity") < 0),
    ]


def _is_empty(name: str) -> Column:
    return F.col(name).isNull() | (F.col(name) == "")


def _is_endless(*names: str) -> Column:
    """Whether a number is NaN or infinite; false where all are null."""
    ends = [F.isnan(name) | (F.abs(name) == float("inf")) for name in names]
    return reduce(or_, [F.coalesce(end, F.lit(False)) for end in ends])


def touched_dates(ingest_dates: DateRange, lateness_days: int) -> DateRange:
    """Event dates that a delivery may hold: from the lateness horizon to the day after (fast clocks)."""
    return ingest_dates.widen(before=lateness_days, after=1)


def build_user_days(events: DataFrame, time_zone: str) -> DataFrame:
    """Count each user's day and say whether it is a bot's.

    Grain: one row per (``user_id``, ``event_date``) with an event. A pure function of the date's rows.
    Rule: see ``BOT_MIN_EVENTS``. Purchases are left out of the gaps: the lines of one receipt share their
        time without being a bot's. The median of an even number of gaps is the upper one.
    Late: the counts are over all events; the flag sees only those whose ``ingest_date`` and business day of
        ``ingest_time`` are not after the event date. So nothing delivered at or after an ``as_of`` flips the
        flag of a day before it, and changes a history; a bot all of whose events come late stays unflagged.
    Cost: one shuffle; a list of one user's event times on one day is built (8 bytes an event).
    """
    is_purchase = F.col("event_type") == "purchase"
    delivered = F.greatest("ingest_date", F.to_date(F.from_utc_timestamp("ingest_time", time_zone)))
    is_in_time = delivered <= F.col("event_date")
    times = F.collect_list(F.when(is_in_time & ~is_purchase, F.unix_micros("event_time")))
    days = events.groupBy("user_id", "event_date").agg(
        F.count(F.lit(1)).alias("num_events"),
        F.count_if(is_purchase).alias("num_purchases"),
        F.count_if(is_in_time & is_purchase).alias("num_seen_purchases"),
        F.sort_array(times).alias("micros"),
    )
    size = F.size("micros")
    # A shifted copy, not an index inside the lambda: that one is quadratic.
    later, earlier = F.slice("micros", 2, size), F.slice("micros", 1, F.greatest(size - 1, F.lit(0)))
    gaps = F.sort_array(F.zip_with(later, earlier, lambda a, b: a - b))
    median = F.element_at(gaps, (F.size(gaps) / 2).cast("int") + 1)
    is_fast = F.when(size > BOT_MIN_EVENTS, median <= BOT_GAP_MICROS).otherwise(False)
    is_bot = is_fast | ((size > BOT_MAX_EVENTS) & (F.col("num_seen_purchases") == 0))
    return days.select(
        "user_id",
        "event_date",
        "num_events",
        "num_purchases",
        F.when(is_bot, F.lit("bot")).alias("exclusion_reason"),
    ).repartition("event_date")


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

    Grain: one row per event; columns of the ``events`` table. First deliveries only, and without users
    whom ``user_days`` excludes on that date, whose purchases stay (they are labels). An exclusion is known
    when its date is over (see ``build_user_days``), so it may serve every later ``as_of``.

    Raises:
        DataError: ``events`` or ``user_days`` does not exist.
    """
    rows = read_first_deliveries(spark, root_uri, event_dates)
    excluded = (
        tables.read(spark, root_uri, "user_days", event_dates)
        .where(F.col("exclusion_reason").isNotNull())
        .select("user_id", "event_date", F.lit(True).alias("is_excluded"))
    )
    joined = rows.join(F.broadcast(excluded), ["user_id", "event_date"], "left")
    stays = F.col("is_excluded").isNull() | (F.col("event_type") == "purchase")
    return joined.where(stays).select(*schemas.TABLES["events"].column_names)
