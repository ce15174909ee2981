"""What a campaign's mails really caused: selected-and-mailed against selected-and-withheld users.

The users of a ledger's arms, what they ordered in one window that is the same for all of them, and what they
ordered before it. Users stand in the arm that they were dealt, mailed or not, so that nothing which happened
after the deal can tilt the comparison. What must hold before anybody looks at an effect is checked first.

The global holdout never gets any mail, so its users may differ in what they did before; whether the deal
looks random is therefore asked of mailed users and campaign control only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from couponflow.campaign.choice import assignment
from couponflow.campaign.readouts import intervals, power
from couponflow.campaign.readouts.effects import (
    EXPLORE,
    OUTCOMES,
    TREAT,
    WITHHELD,
    WITHHELD_ARMS,
    Arm,
    Cell,
    Effect,
    Money,
    effect,
)
from couponflow.campaign.readouts.intervals import NAN
from couponflow.training import metrics

MIN_USERS = 100
#: A check that a sound campaign fails once in a thousand times.
MIN_P_VALUE = 0.001
#: Above this share of withheld users who got the mail all the same, they are no control.
MAX_MAILED_SHARE = 0.01


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
