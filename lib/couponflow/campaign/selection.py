"""The budgeted choice: who gets the coupon, exactly within budget and list size, the same on every rerun.

Each eligible user has options, each with a value and a cost in integer micro-units of the currency, so that
sums are exact whatever the order of rows. With one option per user, the pooled coupon, options are taken in
order of priority (value per cost, or probability), ties by ``assignment.tie_key`` and then ``user_id``, and
the first that does not fit ends the list: the greedy solution of the knapsack, which loses less than the
value of that first option left out and never takes a worse user over a better one. With coupons or segments
in the config, ``allocation`` solves the multiple-choice knapsack, and this module books what it chose.
"""

import logging
from dataclasses import dataclass
from datetime import date
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from couponflow.campaign import eligibility, forecasting
from couponflow.campaign.choice import allocation, assignment, exploration, options
from couponflow.campaign.choice.options import MICRO, micro
from couponflow.campaigning import SelectionConfig
from couponflow.errors import DataError

log = logging.getLogger("couponflow")

_NANO = 1_000_000_000  # probabilities are summed in these units, so that sums are order-free

#: Reason -> label, in waterfall order after ``eligibility.REASONS``: why an eligible user is not mailed.
REASONS: dict[str, str] = {
    "value": "Not worth a mail",
    "stock": "Coupons used up",
    "segment_max": "Segment full",
    "max_recipients": "List size reached",
    "budget": "Budget used up",
    "holdout": "Withheld: global holdout",
    "control": "Withheld: campaign control",
    "explore": "Mailed at random",
    "selected": "Mailed",
}
#: Per octave, 177 buckets: fine enough that a bucket holds a small share of the users.
_BUCKETS_PER_E = 256


@dataclass(frozen=True)
class Decision:
    """What is being decided, and by which rules."""

    campaign_id: str
    version: str
    run_date: date
    model_version: str
    section: SelectionConfig

    @classmethod
    def of(
        cls, campaign_id: str, run_date: date, model_version: str, section: SelectionConfig, rules: str
    ) -> "Decision":
        """The decision of a day; ``rules`` is the fingerprint of ``section``: other rules, other version."""
        version = f"{run_date}-{model_version}-{rules[:6]}"
        return cls(campaign_id, version, run_date, model_version, section)


def with_option(users: DataFrame, campaign_id: str, section: SelectionConfig) -> DataFrame:
    """Add the one coupon option of each user: mail with the pooled coupon, against no mail.

    Grain: one row per ``user_id``, as given; ``conversion_probability`` p is null where unknown.
    Adds: ``coupon_id`` (null = pooled), ``cost_micro``, ``value_micro`` of ``options``, ``priority`` double,
        ``tie`` text.
    Priority: value per cost for a profit (infinite where the cost is 0), else p.

    Raises:
        ConfigError: the users lack what the objective is computed from.
    """
    options.check_scores(users, section)
    (pooled,) = options.coupons(section)
    priced = (
        users.withColumn("coupon_id", F.lit(None).cast("string"))
        .withColumn("cost_micro", options.cost(pooled, section))
        .withColumn("value_micro", options.profit(pooled, section))
    )
    ratio = F.when(F.col("cost_micro") == 0, F.lit(float("inf"))).otherwise(
        F.col("value_micro").cast("double") / F.col("cost_micro").cast("double")
    )
    priority = ratio if section.objective in options.PROFITS else options.probability(pooled)
    return priced.withColumn("priority", priority).withColumn(
        "tie", assignment.tie_key_column(campaign_id, F.col("user_id"))
    )


def select_users(priced: DataFrame, section: SelectionConfig) -> DataFrame:
    """Take options in order until list size or budget is reached.

    Grain: one row per ``user_id``, as given; needs the columns of ``with_option``, the raw ``score`` and
    ``reason`` (null = eligible). Adds: ``rank`` (order of choice from 1; null outside the candidates),
    ``would_select``; fills ``reason`` of eligible users: value (no candidate), max_recipients, budget or
    selected.
    Candidates: positive value for a profit, p >= min_probability for threshold, else all eligible.
    Order: (priority desc, score desc, tie, user_id), total; a pure function of the rows, not of their
    partitions. An isotonic calibrator gives many users one probability: the raw score still tells them apart.
    Cost: a histogram of priority gives each bucket the count and cost before it; the exact running sums
    are taken inside the buckets, in parallel. Only the histogram (some thousand rows) meets in one task.
    """
    is_candidate = F.col("reason").isNull() & _is_candidate(section)
    marked = priced.withColumn("is_candidate", is_candidate).withColumn("bucket", _bucket(F.col("priority")))
    ranked = _in_order(marked.where("is_candidate"))
    # Both grow along the order, so each condition holds for a prefix of it.
    within_size = F.col("rank") <= section.max_recipients
    within_budget = F.col("running_micro") <= micro(section.budget_amount)
    outcome = (
        F.when(F.col("reason").isNotNull(), F.col("reason"))
        .when(within_size & within_budget, "selected")  # nothing but a proof selects
        .when(~F.col("is_candidate"), "value")
        .when(~within_size, "max_recipients")
        .when(~within_budget, "budget")
    )
    return (
        marked.join(ranked, "user_id", "left")
        .withColumn("reason", outcome)
        .withColumn("would_select", F.col("reason") == "selected")
        .drop("is_candidate", "bucket", "running_micro")
    )


