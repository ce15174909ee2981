"""Which user-days are no shopper's: staff, bots, mail scanners. The config holds the rules.

A flag sees only what was delivered on its own day (``ingest_date`` and the business day of ``ingest_time``
are not after the event date), so nothing that comes later flips it and changes a history; a bot all of whose
events come late stays unflagged. Of several reasons staff comes before bot, and bot before scanner.
"""

import hashlib
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.lake import tables
from couponflow.sections import EventsConfig
from couponflow.sequences.records import PseudonymKey, pseudonym

REASONS = ("staff", "bot", "scanner")
#: What an excluded user-day loses: staff and bots everything but purchases, a scanner its mail events.
MAIL_TYPES = ("mail_open", "mail_click")
TOP = 5
_DAY = ["user_id", "event_date"]


def staff_ids(config: EventsConfig, key: PseudonymKey | None) -> tuple[str, ...]:
    """The config's staff and test accounts as ``events`` knows them."""
    return tuple(pseudonym(user_id, key) for user_id in config.staff_user_ids)


def is_automated(config: EventsConfig) -> Column:
    """Whether ``user_agent`` holds one of the config's texts, in any case; false where it is null."""
    agent = F.lower("user_agent")
    found = F.lit(False)
    for text in config.bot_agents:
        found |= agent.contains(text.lower())
    return F.coalesce(found, F.lit(False))


def is_left_out(reason: Column, event_type: Column) -> Column:
    """Whether an event of a user-day with this ``exclusion_reason`` (null = kept) is kept from later stages.

    Purchases always stay: they are labels.
    """
    is_mail = event_type.isin(*MAIL_TYPES)
    return reason.isNotNull() & F.when(reason == "scanner", is_mail).otherwise(event_type != "purchase")


def build_user_days(
    events: DataFrame, time_zone: str, config: EventsConfig, staff: tuple[str, ...] = ()
) -> DataFrame:
    """Count each user's day and say why it is left out, if it is.

    Grain: one row per (``user_id``, ``event_date``) with an event. A pure function of the date's rows.
    Counts are over all events; flags see the events delivered in time, and of these:
        staff: one of ``staff``.
        bot, by user agent: more than ``bot_agent_share`` of them are automated;
            by rate: more than ``bot_max_events`` are no purchases, and none is one;
            by rhythm: more than ``bot_min_events`` are no purchases, and at least half of these follow their
            predecessor within ``bot_gap_seconds`` (the lines of one receipt share their time, so purchases
            are left out);
            by breadth: no purchase, and more than ``bot_min_events`` with an item on at most
            ``bot_max_items`` items, or with more than ``bot_max_categories`` categories.
        scanner: ``scanner_min_clicks`` mail clicks within ``scanner_burst_seconds``, or one within
            ``scanner_click_seconds`` after a mail open.
    Cost: one shuffle of counts, one of the in-time events that are no purchases (seven narrow columns) with
        one sort by time, one of the mail events. Nothing is collected per user: a user-day of a million
        events is sorted, and spilled, in one task.
    """
    seen = events.where(_is_in_time(time_zone)).where(F.col("event_type") != "purchase")
    acts = seen.select(
        *_DAY, "item_id", "category_id", "event_type", F.unix_micros("event_time").alias("micros")
    )
    days = (
        _counts(events, time_zone)
        .join(_traits(acts, config), _DAY, "left")
        .join(_scanners(acts, config), _DAY, "left")
    )
    is_staff = F.col("user_id").isin(*staff) if staff else F.lit(False)
    reason = (
        F.when(is_staff, F.lit("staff"))
        .when(_is_bot(config), F.lit("bot"))
        .when(F.coalesce("is_scanner", F.lit(False)), F.lit("scanner"))
    )
    return days.select(
        *_DAY, "num_events", "num_purchases", "num_mail_clicks", reason.alias("exclusion_reason")
    ).repartition("event_date")


def _is_in_time(time_zone: str) -> Column:
    delivered = F.greatest("ingest_date", F.to_date(F.from_utc_timestamp("ingest_time", time_zone)))
    return delivered <= F.col("event_date")


def _counts(events: DataFrame, time_zone: str) -> DataFrame:
    is_seen = _is_in_time(time_zone)
    is_purchase = F.col("event_type") == "purchase"
    return events.groupBy(*_DAY).agg(
        F.count(F.lit(1)).alias("num_events"),
        F.count_if(is_purchase).alias("num_purchases"),
        F.count_if(F.col("event_type") == "mail_click").alias("num_mail_clicks"),
        F.count_if(is_seen).alias("num_seen"),
        F.count_if(is_seen & is_purchase).alias("num_seen_purchases"),
        F.count_if(is_seen & F.coalesce("is_automated", F.lit(False))).alias("num_automated"),
    )


