"""Wide aggregates: what was known about a user, and of the user with a campaign, before a cut-off.

Exactly ``layouts.WIDE_FEATURES``, packed float32. All dates are business days: an event is known at the
start of ``as_of_date`` iff the later of its event date and its delivery's date lies before, and it is in a
window of n days iff event_date >= as_of_date - n. Money is summed in whole micro-units, so that a value does
not depend on how rows were partitioned.
"""

from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.lake import layouts
from couponflow.sequences import packing

#: Days written where an event never happened.
MISSING_DAYS = 365
_PAIR = ["user_id", "as_of_date"]
_ROW = ["user_id", "campaign_id", "as_of_date"]


def known_date(time_zone: str) -> Column:
    """The first business day on which an event may be used is the day after this one."""
    return F.greatest("event_date", F.to_date(F.from_utc_timestamp("ingest_time", time_zone)))


def build(
    events: DataFrame,
    population: DataFrame,
    campaigns: DataFrame,
    sends: DataFrame,
    redemptions: DataFrame,
    users: DataFrame,
    time_zone: str,
) -> DataFrame:
    """Build the packed aggregates of each (user, campaign, as_of).

    Grain: one row per row of ``population`` (user_id, campaign_id, as_of, as_of_date), its key; users
        without events stay. Adds ``wide``, float32 LE in the order of ``layouts.WIDE_FEATURES``.
    Input: ``events`` with ``known_date``; the other frames as their tables, each campaign, send and
        redemption once.
    Units: counts, money (configured currency, floored at 0) and days go through log1p; flags are 0 or 1.
    Nulls: a user without events has zeros, recencies of 365 days and a tenure of 0.
    Cost: events are aggregated per order before the cut-offs are joined; promoted lines meet only the
        cut-offs of users who were sent that campaign.
    """
    pairs = population.select(*_PAIR).distinct()
    frames = (
        (_order_features(events, pairs), _PAIR),
        (_category_features(events, pairs), _PAIR),
        (_promoted_features(events, population.select(*_ROW), campaigns), _ROW),
        (
            _redemption_features(
                redemptions, population.select("user_id", "as_of", "as_of_date").distinct(), time_zone
            ),
            _PAIR,
        ),
        (
            _mail_features(sends, campaigns, population.select("user_id", "as_of", "as_of_date").distinct()),
            _PAIR,
        ),
        (_attribute_features(users, pairs), _PAIR),
        (F.broadcast(_campaign_features(campaigns)), ["campaign_id"]),
    )
    joined = reduce(lambda left, right: left.join(right[0], right[1], "left"), frames, population)
    return joined.select(
        "user_id",
        "campaign_id",
        "as_of",
        "as_of_date",
        F.array(*[_finished(n) for n in layouts.WIDE_FEATURES]).alias("wide"),
    ).mapInArrow(
        packing.with_packed_wide,
        "user_id string, campaign_id string, as_of timestamp, as_of_date date, wide binary",
    )


def _finished(name: str) -> Column:
    missing = MISSING_DAYS if name.endswith("recency_days") else 0
    value = F.coalesce(F.col(name).cast("double"), F.lit(float(missing)))
    if "_amount_" in name:
        value = value / 1e6
    if not name.startswith(("is_", "has_")):
        value = F.log1p(F.greatest(value, F.lit(0.0)))
    return value.cast("float")


def _micros(column: str) -> Column:
    return F.round(F.coalesce(F.col(column), F.lit(0.0)) * 1e6).cast("bigint")


def _is_purchase() -> Column:
    return F.col("event_type") == "purchase"


def _total(condition: Column, value: Column | int = 1) -> Column:
    return F.sum(F.when(condition, value).otherwise(0))