def _in_order(candidates: DataFrame) -> DataFrame:
    """``rank`` and ``running_micro``, the cost up to it, of each ``user_id`` in order of priority."""
    before = Window.orderBy(F.desc("bucket")).rowsBetween(Window.unboundedPreceding, -1)
    histogram = candidates.groupBy("bucket").agg(
        F.count(F.lit(1)).alias("num_users"), _exact_sum("cost_micro").alias("bucket_cost")
    )
    offsets = histogram.select(
        "bucket",
        F.coalesce(F.sum("num_users").over(before), F.lit(0)).alias("num_before"),
        F.coalesce(_exact_sum("bucket_cost").over(before), F.lit(0)).alias("cost_before"),
    )
    inside = Window.partitionBy("bucket").orderBy(F.desc("priority"), F.desc("score"), "tie", "user_id")
    so_far = inside.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    return (
        candidates.select("user_id", "bucket", "priority", "score", "tie", "cost_micro")
        .withColumn("rank", F.row_number().over(inside))
        .withColumn("running_micro", _exact_sum("cost_micro").over(so_far))
        .join(F.broadcast(offsets), "bucket")
        .select(
            "user_id",
            (F.col("rank") + F.col("num_before")).alias("rank"),
            (F.col("running_micro") + F.col("cost_before")).alias("running_micro"),
        )
    )


def allocate(users: DataFrame, campaign_id: str, section: SelectionConfig) -> allocation.Allocation | None:
    """The choice among coupons and under limits on segments, made at once; None where there are none.

    Raises:
        ConfigError: the users lack what the objective is computed from, a segment's condition is wrong, or
            ``explore_share`` needs more than a limit allows.
        DataError: a segment cannot get its minimum.
    """
    if not section.coupons and not section.segments:
        return None
    options.check_scores(users, section)
    left = exploration.left_over(users, campaign_id, section)
    return allocation.allocate(options.option_columns(users, campaign_id, section), options.limits(left))


def with_allocation(
    users: DataFrame, campaign_id: str, section: SelectionConfig, allocated: allocation.Allocation
) -> DataFrame:
    """Add to each user what the allocation gives him, in the columns of ``select_users``.

    Grain: one row per ``user_id``, as given. ``conversion_probability`` becomes that of a mail with the
    chosen coupon. Rank: (value per cost of the chosen option desc, score desc, tie, user_id) among the
    selected; null for everybody else, whose cost and value are null as well.
    """
    known = users.join(allocated.choices.withColumnRenamed("reason", "barrier"), "user_id", "left")
    nothing = {
        "coupon_id": F.lit(None).cast("string"),
        "cost_micro": F.lit(None).cast("bigint"),
        "value_micro": F.lit(None).cast("bigint"),
        "conversion_probability": F.col("conversion_probability"),
    }
    priced = (
        known.withColumns(options.mail_columns(F.col("option"), section, nothing))
        .withColumn("tie", assignment.tie_key_column(campaign_id, F.col("user_id")))
        .withColumn("would_select", F.coalesce(F.col("option") >= 0, F.lit(False)))
    )
    ratio = F.when(F.col("cost_micro") == 0, F.lit(float("inf"))).otherwise(
        F.col("value_micro").cast("double") / F.col("cost_micro").cast("double")
    )
    ranked = priced.withColumn("priority", ratio).withColumn("bucket", _bucket(F.col("priority")))
    order = _in_order(ranked.where("would_select")).select("user_id", "rank")
    reason = F.when(F.col("would_select"), "selected").otherwise(F.coalesce("reason", "barrier"))
    return (
        ranked.join(order, "user_id", "left").withColumn("reason", reason).drop("option", "barrier", "bucket")
    )


