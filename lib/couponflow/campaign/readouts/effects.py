"""What a mail added to an outcome: arithmetic on the counts of two arms.

A cell counts users of an arm whose predictions are alike, an arm sums cells, an effect compares arms. Each
user is one independent row, so the intervals are closed forms (``intervals``): Newcombe for conversion rates,
Welch for money, the delta method on the log for relative lifts. What an unmailed user cannot have, such as an
open, is never compared.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from couponflow.campaign.choice import assignment
from couponflow.campaign.readouts import intervals, power
from couponflow.campaign.readouts.intervals import NAN, Interval
from couponflow.errors import ConfigError

TREAT, WITHHELD, EXPLORE = assignment.TREAT, "withheld", "explore"
WITHHELD_ARMS = (assignment.CONTROL, assignment.HOLDOUT)
#: What both sides can have. An order in the window is a conversion, whatever proves one elsewhere.
OUTCOMES = ("conversion", "revenue", "margin", "profit")
BUCKETS_PER_E = 64  # of the odds: users of a bucket differ by at most 1.6 % in them


@dataclass(frozen=True)
class Cell:
    """Users of one arm whose predicted log-odds are alike; counts and exact sums, nothing about one user.

    ``num_converted``: with an order in the window. ``revenue_amount``, ``revenue_squares``: sums over users
    of what a user paid, and of its square. ``num_before``: with an order in the window before the mail.
    ``num_mailed``: with a send; ``mailed_probability`` sums their predictions, ``mailed_conversions`` counts
    those whose send converted. ``is_selected``: chosen before anybody was withheld. ``coupon_id``: of the
    mail, or of the one that a withheld user would have got; None is the pooled one.
    """

    arm: str
    bucket: int
    num_users: int
    is_selected: bool = True
    propensity: float = NAN
    num_converted: int = 0
    revenue_amount: float = 0.0
    revenue_squares: float = 0.0
    num_before: int = 0
    num_mailed: int = 0
    mailed_probability: float = 0.0
    mailed_conversions: int = 0
    coupon_id: str | None = None


@dataclass(frozen=True)
class Arm:
    """The users of one or several arms together; ``by_coupon``: converted users of each coupon."""

    num_users: int
    num_converted: int = 0
    revenue_amount: float = 0.0
    revenue_squares: float = 0.0
    num_before: int = 0
    num_mailed: int = 0
    by_coupon: tuple[tuple[str | None, int], ...] = ()

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> "Arm":
        """Sum of cells."""
        rows = list(cells)
        by_coupon: dict[str | None, int] = {}
        for cell in rows:
            by_coupon[cell.coupon_id] = by_coupon.get(cell.coupon_id, 0) + cell.num_converted
        return cls(
            sum(cell.num_users for cell in rows),
            sum(cell.num_converted for cell in rows),
            math.fsum(cell.revenue_amount for cell in rows),
            math.fsum(cell.revenue_squares for cell in rows),
            sum(cell.num_before for cell in rows),
            sum(cell.num_mailed for cell in rows),
            tuple(sorted(by_coupon.items(), key=str)),
        )

    @property
    def rate(self) -> float:
        """Share of users who converted."""
        return self.num_converted / self.num_users if self.num_users else NAN

    @property
    def rate_variance(self) -> float:
        """Variance of a user's conversion, n - 1 in the denominator."""
        if self.num_users < 2:
            return NAN
        return self.rate * (1.0 - self.rate) * self.num_users / (self.num_users - 1)

    @property
    def revenue_mean(self) -> float:
        """Mean of what a user paid."""
        return self.revenue_amount / self.num_users if self.num_users else NAN

    @property
    def revenue_variance(self) -> float:
        """Variance of what a user paid, n - 1 in the denominator."""
        if self.num_users < 2:
            return NAN
        spread = self.revenue_squares - self.num_users * self.revenue_mean**2
        return max(0.0, spread) / (self.num_users - 1)

    def described(self) -> dict[str, Any]:
        """The arm as the record keeps it."""
        return {
            "num_users": self.num_users,
            "num_mailed": self.num_mailed,
            "num_converted": self.num_converted,
            "conversion_rate": self.rate,
            "conversion_interval": list(intervals.wilson(self.num_converted, self.num_users)),
            "revenue_amount": self.revenue_amount,
            "revenue_per_user": self.revenue_mean,
            "revenue_deviation": math.sqrt(self.revenue_variance) if self.num_users > 1 else NAN,
        }


@dataclass(frozen=True)
class Money:
    """What a conversion is worth and what the mails cost. ``costs``: delivered amounts by type, or none.

    ``coupons``: margin and discount of each coupon; the others have ``margin_amount``, ``discount_amount``.
    """

    margin_amount: float
    mail_cost_amount: float
    discount_amount: float
    costs: Mapping[str, float]
    coupons: Mapping[str | None, tuple[float, float]] = field(default_factory=dict)

    def cost(self, treat: Arm) -> float:
        """What the mails cost: as delivered, else mails and one discount per conversion of a mailed user."""
        if self.costs:
            return math.fsum(self.costs.values())
        if not treat.num_users:
            return 0.0
        margin, gain = self.margins(treat)[0], self.gains(treat)[0]
        return self.mail_cost_amount * treat.num_mailed + (margin - gain) * treat.num_users

    @property
    def has_one_margin(self) -> bool:
        """Whether a conversion brings the same margin with every coupon."""
        return all(margin == self.margin_amount for margin, _ in self.coupons.values())

    def margins(self, arm: Arm) -> tuple[float, float]:
        """Mean and variance of what a user's conversion brings before the coupon."""
        return self._moments(arm, lambda margin, discount: margin)

    def gains(self, arm: Arm) -> tuple[float, float]:
        """Mean and variance of margin less discount of a user's conversion."""
        return self._moments(arm, lambda margin, discount: margin - discount)

    def _moments(self, arm: Arm, amount: Callable[[float, float], float]) -> tuple[float, float]:
        usual = self.margin_amount, self.discount_amount
        counts = arm.by_coupon or ((None, arm.num_converted),)
        amounts = [(count, amount(*self.coupons.get(coupon_id, usual))) for coupon_id, count in counts]
        if not arm.num_users:
            return NAN, NAN
        mean = math.fsum(count * value for count, value in amounts) / arm.num_users
        squares = math.fsum(count * value**2 for count, value in amounts)
        spread = max(0.0, squares - arm.num_users * mean**2)
        return mean, spread / (arm.num_users - 1) if arm.num_users > 1 else NAN


