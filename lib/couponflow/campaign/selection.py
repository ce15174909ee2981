"""The budgeted choice: who gets the coupon, exactly within budget and list size, the same on every rerun.

Each eligible user has options (here one: the pooled coupon), each with a value and a cost in integer
micro-units of the currency, so that sums are exact whatever the order of rows. Options are taken in order of
priority (value per cost, or probability), ties by ``assignment.tie_key`` and then ``user_id``, and the first
that does not fit ends the list. With one option per user this is the greedy solution of the knapsack: it
loses less than the value of that first option left out, and never takes a worse user over a better one.
"""

import logging
from dataclasses import dataclass
from datetime import date
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from couponflow.campaign import assignment, eligibility
from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import tables
from couponflow.lake.erased import TOMBSTONE
from couponflow.sections import SelectionConfig

log = logging.getLogger("couponflow")

MICRO = 1_000_000
MAX_AMOUNT = 1_000_000_000_000  # in micro-units still far inside a bigint
_NANO = 1_000_000_000  # probabilities are summed in these units, so that sums are order-free

#: Reason -> label, in waterfall order after ``eligibility.REASONS``: why an eligible user is not mailed.
REASONS: dict[str, str] = {
    "value": "Not worth a mail",
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


def micro(amount: float) -> int:
    """An amount of the config in micro-units.

    Raises:
        ConfigError: it is infinite, or larger than ``MAX_AMOUNT``.
    """
    if not abs(amount) <= MAX_AMOUNT:
        raise ConfigError(
            f"section selection: amount {amount} is above {MAX_AMOUNT:,}; give a smaller one in the currency"
        )
    return round(amount * MICRO)


def with_option(users: DataFrame, campaign_id: str, section: SelectionConfig) -> DataFrame:
    """Add the one coupon option of each user: mail with the pooled coupon, against no mail.

    Grain: one row per ``user_id``, as given; ``conversion_probability`` p is null where unknown.
    Adds: ``coupon_id`` (null = pooled), ``cost_micro`` = mail + p * discount, ``value_micro`` =
        p * (margin - discount) - mail, ``priority`` double, ``tie`` text.
    Priority: value per cost for expected_profit (infinite where the cost is 0), else p.
    """
    probability = F.coalesce(F.col("conversion_probability"), F.lit(0.0))
    mail, discount = micro(section.mail_cost_amount), micro(section.discount_amount)
    gain = micro(section.margin_amount) - discount
    priced = (
        users.withColumn("coupon_id", F.lit(None).cast("string"))
        .withColumn("cost_micro", _times(probability, discount) + F.lit(mail).cast("bigint"))
        .withColumn("value_micro", _times(probability, gain) - F.lit(mail).cast("bigint"))
    )
    ratio = F.when(F.col("cost_micro") == 0, F.lit(float("inf"))).otherwise(
        F.col("value_micro").cast("double") / F.col("cost_micro").cast("double")
    )
    priority = ratio if section.objective == "expected_profit" else probability
    return priced.withColumn("priority", priority).withColumn(
        "tie", assignment.tie_key_column(campaign_id, F.col("user_id"))
    )


def select_users(options: DataFrame, section: SelectionConfig) -> DataFrame:
    """Take options in order until list size or budget is reached.

    Grain: one row per ``user_id``, as given; needs the columns of ``with_option``, the raw ``score`` and
    ``reason`` (null = eligible). Adds: ``rank`` (order of choice from 1; null outside the candidates),
    ``would_select``; fills ``reason`` of eligible users: value (no candidate), max_recipients, budget or
    selected.
    Candidates: positive value for expected_profit, p >= min_probability for threshold, else all eligible.
    Order: (priority desc, score desc, tie, user_id), total; a pure function of the rows, not of their
    partitions. An isotonic calibrator gives many users one probability: the raw score still tells them apart.
    Cost: a histogram of priority gives each bucket the count and cost before it; the exact running sums
    are taken inside the buckets, in parallel. Only the histogram (some thousand rows) meets in one task.
    """
    is_candidate = F.col("reason").isNull() & _is_candidate(section)
    marked = options.withColumn("is_candidate", is_candidate).withColumn("bucket", _bucket(F.col("priority")))
    candidates = marked.where("is_candidate")
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
    ranked = (
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


def with_decision(users: DataFrame, campaign_id: str, section: SelectionConfig) -> DataFrame:
    """Options, choice and arms of users with a reason; see ``with_option``, ``select_users``, ``with_arm``.

    A selected user who is withheld, and one who is mailed at random, gets the arm's name as his ``reason``.

    Raises:
        ConfigError: ``explore_share`` needs more than the budget or the list size.
    """
    options = with_option(users, campaign_id, section).withColumn("is_eligible", F.col("reason").isNull())
    chosen = select_users(options, _without_exploration(options, campaign_id, section))
    dealt = assignment.with_arm(chosen, campaign_id, section).drop("is_eligible")
    is_dealt = F.col("arm").isin(assignment.HOLDOUT, assignment.CONTROL, assignment.EXPLORE)
    return dealt.withColumn("reason", F.when(is_dealt, F.col("arm")).otherwise(F.col("reason")))


def _without_exploration(options: DataFrame, campaign_id: str, section: SelectionConfig) -> SelectionConfig:
    """The limits that are left to the selection once every eligible user drawn for exploration is paid for.

    Who is drawn and then selected on his merits is paid for twice, so the list stays within its limits and
    may fall short of them by that. Costs a pass over the users where ``explore_share`` is above 0.
    """
    if not section.explore_share:
        return section
    is_drawn = F.col("is_eligible") & assignment.is_drawn(campaign_id, F.col("user_id"), section)
    found = (
        options.where(is_drawn)
        .agg(F.count(F.lit(1)).alias("num_users"), _exact_sum("cost_micro").alias("cost"))
        .collect()[0]
    )
    num_left = section.max_recipients - int(found.num_users)
    left_micro = micro(section.budget_amount) - int(found.cost or 0)
    if num_left < 0 or left_micro < 0:
        raise ConfigError(
            f"campaign {campaign_id}: selection.explore_share = {section.explore_share} draws "
            f"{found.num_users} users for {int(found.cost) / MICRO:.2f}, above max_recipients "
            f"{section.max_recipients} or budget_amount {section.budget_amount}; lower it"
        )
    return section.model_copy(update={"max_recipients": num_left, "budget_amount": left_micro / MICRO})


def summarise(decided: DataFrame, decision: Decision, snapshot: eligibility.Snapshot) -> dict[str, Any]:
    """The facts of a selection: waterfall, forecast of the mailed users, binding constraint, shadow price.

    Raises:
        DataError: a user has no reason of the closed list, or the counts do not add up.
    """
    section = decision.section
    sums = decided.groupBy("reason").agg(
        F.count(F.lit(1)).alias("num_users"),
        _exact_sum("cost_micro").alias("cost"),
        _exact_sum("value_micro").alias("value"),
        F.sum(_times(F.coalesce("conversion_probability", F.lit(0.0)), _NANO)).alias("conversions"),
        F.min(F.when(F.col("rank").isNotNull(), F.struct("rank", "value_micro", "cost_micro"))).alias(
            "first"
        ),
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
    constraint, price = _binding(rows)
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
    }


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
    for reason in ("value", "max_recipients", "budget"):
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


def ledger_rows(decided: DataFrame, decision: Decision, run_id: str) -> DataFrame:
    """Rows of ``assignments``: every user of the master, mailed or not. Probability 0 where none is known."""
    return decided.select(
        F.lit(decision.campaign_id).alias("campaign_id"),
        F.lit(decision.version).alias("version"),
        "user_id",
        F.lit(decision.run_date).alias("run_date"),
        F.col("arm").isin(assignment.TREAT, assignment.CONTROL, assignment.HOLDOUT).alias("would_select"),
        "arm",
        "propensity",
        "reason",
        F.coalesce("conversion_probability", F.lit(0.0)).alias("conversion_probability"),
        F.lit(run_id).alias("run_id"),
        F.lit(None).cast("timestamp").alias("exposure_time"),
    )


def audience_rows(decided: DataFrame, decision: Decision) -> DataFrame:
    """Rows of ``audience``: the users to mail and nobody else; rank 0 is mailed at random, not chosen."""
    is_explored = F.col("arm") == assignment.EXPLORE
    return decided.where(F.col("arm").isin(*assignment.MAILED)).select(
        F.lit(decision.campaign_id).alias("campaign_id"),
        F.lit(decision.version).alias("version"),
        "user_id",
        "coupon_id",
        "conversion_probability",
        (F.col("value_micro").cast("double") / MICRO).alias("expected_value_amount"),
        F.when(is_explored, 0).otherwise(F.col("rank")).cast("bigint").alias("rank"),
    )


def publish(
    decided: DataFrame, root_uri: str, decision: Decision, run_id: str, is_final: bool
) -> dict[str, int]:
    """Write the ledger, then the audience of a version; returns the rows of each.

    The ledger only grows: a rerun with the same content writes nothing and keeps what is known about
    exposure. A version that is ``is_final`` (approved or handed over) cannot change any more; one from which
    people were erased since stays as it is, as its inputs are no longer those that it was decided on.

    Raises:
        ConflictError: the rows of a final version would change.
    """
    if is_final and (kept := _kept_after_erasure(decided, root_uri, decision)):
        return kept
    frames = {
        "assignments": ledger_rows(decided, decision, run_id),
        "audience": audience_rows(decided, decision),
    }
    return {
        table: _publish(rows, root_uri, table, decision, run_id, is_final) for table, rows in frames.items()
    }


def _kept_after_erasure(decided: DataFrame, root_uri: str, decision: Decision) -> dict[str, int]:
    """Rows of a version in ledger and audience if an erasure has left a tombstone there; else nothing."""
    frames = {
        table: tables.read_or_empty(decided.sparkSession, root_uri, table).where(
            (F.col("campaign_id") == decision.campaign_id) & (F.col("version") == decision.version)
        )
        for table in ("assignments", "audience")
    }
    if frames["assignments"].where(F.col("user_id").startswith(TOMBSTONE)).isEmpty():
        return {}
    return {table: frame.count() for table, frame in frames.items()}


def _publish(
    rows: DataFrame, root_uri: str, table: str, decision: Decision, run_id: str, is_final: bool
) -> int:
    found = tables.read_or_empty(rows.sparkSession, root_uri, table).where(
        (F.col("campaign_id") == decision.campaign_id) & (F.col("version") == decision.version)
    )
    content = [name for name in found.columns if name not in ("run_id", "exposure_time")]
    num_found = found.count()
    if num_found and tables.content_hash(found.select(*content)) == tables.content_hash(
        rows.select(*content)
    ):
        return num_found
    if num_found and is_final:
        raise ConflictError(
            f"table {table}, campaign {decision.campaign_id}, version {decision.version}: approved or handed "
            "over, but its inputs have changed since; recall it, or decide under other rules"
        )
    return tables.overwrite(
        rows, root_uri, table, run_id=run_id, campaign_id=decision.campaign_id, version=decision.version
    )


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


def _is_candidate(section: SelectionConfig) -> Column:
    match section.objective:
        case "expected_profit":
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


def _times(share: Column, amount: int) -> Column:
    """``share * amount`` as a whole number, halves up; the same in every engine."""
    return F.floor(share * F.lit(float(amount)) + 0.5).cast("bigint")