def _order_features(events: DataFrame, pairs: DataFrame) -> DataFrame:
    """Sums per cut-off, by way of one row per (user, order, event_date, known_date)."""
    buys = _is_purchase()
    per_order = events.groupBy("user_id", "order_id", "event_date", "known_date").agg(
        _total(buys).alias("lines"),
        _total(buys, _micros("price")).alias("spend"),
        _total(buys & (F.col("coupon_amount") > 0)).alias("coupon_lines"),
        _total(buys, _micros("coupon_amount")).alias("coupon"),
        _total(buys & (F.col("coupon_match_amount") > 0)).alias("match_lines"),
        _total(buys, _micros("discount_amount")).alias("discount"),
        _total(buys & (F.col("discount_amount") > 0)).alias("discount_lines"),
    )
    age = F.datediff("as_of_date", "event_date")
    known = (
        per_order.join(pairs, "user_id")
        .where(F.col("known_date") < F.col("as_of_date"))
        .withColumn("age", age)
    )
    windows = [
        _total(F.col("age") <= days, F.col(measure)).alias(f"{measure}_{days}")
        for measure, days in (
            ("lines", 28),
            ("spend", 28),
            ("spend", 56),
            ("coupon_lines", 28),
            ("coupon_lines", 91),
        )
    ]
    sums = ("lines", "spend", "coupon_lines", "coupon", "match_lines", "discount", "discount_lines")
    # One order may span days: it counts once, and lies in a window iff its newest known line does.
    per_pair = known.groupBy(*_PAIR, "order_id").agg(
        *[F.sum(name).alias(name) for name in sums],
        *windows,
        F.min(F.when(F.col("lines") > 0, F.col("age"))).alias("order_age"),
        F.min(F.when(F.col("coupon_lines") > 0, F.col("age"))).alias("coupon_age"),
        F.max("age").alias("oldest"),
    )
    is_order = F.col("order_id").isNotNull()
    return per_pair.groupBy(*_PAIR).agg(
        _total(is_order & F.col("order_age").isNotNull()).alias("num_orders_all"),
        _total(is_order & (F.col("order_age") <= 28)).alias("num_orders_28_days"),
        _total(is_order & (F.col("order_age") <= 7)).alias("num_orders_7_days"),
        F.sum("lines").alias("num_lines_all"),
        F.sum("lines_28").alias("num_lines_28_days"),
        F.sum("spend").alias("spend_amount_all"),
        F.sum("spend_28").alias("spend_amount_28_days"),
        F.sum("spend_56").alias("spend_amount_56_days"),
        F.min("order_age").alias("recency_days"),
        F.max("oldest").alias("tenure_days"),
        F.sum("coupon_lines").alias("num_coupon_lines_all"),
        F.sum("coupon_lines_28").alias("num_coupon_lines_28_days"),
        F.sum("coupon_lines_91").alias("num_coupon_lines_91_days"),
        F.sum("coupon").alias("coupon_amount_all"),
        F.min("coupon_age").alias("coupon_recency_days"),
        F.sum("match_lines").alias("num_coupon_match_lines"),
        F.sum("discount").alias("discount_amount_all"),
        F.sum("discount_lines").alias("num_discount_lines"),
    )


def _category_features(events: DataFrame, pairs: DataFrame) -> DataFrame:
    """Distinct categories bought: how many became known on each day, summed up to the cut-off."""
    first_seen = (
        events.where(_is_purchase() & F.col("category_id").isNotNull())
        .groupBy("user_id", "category_id")
        .agg(F.min("known_date").alias("known_date"))
        .groupBy("user_id", "known_date")
        .agg(F.count(F.lit(1)).alias("categories"))
    )
    return (
        first_seen.join(pairs, "user_id")
        .where(F.col("known_date") < F.col("as_of_date"))
        .groupBy(*_PAIR)
        .agg(F.sum("categories").alias("num_categories"))
    )


