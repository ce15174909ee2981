"""Who is withheld: arms by salted hash, the same for everyone who asks, with the propensity logged.

An arm is a pure function of (salt, campaign, user): no draw, no state, so that growth of the list or a rerun
never moves a user. The global holdout does not depend on the campaign; a user in it is never mailed by any.
Selection runs first over all eligible users; treatment, control and holdout are dealt among the selected, so
that selected-and-mailed and selected-and-withheld users are comparable. Of the eligible users who were not
selected, a share is mailed at random (arm explore), nobody of the holdout among them.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.campaigning import SelectionConfig

TREAT, CONTROL, HOLDOUT, EXPLORE, NONE = "treat", "control", "holdout", "explore", "none"
ARMS = (TREAT, CONTROL, HOLDOUT, EXPLORE, NONE)
#: Arms whose users get the mail.
MAILED = (TREAT, EXPLORE)
#: A sample-ratio mismatch: with a smaller p-value the arms are not what was intended.
SRM_LIMIT = 0.001

_BITS = 53  # what a double holds exactly; the other 11 of the 8 bytes are dropped


def unit_hash(salt: str, user_id: str) -> float:
    """Map a user to [0, 1): first 8 bytes of SHA-256 of ``salt|user_id``, big-endian, top 53 bits."""
    head = hashlib.sha256(f"{salt}|{user_id}".encode()).digest()[:8]
    return (int.from_bytes(head, "big") >> (64 - _BITS)) / float(1 << _BITS)


def unit_hash_column(salt: str, user_id: Column) -> Column:
    """``unit_hash`` as a Spark expression: equal bit for bit."""
    text = F.sha2(F.concat(F.lit(f"{salt}|"), user_id), 256)
    # conv to base -10 gives the signed reading, which a bigint holds; the unsigned one would overflow.
    bits = F.conv(F.substring(text, 1, 16), 16, -10).cast("bigint")
    return F.shiftrightunsigned(bits, 64 - _BITS) / F.lit(float(1 << _BITS))


def tie_key(campaign_id: str, user_id: str) -> str:
    """Order among equals: first 8 bytes of SHA-256 of ``campaign_id:user_id`` as 16 hex digits."""
    return hashlib.sha256(f"{campaign_id}:{user_id}".encode()).hexdigest()[:16]


def tie_key_column(campaign_id: str, user_id: Column) -> Column:
    """``tie_key`` as a Spark expression; text order equals number order."""
    return F.substring(F.sha2(F.concat(F.lit(f"{campaign_id}:"), user_id), 256), 1, 16)


def deal_arm(campaign_id: str, user_id: str, section: SelectionConfig, is_selected: bool = True) -> str:
    """The arm of an eligible user, selected or not."""
    is_holdout = unit_hash(_holdout_salt(section), user_id) < section.holdout_share
    is_control = unit_hash(_control_salt(section, campaign_id), user_id) < section.control_share
    is_explored = unit_hash(_explore_salt(section, campaign_id), user_id) < _explored_share(section)
    if is_selected:
        return HOLDOUT if is_holdout else CONTROL if is_control else TREAT
    return EXPLORE if is_explored and not is_holdout else NONE


def propensity(arm: str, section: SelectionConfig) -> float:
    """Probability of an arm: of treat, control and holdout for a selected user, of explore and none for an
    eligible one who was not selected. Each of the two adds up to 1; among several coupons, that of explore is
    of the one coupon that was drawn.
    """
    mailed = 1.0 - section.holdout_share
    explored = mailed * _explored_share(section)
    return {
        HOLDOUT: section.holdout_share,
        CONTROL: mailed * section.control_share,
        TREAT: mailed * (1.0 - section.control_share),
        EXPLORE: explored / max(1, len(explored_coupons(section))),
        NONE: 1.0 - explored,
    }[arm]


def explored_coupons(section: SelectionConfig) -> tuple[int, ...]:
    """Places of the coupons that mails at random may carry: those in stock; the pooled one has place 0."""
    if not section.coupons:
        return (0,)
    return tuple(place for place, coupon in enumerate(section.coupons) if coupon.stock != 0)


def _explored_share(section: SelectionConfig) -> float:
    """No coupon, no mail at random."""
    return section.explore_share if explored_coupons(section) else 0.0


def is_drawn(campaign_id: str, user_id: Column, section: SelectionConfig) -> Column:
    """Whether a user is mailed at random if he is eligible and not selected."""
    is_holdout = unit_hash_column(_holdout_salt(section), user_id) < section.holdout_share
    return ~is_holdout & (
        unit_hash_column(_explore_salt(section, campaign_id), user_id) < _explored_share(section)
    )


def with_arm(users: DataFrame, campaign_id: str, section: SelectionConfig) -> DataFrame:
    """Add ``arm`` and ``propensity`` to each user.

    Grain: one row per ``user_id``, as given. Needs ``is_eligible`` and ``would_select``.
    Rule: ``deal_arm``; holdout before control before treat, explore before none. A user who is not eligible
        gets arm none with propensity 1: nothing was drawn.
    """
    user = F.col("user_id")
    is_holdout = unit_hash_column(_holdout_salt(section), user) < section.holdout_share
    is_control = unit_hash_column(_control_salt(section, campaign_id), user) < section.control_share
    is_selected = F.coalesce("would_select", F.lit(False))
    arm = (
        F.when(~F.col("is_eligible"), NONE)
        .when(~is_selected & is_drawn(campaign_id, user, section), EXPLORE)
        .when(~is_selected, NONE)
        .when(is_holdout, HOLDOUT)
        .when(is_control, CONTROL)
        .otherwise(TREAT)
    )
    drawn = F.when(F.col("is_eligible"), _by_arm(lambda a: propensity(a, section))).otherwise(F.lit(1.0))
    return users.withColumn("arm", arm).withColumn("propensity", drawn)


def srm_p_value(counts: dict[str, int], section: SelectionConfig) -> float:
    """How likely the sizes of treat, control and holdout are, had they been dealt in their shares.

    Pearson's chi-square over the arms that have a share; 1 where there is nothing to compare. Below
    ``SRM_LIMIT`` no comparison of the arms can be trusted.
    Approximate: good from about five expected users per arm. ``counts`` may lack an arm.
    """
    from scipy.special import chdtrc

    arms = (TREAT, CONTROL, HOLDOUT)
    total = sum(counts.get(arm, 0) for arm in arms)
    expected = {arm: total * propensity(arm, section) for arm in arms}
    if any(counts.get(arm, 0) and not expected[arm] for arm in arms):
        return 0.0
    compared = [arm for arm in arms if expected[arm]]
    if len(compared) < 2:
        return 1.0
    statistic = sum((counts.get(arm, 0) - expected[arm]) ** 2 / expected[arm] for arm in compared)
    return float(chdtrc(len(compared) - 1, statistic))


def _by_arm(value: Callable[[str], Any]) -> Column:
    column = F.lit(None)
    for arm in ARMS:
        column = F.when(F.col("arm") == arm, F.lit(value(arm))).otherwise(column)
    return column


def _holdout_salt(section: SelectionConfig) -> str:
    return f"{section.salt}|holdout"


def _control_salt(section: SelectionConfig, campaign_id: str) -> str:
    return f"{section.salt}|{campaign_id}"


def _explore_salt(section: SelectionConfig, campaign_id: str) -> str:
    return f"{section.salt}|explore|{campaign_id}"
