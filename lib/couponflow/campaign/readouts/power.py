"""How small an effect a campaign can show: two-sided test at 5 %, power 80 %, two arms of any sizes.

An effect is what a mail adds per mailed user: a difference of conversion rates, or of money means. The
difference of two arms has the squared standard error ``var_treat / num_treat + var_withheld / num_withheld``;
an effect of ``(z.975 + z.80)`` standard errors is found in 80 % of campaigns.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from couponflow.campaign.readouts.intervals import NAN, Z, normal_cdf
from couponflow.errors import ConfigError

POWER = 0.8
#: 2.8016 standard errors: the smallest effect that is found with ``POWER``.
DETECTABLE = Z + NormalDist().inv_cdf(POWER)


@dataclass(frozen=True)
class Arms:
    """Users who are mailed, and users who are selected and withheld."""

    num_treat: int
    num_withheld: int

    @property
    def can_show(self) -> bool:
        """Whether there is anybody on both sides."""
        return min(self.num_treat, self.num_withheld) > 0

    @property
    def inverse(self) -> float:
        """1 / num_treat + 1 / num_withheld."""
        return 1.0 / self.num_treat + 1.0 / self.num_withheld


def check_rate(name: str, rate: float) -> None:
    """Refuse what is no share strictly between 0 and 1.

    Raises:
        ConfigError: naming the argument.
    """
    if not 0.0 < rate < 1.0:
        raise ConfigError(f"{name} {rate:g}: expected a share between 0 and 1, both excluded")


def smallest_rate_effect(base_rate: float, arms: Arms) -> float:
    """The smallest rise of a conversion rate that is found with power 80 %; NaN if none can be.

    With b = base_rate and z = ``DETECTABLE`` the effect d solves
    d^2 = z^2 ((b + d)(1 - b - d) / num_treat + b (1 - b) / num_withheld): the positive root of
    (1 + z^2/num_treat) d^2 - z^2 (1 - 2b) / num_treat d - z^2 b (1 - b) (1/num_treat + 1/num_withheld) = 0.
    """
    check_rate("base rate", base_rate)
    if not arms.can_show:
        return NAN
    square = DETECTABLE**2
    a = 1.0 + square / arms.num_treat
    b = -square * (1.0 - 2.0 * base_rate) / arms.num_treat
    c = -square * base_rate * (1.0 - base_rate) * arms.inverse
    root = (-b + math.sqrt(b * b - 4.0 * a * c)) / (2.0 * a)
    return root if base_rate + root <= 1.0 else NAN


def smallest_mean_effect(standard_deviation: float, arms: Arms) -> float:
    """The smallest difference of means found with power 80 %: z sd sqrt(1/num_treat + 1/num_withheld)."""
    return DETECTABLE * standard_deviation * math.sqrt(arms.inverse) if arms.can_show else NAN


def rate_power(effect: float, base_rate: float, arms: Arms) -> float:
    """Chance that a campaign of these arms shows an ``effect`` on a conversion rate; NaN without arms.

    Phi(d/se - z.975) + Phi(-d/se - z.975); at no effect that is the 5 % of false alarms.
    """
    check_rate("base rate", base_rate)
    check_rate("base rate with the effect", base_rate + effect)
    if not arms.can_show:
        return NAN
    treated = base_rate + effect
    variance = treated * (1.0 - treated) / arms.num_treat
    variance += base_rate * (1.0 - base_rate) / arms.num_withheld
    return _power(effect / math.sqrt(variance))


def mean_power(effect: float, standard_deviation: float, arms: Arms) -> float:
    """Chance that a campaign of these arms shows a difference of means; NaN without arms."""
    return _power(effect / (standard_deviation * math.sqrt(arms.inverse))) if arms.can_show else NAN


def _power(standard_errors: float) -> float:
    return normal_cdf(standard_errors - Z) + normal_cdf(-standard_errors - Z)


def users_for_rate(effect: float, base_rate: float, withheld_share: float) -> int:
    """Selected users, mailed and withheld together, that show ``effect`` with power 80 %.

    z^2 / d^2 ((b + d)(1 - b - d) / (1 - w) + b (1 - b) / w), rounded up, with w = withheld_share.
    """
    check_rate("base rate", base_rate)
    check_rate("base rate with the effect", base_rate + effect)
    treated = base_rate + effect
    return _users(effect, treated * (1.0 - treated), base_rate * (1.0 - base_rate), withheld_share)


def users_for_mean(effect: float, standard_deviation: float, withheld_share: float) -> int:
    """Selected users that show a difference of means with power 80 %: z^2 sd^2 / (d^2 w (1 - w))."""
    return _users(effect, standard_deviation**2, standard_deviation**2, withheld_share)


def _users(effect: float, treated_variance: float, variance: float, withheld_share: float) -> int:
    check_rate("withheld share", withheld_share)
    if not effect:
        raise ConfigError("wanted effect 0: no number of users shows that; give one that matters")
    spread = treated_variance / (1.0 - withheld_share) + variance / withheld_share
    return math.ceil(DETECTABLE**2 * spread / effect**2 - 1e-9)