def with_decision(
    users: DataFrame,
    campaign_id: str,
    section: SelectionConfig,
    allocated: allocation.Allocation | None = None,
) -> DataFrame:
    """Choice and arms of users with a reason; see ``select_users``, ``with_allocation``, ``with_arm``.

    ``allocated`` is what ``allocate`` has made of the same users. A selected user who is withheld, and one
    who is mailed at random, gets the arm's name as his ``reason``.

    Raises:
        ConfigError: ``explore_share`` needs more than the budget or the list size.
    """
    marked = users.withColumn("is_eligible", F.col("reason").isNull())
    if allocated is None:
        priced = with_option(marked, campaign_id, section)
        chosen = select_users(priced, exploration.left_over(users, campaign_id, section))
    else:
        chosen = with_allocation(marked, campaign_id, section, allocated)
    dealt = assignment.with_arm(chosen, campaign_id, section).drop("is_eligible")
    if allocated is not None and section.explore_share:
        dealt = exploration.with_drawn_coupon(dealt, campaign_id, section)
    is_dealt = F.col("arm").isin(assignment.HOLDOUT, assignment.CONTROL, assignment.EXPLORE)
    return dealt.withColumn("reason", F.when(is_dealt, F.col("arm")).otherwise(F.col("reason")))


def summarise(
    decided: DataFrame,
    decision: Decision,
    snapshot: eligibility.Snapshot,
    allocated: allocation.Allocation | None = None,
) -> dict[str, Any]:
    """The facts of a selection: waterfall, forecast of the mailed users with intervals, binding constraint,
    shadow price.

    With an allocation also ``shadow_prices`` of all limits, ``dual_bound`` (in the unit of the objective: the
    currency, or conversions) and ``gap_share``, the share of it that was not reached.

    Raises:
        DataError: a user has no reason of the closed list, or the counts do not add up.
    """
    section = decision.section
    sums = decided.groupBy("reason").agg(
        F.count(F.lit(1)).alias("num_users"),
        _exact_sum("cost_micro").alias("cost"),
        _exact_sum("value_micro").alias("value"),
        F.sum(options.times(F.coalesce("conversion_probability", F.lit(0.0)), _NANO)).alias("conversions"),
        F.min(F.when(F.col("rank").isNotNull(), F.struct("rank", "value_micro", "cost_micro"))).alias(
            "first"
        ),
        *forecasting.spread_columns(section),
    )
    rows = {str(row.reason): row for row in sums.collect()}
    counts = {reason: int(row.num_users) for reason, row in rows.items()}
    mailed = [rows[name] for name in ("selected", "explore") if name in rows]
    arms = {"treat": "selected", "control": "control", "holdout": "holdout"}
    sizes = {arm: counts.get(reason, 0) for arm, reason in arms.items()}
    p_value = assignment.srm_p_value(sizes, section)
    if p_value < assignment.SRM_LIMIT:
        log.warning(
            "campaign %s: treat, control and holdout are %s, not as their shares say (p = %.1e); do not "
            "compare them before this is understood",
            decision.campaign_id,
            sizes,
            p_value,
        )
    constraint, price = _binding(rows) if allocated is None else _dearest(rows, section, allocated)
    selected = [rows[name] for name in ("selected", "control", "holdout") if name in rows]
    return {
        "campaign_id": decision.campaign_id,
        "version": decision.version,
        "run_date": decision.run_date.isoformat(),
        "model_version": decision.model_version,
        "objective": section.objective,
        "num_users": sum(counts.values()),
        "waterfall": waterfall(counts),
        "budget_amount": section.budget_amount,
        "expected_cost_amount": sum(int(row.cost) for row in mailed) / MICRO,
        "expected_conversions": sum(int(row.conversions) for row in mailed) / _NANO,
        "expected_profit_amount": sum(int(row.value) for row in mailed) / MICRO,
        "selected_cost_amount": sum(int(row.cost) for row in selected) / MICRO,
        "binding_constraint": constraint,
        "shadow_price": price,
        "selected_users": sum(int(row.num_users) for row in selected),
        "control_users": counts.get("control", 0),
        "holdout_users": counts.get("holdout", 0),
        "explore_users": counts.get("explore", 0),
        "mailed_users": sum(int(row.num_users) for row in mailed),
        "srm_p_value": p_value,
        "consent_source": snapshot.source,
        "consent_snapshot_date": snapshot.snapshot_date.isoformat(),
        **forecasting.intervals_of([row.asDict() for row in mailed], section),
    } | ({} if allocated is None else _solution_facts(section, allocated))


