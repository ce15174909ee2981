"""Mails at random beside the choice: who is drawn, with which coupon, and what that takes from the limits.

Of the eligible users who are not selected a share gets the mail (``assignment``), with one of the coupons in
stock, each as likely as the others. What the drawn ones need is set aside before anybody is selected, so that
selected and drawn users together stay within every limit.
"""

from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.campaign.choice import assignment, options
from couponflow.campaign.choice.options import MICRO
from couponflow.campaigning import SelectionConfig
from couponflow.errors import ConfigError


def drawn_coupon(campaign_id: str, user_id: str, section: SelectionConfig) -> int:
    """The place, among ``options.coupons``, of the coupon that a user gets if he is mailed at random."""
    places = assignment.explored_coupons(section)
    return places[int(assignment.unit_hash(_salt(section, campaign_id), user_id) * len(places))]


def left_over(users: DataFrame, campaign_id: str, section: SelectionConfig) -> SelectionConfig:
    """The limits that are left to the selection once every eligible user drawn is paid for.

    Grain: one row per ``user_id``; ``reason`` is null for the eligible.
    Rule: budget, list size, stock of each coupon and maximum of each segment shrink by what the drawn take.
        Who is drawn and then selected on his merits is paid for twice, so the list stays within its limits
        and may fall short of them by that.
    Cost: a pass over the users where ``explore_share`` is above 0.

    Raises:
        ConfigError: the drawn need more than a limit allows, or leave a segment less than its minimum.
    """
    if not section.explore_share:
        return section
    offers = options.coupons(section)
    place = _drawn_place(campaign_id, section)
    cost = options.of_place(place, [options.cost(coupon, section) for coupon in offers], F.lit(None))
    eligible = users.where(F.col("reason").isNull())
    inside = [options.condition(eligible, segment) for segment in section.segments]
    sums = [F.count(F.lit(1)).alias("num_users"), F.sum(cost.cast("decimal(38,0)")).alias("cost")]
    sums += [F.count_if(place == number).alias(f"coupon_{number}") for number in range(len(offers))]
    sums += [F.count_if(condition).alias(f"segment_{number}") for number, condition in enumerate(inside)]
    is_drawn = assignment.is_drawn(campaign_id, F.col("user_id"), section)
    found = eligible.where(is_drawn).agg(*sums).collect()[0]
    return _less(section, campaign_id, found.asDict())


def _less(section: SelectionConfig, campaign_id: str, found: dict[str, Any]) -> SelectionConfig:
    num_users, cost = int(found["num_users"]), int(found["cost"] or 0)
    drawn = (
        f"campaign {campaign_id}: selection.explore_share = {section.explore_share} draws {num_users} users "
        f"for {cost / MICRO:.2f}"
    )

    def rest(limit: int, used: int, name: str, least: int = 0) -> int:
        if limit - used < least:
            needed = f" with at least {least} selected" if least else ""
            raise ConfigError(f"{drawn}: {used} of {name}{needed}, which allows {limit}; lower it")
        return limit - used

    size = rest(section.max_recipients, num_users, "selection.max_recipients")
    budget = options.micro(section.budget_amount)
    if budget < cost:
        raise ConfigError(f"{drawn}, above selection.budget_amount {section.budget_amount}; lower it")
    coupons = tuple(
        coupon
        if coupon.stock is None
        else coupon.model_copy(
            update={
                "stock": rest(coupon.stock, found[f"coupon_{n}"], f"the stock of coupon {coupon.coupon_id}")
            }
        )
        for n, coupon in enumerate(section.coupons)
    )
    segments = tuple(
        segment
        if segment.max_recipients is None
        else segment.model_copy(
            update={
                "max_recipients": rest(
                    segment.max_recipients,
                    found[f"segment_{n}"],
                    f"segment {segment.name}",
                    segment.min_recipients,
                )
            }
        )
        for n, segment in enumerate(section.segments)
    )
    changed = {"max_recipients": size, "budget_amount": (budget - cost) / MICRO}
    return section.model_copy(update=changed | {"coupons": coupons, "segments": segments})


def with_drawn_coupon(dealt: DataFrame, campaign_id: str, section: SelectionConfig) -> DataFrame:
    """Give the users of arm explore the coupon that was drawn, with its probability, cost and value.

    Grain: one row per ``user_id``, as given; everybody else keeps what he has.
    """
    place = F.when(F.col("arm") == assignment.EXPLORE, _drawn_place(campaign_id, section))
    names = ("coupon_id", "cost_micro", "value_micro", "conversion_probability")
    return dealt.withColumns(options.mail_columns(place, section, {name: F.col(name) for name in names}))


def _drawn_place(campaign_id: str, section: SelectionConfig) -> Column:
    """``drawn_coupon`` as a Spark expression: equal bit for bit."""
    places = assignment.explored_coupons(section)
    draw = assignment.unit_hash_column(_salt(section, campaign_id), F.col("user_id"))
    return options.of_place(F.floor(draw * len(places)), [F.lit(place) for place in places], F.lit(None))


def _salt(section: SelectionConfig, campaign_id: str) -> str:
    return f"{section.salt}|explored coupon|{campaign_id}"
