"""Wide aggregates: what was known about a user, and of the user with a campaign, before a cut-off.

Exactly ``layouts.WIDE_FEATURES``, packed float32. All dates are business days: an event is known at the
start of ``as_of_date`` iff the later of its event date and its delivery's date lies before, and it is in a
window of n days iff event_date >= as_of_date - n. Money is summed in whole micro-units, so that a value does
not depend on how rows were partitioned.
"""

from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.lake import layouts, python_tasks
from couponflow.sequences import affinity, contacts, measures, packing

#: Days written where an event never happened.
MISSING_DAYS = 365
#: Measure of activity -> the feature that says how many days ago it last happened.
_AGES = {
    "lines": "recency_days",
    "coupon_lines": "coupon_recency_days",
    "views": "view_recency_days",
    "carts": "cart_recency_days",
}


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
    orders: DataFrame,
    catalogue: DataFrame,
    time_zone: str,
) -> DataFrame:
    """Build the packed aggregates of each (user, campaign, as_of).

    Grain: one row per row of ``population`` (user_id, campaign_id, as_of, as_of_date), its key; users
        without events stay. Adds ``wide``, float32 LE in the order of ``layouts.WIDE_FEATURES``.
    Input: ``events`` with ``known_date``; the other frames as their tables, each campaign, send and
        redemption once; an order once per delivery, as a later one tells that it was returned.
    Units: counts, money (configured currency, floored at 0) and days go through log1p; flags, shares and
        rates lie in 0..1 as they are.
    Nulls: a user without events has zeros, recencies of 365 days and a tenure of 0. A share of nothing is 0.
    Cost: events are aggregated per order and day before the cut-offs are joined; for the target they meet
        the cut-offs of users who were sent that campaign. No feature has a join of its own.
    """
    pairs = population.select(*measures.PAIR).distinct()
    cutoffs = population.select("user_id", "as_of", "as_of_date").distinct()
    rows = population.select(*measures.ROW)
    frames = (
        (_activity_features(events, pairs), measures.PAIR),
        (_category_features(events, pairs), measures.PAIR),
        (affinity.target_features(events, rows, campaigns, catalogue), measures.ROW),
        (contacts.redemption_features(redemptions, cutoffs, time_zone), measures.PAIR),
        (contacts.mail_features(events, sends, campaigns, cutoffs), measures.PAIR),
        (_return_features(orders, pairs, time_zone), measures.PAIR),
        (_attribute_features(users, pairs), measures.PAIR),
        (F.broadcast(_campaign_features(campaigns)), ["campaign_id"]),
    )
    joined = reduce(lambda left, right: left.join(right[0], right[1], "left"), frames, population)
    rate = measures.ratio(F.col("num_redeemed_campaigns"), F.col("num_campaigns_received"))
    finished = joined.withColumn("redemption_rate", rate).select(
        "user_id",
        "campaign_id",
        "as_of",
        "as_of_date",
        F.expr(f"array({', '.join(map(_finished, layouts.WIDE_FEATURES))})").alias("wide"),
    )
    return python_tasks.map_in_arrow(
        finished,
        packing.with_packed_wide,
        "user_id string, campaign_id string, as_of timestamp, as_of_date date, wide binary",
    )


def _finished(name: str) -> str:
    """A feature's value as SQL: one call to the JVM for all of them, where columns need a dozen for each."""
    missing = MISSING_DAYS if name.endswith("recency_days") else 0
    value = f"coalesce(cast({name} as double), {missing}D)"
    if "_amount_" in name:
        value = f"{value} / 1e6D"
    if not name.startswith(("is_", "has_")) and "_share_" not in name and "_rate" not in name:
        value = f"log1p(greatest({value}, 0D))"
    return f"cast({value} as float)"


