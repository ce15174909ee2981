"""What each user may be given, and under which limits: the coupons and segments of the config as options.

An option is a coupon with its value and cost for one user, in whole micro-units. Without coupons there is
one option, the pooled coupon.
"""

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.campaign.choice import assignment, pricing
from couponflow.campaigning import CouponOption, SegmentLimit, SelectionConfig
from couponflow.errors import ConfigError

MICRO = 1_000_000
MAX_AMOUNT = 1_000_000_000_000  # in micro-units still far inside a bigint
#: The objectives of a profit, as opposed to those of a probability.
PROFITS = ("expected_profit", "incremental_profit")


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


def times(share: Column, amount: int) -> Column:
    """``share * amount`` as a whole number, halves up; the same in every engine."""
    return F.floor(share * F.lit(float(amount)) + 0.5).cast("bigint")


def coupons(section: SelectionConfig) -> tuple[CouponOption, ...]:
    """The coupons to choose from; the pooled one, whose id is null in tables, stands for none listed."""
    return section.coupons or (CouponOption(coupon_id="pooled", discount_amount=section.discount_amount),)


def probability(coupon: CouponOption) -> Column:
    """P(conversion given a mail with this coupon), for its target; 0 where unknown."""
    of_target = F.col("conversion_probability")
    if coupon.target_id:
        of_target = F.col("target_probabilities").getItem(coupon.target_id)
    known = F.coalesce(of_target, F.lit(0.0))
    return known if coupon.response_scale == 1.0 else F.least(known * coupon.response_scale, F.lit(1.0))


def coupon_ids(section: SelectionConfig) -> list[Column]:
    """The id of each of the ``coupons`` as tables name it: null for the pooled one."""
    ids = (coupon.coupon_id if section.coupons else None for coupon in coupons(section))
    return [F.lit(coupon_id).cast("string") for coupon_id in ids]


def margin_amount(coupon: CouponOption, section: SelectionConfig) -> float:
    """Margin of a conversion with this coupon, before its discount."""
    return section.margin_amount if coupon.margin_amount is None else coupon.margin_amount


def cost(coupon: CouponOption, section: SelectionConfig) -> Column:
    """Expected cost of a mail with this coupon in micro-units: mail + p * discount."""
    mail = F.lit(micro(section.mail_cost_amount)).cast("bigint")
    return times(probability(coupon), micro(coupon.discount_amount)) + mail


def profit(coupon: CouponOption, section: SelectionConfig) -> Column:
    """Expected profit of a mail with this coupon in micro-units.

    expected_profit and the objectives without money: p * (margin - discount) - mail. incremental_profit:
    uplift * margin - p * discount - mail, as who would have bought anyway redeems the coupon all the same;
    without a score of his uplift a user is worth nothing.
    """
    discount, mail = micro(coupon.discount_amount), F.lit(micro(section.mail_cost_amount)).cast("bigint")
    margin = micro(margin_amount(coupon, section))
    if section.objective != "incremental_profit":
        return times(probability(coupon), margin - discount) - mail
    caused = F.coalesce(F.col("uplift"), F.lit(0.0)) * coupon.response_scale
    return times(F.least(caused, F.lit(1.0)), margin) - times(probability(coupon), discount) - mail


def of_place(place: Column, values: list[Column], otherwise: Column) -> Column:
    """The value at a user's place among the coupons; ``otherwise`` where the place is none of theirs."""
    found = otherwise
    for number, value in enumerate(values):
        found = F.when(place == number, value).otherwise(found)
    return found


def mail_columns(place: Column, section: SelectionConfig, otherwise: dict[str, Column]) -> dict[str, Column]:
    """What a mail with the coupon at a place is: its id, cost and value, and P(conversion given it).

    ``otherwise`` names the columns, ``coupon_id``, ``cost_micro``, ``value_micro`` and
    ``conversion_probability``, with their values where there is no such coupon.
    """
    offers = coupons(section)
    values = {
        "coupon_id": coupon_ids(section),
        "cost_micro": [cost(coupon, section) for coupon in offers],
        "value_micro": [profit(coupon, section) for coupon in offers],
        "conversion_probability": [probability(coupon) for coupon in offers],
    }
    return {name: of_place(place, values[name], column) for name, column in otherwise.items()}


