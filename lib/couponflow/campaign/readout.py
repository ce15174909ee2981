"""What a campaign's mails really caused: selected-and-mailed against selected-and-withheld users.

Pure arithmetic on counts: the users of a ledger's arms, what they ordered in one window that is the same for
all of them, and what they ordered before it. Users stand in the arm that they were dealt, mailed or not, so
that nothing which happened after the deal can tilt the comparison. Each user is one independent row, so the
intervals are closed forms (``intervals``): Newcombe for conversion rates, Welch for money, the delta method
on the log for relative lifts. What an unmailed user cannot have, such as an open, is never compared.

The global holdout never gets any mail, so its users may differ in what they did before; whether the deal
looks random is therefore asked of mailed users and campaign control only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from couponflow.campaign import assignment, intervals, power
from couponflow.campaign.intervals import NAN, Interval
from couponflow.errors import ConfigError
from couponflow.training import metrics

TREAT, WITHHELD, EXPLORE = assignment.TREAT, "withheld", "explore"
WITHHELD_ARMS = (assignment.CONTROL, assignment.HOLDOUT)
#: What both sides can have. An order in the window is a conversion, whatever proves one elsewhere.
OUTCOMES = ("conversion", "revenue", "margin", "profit")
MIN_USERS = 100
#: A check that a sound campaign fails once in a thousand times.
MIN_P_VALUE = 0.001
#: Above this share of withheld users who got the mail all the same, they are no control.
MAX_MAILED_SHARE = 0.01
BUCKETS_PER_E = 64  # of the odds: users of a bucket differ by at most 1.6 % in them


@dataclass(frozen=True)
class Cell:
    """Users of one arm whose predicted log-odds are alike; counts and exact sums, nothing about one user.

    ``num_converted``: with an order in the window. ``revenue_amount``, ``revenue_squares``: sums over users
    of what a user paid, and of its square. ``num_before``: with an order in the window before the mail.
    ``num_mailed``: with a send; ``mailed_probability`` sums their predictions, ``mailed_conversions`` counts
    those whose send converted. ``is_selected``: chosen before anybody was withheld.
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


