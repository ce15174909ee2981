"""What a campaign will be able to show, before anybody is mailed: a selection without its writes, and power.

The base rate is what a user orders without the mail. The last campaign of the same type that had a control
measured it; before there is one, the predictions of the day stand in for it. They are chances with the mail,
so the smallest effect comes out somewhat too large (below one half), never too small.
"""

import math
from dataclasses import dataclass
from datetime import date
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow.campaign import candidates
from couponflow.campaign.readouts import effects, power, readout, settled
from couponflow.campaigning import SelectionConfig
from couponflow.config import Config
from couponflow.errors import DataError
from couponflow.lake import tables
from couponflow.sequences import conversions

#: What a plan repeats of the selection's own facts.
_FACTS = (
    "campaign_id",
    "run_date",
    "model_version",
    "selected_users",
    "mailed_users",
    "control_users",
    "holdout_users",
    "binding_constraint",
    "expected_conversions",
    "expected_conversions_interval",
    "expected_cost_amount",
    "expected_cost_amount_interval",
    "expected_profit_amount",
    "expected_profit_amount_interval",
    "forecast_words",
)


@dataclass(frozen=True)
class Base:
    """Conversion rate without mail, where it comes from, and the spread of what a user pays if known."""

    rate: float
    source: str
    revenue_deviation: float | None = None


def plan(
    spark: SparkSession, config: Config, campaign_id: str, day: date, base_rate: float, wanted_effect: float
) -> dict[str, Any]:
    """Decide as select_audience would on this day, write nothing, and say what could be shown.

    ``base_rate`` 0: from the last readout of the campaign's type, else from the predictions.
    ``wanted_effect`` 0: none is asked about.

    Raises:
        DataError: as the selection; or nobody would be selected.
    """
    facts = _selected(spark, config, campaign_id, day)
    if base_rate:
        base = Base(base_rate, "as given")
    else:
        base = _known_base(spark, config, campaign_id, day) or predicted_base(facts)
    return forecast(facts, base, config.selection, wanted_effect)


def _selected(spark: SparkSession, config: Config, campaign_id: str, day: date) -> dict[str, Any]:
    with candidates.decided(candidates.read(spark, config, campaign_id, day)) as (_, facts):
        return facts


def _known_base(spark: SparkSession, config: Config, campaign_id: str, day: date) -> Base | None:
    campaigns = tables.read(spark, config.lake.root_uri, "campaigns")
    mine = conversions.latest_campaigns(campaigns).where(F.col("campaign_id") == campaign_id)
    row = mine.select("campaign_type").first()
    found = None
    if row is not None:
        found = settled.last_of_type(config.lake.root_uri, str(row["campaign_type"]), day.isoformat())
    return None if found is None else measured_base(found)


def measured_base(record: dict[str, Any]) -> Base | None:
    """The rate of the withheld users of a readout; None if none or all of them ordered, which is no rate."""
    withheld = record["arms"][effects.WITHHELD]
    rate = float(withheld["conversion_rate"])
    source = f"withheld users of campaign {record['campaign_id']}, version {record['version']}"
    return Base(rate, source, withheld["revenue_deviation"]) if 0.0 < rate < 1.0 else None


def predicted_base(facts: dict[str, Any]) -> Base:
    """The mean prediction of the users who would be mailed.

    Raises:
        DataError: nobody would be.
    """
    if not facts["mailed_users"]:
        raise DataError(
            f"campaign {facts['campaign_id']}, {facts['run_date']}: nobody would be mailed (bound by "
            f"{facts['binding_constraint']}); change [selection], or give --base-rate"
        )
    rate = facts["expected_conversions"] / facts["mailed_users"]
    return Base(rate, f"predictions of {facts['run_date']} by {facts['model_version']}")


def forecast(
    facts: dict[str, Any], base: Base, section: SelectionConfig, wanted_effect: float
) -> dict[str, Any]:
    """What the arms of a selection can show. None: there is no such effect, for want of users or control.

    ``break_even_effect`` d pays for the mail: d margin = mail + (base + d) discount; of several coupons the
    amounts are those of an expected conversion of the mailed users.
    """
    margin, discount = _amounts(facts, section)
    num_withheld = facts["control_users"] + facts["holdout_users"]
    arms = power.Arms(facts["mailed_users"], num_withheld)
    smallest = _known(power.smallest_rate_effect(base.rate, arms))
    gain = margin - discount
    cost = section.mail_cost_amount + base.rate * discount
    withheld_share = 1.0 - (1.0 - section.holdout_share) * (1.0 - section.control_share)
    return {
        **{name: facts[name] for name in _FACTS},
        "control_share": section.control_share,
        "withheld_users": num_withheld,
        "base_rate": base.rate,
        "base_rate_source": base.source,
        "smallest_effect": smallest,
        "smallest_lift": None if smallest is None else smallest / base.rate,
        "smallest_margin_amount": None if smallest is None else smallest * margin,
        "smallest_margin_total_amount": None if smallest is None else smallest * margin * arms.num_treat,
        "smallest_revenue_amount": None
        if base.revenue_deviation is None
        else _known(power.smallest_mean_effect(base.revenue_deviation, arms)),
        "break_even_effect": cost / gain if gain > 0.0 else None,
        "wanted_effect": wanted_effect or None,
        "wanted_effect_power": _known(power.rate_power(wanted_effect, base.rate, arms))
        if wanted_effect
        else None,
        "wanted_effect_users": power.users_for_rate(wanted_effect, base.rate, withheld_share)
        if wanted_effect and withheld_share
        else None,
        "words": _words(arms, smallest),
    }


def _amounts(facts: dict[str, Any], section: SelectionConfig) -> tuple[float, float]:
    """Margin and discount of an expected conversion."""
    number, cost = facts["expected_conversions"], facts["expected_cost_amount"]
    if not section.coupons or not number:
        return section.margin_amount, section.discount_amount
    discount = (cost - section.mail_cost_amount * facts["mailed_users"]) / number
    if section.objective == "incremental_profit":  # its profit counts another margin
        return section.margin_amount, discount
    return (facts["expected_profit_amount"] + cost) / number, discount


def _words(arms: power.Arms, smallest: float | None) -> str:
    if not arms.num_withheld:
        return "Nobody is withheld, so what the mail causes will never be known; set --control-share above 0."
    if min(arms.num_treat, arms.num_withheld) < readout.MIN_USERS:
        return (
            f"An arm has fewer than {readout.MIN_USERS} users, so a readout will be refused; mail more users "
            "or withhold a larger share."
        )
    if smallest is None:
        return "No effect could be shown at this size; mail more users or withhold a larger share."
    return (
        f"An effect of {smallest * 100:.2f} points or more is shown in 4 of 5 campaigns like this; a smaller "
        "one will mostly stay hidden."
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
