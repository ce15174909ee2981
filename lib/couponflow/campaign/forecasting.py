"""How far chance alone may carry a forecast: 95 % intervals of conversions, cost and profit of a mail.

Each mailed user converts or not, on his own, with his calibrated probability p: the conversions are a sum of
independent Bernoulli variables (Poisson binomial) of variance sum p (1 - p). A conversion adds an amount of
the user's coupon to cost (its discount) and profit (margin less discount), so that their variances are sums
of amount^2 p (1 - p). Interval: mean +- (z sd + a / 2), z the normal .975 quantile, a the largest amount
that one conversion adds. The half step is the continuity correction of the normal approximation; with it the
interval holds at least the stated share of the outcomes of short lists too. It never leaves what is possible.

A wrong model is not in these intervals: they take every p as true.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column
from pyspark.sql import functions as F

from couponflow.campaign.choice import options
from couponflow.campaign.choice.options import MICRO
from couponflow.campaign.readouts import intervals
from couponflow.campaign.readouts.intervals import Interval
from couponflow.campaigning import SelectionConfig

NANO = 1_000_000_000  # p (1 - p) is summed in these units, so that sums are order-free
COVERS = (
    "The 95 % intervals cover chance alone: which of the mailed users convert, each on his own, if every "
    "probability is right. The error of the model (its calibration) comes on top of them."
)
NO_PROFIT = (
    "Profit has no interval: it counts conversions that would not have come without the mail, and no record "
    "tells how a user's outcomes with and without it go together."
)


@dataclass(frozen=True)
class Spread:
    """The mailed users of one coupon: how many, and their sum of p (1 - p) in billionths."""

    num_users: int
    variance_nano: int


def spread_columns(section: SelectionConfig) -> list[Column]:
    """Aggregates over decided users: ``num_users_j`` and ``variance_nano_j`` of each of ``options.coupons``.

    Needs ``coupon_id`` (null = pooled) and ``conversion_probability`` of a mail with that coupon (null
    counts as 0). Sums of whole numbers: equal in any order of the rows. Read back by ``spreads``.
    """
    p = F.coalesce("conversion_probability", F.lit(0.0))
    variance = options.times(p * (F.lit(1.0) - p), NANO)
    columns = []
    for place, coupon_id in enumerate(options.coupon_ids(section)):
        has_coupon = F.col("coupon_id").eqNullSafe(coupon_id)
        columns += [
            F.count_if(has_coupon).alias(f"num_users_{place}"),
            F.sum(F.when(has_coupon, variance).otherwise(0)).alias(f"variance_nano_{place}"),
        ]
    return columns


def spreads(sums: Sequence[Mapping[str, Any]], section: SelectionConfig) -> list[Spread]:
    """What ``spread_columns`` gave, added up over some groups of users; one per coupon."""
    return [
        Spread(
            sum(int(row[f"num_users_{place}"]) for row in sums),
            sum(int(row[f"variance_nano_{place}"]) for row in sums),
        )
        for place, _ in enumerate(options.coupons(section))
    ]


def interval(mean: float, fixed: int, amounts: Sequence[int], parts: Sequence[Spread]) -> Interval:
    """The interval of ``fixed`` + the amounts of all conversions, in the unit of the amounts.

    ``amounts`` j is what a conversion with coupon j adds, negative where it loses; ``parts`` its users.
    A sum that cannot vary is a point.
    """
    square_nano = sum(amount**2 * part.variance_nano for amount, part in zip(amounts, parts, strict=True))
    if not square_nano:
        return mean, mean
    step = max(abs(a) for a, part in zip(amounts, parts, strict=True) if part.variance_nano)
    width = intervals.Z * math.sqrt(square_nano / NANO) + step / 2
    least = fixed + sum(min(0, a) * part.num_users for a, part in zip(amounts, parts, strict=True))
    most = fixed + sum(max(0, a) * part.num_users for a, part in zip(amounts, parts, strict=True))
    return max(mean - width, float(least)), min(mean + width, float(most))


def conversions(mean: float, parts: Sequence[Spread]) -> tuple[int, int]:
    """The whole numbers of conversions inside their interval."""
    low, high = interval(mean, 0, [1] * len(parts), parts)
    first, last = math.ceil(low), math.floor(high)
    # A mean that is rounding alone, such as a millionth without variance, lies between two whole numbers.
    return (first, last) if first <= last else (round(mean), round(mean))


def intervals_of(sums: Sequence[Mapping[str, Any]], section: SelectionConfig) -> dict[str, Any]:
    """The facts of a forecast's intervals, each ``[lower, upper]``, named by their expected values.

    ``sums``: groups of mailed users with ``num_users``, ``cost`` and ``value`` (micro-units), ``conversions``
    (billionths) and the columns of ``spread_columns``. Amounts in the configured currency. Profit has none
    (null) for objective incremental_profit; ``forecast_words`` says why, and what the intervals cover.
    """
    parts = spreads(sums, section)
    mail = options.micro(section.mail_cost_amount) * sum(int(row["num_users"]) for row in sums)
    offers = options.coupons(section)
    discounts = [options.micro(coupon.discount_amount) for coupon in offers]
    margins = [options.micro(options.margin_amount(coupon, section)) for coupon in offers]
    gains = [margin - discount for margin, discount in zip(margins, discounts, strict=True)]
    cost, value = (float(sum(int(row[name]) for row in sums)) for name in ("cost", "value"))
    expected = sum(int(row["conversions"]) for row in sums) / NANO
    has_profit = section.objective != "incremental_profit"
    return {
        "expected_conversions_interval": list(conversions(expected, parts)),
        "expected_cost_amount_interval": _amounts(interval(cost, mail, discounts, parts)),
        "expected_profit_amount_interval": _amounts(interval(value, -mail, gains, parts))
        if has_profit
        else None,
        "forecast_words": COVERS if has_profit else f"{COVERS} {NO_PROFIT}",
    }


def _amounts(ends: Interval) -> list[float]:
    return [end / MICRO for end in ends]