def _traits(acts: DataFrame, config: EventsConfig) -> DataFrame:
    """Rhythm and breadth of the events that are no purchases; one row per user-day that has such."""
    by_time = Window.partitionBy(*_DAY).orderBy("micros")
    gap = F.col("micros") - F.lag("micros").over(by_time)
    per_item = (
        acts.repartition(*_DAY)
        .withColumn("is_fast", gap <= _micros(config.bot_gap_seconds))
        .groupBy(*_DAY, "item_id", "category_id")
        .agg(F.count(F.lit(1)).alias("num"), F.count_if("is_fast").alias("num_fast"))
    )
    has_item = F.col("item_id").isNotNull()
    return per_item.groupBy(*_DAY).agg(
        F.sum("num").alias("num_acts"),
        F.sum("num_fast").alias("num_fast"),
        F.sum(F.when(has_item, F.col("num")).otherwise(0)).alias("num_item_acts"),
        F.count_if(has_item).alias("num_items"),
        F.size(F.collect_set("category_id")).alias("num_categories"),  # bounded by the catalogue
    )


def _scanners(acts: DataFrame, config: EventsConfig) -> DataFrame:
    """Whether mail events of a user-day are a scanner's; one row per user-day that has such."""
    mails = acts.where(F.col("event_type").isin(*MAIL_TYPES)).withColumn(
        "is_click", F.col("event_type") == "mail_click"
    )
    by_time = Window.partitionBy(*_DAY).orderBy("micros", "is_click")  # an open comes first
    clicks = Window.partitionBy(*_DAY, "is_click").orderBy("micros")
    opened = F.last(F.when(~F.col("is_click"), F.col("micros")), ignorenulls=True).over(by_time)
    is_scan = F.lit(False)
    if config.scanner_click_seconds > 0:
        is_scan |= F.col("micros") - F.col("opened") <= _micros(config.scanner_click_seconds)
    if config.scanner_min_clicks > 1:
        is_scan |= F.col("micros") - F.col("earlier") <= _micros(config.scanner_burst_seconds)
    earlier = F.lag("micros", max(1, config.scanner_min_clicks - 1)).over(clicks)
    marked = mails.withColumn("opened", opened).withColumn("earlier", earlier)
    is_found = F.col("is_click") & F.coalesce(is_scan, F.lit(False))
    return marked.groupBy(*_DAY).agg(F.max(is_found).alias("is_scanner"))


def _is_bot(config: EventsConfig) -> Column:
    acts, no_purchase = F.col("num_acts"), F.col("num_seen_purchases") == 0
    is_busy = acts > config.bot_min_events
    rules = [F.col("num_automated") > config.bot_agent_share * F.col("num_seen")]
    if config.bot_max_events:
        rules.append((acts > config.bot_max_events) & no_purchase)
    if config.bot_gap_seconds > 0:
        # Of n - 1 gaps the upper median is within the limit.
        rules.append(is_busy & (F.col("num_fast") >= F.floor((acts - 1) / 2) + 1))
    if config.bot_max_items:
        is_narrow = F.col("num_items") <= config.bot_max_items
        rules.append((F.col("num_item_acts") > config.bot_min_events) & is_narrow & no_purchase)
    if config.bot_max_categories:
        rules.append(is_busy & (F.col("num_categories") > config.bot_max_categories) & no_purchase)
    found = F.lit(False)
    for rule in rules:
        found |= F.coalesce(rule, F.lit(False))
    return found


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)


def summary(spark: SparkSession, root_uri: str, event_dates: DateRange) -> dict[str, Any]:
    """What was left out on these dates, for the run record.

    Per reason the user-days, their events and the largest of them; the share of mail clicks that are
    scanners'. Users are shown as the first 12 digits of the SHA-256 of their id in ``user_days``, so that a
    record keeps nobody's id.
    """
    days = tables.read(spark, root_uri, "user_days", event_dates)
    totals = days.groupBy("exclusion_reason").agg(
        F.count(F.lit(1)).alias("user_days"),
        F.sum("num_events").alias("events"),
        F.sum("num_mail_clicks").alias("clicks"),
    )
    by_reason = {row["exclusion_reason"]: row for row in totals.collect()}
    clicks = sum(row["clicks"] for row in by_reason.values())
    found: dict[str, Any] = {}
    for reason in REASONS:
        if reason not in by_reason:
            found[reason] = {"user_days": 0, "events": 0, "largest": []}
            continue
        largest = (
            days.where(F.col("exclusion_reason") == reason)
            .orderBy(F.desc("num_events"), "user_id", "event_date")
            .limit(TOP)
            .collect()
        )
        found[reason] = {
            "user_days": by_reason[reason]["user_days"],
            "events": by_reason[reason]["events"],
            "largest": [f"{_shown(r['user_id'])} {r['event_date']} {r['num_events']}" for r in largest],
        }
    scanned = by_reason["scanner"]["clicks"] if "scanner" in by_reason else 0
    return found | {"scanner_click_share": scanned / clicks if clicks else 0.0}


def _shown(user_id: str) -> str:
    return hashlib.sha256(user_id.encode()).hexdigest()[:12]