def check_scores(users: DataFrame, section: SelectionConfig) -> None:
    """Make sure that the users carry what the objective is computed from.

    Raises:
        ConfigError: incremental_profit without uplift scores.
    """
    if section.objective == "incremental_profit" and "uplift" not in users.columns:
        raise ConfigError(
            "section selection: objective incremental_profit needs uplift scores, and the predictions "
            "have none; set selection.objective = 'expected_profit'"
        )


def limits(section: SelectionConfig) -> pricing.Limits:
    """Budget, list size, stock of each coupon and segments, in this order."""
    offers = coupons(section)
    every = (True,) * len(offers)
    units = [pricing.UnitLimit("max_recipients", "", every, section.max_recipients)]
    for place, coupon in enumerate(offers):
        if coupon.stock is not None:
            only = tuple(place == other for other in range(len(offers)))
            units.append(pricing.UnitLimit("stock", coupon.coupon_id, only, coupon.stock))
    for segment in section.segments:
        most = pricing.NO_LIMIT if segment.max_recipients is None else segment.max_recipients
        units.append(
            pricing.UnitLimit("segment_max", segment.name, every, most, minimum=segment.min_recipients)
        )
    return pricing.Limits(micro(section.budget_amount), tuple(units))


def option_columns(users: DataFrame, campaign_id: str, section: SelectionConfig) -> DataFrame:
    """The eligible users with what the knapsack needs of each.

    Grain: one row per ``user_id`` with ``reason`` null. Columns: ``user_id``, ``tie``, ``value_j`` and
        ``cost_j`` of option j (bigint, micro-units; a probability counts in millionths of a millionth),
        ``offered`` and ``segments``: bit j, or bit g, is set where option j is offered, or the user is in
        segment g.
    Rule: a profit is the value of an option, else its probability. threshold offers no option below
        min_probability.

    Raises:
        ConfigError: the condition of a segment cannot be evaluated over these users.
    """
    offers = coupons(section)
    values = [
        profit(coupon, section) if section.objective in PROFITS else times(probability(coupon), MICRO * MICRO)
        for coupon in offers
    ]
    least = section.min_probability if section.objective == "threshold" else 0.0
    offered = _bits([probability(coupon) >= least for coupon in offers])
    columns = [value.alias(f"value_{j}") for j, value in enumerate(values)]
    columns += [cost(coupon, section).alias(f"cost_{j}") for j, coupon in enumerate(offers)]
    eligible = users.where(F.col("reason").isNull())
    inside = _bits([condition(eligible, segment) for segment in section.segments])
    tie = assignment.tie_key_column(campaign_id, F.col("user_id"))
    return eligible.select(
        "user_id", tie.alias("tie"), *columns, offered.alias("offered"), inside.alias("segments")
    )


def condition(users: DataFrame, segment: SegmentLimit) -> Column:
    """Whether a user is of a segment; false where that is unknown.

    The text has to be a condition as it stands, and in parentheses.

    Raises:
        ConfigError: it cannot be evaluated over these users.
    """
    try:
        users.select(F.expr(segment.where).cast("boolean"))
        inside = F.expr(f"({segment.where})").cast("boolean")
        users.select(inside)
    except AnalysisException as error:
        detail = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"section selection: segment {segment.name}: where = {segment.where!r} cannot be evaluated "
            f"({detail}); correct the condition"
        ) from error
    return F.coalesce(inside, F.lit(False))


def _bits(flags: list[Column]) -> Column:
    total = F.lit(0).cast("bigint")
    for place, flag in enumerate(flags):
        total = total + F.when(flag, F.lit(1 << place).cast("bigint")).otherwise(F.lit(0).cast("bigint"))
    return total
