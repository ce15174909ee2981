"""What a choice is worth by the true chances, where they are known: against the best choice and a random one.

Only the synthetic shop tells the truth, and only after the run: no job reads it. The best choice is the same
selection, under the same limits and after the same exploration, given the true chances in place of the
predictions.
"""

from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign import eligibility, selection
from couponflow.campaign.choice import options
from couponflow.campaign.choice.options import MICRO
from couponflow.campaigning import SelectionConfig
from couponflow.config import Config
from couponflow.lake import tables
from couponflow.sources import synthetic_truth


def of_campaign(config: Config, campaign_id: str, version: str, spark: Any) -> dict[str, Any]:
    """``compare`` for one decided version; empty where the truth is not known or not asked for.

    ``config`` is that of the campaign's jobs.
    """
    root, section = config.lake.root_uri, config.selection
    is_open = config.source.name == "synthetic" and not config.events.pseudonymise
    if not is_open or not version or section.objective != "expected_profit":
        return {}
    targets = section.targets(campaign_id)
    chances = synthetic_truth.read_chances(spark, root, targets)
    if chances is None:
        return {}
    ledger = tables.read(spark, root, "assignments").where(
        (F.col("campaign_id") == campaign_id) & (F.col("version") == version)
    )
    master = eligibility.user_master(tables.read(spark, root, "users"), config.run.run_date)
    return compare(ledger, master, chances, campaign_id, section)


def compare(
    ledger: DataFrame, master: DataFrame, chances: DataFrame, campaign_id: str, section: SelectionConfig
) -> dict[str, Any]:
    """True expected profit of the selected users, of the best selection, and of a random one.

    Inputs: ``ledger`` rows of one version; ``master`` with what segments ask for; ``chances`` with ``p1``,
    the true P(conversion given send), per ``user_id`` and ``campaign_id`` whose target is meant, 0 for who is
    not in it.
    Rule: withheld users count as selected: who is withheld is no part of the choice. Mails at random are no
        part of it either, but what they take of the limits is. The random selection has as many users, and as
        many with each coupon.
    Empty: nobody eligible, all amounts are 0 and the share is null.
    """
    eligible = ledger.where(F.col("reason").isin(*selection.REASONS))
    is_own = F.col("campaign_id") == campaign_id
    pair = F.struct("campaign_id", "p1")
    known = chances.groupBy("user_id").agg(
        F.max(F.when(is_own, F.col("p1"))).alias("p1"),
        F.map_from_entries(F.collect_list(pair)).alias("target_probabilities"),
    )
    chance = F.coalesce("p1", F.lit(0.0))
    users = (
        eligible.select("user_id", "would_select", F.col("coupon_id").alias("held"))
        .join(known, "user_id", "left")
        .join(master, "user_id")
        .withColumns({"conversion_probability": chance, "score": chance})
        .withColumn("reason", F.lit(None).cast("string"))
        .drop("p1")
        .localCheckpoint()
    )
    offers = options.coupons(section)
    profits = [options.profit(coupon, section) for coupon in offers]
    is_chosen = F.coalesce("would_select", F.lit(False))
    sums = [F.count(F.lit(1)).alias("num_eligible"), F.count_if(is_chosen).alias("num_chosen")]
    for place, (coupon_id, profit) in enumerate(zip(options.coupon_ids(section), profits, strict=True)):
        is_held = is_chosen & F.col("held").eqNullSafe(coupon_id)
        sums += [
            F.count_if(is_held).alias(f"held_{place}"),
            F.sum(F.when(is_held, profit)).alias(f"chosen_{place}"),
            F.sum(profit).alias(f"all_{place}"),
        ]
    found = users.agg(*sums).collect()[0].asDict()
    places = range(len(offers))
    num_eligible = int(found["num_eligible"])
    chosen = sum(int(found[f"chosen_{place}"] or 0) for place in places) / MICRO
    random = sum(int(found[f"all_{p}"] or 0) * int(found[f"held_{p}"]) for p in places) / MICRO
    random = random / num_eligible if num_eligible else 0.0
    best, num_best = _best(users.drop("would_select", "held"), campaign_id, section)
    gain = best - random
    return {
        "num_eligible": num_eligible,
        "num_chosen": int(found["num_chosen"]),
        "num_best": num_best,
        "chosen_profit_amount": chosen,
        "best_profit_amount": best,
        "random_profit_amount": random,
        "share_of_best": chosen / best if best > 0 else None,
        "share_of_gain": (chosen - random) / gain if gain > 0 else None,
    }


def _best(users: DataFrame, campaign_id: str, section: SelectionConfig) -> tuple[float, int]:
    """Profit and size of the selection that the true chances lead to."""
    allocated = selection.allocate(users, campaign_id, section)
    decided = selection.with_decision(users, campaign_id, section, allocated)
    is_chosen = F.coalesce("would_select", F.lit(False))
    row = decided.agg(
        F.sum(F.when(is_chosen, F.col("value_micro"))).alias("value"),
        F.count_if(is_chosen).alias("num_users"),
    ).collect()[0]
    return int(row.value or 0) / MICRO, int(row.num_users)