def _activity_features(events: DataFrame, pairs: DataFrame) -> DataFrame:
    """Orders, money and browsing per cut-off, by way of one row per (user, order, event_date, known_date).

    Browsing carries no order, so that it is one row per day.
    """
    buys, kind = measures.is_purchase(), F.col("event_type")
    per_order = events.groupBy("user_id", "order_id", "event_date", "known_date").agg(
        measures.total(buys).alias("lines"),
        measures.total(buys, measures.micros("price")).alias("spend"),
        measures.total(buys & (F.col("coupon_amount") > 0)).alias("coupon_lines"),
        measures.total(buys, measures.micros("coupon_amount")).alias("coupon"),
        measures.total(buys & (F.col("coupon_match_amount") > 0)).alias("match_lines"),
        measures.total(buys, measures.micros("discount_amount")).alias("discount"),
        measures.total(buys & (F.col("discount_amount") > 0)).alias("discount_lines"),
        *[measures.total(kind.isin(*types)).alias(name) for name, types in layouts.BROWSING.items()],
        measures.total(~kind.isin(*measures.MAIL)).alias("visits"),
    )
    known = (
        per_order.join(pairs, "user_id")
        .where(F.col("known_date") < F.col("as_of_date"))
        .withColumn("age", F.datediff("as_of_date", "event_date"))  # at least 1
    )
    windows = {
        f"{measure}_{days}": measures.total(measures.within(days), F.col(measure))
        for measure in ("lines", "spend", *layouts.BROWSING)
        for days in layouts.WINDOWS
    } | {
        f"coupon_lines_{days}": measures.total(measures.within(days), F.col("coupon_lines"))
        for days in (28, 91)
    }
    sums = ("lines", "spend", "coupon_lines", "coupon", "match_lines", "discount", "discount_lines")
    ages = {name: F.min(F.when(F.col(name) > 0, F.col("age"))) for name in _AGES}
    # Bit n - 1 says that the user was there n days before: distinct days without a list of them.
    days_seen = F.when(
        measures.within(28) & (F.col("visits") > 0), F.expr("shiftleft(1L, age - 1)")
    ).otherwise(0)
    # One order may span days: it counts once, and lies in a window iff its newest known line does.
    per_pair = known.groupBy(*measures.PAIR, "order_id").agg(
        *[F.sum(name).alias(name) for name in sums],
        *[total.alias(name) for name, total in windows.items()],
        *[age.alias(f"{name}_age") for name, age in ages.items()],
        F.max("age").alias("oldest"),
        F.bit_or(days_seen).alias("days_seen"),
    )
    is_order = F.col("order_id").isNotNull() & F.col("lines_age").isNotNull()
    names = {"lines": "num_lines", "spend": "spend_amount", "coupon_lines": "num_coupon_lines"}
    names |= {name: f"num_{name}" for name in layouts.BROWSING}
    totals = per_pair.groupBy(*measures.PAIR).agg(
        measures.total(is_order).alias("num_orders_all"),
        *[
            measures.total(is_order & (F.col("lines_age") <= days)).alias(f"num_orders_{days}_days")
            for days in layouts.WINDOWS
        ],
        *[
            F.sum(name).alias(f"{names[measure]}_{days}_days")
            for name in windows
            for measure, _, days in [name.rpartition("_")]
        ],
        F.sum("lines").alias("num_lines_all"),
        F.sum("spend").alias("spend_amount_all"),
        F.sum("coupon_lines").alias("num_coupon_lines_all"),
        F.sum("coupon").alias("coupon_amount_all"),
        F.sum("match_lines").alias("num_coupon_match_lines"),
        F.sum("discount").alias("discount_amount_all"),
        F.sum("discount_lines").alias("num_discount_lines"),
        *[F.min(f"{name}_age").alias(feature) for name, feature in _AGES.items()],
        F.max("oldest").alias("tenure_days"),
        F.bit_or("days_seen").alias("days_seen"),
    )
    return totals.select(
        "*",
        F.bit_count(F.col("days_seen").bitwiseAND(F.lit((1 << 7) - 1))).alias("num_active_days_7_days"),
        F.bit_count("days_seen").alias("num_active_days_28_days"),
    ).drop("days_seen")


def _category_features(events: DataFrame, pairs: DataFrame) -> DataFrame:
    """Distinct categories bought: how many became known on each day, summed up to the cut-off."""
    first_seen = (
        events.where(measures.is_purchase() & F.col("category_id").isNotNull())
        .groupBy("user_id", "category_id")
        .agg(F.min("known_date").alias("known_date"))
        .groupBy("user_id", "known_date")
        .agg(F.count(F.lit(1)).alias("categories"))
    )
    return (
        first_seen.join(pairs, "user_id")
        .where(F.col("known_date") < F.col("as_of_date"))
        .groupBy(*measures.PAIR)
        .agg(F.sum("categories").alias("num_categories"))
    )


def _return_features(orders: DataFrame, pairs: DataFrame, time_zone: str) -> DataFrame:
    """Orders that were cancelled or returned before the cut-off, told by then, and their money."""
    # Nothing is told before its own time, clocks ahead or not; a missing status time is that of the delivery.
    days = [F.to_date(F.from_utc_timestamp(name, time_zone)) for name in ("order_time", "status_time")]
    told = F.greatest("ingest_date", *days)
    returned = (
        orders.where(F.col("order_status").isin("cancelled", "returned"))
        .withColumn("told", told)
        .groupBy("user_id", "order_id")
        .agg(
            F.min("told").alias("told"),
            F.min_by(measures.micros("total_amount"), F.struct("told", "ingest_date")).alias("amount"),
        )
    )
    return (
        returned.join(pairs, "user_id")
        .where(F.col("told") < F.col("as_of_date"))
        .groupBy(*measures.PAIR)
        .agg(F.count(F.lit(1)).alias("num_returned_orders"), F.sum("amount").alias("returned_amount_all"))
    )


def _attribute_features(users: DataFrame, pairs: DataFrame) -> DataFrame:
    """Whether attributes were known in the newest snapshot of the user master before the cut-off's day."""
    return users.join(F.broadcast(measures.newest_snapshots(users, pairs)), "snapshot_date").select(
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