def waterfall(counts: dict[str, int]) -> list[dict[str, Any]]:
    """From the user master to the mailed users, one step per reason; adds up exactly.

    Raises:
        DataError: a reason outside the closed lists, or users without one.
    """
    unknown = set(counts) - set(eligibility.REASONS) - set(REASONS)
    if unknown:
        raise DataError(
            f"waterfall: users with reason {sorted(unknown)[0]!r}, which is not in the closed list"
        )
    remaining = sum(counts.values())
    steps = [{"reason": "user_master", "label": "User master", "excluded": 0, "remaining": remaining}]

    def exclude(reason: str, label: str) -> None:
        nonlocal remaining
        remaining -= counts.get(reason, 0)
        steps.append(
            {"reason": reason, "label": label, "excluded": counts.get(reason, 0), "remaining": remaining}
        )

    def milestone(reason: str, label: str) -> None:
        steps.append({"reason": reason, "label": label, "excluded": 0, "remaining": remaining})

    for reason, label in eligibility.REASONS.items():
        exclude(reason, label)
    milestone("eligible", "Eligible")
    for reason in ("value", "stock", "segment_max", "max_recipients", "budget"):
        exclude(reason, REASONS[reason])
    num_explored = counts.get("explore", 0)
    milestone("would_select", "Selected, or drawn at random" if num_explored else "Selected")
    for reason in ("holdout", "control"):
        exclude(reason, REASONS[reason])
    milestone("mailed", REASONS["selected"])
    num_mailed = counts.get("selected", 0) + num_explored
    if remaining != num_mailed:
        raise DataError(f"waterfall: {remaining} users remain, {num_mailed} are mailed")
    return steps


def _binding(rows: dict[str, Any]) -> tuple[str, float]:
    """What ended the list, and the gain from one more unit of it, at the first user left out.

    For the budget a unit is one of currency: value per cost. For the list size it is one recipient: value.
    """
    cut = {name: rows[name].first for name in ("max_recipients", "budget") if name in rows}
    if cut:
        name = min(cut, key=lambda reason: int(cut[reason]["rank"]))
        first = cut[name]
        if name == "budget":
            return name, int(first["value_micro"]) / int(first["cost_micro"])
        return name, int(first["value_micro"]) / MICRO
    return ("value", 0.0) if "value" in rows else ("none", 0.0)


def _dearest(
    rows: dict[str, Any], section: SelectionConfig, allocated: allocation.Allocation
) -> tuple[str, float]:
    """The limit that is worth most at its shadow price, and the gain from one more unit of it.

    Where no limit has a price, the first one that left a user out. Objectives without money have no gain.
    """
    limits, prices = allocated.limits, allocated.prices
    worth = {"budget": (prices.budget * limits.budget, prices.budget)}
    for unit, price in zip(limits.units, prices.units, strict=True):
        if price > 0:
            worth[unit.kind] = max(worth.get(unit.kind, (0.0, 0.0)), (price * unit.maximum, price / MICRO))
    name = max(worth, key=lambda kind: worth[kind])
    if worth[name][0] > 0:
        return name, worth[name][1] if section.objective in options.PROFITS else 0.0
    left_out = ("stock", "segment_max", "max_recipients", "budget", "value")
    return next((reason for reason in left_out if reason in rows), "none"), 0.0


def _solution_facts(section: SelectionConfig, allocated: allocation.Allocation) -> dict[str, Any]:
    """How good the choice is: prices, bound and gap."""
    limits, prices = allocated.limits, allocated.prices
    unit_size = MICRO if section.objective in options.PROFITS else MICRO * MICRO
    named = {
        f"{unit.kind} {unit.name}".strip(): price / unit_size
        for unit, price in zip(limits.units, prices.units, strict=True)
    }
    return {
        "shadow_prices": {"budget": prices.budget * (MICRO / unit_size)} | named,
        "dual_bound": allocated.bound / unit_size,
        "gap_share": (allocated.bound - allocated.value) / allocated.bound if allocated.bound > 0 else 0.0,
    }


def _is_candidate(section: SelectionConfig) -> Column:
    match section.objective:
        case "expected_profit" | "incremental_profit":
            return F.col("value_micro") > 0
        case "threshold":
            return F.col("conversion_probability") >= section.min_probability
        case "top_k":
            return F.lit(True)


def _bucket(priority: Column) -> Column:
    """A coarse number that never falls when the priority grows; all the choice needs of it."""
    return (
        F.when(priority == float("inf"), 1 << 30)
        .when(priority <= 0.0, -(1 << 30))
        .otherwise(F.floor(F.log(priority) * _BUCKETS_PER_E))
        .cast("bigint")
    )


def _exact_sum(name: str) -> Column:
    """Sum of whole numbers that cannot wrap round, as a bigint's would without a word."""
    return F.sum(F.col(name).cast("decimal(38,0)"))