@dataclass(frozen=True)
class Arm:
    """The users of one or several arms together."""

    num_users: int
    num_converted: int = 0
    revenue_amount: float = 0.0
    revenue_squares: float = 0.0
    num_before: int = 0
    num_mailed: int = 0

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> "Arm":
        """Sum of cells."""
        rows = list(cells)
        return cls(
            sum(cell.num_users for cell in rows),
            sum(cell.num_converted for cell in rows),
            math.fsum(cell.revenue_amount for cell in rows),
            math.fsum(cell.revenue_squares for cell in rows),
            sum(cell.num_before for cell in rows),
            sum(cell.num_mailed for cell in rows),
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
    """What a conversion is worth and what the mails cost. ``costs``: delivered amounts by type, or none."""

    margin_amount: float
    mail_cost_amount: float
    discount_amount: float
    costs: Mapping[str, float]

    def cost(self, treat: Arm) -> float:
        """What the mails cost: as delivered, else mails and one discount per conversion of a mailed user."""
        if self.costs:
            return math.fsum(self.costs.values())
        return self.mail_cost_amount * treat.num_mailed + self.discount_amount * treat.num_converted


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

    margin = margin_amount per converted user. profit = margin less cost: delivered costs are known amounts
    without spread, those of the config grow with the conversions of the mailed.

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
    if outcome == "profit" and not money.costs:
        gain = money.margin_amount - money.discount_amount
        sent = treat.num_mailed / treat.num_users if treat.num_users else NAN
        means = gain * treat.rate - money.mail_cost_amount * sent, money.margin_amount * withheld.rate
        variances = gain**2 * treat.rate_variance, money.margin_amount**2 * withheld.rate_variance
        return replace(
            _mean_effect(outcome, means, variances, treat, withheld), lift=NAN, lift_interval=(NAN, NAN)
        )
    rate = _rate_effect(treat, withheld)
    if outcome == "conversion":
        return rate
    scale = money.margin_amount
    cost = money.cost(treat) / treat.num_users if outcome == "profit" and treat.num_users else 0.0
    is_margin = outcome == "margin"
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


def arms(cells: Sequence[Cell]) -> dict[str, Arm]:
    """Selected users by arm, and control and holdout together as ``withheld``; exploration stands apart."""
    chosen = [cell for cell in cells if cell.is_selected and cell.arm != EXPLORE]
    names = sorted({cell.arm for cell in chosen})
    found = {name: Arm.of(cell for cell in chosen if cell.arm == name) for name in names}
    found[WITHHELD] = Arm.of(cell for cell in chosen if cell.arm in WITHHELD_ARMS)
    found.setdefault(TREAT, Arm(0))
    if explored := [cell for cell in cells if cell.arm == EXPLORE]:
        found[EXPLORE] = Arm.of(explored)
    return found


def sample_ratio(cells: Sequence[Cell]) -> dict[str, Any]:
    """Chi-square test of the arms' sizes against the propensities that the ledger logged.

    Arms of selected users, exploration included where it was dealt among them. Shares that no arm stands for
    are those of an arm that is missing. ``p_value`` is 0 where the shares cannot be: not one per arm, or
    together more than 1.
    """
    chosen = [cell for cell in cells if cell.is_selected]
    logged: dict[str, set[float]] = {}
    for cell in chosen:
        logged.setdefault(cell.arm, set()).add(cell.propensity)
    observed = {arm: sum(cell.num_users for cell in chosen if cell.arm == arm) for arm in sorted(logged)}
    shares = {arm: min(logged[arm]) for arm in observed}
    rest = 1.0 - math.fsum(shares.values())
    is_sound = all(len(known) == 1 and next(iter(known)) > 0.0 for known in logged.values()) and rest > -1e-6
    if rest > 1e-6:
        observed["missing"], shares["missing"] = 0, rest
    size = sum(observed.values())
    expected = {arm: size * share for arm, share in shares.items()}
    statistic = NAN
    p_value = 0.0
    if is_sound:
        statistic = math.fsum((observed[arm] - expected[arm]) ** 2 / expected[arm] for arm in observed)
        p_value = intervals.chi_square_tail(statistic, len(observed) - 1) if len(observed) > 1 else 1.0
    return {"observed": observed, "expected": expected, "statistic": statistic, "p_value": p_value}


def balance(cells: Sequence[Cell]) -> dict[str, Any]:
    """Whether predictions tell mailed users from campaign control: AUC, and its p-value under a random deal.

    Mann-Whitney: the AUC of two samples of one distribution has mean .5 and variance (n + m + 1) / (12 n m);
    ties make it smaller, so that the test is cautious.
    """
    rows = [cell for cell in cells if cell.is_selected and cell.arm in (TREAT, assignment.CONTROL)]
    weight = np.array([cell.num_users for cell in rows], np.float64)
    is_treated = np.array([cell.arm == TREAT for cell in rows], np.float64)
    treated, control = float(weight @ is_treated), float(weight @ (1.0 - is_treated))
    if not (treated and control):
        return {"auc": NAN, "p_value": NAN}
    area = metrics.auc(np.array([cell.bucket for cell in rows]), is_treated, weight)
    error = math.sqrt((treated + control + 1.0) / (12.0 * treated * control))
    return {"auc": area, "p_value": intervals.two_sided((area - 0.5) / error)}


def placebo(found: Mapping[str, Arm]) -> dict[str, Any]:
    """The "effect" on orders before the mail, mailed users against campaign control: there can be none."""
    treat, control = found[TREAT], found.get(assignment.CONTROL, Arm(0))
    if not (treat.num_users and control.num_users):
        return {"difference": NAN, "p_value": NAN}
    rates = treat.num_before / treat.num_users, control.num_before / control.num_users
    pooled = (treat.num_before + control.num_before) / (treat.num_users + control.num_users)
    error = math.sqrt(pooled * (1.0 - pooled) * (1.0 / treat.num_users + 1.0 / control.num_users))
    difference = rates[0] - rates[1]
    return {"difference": difference, "p_value": intervals.two_sided(difference / error) if error else 1.0}


def checks(cells: Sequence[Cell]) -> dict[str, Any]:
    """What must hold before anybody looks at an effect."""
    found = arms(cells)
    withheld = found[WITHHELD]
    return {
        "sample_ratio": sample_ratio(cells),
        "balance": balance(cells),
        "placebo": placebo(found),
        "withheld_mailed": withheld.num_mailed,
        "withheld_mailed_share": withheld.num_mailed / withheld.num_users if withheld.num_users else NAN,
    }


def refusal(found: Mapping[str, Arm], checked: Mapping[str, Any]) -> str:
    """Why the arms cannot be compared; empty where they can."""
    withheld = found[WITHHELD]
    ratio = checked["sample_ratio"]
    if not withheld.num_users and "missing" not in ratio["observed"]:
        return (
            "no randomised control: nobody who was selected was withheld; set selection.control_share above "
            "0 for the next campaign"
        )
    if checked["withheld_mailed_share"] > MAX_MAILED_SHARE:
        return (
            f"no randomised control: {withheld.num_mailed:,} of {withheld.num_users:,} withheld users got "
            "the mail, so it was not this ledger that decided who is mailed"
        )
    if ratio["p_value"] < MIN_P_VALUE:
        sizes = ", ".join(
            f"{arm} {number:,} (logged shares expect {ratio['expected'][arm]:,.0f})"
            for arm, number in ratio["observed"].items()
        )
        return (
            f"the arms have other sizes than they were dealt with, p = {ratio['p_value']:.1g}: {sizes}; "
            "find out who is missing"
        )
    small = {name: found[name].num_users for name in (TREAT, WITHHELD) if found[name].num_users < MIN_USERS}
    if small:
        name, number = next(iter(small.items()))
        return f"arm {name} has {number:,} users, fewer than {MIN_USERS}; mail or withhold more the next time"
    if checked["balance"]["p_value"] < MIN_P_VALUE:
        return (
            "the control is not random: predictions tell mailed from control users, AUC "
            f"{checked['balance']['auc']:.3f}, p = {checked['balance']['p_value']:.1g}"
        )
    if checked["placebo"]["p_value"] < MIN_P_VALUE:
        return (
            "the control is not random: before the mail the arms ordered differently, by "
            f"{_points(checked['placebo']['difference'])}, p = {checked['placebo']['p_value']:.1g}"
        )
    return ""


def measure(cells: Sequence[Cell], money: Money) -> dict[str, Any]:
    """Arms, checks, refusal or effects, cost and verdict of a campaign version; NaN where nothing exists."""
    found = arms(cells)
    checked = checks(cells)
    reason = refusal(found, checked)
    treat, withheld = found[TREAT], found[WITHHELD]
    effects = {} if reason else {name: effect(name, treat, withheld, money) for name in OUTCOMES}
    return {
        "arms": {name: arm.described() for name, arm in found.items()},
        "checks": checked,
        "refusal": reason,
        "effects": {name: one.described(treat.num_users) for name, one in effects.items()},
        "cost": {
            "amount": money.cost(treat),
            "source": "costs" if money.costs else "config",
            "by_type": dict(money.costs),
        },
        "verdict": refused(reason) if reason else verdict(effects, found, checked),
    }


def refused(reason: str) -> str:
    """The words in place of a verdict."""
    return f"What the mail caused cannot be told: {reason}."


def verdict(effects: Mapping[str, Effect], found: Mapping[str, Arm], checked: Mapping[str, Any]) -> str:
    """What the numbers say, in words."""
    rate, profit = effects["conversion"], effects["profit"]
    low, high = rate.interval
    between = f"95 % interval {_points(low)} to {_points(high)}"
    if rate.covers_zero:
        shown = power.smallest_rate_effect(
            min(max(rate.withheld, 0.5 / found[WITHHELD].num_users), 1.0 - 0.5 / found[WITHHELD].num_users),
            power.Arms(found[TREAT].num_users, found[WITHHELD].num_users),
        )
        size = "none" if math.isnan(shown) else _points(shown)
        told = (
            f"Not shown to work at this size: {_points(rate.difference)} of conversion, {between}; smallest "
            f"effect this campaign could have shown: {size}."
        )
    else:
        extra = rate.difference * found[TREAT].num_users
        word = "caused" if rate.difference > 0 else "prevented"
        told = (
            f"The mail {word} {abs(extra):,.0f} conversions: {_points(rate.difference)}, {between}. "
            + ("Profit is above 0." if profit.interval[0] > 0.0 else "")
            + ("It lost money." if profit.interval[1] < 0.0 else "")
            + ("Whether it paid is not shown." if profit.covers_zero else "")
        )
    if checked["withheld_mailed"]:
        told += f" {checked['withheld_mailed']:,} withheld users got the mail: the true effect is larger."
    return told


def _points(share: float) -> str:
    return f"{share * 100:+.2f} points"