@dataclass(frozen=True)
class Effect:
    """What one mail added to one outcome, per user of arm treat."""

    outcome: str
    treated: float
    withheld: float
    interval: Interval
    standard_error: float
    lift: float
    lift_interval: Interval
    method: str

    @property
    def difference(self) -> float:
        """Mean of the treated less mean of the withheld."""
        return self.treated - self.withheld

    @property
    def covers_zero(self) -> bool:
        """Whether no effect at all is among what the data allow."""
        return not (self.interval[0] > 0.0 or self.interval[1] < 0.0)

    def described(self, num_treated: int) -> dict[str, Any]:
        """The effect per user and in all, as the record keeps it."""
        return {
            "treated": self.treated,
            "withheld": self.withheld,
            "difference": self.difference,
            "interval": list(self.interval),
            "total": self.difference * num_treated,
            "total_interval": [end * num_treated for end in self.interval],
            "standard_error": self.standard_error,
            "minimum_detectable": power.DETECTABLE * self.standard_error,
            "lift": self.lift,
            "lift_interval": list(self.lift_interval),
            "covers_zero": self.covers_zero,
            "method": self.method,
        }


def effect(outcome: str, treat: Arm, withheld: Arm, money: Money) -> Effect:
    """What a mail added to ``outcome``, one of ``OUTCOMES``.

    margin = that of the coupon per converted user. profit = margin less cost: delivered costs are known
    amounts without spread, those of the config grow with the conversions of the mailed.

    Raises:
        ConfigError: another outcome, such as an open or click, which an unmailed user cannot have.
    """
    if outcome not in OUTCOMES:
        raise ConfigError(
            f"outcome {outcome!r}: a user without mail cannot have it, so a control says nothing about it; "
            f"use one of {', '.join(OUTCOMES)}"
        )
    if outcome == "revenue":
        means = treat.revenue_mean, withheld.revenue_mean
        return _mean_effect(
            outcome, means, (treat.revenue_variance, withheld.revenue_variance), treat, withheld
        )
    cost = money.cost(treat) / treat.num_users if outcome == "profit" and treat.num_users else 0.0
    is_margin = outcome == "margin"
    if outcome == "profit" and not money.costs:
        (gain, spread), (margin, other) = money.gains(treat), money.margins(withheld)
        sent = treat.num_mailed / treat.num_users if treat.num_users else NAN
        means = gain - money.mail_cost_amount * sent, margin
        return _without_lift(_mean_effect(outcome, means, (spread, other), treat, withheld))
    if outcome != "conversion" and not money.has_one_margin:
        (margin, spread), (without, other) = money.margins(treat), money.margins(withheld)
        found = _mean_effect(outcome, (margin - cost, without), (spread, other), treat, withheld)
        return found if is_margin else _without_lift(found)
    rate = _rate_effect(treat, withheld)
    if outcome == "conversion":
        return rate
    scale = money.margin_amount
    return Effect(
        outcome,
        scale * rate.treated - cost,
        scale * rate.withheld,
        (scale * rate.interval[0] - cost, scale * rate.interval[1] - cost),
        scale * rate.standard_error,
        rate.lift if is_margin else NAN,
        rate.lift_interval if is_margin else (NAN, NAN),
        rate.method,
    )


def _without_lift(found: Effect) -> Effect:
    """Relative to what may be negative a difference says nothing."""
    return replace(found, lift=NAN, lift_interval=(NAN, NAN))


def _rate_effect(treat: Arm, withheld: Arm) -> Effect:
    errors = _squared_errors((treat.rate_variance, withheld.rate_variance), treat, withheld)
    return Effect(
        "conversion",
        treat.rate,
        withheld.rate,
        intervals.share_difference(
            treat.num_converted, treat.num_users, withheld.num_converted, withheld.num_users
        ),
        math.sqrt(sum(errors)),
        *intervals.lift(treat.rate, withheld.rate, errors),
        "Newcombe; lift: delta method on the log",
    )


def _mean_effect(
    outcome: str, means: tuple[float, float], variances: tuple[float, float], treat: Arm, withheld: Arm
) -> Effect:
    errors = _squared_errors(variances, treat, withheld)
    sizes = treat.num_users, withheld.num_users
    return Effect(
        outcome,
        *means,
        intervals.mean_difference(means[0] - means[1], errors, sizes),
        math.sqrt(sum(errors)),
        *intervals.lift(*means, errors),
        "Welch; lift: delta method on the log",
    )


def _squared_errors(variances: tuple[float, float], treat: Arm, withheld: Arm) -> Interval:
    sizes = treat.num_users, withheld.num_users
    first, second = (value / size if size else NAN for value, size in zip(variances, sizes, strict=True))
    return first, second
