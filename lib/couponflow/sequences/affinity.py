"""Aggregates of a user with a campaign: how much of what the user did touches the campaign's target."""

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.lake import layouts
from couponflow.sequences import measures


def target_features(
    events: DataFrame, rows: DataFrame, campaigns: DataFrame, catalogue: DataFrame
) -> DataFrame:
    """Sum events that touch the campaign's target, and purchases of what it promotes.

    Grain: one row per row of ``rows`` (user_id, campaign_id, as_of_date) with a known event.
    Rule: promoted are its coupons' items or, if it names none, their categories. Target categories are those
        of the coupons; target shops those that the newest catalogue snapshot before the cut-off's day gives
        to its items. A share is of the events, or lines, that name a category, or a shop.
    Cost: three broadcast look-ups per event and row of its user; no shuffle where events lie by user.
    """
    items, categories = _target_members(campaigns)
    bought, recent = measures.is_purchase(), measures.within(28)
    touched = (
        events.where(F.coalesce("item_id", "category_id", "shop_id").isNotNull())
        .select(
            "user_id",
            "item_id",
            "category_id",
            "shop_id",
            "event_date",
            "known_date",
            bought.alias("is_line"),
            F.when(bought, measures.micros("price")).otherwise(0).alias("spend"),
        )
        .join(rows, "user_id")
        .where(F.col("known_date") < F.col("as_of_date"))
        .withColumn("age", F.datediff("as_of_date", "event_date"))
        .join(F.broadcast(items), ["campaign_id", "item_id"], "left")
        .join(F.broadcast(categories), ["campaign_id", "category_id"], "left")
        .join(
            F.broadcast(_target_shops(rows, items, catalogue)),
            ["campaign_id", "as_of_date", "shop_id"],
            "left",
        )
    )
    promoted = F.col("is_line") & F.coalesce("is_item", "is_whole_category", F.lit(False))
    sums: dict[str, Column] = {}
    for affinity in layouts.AFFINITIES:
        named, hit = F.col(f"{affinity}_id").isNotNull(), F.col(f"is_target_{affinity}")
        for what, counted in (("events", F.lit(True)), ("lines", F.col("is_line"))):
            for span, inside in (("28_days", recent), ("all", F.lit(True))):
                sums[f"num_target_{affinity}_{what}_{span}"] = measures.total(hit & counted & inside)
                sums[f"{affinity}_{what}_{span}"] = measures.total(named & counted & inside)
    sums["num_promoted_lines_all"] = measures.total(promoted)
    sums["num_promoted_lines_56_days"] = measures.total(promoted & measures.within(56))
    sums["promoted_amount_all"] = measures.total(promoted, F.col("spend"))
    totals = (
        touched.groupBy(*measures.ROW, F.when(promoted, F.col("item_id")).alias("promoted_item"))
        .agg(*[total.alias(name) for name, total in sums.items()])
        .groupBy(*measures.ROW)
        .agg(
            *[F.sum(name).alias(name) for name in sums],
            F.count("promoted_item").alias("num_promoted_items"),
        )
    )
    shares = [
        measures.ratio(
            F.col(f"num_target_{affinity}_{what}s_{span}"), F.col(f"{affinity}_{what}s_{span}")
        ).alias(f"target_{affinity}_{what}_share_{span}")
        for affinity in layouts.AFFINITIES
        for what in ("event", "line")
        for span in ("28_days", "all")
    ]
    return totals.select("*", *shares)


def _target_members(campaigns: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Items and categories of each campaign's coupons, each once."""
    coupons = campaigns.select("campaign_id", F.explode("coupons").alias("coupon"))
    items = coupons.select("campaign_id", F.explode("coupon.item_ids").alias("item_id")).distinct()
    has_items = items.select("campaign_id").distinct().withColumn("has_items", F.lit(True))
    categories = (
        coupons.select("campaign_id", F.col("coupon.category_id").alias("category_id"))
        .where(F.col("category_id").isNotNull())
        .distinct()
        .join(has_items, "campaign_id", "left")
        .select(
            "campaign_id",
            "category_id",
            F.lit(True).alias("is_target_category"),
            F.col("has_items").isNull().alias("is_whole_category"),
        )
    )
    return items.withColumn("is_item", F.lit(True)), categories


def _target_shops(rows: DataFrame, items: DataFrame, catalogue: DataFrame) -> DataFrame:
    """Shops of each campaign's items as the catalogue knew them at each cut-off."""
    cuts = rows.select("campaign_id", "as_of_date").distinct()
    return (
        cuts.join(measures.newest_snapshots(catalogue, cuts), "as_of_date")
        .join(items, "campaign_id")
        .join(catalogue.select("snapshot_date", "item_id", "shop_id"), ["snapshot_date", "item_id"])
        .where(F.col("shop_id").isNotNull())
        .select("campaign_id", "as_of_date", "shop_id", F.lit(True).alias("is_target_shop"))
        .distinct()
    )
