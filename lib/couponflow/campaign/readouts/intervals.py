"""Intervals and tail probabilities of two independent groups, from counts, means and variances alone.

All intervals are two-sided at 95 %. A value that does not exist (an empty group, a ratio to nothing) is NaN.
"""

import math
from statistics import NormalDist

Interval = tuple[float, float]

_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(0.975)
NAN = float("nan")
NONE: Interval = (NAN, NAN)


def normal_cdf(value: float) -> float:
    """Chance that a standard normal value lies at or below ``value``."""
    return _NORMAL.cdf(value)


def two_sided(z: float) -> float:
    """Chance of a standard normal value at least as far from 0; exact in the tails, NaN for NaN."""
    return math.erfc(abs(z) / math.sqrt(2.0))


def chi_square_tail(value: float, degrees: int) -> float:
    """Chance that a chi-square value of ``degrees`` degrees of freedom is at least ``value``.

    Q(k + 2) = Q(k) + (x/2)^(k/2) e^(-x/2) / Gamma(k/2 + 1), from Q(1) = erfc(sqrt(x/2)), Q(2) = e^(-x/2).
    """
    half = value / 2.0
    known = 2 - degrees % 2
    tail = math.erfc(math.sqrt(half)) if known == 1 else math.exp(-half)
    while known < degrees:
        tail += half ** (known / 2) * math.exp(-half) / math.gamma(known / 2 + 1)
        known += 2
    return min(1.0, tail)


def t_quantile(degrees: float) -> float:
    """The .975 quantile of Student's t, by the Cornish-Fisher series; 1e-4 off at 10 degrees, 1e-7 at 60."""
    z, n = Z, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def wilson(num_hits: float, num_users: float) -> Interval:
    """Score interval of a share (Wilson 1927): sound at few hits, and never outside 0 to 1."""
    if num_users <= 0:
        return NONE
    share, square = num_hits / num_users, Z * Z / num_users
    middle = share + square / 2
    width = Z * math.sqrt(share * (1.0 - share) / num_users + square / (4 * num_users))
    return max(0.0, (middle - width) / (1 + square)), min(1.0, (middle + width) / (1 + square))


def share_difference(hits: int, users: int, other_hits: int, other_users: int) -> Interval:
    """Interval of the first share less the second, from their Wilson intervals (Newcombe 1998, method 10).

    Unlike the plain normal one it keeps its level at few hits, and is no point where both groups have none.
    """
    if min(users, other_users) <= 0:
        return NONE
    share, other = hits / users, other_hits / other_users
    (low, high), (other_low, other_high) = wilson(hits, users), wilson(other_hits, other_users)
    difference = share - other
    return (
        difference - math.hypot(share - low, other_high - other),
        difference + math.hypot(high - share, other - other_low),
    )


def share_ratio(hits: int, users: int, other_hits: int, other_users: int) -> Interval:
    """Interval of the first share over the second, from their Wilson intervals (Donner and Zou 2012).

    It needs no correction at few hits: 0 of the first gives a lower end of 0, 0 of the second an infinite
    upper one. The lower end is multiplied out, so that it is no difference of nearly equal numbers.
    """
    if min(users, other_users) <= 0 or hits + other_hits <= 0:
        return NONE
    share, other = hits / users, other_hits / other_users
    (low, high), (other_low, other_high) = wilson(hits, users), wilson(other_hits, other_users)
    product, lower, upper = share * other, 0.0, math.inf
    if hits:
        part = low * (2 * share - low)
        root = math.sqrt(max(0.0, product**2 - part * other_high * (2 * other - other_high)))
        lower = part / (product + root)
    if other_hits:
        part = other_low * (2 * other - other_low)
        root = math.sqrt(max(0.0, product**2 - part * high * (2 * share - high)))
        upper = (product + root) / part
    return lower, upper


def ratio_to_whole(hits: int, users: int, all_hits: int, all_users: int) -> tuple[float, Interval]:
    """Share of a group over the share of the whole that it is a part of, with its interval.

    For a part w of all users and the ratio r to the rest it is r / (w r + 1 - w), which grows with r: the
    interval is that of ``share_ratio`` against the rest, mapped. It ends at 1 / w, where the rest has no hit.
    """
    if users <= 0 or all_hits <= 0:
        return NAN, NONE
    ratio, part = hits / users / (all_hits / all_users), users / all_users
    if users == all_users:
        return 1.0, (1.0, 1.0)
    low, high = share_ratio(hits, users, all_hits - hits, all_users - users)
    return ratio, (
        low / (part * low + 1.0 - part),
        1.0 / part if math.isinf(high) else high / (part * high + 1.0 - part),
    )


def mean_difference(difference: float, squared_errors: Interval, sizes: tuple[int, int]) -> Interval:
    """Welch's interval of a difference of means with the squared standard error of each group's mean."""
    first, second = squared_errors
    if min(sizes) < 2:
        return NONE
    total = first + second
    if total == 0.0:
        return difference, difference
    degrees = total**2 / (first**2 / (sizes[0] - 1) + second**2 / (sizes[1] - 1))
    width = t_quantile(degrees) * math.sqrt(total)
    return difference - width, difference + width


def lift(mean: float, other: float, squared_errors: Interval) -> tuple[float, Interval]:
    """First mean over the second less 1, with its interval by the delta method on the log of the ratio.

    NaN where a mean is not positive. Variance of the log: sum of squared error over squared mean.
    """
    if not (mean > 0.0 and other > 0.0):
        return (mean / other - 1.0 if other > 0.0 else NAN), NONE
    width = Z * math.sqrt(squared_errors[0] / mean**2 + squared_errors[1] / other**2)
    ratio = mean / other
    return ratio - 1.0, (ratio * math.exp(-width) - 1.0, ratio * math.exp(width) - 1.0)