def _promoted_features(events: DataFrame, rows: DataFrame, campaigns: DataFrame) -> DataFrame:
    """Purchases of what the campaign promotes: its coupons' items or, if it names none, their categories."""
    coupons = campaigns.select("campaign_id", F.explode("coupons").alias("coupon"))
    items = coupons.select("campaign_id", F.explode("coupon.item_ids").alias("item_id")).distinct()
    categories = (
        coupons.join(items.select("campaign_id").distinct(), "campaign_id", "left_anti")
        .select("campaign_id", F.col("coupon.category_id").alias("category_id"))
        .where(F.col("category_id").isNotNull())
        .distinct()
    )
    bought = events.where(_is_purchase()).select(
        "user_id", "item_id", "category_id", "event_date", "known_date", _micros("price").alias("spend")
    )
    by_item = bought.join(F.broadcast(items), "item_id")
    by_category = bought.join(F.broadcast(categories), "category_id").select(*by_item.columns)
    recent = F.datediff("as_of_date", "event_date") <= 56
    return (
        by_item.unionByName(by_category)
        .join(rows, ["user_id", "campaign_id"])
        .where(F.col("known_date") < F.col("as_of_date"))
        .groupBy(*_ROW, "item_id")
        .agg(
            F.count(F.lit(1)).alias("lines"), _total(recent).alias("lines_56"), F.sum("spend").alias("spend")
        )
        .groupBy(*_ROW)
        .agg(
            F.sum("lines").alias("num_promoted_lines_all"),
            F.sum("lines_56").alias("num_promoted_lines_56_days"),
            F.sum("spend").alias("promoted_amount_all"),
            F.count("item_id").alias("num_promoted_items"),
        )
    )


def _redemption_features(redemptions: DataFrame, cutoffs: DataFrame, time_zone: str) -> DataFrame:
    """Redemptions before the cut-off, delivered by then."""
    day = F.to_date(F.from_utc_timestamp("redemption_time", time_zone))
    return (
        redemptions.select("user_id", "campaign_id", "redemption_time", "ingest_date", day.alias("day"))
        .join(cutoffs, "user_id")
        .where((F.col("redemption_time") < F.col("as_of")) & (F.col("ingest_date") < F.col("as_of_date")))
        .groupBy(*_PAIR)
        .agg(
            F.count(F.lit(1)).alias("num_redemptions"),
            F.countDistinct("campaign_id").alias("num_redeemed_campaigns"),
            F.min(F.datediff("as_of_date", "day")).alias("redemption_recency_days"),
        )
    )


def _mail_features(sends: DataFrame, campaigns: DataFrame, cutoffs: DataFrame) -> DataFrame:
    """Campaigns whose mail the user got before the cut-off, and those of them that are over."""
    mails = sends.select("user_id", "campaign_id", "delivered_time", "ingest_date")
    ends = F.broadcast(campaigns.select("campaign_id", "end_date"))
    before = mails.join(cutoffs, "user_id").where(
        (F.col("delivered_time") < F.col("as_of")) & (F.col("ingest_date") < F.col("as_of_date"))
    )
    finished = F.when(F.col("end_date") < F.col("as_of_date"), F.col("campaign_id"))
    return (
        before.join(ends, "campaign_id", "left")
        .groupBy(*_PAIR)
        .agg(
            F.countDistinct("campaign_id").alias("num_campaigns_received"),
            F.countDistinct(finished).alias("num_campaigns_finished"),
        )
    )


def _attribute_features(users: DataFrame, pairs: DataFrame) -> DataFrame:
    """Whether attributes were known in the newest snapshot of the user master before the cut-off's day.

    The snapshot of that day is delivered after the day's start, which is the cut-off.
    """
    days = pairs.select("as_of_date").distinct()
    newest = (
        users.select("snapshot_date")
        .distinct()
        .join(days, F.col("snapshot_date") < F.col("as_of_date"))
        .groupBy("as_of_date")
        .agg(F.max("snapshot_date").alias("snapshot_date"))
    )
    return users.join(F.broadcast(newest), "snapshot_date").select(
        "user_id", "as_of_date", F.col("has_attributes").cast("int").alias("has_attributes")
    )


def _campaign_features(campaigns: DataFrame) -> DataFrame:
    """What the campaign itself says: size, length and type."""
    items = F.size(F.array_distinct(F.flatten(F.transform("coupons", _item_ids))))
    return campaigns.select(
        "campaign_id",
        F.size("coupons").alias("num_campaign_coupons"),
        items.alias("num_campaign_items"),
        (F.datediff("end_date", "start_date") + 1).alias("campaign_days"),
        *[
            (F.col("campaign_type") == f"Type {letter.upper()}").cast("int").alias(f"is_type_{letter}")
            for letter in "abc"
        ],
    )


def _item_ids(coupon: Column) -> Column:
    return F.coalesce(coupon["item_ids"], F.array().cast("array<string>"))
